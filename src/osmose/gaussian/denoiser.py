"""The denoiser E[x0 | x_t]: the one quantity that every Gaussian method exchanges."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from osmose.gaussian.parametrization import Parametrization, column
from osmose.gaussian.schedule import Level, Schedule


class Denoiser(Protocol):
    """E[x0 | x_t] for a batch x_t (B, *event) at a level."""

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """The denoised batch, in the shape and dtype of x_t."""


class NetworkDenoiser(nn.Module):
    """A network read through a parametrization on a schedule."""

    def __init__(self, network: nn.Module, schedule: Schedule, parametrization: Parametrization):
        super().__init__()
        parametrization.check(schedule)
        self.network, self.schedule, self.parametrization = network, schedule, parametrization

    def output(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """The network's own output F at x_t, in the dtype of x_t."""
        c_in = self.parametrization.coefficients(level).c_in
        label = self.schedule.label(level)
        if not isinstance(label, Tensor):
            label = torch.full((len(x_t),), label, dtype=torch.float32, device=x_t.device)
        scaled = x_t if isinstance(c_in, float) and c_in == 1.0 else column(c_in, x_t) * x_t
        out: Tensor = self.network(scaled, label.to(device=x_t.device, dtype=torch.float32), condition)
        return out.to(x_t.dtype)

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """The output that would be exact for a known pair, shape (B, *event)."""
        c = self.parametrization.coefficients(level)
        if isinstance(c.target_x0, float) and c.target_x0 == 0.0:
            return eps if isinstance(c.target_eps, float) and c.target_eps == 1.0 else column(c.target_eps, eps) * eps
        return column(c.target_x0, x0) * x0 + column(c.target_eps, eps) * eps

    def forward(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """E[x0 | x_t], shape (B, *event)."""
        c = self.parametrization.coefficients(level)
        out = self.output(x_t, level, condition)
        return column(c.c_skip, x_t) * x_t + column(c.c_out, x_t) * out


class Clipped:
    """A denoiser whose result is kept inside the data's range; the solvers recompute eps from it."""

    def __init__(self, denoiser: Denoiser, low: float, high: float):
        self.denoiser, self.low, self.high = denoiser, low, high

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        return self.denoiser(x_t, level, condition).clamp(self.low, self.high)

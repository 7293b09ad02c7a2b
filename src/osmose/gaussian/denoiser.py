"""The denoiser E[x0 | x_t]: the one quantity that every Gaussian method exchanges."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from osmose.errors import UserError
from osmose.gaussian.parametrization import Parametrization, column
from osmose.gaussian.schedule import Level, Schedule


class Denoiser(Protocol):
    """E[x0 | x_t] for a batch x_t (B, *event) at a level."""

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """The denoised batch, in the shape and dtype of x_t."""


class NetworkDenoiser(nn.Module):
    """A network read through a parametrization on a schedule.

    Args:
        network: called as (x, label, condition); its output has the channels of x, or twice as many.
        schedule: the noise schedule.
        parametrization: what the output means.
        learned_variance: the second half of the output's channels is v of `learned_range` (`gaussian.chain`).
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, parametrization: Parametrization, learned_variance: bool = False
    ):
        super().__init__()
        parametrization.check(schedule)
        self.network, self.schedule, self.parametrization = network, schedule, parametrization
        self.learned_variance = learned_variance

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """What the network is given at x_t: c_in x_t, (B, *event), and the labels of the times, float32 (B,)."""
        c_in = self.parametrization.coefficients(level).c_in
        label = self.schedule.label(level)
        if not isinstance(label, Tensor):
            label = torch.full((len(x_t),), label, dtype=torch.float32, device=x_t.device)
        scaled = x_t if isinstance(c_in, float) and c_in == 1.0 else column(c_in, x_t) * x_t
        return scaled, label.to(device=x_t.device, dtype=torch.float32)

    def outputs(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The network's own output F at x_t, and w = (v + 1) / 2 of a learned variance or None: shape of x_t.

        Raises:
            UserError: a learned variance, but a network without the output for it.
        """
        out: Tensor = self.network(*self.inputs(x_t, level), condition).to(x_t.dtype)
        if not self.learned_variance:
            return out, None
        if out.shape[1] != 2 * x_t.shape[1]:
            raise UserError(
                f"variance: learned_range needs a network with two outputs for each value, {2 * x_t.shape[1]} channels "
                f"here; this one gives {out.shape[1]}: use variance=fixed_small, or a network that takes num_outputs=2"
            )
        mean, v = out.chunk(2, dim=1)
        return mean, (v + 1) / 2

    def output(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """The network's own output F at x_t, in the shape and dtype of x_t."""
        return self.outputs(x_t, level, condition)[0]

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """The output that would be exact for a known pair, shape (B, *event)."""
        c = self.parametrization.coefficients(level)
        if isinstance(c.target_x0, float) and c.target_x0 == 0.0:
            return eps if isinstance(c.target_eps, float) and c.target_eps == 1.0 else column(c.target_eps, eps) * eps
        return column(c.target_x0, x0) * x0 + column(c.target_eps, eps) * eps

    def denoised(self, output: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """E[x0 | x_t] that an output F stands for, shape (B, *event)."""
        c = self.parametrization.coefficients(level)
        return column(c.c_skip, x_t) * x_t + column(c.c_out, x_t) * output

    def forward(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        """E[x0 | x_t], shape (B, *event)."""
        return self.denoised(self.output(x_t, level, condition), x_t, level)

    def with_variance(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """E[x0 | x_t], and w of a learned variance or None, both (B, *event), from one evaluation."""
        output, share = self.outputs(x_t, level, condition)
        return self.denoised(output, x_t, level), share

    def probe(self, items: int, shape: tuple[int, ...], conditional: bool) -> None:
        """Run the network once on some input for so many items of a shape: what is counted and timed."""
        device = next(self.parameters()).device
        x = torch.randn(items, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        condition = torch.zeros(items, dtype=torch.int64, device=device) if conditional else None
        self.network(x, torch.full((items,), 500.0, device=device), condition)


class Conditioned:
    """A denoiser with its condition filled in, and its result kept inside the data's range where one is given.

    With guidance g (arXiv 2207.12598) it is D + (g - 1) (D - D without the condition), of two evaluations.

    The solvers recompute eps from what it returns.

    Attributes:
        calls: evaluations of the network so far.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        condition: Tensor | None = None,
        limits: tuple[float, float] | None = None,
        guidance: float | None = None,
    ):
        self.denoiser, self.condition, self.limits, self.guidance = denoiser, condition, limits, guidance
        self.calls = 0

    def __call__(self, x_t: Tensor, level: Level) -> Tensor:
        self.calls += 1
        return self._limited(self._guided(self.denoiser(x_t, level, self.condition), x_t, level))

    def _guided(self, x0: Tensor, x_t: Tensor, level: Level) -> Tensor:
        if self.guidance is None:
            return x0
        self.calls += 1
        return x0 + (self.guidance - 1) * (x0 - self.denoiser(x_t, level, None))

    def with_variance(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The denoised batch, and w of a learned variance."""
        self.calls += 1
        x0, share = self.denoiser.with_variance(x_t, level, self.condition)
        assert share is not None, "asked for the variance of a model that has not learned one"
        return self._limited(self._guided(x0, x_t, level)), share

    def _limited(self, x0: Tensor) -> Tensor:
        return x0 if self.limits is None else x0.clamp(*self.limits)

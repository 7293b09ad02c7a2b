"""Timestep samplers: which t a training item gets, and the weight that keeps the objective unbiased.

They are modules, so that a sampler with a memory keeps it in its buffers, and so in every checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from osmose.configuration import Config
from osmose.gaussian.draws import Draws
from osmose.gaussian.schedule import Schedule


class TimeSamplerConfig(Config, ABC):
    """Describes a law of training times."""

    kind: str
    stratified: bool = Field(
        False, description="spread the times of a batch evenly: less noise in the loss, the same expectation"
    )

    def build(self, schedule: Schedule) -> TimeSampler:
        """The sampler on a schedule."""
        return TimeSampler(self, schedule)

    @abstractmethod
    def times(self, u: Tensor, schedule: Schedule) -> Tensor:
        """The inverse distribution function: u uniform in [0, 1), float64 (B,), to t in [0, 1]."""


class TimeSampler(nn.Module):
    """Draws training times from a fixed law."""

    def __init__(self, config: TimeSamplerConfig, schedule: Schedule):
        super().__init__()
        self.config, self.schedule = config, schedule

    def draw(self, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Times, float64 (B,) on the CPU, and importance weights (B,), or None where all are 1."""
        u = draws.stratified() if self.config.stratified else draws.uniform()
        return self.config.times(u, self.schedule), None

    def observe(self, t: Tensor, per_item: Tensor) -> None:
        """Learn from the losses (B,) found at t (B,): nothing to learn for a fixed law."""


class UniformTimes(TimeSamplerConfig):
    """Uniform over the steps k/T, k = 1..T, of a discrete schedule, or over [0, 1) of a continuous one."""

    kind: Literal["uniform"] = "uniform"

    def times(self, u: Tensor, schedule: Schedule) -> Tensor:
        steps = schedule.native_steps
        return u if steps is None else ((u * steps).floor() + 1) / steps


class LogNormalTimes(TimeSamplerConfig):
    """log(sigma / alpha) ~ N(mean, std^2) (EDM, arXiv 2206.00364, table 1), limited to the schedule's range."""

    kind: Literal["log-normal"] = "log-normal"
    mean: float = -1.2
    std: float = Field(1.2, gt=0)

    def times(self, u: Tensor, schedule: Schedule) -> Tensor:
        # ndtri(0) is minus infinity; the smallest double above 0 is far beyond every schedule's range already.
        log_ratio = self.mean + self.std * torch.special.ndtri(u.clamp(min=1e-300))
        earliest = 1 / schedule.native_steps if schedule.native_steps else 0.0
        return schedule.time_of(-2 * log_ratio).clamp(min=earliest)

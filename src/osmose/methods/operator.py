r"""DSNO: a network that returns the whole trajectory of a diffusion from its noise, at M times at once.

The probability-flow ODE has a solution operator, x_T to x(t) for all t. DSNO (arXiv 2211.13449) learns it from stored
trajectories of a teacher: the teacher's network runs on M copies of x_T, copy i told the time t_i, and layers between
its residual blocks mix the copies along time (`networks.temporal`). The last time is t = 0, the sample.

The network is read at the level T of the noise, through the parametrization, as an estimate X of the data, and slice i
is the DDIM step from T to t_i with that estimate,

    G(x_T)(t_i) = (sigma_i / sigma_T) x_T + (alpha_i sigma_T - alpha_T sigma_i) / sigma_T X_i,

so that G(x_T)(T) = x_T, and at t = 0, G = X; the published network gives G itself, which makes it learn the share of
noise in every slice as well. The loss is the mean over dimensions of the absolute (or squared) error, weighted over
times by

    lambda(t) = min(max(alpha / sigma, 1), cap) / sum over the M times,

the square root of the signal-to-noise ratio. With the published cap, 10^4, the end has almost all of the weight.

A sample takes one call, which is the work of M evaluations of the network, all in parallel. The trained times are the
only ones: with others a network has to be taught anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import Draws
from osmose.gaussian.schedule import CLEAN, Level
from osmose.methods.base import GenerativeModel, SamplingConfig
from osmose.methods.chain import ProcessConfig
from osmose.methods.messages import Batch, LossTerms, Watch
from osmose.networks.copying import copy_weights
from osmose.networks.temporal import TemporalNetwork

#: The share of trajectories that is kept from training.
_HELD_OUT = 20
#: Times that differ by less are the same.
_SAME_TIME = 1e-6


class Paths(Protocol):
    """Stored trajectories of a teacher, model units."""

    @property
    def levels(self) -> tuple[Level[float], ...]:
        """Where their states are, the noise first and clean data last."""

    def __len__(self) -> int:
        """How many there are."""

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some of them, float32 (n, len(levels), *event), and their classes, int64 (n,), or None."""


class OperatorSampling(SamplingConfig):
    """One call: there is nothing to choose."""

    num_steps: int = Field(1, ge=1, le=1, description="calls of the operator")


class DSNOConfig(ProcessConfig):
    """Diffusion sampling with a neural operator."""

    kind: Literal["dsno"] = "dsno"
    num_times: int = Field(4, ge=1, description="M, the times at which the trajectory is returned")
    grid: Literal["quadratic", "even"] = Field("quadratic", description="t = (k / M)^2, or k / M, k = M - 1..0")
    modes: int = Field(2, ge=0, description="J, modes of the temporal layers, at most M / 2 + 1; 0: no such layers")
    loss: Literal["l1", "l2"] = Field("l1", description="mean absolute, or mean squared, error")
    weight_cap: float = Field(1e4, ge=1, description="largest alpha / sigma in the weight of a time")
    warm_start: bool = Field(True, description="start from the teacher's weights")
    trajectories: dict[str, Any] = Field(default_factory=dict, description="what the stored trajectories are")
    teacher_sampling: dict[str, Any] = Field(default_factory=dict, description="how the teacher drew them")
    sampling: OperatorSampling = OperatorSampling()

    @model_validator(mode="after")
    def _fits(self) -> DSNOConfig:
        most = self.num_times // 2 + 1
        if self.modes > most:
            raise ConfigError("modes", f"{self.modes} is more than {self.num_times} times have, {most}")
        if self.parametrization.kind == "eps":
            raise ConfigError("parametrization", "'eps' cannot give x0 from pure noise; use v, x0 or edm")
        return self

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:  # noqa: ARG003
        return {"precision": "fp32", "lr": 1e-3}

    def build(self, spec: DataSpec) -> DSNO:
        return DSNO(self, spec)


class DSNO(GenerativeModel):
    """See the module's text.

    Attributes:
        operator: the network with its temporal layers.
        levels: of the M times, noisiest first; the last is t = 0.
    """

    config: DSNOConfig
    _labels: Tensor
    _weights: Tensor

    def __init__(self, config: DSNOConfig, spec: DataSpec):
        super().__init__(config, spec)
        denoiser = config.denoiser(spec)
        self.operator = TemporalNetwork(denoiser.network, config.num_times, config.modes)
        count, schedule = config.num_times, config.schedule
        power = 2 if config.grid == "quadratic" else 1
        t = torch.tensor([1.0, *((k / count) ** power for k in reversed(range(count)))], dtype=torch.float64)
        if schedule.native_steps:
            t = (t * schedule.native_steps).round() / schedule.native_steps
        rows = zip(*(values.tolist() for values in schedule.level(t)), strict=True)
        self._top, *levels = (Level(*row) for row in rows)
        self.levels = tuple(levels)
        if bool((t.diff() >= 0).any()):
            raise UserError(
                f"num_times: {count} is too many for a schedule of {schedule.native_steps} steps: two times are one"
            )
        labels = torch.tensor([float(schedule.label(level)) for level in levels])
        self.register_buffer("_labels", labels, persistent=False)
        weight = torch.tensor([self._weight(level) for level in levels])
        self.register_buffer("_weights", weight / weight.sum(), persistent=False)
        self._paths: list[Paths] = []

    def _weight(self, level: Level[float]) -> float:
        """Lambda, before it is divided by the sum."""
        cap = self.config.weight_cap
        return cap if level.sigma == 0 else min(max(level.alpha / level.sigma, 1.0), cap)

    def begin(self, teacher: NetworkDenoiser, paths: Paths) -> None:
        """Give the model the trajectories of its teacher, and its weights; before training, also when taken up again.

        Raises:
            UserError: trajectories that were not stored at the model's times, or fewer than two.
        """
        self._columns = self.columns(paths.levels, len(paths))
        self._paths = [paths]
        if self.config.warm_start:
            copy_weights(teacher.network, self.operator.backbone)

    def columns(self, levels: Sequence[Level[float]], count: int) -> list[int]:
        """Which states of so many trajectories with states at some levels are those of the model's times.

        Raises:
            UserError: as `begin`.
        """
        stored, found = [level.t for level in levels], []
        for level in self.levels:
            near = [index for index, t in enumerate(stored) if abs(t - level.t) < _SAME_TIME]
            if not near:
                raise UserError(
                    f"num_times: {self.config.num_times} needs the state at t = {level.t:.6g}, which the trajectories "
                    f"do not have; theirs are {', '.join(f'{t:.4g}' for t in stored)}"
                )
            found.append(near[0])
        if count < 2:
            raise UserError(f"trajectories: {count} is not enough: one at least is held out")
        return found

    @property
    def paths(self) -> Paths:
        """The trajectories.

        Raises:
            UserError: they have not been given; training goes through `osmose distill`.
        """
        if not self._paths:
            raise UserError("dsno: has no trajectories; it is continued by osmose distill dsno RUN --out RUN2 --resume")
        return self._paths[0]

    def solve(self, x_t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The trajectory from noise at the level T, (B, *event), at all M times: (B, M, *event)."""
        top = self._top
        c = self.config.parametrization.coefficients(top)
        out = self.operator(c.c_in * x_t, self._labels, condition)
        x_t = x_t.unsqueeze(1)
        x0 = c.c_skip * x_t + c.c_out * out
        ends = (*self.levels[:-1], CLEAN)
        shape = (1, -1, *(1,) * (x0.ndim - 2))
        keep = x0.new_tensor([s.sigma / top.sigma for s in ends]).view(shape)
        gain = x0.new_tensor([s.alpha - s.sigma * top.alpha / top.sigma for s in ends]).view(shape)
        return keep * x_t + gain * x0

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        """As `GenerativeModel.loss`; of the batch only its size matters, the items are trajectories."""
        held_out = max(1, len(self.paths) // _HELD_OUT)
        first, count = (0, len(self.paths) - held_out) if self.training else (len(self.paths) - held_out, held_out)
        states, condition = self.paths.rows(first + (draws.uniform() * count).long())
        device = batch.x0.device
        states, condition = states.to(device), None if condition is None else condition.to(device)
        difference = (self.solve(states[:, 0], condition) - states[:, self._columns]).flatten(2)
        error = difference.abs().mean(2) if self.config.loss == "l1" else difference.square().mean(2)
        end = difference[:, -1].detach().square().mean(1)
        return LossTerms((error * self._weights).sum(1), None, {"end_squared_error": end})

    def networks(self) -> list[nn.Module]:
        return [self.operator]

    def probe(self, items: int) -> None:
        device = self._labels.device
        x = torch.randn(items, *self.spec.shape, generator=torch.Generator().manual_seed(0)).to(device)
        condition = torch.zeros(items, dtype=torch.int64, device=device) if self.config.conditional else None
        self.operator(x, self._labels, condition)

    def generate(
        self,
        draws: Draws,
        sampling: SamplingConfig,  # noqa: ARG002
        condition: Tensor | None,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        noise, count = self._noise(draws), self.config.num_times
        states = self.solve(noise, condition)
        on_step(0, count, noise / self._top.size)
        for step, (state, level) in enumerate(zip(states.unbind(1), (*self.levels[:-1], CLEAN), strict=True), 1):
            on_step(step, count, state / level.size)
        return states[:, -1], count

    @property
    def path_levels(self) -> tuple[Level[float], ...]:
        """Where the states of `trajectories` are, the noise first and clean data last."""
        return (self._top, *self.levels)

    def _noise(self, draws: Draws) -> Tensor:
        return self.config.noise.sample(draws, self.spec.shape) * self.config.schedule.prior_std

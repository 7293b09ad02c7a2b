r"""Consistency models: one network evaluation from any noisy point to the clean end of its trajectory.

In TrigFlow's coordinates (`gaussian.trigflow`) the model is f(x, t) = cos(t) x - sin(t) V(x, t), the form that a
denoiser has, with f(x, 0) = x; V is sd times the network. It is taught by the derivative of f along the flow of a
teacher or of the data, which should vanish (arXiv 2410.11081):

`scd`   consistency distillation in continuous time: dx/dt is the teacher's velocity.
`sct`   consistency training: dx/dt = cos(t) z - sin(t) x0, whose mean given x is the velocity.
`ect`   their discrete relative without derivatives (arXiv 2406.14548): f at t is drawn to f at an earlier time r of the
        same noise, and r comes nearer to t stage by stage; it begins with r = 0, which is diffusion training.

With the tangent g = cos(t) df/dt, taken along at a share r that rises from 0 to 1 in the first `warmup` steps,

    g = -cos(t)^2 (V - dx/dt) - r (cos(t) sin(t) x + cos(t) sin(t) dV/dt),

the loss of `scd` and `sct` is

    exp(w(t)) / D ||V / sd - (V / sd)^- - g / (||g|| + c)||^2 - w(t),

where ^- stops the gradient. Its gradient is that of the loss between neighbouring times as they meet, weighted by
1 / (sd tan t): that weight is inside g already. The learned w(t) lets every t count alike. The norm is the plain L2
norm; `norm=rms` divides it by sqrt(D), which moves the place where c bites. The value of the loss says nothing about
progress; the part `tangent` of the log, ||g|| / sqrt(D) before it is normalised, does.

Several steps: f's clean end is noised again to a smaller angle and brought back (`t_mid`). With `segments` M of the
range of angles, f_k(x, t) = cos(t - t_k) x - sin(t - t_k) V leads to the bottom t_k of the segment instead, the same
equations hold for t - t_k, and M evaluations lead to the data without fresh noise.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import Draws
from osmose.gaussian.parametrization import EDMParametrization, column
from osmose.gaussian.schedule import TrigSchedule
from osmose.gaussian.trigflow import (
    Derivative,
    NoForwardDerivativeError,
    TrigFlow,
    angle_of,
    require_forward_derivative,
    turned,
)
from osmose.methods.base import GenerativeModel, SamplingConfig
from osmose.methods.chain import ParametrizationChoice, ProcessConfig, ScheduleChoice, calibrate
from osmose.methods.messages import Batch, LossTerms, Watch
from osmose.methods.times import LogNormalTimes, TimesChoice
from osmose.networks.base import sinusoids
from osmose.networks.copying import copy_weights
from osmose.networks.presets import network_for

#: EDM's largest noise, for data of deviation 0.5: where sampling begins, if the schedule goes further.
_SIGMA_MAX = 80.0
#: A frequency of the time embedding (`networks.base`) that suits what is differentiated in time.
LOW_FREQUENCY = 0.02
#: The second angle of two-step sampling.
_T_MID = 1.1
#: Features of the angle that the learned weight is a linear function of, and their highest frequency.
_FEATURES, _FREQUENCY = 32, 0.01


class ConsistencySampling(SamplingConfig):
    """Number of steps, and where they go on from."""

    num_steps: int | None = Field(None, ge=1, description="evaluations; null: 2, or as many as there are segments")
    t_mid: tuple[float, ...] | None = Field(
        None,
        description="angles in (0, pi/2), falling, that x is noised to again after each step but the last; null: 1.1 "
        "and evenly from there to 0",
    )

    @field_validator("t_mid", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value


class ConsistencyConfig(ProcessConfig, ABC):
    """What every consistency model has: a network that is read as a denoiser, and a law of training times."""

    schedule: ScheduleChoice = TrigSchedule()
    parametrization: ParametrizationChoice = EDMParametrization()
    times: TimesChoice = LogNormalTimes(mean=-1.0, std=1.4)
    sampling: ConsistencySampling = ConsistencySampling()

    @model_validator(mode="after")
    def _bounded(self) -> ConsistencyConfig:
        if (kind := self.parametrization.kind) not in ("edm", "v"):
            raise ConfigError("parametrization", f"{kind!r} does not give f(x, 0) = x with bounded factors; use edm")
        return self

    @property
    def sigma_data(self) -> float:
        """Sd, the standard deviation of the data that TrigFlow's coordinates are made for."""
        return getattr(self.parametrization, "sigma_data", 1.0)

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:
        network = network_for(spec.shape) | {"modulation": "double-norm", "time_frequency": LOW_FREQUENCY}
        return {
            "network": network,
            "parametrization": {"kind": "edm", "sigma_data": round(data_std, 3)},
            "times": {"kind": "log-normal", "mean": -1.0, "std": 1.4, "stratified": True},
        }

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:  # noqa: ARG003
        return {"precision": "fp32", "lr": 1e-3}

    @abstractmethod
    def build(self, spec: DataSpec) -> Consistency:
        """As `MethodConfig.build`."""


class TangentConfig(ConsistencyConfig, ABC):
    """Consistency in continuous time: how the tangent is computed and tamed."""

    warmup: int = Field(500, ge=0, description="steps over which the tangent's second part comes in; 0: at once")
    tangent: Literal["normalize", "clip", "none"] = Field(
        "normalize", description="g / (||g|| + c), each value kept in [-1, 1], or g as it is"
    )
    tangent_c: float = Field(0.1, gt=0, description="c of the normalisation")
    norm: Literal["l2", "rms"] = Field("l2", description="||g||, or ||g|| / sqrt(D)")
    adaptive_weight: bool = Field(True, description="learn the weight of each t; otherwise it is 1")
    jvp: Derivative = Field("forward", description="exact, or finite-diff: two more evaluations")

    @classmethod
    def length_recipe(cls, steps: int) -> dict[str, Any]:
        return {"warmup": max(0, steps // 5)}


class SCDConfig(TangentConfig):
    """Consistency distillation in continuous time (sCD)."""

    kind: Literal["scd"] = "scd"
    segments: int = Field(1, ge=1, description="M, parts of the range of angles, each with its own end")
    warm_start: bool = Field(True, description="start from the teacher's weights")

    def build(self, spec: DataSpec) -> SCD:
        return SCD(self, spec)


class SCTConfig(TangentConfig):
    """Consistency training in continuous time (sCT)."""

    kind: Literal["sct"] = "sct"

    def build(self, spec: DataSpec) -> SCT:
        return SCT(self, spec)


class ECTConfig(ConsistencyConfig):
    """Easy consistency tuning (ECT). Its numbers are for data of deviation 0.5, to which all noise is rescaled."""

    kind: Literal["ect"] = "ect"
    q: float = Field(2.0, gt=1, description="how much nearer r comes to t in a stage")
    k: float = Field(8.0, ge=0, description="how much further r is from small t")
    b: float = Field(1.0, gt=0, description="where t is small")
    stage_steps: int = Field(125, ge=1, description="optimisation steps of a stage")
    huber_c: float = Field(0.0, ge=0, description="c of the distance sqrt(||.||^2 + c^2) - c")

    @classmethod
    def length_recipe(cls, steps: int) -> dict[str, Any]:
        return {"stage_steps": max(1, steps // 8)}

    def build(self, spec: DataSpec) -> ECT:
        return ECT(self, spec)


class Consistency(GenerativeModel):
    """See the module's text.

    Attributes:
        denoiser: the network, read as f.
        steps_done: optimisation steps so far, int64.
    """

    config: ConsistencyConfig
    steps_done: Tensor

    def __init__(self, config: ConsistencyConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.denoiser = config.denoiser(spec)
        self.times = config.times.build(config.schedule)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.sampling()

    @property
    def flow(self) -> TrigFlow:
        """The model in TrigFlow's coordinates."""
        return TrigFlow(self.denoiser, self.config.sigma_data)

    @property
    def segments(self) -> int:
        """Parts of the range of angles that have their own ends."""
        return 1

    @property
    def start(self) -> float:
        """The angle at which sampling begins."""
        return min(self.flow.highest, math.atan(_SIGMA_MAX / 0.5))

    def begin(self, teacher: NetworkDenoiser) -> None:
        """Start from the weights of a denoiser with such a network; to be called before training.

        Raises:
            UserError: another network.
        """
        copy_weights(teacher.network, self.denoiser.network)

    def prepare(self, items: Iterable[Batch]) -> None:
        count, total = 0, 0.0

        def counted() -> Iterator[Batch]:
            nonlocal count, total
            for batch in items:
                count, total = count + batch.x0.numel(), total + float(batch.x0.double().square().sum())
                yield batch

        passing = counted()
        calibrate(self.denoiser, passing, self.spec)
        for _ in passing:  # where nothing had to be fitted
            pass
        measured, said = math.sqrt(total / count), self.config.parametrization
        if isinstance(said, EDMParametrization) and not 0.5 < said.sigma_data / measured < 2:
            warnings.warn(
                f"parametrization.sigma_data: {said.sigma_data:g} is far from the data's {measured:.3g}", stacklevel=2
            )

    def sampling(self, **options: Any) -> ConsistencySampling:
        sampling = super().sampling(**options)
        assert isinstance(sampling, ConsistencySampling)
        count, mids = sampling.num_steps or (self.segments if self.segments > 1 else 2), sampling.t_mid
        if self.segments > 1:
            if count != self.segments:
                raise UserError(f"num_steps: {count} is not valid: the model was taught {self.segments} segments")
            if mids is not None:
                raise UserError(f"t_mid: {list(mids)} given, but steps end where the {self.segments} segments do")
            return ConsistencySampling(num_steps=count)
        if mids is None:
            mids = tuple(_T_MID * (1 - step / (count - 1)) for step in range(count - 1))
        if len(mids) != count - 1:
            raise UserError(f"t_mid: {len(mids)} given for num_steps={count}; each step but the first has one angle")
        if any(not low < high for high, low in zip((self.start, *mids), (*mids, 0.0), strict=True)):
            raise UserError(
                f"t_mid: {list(mids)} is not valid: angles have to fall from below {self.start:.4f} to above 0"
            )
        return ConsistencySampling(num_steps=count, t_mid=mids)

    def networks(self) -> list[nn.Module]:
        return [self.denoiser.network]

    def probe(self, items: int) -> None:
        self.denoiser.probe(items, self.spec.shape, self.config.conditional)

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, ConsistencySampling)
        assert sampling.num_steps is not None
        flow, count, start = self.flow, sampling.num_steps, self.start
        ends = [start * (count - step) / count for step in range(count)] if self.segments > 1 else [start]
        angles = [*ends, *(sampling.t_mid or ()), 0.0]
        x = self._noise(draws)
        on_step(0, count, x)
        for step in range(count):
            angle, after = angles[step], angles[step + 1]
            velocity = flow.velocity(x, torch.full((len(x),), angle, dtype=torch.float64), condition)
            x = turned(x, velocity, angle - (after if self.segments > 1 else 0.0))
            if self.segments == 1 and after > 0:
                x = math.cos(after) * x + math.sin(after) * self._noise(draws)
            on_step(step + 1, count, x)
        return x, count

    def after_step(self, parts: Sequence[tuple[Batch, Draws]]) -> None:  # noqa: ARG002
        self.steps_done += 1

    def _noise(self, draws: Draws) -> Tensor:
        return self.config.noise.sample(draws, self.spec.shape) * self.config.sigma_data

    def _drawn(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Process times and angles of the items, float64 (B,), and their noise z."""
        t, _ = self.times.draw(draws)
        angle = angle_of(self.config.schedule.level(t), self.config.sigma_data)
        return t, angle.clamp(self.flow.lowest, self.flow.highest), self._noise(draws).to(batch.x0.dtype)


class Tangent(Consistency):
    """Consistency in continuous time.

    Attributes:
        weight: w of an angle, or None.
    """

    config: TangentConfig

    def __init__(self, config: TangentConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.weight = AdaptiveWeight() if config.adaptive_weight else None
        if config.jvp == "forward":  # before training, not after
            self._require_forward_derivative()

    def prepare(self, items: Iterable[Batch]) -> None:
        super().prepare(items)
        frequency = getattr(self.config.network, "time_frequency", 0.0)
        if frequency > 10 * LOW_FREQUENCY:
            warnings.warn(
                f"network.time_frequency: {frequency:g} makes the derivative in time large, and few-step samples bad; "
                f"use {LOW_FREQUENCY:g}",
                stacklevel=2,
            )

    @abstractmethod
    def direction(self, x: Tensor, x0: Tensor, z: Tensor, angle: Tensor, condition: Tensor | None) -> Tensor:
        """dx/dt, shape of x."""

    def bottom(self, angle: Tensor) -> Tensor:
        """The angle that f leads to from others, float64 (B,)."""
        return torch.zeros_like(angle)

    @property
    def not_compiled(self) -> str | None:
        if self.config.jvp == "finite-diff":
            return super().not_compiled
        return "torch does not compile what is differentiated in forward mode; use jvp=finite-diff, or false"

    @property
    def share(self) -> float:
        """R, how much of the tangent's second part is taken along now."""
        return min(1.0, int(self.steps_done) / self.config.warmup) if self.config.warmup else 1.0

    def tangent(self, batch: Batch, angle: Tensor, z: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """The items noised with z, the tangent g there, and cos sin dV/dt in it, without gradient, shape of x0."""
        x0 = batch.x0
        x = column(angle.cos(), x0) * x0 + column(angle.sin(), x0) * z
        with torch.no_grad():
            direction = self.direction(x, x0, z, angle, batch.condition)
            left = angle - self.bottom(angle)
            g, change = self.flow.tangent(x, angle, direction, left, share, batch.condition, self.config.jvp)
        return x, g, change

    def tamed(self, g: Tensor) -> Tensor:
        """The tangent as it is taught, shape of g."""
        if self.config.tangent == "none":
            return g
        if self.config.tangent == "clip":
            return g.clamp(-1, 1)
        size = g.flatten(1).norm(dim=1)
        if self.config.norm == "rms":
            size = size / math.sqrt(self.spec.dimension)
        return g / column(size + self.config.tangent_c, g)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        t, angle, z = self._drawn(batch, draws)
        with torch.random.fork_rng(devices=[z.device] if z.device.type == "cuda" else []):
            x, g, _ = self.tangent(batch, angle, z, self.share)
        # The random state is what it was: where there is dropout, its mask is that of the tangent.
        v = self.flow.velocity(x, angle, batch.condition)
        per_item = ((v - v.detach()) / self.config.sigma_data - self.tamed(g)).square().flatten(1).mean(1)
        if self.weight is not None:
            w = self.weight(angle)
            per_item = w.exp() * per_item - w
        return LossTerms(per_item, t, {"tangent": g.square().flatten(1).mean(1).sqrt()})

    def _require_forward_derivative(self) -> None:
        x = torch.zeros(2, *self.spec.shape)
        angle = torch.full((2,), 1.0, dtype=torch.float64)
        condition = torch.zeros(2, dtype=torch.int64) if self.config.conditional else None
        network = self.denoiser.network
        try:
            require_forward_derivative(
                network, lambda: self.flow.derivative(x, angle, torch.ones_like(x), angle, condition)
            )
        except NoForwardDerivativeError as error:
            raise UserError(
                f"network: {error.name or 'it'} ({type(error.module).__name__}) has no forward-mode derivative "
                f"({error.reason}); use jvp=finite-diff, attention by plain matrix products, or train ect, which needs "
                "none"
            ) from None


class SCD(Tangent):
    """See `SCDConfig`."""

    config: SCDConfig

    def __init__(self, config: SCDConfig, spec: DataSpec):
        # Not a part of the module: a teacher is neither trained nor saved with the student.
        self._teacher: list[TrigFlow] = []
        super().__init__(config, spec)

    @property
    def segments(self) -> int:
        return self.config.segments

    def begin(self, teacher: NetworkDenoiser) -> None:
        """Give the model its teacher, which is copied; to be called before training, also when it is taken up again."""
        own = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        self._teacher = [TrigFlow(own, self.config.sigma_data)]
        if self.config.warm_start:
            super().begin(teacher)

    @property
    def teacher(self) -> TrigFlow:
        """The teacher in the same coordinates.

        Raises:
            UserError: it has not been given; training goes through `osmose distill`.
        """
        if not self._teacher:
            raise UserError(
                "scd: has no teacher; a distillation is continued by osmose distill scd RUN --out RUN2 --resume"
            )
        teacher = self._teacher[0]
        if next(teacher.denoiser.parameters()).device != self.device:
            teacher.denoiser.to(self.device)
        return teacher

    def direction(self, x: Tensor, x0: Tensor, z: Tensor, angle: Tensor, condition: Tensor | None) -> Tensor:  # noqa: ARG002
        teacher = self.teacher
        return teacher.velocity(x, angle.clamp(teacher.lowest, teacher.highest), condition)

    def bottom(self, angle: Tensor) -> Tensor:
        length = self.start / self.segments
        return (angle / length).floor().clamp(max=self.segments - 1) * length

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), *(teacher.denoiser.network for teacher in self._teacher)]


class SCT(Tangent):
    """See `SCTConfig`."""

    def direction(self, x: Tensor, x0: Tensor, z: Tensor, angle: Tensor, condition: Tensor | None) -> Tensor:  # noqa: ARG002
        return column(angle.cos(), x) * z - column(angle.sin(), x) * x0


class ECT(Consistency):
    """See `ECTConfig`."""

    config: ECTConfig

    def earlier(self, angle: Tensor) -> Tensor:
        """R of the present stage, as an angle, float64 (B,); 0 where the target is the data."""
        config = self.config
        noise = 0.5 * angle.tan()
        stage = int(self.steps_done) // config.stage_steps
        nearness = 1 - (1 + config.k * torch.sigmoid(-config.b * noise)) / config.q ** (stage + 1)
        earlier = torch.atan(2 * noise * nearness.clamp(min=0))
        return torch.where(earlier < self.flow.lowest, 0.0, earlier)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        t, angle, z = self._drawn(batch, draws)
        x0, before = batch.x0, self.earlier(angle)
        with torch.no_grad(), torch.random.fork_rng(devices=[z.device] if z.device.type == "cuda" else []):
            x_r = column(before.cos(), x0) * x0 + column(before.sin(), x0) * z
            target = self.flow.x0(x_r, before.clamp(min=self.flow.lowest), batch.condition)
            near = (before > 0).to(x0.device).view(-1, *(1,) * (x0.ndim - 1))
            target = torch.where(near, target, x0)
        x = column(angle.cos(), x0) * x0 + column(angle.sin(), x0) * z
        square = (self.flow.x0(x, angle, batch.condition) - target).square().flatten(1).sum(1)
        distance = (square + self.config.huber_c**2 + 1e-20).sqrt() - self.config.huber_c
        gap = column(0.5 * (angle.tan() - before.tan()), distance)
        return LossTerms(distance / gap, t, {"distance": distance.detach()})


class AdaptiveWeight(nn.Module):
    """A learned weight w of each angle, (B,): linear in low-frequency features, 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_FEATURES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, angle: Tensor) -> Tensor:
        label = (angle * (2000 / math.pi)).to(self.linear.weight.device, torch.float32)
        out: Tensor = self.linear(sinusoids(label, _FEATURES, _FREQUENCY))
        return out.squeeze(1)

r"""Diffusion of series as functions of time (arXiv 2211.02590): `dspd` in N steps, `cspd` in continuous time.

The noise of a series is a Gaussian process (`processes.kernels`) at its own times, so that noisy series are as
continuous as clean ones and times need no grid. With C a root of the covariance of the noise, U = C^-1 (X - m) / s is
diffused by white noise: schedules, parametrizations and solvers are those of every other Gaussian model. m is what the
process expects given the known values, s the deviation of each column of U in training.

Each value of an item is hidden, known or absent. The model draws the hidden ones given the known ones; absent values,
missing in the data, take no part. What is hidden in training is the task:

=========== ==============================================================================================
generate    all that there is
forecast    the last `horizon` times
impute      values at random, their share uniform in [0, 1]
any         each of these for a third of the items
=========== ==============================================================================================

With `pinned` the noise is that of the process given that it vanishes at known values: a forecast starts at the last
one, an imputation joins both ends, and m is the kriging mean. Without, as published, noise ignores what is known and
m = 0.

The network sees, at each time and for each column, the noisy values X_t (the known ones clean), U_t, and what is known
and hidden; it answers in units of U (`output=whitened`), or in units of X, as published (`raw`): then its errors are
weighted by the covariance of the noise, which stresses coarse scales.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.chain import ReverseChain, Variance
from osmose.gaussian.denoiser import Conditioned, NetworkDenoiser
from osmose.gaussian.draws import Draws, StepDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.parametrization import VParametrization, column, noised, velocity
from osmose.gaussian.schedule import LinearSchedule, VPSchedule
from osmose.gaussian.solvers import Ancestral, Heun
from osmose.interpolants.transport import grid as even_grid
from osmose.interpolants.transport import log_density
from osmose.methods.base import GenerativeModel, MethodConfig, SamplingConfig
from osmose.methods.chain import GaussianSampling, ParametrizationChoice, ScheduleChoice
from osmose.methods.messages import Batch, BoundTerms, LossTerms, OnStep, Watch
from osmose.methods.times import TimesChoice, UniformTimes
from osmose.networks import SERIES_NETWORKS
from osmose.networks.series import SeriesNetworkConfig, SeriesTransformerConfig
from osmose.processes import KERNELS
from osmose.processes.factors import Factor
from osmose.processes.kernels import Kernel, OUKernel

SeriesNetworkChoice = Annotated[SerializeAsAny[SeriesNetworkConfig], BeforeValidator(SERIES_NETWORKS.parse)]
KernelChoice = Annotated[SerializeAsAny[Kernel], BeforeValidator(KERNELS.parse)]
Task = Literal["generate", "forecast", "impute", "any"]

#: Sets of times that a run keeps, to draw samples at.
_GRIDS = 256
#: Added to the deviation of what is known of a column, in deviations of the training part: a flat stretch is not blown
#: up, and does not drown all others in the loss.
_LEAST = 0.05
#: Times that cover so many times as much as those of training, or are so many times closer or farther, are unlike them.
_FAR, _FREQUENCY = 1.5, 8.0
#: Times between which the ODE of the density runs, its steps, and the values up to which its divergence is exact.
_CAP, _STEPS, _EXACT = 1e-4, 100, 16


class SeriesProcessConfig(MethodConfig, ABC):
    """The parts of a diffusion of series."""

    network: SeriesNetworkChoice = SeriesTransformerConfig()
    kernel: KernelChoice = OUKernel()
    pinned: bool = Field(True, description="noise vanishes at known values, and begins from what they let expect")
    task: Task = Field("any", description="what is hidden in training: generate, forecast, impute, or any of them")
    horizon: int = Field(1, ge=1, description="last times that are hidden for a forecast")
    local: bool = Field(
        False,
        description="measure each item from the mean of its known values, in their deviation: for those that wander",
    )
    output: Literal["whitened", "raw"] = Field("whitened", description="units of the network's answer and of the loss")
    whitened_input: bool = Field(True, description="show the network U_t besides X_t: differences of close times")
    schedule: ScheduleChoice
    parametrization: ParametrizationChoice = VParametrization()
    times: TimesChoice = UniformTimes()
    sampling: GaussianSampling = GaussianSampling()

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {} if spec.series is None else {"horizon": max(1, spec.shape[1] // 3)}

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:  # noqa: ARG003
        return {"steps": 3000, "batch_size": 128, "lr": 2e-3}

    def build(self, spec: DataSpec) -> SeriesProcess:
        return SeriesProcess(self, spec)


class DSPDConfig(SeriesProcessConfig):
    """Discrete: N = 100 steps of the published betas, 1e-4 to 0.2."""

    kind: Literal["dspd"] = "dspd"
    schedule: ScheduleChoice = LinearSchedule(num_steps=100, beta_start=1e-5)
    sampling: GaussianSampling = GaussianSampling(num_steps=100, solver=Ancestral(variance="fixed_large"))


class CSPDConfig(SeriesProcessConfig):
    """Continuous: the variance-preserving SDE, sampled by its probability-flow ODE."""

    kind: Literal["cspd"] = "cspd"
    schedule: ScheduleChoice = VPSchedule()
    sampling: GaussianSampling = GaussianSampling(num_steps=25, solver=Heun(), spacing="karras")


@dataclass(frozen=True)
class Setting:
    """What is known of a batch of items, and the noise that goes with it.

    Attributes:
        times, there: from the first on, (B, L), and where they exist.
        known, hidden: 1 where a value is, 0 elsewhere, (B, C, L).
        base: what the process expects: the known values where known, m where hidden, 0 elsewhere; local units.
        factor: of the noise at the hidden values.
        shift, scale: local units of each item are (x - shift) / scale, (B, C, 1).
        classes: of a conditional model.
    """

    times: Tensor
    there: Tensor
    known: Tensor
    hidden: Tensor
    base: Tensor
    factor: Factor
    shift: Tensor
    scale: Tensor
    classes: Tensor | None

    @property
    def count(self) -> Tensor:
        """Hidden values of each item, at least 1, (B,)."""
        return self.hidden.flatten(1).sum(1).clamp(min=1)


class _Whitened(nn.Module):
    """A network for series that takes and gives U."""

    scale: Tensor

    def __init__(self, config: SeriesProcessConfig, spec: DataSpec):
        super().__init__()
        assert spec.series is not None
        columns, form = spec.shape[0], spec.series
        classes = spec.num_classes if config.conditional else None
        self.sees_u, self.raw = config.whitened_input, config.output == "raw"
        inputs = (4 if self.sees_u else 3) * columns
        self.body = config.network.build(inputs, columns, form.gap, form.span, classes)
        #: Of each column of U, (C, 1).
        self.register_buffer("scale", torch.ones(columns, 1))

    def forward(self, u: Tensor, label: Tensor, setting: Setting) -> Tensor:
        """U_t (B, C, L) -> what is to be said of it, (B, C, L), 0 where nothing is hidden."""
        x = setting.base + setting.factor.color(u * self.scale)
        seen = [x, u, setting.known, setting.hidden] if self.sees_u else [x, setting.known, setting.hidden]
        out: Tensor = self.body(torch.cat(seen, 1), label, setting.classes, setting.times, setting.there)
        if self.raw:
            return setting.factor.whiten(out) / self.scale
        return out * setting.hidden

    def error(self, difference: Tensor, setting: Setting) -> Tensor:
        """An error of U in the units of the network's answer."""
        return setting.factor.color(difference * self.scale) if self.raw else difference


class SeriesProcess(GenerativeModel):
    """See `SeriesProcessConfig`."""

    config: SeriesProcessConfig
    takes_gaps = True
    grids: Tensor
    lengths: Tensor
    histories: Tensor
    seen: Tensor

    def __init__(self, config: SeriesProcessConfig, spec: DataSpec):
        super().__init__(config, spec)
        if spec.series is None:
            raise UserError(
                f"method: {config.kind} learns from series (--data series:FILE.csv), and these data are {spec.kind}"
            )
        form = spec.series
        if config.task in ("forecast", "any") and not config.horizon < spec.shape[1]:
            raise UserError(
                f"horizon: {config.horizon} is not valid: items have {spec.shape[1]} times, and some must be known"
            )
        if config.local and config.task == "generate":
            raise UserError("local: true measures from what is known, and with task=generate nothing is; use false")
        self.kernel = config.kernel.fitted(form.memory, form.first)
        self.kernel.factor(cast(Tensor, spec.some_times(1)))  # refuses what does not fit the times
        self.denoiser = NetworkDenoiser(_Whitened(config, spec), config.schedule, config.parametrization)
        self.times = config.times.build(config.schedule)
        self._unlike: str | None = None
        # Sets of times to draw samples at, filled up with 0; those of regular series are all alike. Each time is the
        # sum of two float32: not every device has float64.
        count = 1 if form.regular and config.task != "forecast" else _GRIDS
        self.register_buffer("grids", torch.zeros(count, spec.shape[1], 2))
        self.register_buffer("lengths", torch.full((count,), spec.shape[1]))
        if config.task == "forecast":
            self.register_buffer("histories", torch.zeros(_GRIDS, *spec.shape))
            self.register_buffer("seen", torch.zeros(_GRIDS, *spec.shape, dtype=torch.bool))
        try:
            self.sampling()
        except UserError as error:  # before training, not after
            raise UserError(f"sampling.{error}") from None

    @property
    def _network(self) -> _Whitened:
        network = self.denoiser.network
        assert isinstance(network, _Whitened)
        return network

    def networks(self) -> list[nn.Module]:
        return [self._network.body]

    def sampling(self, **options: Any) -> SamplingConfig:
        sampling = super().sampling(**options)
        assert isinstance(sampling, GaussianSampling)
        self._grid(sampling)
        if sampling.solver.needs_learned_variance:
            raise UserError(f"solver.variance: learned_range is not what {self.config.kind} learns; use fixed_small")
        return sampling

    def probe(self, items: int) -> None:
        batch = Batch.made(self.spec, items, self.config.conditional, self.device)
        assert batch.times is not None
        setting = self._setting(batch.x0, batch.times, torch.ones(batch.x0.shape, dtype=torch.bool), batch.condition)
        self._network(batch.x0, torch.full((items,), 500.0, device=self.device), setting)

    def complaints(self) -> list[str]:
        times = self._kept()[:1, : int(self.lengths[0])]
        found = [self.kernel.warning(times) if bool(times.any()) else None, self._unlike]
        return [*super().complaints(), *(warning for warning in found if warning is not None)]

    def report(self) -> dict[str, float]:
        self._unlike = None  # what is asked for next has complaints of its own
        return super().report()

    def _compare(self, times: Tensor) -> None:
        """Note times that are unlike those of training."""
        form, there = self.spec.series, times.isfinite()
        assert form is not None
        gaps = times.diff(dim=1)[there[:, 1:]]
        if len(gaps) and not form.gap / _FREQUENCY < float(gaps.median()) < form.gap * _FREQUENCY:
            self._unlike = f"times: are {float(gaps.median()):.4g} apart, and those of training {form.gap:.4g}"
        span = float((times.nan_to_num(-math.inf).amax(1) - times[:, 0]).max())
        if span > _FAR * form.span:
            self._unlike = f"times: cover {span:.4g}, and those of training at most {form.span:.4g}"

    def prepare(self, items: Iterable[Batch]) -> None:
        squares = torch.zeros(self.spec.shape[0], dtype=torch.float64)
        counts = torch.zeros_like(squares)
        kept: list[Batch] = []
        for index, batch in enumerate(items):
            # A seventh of the items is enough for a deviation; of the times, as many as are kept.
            size = len(batch.x0)
            rows = torch.arange(index % 7, size, 7) if size >= 64 else torch.arange(size)
            assert batch.times is not None
            part = Batch(
                batch.x0[rows.to(batch.x0.device)],
                None if batch.condition is None else batch.condition[rows.to(batch.x0.device)],
                times=batch.times[rows],
            )
            draws = StepDraws(0, index, 0, len(rows), len(rows), self.device).branch("scale")
            setting, x = self._hide(part, draws)
            u = setting.factor.whiten((x - setting.base) * setting.hidden)
            squares += u.cpu().double().square().sum((0, 2))
            counts += setting.hidden.cpu().double().sum((0, 2))
            kept.append(part)
        scale = (squares / counts.clamp(min=1)).sqrt().clamp(min=1e-6)
        self._network.scale.copy_(torch.where(counts > 0, scale, 1.0)[:, None])
        self._keep(kept)

    def _keep(self, items: list[Batch]) -> None:
        """Keep the times of some items, and of a model of forecasts what comes before their horizon."""
        every = torch.cat([batch.times for batch in items if batch.times is not None])
        values = torch.cat([batch.x0.cpu() for batch in items])
        there = values.isfinite()
        known = there & ~self._late(there, every)
        useful = torch.arange(len(every))
        if self.config.task == "forecast":  # with something to go on from, and something to come
            useful = (known.flatten(1).any(1) & (there & ~known).flatten(1).any(1)).nonzero().flatten()
            if not len(useful):
                raise UserError(
                    f"horizon: {self.config.horizon} is not valid: no series has a value before its last "
                    f"{self.config.horizon} times and one in them"
                )
        place = useful[torch.linspace(0, len(useful) - 1, len(self.grids)).round().long()]
        times = every[place]
        rough = times.nan_to_num(0.0).float()
        self.grids.copy_(torch.stack([rough, (times.nan_to_num(0.0) - rough.double()).float()], 2))
        self.lengths.copy_(times.isfinite().sum(1))
        if self.config.task == "forecast":
            self.histories.copy_(torch.where(known, values, 0.0)[place])
            self.seen.copy_(known[place])

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        setting, x = self._hide(batch, draws)
        u0 = self._whiten(x, setting)
        t, weight = self.times.draw(draws)
        level = self.config.schedule.level(t)
        eps = self._noise(draws, setting).to(u0.dtype)
        said = self.denoiser.output(noised(u0, eps, level), level, cast(Tensor, setting))
        error = self._network.error(said - self.denoiser.target(u0, eps, level), setting)
        per_item = error.square().flatten(1).sum(1) / setting.count
        if self.training:
            self.times.observe(t, per_item.detach())
        weighted = per_item if weight is None else per_item * column(weight, per_item)
        return LossTerms(weighted, t, self.times.report(t), weight)

    def after_step(self, parts: Any) -> None:  # noqa: ARG002
        self.times.commit()

    def _hide(self, batch: Batch, draws: Draws, task: Task | None = None) -> tuple[Setting, Tensor]:
        """Items with some of their values hidden as the task has it, and their values in local units."""
        assert batch.times is not None
        there = batch.x0.isfinite().cpu()
        hidden = self._hidden(there, batch.times, draws, self.config.task if task is None else task)
        setting = self._setting(batch.x0, batch.times, hidden, batch.condition)
        x = torch.where(batch.x0.isfinite(), (batch.x0 - setting.shift) / setting.scale, 0.0)
        return setting, x

    def _hidden(self, there: Tensor, times: Tensor, draws: Draws, task: Task) -> Tensor:
        """Which of the values that there are, bool (B, C, L) on the CPU, are hidden."""
        if task == "generate":
            return there
        forecast = self._late(there, times)
        if task == "forecast":
            return forecast
        share = draws.uniform().view(-1, 1, 1)
        drawn = torch.special.ndtr(draws.normal(tuple(there.shape[1:])).cpu())
        some = there & (drawn < share)
        if task == "impute":
            return some
        kind = (3 * draws.uniform()).view(-1, 1, 1)
        return torch.where(kind < 1, there, torch.where(kind < 2, forecast, some))

    def _late(self, there: Tensor, times: Tensor) -> Tensor:
        """Which of the values that there are belong to the horizon."""
        lengths = times.isfinite().sum(1, keepdim=True)
        late = torch.arange(times.shape[1])[None] >= lengths - self.config.horizon
        return there & late[:, None]

    def _setting(self, x0: Tensor, times: Tensor, hidden: Tensor, classes: Tensor | None) -> Setting:
        """See `Setting`; x0 (B, C, L) in the model's units, NaN where absent; hidden bool, on the CPU."""
        device, exists = x0.device, times.isfinite()
        known = x0.isfinite().cpu() & ~hidden & exists[:, None]
        hidden = hidden & exists[:, None]
        seen = known.to(device)
        values = torch.where(seen, x0, 0.0)
        shift, scale = torch.zeros_like(values[..., :1]), torch.ones_like(values[..., :1])
        if self.config.local:
            count = seen.sum(2, keepdim=True)
            some = count.clamp(min=1)
            shift = values.sum(2, keepdim=True) / some
            spread = (torch.where(seen, values - shift, 0.0).square().sum(2, keepdim=True) / some).sqrt()
            scale = torch.where(count > 0, (spread.square() + _LEAST**2).sqrt(), 1.0)
            values = torch.where(seen, (values - shift) / scale, 0.0)
        factor = self.kernel.factor(times, hidden, known, pinned=self.config.pinned)
        dtype = x0.dtype
        return Setting(
            # From the first on: where there is no float64, an hour would be lost beside a date.
            times=(times - times[:, :1]).to(device, torch.float64 if device.type != "mps" else torch.float32),
            there=exists.to(device),
            known=seen.to(dtype),
            hidden=hidden.to(device, dtype),
            base=factor.expect(values),
            factor=factor,
            shift=shift,
            scale=scale,
            classes=classes,
        )

    def _whiten(self, x: Tensor, setting: Setting) -> Tensor:
        """U of values in local units, 0 where nothing is hidden."""
        return setting.factor.whiten((x - setting.base) * setting.hidden) / self._network.scale

    def _noise(self, draws: Draws, setting: Setting) -> Tensor:
        return draws.normal(tuple(setting.hidden.shape[1:])) * setting.hidden

    def _grid(self, sampling: GaussianSampling) -> TimeGrid:
        return TimeGrid.of(self.config.schedule, sampling.num_steps, sampling.spacing)

    def _kept(self) -> Tensor:
        """The sets of times, float64 on the CPU."""
        return self.grids.cpu().double().sum(2)

    def given_for(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Times of training items and nothing known; of a model of forecasts, their beginnings."""
        index = (draws.branch("times").uniform() * len(self.grids)).long()
        grids, lengths = self._kept()[index], self.lengths.cpu()[index]
        times = torch.where(torch.arange(grids.shape[1])[None] < lengths[:, None], grids, math.nan)
        if self.config.task != "forecast":
            return torch.full((len(index), *self.spec.shape), math.nan, device=self.device), times
        index = index.to(self.device)
        return torch.where(self.seen[index], self.histories[index], math.nan), times

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        return self.complete(*self.given_for(draws), draws, sampling, condition, on_step)

    def complete(
        self,
        known: Tensor,
        times: Tensor | None,
        draws: Draws,
        sampling: SamplingConfig,
        condition: Tensor | None,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        """See `GenerativeModel.complete`.

        A model of forecasts fills in what comes after the last known time, all others every missing value; values at
        times that do not exist are NaN.
        """
        assert isinstance(sampling, GaussianSampling)
        assert times is not None
        hidden = known.isnan().cpu() & times.isfinite()[:, None]
        if self.config.task == "forecast":
            last = torch.where(known.isfinite().any(1).cpu(), torch.arange(known.shape[2]), -1).amax(1)
            hidden &= (torch.arange(known.shape[2]) > last[:, None])[:, None]
        self._admit(known, hidden)
        self._compare(times)
        setting = self._setting(known, times, hidden, condition)
        grid = self._grid(sampling)
        u = self._noise(draws, setting) * self.config.schedule.prior_std
        denoise = Conditioned(self.denoiser, cast(Tensor, setting), None)
        on_step(0, grid.num_steps, self._values(u / grid.levels[0].size, setting))
        states = sampling.solver.run(denoise, u, grid, lambda: self._noise(draws, setting))
        for step, state in enumerate(states, 1):
            u = state.x
            on_step(step, grid.num_steps, self._values(u / grid.levels[step].size, setting))
        return self._values(u, setting), denoise.calls

    def _admit(self, known: Tensor, hidden: Tensor) -> None:
        """Refuse what the model has not learned to fill in."""
        task, none = self.config.task, bool((~known.isfinite().flatten(1).any(1)).any())
        if task == "generate" and bool(known.isfinite().any()):
            raise UserError("known: given, and this run learned with task=generate, to draw whole series")
        if task == "forecast":
            if none:
                raise UserError("known: nothing is, and this run learned with task=forecast, from what comes before")
            longest = int(hidden.any(1).sum(1).max())
            if longest > self.config.horizon:
                raise UserError(
                    f"horizon: {longest} times asked for, and this run learned to forecast {self.config.horizon}; "
                    f"train with horizon={longest}"
                )

    def _values(self, u: Tensor, setting: Setting) -> Tensor:
        """The model's units of U: known values as they are, NaN where absent."""
        x = setting.base + setting.factor.color(u * self._network.scale)
        whole = (setting.known + setting.hidden) > 0
        return torch.where(whole, x * setting.scale + setting.shift, math.nan)

    def bound(
        self,
        batch: Batch,
        draws: Draws,
        on_step: OnStep,
        *,
        num_steps: int | None = None,
        variance: str | None = None,
        clip: bool = True,
    ) -> BoundTerms:
        """Of the density of the hidden values given the known ones, in data units and for each hidden value.

        In steps it is the variational bound, in continuous time the density by the probability-flow ODE, whose
        divergence is exact up to 16 values an item and Hutchinson's estimate beyond. A model of any task is scored on
        whole series.
        """
        if not clip:
            raise UserError(f"clip: {self.config.kind} never keeps estimates inside a range; there is nothing to leave")
        with torch.inference_mode(False), torch.no_grad():  # the ODE's divergence is a derivative
            classes = None if batch.condition is None else batch.condition.clone()
            whole = Batch(batch.x0.clone(), classes, times=batch.times)
            setting, x = self._hide(whole, draws.branch("hidden"), "generate" if self.config.task == "any" else None)
            u0 = self._whiten(x, setting)
        unit = self._network.scale.cpu().double() * setting.scale.cpu().double()
        unit = unit * torch.tensor(self.spec.scale, dtype=torch.float64)[:, None]
        volume = (setting.hidden.cpu().double() * (unit.log() + setting.factor.log_det())).flatten(1).sum(1)
        scored = self._steps if self.config.schedule.native_steps else self._flow
        if variance is not None and not self.config.schedule.native_steps:
            raise UserError(f"variance: the ODE of {self.config.kind} has none to choose")
        t, prior, steps, errors = scored(u0, setting, draws, on_step, num_steps, variance)
        count = setting.count.cpu().double()
        exact = not self.config.schedule.native_steps
        errors = None if errors is None else errors / count[:, None]
        return BoundTerms(t, (prior + volume) / count, steps / count[:, None], errors, is_density=True, is_exact=exact)

    def _steps(
        self,
        u0: Tensor,
        setting: Setting,
        draws: Draws,
        on_step: OnStep,
        num_steps: int | None,
        variance: str | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Times (K,), L_T and the terms of the bound in nats of U, (n,) and (n, K), and squared errors, (n, K)."""
        solver = self.config.sampling.solver
        kind = variance or (solver.variance if isinstance(solver, Ancestral) else "fixed_small")
        if kind not in ("fixed_small", "fixed_large"):
            raise UserError(f"variance: {kind!r} is not valid: should be 'fixed_small' or 'fixed_large'")
        schedule = self.config.schedule
        steps = num_steps or schedule.native_steps
        assert steps is not None
        chain = ReverseChain(TimeGrid.of(schedule, steps))
        table, size = torch.empty(len(u0), steps, dtype=torch.float64), u0[0].numel()
        errors = torch.empty_like(table)
        # The chain's terms are means over all values: those that are not hidden, where both sides are 0, are taken out.
        idle, nothing = size - setting.hidden.flatten(1).sum(1).cpu().double(), torch.zeros(1, 1, dtype=torch.float64)
        for index, level in enumerate(chain.levels):
            eps, k = self._noise(draws, setting).to(u0.dtype), torch.full((len(u0),), index + 1)
            estimate = self.denoiser(noised(u0, eps, level), level, cast(Tensor, setting))
            log_variance = chain.log_variance(cast(Variance, kind), k, None, u0)
            terms = chain.term(k, u0, estimate, log_variance, None).cpu().double()
            one = chain.log_variance(cast(Variance, kind), k[:1], None, nothing)
            table[:, index] = terms * size - idle * chain.term(k[:1], nothing, nothing, one, None)
            errors[:, index] = (u0 - estimate).square().flatten(1).sum(1)
            on_step(index + 1, steps)
        prior = chain.prior_term(u0.cpu().double(), schedule.prior_std) * size
        prior = prior - idle * chain.prior_term(nothing, schedule.prior_std)
        return torch.tensor([level.t for level in chain.levels], dtype=torch.float64), prior, table, errors

    def _flow(
        self,
        u0: Tensor,
        setting: Setting,
        draws: Draws,
        on_step: OnStep,
        num_steps: int | None,
        variance: str | None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Times of the steps, -log density of the noise at the end, and minus the change of volume of each step."""
        schedule, count = self.config.schedule, num_steps or _STEPS
        shape = tuple(u0.shape[1:])
        with torch.inference_mode(False):
            hidden = setting.hidden

            def slope(t: float, u: Tensor) -> Tensor:
                on_step(min(count, 1 + round(t * count)), count)
                (level,) = TimeGrid.at(schedule, torch.tensor([t], dtype=torch.float64)).levels[:1]
                x0 = self.denoiser(u, level, cast(Tensor, setting))
                eps = (u - level.alpha * x0) / level.sigma
                at = torch.tensor(t, dtype=torch.float64)
                moved = velocity(x0, eps, float(schedule.alpha_dot(at)), float(schedule.sigma_dot(at)))
                return moved * hidden  # what is not hidden stays, and adds nothing to the divergence

            def log_prior(u: Tensor) -> Tensor:
                z = (u / schedule.prior_std).cpu().double().square() + math.log(2 * math.pi * schedule.prior_std**2)
                return -(z * hidden.cpu().double()).flatten(1).sum(1) / 2

            log_p, integrals = log_density(
                slope,
                u0,
                even_grid(count, _CAP, 1.0),
                log_prior,
                "exact" if u0[0].numel() <= _EXACT else "hutchinson",
                normal=lambda: draws.normal(shape) * hidden,
            )
        t = torch.linspace(_CAP, 1, count + 1, dtype=torch.float64)
        return (t[1:] + t[:-1]) / 2, -log_p, -integrals, None

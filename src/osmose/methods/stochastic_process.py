r"""Diffusion of series as functions of time (arXiv 2211.02590): `dspd` in N steps, `cspd` in continuous time.

The noise of a series is a Gaussian process (`processes.kernels`) at its own times, so that noisy series are as
continuous as clean ones and times need no grid. With C a root of the covariance of the noise, U = C^-1 (X - m) / s is
diffused by white noise: schedules, parametrizations and solvers are those of every other Gaussian model. m is what the
process expects given the known values, s the deviation of each column of U in training.

Each value of an item is hidden, known or absent. The model draws the hidden ones given the known ones; absent values,
missing in the data, take no part. What is hidden in training is the task (`methods.hiding`).

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
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.chain import Variance
from osmose.gaussian.denoiser import Conditioned, NetworkDenoiser
from osmose.gaussian.draws import Draws, StepDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.parametrization import VParametrization, column, noised
from osmose.gaussian.schedule import LinearSchedule, VPSchedule
from osmose.gaussian.solvers import Ancestral, Heun
from osmose.methods.base import GenerativeModel, MethodConfig, SamplingConfig
from osmose.methods.chain import GaussianSampling, ParametrizationChoice, ScheduleChoice
from osmose.methods.densities import Hidden, Scored, by_flow, in_steps
from osmose.methods.hiding import Hiding, Setting, Task
from osmose.methods.messages import Batch, BoundTerms, LossTerms, OnStep, Watch
from osmose.methods.times import TimesChoice, UniformTimes
from osmose.networks import SERIES_NETWORKS
from osmose.networks.series import SeriesNetworkConfig, SeriesTransformerConfig
from osmose.processes import KERNELS
from osmose.processes.kernels import Kernel, OUKernel

SeriesNetworkChoice = Annotated[SerializeAsAny[SeriesNetworkConfig], BeforeValidator(SERIES_NETWORKS.parse)]
KernelChoice = Annotated[SerializeAsAny[Kernel], BeforeValidator(KERNELS.parse)]

#: Sets of times that a run keeps, to draw samples at.
_GRIDS = 256
#: Times that cover so many times as much as those of training, or are so many times closer or farther, are unlike them.
_FAR, _FREQUENCY = 1.5, 8.0


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

    @property
    def use(self) -> str:
        own = {"forecast": "osmose backtest {run}", "impute": "osmose impute {run} FILE"}
        return own.get(self.task, super().use)

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
        self.hiding = Hiding(self.kernel, config.pinned, config.local, config.task, config.horizon)
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
        setting = self.hiding.setting(
            batch.x0, batch.times, torch.ones(batch.x0.shape, dtype=torch.bool), batch.condition
        )
        self._network(batch.x0, torch.full((items,), 500.0, device=self.device), setting)

    def complaints(self) -> list[str]:
        times = self._kept()[:1, : int(self.lengths[0])]
        found = [self.kernel.warning(times) if bool(times.any()) else None, self._unlike]
        return [*super().complaints(), *(warning for warning in found if warning is not None)]

    def report(self) -> dict[str, float]:
        self._unlike = None  # what is asked for next has complaints of its own
        return super().report()

    def _compare(self, times: Tensor, free: bool) -> None:
        """Note times that are unlike those of training; of series that are drawn freely, also when they begin."""
        form, there = self.spec.series, times.isfinite()
        assert form is not None
        gaps = times.diff(dim=1)[there[:, 1:]]
        if len(gaps) and not form.gap / _FREQUENCY < float(gaps.median()) < form.gap * _FREQUENCY:
            self._unlike = f"times: are {float(gaps.median()):.4g} apart, and those of training {form.gap:.4g}"
        span = float((times.nan_to_num(-math.inf).amax(1) - times[:, 0]).max())
        if span > _FAR * form.span:
            self._unlike = f"times: cover {span:.4g}, and those of training at most {form.span:.4g}"
        if free and not form.from_first:  # the network counts from the first time of an item, wherever that is
            first, begins = times[:, 0], self._kept()[:, 0]
            low, high = float(begins.min()) - form.gap, float(begins.max()) + form.gap
            if not low <= float(first.min()) <= float(first.max()) <= high:
                self._unlike = (
                    f"times: begin between {float(first.min()):.4g} and {float(first.max()):.4g}, and those of "
                    f"training between {float(begins.min()):.4g} and {float(begins.max()):.4g}, as whose they are taken"
                )

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
            setting, x = self.hiding.hide(part, draws)
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
        known = there & ~self.hiding.late(there, every)
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
        setting, x = self.hiding.hide(batch, draws)
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
        self._compare(times, free=not bool(known.isfinite().any()))
        setting = self.hiding.setting(known, times, hidden, condition)
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
            raise UserError(
                "known: given, and this run learned with task=generate, to draw whole series; forecasts and "
                "imputations are made by one that learned with forecast, impute or any"
            )
        if task == "forecast":
            if none:
                raise UserError(
                    "known: nothing is, and this run learned with task=forecast, from what comes before; use osmose "
                    "forecast, or draw samples without times"
                )
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
            setting, x = self.hiding.hide(
                whole, draws.branch("hidden"), "generate" if self.config.task == "any" else None
            )
            u0 = self._whiten(x, setting)
        unit = self._network.scale.cpu().double() * setting.scale.cpu().double()
        unit = unit * torch.tensor(self.spec.scale, dtype=torch.float64)[:, None]
        volume = (
            (setting.hidden.cpu().double() * (unit.log() + setting.factor.log_det().cpu().double())).flatten(1).sum(1)
        )
        count = setting.count.cpu().double()
        found = self._scored(u0, setting, draws, on_step, num_steps, variance)
        errors = None if found.errors is None else found.errors / count[:, None]
        exact = not self.config.schedule.native_steps
        steps = found.steps / count[:, None]
        return BoundTerms(found.t, (found.prior + volume) / count, steps, errors, is_density=True, is_exact=exact)

    def _scored(
        self,
        u0: Tensor,
        setting: Setting,
        draws: Draws,
        on_step: OnStep,
        num_steps: int | None,
        variance: str | None,
    ) -> Scored:
        """The likelihood of U: in steps its bound, in continuous time by the flow."""
        problem = Hidden(self.denoiser, setting, setting.hidden, lambda: self._noise(draws, setting).to(u0.dtype))
        if self.config.schedule.native_steps is None:
            if variance is not None:
                raise UserError(f"variance: the ODE of {self.config.kind} has none to choose")
            return by_flow(problem, u0, on_step, num_steps)
        solver = self.config.sampling.solver
        kind = variance or (solver.variance if isinstance(solver, Ancestral) else "fixed_small")
        if kind not in ("fixed_small", "fixed_large"):
            raise UserError(f"variance: {kind!r} is not valid: should be 'fixed_small' or 'fixed_large'")
        return in_steps(problem, u0, cast(Variance, kind), on_step, num_steps or self.config.schedule.native_steps)

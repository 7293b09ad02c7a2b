"""Gaussian diffusion: DDPM (arXiv 2006.11239), improved DDPM (arXiv 2102.09672) and EDM (arXiv 2206.00364).

All are one model put together from parts: a schedule, a parametrization, an objective, a law of training times, a
network, a solver. The training loss of an item is

    mean over dimensions of (F(c_in x_t, label) - F*)^2,   x_t = alpha x0 + sigma eps,

in the units of the parametrization's own target F*, or another objective (`methods.objectives`). `ddpm`, `iddpm` and
`edm` differ only in the defaults of the parts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, cast, get_args

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.chain import ReverseChain, Variance
from osmose.gaussian.denoiser import Conditioned
from osmose.gaussian.draws import Draws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.parametrization import EDMParametrization, EpsParametrization, column, noised
from osmose.gaussian.schedule import CosineSchedule, Level, LinearSchedule, VarianceExploding
from osmose.gaussian.score import ScoreField, score_field
from osmose.gaussian.solvers import Ancestral, Heun
from osmose.methods import OBJECTIVES
from osmose.methods.base import SamplingConfig
from osmose.methods.chain import (
    ChainModel,
    GaussianSampling,
    GuidedSampling,
    ParametrizationChoice,
    ProcessConfig,
    ScheduleChoice,
    calibrate,
)
from osmose.methods.densities import level_decoder
from osmose.methods.messages import Batch, BoundTerms, LossTerms, OnStep, Regression, Watch
from osmose.methods.objectives import HybridObjective, Objective, Problem, SimpleObjective
from osmose.methods.sharing import SharedSigma
from osmose.methods.times import LogNormalTimes, TimesChoice, UniformTimes

ObjectiveChoice = Annotated[SerializeAsAny[Objective], BeforeValidator(OBJECTIVES.parse)]

#: Steps of the bound on a schedule that has none of its own.
_BOUND_STEPS = 1000
#: Times, and ratios of levels, that differ by less are the same.
_SAME_TIME = 1e-9


class DiffusionConfig(ProcessConfig, SharedSigma):
    """The parts of a Gaussian diffusion model."""

    objective: ObjectiveChoice = SimpleObjective()
    times: TimesChoice
    variance: Variance = Field(
        "fixed_small", description="of the reverse chain in the bound; learned_range is a second output of the network"
    )
    label_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of items whose class is not told in training, which guidance needs"
    )
    sampling: GuidedSampling = GuidedSampling()

    @model_validator(mode="after")
    def _has_labels(self) -> DiffusionConfig:
        if self.label_dropout and not self.conditional:
            raise ConfigError("label_dropout", f"{self.label_dropout:g} needs conditional=true: no class is told")
        return self

    def build(self, spec: DataSpec) -> Diffusion:
        return Diffusion(self, spec)


class DDPMConfig(DiffusionConfig):
    """DDPM: noise prediction on T discrete steps."""

    kind: Literal["ddpm"] = "ddpm"
    schedule: ScheduleChoice = LinearSchedule()
    parametrization: ParametrizationChoice = EpsParametrization()
    times: TimesChoice = UniformTimes()


class IDDPMConfig(DDPMConfig):
    """Improved DDPM: DDPM with a learned variance, taught by L_hybrid on the cosine schedule of 4,000 steps."""

    kind: Literal["iddpm"] = "iddpm"  # type: ignore[assignment]
    schedule: ScheduleChoice = CosineSchedule(num_steps=4000)
    objective: ObjectiveChoice = HybridObjective()
    variance: Variance = "learned_range"
    sampling: GuidedSampling = GuidedSampling(num_steps=100, solver=Ancestral(variance="learned_range"))


class EDMConfig(DiffusionConfig):
    """EDM: preconditioned denoising at continuous noise levels, sampled with Heun's method."""

    kind: Literal["edm"] = "edm"
    schedule: ScheduleChoice = VarianceExploding()
    parametrization: ParametrizationChoice = EDMParametrization()
    times: TimesChoice = LogNormalTimes()
    sampling: GuidedSampling = GuidedSampling(num_steps=18, solver=Heun(), clip=False)

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:
        return {
            **super().recipe(spec, data_std),
            "parametrization": {"kind": "edm", "sigma_data": round(data_std, 3)},
            "times": {"kind": "log-normal", "stratified": True},
        }


class Diffusion(ChainModel):
    """See `DiffusionConfig`."""

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.schedule = config.schedule
        try:
            self.sampling()
        except UserError as error:  # before training, not after
            raise UserError(f"sampling.{error}") from None
        learned = config.variance == "learned_range"
        self.denoiser = config.denoiser(spec, **({"num_outputs": 2} if learned else {}))
        if learned:  # before training, not after
            with torch.no_grad():
                self.denoiser.outputs(torch.zeros(1, *spec.shape), TimeGrid.of(config.schedule, 1).levels[0])
        self.times = config.times.build(config.schedule)
        native = config.schedule.native_steps
        self._problem = Problem(
            self.denoiser,
            config.variance,
            None if native is None else ReverseChain(TimeGrid.of(config.schedule, native)),
            level_decoder(spec),
        )
        config.objective.check(self._problem)

    def sampling(self, **options: Any) -> SamplingConfig:
        sampling = super().sampling(**options)
        assert isinstance(sampling, GaussianSampling)
        self.grid(sampling)  # refuses what does not fit the schedule
        self._require_variance("solver.variance", sampling.solver.needs_learned_variance)
        if isinstance(sampling, GuidedSampling) and sampling.guidance is not None and not self.config.label_dropout:
            raise UserError(
                f"guidance: {sampling.guidance:g} needs a run that can do without classes: train with --conditional "
                "label_dropout=0.1"
            )
        return sampling

    def _require_variance(self, name: str, learned: bool) -> None:
        if learned and self.config.variance != "learned_range":
            raise UserError(
                f"{name}: learned_range needs a model with a learned variance (train with variance=learned_range "
                f"objective=hybrid); this one has {self.config.variance!r}"
            )

    def networks(self) -> list[nn.Module]:
        return [self.denoiser.network]

    def probe(self, items: int) -> None:
        self.denoiser.probe(items, self.spec.shape, self.config.conditional)

    def noise(self, draws: Draws) -> Tensor:
        return self.config.noise.sample(draws, self.spec.shape)

    def prepare(self, items: Iterable[Batch]) -> None:
        calibrate(self.denoiser, items, self.spec)

    def regression(self, batch: Batch, draws: Draws) -> Regression:
        if not isinstance(self.config.objective, SimpleObjective):
            return super().regression(batch, draws)
        t, weight = self.times.draw(draws)
        level, eps = self.schedule.level(t), self.noise(draws).to(batch.x0.dtype)
        x, label = self.denoiser.inputs(noised(batch.x0, eps, level), level)
        weight = torch.ones_like(t) if weight is None else weight
        target = self.denoiser.target(batch.x0, eps, level)
        return Regression(self.denoiser.network, x, label, batch.condition, target, weight.to(x))

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        return self._weighted(batch, draws, note=self.training)

    def loss_again(self, batch: Batch, draws: Draws) -> LossTerms:
        return self._weighted(batch, draws, note=False)

    def _weighted(self, batch: Batch, draws: Draws, note: bool) -> LossTerms:
        """The objective at times of the model's law, with their importance weights."""
        t, weight = self.times.draw(draws)
        terms = self._losses(batch, t, draws, note)
        per_item = terms.per_item if weight is None else terms.per_item * column(weight, terms.per_item)
        return LossTerms(per_item, terms.t, terms.parts | self.times.report(t), weight)

    def _losses(self, batch: Batch, t: Tensor, draws: Draws, note: bool) -> LossTerms:
        """The objective at given times, as the time sampler sees it, if it is to: without importance weights."""
        first = self.noise(draws).to(batch.x0.dtype)
        if self.training and self.config.label_dropout and batch.condition is not None:
            hidden = draws.branch("labels").uniform().to(self.device) < self.config.label_dropout
            batch = replace(batch, condition=torch.where(hidden, -1, batch.condition))

        def noise(index: int) -> Tensor:
            if index == 0:
                return first
            return self.noise(draws.branch("noise", index)).to(batch.x0.dtype)

        terms = self.config.objective.losses(self._problem, batch, t, noise)
        if note:
            self.times.observe(t, terms.per_item.detach())
        return terms

    def after_step(self, parts: Sequence[tuple[Batch, Draws]]) -> None:
        self.times.commit()
        for extra in range(self.times.extra_updates):
            for batch, draws in parts:
                branch = draws.branch("extra", extra)
                self._losses(batch, self.times.draw(branch)[0], branch, note=True)
            self.times.commit()

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
        decoder = level_decoder(self.spec)
        if decoder is None:
            raise UserError(
                "likelihood: bits per dimension need data with a known number of levels (256 for 8-bit images, 17 for "
                "the digits), the same in all channels; these have none"
            )
        kind = self.config.variance if variance is None else variance
        if kind not in get_args(Variance):
            raise UserError(
                f"variance: {kind!r} is not valid: should be 'fixed_small', 'fixed_large' or 'learned_range'"
            )
        self._require_variance("variance", kind == "learned_range")
        steps = (self.schedule.native_steps or _BOUND_STEPS) if num_steps is None else num_steps
        chain = ReverseChain(TimeGrid.of(self.schedule, steps))
        x0, n = batch.x0, len(batch.x0)
        table, x0_error, eps_error = (torch.empty(n, steps, dtype=torch.float64) for _ in range(3))
        for index in range(steps):
            level = chain.levels[index]
            eps = self.noise(draws).to(x0.dtype)
            x0_hat, share = self.denoiser.with_variance(noised(x0, eps, level), level, batch.condition)
            eps_error[:, index] = (x0 - x0_hat).square().flatten(1).mean(1) * (level.alpha / level.sigma) ** 2
            if clip and self.spec.model_range is not None:
                x0_hat = x0_hat.clamp(*self.spec.model_range)
            k = torch.full((n,), index + 1)
            log_variance = chain.log_variance(cast(Variance, kind), k, share, x0)
            table[:, index] = chain.term(k, x0, x0_hat, log_variance, decoder)
            x0_error[:, index] = (x0 - x0_hat).square().flatten(1).mean(1)
            on_step(index + 1, steps)
        t = torch.tensor([level.t for level in chain.levels], dtype=torch.float64)
        return BoundTerms(t, chain.prior_term(x0.cpu().double(), self.schedule.prior_std), table, x0_error, eps_error)

    def score_field(self) -> ScoreField:
        return score_field(self.denoiser, self.schedule)

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, GaussianSampling)
        grid = self.grid(sampling)
        x = self.noise(draws) * self.schedule.prior_std
        return self._run(x, grid.levels, draws, sampling, self._denoise(sampling, condition), on_step)

    def entry(self, t: float, sampling: GaussianSampling) -> Level[float]:
        if not 0 < t <= 1:
            raise UserError(f"t: {t} is not valid: must be above 0 and at most 1")
        total = self.schedule.native_steps
        if total is not None and abs(t * total - round(t * total)) > 1e-6:
            step = int(t * total)
            near = " or ".join(f"{k / total:g} (step {k})" for k in (step, step + 1) if k)
            raise UserError(f"t: {t} is not on the grid of the {total} steps of the schedule; take {near}")
        levels = self.grid(sampling).levels[:-1]
        for level in levels:
            if level.t <= t + _SAME_TIME:
                return level
        raise UserError(
            f"t: {t} lies below all {len(levels)} steps of the chain, whose last is at {levels[-1].t:.4g}; take a "
            "larger t or more steps"
        )

    def level_at(self, ratio: float, sampling: GaussianSampling) -> Level[float]:
        first, total = self.grid(sampling).levels[0], self.schedule.native_steps
        if ratio * first.alpha >= first.sigma:
            return first
        t = self.schedule.time_of(-2 * math.log(ratio))
        if total is not None:
            t = (t * total).round().clamp(1, total) / total
        return TimeGrid.at(self.schedule, t.reshape(1)).levels[0]

    def recall(
        self, x0: Tensor, t: float, draws: Draws, sampling: GaussianSampling, condition: Tensor | None
    ) -> Tensor:
        level = self.entry(t, sampling)
        x_t = noised(x0, self.noise(draws), level)
        return self._denoise(sampling, condition)(x_t, level)

    def refine(
        self,
        x0: Tensor,
        t: float,
        draws: Draws,
        sampling: GaussianSampling,
        condition: Tensor | None,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        levels, start = self.grid(sampling).levels, self.entry(t, sampling)
        x = noised(x0, self.noise(draws), start)
        levels = levels[levels.index(start) :]
        return self._run(x, levels, draws, sampling, self._denoise(sampling, condition), on_step)

    def outline(
        self, ratio: float, draws: Draws, sampling: GaussianSampling, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        last, denoise = self.level_at(ratio, sampling), self._denoise(sampling, condition)
        levels = (*(level for level in self.grid(sampling).levels[:-1] if level.t > last.t + _SAME_TIME), last)
        x = self.noise(draws) * self.schedule.prior_std

        def one_more(done: int, of: int, state: Tensor | None = None, /) -> None:
            on_step(done, of + 1, state)

        x, _ = self._run(x, levels, draws, sampling, denoise, one_more)
        x0 = denoise(x, levels[-1])
        on_step(len(levels), len(levels), x0)
        return x0, denoise.calls

    def grid(self, sampling: GaussianSampling) -> TimeGrid:
        """The levels that samples pass through."""
        return TimeGrid.of(self.schedule, sampling.num_steps, sampling.spacing)

    def _denoise(self, sampling: GaussianSampling, condition: Tensor | None) -> Conditioned:
        guidance = sampling.guidance if isinstance(sampling, GuidedSampling) else None
        return Conditioned(self.denoiser, condition, self.spec.model_range if sampling.clip else None, guidance)

    def _run(
        self,
        x: Tensor,
        levels: tuple[Level[float], ...],
        draws: Draws,
        sampling: GaussianSampling,
        denoise: Conditioned,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        """Take x from the first of some levels to the last; x there, and the evaluations that it took."""
        solver, grid = sampling.solver, TimeGrid(levels)
        if warning := solver.warning(sampling.num_steps, self.schedule.native_steps):
            warnings.warn(warning, stacklevel=2)

        on_step(0, grid.num_steps, x / levels[0].size)
        for step, state in enumerate(solver.run(denoise, x, grid, lambda: self.noise(draws)), 1):
            x = state.x
            on_step(step, grid.num_steps, x / levels[step].size)
        return x, denoise.calls

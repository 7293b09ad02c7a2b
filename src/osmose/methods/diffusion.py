"""Gaussian diffusion: DDPM (arXiv 2006.11239) and EDM (arXiv 2206.00364).

Both are one model put together from parts: a schedule, a parametrization, a law of training times, a network, a
solver. The training loss of an item is

    mean over dimensions of (F(c_in x_t, label) - F*)^2,   x_t = alpha x0 + sigma eps,

in the units of the parametrization's own target F*: for `eps` this is DDPM's L_simple, for `edm` it is EDM's
weighted loss (its lambda(sigma) c_out^2 is 1). `ddpm` and `edm` differ only in the defaults of the parts.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian import NOISES, PARAMETRIZATIONS, SCHEDULES, SOLVERS
from osmose.gaussian.denoiser import Clipped, Denoiser, NetworkDenoiser
from osmose.gaussian.draws import Draws
from osmose.gaussian.grid import Spacing, TimeGrid
from osmose.gaussian.noise import Noise, WhiteNoise
from osmose.gaussian.parametrization import EDMParametrization, EpsParametrization, Parametrization, column, noised
from osmose.gaussian.schedule import LinearSchedule, Schedule, VarianceExploding
from osmose.gaussian.solvers import DDIM, Heun, Solver
from osmose.methods import TIME_SAMPLERS
from osmose.methods.base import (
    Batch,
    GenerativeModel,
    LossTerms,
    MethodConfig,
    NetworkChoice,
    OnStep,
    SamplingConfig,
)
from osmose.methods.times import LogNormalTimes, TimeSamplerConfig, UniformTimes
from osmose.networks.presets import network_for

ScheduleChoice = Annotated[SerializeAsAny[Schedule], BeforeValidator(SCHEDULES.parse)]
ParametrizationChoice = Annotated[SerializeAsAny[Parametrization], BeforeValidator(PARAMETRIZATIONS.parse)]
NoiseChoice = Annotated[SerializeAsAny[Noise], BeforeValidator(NOISES.parse)]
SolverChoice = Annotated[SerializeAsAny[Solver], BeforeValidator(SOLVERS.parse)]
TimesChoice = Annotated[SerializeAsAny[TimeSamplerConfig], BeforeValidator(TIME_SAMPLERS.parse)]


class GaussianSampling(SamplingConfig):
    """Solver, number of steps and their spacing."""

    solver: SolverChoice = DDIM()
    spacing: Spacing = "even"
    clip: bool = Field(True, description="keep the denoised estimate inside the data's range, where there is one")


class DiffusionConfig(MethodConfig):
    """The parts of a Gaussian diffusion model."""

    network: NetworkChoice
    schedule: ScheduleChoice
    parametrization: ParametrizationChoice
    noise: NoiseChoice = WhiteNoise()
    times: TimesChoice
    sampling: GaussianSampling = GaussianSampling()

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {"network": network_for(spec.shape)}

    def build(self, spec: DataSpec) -> Diffusion:
        return Diffusion(self, spec)


class DDPMConfig(DiffusionConfig):
    """DDPM: noise prediction on T discrete steps."""

    kind: Literal["ddpm"] = "ddpm"
    schedule: ScheduleChoice = LinearSchedule()
    parametrization: ParametrizationChoice = EpsParametrization()
    times: TimesChoice = UniformTimes()


class EDMConfig(DiffusionConfig):
    """EDM: preconditioned denoising at continuous noise levels, sampled with Heun's method."""

    kind: Literal["edm"] = "edm"
    schedule: ScheduleChoice = VarianceExploding()
    parametrization: ParametrizationChoice = EDMParametrization()
    times: TimesChoice = LogNormalTimes()
    sampling: GaussianSampling = GaussianSampling(num_steps=18, solver=Heun(), clip=False)

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:
        return {
            **super().recipe(spec, data_std),
            "parametrization": {"kind": "edm", "sigma_data": round(data_std, 3)},
            "times": {"kind": "log-normal", "stratified": True},
        }


class Diffusion(GenerativeModel):
    """See `DiffusionConfig`.

    Attributes:
        denoiser: E[x0 | x_t], what distillation, analysis and guidance work with.
        schedule: the noise schedule.
    """

    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.schedule = config.schedule
        try:
            self.sampling()
        except UserError as error:  # before training, not after
            raise UserError(f"sampling.{error}") from None
        network = config.network.build(spec.shape, num_classes=spec.num_classes if config.conditional else None)
        self.denoiser = NetworkDenoiser(network, config.schedule, config.parametrization)
        self.times = config.times.build(config.schedule)

    def sampling(self, **options: Any) -> SamplingConfig:
        sampling = super().sampling(**options)
        assert isinstance(sampling, GaussianSampling)
        TimeGrid.of(self.schedule, sampling.num_steps, sampling.spacing)  # refuses what does not fit the schedule
        return sampling

    def networks(self) -> list[nn.Module]:
        return [self.denoiser.network]

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        t, weight = self.times.draw(draws)
        level = self.schedule.level(t)
        eps = self.config.noise.sample(draws, self.spec.shape).to(batch.x0.dtype)
        out = self.denoiser.output(noised(batch.x0, eps, level), level, batch.condition)
        per_item = (out - self.denoiser.target(batch.x0, eps, level)).square().flatten(1).mean(1)
        if self.training:
            self.times.observe(t, per_item.detach())
        return LossTerms(per_item if weight is None else per_item * column(weight, per_item), t)

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: OnStep
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, GaussianSampling)
        solver, grid = sampling.solver, TimeGrid.of(self.schedule, sampling.num_steps, sampling.spacing)
        if warning := solver.warning(grid.num_steps, self.schedule.native_steps):
            warnings.warn(warning, stacklevel=2)
        denoiser: Denoiser = self.denoiser
        if sampling.clip and self.spec.model_range is not None:
            denoiser = Clipped(denoiser, *self.spec.model_range)

        def noise() -> Tensor:
            return self.config.noise.sample(draws, self.spec.shape)

        x = noise() * self.schedule.prior_std
        for step, state in enumerate(solver.run(lambda x, level: denoiser(x, level, condition), x, grid, noise), 1):
            x = state.x
            on_step(step, grid.num_steps)
        return x, solver.evaluations(grid.num_steps)

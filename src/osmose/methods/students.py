"""Students: networks distilled from a diffusion, each of which samples in the few steps of one grid.

A diffusion can be run with any number of steps; a student has learned where to jump from each level of its own grid,
and knows nothing of others. A grid is given by groups of the N steps of the finest one, the teacher's: 4 groups are 4
steps, from the top of each group to its bottom.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.denoiser import Conditioned, NetworkDenoiser
from osmose.gaussian.draws import Draws
from osmose.gaussian.grid import Spacing, TimeGrid
from osmose.gaussian.jumps import Partition
from osmose.gaussian.solvers import DDIM
from osmose.methods.base import GenerativeModel, MethodChoice, MethodConfig, SamplingConfig
from osmose.methods.chain import ChainModel
from osmose.methods.messages import Batch, LossTerms, Watch
from osmose.networks.base import NetworkConfig

#: So many groups of equal length, or the last step of each group.
Groups = int | tuple[int, ...]


def num_groups(groups: Groups) -> int:
    """How many there are: the steps of a grid."""
    return groups if isinstance(groups, int) else len(groups)


class StudentSampling(SamplingConfig):
    """Which of the grids."""

    num_steps: int = Field(1, ge=1, description="steps, one of the numbers that were distilled")


class StudentConfig(MethodConfig):
    """Students of one diffusion, which have its schedule, parametrization and network."""

    model: MethodChoice = Field(description="the diffusion that they are like")
    num_steps: int = Field(ge=1, description="N, the steps of the finest grid")
    spacing: Spacing = Field("even", description="of the finest grid")
    teacher_grid: Groups = Field(description="groups of the N steps: the first teacher's steps")
    grids: tuple[Groups, ...] = Field(min_length=1, description="groups of the N steps, one grid for each student")
    clip: bool = Field(False, description="keep the denoised estimate inside the data's range")
    teacher_sampling: dict[str, Any] = Field(
        default_factory=dict, description="how the first teacher draws the samples that students imitate"
    )
    sampling: StudentSampling = StudentSampling()

    @model_validator(mode="after")
    def _grids_fit(self) -> StudentConfig:
        if self.conditional != self.model.conditional:
            raise ValueError(f"conditional has to be as the diffusion's, {self.model.conditional}")
        for groups in (self.teacher_grid, *self.grids):
            Partition.of(groups, self.num_steps)
        counts = self.counts()[1:]
        if len(set(counts)) < len(counts):
            raise ValueError(f"grids: two have the same number of steps ({', '.join(map(str, counts))})")
        return self

    @property
    def network_config(self) -> NetworkConfig | None:
        found: NetworkConfig | None = self.model.network_config
        return found

    def with_network(self, network: NetworkConfig) -> MethodConfig:
        return type(self).parse(self.to_json() | {"model": self.model.with_network(network).to_json()})

    def counts(self) -> list[int]:
        """Steps of the first teacher, and of each student in turn."""
        return [num_groups(groups) for groups in (self.teacher_grid, *self.grids)]

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        kind = cls.model_fields["kind"].default
        command = f"osmose distill {'tract' if kind == 'distilled' else kind} RUN --out RUN2"
        raise UserError(f"{kind}: is distilled from a trained run, not trained; use {command}")


class DistilledConfig(StudentConfig):
    """The students of all phases of a distillation."""

    kind: Literal["distilled"] = "distilled"
    taught: str = Field(description="the method that taught them")

    def history(self) -> str:
        """What they were distilled by, and through which numbers of steps."""
        return f"{self.taught}, {' to '.join(map(str, self.counts()))} steps"

    def build(self, spec: DataSpec) -> Students:
        return Students(self, spec).requires_grad_(False)


class Students(GenerativeModel):
    """See the module's text.

    Attributes:
        students: the denoiser of each grid.
        grids: the levels of each student, noisiest first, by the number of its steps.
    """

    config: StudentConfig

    def __init__(self, config: StudentConfig, spec: DataSpec):
        super().__init__(config, spec)
        chain = config.model.build(spec)
        if not isinstance(chain, ChainModel):
            raise UserError(f"{config.model.kind}: is no diffusion that can be distilled; ddpm, iddpm and edm are")
        if config.clip and spec.model_range is None:
            raise UserError("clip: true needs data with a range, and these have none")
        self.schedule, self._noise = chain.schedule, chain.noise
        self.finest = TimeGrid.of(chain.schedule, config.num_steps, config.spacing).levels[::-1]
        others = (copy.deepcopy(chain.denoiser) for _ in config.grids[1:])
        self.students = nn.ModuleList([chain.denoiser, *others])
        self.grids = {}
        for groups in config.grids:
            tops = Partition.of(groups, config.num_steps).tops
            self.grids[len(tops)] = TimeGrid(tuple(self.finest[step] for step in (*tops[::-1], 0)))
        self.sampling()

    def student(self, num_steps: int) -> NetworkDenoiser:
        """The denoiser of the grid with so many steps."""
        found = self.students[list(self.grids).index(num_steps)]
        assert isinstance(found, NetworkDenoiser)
        return found

    def sampling(self, **options: Any) -> StudentSampling:
        for name in sorted(set(options) - set(StudentSampling.model_fields)):
            if options[name] is not None:
                raise UserError(f"{name}: {options[name]!r} given, but of a student only num_steps can be chosen")
        sampling = super().sampling(**options)
        assert isinstance(sampling, StudentSampling)
        if sampling.num_steps not in self.grids:
            known = ", ".join(map(str, sorted(self.grids)))
            raise UserError(f"num_steps: {sampling.num_steps} is no grid that was distilled; those are {known}")
        return sampling

    def networks(self) -> list[nn.Module]:
        return [self.student(self.sampling().num_steps).network]

    def probe(self, items: int) -> None:
        self.student(self.sampling().num_steps).probe(items, self.spec.shape, self.config.conditional)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:  # noqa: ARG002
        raise UserError("distilled: is put together of distilled students and has nothing to train")

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, StudentSampling)
        limits = self.spec.model_range if self.config.clip else None
        denoise = Conditioned(self.student(sampling.num_steps), condition, limits)
        x = self._noise(draws) * self.schedule.prior_std
        grid = self.grids[sampling.num_steps]
        on_step(0, grid.num_steps, x / grid.levels[0].size)
        for step, state in enumerate(DDIM().run(denoise, x, grid, lambda: self._noise(draws)), 1):
            x = state.x
            on_step(step, grid.num_steps, x / grid.levels[step].size)
        return x, denoise.calls

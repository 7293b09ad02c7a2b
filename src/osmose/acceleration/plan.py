"""What a distillation will be, decided before it begins: grids, phases, how each is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator

from osmose.configuration import Config, override
from osmose.data.dataset import DataSpec
from osmose.errors import UserError, nearest
from osmose.gaussian.draws import mix
from osmose.gaussian.grid import Spacing
from osmose.gaussian.jumps import Partition
from osmose.methods import DISTILLED, METHODS, STEPWISE
from osmose.methods.diffusion import DiffusionConfig
from osmose.methods.students import DistilledConfig, Groups, StudentConfig, num_groups
from osmose.methods.time_distillation import TimeDistillationConfig
from osmose.training.config import Parent, RunConfig, TrainingConfig
from osmose.training.recipes import checked, training_for
from osmose.training.run import require_real

#: The teacher's steps where the user names none, by solver. So many steps of DDIM are nearly as good as a thousand, and
#: the fewer steps a jump has to be learned through, the faster it is learned.
STEPS = {"ddim": 64, "heun": 40}
#: What suits the regression onto a teacher better than what suits training on data.
_TRAINING = {"precision": "fp32", "keep_checkpoints": 1}
#: What can be changed of each method.
_COMMON = ("solver", "weight", "snr_cap", "clip", "spacing")
_CHANGES = {"tract": (*_COMMON, "ema_self"), "btd": _COMMON}
#: How each phase is told what `training.` says of others.
_SAID = {"steps": "steps (--steps 2000, or --steps 500,1500)", "lr": "lr (--lr)", "ema": "ema_residual"}


class Options(Config):
    """What can be said of a distillation, besides changes of training and of the method."""

    schedule: tuple[int | tuple[int, ...], ...] | None = Field(
        None,
        description="numbers of steps, the teacher's first; a student's may be the last step of each of its groups "
        "instead, in steps of the finest grid",
    )
    steps: int | tuple[int, ...] | None = Field(
        None, description="optimisation steps in all, shared equally by the phases, or of each phase"
    )
    lr: float | tuple[float, ...] = Field(1e-3, description="learning rate after warm-up, of all phases or of each")
    ema_residual: float = Field(
        1e-3,
        ge=0,
        lt=1,
        description="weight of a phase's first state in the average that is sampled from, relative to the last: the "
        "decay is its N-th root for a phase of N steps; 0 for no average",
    )
    warm_start: bool = Field(True, description="start each student from its teacher's weights")
    parametrization: str | None = Field(None, description="what students predict; what the teacher does if null")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")

    @field_validator("schedule", "steps", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """Say what is wrong before a union of types is tried, which says it of each."""
        for part in _flat(value):
            if isinstance(part, bool) or not isinstance(part, int) or part < 1:
                raise ValueError("should be whole numbers, at least 1")
        return value

    @field_validator("lr", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        for part in _flat(value):
            if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part < math.inf:
                raise ValueError("should be a number above 0")
        return value


def _flat(value: Any) -> list[Any]:
    if value is None:
        return []
    return [part for inner in value for part in _flat(inner)] if isinstance(value, list | tuple) else [value]


class Plan(Config):
    """All that is decided before a distillation begins: distillation.json."""

    format: Literal["osmose-distillation-1"] = "osmose-distillation-1"
    teacher: Parent = Field(description="the run that is distilled")
    seed: int = Field(description="of everything random")
    warm_start: bool = Field(description="whether students start from the weights of their teachers")
    phases: tuple[RunConfig, ...] = Field(description="of each phase's run; its parent is known when it begins")

    @property
    def methods(self) -> list[TimeDistillationConfig]:
        """The method of each phase."""
        found = []
        for phase in self.phases:
            assert isinstance(phase.method, TimeDistillationConfig)
            found.append(phase.method)
        return found

    @property
    def method(self) -> str:
        """Either "tract" or "btd"."""
        return self.methods[0].kind

    def counts(self) -> list[int]:
        """Steps of the teacher, and of each student in turn."""
        return [self.methods[0].counts()[0], *(method.counts()[1] for method in self.methods)]

    def result(self) -> RunConfig:
        """The configuration of the run that is made of all students."""
        last = self.methods[-1]
        method = DistilledConfig(
            taught=self.method,
            teacher_grid=self.methods[0].teacher_grid,
            model=last.model,
            conditional=last.conditional,
            num_steps=last.num_steps,
            spacing=last.spacing,
            grids=tuple(own.grids[0] for own in self.methods),
            clip=last.clip,
            teacher_sampling=last.teacher_sampling,
            sampling=last.sampling,
        )
        updates = sum(phase.training.steps for phase in self.phases)
        training = self.phases[-1].training.model_copy(update={"steps": updates})
        changes = {"method": method, "parent": self.teacher, "seed": self.seed, "training": training}
        made: RunConfig = self.phases[-1].model_copy(update=changes)
        return made


def plan(teacher: RunConfig, parent: Parent, method: str, said: Mapping[str, Any]) -> Plan:
    """Decide everything about a distillation.

    Args:
        teacher: the configuration of the run that is distilled.
        parent: its name and hash.
        method: "tract" or "btd".
        said: `Options` by name, `spacing` of the teacher's steps, and dotted overrides of training
            (`training.batch_size`) and of the method (`weight`, `ema_self`, `solver`).

    Raises:
        UserError: anything that is refused; the message names the field and the numbers.
    """
    if method not in STEPWISE:
        raise UserError(f"method: {method!r} is not valid: should be one of {', '.join(DISTILLED)}")
    require_real(teacher.method, parent.folder, "teaches no student, which begins as it is")
    options = Options.parse({name: value for name, value in said.items() if name in Options.model_fields})
    training = {n.removeprefix("training."): value for n, value in said.items() if n.startswith("training.")}
    changes = {n: v for n, v in said.items() if n not in Options.model_fields and not n.startswith("training.")}
    _require_known(method, training, changes)
    origin = _origin(teacher, method, options.schedule, changes)
    grids = _grids(origin, method, options.schedule)
    if options.parametrization is not None:
        origin = replace(origin, model=_with_head(origin.model, options.parametrization))
    _require_head(origin.model, num_groups(grids[-1]))
    lengths, rates = _lengths(options.steps, teacher.spec, len(grids) - 1), _each("lr", options.lr, len(grids) - 1)
    phases = []
    for index, (fine, coarse) in enumerate(pairwise(grids)):
        config = origin.phase(method, fine, coarse, changes)
        if index > 0:  # a student has learned where to jump, not a slope: only a diffusion's own steps can be Heun's
            config = config.replace(solver="ddim")
        own = training_for(teacher.spec, lengths[index]) | _TRAINING
        own |= {"lr": rates[index], "ema": options.ema_residual ** (1 / lengths[index])}
        made = {
            "method": config.to_json(),
            "training": override(own, training),
            "seed": mix(options.seed, "phase", index),
            "versions": {},
            "parent": None,
        }
        phases.append(checked(RunConfig.parse(teacher.to_json() | made)))
    return Plan(teacher=parent, seed=options.seed, warm_start=options.warm_start, phases=tuple(phases))


def _require_known(method: str, training: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Refuse what is decided here, or unknown.

    Raises:
        UserError: naming it, and what would be right.
    """
    for name in training.keys() & _SAID.keys():
        raise UserError(f"training.{name}: is said of each phase, by {_SAID[name]}")
    for name in changes:
        if name not in _CHANGES[method]:
            known = nearest(name, [*Options.model_fields, *_CHANGES[method]])
            hint = f"did you mean 'training.{name}'?" if name in TrainingConfig.model_fields else known
            raise UserError(f"{name}: unknown field; {hint}")


@dataclass(frozen=True)
class _Origin:
    """What the first teacher is, and the grid that it is run on.

    Attributes:
        model: a diffusion, the teacher or what it was distilled from.
        num_steps: of the finest grid.
        spacing: of the finest grid.
        start: the teacher's grid.
        clip: whether it keeps its estimates inside the data's range.
        student: whether it is a distilled run.
    """

    model: DiffusionConfig
    num_steps: int
    spacing: Spacing
    start: Groups
    clip: bool
    student: bool

    def phase(self, method: str, fine: Groups, coarse: Groups, changes: Mapping[str, Any]) -> TimeDistillationConfig:
        """A phase from one grid to a coarser one."""
        values = {
            "model": self.model.to_json(),
            "conditional": self.model.conditional,
            "num_steps": self.num_steps,
            "spacing": self.spacing,
            "teacher_grid": fine,
            "grids": [coarse],
            "clip": self.clip,
            "sampling": {"num_steps": num_groups(coarse)},
        }
        config: TimeDistillationConfig = METHODS.resolve(method).parse(override(values, changes))
        changed: TimeDistillationConfig = config.replace(teacher_sampling=self._sampling(config))
        return changed

    def _sampling(self, config: TimeDistillationConfig) -> dict[str, Any]:
        """How the first teacher samples in full: options of its run's `sample`."""
        if self.student:
            return {"num_steps": num_groups(self.start)}
        solver = {"kind": "heun"} if config.solver == "heun" else {"kind": "ddim", "eta": 0.0}
        return {"num_steps": self.num_steps, "spacing": self.spacing, "solver": solver, "clip": config.clip}


def _origin(teacher: RunConfig, method: str, schedule: Sequence[Groups] | None, changes: Mapping[str, Any]) -> _Origin:
    """The first teacher on its grid.

    Raises:
        UserError: what cannot be distilled, or not from so many steps.
    """
    config, first = teacher.method, None if not schedule else schedule[0]
    if first is not None and not isinstance(first, int):
        raise UserError(f"schedule: {list(first)} is not valid: the teacher's steps, which come first, are a number")
    if isinstance(config, StudentConfig):
        return _student(config, first, changes)
    if not isinstance(config, DiffusionConfig):
        raise UserError(f"{config.kind}: is no diffusion that can be distilled; ddpm, iddpm and edm are")
    native = config.schedule.native_steps
    suited = STEPS.get(changes.get("solver", "ddim"), STEPS["ddim"])
    count = first or min(native or suited, suited)
    if first is None and method == "btd":
        count = 2 ** (count.bit_length() - 1)
    if native is not None and count > native:
        raise UserError(
            f"schedule: begins with {count} steps, but the teacher was trained on {native}; begin with {native} or less"
        )
    spacing = changes.get("spacing", "even" if native is None else "trailing")
    clip = config.sampling.clip and teacher.spec.model_range is not None
    return _Origin(config, count, spacing, count, clip, False)


def _student(config: StudentConfig, first: int | None, changes: Mapping[str, Any]) -> _Origin:
    """A distilled run as the first teacher, on the grid with `first` steps or its finest."""
    known = {num_groups(groups): groups for groups in config.grids}
    count = max(known) if first is None else first
    if count not in known:
        raise UserError(
            f"schedule: begins with {count} steps, but the teacher was distilled to "
            f"{', '.join(map(str, sorted(known)))}; begin with one of these"
        )
    if "spacing" in changes:
        raise UserError("spacing: is of a diffusion's steps; a student has its own grids")
    if changes.get("solver", "ddim") != "ddim":
        raise UserError(f"solver: {changes['solver']!r} is for a diffusion's steps; the jumps of a student are ddim's")
    assert isinstance(config.model, DiffusionConfig), "nothing else is distilled"
    return _Origin(config.model, config.num_steps, config.spacing, known[count], config.clip, True)


def _grids(origin: _Origin, method: str, schedule: Sequence[Groups] | None) -> list[Groups]:
    """The grid of the teacher and of each student.

    Raises:
        UserError: numbers that do not fall or do not divide each other, groups that do not nest.
    """
    before = Partition.of(origin.start, origin.num_steps)
    first = len(before)
    if schedule is None:
        halves = [first]
        while halves[-1] % 2 == 0:
            halves.append(halves[-1] // 2)
        middle = [n for n in range(2, int(first**0.5) + 1) if first % n == 0]
        schedule = halves if method == "btd" else [first, *middle[-1:], 1]
    if len(schedule) < 2:
        raise UserError(f"schedule: {first} alone is not valid: the steps of at least one student come after it")
    grids: list[Groups] = [origin.start]
    for groups in schedule[1:]:
        count = groups if isinstance(groups, int) else len(groups)
        if count >= len(before):
            raise UserError(f"schedule: {count} after {len(before)} is not valid: the numbers of steps have to fall")
        if method == "btd" and len(before) != 2 * count:
            raise UserError(f"schedule: btd halves, and {len(before)} to {count} does not; use distill tract")
        if isinstance(groups, int):
            if len(before) % groups:
                raise UserError(f"schedule: {groups} does not divide {len(before)}, the steps before it")
            # Equal shares of the steps before, which need not be equal themselves.
            if groups > 1 and not isinstance(grids[-1], int):
                length = len(before) // groups
                groups = before.tops[length - 1 :: length]
        try:
            after = Partition.of(groups, origin.num_steps)
            after.within(before)
        except ValueError as error:
            raise UserError(f"schedule: {error}") from None
        grids.append(groups)
        before = after
    return grids


def _with_head(model: DiffusionConfig, kind: str) -> DiffusionConfig:
    """The diffusion with another parametrization."""
    own = model.parametrization.kind
    if kind == "edm" and own != "edm":
        raise UserError(f"parametrization: 'edm' is for students of an edm teacher, and this one is {own!r}; use v")
    changed: DiffusionConfig = model.replace(parametrization=kind)
    return changed


def _require_head(model: DiffusionConfig, last: int) -> None:
    if last == 1 and model.parametrization.kind == "eps":
        raise UserError(
            "parametrization: 'eps' cannot give x0 in one step, from pure noise; use parametrization=v, which the "
            "student learns beginning with the teacher's weights"
        )


def _lengths(steps: int | tuple[int, ...] | None, spec: DataSpec, phases: int) -> list[int]:
    """Optimisation steps of each phase."""
    if isinstance(steps, tuple):
        return _each("steps", steps, phases)
    total = default_steps(spec) if steps is None else steps
    if total < phases:
        raise UserError(f"steps: {total} is not valid: {phases} phases need at least one each")
    return [total // phases + (index < total % phases) for index in range(phases)]


def _each(name: str, value: Any, phases: int) -> list[Any]:
    """A value for each phase."""
    if not isinstance(value, tuple):
        return [value] * phases
    if len(value) != phases:
        raise UserError(f"{name}: {len(value)} values given for {phases} phases; give one, or one for each")
    return list(value)


def default_steps(spec: DataSpec) -> int:
    """Optimisation steps of all phases together, where the user says nothing."""
    small = spec.kind != "image" or spec.dimension <= 256
    return 3000 if small else 4000

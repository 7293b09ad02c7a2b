r"""Time distillation: a student learns to do in one jump what its teacher does in several steps.

The teacher's steps are cut into groups. For data noised to step t of a group with bottom b, the target is the f whose
`jump` from x_t ends where this ends:

`btd`   two teacher steps, t to t - 1 to b = t - 2, from the tops of groups of two: binary time distillation, known as
        progressive distillation (arXiv 2202.00512).
`tract` one teacher step, t to t - 1, and one jump of the *self-teacher*, an average of the student, t - 1 to b, from
        any step of a group of any length: transitive closure (arXiv 2303.04248). Where t - 1 = b there is no jump, and
        the target is the teacher's own estimate.

Both targets are a convex mixture of two estimates of x0 (`gaussian.jumps.share_of_first`), computed as such: nothing is
divided by the small angle between two levels. The loss is

    w(t) mean over dimensions of (g(x_t, t) - target)^2

on the student's estimate of x0 whatever its network predicts, with SNR = alpha_t^2 / sigma_t^2 and

=============  ======================================================================================================
truncated-snr  w = max(SNR, 1). The plain SNR would leave t = T, all that a one-step student is asked, untrained.
v              w = SNR + 1 / sigma_data^2: the squared error of EDM's output, and with sigma_data = 1, which stands for
               other parametrizations, that of v on a variance-preserving schedule
constant       w = 1
=============  ======================================================================================================

The student has the teacher's network and starts from its weights; the target level is not an input, it follows from t.
Dropout is off throughout.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.denoiser import Denoiser, NetworkDenoiser
from osmose.gaussian.draws import Draws
from osmose.gaussian.jumps import Partition, heun_x0, jump, share_of_first, take
from osmose.gaussian.parametrization import column, noised
from osmose.gaussian.schedule import Level
from osmose.methods.messages import Batch, LossTerms
from osmose.methods.students import StudentConfig, Students
from osmose.networks.averaging import newest_share
from osmose.networks.calibration import calibrations


class TimeDistillationConfig(StudentConfig):
    """One phase: from a teacher's grid to a coarser one."""

    solver: Literal["ddim", "heun"] = Field("ddim", description="of the teacher's steps")
    weight: Literal["truncated-snr", "v", "constant"] = Field("truncated-snr", description="of the loss at a level")
    snr_cap: float | None = Field(None, gt=0, description="largest SNR in the weight; null for none")

    @model_validator(mode="after")
    def _one_coarser_grid(self) -> TimeDistillationConfig:
        if len(self.grids) != 1:
            raise ValueError(f"grids: {len(self.grids)} given, a phase has one")
        try:
            self.groups()
        except ValueError as error:
            raise ValueError(f"grids: {error}") from None
        if self.weight == "constant" and self.snr_cap is not None:
            raise ValueError(f"snr_cap: {self.snr_cap:g} has no meaning with weight=constant")
        return self

    def groups(self) -> Partition:
        """The student's groups, in steps of the teacher."""
        teacher = Partition.of(self.teacher_grid, self.num_steps)
        return Partition.of(self.grids[0], self.num_steps).within(teacher)


class TractConfig(TimeDistillationConfig):
    """Transitive closure time-distillation (arXiv 2303.04248)."""

    kind: Literal["tract"] = "tract"
    ema_self: float = Field(
        0.5, ge=0, lt=1, description="decay of the average that teaches the end of the jump; 0: the student itself"
    )

    def build(self, spec: DataSpec) -> Tract:
        return Tract(self, spec)


class BTDConfig(TimeDistillationConfig):
    """Binary time distillation: progressive distillation (arXiv 2202.00512)."""

    kind: Literal["btd"] = "btd"

    @model_validator(mode="after")
    def _pairs(self) -> BTDConfig:
        groups = self.groups()
        lengths = {high - low for low, high in zip((0, *groups.tops), groups.tops, strict=False)}
        if lengths != {2}:
            total = groups.tops[-1]
            raise ValueError(
                f"grids: btd makes one step of two; {total} steps to {len(groups)} in groups of {sorted(lengths)}; "
                "use tract"
            )
        return self

    def build(self, spec: DataSpec) -> BTD:
        return BTD(self, spec)


class TimeDistillation(Students):
    """A student in training.

    Attributes:
        groups: the student's groups, in steps of the teacher.
    """

    config: TimeDistillationConfig

    def __init__(self, config: TimeDistillationConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.groups = config.groups()
        own = [self.finest[step] for step in (0, *Partition.of(config.teacher_grid, config.num_steps).tops)]
        columns = (torch.tensor(values, dtype=torch.float64) for values in zip(*own, strict=True))
        self._levels: Level[Tensor] = Level(*columns)
        self._bottoms = self.groups.bottoms()
        # Not a part of the module: a teacher is neither trained nor saved with the student.
        self._teacher: list[NetworkDenoiser] = []

    def begin(self, teacher: NetworkDenoiser, warm: bool = True) -> None:
        """Give the student its teacher; to be called before training, also when it is taken up again.

        Args:
            teacher: the denoiser whose steps are to be learned; it is copied.
            warm: start the student's network from the teacher's weights.
        """
        self._teacher = [copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)]
        if warm:
            self.learner.network.load_state_dict(teacher.network.state_dict())
        for own, known in zip(calibrations(self.learner), calibrations(teacher), strict=True):
            own.load_state_dict(known.state_dict())  # of the data, not of the teacher

    @property
    def learner(self) -> NetworkDenoiser:
        """The student's denoiser."""
        denoiser = self.students[0]
        assert isinstance(denoiser, NetworkDenoiser)
        return denoiser

    @property
    def teacher(self) -> NetworkDenoiser:
        """The teacher's denoiser.

        Raises:
            UserError: it has not been given; training goes through `osmose distill`.
        """
        if not self._teacher:
            raise UserError(
                f"{self.config.kind}: has no teacher; a distillation is continued by osmose distill "
                f"{self.config.kind} RUN --out RUN2 --resume"
            )
        return self._teacher[0].to(self.device)

    def train(self, mode: bool = True) -> TimeDistillation:  # noqa: ARG002
        """Leave dropout off: the targets are functions, and their noise would be learned."""
        return super().train(False)

    @abstractmethod
    def finish(self, x_m: Tensor, m: Level[Tensor], s: Level[Tensor], condition: Tensor | None) -> Tensor:
        """The f that leads from x_m, at the level after the teacher's step, to the bottom s of the group."""

    def steps(self, u: Tensor) -> Tensor:
        """The teacher's steps at which items are taught, int64 (B,), from uniform numbers (B,)."""
        return (u * self.groups.tops[-1]).long() + 1

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        step = self.steps(draws.uniform())
        t, m, s = (take(self._levels, rows) for rows in (step, step - 1, self._bottoms[step - 1]))
        x_t = noised(batch.x0, self._noise(draws).to(batch.x0.dtype), t)
        with torch.no_grad():
            target = self.target(x_t, t, m, s, batch.condition)
        error = (self.learner(x_t, t, batch.condition) - target).square().flatten(1).mean(1)
        return LossTerms(error * column(self.weight(t), error), t.t, {"x0_error": error.detach()})

    def target(
        self, x_t: Tensor, t: Level[Tensor], m: Level[Tensor], s: Level[Tensor], condition: Tensor | None
    ) -> Tensor:
        """What the student should say at t: the f that leads from x_t to the bottom of its group, shape of x_t.

        Args:
            x_t: shape (B, *event).
            t: levels of the items.
            m: levels after one step of the teacher.
            s: bottoms of the groups; where they are m, the target is the teacher's own estimate.
            condition: class of each item, or None.
        """
        target = self.step(x_t, t, m, condition)
        if (rows := _where(m.sigma > s.sigma, x_t)) is not None:
            x, first, own = x_t[rows], target[rows], _of(condition, rows)
            t, m, s = (take(level, rows.cpu()) for level in (t, m, s))
            second = self.finish(jump(x, first, t, m), m, s, own)
            share = column(share_of_first(t, m, s), x)
            target[rows] = share * first + (1 - share) * second
        return target

    def step(self, x_t: Tensor, t: Level[Tensor], s: Level[Tensor], condition: Tensor | None) -> Tensor:
        """The f of a step of the teacher from t to s, shape of x_t."""
        teacher = self._clipped(self.teacher)
        x0 = teacher(x_t, t, condition)
        if self.config.solver == "heun" and (rows := _where(s.sigma > 0, x_t)) is not None:
            own = x_t[rows], x0[rows], take(t, rows.cpu()), take(s, rows.cpu())
            x0[rows] = heun_x0(teacher, *own, _of(condition, rows))
        return x0

    def weight(self, t: Level[Tensor]) -> Tensor:
        """w(t), float64 (B,)."""
        snr = (t.alpha / t.sigma) ** 2
        if self.config.snr_cap is not None:
            snr = snr.clamp(max=self.config.snr_cap)
        if self.config.weight == "constant":
            return torch.ones_like(snr)
        if self.config.weight == "v":
            return snr + getattr(self.learner.parametrization, "sigma_data", 1.0) ** -2
        return snr.clamp(min=1)

    def networks(self) -> list[nn.Module]:
        return [self.learner.network, *(teacher.network for teacher in self._teacher)]

    def _clipped(self, denoiser: NetworkDenoiser) -> Denoiser:
        limits = self.spec.model_range if self.config.clip else None
        if limits is None:
            return denoiser
        return lambda x_t, level, condition=None: denoiser(x_t, level, condition).clamp(*limits)


class BTD(TimeDistillation):
    """See `BTDConfig`."""

    def finish(self, x_m: Tensor, m: Level[Tensor], s: Level[Tensor], condition: Tensor | None) -> Tensor:
        return self.step(x_m, m, s, condition)

    def steps(self, u: Tensor) -> Tensor:
        tops = torch.tensor(self.groups.tops)
        return tops[(u * len(tops)).long()]


class Tract(TimeDistillation):
    """See `TractConfig`.

    Attributes:
        self_teacher: the average of the student that ends the jumps.
        updates: how many of the student's states it holds, int64.
    """

    config: TractConfig
    updates: Tensor

    def __init__(self, config: TractConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.self_teacher = copy.deepcopy(self.learner).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def begin(self, teacher: NetworkDenoiser, warm: bool = True) -> None:
        super().begin(teacher, warm)
        self.self_teacher.load_state_dict(self.learner.state_dict())

    def finish(self, x_m: Tensor, m: Level[Tensor], s: Level[Tensor], condition: Tensor | None) -> Tensor:  # noqa: ARG002
        return self._clipped(self.self_teacher)(x_m, m, condition)

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), self.self_teacher.network]

    @torch.no_grad()
    def after_step(self, parts: Sequence[tuple[Batch, Draws]]) -> None:  # noqa: ARG002
        self.updates += 1
        share = newest_share(self.config.ema_self, int(self.updates))
        torch._foreach_lerp_(list(self.self_teacher.parameters()), list(self.learner.parameters()), share)
        for own, new in zip(self.self_teacher.buffers(), self.learner.buffers(), strict=True):
            own.copy_(new)


def _where(wanted: Tensor, x: Tensor) -> Tensor | None:
    """The rows of a condition (B,), on the device of x, or None where there are none."""
    (rows,) = torch.nonzero(wanted, as_tuple=True)
    return rows.to(x.device) if len(rows) else None


def _of(condition: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if condition is None else condition[rows]

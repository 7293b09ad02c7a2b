"""`osmose distill tract` and `osmose distill btd`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, quiet_warnings
from osmose.errors import UserError

if TYPE_CHECKING:
    from osmose.acceleration.distill import Distillation
    from osmose.data.dataset import Dataset

#: Arguments that say where and how to run; all others say what is distilled, which a resumed distillation knows.
_RUNNING = {"model", "out", "resume", "data_root", "threads", "quiet", "json", "overrides"}


@dataclass
class _Distill:
    method: ClassVar[str]

    model: Annotated[Positional[Path], arg(metavar="RUN", help="the teacher: a run of ddpm, iddpm, edm, or distilled")]
    out: Annotated[Path | None, arg(metavar="RUN2", help="the run folder to make; required")] = None
    schedule: Annotated[
        str | None,
        arg(
            metavar="N,N,...",
            help="numbers of steps, the teacher's first, as 1024,32,1; unequal groups by the last step of each: "
            "1024,16:64:256:1024,1",
        ),
    ] = None
    steps: Annotated[
        str | None, arg(metavar="N[,N,...]", help="optimisation steps in all, shared by the phases; or of each phase")
    ] = None
    batch_size: Annotated[int | None, arg(help="items per step")] = None
    lr: Annotated[str | None, arg(metavar="X[,X,...]", help="learning rate after warm-up, of all phases or each")] = (
        None
    )
    solver: Annotated[str | None, arg(help="of the teacher's steps: ddim or heun; ddim if not given")] = None
    loss_weight: Annotated[str | None, arg(help="truncated-snr, v or constant")] = None
    snr_cap: Annotated[float | None, arg(help="largest SNR in the weight; none if not given")] = None
    ema_residual: Annotated[
        float | None,
        arg(help="weight of a phase's first state in its averaged weights, relative to the last; 0: no average"),
    ] = None
    parametrization: Annotated[
        str | None, arg(help="what students predict: x0, v, edm or eps; as the teacher if not given")
    ] = None
    cold_start: Annotated[bool, arg(help="do not begin with the teacher's weights")] = False
    seed: Annotated[int | None, arg(help="of everything random; 0 if not given")] = None
    resume: Annotated[bool, arg(help="continue the distillation in --out by its own settings")] = False
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Check everything, then distil."""
        if self.out is None:
            raise UserError("--out: required: the run folder to make")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads: {self.threads} is not valid: must be at least 1")
        import torch

        from osmose.acceleration.distill import prepared

        if self.threads:
            torch.set_num_threads(self.threads)
        if self.resume:
            self._require_nothing_said(self.out)
        distillation, dataset = prepared(
            self.model, self.out, self.method, {} if self.resume else self._options(), self.data_root, self.resume
        )
        return self._carry_out(distillation, dataset)

    def _options(self) -> dict[str, Any]:
        """What `plan` is told."""
        said = {
            "schedule": None if self.schedule is None else _schedule(self.schedule),
            "steps": None if self.steps is None else _numbers("steps", self.steps, int),
            "lr": None if self.lr is None else _numbers("lr", self.lr, float),
            "ema_residual": self.ema_residual,
            "parametrization": self.parametrization,
            "seed": self.seed,
            "warm_start": False if self.cold_start else None,
            "training.batch_size": self.batch_size,
            "solver": self.solver,
            "weight": self.loss_weight,
            "snr_cap": self.snr_cap,
            **self._own(),
        }
        flags = {name: value for name, value in said.items() if value is not None}
        for name in flags:
            if name in self.overrides:
                raise UserError(f"{name}: given twice, as a flag and as {name}={self.overrides[name]}")
        return flags | self.overrides

    def _own(self) -> dict[str, Any]:
        """What one method has and the other has not."""
        return {}

    def _require_nothing_said(self, out: Path) -> None:
        given = [f.name for f in fields(self) if f.name not in _RUNNING and getattr(self, f.name) != f.default]
        for name in [*given, *self.overrides]:
            flag = f"--{name.replace('_', '-')}" if name in given else name
            raise UserError(f"{flag}: given, but {out} is continued by its own settings; resume without it")

    def _carry_out(self, distillation: Distillation, dataset: Dataset) -> Result:
        from osmose.training.trainer import DivergedError

        again = f"osmose distill {self.method} {self.model} --out {self.out} --resume"
        counts = distillation.plan.counts()
        values = {"run": str(self.out), "schedule": counts}
        before = distillation.finished
        try:
            with quiet_warnings():
                finished = distillation.carry_out(dataset, progress=not (self.quiet or self.json))
        except DivergedError as error:
            print(f"osmose: {error}", file=sys.stderr)
            return Result(values | {"error": str(error)}, status=1)
        if not finished:
            return Result(values | {"finished": False}, ["stopped; everything is saved"], again, status=130)
        grids = ", ".join(map(str, sorted(counts[1:])))
        log = distillation.made.metrics()
        seconds = sum(line.get("seconds", 0.0) for line in log)
        losses = {line["phase"]: line["validation_loss"] for line in log if "validation_loss" in line}
        held_out = ", ".join(f"{loss:.4g}" for loss in losses.values())
        line = (
            f"wrote {self.out}: {' to '.join(map(str, counts))} steps in {seconds:.0f} s, held-out loss of the phases "
            f"{held_out}; it samples in {grids} steps"
        )
        if before:
            line = f"{self.out} is finished already; it samples in {grids} steps"
        steps = ",".join(map(str, sorted(counts[1:])[:4]))
        return Result(
            values | {"finished": True, "seconds": round(seconds, 2), "held_out_losses": list(losses.values())},
            [line],
            f"osmose evaluate {self.out} --steps {steps} --against {self.model}",
        )


@dataclass
class Tract(_Distill):
    """Distil a run into students that sample in a few steps: transitive closure time-distillation.

    In each phase the student learns to jump from every level of a group of steps to the group's bottom: the teacher
    does the first step and an average of the student itself the rest, so that groups may have any length. The result is
    a run that samples with every number of steps of --schedule but the first. Training and the method are set further
    by name: training.clip_grad=null training.batch_size=32 spacing=karras.
    """

    method: ClassVar[str] = "tract"
    ema_self: Annotated[
        float | None, arg(help="decay of the average that teaches the end of the jumps, below 1; 0.5 if not given")
    ] = None

    def _own(self) -> dict[str, Any]:
        return {"ema_self": self.ema_self}


@dataclass
class BTD(_Distill):
    """Distil a run into students that sample in a few steps: binary time distillation (progressive distillation).

    In each phase the student learns to do two steps of its teacher in one. The result is a run that samples with every
    number of steps of --schedule but the first; without --schedule, down to one.
    """

    method: ClassVar[str] = "btd"


def _schedule(text: str) -> list[int | list[int]]:
    """1024,32,1 or 1024,16:64:1024,1."""
    words = text.split(",")
    try:
        return [list(map(int, word.split(":"))) if ":" in word else int(word) for word in words]
    except ValueError:
        raise UserError(
            f"--schedule: {text!r} is not valid: should be whole numbers, as in 1024,32,1 or 1024,16:64:256:1024,1"
        ) from None


def _numbers(name: str, text: str, kind: type) -> Any:
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        what = "whole numbers, as in 2000 or 500,1500" if kind is int else "numbers, as in 0.001 or 0.001,0.0005"
        raise UserError(f"--{name}: {text!r} is not valid: should be {what}") from None
    return values[0] if len(values) == 1 else values

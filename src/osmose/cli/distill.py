"""`osmose distill METHOD`: tract, btd, scd, dsno."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, at_least, quiet_warnings
from osmose.errors import UserError

if TYPE_CHECKING:
    from osmose.acceleration.distill import Distillation
    from osmose.acceleration.teaching import Teaching

#: Arguments that say where and how to run; all others say what is distilled, which a resumed distillation knows.
_RUNNING = {"model", "out", "trajectories", "resume", "data_root", "threads", "quiet", "json", "overrides"}


@dataclass
class _Distill(ABC):
    method: ClassVar[str]

    model: Annotated[Positional[Path], arg(metavar="RUN", help="the teacher: a run of ddpm, iddpm or edm")]
    out: Annotated[Path | None, arg(metavar="RUN2", help="the run folder to make; required")] = None
    batch_size: Annotated[int | None, arg(help="items per step")] = None
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
        at_least(self, 1, "threads")
        import torch

        from osmose.acceleration.distill import prepared
        from osmose.training.trainer import DivergedError

        if self.threads:
            torch.set_num_threads(self.threads)
        if self.resume:
            self._require_nothing_said(self.out)
        said = self._where() | ({} if self.resume else self._options())
        distillation, dataset = prepared(self.model, self.out, self.method, said, self.data_root, self.resume)
        again = f"osmose distill {self.method} {self.model} --out {self.out} --resume"
        before = distillation.finished
        try:
            with quiet_warnings():
                finished = distillation.carry_out(dataset, progress=not (self.quiet or self.json))
        except DivergedError as error:
            print(f"osmose: {error}", file=sys.stderr)
            return Result({"run": str(self.out), "error": str(error)}, status=1)
        if not finished:
            values = {"run": str(self.out), "finished": False}
            return Result(values, ["stopped; everything is saved"], again, status=130)
        return self._made(distillation, before)

    def _options(self) -> dict[str, Any]:
        """What `plan` is told."""
        said = {
            "parametrization": self.parametrization,
            "seed": self.seed,
            "warm_start": False if self.cold_start else None,
            "training.batch_size": self.batch_size,
            **self._own(),
        }
        flags = {name: value for name, value in said.items() if value is not None}
        for name in flags:
            if name in self.overrides:
                raise UserError(f"{name}: given twice, as a flag and as {name}={self.overrides[name]}")
        return flags | self.overrides

    def _own(self) -> dict[str, Any]:
        """What not all methods have."""
        return {}

    def _where(self) -> dict[str, Any]:
        """What is said again where a distillation is continued."""
        return {}

    @abstractmethod
    def _made(self, distillation: Any, before: bool) -> Result:
        """The result, of a distillation that was finished before or is now."""

    def _require_nothing_said(self, out: Path) -> None:
        given = [f.name for f in fields(self) if f.name not in _RUNNING and getattr(self, f.name) != f.default]
        for name in [*given, *self.overrides]:
            flag = f"--{name.replace('_', '-')}" if name in given else name
            raise UserError(f"{flag}: given, but {out} is continued by its own settings; resume without it")


@dataclass
class _Phases(_Distill):
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

    def _own(self) -> dict[str, Any]:
        return {
            "schedule": None if self.schedule is None else _schedule(self.schedule),
            "steps": None if self.steps is None else _numbers("steps", self.steps, int),
            "lr": None if self.lr is None else _numbers("lr", self.lr, float),
            "ema_residual": self.ema_residual,
            "solver": self.solver,
            "weight": self.loss_weight,
            "snr_cap": self.snr_cap,
        }

    def _made(self, distillation: Distillation, before: bool) -> Result:
        counts = distillation.plan.counts()
        values = {"run": str(self.out), "schedule": counts}
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
class Tract(_Phases):
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
        return {**super()._own(), "ema_self": self.ema_self}


@dataclass
class BTD(_Phases):
    """Distil a run into students that sample in a few steps: binary time distillation (progressive distillation).

    In each phase the student learns to do two steps of its teacher in one. The result is a run that samples with every
    number of steps of --schedule but the first; without --schedule, down to one.
    """

    method: ClassVar[str] = "btd"


@dataclass
class _Single(_Distill):
    steps: Annotated[int | None, arg(help="optimisation steps")] = None
    lr: Annotated[float | None, arg(help="learning rate after warm-up")] = None

    def _own(self) -> dict[str, Any]:
        return {"training.steps": self.steps, "training.lr": self.lr}

    def _made(self, distillation: Teaching, before: bool) -> Result:
        run = distillation.made
        seconds = sum(line.get("seconds", 0.0) for line in run.metrics())
        first = distillation.data_seconds()
        values = {"run": str(self.out), "finished": True, "seconds": round(seconds, 2), "data_seconds": round(first, 2)}
        made = f"; its trajectories took {first:.0f} s" if first else ""
        line = f"wrote {self.out}: {run.config.training.steps} steps in {seconds:.0f} s{made}"
        if before:
            line = f"{self.out} is finished already"
        several = "1,2,4" if self.method == "scd" and run.config.method.to_json()["segments"] == 1 else None
        steps = f" --steps {several}" if several else ""
        return Result(values, [line], f"osmose evaluate {self.out}{steps} --against {self.model}")


@dataclass
class SCD(_Single):
    """Distil a run into a consistency model: one evaluation from noise to data, and better ones with 2 or more.

    The model learns that all points of a trajectory of the teacher lead to the same end, by the derivative along it
    (sCD). `osmose train sct --init RUN` learns the same from the data alone. The method is set further by name:
    warmup=200 tangent=clip norm=rms adaptive_weight=false jvp=finite-diff times.mean=-0.8.
    """

    method: ClassVar[str] = "scd"
    segments: Annotated[
        int | None, arg(help="parts of the noise range with their own ends: as many steps, without fresh noise")
    ] = None

    def _own(self) -> dict[str, Any]:
        return {**super()._own(), "segments": self.segments}


@dataclass
class DSNO(_Single):
    """Distil a run into a neural operator: one call from noise to a whole trajectory, whose end is the sample.

    It is regressed onto stored trajectories of the teacher: those of `osmose trajectories`, or, where none are named,
    as many as --num, which are made first and kept in RUN2/trajectories. The method is set further by name:
    num_times=8 weight_cap=10 loss=l2 trajectories.num_steps=128.
    """

    method: ClassVar[str] = "dsno"
    trajectories: Annotated[
        Path | None, arg(metavar="T", help="folder of osmose trajectories RUN --out T; made if not given")
    ] = None
    num: Annotated[int | None, arg(help="trajectories to make; 4000 if not given")] = None
    modes: Annotated[int | None, arg(help="modes of the temporal layers; 2 if not given, 0 for no such layers")] = None

    def _own(self) -> dict[str, Any]:
        return {**super()._own(), "trajectories.num": self.num, "modes": self.modes}

    def _where(self) -> dict[str, Any]:
        return {} if self.trajectories is None else {"trajectories": self.trajectories}


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

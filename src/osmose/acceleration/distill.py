"""From a diffusion run to students that sample in a few steps, phase by phase (`methods.time_distillation`).

    RUN2/distillation.json     the plan: teacher and phases; written first
    RUN2/phases/32/            the run that trains the student of 32 steps: a run like any other
    RUN2/config.json           once all phases are done: a run that samples on every grid that was distilled,
    RUN2/model.safetensors     with the weights of all students
    RUN2/metrics.jsonl         and the logs of all phases, one after the other
    RUN2/samples/losses.png    drawn

The student of a phase is the teacher of the next. An interrupted distillation goes on in the middle of its phase.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from osmose.acceleration import teaching
from osmose.acceleration.losses import write_losses
from osmose.acceleration.plan import Plan, plan
from osmose.configuration import ConfigError
from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.methods import CONTINUED, TAUGHT
from osmose.methods.base import GenerativeModel
from osmose.methods.chain import ChainModel
from osmose.methods.students import Students
from osmose.methods.time_distillation import TimeDistillation
from osmose.training import files
from osmose.training.config import RunConfig
from osmose.training.progress import Progress
from osmose.training.recipes import flattened
from osmose.training.run import Run, data_of, is_first_process, require_free, versions
from osmose.training.trainer import DivergedError, Trainer, built


def distill(
    run: Run | Path | str,
    out: Path | str,
    *,
    method: str = "tract",
    root: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> Run:
    """Distil a run into one that samples in a few steps.

    Args:
        run: the teacher: a run of ddpm, iddpm or edm; for "tract" and "btd" a distilled one as well.
        out: the folder to make, or with `resume` the one to go on with.
        method: "tract", "btd", "scd" or "dsno"; with "sct" or "ect" the run gives its weights alone.
        root: where the data lie, if not where the run found them.
        resume: go on with an interrupted distillation, by its own settings.
        progress: show progress bars.
        **options: of "tract" and "btd" `schedule`, `steps`, `lr`, `ema_residual`, `warm_start`, `parametrization`,
            `seed` (`plan.Options`), of the others `steps`, `lr`, `seed`, and of "dsno" `trajectories`, the folder of
            those to learn from; anything else is a change of training or of the method, by nested dictionaries or
            dotted names (`training={"batch_size": 32}`, `weight="v"`, `warmup=200`).

    Raises:
        UserError: anything in the input that is refused; nothing has been written then.
        DivergedError: a loss is not finite; the phase is named.
        KeyboardInterrupt: a signal asked to stop; the state is saved.
    """
    distillation, dataset = prepared(run, out, method, flattened(options), root, resume)
    if not distillation.carry_out(dataset, progress):
        raise KeyboardInterrupt
    return distillation.made


def prepared(
    run: Run | Path | str, out: Path | str, method: str, said: Mapping[str, Any], root: Path | None, resume: bool
) -> tuple[Distillation | teaching.Teaching, Dataset]:
    """A distillation that is begun, or with `resume` found in its folder, and its data; as `distill`.

    Raises:
        UserError: anything in the input that is refused; nothing has been written then.
    """
    teacher = run if isinstance(run, Run) else Run.open(run)
    if method in (*TAUGHT, *CONTINUED):
        return teaching.prepared(teacher, out, method, said, root, resume)
    if resume:
        for name in said:
            raise UserError(f"{name}: given, but {out} is continued by its own settings; resume without it")
        return Distillation.open(out, teacher, method), data_of(teacher, root)
    require_free(Path(out))
    teacher.model()  # refuses a folder without weights, or with others
    decided = plan(teacher.config, teacher.as_parent(), method, said)
    dataset = data_of(teacher, root)
    return Distillation.begin(out, teacher, decided), dataset


class Distillation:
    """A distillation in its folder, begun or about to begin.

    Attributes:
        folder: of the run that is made.
        plan: what is to be done.
        teacher: the run that is distilled.
    """

    def __init__(self, folder: Path, plan: Plan, teacher: Run):
        self.folder, self.plan, self.teacher = folder, plan, teacher

    @classmethod
    def begin(cls, folder: Path | str, teacher: Run, plan: Plan) -> Distillation:
        """Make a new folder with its distillation.json.

        Raises:
            UserError: something is there already.
        """
        folder = Path(folder)
        require_free(folder)
        if is_first_process():
            files.write_json(folder / "distillation.json", plan.to_json())
        return cls(folder, plan, teacher)

    @classmethod
    def open(cls, folder: Path | str, teacher: Run, method: str) -> Distillation:
        """Go on with what is in a folder.

        Raises:
            UserError: not a distillation, or one of another teacher or method.
        """
        folder = Path(folder)
        if not (folder / "distillation.json").is_file():
            raise UserError(f"{folder}: no distillation was begun here (it has no distillation.json)")
        try:
            plan = Plan.parse(files.read_json(folder / "distillation.json"))
        except ConfigError as error:
            raise UserError(f"{folder / 'distillation.json'}: not written by osmose ({error})") from None
        if plan.method != method:
            raise UserError(f"{folder}: was begun with {plan.method}, not with {method}")
        if teacher.hash() != plan.teacher.sha256:
            raise UserError(
                f"RUN: {teacher.folder} is not the teacher of {folder}, {plan.teacher.folder!r} (their weights differ)"
            )
        if is_first_process():
            files.sweep(folder)
        return cls(folder, plan, teacher)

    @property
    def finished(self) -> bool:
        """Whether the run that is made is whole."""
        return (self.folder / "config.json").is_file()

    @property
    def made(self) -> Run:
        """The run that is made, once it is finished."""
        return Run.open(self.folder)

    def carry_out(self, dataset: Dataset, progress: bool = True) -> bool:
        """Do what is missing; False when a signal asked to stop before the end (the state is then saved).

        Raises:
            DivergedError: a loss is not finite; the phase is named.
            UserError: other data, or a full disk.
        """
        if self.finished:
            return True
        teacher, counts = self.teacher, self.plan.counts()
        for index, phase in enumerate(self.plan.phases):
            label = f"phase {index + 1}/{len(self.plan.phases)}, {counts[index]} to {counts[index + 1]} steps"
            config = phase.replace(parent=teacher.as_parent().to_json())
            folder = self.folder / "phases" / str(counts[index + 1])
            run = Run.open(folder) if (folder / "config.json").is_file() else Run.create(folder, config)
            if run.config.parent != config.parent:
                raise UserError(
                    f"{folder}: was begun with another teacher than {teacher.folder} is now; delete it to begin it anew"
                )
            model = self._model(run.config, teacher.model(), counts[index])
            trainer = Trainer(run, dataset, model=model, progress=Progress(progress, label))
            try:
                done = trainer.fit()
            except DivergedError as error:
                raise DivergedError(f"{label}: {error}") from None
            if not done or (trainer.asked and index + 1 < len(self.plan.phases)):
                return False
            teacher = run
        if is_first_process():
            self._put_together()
        trainer.accelerator.wait_for_everyone()  # the others may be about to read the run
        return True

    def _model(self, config: RunConfig, teacher: GenerativeModel, num_steps: int) -> TimeDistillation:
        model = built(config)
        assert isinstance(model, TimeDistillation)
        model.begin(_denoiser(teacher, num_steps), self.plan.warm_start)
        return model

    def _put_together(self) -> None:
        """Write the run of all students; config.json, which makes it one, comes last."""
        runs = [Run.open(self.folder / "phases" / str(count)) for count in self.plan.counts()[1:]]
        weights: dict[str, Tensor] = {}
        lines: list[dict[str, Any]] = []
        for index, run in enumerate(runs):
            own = files.read_tensors(run.weights)
            prefix = "students.0."
            weights |= {
                f"students.{index}.{name.removeprefix(prefix)}": value
                for name, value in own.items()
                if name.startswith(prefix)
            }
            before = sum(phase.training.steps for phase in self.plan.phases[:index])
            lines += [{**line, "step": before + line["step"], "phase": index + 1} for line in run.metrics()]
        config: RunConfig = self.plan.result().replace(versions=versions())
        files.write_bytes(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        write_losses(self.folder / "samples" / "losses.png", lines, self.plan.counts())
        Run(self.folder, config).write_weights(weights)
        files.write_json(self.folder / "config.json", config.to_json())


def _denoiser(model: GenerativeModel, num_steps: int) -> NetworkDenoiser:
    """What a teacher of so many steps denoises with."""
    if isinstance(model, Students):
        return model.student(num_steps)
    assert isinstance(model, ChainModel), "the plan refuses other teachers"
    return model.denoiser

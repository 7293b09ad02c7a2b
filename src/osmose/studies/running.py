"""Running a study: what is missing is trained and measured, what is there is kept, and the report is written.

    study.json                      which study and form the folder holds
    configs/CELL.json               the RunConfig of the cell's first seed
    runs/CELL-SEED/                 an ordinary run folder
    measurements/CELL-SEED.json     what was measured, under which configuration, in how many seconds
    results.json  README.md  *.png  the report

A measurement is written last, in one step, and carries a hash of everything that it depends on: after an interruption
or a change of the study, what is missing or out of date is exactly what has no measurement with the right hash. What is
missing may need runs of other cells (`Cell.uses`): these are made first where they are missing too.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from osmose.acceleration.blocks import Blocks
from osmose.acceleration.blocks_plan import BlocksPlan
from osmose.acceleration.distill import Distillation
from osmose.acceleration.plan import Plan
from osmose.acceleration.teaching import Teaching
from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.gaussian.draws import mix
from osmose.studies import STUDIES
from osmose.studies.planning import cells_of, load, missing_of, tasks_of
from osmose.studies.progress import Progress
from osmose.studies.report import write_report
from osmose.studies.study import Results, Row, Study, Trained
from osmose.studies.task import Task
from osmose.studies.workers import run_all
from osmose.training import files
from osmose.training.run import Run, versions
from osmose.training.trainer import Trainer


@dataclass
class Outcome:
    """What a study came to.

    Attributes:
        folder: where everything is.
        results: the content of results.json, or None where cells are missing.
        failures: one line for each cell and seed that failed.
        rows: what was measured on the cells that `only` named.
        wrote: the report's files.
    """

    folder: Path
    results: dict[str, Any] | None = None
    failures: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrote: list[Path] = field(default_factory=list)


def default_folder(name: str, quick: bool) -> Path:
    """Where a study goes when nothing is said."""
    return Path("studies") / (f"{name}-quick" if quick else name)


def run_study(
    name: str,
    out: Path | str | None = None,
    *,
    quick: bool = False,
    data_root: Path | str | None = None,
    jobs: int = 1,
    only: str | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Outcome:
    """Run what is missing of a study and write its report.

    Args:
        name: a registered study.
        out: its folder, new or one of the same study and form; `default_folder` if None.
        quick: the short form.
        data_root: folder that holds mnist/, fashion-mnist/ or cifar10/.
        jobs: processes; the results do not depend on their number.
        only: CELL or CELL/SEED: run this alone, anew if it is there already, and leave the report as it is. What it
            uses is run first where it is missing.
        device: where to sample; training takes the fastest device there is.
        progress: show a bar on a terminal, lines elsewhere.

    Raises:
        UserError: an unknown study or cell, missing data, a folder that is in the way, a configuration that is refused;
            nothing has been written then.
        ValueError: a study whose cells and claims do not fit each other.
        KeyboardInterrupt: interrupted or terminated; the same call continues.
    """
    study: Study = STUDIES.resolve(name)(quick)
    folder = Path(out) if out is not None else default_folder(name, quick)
    if jobs < 1:
        raise UserError(f"--jobs: {jobs} is not valid: must be at least 1")
    mark = {"format": "osmose-study-1", "study": name, "form": "quick" if quick else "full"}
    _require_ours(folder, mark)
    cells = cells_of(study)
    tasks = tasks_of(study, name, cells, only, folder, data_root, torch.device(device))
    if not (folder / "study.json").is_file():
        files.write_json(folder / "study.json", mark)
    with _alone(folder), _terminating(), Progress(progress) as shown:
        files.sweep(folder)
        if only:
            for task in tasks:
                if task.measurement() is not None:
                    shown.note(f"{task.label}: was run before; it is run again from the beginning")
                    _remove(task.run_folder)
                    task.path.unlink()
        missing = missing_of(tasks)
        _write_configs([*tasks, *missing], whole=not only)
        failures = _run(missing, len({task.label for task in [*tasks, *missing]}), jobs, shown)
    outcome = Outcome(folder, failures=failures)
    if only:
        for task in tasks:
            rows = (task.measurement() or {}).get("rows", [])  # none of a task that failed
            outcome.rows += [{"cell": task.cell.name, "seed": task.seed, **row} for row in rows]
    elif not failures:
        found = {task.label: task.measurement() or {} for task in tasks}
        results = Results(
            study.seeds(),
            {
                cell.name: [
                    [Row(row["labels"], row["values"]) for row in found[f"{cell.name}/{seed}"]["rows"]]
                    for seed in study.seeds()
                ]
                for cell in cells
            },
        )
        outcome.results, outcome.wrote = write_report(study, name, folder, cells, results, list(found.values()))
    return outcome


def _require_ours(folder: Path, mark: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but this study in this form.

    Raises:
        UserError: naming the folder and what it holds.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "study.json").is_file():
        raise UserError(f"--out: {folder} exists already and is not the folder of a study; choose another folder")
    held = files.read_json(folder / "study.json")
    if held != mark:
        what = f"{held.get('study')}, {held.get('form')} form" if isinstance(held, dict) else "another osmose"
        ours = f"{mark['study']}, {mark['form']} form"
        raise UserError(f"--out: {folder} is the folder of {what}, not of {ours}; choose another folder")


def _write_configs(tasks: list[Task], whole: bool) -> None:
    """configs/CELL.json for the cells of the tasks; where these are the whole study, other cells' are removed."""
    folder = tasks[0].folder / "configs"
    first = {task.cell.name: task for task in reversed(tasks)}
    for name, task in first.items():
        files.write_json(folder / f"{name}.json", task.description())
    for path in folder.glob("*.json"):
        if whole and path.stem not in first:
            path.unlink()


def _run(missing: list[Task], total: int, jobs: int, shown: Progress) -> list[str]:
    """Do the missing ones among all the tasks there are; what failed, one line each."""
    for task in missing:
        if task.config is not None and task.has_other_run():
            shown.note(f"{task.label}: its configuration has changed; the run that is there is removed and made again")
        elif task.path.is_file():
            shown.note(f"{task.label}: what is measured has changed; it is measured again")
    place = {task.label: index for index, task in enumerate(missing)}
    after = [[place[used.label] for used in task.uses if used.label in place] for task in missing]
    shown.start(total, total - len(missing))
    failures = []
    with contextlib.closing(run_all(do, missing, jobs, after)) as ended:
        for done in ended:
            label = missing[done.index].label
            if done.error is not None:
                failures.append(f"{label}: {done.error}")
            shown.advance(label, done.seconds, done.error)
    return failures


def do(task: Task) -> None:
    """Train, or go on training, and measure; the measurement is the last thing written.

    Raises:
        UserError: a task that it uses has failed.
        KeyboardInterrupt: a signal asked to stop; the run's state is saved.
        Exception: whatever training and measuring raise.
    """
    for used in task.uses:
        if used.measurement() is None:
            raise UserError(f"it uses {used.label}, which has failed")
    task.path.unlink(missing_ok=True)  # where a measurement is, the run that it was made with is whole
    study: Study = STUDIES.resolve(task.study)(task.quick)
    dataset = load(task.data)
    run, from_step = None, 0
    began = _clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the study chose on purpose
        if task.config is not None:
            run, from_step = _trained(task, dataset)
        training, began = _since(began), _clock()
        with torch.random.fork_rng():
            torch.manual_seed(mix(task.seed, "measure"))  # nothing that ran before in this process may show
            used_runs = {used.cell.name: Run.open(used.run_folder) for used in task.uses}
            rows = study.measure(Trained(task.cell, task.seed, dataset, task.device, run, used_runs, task.data))
    labels = [dict(row.labels) for row in rows]
    if any(label in labels[:index] for index, label in enumerate(labels)):
        raise ValueError(f"two rows have the labels {labels}; labels have to tell the rows of a cell apart")
    measurement = {
        "study": task.study,
        "cell": task.cell.name,
        "seed": task.seed,
        "hash": task.hash(),
        "rows": [{"labels": dict(row.labels), "values": {k: float(v) for k, v in row.values.items()}} for row in rows],
        "training": {**training, "from_step": from_step},
        "measuring": _since(began),
        "device": str(task.device),
        "commit": task.commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    files.write_json(task.path, measurement)


def _trained(task: Task, dataset: Dataset) -> tuple[Run, int]:
    """The finished run, and the step from which it was trained now; 0 of a distillation."""
    if task.has_other_run():
        _remove(task.run_folder)
    begun = task.run_folder.exists()
    if isinstance(task.config, Plan):
        teacher = task.teacher()
        plan = task.config.model_copy(update={"teacher": teacher.as_parent()})
        distillation = (
            Distillation.open(task.run_folder, teacher, plan.method)
            if begun
            else Distillation.begin(task.run_folder, teacher, plan)
        )
        if not distillation.carry_out(dataset, progress=False):
            raise KeyboardInterrupt
        return distillation.made, 0
    if isinstance(task.config, BlocksPlan):
        blocks = Blocks.open(task.run_folder) if begun else Blocks.begin(task.run_folder, task.config)
        if not blocks.carry_out(dataset, progress=False):
            raise KeyboardInterrupt
        return Run.open(task.run_folder), 0
    assert task.config is not None
    if task.cell.starts_from:
        teacher = task.teacher()
        config = task.config.replace(parent=teacher.as_parent().to_json())
        teaching = (
            Teaching.open(task.run_folder, teacher, config.method.kind)
            if begun
            else Teaching.begin(task.run_folder, teacher, config)
        )
        run, trainer = teaching.run, teaching.trainer(dataset, progress=False)
    else:
        run = Run.open(task.run_folder) if begun else Run.create(task.run_folder, task.config)
        trainer = Trainer(run, dataset)
    from_step = trainer.step
    if not trainer.fit():
        raise KeyboardInterrupt
    return run, from_step


def _remove(folder: Path) -> None:
    """Delete a run folder so that no half of it is ever taken for a run."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _since(began: tuple[float, float]) -> dict[str, float]:
    cpu, wall = (now - then for now, then in zip(_clock(), began, strict=True))
    return {"cpu_seconds": round(cpu, 2), "wall_seconds": round(wall, 2)}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second process from working on the same folder.

    Raises:
        UserError: one does already.
    """
    with (folder / "study.json").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: another osmose study is at work in {folder}; wait for it, or stop it") from None
        yield


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous: Any = None
    with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
        previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)

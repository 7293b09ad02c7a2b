"""From a study to its tasks: cells checked against each other, configurations made, and what of it is missing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import torch

from osmose.acceleration.blocks_plan import BlocksPlan
from osmose.acceleration.plan import Plan, plan
from osmose.acceleration.teaching import taught_config
from osmose.data.dataset import DataConfig, Dataset
from osmose.errors import UserError, nearest
from osmose.methods import CONTINUED, DISTILLED, TAUGHT
from osmose.studies.report import commit
from osmose.studies.study import Cell, Study
from osmose.studies.task import Task
from osmose.training.config import Parent, RunConfig
from osmose.training.recipes import checked, recipe, spread

#: Steps after which what serves people happens, but for the last one, when it happens always.
_NEVER = 10**9


def cells_of(study: Study) -> list[Cell]:
    """The study's cells, checked against each other and the claims."""
    cells = study.cells()
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise ValueError(f"cells {names}: every name has to be different")
    for claim in study.claims():
        missing = set(claim.cells) - set(names)
        if missing and not study.quick:
            raise ValueError(f"claim {claim.text!r} names {missing}, which the study does not have")
    trained = [cell.name for cell in cells if cell.method is not None]
    for cell in cells:
        if cell.method in DISTILLED and not cell.uses:
            raise ValueError(f"cell {cell.name!r} distils, but uses no cell that could be the teacher")
    for cell in cells:
        for used in cell.uses:
            if used not in names:
                raise ValueError(f"cell {cell.name!r} uses {used!r}, which the study does not have")
            if used not in trained:
                raise ValueError(f"cell {cell.name!r} uses {used!r}, which has no run (its method is None)")
    try:
        TopologicalSorter({cell.name: cell.uses for cell in cells}).prepare()
    except CycleError as error:
        raise ValueError(f"cells {error.args[1]} use each other in a circle") from None
    return cells


def tasks_of(
    study: Study,
    name: str,
    cells: list[Cell],
    only: str | None,
    folder: Path,
    data_root: Path | str | None,
    device: torch.device,
) -> list[Task]:
    """Every cell of every seed, seed by seed; of `only` its own. Each holds those that it uses.

    Raises:
        UserError: an unknown cell or seed, missing data, a configuration that is refused.
    """
    cell_name, _, seed_text = (only or "").partition("/")
    names, seeds = [cell.name for cell in cells], study.seeds()
    if only and cell_name not in names:
        raise UserError(f"--only: unknown cell {cell_name!r}; {nearest(cell_name, names)}")
    if seed_text and seed_text not in map(str, seeds):
        raise UserError(
            f"--only: {seed_text!r} is not a seed of this study; choose one of {', '.join(map(str, seeds))}"
        )
    here, by_name = commit(), {cell.name: cell for cell in cells}

    @cache
    def made(which: str) -> dict[int, Task]:
        """The tasks of the cell of this name, by seed."""
        cell = by_name[which]
        given = cell.data if isinstance(cell.data, DataConfig) else DataConfig.parse({"source": cell.data})
        data = given.replace(root=data_root)
        dataset = load(data)
        config = None
        if cell.method is not None:
            try:
                if not cell.starts_from:
                    config = _config(cell, data, dataset, seeds[0], study.quick)
            except UserError as error:  # what a configuration calls method.network is network in a cell's changes
                raise UserError(f"cell {cell.name}: {str(error).removeprefix('method.')}") from None
        sha256 = dataset.identity.sha256
        found = {}
        for seed in seeds:
            if seed_text in ("", str(seed)):
                uses = tuple(made(used)[seed] for used in cell.uses)
                own: RunConfig | Plan | BlocksPlan | None = config
                if config is not None:
                    own = config.replace(**{"whole.seed" if isinstance(config, BlocksPlan) else "seed": seed})
                if cell.starts_from:
                    own = _from_run(cell, uses[0], dataset, seed, study.quick)
                found[seed] = Task(name, study.quick, cell, seed, data, sha256, own, folder, device, here, uses)
        return found

    tasks = [task for which in ([cell_name] if only else names) for task in made(which).values()]
    return sorted(tasks, key=lambda task: seeds.index(task.seed))


def _from_run(cell: Cell, teacher: Task, dataset: Dataset, seed: int, quick: bool) -> Plan | RunConfig:
    """What a cell makes of another one's run, as in `_config`; the hash of that is put in when it begins."""
    assert cell.method is not None
    assert teacher.config is not None, "cells that use others are checked to use runs"
    known = teacher.config.result() if isinstance(teacher.config, Plan) else teacher.config
    if isinstance(known, BlocksPlan):
        known = known.merged()
    said: dict[str, Any] = {f"training.{name}": _NEVER for name in ("validate_every", "preview_every")}
    said |= {"training.precision": "fp32", "training.preview_samples": _previews(quick), "training.keep_checkpoints": 1}
    said |= {"seed": seed, **cell.changes}
    parent = Parent(folder=teacher.run_folder.name, sha256="")
    try:
        if cell.method in (*TAUGHT, *CONTINUED):
            return taught_config(known, parent, cell.method, said, spread(dataset))
        return plan(known, parent, cell.method, said)
    except UserError as error:
        raise UserError(f"cell {cell.name}: {error}") from None


def _previews(quick: bool) -> int:
    """Samples at the end of a training, for people; drawing them would take the quick form longer than training."""
    return 0 if quick else 1


def _config(cell: Cell, data: DataConfig, dataset: Dataset, seed: int, quick: bool) -> RunConfig | BlocksPlan:
    """The recipe with the cell's changes, in float32 on every machine; what serves people is left to the end."""
    assert cell.method is not None
    if cell.method == "blocks":
        of_plan = {name.removeprefix("blocks."): v for name, v in cell.changes.items() if name.startswith("blocks.")}
        others = {name: value for name, value in cell.changes.items() if not name.startswith("blocks.")}
        whole = _config(replace(cell, method="edm", changes=others), data, dataset, seed, quick)
        planned = BlocksPlan.parse(of_plan | {"whole": whole.to_json()})
        for block in range(planned.count):
            checked(planned.member(block))
        return planned
    config = recipe(cell.method, data, dataset, seed, cell.changes)
    steps = max(1, config.training.steps)
    quiet = {
        "training.validate_every": steps,
        "training.preview_every": steps,
        "training.preview_samples": _previews(quick),
        "training.checkpoint_every": -(-steps // 4),
        "training.keep_checkpoints": 1,
        "training.precision": "fp32",
    }
    changed: RunConfig = config.replace(**{name: value for name, value in quiet.items() if name not in cell.changes})
    return checked(changed)


@lru_cache(maxsize=4)
def load(data: DataConfig) -> Dataset:
    """The data, read once for all cells of a process."""
    return data.load()


def missing_of(tasks: list[Task]) -> list[Task]:
    """Those that have no measurement, each after what it uses, as far as that has no measurement or no run any more."""
    found: dict[str, Task] = {}

    def add(task: Task) -> None:
        for used in task.uses:
            if used.measurement() is None or not used.run_folder.exists():
                add(used)
        found.setdefault(task.label, task)

    for task in tasks:
        if task.measurement() is None:
            add(task)
    return list(found.values())

"""One cell and seed of a study: where its files are, and whether they are of the present configuration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osmose.acceleration.blocks_plan import BlocksPlan
from osmose.acceleration.plan import Plan
from osmose.data.dataset import DataConfig
from osmose.studies.study import Cell
from osmose.training import files
from osmose.training.config import RunConfig
from osmose.training.run import Run


@dataclass(frozen=True)
class Task:
    """One cell and seed, with all that a process of its own needs to do it; `uses` are those whose runs it needs."""

    study: str
    quick: bool
    cell: Cell
    seed: int
    data: DataConfig
    identity: str
    config: RunConfig | Plan | BlocksPlan | None
    folder: Path
    device: torch.device
    commit: str | None
    uses: tuple[Task, ...] = ()

    @property
    def label(self) -> str:
        """CELL/SEED: what people and `--only` call it."""
        return f"{self.cell.name}/{self.seed}"

    @property
    def run_folder(self) -> Path:
        """Where its run is."""
        return self.folder / "runs" / f"{self.cell.name}-{self.seed}"

    @property
    def path(self) -> Path:
        """Where its measurement is."""
        return self.folder / "measurements" / f"{self.cell.name}-{self.seed}.json"

    def description(self) -> dict[str, Any]:
        """What is trained, as plain JSON: the run's configuration; of a cell without a method, its data.

        Of a distillation it is the plan, and what the teacher is.
        """
        if self.config is None:
            return {"data": self.data.to_json(), "data_sha256": self.identity, "seed": self.seed}
        of = {"distilled": self.uses[0].description()} if self.cell.starts_from else {}
        return _what(self.config.to_json()) | of

    def has_other_run(self) -> bool:
        """Whether its run folder holds a run of another configuration or teacher, or one that was hardly begun."""
        assert self.config is not None, "a cell without a method has no run"
        planned = isinstance(self.config, Plan)
        name = (
            "distillation.json" if planned else "blocks.json" if isinstance(self.config, BlocksPlan) else "config.json"
        )
        path = self.run_folder / name
        if not path.is_file():
            return self.run_folder.exists()
        held = files.read_json(path)
        # Of a teacher that is not there yet, it is asked again once it is.
        here = self.cell.starts_from and (self.uses[0].run_folder / "model.safetensors").is_file()
        parent = held.get("teacher" if planned else "parent") or {}  # none, where the cell once began by itself
        other = here and parent.get("sha256") != self.teacher().hash()
        return other or _what(held) != _what(self.config.to_json())

    def teacher(self) -> Run:
        """The run that it is made from."""
        return Run.open(self.uses[0].run_folder)

    def hash(self) -> str:
        """SHA-256 of all that its measurement depends on."""
        content = {"trained": self.description(), "settings": dict(self.cell.settings)}
        if self.uses:
            content["uses"] = {used.cell.name: used.description() for used in self.uses}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def measurement(self) -> dict[str, Any] | None:
        """Its measurement, if there is one of the present configuration."""
        if not self.path.is_file():
            return None
        values: dict[str, Any] = files.read_json(self.path)
        return values if values.get("hash") == self.hash() else None


def _what(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says who computed it, and from which weights, which its teacher's cell says."""
    return {
        name: value
        for name, value in config.items()
        if name not in ("versions", "teacher") and not (name == "parent" and value)
    }

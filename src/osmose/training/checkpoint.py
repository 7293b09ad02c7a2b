"""Checkpoints: everything that is needed to continue a run to the same result, bit for bit.

    checkpoints/step_00001000/
        weights.safetensors     the live weights and buffers
        average.safetensors     the averaged weights
        optimizer.safetensors   what the optimizer remembers
        state.json              step, number of updates, losses and parts since the last line of the log, random state

Randomness is a pure function of (seed, step), and so is the order of the data, so the random state that has to be kept
is the pair (seed, step) itself. A folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from osmose.errors import UserError
from osmose.training import files
from osmose.training.ema import EMA
from osmose.training.optimizers import Optimizer
from osmose.training.run import Run, load_weights


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Run, keep: int):
        self.folder, self.keep, self.seed = run.folder / "checkpoints", keep, run.config.seed

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if (path / "state.json").is_file())

    def save(self, step: int, model: nn.Module, ema: EMA, optimizer: Optimizer, **more: Any) -> Path:
        """Write the state after `step` steps, `more` (plain JSON) with it; drop the oldest checkpoints beyond `keep`.

        Raises:
            UserError: the disk is full; earlier checkpoints are unchanged.
        """
        path = self.folder / f"step_{step:08d}"
        if path.is_dir():
            return path
        with files.replacing(path) as temporary:
            files.write_tensors(temporary / "weights.safetensors", model.state_dict())
            files.write_tensors(temporary / "average.safetensors", ema.average)
            files.write_tensors(temporary / "optimizer.safetensors", optimizer.tensors())
            state = {"step": step, "updates": ema.updates, "random": {"seed": self.seed, "step": step}}
            files.write_json(temporary / "state.json", state | more)
            _sync(temporary)
        self.prune()
        return path

    def prune(self) -> None:
        """Delete the oldest checkpoints beyond `keep`."""
        for old in self.all()[: -self.keep]:
            # Under its final name a checkpoint is complete: rename before deleting piece by piece.
            doomed = old.with_name(f".{old.name}.{os.getpid()}.old")
            old.rename(doomed)
            shutil.rmtree(doomed)

    def restore(self, model: nn.Module, ema: EMA, optimizer: Optimizer) -> dict[str, Any]:
        """Load the newest checkpoint; return its state.json, at least the step, which is 0 when there is none.

        Raises:
            UserError: a checkpoint of another network or seed, or one that is damaged.
        """
        if not self.all():
            return {"step": 0}
        path = self.all()[-1]
        try:
            return self._read(path, model, ema, optimizer)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: damaged ({error}); delete it to continue from the one before") from None

    def _read(self, path: Path, model: nn.Module, ema: EMA, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = files.read_json(path / "state.json")
        if state["random"]["seed"] != self.seed:
            raise UserError(f"{path}: made with seed {state['random']['seed']}, but this run has seed {self.seed}")
        load_weights(model, files.read_tensors(path / "weights.safetensors"), path / "weights.safetensors")
        ema.load(files.read_tensors(path / "average.safetensors"), state["updates"])
        optimizer.restore(files.read_tensors(path / "optimizer.safetensors"))
        return state


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A run folder: what a model is, its weights, what happened while it was trained. Safe to share, no pickle.

config.json         the RunConfig
model.safetensors   weights to sample with (the averaged ones)
metrics.jsonl       one JSON object a line: training, validation
samples/            preview grids
checkpoints/        everything that is needed to continue bit for bit
evaluation.json     scores, once `evaluate` has been run
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osmose.configuration import ConfigError
from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.methods.base import GenerativeModel, MethodConfig
from osmose.networks.quantized import in_fewer_bits
from osmose.training import files
from osmose.training.config import Parent, RunConfig
from osmose.training.runtime import Runtime, chosen


class Run:
    """One run folder."""

    def __init__(self, folder: Path, config: RunConfig):
        self.folder, self.config = folder, config

    @classmethod
    def create(cls, folder: Path | str, config: RunConfig) -> Run:
        """Make a new folder with its config.json.

        Raises:
            UserError: something is there already.
        """
        folder = Path(folder)
        require_free(folder)
        config = config.replace(versions=versions())
        if is_first_process():
            files.write_json(folder / "config.json", config.to_json())
        return cls(folder, config)

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Open an existing folder.

        Raises:
            UserError: not a run folder, or a config.json that this version cannot read; the message says why.
        """
        folder = Path(folder)
        if (folder / "distillation.json").is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: a distillation that is not finished; osmose distill METHOD RUN --out {folder} --resume "
                "goes on with it"
            )
        if (folder / "blocks.json").is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: blocks that are not all trained; osmose train blocks --out {folder} --resume goes on with "
                "them, osmose blocks merge puts together what was trained elsewhere"
            )
        if (folder / "quantization.json").is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: a quantization that is not finished; osmose quantize RUN --out {folder} --resume goes on "
                "with it"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: not a run folder (it has no config.json)")
        values = files.read_json(folder / "config.json")
        if not isinstance(values, dict) or values.get("format") != "osmose-run-1":
            raise UserError(f"{folder / 'config.json'}: not written by osmose (its format is not 'osmose-run-1')")
        try:
            return cls(folder, RunConfig.parse(values))
        except ConfigError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from None

    def require_real(self, what: str) -> None:
        """Refuse a run whose network has integer weights, or bf16.

        Raises:
            UserError: saying what cannot be done with it.
        """
        require_real(self.config.method, str(self.folder), what)

    @property
    def weights(self) -> Path:
        """model.safetensors."""
        return self.folder / "model.safetensors"

    def model(self, device: torch.device | str = "cpu", runtime: Runtime = "torch") -> GenerativeModel:
        """The trained model, in evaluation mode.

        Args:
            device: where it computes.
            runtime: what computes its networks, "torch" or "openvino", which samples alone; "auto" is OpenVINO for
                quantised runs where it can (`training.runtime`), torch for all others.

        Raises:
            UserError: no weights yet, or weights of another network; the message names what differs. A runtime that
                cannot compute it here.
        """
        if not self.weights.is_file():
            raise UserError(f"{self.folder}: has no model.safetensors yet; train it first (osmose train ... --resume)")
        state = files.read_tensors(self.weights)
        with torch.random.fork_rng(devices=[]):
            model = self.config.method.build(self.config.spec)
        load_weights(model, state, self.weights)
        model = model.to(device).eval()
        if runtime != "torch":
            chosen(model, self.folder / "graphs", self.hash, device, runtime)
        return model

    def write_weights(self, state: dict[str, Tensor]) -> None:
        """Replace model.safetensors."""
        files.write_tensors(self.weights, state)

    def hash(self) -> str:
        """SHA-256 of model.safetensors: what a child run records of its parent."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def as_parent(self) -> Parent:
        """What a run that is made from this one records of it."""
        return Parent(folder=self.folder.resolve().name, sha256=self.hash())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = []
        for line in lines:
            try:
                kept.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return kept

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl.

        Raises:
            UserError: the disk is full.
        """
        path = self.folder / "metrics.jsonl"
        with files.writing(path), path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Remove what an interruption left half written, and what metrics.jsonl says of steps after `step`."""
        files.sweep(self.folder)
        kept = [line for line in self.metrics() if line["step"] <= step]
        files.write_bytes(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())


def require_real(method: MethodConfig, name: str, what: str) -> None:
    """Refuse a method whose network has integer weights, or bf16; `what` cannot be done with it.

    Raises:
        UserError: naming the run.
    """
    network = method.network_config
    if network is not None and in_fewer_bits(network):
        raise UserError(f"{name}: is quantized, and {what}; take the run that it was made from")


def is_first_process() -> bool:
    """Whether this is the process that makes the folder; torchrun and accelerate launch number theirs in RANK."""
    return os.environ.get("RANK", "0") == "0"


def require_free(folder: Path) -> None:
    """Refuse a folder that holds something already.

    Raises:
        UserError: there is a file, or a folder that is not empty.
    """
    if is_first_process() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} exists already; choose another folder (--resume continues a run)")


def data_of(run: Run, root: Path | None = None) -> Dataset:
    """The data that a run was trained on.

    Args:
        run: the run.
        root: where the data lie, if not where the run found them.

    Raises:
        UserError: missing data, or other data in their place.
    """
    data = run.config.data.replace(root=str(root)) if root is not None else run.config.data
    dataset: Dataset = data.load()
    if dataset.identity.sha256 != run.config.identity.sha256:
        raise UserError(f"data: {run.config.identity.source!r} is not what this run was trained on (its hash differs)")
    return dataset


def load(folder: Path | str, device: torch.device | str = "cpu", runtime: Runtime = "auto") -> GenerativeModel:
    """The model of a run folder, ready to `sample`; arguments as of `Run.model`.

    Raises:
        UserError: not a run folder, or one that cannot be read.
    """
    return Run.open(folder).model(device, runtime)


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Put tensors into a model, refusing any that are missing, left over or of another shape.

    Raises:
        UserError: naming the file and the first tensor that does not fit.
    """
    own = model.state_dict()
    for name, value in own.items():
        if name not in state:
            raise UserError(f"{source}: has no tensor {name!r}; these weights are not of this run's network")
        if state[name].shape != value.shape:
            raise UserError(
                f"{source}: {name!r} is {tuple(state[name].shape)}, but this run's network wants {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(state[name]).all()):
            raise UserError(f"{source}: {name!r} holds NaN or infinity")
    extra = sorted(set(state) - set(own))
    if extra:
        raise UserError(f"{source}: holds {extra[0]!r}, which this run's network does not have")
    model.load_state_dict(state)


def versions() -> dict[str, str]:
    """What computed a run: osmose, torch, Python, machine."""
    return {
        "osmose": importlib.metadata.version("osmose"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }

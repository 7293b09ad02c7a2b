"""A run that takes a fifth of a second and uses everything that could go wrong: dropout, flips, classes, previews."""

import json
from pathlib import Path

import pytest
import torch

from osmose.data.assembly import Part, image_dataset
from osmose.data.dataset import DataConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run

TINY = {
    "conditional": True,
    "network.kind": "mlp",
    "network.width": 16,
    "network.depth": 2,
    "network.dropout": 0.3,
    "sampling.num_steps": 2,
    "training.steps": 12,
    "training.batch_size": 8,
    "training.lr": 0.01,
    "training.warmup": 3,
    "training.ema": 0.8,
    "training.flip": True,
    "training.precision": "fp32",
    "training.log_every": 5,
    "training.validate_every": 6,
    "training.preview_every": 6,
    "training.preview_samples": 4,
    "training.checkpoint_every": 4,
    "training.keep_checkpoints": 1,
}
TIMINGS = ("seconds", "items_per_second")


@pytest.fixture(scope="session")
def dataset():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return image_dataset("npz:tiny", DataConfig(source="npz:tiny"), Part(pixels, torch.arange(50) % 3))


@pytest.fixture
def start(dataset, tmp_path):
    """Make a run folder of the tiny run, with changes."""

    def make(name="run", seed=0, **changes):
        changed = TINY | {name.replace("__", "."): value for name, value in changes.items()}
        return Run.create(tmp_path / name, recipe("ddpm", DataConfig(source="npz:tiny"), dataset, seed, changed))

    return make


@pytest.fixture
def contents():
    return read_contents


def read_contents(folder):
    """Everything below a run folder, by its name there; of the log, what does not depend on the clock."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name != "config.json":
            found[str(path.relative_to(folder))] = path.read_bytes()
    lines = [json.loads(line) for line in found.pop("metrics.jsonl", b"").splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    return found

"""osmose: diffusion models on the hardware you have.

import osmose

run = osmose.train("ddpm", "digits", "runs/digits")
x = osmose.load("runs/digits").sample(64, num_steps=20, seed=0).data
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osmose.acceleration.distill import distill
    from osmose.acceleration.surrogate import surrogate
    from osmose.analysis.conservativity import conservativity
    from osmose.analysis.dimension_report import dimension
    from osmose.analysis.flow_likelihood import flow_likelihood
    from osmose.analysis.likelihood import likelihood
    from osmose.data.dataset import DataConfig, Dataset
    from osmose.errors import UserError
    from osmose.metrics.evaluate import score_samples
    from osmose.studies.running import run_study
    from osmose.training.recipes import recipe, train
    from osmose.training.run import Run, load
    from osmose.training.trainer import Trainer

__all__ = [
    "DataConfig",
    "Dataset",
    "Run",
    "Trainer",
    "UserError",
    "conservativity",
    "dimension",
    "distill",
    "flow_likelihood",
    "likelihood",
    "load",
    "recipe",
    "run_study",
    "score_samples",
    "surrogate",
    "train",
]
__version__ = "0.1.0"

_HOMES = {
    "DataConfig": "osmose.data.dataset",
    "Dataset": "osmose.data.dataset",
    "Run": "osmose.training.run",
    "Trainer": "osmose.training.trainer",
    "UserError": "osmose.errors",
    "conservativity": "osmose.analysis.conservativity",
    "dimension": "osmose.analysis.dimension_report",
    "distill": "osmose.acceleration.distill",
    "flow_likelihood": "osmose.analysis.flow_likelihood",
    "likelihood": "osmose.analysis.likelihood",
    "load": "osmose.training.run",
    "recipe": "osmose.training.recipes",
    "run_study": "osmose.studies.running",
    "score_samples": "osmose.metrics.evaluate",
    "surrogate": "osmose.acceleration.surrogate",
    "train": "osmose.training.recipes",
}


def __getattr__(name: str) -> Any:
    # Importing osmose imports nothing else: torch comes in with the first thing that needs it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'osmose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

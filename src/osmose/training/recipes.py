"""From what a user says to a whole configuration: the method's own recipe, then sensible training, then overrides."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from osmose.configuration import override
from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.methods import METHODS, TAUGHT
from osmose.methods.messages import Batch
from osmose.training.config import RunConfig, TrainingConfig
from osmose.training.optimizers import suited_to
from osmose.training.progress import Progress
from osmose.training.run import Run
from osmose.training.trainer import Trainer


def recipe(method: str, data: DataConfig, dataset: Dataset, seed: int, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration of a new run.

    Args:
        method: a registered method.
        data: where the data come from.
        dataset: the data themselves: their form and spread decide the defaults.
        seed: of everything random.
        changes: dotted overrides (`{"network.channels": 64, "training.steps": 500}`); names that do not begin with
            `training.` are the method's.

    Raises:
        UserError: a name or a value that is refused; the message says what would be right.
    """
    cls = METHODS.resolve(method)
    if method in TAUGHT:
        raise UserError(
            f"{method}: is distilled from a trained run, not trained; use osmose distill {method} RUN --out RUN2"
        )
    # Complete, so that an override may reach into a part that the recipe does not mention (schedule.num_steps=500).
    values = cls.parse(cls.recipe(dataset.spec, spread(dataset))).to_json()
    training = {
        name.removeprefix("training."): value for name, value in changes.items() if name.startswith("training.")
    }
    fields = set(cls.model_fields)
    for name in changes:
        if name in TrainingConfig.model_fields and name not in fields:
            raise UserError(f"{name}: unknown field; did you mean 'training.{name}'?")
    ours = {name: value for name, value in changes.items() if not name.startswith("training.")}
    suited = cls.training_recipe(dataset.spec) | suited_to(training)
    whole = override(training_for(dataset.spec, training.get("steps", suited.get("steps"))) | suited, training)
    steps = whole["steps"]
    return RunConfig.parse(
        {
            "method": override(values | cls.length_recipe(steps if isinstance(steps, int) else 1), ours),
            "data": data.to_json(),
            "spec": dataset.spec.to_json(),
            "identity": dataset.identity.to_json(),
            "training": whole,
            "seed": seed,
        }
    )


def spread(dataset: Dataset) -> float:
    """Root mean square of the training data in the model's units, from about 2,000 items."""
    sample = dataset.spec.encode(dataset.train[:: max(1, len(dataset.train) // 2000)])
    return float(sample.square().nanmean().sqrt())  # of series, of what is there


def training_for(spec: DataSpec, steps: Any = None) -> dict[str, Any]:
    """Training that reaches good samples in minutes on two cores.

    What should follow the length of the run does: weights are averaged over about the last tenth of it, so that a short
    run's average does not remember its beginning; warm-up takes a twentieth.

    Args:
        spec: of the data; kind and size decide length and batch.
        steps: the user's own number of steps, if any (validated later).
    """
    if spec.kind != "image":
        values = {"steps": 5000, "batch_size": 512, "lr": 2e-3}
    elif spec.dimension <= 256:
        values = {"steps": 1500, "batch_size": 64, "lr": 2e-3}
    else:
        values = {"steps": 4000, "batch_size": 64, "lr": 2e-3}
    length = steps if isinstance(steps, int) and steps > 0 else int(values["steps"])
    return values | {
        "steps": length,
        "ema": round(min(0.9999, max(0.9, 1 - 10 / length)), 6),
        "warmup": min(1000, length // 20),
        # Of a run of a few steps, what is written on the way would cost more than the steps.
        "validate_every": max(10, length // 12),
        "preview_every": max(25, length // 4),
        "checkpoint_every": max(25, length // 10),
    }


def train(
    method: str,
    data: str | DataConfig,
    out: Path | str,
    *,
    seed: int = 0,
    progress: bool = True,
    **changes: Any,
) -> Run:
    """Train a model and leave it in a run folder; the whole of training for a script.

    Args:
        method: a registered method, for example "ddpm".
        data: as `--data`, or a `DataConfig`.
        out: the folder to make.
        seed: of everything random.
        progress: show a progress bar.
        **changes: overrides, by nested dictionaries or dotted names:
            `training={"steps": 500}` or `**{"training.steps": 500}`.

    Raises:
        UserError: anything in the input that is refused; nothing has been written then.
    """
    config = data if isinstance(data, DataConfig) else DataConfig.parse({"source": data})
    dataset = config.load()
    run = Run.create(out, checked(recipe(method, config, dataset, seed, flattened(changes))))
    Trainer(run, dataset, progress=Progress(progress)).fit()
    return run


def checked(config: RunConfig) -> RunConfig:
    """The same configuration, after its parts have been put together once.

    Raises:
        UserError: parts that do not fit each other, the data or this machine.
    """
    config.training.require(int(os.environ.get("WORLD_SIZE", "1")))
    if config.training.flip and config.spec.kind != "image":
        raise UserError(f"training.flip: true mirrors images, and these data are {config.spec.kind}")
    with torch.random.fork_rng(devices=[]):
        model = config.method.build(config.spec)
    if config.training.compile and (why := model.not_compiled):
        raise UserError(f"training.compile: true given, but {why}")
    steps, trains = config.training.steps, any(parameter.requires_grad for parameter in model.parameters())
    if trains and not steps:
        raise UserError("training.steps: 0 is not valid: must be at least 1")
    if steps and not trains:
        raise UserError(
            f"training.steps: {steps} is not valid: {config.method.kind} is fitted in closed form, in 0 steps"
        )
    if trains:
        config.training.optimizer.check(config.training)
        optimizer = config.training.optimizer.build(model, config.training)
        if not optimizer.by_gradient:
            some = Batch(torch.zeros(2, *config.spec.shape), torch.zeros(2, dtype=torch.int64))
            model.regression(some, StepDraws(0, 0, 0, 2, 2))
    return config


def flattened(changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, Mapping) and "kind" not in value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat

"""What several studies measure besides the scores of samples."""

from __future__ import annotations

import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osmose.analysis.gradients import GradientNoise, gradient_noise
from osmose.analysis.likelihood import chosen_rows, likelihood
from osmose.data.dataset import DataConfig, Dataset
from osmose.data.laws import Gaussian, Mixture
from osmose.data.toy import law_of
from osmose.methods.base import GenerativeModel
from osmose.methods.times import LossAwareSampler
from osmose.studies.study import Trained
from osmose.training import files
from osmose.training.recipes import recipe
from osmose.training.run import Run
from osmose.training.runtime import use_graphs, write_graphs
from osmose.training.trainer import Trainer
from osmose.training.window import Window


def csv_table(name: str, header: Sequence[str], rows: Sequence[Sequence[float]]) -> Path:
    """A .csv in the temporary folder, whose place tells what it holds: the data of a study that makes its own."""
    text = "\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)])
    folder = Path(tempfile.gettempdir()) / f"osmose-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.csv"
    if not path.is_file():
        files.write_bytes(path, text.encode())
    return path


def exact_bits(dataset: Dataset, n: int, seed: int) -> float:
    """-log2 of a toy law's own density per dimension, at the held-out points that `analysis.likelihood` chooses.

    Raises:
        LookupError: a law whose density is not written here.
    """
    points = dataset.held_out[chosen_rows(dataset, "held-out", n, seed, 1)].double()
    law = law_of(dataset.source.removeprefix("toy:"))
    if isinstance(law, Mixture):
        centres, deviation = torch.from_numpy(law.centres), law.deviation
        near = -torch.cdist(points, centres).square() / (2 * deviation**2)
        size = len(centres) * (2 * math.pi * deviation**2) ** (law.dimension / 2)
        log_p = near.logsumexp(1) - math.log(size)
    elif isinstance(law, Gaussian):
        mean, covariance = torch.from_numpy(law.mean), torch.from_numpy(law.covariance)
        log_p = torch.distributions.MultivariateNormal(mean, covariance).log_prob(points)
    else:
        raise LookupError(f"{dataset.source}: its density is not written here")
    return -float(log_p.mean()) / (law.dimension * math.log(2))


def bound(
    trained: Trained, variance: str | None = None, n: int | None = None, num_steps: int | None = None
) -> dict[str, float]:
    """The held-out items' bound in bits per dimension, and their squared error of the noise with all t alike."""
    found = likelihood(trained.model, trained.dataset, variance=variance, n=n, num_steps=num_steps, seed=trained.seed)
    noise = {} if found.eps_error is None else {"eps_error": float(found.eps_error.mean())}
    return {"bits_per_dim": found.bits} | noise


def noise_under(trained: Trained, changes: Mapping[str, Any], *, batches: int, warmup: int) -> GradientNoise:
    """Gradient noise at a trained model's weights if it were trained with other parts (`{"objective": "vlb"}`)."""
    config = trained.run.config
    model: Any = config.method.replace(**changes).build(config.spec)
    weights: Any = trained.model
    model.denoiser.load_state_dict(weights.denoiser.state_dict())
    return gradient_noise(
        model,
        trained.dataset,
        batch_size=config.training.batch_size,
        batches=batches,
        warmup=warmup,
        seed=trained.seed,
    )


def step_seconds(
    method: str, data: str, dataset: Dataset, changes: Mapping[str, Mapping[str, Any]], *, steps: int, rounds: int = 3
) -> dict[str, float]:
    """CPU seconds of a training step in float32 under several configurations, in turns so that all see one machine.

    Args:
        method: of all of them.
        data: as `--data`.
        dataset: the data.
        changes: of each configuration, by name.
        steps: taken at a time.
        rounds: turns; the median of each configuration's is its result.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, own in changes.items():
            config = recipe(method, DataConfig(source=data), dataset, 0, {**own, "training.precision": "fp32"})
            trainers[name] = Trainer(Run.create(Path(folder) / name, config), dataset)
            for module in trainers[name].model.modules():
                if isinstance(module, LossAwareSampler):  # as it is for most of a training: learned
                    module.losses.fill_(1.0)
                    module.counts.fill_(module.config.history)
        window, found = Window(), {name: [] for name in changes}  # type: ignore[var-annotated]
        for turn in range(rounds + 1):
            for name, trainer in trainers.items():
                start = time.process_time()
                for _ in range(steps):
                    trainer.optimise(window)
                    trainer.step += 1
                if turn:  # the first warms up
                    found[name].append((time.process_time() - start) / steps)
    return {name: statistics.median(times) for name, times in found.items()}


def by_openvino(run: Run, folder: Path) -> GenerativeModel:
    """The model of a run that others may be reading, computed by OpenVINO from graphs in another folder."""
    model = run.model()
    write_graphs(model, folder, run.hash())
    use_graphs(model, folder)
    return model


def sample_milliseconds(
    models: Mapping[str, GenerativeModel],
    items: int,
    seed: int,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    rounds: int = 3,
) -> dict[str, float]:
    """Milliseconds a sample of several models, in turns so that all see one machine.

    Args:
        models: by name.
        items: samples that are drawn at once.
        seed: of them.
        options: of each model's sampling.
        rounds: turns; the median of each model's is its result.
    """
    found = {name: [] for name in models}  # type: ignore[var-annotated]
    for turn in range(rounds + 1):
        for name, model in models.items():
            samples = model.sample(items, seed=seed, **(options or {}).get(name, {}))
            if turn:  # the first warms up
                found[name].append(1e3 * samples.seconds / items)
    return {name: statistics.median(times) for name, times in found.items()}


def at_equal_time(times: Sequence[float], values: Sequence[np.ndarray], time: float) -> np.ndarray:
    """A configuration's values at another training time, by interpolation in the logarithm of time.

    Args:
        times: training times of the configuration's runs, or of the states of one run, rising.
        values: a metric at each of these, one array each, (seeds,).
        time: that is wanted, in the unit of `times`; beyond the last its value is taken.
    """
    table = np.stack(values)
    return np.array([np.interp(np.log(time), np.log(times), column) for column in table.T])

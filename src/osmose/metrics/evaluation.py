"""A run's scores and what they cost: evaluation.json."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from osmose.configuration import Config, ConfigError
from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import OnStep
from osmose.metrics.evaluate import Score, score_samples
from osmose.metrics.features import FeatureNetwork
from osmose.training import files
from osmose.training.run import Run, versions
from osmose.training.runtime import computed_by_graphs

#: Samples drawn when nothing else is said: enough for features of 64 dimensions, minutes on a CPU.
DEFAULT_SAMPLES = 2_000


class Paired(Config):
    """How far samples are from those that another run, or the same in another way, draws from the same noise."""

    folder: str = Field(description="name of the other run, without private folders")
    sha256: str = Field(description="of the other run's model.safetensors")
    sampling: dict[str, Any] = Field(description="the other run's sampling configuration")
    rmse: float = Field(ge=0, description="root mean square difference over samples and values, model units")


class Evaluation(Config):
    """Scores of one run under one way of sampling."""

    sampling: dict[str, Any] = Field(description="the method's sampling configuration")
    seed: int
    n: int
    nfe: int = Field(description="network evaluations spent on each sample")
    seconds: float = Field(description="wall time of the sampling alone")
    items_per_second: float
    peak_memory_mib: float = Field(description="largest memory of the process, or of the accelerator, so far")
    device: str = Field(description="where, and `by openvino` where graphs were computed")
    threads: int
    weights_sha256: str
    data_sha256: str
    versions: dict[str, str]
    scores: list[Score]
    paired: Paired | None = Field(None, description="the last comparison from the same noise")

    def score(self, name: str) -> Score | None:
        """The score of a metric, if it was computed."""
        return next((score for score in self.scores if score.name == name), None)


class EvaluationFile(Config):
    """The content of evaluation.json."""

    evaluations: list[Evaluation]


def default_count(dataset: Dataset) -> int:
    """As many samples as `DEFAULT_SAMPLES`, or as half the training part holds, so that a floor can be measured."""
    return max(2, min(DEFAULT_SAMPLES, len(dataset.train) // 2))


def evaluate_run(
    run: Run,
    dataset: Dataset,
    *,
    n: int | None = None,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    features: FeatureNetwork | str | None = "default",
    reference: str = "train",
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    model: GenerativeModel | None = None,
    **options: Any,
) -> tuple[Evaluation, Tensor]:
    """Sample from a run and score the samples.

    Args:
        run: the run.
        dataset: the real data, as `run.config.data.load()` gives them.
        n: number of samples; `default_count` if None.
        seed: of the samples and of every random choice of the metrics.
        metrics: names, or None for all that can be computed.
        features: as in `score_samples`.
        reference: part of the real data to compare with, "train" or "held-out".
        batch_size: samples computed together.
        device: where to sample.
        on_step: called with the steps done and the steps in all.
        model: the run's model, when it is loaded already.
        **options: of the method's sampling configuration (`num_steps`, `solver`).

    Returns:
        The evaluation and the samples, data units.

    Raises:
        UserError: an option or a metric that is refused.
    """
    model = model if model is not None else run.model(device)
    n = n or min(default_count(dataset), model.most or sys.maxsize)
    sampling = model.sampling(**options)
    form = model.ends(sampling)[1]
    if form.shape != model.spec.shape:
        raise UserError(
            f"resolution: samples of shape {form.shape} are not compared with data of shape {model.spec.shape}; scores "
            "are those of the data's own"
        )
    if form != model.spec:
        raise UserError("direction: backward gives items of the source, and scores compare with the data")
    samples = model.sample(n, seed=seed, batch_size=batch_size, on_step=on_step, **options)
    memory = peak_memory(model.device)  # before the metrics add their own
    scores = score_samples(
        samples.data,
        dataset,
        reference=reference,  # type: ignore[arg-type]
        features=features,  # type: ignore[arg-type]
        labels=samples.condition,
        times=samples.times,
        seed=seed,
        metrics=metrics,
    )
    evaluation = Evaluation(
        sampling=sampling.to_json(),
        seed=seed,
        n=n,
        nfe=samples.nfe,
        seconds=round(samples.seconds, 4),
        items_per_second=round(n / samples.seconds, 3),
        peak_memory_mib=round(memory / 2**20, 1),
        device=f"{model.device} by openvino" if computed_by_graphs(model) else str(model.device),
        threads=torch.get_num_threads(),
        weights_sha256=run.hash(),
        data_sha256=dataset.identity.sha256,
        versions=versions(),
        scores=scores,
    )
    return evaluation, samples.data


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes so far: of a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_evaluations(run: Run) -> list[Evaluation]:
    """What evaluation.json holds of the run's present weights; older weights' scores are passed over.

    Raises:
        UserError: an evaluation.json that osmose did not write; the message names it.
    """
    path = run.folder / "evaluation.json"
    if not path.is_file() or not run.weights.is_file():
        return []
    try:
        evaluations = EvaluationFile.parse(files.read_json(path)).evaluations
    except ConfigError as error:
        raise UserError(f"{path}: not written by osmose ({error})") from None
    weights = run.hash()
    return [evaluation for evaluation in evaluations if evaluation.weights_sha256 == weights]


def record(run: Run, evaluation: Evaluation) -> None:
    """Add an evaluation to evaluation.json.

    Of one made under the same conditions, the scores that were not computed again are kept, and what it was paired with
    if the new one is not paired.
    """

    def conditions(e: Evaluation) -> Any:
        by_graphs = "openvino" in e.device
        return e.sampling, e.seed, e.n, by_graphs, e.scores[0].reference if e.scores else None

    kept = []
    for earlier in read_evaluations(run):
        if conditions(earlier) != conditions(evaluation):
            kept.append(earlier)
            continue
        again = {(score.name, score.features_sha256) for score in evaluation.scores}
        old = [score for score in earlier.scores if (score.name, score.features_sha256) not in again]
        paired = evaluation.paired or earlier.paired
        evaluation = evaluation.model_copy(update={"scores": [*old, *evaluation.scores], "paired": paired})
    files.write_json(run.folder / "evaluation.json", {"evaluations": [e.to_json() for e in (*kept, evaluation)]})


#: Metrics that sum up data, the best first: FID where it exists, then a classifier's, then plain distances.
HEADLINES = ("fid", "fd_clf", "fd_inception-unverified", "sw2", "trigram_tv")


def headline(evaluations: Sequence[Evaluation]) -> str:
    """The metric that best sums up such data."""
    for name in HEADLINES:
        if any(e.score(name) for e in evaluations):
            return name
    return evaluations[0].scores[0].name

"""Two runs from the same noise: how far the samples of one, in few steps, are from those of the other in full.

A seed gives the samples of every diffusion the same standard noise to start from. With solvers that draw no more, the
sample of a run is a function of that noise, and two runs, or one in two numbers of steps, can be compared sample by
sample: by the root mean square of the difference, which says what a student lost of its teacher even where both score
alike against real data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import Tensor

from osmose.data.dataset import Dataset, DataSpec
from osmose.errors import UserError
from osmose.gaussian.noise import Noise
from osmose.gaussian.solvers import DDIM, Ancestral
from osmose.methods.base import GenerativeModel, SamplingConfig
from osmose.methods.chain import ProcessConfig
from osmose.methods.consistency import ConsistencyConfig
from osmose.methods.diffusion import DiffusionConfig
from osmose.methods.messages import OnStep
from osmose.methods.operator import DSNOConfig
from osmose.methods.students import DistilledConfig, StudentConfig
from osmose.metrics.evaluation import Evaluation, Paired, evaluate_run, headline, record
from osmose.training.run import Run

#: Shows that some sampling goes on, named by a label: a context that yields what is called after each step.
Bar = Callable[[str], AbstractContextManager[OnStep | None]]

#: Samples of each way that are kept for pictures: images in each row, points in each panel.
_COLUMNS, _POINTS = 12, 2_000


class Pair:
    """A run in some ways of sampling, and another in one way, all from the same noise.

    Attributes:
        run: the run.
        model: its model.
        ways: its ways of sampling: options of `model.sample`, each with a number of steps.
        against: the run that it is held against; may be the same.
        full: the model of `against`.
        options: how that samples.
    """

    def __init__(self, run: Run, model: GenerativeModel, ways: Sequence[dict[str, Any]], against: Run):
        """Read the weights of `against` and refuse what cannot be paired; nothing is sampled.

        Raises:
            UserError: other data, a method that does not start from such noise, a solver that draws more of it, steps
                that a run does not have.
        """
        _require_same_noise(run, against)
        for way in ways:
            _require_function(run, model.sampling(**way), "take --solver ddim, heun or dpmpp-2m")
        self.run, self.model, self.ways, self.against = run, model, list(ways), against
        self.options, self.full = full_sampling(run, against), against.model(model.device)
        _require_function(
            against,
            self.full.sampling(**self.options),
            "the samples to pair with come from ddim (eta = 0), heun or dpmpp-2m in method.sampling of its config.json",
        )


@dataclass(frozen=True)
class Row:
    """One way of sampling.

    Attributes:
        run: the run.
        evaluation: its scores and, where it is not what others are paired with, its distance from that.
        shown: the first of its samples, data units, for pictures.
    """

    run: Run
    evaluation: Evaluation
    shown: Tensor

    @property
    def steps(self) -> int:
        """Solver steps."""
        return int(self.evaluation.sampling["num_steps"])

    @property
    def rmse(self) -> float | None:
        """Paired root mean square difference."""
        return None if self.evaluation.paired is None else self.evaluation.paired.rmse


@dataclass(frozen=True)
class Result:
    """What was measured of a pair.

    Attributes:
        full: the run that is held against, in full.
        rows: the ways of the other.
    """

    full: Row
    rows: list[Row]

    @property
    def metric(self) -> str:
        """The metric that sums up the data."""
        return headline([row.evaluation for row in (self.full, *self.rows)])

    def to_json(self) -> list[dict[str, Any]]:
        """The numbers of every row, that in full first; `call_ratio` is its network evaluations over those of a row."""
        values = []
        for row in (self.full, *self.rows):
            e, score = row.evaluation, row.evaluation.score(self.metric)
            assert score is not None, "all rows are scored by the same metrics"
            values.append(
                {
                    "run": str(row.run.folder),
                    "steps": row.steps,
                    "metric": self.metric,
                    "score": score.value,
                    "standard_error": score.standard_error,
                    "real": score.floor,
                    "paired_rmse": row.rmse,
                    "nfe": e.nfe,
                    "call_ratio": self.full.evaluation.nfe / e.nfe,
                    "seconds": e.seconds,
                    "seconds_per_sample": e.seconds / e.n,
                    "n": e.n,
                }
            )
        return values

    def table(self) -> Table:
        """The numbers for the terminal."""
        values, score = self.to_json(), self.full.evaluation.score(self.metric)
        assert score is not None, "all rows are scored by the same metrics"
        name = self.full.run.folder
        table = Table(title=f"{self.rows[0].run.folder} against {name}, {values[0]['n']} samples from the same noise")
        table.add_column("run")
        for heading in ("steps", self.metric, "±", f"RMSE to {name}", "nfe", "fewer calls", "ms per sample"):
            table.add_column(heading, justify="right")
        for row in values:
            table.add_row(
                row["run"],
                str(row["steps"]),
                f"{row['score']:.4g}",
                "-" if row["standard_error"] is None else f"{row['standard_error']:.2g}",
                "-" if row["paired_rmse"] is None else f"{row['paired_rmse']:.4g}",
                str(row["nfe"]),
                f"{row['call_ratio']:.4g}x",
                f"{1000 * row['seconds_per_sample']:.3g}",
            )
        real = [] if score.floor is None else [f"{self.metric} of real data: {score.floor:.4g}"]
        notes = [*real, "RMSE in the model's units", *(score.note or "").splitlines()]
        if isinstance(self.rows[0].run.config.method, ConsistencyConfig) and any(
            row.evaluation.nfe > 1 for row in self.rows
        ):
            notes.append("with more than one step a consistency model draws further noise")
        table.caption = "\n".join(notes)
        table.caption_justify = "left"
        return table


def full_sampling(run: Run, against: Run) -> dict[str, Any]:
    """How `against` samples when `run` is held against it: options of its model's `sample`.

    The diffusion that students were distilled from, or one on its schedule, samples as they were taught to, whichever
    phase they are of, and so does the one that gave a neural operator its trajectories; any other run as it does by
    itself.
    """
    method, other = run.config.method, against.config.method
    if isinstance(method, DSNOConfig):
        theirs = other.model if isinstance(other, StudentConfig) else other
        alike = isinstance(theirs, DiffusionConfig) and theirs.schedule == method.schedule
        return dict(method.teacher_sampling) if alike else {}
    if not isinstance(method, StudentConfig):
        return {}
    if isinstance(other, DiffusionConfig):
        assert isinstance(method.model, DiffusionConfig), "nothing else is distilled"
        alike = "solver" in method.teacher_sampling and other.schedule == method.model.schedule
    else:  # students that were distilled further; a phase has one grid, and need not be told
        parent = run.config.parent
        alike = parent is not None and parent.sha256 == against.hash() and isinstance(other, DistilledConfig)
    return dict(method.teacher_sampling) if alike else {}


def paired_rmse(samples: Tensor, others: Tensor, spec: DataSpec) -> float:
    """Root mean square difference of samples from the same noise, over samples and dimensions.

    Args:
        samples: data units, shape (n, *spec.shape).
        others: the same.
        spec: gives the model's units, in which the difference is.
    """
    total = 0.0
    for a, b in zip(samples.split(4096), others.split(4096), strict=True):
        total += float((spec.encode(a) - spec.encode(b)).double().square().sum())
    return math.sqrt(total / samples.numel())


def evaluate_pair(pair: Pair, dataset: Dataset, bar: Bar, **settings: Any) -> Result:
    """Sample in full and in all other ways from the same noise; score, compare, and record in both evaluation.json.

    Args:
        pair: the runs.
        dataset: the real data.
        bar: called for each way of sampling with a label.
        **settings: of `evaluate_run`: `n`, `seed`, `metrics`, `features`, `reference`, `batch_size`.

    Raises:
        UserError: a setting that is refused, an evaluation.json that cannot be written.
    """
    spec = dataset.spec
    most = _COLUMNS if spec.kind == "image" else _POINTS
    with bar(f"sampling {pair.against.folder} in full") as on_step:
        evaluation, others = evaluate_run(
            pair.against, dataset, model=pair.full, on_step=on_step, **settings, **pair.options
        )
    record(pair.against, evaluation)
    full = Row(pair.against, evaluation, others[:most])
    rows = []
    for way in pair.ways:
        with bar(f"sampling {pair.run.folder}") as on_step:
            evaluation, samples = evaluate_run(pair.run, dataset, model=pair.model, on_step=on_step, **settings, **way)
        paired = Paired(
            folder=name_of(pair.against),
            sha256=full.evaluation.weights_sha256,
            sampling=full.evaluation.sampling,
            rmse=paired_rmse(samples, others, spec),
        )
        evaluation = evaluation.model_copy(update={"paired": paired})
        record(pair.run, evaluation)
        rows.append(Row(pair.run, evaluation, samples[:most]))
    return Result(full, rows)


def name_of(run: Run) -> str:
    """Of its folder, without private ones."""
    return run.folder.resolve().name


def _require_same_noise(run: Run, against: Run) -> None:
    ours, theirs = run.config, against.config
    if ours.identity.sha256 != theirs.identity.sha256:
        forms = [f"{c.identity.source!r}, {c.spec.kind} of shape {c.spec.shape}" for c in (theirs, ours)]
        same = " (their hashes differ)" if forms[0] == forms[1] else ""
        raise UserError(
            f"--against: {against.folder} was trained on {forms[0]}, and {run.folder} on {forms[1]}{same}; "
            "only runs on the same data can be paired"
        )
    mine, other = _noise(run), _noise(against)
    if mine != other:
        raise UserError(
            f"--against: {against.folder} starts from noise {other.to_json()}, and {run.folder} from {mine.to_json()}; "
            "only samples from the same noise can be paired"
        )


def _noise(run: Run) -> Noise:
    """The law of the noise that a run's samples are made from."""
    method = run.config.method
    process = method.model if isinstance(method, StudentConfig) else method
    if not isinstance(process, ProcessConfig):
        raise UserError(
            f"--against: {run.folder} is a run of {method.kind}, whose samples do not come from the noise of a "
            "diffusion; ddpm, iddpm, edm and what is distilled from them can be paired"
        )
    return process.noise


def _require_function(run: Run, sampling: SamplingConfig, advice: str) -> None:
    """Refuse sampling that is no function of the noise at the start."""
    solver = getattr(sampling, "solver", None)
    eta = solver.eta if isinstance(solver, DDIM) else 0.0
    if isinstance(solver, Ancestral) or eta > 0:
        how = f"ddim with eta = {eta:g}" if eta else "ancestral"
        raise UserError(
            f"--against: {run.folder} samples with {how}, which draws further noise, and only samples that follow from "
            f"the noise at the start can be paired; {advice}"
        )

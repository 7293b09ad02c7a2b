"""What a study is: configurations, what is measured on each, and claims that are checked against the numbers."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from osmose.data.dataset import DataConfig, Dataset
from osmose.methods import CONTINUED, DISTILLED
from osmose.methods.base import GenerativeModel
from osmose.metrics.evaluation import evaluate_run, record
from osmose.studies.verdicts import Finding, lower, mean_and_spread, same
from osmose.training.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Label = str | int | float


@dataclass(frozen=True)
class Cell:
    """One configuration of a study; it is run once for each seed.

    Attributes:
        name: lower-case letters, digits, `.` and `-`: it names files.
        method: what is trained, or None where nothing is and `measure` needs only the data. Methods that distil have
            the run of the first cell in `uses` for a teacher; `sct` and `ect` begin with its weights, if there is one.
            `blocks` is edm in blocks, whose plan has the changes that begin with `blocks.`.
        data: as `--data`, or a `DataConfig` without a root.
        changes: dotted overrides of the recipe, as for `recipe` (`{"network.width": 256, "training.steps": 500}`); of a
            distillation, what is said of it, as for `acceleration.distill` (`{"schedule": [64, 8, 1]}`).
        settings: plain values that `measure` reads (`{"num_samples": 800}`). They belong to the cell's identity: when
            one changes, the cell is measured again, and not trained again.
        note: what the cell is there for, in words.
        uses: names of cells of the same study whose runs of the same seed `measure` needs (`Trained.of`). They are
            trained and measured first; when what is trained of them changes, the cell is measured again.
    """

    name: str
    method: str | None
    data: str | DataConfig
    changes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    uses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ValueError(f"cell {self.name!r}: a name is made of lower-case letters, digits, '.' and '-'")

    @property
    def starts_from(self) -> str | None:
        """The cell whose run this one is made from, if it is made from one."""
        return self.uses[0] if self.uses and self.method in (*DISTILLED, *CONTINUED) else None


@dataclass(frozen=True)
class Row:
    """Measurements of one cell and seed: `labels` tell the rows of a cell apart, `values` are what is averaged."""

    labels: Mapping[str, Label]
    values: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}; every value of a row has to be a finite number")


@dataclass(frozen=True)
class Trained:
    """One cell and seed, ready to be measured.

    Attributes:
        cell: the configuration.
        seed: of the run, and of everything random in measuring.
        dataset: the real data.
        device: where to sample.
        trained_run: the run folder, or None where nothing was trained.
        used_runs: the run folder of each cell that the cell uses, by name.
        data: where the dataset was read, for what it does not hold; None where nobody says.
    """

    cell: Cell
    seed: int
    dataset: Dataset
    device: torch.device
    trained_run: Run | None
    used_runs: Mapping[str, Run] = field(default_factory=dict)
    data: DataConfig | None = None

    @property
    def run(self) -> Run:
        """The run folder.

        Raises:
            LookupError: the cell trains nothing.
        """
        if self.trained_run is None:
            raise LookupError(f"cell {self.cell.name!r} trains nothing (its method is None): it has no run")
        return self.trained_run

    def of(self, name: str) -> Run:
        """The finished run, of the same seed, of a cell that this one uses; to be read only, others may be reading it.

        Raises:
            LookupError: the cell does not say that it uses it.
        """
        if name not in self.used_runs:
            known = ", ".join(self.used_runs) or "none"
            raise LookupError(f"cell {self.cell.name!r} does not use {name!r}; in its `uses` are {known}")
        return self.used_runs[name]

    @cached_property
    def model(self) -> GenerativeModel:
        """The trained model, in evaluation mode on `device`; loaded when first asked for."""
        return self.run.model(self.device)

    def scores(self, num_samples: int, metrics: Sequence[str], **sampling: Any) -> dict[str, float]:
        """Sample and score, and keep the evaluation in the run folder as `osmose evaluate` does.

        Args:
            num_samples: samples, and real items that they are compared with.
            metrics: names of scores, as for `score_samples`.
            **sampling: of the method's sampling configuration (`num_steps`, `solver`).

        Returns:
            Each score, `NAME_real` beside it for what real data reach, and `nfe`.
        """
        evaluation, _ = evaluate_run(
            self.run, self.dataset, n=num_samples, seed=self.seed, metrics=metrics, device=self.device,
            model=self.model, **sampling,
        )  # fmt: skip
        record(self.run, evaluation)
        values: dict[str, float] = {"nfe": evaluation.nfe}
        for score in evaluation.scores:
            values[score.name] = score.value
            if score.floor is not None:
                values[f"{score.name}_real"] = score.floor
        return values


@dataclass(frozen=True)
class Results:
    """All rows of all cells: `rows[cell]` holds the rows of each seed, in the order of `seeds`."""

    seeds: tuple[int, ...]
    rows: Mapping[str, Sequence[Sequence[Row]]]

    def __post_init__(self) -> None:
        for cell, per_seed in self.rows.items():
            forms = [[(dict(row.labels), set(row.values)) for row in rows] for rows in per_seed]
            if any(form != forms[0] for form in forms):
                raise ValueError(f"cell {cell!r}: the seeds have different rows; they have to be measured alike")

    def groups(self, cell: str) -> list[tuple[dict[str, Label], dict[str, np.ndarray]]]:
        """Each row of a cell: its labels, and for each metric the values of all seeds, shape (seeds,)."""
        return [
            (dict(rows[0].labels), {name: np.array([row.values[name] for row in rows]) for name in rows[0].values})
            for rows in zip(*self.rows[cell], strict=True)
        ]

    def values(self, cell: str, metric: str, **labels: Label) -> np.ndarray:
        """A metric of the row of `cell` with these labels, in the order of `seeds`, shape (seeds,).

        Raises:
            LookupError: no such cell or metric, or not exactly one row with these labels.
        """
        if cell not in self.rows:
            raise LookupError(f"no cell {cell!r}; there are {', '.join(self.rows)}")
        groups = self.groups(cell)
        found = [values for own, values in groups if labels.items() <= own.items()]
        if len(found) != 1:
            raise LookupError(
                f"cell {cell!r} has {len(found)} rows with {labels}; its rows are {[own for own, _ in groups]}"
            )
        if metric not in found[0]:
            raise LookupError(f"cell {cell!r} has no {metric!r}; it has {', '.join(found[0])}")
        return found[0][metric]


@dataclass(frozen=True)
class Claim:
    """A sentence that the numbers bear out or not.

    Attributes:
        text: the claim, in words that stand for themselves.
        cells: names of the cells that it compares.
        check: from the results to the verdict, put together from `verdicts`.
    """

    text: str
    cells: Sequence[str]
    check: Callable[[Results], Finding]

    @classmethod
    def lower(cls, text: str, a: str, b: str, metric: str, **labels: Label) -> Claim:
        """The claim that cell `a` has less of a metric than cell `b`, in the rows with these labels."""
        return cls(text, [a, b], lambda r: lower(r.values(a, metric, **labels), r.values(b, metric, **labels)))

    @classmethod
    def alike(cls, text: str, a: str, b: str, metric: str, share: float) -> Claim:
        """The claim that cell `a`'s metric differs from `b`'s by at most a share of `b`'s mean."""

        def check(results: Results) -> Finding:
            known = results.values(b, metric)
            return same(results.values(a, metric), known, share * abs(float(known.mean())))

        return cls(text, [a, b], check)


class Study(ABC):
    """A table or figure of a paper; a subclass is a file of its own, and its docstring the text of the report.

    Attributes:
        title: what is studied, in one sentence.
        source: paper, table or figure.
        quick: the short form, which shows that the machinery runs and nothing else.
    """

    title: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, quick: bool = False):
        self.quick = quick

    def seeds(self) -> tuple[int, ...]:
        """Seeds that every cell is run with."""
        return (0,) if self.quick else (0, 1, 2)

    @abstractmethod
    def cells(self) -> list[Cell]:
        """The configurations; the quick form may leave some out."""

    @abstractmethod
    def measure(self, trained: Trained) -> list[Row]:
        """Everything that is measured on one cell and seed; what it is told by the cell stands in `cell.settings`."""

    @abstractmethod
    def claims(self) -> list[Claim]:
        """The claims; the quick form passes over those that compare cells it has left out."""

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        """Tables by heading, each a list of rows from column to text; by default one of all rows and all values."""
        rows = [
            {"configuration": cell}
            | {name: str(label) for name, label in labels.items()}
            | {name: mean_and_spread(values) for name, values in metrics.items()}
            for cell in results.rows
            for labels, metrics in results.groups(cell)
        ]
        return {"Results": rows}

    def figures(self, results: Results) -> dict[str, Figure]:  # noqa: ARG002
        """Figures by file name without suffix; none by default."""
        return {}

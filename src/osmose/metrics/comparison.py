"""Runs side by side: a table, and quality against the time that a sample takes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osmose.errors import UserError
from osmose.metrics.evaluation import Evaluation, headline
from osmose.metrics.score import Score
from osmose.training import files
from osmose.training.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of every comparison; the metrics follow.
_COLUMNS = (
    "run", "method", "steps", "solver", "nfe", "seconds_per_sample", "parameters_millions", "peak_memory_mib",
    "training_seconds", "device", "threads", "n",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run under one way of sampling."""

    run: Run
    parameters: int
    evaluation: Evaluation

    @property
    def seconds_per_sample(self) -> float:
        """Wall time of one sample, computed in batches."""
        return self.evaluation.seconds / self.evaluation.n

    def cells(self) -> dict[str, Any]:
        """The row of the table."""
        e = self.evaluation
        cells: dict[str, Any] = {
            "run": str(self.run.folder),
            "method": self.run.config.method.kind,
            "steps": e.sampling.get("num_steps", ""),
            "solver": (e.sampling.get("solver") or {}).get("kind", ""),
            "nfe": e.nfe,
            "seconds_per_sample": float(f"{self.seconds_per_sample:.4g}"),
            "parameters_millions": round(self.parameters / 1e6, 3),
            "peak_memory_mib": e.peak_memory_mib,
            "training_seconds": round(sum(line.get("seconds", 0) for line in self.run.metrics())),
            "device": e.device,
            "threads": e.threads,
            "n": e.n,
        }
        for score in e.scores:
            cells[score.name] = float(f"{score.value:.4g}")
            if score.floor is not None:
                cells[f"{score.name}_real"] = float(f"{score.floor:.4g}")
        if e.paired is not None:
            cells["paired_rmse"] = float(f"{e.paired.rmse:.4g}")
            cells["paired_with"] = f"{e.paired.folder}, {e.paired.sampling['num_steps']} steps"
        return cells


def same_count(rows: Sequence[Row]) -> list[Row]:
    """The rows with the largest number of samples that every run has; all rows where the runs share none."""
    counts = [{row.evaluation.n for row in rows if row.run is run} for run in {id(r.run): r.run for r in rows}.values()]
    shared = set.intersection(*counts)
    return [row for row in rows if row.evaluation.n == max(shared)] if shared else list(rows)


def check_comparable(rows: Sequence[Row]) -> None:
    """Refuse to compare what cannot be compared.

    Raises:
        UserError: different data or different numbers of samples (the bias of a distance depends on them).
    """
    first = rows[0]
    for row in rows[1:]:
        if row.evaluation.data_sha256 != first.evaluation.data_sha256:
            raise UserError(f"{row.run.folder} and {first.run.folder} were evaluated on different data")
        if row.evaluation.n != first.evaluation.n:
            raise UserError(
                f"{row.run.folder} was evaluated on {row.evaluation.n} samples and {first.run.folder} on "
                f"{first.evaluation.n}; evaluate both with the same -n"
            )
        for score in row.evaluation.scores:
            other = first.evaluation.score(score.name)
            if other is not None and conditions(score) != conditions(other):
                raise UserError(
                    f"{row.run.folder} and {first.run.folder}: {score.name} was computed on other real data or "
                    "features; evaluate both the same way"
                )


def write_comparison(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write comparison.md, comparison.csv and pareto.png.

    Raises:
        UserError: rows that cannot be compared.
    """
    check_comparable(rows)
    cells = [row.cells() for row in rows]
    names = [*_COLUMNS, *dict.fromkeys(name for row in cells for name in row if name not in _COLUMNS)]
    metric = headline([row.evaluation for row in rows])
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    shown = [name for name in names if not name.endswith("_real") or name == f"{metric}_real"]
    lines = [f"| {' | '.join(shown)} |", f"|{'|'.join('---' for _ in shown)}|"]
    lines += [f"| {' | '.join(str(row.get(name, '')) for name in shown)} |" for row in cells]
    title = f"# Comparison on {rows[0].run.config.identity.source}\n\n"
    note = (
        f"\n`{metric}_real` is what real data reach: the floor of `{metric}` at this number of samples. Seconds are "
        "wall time, of sampling in batches and of training without validation.\n\n"
        "![quality against seconds per sample](pareto.png)\n"
    )
    paths = [folder / "comparison.md", folder / "comparison.csv", folder / "pareto.png"]
    files.write_bytes(paths[0], (title + "\n".join(lines) + "\n" + note).encode())
    files.write_bytes(paths[1], text.getvalue().encode())
    files.write_figure(paths[2], _pareto(rows, metric))
    return paths


def conditions(score: Score) -> tuple[Any, ...]:
    """What two scores of one name have to share to be compared."""
    return score.reference, score.m, score.features_sha256


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, error) that no other point beats in both, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def _pareto(rows: Sequence[Row], metric: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    scored = [(row, row.evaluation.score(metric)) for row in rows]
    points = [(row.seconds_per_sample, score.value) for row, score in scored if score is not None]
    for folder in dict.fromkeys(row.run.folder for row in rows):
        own = sorted(
            (row.seconds_per_sample, s.value, row.evaluation.nfe) for row, s in scored if s and row.run.folder == folder
        )
        axes.plot([p[0] for p in own], [p[1] for p in own], "o-", label=str(folder), markersize=5, linewidth=1)
        for seconds, value, nfe in own:
            axes.annotate(f"{nfe}", (seconds, value), textcoords="offset points", xytext=(4, 4), fontsize=7)
    front = [points[i] for i in pareto_front(points)]
    axes.step(
        [p[0] for p in front],
        [p[1] for p in front],
        where="post",
        color="0.6",
        linestyle="--",
        linewidth=1,
        label="Pareto front",
    )
    better = next(score.better for _, score in scored if score is not None)
    floors = [score.floor for _, score in scored if score is not None and score.floor is not None]
    if floors:
        axes.axhline(min(floors), color="0.3", linestyle=":", linewidth=1, label="real data")
    axes.set(
        xscale="log",
        xlabel="seconds per sample (numbers: network evaluations)",
        ylabel=f"{metric} ({better} is better)",
    )
    if min(p[1] for p in points) > 0:
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure

"""Pictures of runs from the same noise: their samples side by side, and the score against the number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from osmose.data.dataset import DataSpec
from osmose.data.pictures import has_picture, image_grid
from osmose.metrics.pairing import Result, name_of
from osmose.training import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Panels of points side by side.
_PANELS = 5


def write_pictures(result: Result, spec: DataSpec) -> list[Path]:
    """Write samples/against-NAME.png, where the data have a picture, and samples/against-NAME-scores.png.

    In the first, each column of images has the same noise; points of the same noise have the same colour.
    """
    folder = result.rows[0].run.folder / "samples"
    pictures = {f"against-{name_of(result.full.run)}-scores.png": _curve(result)}
    if has_picture(spec):
        draw = _images if spec.kind == "image" else _points
        pictures[f"against-{name_of(result.full.run)}.png"] = draw(result, spec)
    for name, figure in pictures.items():
        files.write_figure(folder / name, figure)
    return [folder / name for name in pictures]


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _labels(result: Result) -> list[str]:
    return [f"{name_of(result.full.run)},\n{_steps(result.full.steps)}", *(_steps(row.steps) for row in result.rows)]


def _images(result: Result, spec: DataSpec) -> Figure:
    from matplotlib.figure import Figure

    rows, labels = [result.full, *result.rows], _labels(result)
    columns = len(result.full.shown)
    grid = image_grid(torch.cat([row.shown for row in rows]), spec, columns=columns, min_side=960).convert("RGB")
    # Pixel by pixel: the images' own are whole numbers of the figure's.
    margin, dpi = 30 + 8 * max(len(line) for label in labels for line in label.split("\n")), 100
    width, height = margin + grid.width, grid.height
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    axes = figure.add_axes((margin / width, 0, grid.width / width, 1))
    axes.imshow(grid, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for index, label in enumerate(labels):
        place = 1 - (index + 0.5) / len(labels)
        figure.text((margin - 10) / width, place, label, ha="right", va="center", fontsize=10)
    return figure


def _points(result: Result, spec: DataSpec) -> Figure:  # noqa: ARG001
    from matplotlib.figure import Figure

    rows, colours = [result.full, *result.rows], result.full.shown[:, 0]
    across = min(len(rows), _PANELS)
    down = -(-len(rows) // across)
    figure = Figure(figsize=(2.6 * across, 2.8 * down), dpi=110, layout="constrained")
    panels = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for axes, row, label in zip(panels, rows, _labels(result), strict=False):
        axes.scatter(row.shown[:, 0], row.shown[:, 1], s=3, c=colours, cmap="turbo", linewidths=0)
        axes.set_title(label, fontsize=9)
        axes.set_aspect("equal", adjustable="box")
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    return figure


def _curve(result: Result) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, NullFormatter, NullLocator

    figure = Figure(figsize=(6.5, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    first, *values = result.to_json()
    values.sort(key=lambda row: row["steps"])
    steps = [row["steps"] for row in values]
    axes.errorbar(
        steps,
        [row["score"] for row in values],
        yerr=[row["standard_error"] or 0.0 for row in values],
        fmt="o-",
        markersize=4,
        linewidth=1.2,
        capsize=3,
        label=name_of(result.rows[0].run),
    )
    label = f"{name_of(result.full.run)}, {_steps(result.full.steps)}"
    axes.axhline(first["score"], color="black", linestyle="--", linewidth=1, label=label)
    if first["standard_error"] is not None:
        error = first["standard_error"]
        axes.axhspan(first["score"] - error, first["score"] + error, color="black", alpha=0.1, linewidth=0)
    if first["real"] is not None:
        axes.axhline(first["real"], color="0.3", linestyle=":", linewidth=1.2, label="real data")
    score = result.full.evaluation.score(result.metric)
    assert score is not None, "all rows are scored by the same metrics"
    axes.set(xscale="log", xlabel="steps", ylabel=f"{result.metric} ({score.better} is better)")
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    if min(row["score"] for row in (first, *values)) > 0 and (first["real"] is None or first["real"] > 0):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure

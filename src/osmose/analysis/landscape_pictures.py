"""Landscapes written down: JSON, and a picture with contours, trajectories and cuts on one scale for all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from osmose.analysis.landscape import Landscape, Landscapes
from osmose.training import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import ContourSet

#: Contours of a picture, and how many times the lowest loss the last may be: what is above says only that it is bad.
_LEVELS, _TOP = 18, 1000.0
#: From where on a cut has a logarithmic axis.
_DECADE = 10.0
#: Of runs.
_COLOURS = ("C3", "C1", "black", "C6", "C5", "C2")


def write_landscapes(result: Landscapes, folder: Path) -> list[Path]:
    """Write landscape.json and landscape.png: contours with trajectories, and cuts through the centres."""
    from matplotlib.figure import Figure

    runs, count = result.runs, len(result.runs)
    columns = min(count, 3)
    rows, alone = -(-count // columns), count == 1
    figure = Figure(figsize=(11.5, 5.4) if alone else (4.6 * columns + 1, 4.7 * rows + 3.4), dpi=110)
    figure.set_layout_engine("constrained", h_pad=0.08)
    shape: dict[str, Any] = {"width_ratios": [1.3, 1]} if alone else {"height_ratios": [4.7 * rows, 3.4]}
    parts: Any = figure.subfigures(1, 2, **shape) if alone else figure.subfigures(2, 1, **shape)
    maps, lines = parts
    panels = maps.subplots(rows, columns, squeeze=False).ravel()
    levels, drawn = _levels(runs), None
    for axes, run in zip(panels, runs, strict=False):
        drawn = _map(axes, run, [one.name for one in runs], levels) or drawn
    for axes in panels[count:]:
        axes.set_axis_off()
    if drawn is not None:
        heights = levels.tolist()
        bar = maps.colorbar(drawn, ax=list(panels), shrink=0.9, pad=0.02, label="loss")
        bar.set_ticks(heights[::2], labels=[f"{height:.3g}" for height in heights[::2]])
    along = result.conditions["directions"] == "trajectory"
    maps.suptitle(
        "directions of the trajectory; 1 is its farthest coordinate"
        if along
        else "random directions; 1 is the length of each filter",
        fontsize="medium",
    )
    for direction, axes in enumerate(lines.subplots(2, 1) if alone else lines.subplots(1, 2)):
        _cut(axes, direction, runs, levels)
    paths = [folder / "landscape.json", folder / "landscape.png"]
    files.write_json(paths[0], result.to_json())
    files.write_figure(paths[1], figure)
    return paths


def _levels(runs: Sequence[Landscape]) -> Tensor:
    """Heights of contours for all runs together, float64: evenly spaced in the logarithm of the loss.

    Where losses are not all above 0 (likelihoods), in the logarithm of the loss above a base, which lies so far below
    the lowest that in no run more than 5 % of the values rise less than that.
    """
    grids = [torch.cat([run.loss.flatten(), run.cuts.flatten()]) for run in runs]
    grids = [values for grid in grids if len(values := grid[grid.isfinite()])]
    if not grids:
        return torch.linspace(0, 1, _LEVELS, dtype=torch.float64)
    low, high = (float(end) for end in torch.cat(grids).aminmax())
    step = low
    if low <= 0:
        step = max(1e-6 * max(1.0, -low), *(float((values - values.min()).quantile(0.05)) for values in grids))
    # A run that is far above the lowest has contours around its weights all the same.
    centres = [run.centre_loss - low + step for run in runs if math.isfinite(run.centre_loss)]
    top = min(high - low + step, max(_TOP * step, *(10 * centre for centre in centres), 0.0))
    top = max(top, step * (1 + 1e-6))  # a loss that is the same everywhere
    levels = low - step + torch.linspace(math.log(step), math.log(top), _LEVELS, dtype=torch.float64).exp()
    levels[0] -= 1e-9 * step  # the lowest loss is not below the first contour
    return levels


def _map(axes: Axes, run: Landscape, names: Sequence[str], levels: Tensor) -> ContourSet | None:
    """Draw the loss of one run of those with some names, and trajectories; None where no loss is finite."""
    from matplotlib.colors import BoundaryNorm
    from matplotlib.patheffects import withStroke

    end, drawn = float(run.axis[-1]), None
    if bool(run.loss.isfinite().any()):
        heights, steps = torch.where(run.loss.isfinite(), run.loss, math.nan).T.numpy(), levels.tolist()
        norm = BoundaryNorm(steps, 256, extend="max")
        drawn = axes.contourf(run.axis, run.axis, heights, steps, cmap="YlGnBu_r", norm=norm, extend="max")
        axes.contour(run.axis, run.axis, heights, steps, colors="black", linewidths=0.35, alpha=0.6)
    else:
        axes.text(0.5, 0.4, "no loss is finite", ha="center", transform=axes.transAxes)
    for one in run.trajectories:
        own = one.name == run.name
        axes.plot(
            *one.points.T,
            "o-",
            color=_colour(names.index(one.name)),
            markersize=4 if own else 3,
            linewidth=1.8 if own else 1,
            path_effects=[withStroke(linewidth=4 if own else 2.5, foreground="white")],
            zorder=4 if own else 3,
        )
    axes.plot(*run.centre, "*", color="gold", markersize=11, markeredgecolor="black", zorder=5)
    held = ["", ""] if run.shares is None else [f" ({share:.1%} of the squares)" for share in run.shares]
    axes.set(xlim=(-end, end), ylim=(-end, end), aspect="equal")
    axes.set(xlabel=f"a, along u{held[0]}", ylabel=f"b, along v{held[1]}")
    axes.locator_params(nbins=5)
    inside = [one.share for one in run.trajectories if one.name == run.name and one.share is not None]
    more = f"\n{inside[0]:.1%} of its trajectory in the plane" if inside and run.shares is not None else ""
    axes.set_title(f"{run.name}: loss {run.centre_loss:.4g}{more}", fontsize="medium")
    return drawn


def _cut(axes: Axes, direction: int, runs: Sequence[Landscape], levels: Tensor) -> None:
    """Draw the losses of all runs along u or v."""
    for index, run in enumerate(runs):
        heights = torch.where(run.cuts[direction].isfinite(), run.cuts[direction], math.nan)
        axes.plot(run.axis, heights, "o-", color=_colour(index), markersize=3, linewidth=1.4, label=run.name)
    heights = torch.cat([run.cuts.flatten() for run in runs])
    heights = heights[heights.isfinite()]
    # No higher than contours go: one run that explodes would press the others into a line.
    low, high = float(levels[0]), float(levels[-1])
    if len(heights) and float(heights.min()) < high:
        low, high = float(heights.min()), min(float(heights.max()), high)
    high = max(high, low + 1e-6 * max(1.0, abs(low)))
    if low > 0 and high > _DECADE * low:
        axes.set(yscale="log", ylim=(low / 1.2, high * 1.2))
    else:
        axes.set_ylim(low - (high - low) / 20, high + (high - low) / 20)
    axes.set(xlabel=f"distance from the weights along {'uv'[direction]}", ylabel="loss")
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.grid(alpha=0.3, which="both")
    if len(runs) > 1:
        axes.legend(fontsize="small")


def _colour(index: int) -> str:
    """Of a run, in maps and cuts: none that is in the map itself."""
    return _COLOURS[index % len(_COLOURS)]

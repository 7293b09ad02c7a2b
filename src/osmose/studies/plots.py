"""Lines over seeds, drawn the same way in every study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter


def panels(count: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, in rows of `count`, legible at the width of a GitHub page."""
    size = (6.5, 4) if count == rows == 1 else (4.8 * count, 3.8 * rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = [figure.add_subplot(rows, count, index + 1) for index in range(count * rows)]
    for panel in axes:
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(axes: Axes, x: Sequence[float], per_seed: Sequence[np.ndarray], label: str, marker: str = "o") -> None:
    """A line through the means over seeds, and every seed as a small dot.

    Args:
        axes: where to draw.
        x: one number for each point.
        per_seed: for each point the values of all seeds, shape (seeds,).
        label: for the legend.
        marker: of the means.
    """
    (line,) = axes.plot(x, [values.mean() for values in per_seed], marker=marker, markersize=6, label=label)
    for place, values in zip(x, per_seed, strict=True):
        axes.plot([place] * len(values), values, ".", color=line.get_color(), alpha=0.5, markersize=5)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis whose numbers are written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def real(axes: Axes, value: float) -> None:
    """The dotted line of what real data score."""
    axes.axhline(value, color="0.3", linestyle=":", linewidth=1.2, label="real data")

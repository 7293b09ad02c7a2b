"""Pictures of trajectories: rows of images from noise to data, series at each of them, or the paths of points."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osmose.acceleration.trajectories import Trajectories
from osmose.data.dataset import DataSpec
from osmose.data.pictures import image_grid, require_picture
from osmose.training import files

#: Trajectories in the picture: rows of images, or paths of points over so many ends of others.
_ROWS, _PATHS, _ENDS = 8, 200, 2000


def write_picture(trajectories: Trajectories, spec: DataSpec) -> Path:
    """Draw some trajectories into trajectories.png of their folder; states are divided by sqrt(alpha^2 + sigma^2).

    Args:
        trajectories: what to draw.
        spec: of the teacher's data, which have a picture (`data.pictures.has_picture`).
    """
    found, _ = trajectories.rows(torch.arange(min(len(trajectories), most_drawn(spec))))
    path = trajectories.folder / "trajectories.png"
    sizes = found.new_tensor([level.size for level in trajectories.levels[:-1]] + [1.0])
    found = found / sizes.view(-1, *(1,) * len(spec.shape))
    files.write_bytes(path, picture_of(found, [f"t = {level.t:.3g}" for level in trajectories.levels], spec))
    return path


def most_drawn(spec: DataSpec) -> int:
    """How many trajectories a picture can show, of images a row each, of points the ends of more than have paths."""
    return _ROWS if spec.kind == "image" else _ENDS


def picture_of(found: Tensor, labels: Sequence[str], spec: DataSpec) -> bytes:
    """A PNG of trajectories.

    Args:
        found: at most `most_drawn` of them, model units, the beginning first and the data last, shape
            (n, len(labels), *event).
        labels: what to write above each state of images.
        spec: of the data.

    Raises:
        UserError: data that have no picture.
    """
    require_picture(spec)
    draw = {"image": _images, "series": _series}.get(spec.kind, _paths)
    buffer = io.BytesIO()
    draw(found, labels, spec).savefig(buffer, format="png")
    return buffer.getvalue()


def _images(found: Tensor, labels: Sequence[str], spec: DataSpec) -> Any:
    """A row for each trajectory, from noise to data."""
    from matplotlib.figure import Figure

    picture = image_grid(spec.decode(found.flatten(0, 1)), spec, columns=len(labels), min_side=720).convert("RGB")
    # Pixel by pixel: the images' own are whole numbers of the figure's.
    margin, dpi = 24, 100
    width, height = picture.width, picture.height + margin
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, picture.height / height))
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for index, label in enumerate(labels):
        figure.text((index + 0.5) / len(labels), 1 - margin / 2 / height, label, ha="center", va="center", fontsize=8)
    return figure


def _series(found: Tensor, labels: Sequence[str], spec: DataSpec) -> Any:  # noqa: ARG001
    """A panel for each state, the first column of a few series, place by place."""
    from matplotlib.figure import Figure

    across = min(4, len(labels))
    down = -(-len(labels) // across)
    figure = Figure(figsize=(2.8 * across, 2 * down), dpi=110, layout="constrained")
    for index, label in enumerate(labels):
        axes = figure.add_subplot(down, across, index + 1)
        axes.plot(found[:_ROWS, index, 0].T.numpy(), linewidth=0.8)
        axes.set_title(label, fontsize=8)
        axes.tick_params(labelsize=6)
    return figure


def _paths(found: Tensor, labels: Sequence[str], spec: DataSpec) -> Any:  # noqa: ARG001
    """Lines from noise to data over the ends of more of them, in the first two coordinates."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.6), dpi=110, layout="constrained")
    axes, paths, ends = figure.add_subplot(), found[:_PATHS, :, :2], found[:, -1, :2]
    axes.scatter(ends[:, 0], ends[:, 1], s=3, c="0.7", linewidths=0, label="ends of all")
    axes.add_collection(LineCollection(list(paths.numpy()), colors="tab:blue", linewidths=0.5, alpha=0.5))
    for index, colour, name in ((0, "tab:red", "beginning"), (-1, "tab:blue", "end")):
        axes.scatter(paths[:, index, 0], paths[:, index, 1], s=6, c=colour, linewidths=0, label=name, zorder=3)
    axes.set_title(f"{len(paths)} of {len(found)} trajectories, model units", fontsize=9)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="upper right", fontsize=8, markerscale=2)
    return figure

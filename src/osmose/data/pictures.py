"""Pictures of data: a grid of images, a scatter of points, lines of series."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from osmose.data.dataset import DataSpec
from osmose.errors import UserError


def to_images(data: Tensor, spec: DataSpec) -> np.ndarray:
    """Images in data units (n, C, H, W), C = 1 or 3, as uint8 (n, H, W, C) over the data's range."""
    if spec.kind != "image" or spec.range is None or not has_picture(spec):
        raise UserError(f"data of kind {spec.kind!r} and shape {spec.shape} cannot be shown as images")
    low, high = spec.range
    scaled = ((data.float() - low) * (255 / (high - low))).round().clamp(0, 255)
    return scaled.byte().permute(0, 2, 3, 1).numpy()


def image_grid(data: Tensor, spec: DataSpec, *, columns: int | None = None, min_side: int = 480) -> Image.Image:
    """Images side by side with a thin border, enlarged by a whole factor to at least `min_side` pixels."""
    images = to_images(data, spec)
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    factor = max(1, math.ceil(min_side / (max(columns * width, rows * height))))
    gap = max(1, factor // 2)
    canvas = np.full(
        (rows * (height * factor + gap) + gap, columns * (width * factor + gap) + gap, channels), 96, np.uint8
    )
    for index, image in enumerate(images):
        top = gap + (index // columns) * (height * factor + gap)
        left = gap + (index % columns) * (width * factor + gap)
        canvas[top : top + height * factor, left : left + width * factor] = image.repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def beside(above: Tensor, below: Tensor, spec: DataSpec, columns: int = 8) -> Image.Image:
    """A grid of images: a row of the first, below it the row of the second that belongs to it, and so on."""
    rows = [part for pair in zip(above.split(columns), below.split(columns), strict=True) for part in pair]
    return image_grid(torch.cat(rows), spec, columns=columns)


def scatter(data: Tensor, reference: Tensor | None = None) -> Image.Image:
    """Points (n, D >= 2) in their first two coordinates, over real ones in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=110)
    axes = figure.add_subplot()
    if reference is not None:
        axes.scatter(reference[:, 0], reference[:, 1], s=2, c="0.75", linewidths=0, label="real")
    axes.scatter(data[:, 0], data[:, 1], s=3, c="tab:blue", linewidths=0, label="generated")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="upper right", markerscale=4)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


#: Series, and columns of them, in a picture.
_LINES, _PANELS = 24, 9


def lines(
    data: Tensor,
    times: Tensor,
    spec: DataSpec,
    reference: Tensor | None = None,
    reference_times: Tensor | None = None,
) -> Image.Image:
    """Series (n, C, L) at their times (n, L), a panel for each column, over real ones in grey."""
    from matplotlib.figure import Figure

    assert spec.series is not None
    names = spec.series.columns[:_PANELS]
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(4.2 * across, 2.8 * down), dpi=110, layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(down, across, index + 1)
        for values, at, color, label in (
            (reference, reference_times, "0.75", "real"),
            (data, times, "tab:blue", "generated"),
        ):
            for item in range(0 if values is None or at is None else min(_LINES, len(values))):
                assert values is not None
                assert at is not None
                known = values[item, index].isfinite()
                shown = label if item == 0 else None
                axes.plot(at[item, known], values[item, index, known], c=color, linewidth=0.8, alpha=0.8, label=shown)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel(spec.series.unit or "time", fontsize=7)
    figure.axes[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def has_picture(spec: DataSpec) -> bool:
    """Whether `picture` can show data of this form."""
    if spec.kind == "image":
        return spec.shape[0] in (1, 3) and spec.range is not None
    return spec.kind == "series" or (spec.kind != "text" and len(spec.shape) == 1 and spec.shape[0] >= 2)


def require_picture(spec: DataSpec) -> None:
    """Refuse data that have no picture.

    Raises:
        UserError: naming their form, and what to write instead.
    """
    if not has_picture(spec):
        raise UserError(f"data of kind {spec.kind!r} and shape {spec.shape} have no picture; write .npz instead")


def picture(
    data: Tensor,
    spec: DataSpec,
    reference: Tensor | None = None,
    times: Tensor | None = None,
    reference_times: Tensor | None = None,
) -> Image.Image:
    """The picture that suits the data's kind: a grid of images, a scatter of points, lines of series.

    Args:
        data: data units, (n, *event).
        spec: of the data.
        reference: real items to show besides, where that helps.
        times, reference_times: of series, (n, L); even ones if None.

    Raises:
        UserError: data that have no picture (one-dimensional points, other channel counts).
    """
    require_picture(spec)
    if spec.kind == "series":
        count = 0 if reference is None else len(reference)
        times = spec.some_times(len(data)) if times is None else times
        reference_times = spec.some_times(count) if reference_times is None else reference_times
        assert times is not None
        return lines(data, times, spec, reference, reference_times)
    return image_grid(data, spec) if spec.kind == "image" else scatter(data, reference)

"""Writing down what estimates of dimension say: numbers, a row for each point, curves, maps of images."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from osmose.analysis.dimension_report import Dimension
from osmose.data.pictures import has_picture, to_images
from osmose.training import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Images that the map shows at most.
_SHOWN = 24


def write_dimension(result: Dimension, folder: Path, spec: Any) -> list[Path]:
    """Write dimension.json, dimension.csv (a row for each point), dimension.png and, of images, dimension-map.png."""
    paths = [folder / "dimension.json", folder / "dimension.csv", folder / "dimension.png"]
    files.write_json(paths[0], result.to_json())
    files.write_bytes(paths[1], _table(result).encode())
    files.write_figure(paths[2], _curves(result))
    if result.map is not None and has_picture(spec):
        paths.append(folder / "dimension-map.png")
        files.write_figure(paths[3], _maps(result, spec))
    return paths


def _table(result: Dimension) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", "class", "truth", "estimator", "ratio", "dimension"])
    for name, found in result.estimates.items():
        ratios = [f"{ratio:.6g}" for ratio in result.ratios.tolist()] if found.by_ratio else [""]
        for index, row in enumerate(found.values.tolist()):
            label = "" if result.labels is None else int(result.labels[index])
            truth = "" if result.truth is None else int(result.truth[index])
            for ratio, value in zip(ratios, row, strict=False):
                writer.writerow([index, label, truth, name, ratio, f"{value:.6g}"])
    return text.getvalue()


def _curves(result: Dimension) -> Figure:
    from matplotlib.figure import Figure

    spectra = [name for name in ("flow", "rank", "normal-bundle") if name in result.estimates][:1]
    by_class = result.labels is not None and "flipd" in result.estimates
    count = 1 + len(spectra) + int(by_class)
    figure = Figure(figsize=(5.4 * count, 4.4), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    _against_ratio(axes[0], result)
    if spectra:
        _singular_values(axes[1], result, spectra[0])
    if by_class:
        _histogram(axes[-1], result)
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure


def _against_ratio(axes: Axes, result: Dimension) -> None:
    for place, (name, found) in enumerate(result.estimates.items()):
        mean, colour = found.values.mean(0), f"C{place}"
        if not found.by_ratio:
            axes.axhline(float(mean), color=colour, linestyle=":", linewidth=1.2, label=name)
            continue
        spread = found.values.std(0) if len(found.values) > 1 else torch.zeros_like(mean)
        axes.fill_between(result.ratios, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axes.plot(result.ratios, mean, "o-", color=colour, markersize=3, linewidth=1.2, label=name)
    if result.truth is not None:
        axes.axhline(float(result.truth.mean()), color="0.3", linestyle="--", linewidth=1, label="truth")
    means = torch.cat([found.values.mean(0) for found in result.estimates.values()])
    top = min(float(means[means.isfinite()].max()), 1.5 * result.ambient)
    axes.set(
        xscale="log",
        xlabel="sigma / alpha",
        ylabel="local dimension: mean and deviation over points",
        ylim=(min(-0.5, float(means[means.isfinite()].min())), 1.1 * top + 0.5),
        title=f"of {result.ambient} values, {result.conditions['n']} points",
    )
    axes.legend(fontsize=8)


def _singular_values(axes: Axes, result: Dimension, name: str) -> None:
    spectra = result.estimates[name].spectra
    assert spectra is not None
    middle = spectra.clamp(min=1e-300).log().mean(0).exp()
    axes.plot(result.ratios, middle, color="C0", linewidth=0.8, alpha=0.7)
    titles = {
        "flow": "flow from noise to r: level along the data, rising off it",
        "rank": "denoiser's Jacobian",
        "normal-bundle": "scores around a point",
    }
    axes.set(xscale="log", yscale="log", xlabel="sigma / alpha", ylabel="singular values", title=titles[name])


def _histogram(axes: Axes, result: Dimension) -> None:
    assert result.labels is not None
    values = result.estimates["flipd"].values[:, result.place].numpy()
    labels = result.labels.cpu().numpy()
    groups = [values[labels == label] for label in np.unique(labels)]
    axes.boxplot(groups, tick_labels=[str(label) for label in np.unique(labels)])
    axes.set(
        xlabel="class", ylabel="flipd", title=f"by class, at sigma / alpha = {float(result.ratios[result.place]):.3g}"
    )


def _maps(result: Dimension, spec: Any) -> Figure:
    """Images from the simplest to the most complex, and below each what its pixels add to flipd."""
    from matplotlib.figure import Figure

    assert result.map is not None
    parts, ratio = result.map, float(result.ratios[result.place])
    totals = parts.flatten(1).sum(1)
    order = totals.argsort()
    if len(order) > _SHOWN:  # evenly over the range
        order = order[torch.linspace(0, len(order) - 1, _SHOWN).round().long()]
    columns = min(12, len(order))
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(1.05 * columns, 2.5 * rows + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    images = to_images(result.points, spec)
    local = parts.sum(1)
    high = float(local[order].quantile(0.98))
    for panel in axes.flat:
        panel.axis("off")
    for place, index in enumerate(order.tolist()):
        row, column = 2 * (place // columns), place % columns
        image = images[index]
        axes[row][column].imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes[row][column].set_title(f"{float(totals[index]):.1f}", fontsize=8)
        axes[row + 1][column].imshow(local[index], cmap="magma", vmin=0, vmax=high)
    figure.suptitle(f"flipd at sigma / alpha = {ratio:.3g}, and what each pixel adds to it", fontsize=9)
    return figure

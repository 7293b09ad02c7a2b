"""Do likelihoods tell other data apart? Bits of a run's own items beside those of another data set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osmose.data.dataset import Dataset, DataSpec
from osmose.errors import UserError
from osmose.training import files


@dataclass(frozen=True)
class Outliers:
    """Bits per dimension of items of two data sets under one model.

    Attributes:
        own: of the data that the run was trained on, (n,).
        other: of the other data, (m,).
        name: of the other data.
        part: "held-out" or "train": of both.
    """

    own: Tensor
    other: Tensor
    name: str
    part: str

    @property
    def auroc(self) -> float:
        """Probability that an item of the other data has more bits than one of the run's own; ties count half.

        0.5 tells nothing apart; below, the other data are more likely than the run's own.
        """
        own, other = self.own.sort().values, self.other.contiguous()
        below = torch.searchsorted(own, other, right=False) + torch.searchsorted(own, other, right=True)
        return float(below.double().mean()) / (2 * len(own))

    def reading(self) -> str:
        """What it says, in a sentence."""
        own, other = float(self.own.mean()), float(self.other.mean())
        first = f"{self.name}: {other:.3f} bits per dimension against {own:.3f}, AUROC {self.auroc:.3f}"
        if self.auroc < 0.5:
            return f"{first}: the other data are more likely under this model than its own; density does not tell"
        return f"{first} (0.5 tells nothing apart, 1 everything)"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"data": self.name, "auroc": self.auroc, "bits_per_dim": float(self.other.mean())} | {
            "per_item": self.other.tolist()
        }


def in_units_of(dataset: Dataset, spec: DataSpec) -> Dataset:
    """Other data as if they were of a run's form: images by their place in their range, others as they are.

    Raises:
        UserError: events of another shape or kind, or another number of levels.
    """
    own = dataset.spec
    if own.shape != spec.shape or own.kind != spec.kind:
        size = "; other data are read with the run's own --size and --downsample; train with those that make both alike"
        raise UserError(
            f"against: {dataset.source} has {own.kind} {own.shape}, and the run {spec.kind} {spec.shape}"
            f"{size if own.kind == spec.kind == 'image' else ''}"
        )
    if own.levels != spec.levels:
        raise UserError(
            f"against: {dataset.source} has {own.levels or 'no'} levels, and the run's data {spec.levels or 'none'}: "
            "bits do not compare; train on data brought to as many (--levels)"
        )
    if own.kind != "image":
        return replace(dataset, spec=spec)
    train, held_out = (spec.decode(own.encode(part)) for part in (dataset.train, dataset.held_out))
    return replace(dataset, spec=spec, train=train, held_out=held_out)


def write_outliers(result: Outliers, folder: Path) -> list[Path]:
    """Write outliers.json and outliers.png: both histograms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    whole = torch.cat([result.own, result.other])
    low, high = (float(whole.quantile(share)) for share in (0.002, 0.998))
    for values, label in ((result.own, f"the run's own data, {result.part}"), (result.other, result.name)):
        axes.hist(values.clamp(low, high).numpy(), bins=50, range=(low, high), density=True, alpha=0.55, label=label)
    axes.set(xlabel="bits per dimension", ylabel="density of items", title=f"AUROC {result.auroc:.3f}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    paths = [folder / "outliers.json", folder / "outliers.png"]
    files.write_json(paths[0], result.to_json())
    files.write_figure(paths[1], figure)
    return paths

"""Series with times of their own, made comparable: values on one grid, and how rough paths are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from osmose.data.dataset import Dataset


def common_grid(times: Tensor) -> Tensor:
    """As many even times as the longest series has, from the median first to the median last time, float64 (L,).

    Args:
        times: float64 (n, L), NaN at the end of shorter series.
    """
    last = times.nan_to_num(-torch.inf).amax(1)
    return torch.linspace(float(times[:, 0].median()), float(last.median()), times.shape[1], dtype=torch.float64)


def on_grid(values: Tensor, times: Tensor, grid: Tensor, empty: Tensor) -> Tensor:
    """Values (n, C, L) at times (n, L) brought to the times of a grid (G,) by straight lines, float32 (n, C, G).

    Missing values (NaN) are passed over; before the first and after the last known value it stays as it is; a column
    of an item without any known value has that of `empty` (C,) throughout.
    """
    found = empty.float()[None, :, None].repeat(len(values), 1, len(grid)).numpy()
    wanted, x, t = grid.numpy(), values.numpy(), times.numpy()
    for item in range(len(x)):
        for column in range(x.shape[1]):
            there = np.isfinite(x[item, column]) & np.isfinite(t[item])
            if there.any():
                found[item, column] = np.interp(wanted, t[item, there], x[item, column, there])
    return torch.from_numpy(found)


def evened(dataset: Dataset) -> tuple[Dataset, Tensor]:
    """The same series on one grid, with nothing missing, and that grid."""
    assert dataset.spec.series is not None
    assert dataset.train_times is not None
    assert dataset.held_out_times is not None
    grid = common_grid(dataset.train_times)
    form = dataset.spec.series.replace(regular=True, times=grid.tolist())
    mean = torch.tensor(dataset.spec.shift)
    made = replace(
        dataset,
        spec=dataset.spec.replace(series=form.to_json(), shape=(dataset.spec.shape[0], len(grid))),
        train=on_grid(dataset.train, dataset.train_times, grid, mean),
        held_out=on_grid(dataset.held_out, dataset.held_out_times, grid, mean),
        train_times=grid.repeat(len(dataset.train), 1),
        held_out_times=grid.repeat(len(dataset.held_out), 1),
    )
    return made, grid


def squared_steps(values: Tensor, times: Tensor, gap: float) -> Tensor:
    """Mean squared difference of neighbours at most `gap` apart, of each column, float64 (C,); NaN where there is none.

    Args:
        values: (n, C, L), NaN where missing.
        times: float64 (n, L).
        gap: in the units of time.
    """
    step = values.double().diff(dim=2)
    near = step.isfinite() & (times.diff(dim=1) <= gap * (1 + 1e-9))[:, None]
    return torch.where(near, step, 0.0).square().sum((0, 2)) / near.sum((0, 2))


def roughness(made: Tensor, made_times: Tensor, real: Tensor, real_times: Tensor, gap: float) -> float:
    """Squared steps of generated series over those of real ones, the mean over columns; 1 is right."""
    ratio = squared_steps(made, made_times, gap) / squared_steps(real, real_times, gap).clamp(min=1e-30)
    return float(ratio.nanmean())

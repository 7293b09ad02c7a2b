"""Unbiased two-sample distances from kernels: MMD, energy distance, kernel inception distance.

All in float64 on matrices x (n, d), generated, and y (m, d), real. They have mean 0 for equal laws and are therefore
slightly negative about half of the time; they are not clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from osmose.errors import UserError
from osmose.metrics.matrices import pair, row_blocks, seeded, subset

#: A kernel on blocks of rows: (a, d) and (b, d) to (a, b).
Kernel = Callable[[Tensor, Tensor], Tensor]

MMD_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Estimate(NamedTuple):
    """A number, how far it may be off, and what papers print after the +-.

    Attributes:
        value: the estimate.
        standard_error: of `value`, over repetitions with new samples.
        std: over the subsets or splits that the published protocol uses; not a standard error.
    """

    value: float
    standard_error: float
    std: float | None = None


def two_sample(x: Tensor, y: Tensor, kernel: Kernel) -> Estimate:
    """Unbiased squared MMD: mean_{i!=j} k(x_i, x_j) + mean_{i!=j} k(y_i, y_j) - 2 mean k(x_i, y_j).

    Gretton et al. 2012 (JMLR 13), eq. 3. The standard error has the first-order variance of the U-statistic (from the
    row means) and the second-order one (from the doubly centred kernels), so it holds for equal laws too.

    Args:
        x: shape (n, d).
        y: shape (m, d).
        kernel: symmetric; called on blocks of rows, so memory is bounded.

    Raises:
        UserError: bad matrices, fewer than 2 rows.
    """
    x, y = pair(x, y)
    n, m = len(x), len(y)
    xx, yy, xy = _Block(x, x, kernel, same=True), _Block(y, y, kernel, same=True), _Block(x, y, kernel, same=False)
    value = xx.mean + yy.mean - 2 * xy.mean
    first = (xx.rows - xy.rows).var() * 4 / n + (yy.rows - xy.columns).var() * 4 / m
    second = 2 * xx.interaction / n**2 + 2 * yy.interaction / m**2 + 4 * xy.interaction / (n * m)
    # The variance of estimated row means holds the second-order part twice, and the whole holds it once.
    variance = torch.maximum(first - second, second)
    return Estimate(float(value), float(variance.sqrt()))


class _Block:
    """Means of one kernel matrix; its diagonal is left out where both sides are the same rows."""

    def __init__(self, a: Tensor, b: Tensor, kernel: Kernel, same: bool):
        row_sums, column_sums, squares = a.new_zeros(len(a)), a.new_zeros(len(b)), a.new_zeros(())
        for block in row_blocks(len(a), len(b)):
            values = kernel(a[block], b)
            if same:
                rows = torch.arange(len(values))
                values[rows, rows + block.start] = 0
            row_sums[block] = values.sum(dim=1)
            column_sums += values.sum(dim=0)
            squares += values.square().sum()
        self.rows = row_sums / (len(b) - same)
        self.columns = column_sums / (len(a) - same)
        self.mean = self.rows.mean()
        square = squares / (len(a) * (len(b) - same))
        #: Variance of the part of k that is not a sum of a function of each argument.
        self.interaction = (
            square - self.rows.square().mean() - self.columns.square().mean() + self.mean.square()
        ).clamp(min=0)


def energy_distance(x: Tensor, y: Tensor) -> Estimate:
    """2 E|x-y| - E|x-x'| - E|y-y'|, unbiased (pairs i = j left out), in the units of the data.

    Szekely and Rizzo 2013. No bandwidth to choose; a good default up to d of about 100.

    Raises:
        UserError: bad matrices, fewer than 2 rows.
    """
    return two_sample(x, y, lambda a, b: -torch.cdist(a, b))


def mmd(x: Tensor, y: Tensor, median: float | None = None, seed: int = 0) -> Estimate:
    """Unbiased squared MMD with the sum of five Gaussian kernels exp(-|a-b|^2 / (2 h^2)).

    Bandwidths h = `MMD_BANDWIDTHS` times the median distance of the *real* data, so that models are compared with
    the same kernel.

    Args:
        x: generated, shape (n, d).
        y: real, shape (m, d).
        median: the median distance where it was stored; None takes it from (at most 2,000 rows of) y.
        seed: of that choice of rows.

    Raises:
        UserError: bad matrices, fewer than 2 rows, or real data whose median distance is 0.
    """
    x, y = pair(x, y)
    if median is None:
        median = float(torch.pdist(y[subset(len(y), 2000, seeded(seed))]).median())
    if not median > 0:
        raise UserError(f"MMD: the median distance of the real data is {median:g}; more than half of them are equal")
    scales = [-0.5 / (factor * median) ** 2 for factor in MMD_BANDWIDTHS]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.cdist(a, b).square()
        return torch.stack([(squared * scale).exp() for scale in scales]).sum(dim=0)

    return two_sample(x, y, kernel)


def kernel_distance(x: Tensor, y: Tensor, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0) -> Estimate:
    """Kernel inception distance on any features: unbiased squared MMD with k(a, b) = (a.b / d + 1)^3.

    Binkowski et al. 2018 (arXiv 1801.01401), section 4: mean over random subsets. `std` is over the subsets, as
    published. The standard error comes from the same subsets by the delete-d jackknife, var * s / (n - s) (Shao and
    Wu 1989); that needs subsets smaller than the sample, hence at most half of it. For equal laws it is up to twice
    too large.

    Args:
        x: generated features, shape (n, d).
        y: real features, shape (m, d).
        subset_size: at most this many rows of each side per subset, and at most half of the smaller side.
        num_subsets: how many.
        seed: of the subsets.

    Raises:
        UserError: bad matrices, fewer than 4 rows, a subset size or number below 2.
    """
    x, y = pair(x, y, least=4)
    if min(subset_size, num_subsets) < 2:
        raise UserError(f"kernel distance: subset size {subset_size} and number {num_subsets} must be at least 2")
    size, total = min(subset_size, len(x) // 2, len(y) // 2), min(len(x), len(y))
    generator = seeded(seed)
    values = torch.tensor(
        [
            _polynomial_mmd(x[subset(len(x), size, generator)], y[subset(len(y), size, generator)])
            for _ in range(num_subsets)
        ],
        dtype=torch.float64,
    )
    std = float(values.std())
    return Estimate(float(values.mean()), std * (size / (total - size)) ** 0.5, std)


def _polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel, for equally many rows."""
    n, d = x.shape

    def total(a: Tensor, b: Tensor, same: bool) -> Tensor:
        values = torch.addmm(a.new_ones(()), a, b.T, alpha=1 / d)
        cubes = values * values * values
        return (cubes.sum() - cubes.diagonal().sum()) / (n * (n - 1)) if same else cubes.mean()

    return float(total(x, x, True) + total(y, y, True) - 2 * total(x, y, False))

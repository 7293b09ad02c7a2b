r"""Noise of fields on [0, 1)^d, d = 1 or 2, by the variances of its modes (arXiv 2303.00800).

A field is X(p) = sum_k c_k phi_k(p) with independent c_k ~ N(0, r_k) and phi_k the products, over the axes, of

    fourier   1, sqrt(2) cos(2 pi k p), sqrt(2) sin(2 pi k p)     periodic,   points p = i / n
    dct       1, sqrt(2) cos(pi k p)                              reflected,  points p = (i + 1/2) / n

which are orthonormal: the real form of sum_k c_k e^{2 pi i k p} with E |c_k|^2 = r_k. r depends on |k| in cycles
alone, so that products of sines and cosines have the same variances as complex exponentials, and noise of white noise
is real whatever the grid: even, odd, not square.

**One field, any grid.** On n points the modes k and k + j n are the same values. The coefficients on the grid,
c = (matrix of the phi) x / N, have the *folded* variances

    r^(n)_k = sum_j r_{k + j n},

and nothing is cut off: values on every second point of a grid of 2 n have the law of those on n points. Sums go over
|k| <= 4096 (d = 1) or 512 (d = 2) cycles on each axis, beyond which fields have nothing.

Float64, on the CPU; `modes` and `values` in the type and on the device of what they are given.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from osmose.configuration import Config
from osmose.errors import UserError

BasisKind = Literal["fourier", "dct"]
#: Variances, or rates, of modes by their squared frequency |k|^2 in cycles.
Law = Callable[[Tensor], Tensor]

#: Highest frequency of a field on each axis, in cycles, for one axis and for two.
_HIGHEST = {1: 4096, 2: 512}
#: Sums over twice as many points grow by the same again where they have no limit, by half of it where r ~ 1 / k^2.
_NO_LIMIT = 0.95
#: Points on each axis from which on that shows.
_FEWEST = 16


@dataclass(frozen=True)
class Harmonics:
    """The modes of a grid, in order of their frequency on each axis: those of a coarser grid are the first ones.

    Attributes:
        basis: periodic or reflected.
        grid: points on each axis.

    Raises:
        UserError: no grid of one or two axes, or one that is too fine.
    """

    basis: BasisKind
    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.grid) not in _HIGHEST:
            raise UserError(f"grid: {self.grid} is not valid: fields have one or two axes")
        most = _HIGHEST[len(self.grid)]
        if not all(1 <= side <= most for side in self.grid):
            raise UserError(f"grid: {self.grid} is not valid: each axis needs 1 to {most} points")

    @property
    def offset(self) -> float:
        """Of the first point from 0, as a share of the distance of points: points are (i + offset) / n."""
        return 0.0 if self.basis == "fourier" else 0.5

    @property
    def squared(self) -> Tensor:
        """|k|^2 of every mode, in cycles, float64 (*grid)."""
        return _squared([_frequencies(self.basis, side) for side in self.grid])

    def modes(self, x: Tensor) -> Tensor:
        """Coefficients of values (..., *grid), in the same shape; floating point."""
        return self._applied(x, transposed=False) / math.sqrt(math.prod(self.grid))

    def values(self, c: Tensor) -> Tensor:
        """The inverse of `modes`."""
        return self._applied(c, transposed=True) * math.sqrt(math.prod(self.grid))

    def at(self, c: Tensor, points: Tensor) -> Tensor:
        """Values at any points of [0, 1)^d of what has coefficients (..., *grid); between points of a grid, too.

        Args:
            c: floating point.
            points: float64 (P, d).

        Returns:
            In the type of c, (..., P).
        """
        rows = [self._between(axis, points[:, axis].double()).to(c) for axis in range(len(self.grid))]
        with torch.autocast(c.device.type, enabled=False):
            if len(rows) == 1:
                return c @ rows[0]
            return ((c.mT @ rows[0]) * rows[1]).sum(-2)

    def _between(self, axis: int, p: Tensor) -> Tensor:
        """phi_k(p) of the modes of an axis, as they are on this grid: float64 (side, P)."""
        side = self.grid[axis]
        k = _frequencies(self.basis, side)
        turns = 2 * math.pi * torch.outer(k, p)
        size = torch.full((side, 1), math.sqrt(2.0), dtype=torch.float64)
        size[0] = 1.0
        if self.basis == "dct":
            return size * turns.cos()
        if side % 2 == 0:  # on the grid the highest cosine is -1 and 1
            size[-1] = 1.0
        waves = torch.where((torch.arange(side) % 2 == 0)[:, None], turns.sin(), turns.cos())
        waves[0] = 1.0
        return size * waves

    def onto(self, c: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Coefficients (..., *grid) on another grid of what they are on this: 0 for modes that this one lacks."""
        sides = list(zip(range(-len(grid), 0), self.grid, grid, strict=True))
        result = part = c.new_zeros(*c.shape[: -len(grid)], *grid)
        for axis, own, side in sides:
            c, part = (x.narrow(axis, 0, min(own, side)) for x in (c, part))
        part.copy_(c)
        for axis, own, side in sides:
            if self.basis == "fourier" and own % 2 == 0 and side > own:
                # On its own grid the highest cosine is -1 and 1, on a finer one of mean square 1/2 as all are.
                result.select(axis, own - 1).mul_(math.sqrt(0.5))
        return result

    def _applied(self, x: Tensor, transposed: bool) -> Tensor:
        matrices = [_matrix(self.basis, side).to(x.dtype).to(x.device) for side in self.grid]
        matrices = [matrix.mT if transposed else matrix for matrix in matrices]
        with torch.autocast(x.device.type, enabled=False):  # half precision has no use for small modes
            x = x @ matrices[-1].mT
            return x if len(matrices) == 1 else matrices[0] @ x

    def folded(self, law: Law) -> Tensor:
        """Variances of the coefficients on the grid of a field whose modes have those of a law, float64 (*grid)."""
        highest = _HIGHEST[len(self.grid)]
        everything = torch.arange(2 * highest + 1) - (highest if self.basis == "fourier" else 0)
        cycles = everything if self.basis == "fourier" else everything / 2
        table = law(_squared([cycles.double()] * len(self.grid)))
        for axis, side in enumerate(self.grid):
            place, share = self._aliases(everything, side)
            form = [1] * table.ndim
            form[axis] = len(share)
            kept = torch.zeros(*table.shape[:axis], side, *table.shape[axis + 1 :], dtype=torch.float64)
            table = kept.index_add_(axis, place, table * share.view(form))
        if self.basis == "fourier":
            for axis, side in enumerate(self.grid):
                table = table.index_select(axis, _frequencies(self.basis, side).long())
        return table

    def _aliases(self, k: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Which mode of an axis each of all modes is on the grid, and what its variance counts for there."""
        if self.basis == "fourier":
            return k % side, torch.ones(len(k), dtype=torch.float64)
        within = k % (2 * side)
        place = torch.where(within > side, 2 * side - within, within)
        share = (place < side).double()  # cos(pi n p) is 0 on all points
        share = torch.where((place == 0) & (k > 0), 2.0, share)  # sqrt(2) cos is a constant of sqrt(2)
        return place.clamp(max=side - 1), share


class Trace(NamedTuple):
    """Sums of r_k over the modes of a grid, of at least 16 points a side, and of twice and four times as many."""

    sums: tuple[float, float, float]

    @property
    def growth(self) -> float:
        """How much the second doubling adds, as a share of what the first did; 1 for a sum that has no limit."""
        first, second = self.sums[1] - self.sums[0], self.sums[2] - self.sums[1]
        return second / first if first > 0 else 0.0

    @property
    def converges(self) -> bool:
        """Whether the sums seem to have a limit: whether the noise is a function."""
        return self.growth < _NO_LIMIT


class Spectrum(Config, ABC):
    """The law of noise: r_k, the variances of its modes."""

    kind: str

    @abstractmethod
    def law(self, basis: BasisKind, dims: int) -> Law:
        """r_k as a function of |k|^2, for fields on so many axes."""

    def variances(self, harmonics: Harmonics, rate: Law | None = None) -> Tensor:
        """Of the coefficients on a grid, float64 (*grid): folded r_k, or r_k / b_k with a rate b_k."""
        law = self.law(harmonics.basis, len(harmonics.grid))
        return harmonics.folded(law if rate is None else lambda squared: law(squared) / rate(squared))

    def trace(self, harmonics: Harmonics) -> Trace:
        """Sums over growing grids; warns when they have no limit, and samples therefore depend on the grid."""
        law = self.law(harmonics.basis, len(harmonics.grid))
        first = -(-_FEWEST // min(harmonics.grid))
        grids = [[first * factor * side for side in harmonics.grid] for factor in (1, 2, 4)]
        sums = [float(law(_squared([_frequencies(harmonics.basis, n) for n in grid])).sum()) for grid in grids]
        found = Trace((sums[0], sums[1], sums[2]))
        if not found.converges:
            shown = ", ".join(f"{value:.3g}" for value in sums)
            warnings.warn(
                f"spectrum {self.kind}: the variance of the noise has no limit on finer grids ({shown} on grids of "
                f"{' x '.join(map(str, grids[0]))}, twice and four times as many); power with an exponent above "
                f"{len(harmonics.grid) / 2:g} has one",
                stacklevel=2,
            )
        return found


class PowerSpectrum(Spectrum):
    """r_k ~ (1 + |k|^2)^-exponent, of which all together are the variance of a point (its mean, if reflected)."""

    kind: Literal["power"] = "power"
    exponent: float = Field(1.0, ge=0, description="a function above d / 2; r falls as |k|^(-2 exponent)")
    variance: float = Field(1.0, gt=0, description="of the noise at a point, in the model's units")

    def law(self, basis: BasisKind, dims: int) -> Law:
        factor = self.variance / _total(basis, dims, self.exponent)
        return lambda squared: factor * (1 + squared) ** -self.exponent


class PublishedSpectrum(Spectrum):
    """r_k = amplitude / (|k|^2 + 2); on two axes it has no limit.

    The published code scales by the number of points, and k by another constant for each data set. On 64 x 64 points
    with both constants 1 its r_k are these.
    """

    kind: Literal["published"] = "published"
    amplitude: float = Field(1 / 23.27, gt=0)

    def law(self, basis: BasisKind, dims: int) -> Law:  # noqa: ARG002
        return lambda squared: self.amplitude / (squared + 2)


class WhiteSpectrum(Spectrum):
    """Independent values at all points, as in ordinary diffusion; no field has such values on every grid."""

    kind: Literal["white"] = "white"
    variance: float = Field(1.0, gt=0, description="of the noise at a point, in the model's units")

    def law(self, basis: BasisKind, dims: int) -> Law:  # noqa: ARG002
        return lambda squared: torch.full_like(squared, self.variance)

    def variances(self, harmonics: Harmonics, rate: Law | None = None) -> Tensor:
        share = torch.full(harmonics.grid, self.variance / math.prod(harmonics.grid), dtype=torch.float64)
        return share if rate is None else share / rate(harmonics.squared)


def slope(variances: Tensor, squared: Tensor) -> float:
    """The power of |k| that fits the logarithms of variances best, of modes above frequency 0.

    Args:
        variances: float64 (*grid); those that are 0 are left out.
        squared: |k|^2, of the same shape.
    """
    some = (squared > 0) & (variances > 0)
    if not bool(some.any()):
        return 0.0
    x, y = squared[some].log() / 2, variances[some].log()
    x = x - x.mean()
    spread = float(x.square().sum())
    return float((x * y).sum()) / spread if spread else 0.0


def _frequencies(basis: BasisKind, side: int) -> Tensor:
    """Of the modes of an axis, in cycles, float64 (side,): 0, 1, 1, 2, 2 ... or 0, 1/2, 1, ..."""
    place = torch.arange(side, dtype=torch.float64)
    return ((place + 1) / 2).floor() if basis == "fourier" else place / 2


def _squared(frequencies: list[Tensor]) -> Tensor:
    """|k|^2 of the products of the modes of the axes."""
    first, *others = (frequency.square() for frequency in frequencies)
    return first if not others else first[:, None] + others[0]


@lru_cache(maxsize=32)
def _matrix(basis: BasisKind, side: int) -> Tensor:
    """Modes in rows, values at the points in columns, orthonormal: float64 (side, side)."""
    point = torch.arange(side, dtype=torch.float64)
    if basis == "dct":
        rows = (math.pi * torch.outer(point, (point + 0.5) / side)).cos()
    else:
        turns = 2 * math.pi * torch.outer(_frequencies(basis, side), point / side)
        rows = torch.where((torch.arange(side) % 2 == 0)[:, None], turns.sin(), turns.cos())
        rows[0] = 1.0
    matrix: Tensor = rows / rows.square().sum(1, keepdim=True).sqrt()
    return matrix


@lru_cache(maxsize=32)
def _total(basis: BasisKind, dims: int, exponent: float) -> float:
    """The sum of (1 + |k|^2)^-exponent over all modes of a field."""
    highest = _HIGHEST[dims]
    side = 2 * highest + 1  # as many modes on each axis as there are frequencies up to the highest
    return float(((1 + _squared([_frequencies(basis, side)] * dims)) ** -exponent).sum())

r"""Jumps: the deterministic step from one level to any quieter one, its inverse, and grids cut into groups of steps.

With E[x0 | x_t] = f the DDIM step (arXiv 2010.02502, eq. 12 at eta = 0) from level t to level s is

    x_s = (sigma_s / sigma_t) x_t + (gap(t, s) / sigma_t) f,   gap(t, s) = alpha_s sigma_t - alpha_t sigma_s,

on every schedule; where alpha^2 + sigma^2 = 1, gap is the sine of the angle between the two levels. It is linear in f,
so each (x_t, x_s) has exactly one f that leads from the one to the other. Levels are Python floats or, for a batch in
which each item has its own, float64 tensors of shape (B,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osmose.gaussian.denoiser import Denoiser
from osmose.gaussian.parametrization import Number, column
from osmose.gaussian.schedule import Level
from osmose.gaussian.solvers import LOUD


def gap(t: Level, s: Level) -> Number:
    """alpha_s sigma_t - alpha_t sigma_s: above 0 where s is quieter than t."""
    difference: Number = s.alpha * t.sigma - t.alpha * s.sigma
    return difference


def jump(x_t: Tensor, x0: Tensor, t: Level, s: Level) -> Tensor:
    """The DDIM step from t to s, shape of x_t (B, *event)."""
    return column(s.sigma / t.sigma, x_t) * x_t + column(gap(t, s) / t.sigma, x_t) * x0


def implied_x0(x_t: Tensor, x_s: Tensor, t: Level, s: Level) -> Tensor:
    """The f whose step from x_t at t would have landed on x_s at s: inverse of `jump`, shape of x_t."""
    between = gap(t, s)
    return column(t.sigma / between, x_t) * x_s - column(s.sigma / between, x_t) * x_t


def share_of_first(t: Level, m: Level, s: Level) -> Number:
    """The weight of the first of two jumps, t to m to s, in the f of the one jump from t to s.

    `implied_x0` of the end is share f_1 + (1 - share) f_2, a convex mixture. It is 1 where m = s and 0 where s is clean
    data: there only the second counts.
    """
    share: Number = s.sigma * gap(t, m) / (m.sigma * gap(t, s))
    return share


def heun_x0(
    denoise: Denoiser, x_t: Tensor, first: Tensor, t: Level[Tensor], s: Level[Tensor], condition: Tensor | None = None
) -> Tensor:
    """The f whose `jump` from t to s is a step of Heun's method (`solvers.Heun`), shape of x_t.

    Args:
        denoise: E[x0 | x_t]; it is evaluated once.
        x_t: shape (B, *event).
        first: E[x0 | x_t] at t.
        t: levels of the items.
        s: where they go, all above clean data: the step to clean data is Euler's, and its f is `first`.
        condition: of the items, or None.
    """
    there = jump(x_t, first, t, s)
    second = denoise(there, s, condition)
    # In r = sigma / alpha the slope is eps, and the mean of its values at both ends gives back an estimate of x0 at t.
    eps = (there - column(s.alpha, x_t) * second) / column(s.sigma, x_t)
    loud = torch.gt(t.sigma, LOUD * t.alpha)
    alpha = t.alpha.masked_fill(loud, 1.0)
    from_eps = (x_t - column(t.sigma, x_t) * eps) / column(alpha, x_t)
    loud = loud.to(x_t.device).view(-1, *(1,) * (x_t.ndim - 1))
    return (first + torch.where(loud, second, from_eps)) / 2


def take(level: Level[Tensor], rows: Tensor) -> Level[Tensor]:
    """The levels of some items."""
    return Level(*(value[rows] for value in level))


@dataclass(frozen=True)
class Partition:
    """The steps 1..N of a grid cut into groups; a jump goes from anywhere in a group to its bottom.

    Step 0 is clean data, N the noisiest level. The bottom of a group is the top of the one below.

    Attributes:
        tops: the last step of each group, rising to N.

    Raises:
        ValueError: tops that do not rise from at least 1.
    """

    tops: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tops or any(high <= low for low, high in zip((0, *self.tops), self.tops, strict=False)):
            raise ValueError(f"groups that end at {list(self.tops)}: the ends should rise, from at least 1")

    @classmethod
    def of(cls, groups: int | Sequence[int], total: int) -> Partition:
        """As many groups of equal length, or groups with the given tops.

        Raises:
            ValueError: groups that do not divide the `total` steps, or do not end with the last of them.
        """
        if isinstance(groups, int):
            if groups < 1 or total % groups:
                raise ValueError(
                    f"{groups} groups cannot have equal shares of {total} steps; {groups} has to divide it"
                )
            length = total // groups
            return cls(tuple(range(length, total + 1, length)))
        partition = cls(tuple(groups))
        if partition.tops[-1] != total:
            raise ValueError(
                f"the last group ends at step {partition.tops[-1]}, and the grid has {total}; end with that"
            )
        return partition

    def __len__(self) -> int:
        return len(self.tops)

    def within(self, finer: Partition) -> Partition:
        """The same groups, counted in groups of a finer partition.

        Raises:
            ValueError: a top that is none of the finer one's; the message has the number.
        """
        place = {top: index for index, top in enumerate(finer.tops, 1)}
        for top in self.tops:
            if top not in place:
                raise ValueError(f"step {top} ends a group, but none of the {len(finer)} groups that these are made of")
        return Partition(tuple(place[top] for top in self.tops))

    def bottoms(self) -> Tensor:
        """For each step 1..N the bottom of its group, int64 (N,)."""
        lengths = torch.tensor([high - low for low, high in zip((0, *self.tops), self.tops, strict=False)])
        return torch.tensor([0, *self.tops[:-1]]).repeat_interleave(lengths)

r"""Forecasts and imputations that need no training, to be put beside those that do.

=============== =====================================================================================================
last            the last known value of each column
seasonal        the values one period before, and again
seasonal-walk   those, plus the sum of as many earlier differences between a period and the one before, drawn together
walk            a Gaussian random walk from the last value, with the covariance of the increments of the recent past
kriging         an Ornstein-Uhlenbeck process around the mean of the known values, given them (Gaussian process
                regression); of imputations too
linear          straight lines between known values; of imputations alone
=============== =====================================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.errors import UserError
from osmose.processes.kernels import OUKernel

#: Increments of so many times make the covariance of a walk.
RECENT = 250


def last_value(history: Tensor, horizon: int, count: int) -> Tensor:
    """The last known value of each column, (count, C, horizon), of a history (C, n)."""
    return last_known(history)[None, :, None].expand(count, -1, horizon).clone()


def last_known(history: Tensor) -> Tensor:
    """The last known value of each column, (C,).

    Raises:
        UserError: a column without any known value.
    """
    place = torch.where(history.isfinite(), torch.arange(history.shape[1]), -1).amax(1)
    if bool((place < 0).any()):
        raise UserError(f"history: column {int((place < 0).nonzero()[0])} has no known value")
    return history.gather(1, place[:, None])[:, 0]


def walk(history: Tensor, horizon: int, count: int, generator: torch.Generator, recent: int = RECENT) -> Tensor:
    """A Gaussian random walk from the last value, (count, C, horizon), of a history (C, n) at even times."""
    steps = history[:, -recent - 1 :].double().diff(dim=1)
    steps = steps[:, steps.isfinite().all(0)]
    if steps.shape[1] < 2:
        raise UserError(f"history: {history.shape[1]} times are too few for the increments of a walk")
    covariance = torch.cov(steps).reshape(len(history), len(history))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    drawn = torch.randn(count, horizon, len(history), generator=generator, dtype=torch.float64) @ root.T
    return last_known(history).double()[None, :, None] + drawn.cumsum(1).mT


def seasonal(history: Tensor, horizon: int, period: int, count: int) -> Tensor:
    """The last period again and again, (count, C, horizon), of a history (C, n), n at least `period`."""
    if not 1 <= period <= history.shape[1]:
        raise UserError(f"period: {period} is not valid: the history has {history.shape[1]} times")
    places = history.shape[1] - period + torch.arange(horizon) % period
    return history[:, places][None].expand(count, -1, -1).clone()


def seasonal_walk(history: Tensor, horizon: int, period: int, count: int, generator: torch.Generator) -> Tensor:
    """`seasonal` plus differences from period to period in the past, all columns and times of one past period at once.

    Of a horizon of more than a period differences are added up, period by period.
    """
    periods = history.shape[1] // period
    if periods < 3:
        raise UserError(f"period: {period} needs a history of 3 periods, and it has {history.shape[1]} times")
    past = history[:, -periods * period :].double().unflatten(1, (periods, period)).diff(dim=1)  # (C, periods - 1, P)
    drawn = torch.randint(periods - 1, (count, -(-horizon // period)), generator=generator)
    moved = past[:, drawn].cumsum(2)  # (C, count, blocks, P)
    return seasonal(history, horizon, period, count) + moved.flatten(2)[..., :horizon].transpose(0, 1)


def linear(values: Tensor, times: Tensor) -> Tensor:
    """Straight lines through the known values of (C, L) at times (L,); flat beyond the outermost."""
    import numpy as np

    found = values.double().clone()
    for column in found:
        known = column.isfinite()
        if bool(known.any()):
            made = np.interp(times.numpy(), times[known].numpy(), column[known].numpy())
            column.copy_(torch.from_numpy(made))
    return found


def kriging(
    values: Tensor, times: Tensor, mean: Tensor, scale: Tensor, memory: float, count: int, generator: torch.Generator
) -> Tensor:
    """Paths of an Ornstein-Uhlenbeck process given known values, (count, C, L).

    Args:
        values: (C, L), NaN where unknown.
        times: float64 (L,).
        mean, scale: of the process, (C,).
        memory: its length scale.
        count: paths.
        generator: of the noise.
    """
    known = values.isfinite()[None]
    x = ((values.double() - mean[:, None]) / scale[:, None]).nan_to_num()[None]
    factor = OUKernel(length_scale=memory).factor(times[None], ~known, known)
    eps = torch.randn(count, *values.shape, generator=generator, dtype=torch.float64)
    return (factor.expect(x) + factor.color(eps)) * scale[:, None] + mean[:, None]

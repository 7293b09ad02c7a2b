r"""What the network's output F means: one table for eps, x0, v and EDM's preconditioning.

Every parametrization has the form of EDM's eq. 7 (arXiv 2206.00364) on any schedule,

    E[x0 | x_t] = c_skip x_t + c_out F(c_in x_t, label),

and the F that makes this exact for a known pair (x0, eps) is its training target, again linear:
F* = target_x0 x0 + target_eps eps.

The predictions themselves (x0, eps, v, score, velocity) are linear in each other given x_t; `convert` goes between
any two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from osmose.configuration import Config
from osmose.errors import UserError
from osmose.gaussian.schedule import Level, Schedule

Number = float | Tensor
Quantity = Literal["x0", "eps", "v", "score"]


class Coefficients(NamedTuple):
    """The five numbers of a parametrization at one level: Python floats, or float64 tensors of shape (B,)."""

    c_in: Number
    c_skip: Number
    c_out: Number
    target_x0: Number
    target_eps: Number


class Parametrization(Config, ABC):
    """How the network's output is turned into the denoised data."""

    kind: str

    @abstractmethod
    def coefficients(self, level: Level) -> Coefficients:
        """The table's row at one level."""

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule on which the denoised data cannot be recovered.

        Raises:
            UserError: naming both and what to use.
        """


class EpsParametrization(Parametrization):
    """F is the noise: x0 = (x_t - sigma F) / alpha."""

    kind: Literal["eps"] = "eps"

    def coefficients(self, level: Level) -> Coefficients:
        return Coefficients(1.0, 1 / level.alpha, -level.sigma / level.alpha, 0.0, 1.0)

    def check(self, schedule: Schedule) -> None:
        if float(schedule.alpha(1.0)) == 0:
            raise UserError(
                f"parametrization: 'eps' cannot recover x0 at t = 1, where {schedule.kind!r} has alpha = 0; "
                "use v, x0 or edm"
            )


class X0Parametrization(Parametrization):
    """F is the clean data."""

    kind: Literal["x0"] = "x0"

    def coefficients(self, level: Level) -> Coefficients:  # noqa: ARG002
        return Coefficients(1.0, 0.0, 1.0, 1.0, 0.0)


class VParametrization(Parametrization):
    """F is v = alpha eps - sigma x0 (arXiv 2202.00512): x0 = (alpha x_t - sigma F) / (alpha^2 + sigma^2)."""

    kind: Literal["v"] = "v"

    def coefficients(self, level: Level) -> Coefficients:
        norm = level.alpha**2 + level.sigma**2
        return Coefficients(1.0, level.alpha / norm, -level.sigma / norm, -level.sigma, level.alpha)


class EDMParametrization(Parametrization):
    """EDM's table 1 for any schedule: network input and target have unit variance when the data have `sigma_data`.

    With alpha = 1 these are Karras et al.'s formulas; on a variance-preserving schedule with sigma_data = 1 it is
    minus the v-parametrization.
    """

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of the data in the model's units")

    def coefficients(self, level: Level) -> Coefficients:
        alpha, sigma, data = level.alpha, level.sigma, self.sigma_data
        total = alpha**2 * data**2 + sigma**2
        std = total**0.5
        # F* = (x0 - c_skip (alpha x0 + sigma eps)) / c_out, with the common factors cancelled by hand so that no
        # small difference is divided by a small number as sigma goes to 0.
        return Coefficients(
            1 / std, alpha * data**2 / total, sigma * data / std, sigma / (data * std), -alpha * data / std
        )


def column(value: Number, like: Tensor) -> Number:
    """A coefficient ready to multiply a batch: a number as it is, a (B,) tensor as (B, 1, ...) in `like`'s dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device=like.device, dtype=like.dtype).view(-1, *(1,) * (like.ndim - 1))


def noised(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """x_t = alpha x0 + sigma eps, shape (B, *event)."""
    return column(level.alpha, x0) * x0 + column(level.sigma, x0) * eps


def convert(value: Tensor, source: Quantity, target: Quantity, x_t: Tensor, level: Level) -> Tensor:
    """Turn a prediction of one quantity at x_t into another: x0, eps, v = alpha eps - sigma x0, score = -eps / sigma.

    Raises:
        ValueError: the quantity is not determined there (sigma = 0, or alpha = 0 when x0 is asked from eps).
    """
    alpha, sigma = column(level.alpha, x_t), column(level.sigma, x_t)
    if source == target:
        return value
    if "score" in (source, target) and not _all_positive(level.sigma):
        raise ValueError("the score is not defined where sigma = 0")
    if source == "score":
        value, source = -sigma * value, "eps"
    wants_eps = target in ("eps", "score")
    if source == "v":
        norm = alpha**2 + sigma**2
        x0, eps = (alpha * x_t - sigma * value) / norm, (sigma * x_t + alpha * value) / norm
    elif source == "x0":
        if not _all_positive(level.sigma):
            raise ValueError("eps is not determined by x0 where sigma = 0")
        x0, eps = value, (x_t - alpha * value) / sigma
    elif wants_eps:
        x0, eps = torch.empty(0), value
    else:
        if not _all_positive(level.alpha):
            raise ValueError("x0 is not determined by eps where alpha = 0")
        x0, eps = (x_t - sigma * value) / alpha, value
    if target == "v":
        return alpha * eps - sigma * x0
    if target == "score":
        return -eps / sigma
    return eps if target == "eps" else x0


def velocity(x0: Tensor, eps: Tensor, alpha_dot: Number, sigma_dot: Number) -> Tensor:
    """dx_t/dt of the probability-flow ODE: alpha' x0 + sigma' eps, for the predicted x0 and eps at x_t."""
    return column(alpha_dot, x0) * x0 + column(sigma_dot, x0) * eps


def _all_positive(value: Number) -> bool:
    return bool((value > 0).all()) if isinstance(value, Tensor) else value > 0

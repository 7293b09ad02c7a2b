r"""How errors of learned fields bound the likelihood of an SDE's samples (arXiv 2303.08797).

Two processes with one noise level epsilon, whose drifts b + epsilon s differ by db + epsilon ds, have

    KL(rho1 || learned rho1) <= 1 / (4 epsilon) int E|db + epsilon ds|^2 dt
                             <= 1 / (2 epsilon) int E|db|^2 dt + epsilon / 2 int E|ds|^2 dt.

With excess losses of half the mean squared error that is excess_b / epsilon + epsilon excess_s. The paper prints half
of it, which is too small. For the ODE there is no such bound.
"""

from __future__ import annotations

import math

from osmose.errors import UserError


def divergence_bound(excess_b: float, excess_s: float, epsilon: float) -> float:
    """An upper bound on KL(rho1 || law of the samples), in nats, for a constant epsilon.

    Args:
        excess_b: half the mean squared error of the velocity, over rho(t) and t uniform in [0, 1].
        excess_s: the same of the score.
        epsilon: the noise level.

    Raises:
        UserError: an epsilon that is not positive, negative errors.
    """
    if not 0 < epsilon < math.inf:
        raise UserError(f"epsilon: {epsilon:g} is not valid: the bound holds for an SDE, with epsilon above 0")
    if not min(excess_b, excess_s) >= 0:
        raise UserError(f"excess losses: {excess_b:g} and {excess_s:g} are not valid: must be at least 0")
    return excess_b / epsilon + epsilon * excess_s


def best_epsilon(excess_b: float, excess_s: float) -> float:
    """The epsilon at which the bound is least: sqrt(excess_b / excess_s).

    Raises:
        UserError: errors that are not positive.
    """
    if not min(excess_b, excess_s) > 0:
        raise UserError(f"excess losses: {excess_b:g} and {excess_s:g} are not valid: must be above 0")
    return math.sqrt(excess_b / excess_s)

r"""Likelihoods: of the levels of data, and of values of which some are hidden and the others have no part in it.

Values that are not hidden are 0, and so is their noise: they drop out of the terms of the variational bound, and their
velocity along the probability-flow ODE is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osmose.data.dataset import DataSpec
from osmose.gaussian.chain import LevelDecoder, ReverseChain, Variance
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.parametrization import noised, velocity
from osmose.interpolants.transport import grid as even_grid
from osmose.interpolants.transport import log_density
from osmose.methods.messages import OnStep

#: Times between which the ODE of the density runs, its steps, and the values up to which its divergence is exact.
_CAP, _STEPS, _EXACT = 1e-4, 100, 16


def level_decoder(spec: DataSpec) -> LevelDecoder | None:
    """Of the data's levels; None for data without, and for channels whose levels lie at different values."""
    limits, alike = spec.model_range, len(set(spec.shift)) == len(set(spec.scale)) == 1
    return LevelDecoder(*limits, spec.levels) if limits is not None and spec.levels is not None and alike else None


@dataclass(frozen=True)
class Hidden:
    """What a likelihood is of.

    Attributes:
        denoiser: E[u0 | u_t], which is told `condition`.
        condition: as the denoiser's network takes it.
        hidden: 1 where a value is hidden, 0 elsewhere, (n, *event).
        noise: draws standard noise of the hidden values, 0 elsewhere.
    """

    denoiser: NetworkDenoiser
    condition: Any
    hidden: Tensor
    noise: Callable[[], Tensor]


class Scored(NamedTuple):
    """-log p in nats of all hidden values of each of n items, term by term.

    Attributes:
        t: times of the K steps, float64.
        prior: of the noise at the end, float64 (n,).
        steps: of each step, float64 (n, K).
        errors: squared errors of the estimates at each step, (n, K), or None where there are none.
    """

    t: Tensor
    prior: Tensor
    steps: Tensor
    errors: Tensor | None


def in_steps(problem: Hidden, u0: Tensor, variance: Variance, on_step: OnStep, num_steps: int) -> Scored:
    """The variational bound of u0 (n, *event), each step estimated with one noise.

    Args:
        problem: see `Hidden`.
        u0: values, 0 where not hidden.
        variance: of the chain.
        on_step: called after each step.
        num_steps: of the chain.
    """
    schedule = problem.denoiser.schedule
    chain = ReverseChain(TimeGrid.of(schedule, num_steps))
    table, size = torch.empty(len(u0), num_steps, dtype=torch.float64), u0[0].numel()
    errors = torch.empty_like(table)
    # The chain's terms are means over all values: those that are not hidden, where both sides are 0, are taken out.
    idle = size - problem.hidden.flatten(1).sum(1).cpu().double()
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    for index, level in enumerate(chain.levels):
        k = torch.full((len(u0),), index + 1)
        estimate = problem.denoiser(noised(u0, problem.noise(), level), level, problem.condition)
        terms = chain.term(k, u0, estimate, chain.log_variance(variance, k, None, u0), None).cpu().double()
        one = chain.log_variance(variance, k[:1], None, nothing)
        table[:, index] = terms * size - idle * chain.term(k[:1], nothing, nothing, one, None)
        errors[:, index] = (u0 - estimate).square().flatten(1).sum(1)
        on_step(index + 1, num_steps)
    prior = chain.prior_term(u0.cpu().double(), schedule.prior_std) * size
    prior = prior - idle * chain.prior_term(nothing, schedule.prior_std)
    return Scored(torch.tensor([level.t for level in chain.levels], dtype=torch.float64), prior, table, errors)


def by_flow(problem: Hidden, u0: Tensor, on_step: OnStep, num_steps: int | None) -> Scored:
    """The density of u0 (n, *event) by the probability-flow ODE: minus the change of volume of each step."""
    schedule, count = problem.denoiser.schedule, num_steps or _STEPS
    with torch.inference_mode(False):  # the divergence is a derivative
        hidden = problem.hidden

        def slope(t: float, u: Tensor) -> Tensor:
            on_step(min(count, 1 + round(t * count)), count)
            (level,) = TimeGrid.at(schedule, torch.tensor([t], dtype=torch.float64)).levels[:1]
            x0 = problem.denoiser(u, level, problem.condition)
            eps = (u - level.alpha * x0) / level.sigma
            at = torch.tensor(t, dtype=torch.float64)
            moved = velocity(x0, eps, float(schedule.alpha_dot(at)), float(schedule.sigma_dot(at)))
            return moved * hidden  # what is not hidden stays, and adds nothing to the divergence

        def log_prior(u: Tensor) -> Tensor:
            z = (u / schedule.prior_std).cpu().double().square() + math.log(2 * math.pi * schedule.prior_std**2)
            return -(z * hidden.cpu().double()).flatten(1).sum(1) / 2

        log_p, integrals = log_density(
            slope,
            u0,
            even_grid(count, _CAP, 1.0),
            log_prior,
            "exact" if u0[0].numel() <= _EXACT else "hutchinson",
            normal=problem.noise,
        )
    t = torch.linspace(_CAP, 1, count + 1, dtype=torch.float64)
    return Scored((t[1:] + t[:-1]) / 2, -log_p, -integrals, None)

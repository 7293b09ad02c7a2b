r"""Objectives: what a Gaussian diffusion model is taught at a given time, item by item.

An objective takes the items, their times and a source of noise and returns one loss for each item; which times are
drawn, and how the items are weighted for it, is the time sampler's business (`methods.times`), and reduction is the
trainer's. F is the network's output and F* its target (`gaussian.parametrization`), l = mean over dimensions of
(F - F*)^2, T the number of steps, L_t the term of the bound at t in bits per dimension (`gaussian.chain`).

=========== =====================================================================================================
simple      l. For `eps` this is DDPM's L_simple, for `edm` EDM's weighted loss.
vlb         T L_t: its mean over uniform times is the bound in bits per dimension, without the constant L_T.
hybrid      l + vlb_weight T L_t, where L_t teaches the variance alone: the mean inside it is held fixed
            (arXiv 2102.09672, eq. 16; T = 1000 and 0.001 make the factor 1).
tilted      k noises for each item at the same t: sum_i w_i l_i, w = softmax(tau D l + offset), held fixed.
=========== =====================================================================================================

`tilted` descends on F_tau = log(mean_i exp(tau D l_i)) / (tau D), whose gradient is that weighted sum; tau -> 0 is the
mean of the k losses. Its `tilt` is tau, for losses summed over the D dimensions, or the name of a choice:

=============== ======= ===========================================================================================
mean            0       k noises for each item, plainly averaged: what the others are to be compared with
algorithm3      1       importance-weighted diffusion as printed: the worst draw weighs most
author-code     1 / D   as its author ran it, with l a mean: weights within a percent of equal
iwae            -c_t    the weights of the importance-weighted bound (arXiv 1509.00519): w = softmax of the mean of
                        log p(x_s | x_t) / q(x_t | x_s) over q(x_s | x_t, x0), which is -c_t D l plus an offset,
                        beta ||eps||^2 / (2 sigma_t^2); without the factor c_t of its gradient
iwae-simple     -1      its sign without its scale: the best draw weighs most
=============== ======= ===========================================================================================

A tilt other than `mean` changes the optimum, which is no longer E[x0 | x_t]: positive ones over-predict the noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from osmose.configuration import Config
from osmose.errors import UserError, nearest
from osmose.gaussian.chain import LevelDecoder, ReverseChain, Variance
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.parametrization import column, noised
from osmose.gaussian.schedule import Level
from osmose.methods.messages import Batch, LossTerms

#: The i-th noise of the items, i = 0, 1, ...: the same whenever it is asked for.
NoiseOf = Callable[[int], Tensor]


@dataclass(frozen=True)
class Problem:
    """What an objective teaches.

    Attributes:
        denoiser: the model's denoiser.
        variance: how the variance of its reverse chain is chosen.
        chain: that chain on all steps of the schedule, or None on a schedule without steps.
        decoder: of the data's levels, or None for data without.
    """

    denoiser: NetworkDenoiser
    variance: Variance
    chain: ReverseChain | None
    decoder: LevelDecoder | None

    def step(self, t: Tensor) -> Tensor:
        """The steps k nearest to times t = k / T, int64 (B,)."""
        assert self.chain is not None
        return (t * self.chain.num_steps).round().long().clamp(min=1)

    def on_grid(self, t: Tensor) -> Tensor:
        """The nearest times that the chain visits, float64 (B,): a continuous law of times may draw others."""
        assert self.chain is not None
        return self.step(t).double() / self.chain.num_steps

    def bound_term(self, t: Tensor, x0: Tensor, x0_hat: Tensor, share: Tensor | None) -> Tensor:
        """T L_t in bits per dimension, shape (B,)."""
        assert self.chain is not None
        k = self.step(t)
        log_variance = self.chain.log_variance(self.variance, k, share, x0)
        nats = self.chain.term(k, x0, x0_hat, log_variance, self.decoder)
        return nats * (self.chain.num_steps / math.log(2))


class Objective(Config, ABC):
    """Describes the loss of an item at a time."""

    kind: str

    @abstractmethod
    def check(self, problem: Problem) -> None:
        """Refuse what the objective cannot teach.

        Raises:
            UserError: naming the part that does not fit and what would.
        """

    @abstractmethod
    def losses(self, problem: Problem, batch: Batch, t: Tensor, noise: NoiseOf) -> LossTerms:
        """The loss of each item.

        Args:
            problem: the model.
            batch: the items.
            t: their times, float64 (B,) on the CPU.
            noise: their noises, each (B, *event).
        """


def _squared_error(problem: Problem, batch: Batch, level: Level, eps: Tensor) -> Tensor:
    """The mean over dimensions of (F - F*)^2, shape (B,)."""
    out = problem.denoiser.output(noised(batch.x0, eps, level), level, batch.condition)
    return (out - problem.denoiser.target(batch.x0, eps, level)).square().flatten(1).mean(1)


def _refuse_learned_variance(problem: Problem) -> None:
    if problem.variance == "learned_range":
        steps = "" if problem.chain is not None else " on schedule=linear or cosine"
        raise UserError(
            f"variance: learned_range is taught by the bound alone; use objective=hybrid or vlb{steps}, "
            "or variance=fixed_small (and sampling.solver.variance=fixed_small)"
        )


def _without(problem: Problem) -> str:
    """What else has to change where there is no bound to teach a learned variance."""
    learned = problem.variance == "learned_range"
    return " variance=fixed_small sampling.solver.variance=fixed_small" if learned else ""


def _require_bound(kind: str, problem: Problem) -> None:
    if problem.chain is None:
        raise UserError(
            f"objective: {kind} needs a schedule with steps, linear or cosine; "
            f"{problem.denoiser.schedule.kind!r} is continuous: use objective=simple{_without(problem)}"
        )
    if problem.decoder is None:
        raise UserError(
            f"objective: {kind} counts bits per dimension, which needs data with a known number of levels (256 for "
            f"8-bit images); these have none: use objective=simple{_without(problem)}"
        )


class SimpleObjective(Objective):
    """The squared error of the network's output."""

    kind: Literal["simple"] = "simple"

    def check(self, problem: Problem) -> None:
        _refuse_learned_variance(problem)

    def losses(self, problem: Problem, batch: Batch, t: Tensor, noise: NoiseOf) -> LossTerms:
        return LossTerms(_squared_error(problem, batch, problem.denoiser.schedule.level(t), noise(0)), t)


class VLBObjective(Objective):
    """The variational bound of the negative log-likelihood, in bits per dimension."""

    kind: Literal["vlb"] = "vlb"

    def check(self, problem: Problem) -> None:
        _require_bound(self.kind, problem)

    def losses(self, problem: Problem, batch: Batch, t: Tensor, noise: NoiseOf) -> LossTerms:
        t = problem.on_grid(t)
        level = problem.denoiser.schedule.level(t)
        x_t = noised(batch.x0, noise(0), level)
        x0_hat, share = problem.denoiser.with_variance(x_t, level, batch.condition)
        return LossTerms(problem.bound_term(t, batch.x0, x0_hat, share), t)


class HybridObjective(Objective):
    """The squared error, and the bound for the variance."""

    kind: Literal["hybrid"] = "hybrid"
    vlb_weight: float = Field(
        0.001, gt=0, description="lambda: factor of the bound, which is T L_t in bits per dimension"
    )

    def check(self, problem: Problem) -> None:
        if problem.variance != "learned_range":
            raise UserError(
                f"objective: hybrid teaches the variance, and {problem.variance!r} has nothing to learn; "
                "use variance=learned_range, or objective=simple"
            )
        _require_bound(self.kind, problem)

    def losses(self, problem: Problem, batch: Batch, t: Tensor, noise: NoiseOf) -> LossTerms:
        t, denoiser, eps = problem.on_grid(t), problem.denoiser, noise(0)
        level = denoiser.schedule.level(t)
        x_t = noised(batch.x0, eps, level)
        out, share = denoiser.outputs(x_t, level, batch.condition)
        simple = (out - denoiser.target(batch.x0, eps, level)).square().flatten(1).mean(1)
        bound = problem.bound_term(t, batch.x0, denoiser.denoised(out.detach(), x_t, level), share)
        return LossTerms(simple + self.vlb_weight * bound, t, {"simple": simple.detach(), "vlb": bound.detach()})


_TILTS = ("mean", "algorithm3", "author-code", "iwae", "iwae-simple")


class TiltedObjective(Objective):
    """Several noises for each item, weighted by their losses."""

    kind: Literal["tilted"] = "tilted"
    noise_draws: int = Field(2, ge=1, description="k: noises for each item and step")
    tilt: float | str = Field("mean", description="mean, algorithm3, author-code, iwae, iwae-simple, or tau itself")
    two_pass: bool = Field(
        False, description="keep no activations: a second forward pass a draw instead, memory of one draw for any k"
    )

    @field_validator("tilt", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        # Checked here, before the union is: it would say which of its members refused the value (`tilt.float`).
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (math.isfinite(value) if number else value in _TILTS):
            raise ValueError(f"should be a finite number, or {nearest(str(value), _TILTS)}")
        return value

    def check(self, problem: Problem) -> None:
        _refuse_learned_variance(problem)
        if self.tilt == "iwae" and problem.chain is None:
            raise UserError(
                "objective.tilt: iwae needs a schedule with steps, linear or cosine; "
                f"{problem.denoiser.schedule.kind!r} is continuous: use iwae-simple"
            )

    def losses(self, problem: Problem, batch: Batch, t: Tensor, noise: NoiseOf) -> LossTerms:
        level = problem.denoiser.schedule.level(t)

        def loss(x0: Tensor, draw: int) -> Tensor:
            return _squared_error(problem, Batch(x0, batch.condition), level, noise(draw))

        def again(x0: Tensor, draw: int) -> Tensor:
            # Its backward pass runs the draw anew, with the same noise and dropout, and frees it before the next. The
            # tensor among the arguments tells it the device whose random state, that of dropout, is to be repeated.
            out: Tensor = checkpoint(loss, x0, draw, use_reentrant=False)
            return out

        draws = range(self.noise_draws)
        each = torch.stack([(again if self.two_pass else loss)(batch.x0, draw) for draw in draws])
        tau = column(self._tau(problem, t, level, batch.x0[0].numel()), each[0])
        with torch.no_grad():
            offset = torch.zeros_like(each)
            if self.tilt == "iwae":
                assert problem.chain is not None
                factor = column(problem.chain.noise_weight(problem.step(t)), each[0])
                offset = factor * torch.stack([noise(draw).square().flatten(1).sum(1) for draw in draws])
            weights = torch.softmax(tau * each + offset, 0)
            mean = each.mean(0)
            tilted = (torch.logsumexp(tau * each + offset, 0) - torch.logsumexp(offset, 0)) / tau
            parts = {
                "plain": mean,
                "tilted": torch.where(torch.as_tensor(tau) == 0, mean, tilted),
                "max_weight": weights.amax(0),
                "spread": each.std(0, correction=0) / mean.clamp(min=torch.finfo(mean.dtype).tiny),
            }
        return LossTerms((weights * each).sum(0), t, parts)

    def _tau(self, problem: Problem, t: Tensor, level: Level, dimension: int) -> Tensor:
        """The factor of l, which is a mean over dimensions, in the exponent: float64 (B,)."""
        if self.tilt == "iwae":
            assert problem.chain is not None
            weight = problem.chain.x0_weight(problem.variance, problem.step(t))
            c_out = problem.denoiser.parametrization.coefficients(level).c_out
            return -dimension * weight * c_out**2  # F's error is that of the denoised data divided by c_out
        factor = {"mean": 0.0, "algorithm3": 1.0, "author-code": 1 / dimension, "iwae-simple": -1.0}
        tau = factor[self.tilt] if isinstance(self.tilt, str) else self.tilt
        return torch.full_like(t, tau * dimension)

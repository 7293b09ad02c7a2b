r"""The reverse chain: what ancestral sampling runs, and what the variational bound of the likelihood scores.

A step goes from t to the quieter s (DDPM, arXiv 2006.11239, eq. 6-7, on any schedule and any grid):

    q(x_t | x_s)     = N(ratio x_s, beta),            ratio = alpha_t / alpha_s, beta = sigma_t^2 - ratio^2 sigma_s^2
    q(x_s | x_t, x0) = N(keep x_t + pull x0, btilde),  btilde = beta sigma_s^2 / sigma_t^2
    p(x_s | x_t)     = N(keep x_t + pull x0_hat, Sigma)

On the grid of all steps of a discrete schedule, beta and btilde are DDPM's; on a strided one they are the rescaled
betas of improved DDPM (arXiv 2102.09672, eq. 19). Sigma is

    fixed_small      btilde
    fixed_large      beta
    learned_range    exp(w log beta + (1 - w) log btilde), w = (v + 1) / 2 for a second output v of the network, one
                     for each dimension and neither squashed nor clipped (arXiv 2102.09672, eq. 15)

The last step, to clean data, has btilde = 0: sampling adds no noise there, and the bound takes the btilde of the step
before (`learned_range`: in place of its lower end), or beta where there is only one step.

The negative log-likelihood of an item is at most L_T + L_{K-1} + ... + L_0 (arXiv 2006.11239, eq. 5):

    L_T     = KL(q(x_T | x0) || N(0, prior_std^2))
    L_{k-1} = KL(q(x_s | x_t, x0) || p(x_s | x_t)),  k = K..2
    L_0     = -log p(x0 | x_1), of values on `levels` (their whole interval's probability), else of the density
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.parametrization import column
from osmose.gaussian.schedule import Level

Variance = Literal["fixed_small", "fixed_large", "learned_range"]


class ReverseStep(NamedTuple):
    """One step of the chain: keep and pull make the mean of q(x_s | x_t, x0); beta and btilde are variances."""

    keep: float
    pull: float
    beta: float
    btilde: float


def reverse_step(t: Level[float], s: Level[float]) -> ReverseStep:
    """The step from level t to the quieter level s."""
    ratio = t.alpha / s.alpha
    beta = t.sigma**2 - (ratio * s.sigma) ** 2
    share = s.sigma**2 / t.sigma**2
    return ReverseStep(ratio * share, s.alpha * beta / t.sigma**2, beta, beta * share)


class LevelDecoder(NamedTuple):
    """p(x0 | x_1) of values on `levels` equally spaced points from `low` to `high` (arXiv 2006.11239, eq. 13).

    A level has the probability of the interval half way to its neighbours; the outermost reach to infinity, so that
    the probabilities of all levels sum to 1.
    """

    low: float
    high: float
    levels: int

    def nll(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """-log p of x0 under N(mean, variance) in nats, in the shape of x0; exact, in float64."""
        half = (self.high - self.low) / (self.levels - 1) / 2
        host = "cpu" if x0.device.type == "mps" else x0.device  # MPS has no float64
        x0, mean, log_variance = (value.to(host, torch.float64) for value in (x0, mean, log_variance))
        scale = (-log_variance / 2).exp()
        upper = torch.where(x0 > self.high - half, math.inf, (x0 + half - mean) * scale)
        lower = torch.where(x0 < self.low + half, -math.inf, (x0 - half - mean) * scale)
        # In the upper tail both probabilities round to 1: mirrored, the interval lies in the lower one.
        mirrored = lower > 0
        lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
        log_upper = torch.special.log_ndtr(upper)
        return -(log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper)))


class ReverseChain:
    """The reverse chain over a grid; step k = 1..K, where 1 is the last one, to clean data.

    Attributes:
        levels: the K noisy levels, quietest first: step k starts from `levels[k - 1]`.
    """

    def __init__(self, grid: TimeGrid):
        pairs = list(grid.steps())[::-1]
        self.levels = [t for t, _ in pairs]
        steps = [reverse_step(t, s) for t, s in pairs]
        self._sigma2 = torch.tensor([t.sigma**2 for t in self.levels], dtype=torch.float64)
        self._pull, self._beta, btilde = (
            torch.tensor([getattr(step, name) for step in steps], dtype=torch.float64)
            for name in ("pull", "beta", "btilde")
        )
        btilde[0] = btilde[1] if len(steps) > 1 else self._beta[0]
        self._log_beta, self._log_btilde = self._beta.log(), btilde.log()

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.levels)

    def log_variance(self, kind: Variance, k: Tensor, share: Tensor | None, like: Tensor) -> Tensor:
        """Log Sigma of steps k (int64 (B,)), broadcast to the shape of `like` (B, *event).

        Args:
            kind: how Sigma is chosen.
            k: steps, 1..K.
            share: w of `learned_range`, shape of `like`; None otherwise.
            like: gives shape, dtype and device.
        """
        small, large = self._log_btilde[k - 1], self._log_beta[k - 1]
        if kind == "learned_range":
            assert share is not None, "learned_range needs the network's second output"
            return column(small, like) + share * column(large - small, like)
        fixed = small if kind == "fixed_small" else torch.where(k == 1, small, large)
        return torch.zeros_like(like) + column(fixed, like)

    def x0_weight(self, kind: Variance, k: Tensor) -> Tensor:
        """Factor of (x0 - x0_hat)^2 in step k's KL divergence for a fixed variance: pull^2 / (2 Sigma), float64 (B,).

        Raises:
            ValueError: a learned variance, for which there is no such number.
        """
        if kind == "learned_range":
            raise ValueError("the weight of the squared error is not a function of the step for a learned variance")
        pull = self._pull[k - 1]
        return pull**2 / (2 * self.log_variance(kind, k, None, pull).exp())

    def noise_weight(self, k: Tensor) -> Tensor:
        """Factor of eps^2 in E[-log q(x_t | x_s)] over q(x_s | x_t, x0): beta / (2 sigma_t^2), float64 (B,)."""
        return self._beta[k - 1] / (2 * self._sigma2[k - 1])

    def term(self, k: Tensor, x0: Tensor, x0_hat: Tensor, log_variance: Tensor, decoder: LevelDecoder | None) -> Tensor:
        """L_{k-1} of each item in nats per dimension, shape (B,).

        Args:
            k: steps, int64 (B,) on the CPU, 1..K.
            x0, x0_hat: the data and the denoised estimate at x_t, shape (B, *event).
            log_variance: of p(x_s | x_t), shape (B, *event).
            decoder: of x0 at the last step; None scores its density.
        """
        excess = column(self._log_btilde[k - 1], x0) - log_variance
        error = (column(self._pull[k - 1], x0) * (x0 - x0_hat)).square() * (-log_variance).exp()
        terms = (0.5 * (excess.expm1() - excess + error)).flatten(1).mean(1)
        last = (k == 1).nonzero().squeeze(1).to(x0.device)
        if len(last):
            x, mean, log_v = x0[last], x0_hat[last], log_variance[last]
            if decoder is not None:
                nll = decoder.nll(x, mean, log_v).to(x0)
            else:
                nll = 0.5 * (math.log(2 * math.pi) + log_v + (x - mean).square() * (-log_v).exp())
            terms = terms.index_copy(0, last, nll.flatten(1).mean(1))
        return terms

    def prior_term(self, x0: Tensor, prior_std: float) -> Tensor:
        """L_T of each item in nats per dimension, shape (B,)."""
        noisiest = self.levels[-1]
        variance = (noisiest.sigma / prior_std) ** 2
        mean = x0 * (noisiest.alpha / prior_std)
        # expm1-like form: for variance next to 1 the difference variance - 1 - log(variance) is all that is left.
        rest = variance - 1 - math.log1p(variance - 1)
        return (0.5 * (mean.square() + rest)).flatten(1).mean(1)

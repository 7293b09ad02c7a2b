r"""The pure death of counts, with which blackout diffusion corrupts its data (arXiv 2305.11089).

Every unit of a count n0 survives to a time with the probability p, on its own:

    n_t | n0 ~ Binomial(n0, p_t)
    n_s - n_t | n_t, n0 ~ Binomial(n0 - n_t, r),    r = (p_s - p_t) / (1 - p_t),    s before t.

Everything depends on time through p alone, which is kept as its log-odds u = log(p / (1 - p)): near the data 1 - p is
sigmoid(-u), with all digits, where p itself would leave none. The signal-to-noise ratio of a count is n0 p / (1 - p):
u is log-SNR but for a constant.

Backwards, n jumps to n + 1 at the rate E[n0 - n | n_t = n] p / (1 - p) in the clock -log p: all that a model has to
know is y = E[n0 - n_t | n_t]. `steps` holds what can be done with it:

    bridge        n + Binomial(y rounded up or down at random, so that its mean is y; r)
    bridge-round  n + Binomial(y rounded to the nearest; r): the published one, which loses what it rounds off
    tau-leap      n + Poisson(r y), cut at the largest count
    binomial      n + Binomial(M - n, r y / (M - n)): a leap that cannot overshoot; exact at any step where counts are
                  Binomial(M, b) or M is 1

All of them know the mean alone, and are of first order in the step but where said otherwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from osmose.configuration import Config
from osmose.errors import UserError
from osmose.gaussian.draws import Draws

#: Survivors that are expected at the end of the automatic schedule, of all units of an event.
SURVIVORS = 0.1


class Survival(Config, ABC):
    """Log-odds of survival along s in [0, 1], from nearly all units to nearly none.

    Both ends follow from `t_end`: -log p at s = 1, and -log(1 - p) at s = 0. A grid has `num_steps` times, evenly in s.
    """

    kind: str
    t_end: float = Field(10.0, gt=0.7, le=30, description="-log of the share of units that survive to the end")
    num_steps: int = Field(1000, ge=2, description="T, times of the grid")

    @abstractmethod
    def log_odds(self, s: Tensor) -> Tensor:
        """U at s, float64."""

    @abstractmethod
    def slope(self, s: Tensor) -> Tensor:
        """-du/ds, float64, positive."""

    @abstractmethod
    def position(self, u: Tensor) -> Tensor:
        """S of log-odds, float64, kept in [0, 1]."""

    def grid(self, count: int | None = None) -> Tensor:
        """S of the grid, or of so many of its times, evenly, both ends included: float64, rising.

        Raises:
            UserError: more times than the grid has.
        """
        count = self.num_steps if count is None else count
        if count > self.num_steps:
            raise UserError(
                f"num_steps: {count} is more than the {self.num_steps} times of the grid (schedule.num_steps)"
            )
        last = self.num_steps - 1
        # One step goes from the end of the grid to the data.
        index = torch.linspace(0 if count > 1 else last, last, count, dtype=torch.float64).round()
        return index / last


class LogitSurvival(Survival):
    """U falls evenly: even in log-SNR. The published one."""

    kind: Literal["logit"] = "logit"

    @property
    def extent(self) -> float:
        """U goes from this to its negative."""
        return math.log(math.expm1(self.t_end))

    def log_odds(self, s: Tensor) -> Tensor:
        return self.extent * (1 - 2 * s.double())

    def slope(self, s: Tensor) -> Tensor:
        return torch.full_like(s.double(), 2 * self.extent)

    def position(self, u: Tensor) -> Tensor:
        return ((1 - u.double() / self.extent) / 2).clamp(0, 1)


class CosineSurvival(Survival):
    """P = cos^2 of an angle that grows evenly (CountsDiff, arXiv 2604.03779), between the same ends."""

    kind: Literal["cosine"] = "cosine"

    def log_odds(self, s: Tensor) -> Tensor:
        return -2 * torch.tan(self._angle(s)).log()

    def slope(self, s: Tensor) -> Tensor:
        first, last = self._ends
        return 4 * (last - first) / torch.sin(2 * self._angle(s))

    def position(self, u: Tensor) -> Tensor:
        first, last = self._ends
        return ((torch.exp(-u.double() / 2).atan() - first) / (last - first)).clamp(0, 1)

    @property
    def _ends(self) -> tuple[float, float]:
        """Angles whose squared cosine is p at both ends."""
        last = math.acos(math.exp(-self.t_end / 2))
        return math.pi / 2 - last, last

    def _angle(self, s: Tensor) -> Tensor:
        first, last = self._ends
        return first + (last - first) * s.double()


def survival(u: Tensor) -> Tensor:
    """P, float64."""
    return torch.sigmoid(u.double())


def loss_odds(u: Tensor) -> Tensor:
    """1 - p, float64, with all its digits."""
    return torch.sigmoid(-u.double())


def regained(u_s: Tensor, u_t: Tensor) -> Tensor:
    """R, the share of what is lost at t that is still there at s, before t: 1 - (1 - p_s) / (1 - p_t), float64."""
    return -torch.expm1(logsigmoid(-u_s.double()) - logsigmoid(-u_t.double()))


def end_for(total: float) -> float:
    """T_end at which `SURVIVORS` units are expected of an event that has `total` of them, at least 5."""
    return max(5.0, math.log(max(total, 1.0) / SURVIVORS))


def mean_surprise(y: Tensor, d: Tensor) -> Tensor:
    """Y - d + d log(d / y): what it costs, in nats, to expect y Poisson events where d come; 0 at y = d.

    As a function of y it is the Poisson likelihood, whose mean over d is least at y = E[d].

    Args:
        y: positive where d is, any shape.
        d: counts of that shape.
    """
    # Where d = 0 the logarithms play no part, and must not be taken of 0. Not of d / y, which overflows first.
    comes = d > 0
    log_y = torch.where(comes, y, 1.0).clamp(min=torch.finfo(y.dtype).tiny).log()
    return y - d + d * (torch.where(comes, d, 1.0).log() - log_y)


#: The steps by name.
StepKind = Literal["bridge", "bridge-round", "tau-leap", "binomial"]
StepFunction = Callable[[Tensor, Tensor, float, int, Draws], Tensor]


def _whole_and_rest(n: Tensor, y: Tensor, most: int) -> tuple[Tensor, Tensor]:
    y = y.double().minimum(most - n.double()).clamp(min=0)
    return y.floor(), y - y.floor()


def _bridge(n: Tensor, y: Tensor, r: float, most: int, draws: Draws) -> Tensor:
    whole, rest = _whole_and_rest(n, y, most)
    up = draws.binomial(torch.ones_like(n), rest)
    return n + draws.binomial(whole.to(n.dtype) + up, torch.full_like(rest, r))


def _bridge_round(n: Tensor, y: Tensor, r: float, most: int, draws: Draws) -> Tensor:
    left = y.double().round().minimum(most - n.double()).clamp(min=0)
    return n + draws.binomial(left.to(n.dtype), torch.full_like(left, r))


def _tau_leap(n: Tensor, y: Tensor, r: float, most: int, draws: Draws) -> Tensor:
    return (n + draws.poisson(r * y.double().clamp(min=0))).clamp(max=most)


def _binomial(n: Tensor, y: Tensor, r: float, most: int, draws: Draws) -> Tensor:
    left = most - n
    chance = (r * y.double() / left.clamp(min=1)).clamp(0, 1)
    return n + draws.binomial(left, chance)


#: One step backwards each: (n int64 (B, *event), y (B, *event), r, largest count, draws) -> n, int64.
steps: dict[str, StepFunction] = {
    "bridge": _bridge,
    "bridge-round": _bridge_round,
    "tau-leap": _tau_leap,
    "binomial": _binomial,
}


def binomial_matrix(most: int, p: Tensor | float) -> Tensor:
    """P(Binomial(n, p) = m), float64, shape (..., most + 1, most + 1), [m, n]; p is a number or any shape (...)."""
    p = torch.as_tensor(p, dtype=torch.float64)[..., None, None]
    m, n = torch.arange(most + 1.0, dtype=torch.float64)[:, None], torch.arange(most + 1.0, dtype=torch.float64)[None]
    ways = torch.lgamma(n + 1) - torch.lgamma(m + 1) - torch.lgamma((n - m).clamp(min=0) + 1)
    value = (ways + torch.special.xlogy(m, p) + torch.special.xlogy((n - m).clamp(min=0), 1 - p)).exp()
    return torch.where(m <= n, value, 0.0)


def step_matrix(kind: str, y: Tensor, r: float, most: int) -> Tensor:
    """The law of a step of `steps`: P(n' | n), float64, shape (most + 1, most + 1), [n', n].

    Args:
        kind: of the step.
        y: the mean that it is told at each count, (most + 1,).
        r: the share that is regained.
        most: the largest count.
    """
    y, counts = y.double(), torch.arange(most + 1, dtype=torch.float64)
    left = most - counts
    births = torch.zeros(most + 1, most + 1, dtype=torch.float64)  # [units gained, n]
    if kind == "tau-leap":
        rate = r * y.clamp(min=0)
        log = torch.special.xlogy(counts[:, None], rate) - rate - torch.lgamma(counts[:, None] + 1)
        births = log.exp()
    elif kind == "binomial":
        chance = (r * y / left.clamp(min=1)).clamp(0, 1)
        for n in range(most + 1):
            births[:, n] = binomial_matrix(most, chance[n])[:, most - n]
    else:
        table, kept = binomial_matrix(most, r), y.minimum(left).clamp(min=0)
        if kind == "bridge-round":
            births = table[:, y.round().minimum(left).clamp(min=0).long()]
        else:
            low, rest = kept.floor().long(), kept - kept.floor()
            births = table[:, low] * (1 - rest) + table[:, (low + 1).clamp(max=most)] * rest
    moved = torch.zeros_like(births)
    for n in range(most + 1):
        moved[n:, n] = births[: most + 1 - n, n]
        moved[most, n] += (1 - moved[:, n].sum()).clamp(min=0)  # what a leap overshoots by is cut off
    return moved

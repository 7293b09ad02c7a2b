r"""Continuous-time Markov chains on finitely many states, and the same chains seen backwards.

A chain leaves n for m at the rate Q[m, n]; columns of the generator Q sum to 0. With its clock at tau,

    P(tau) = exp(tau Q),   P(tau)[m, n] = P(x_tau = m | x_0 = n).

Backwards in time it is a Markov chain too, with rates that depend on the law p(tau) of the state (arXiv 2305.11089),

    Q_back(tau)[n, m] = Q[m, n] p_n(tau) / p_m(tau):

the ratio is what the score is to Gaussian diffusion. Given the state that a chain has begun in the ratio is known, and
the expectation over what x_tau tells of x_0 is the ratio of the law, so that a network can learn it by regression.

Blackout diffusion (`discrete.death`) is the chain `Death`. `Uniform` and `Absorbing` are the other two that discrete
diffusion models are made of (arXiv 2107.03006); `BirthDeath` takes any rates between neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from osmose.configuration import Config, ConfigError
from osmose.errors import UserError

#: Columns of a generator sum to 0 up to this share of the largest rate.
_ROUNDING = 1e-9


class MarkovChain:
    """A chain of a generator, float64: exact, for as many states as a matrix exponential is cheap for.

    Args:
        generator: Q, shape (S, S): rates from column to row, columns that sum to 0.

    Raises:
        UserError: not a square matrix, a negative rate, a column with another sum.
    """

    def __init__(self, generator: Tensor):
        q = generator.double()
        if q.ndim != 2 or q.shape[0] != q.shape[1] or not len(q):
            raise UserError(
                f"generator: shape {tuple(generator.shape)} is not valid: should be square, (states, states)"
            )
        rates = q - q.diagonal().diag()
        if not bool(q.isfinite().all()) or bool((rates < 0).any()):
            m, n = (int(i) for i in (~q.isfinite() | (rates < 0)).nonzero()[0])
            raise UserError(f"generator: the rate {float(q[m, n]):g} from state {n} to {m} is not valid: must be >= 0")
        sums = q.sum(0).abs()
        if float(sums.max()) > _ROUNDING * max(1.0, float(q.abs().max())):
            n = int(sums.argmax())
            raise UserError(
                f"generator: column {n} sums to {float(q[:, n].sum()):g}; what is gained is lost: 0 is right"
            )
        self.generator = q

    @property
    def num_states(self) -> int:
        """S."""
        return len(self.generator)

    def transition(self, tau: float) -> Tensor:
        """P(x_tau = m | x_0 = n), shape (S, S), [m, n].

        Raises:
            UserError: a negative time.
        """
        if tau < 0:
            raise UserError(f"tau: {tau} is not valid: must be at least 0")
        # What the exponential leaves of negative probabilities is rounding.
        p = torch.linalg.matrix_exp(self.generator * tau).clamp(min=0)
        return p / p.sum(0)

    def marginal(self, law: Tensor, tau: float) -> Tensor:
        """The law of x_tau, shape (S,), of chains that begin by a law (S,)."""
        return self.transition(tau) @ law.double()

    def reverse_rates(self, law: Tensor, tau: float) -> Tensor:
        """Rates of the chain backwards at tau, shape (S, S), [n, m] from m to n, with its own outflow on the diagonal.

        States that cannot have been reached have no rates.

        Args:
            law: of x_0, (S,); a single state for what is known given x_0.
            tau: the clock.
        """
        p = self.marginal(law, tau)
        rates = (self.generator - self.generator.diagonal().diag()).T * (p[:, None] / p[None])
        rates = torch.where(p[None] > 0, rates, 0.0)
        return rates - rates.sum(0).diag()

    def posterior(self, law: Tensor, tau: float) -> Tensor:
        """P(x_0 = k | x_tau = m), shape (S, S), [k, m]; 0 where m cannot be reached."""
        joint = (self.transition(tau) * law.double()).T
        return _conditional(joint)

    def bridge(self, s: float, t: float) -> Tensor:
        """P(x_s = n | x_t = m, x_0 = k), s <= t, shape (S, S, S), [k, m, n]; 0 where m cannot be reached from k.

        Raises:
            UserError: times that are not in order.
        """
        to_s, on = self.transition(s), self._between(s, t)
        joint = to_s.T[:, None, :] * on[None, :, :]  # [k, m, n]
        whole = joint.sum(2, keepdim=True)
        return torch.where(whole > 0, joint / whole, 0.0)

    def kernel(self, law: Tensor, s: float, t: float) -> Tensor:
        """P(x_s = n | x_t = m) of chains that begin by a law, shape (S, S), [n, m]: an exact step backwards.

        Raises:
            UserError: times that are not in order.
        """
        return _conditional(self.marginal(law, s)[:, None] * self._between(s, t).T)

    def _between(self, s: float, t: float) -> Tensor:
        if not 0 <= s <= t:
            raise UserError(f"s, t: {s:g}, {t:g} are not valid: should be 0 <= s <= t")
        return self.transition(t - s)

    def simulate(self, state: int, tau: float, generator: torch.Generator) -> list[tuple[float, int]]:
        """A path up to tau, jump by jump: the times of arrival and the states, the first at 0."""
        path, now = [(0.0, state)], 0.0
        while True:
            out = -float(self.generator[path[-1][1], path[-1][1]])
            if out <= 0:
                return path
            now += float(torch.empty((), dtype=torch.float64).exponential_(out, generator=generator))
            if now > tau:
                return path
            rates = self.generator[:, path[-1][1]].clamp(min=0)
            path.append((now, int(torch.multinomial(rates, 1, generator=generator))))


def _conditional(joint: Tensor) -> Tensor:
    """Columns divided by their sums; 0 where a column has none."""
    whole = joint.sum(0)
    return torch.where(whole > 0, joint / whole, 0.0)


class Process(Config, ABC):
    """How the levels 0..levels-1 of a value are corrupted: a chain, and where it ends."""

    kind: str

    def states(self, levels: int) -> int:
        """Number of states of a value with so many levels."""
        return levels

    @abstractmethod
    def generator(self, levels: int) -> Tensor:
        """Q, float64, shape (states, states).

        Raises:
            UserError: rates that are not those of so many levels.
        """

    @abstractmethod
    def end(self, levels: int) -> Tensor:
        """The law of the state in the end, float64 (states,)."""

    def chain(self, levels: int) -> MarkovChain:
        """The chain."""
        return MarkovChain(self.generator(levels))


class Death(Process):
    """n loses units at the rate n: each of them lives for a time of mean 1, by itself, so that x_tau is Binomial."""

    kind: Literal["death"] = "death"

    def generator(self, levels: int) -> Tensor:
        n = torch.arange(levels, dtype=torch.float64)
        return n[1:].diag(1) - n.diag()

    def end(self, levels: int) -> Tensor:
        return _at(0, levels)


class Uniform(Process):
    """Every state jumps to a state at random, itself included, at the rate 1."""

    kind: Literal["uniform"] = "uniform"

    def generator(self, levels: int) -> Tensor:
        return torch.full((levels, levels), 1 / levels, dtype=torch.float64) - torch.eye(levels, dtype=torch.float64)

    def end(self, levels: int) -> Tensor:
        return torch.full((levels,), 1 / levels, dtype=torch.float64)


class Absorbing(Process):
    """Every level jumps at the rate 1 to one more state, the last, that says nothing; and stays there."""

    kind: Literal["absorbing"] = "absorbing"

    def states(self, levels: int) -> int:
        return levels + 1

    def generator(self, levels: int) -> Tensor:
        q = torch.zeros(levels + 1, levels + 1, dtype=torch.float64)
        q[levels, :levels] = 1.0
        return q - q.sum(0).diag()

    def end(self, levels: int) -> Tensor:
        return _at(levels, levels + 1)


class BirthDeath(Process):
    """Level n jumps to n + 1 at the rate births[n] and to n - 1 at the rate deaths[n - 1]."""

    kind: Literal["birth-death"] = "birth-death"
    births: tuple[float, ...] = Field(description="rates from 0 to 1, 1 to 2, ...: one less than there are levels")
    deaths: tuple[float, ...] = Field(description="rates from 1 to 0, 2 to 1, ...: as many")

    @model_validator(mode="after")
    def _rates(self) -> BirthDeath:
        for name in ("births", "deaths"):
            for rate in getattr(self, name):
                if rate < 0:
                    raise ConfigError(name, f"{rate} is not valid: must be at least 0")
        if len(self.births) != len(self.deaths):
            raise ConfigError("deaths", f"{len(self.deaths)} rates given beside {len(self.births)} births; as many")
        if not any(self.births) and not any(self.deaths):
            raise ConfigError("births", "all rates are 0: nothing would be corrupted")
        return self

    def generator(self, levels: int) -> Tensor:
        if len(self.births) != levels - 1:
            raise UserError(f"process.births: {len(self.births)} rates given for {levels} levels; {levels - 1} needed")
        births, deaths = (torch.tensor(rates, dtype=torch.float64) for rates in (self.births, self.deaths))
        q = births.diag(-1) + deaths.diag(1)
        return q - q.sum(0).diag()

    def end(self, levels: int) -> Tensor:
        """The law that the chain leaves as it is; where one state is never left, that state.

        Raises:
            UserError: levels that fall apart into sets that are never left, so that there are many such laws.
        """
        q = self.generator(levels)
        # The null vector of Q: the smallest singular value's.
        _, sizes, rows = torch.linalg.svd(q)
        if levels > 1 and float(sizes[-2]) <= _ROUNDING * float(sizes[0]):
            raise UserError("process: there are levels between which no jumps lead, and the chain has no single end")
        law = rows[-1].abs()
        return law / law.sum()


def _at(state: int, states: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(state), states).double()

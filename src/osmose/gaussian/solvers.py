r"""Solvers: how x_t at one level becomes x_s at the next quieter one, given E[x0 | x_t].

All work on any schedule through the ratio r = sigma / alpha, in which the probability-flow ODE is
d(x / alpha) / dr = eps (arXiv 2010.02502, eq. 14). Coefficients are Python floats computed once a step; noise is asked
for only where its factor is not zero; there is no progress bar inside: callers iterate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal, NamedTuple, Protocol, cast

from pydantic import Field
from torch import Tensor

from osmose.configuration import Config
from osmose.gaussian.chain import Variance, reverse_step
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import Level

DrawNoise = Callable[[], Tensor]

#: The noise-to-signal ratio r above which Heun's rule is applied in 1 / r.
LOUD = 100.0


class Denoise(Protocol):
    """E[x0 | x_t] of a batch at a level."""

    def __call__(self, x_t: Tensor, level: Level[float], /) -> Tensor:
        """The denoised batch, in the shape of x_t."""


class DenoiseWithVariance(Denoise, Protocol):
    """A denoiser that knows the variance of the reverse chain as well."""

    def with_variance(self, x_t: Tensor, level: Level[float], /) -> tuple[Tensor, Tensor]:
        """The denoised batch, and where the log-variance lies between its ends, both in the shape of x_t."""


class State(NamedTuple):
    """What a solver has after one step: x at the new level, and the denoised estimate it was made from."""

    x: Tensor
    x0: Tensor


class Solver(Config, ABC):
    """A way from noise to data.

    Attributes:
        order: global order of convergence to the exact flow in the number of steps; 0 for a stochastic chain,
            which has no flow to converge to.
    """

    kind: str
    order: ClassVar[int]

    @abstractmethod
    def run(self, denoise: Denoise, x: Tensor, grid: TimeGrid, noise: DrawNoise) -> Iterator[State]:
        """Yield the state after each step, `grid.num_steps` in all.

        Args:
            denoise: E[x0 | x_t] at a level.
            x: shape (B, *event), a sample at `grid.levels[0]`.
            grid: the levels to visit.
            noise: draws a standard noise of x's shape.
        """

    @property
    def needs_learned_variance(self) -> bool:
        """Whether `run` needs a `DenoiseWithVariance`."""
        return False

    def evaluations(self, num_steps: int) -> int:
        """Number of calls of `denoise` in `num_steps` steps."""
        return num_steps

    def warning(self, num_steps: int, native_steps: int | None) -> str | None:  # noqa: ARG002
        """A sentence for a choice that is allowed but known to do badly, or None."""
        return None


class Ancestral(Solver):
    """DDPM's reverse chain (arXiv 2006.11239), strided as in improved DDPM (arXiv 2102.09672, section 4).

    x_s ~ N(mean of q(x_s | x_t, x0), variance); `fixed_small` is that posterior's own variance, `fixed_large` is
    q(x_t | x_s)'s, `learned_range` lies between them where the network says (`gaussian.chain`). The last step adds no
    noise.
    """

    kind: Literal["ancestral"] = "ancestral"
    order: ClassVar[int] = 0
    variance: Variance = "fixed_small"

    @property
    def needs_learned_variance(self) -> bool:
        return self.variance == "learned_range"

    def run(self, denoise: Denoise, x: Tensor, grid: TimeGrid, noise: DrawNoise) -> Iterator[State]:
        for t, s in grid.steps():
            step = reverse_step(t, s)
            if self.variance == "learned_range":
                x0, share = cast(DenoiseWithVariance, denoise).with_variance(x, t)
            else:
                x0, share = denoise(x, t), None
            x = x.mul(step.keep).add_(x0, alpha=step.pull)
            if s.sigma > 0 and share is not None:
                log_ratio = math.log(step.beta / step.btilde)
                x.addcmul_(noise(), share.mul(log_ratio / 2).exp_(), value=step.btilde**0.5)
            elif s.sigma > 0:
                x.add_(noise(), alpha=(step.btilde if self.variance == "fixed_small" else step.beta) ** 0.5)
            yield State(x, x0)

    def warning(self, num_steps: int, native_steps: int | None) -> str | None:
        if self.variance == "fixed_large" and (native_steps is None or num_steps < native_steps):
            return (
                f"fixed_large variance with {num_steps} of {native_steps or 'infinitely many'} steps leaves noise in "
                "the samples; fixed_small or ddim do better on short chains"
            )
        return None


class DDIM(Solver):
    """DDIM (arXiv 2010.02502, eq. 12): deterministic at eta = 0, strided `fixed_small` ancestral at eta = 1."""

    kind: Literal["ddim"] = "ddim"
    order: ClassVar[int] = 1
    eta: float = Field(0.0, ge=0, le=1, description="share of the ancestral noise")

    def run(self, denoise: Denoise, x: Tensor, grid: TimeGrid, noise: DrawNoise) -> Iterator[State]:
        for t, s in grid.steps():
            x0 = denoise(x, t)
            fresh = self.eta * s.sigma / t.sigma * reverse_step(t, s).beta ** 0.5
            keep = max(s.sigma**2 - fresh**2, 0.0) ** 0.5 / t.sigma  # at eta = 1 the difference may round below 0
            x = x.mul(keep).add_(x0, alpha=s.alpha - keep * t.alpha)
            if fresh > 0:
                x.add_(noise(), alpha=fresh)
            yield State(x, x0)


class Heun(Solver):
    """EDM's deterministic solver (arXiv 2206.00364, algorithm 1): trapezoidal rule in r; the last step is Euler's.

    At r > 100, beyond EDM's range, where alpha may be 0 and a first step of `cosine` falls from 20000 to 10, the rule
    is applied in 1 / r: in r it would multiply the difference of the two estimates by as much.
    """

    kind: Literal["heun"] = "heun"
    order: ClassVar[int] = 2

    def run(self, denoise: Denoise, x: Tensor, grid: TimeGrid, noise: DrawNoise) -> Iterator[State]:  # noqa: ARG002
        for t, s in grid.steps():
            x0 = denoise(x, t)
            keep = s.sigma / t.sigma
            predicted = x.mul(keep).add_(x0, alpha=s.alpha - keep * t.alpha)
            if s.sigma == 0:
                x = predicted
            elif t.sigma <= LOUD * t.alpha:
                eps = (x - t.alpha * x0).div_(t.sigma)
                eps.add_((predicted - s.alpha * denoise(predicted, s)).div_(s.sigma)).div_(2)
                ratio = s.alpha / t.alpha
                x = x.mul(ratio).add_(eps, alpha=s.sigma - ratio * t.sigma)
            else:  # d(x / sigma) / d(1 / r) = x0
                x = x.mul(keep).add_((x0 + denoise(predicted, s)).div_(2), alpha=s.alpha - keep * t.alpha)
            yield State(x, x0)

    def evaluations(self, num_steps: int) -> int:
        return 2 * num_steps - 1


class DPMSolverPP2M(Solver):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): multistep in log(alpha / sigma); first order at the end."""

    kind: Literal["dpmpp-2m"] = "dpmpp-2m"
    order: ClassVar[int] = 2

    def run(self, denoise: Denoise, x: Tensor, grid: TimeGrid, noise: DrawNoise) -> Iterator[State]:  # noqa: ARG002
        before: tuple[Tensor, float] | None = None
        for t, s in grid.steps():
            x0 = denoise(x, t)
            keep = s.sigma / t.sigma
            gain = s.alpha - keep * t.alpha
            x = x.mul(keep)
            h = math.inf
            if s.sigma > 0 and t.alpha > 0:
                h = math.log(s.alpha / s.sigma) - math.log(t.alpha / t.sigma)
            if before is not None and h < math.inf and before[1] < math.inf:
                slope = h / (2 * before[1])
                x.add_(x0, alpha=gain * (1 + slope)).sub_(before[0], alpha=gain * slope)
            else:
                x.add_(x0, alpha=gain)
            before = (x0, h)
            yield State(x, x0)

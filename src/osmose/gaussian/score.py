r"""The score of noisy data, for any schedule in the same coordinates.

Whatever the schedule, x_t / alpha = x0 + r eps with the ratio of noise to signal r = sigma / alpha. In these
coordinates, those of a variance-exploding process, a denoiser D(y, r) = E[x0 | y] gives

    score       s     = grad log p_r(y) = (D - y) / r^2
    noise       eps   = (y - D) / r
    flow        dy / d(log r) = y - D,    the probability-flow ODE, forwards from data to noise
    its rate    d(log p_r(y)) / d(log r) = -div(y - D) = tr J_D - D   along the flow (J_D = dD / dy)

so that what is said of one run can be compared with another's, and the closed forms are the shortest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from osmose.errors import UserError
from osmose.gaussian.denoiser import Denoiser
from osmose.gaussian.parametrization import column
from osmose.gaussian.schedule import Schedule

#: D(y, r, condition): shape (B, *event) from that shape, ratios float64 (B,), and classes (B,) or None.
Estimate = Callable[[Tensor, Tensor, Tensor | None], Tensor]

#: Where alpha vanishes, the ratio of the last time that samples begin at.
_NEAR_NOISE = 1 - 1e-3
_NEAR_DATA = 1e-3


@dataclass(frozen=True)
class ScoreField:
    """What is known of the score of data under noise, y = x0 + r eps.

    Attributes:
        estimate: D(y, r, condition).
        lowest: the smallest ratio that it was made for.
        highest: the largest.
        prior_std: deviation of y at `highest` where samples begin.
        condition: classes of the items that it is evaluated at, or None.
    """

    estimate: Estimate
    lowest: float
    highest: float
    prior_std: float
    condition: Tensor | None = None

    def given(self, condition: Tensor | None) -> ScoreField:
        """The same for items of some classes, int64 (B,)."""
        return replace(self, condition=condition)

    def denoised(self, y: Tensor, ratio: Tensor | float) -> Tensor:
        """E[x0 | y], shape of y (B, *event); the ratio is one, or float64 (B,)."""
        ratios = torch.as_tensor(ratio, dtype=torch.float64).expand(len(y))
        return self.estimate(y, ratios, self.condition)

    def at(self, ratio: float) -> Callable[[Tensor], Tensor]:
        """The denoiser at one ratio."""
        return lambda y: self.denoised(y, ratio)

    def score(self, y: Tensor, ratio: Tensor | float) -> Tensor:
        """Grad log p_r(y) = (D - y) / r^2, shape of y."""
        return (self.denoised(y, ratio) - y) * column(ratio**-2, y)

    def noise(self, y: Tensor, ratio: Tensor | float) -> Tensor:
        """E[eps | y] = (y - D) / r, shape of y."""
        return (y - self.denoised(y, ratio)) * column(1 / ratio, y)

    def require(self, ratio: float, name: str = "ratios") -> None:
        """Refuse a ratio that the field was not made for.

        Raises:
            UserError: naming the range.
        """
        if not self.lowest * (1 - 1e-6) <= ratio <= self.highest * (1 + 1e-6):
            raise UserError(
                f"{name}: {ratio:g} is not valid: the noise-to-signal ratios that the run was trained at are "
                f"{self.lowest:.3g} to {self.highest:.3g}"
            )

    def ratios(self, count: int, low: float = 0.0, high: float = math.inf) -> Tensor:
        """So many ratios, rising evenly in their logarithm, from `low` to `high` as far as the field knows them."""
        ends = math.log(max(self.lowest, low)), math.log(min(self.highest, high))
        return torch.linspace(*ends, count, dtype=torch.float64).exp()

    def known(self, ratios: Sequence[float]) -> Tensor:
        """Some ratios, float64, rising, each once.

        Raises:
            UserError: none, or one that is no positive number or that the field was not made for.
        """
        if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
            said = ", ".join(f"{ratio:g}" for ratio in ratios) or "none"
            raise UserError(f"ratios: {said} is not valid: should be one or more numbers above 0")
        for ratio in ratios:
            self.require(ratio)
        return torch.tensor(sorted(set(ratios)), dtype=torch.float64)


def score_field(denoiser: Denoiser, schedule: Schedule) -> ScoreField:
    """The field of a denoiser on a schedule.

    Between two steps of a schedule in steps the denoiser is asked as its label continues; its lowest ratio is that of
    the first step, and of a schedule that reaches clean data that at t = 0.001.
    """
    first = 1 / schedule.native_steps if schedule.native_steps else 0.0 if float(schedule.sigma(0.0)) else _NEAR_DATA
    last = 1.0 if float(schedule.alpha(1.0)) > 0 else _NEAR_NOISE
    low, high = schedule.level(first), schedule.level(last)

    def estimate(y: Tensor, ratios: Tensor, condition: Tensor | None) -> Tensor:
        level = schedule.level(schedule.time_of(-2 * ratios.log()))
        return denoiser(y * column(level.alpha, y), level, condition)

    # What samples begin with at t = 1; where alpha is 0 there, the data of unit variance have a trace at `last`.
    begin = schedule.prior_std if last == 1.0 else high.size
    return ScoreField(estimate, float(low.sigma / low.alpha), float(high.sigma / high.alpha), begin / float(high.alpha))

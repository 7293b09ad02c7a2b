r"""Densities by the probability-flow ODE, each item with steps of its own (arXiv 2011.13456, section 4.3).

In the coordinates of `gaussian.score`, with tau = log r,

    dy / dtau = y - D(y, r),    d log p_r(y) / dtau = tr J_D - D,

from the data's end, where y is given, to `highest`, where y ~ N(0, prior_std^2 I). The pair of Dormand and Prince, of
orders 5 and 4, chooses the steps. Items do not share them: what is said of one does not depend on the others, and one
that needs small steps costs no other evaluations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from osmose.errors import UserError
from osmose.gaussian.derivatives import with_divergence
from osmose.gaussian.parametrization import column
from osmose.gaussian.score import ScoreField

#: Places and weights of the stages (Dormand and Prince 1980); the last row is the step itself, its end the next start.
_PLACES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
#: Weights of the difference of the two orders.
_DIFFERENCE = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
#: First step in log r, and the shortest there is.
_FIRST, _SHORTEST = 0.1, 1e-5
#: Noise below which positions need not be more exact than at this ratio: networks compute in float32.
_RESOLUTION = 0.01


@dataclass(frozen=True)
class Density:
    """log p of n items, in nats.

    Attributes:
        log_p: in the coordinates of the items given, float64 (n,).
        solver_error: sum of the sizes of the steps' estimated errors in it, (n,): above the true one at tolerances of
            0.001 and below.
        probe_error: standard error over Hutchinson's probes, (n,); 0 of exact traces, NaN of a single probe.
        evaluations: of the network, of each item, int64 (n,).
        end: y at `highest`, (n, *event).
    """

    log_p: Tensor
    solver_error: Tensor
    probe_error: Tensor
    evaluations: Tensor
    end: Tensor


def log_density(
    field: ScoreField,
    y: Tensor,
    ratio: float | None = None,
    *,
    signs: Tensor | None = None,
    tolerance: float = 1e-4,
) -> Density:
    """The density of y under noise of a ratio.

    Args:
        field: of the model, or a closed form.
        y: shape (n, *event).
        ratio: noise-to-signal ratio that y is taken to have; the lowest of the field if None.
        signs: random signs (probes, n, *event), for Hutchinson's traces: drawn once and kept along the way, so that the
            estimate is that of one smooth function; exact traces if None.
        tolerance: error of a step, of positions relative to the noise and of log p in nats per dimension.

    Raises:
        UserError: a ratio or a tolerance that is not valid; steps that become too short, a network that is not
            finite.
    """
    if not 1e-9 <= tolerance <= 0.1:
        raise UserError(f"tolerance: {tolerance:g} is not valid: must be between 1e-9 and 0.1")
    ratio = field.lowest if ratio is None else ratio
    field.require(ratio, "ratio")
    return _Integration(field, y, signs, tolerance).run(math.log(ratio))


class _Integration:
    """Items on their way: those that have not arrived are `rows`."""

    def __init__(self, field: ScoreField, y: Tensor, signs: Tensor | None, tolerance: float):
        self.field, self.signs, self.tolerance = field, signs, tolerance
        # Steps are taken in float64 on the CPU, which not every device has; the network sees its own precision.
        self.y, self.dimension = y.cpu().double().clone(), y[0].numel()
        self.like = y
        count = 1 if signs is None else len(signs)
        self.gained = torch.zeros(count, len(y), dtype=torch.float64)
        self.error = torch.zeros(len(y), dtype=torch.float64)
        self.evaluations = torch.zeros(len(y), dtype=torch.int64)

    def _slope(self, rows: Tensor, tau: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Dy / dtau and, by each probe, d log p / dtau (probes, rows)."""
        field = self.field
        if field.condition is not None:
            field = field.given(field.condition[rows.to(field.condition.device)])
        signs = None if self.signs is None else self.signs[:, rows.to(self.signs.device)]
        x = y.to(self.like)
        denoised, trace = with_divergence(lambda moved: field.denoised(moved, tau.exp()), x, signs)
        self.evaluations[rows] += 1
        return y - denoised.cpu().double(), trace - self.dimension

    def run(self, start: float) -> Density:
        end, count = math.log(self.field.highest), len(self.y)
        tau = torch.full((count,), start, dtype=torch.float64)
        step = torch.full((count,), min(_FIRST, max(end - start, 1e-12)), dtype=torch.float64)
        rows = torch.arange(count) if start < end else torch.arange(0)
        slopes = self._slope(rows, tau[rows], self.y[rows]) if len(rows) else None
        while slopes is not None and len(rows):
            here, h = self.y[rows], step[rows]
            moved, gain, worst, slip, last = self._try(rows, tau[rows], h, here, slopes)
            if not bool(worst.isfinite().all()):
                raise UserError("likelihood: the network answers with NaN or infinity along the flow")
            kept = worst <= 1
            done = rows[kept]
            self.y[done] = moved[kept]
            self.gained[:, done] += gain[:, kept]
            self.error[done] += slip[kept]
            tau[done] += h[kept]
            slopes[0][kept] = last[0][kept]
            slopes[1][:, kept] = last[1][:, kept]
            step[rows] = h * (0.9 * worst.clamp(min=1e-10) ** -0.2).clamp(0.2, 5)
            if float(step[rows].min()) < _SHORTEST:
                raise UserError(
                    f"tolerance: {self.tolerance:g} cannot be reached: steps of the ODE become too short; take a "
                    "larger one"
                )
            left = tau[rows] < end - 1e-9
            step[rows] = torch.minimum(step[rows], (end - tau[rows]).clamp(min=_SHORTEST))
            rows = rows[left]
            slopes = (slopes[0][left], slopes[1][:, left])
        return self._result()

    def _try(
        self, rows: Tensor, tau: Tensor, h: Tensor, y: Tensor, first: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """One step of each row: y there, what log p gains, the error as a share of what is allowed, that of log p."""
        moves, gains = [first[0]], [first[1]]
        across = column(h, y)
        moved, gain = y, torch.zeros_like(first[1])
        for place, weights in zip(_PLACES[1:], _STAGES[1:], strict=True):
            moved = y + across * _sum(weights, moves)
            gain = h * _sum(weights, gains)
            move, rate = self._slope(rows, tau + place * h, moved)
            moves.append(move)
            gains.append(rate)
        off, ratio = (across * _sum(_DIFFERENCE, moves)).flatten(1), (tau + h).exp()
        # An error of the place is one of log p as well, by the score there, (D - y) / r^2.
        climbed = -(off * moves[-1].flatten(1)).sum(1) / ratio**2
        slip = (climbed - (h * _sum(_DIFFERENCE, gains)).mean(0)).abs()
        size = ratio.clamp(min=_RESOLUTION)
        worst = torch.maximum(off.square().mean(1).sqrt() / size, slip / self.dimension) / self.tolerance
        return moved, gain, worst, slip, (moves[-1], gains[-1])

    def _result(self) -> Density:
        std = self.field.prior_std
        z = (self.y.flatten(1) / std).square().sum(1)
        prior = -(z + self.dimension * math.log(2 * math.pi * std**2)) / 2
        count = len(self.gained)
        unknown = torch.full_like(prior, math.nan)
        # Along the way log p rises by `gained`: at the start it was less than at the end.
        return Density(
            log_p=prior - self.gained.mean(0),
            solver_error=self.error,
            probe_error=(
                torch.zeros_like(prior)
                if self.signs is None
                else unknown
                if count == 1
                else self.gained.std(0) / math.sqrt(count)
            ),
            evaluations=self.evaluations,
            end=self.y.to(self.like),
        )


def _sum(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    total = values[0] * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        if weight:
            total = total + weight * value
    return total

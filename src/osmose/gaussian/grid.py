"""Sampling grids: which points of a schedule a solver visits. The only place that computes a previous time.

A grid of `num_steps` steps has `num_steps + 1` levels from the noisiest to `CLEAN`; the network is evaluated at all
but the last.

Spacings (T is the length of a discrete schedule, S the 1-based steps kept):

=========== ========================================================================================================
even        discrete: 1 + round(linspace(0, T - 1, K)), improved DDPM's. Continuous: uniform in t.
leading     1 + i (T // K), DDIM's uniform stride: contains the first step, not the last.
trailing    round(T - i T / K), contains the last step.
quadratic   1 + floor(linspace(0, sqrt(0.8 T), K)^2), DDIM's quadratic grid: starts near 0.8 T.
log-snr     uniform in log(alpha / sigma), DPM-Solver's.
karras      uniform in (sigma / alpha)^(1/7), EDM's eq. 5.
equal-mass  quantiles of EDM's law of training noise, log(sigma / alpha) ~ N(-1.2, 1.2^2) (arXiv 2506.14202).
=========== ========================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from osmose.errors import UserError
from osmose.gaussian.schedule import CLEAN, Level, Schedule

Spacing = Literal["even", "leading", "trailing", "quadratic", "log-snr", "karras", "equal-mass"]
_KARRAS_RHO = 7.0
#: EDM's law of training noise: log(sigma / alpha) is normal with this mean and deviation.
LAW_MEAN, LAW_STD = -1.2, 1.2


@dataclass(frozen=True)
class TimeGrid:
    """Levels of decreasing noise; `levels[-1]` is `CLEAN`. Coefficients are Python floats, computed in float64."""

    levels: tuple[Level[float], ...]

    @property
    def num_steps(self) -> int:
        """Number of solver steps."""
        return len(self.levels) - 1

    def steps(self) -> Iterator[tuple[Level[float], Level[float]]]:
        """Pairs (from, to), noisiest first."""
        yield from zip(self.levels, self.levels[1:], strict=False)

    @classmethod
    def of(cls, schedule: Schedule, num_steps: int, spacing: Spacing = "even") -> TimeGrid:
        """Lay `num_steps` steps over a schedule.

        Raises:
            UserError: fewer than one step, more than the schedule has, or a spacing that the schedule does not have.
        """
        total = schedule.native_steps
        if num_steps < 1:
            raise UserError(f"num_steps: {num_steps} is not valid: must be at least 1")
        if total is not None and num_steps > total:
            raise UserError(f"num_steps: {num_steps} is more than the {total} steps that the schedule has")
        if spacing in ("log-snr", "karras", "equal-mass"):
            return cls.at(schedule, _continuous(schedule, num_steps, spacing))
        if total is not None:
            return cls.at(schedule, torch.tensor(strided(total, num_steps, spacing)).flip(0).double() / total)
        if spacing != "even":
            raise UserError(
                f"spacing: {spacing!r} needs a schedule with discrete steps; use even, log-snr, karras or equal-mass"
            )
        # A schedule that ends above zero noise (EDM's sigma_min) is evaluated at its end, others stop one step before.
        ends_noisy = float(schedule.sigma(0.0)) > 0
        t = torch.linspace(1, 0, num_steps + (0 if ends_noisy else 1), dtype=torch.float64)
        return cls.at(schedule, t[:num_steps])

    @classmethod
    def at(cls, schedule: Schedule, t: Tensor) -> TimeGrid:
        """The grid through the given times, which must decrease strictly, and then to clean data.

        Raises:
            ValueError: times that do not decrease, or that reach clean data before the end.
        """
        if bool((t.diff() >= 0).any()):
            raise ValueError(f"times must decrease strictly, got {t.tolist()}")
        level = schedule.level(t)
        columns = (column.tolist() for column in level)
        levels = tuple(Level(*row) for row in zip(*columns, strict=True))
        if any(level.sigma <= 0 for level in levels):
            raise ValueError("only the end of a grid may be without noise")
        return cls((*levels, CLEAN))


def strided(total: int, num_steps: int, spacing: Spacing) -> list[int]:
    """The steps S_1 < ... < S_K out of 1..T that a discrete spacing keeps.

    Raises:
        UserError: the spacing yields fewer than `num_steps` different steps.
    """
    i = torch.arange(num_steps, dtype=torch.float64)
    if num_steps == 1:
        steps = torch.tensor([float(total)])
    elif spacing == "even":
        steps = 1 + torch.linspace(0, total - 1, num_steps, dtype=torch.float64).round()
    elif spacing == "leading":
        steps = 1 + i * (total // num_steps)
    elif spacing == "trailing":
        steps = (total - i * (total / num_steps)).round().flip(0)
    elif spacing == "quadratic":
        steps = 1 + (torch.linspace(0, (0.8 * total) ** 0.5, num_steps, dtype=torch.float64) ** 2).floor()
    else:
        raise UserError(f"spacing: {spacing!r} has no discrete steps")
    kept = [int(step) for step in steps]
    if len(set(kept)) < num_steps:
        raise UserError(f"spacing: {spacing!r} has only {len(set(kept))} different steps of {total} for {num_steps}")
    return kept


def _continuous(schedule: Schedule, num_steps: int, spacing: Spacing) -> Tensor:
    # The quietest level that the network was trained on; at t = 0 most schedules have no noise at all.
    last = 1 / schedule.native_steps if schedule.native_steps else (0.0 if float(schedule.sigma(0.0)) > 0 else 1e-3)
    # The loudest: where alpha vanishes log_snr is infinite.
    first = 1.0 if float(schedule.alpha(1.0)) > 0 else 1 - 1e-3
    low, high = (float(schedule.log_snr(t)) for t in (first, last))
    if num_steps == 1:
        return torch.tensor([first], dtype=torch.float64)
    if spacing == "log-snr":
        log_snr = torch.linspace(low, high, num_steps, dtype=torch.float64)
    elif spacing == "equal-mass":
        ends = (torch.tensor([low, high], dtype=torch.float64) / -2 - LAW_MEAN) / LAW_STD
        first_share, last_share = torch.special.ndtr(ends).tolist()
        share = torch.linspace(first_share, last_share, num_steps, dtype=torch.float64)
        log_snr = -2 * (LAW_MEAN + LAW_STD * torch.special.ndtri(share))
    else:
        ratio = torch.tensor([low, high], dtype=torch.float64).div(-2 * _KARRAS_RHO).exp()
        root = torch.linspace(float(ratio[0]), float(ratio[1]), num_steps, dtype=torch.float64)
        log_snr = -2 * _KARRAS_RHO * root.log()
    t = schedule.time_of(log_snr)
    t[0], t[-1] = first, last
    return t

"""Whether a claim holds here: comparisons of a few seeds that say so when they cannot tell.

Runs of the same seed share their noise, so two configurations are compared by the differences seed by seed, and the
uncertainty of the mean difference is Student's t interval at 95 %: mean ± t s / sqrt(n). With 3 seeds t is 4.30, with 5
it is 2.78; a single seed has no interval and leaves everything inconclusive but facts that do not vary (`within`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]


@dataclass(frozen=True)
class Finding:
    """What a check found: the verdict, and the numbers that it rests on, in words."""

    verdict: Verdict
    evidence: str


def lower(a: ArrayLike, b: ArrayLike, margin: float = 0.0) -> Finding:
    """The claim that `a` is below `b` by more than `margin`.

    Reproduced if the whole interval of `a - b` is below `-margin`, not reproduced if all of it is at or above.

    Args:
        a: one value per seed, shape (n,), or one number.
        b: as `a` and in the same order of seeds, or one number.
        margin: at least 0, in the values' units.

    Raises:
        ValueError: shapes that do not belong together, or values that are not finite.
    """
    a, b, difference = _paired(a, b)
    low, high = interval(difference)
    verdict: Verdict = "reproduced" if high < -margin else "not reproduced" if low >= -margin else "inconclusive"
    return Finding(verdict, _comparison(a, b, difference) + (f"; margin {margin:g}" if margin else ""))


def same(a: ArrayLike, b: ArrayLike, within: float) -> Finding:
    """The claim that `a` and `b` differ by at most `within`.

    Reproduced if the whole interval of `a - b` lies in [-within, within], not reproduced if all of it lies outside.

    Args:
        a: one value per seed, shape (n,).
        b: as `a` and in the same order of seeds, or one number.
        within: largest difference that counts as none, in the values' units.

    Raises:
        ValueError: shapes that do not belong together, or values that are not finite.
    """
    a, b, difference = _paired(a, b)
    low, high = interval(difference)
    inside, outside = -within <= low and high <= within, low > within or high < -within
    verdict: Verdict = "reproduced" if inside else "not reproduced" if outside else "inconclusive"
    return Finding(verdict, f"{_comparison(a, b, difference)}; allowed ±{within:g}")


def within(value: float, low: float, high: float) -> Finding:
    """The claim that a number that does not vary with the seed (a count, a ratio of sizes) is in [low, high]."""
    holds = low <= value <= high
    return Finding("reproduced" if holds else "not reproduced", f"{value:.4g}; claimed {low:g} to {high:g}")


def all_of(*findings: Finding) -> Finding:
    """The claim that every part holds: not reproduced if one part is not, inconclusive if one part is."""
    verdicts = {finding.verdict for finding in findings}
    verdict: Verdict = "reproduced"
    if "not reproduced" in verdicts:
        verdict = "not reproduced"
    elif "inconclusive" in verdicts:
        verdict = "inconclusive"
    return Finding(verdict, "; ".join(f"({i}) {finding.evidence}" for i, finding in enumerate(findings, 1)))


def interval(values: ArrayLike) -> tuple[float, float]:
    """Student's 95 % interval of the mean of n values; the whole line when n is 1."""
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if count < 2:
        return -math.inf, math.inf
    half = t_quantile(count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()) - half, float(values.mean()) + half


@lru_cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The t with P(|T| < t) = level for Student's law with `freedom` degrees of freedom.

    With T = sqrt(freedom) tan(u) the density of u is proportional to cos(u)^(freedom - 1); it is summed up here, which
    is exact to about 1e-8 and spares a dependency on scipy.
    """
    u = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(u) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, mass / mass[-1], u)))


def mean_and_spread(values: Sequence[float] | np.ndarray) -> str:
    """`mean ± standard deviation` over seeds, with as many digits as the deviation bears; the value alone for n = 1."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.4g}"
    std = float(np.std(values, ddof=1))
    if std <= 1e-9 * abs(mean):
        return f"{mean:.4g} ± 0"
    return f"{_rounded(mean, std)} ± {_rounded(std, std)}"


def _rounded(value: float, std: float) -> str:
    """To two digits of `std`."""
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{value:.{decimals}f}" if decimals <= 6 else f"{value:.3g}"


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim == 0:
        a = np.full(b.shape or 1, a)
    if a.ndim != 1 or b.shape not in ((), a.shape):
        raise ValueError(f"shapes {a.shape} and {b.shape} cannot be compared seed by seed")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("values that are not finite cannot be compared")
    return a, b, a - b


def _comparison(a: np.ndarray, b: np.ndarray, difference: np.ndarray) -> str:
    other = f"{float(b):.4g}" if b.ndim == 0 else mean_and_spread(b)
    if len(a) < 2:
        return f"{mean_and_spread(a)} against {other}, difference {float(difference[0]):.3g}; 1 seed has no interval"
    low, high = interval(difference)
    mean = float(difference.mean())
    numbers = f"difference {mean:.3g}, 95 % interval {low:.3g} to {high:.3g} (n = {len(a)})"
    return f"{mean_and_spread(a)} against {other}, {numbers}"

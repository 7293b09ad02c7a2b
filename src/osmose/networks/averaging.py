"""The weight of the newest term in an exponential average without bias."""

from __future__ import annotations


def newest_share(decay: float, updates: int) -> float:
    """(1 - decay) / (1 - decay^n): the share that the n-th term of an average takes, counted from 1.

    With it the average after n terms is sum_i decay^(n - i) x_i, normalised to weights that sum to 1. This is Adam's
    bias correction (arXiv 1412.6980, section 3) applied to weights: what the average began with has no share.
    """
    return (1 - decay) / (1 - decay**updates) if decay > 0 else 1.0

"""Distances between generated samples x (n, d) and real samples y (m, d), on matrices and nothing else, in float64.

Everything that the floor offers on matrices can be imported from here, wherever it is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.errors import UserError
from osmose.metrics.kernels import Estimate, energy_distance, kernel_distance, mmd, two_sample
from osmose.metrics.matrices import matrix, pair, seeded
from osmose.metrics.moments import Moments, frechet_distance, frechet_standard_error
from osmose.metrics.neighbours import nearest_neighbour_ratio, precision_recall, ratio_of_medians

__all__ = [
    "Estimate",
    "Moments",
    "crps_ensemble",
    "energy_distance",
    "frechet_distance",
    "frechet_standard_error",
    "inception_score",
    "kernel_distance",
    "mmd",
    "nearest_neighbour_ratio",
    "precision_recall",
    "project",
    "ratio_of_medians",
    "sliced_wasserstein",
    "total_variation",
    "two_sample",
    "wasserstein_of_projections",
]


def project(x: Tensor, num_directions: int, seed: int) -> Tensor:
    """Projections of x (n, d) on random unit directions, shape (n, num_directions); same seed, same directions."""
    directions = torch.randn(x.shape[1], num_directions, generator=seeded(seed), dtype=torch.float64).to(x.device)
    return x @ (directions / directions.norm(dim=0))


def sliced_wasserstein(x: Tensor, y: Tensor, p: float = 2, num_directions: int = 200, seed: int = 0) -> float:
    """(Mean over unit directions of W_p^p of the projections)^(1/p), in the units of the data.

    Rabin et al. 2011; Bonneel et al. 2015. One-dimensional distances by sorting for equal n, by the quantile functions
    (POT) otherwise. A translation by a gives |a| / sqrt(d) for p = 2. Biased upwards by the sample size.

    Args:
        x: shape (n, d).
        y: shape (m, d).
        p: at least 1.
        num_directions: fewer than 200 makes the value depend visibly on the seed.
        seed: of the directions.

    Raises:
        UserError: bad matrices, p below 1, no directions.
    """
    if p < 1 or num_directions < 1:
        raise UserError(f"sliced Wasserstein: p = {p} and {num_directions} directions must both be at least 1")
    x, y = pair(x, y, least=1)
    return wasserstein_of_projections(project(x, num_directions, seed), project(y, num_directions, seed), p)


def wasserstein_of_projections(x: Tensor, y: Tensor, p: float = 2) -> float:
    """The same from projections (n, directions) and (m, directions) that are already there."""
    if len(x) == len(y):
        powers = (x.sort(dim=0).values - y.sort(dim=0).values).abs().pow(p).mean(dim=0)
    else:
        import ot  # POT takes a second to import and only unequal sizes need it

        powers = ot.wasserstein_1d(x, y, p=p)
    return float(powers.mean() ** (1 / p))


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 0) -> Estimate:
    """exp(E KL(p(c|x) || p(c))), mean over splits: Salimans et al. 2016 (arXiv 1606.03498), section 4.

    Only a score with the Inception network of 2015 may be called IS. Rows are shuffled first: samples that come sorted
    by class would otherwise get a marginal p(c) of few classes in every split.

    Args:
        probabilities: shape (n, classes), rows summing to 1.
        splits: number of equal parts; `std` is over them.
        seed: of the shuffling.

    Raises:
        UserError: bad matrix, rows that are no probabilities, fewer rows than splits.
    """
    p = matrix(probabilities, "class probabilities", least=1)
    worst = float((p.sum(dim=1) - 1).abs().max())
    if float(p.min()) < 0 or worst > 1e-3:
        raise UserError(
            f"class probabilities: a row sums to 1 only within {worst:g}, or is negative; pass softmax values"
        )
    if splits < 1 or len(p) < splits:
        raise UserError(f"inception score: {len(p)} samples cannot be cut into {splits} splits")
    scores = []
    for part in torch.tensor_split(p[torch.randperm(len(p), generator=seeded(seed))], splits):
        marginal = part.mean(dim=0, keepdim=True)
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, marginal)
        scores.append(divergence.sum(dim=1).mean().exp())
    values = torch.stack(scores)
    std = float(values.std()) if splits > 1 else 0.0
    return Estimate(float(values.mean()), std / splits**0.5, std)


def total_variation(x: Tensor, y: Tensor) -> float:
    """Half the L1 distance of two class histograms, in [0, 1].

    Args:
        x: counts or weights, shape (classes,).
        y: the same.

    Raises:
        UserError: different lengths, negative counts, an empty histogram.
    """
    x, y = x.to(torch.float64), y.to(torch.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise UserError(f"total variation: histograms of shape {tuple(x.shape)} and {tuple(y.shape)}")
    if min(float(x.min()), float(y.min())) < 0 or min(float(x.sum()), float(y.sum())) <= 0:
        raise UserError("total variation: a histogram is empty or has negative counts")
    return float((x / x.sum() - y / y.sum()).abs().sum() / 2)


def crps_ensemble(ensemble: Tensor, observation: Tensor) -> Tensor:
    """Continuous ranked probability score of each observation, in its units; smaller is better.

    mean|z_i - y| - sum_ij |z_i - z_j| / (2 M (M - 1)): the fair version (Ferro 2014), unbiased in the ensemble size.

    Args:
        ensemble: shape (M, ...), M >= 2.
        observation: shape (...).

    Returns:
        Shape (...), float64.

    Raises:
        UserError: shapes that do not fit, or one member only.
    """
    z, y = ensemble.to(torch.float64), observation.to(torch.float64)
    if z.shape[1:] != y.shape or len(z) < 2:
        raise UserError(
            f"CRPS: ensemble of shape {tuple(z.shape)} and observations of shape {tuple(y.shape)}; "
            "needs (M, ...) and (...) with M of at least 2"
        )
    members = len(z)
    # sum_{i<j} (z_(j) - z_(i)) = sum_i (2 i - M + 1) z_(i) over the sorted members, i from 0
    weights = (2 * torch.arange(members, dtype=torch.float64) - members + 1).view(-1, *[1] * y.ndim)
    pairs = (weights * z.sort(dim=0).values).sum(dim=0)
    return (z - y).abs().mean(dim=0) - pairs / (members * (members - 1))

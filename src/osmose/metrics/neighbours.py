"""Nearest neighbours: precision and recall, and whether the training set was memorised."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from osmose.errors import UserError
from osmose.metrics.matrices import matrix, pair, row_blocks


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated samples that look real, and real samples that are covered."""

    precision: float
    recall: float


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall, Kynkaanniemi et al. 2019 (arXiv 1904.06991), eq. 1-2.

    Precision is the share of generated points inside the union of balls around the real points that reach to each
    one's k-th nearest other real point; recall is the same with the roles swapped. Noise widens the balls around the
    generated points, so recall hardly falls with it: it measures missing modes, not quality. Memory is bounded.

    Args:
        x: generated features, shape (n, d).
        y: real features, shape (m, d).
        k: which neighbour sets the radius.

    Raises:
        UserError: bad matrices, or a side with at most k rows.
    """
    return PrecisionRecall(precision=coverage(x, y, k), recall=coverage(y, x, k))


def coverage(queries: Tensor, centres: Tensor, k: int = 3) -> float:
    """Share of the queries (n, d) inside the union of the k-nearest-neighbour balls of the centres (m, d).

    Precision is `coverage(generated, real)`, recall `coverage(real, generated)`.

    Raises:
        UserError: bad matrices, k below 1, or a side with at most k rows.
    """
    if k < 1:
        raise UserError(f"precision and recall: k = {k} is not a neighbour; use 1 or more")
    queries, centres = pair(queries, centres, least=k + 1)
    middle = centres.mean(dim=0)
    queries, centres = queries - middle, centres - middle
    # Distances through the scalar product are exact to about 1e-8 of the norm: equal points must count as equal.
    radii = _radii(centres, k) + 1e-7 * float(centres.square().sum(dim=1).mean().sqrt())
    inside = 0
    for block in row_blocks(len(queries), len(centres)):
        inside += int((torch.cdist(queries[block], centres) <= radii).any(dim=1).sum())
    return inside / len(queries)


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, shape (n,)."""
    radii = points.new_empty(len(points))
    for block in row_blocks(len(points), len(points)):
        # The nearest of all is the point itself, hence k + 1.
        radii[block] = torch.cdist(points[block], points).kthvalue(k + 1, dim=1).values
    return radii


def nearest_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Euclidean distance of each query (n, d) to its nearest point (m, d): float64, shape (n,).

    The search runs in float32, over blocks of the points so that a large training set is never copied; the distance
    to the neighbour found is then computed in float64 from the difference, so a copy has distance exactly 0.

    Raises:
        UserError: a bad matrix of queries, different numbers of columns, or no points.
    """
    queries = matrix(queries, "queries", least=1)
    if points.ndim != 2 or len(points) == 0 or points.shape[1] != queries.shape[1]:
        raise UserError(f"points of shape {tuple(points.shape)} for queries of shape {tuple(queries.shape)}")
    centre = queries.mean(dim=0)
    rows = (queries - centre).to(torch.float32)
    best = torch.full((len(queries),), torch.inf)
    nearest = torch.zeros(len(queries), dtype=torch.int64)
    for block in row_blocks(len(points), max(points.shape[1], len(queries))):
        coarse = (points[block] - centre).to(torch.float32)
        # |q - p|^2 without |q|^2, which is the same for every point.
        found, index = torch.addmm(coarse.square().sum(dim=1), rows, coarse.T, alpha=-2).min(dim=1)
        nearest = torch.where(found < best, index + block.start, nearest)
        best = torch.minimum(found, best)
    return (queries - points[nearest].to(torch.float64)).square().sum(dim=1).sqrt()


def nearest_neighbour_ratio(generated: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Median distance generated -> nearest training item, over the same for held-out items.

    About 1 for a model that generalises, well below 1 for one that reproduces its training set, above 1 where samples
    lie farther from the data than unseen data do. Frechet distances cannot see copies; this can.

    Args:
        generated: shape (n, d).
        train: shape (N, d), the whole training part.
        held_out: shape (m, d), real data that were not trained on.

    Raises:
        UserError: bad matrices, or held-out items that are themselves copies of training items.
    """
    return ratio_of_medians(nearest_distances(generated, train), nearest_distances(held_out, train))


def ratio_of_medians(made: Tensor, unseen: Tensor) -> float:
    """Median of the distances `made` (n,) over that of the distances `unseen` (m,).

    Raises:
        UserError: the second one is 0.
    """
    if float(unseen.median()) == 0:
        raise UserError("nearest-neighbour ratio: half of the held-out items are exact copies of training items")
    return float(made.median() / unseen.median())

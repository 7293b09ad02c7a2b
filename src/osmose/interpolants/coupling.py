"""Which x0 goes with which x1: pairing a batch at the least cost (arXiv 2302.00482, minibatch optimal transport)."""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.errors import UserError


def ot_pairing(x0: Tensor, x1: Tensor, groups: Tensor | None = None) -> Tensor:
    """The permutation for which sum |x0[permutation] - x1|^2 is least: exact, in O(n^3) at worst.

    Args:
        x0: shape (n, *event).
        x1: the same shape.
        groups: labels, int64 (n,): pairs are exchanged only between rows of one label, so that x0[permutation] has the
            labels that x0 had, row by row.

    Returns:
        int64 (n,), on the device of x1.

    Raises:
        UserError: shapes that differ, values that are not finite, labels that are not one for each row.
    """
    if x0.shape != x1.shape or not len(x1):
        raise UserError(f"pairing: x0 {tuple(x0.shape)} and x1 {tuple(x1.shape)} must have one shape, and rows")
    if groups is not None and groups.shape != x1.shape[:1]:
        raise UserError(f"groups: shape {tuple(groups.shape)} is not valid: must be ({len(x1)},)")
    first, second = (x.detach().flatten(1).to("cpu", torch.float64) for x in (x0, x1))
    if not bool(first.isfinite().all() & second.isfinite().all()):
        raise UserError("pairing: x0 or x1 holds values that are not finite")
    if groups is None:
        return _assignment(first, second).to(x1.device)
    permutation = torch.empty(len(x1), dtype=torch.int64)
    labels = groups.to("cpu")
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        permutation[rows] = rows[_assignment(first[rows], second[rows])]
    return permutation.to(x1.device)


def _assignment(x0: Tensor, x1: Tensor) -> Tensor:
    """For each row of x1 (n, D) the row of x0 that is its partner, int64 (n,)."""
    import ot  # POT takes a second to import, and only this needs it

    count = len(x1)
    # |x|^2 of the rows adds the same to the cost of every pairing; without it only products are left.
    cost = -(x0 - x0.mean(0)) @ (x1 - x1.mean(0)).T
    uniform = torch.full((count,), 1 / count, dtype=torch.float64).numpy()
    plan = torch.from_numpy(ot.emd(uniform, uniform, (cost - cost.min()).numpy(), numItermax=100 * 1000 * 1000))
    partners = plan.argmax(0)
    if len(partners.unique()) != count:
        raise UserError(f"pairing: optimal transport between {count} rows did not come to an end")
    return partners

r"""Tensor trains as lists of cores: evaluation, gauge, rounding, projection on tangent spaces.

A train of d modes is X[i_1..i_d] = G_1[:, i_1, :] G_2[:, i_2, :] ... G_d[:, i_d, :], with cores G_k of shape
(C, r_{k-1}, n_k, r_k), r_0 = r_d = 1; C trains of the same form are computed side by side and never mix. Bond k lies
between cores k and k + 1. See Oseledets, "Tensor-train decomposition" (2011), and for the manifold of fixed ranks
Holtz, Rohwedder, Schneider, "On manifolds of tensors of fixed TT-rank" (2012), and Steinlechner, "Riemannian
optimization for high-dimensional tensor completion" (2016).

Inner products and norms are those of the full tensors; in orthonormal bases they are those of the functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Cores = list[Tensor]


def ranks(cores: Sequence[Tensor]) -> list[int]:
    """r_1..r_{d-1}."""
    return [core.shape[3] for core in cores[:-1]]


def largest_ranks(sizes: Sequence[int]) -> list[int]:
    """The ranks r_1..r_{d-1} beyond which no tensor of n_1 x ... x n_d goes: min of the products on both sides."""
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def dense(cores: Sequence[Tensor]) -> Tensor:
    """The full tensors, (C, n_1, ..., n_d); for small ones."""
    whole = cores[0][:, 0]
    for core in cores[1:]:
        whole = torch.einsum("c...r,crns->c...ns", whole, core)
    return whole[..., 0]


def step_right(left: Tensor, features: Tensor, core: Tensor) -> Tensor:
    """One mode further from the left: sum over r, m of left features G[r, m, :].

    Args:
        left: (C, B, r), or of channels (C, B, c, r).
        features: (B, m); values of the mode's functions.
        core: (C, r, m, s).

    Returns:
        (C, B, s), or (C, B, c, s). One product of matrices, with r m numbers an item in between.
    """
    C, r, m, s = core.shape
    joint = left[..., None] * features.view(len(features), *(1,) * (left.ndim - 2), m)
    return (joint.flatten(-2).reshape(C, -1, r * m) @ core.reshape(C, r * m, s)).reshape(*left.shape[:-1], s)


def step_left(right: Tensor, features: Tensor, core: Tensor) -> Tensor:
    """One mode further from the right: sum over m, s of G[:, m, s] features right; shapes as in `step_right`."""
    C, r, m, s = core.shape
    joint = features.view(len(features), *(1,) * (right.ndim - 3), m, 1) * right[..., None, :]
    flat = joint.flatten(-2).reshape(C, -1, m * s)
    return (flat @ core.reshape(C, r, m * s).transpose(1, 2)).reshape(*right.shape[:-1], r)


def matrices(cores: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
    """M_k = sum over m of features G_k[:, m, :] for items, one (C, r, s, B) for each mode, from features (B, m).

    Modes of the same form are computed together, since what costs time in small trains is the number of operations; and
    the items come last, since one operation on all of them then runs along memory.
    """
    forms: dict[tuple[int, ...], list[int]] = {}
    for k, (core, own) in enumerate(zip(cores, features, strict=True)):
        forms.setdefault((*core.shape, len(own)), []).append(k)
    found: dict[int, Tensor] = {}
    for (C, r, m, s, B), places in forms.items():
        stacked = torch.stack([cores[k] for k in places]).transpose(3, 4).reshape(len(places), C * r * s, m)
        values = torch.bmm(stacked, torch.stack([features[k] for k in places]).transpose(1, 2))
        found |= dict(zip(places, values.view(len(places), C, r, s, B).unbind(0), strict=True))
    return [found[k] for k in range(len(cores))]


def products_right(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The rows M_1 ... M_k for k = 0..d, the first of them ones: (C, r_k, B) each."""
    C, _, _, B = matrices[0].shape
    rows = [matrices[0].new_ones(C, 1, B)]
    for matrix in matrices:
        rows.append((rows[-1][:, :, None] * matrix).sum(1))
    return rows


def products_left(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The columns M_{k+1} ... M_d for k = 0..d, the last of them ones: (C, r_k, B) each."""
    C, _, _, B = matrices[-1].shape
    columns = [matrices[-1].new_ones(C, 1, B)]
    for matrix in reversed(matrices):
        columns.append((matrix * columns[-1][:, None]).sum(2))
    return columns[::-1]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner products of two trains of the same modes, (C,)."""
    overlap = a[0].new_ones(a[0].shape[0], 1, 1)
    for x, y in zip(a, b, strict=True):
        overlap = _overlap_right(overlap, x, y)
    return overlap[:, 0, 0]


def add(a: Sequence[Tensor], b: Sequence[Tensor], scale: float = 1.0) -> Cores:
    """A + scale b: a train whose ranks are the sums of theirs."""
    last = len(a) - 1
    cores = []
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        y = scale * y if k == 0 else y
        if last == 0:
            cores.append(x + y)
        elif k == 0:
            cores.append(torch.cat([x, y], 3))
        elif k == last:
            cores.append(torch.cat([x, y], 1))
        else:
            cores.append(_blocks(x, y))
    return cores


def _blocks(x: Tensor, y: Tensor) -> Tensor:
    """[[x, 0], [0, y]] in the two ranks."""
    C, r, n, s = x.shape
    whole = x.new_zeros(C, r + y.shape[1], n, s + y.shape[3])
    whole[:, :r, :, :s], whole[:, r:, :, s:] = x, y
    return whole


def split_right(core: Tensor) -> tuple[Tensor, Tensor]:
    """A core as Q R, Q left-orthogonal (C, r, n, s), R (C, s, s) to go into the next core; s keeps its size.

    The diagonal of R is not negative, so that the same function gives the same factors. Where r n < s, Q has
    orthonormal rows instead, and zeros in the columns that are too many.
    """
    C, r, n, s = core.shape
    q, upper = torch.linalg.qr(core.reshape(C, r * n, s))
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(core.dtype)
    q, upper = q * sign[:, None, :], sign[..., None] * upper
    if (missing := s - q.shape[-1]) > 0:
        q = torch.cat([q, q.new_zeros(C, r * n, missing)], 2)
        upper = torch.cat([upper, upper.new_zeros(C, missing, s)], 1)
    return q.reshape(C, r, n, s), upper


def split_left(core: Tensor) -> tuple[Tensor, Tensor]:
    """A core as L Q, Q right-orthogonal (C, r, n, s), L (C, r, r) to go into the core before."""
    q, lower = split_right(core.permute(0, 3, 2, 1))
    return q.permute(0, 3, 2, 1).contiguous(), lower.transpose(1, 2)


def times_left(factor: Tensor, core: Tensor) -> Tensor:
    """A factor (C, q, r) times a core (C, r, n, s)."""
    return torch.einsum("cqr,crns->cqns", factor, core)


def times_right(core: Tensor, factor: Tensor) -> Tensor:
    """A core (C, r, n, s) times a factor (C, s, q)."""
    return torch.einsum("crns,csq->crnq", core, factor)


def orthogonalized(cores: Sequence[Tensor], centre: int) -> Cores:
    """The same trains with all cores before `centre` left-orthogonal and all after it right-orthogonal."""
    made = list(cores)
    for k in range(centre):
        made[k], rest = split_right(made[k])
        made[k + 1] = times_left(rest, made[k + 1])
    for k in range(len(made) - 1, centre, -1):
        made[k], rest = split_left(made[k])
        made[k - 1] = times_right(made[k - 1], rest)
    return made


def rounded(cores: Sequence[Tensor], wanted: Sequence[int]) -> Cores:
    """The best that a sweep of SVDs finds with ranks at most as wanted (Oseledets 2011, algorithm 2).

    The error is at most sqrt(d - 1) times that of the best approximation. The bonds have the basis of singular vectors,
    each with the sign that makes its largest number positive, and the last core is the one that is not orthogonal: with
    the ranks that it has, this is the canonical form of a train, whatever gauge it comes in.
    """
    made = orthogonalized(cores, len(cores) - 1)[::-1]
    made = [core.permute(0, 3, 2, 1) for core in made]  # from the right end, so that the cut goes left to right below
    for k in range(len(made) - 1):
        C, r, n, s = made[k].shape
        u, value, v = torch.linalg.svd(made[k].reshape(C, r * n, s), full_matrices=False)
        keep = min(wanted[len(made) - 2 - k], value.shape[1])
        largest = u.abs().argmax(1, keepdim=True)
        sign = torch.where(u.gather(1, largest) < 0, -1.0, 1.0).to(u.dtype)[:, 0, :keep]
        u, v = u[:, :, :keep] * sign[:, None], (sign * value[:, :keep])[..., None] * v[:, :keep]
        made[k] = u.reshape(C, r, n, keep)
        made[k + 1] = times_left(v, made[k + 1])
    made = [core.permute(0, 3, 2, 1) for core in made[::-1]]
    # The first core is the one that is not orthogonal now. Its columns are, up to their lengths, and so are those of
    # each next one in turn: the QR decompositions leave the basis as it is.
    return orthogonalized(made, len(made) - 1)


class Point:
    """A point on the manifold of trains of fixed ranks, in the two gauges that its tangent space is described in.

    A tangent vector is sum_k U_1..U_{k-1} D_k V_{k+1}..V_d with (left unfolding of U_k)^T (that of D_k) = 0 for k < d:
    in this gauge <xi, eta> = sum_k <D_k, E_k>, and each xi has one set of D.

    Attributes:
        left: U_1..U_{d-1} left-orthogonal, then the last core: X itself.
        right: V_2..V_d right-orthogonal in places 2..d; the first is that of X in this gauge.
        between: for each k the R_k with U_{k+1} ... U_d = R_k V_{k+1} ... V_d, (C, r_k, r_k).
    """

    def __init__(self, cores: Sequence[Tensor]):
        self.left = orthogonalized(cores, len(cores) - 1)
        self.right = list(self.left)
        self.between: list[Tensor] = []
        for k in range(len(cores) - 1, 0, -1):
            self.right[k], rest = split_left(self.right[k])
            self.right[k - 1] = times_right(self.right[k - 1], rest)
            self.between.insert(0, rest)

    def gauged(self, variations: Sequence[Tensor]) -> Cores:
        """Variations D of the cores with what lies along U_k taken out, for k < d: (I - U U^T) D."""
        last = len(self.left) - 1
        return [v if k == last else _without(u, v) for k, (u, v) in enumerate(zip(self.left, variations, strict=True))]

    def gradient(self, by_core: Sequence[Tensor]) -> Cores:
        """The Riemannian gradient from the derivatives of a loss by the cores of `left`, as D.

        A derivative by core k there is that by D_k times R_k^T on the right: what follows core k is R_k V. It is solved
        for by the pseudo-inverse, which leaves out directions that X does not have.
        """
        last = len(by_core) - 1
        delta = [
            g if k == last else times_right(g, torch.linalg.pinv(self.between[k].transpose(1, 2)))
            for k, g in enumerate(by_core)
        ]
        return self.gauged(delta)

    def projected(self, other: Sequence[Tensor]) -> Cores:
        """The orthogonal projection of trains of any ranks on the tangent space, as D."""
        last, ones = len(self.left) - 1, other[0].new_ones(other[0].shape[0], 1, 1)
        before, after = [ones], [ones]
        for u, z in zip(self.left[:-1], other[:-1], strict=True):
            before.append(_overlap_right(before[-1], u, z))
        for v, z in zip(self.right[:0:-1], other[:0:-1], strict=True):
            after.append(_overlap_left(after[-1], v, z))
        after.reverse()
        return self.gauged(
            [times_right(times_left(before[k], other[k]), after[k].transpose(1, 2)) for k in range(last + 1)]
        )

    def train(self, variations: Sequence[Tensor], base: float = 0.0) -> Cores:
        """The tangent vector as a train of ranks 2 r, with `base` X added."""
        U, V, D, last = self.left, self.right, variations, len(self.left) - 1
        if last == 0:
            return [D[0] + base * U[0]]
        cores = [torch.cat([D[0], U[0]], 3)]
        for k in range(1, last):
            C, r, n, s = U[k].shape
            whole = U[k].new_zeros(C, 2 * r, n, 2 * s)
            whole[:, :r, :, :s], whole[:, r:, :, :s], whole[:, r:, :, s:] = V[k], D[k], U[k]
            cores.append(whole)
        cores.append(torch.cat([V[last], D[last] + base * U[last]], 1))
        return cores

    def retracted(self, variations: Sequence[Tensor], length: float = 1.0) -> Cores:
        """X + length times the tangent vector, brought back to the ranks of X by rounding."""
        return rounded(self.train([length * v for v in variations], 1.0), ranks(self.left))


def tangent_inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product of two tangent vectors at one point, over all trains side by side."""
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def _without(orthogonal: Tensor, core: Tensor) -> Tensor:
    """What of a core's left unfolding is orthogonal to that of another, whose columns are orthonormal."""
    C, r, n, s = orthogonal.shape
    u, v = orthogonal.reshape(C, r * n, s), core.reshape(C, r * n, -1)
    return (v - u @ (u.transpose(1, 2) @ v)).reshape(core.shape)


def _overlap_right(overlap: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(C, r_x, r_y) to (C, s_x, s_y): sum over both r and n."""
    return torch.einsum("crns,crnt->cst", x, torch.einsum("crq,cqnt->crnt", overlap, y))


def _overlap_left(overlap: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(C, s_x, s_y) to (C, r_x, r_y): sum over both s and n."""
    return torch.einsum("crns,cqns->crq", x, torch.einsum("cst,cqnt->cqns", overlap, y))

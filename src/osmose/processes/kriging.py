r"""What some values of a Gaussian field say of the others.

With mean mu and covariance E = Phi diag(e) Phi^T, e the variances of the modes, and values y at some of the points,

    E[x | y] = mu + E_K (E_KK + nugget I)^-1 (y - mu_K),

by conjugate gradients: E is applied by going to the modes and back, and no matrix is ever made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from osmose.processes.spectrum import Harmonics

#: Of the variance of a point: keeps the equations solvable where the field is smooth.
_NUGGET = 1e-4
#: Conjugate gradients end when what is left is so small a share, or after so many steps.
_SMALL, _MOST = 1e-4, 100


def conditioned(mean: Tensor, known: Tensor, variances: Tensor, harmonics: Harmonics) -> Tensor:
    """The mean of a field given some of its values.

    Args:
        mean: without them, (B, C, *grid).
        known: the values, NaN where nothing is known, of the same shape.
        variances: of the modes, float64 on the CPU, (B or 1, C or 1, *grid).
        harmonics: the modes.

    Returns:
        The known values where there are any, elsewhere their best linear estimate; shape, type and device of `mean`.
    """
    there = ~known.isnan()
    axes = tuple(range(-len(harmonics.grid), 0))
    wide = torch.float32 if mean.device.type == "mps" else torch.float64
    e = variances.to(wide).to(mean.device) * math.prod(harmonics.grid)  # `modes` is Phi^T / N
    nugget = _NUGGET * e.mean(axes, keepdim=True)
    left = torch.where(there, known - mean, 0.0).to(wide)

    def covariance(w: Tensor) -> Tensor:
        return harmonics.values(e * harmonics.modes(w))

    weights, way = torch.zeros_like(left), left
    size = first = left.square().sum(axes, keepdim=True)
    for _ in range(min(_MOST, int(there.flatten(2).sum(2).max()))):
        if bool((size <= _SMALL**2 * first).all()):
            break
        moved = torch.where(there, covariance(way) + nugget * way, 0.0)
        bend = (way * moved).sum(axes, keepdim=True)
        step = torch.where(bend > 0, size / bend, 0.0)
        weights, left = weights + step * way, left - step * moved
        after = left.square().sum(axes, keepdim=True)
        way = left + torch.where(size > 0, after / size, 0.0) * way
        size = after
    return torch.where(there, known, mean + covariance(weights).to(mean))

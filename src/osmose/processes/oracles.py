r"""What a sampler makes of a Gaussian process when its denoiser is exact: closed forms to test and compare against.

Data are N(0, K) at L times, noise N(0, Sigma). Both are Gaussian at every level, and the best denoiser is linear:

    E[x0 | x_t] = alpha K (alpha^2 K + sigma^2 Sigma)^-1 x_t,

so that a step x_s = keep x_t + pull x0_hat + N(0, Sigma_step) maps covariances to covariances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.gaussian.chain import Variance, reverse_step
from osmose.gaussian.grid import TimeGrid


def denoiser_matrix(data: Tensor, noise: Tensor, alpha: float, sigma: float) -> Tensor:
    """The matrix of E[x0 | x_t], (L, L), for covariances of the data and of the noise."""
    return torch.linalg.solve(alpha**2 * data + sigma**2 * noise, alpha * data, left=False)


def sampled_covariance(data: Tensor, noise: Tensor, grid: TimeGrid, variance: Variance = "fixed_large") -> Tensor:
    """The covariance of what the ancestral chain ends with, from N(0, noise), float64 (L, L).

    Args:
        data, noise: K and Sigma, float64 (L, L).
        grid: of the chain, on a variance-preserving schedule.
        variance: of its steps, in units of Sigma.
    """
    found = noise
    for t, s in grid.steps():
        step = reverse_step(t, s)
        move = step.keep * torch.eye(len(data), dtype=data.dtype)
        move = move + step.pull * denoiser_matrix(data, noise, t.alpha, t.sigma)
        found = move @ found @ move.T
        if s.sigma > 0:
            found = found + (step.beta if variance == "fixed_large" else step.btilde) * noise
    return found


def divergence(made: Tensor, data: Tensor) -> float:
    """KL(N(0, made) || N(0, data)) in nats."""
    ratio = torch.linalg.solve(data, made)
    value = torch.trace(ratio) - len(data) - torch.linalg.slogdet(made)[1] + torch.linalg.slogdet(data)[1]
    return float(value / 2)

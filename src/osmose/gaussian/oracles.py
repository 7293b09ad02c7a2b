"""Denoisers known in closed form, to test everything else against: Gaussian, mixture of Gaussians, finite data set."""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.gaussian.parametrization import column
from osmose.gaussian.schedule import Level


class GaussianDenoiser:
    """E[x0 | x_t] for x0 ~ N(mean, covariance) over flat events of dimension D.

    Args:
        mean: shape (D,).
        covariance: shape (D, D), or (D,) for a diagonal one.
    """

    def __init__(self, mean: Tensor, covariance: Tensor):
        self.mean = mean
        covariance = torch.diag(covariance) if covariance.ndim == 1 else covariance
        self.variances, self.axes = torch.linalg.eigh(covariance)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:  # noqa: ARG002
        alpha, sigma = column(level.alpha, x_t), column(level.sigma, x_t)
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        return self.mean + ((x_t - alpha * self.mean) @ self.axes * gain) @ self.axes.T

    def flow(self, x_t: Tensor, t: Level, s: Level) -> Tensor:
        """Where the probability-flow ODE carries x_t (B, D) from level t to level s."""

        def std(level: Level) -> Tensor:
            return torch.sqrt(level.alpha**2 * self.variances + level.sigma**2)

        moved = (x_t - t.alpha * self.mean) @ self.axes * (std(s) / std(t))
        return s.alpha * self.mean + moved @ self.axes.T


class MixtureDenoiser:
    """E[x0 | x_t] for a mixture of isotropic Gaussians; a finite data set is the case of deviation 0.

    Args:
        centres: shape (K, D).
        std: deviation of every component, >= 0.
        weights: shape (K,), summing to 1; equal when omitted.
    """

    def __init__(self, centres: Tensor, std: float = 0.0, weights: Tensor | None = None):
        self.centres, self.variance = centres, std**2
        weights = torch.full((len(centres),), 1 / len(centres), dtype=centres.dtype) if weights is None else weights
        self.log_weights = weights.log()

    def responsibilities(self, x_t: Tensor, level: Level) -> Tensor:
        """p(component | x_t), shape (B, K)."""
        alpha, sigma = column(level.alpha, x_t), column(level.sigma, x_t)
        total = alpha**2 * self.variance + sigma**2
        if isinstance(alpha, Tensor):
            distance = torch.stack([(x_t - alpha * centre).norm(dim=1) for centre in self.centres], dim=1)
        else:  # by differences: expanding the square loses the digits that small noise needs
            distance = torch.cdist(x_t, alpha * self.centres, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.softmax(self.log_weights - distance**2 / (2 * total), dim=1)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:  # noqa: ARG002
        alpha, sigma = column(level.alpha, x_t), column(level.sigma, x_t)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        centre = self.responsibilities(x_t, level) @ self.centres
        return centre + gain * (x_t - alpha * centre)

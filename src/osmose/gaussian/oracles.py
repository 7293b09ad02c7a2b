"""Denoisers known in closed form, to test everything else against.

Gaussian, mixture of Gaussians, finite data set, independent coordinates, chain of coordinates, sphere; and what a
field may have besides that changes no sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import overload

import torch
from torch import Tensor

from osmose.gaussian.denoiser import Denoiser
from osmose.gaussian.parametrization import column
from osmose.gaussian.schedule import Level

#: Largest d of `bessel_ratio`.
_MOST_RATIO = 60


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
        mean, variances, axes = (_like(value, x_t) for value in (self.mean, self.variances, self.axes))
        gain = alpha * variances / (alpha**2 * variances + sigma**2)
        return mean + ((x_t - alpha * mean) @ axes * gain) @ axes.T

    def flow(self, x_t: Tensor, t: Level, s: Level) -> Tensor:
        """Where the probability-flow ODE carries x_t (B, D) from level t to level s."""

        def std(level: Level) -> Tensor:
            return torch.sqrt(level.alpha**2 * self.variances + level.sigma**2)

        moved = (x_t - t.alpha * self.mean) @ self.axes * (std(s) / std(t))
        return s.alpha * self.mean + moved @ self.axes.T


class MixtureDenoiser:
    """E[x0 | x_t] for a mixture of Gaussians of one shape; a finite data set is the case of deviation 0.

    Args:
        centres: shape (K, D).
        std: deviation of every component, >= 0: a number, or one for each coordinate, shape (D,).
        weights: shape (K,), summing to 1; equal when omitted.
    """

    def __init__(self, centres: Tensor, std: float | Tensor = 0.0, weights: Tensor | None = None):
        self.centres, self.variance = centres, std**2
        weights = torch.full((len(centres),), 1 / len(centres), dtype=centres.dtype) if weights is None else weights
        self.log_weights = weights.log()

    def responsibilities(self, x_t: Tensor, level: Level) -> Tensor:
        """p(component | x_t), shape (B, K)."""
        alpha, sigma, variance = column(level.alpha, x_t), column(level.sigma, x_t), _like(self.variance, x_t)
        centres, total = _like(self.centres, x_t), alpha**2 * variance + sigma**2
        if isinstance(total, Tensor):
            spread = total.sqrt()
            distance = torch.stack([((x_t - alpha * centre) / spread).norm(dim=1) for centre in centres], dim=1)
        else:  # by differences: expanding the square loses the digits that small noise needs
            distance = torch.cdist(x_t, alpha * centres, compute_mode="donot_use_mm_for_euclid_dist") / total**0.5
        return torch.softmax(_like(self.log_weights, x_t) - distance**2 / 2, dim=1)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:  # noqa: ARG002
        alpha, sigma, variance = column(level.alpha, x_t), column(level.sigma, x_t), _like(self.variance, x_t)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        centre = self.responsibilities(x_t, level) @ _like(self.centres, x_t)
        return centre + gain * (x_t - alpha * centre)


class _CoordinateModes(ABC):
    """E[x0 | x_t] where each coordinate is N(centre, deviation^2) around one of its K modes; the modes have some law.

    Args:
        centres: of the modes of each coordinate, shape (D, K).
        deviations: of each coordinate, the same around all of its modes, shape (D,).
    """

    def __init__(self, centres: Tensor, deviations: Tensor):
        self.centres, self.variances = centres, deviations[:, None] ** 2

    @abstractmethod
    def responsibilities(self, x_t: Tensor, level: Level) -> Tensor:
        """p(mode of coordinate i | x_t), shape (B, D, K)."""

    def evidence(self, x_t: Tensor, level: Level) -> Tensor:
        """The logarithm of p(coordinate i of x_t | its mode), up to what all modes share: shape (B, D, K)."""
        x = x_t[:, :, None]
        alpha, sigma = column(level.alpha, x), column(level.sigma, x)
        total = alpha**2 * _like(self.variances, x) + sigma**2
        return -((x - alpha * _like(self.centres, x)) ** 2) / (2 * total)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:  # noqa: ARG002
        alpha, sigma = column(level.alpha, x_t), column(level.sigma, x_t)
        variance = _like(self.variances[:, 0], x_t)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        centre = (self.responsibilities(x_t, level) * _like(self.centres, x_t)).sum(2)
        return centre + gain * (x_t - alpha * centre)


class ProductDenoiser(_CoordinateModes):
    """E[x0 | x_t] for independent coordinates, each a mixture of K univariate Gaussians of one deviation.

    Args:
        centres: shape (D, K).
        deviations: shape (D,).
        weights: shape (D, K), rows summing to 1; a coordinate with fewer components has weights 0.
    """

    def __init__(self, centres: Tensor, deviations: Tensor, weights: Tensor):
        super().__init__(centres, deviations)
        self.log_weights = weights.log()

    def responsibilities(self, x_t: Tensor, level: Level) -> Tensor:
        """p(component of coordinate i | x_t), shape (B, D, K)."""
        return torch.softmax(_like(self.log_weights, x_t) + self.evidence(x_t, level), dim=2)


class ChainDenoiser(_CoordinateModes):
    """E[x0 | x_t] where the modes of the coordinates are a Markov chain: K^D modes at the cost of D K^2.

    Given the modes the coordinates of x_t are independent, so x_t is the observation of a hidden Markov model, whose
    posterior is found by the forward-backward recursion, in logarithms.

    Args:
        centres: shape (D, K); of a chain of signs, K = 2.
        deviations: shape (D,).
        transitions: p(mode b of coordinate i + 1 | mode a of coordinate i), shape (D - 1, K, K), rows summing to 1.
        start: law of the first coordinate's mode, shape (K,); uniform when omitted.
    """

    def __init__(self, centres: Tensor, deviations: Tensor, transitions: Tensor, start: Tensor | None = None):
        super().__init__(centres, deviations)
        modes = centres.shape[1]
        start = torch.full((modes,), 1 / modes, dtype=centres.dtype) if start is None else start
        self.log_transitions, self.log_start = transitions.log(), start.log()

    def responsibilities(self, x_t: Tensor, level: Level) -> Tensor:
        """p(mode of coordinate i | x_t), shape (B, D, K)."""
        evidence, step = self.evidence(x_t, level), _like(self.log_transitions, x_t)
        # Of the coordinates up to i, jointly with the mode of i; and of those after i, given the mode of i.
        forward, backward = [_like(self.log_start, x_t) + evidence[:, 0]], [torch.zeros_like(evidence[:, 0])]
        for i in range(1, evidence.shape[1]):
            forward.append(torch.logsumexp(forward[-1][:, :, None] + step[i - 1], dim=1) + evidence[:, i])
        for i in range(evidence.shape[1] - 1, 0, -1):
            backward.append(torch.logsumexp(step[i - 1] + (evidence[:, i] + backward[-1])[:, None, :], dim=2))
        return torch.softmax(torch.stack(forward, dim=1) + torch.stack(backward[::-1], dim=1), dim=2)


@overload
def _like(value: Tensor, x: Tensor) -> Tensor: ...
@overload
def _like(value: float | Tensor, x: Tensor) -> float | Tensor: ...
def _like(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A parameter in the dtype and on the device of x; a number as it is."""
    return value.to(device=x.device, dtype=x.dtype) if isinstance(value, Tensor) else value


class SphereDenoiser:
    """E[x0 | x_t] for x0 uniform on a sphere of dimension k around 0, somewhere in R^D.

    Given x_t, the place on the sphere has a law of von Mises and Fisher, whose mean is A(kappa) along the part of x_t
    in the sphere's own space, kappa = radius |u| alpha / sigma^2 (`bessel_ratio`).

    Args:
        frame: an orthonormal basis of the space that the sphere lies in, as columns, (D, k + 1).
        radius: above 0.
    """

    def __init__(self, frame: Tensor, radius: float = 1.0):
        self.frame, self.radius = frame, radius

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:  # noqa: ARG002
        frame = _like(self.frame, x_t)
        alpha, sigma = column(level.alpha, x_t), column(level.sigma, x_t)
        u = x_t @ frame
        size = u.norm(dim=1, keepdim=True).clamp(min=1e-30)
        mean = bessel_ratio(self.radius * size * alpha / sigma**2, frame.shape[1])
        return (self.radius * mean / size * u) @ frame.T


class RotatedDenoiser:
    r"""A denoiser whose score has a gauge field added: s + A s with an antisymmetric A.

    div(p A grad log p) = sum_ij A_ij d_i d_j p = 0, so that the flow and every reverse chain have the same marginals as
    before, whatever p is, while paths turn and the Jacobian is no longer symmetric.

    Args:
        denoiser: the exact one, of flat events.
        skew: A, antisymmetric, (D, D).
    """

    def __init__(self, denoiser: Denoiser, skew: Tensor):
        self.denoiser, self.skew = denoiser, skew

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        x0 = self.denoiser(x_t, level, condition)
        return x0 + (x0 - x_t / column(level.alpha, x_t)) @ _like(self.skew, x_t).T


def bessel_ratio(kappa: Tensor, dimension: int) -> Tensor:
    """I_{d/2}(kappa) / I_{d/2 - 1}(kappa), shape of kappa >= 0: the mean along its axis of a von Mises-Fisher law.

    By Gauss's continued fraction where kappa is small, and by the recurrence A_{d+2} = 1 / A_d - d / kappa from the
    circle's or the sphere's where it is large, each where it is stable.

    Raises:
        ValueError: d beyond 60, up to which it is right to 1e-10.
    """
    if not 2 <= dimension <= _MOST_RATIO:
        raise ValueError(f"a Bessel ratio of d = {dimension} is not computed here: from 2 to {_MOST_RATIO}")
    limit = 20.0 + dimension  # the more terms, the larger the kappa that the fraction is good for
    small = kappa.clamp(max=limit)
    fraction = torch.zeros_like(small)
    for n in range(int(1.5 * limit) + 10, -1, -1):
        fraction = small / (dimension + 2 * n + small * fraction)
    large = kappa.clamp(min=limit)
    order = 2 + dimension % 2
    ratio = torch.special.i1e(large) / torch.special.i0e(large) if order == 2 else 1 / torch.tanh(large) - 1 / large
    while order < dimension:
        ratio, order = 1 / ratio - order / large, order + 2
    return torch.where(kappa < limit, fraction, ratio)


def conservative_part(matrix: Tensor, covariance: Tensor) -> Tensor:
    """S of the gradient -S x that is nearest to a linear field -M x in the mean over N(0, C): S C + C S = M C + C M^T.

    The rest r = (S - M) x has div(p r) = 0. S is symmetric, and not the symmetric part of M unless that and C commute.

    Args:
        matrix: M, (D, D).
        covariance: C, positive definite, (D, D).
    """
    variances, axes = torch.linalg.eigh(covariance)
    right = matrix @ covariance + covariance @ matrix.T
    turned = axes.T @ right @ axes
    return axes @ (turned / (variances[:, None] + variances)) @ axes.T

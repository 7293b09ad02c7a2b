r"""Fields known in closed form, to test everything else against: independent Gaussian mixtures at both ends.

With x0 in component i and x1 in component j, x_t is N(m, C) with (arXiv 2303.08797)

    m = alpha m0 + beta m1,   C = alpha^2 C0 + beta^2 C1 + gamma^2 I,   r = C^-1 (x - m),

so that E[x0 | x] = m0 + alpha C0 r, E[x1 | x] = m1 + beta C1 r and E[z | x] = gamma r; averaged over the pairs (i, j)
with the weights p(i, j | x) these are the fields. Everything is float64 inside.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from osmose.errors import UserError
from osmose.interpolants.fields import Fields
from osmose.interpolants.paths import Coefficients, Path


class GaussianMixture:
    """A mixture of K Gaussians in D dimensions, float64.

    Args:
        means: shape (K, D).
        covariances: positive definite, shape (K, D, D).
        weights: at least 0, shape (K,); equal when omitted, divided by their sum, with a warning, when that is not 1.

    Raises:
        UserError: shapes that do not fit, negative weights or none that is positive, a covariance that is none.
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor | None = None):
        means, covariances = means.double(), covariances.double()
        if means.ndim != 2 or covariances.shape != (*means.shape, means.shape[1]):
            raise UserError(
                f"mixture: means {tuple(means.shape)} and covariances {tuple(covariances.shape)} are not valid: "
                "must be (K, D) and (K, D, D)"
            )
        weights = torch.ones(len(means), dtype=torch.float64) / len(means) if weights is None else weights
        weights = weights.double()
        if weights.shape != means.shape[:1]:
            raise UserError(f"weights: shape {tuple(weights.shape)} is not valid: must be ({len(means)},)")
        if not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < math.inf:
            raise UserError(f"weights: {weights.tolist()} are not valid: must be at least 0, with a positive sum")
        if abs(float(weights.sum()) - 1) > 1e-6:
            warnings.warn(f"weights sum to {float(weights.sum()):.6g}; they are divided by that", stacklevel=2)
        roots, failed = torch.linalg.cholesky_ex(covariances)
        if bool(failed.any()) or not torch.allclose(covariances, covariances.mT):
            raise UserError("covariances: are not valid: each must be symmetric and positive definite")
        self.means, self.covariances, self.weights = means, covariances, weights / weights.sum()
        self._roots = roots

    @classmethod
    def isotropic(cls, means: Tensor, std: float, weights: Tensor | None = None) -> GaussianMixture:
        """Components of one deviation in all directions."""
        unit = torch.eye(means.shape[-1], dtype=torch.float64)
        return cls(means, (std**2 * unit).expand(len(means), -1, -1), weights)

    @classmethod
    def standard(cls, dimension: int) -> GaussianMixture:
        """N(0, I)."""
        return cls.isotropic(torch.zeros(1, dimension), 1.0)

    @property
    def dimension(self) -> int:
        """D."""
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """Of the whole mixture, shape (D,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Of the whole mixture, shape (D, D)."""
        apart = self.means - self.mean
        return (self.weights[:, None, None] * (self.covariances + apart[:, :, None] * apart[:, None])).sum(0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws, float64 (n, D)."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dimension, generator=generator, dtype=torch.float64)
        return self.means[component] + (self._roots[component] @ noise[:, :, None])[:, :, 0]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at x (n, D), float64 (n,)."""
        log_joint, _ = _posterior(x.double(), self.means[None], self.covariances[None], self.weights.log())
        return log_joint.logsumexp(1)


class MixturePath:
    """A path between two mixtures, with all of its fields.

    Args:
        path: any path with finite alpha' or one-sided.
        rho1: the law of x1.
        rho0: the law of x0; None for a one-sided path, where it is N(0, I), and for a mirror, where x0 is x1.

    Raises:
        UserError: a rho0 that the path does not have, or lacks, or of another dimension.
    """

    def __init__(self, path: Path, rho1: GaussianMixture, rho0: GaussianMixture | None = None):
        alone = path.one_sided or path.mirror
        if alone != (rho0 is None):
            raise UserError(f"rho0: {path.kind} has {'one of its own' if alone else 'none of its own: give its law'}")
        self.path, self.rho1 = path, rho1
        self.rho0 = rho0 or (rho1 if path.mirror else GaussianMixture.standard(rho1.dimension))
        if self.rho0.dimension != rho1.dimension:
            raise UserError(f"rho0: dimension {self.rho0.dimension} is not rho1's {rho1.dimension}")
        # Pairs of components; of a mirror, whose alpha is 0, x0 is no second variable.
        first = GaussianMixture.standard(rho1.dimension) if path.mirror else self.rho0
        ones, others = len(first.means), len(rho1.means)
        self._means = first.means.repeat_interleave(others, 0), rho1.means.repeat(ones, 1)
        self._covariances = first.covariances.repeat_interleave(others, 0), rho1.covariances.repeat(ones, 1, 1)
        self._log_weights = (first.weights.log()[:, None] + rho1.weights.log()).flatten()

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x0 and x1, each float64 (n, D): independent, of a mirror the same."""
        x1 = self.rho1.sample(n, generator)
        return (x1 if self.path.mirror else self.rho0.sample(n, generator)), x1

    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Logarithm of rho(t, x), float64 (n,), for x (n, D) and t of shape () or (n,)."""
        means, covariances = self._moments(self.path.at(t))
        return _posterior(x.double(), means, covariances, self._log_weights)[0].logsumexp(1)

    def fields(self, t: Tensor | float, x: Tensor) -> Fields:
        """Every field at x (n, D) and t of shape () or (n,), in the dtype of x."""
        c = self.path.at(t)
        return self._read(c, x)[0]

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """E[alpha' x0 + beta' x1 | x_t], shape and dtype of x."""
        return self._read(self.path.at(t), x)[1]

    def _moments(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        """m, (T, K, D), and C, (T, K, D, D), of all pairs; T is 1 for a single time."""
        alpha, beta, gamma = (v.reshape(-1, 1, 1) for v in (c.alpha, c.beta, c.gamma))
        means = alpha * self._means[0] + beta * self._means[1]
        alpha, beta, gamma = alpha[..., None], beta[..., None], gamma[..., None]
        unit = torch.eye(means.shape[2], dtype=torch.float64)
        return means, alpha**2 * self._covariances[0] + beta**2 * self._covariances[1] + gamma**2 * unit

    def _read(self, c: Coefficients, x: Tensor) -> tuple[Fields, Tensor]:
        """All fields, and v."""
        log_joint, r = _posterior(x.double(), *self._moments(c), self._log_weights)
        share = torch.softmax(log_joint, 1)
        weighted = share[:, :, None] * r
        scores = -weighted.sum(1)
        alpha, beta, gamma, alpha_dot, beta_dot, alpha_product, gamma_product = (
            v.reshape(-1, 1)
            for v in (c.alpha, c.beta, c.gamma, c.alpha_dot, c.beta_dot, c.alpha_alpha_dot, c.gamma_gamma_dot)
        )
        # Symmetric covariances below each other: all components' C r, weighted and summed, are one product of matrices.
        pulls = [weighted.flatten(1) @ covariances.flatten(0, 1) for covariances in self._covariances]
        centre0 = share @ self._means[0]
        eta0, eta1 = centre0 + alpha * pulls[0], share @ self._means[1] + beta * pulls[1]
        # alpha' eta0 by its two terms: of a one-sided path the first is 0, and alpha' may be infinite at t = 1.
        own = alpha_product * pulls[0] if self.path.one_sided else alpha_dot * centre0 + alpha_product * pulls[0]
        v = own + beta_dot * eta1
        eta = eta0 if self.path.one_sided else -gamma * scores
        b = v - gamma_product * scores
        eta0 = eta1 if self.path.mirror else eta0
        return Fields(*(field.to(x) for field in (b, scores, eta, eta0, eta1))), v.to(x)


def _posterior(x: Tensor, means: Tensor, covariances: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(k) N(x | m_k, C_k), (n, K), and C_k^-1 (x - m_k), (n, K, D), for moments at one time or at n times."""
    root = torch.linalg.cholesky(covariances)
    precision = torch.cholesky_inverse(root)
    apart = x[:, None] - means
    if len(precision) == 1:
        r = (apart.transpose(0, 1) @ precision[0]).transpose(0, 1)
    else:
        r = (precision @ apart[..., None])[..., 0]
    log_volume = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + x.shape[1] * math.log(2 * math.pi) / 2
    return log_weights - log_volume - (apart * r).sum(2) / 2, r

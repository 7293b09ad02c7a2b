r"""The Schroedinger bridge between two Gaussians in closed form (arXiv 2303.08797; Bunne et al., arXiv 2202.05722).

Of all processes dX = u dt + sqrt(2 epsilon) dW from N(m0, C0) to N(m1, C1) it has the least energy, int_0^1 E|u|^2 dt.
It is Gaussian. Where C0 and C1 commute, as they are taken to do, it is one process for each of their common axes; with
deviations s0 and s1 there, its covariance of both ends is

    c = (sqrt(4 s0^2 s1^2 + 4 epsilon^2) - 2 epsilon) / 2,   so that c^2 + 2 epsilon c = s0^2 s1^2,

and given its ends it is a Brownian bridge of variance 2 epsilon t (1 - t). At epsilon = 0 it is optimal transport.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.errors import UserError


class GaussianBridge:
    """The bridge between N(mean0, cov0) and N(mean1, cov1), float64.

    Args:
        mean0: shape (D,).
        cov0: positive definite, shape (D, D).
        mean1: shape (D,).
        cov1: positive definite, shape (D, D), commuting with cov0.
        epsilon: at least 0; the process has noise of variance 2 epsilon per unit of time.

    Raises:
        UserError: shapes that differ, covariances that do not commute or are none, a negative epsilon.
    """

    def __init__(self, mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor, epsilon: float):
        self.mean0, cov0, self.mean1, cov1 = (v.double() for v in (mean0, cov0, mean1, cov1))
        if cov0.shape != (*mean0.shape, *mean0.shape) or cov1.shape != cov0.shape or mean1.shape != mean0.shape:
            shapes = ", ".join(str(tuple(v.shape)) for v in (mean0, cov0, mean1, cov1))
            raise UserError(f"bridge: means and covariances of shapes {shapes} do not belong together")
        if not 0 <= epsilon < float("inf"):
            raise UserError(f"epsilon: {epsilon:g} is not valid: must be a finite number, at least 0")
        # Axes of a combination that has no more equal variances than both together have: they serve both.
        scales = [float(v.diagonal().mean()) for v in (cov0, cov1)]
        if not min(scales) > 0:
            raise UserError("bridge: a covariance is not positive definite")
        _, self.axes = torch.linalg.eigh(cov0 / scales[0] + 0.6180339887 * cov1 / scales[1])
        turned = [self.axes.T @ v @ self.axes for v in (cov0, cov1)]
        self.var0, self.var1 = (v.diagonal().clone() for v in turned)
        for value, scale in zip(turned, scales, strict=True):
            if float((value - torch.diag(value.diagonal())).abs().max()) > 1e-8 * scale:
                raise UserError("bridge: the covariances do not commute; only those with common axes have this form")
        if not float(torch.minimum(self.var0, self.var1).min()) > 0:
            raise UserError("bridge: a covariance is not positive definite")
        self.epsilon = epsilon
        self.cross = (self.var0 * self.var1 + epsilon**2).sqrt() - epsilon

    def mean(self, t: float) -> Tensor:
        """E X_t, shape (D,)."""
        return (1 - t) * self.mean0 + t * self.mean1

    def variances(self, t: float) -> Tensor:
        """Var X_t along each axis, shape (D,)."""
        bridge = 2 * t * (1 - t) * (self.cross + self.epsilon)
        return (1 - t) ** 2 * self.var0 + t**2 * self.var1 + bridge

    def covariance(self, t: float) -> Tensor:
        """Cov X_t, shape (D, D)."""
        return self.axes * self.variances(t) @ self.axes.T

    def drift(self, t: float, x: Tensor) -> Tensor:
        """u(t, x) of the process that runs forwards, for x (n, D), in its dtype."""
        slopes = -2 * (1 - t) * self.var0 + 2 * t * self.var1 + 2 * (1 - 2 * t) * (self.cross + self.epsilon)
        gain = (slopes / 2 - self.epsilon) / self.variances(t)
        apart = (x.double() - self.mean(t)) @ self.axes
        return (self.mean1 - self.mean0 + apart * gain @ self.axes.T).to(x)

    def energy(self) -> float:
        """int_0^1 E|u|^2 dt: 4 epsilon times the divergence from the free process; at epsilon = 0, W2 squared."""
        ratio = self.cross / self.var0  # x1 given x0 has this slope in x0, and the variance 2 epsilon ratio
        spread = 2 * self.epsilon * (ratio - 1 - ratio.log()) + self.var0 * (ratio - 1) ** 2
        return float((self.mean1 - self.mean0).square().sum() + spread.sum())

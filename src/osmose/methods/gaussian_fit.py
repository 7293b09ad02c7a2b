"""Gaussians fitted in closed form: `gaussian` is one with a full covariance, `class-means` one for each class.

    gaussian       p(x) = N(x; mu, S)
    class-means    p(x) = sum over k of pi_k N(x; mu_k, S),   S the covariance within classes, pi_k their frequencies

These are the maximum-likelihood fits, up to the ridge of `methods.moments`. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.methods.base import MethodConfig, OneShot
from osmose.methods.messages import Batch, LossTerms
from osmose.methods.moments import Moments, require_affordable


class _FittedConfig(MethodConfig):
    """A method without a step of training."""

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {}

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:  # noqa: ARG003
        return {"steps": 0}


class GaussianConfig(_FittedConfig):
    """One Gaussian with the mean and the covariance of the data."""

    kind: Literal["gaussian"] = "gaussian"

    @field_validator("conditional")
    @classmethod
    def _one_for_all(cls, conditional: bool) -> bool:
        if conditional:
            raise ValueError("one Gaussian knows no classes; class-means does")
        return conditional

    def build(self, spec: DataSpec) -> GaussianFit:
        return GaussianFit(self, spec, 1)


class ClassMeansConfig(_FittedConfig):
    """A Gaussian around the mean of each class, all with the covariance within classes."""

    kind: Literal["class-means"] = "class-means"

    def build(self, spec: DataSpec) -> GaussianFit:
        if not spec.num_classes:
            raise UserError("class-means: needs data with classes, and these have none; take gaussian")
        return GaussianFit(self, spec, spec.num_classes)


class GaussianFit(OneShot):
    """See the module's text. Before `prepare`, standard normal.

    Attributes:
        weights: pi, shape (K,).
        means: mu_k in model units, shape (K, D).
        scale_tril: lower triangular L with L L^T = S, shape (D, D).
    """

    evaluations: ClassVar[int] = 0

    def __init__(self, config: MethodConfig, spec: DataSpec, num_components: int):
        super().__init__(config, spec)
        require_affordable(spec)
        self.weights = nn.Parameter(torch.full((num_components,), 1 / num_components), requires_grad=False)
        self.means = nn.Parameter(torch.zeros(num_components, spec.dimension), requires_grad=False)
        self.scale_tril = nn.Parameter(torch.eye(spec.dimension), requires_grad=False)

    def prepare(self, items: Iterable[Batch]) -> None:
        """Fit to the items. A class without any keeps the weight 0 and gets the mean of all items."""
        moments = Moments.of(items, self.spec, len(self.weights))
        weights = moments.counts / moments.counts.sum()
        missing = (moments.counts == 0)[:, None]
        self.weights.copy_(weights)
        self.means.copy_(torch.where(missing, weights @ moments.means, moments.means))
        self.scale_tril.copy_(torch.linalg.cholesky(moments.covariance()))

    def networks(self) -> list[nn.Module]:
        return []

    def probe(self, items: int) -> None:
        """There is no network to run."""

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:  # noqa: ARG002
        """-log p(x) / D, or -log p(x | class) / D where the model is told classes; float64 on the CPU."""
        x = batch.x0.flatten(1).cpu().double()
        means, scale_tril = self.means.cpu().double(), self.scale_tril.cpu().double()
        centre = means.mean(0)  # both sides of the distance near the origin: nothing is lost in their difference
        x, means = (torch.linalg.solve_triangular(scale_tril, (v - centre).T, upper=False).T for v in (x, means))
        squares = torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square()
        log_scale = scale_tril.diagonal().log().sum() + self.spec.dimension / 2 * math.log(2 * math.pi)
        densities = -squares / 2 - log_scale
        if self.config.conditional:
            assert batch.condition is not None
            log_p = densities.gather(1, batch.condition.cpu()[:, None])[:, 0]
        else:
            log_p = (self.weights.cpu().double().log() + densities).logsumexp(1)
        return LossTerms((-log_p / self.spec.dimension).to(batch.x0))

    def draw(self, draws: Draws, condition: Tensor | None) -> Tensor:
        z = draws.normal(self.spec.shape).flatten(1).to(self.means)
        if condition is None:
            cumulated = self.weights.cpu().double().cumsum(0)
            u = draws.branch("component").uniform() * cumulated[-1]
            condition = torch.searchsorted(cumulated, u, right=True).clamp(max=len(cumulated) - 1).to(z.device)
        x = self.means[condition] + z @ self.scale_tril.T
        return x.view(-1, *self.spec.shape)

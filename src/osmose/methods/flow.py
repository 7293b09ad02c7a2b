"""A normalizing flow: coupling layers of rational-quadratic splines (Durkan et al. 2019, arXiv 1906.04032).

    z = f(V^T (x - mu) / sqrt(lambda)),   log p(x) = log N(z; 0, I) + log |det dz / dx|

The first layer is fixed: it whitens by the mean and the principal components of the data (`methods.moments`). The
coupling layers f start as the identity, so that the flow starts as the Gaussian that is fitted to the data and what it
learns is what a Gaussian misses. Each layer changes one half of the leading components by monotone splines whose shape
a small network reads off the other half: both directions cost one evaluation of each network. The components after the
leading ones stay Gaussian: in pictures they hold little that is seen, and most of the values.

Data with levels are dequantised: x is moved by uniform noise one level wide, and the mean of -log p is then a bound on
that of the probability of the level (Theis et al. 2016, arXiv 1511.01844).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.methods.base import MethodConfig, OneShot
from osmose.methods.messages import Batch, LossTerms
from osmose.methods.moments import Moments, level_step, require_affordable


class FlowConfig(MethodConfig):
    """Size of the coupling layers."""

    kind: Literal["flow"] = "flow"
    transforms: int = Field(8, ge=1, description="coupling layers")
    width: int = Field(64, ge=1, description="of the two hidden layers of each coupling layer's network")
    bins: int = Field(4, ge=2, description="of each spline")
    components: int = Field(128, ge=2, description="leading principal components that the layers change; all of fewer")

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {"width": 64 if spec.dimension <= 256 else 128}

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:
        values: dict[str, Any] = {"steps": 1500, "batch_size": 128, "lr": 2e-3, "precision": "fp32"}
        # Small pictures come in small numbers, which a flow learns by heart otherwise.
        return values | {"weight_decay": 1.0} if spec.kind == "image" and spec.dimension <= 256 else values

    def build(self, spec: DataSpec) -> Flow:
        return Flow(self, spec)


class Flow(OneShot):
    """See the module's text. Before `prepare`, the whitening is the identity.

    Attributes:
        layers: the coupling layers, from whitened data to noise.
        mean: mu, model units, shape (D,).
        directions: V, the principal components as columns, by falling variance, shape (D, D).
        deviations: sqrt(lambda), shape (D,).
    """

    config: FlowConfig

    def __init__(self, config: FlowConfig, spec: DataSpec):
        super().__init__(config, spec)
        require_affordable(spec)
        if spec.dimension < 2:
            raise UserError("flow: couples the values of an item, and these data have one each; take gaussian")
        self.leading = min(config.components, spec.dimension)
        self.layers = _layers(config, self.leading, (spec.num_classes or 0) if config.conditional else 0)
        self.mean = nn.Buffer(torch.zeros(spec.dimension))
        self.directions = nn.Buffer(torch.eye(spec.dimension))
        self.deviations = nn.Buffer(torch.ones(spec.dimension))
        self._step = level_step(spec)

    def prepare(self, items: Iterable[Batch]) -> None:
        """Set the whitening."""
        moments = Moments.of(items, self.spec)
        variances, directions = torch.linalg.eigh(moments.covariance())
        self.mean.copy_(moments.means[0])
        self.directions.copy_(directions.flip(1))
        self.deviations.copy_(variances.flip(0).sqrt())

    def normalise(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise.

        Args:
            x: model units, shape (B, *event).
            condition: classes, int64 (B,), or None.

        Returns:
            z, shape (B, D), and log |det dz / dx|, shape (B,).
        """
        z = (x.flatten(1) - self.mean) @ self.directions / self.deviations
        leading, log_det = self._transform(condition, z).call_and_ladj(z[:, : self.leading])
        return torch.cat([leading, z[:, self.leading :]], 1), log_det - self.deviations.log().sum()

    def invert(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Noise (B, D) to data (B, *event): the inverse of `normalise`."""
        leading = self._transform(condition, z).inv(z[:, : self.leading])
        z = torch.cat([leading, z[:, self.leading :]], 1)
        return (z * self.deviations @ self.directions.T + self.mean).view(-1, *self.spec.shape)

    def _transform(self, condition: Tensor | None, like: Tensor) -> Any:
        """The transformation of the leading components, for given classes, as zuko has it."""
        if condition is None:
            return self.layers()
        return self.layers(nn.functional.one_hot(condition, self.spec.num_classes or 0).to(like))

    def networks(self) -> list[nn.Module]:
        return [layer.hyper for layer in self.layers.transforms]

    def probe(self, items: int) -> None:
        condition = torch.zeros(items, dtype=torch.int64, device=self.device) if self.config.conditional else None
        self.invert(torch.zeros(items, self.spec.dimension, device=self.device), condition)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        """-log p(x) / D of the dequantised items, never in half precision: a density is a matter of small numbers."""
        x = batch.x0
        if self._step is not None:
            u = torch.special.ndtr(draws.normal(self.spec.shape))  # uniform in (0, 1)
            x = x + (u - 0.5) * self._step.to(x)
        with torch.autocast(x.device.type, enabled=False):
            z, log_det = self.normalise(x, batch.condition)
        log_p = log_det - (z.square() + math.log(2 * math.pi)).sum(1) / 2
        return LossTerms(-log_p / self.spec.dimension)

    def draw(self, draws: Draws, condition: Tensor | None) -> Tensor:
        return self.invert(draws.normal(self.spec.shape).flatten(1).to(self.mean), condition)


def _layers(config: FlowConfig, features: int, classes: int) -> Any:
    """Coupling layers of zuko's, the identity to begin with.

    Raises:
        UserError: zuko is not installed.
    """
    try:
        from zuko.flows.coupling import GeneralCouplingTransform
        from zuko.lazy import LazyComposedTransform
        from zuko.transforms import MonotonicRQSTransform
    except ImportError:
        raise UserError("flow needs the package zuko: pip install 'osmose[flow]'") from None
    layers = []
    halves = torch.zeros(features, dtype=torch.bool)
    for index in range(config.transforms):
        # A new split for every second layer; the one after it changes the other half.
        halves = ~halves if index % 2 else torch.randperm(features) % 2 == 0
        layer = GeneralCouplingTransform(
            features,
            classes,
            halves,
            univariate=MonotonicRQSTransform,
            shapes=[(config.bins,), (config.bins,), (config.bins - 1,)],
            hidden_features=(config.width, config.width),
        )
        nn.init.zeros_(layer.hyper[-1].weight)
        nn.init.zeros_(layer.hyper[-1].bias)
        layers.append(layer)
    return LazyComposedTransform(*layers)

"""The variational autoencoder (arXiv 1312.6114), with one learned variance for all values (arXiv 2006.13202).

    q(z | x) = N(m(x), diag(s(x)^2)),   p(z) = N(0, I),   p(x | z) = N(mu(z), sigma^2 I)
    -ELBO    = -log p(x | z) + KL(q(z | x) || p(z)),   z = m(x) + s(x) eps,  eps ~ N(0, I)

The loss is this bound in nats per dimension of x. A sample is mu(z), without the noise of p(x | z).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.gaussian.draws import Draws
from osmose.methods.base import MethodConfig, OneShot
from osmose.methods.messages import Batch, LossTerms
from osmose.networks.resnet import Contracting, Expanding, channels_for

#: log sigma^2 for each unit of its parameter. Adam moves every parameter by about the learning rate a step, and this
#: one has further to go than a weight.
_LOG_VARIANCE_UNIT = 10.0


class VAEConfig(MethodConfig):
    """A Gaussian prior, and encoder and decoder as in SNGAN's ResNet."""

    kind: Literal["vae"] = "vae"
    latent: int = Field(32, ge=1, description="length of z")
    channels: int = Field(
        32, ge=4, description="of the largest feature maps of both networks; units of an MLP's layers"
    )

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {"channels": channels_for(spec.shape), "latent": min(32, spec.dimension)}

    def build(self, spec: DataSpec) -> VAE:
        return VAE(self, spec)


class VAE(OneShot):
    """See the module's text. With classes, a vector of the item's class is added to z, and another to m(x), log s(x)^2.

    Attributes:
        encoder: x (B, *event) to m(x) and log s(x)^2, one after the other, (B, 2 latent).
        decoder: z (B, latent) to mu(z) (B, *event).
    """

    config: VAEConfig

    def __init__(self, config: VAEConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.encoder = Contracting(spec.shape, 2 * config.latent, config.channels)
        self.decoder = Expanding(config.latent, spec.shape, config.channels)
        classes = spec.num_classes if config.conditional else None
        self.encoder_classes = nn.Embedding(classes, 2 * config.latent) if classes else None
        self.decoder_classes = nn.Embedding(classes, config.latent) if classes else None
        self.scaled_log_variance = nn.Parameter(torch.zeros(()))

    @property
    def log_variance(self) -> Tensor:
        """Of p(x | z): log sigma^2, in squared model units."""
        return self.scaled_log_variance * _LOG_VARIANCE_UNIT

    def networks(self) -> list[nn.Module]:
        return [self.encoder, self.decoder]

    def probe(self, items: int) -> None:
        condition = torch.zeros(items, dtype=torch.int64, device=self.device) if self.config.conditional else None
        self._decode(torch.ones(items, self.config.latent, device=self.device), condition)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        x0, dimension = batch.x0, self.spec.dimension
        mean, log_variance = self._encode(x0, batch.condition)
        z = mean + (log_variance / 2).exp() * draws.normal((self.config.latent,)).to(x0.dtype)
        error = (x0 - self._decode(z, batch.condition)).square().flatten(1).mean(1)
        reconstruction = (error * (-self.log_variance).exp() + self.log_variance + math.log(2 * math.pi)) / 2
        kl = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / (2 * dimension)
        return LossTerms(reconstruction + kl, parts={"reconstruction": reconstruction.detach(), "kl": kl.detach()})

    def draw(self, draws: Draws, condition: Tensor | None) -> Tensor:
        return self._decode(draws.normal((self.config.latent,)), condition)

    def _encode(self, x0: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """M(x) and log s(x)^2, each (B, latent), in the precision of x0."""
        out = self.encoder(x0).to(x0.dtype)
        if self.encoder_classes is not None and condition is not None:
            out = out + self.encoder_classes(condition)
        mean, log_variance = out.chunk(2, 1)
        return mean, log_variance

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """mu(z), model units, in the precision of z."""
        if self.decoder_classes is not None and condition is not None:
            z = z + self.decoder_classes(condition)
        out: Tensor = self.decoder(z).to(z.dtype)
        return out

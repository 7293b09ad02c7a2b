r"""Text from left to right, each character by a short diffusion of its embedding (arXiv 2506.14202, autoregressive).

A character stands for a point y, a row of a fixed table of unit vectors in d dimensions; z = y + sigma eps. Told z and
the clean characters before it, the network answers logits, and the denoiser is the mean of the table under them:

    D(z, sigma) = softmax(F(c_in z, c_noise, characters before)) table,    loss = cross-entropy of the character.

The loss is not weighed by 1 / c_out^2, which at small noise is all that would count. A character is the likeliest of
the last of a few Euler steps from sigma_max down; noise makes it a random one. The table is drawn once and is no part
of what is trained: blocks that are trained apart have to speak of the same points.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from osmose.data.dataset import DataSpec
from osmose.gaussian.draws import Draws, seeded
from osmose.gaussian.grid import Spacing, TimeGrid
from osmose.gaussian.parametrization import EDMParametrization
from osmose.gaussian.schedule import Level, VarianceExploding
from osmose.methods.base import SamplingConfig
from osmose.methods.characters import Characters, CharactersConfig
from osmose.methods.messages import Batch, LossTerms, Watch
from osmose.methods.sharing import SharedSigma
from osmose.methods.times import LogNormalTimes


class TokenSampling(SamplingConfig):
    """Steps of each character."""

    num_steps: int = Field(4, ge=1, description="Euler steps of each character")
    spacing: Spacing = Field("karras", description="of their noise levels")


class TokenDiffusionConfig(CharactersConfig, SharedSigma):
    """A network that sees the characters before, and the noise of an embedding."""

    suited = "causal-text"
    kind: Literal["token-diffusion"] = "token-diffusion"
    dimension: int = Field(32, ge=1, description="d, of the embedding that is diffused")
    schedule: VarianceExploding = VarianceExploding()
    times: LogNormalTimes = LogNormalTimes(stratified=True)
    sampling: TokenSampling = TokenSampling()

    def build(self, spec: DataSpec) -> TokenDiffusion:
        return TokenDiffusion(self, spec)


class TokenDiffusion(Characters):
    """See the module's text.

    Attributes:
        table: y of each character, unit vectors, float32 (V, d).
        parametrization: EDM's, for data of variance 1 / d.
    """

    config: TokenDiffusionConfig
    table: Tensor

    def __init__(self, config: TokenDiffusionConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.length = spec.shape[0]
        drawn = torch.randn(self.symbols, config.dimension, generator=seeded("table", self.symbols, config.dimension))
        self.register_buffer("table", F.normalize(drawn, dim=1))
        self.parametrization = EDMParametrization(sigma_data=config.dimension**-0.5)
        self.network = config.network.build((self.length, 1 + config.dimension), num_outputs=self.symbols)
        self.times = config.times.build(config.schedule)
        TimeGrid.of(config.schedule, config.sampling.num_steps, config.sampling.spacing)

    def probe(self, items: int) -> None:
        z = torch.zeros(items, self.length, self.config.dimension, device=self.device)
        codes = torch.zeros(items, self.length, dtype=torch.int64, device=self.device)
        self.logits(codes, z, self.config.schedule.level(torch.full((items,), 0.5, dtype=torch.float64)))

    def logits(self, codes: Tensor, z: Tensor, level: Level) -> Tensor:
        """What the network makes of noisy embeddings (B, length, d) after clean characters: (B, V, length)."""
        c_in = torch.as_tensor(self.parametrization.coefficients(level).c_in, dtype=torch.float32)
        label = torch.as_tensor(self.config.schedule.label(level), dtype=torch.float32)
        c_in, label = (value.to(z.device).repeat(len(z) // value.numel()) for value in (c_in, label))
        out: Tensor = self.network(torch.cat([codes[..., None].to(z), c_in[:, None, None] * z], -1), label, None)
        return out.float()

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        codes = self.spec.to_levels(batch.x0)
        t, weight = self.times.draw(draws)
        level = self.config.schedule.level(t)
        sigma = torch.as_tensor(level.sigma, dtype=torch.float32).to(self.device)[:, None, None]
        z = self.table[codes] + sigma * draws.normal((self.length, self.config.dimension))
        surprise = F.cross_entropy(self.logits(codes, z, level), codes, reduction="none").mean(1)
        if weight is not None:
            surprise = surprise * weight.to(surprise)
        return LossTerms(surprise, t, {}, weight)

    def sampling(self, **options: Any) -> SamplingConfig:
        sampling = super().sampling(**options)
        assert isinstance(sampling, TokenSampling)
        TimeGrid.of(self.config.schedule, sampling.num_steps, sampling.spacing)
        return sampling

    def written(
        self, codes: Tensor, missing: Tensor, draws: Draws, sampling: SamplingConfig, on_step: Watch
    ) -> tuple[Tensor, int]:
        """As of `Characters`, from left to right: what comes after a gap does not tell what is in it."""
        assert isinstance(sampling, TokenSampling)
        levels = TimeGrid.of(self.config.schedule, sampling.num_steps, sampling.spacing).levels
        places = [place for place in range(self.length) if bool(missing[:, place].any())]
        on_step(0, len(places))
        # Drawn for all places, so that an item's text does not depend on what is missing in others.
        noises = draws.normal((self.length, self.config.dimension))
        for done, place in enumerate(places, 1):
            noise = noises[:, place]
            z = torch.zeros(len(codes), self.length, self.config.dimension, device=self.device)
            z[:, place] = noise * levels[0].sigma
            for level, following in pairwise(levels):
                logits = self.logits(codes, z, level)[..., place]
                self.require_finite(logits)
                ratio = following.sigma / level.sigma
                z[:, place] = ratio * z[:, place] + (1 - ratio) * (logits.softmax(1) @ self.table)
            codes[:, place] = torch.where(missing[:, place], logits.argmax(1), codes[:, place])
            on_step(done, len(places))
        return codes, len(places) * sampling.num_steps

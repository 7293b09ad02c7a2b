"""SNGAN: a generator against a critic with spectral normalisation (arXiv 1802.05957), with the hinge loss.

    critic     E max(0, 1 - D(x0)) + E max(0, 1 + D(G(z)))        every step
    generator  -E D(G(z)),  z ~ N(0, I)                           every `critic_steps` steps, besides

One optimiser takes both gradients of a step at once. They do not mix: the critic sees samples that are detached, the
generator's loss runs through a copy of the critic whose parameters are, and Adam treats every parameter by itself. On
the other steps the generator has no gradient, and the optimiser leaves it alone. Sampling is one evaluation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from osmose.data.dataset import DataSpec
from osmose.gaussian.draws import Draws
from osmose.methods.base import MethodConfig, OneShot
from osmose.methods.messages import Batch, LossTerms
from osmose.networks.resnet import Contracting, Expanding, channels_for


class SNGANConfig(MethodConfig):
    """Generator and critic as in SNGAN's ResNet."""

    kind: Literal["sngan"] = "sngan"
    latent: int = Field(64, ge=1, description="length of the generator's input z")
    channels: int = Field(
        32, ge=4, description="of the largest feature maps of both networks; units of an MLP's layers"
    )
    critic_steps: int = Field(5, ge=1, description="steps of the critic for each step of the generator")

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {"channels": channels_for(spec.shape)}

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:
        length = {"steps": 2500, "lr": 1e-3} if spec.dimension <= 256 else {"steps": 4000, "lr": 5e-4}
        return {**length, "batch_size": 64, "betas": (0.0, 0.9), "clip_grad": None, "warmup": 0}

    def build(self, spec: DataSpec) -> SNGAN:
        return SNGAN(self, spec)


class SNGAN(OneShot):
    """See the module's text.

    With classes the generator takes z plus a vector of the class, and the critic's last layer has an output for all
    classes and one for each, of which the item's own is added: a projection critic (arXiv 1802.05637).

    The model counts the updates that it has had in a buffer, which is saved with the weights: a resumed run goes on
    where it was in the round of `critic_steps`. In evaluation mode (validation) every loss holds both parts.
    """

    config: SNGANConfig
    idle_parameters: ClassVar[bool] = True

    def __init__(self, config: SNGANConfig, spec: DataSpec):
        super().__init__(config, spec)
        classes = (spec.num_classes or 0) if config.conditional else 0
        self.generator = Expanding(config.latent, spec.shape, config.channels)
        self.critic = Contracting(spec.shape, 1 + classes, config.channels, spectral=True)
        self.classes = nn.Embedding(classes, config.latent) if classes else None
        self.updates = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def networks(self) -> list[nn.Module]:
        return [self.generator, self.critic]

    def probe(self, items: int) -> None:
        condition = torch.zeros(items, dtype=torch.int64, device=self.device) if self.config.conditional else None
        self._items(torch.ones(items, self.config.latent, device=self.device), condition)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        z = draws.normal((self.config.latent,))
        taught = not self.training or (int(self.updates) + 1) % self.config.critic_steps == 0
        with contextlib.nullcontext() if taught else torch.no_grad():
            fake = self._items(z, batch.condition)
        condition = None if batch.condition is None else batch.condition.repeat(2)
        real_score, fake_score = self._score(torch.cat([batch.x0, fake.detach()]), condition).chunk(2)
        critic = F.relu(1 - real_score) + F.relu(1 + fake_score)
        if not taught:
            return LossTerms(critic, parts={"critic": critic.detach()})
        frozen = {name: value.detach() for name, value in self.critic.named_parameters()}
        generator = -self._score(fake, batch.condition, frozen)
        return LossTerms(critic + generator, parts={"critic": critic.detach(), "generator": generator.detach()})

    def after_step(self, parts: Sequence[tuple[Batch, Draws]]) -> None:  # noqa: ARG002
        self.updates.add_(1)
        self.critic.iterate()

    def draw(self, draws: Draws, condition: Tensor | None) -> Tensor:
        return self._items(draws.normal((self.config.latent,)), condition)

    def _items(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """G(z), model units, inside the data's range where there is one."""
        if self.classes is not None and condition is not None:
            z = z + self.classes(condition)
        x: Tensor = self.generator(z).float()
        if self.spec.model_range is None:
            return x
        low, high = self.spec.model_range
        return x.tanh() * ((high - low) / 2) + (high + low) / 2

    def _score(self, x: Tensor, condition: Tensor | None, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """D(x), float32 (B,), with the critic's own parameters or others."""
        out = (self.critic(x) if parameters is None else functional_call(self.critic, parameters, (x,))).float()
        common, own = out[:, 0], 0 if condition is None else out.gather(1, 1 + condition[:, None])[:, 0]
        return common + own

"""Networks in fewer bits: with layers of integers, or as a whole in bf16. `osmose quantize` makes them."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from osmose.configuration import ConfigError
from osmose.networks import NETWORKS
from osmose.networks.base import NetworkConfig
from osmose.networks.experts import Experts, ExpertsConfig
from osmose.networks.integers import Form, Inputs, IntegerLayer, RoundedLayer

InnerChoice = Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(NETWORKS.parse)]


class QuantizedConfig(NetworkConfig):
    """A network some of whose linear layers and convolutions have integer weights, and rounded inputs."""

    kind: Literal["quantized"] = "quantized"
    network: InnerChoice = Field(description="what it is in real numbers")
    layers: dict[str, Inputs] = Field(
        description="layers with integer weights by name, and whether their inputs are rounded: static, dynamic, float"
    )
    parts: dict[str, tuple[int, ...]] = Field(
        default_factory=dict, description="channels of the parts that a layer's input is joined from, by name"
    )
    bits: int = Field(8, ge=2, le=8, description="of inputs")
    weight_bits: int = Field(8, ge=2, le=8, description="of weights; 7 for processors without VNNI")
    form: Literal["integers", "rounded"] = Field(
        "integers", description="as they run, or as real numbers that are rounded in every evaluation: to be trained"
    )

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        network = self.network.build(event_shape, num_classes=num_classes, num_outputs=num_outputs)
        for name in self.layers:
            try:
                layer = network.get_submodule(name)
            except AttributeError:
                layer = None
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                raise ConfigError(f"layers.{name}", f"{self.network.kind} has no such linear layer or convolution")
            kind = IntegerLayer if self.form == "integers" else RoundedLayer
            network.set_submodule(name, kind(layer, self.form_of(name)))
        return network

    def form_of(self, name: str) -> Form:
        """How a layer is quantised."""
        return Form(self.layers[name], self.bits, self.weight_bits, self.parts.get(name, ()))


class BF16Config(NetworkConfig):
    """A network with weights and activations in bf16; its labels of time stay float32."""

    kind: Literal["bf16"] = "bf16"
    network: InnerChoice

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        return BF16(self.network.build(event_shape, num_classes=num_classes, num_outputs=num_outputs))


def in_fewer_bits(config: NetworkConfig) -> bool:
    """Whether a network, or a part of experts, has weights that cannot be trained: integers, or bf16."""
    if isinstance(config, ExpertsConfig):
        return any(in_fewer_bits(part) for part in config.parts)
    return isinstance(config, BF16Config) or (isinstance(config, QuantizedConfig) and config.form == "integers")


class BF16(nn.Module):
    """See `BF16Config`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.to(torch.bfloat16)

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """X (B, *event), label (B,), condition (B,) or None -> float32 (B, outputs, ...)."""
        out: Tensor = self.network(x.to(torch.bfloat16), label, condition)
        return out.float()


@torch.no_grad()
def to_integers(rounded: nn.Module, whole: nn.Module) -> None:
    """Give a network with integer layers what one with rounded layers rounds to, and all else that it has."""
    layers = dict(whole.named_modules())
    taken: set[str] = set()
    for name, layer in rounded.named_modules():
        if isinstance(layer, RoundedLayer):
            target = layers[name]
            assert isinstance(target, IntegerLayer)
            layer.integers(target)
            taken.add(f"{name}.")
    own = whole.state_dict()
    for name, value in rounded.state_dict().items():
        if not any(name.startswith(prefix) for prefix in taken):
            own[name].copy_(value)


@torch.no_grad()
def fill(target: nn.Module, real: nn.Module, whole: nn.Module) -> None:
    """Give a network the weights of the networks that it is made of: in real numbers, and in integers."""
    if isinstance(target, BF16):
        target.network.load_state_dict(real.state_dict())
    elif isinstance(target, Experts) and isinstance(whole, Experts):
        for part, one, other in zip(target.parts, real.parts, whole.parts, strict=True):  # type: ignore[arg-type]
            fill(part, one, other)
    elif isinstance(target, Experts):
        for part in target.parts:
            fill(part, real, whole)
    else:
        integers = any(isinstance(module, IntegerLayer) for module in target.modules())
        target.load_state_dict((whole if integers else real).state_dict())

r"""A network whose output is a gradient: F(u, label) = grad_u of the sum of the values of N(u, label), N any network.

Its Jacobian is symmetric whatever the weights, and so is that of the score, which is affine in F (`gaussian.
parametrization`): the model is the gradient of an energy. The price is a backward pass in every evaluation, and one
through it in training (arXiv 2402.03845 compares such models with free ones). Of the sum of N, <u, N>, |N|^2 / 2 and
<u, N> - |N|^2 / 2, which is the energy of a denoising autoencoder in these units, the first was learned as well as any
here, and it asks the least. With N = 0 it begins at F = 0, as other networks do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from osmose.errors import UserError
from osmose.networks import NETWORKS
from osmose.networks.base import Differentiating, NetworkConfig
from osmose.networks.calibration import calibrations
from osmose.networks.presets import network_for

InnerChoice = Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(NETWORKS.parse)]


class ConservativeConfig(NetworkConfig):
    """The gradient of the sum of another network's values: a network whose Jacobian is symmetric."""

    kind: Literal["conservative"] = "conservative"
    network: InnerChoice | None = Field(None, description="N; null: what suits the data")

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        if num_outputs != 1:
            raise UserError(
                "network: conservative gives the gradient of one energy, and a learned variance, or a second field, is "
                "another output; use variance=fixed_small, or learn one field"
            )
        network = self.inner(event_shape).build(event_shape, num_classes=num_classes)
        if calibrations(network):
            raise UserError(
                "network.network: a network with a linear prediction of its own is none to take the gradient of; take "
                "one without (mlp with linear=false, unet)"
            )
        return Conservative(network)

    def inner(self, event_shape: tuple[int, ...]) -> NetworkConfig:
        """N's configuration."""
        found: NetworkConfig = self.network or NETWORKS.parse(network_for(event_shape))
        return found

    def table(self, event_shape: tuple[int, ...]) -> list[dict[str, Any]]:
        return self.inner(event_shape).table(event_shape)


class Conservative(nn.Module, Differentiating):
    """See `ConservativeConfig`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """X (B, *event), label (B,), condition (B,) or None -> (B, *event)."""
        learning = torch.is_grad_enabled()
        # Fused attention has no second derivative. Tensors of inference mode cannot be differentiated: copies can.
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            given = [None if value is None else _usable(value) for value in (x, label, condition)]
            u = given[0]
            assert u is not None
            # No leaf: what counts operations puts hooks on a module's inputs that leaves do not take in such a pass.
            u = (u if u.requires_grad else u.detach().requires_grad_()).view_as(u)
            energy = self.network(u, *given[1:]).sum()
            (gradient,) = torch.autograd.grad(energy, u, create_graph=learning)
        return gradient


def _usable(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value

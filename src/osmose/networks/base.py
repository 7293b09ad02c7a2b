"""What every network is: a configuration that builds a module of (x, label, condition)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from osmose.configuration import Config


class NetworkConfig(Config, ABC):
    """Describes a network independently of the data it will see."""

    kind: str

    @abstractmethod
    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        """A network for events of a shape.

        The module is called as `network(x, label, condition)`: x (B, *event_shape), label float32 (B,) on the scale
        0..1000, condition int64 (B,) class indices or None. It returns `num_outputs` values for each value of the
        event, one event after the other along its first axis: (B, num_outputs * event_shape[0], *event_shape[1:]);
        a learned variance is a second output. All of them are 0 at the start.

        Raises:
            UserError: the configuration does not fit the shape; the message says what would.
        """

    def table(self, event_shape: tuple[int, ...]) -> list[dict[str, Any]]:  # noqa: ARG002
        """The parts of a network for events of a shape in the order of the computation, for people to look at.

        Each is a mapping with the same keys. A network that is the same throughout has none.

        Raises:
            UserError: the configuration does not fit the shape.
        """
        return []


def sinusoids(label: Tensor, width: int) -> Tensor:
    """DDPM's embedding of the step: sin and cos of label * 10000^(-j / (width/2 - 1)), shape (B, width), sine first."""
    half = width // 2
    frequency = torch.exp(
        torch.arange(half, dtype=torch.float32, device=label.device) * (-math.log(10_000) / max(half - 1, 1))
    )
    angle = label.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def near_zero_(module: nn.Module) -> nn.Module:
    """Initialise a layer's output to zero, so that residual branches start as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module

"""What every network is: a configuration that builds a module of (x, label, condition)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osmose.configuration import Config
from osmose.errors import UserError

#: How the embedding of time and class enters a block: added; as a scale and a shift of what the normalisation gives,
#: norm(h) (1 + s) + b (arXiv 2102.09672); as norm(h) pnorm(s) + pnorm(b), adaptive double normalisation (2410.11081).
Modulation = Literal["add", "scale-shift", "double-norm"]

#: What the configurations say of the fields that they share.
MODULATION = (
    "how the time enters a block: added (DDPM's), scaling and shifting the normalised values (IDDPM's), or so with "
    "scale and shift normalised over the channels (sCM's: slopes in time stay bounded)"
)
TIME_FREQUENCY = (
    "highest angular frequency of the time embedding, per unit of the label's 0..1000; 1 is DDPM's. Models that are "
    "differentiated in time, as consistency models are, need low ones: 0.002 to 0.02"
)


class NetworkConfig(Config, ABC):
    """Describes a network independently of the data it will see."""

    kind: str

    @abstractmethod
    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        """A network for events of a shape.

        The module is called as `network(x, label, condition)`: x (B, *event_shape), label float32 (B,) on the scale
        0..1000, condition int64 (B,) class indices, -1 for a class that is not told, or None. It returns `num_outputs`
        values for each value of the event, one event after the other along its first axis: (B, num_outputs *
        event_shape[0], *event_shape[1:]); a learned variance is a second output. All of them are 0 at the start, or
        what can be said without training (`networks.calibration`), and no more than a trace of anything else.

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


class StackConfig(NetworkConfig, ABC):
    """A stack of residual layers of one width: any number of them is a network of the same kind."""

    depth: int


class Noting(ABC):
    """A module that keeps count of something while it is evaluated, which its training log should tell."""

    @abstractmethod
    def noted(self) -> dict[str, float]:
        """Named numbers of the time since the last call."""

    @abstractmethod
    def complaint(self) -> str | None:
        """What people should know of these numbers, in one line; None where all is well. Does not begin anew."""


class Joining(ABC):
    """A module some of whose layers have an input that is joined from several parts, along its channels."""

    @abstractmethod
    def joined(self) -> dict[str, tuple[int, ...]]:
        """Channels of the parts, by the name of the layer in this module."""


class Differentiating:
    """A network that is differentiated in its own evaluation, which `torch.compile` cannot follow."""


class Everywhere:
    """A network of values at points, which it knows by their coordinates: it takes events on other grids as well.

    Attributes:
        offset: of the first point of an axis from 0, as a share of the distance of points: 1/2 for pixels, 0 for points
            of a circle. Coordinates are (i + offset) / n.
    """

    offset: float = 0.5

    def require(self, grid: tuple[int, ...]) -> None:
        """Refuse a grid on which it cannot be evaluated.

        Raises:
            UserError: such a grid; the message says which would do.
        """


def coordinates(grid: tuple[int, ...], offset: float) -> Tensor:
    """(i + offset) / n of all points in order, float32 (points, axes)."""
    axes = [(torch.arange(side) + offset) / side for side in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def sinusoids(label: Tensor, width: int, frequency: float = 1.0, shift: int = 1) -> Tensor:
    """Sines and cosines of label * frequency * 10000^(-j / (width/2 - shift)), shape (B, width), sines first.

    With a frequency and a shift of 1 this is DDPM's embedding of the step.
    """
    half = width // 2
    frequencies = frequency * torch.exp(
        torch.arange(half, dtype=torch.float32, device=label.device) * (-math.log(10_000) / max(half - shift, 1))
    )
    angle = label.float()[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def pixel_norm(x: Tensor) -> Tensor:
    """Scaled to a root mean square of 1 over the channels, axis 1: x / sqrt(mean of x^2 + 1e-8)."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def factor_and_shift(modulation: Modulation, projected: Tensor) -> tuple[Tensor, Tensor]:
    """What normalised values are multiplied by and then shifted by, (B, C) each, from a projected embedding (B, 2 C).

    `modulation` is not "add".
    """
    scale, shift = projected.chunk(2, 1)
    return (1 + scale, shift) if modulation == "scale-shift" else (pixel_norm(scale), pixel_norm(shift))


def followers(after: Sequence[nn.Module] | None, widths: tuple[int, ...]) -> Sequence[Callable[[Tensor], Tensor]]:
    """What is applied after each block, of which `widths` has one entry each: the modules given, or nothing.

    Raises:
        UserError: modules are given, and not one for each block.
    """
    if after is None:
        return [_same] * len(widths)
    if len(after) != len(widths):
        raise UserError(f"network: after: {len(after)} modules for {len(widths)} blocks; give one for each")
    return after


def _same(x: Tensor) -> Tensor:
    return x


def near_zero_(module: nn.Module) -> nn.Module:
    """Initialise a layer's output to zero, so that residual branches start as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module

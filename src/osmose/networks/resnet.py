"""Plain residual networks between events and vectors, after SNGAN's ResNet (arXiv 1802.05957, appendix B.4).

`Expanding` makes an event of a vector, `Contracting` a vector of an event. Images of any sides are halved while all
sides are even and stay at 4 or above (8 -> 4, 28 -> 7, 32 -> 4), enlarged by repeating pixels and shrunk by averaging
them; feature maps have `channels` channels at full size, twice as many at each halving, up to four times. Flat events
(points) get multilayer perceptrons of `channels` units in the same places. Neither network sees a time or a class.

SNGAN normalises its generator by batches. Here groups of channels are normalised within each item, as in the UNet: an
item then depends on no other, so neither the cut of a batch into micro-batches and processes nor its size when sampling
changes a result, and there are no running statistics that have to agree with averaged weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from osmose.errors import UserError
from osmose.networks.blocks import Norm, Upsample
from osmose.networks.unet import UNetConfig

#: Hidden layers of the networks of flat events.
_DEPTH = 3


def halvings(event_shape: tuple[int, ...]) -> int:
    """How often all sides of an image can be halved without remainder and stay at 4 or above."""
    count, sides = 0, event_shape[1:]
    while all(side % 2 ** (count + 1) == 0 and side >> (count + 1) >= 4 for side in sides):
        count += 1
    return count


def channels_for(event_shape: tuple[int, ...]) -> int:
    """Channels that a modest computer trains in minutes, with more where the images are small; units for points."""
    if len(event_shape) == 1:
        return 128
    return 16 if max(event_shape[1:]) > 16 else 32


def _levels(event_shape: tuple[int, ...], channels: int) -> tuple[list[int], tuple[int, int]]:
    """Channels at each level, the full size first, and the height and width of the last."""
    if len(event_shape) != 3:
        raise UserError(
            "network: a resnet is for images (channels, height, width) and points (dimension,), not for events of "
            f"shape {event_shape}"
        )
    count = halvings(event_shape)
    height, width = (side >> count for side in event_shape[1:])
    return [channels * min(4, 2**level) for level in range(count + 1)], (height, width)


class _Up(nn.Module):
    """A residual block that may double the sides: normalisation and SiLU before each convolution."""

    def __init__(self, c_in: int, c_out: int, doubles: bool):
        super().__init__()
        self.norm1, self.norm2 = Norm(UNetConfig(), c_in), Norm(UNetConfig(), c_in)
        self.conv1 = Upsample(c_in) if doubles else nn.Conv2d(c_in, c_in, 3, padding=1)
        self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.doubles = doubles

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2.silu(self.conv1(self.norm1.silu(x))))
        x = self.shortcut(x)  # before the enlargement, with which it commutes
        return torch.add(h, F.interpolate(x, scale_factor=2.0) if self.doubles else x)


class _Down(nn.Module):
    """A residual block that may halve the sides: ReLU before each convolution, no normalisation."""

    def __init__(self, c_in: int, c_out: int, halves: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_in, 3, padding=1)
        self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        if self.halves:  # the shortcut commutes with the average
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return torch.add(h, self.shortcut(x))


class Expanding(nn.Module):
    """From vectors (B, inputs) to events (B, *event_shape): a generator or a decoder.

    Args:
        inputs: length of the vectors.
        event_shape: (channels, height, width) or (dimension,).
        channels: of the largest feature maps, or units of a layer.

    Raises:
        UserError: events of another form.
    """

    def __init__(self, inputs: int, event_shape: tuple[int, ...], channels: int):
        super().__init__()
        if len(event_shape) == 1:
            self.stem: nn.Module = nn.Linear(inputs, channels)
            hidden = [layer for _ in range(_DEPTH - 1) for layer in (nn.SiLU(), nn.Linear(channels, channels))]
            self.body = nn.Sequential(*hidden, nn.SiLU(), nn.Linear(channels, *event_shape))
            return
        widths, base = _levels(event_shape, channels)
        widths.reverse()
        self.stem = nn.Sequential(nn.Linear(inputs, widths[0] * math.prod(base)), nn.Unflatten(1, (widths[0], *base)))
        self.body = nn.Sequential(
            _Up(widths[0], widths[0], doubles=False),
            *(_Up(c_in, c_out, doubles=True) for c_in, c_out in itertools.pairwise(widths)),
            _ToImage(channels, event_shape[0]),
        )

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.body(self.stem(z))
        return out


class _ToImage(nn.Module):
    """The last convolution, after normalisation and SiLU."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm, self.conv = Norm(UNetConfig(), c_in), nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm.silu(x))
        return out


class Contracting(nn.Module):
    """From events (B, *event_shape) to vectors (B, outputs): a critic or an encoder.

    With `spectral` every weight, as a matrix of output channels by everything else, is divided by its largest singular
    value, which power iteration estimates. One iteration is made when `iterate` is called and at no other time: a step
    may run the network as often as it likes, on as many parts of a batch, and gets the same weights.

    Args:
        event_shape: (channels, height, width) or (dimension,).
        outputs: length of the vectors.
        channels: of the largest feature maps, or units of a layer.
        spectral: divide the weights by their spectral norms.

    Raises:
        UserError: events of another form.
    """

    def __init__(self, event_shape: tuple[int, ...], outputs: int, channels: int, *, spectral: bool = False):
        super().__init__()
        if len(event_shape) == 1:
            self.stem: nn.Module = nn.Linear(*event_shape, channels)
            hidden = [layer for _ in range(_DEPTH - 1) for layer in (nn.ReLU(), nn.Linear(channels, channels))]
            self.body, features = nn.Sequential(*hidden), channels
        else:
            widths, base = _levels(event_shape, channels)
            self.stem = nn.Conv2d(event_shape[0], channels, 3, padding=1)
            self.body = nn.Sequential(
                *(_Down(c_in, c_out, halves=True) for c_in, c_out in itertools.pairwise(widths)),
                _Down(widths[-1], widths[-1], halves=False),
            )
            features = widths[-1] * math.prod(base)
        self.head = nn.Linear(features, outputs)
        if spectral:
            for layer in self.layers():
                spectral_norm(layer)
        self.train(self.training)

    def layers(self) -> list[nn.Module]:
        """The layers that have a weight, in the order of the computation."""
        return [layer for layer in self.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]

    def train(self, mode: bool = True) -> Self:
        """As every module, except that no mode lets the estimates of the spectral norms move: `iterate` does."""
        super().train(mode)
        for norms in self._norms():
            norms.eval()
        return self

    def iterate(self) -> None:
        """One power iteration for the spectral norm of each weight, in float32: call it after the weights change."""
        with torch.no_grad(), torch.autocast(self.head.bias.device.type, enabled=False):
            for norms in self._norms():
                norms.train()
                norms()
                norms.eval()

    def _norms(self) -> Iterator[nn.Module]:
        """What torch computes each normalised weight by."""
        for layer in self.layers():
            if parametrize.is_parametrized(layer, "weight"):
                yield layer.get_submodule("parametrizations.weight")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.body(self.stem(x))).flatten(1))
        return out

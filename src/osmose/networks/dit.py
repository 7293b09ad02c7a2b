"""A transformer over patches whose blocks are modulated by time and class (DiT, arXiv 2212.09748).

Every layer adds to its tokens: a residual stack of one width, which may be cut into shorter ones. A layer normalises
its tokens without weights of its own, scales and shifts them as time and class say, and is let in by a factor that is
zero at the start (adaLN-Zero): an untrained network is the identity up to its head, which is zero.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks.base import TIME_FREQUENCY, StackConfig, coordinates, near_zero_, sinusoids
from osmose.networks.layers import Classes, Conv2d, Linear


class DiTConfig(StackConfig):
    """Transformer over patches of images."""

    kind: Literal["dit"] = "dit"
    width: int = Field(96, ge=8)
    depth: int = Field(12, ge=1, description="layers, each attention and an MLP")
    heads: int = Field(4, ge=1)
    patch: int = Field(2, ge=1, description="side of the square that a token is")
    mlp_ratio: int = Field(4, ge=1, description="hidden units of a layer's MLP, in widths")
    time_frequency: float = Field(1.0, gt=0, description=TIME_FREQUENCY)

    @model_validator(mode="after")
    def _coherent(self) -> DiTConfig:
        if self.width % (4 * self.heads):
            raise ConfigError("width", f"{self.width} is not valid: a multiple of {4 * self.heads}, four times heads")
        return self

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        return DiT(self, event_shape, num_classes, num_outputs)


class Layer(nn.Module):
    """Attention and MLP on tokens (B, T, width), told an embedding (B, width)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        hidden = mlp_ratio * width
        self.mlp = nn.Sequential(Linear(width, hidden), nn.GELU(approximate="tanh"), Linear(hidden, width))
        self.modulation = near_zero_(Linear(width, 6 * width))

    def forward(self, h: Tensor, told: Tensor, seen: Tensor | None = None) -> Tensor:
        """Tokens, what all are told, and which tokens each may see, bool (T, T), all if None."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(told)[:, None].chunk(6, -1)
        x = self.norm(h) * (1 + scale1) + shift1
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + gate1 * self.out(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))
        return h + gate2 * self.mlp(self.norm(h) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """See `DiTConfig`.

    Raises:
        UserError: no images, or sides that patches do not divide.
    """

    places: Tensor

    def __init__(
        self, config: DiTConfig, event_shape: tuple[int, ...], num_classes: int | None = None, num_outputs: int = 1
    ):
        super().__init__()
        if len(event_shape) != 3:
            raise UserError(f"network: a dit needs images (channels, height, width), not events of {event_shape}")
        channels, *grid = event_shape
        if any(side % config.patch for side in grid):
            raise UserError(
                f"network.patch: {config.patch} does not divide the sides {' x '.join(map(str, grid))}; use 1, or a "
                f"divisor of {math.gcd(*grid)}"
            )
        self.event_shape, self.outputs, self.config = tuple(event_shape), num_outputs * channels, config
        width, patch = config.width, config.patch
        self.embed = Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("places", _places(grid[0] // patch, grid[1] // patch, width), persistent=False)
        self.time = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.classes = Classes(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(Layer(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = near_zero_(Linear(width, 2 * width))
        self.head = near_zero_(Linear(width, self.outputs * patch**2))

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """X (B, C, H, W), label (B,), condition (B,) or None -> (B, outputs, H, W)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise UserError(f"network: built for events {self.event_shape}; {tuple(x.shape[1:])} given")
        h = self.embed(x)
        rows, columns = h.shape[2:]
        h = h.flatten(2).mT + self.places.to(h.dtype)
        told = self.time(sinusoids(label, self.config.width, self.config.time_frequency).to(h.dtype))
        if self.classes is not None and condition is not None:
            told = told + self.classes(condition)
        told = F.silu(told)
        for block in self.blocks:
            h = block(h, told)
        shift, scale = self.modulation(told)[:, None].chunk(2, -1)
        h = self.head(self.norm(h) * (1 + scale) + shift)
        patch = self.config.patch
        h = h.reshape(x.shape[0], rows, columns, self.outputs, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return h.reshape(x.shape[0], self.outputs, rows * patch, columns * patch)


def _places(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the row and of the column of each token, in order: float32 (rows columns, width)."""
    place = coordinates((rows, columns), 0.5) * torch.tensor([rows, columns])
    return torch.cat([sinusoids(place[:, axis], width // 2) for axis in (0, 1)], 1)

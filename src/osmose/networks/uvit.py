r"""A transformer over patches or points, with long skips (U-ViT, arXiv 2209.12152), on any grid.

A token is a patch of p points on each axis (p = 1: a point), and knows its values and the coordinates of its middle;
one more token says the time and the class. The first half of the blocks hands what it has to the second half.

**Other grids.** On a grid f times finer than that of the data, a token is p points that lie f apart, which is what it
has been in training, and the f^d patches that begin at neighbouring points interleave: there are more tokens, each of
them as coarse as ever. Attention is a mean over tokens, and does not mind their number. Without patches any grid will
do.
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
from osmose.networks.base import Everywhere, Joining, NetworkConfig, coordinates, near_zero_, sinusoids
from osmose.networks.layers import Classes, Linear


class UViTConfig(NetworkConfig):
    """Transformer over patches of images or of functions (channels, points)."""

    kind: Literal["uvit"] = "uvit"
    width: int = Field(96, ge=8)
    depth: int = Field(5, ge=1, description="blocks; of an odd number one is in the middle, the others have long skips")
    heads: int = Field(4, ge=1)
    patch: int = Field(2, ge=1, description="points of a token on each axis; 1 for any grid, at more tokens")
    mlp_ratio: int = Field(4, ge=1, description="hidden units of a block's MLP, in widths")

    @model_validator(mode="after")
    def _coherent(self) -> UViTConfig:
        if self.width % (2 * self.heads):
            raise ConfigError("width", f"{self.width} is not valid: a multiple of {2 * self.heads}, twice the heads")
        return self

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        return UViT(self, event_shape, num_classes, num_outputs)


class _Block(nn.Module, Joining):
    """Attention and MLP, after their normalisation and with residual connections; tokens (B, T, width)."""

    def __init__(self, config: UViTConfig, skip: bool):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.skip = Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = near_zero_(Linear(width, width))
        self.mlp = nn.Sequential(
            Linear(width, config.mlp_ratio * width), nn.GELU(), near_zero_(Linear(config.mlp_ratio * width, width))
        )

    def joined(self) -> dict[str, tuple[int, ...]]:
        return {} if self.skip is None else {"skip": (self.skip.out_features,) * 2}

    def forward(self, h: Tensor, skipped: Tensor | None) -> Tensor:
        if self.skip is not None and skipped is not None:
            h = self.skip(torch.cat([h, skipped], -1))
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))


class UViT(nn.Module, Everywhere):
    """See `UViTConfig`.

    Raises:
        UserError: neither images nor functions, or sides that patches do not divide.
    """

    def __init__(
        self, config: UViTConfig, event_shape: tuple[int, ...], num_classes: int | None = None, num_outputs: int = 1
    ):
        super().__init__()
        if len(event_shape) not in (2, 3):
            raise UserError(
                "network: a uvit needs images (channels, height, width) or functions (channels, points), not events of "
                f"shape {event_shape}"
            )
        channels, *grid = event_shape
        self.event_shape, self.grid, self.outputs = tuple(event_shape), tuple(grid), num_outputs * channels
        self.width, self.patch = config.width, config.patch
        if any(side % config.patch for side in grid):
            raise UserError(
                f"network.patch: {config.patch} does not divide the sides {' x '.join(map(str, grid))}; use 1, or a "
                f"divisor of {math.gcd(*grid)}"
            )
        # Neighbouring tokens are a quarter of the highest frequency's half turn apart: it is known between them, too.
        finest = max(grid) / config.patch / 4
        count = max(1, round(math.log2(finest)) + 2) * 2
        self.register_buffer(
            "frequencies", math.pi * torch.logspace(-1, max(math.log2(finest), 0.0), count, 2), persistent=False
        )
        values = config.patch ** len(grid)
        self.embed = Linear(channels * values, config.width)
        self.place = Linear(2 * count * len(grid), config.width)
        self.time = nn.Sequential(Linear(config.width, config.width), nn.SiLU(), Linear(config.width, config.width))
        self.classes = Classes(num_classes, config.width) if num_classes else None
        half = config.depth // 2
        self.blocks = nn.ModuleList(_Block(config, skip=i >= config.depth - half) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = near_zero_(Linear(config.width, self.outputs * values))

    frequencies: Tensor

    def require(self, grid: tuple[int, ...]) -> None:
        factors = [side // own for side, own in zip(grid, self.grid, strict=True)]
        if self.patch > 1 and tuple(f * own for f, own in zip(factors, self.grid, strict=True)) != grid:
            own = " x ".join(map(str, self.grid))
            raise UserError(
                f"resolution: {' x '.join(map(str, grid))} is no multiple of {own}, of which patches of {self.patch} "
                "points are; take a multiple, or train with network.patch=1"
            )

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """X (B, C, *grid), label (B,), condition (B,) or None -> (B, outputs, *grid)."""
        if x.ndim != len(self.event_shape) + 1 or x.shape[1] != self.event_shape[0]:
            raise UserError(f"network: built for events {self.event_shape}; {tuple(x.shape[1:])} given")
        grid = tuple(x.shape[2:])
        self.require(grid)
        h = self.embed(self._cut(x)) + self.place(self._places(grid).to(x))
        time = self.time(sinusoids(label, self.width).to(x.dtype))
        if self.classes is not None and condition is not None:
            time = time + self.classes(condition)
        h = torch.cat([time[:, None], h], 1)
        skips: list[Tensor] = []
        half = len(self.blocks) // 2
        for index, block in enumerate(self.blocks):
            h = block(h, skips.pop() if index >= len(self.blocks) - half else None)
            if index < half:
                skips.append(h)
        return self._joined(self.head(self.norm(h[:, 1:])), grid)

    def _parts(self, grid: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Of each axis: patches, points of a patch, and how far apart these are."""
        if self.patch == 1:
            return [(side, 1, 1) for side in grid]
        return [(own // self.patch, self.patch, side // own) for side, own in zip(grid, self.grid, strict=True)]

    def _cut(self, x: Tensor) -> Tensor:
        """Values (B, C, *grid) as tokens (B, T, C p^d)."""
        parts = self._parts(tuple(x.shape[2:]))
        x = x.reshape(*x.shape[:2], *(n for part in parts for n in part))
        if len(parts) == 1:
            return x.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)
        return x.permute(0, 2, 4, 5, 7, 1, 3, 6).flatten(5).flatten(1, 4)

    def _joined(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The inverse of `_cut`, for as many channels as there are outputs."""
        parts = self._parts(grid)
        if len(parts) == 1:
            ((n, p, f),) = parts
            x = tokens.reshape(-1, n, f, self.outputs, p).permute(0, 3, 1, 4, 2)
        else:
            (n, p, f), (m, q, g) = parts
            x = tokens.reshape(-1, n, f, m, g, self.outputs, p, q).permute(0, 5, 1, 6, 2, 3, 7, 4)
        return x.reshape(-1, self.outputs, *grid)

    def _places(self, grid: tuple[int, ...]) -> Tensor:
        """Sines and cosines of the coordinates of the middle of each token, (T, features)."""
        points = coordinates(grid, self.offset).T.reshape(1, len(grid), *grid)
        middles = self._cut(points).unflatten(2, (len(grid), -1)).mean(3)[0]
        angles = (middles.to(self.frequencies)[:, :, None] * self.frequencies).flatten(1)
        return torch.cat([angles.sin(), angles.cos()], 1)

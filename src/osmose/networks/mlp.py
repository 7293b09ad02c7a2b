"""A residual MLP for points and other flat events."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.errors import UserError
from osmose.networks.base import NetworkConfig, near_zero_, sinusoids


class MLPConfig(NetworkConfig):
    """Residual MLP: `depth` blocks of two layers of `width` units, the label embedding added in each."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(256, ge=4, multiple_of=2)
    depth: int = Field(3, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        return MLP(self, event_shape, num_classes, num_outputs)


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.second = near_zero_(nn.Linear(width, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.first(self.norm(x)) + embedding)
        return torch.add(x, self.second(self.dropout(h)))


class MLP(nn.Module):
    """See `MLPConfig`."""

    def __init__(
        self, config: MLPConfig, event_shape: tuple[int, ...], num_classes: int | None = None, num_outputs: int = 1
    ):
        super().__init__()
        dimension, width = math.prod(event_shape), config.width
        self.event_shape, self.out_shape = tuple(event_shape), (num_outputs * event_shape[0], *event_shape[1:])
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.classes = nn.Embedding(num_classes, width) if num_classes else None
        self.stem = nn.Linear(dimension, width)
        self.blocks = nn.ModuleList(_Block(width, config.dropout) for _ in range(config.depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), near_zero_(nn.Linear(width, num_outputs * dimension)))

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """X (B, *event), label (B,), condition (B,) or None -> (B, num_outputs * event[0], *event[1:])."""
        if tuple(x.shape[1:]) != self.event_shape or label.shape != x.shape[:1]:
            raise UserError(
                f"network: built for events {self.event_shape} with one label each; "
                f"{tuple(x.shape)} with labels {tuple(label.shape)} given"
            )
        embedding = self.embed(sinusoids(label, self.width).to(x.dtype))
        if self.classes is not None and condition is not None:
            embedding = embedding + self.classes(condition)
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        out: Tensor = self.head(h)
        return out.unflatten(1, self.out_shape)

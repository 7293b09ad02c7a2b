"""A residual MLP for points and other flat events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.errors import UserError
from osmose.networks.base import (
    MODULATION,
    TIME_FREQUENCY,
    Modulation,
    StackConfig,
    factor_and_shift,
    followers,
    near_zero_,
    sinusoids,
)
from osmose.networks.calibration import Calibration
from osmose.networks.layers import Classes, Linear


class MLPConfig(StackConfig):
    """Residual MLP: `depth` blocks of two layers of `width` units, each of which sees the label's embedding."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(256, ge=4, multiple_of=2)
    depth: int = Field(3, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    modulation: Modulation = Field("add", description=MODULATION)
    time_frequency: float = Field(1.0, gt=0, description=TIME_FREQUENCY)
    linear: bool = Field(
        False, description="learn what is left of the best linear prediction, which is fitted to the data's moments"
    )

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        return MLP(self, event_shape, num_classes, num_outputs)


class _Block(nn.Module):
    def __init__(self, config: MLPConfig):
        super().__init__()
        width, self.modulation = config.width, config.modulation
        self.norm = nn.LayerNorm(width)
        self.first = Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.second = near_zero_(Linear(width, width))
        if self.modulation != "add":
            self.time_emb_proj = Linear(width, 2 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.modulation == "add":
            h = self.first(self.norm(x)) + embedding
        else:
            factor, shift = factor_and_shift(self.modulation, self.time_emb_proj(embedding))
            h = self.first(torch.addcmul(shift, self.norm(x), factor))
        return torch.add(x, self.second(self.dropout(F.silu(h))))


class MLP(nn.Module):
    """See `MLPConfig`."""

    def __init__(
        self, config: MLPConfig, event_shape: tuple[int, ...], num_classes: int | None = None, num_outputs: int = 1
    ):
        super().__init__()
        dimension, width = math.prod(event_shape), config.width
        self.event_shape, self.out_shape = tuple(event_shape), (num_outputs * event_shape[0], *event_shape[1:])
        self.config = config
        self.embed = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width), nn.SiLU())
        self.calibration = Calibration(dimension) if config.linear else None
        self.classes = Classes(num_classes, width) if num_classes else None
        self.stem = Linear(dimension, width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), near_zero_(Linear(width, num_outputs * dimension)))

    @property
    def widths(self) -> tuple[int, ...]:
        """The units of each block's output."""
        return (self.config.width,) * self.config.depth

    def forward(
        self, x: Tensor, label: Tensor, condition: Tensor | None = None, after: Sequence[nn.Module] | None = None
    ) -> Tensor:
        """X (B, *event), label (B,), condition (B,) or None -> (B, num_outputs * event[0], *event[1:]).

        `after[i]` is applied to the output of block i, (B, widths[i]).
        """
        if tuple(x.shape[1:]) != self.event_shape or label.shape != x.shape[:1]:
            raise UserError(
                f"network: built for events {self.event_shape} with one label each; "
                f"{tuple(x.shape)} with labels {tuple(label.shape)} given"
            )
        embedding = self.embed(sinusoids(label, self.config.width, self.config.time_frequency).to(x.dtype))
        if self.classes is not None and condition is not None:
            embedding = embedding + self.classes(condition)
        h = self.stem(x.flatten(1))
        for block, follow in zip(self.blocks, followers(after, self.widths), strict=True):
            h = follow(block(h, embedding))
        out: Tensor = self.head(h)
        if self.calibration is not None:
            with torch.autocast(x.device.type, enabled=False):  # errors of half precision are not small beside it
                levels = self.calibration.at(label)
                linear = self.calibration.predicted(self.calibration.centred(x.flatten(1), levels), levels)
            out = out + nn.functional.pad(linear, (0, out.shape[1] - linear.shape[1]))  # a variance has none
        return out.unflatten(1, self.out_shape)

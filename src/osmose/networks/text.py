"""Transformers over the characters of a text, of layers that the time modulates (`networks.dit`).

`text` reads characters that may be masked, in both directions. `causal-text` reads each place's noisy embedding and the
clean characters before it: clean and noisy sequences stand one after the other, under a mask by which the noisy place i
sees the clean places before i and itself, and clean places see each other backwards (arXiv 2506.14202).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks.base import TIME_FREQUENCY, StackConfig, near_zero_, sinusoids
from osmose.networks.dit import Layer
from osmose.networks.layers import Linear


class _StackOfText(StackConfig):
    width: int = Field(128, ge=8)
    depth: int = Field(6, ge=1, description="layers, each attention and an MLP")
    heads: int = Field(4, ge=1)
    mlp_ratio: int = Field(4, ge=1, description="hidden units of a layer's MLP, in widths")
    time_frequency: float = Field(1.0, gt=0, description=TIME_FREQUENCY)

    @model_validator(mode="after")
    def _coherent(self) -> _StackOfText:
        if self.width % (2 * self.heads):
            raise ConfigError("width", f"{self.width} is not valid: a multiple of {2 * self.heads}, twice the heads")
        return self

    def layers(self) -> nn.ModuleList:
        """The layers themselves."""
        return nn.ModuleList(Layer(self.width, self.heads, self.mlp_ratio) for _ in range(self.depth))


class TextConfig(_StackOfText):
    """Transformer over characters, some of them masked."""

    kind: Literal["text"] = "text"

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        """For events (length,) of codes 0..num_outputs, the last of which is the mask; answers logits of the others."""
        if len(event_shape) != 1 or num_classes:
            raise UserError(f"network: text is for sequences of characters (length,), not events of {event_shape}")
        return Text(self, event_shape[0], num_outputs)


class CausalTextConfig(_StackOfText):
    """Transformer over the noisy embedding of each character and the clean characters before it."""

    kind: Literal["causal-text"] = "causal-text"

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        """For events (length, 1 + d): the code of a character, and a noisy embedding; answers logits of the codes."""
        if len(event_shape) != 2 or num_classes:
            raise UserError(f"network: causal-text is for events (length, 1 + d), not {event_shape}")
        return CausalText(self, event_shape[0], event_shape[1] - 1, num_outputs)


class _Body(nn.Module):
    """What both have: embeddings of characters, places and time, the layers, the head."""

    def __init__(self, config: _StackOfText, length: int, symbols: int):
        super().__init__()
        self.config, self.length, self.symbols = config, length, symbols
        width = config.width
        self.embed = nn.Embedding(symbols + 1, width)  # one more than there are characters
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        self.time = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.blocks = config.layers()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = near_zero_(Linear(width, 2 * width))
        self.head = near_zero_(Linear(width, symbols))

    def answer(self, h: Tensor, label: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits (B, symbols, length) of the last places of tokens (B, T, width); `seen` as of `Layer`."""
        told = F.silu(self.time(sinusoids(label, self.config.width, self.config.time_frequency).to(h.dtype)))
        for block in self.blocks:
            h = block(h, told, seen)
        shift, scale = self.modulation(told)[:, None].chunk(2, -1)
        logits: Tensor = self.head(self.norm(h[:, -self.length :]) * (1 + scale) + shift)
        return logits.mT


class Text(_Body):
    """See `TextConfig`; the last symbol is the mask."""

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Codes (B, length), label (B,) -> logits (B, symbols, length)."""
        return self.answer(self.embed(x.long()) + self.places, label)


class CausalText(_Body):
    """See `CausalTextConfig`; the last symbol is that before the first character."""

    seen: Tensor

    def __init__(self, config: CausalTextConfig, length: int, dimension: int, symbols: int):
        super().__init__(config, length, symbols)
        self.noisy = Linear(dimension, config.width)
        # Clean place i holds the character before i: seen by places from i on.
        before = torch.ones(length, length, dtype=torch.bool).tril()
        own = torch.eye(length, dtype=torch.bool)
        none = torch.zeros(length, length, dtype=torch.bool)
        seen = torch.cat([torch.cat([before, none], 1), torch.cat([before, own], 1)])
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Codes and noisy embeddings (B, length, 1 + d), label (B,) -> logits (B, symbols, length)."""
        codes = F.pad(x[:, :-1, 0].long(), (1, 0), value=self.symbols)
        h = torch.cat([self.embed(codes) + self.places, self.noisy(x[..., 1:]) + self.places], 1)
        return self.answer(h, label, self.seen)

r"""Networks for sets of (time, value): what they are told stands at times that differ from item to item.

A network is called as `network(features, label, condition, times, there)`: features (B, F, L) at times float64 (B, L)
in the units of the data, which exist where `there` (B, L) is true, always a beginning of the series; label (B,) on the
scale 0..1000, condition (B,) classes or None. It answers (B, outputs, L), 0 at the start of training and where nothing
exists, and what does not exist has no influence on the rest.

Times enter as sines and cosines of frequencies from one period in four spans up to one in two median gaps; where the
network goes by the order of the times, also as the logarithm of the gap to the time before.

=========== =========================================================================================================
transformer attention among all times; a permutation of the times permutes the answers
rnn         gated recurrent units in both directions, which begin with the embedding of the label (as published)
cnn         dilated convolutions along the order of the times, with gates (as published for forecasts); kernel=1 sees
            each time by itself and is a control
=========== =========================================================================================================

Recurrent and convolutional networks are not consistent under adding times in between: they count places, not time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from osmose.configuration import Config
from osmose.networks.base import near_zero_, sinusoids

#: Frequencies of the times.
_FREQUENCIES = 16


class SeriesNetworkConfig(Config, ABC):
    """Describes a network for series independently of the data it will see.

    Attributes:
        ordered: whether it goes by the order of the times.
    """

    ordered: ClassVar[bool] = True
    kind: str
    width: int = Field(64, ge=4, multiple_of=2)
    depth: int = Field(3, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)

    def build(self, inputs: int, outputs: int, gap: float, span: float, num_classes: int | None = None) -> nn.Module:
        """A network for `inputs` features at a time.

        Args:
            inputs: F.
            outputs: values that it answers at a time.
            gap: median time between neighbours.
            span: longest time that a series covers.
            num_classes: of a conditional model.
        """
        return SeriesNetwork(self, inputs, outputs, gap, span, num_classes)

    @abstractmethod
    def layer(self, index: int) -> nn.Module:
        """Layer `index`: called with (h (B, L, width), embedding (B, width), there (B, L)), answers (B, L, width)."""


class SeriesNetwork(nn.Module):
    """A stem, `depth` residual layers that are told the label, and a head."""

    frequencies: Tensor

    def __init__(
        self,
        config: SeriesNetworkConfig,
        inputs: int,
        outputs: int,
        gap: float,
        span: float,
        num_classes: int | None = None,
    ):
        super().__init__()
        width = config.width
        self.width, self.gap = width, gap if config.ordered else None
        low, high = math.pi / (2 * max(span, gap)), math.pi / gap
        frequencies = torch.logspace(math.log10(low), math.log10(high), _FREQUENCIES, dtype=torch.float64)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.classes = nn.Embedding(num_classes, width) if num_classes else None
        self.stem = nn.Linear(inputs + 2 * _FREQUENCIES + config.ordered, width)
        self.layers = nn.ModuleList(config.layer(index) for index in range(config.depth))
        self.head = nn.Sequential(nn.LayerNorm(width), near_zero_(nn.Linear(width, outputs)))

    def forward(
        self, features: Tensor, label: Tensor, condition: Tensor | None, times: Tensor, there: Tensor
    ) -> Tensor:
        """See the module."""
        embedding = self.embed(sinusoids(label, self.width).to(features.dtype))
        if self.classes is not None and condition is not None:
            embedding = embedding + self.classes(condition)
        known = torch.where(there, times, 0.0)
        # From the earliest time on, and only then in float32: an hour is lost beside a date.
        since = known - torch.where(there, times, math.inf).amin(1, keepdim=True)
        angle = since.to(features.dtype)[..., None] * self.frequencies.to(features.dtype)
        seen = [features.mT, angle.sin(), angle.cos()]
        if self.gap is not None:
            gaps = torch.diff(known, dim=1, prepend=known[:, :1]).clamp(min=0)
            seen.append(torch.log1p(gaps / self.gap).to(features.dtype)[..., None])
        exists = there[..., None].to(features.dtype)
        h = self.stem(torch.cat(seen, 2)) * exists
        for layer in self.layers:
            h = (h + layer(h, embedding, there)) * exists
        out: Tensor = self.head(h) * exists
        return out.mT


class _Modulated(nn.Module):
    """Layer normalisation whose scale and shift come from the embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.project = near_zero_(nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.project(embedding)[:, None].chunk(2, 2)
        return torch.addcmul(shift, self.norm(h), 1 + scale)


class SeriesTransformerConfig(SeriesNetworkConfig):
    """Attention among all times."""

    ordered: ClassVar[bool] = False
    kind: Literal["transformer"] = "transformer"
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> SeriesTransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self

    def layer(self, index: int) -> nn.Module:  # noqa: ARG002
        return _Attention(self)


class _Attention(nn.Module):
    def __init__(self, config: SeriesTransformerConfig):
        super().__init__()
        width, self.heads, self.dropout = config.width, config.heads, config.dropout
        self.before, self.between = _Modulated(width), _Modulated(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = near_zero_(nn.Linear(width, width))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(config.dropout), near_zero_(nn.Linear(4 * width, width))
        )

    def forward(self, h: Tensor, embedding: Tensor, there: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(h, embedding)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if bool(there.all()) else there[:, None, None]
        share = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=share)
        first = self.out(seen.transpose(1, 2).flatten(2))
        second: Tensor = self.mlp(self.between(h + first, embedding))
        return first + second


class SeriesRNNConfig(SeriesNetworkConfig):
    """Gated recurrent units in both directions."""

    kind: Literal["rnn"] = "rnn"
    depth: int = Field(2, ge=1)

    def layer(self, index: int) -> nn.Module:  # noqa: ARG002
        return _Recurrent(self)


class _Recurrent(nn.Module):
    def __init__(self, config: SeriesRNNConfig):
        super().__init__()
        width = config.width
        self.before = _Modulated(width)
        self.begin = nn.Linear(width, width)
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.out = nn.Sequential(nn.Dropout(config.dropout), near_zero_(nn.Linear(width, width)))

    def forward(self, h: Tensor, embedding: Tensor, there: Tensor) -> Tensor:
        state = self.begin(embedding).unflatten(1, (2, -1)).transpose(0, 1).contiguous()
        x = self.before(h, embedding)
        if bool(there.all()):
            return self.out(self.gru(x, state)[0])
        lengths = there.sum(1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        seen, _ = pad_packed_sequence(self.gru(packed, state)[0], batch_first=True, total_length=h.shape[1])
        return self.out(seen)


class SeriesCNNConfig(SeriesNetworkConfig):
    """Dilated convolutions with gates: 1, 2, 4, 8, 1, ... places apart."""

    kind: Literal["cnn"] = "cnn"
    depth: int = Field(6, ge=1)
    kernel: int = Field(3, ge=1, description="places that a convolution sees; odd")

    @model_validator(mode="after")
    def _odd(self) -> SeriesCNNConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} must be odd")
        return self

    def layer(self, index: int) -> nn.Module:
        return _Dilated(self, 2 ** (index % 4))


class _Dilated(nn.Module):
    def __init__(self, config: SeriesCNNConfig, dilation: int):
        super().__init__()
        width = config.width
        self.before = _Modulated(width)
        pad = dilation * (config.kernel // 2)
        self.conv = nn.Conv1d(width, 2 * width, config.kernel, padding=pad, dilation=dilation)
        self.out = nn.Sequential(nn.Dropout(config.dropout), near_zero_(nn.Linear(width, width)))

    def forward(self, h: Tensor, embedding: Tensor, there: Tensor) -> Tensor:
        x = self.before(h, embedding) * there[..., None].to(h.dtype)
        value, gate = self.conv(x.mT).chunk(2, 1)
        return self.out((value.tanh() * gate.sigmoid()).mT)

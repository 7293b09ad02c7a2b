"""DDPM's UNet (arXiv 2006.11239, appendix B) for images of any size and channel count.

Besides DDPM's residual blocks there are IDDPM's (arXiv 2102.09672), which the time scales and shifts, and MBConv blocks
with squeeze-and-excitation (arXiv 1801.04381, 1709.01507), which have fewer parameters and multiplications. They are
bound by memory: with half the multiplications a step takes about as long.

Residual blocks carry the names of diffusers' `UNet2DModel`, and so does everything around the blocks: weights move
between the two without renaming. What differs is how the same function is computed:

* normalisation and SiLU are one operation that keeps only its input for the backward pass;
* nearest-neighbour upsampling followed by a 3x3 convolution is one transposed 4x4 convolution (36 multiplications
  per input pixel become 16);
* short attention on a CPU is two plain matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks.base import (
    MODULATION,
    TIME_FREQUENCY,
    Joining,
    Modulation,
    NetworkConfig,
    followers,
    near_zero_,
    sinusoids,
)
from osmose.networks.blocks import Attention, Downsample, Level, MBConv, Norm, Residual, TimeEmbedding, Upsample
from osmose.networks.layers import Classes, Conv2d


class UNetConfig(NetworkConfig):
    """DDPM's UNet. The defaults are the CIFAR-10 model's 35.7 million parameters; its dropout of 0.1 is off.

    Published models have names: see `networks/presets.py`.
    """

    kind: Literal["unet"] = "unet"
    channels: int = Field(128, ge=4, multiple_of=2, description="width of the first level, C")
    mult: tuple[PositiveInt, ...] = Field((1, 2, 2, 2), min_length=1, description="width of each level, in units of C")
    blocks: int = Field(2, ge=1, description="blocks per level on the way down; one more on the way up")
    block: Literal["residual", "mbconv"] = Field(
        "residual", description="DDPM's, or MBConv with squeeze-and-excitation: fewer operations, each of them slower"
    )
    modulation: Modulation = Field("add", description=MODULATION)
    time_frequency: float = Field(1.0, gt=0, description=TIME_FREQUENCY)
    attention: tuple[int, ...] = Field((16,), description="resolutions (larger side, in pixels) with self-attention")
    heads: int = Field(1, ge=1, description="attention heads")
    head_width: int | None = Field(
        None, ge=1, description="channels of a head, in place of their number; for foreign weights"
    )
    time_shift: Literal[0, 1] = Field(
        1, description="1: frequencies of the time embedding end at 1/10000, as DDPM's; 0: before, for foreign weights"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    norm_groups: int = Field(
        32, ge=1, description="groups of the normalisation; 32 is lowered where it does not divide, others are refused"
    )
    group_channels: int = Field(4, ge=1, description="fewest channels in a group; 1 for foreign weights that have one")
    norm_eps: float = Field(1e-6, gt=0)
    padding: Literal["symmetric", "asymmetric"] = Field(
        "symmetric", description="of the stride-2 convolutions; asymmetric is TensorFlow's, for foreign weights"
    )

    @field_validator("mult", "attention", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _coherent(self) -> UNetConfig:
        if self.modulation != "add" and self.block == "mbconv":
            raise ConfigError(
                "modulation", f"{self.modulation} is for residual blocks; use block=residual, or modulation=add"
            )
        return self

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        return UNet(self, event_shape, num_classes, num_outputs)

    def groups(self, channels: int) -> int:
        """The groups in which some channels are normalised.

        Raises:
            UserError: a number was asked for that does not divide the channels.
        """
        if channels % self.norm_groups and self.norm_groups != type(self).model_fields["norm_groups"].default:
            fit = [n for n in range(1, channels + 1) if channels % n == 0 and n <= 32]
            raise UserError(
                f"network.norm_groups: {self.norm_groups} does not divide the {channels} channels of a level; "
                f"use one of {', '.join(map(str, fit))}, or leave it out"
            )
        most = min(self.norm_groups, max(channels // self.group_channels, 1))
        return next(n for n in range(most, 0, -1) if channels % n == 0)

    def table(self, event_shape: tuple[int, ...]) -> list[dict[str, Any]]:
        resolutions = self.resolutions(event_shape)

        def row(part: str, level: int, blocks: int, attends: bool) -> dict[str, Any]:
            channels = self.channels * self.mult[level]
            height, width = (side >> level for side in event_shape[1:])
            sizes = {"height": height, "width": width, "channels": channels, "norm_groups": self.groups(channels)}
            return {"part": part, **sizes, "blocks": blocks, "attention": attends}

        attends = [resolution in self.attention for resolution in resolutions]
        down = [row("down", level, self.blocks, attends[level]) for level in range(len(resolutions))]
        up = [row("up", level, self.blocks + 1, attends[level]) for level in reversed(range(len(resolutions)))]
        return [*down, row("middle", len(resolutions) - 1, 2, True), *up]

    def heads_of(self, channels: int) -> int:
        """The attention heads of some channels.

        Raises:
            UserError: heads do not divide the channels.
        """
        name, number = ("heads", self.heads) if self.head_width is None else ("head_width", self.head_width)
        if channels % number:
            raise UserError(f"network.{name}: {number} does not divide the {channels} channels of a level")
        return self.heads if self.head_width is None else channels // self.head_width

    def resolutions(self, event_shape: tuple[int, ...]) -> list[int]:
        """The larger side of the feature maps at each level.

        Raises:
            UserError: not an image, or a side that does not halve often enough.
        """
        if len(event_shape) != 3:
            raise UserError(
                f"network: a unet needs images (channels, height, width), not events of shape {event_shape}"
            )
        _, *sides = event_shape
        factor = 2 ** (len(self.mult) - 1)
        if any(side % factor for side in sides):
            most = 1 + min((side & -side).bit_length() - 1 for side in sides)
            raise UserError(
                f"network.mult: {len(self.mult)} levels need sides divisible by {factor}, but the images are "
                f"{sides[0]}x{sides[1]}; use at most {most} level{'s' if most > 1 else ''} or resize the images"
            )
        return [max(sides) // 2**level for level in range(len(self.mult))]


class UNet(nn.Module, Joining):
    """See `UNetConfig`.

    Raises:
        UserError: sides that do not halve, or attention at a resolution that does not occur.
    """

    def __init__(
        self, config: UNetConfig, event_shape: tuple[int, ...], num_classes: int | None = None, num_outputs: int = 1
    ):
        super().__init__()
        resolutions = config.resolutions(event_shape)
        missing = sorted(set(config.attention) - set(resolutions))
        if missing:
            raise UserError(
                f"network.attention: {missing[0]} does not occur; the resolutions of these images are "
                f"{', '.join(map(str, resolutions))}; set network.attention to some of them"
            )
        channels, widths = config.channels, [config.channels * m for m in config.mult]
        self.config, self.channels, data_channels = config, channels, event_shape[0]
        self.event_shape = tuple(event_shape)
        self.time_embedding = TimeEmbedding(channels, 4 * channels)
        self.class_embedding = Classes(num_classes, 4 * channels) if num_classes else None
        self.conv_in = Conv2d(data_channels, channels, 3, padding=1)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels], channels
        self._joined: dict[str, tuple[int, ...]] = {}
        for index, (resolution, out) in enumerate(zip(resolutions, widths, strict=True)):
            inputs = [width] + [out] * (config.blocks - 1)
            level = Level(config, [(c_in, out) for c_in in inputs], resolution in config.attention)
            skips += [out] * config.blocks
            if index < len(widths) - 1:
                level.downsamplers.append(Downsample(config, out))
                skips.append(out)
            self.down_blocks.append(level)
            width = out

        self.mid_block = Level(config, [(width, width)] * 2, attention=False)
        self.mid_block.attentions.append(Attention(config, width))

        for index, (resolution, out) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            joined = [(c_in, skips.pop()) for c_in in [width] + [out] * config.blocks]
            level = Level(config, [(sum(parts), out) for parts in joined], resolution in config.attention)
            for place, parts in enumerate(joined):
                if isinstance(level.resnets[place].conv_shortcut, nn.Conv2d):
                    self._joined[f"up_blocks.{len(self.up_blocks)}.resnets.{place}.conv_shortcut"] = parts
            if index > 0:
                level.upsamplers.append(Upsample(out))
            self.up_blocks.append(level)
            width = out

        self.conv_norm_out = Norm(config, width)
        self.conv_out = Conv2d(width, num_outputs * data_channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # Of a depthwise convolution torch takes all channels for the fan of each input; it has one.
                fan_out, fan_in = module.weight.shape[:2]
                groups = module.groups if isinstance(module, nn.Conv2d) else 1
                gain = math.sqrt((fan_in + fan_out) / (fan_in + fan_out // groups))
                nn.init.xavier_uniform_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Residual | MBConv | Attention):
                near_zero_(module.last)
        near_zero_(self.conv_out)

    @staticmethod
    def _levels(blocks: nn.ModuleList) -> Iterator[Level]:
        for level in blocks:
            assert isinstance(level, Level)
            yield level

    def joined(self) -> dict[str, tuple[int, ...]]:
        return self._joined

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels after each block in the order of the computation: down, the middle's attention, up."""
        widths = [self.config.channels * m for m in self.config.mult]
        down = [width for width in widths for _ in range(self.config.blocks)]
        up = [width for width in reversed(widths) for _ in range(self.config.blocks + 1)]
        return (*down, widths[-1], *up)

    def forward(
        self, x: Tensor, label: Tensor, condition: Tensor | None = None, after: Sequence[nn.Module] | None = None
    ) -> Tensor:
        """From images to as many of them as the network has outputs, along the channels.

        Args:
            x: (B, C, H, W).
            label: (B,) on the scale 0..1000.
            condition: (B,) classes, or None.
            after: modules, one for each of `widths`, that are applied to (B, widths[i], h, w): on the way down and up
                after each block and its attention, in the middle after the attention.

        Returns:
            (B, num_outputs * C, H, W).
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.event_shape or label.shape != x.shape[:1]:
            raise UserError(
                f"network: built for images {self.event_shape} with one label each; "
                f"{tuple(x.shape)} with labels {tuple(label.shape)} given"
            )
        embedding = self.time_embedding(
            sinusoids(label, self.channels, self.config.time_frequency, self.config.time_shift).to(x.dtype)
        )
        if self.class_embedding is not None and condition is not None:
            embedding = embedding + self.class_embedding(condition)
        embedding = F.silu(embedding)  # every block applies SiLU to the same embedding: once is enough
        follow = iter(followers(after, self.widths))
        x = self.conv_in(x)
        skips = [x]
        for level in self._levels(self.down_blocks):
            for index in range(len(level.resnets)):
                x = next(follow)(level.layer(index, x, embedding))
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)
        x = next(follow)(self.mid_block.layer(0, x, embedding))
        x = self.mid_block.resnets[1](x, embedding)
        for level in self._levels(self.up_blocks):
            for index in range(len(level.resnets)):
                x = next(follow)(level.layer(index, torch.cat([x, skips.pop()], 1), embedding))
            for upsample in level.upsamplers:
                x = upsample(x)
        out: Tensor = self.conv_out(self.conv_norm_out.silu(x))
        return out

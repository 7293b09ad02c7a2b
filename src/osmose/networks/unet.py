"""DDPM's UNet (arXiv 2006.11239, appendix B) for images of any size and channel count.

The modules carry the names of diffusers' `UNet2DModel`, so weights move between the two without renaming.
What differs is how the same function is computed:

* normalisation and SiLU are one operation that keeps only its input for the backward pass;
* nearest-neighbour upsampling followed by a 3x3 convolution is one transposed 4x4 convolution (36 multiplications
  per input pixel become 16);
* short attention on a CPU is two plain matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.errors import UserError
from osmose.networks.base import NetworkConfig, near_zero_, sinusoids


class UNetConfig(NetworkConfig):
    """DDPM's UNet. The defaults are the CIFAR-10 model's 35.7 million parameters; its dropout of 0.1 is off."""

    kind: Literal["unet"] = "unet"
    channels: int = Field(128, ge=4, multiple_of=2, description="width of the first level, C")
    mult: tuple[PositiveInt, ...] = Field((1, 2, 2, 2), min_length=1, description="width of each level, in units of C")
    blocks: int = Field(2, ge=1, description="residual blocks per level on the way down; one more on the way up")
    attention: tuple[int, ...] = Field((16,), description="resolutions (larger side, in pixels) with self-attention")
    heads: int = Field(1, ge=1, description="attention heads")
    dropout: float = Field(0.0, ge=0, lt=1)
    norm_groups: int = Field(32, ge=1, description="groups of the normalisation, lowered on narrow levels")
    group_channels: int = Field(4, ge=1, description="fewest channels in a group; 1 for foreign weights that have one")
    norm_eps: float = Field(1e-6, gt=0)
    padding: Literal["symmetric", "asymmetric"] = Field(
        "symmetric", description="of the stride-2 convolutions; asymmetric is TensorFlow's, for foreign weights"
    )

    @field_validator("mult", "attention", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None) -> nn.Module:
        return UNet(self, event_shape, num_classes)

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


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


class _NormSiLU(torch.autograd.Function):
    """SiLU(GroupNorm(x)), remembering only x: the normalised value is computed again in the backward pass."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = torch.native_group_norm(x, weight, bias, x.shape[0], x.shape[1], x[0, 0].numel(), groups, eps)
        return F.silu(out, inplace=True), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.groups, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: in operations that have one
            unit, slope, project = _linearised(x, weight, bias, ctx.groups, ctx.eps)
            grad = grad * slope
            others = [0, *range(2, x.ndim)]
            return project(grad * _along(weight, x)), (grad * unit).sum(others), grad.sum(others), None, None
        n, c, size = x.shape[0], x.shape[1], x[0, 0].numel()
        normed = torch.native_group_norm(x, weight, bias, n, c, size, ctx.groups, ctx.eps)[0]
        grad = torch.ops.aten.silu_backward(grad.contiguous(memory_format=_layout(x)), normed)
        grads = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, weight, n, c, size, ctx.groups, [True, True, True]
        )
        return (*grads, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        x, weight, bias = ctx.saved_tensors
        unit, slope, project = _linearised(x, weight, bias, ctx.groups, ctx.eps)
        d_out = torch.zeros_like(x)
        if tangents[0] is not None:
            d_out = d_out + _along(weight, x) * project(tangents[0])
        if tangents[1] is not None:
            d_out = d_out + _along(tangents[1], x) * unit
        if tangents[2] is not None:
            d_out = d_out + _along(tangents[2], x)
        return d_out * slope, None, None


def _along(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.ndim - 2))


def _linearised(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """What both derivatives of SiLU(GroupNorm(x)) are made of.

    Returns:
        The normalised x before weight and bias; SiLU's slope; the derivative of the normalisation at x, which is a
        symmetric linear map.
    """
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    unit = centred * rstd

    def project(dx: Tensor) -> Tensor:
        dx = dx.reshape(unit.shape)
        return (rstd * (dx - dx.mean(2, keepdim=True) - unit * (unit * dx).mean(2, keepdim=True))).view(x.shape)

    normed = unit.view(x.shape)
    out = _along(weight, x) * normed + _along(bias, x)
    gate = torch.sigmoid(out)
    return normed, gate * (1 + out * (1 - gate)), project


class _Norm(nn.GroupNorm):
    """Group normalisation with as many of the wanted groups as divide the channels and leave enough to a group.

    With one channel to a group, adding a number to a whole channel changes nothing: the block would not see the time.
    """

    def __init__(self, config: UNetConfig, channels: int):
        most = min(config.norm_groups, max(channels // config.group_channels, 1))
        groups = next(n for n in range(most, 0, -1) if channels % n == 0)
        super().__init__(groups, channels, eps=config.norm_eps)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the normalised x."""
        # Accelerators want one dtype; under autocast x is bf16 and the parameters float32.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        out: Tensor = _NormSiLU.apply(x, weight, bias, self.num_groups, self.eps)[0]
        return out


class _Residual(nn.Module):
    def __init__(self, config: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = _Norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.channels, c_out)
        self.norm2 = _Norm(config, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.norm1.silu(x))
        h = h.add_(self.time_emb_proj(embedding)[:, :, None, None])
        h = self.conv2(self.dropout(self.norm2.silu(h)))
        return h.add_(self.conv_shortcut(x))


class _Attention(nn.Module):
    #: Up to this many positions the full score matrix costs less than a fused kernel's blocking on a CPU.
    SHORT = 256

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        if channels % config.heads:
            raise UserError(f"network.heads: {config.heads} does not divide the {channels} channels of a level")
        self.heads = config.heads
        self.group_norm = _Norm(config, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            layer(tokens).view(b, h * w, self.heads, -1).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        if x.device.type == "cpu" and h * w <= self.SHORT:
            weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3), dim=-1)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        out = self.to_out[0](mixed.transpose(1, 2).reshape(b, h * w, c))
        return torch.add(x, out.transpose(1, 2).unflatten(2, (h, w)))


class _Downsample(nn.Module):
    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.asymmetric = config.padding == "asymmetric"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return out


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # An output pixel of even index sees two input rows with weights (w0, w1 + w2), one of odd index (w0 + w1, w2).
        weight = self.conv.weight
        a, b, c = weight.unbind(2)
        a, b, c = torch.stack([c, b + c, a + b, a], 2).unbind(3)
        kernel = torch.stack([c, b + c, a + b, a], 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class _TimeEmbedding(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class _Level(nn.Module):
    """Residual blocks of one resolution, attention after each where it is wanted, and a change of resolution."""

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(config, c_in, c_out) for c_in, c_out in widths)
        self.attentions = nn.ModuleList(_Attention(config, c_out) for _, c_out in widths if attention)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layer(self, index: int, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[index](x, embedding)
        return self.attentions[index](x) if len(self.attentions) > index else x


class UNet(nn.Module):
    """See `UNetConfig`.

    Raises:
        UserError: sides that do not halve, or attention at a resolution that does not occur.
    """

    def __init__(self, config: UNetConfig, event_shape: tuple[int, ...], num_classes: int | None = None):
        super().__init__()
        resolutions = config.resolutions(event_shape)
        missing = sorted(set(config.attention) - set(resolutions))
        if missing:
            raise UserError(
                f"network.attention: {missing[0]} does not occur; the resolutions of these images are "
                f"{', '.join(map(str, resolutions))}"
            )
        channels, widths = config.channels, [config.channels * m for m in config.mult]
        self.config, self.channels, data_channels = config, channels, event_shape[0]
        self.event_shape = tuple(event_shape)
        self.time_embedding = _TimeEmbedding(channels, 4 * channels)
        self.class_embedding = nn.Embedding(num_classes, 4 * channels) if num_classes else None
        self.conv_in = nn.Conv2d(data_channels, channels, 3, padding=1)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, width = [channels], channels
        for index, (resolution, out) in enumerate(zip(resolutions, widths, strict=True)):
            inputs = [width] + [out] * (config.blocks - 1)
            level = _Level(config, [(c_in, out) for c_in in inputs], resolution in config.attention)
            skips += [out] * config.blocks
            if index < len(widths) - 1:
                level.downsamplers.append(_Downsample(config, out))
                skips.append(out)
            self.down_blocks.append(level)
            width = out

        self.mid_block = _Level(config, [(width, width)] * 2, attention=False)
        self.mid_block.attentions.append(_Attention(config, width))

        for index, (resolution, out) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            inputs = [width] + [out] * config.blocks
            level = _Level(config, [(c_in + skips.pop(), out) for c_in in inputs], resolution in config.attention)
            if index > 0:
                level.upsamplers.append(_Upsample(out))
            self.up_blocks.append(level)
            width = out

        self.conv_norm_out = _Norm(config, width)
        self.conv_out = nn.Conv2d(width, data_channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self._last_layers():
            near_zero_(layer)

    def _last_layers(self) -> Iterator[nn.Module]:
        """The last layer of each residual branch, and of the network."""
        for module in self.modules():
            if isinstance(module, _Residual):
                yield module.conv2
            elif isinstance(module, _Attention):
                yield module.to_out[0]
        yield self.conv_out

    @staticmethod
    def _levels(blocks: nn.ModuleList) -> Iterator[_Level]:
        for level in blocks:
            assert isinstance(level, _Level)
            yield level

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """From x (B, C, H, W), label (B,) on the scale 0..1000, condition (B,) classes or None, to (B, C, H, W)."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.event_shape or label.shape != x.shape[:1]:
            raise UserError(
                f"network: built for images {self.event_shape} with one label each; "
                f"{tuple(x.shape)} with labels {tuple(label.shape)} given"
            )
        embedding = self.time_embedding(sinusoids(label, self.channels).to(x.dtype))
        if self.class_embedding is not None and condition is not None:
            embedding = embedding + self.class_embedding(condition)
        embedding = F.silu(embedding)  # every block applies SiLU to the same embedding: once is enough
        x = self.conv_in(x)
        skips = [x]
        for level in self._levels(self.down_blocks):
            for index in range(len(level.resnets)):
                x = level.layer(index, x, embedding)
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)
        x = self.mid_block.layer(0, x, embedding)
        x = self.mid_block.resnets[1](x, embedding)
        for level in self._levels(self.up_blocks):
            for index in range(len(level.resnets)):
                x = level.layer(index, torch.cat([x, skips.pop()], 1), embedding)
            for upsample in level.upsamplers:
                x = upsample(x)
        out: Tensor = self.conv_out(self.conv_norm_out.silu(x))
        return out

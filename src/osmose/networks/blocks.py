"""What the UNet is made of: normalisation, residual and MBConv blocks, attention, changes of resolution.

Blocks are called as block(x, embedding): x (B, C, H, W) and the embedding of time and class after its SiLU, (B, E).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.networks.base import factor_and_shift
from osmose.networks.layers import Conv2d, DoublingConv2d, Linear

if TYPE_CHECKING:
    from osmose.networks.unet import UNetConfig


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


class NormSiLU(torch.autograd.Function):
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
        ctx.set_materialize_grads(False)  # the derivative of what does not vary is None: nothing is computed from it
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
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
        dx, d_weight, d_bias = tangents[:3]
        if torch.is_grad_enabled():  # a second derivative is wanted
            unit, slope, project = _linearised(x, weight, bias, ctx.groups, ctx.eps)
            d_out = torch.zeros_like(x)
            if dx is not None:
                d_out = d_out + _along(weight, x) * project(dx)
            if d_weight is not None:
                d_out = d_out + _along(d_weight, x) * unit
            if d_bias is not None:
                d_out = d_out + _along(d_bias, x)
            return d_out * slope, None, None
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), ctx.groups)
        normed, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, ctx.eps)
        if dx is None:
            d_out = torch.zeros_like(x)
        else:  # the derivative of the normalisation is symmetric: its backward pass is its forward derivative
            dx = dx.contiguous(memory_format=_layout(x))
            project = torch.ops.aten.native_group_norm_backward
            d_out = project(dx, x, mean, rstd, None, *sizes, [True, False, False])[0].mul_(_along(weight, x))
        if d_weight is not None or d_bias is not None:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight
            d_out = d_out.add_(torch.native_group_norm(x, d_weight, d_bias, *sizes, ctx.eps)[0])
        return torch.ops.aten.silu_backward(d_out, normed), None, None


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


class Norm(nn.GroupNorm):
    """Group normalisation with as many of the wanted groups as divide the channels and leave enough to a group.

    With one channel to a group, adding a number to a whole channel changes nothing: the block would not see the time.
    """

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__(config.groups(channels), channels, eps=config.norm_eps)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the normalised x."""
        # Accelerators want one dtype; under autocast x is bf16 and the parameters float32.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        out: Tensor = NormSiLU.apply(x, weight, bias, self.num_groups, self.eps)[0]
        return out

    def scaled_silu(self, x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        """SiLU(factor normalised + shift), with a factor and a shift for each item and channel, (B, C)."""
        weight = (self.weight * factor).to(x.dtype)
        bias = (self.bias * factor + shift).to(x.dtype)
        # The items as further channels of one item: every channel has a weight and a bias of its own.
        items, channels = x.shape[:2]
        wide = x.reshape(1, items * channels, *x.shape[2:])
        out: Tensor = NormSiLU.apply(wide, weight.flatten(), bias.flatten(), items * self.num_groups, self.eps)[0]
        return out.view(x.shape)


class Residual(nn.Module):
    """DDPM's residual block: two 3x3 convolutions, the embedding between them.

    The embedding is added before the second normalisation, or with another `modulation` gives a factor and a shift for
    what comes out of it: GN(h) (1 + s) + b (arXiv 2102.09672), or GN(h) pnorm(s) + pnorm(b) (2410.11081).
    """

    def __init__(self, config: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        self.modulation = config.modulation
        self.norm1 = Norm(config, c_in)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = Linear(4 * config.channels, c_out if self.modulation == "add" else 2 * c_out)
        self.norm2 = Norm(config, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch."""
        return self.conv2

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.norm1.silu(x))
        projected = self.time_emb_proj(embedding)
        if self.modulation == "add":
            h = self.norm2.silu(h.add_(projected[:, :, None, None]))
        else:  # in the parameters' precision, which under autocast is the finer one
            projected = projected.to(self.norm2.weight.dtype)
            h = self.norm2.scaled_silu(h, *factor_and_shift(self.modulation, projected))
        h = self.conv2(self.dropout(h))
        return h.add_(self.conv_shortcut(x))


class MBConv(nn.Module):
    """An inverted bottleneck with squeeze-and-excitation (arXiv 1801.04381, 1709.01507) in the place of `Residual`.

    A 1x1 convolution to four times the input's channels, a depthwise 3x3 convolution, a gate for each channel, a 1x1
    convolution back. The gate is computed from the channels' means through a quarter of the input's channels. Before
    each convolution come normalisation and SiLU, and no convolution has a bias.
    """

    def __init__(self, config: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        hidden = 4 * c_in
        self.norm1 = Norm(config, c_in)
        self.conv1 = Conv2d(c_in, hidden, 1, bias=False)
        self.time_emb_proj = Linear(4 * config.channels, hidden)
        self.norm2 = Norm(config, hidden)
        self.conv2 = Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm3 = Norm(config, hidden)
        self.squeeze = Linear(hidden, c_in // 4, bias=False)
        self.excite = Linear(c_in // 4, hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.conv3 = Conv2d(hidden, c_out, 1, bias=False)
        self.conv_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch."""
        return self.conv3

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.norm1.silu(x))
        h = h.add_(self.time_emb_proj(embedding)[:, :, None, None])
        h = self.norm3.silu(self.conv2(self.norm2.silu(h)))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(h.mean((2, 3))))))
        h = self.conv3(self.dropout(h * gate[:, :, None, None]))
        return h.add_(self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention among the positions of an image, added to it."""

    #: Up to this many positions the full score matrix costs less than a fused kernel's blocking on a CPU.
    SHORT = 256

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.heads = config.heads_of(channels)
        self.group_norm = Norm(config, channels)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    @property
    def last(self) -> nn.Module:
        """The layer that ends the branch."""
        return self.to_out[0]

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


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.asymmetric = config.padding == "asymmetric"
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if self.asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = DoublingConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class TimeEmbedding(nn.Module):
    """Two layers on the sinusoids of the step."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = Linear(channels, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class Level(nn.Module):
    """Blocks of one resolution, attention after each where it is wanted, and a change of resolution."""

    def __init__(self, config: UNetConfig, widths: list[tuple[int, int]], attention: bool):
        super().__init__()
        block = MBConv if config.block == "mbconv" else Residual
        self.resnets = nn.ModuleList(block(config, c_in, c_out) for c_in, c_out in widths)
        self.attentions = nn.ModuleList(Attention(config, c_out) for _, c_out in widths if attention)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layer(self, index: int, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[index](x, embedding)
        return self.attentions[index](x) if len(self.attentions) > index else x

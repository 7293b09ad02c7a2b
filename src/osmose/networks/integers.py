r"""Layers of small integers: the affine quantiser, as it rounds, as it is trained, and as other runtimes run it.

A number x stands for the integer q, and q for x^:

    q = clamp(round(x / scale) + zero, low, high),      x^ = scale (q - zero).

Zero is exact, as zero padding needs. Weights have one scale for each output and no offset; inputs have one scale and an
offset, and where a layer's input is joined from several parts, as with a UNet's skips, each part has its own:

    y_c = sum over parts of  scale_x scale_c ( sum_k q_k w_ck - zero sum_k w_ck )  +  bias_c.

Sums are of products of 8-bit integers, in 32 bits. Here they are computed in float32 from x^ and w^, which is the same
to the rounding of float32; as a graph (`networks.graphs`) they are integers. Processors without VNNI add the products
in pairs of 16 bits, which overflow unless weights have 7 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.errors import UserError
from osmose.networks.layers import DoublingConv2d

#: What becomes of a layer's inputs: rounded on a scale that was measured before, on the scale of each item as it comes,
#: or left as they are.
Inputs = Literal["static", "dynamic", "float"]
#: The smallest scale: of a range that is nothing but zero.
_FLOOR = 1e-12
#: Factor of a trained logarithm of a scale: with Adam, a step changes the scale by so many learning rates.
_SCALE_RATE = 10.0


class Limits(NamedTuple):
    """The integers there are, both ends included."""

    low: int
    high: int


def unsigned(bits: int) -> Limits:
    """0 to 2^bits - 1: of inputs."""
    return Limits(0, 2**bits - 1)


def signed(bits: int) -> Limits:
    """-(2^(bits-1) - 1) to 2^(bits-1) - 1: of weights."""
    return Limits(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def grid_of(smallest: Tensor, largest: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Scale and zero of the integers that reach over a range, which is widened to hold 0; both in its shape."""
    smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
    scale = ((largest - smallest) / (limits.high - limits.low)).clamp(min=_FLOOR)
    return scale, (limits.low - smallest / scale).round().clamp(*limits)


def quantize(x: Tensor, scale: Tensor, zero: Tensor | float, limits: Limits) -> Tensor:
    """The integers q, in the dtype of x; scale and zero broadcast against it."""
    return (x / scale).round().add(zero).clamp(*limits)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """The numbers x^ that integers stand for."""
    return (q - zero) * scale


class _Rounded(torch.autograd.Function):
    """X^ of x; its derivatives are those of rounding that did nothing (straight through).

    By x it is 1 where x is inside the range, 0 beyond; by the scale (arXiv 1902.08153) it is q - zero - x / scale
    inside, and low - zero or high - zero beyond.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | float, limits: Limits) -> Tensor:
        ratio = x / scale
        whole = ratio.round().add(zero)
        q = whole.clamp(*limits)
        ctx.save_for_backward(ratio, whole, q)
        ctx.zero, ctx.limits, ctx.shape = zero, limits, scale.shape
        return (q - zero) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        ratio, whole, q = ctx.saved_tensors
        inside = (whole >= ctx.limits.low) & (whole <= ctx.limits.high)
        by_scale = (q - ctx.zero) - ratio * inside
        return grad * inside, (grad * by_scale).sum_to_size(ctx.shape), None, None


def rounded(x: Tensor, scale: Tensor, zero: Tensor | float, limits: Limits) -> Tensor:
    """X^, with derivatives by x and by the scale, (`_Rounded`); scale and zero broadcast against x."""
    out: Tensor = _Rounded.apply(x, scale, zero, limits)
    return out


class Form(NamedTuple):
    """How a layer is quantised.

    Attributes:
        inputs: what becomes of its inputs.
        bits: of its inputs, 2 to 8.
        weight_bits: of its weights, 2 to 8.
        parts: channels of each part that its input is joined from; empty where it is one.
    """

    inputs: Inputs = "static"
    bits: int = 8
    weight_bits: int = 8
    parts: tuple[int, ...] = ()


def _doubled(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution of what is upsampled by 2."""

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias)

    return apply


class _Layer(nn.Module):
    """A linear map with a bias, of torch's Linear or Conv2d, whose input has one or several parts."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, form: Form):
        super().__init__()
        convolves = isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros":
                raise UserError(f"quantize: padding with {layer.padding_mode!r} has no integer form; zeros have")
            convolve: Callable[..., Tensor] = functools.partial(
                F.conv2d, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
            )
            # Rounding commutes with what repeats values. The sums of weights of which a transposed convolution would
            # consist are not integers of as many bits.
            self.apply_map = _doubled(convolve) if isinstance(layer, DoublingConv2d) else convolve
        else:
            self.apply_map = F.linear
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        if form.parts and sum(form.parts) != channels:
            raise UserError(f"quantize: parts {form.parts} do not sum to the {channels} channels of the layer's input")
        if form.parts and isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise UserError("quantize: the input of a convolution in groups has one part")
        self.form, self.axis = form, 1 if convolves else -1
        #: Channels of the input's parts, and columns of the weights that belong to them.
        self.parts = form.parts or (channels,)
        self.columns = form.parts or (layer.weight.shape[1],)
        self.limits, self.weight_limits = unsigned(form.bits), signed(form.weight_bits)

    def broadcast(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Scales of outputs, (outputs,), against weights."""
        return scale.view(-1, *(1,) * (weight.ndim - 1))

    def item_grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of each item's own range, which broadcast against x."""
        axes = list(range(1, x.ndim))
        return grid_of(x.amin(axes, keepdim=True), x.amax(axes, keepdim=True), self.limits)

    def extra_repr(self) -> str:
        form = self.form
        return f"parts={self.parts}, inputs={form.inputs}, bits={form.bits}, weight_bits={form.weight_bits}"


class IntegerLayer(_Layer):
    """A layer with integer weights, for inference.

    Attributes:
        weight: int8, in the shape of the layer's.
        weight_scale: float32 (parts, outputs).
        bias: float32 (outputs,), or None.
        scale: of inputs that are "static", float32 (parts,).
        zero: likewise, uint8 (parts,).
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    scale: Tensor
    zero: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, form: Form):
        super().__init__(layer, form)
        count, outputs = len(self.parts), len(layer.weight)
        self.register_buffer("weight", torch.zeros_like(layer.weight, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(count, outputs))
        self.register_buffer("bias", None if layer.bias is None else torch.zeros(outputs))
        if form.inputs == "static":
            self.register_buffer("scale", torch.ones(count))
            self.register_buffer("zero", torch.zeros(count, dtype=torch.uint8))

    def real_weight(self) -> Tensor:
        """The weights that the integers stand for, float32."""
        whole = zip(self.weight.split(self.columns, 1), self.weight_scale, strict=True)
        return torch.cat([w.float() * self.broadcast(scale, w) for w, scale in whole], 1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and self.form.inputs == "static":
            return self._graph(x)
        x = x.float()
        if self.form.inputs == "static":
            parts = x.split(self.parts, self.axis)
            known = zip(parts, self.scale, self.zero.float(), strict=True)
            x = torch.cat([dequantize(quantize(p, s, z, self.limits), s, z) for p, s, z in known], self.axis)
        elif self.form.inputs == "dynamic":
            split = [(part, *self.item_grid(part)) for part in x.split(self.parts, self.axis)]
            x = torch.cat([dequantize(quantize(p, s, z, self.limits), s, z) for p, s, z in split], self.axis)
        out: Tensor = self.apply_map(x, self.real_weight(), self.bias)
        return out

    def _graph(self, x: Tensor) -> Tensor:
        """The same in ONNX's operations, which runtimes fuse to layers of integers."""
        total: Tensor | None = None
        for index, (part, weight) in enumerate(
            zip(x.split(self.parts, self.axis), self.weight.split(self.columns, 1), strict=True)
        ):
            scale, zero = self.scale[index].clone(), self.zero[index].clone()
            if self.form.bits < 8:  # a byte has more levels than there are
                ends = ((torch.tensor(self.limits) - zero.float()) * scale).tolist()
                part = part.clamp(*ends)
            q = _symbolic("QuantizeLinear", (part, scale, zero), torch.uint8, part)
            part = _symbolic("DequantizeLinear", (q, scale, zero), torch.float32, part)
            of_outputs = self.weight_scale[index].clone()
            none = torch.zeros(len(weight), dtype=torch.int8)
            weight = weight.clone()
            weight = _symbolic("DequantizeLinear", (weight, of_outputs, none), torch.float32, weight, axis=0)
            done = self.apply_map(part, weight, self.bias if index == 0 else None)
            total = done if total is None else total + done
        assert total is not None
        return total


def _symbolic(name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, like: Tensor, **attributes: Any) -> Tensor:
    """An operation of ONNX, as torch exports it."""
    out: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=like.shape)
    return out


class RoundedLayer(_Layer):
    """A layer with real weights, which are rounded in every evaluation as its inputs are: what is trained.

    Scales of weights follow the weights; those of inputs are trained, and start as they were measured.

    Attributes:
        weight: float32, in the shape of the layer's.
        bias: float32 (outputs,), or None.
        log_scale: of inputs that are "static": the change of the scale's logarithm in training, (parts,).
    """

    start: Tensor
    zero: Tensor
    shrink: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, form: Form):
        super().__init__(layer, form)
        count, outputs = len(self.parts), len(layer.weight)
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.register_buffer("shrink", torch.ones(count, outputs))
        if form.inputs == "static":
            self.log_scale = nn.Parameter(torch.zeros(count))
            self.register_buffer("start", torch.ones(count))
            self.register_buffer("zero", torch.zeros(count))

    @property
    def scale(self) -> Tensor:
        """Of inputs, (parts,)."""
        return self.start * (_SCALE_RATE * self.log_scale).exp()

    def measured(self, smallest: Tensor, largest: Tensor) -> None:
        """Take the range of each part of the inputs, (parts,)."""
        scale, zero = grid_of(smallest, largest, self.limits)
        self.start.copy_(scale)
        self.zero.copy_(zero)

    def weight_scale(self) -> Tensor:
        """(parts, outputs): the largest weight of each output, and less of it where that rounds better."""
        largest = [w.detach().abs().flatten(1).amax(1) for w in self.weight.split(self.columns, 1)]
        return (torch.stack(largest) * self.shrink / self.weight_limits.high).clamp(min=_FLOOR)

    def shrink_weights(self) -> None:
        """Choose how much of the largest weight the integers reach over, for the least squared error."""
        factors = torch.linspace(0.5, 1, 51, device=self.weight.device)
        for index, w in enumerate(self.weight.detach().split(self.columns, 1)):
            full = w.abs().flatten(1).amax(1).clamp(min=_FLOOR) / self.weight_limits.high
            errors = []
            for factor in factors:
                scale = self.broadcast(full * factor, w)
                errors.append((dequantize(quantize(w, scale, 0.0, self.weight_limits), scale, 0.0) - w).square())
            of_outputs = torch.stack([error.flatten(1).sum(1) for error in errors])
            self.shrink[index] = factors[of_outputs.argmin(0)]

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.float().split(self.parts, self.axis))
        if self.form.inputs == "static":
            grid = zip(parts, self.scale, self.zero, strict=True)
            parts = [rounded(part, scale, zero, self.limits) for part, scale, zero in grid]
        elif self.form.inputs == "dynamic":
            parts = [rounded(part, *self.item_grid(part.detach()), self.limits) for part in parts]
        of_parts = zip(self.weight.split(self.columns, 1), self.weight_scale(), strict=True)
        weight = torch.cat([rounded(w, self.broadcast(s, w), 0.0, self.weight_limits) for w, s in of_parts], 1)
        out: Tensor = self.apply_map(torch.cat(parts, self.axis), weight, self.bias)
        return out

    @torch.no_grad()
    def integers(self, target: IntegerLayer) -> None:
        """Give an integer layer of the same form what this one rounds to."""
        scales = self.weight_scale()
        whole = [
            quantize(w, self.broadcast(s, w), 0.0, self.weight_limits)
            for w, s in zip(self.weight.split(self.columns, 1), scales, strict=True)
        ]
        target.weight.copy_(torch.cat(whole, 1))
        target.weight_scale.copy_(scales)
        if self.bias is not None:
            assert target.bias is not None
            target.bias.copy_(self.bias)
        if self.form.inputs == "static":
            target.scale.copy_(self.scale)
            target.zero.copy_(self.zero)

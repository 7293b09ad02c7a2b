"""Linear layers whose forward derivative costs one more evaluation, and embeddings of classes.

torch differentiates a layer f(x, w) + b in x and in w. In forward mode that is f(dx, w) + f(x, dw), and where the
weights do not vary it computes the second term all the same, from zeros: a derivative along x costs two evaluations
more, where one is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F


def affine(
    f: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """f(x, weight, bias), which is linear in x but for the bias; x may be a dual number."""
    value, slope = forward_ad.unpack_dual(x)
    if slope is None or any(forward_ad.unpack_dual(p).tangent is not None for p in (weight, bias) if p is not None):
        return f(x, weight, bias)
    return forward_ad.make_dual(f(value, weight, bias), f(slope, weight, None))


class Classes(nn.Embedding):
    """torch's embedding, of classes of which some are not told: numbers below 0 have the embedding 0."""

    def forward(self, input: Tensor) -> Tensor:
        told = super().forward(input.clamp(min=0))
        return told * (input >= 0).unsqueeze(-1).to(told.dtype)


class Linear(nn.Linear):
    """torch's, with a cheaper forward derivative."""

    def forward(self, input: Tensor) -> Tensor:
        return affine(nn.functional.linear, input, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """torch's, with a cheaper forward derivative."""

    def forward(self, input: Tensor) -> Tensor:
        return affine(self._conv_forward, input, self.weight, self.bias)


class DoublingConv2d(Conv2d):
    """A 3x3 convolution after nearest-neighbour upsampling by 2, as one transposed 4x4 convolution."""

    def forward(self, input: Tensor) -> Tensor:
        # An output pixel of even index sees two input rows with weights (w0, w1 + w2), one of odd index (w0 + w1, w2).
        a, b, c = self.weight.unbind(2)
        a, b, c = torch.stack([c, b + c, a + b, a], 2).unbind(3)
        kernel = torch.stack([c, b + c, a + b, a], 3).transpose(0, 1)
        return affine(partial(F.conv_transpose2d, stride=2, padding=1), input, kernel, self.bias)

r"""Networks that answer for several times at once, and layers in which the times meet.

DSNO (arXiv 2211.13449) maps the noise at the start of a trajectory to the trajectory at M times in one pass. Its
network is that of a diffusion model: every time slice gets the same input and a label of its own, and the slices are
further items of the batch. They meet only in layers that filter along the slices,

    (T u)_t = u_t + a((K u)_t),    K u = irfft(R . rfft(u)),    a = leaky ReLU of slope 0.01,

at each pixel by itself, where rfft is the real Fourier transform over the M slices. Of its modes the lowest J are kept,
and R_j is a complex matrix among the channels for each of them. A backbone has such a layer wherever it lists `widths`:
in a UNet after each residual block and its attention on the way down and up, and after the attention in the middle; in
an MLP after each block. R starts small and positive, so the network starts near its backbone.

This is a learned mixing and not a spectral method in physical time: the slices count as equally spaced and periodic,
whatever their times, and the first and the last are neighbours. A network trained with M slices is of no use with
another number of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.errors import UserError


class TemporalFourier(nn.Module):
    """u + leaky_relu(K u), K a filter along the time slices that keeps the lowest modes (arXiv 2211.13449).

    M and J are so small that a fast Fourier transform would cost more than products with dense matrices. The factors of
    what is discarded, the imaginary parts of mode 0 and of mode M / 2, have gradients of 0.

    Args:
        channels: C, of input and output.
        num_times: M, the slices of an item.
        modes: J, the Fourier modes that pass, from 0; at most M // 2 + 1.

    Raises:
        UserError: modes that M slices do not have.
    """

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, channels: int, num_times: int, modes: int):
        super().__init__()
        _check_modes(num_times, modes, fewest=1)
        self.num_times, self.modes = num_times, modes
        #: R as pairs (real, imaginary): (J, C out, C in, 2).
        self.weight = nn.Parameter(torch.rand(modes, channels, channels, 2) / channels**2)
        analysis, synthesis = _transforms(num_times, modes)
        self.register_buffer("analysis", analysis, persistent=False)
        self.register_buffer("synthesis", synthesis, persistent=False)

    def kernel(self) -> Tensor:
        """The filter in time, (M, C out, C in): (K u)_t is the sum over s of kernel[(t - s) mod M] u_s."""
        return torch.fft.irfft(torch.view_as_complex(self.weight), n=self.num_times, dim=0)

    def filtered(self, u: Tensor) -> Tensor:
        """K u, (B * M, C, *space), in the precision of the weights."""
        with torch.autocast(u.device.type, enabled=False):
            items, matrices = len(u) // self.num_times, self._matrices()
            slices = u.to(self.weight.dtype).reshape(items, self.num_times, -1)
            # Row 0 is mode 0, rows 2 j - 1 and 2 j are the real and the imaginary part of mode j, as further channels.
            rows = torch.matmul(self.analysis, slices).view(items, -1, *u.shape[2:])
            parts = rows.split([len(matrix) for matrix in matrices], 1)
            if u.ndim == 2:
                mixed = [F.linear(part, matrix) for part, matrix in zip(parts, matrices, strict=True)]
            else:
                mixed = [
                    F.conv1d(part.flatten(2), matrix[:, :, None]) for part, matrix in zip(parts, matrices, strict=True)
                ]
            modes = torch.cat(mixed, 1).view(items, len(self.analysis), -1)
            return torch.matmul(self.synthesis, modes).view(u.shape)

    def _matrices(self) -> list[Tensor]:
        """R_j as real matrices: (C, C) for modes that are real, (2 C, 2 C) of real and imaginary part for others."""
        matrices = []
        for mode, weight in enumerate(self.weight):
            real, imaginary = weight.unbind(-1)
            if 2 * mode % self.num_times == 0:
                matrices.append(real)
            else:
                matrices.append(torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)]))
        return matrices

    def forward(self, u: Tensor) -> Tensor:
        """(B * M, C, *space), row b * M + i the slice i of item b, to the same shape."""
        return u + F.leaky_relu(self.filtered(u), 0.01).to(u.dtype)


class TemporalNetwork(nn.Module):
    """A backbone that is asked for all of M times at once, and layers between its blocks in which the times meet.

    Args:
        backbone: a network of (x, label, condition, after) with `widths`.
        num_times: M.
        modes: J, the Fourier modes of the layers; 0 for none, so that each slice is computed by itself.

    Raises:
        UserError: modes that M slices do not have, or a backbone without places for layers.
    """

    def __init__(self, backbone: nn.Module, num_times: int, modes: int):
        super().__init__()
        _check_modes(num_times, modes, fewest=0)
        widths: tuple[int, ...] | None = getattr(backbone, "widths", None) if modes else ()
        if widths is None:
            raise UserError(
                f"network: {type(backbone).__name__} has no places for temporal layers; "
                "use a network that lists the `widths` of its blocks (unet, mlp), or modes=0"
            )
        self.backbone, self.num_times = backbone, num_times
        self.mixers = nn.ModuleList(TemporalFourier(c, num_times, modes) for c in widths)

    def forward(self, x: Tensor, labels: Tensor, condition: Tensor | None = None) -> Tensor:
        """The answers of all slices to the same input.

        Args:
            x: (B, *event).
            labels: (M,) on the scale 0..1000, one for each slice.
            condition: (B,) classes, or None.

        Returns:
            (B, M, *out).
        """
        if labels.shape != (self.num_times,):
            raise UserError(
                f"network: built for {self.num_times} times; labels of shape {tuple(labels.shape)} given, "
                f"use ({self.num_times},)"
            )
        items, label = x.repeat_interleave(self.num_times, 0), labels.repeat(len(x))
        if condition is not None:
            condition = condition.repeat_interleave(self.num_times, 0)
        more = {"after": self.mixers} if self.mixers else {}
        out: Tensor = self.backbone(items, label, condition, **more)
        return out.unflatten(0, (len(x), self.num_times))


def _check_modes(num_times: int, modes: int, *, fewest: int) -> None:
    if num_times < 1:
        raise UserError(f"num_times: {num_times} is not a number of times; use at least 1")
    most = num_times // 2 + 1
    if not fewest <= modes <= most:
        raise UserError(
            f"modes: {modes} with num_times={num_times}, which has {most} (num_times // 2 + 1); use {fewest} to {most}"
        )


def _transforms(num_times: int, modes: int) -> tuple[Tensor, Tensor]:
    """The real Fourier transform cut to some modes as a matrix (rows, M), and its inverse (M, rows).

    A mode is a row for its real and one for its imaginary part, or one alone where the mode is real. In the inverse a
    mode that is not real counts twice, for itself and its conjugate.
    """
    rows, columns = [], []
    for mode in range(modes):
        angles = [2 * math.pi * (mode * t % num_times) / num_times for t in range(num_times)]
        real = 2 * mode % num_times == 0
        share = (1 if real else 2) / num_times
        for row in ([math.cos(a) for a in angles], [-math.sin(a) for a in angles])[: 1 if real else 2]:
            rows.append(row)
            columns.append([share * value for value in row])
    return torch.tensor(rows), torch.tensor(columns).T.contiguous()

r"""Noise that is correlated in time: Gaussian processes at any observation times (arXiv 2211.02590).

Noise at the times t_1 < ... < t_L of a series is C eps with eps white and C the Cholesky factor of

    Sigma_ij = k(t_i, t_j) + jitter [i = j],

the same for every channel. The factor of an item is lower triangular: what it says of the first times does not depend
on those after them, so that series of different lengths share a batch, filled up at the end. A process with the Markov
property (`ou`, `brownian`) needs no matrix: with r_i and s_i of its transition,

    z_1 = s_1 eps_1,   z_i = r_i z_{i-1} + s_i eps_i,   eps_i = (z_i - r_i z_{i-1}) / s_i,   log det C = sum log s_i.

With U = C^-1 X a diffusion of X under this noise is an ordinary one of U: posteriors, samplers and objectives are those
of white noise, and log p(X) = log p(U) - log det C for each channel.

Times are in the units of the data. Everything is float64 inside: a Cholesky factor of a smooth kernel in float32 fails.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from osmose.configuration import Config
from osmose.errors import UserError

#: Jitter grows tenfold until a factor exists, from the least to the largest.
_LEAST_JITTER, _MOST_JITTER = 1e-10, 1e-2
#: Correlations of neighbours below the first are white noise in disguise, above the second lost in float32.
_WHITE, _STIFF = 0.05, 0.9999


class Factor(ABC):
    """C, of each series of a batch at its own times."""

    @abstractmethod
    def color(self, eps: Tensor) -> Tensor:
        """C eps, for eps (B, channels, L); shape and dtype of eps."""

    @abstractmethod
    def whiten(self, x: Tensor) -> Tensor:
        """C^-1 x, for x (B, channels, L); shape and dtype of x."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """Of C, for one channel, by observation: float64 (B, L), to be summed over those that exist."""


class WhiteFactor(Factor):
    """C = I."""

    def __init__(self, times: Tensor):
        self._log_det = torch.zeros_like(times)

    def color(self, eps: Tensor) -> Tensor:
        return eps

    def whiten(self, x: Tensor) -> Tensor:
        return x

    def log_det(self) -> Tensor:
        return self._log_det


class MarkovFactor(Factor):
    """C of a process whose next value depends on the last alone.

    Args:
        keep: r_i, float64 (B, L); of the first, 0.
        spread: s_i, positive, the same shape.
    """

    def __init__(self, keep: Tensor, spread: Tensor):
        self.keep, self.spread = keep, spread

    def color(self, eps: Tensor) -> Tensor:
        keep, pushed = self.keep.to(eps.device), eps.double() * self.spread.to(eps.device)[:, None]
        states = [pushed[..., 0]]
        for i in range(1, pushed.shape[-1]):
            states.append(torch.addcmul(pushed[..., i], keep[:, None, i], states[-1]))
        return torch.stack(states, -1).to(eps)

    def whiten(self, x: Tensor) -> Tensor:
        wide, keep, spread = x.double(), self.keep.to(x.device), self.spread.to(x.device)
        before = torch.nn.functional.pad(wide[..., :-1], (1, 0))
        return ((wide - keep[:, None] * before) / spread[:, None]).to(x)

    def log_det(self) -> Tensor:
        return self.spread.log()


class DenseFactor(Factor):
    """C as a matrix, by Cholesky's decomposition.

    Args:
        covariance: Sigma, float64 (B, L, L), with or without jitter.
        what: whose it is, for messages.

    Raises:
        UserError: a matrix that is not positive definite even with much jitter.
    """

    def __init__(self, covariance: Tensor, what: str = "covariance"):
        size, jitter = covariance.diagonal(dim1=-2, dim2=-1).mean(), 0.0
        unit = torch.eye(covariance.shape[-1], dtype=torch.float64)
        self.root, failed = torch.linalg.cholesky_ex(covariance)
        while bool(failed.any()):
            jitter = max(10 * jitter, _LEAST_JITTER)
            if jitter > _MOST_JITTER:
                raise UserError(
                    f"{what}: not positive definite, not even with a jitter of {_MOST_JITTER:g}; are times too "
                    "close to each other for its length_scale?"
                )
            self.root, failed = torch.linalg.cholesky_ex(covariance + jitter * size * unit)
        self.jitter = jitter
        if jitter:
            warnings.warn(f"{what}: needed a jitter of {jitter:g} more to be positive definite", stacklevel=2)

    def color(self, eps: Tensor) -> Tensor:
        return (eps.double() @ self.root.mT.to(eps.device)).to(eps)

    def whiten(self, x: Tensor) -> Tensor:
        root = self.root.to(x.device)
        return torch.linalg.solve_triangular(root, x.double().mT, upper=False).mT.to(x)

    def log_det(self) -> Tensor:
        return self.root.diagonal(dim1=-2, dim2=-1).log()


class Kernel(Config, ABC):
    """The law of the noise of one channel at any times."""

    kind: str

    @abstractmethod
    def covariance(self, times: Tensor) -> Tensor:
        """Sigma, float64 (B, L, L), for times float64 (B, L), ascending, on the CPU."""

    @abstractmethod
    def factor(self, times: Tensor) -> Factor:
        """C at the same times.

        Raises:
            UserError: times that do not ascend or are not finite, or at which the process has no density.
        """

    def neighbours(self, times: Tensor) -> Tensor:
        """The correlation of the noise at neighbouring times, float64 (B, L - 1)."""
        covariance = self.covariance(times)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        between = covariance.diagonal(offset=1, dim1=-2, dim2=-1)
        return between / (variance[:, :-1] * variance[:, 1:]).sqrt()

    def warning(self, times: Tensor) -> str | None:
        """What people should know of this kernel at such times: that it is white in disguise, or too stiff."""
        if self.kind == "white" or times.shape[-1] < 2:
            return None
        middle = float(self.neighbours(times).median())
        if middle < _WHITE:
            return (
                f"kernel {self.kind}: neighbouring times have a correlation of {middle:.2g}, which is white noise; the "
                "length_scale is in the units of time of the data: take a larger one"
            )
        if middle > _STIFF:
            return (
                f"kernel {self.kind}: neighbouring times have a correlation of {middle:.6f}, and differences of "
                "neighbours drown in rounding; take a smaller length_scale"
            )
        return None


class WhiteKernel(Kernel):
    """Independent at all times."""

    kind: Literal["white"] = "white"

    def covariance(self, times: Tensor) -> Tensor:
        check_times(times)
        return torch.eye(times.shape[-1], dtype=torch.float64).expand(len(times), -1, -1)

    def factor(self, times: Tensor) -> Factor:
        check_times(times)
        return WhiteFactor(times)


class OUKernel(Kernel):
    """exp(-|t - t'| / length_scale), Ornstein and Uhlenbeck's process of variance 1; its rate is 1 / length_scale."""

    kind: Literal["ou"] = "ou"
    length_scale: float = Field(1.0, gt=0, description="in the units of time of the data")

    def covariance(self, times: Tensor) -> Tensor:
        return (-_distances(times) / self.length_scale).exp()

    def factor(self, times: Tensor) -> Factor:
        check_times(times)
        gap = times.diff(dim=-1) / self.length_scale
        first = torch.zeros_like(times[:, :1])
        # 1 - exp(-2 gap) would lose its digits where times are close.
        return MarkovFactor(
            torch.cat([first, (-gap).exp()], 1), torch.cat([first + 1, (-(-2 * gap).expm1()).sqrt()], 1)
        )


class BrownianKernel(Kernel):
    """(min(t, t') - origin) / length_scale: a random walk from the origin, which itself is known."""

    kind: Literal["brownian"] = "brownian"
    length_scale: float = Field(1.0, gt=0, description="the time in which the variance grows by 1")
    origin: float = Field(0.0, description="where the noise is 0; all times lie after it")

    def covariance(self, times: Tensor) -> Tensor:
        since = self._since(times)
        return torch.minimum(since[:, :, None], since[:, None]) / self.length_scale

    def factor(self, times: Tensor) -> Factor:
        since = self._since(times)
        gaps = torch.cat([since[:, :1], since.diff(dim=-1)], 1)
        keep = torch.ones_like(times)
        keep[:, 0] = 0
        return MarkovFactor(keep, (gaps / self.length_scale).sqrt())

    def _since(self, times: Tensor) -> Tensor:
        check_times(times)
        since = times - self.origin
        if not float(since.min()) > 0:
            raise UserError(
                f"kernel.origin: {self.origin:g} is not valid: must lie before the first time, {float(times.min()):g}"
            )
        return since


class _DenseKernel(Kernel):
    length_scale: float = Field(1.0, gt=0, description="in the units of time of the data")
    jitter: float = Field(1e-4, ge=0, description="variance of white noise on top: smooth kernels need some")

    @abstractmethod
    def _at(self, distance: Tensor) -> Tensor:
        """k, for distances in length scales."""

    def covariance(self, times: Tensor) -> Tensor:
        unit = torch.eye(times.shape[-1], dtype=torch.float64)
        return self._at(_distances(times) / self.length_scale) + self.jitter * unit

    def factor(self, times: Tensor) -> Factor:
        return DenseFactor(self.covariance(times), f"kernel {self.kind}")


class GPKernel(_DenseKernel):
    """exp(-((t - t') / length_scale)^2), without a factor 1/2, as published."""

    kind: Literal["gp"] = "gp"

    def _at(self, distance: Tensor) -> Tensor:
        return (-distance.square()).exp()


class Matern32Kernel(_DenseKernel):
    """(1 + a) exp(-a) with a = sqrt(3) |t - t'| / length_scale."""

    kind: Literal["matern32"] = "matern32"

    def _at(self, distance: Tensor) -> Tensor:
        a = math.sqrt(3) * distance
        return (1 + a) * (-a).exp()


class Matern52Kernel(_DenseKernel):
    """(1 + a + a^2 / 3) exp(-a) with a = sqrt(5) |t - t'| / length_scale."""

    kind: Literal["matern52"] = "matern52"

    def _at(self, distance: Tensor) -> Tensor:
        a = math.sqrt(5) * distance
        return (1 + a + a.square() / 3) * (-a).exp()


def check_times(times: Tensor) -> None:
    """Refuse times that are not (B, L), float64, finite and ascending.

    Raises:
        ValueError: another shape or dtype, or no times.
        UserError: times that are equal, descend, or are not finite.
    """
    if times.ndim != 2 or times.dtype != torch.float64 or not times.numel():
        raise ValueError(f"times must be float64 (B, L), and are {times.dtype} {tuple(times.shape)}")
    if not bool(times.isfinite().all()):
        raise UserError("times: hold NaN or infinity")
    wrong = times.diff(dim=-1) <= 0
    if bool(wrong.any()):
        row, place = (int(v) for v in wrong.nonzero()[0])
        pair = times[row, place : place + 2].tolist()
        raise UserError(f"times: {pair[1]:g} comes after {pair[0]:g} in series {row}; they have to ascend, each once")


def _distances(times: Tensor) -> Tensor:
    """|t - t'|, (B, L, L)."""
    check_times(times)
    return (times[:, :, None] - times[:, None]).abs()


def kriging(kernel: Kernel, times: Tensor, values: Tensor, at: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """The law of a Gaussian process at other times, given what it is at some: mean (n, C) and covariance (n, n).

    Args:
        kernel: of the process.
        times: where it is known, float64 (m,), ascending.
        values: what it is there, (C, m).
        at: where it is asked for, float64 (n,), ascending, none of them among `times`.
        noise: variance of the error of each value, beyond the kernel's own jitter.

    Raises:
        UserError: times that are asked for and known, or that do not ascend.
    """
    everywhere, order = torch.cat([times, at]).sort()
    whole = kernel.covariance(everywhere[None])[0]
    place = order.argsort()
    known, asked = place[: len(times)], place[len(times) :]
    own = whole[known][:, known] + noise * torch.eye(len(times), dtype=torch.float64)
    cross = whole[asked][:, known]
    gain = torch.linalg.solve(own, cross.T).T
    return gain @ values.double().T, whole[asked][:, asked] - gain @ cross.T

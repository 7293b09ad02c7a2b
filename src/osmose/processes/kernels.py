r"""Noise that is correlated in time: Gaussian processes at any observation times (arXiv 2211.02590).

Noise at the times t_1 < ... < t_L of a series is C eps with eps white and C a root of

    Sigma_ij = k(t_i, t_j) + jitter [i = j],

the same for every channel (`processes.factors`). With U = C^-1 X a diffusion of X under this noise is an ordinary
one of U: posteriors, samplers and objectives are those of white noise, and log p(X) = log p(U) - log det C for each
channel.

Times are in the units of the data, float64, on the CPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from osmose.configuration import Config
from osmose.errors import UserError
from osmose.processes.factors import DenseFactor, Factor, MarkovFactor, WhiteFactor

#: Correlations of neighbours below the first are white noise in disguise, above the second lost in float32.
_WHITE, _STIFF = 0.05, 0.9999


class Kernel(Config, ABC):
    """The law of the noise of one channel at any times."""

    kind: str

    @abstractmethod
    def covariance(self, times: Tensor) -> Tensor:
        """Sigma, float64 (B, L, L), for times float64 (B, L), ascending, NaN at the end of shorter series."""

    def factor(
        self, times: Tensor, hidden: Tensor | None = None, known: Tensor | None = None, *, pinned: bool = True
    ) -> Factor:
        """C at times float64 (B, L), ascending, NaN at the end of shorter series.

        Args:
            times: see above.
            hidden: where there is noise, bool (B, channels, L) on the CPU; at all times if None.
            known: where values are known, of the same shape; nowhere if None.
            pinned: whether the noise is that of the process given that it is 0 where values are known.

        Raises:
            UserError: times that do not ascend or are not finite, or at which the process has no density.
        """
        check_times(times)
        there = times.isfinite()[:, None]
        hidden = there if hidden is None else hidden & there
        known = torch.zeros_like(hidden) if known is None else known & there & ~hidden
        # Channels, and items, that are alike share one factor.
        if bool((hidden == hidden[:, :1]).all()) and bool((known == known[:, :1]).all()):
            hidden, known = hidden[:, :1], known[:, :1]
        if all(bool((x == x[:1]).all()) for x in (times.nan_to_num(math.inf), hidden, known)):
            times, hidden, known = times[:1], hidden[:1], known[:1]
        return self._factor(times, hidden, known, pinned)

    @abstractmethod
    def _factor(self, times: Tensor, hidden: Tensor, known: Tensor, pinned: bool) -> Factor:
        """See `factor`; what it is given is checked."""

    def fitted(self, memory: float, first: float) -> Kernel:  # noqa: ARG002
        """The same kernel with what was left open taken from the data.

        Args:
            memory: time in which their correlations fall to 1/e.
            first: their earliest time.
        """
        return self

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
        middle = float(self.neighbours(times).nanmedian())
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

    def _factor(self, times: Tensor, hidden: Tensor, known: Tensor, pinned: bool) -> Factor:  # noqa: ARG002
        return WhiteFactor(hidden, known)


class _ScaledKernel(Kernel):
    length_scale: float | None = Field(
        None, gt=0, description="in the units of time of the data; the time in which they forget if null"
    )

    @property
    def scale(self) -> float:
        """The length scale.

        Raises:
            UserError: none is given, and no data said it.
        """
        if self.length_scale is None:
            raise UserError(f"kernel.length_scale: {self.kind} needs one: it is null, and there are no data to tell")
        return self.length_scale

    def fitted(self, memory: float, first: float) -> Kernel:  # noqa: ARG002
        return self if self.length_scale is not None else self.replace(length_scale=float(f"{memory:.3g}"))


class _MarkovKernel(_ScaledKernel):
    @abstractmethod
    def _variance(self, times: Tensor) -> Tensor:
        """Of the noise at times."""

    @abstractmethod
    def _transition(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        """A and Q of z(t + gap) = A z(t) + N(0, Q)."""

    def _factor(self, times: Tensor, hidden: Tensor, known: Tensor, pinned: bool) -> Factor:
        place = torch.arange(times.shape[-1])
        active = hidden | known if pinned else hidden
        so_far = torch.where(active, place, -1).cummax(2).values
        before = torch.nn.functional.pad(so_far[..., :-1], (1, 0), value=-1)
        none = torch.full_like(before, times.shape[-1])
        after = torch.where(known, place, none).flip(2).cummin(2).values.flip(2) if pinned else none
        after = torch.where(after == none, -1, after)
        t = times[:, None].expand(hidden.shape)
        kept, fresh = self._transition(t - t.gather(2, before.clamp(min=0)))
        kept = torch.where(before >= 0, kept, 0.0)
        fresh = torch.where(before >= 0, fresh, self._variance(t))
        onward, beyond = self._transition(t.gather(2, after.clamp(min=0)) - t)
        onward, beyond = torch.where(after >= 0, onward, 0.0), torch.where(after >= 0, beyond, 1.0)
        total = beyond + onward**2 * fresh
        return MarkovFactor(
            hidden,
            known,
            keep=beyond * kept / total,
            spread=(fresh * beyond / total).sqrt(),
            ahead=fresh * onward / total,
            before=before,
            after=after,
        )


class OUKernel(_MarkovKernel):
    """exp(-|t - t'| / length_scale), Ornstein and Uhlenbeck's process of variance 1; its rate is 1 / length_scale."""

    kind: Literal["ou"] = "ou"

    def covariance(self, times: Tensor) -> Tensor:
        return (-_distances(times) / self.scale).exp()

    def _variance(self, times: Tensor) -> Tensor:
        return torch.ones_like(times)

    def _transition(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        # 1 - exp(-2 gap) would lose its digits where times are close.
        return (-gap / self.scale).exp(), -(-2 * gap / self.scale).expm1()


class BrownianKernel(_MarkovKernel):
    """(min(t, t') - origin) / length_scale: a random walk from the origin, which itself is known."""

    kind: Literal["brownian"] = "brownian"
    origin: float | None = Field(
        None, description="where the noise is 0, before all times; a length scale before the data's first if null"
    )

    @property
    def beginning(self) -> float:
        """The origin.

        Raises:
            UserError: none is given, and no data said it.
        """
        if self.origin is None:
            raise UserError("kernel.origin: brownian needs one: it is null, and there are no data to tell")
        return self.origin

    def fitted(self, memory: float, first: float) -> Kernel:
        kernel = super().fitted(memory, first)
        assert isinstance(kernel, BrownianKernel)
        return kernel if self.origin is not None else kernel.replace(origin=first - kernel.scale)

    def covariance(self, times: Tensor) -> Tensor:
        check_times(times)
        return torch.minimum(times[:, :, None], times[:, None]).sub(self.beginning) / self.scale

    def _variance(self, times: Tensor) -> Tensor:
        return (times - self.beginning) / self.scale

    def _transition(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(gap), gap / self.scale

    def _factor(self, times: Tensor, hidden: Tensor, known: Tensor, pinned: bool) -> Factor:
        first = float(times[:, 0].min())
        if not first > self.beginning:
            raise UserError(
                f"kernel.origin: {self.beginning:g} is not valid: must lie before the first time, {first:g}"
            )
        return super()._factor(times, hidden, known, pinned)


class _DenseKernel(_ScaledKernel):
    jitter: float = Field(1e-4, ge=0, description="variance of white noise on top: smooth kernels need some")

    @abstractmethod
    def _at(self, distance: Tensor) -> Tensor:
        """k, for distances in length scales."""

    def covariance(self, times: Tensor) -> Tensor:
        unit = torch.eye(times.shape[-1], dtype=torch.float64)
        return self._at(_distances(times) / self.scale) + self.jitter * unit

    def _factor(self, times: Tensor, hidden: Tensor, known: Tensor, pinned: bool) -> Factor:
        whole = self.covariance(times).nan_to_num()
        return DenseFactor(whole, hidden, known, pinned, f"kernel {self.kind}")


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
    """Refuse times that are not (B, L), float64, and ascending, NaN allowed at the end.

    Raises:
        ValueError: another shape or dtype, or no times.
        UserError: times that are equal, descend, or are infinite; none at the beginning.
    """
    if times.ndim != 2 or times.dtype != torch.float64 or not times.numel():
        raise ValueError(f"times must be float64 (B, L), and are {times.dtype} {tuple(times.shape)}")
    there = times.isfinite()
    if bool(times.isinf().any()) or not bool(there[:, 0].all()) or bool((there[:, 1:] & ~there[:, :-1]).any()):
        raise UserError("times: hold infinity, or NaN before the end")
    wrong = times.diff(dim=-1) <= 0
    if bool(wrong.any()):
        row, place = (int(v) for v in wrong.nonzero()[0])
        pair = times[row, place : place + 2].tolist()
        raise UserError(f"times: {pair[1]:g} comes after {pair[0]:g} in series {row}; they have to ascend, each once")


def _distances(times: Tensor) -> Tensor:
    """|t - t'|, (B, L, L)."""
    check_times(times)
    return (times[:, :, None] - times[:, None]).abs()

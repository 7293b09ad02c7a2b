r"""Roots of the covariance of noise at the times of series, where some values may be known and others missing.

Of an item, each value of each channel is hidden, known or absent. Noise is C eps at the hidden values and 0 elsewhere,
with eps white: C C^T is the covariance of the process there, or, where the process is pinned, that of the process given
that it is 0 at the known values. Pinned noise joins on to what is known without a jump.

A factor is triangular: what it says of the first times does not depend on hidden ones after them, so that series of
different lengths share a batch, filled up at the end. A process with the Markov property needs no matrix: with p the
last value before i that is hidden or pinned, and n the next that is pinned,

    z_i = keep_i z_p + ahead_i z_n + spread_i eps_i,

where, for the transitions z_i = A z_p + N(0, Q) and z_n = B z_i + N(0, R) and D = R + B^2 Q,

    keep = R A / D,   ahead = Q B / D,   spread^2 = Q R / D.

Everything is float64 inside (float32 on devices without it): a Cholesky factor of a smooth kernel in float32 fails.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from osmose.errors import UserError

#: Jitter grows tenfold until a factor exists, from the least to the largest.
_LEAST_JITTER, _MOST_JITTER = 1e-10, 1e-2


class Factor(ABC):
    """C, of each series of a batch at its own times."""

    def to(self, device: torch.device) -> Self:
        """With all its tensors on a device, in place: they travel once there, and not with every call."""
        wide = _wide_on(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device, wide if value.is_floating_point() else value.dtype))
        return self

    @abstractmethod
    def color(self, eps: Tensor) -> Tensor:
        """C eps where hidden, 0 elsewhere, for eps (B, channels, L); shape and dtype of eps."""

    @abstractmethod
    def whiten(self, x: Tensor) -> Tensor:
        """C^-1 x where hidden, 0 elsewhere, for x (B, channels, L); shape and dtype of x."""

    @abstractmethod
    def expect(self, values: Tensor) -> Tensor:
        """The mean of the process, given its values where they are known.

        Args:
            values: (B, channels, L); what stands at other places does not matter, if it is finite.

        Returns:
            The values where known, their kriging mean where hidden (0 without pins), 0 where absent.
        """

    @abstractmethod
    def log_det(self) -> Tensor:
        """Of C, by value: (B or 1, channels or 1, L), to be summed; 0 where nothing is hidden."""


class WhiteFactor(Factor):
    """C = I: what is known says nothing of the rest."""

    def __init__(self, hidden: Tensor, known: Tensor):
        self.hidden, self.known = hidden, known

    def color(self, eps: Tensor) -> Tensor:
        return eps * self.hidden.to(eps)

    def whiten(self, x: Tensor) -> Tensor:
        return x * self.hidden.to(x)

    def expect(self, values: Tensor) -> Tensor:
        return values * self.known.to(values)

    def log_det(self) -> Tensor:
        return torch.zeros(self.hidden.shape, dtype=_wide_on(self.hidden.device), device=self.hidden.device)


class MarkovFactor(Factor):
    """C of a process whose next value depends on the last alone.

    Args:
        hidden, known: bool (B, channels or 1, L), never both.
        keep, spread, ahead: see the module; float64, of the same shape, read where hidden alone.
        before: the place p, or -1 where there is none, int64.
        after: the place n, or -1.
    """

    def __init__(
        self,
        hidden: Tensor,
        known: Tensor,
        keep: Tensor,
        spread: Tensor,
        ahead: Tensor,
        before: Tensor,
        after: Tensor,
    ):
        self.hidden, self.known, self.before, self.after = hidden, known, before, after
        zero = torch.zeros_like(keep)
        self.keep = torch.where(hidden & (before >= 0), keep, zero)
        self.spread = torch.where(hidden, spread, 1.0)
        self.ahead = torch.where(hidden & (after >= 0), ahead, zero)
        # What carries the state over absent places.
        self.pinned = bool((after >= 0).any())
        self._carry = torch.where(hidden, self.keep, (~known if self.pinned else ~hidden).double())

    def _run(self, pushed: Tensor) -> Tensor:
        """The states z_i = carry_i z_{i-1} + pushed_i, (B, channels, L)."""
        carry = self._carry.to(pushed)
        states = [pushed[..., 0]]
        for i in range(1, pushed.shape[-1]):
            states.append(torch.addcmul(pushed[..., i], carry[..., i], states[-1]))
        return torch.stack(states, -1)

    def color(self, eps: Tensor) -> Tensor:
        wide = _wide(eps)
        hidden = self.hidden.to(wide)
        return (self._run(wide * (self.spread.to(wide) * hidden)) * hidden).to(eps)

    def whiten(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        hidden = self.hidden.to(wide)
        wide = wide * hidden
        return ((wide - self.keep.to(wide) * _taken(wide, self.before)) / self.spread.to(wide) * hidden).to(x)

    def expect(self, values: Tensor) -> Tensor:
        wide = _wide(values)
        known = self.known.to(wide) * wide
        if not self.pinned:
            return known.to(values)
        states = self._run(known + self.ahead.to(wide) * _taken(known, self.after))
        return (states * (self.hidden | self.known).to(wide)).to(values)

    def log_det(self) -> Tensor:
        return self.spread.log()


class DenseFactor(Factor):
    """C as a matrix, by Cholesky's decomposition.

    Args:
        covariance: Sigma, float64 (B, L, L), with or without jitter.
        hidden, known: bool (B, channels or 1, L), never both.
        pinned: whether noise is 0 where known.
        what: whose it is, for messages.

    Raises:
        UserError: a matrix that is not positive definite even with much jitter.
    """

    def __init__(self, covariance: Tensor, hidden: Tensor, known: Tensor, pinned: bool, what: str = "covariance"):
        self.hidden, self.known, self.what, self.jitter = hidden, known, what, 0.0
        own = _submatrix(covariance, hidden)
        self.gain: Tensor | None = None
        if pinned and bool(known.any()):
            root = self._root(_submatrix(covariance, known))
            cross = covariance[:, None] * (hidden[..., :, None] & known[..., None, :])
            half = torch.linalg.solve_triangular(root, cross.mT, upper=False)
            self.gain = torch.linalg.solve_triangular(root.mT, half, upper=True).mT
            own = own - half.mT @ half
        self.root = self._root(own)
        if self.jitter:
            warnings.warn(f"{what}: needed a jitter of {self.jitter:g} more to be positive definite", stacklevel=3)

    def _root(self, matrix: Tensor) -> Tensor:
        size, jitter = matrix.diagonal(dim1=-2, dim2=-1).mean(), 0.0
        root, failed = torch.linalg.cholesky_ex(matrix)
        while bool(failed.any()):
            jitter = max(10 * jitter, _LEAST_JITTER)
            if jitter > _MOST_JITTER:
                raise UserError(
                    f"{self.what}: not positive definite, not even with a jitter of {_MOST_JITTER:g}; are times too "
                    "close to each other for its length_scale?"
                )
            unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
            root, failed = torch.linalg.cholesky_ex(matrix + jitter * size * unit)
        self.jitter = max(self.jitter, jitter)
        return root

    def color(self, eps: Tensor) -> Tensor:
        wide = _wide(eps)
        hidden = self.hidden.to(wide)
        return (_applied(self.root.to(wide), wide * hidden) * hidden).to(eps)

    def whiten(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        hidden = self.hidden.to(wide)
        root = self.root.to(wide)
        if root.shape[1] == 1:  # channels as columns
            solved = torch.linalg.solve_triangular(root[:, 0], (wide * hidden).mT, upper=False).mT
        else:
            solved = torch.linalg.solve_triangular(root, (wide * hidden)[..., None], upper=False)[..., 0]
        return (solved * hidden).to(x)

    def expect(self, values: Tensor) -> Tensor:
        wide = _wide(values)
        known = wide * self.known.to(wide)
        return (known if self.gain is None else known + _applied(self.gain.to(wide), known)).to(values)

    def log_det(self) -> Tensor:
        return self.root.diagonal(dim1=-2, dim2=-1).log() * self.hidden


def _submatrix(covariance: Tensor, some: Tensor) -> Tensor:
    """Sigma at some of the values, and I at the others: (B, channels or 1, L, L)."""
    both = some[..., :, None] & some[..., None, :]
    return covariance[:, None] * both + torch.diag_embed((~some).double())


def _applied(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix (B or 1, channels or 1, L, L) times x (B, channels, L)."""
    if matrix.shape[1] == 1:
        return x @ matrix[:, 0].mT
    return (matrix @ x[..., None])[..., 0]


def _taken(x: Tensor, place: Tensor) -> Tensor:
    """X at given places, 0 where the place is -1; (B, channels, L)."""
    found = x.gather(2, place.clamp(min=0).expand_as(x))
    return torch.where(place >= 0, found, 0.0)


def _wide(x: Tensor) -> Tensor:
    """In the type that the mathematics is done in."""
    return x.to(_wide_on(x.device))


def _wide_on(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64

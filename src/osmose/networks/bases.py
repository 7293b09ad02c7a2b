r"""Univariate basis functions, orthonormal in a stated measure, with their derivatives.

Orthonormal ones make least squares well conditioned: with monomials the condition number explodes by degree 6.

========== ================================================================= =====================================
name       functions of z, k = 0..degree                                     orthonormal in
========== ================================================================= =====================================
hermite    He_k(z) / sqrt(k!)                                                the standard normal law
legendre   sqrt(2 k + 1) P_k(z / a)                                          the uniform law on [-a, a]
chebyshev  T_0, sqrt(2) T_k(z / a)                                           the arcsine law on [-a, a]
b-spline   degree + 1 cubic B-splines on equal knots (of lower degree where  the uniform law on [-a, a]
           there are fewer than 4), orthonormalised
fourier    1, sqrt(2) sin(pi j z / a), sqrt(2) cos(pi j z / a), j = 1, 2...  the uniform law on [-a, a]
========== ================================================================= =====================================

The first is 1 in all of them. Outside [-a, a] values are those at the nearest end, and derivatives 0: polynomials of
high degree would blow up there. Fourier functions are periodic and go on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from osmose.errors import UserError

BasisName = Literal["hermite", "legendre", "chebyshev", "b-spline", "fourier"]


class Basis(nn.Module, ABC):
    """`size` functions on [-domain, domain].

    Args:
        size: how many functions, at least 2.
        domain: a.
    """

    #: Whether values beyond the domain are taken to its ends.
    clamped: bool = True

    def __init__(self, size: int, domain: float):
        super().__init__()
        self.size, self.domain = size, domain

    def forward(self, z: Tensor) -> Tensor:
        """The functions at z of any shape: (*z.shape, size)."""
        return self.values(z.clamp(-self.domain, self.domain) if self.clamped else z)

    def with_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The functions at z and their derivatives, (*z.shape, size) each."""
        if not self.clamped:
            return self.both(z)
        inside = z.clamp(-self.domain, self.domain)
        values, slopes = self.both(inside)
        return values, slopes * (inside == z).to(z.dtype)[..., None]

    @abstractmethod
    def values(self, z: Tensor) -> Tensor:
        """The functions at z inside the domain."""

    @abstractmethod
    def both(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The functions and their derivatives at z inside the domain."""


class Polynomials(Basis):
    """Orthonormal polynomials by their three-term recurrence p_{k+1} = a_k u p_k - c_k p_{k-1}, u = z / unit."""

    def __init__(self, size: int, domain: float, unit: float, factors: list[tuple[float, float]]):
        super().__init__(size, domain)
        self.unit, self.factors = unit, factors[: size - 1]

    def values(self, z: Tensor) -> Tensor:
        u = z / self.unit
        functions = [torch.ones_like(u)]
        for k, (a, c) in enumerate(self.factors):
            functions.append(a * u * functions[k] - (c * functions[k - 1] if k else 0.0))
        return torch.stack(functions, -1)

    def both(self, z: Tensor) -> tuple[Tensor, Tensor]:
        u = z / self.unit
        values, slopes = [torch.ones_like(u)], [torch.zeros_like(u)]
        for k, (a, c) in enumerate(self.factors):
            au = a * u
            values.append(au * values[k] - (c * values[k - 1] if k else 0.0))
            slopes.append(a / self.unit * values[k] + au * slopes[k] - (c * slopes[k - 1] if k else 0.0))
        return torch.stack(values, -1), torch.stack(slopes, -1)


def hermite(size: int, domain: float) -> Basis:
    """He_k / sqrt(k!): p_{k+1} = (z p_k - sqrt(k) p_{k-1}) / sqrt(k + 1)."""
    return Polynomials(size, domain, 1.0, [(1 / math.sqrt(k + 1), math.sqrt(k / (k + 1))) for k in range(size)])


def legendre(size: int, domain: float) -> Basis:
    """sqrt(2k+1) P_k(u): from (k+1) P_{k+1} = (2k+1) u P_k - k P_{k-1}."""
    factors = [
        (
            math.sqrt((2 * k + 1) * (2 * k + 3)) / (k + 1),
            k / (k + 1) * math.sqrt((2 * k + 3) / (2 * k - 1)) if k else 0.0,
        )
        for k in range(size)
    ]
    return Polynomials(size, domain, domain, factors)


def chebyshev(size: int, domain: float) -> Basis:
    """T_0 = 1 and sqrt(2) T_k(u): from T_{k+1} = 2 u T_k - T_{k-1}."""
    factors = [(math.sqrt(2), 0.0), (2.0, math.sqrt(2))] + [(2.0, 1.0)] * size
    return Polynomials(size, domain, domain, factors)


class Fourier(Basis):
    """Sines and cosines of period 2 a."""

    clamped = False

    def _angles(self, z: Tensor) -> tuple[Tensor, Tensor]:
        frequency = math.pi / self.domain * torch.arange(1, self.size // 2 + 1, device=z.device, dtype=z.dtype)
        return z[..., None] * frequency, frequency

    def values(self, z: Tensor) -> Tensor:
        angles, _ = self._angles(z)
        waves = math.sqrt(2) * torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
        return torch.cat([torch.ones_like(z)[..., None], waves], -1)[..., : self.size]

    def both(self, z: Tensor) -> tuple[Tensor, Tensor]:
        angles, frequency = self._angles(z)
        waves = math.sqrt(2) * torch.stack([angles.cos() * frequency, -angles.sin() * frequency], -1).flatten(-2)
        return self.values(z), torch.cat([torch.zeros_like(z)[..., None], waves], -1)[..., : self.size]


class Splines(Basis):
    """B-splines on equal knots, made orthonormal: piecewise cubic with two continuous derivatives.

    Attributes:
        pieces: coefficients of 1, v, v^2, v^3 of each function on each interval, v in [0, 1] along it: (P, 4, size).
    """

    pieces: Tensor

    def __init__(self, size: int, domain: float):
        super().__init__(size, domain)
        order = min(4, size)
        intervals = size - order + 1
        self.width = 2 * domain / intervals
        pieces = np.zeros((intervals, 4, size))
        for interval in range(intervals):
            pieces[interval, :order, interval : interval + order] = _uniform_pieces(order)
        v, weight = np.polynomial.legendre.leggauss(8)
        v, weight = (v + 1) / 2, weight / 2 / intervals
        powers = v[:, None] ** np.arange(4)
        at = np.einsum("qd,pdk->pqk", powers, pieces)
        gram = np.einsum("pqk,pql,q->kl", at, at, weight)
        # The first function is their sum, 1, as in every family; by Cholesky each later one adds one B-spline.
        start = np.eye(size)
        start[0] = 1.0
        whitening = np.linalg.inv(np.linalg.cholesky(start @ gram @ start.T)) @ start
        self.register_buffer("pieces", torch.from_numpy(pieces @ whitening.T).float(), persistent=False)

    def _place(self, z: Tensor) -> tuple[Tensor, Tensor]:
        u = (z + self.domain) / self.width
        interval = u.detach().floor().clamp(0, len(self.pieces) - 1)
        return interval.long(), u - interval

    def values(self, z: Tensor) -> Tensor:
        interval, v = self._place(z)
        c = self.pieces.to(z.dtype)[interval]
        v = v[..., None]
        return c[..., 0, :] + v * (c[..., 1, :] + v * (c[..., 2, :] + v * c[..., 3, :]))

    def both(self, z: Tensor) -> tuple[Tensor, Tensor]:
        interval, v = self._place(z)
        c = self.pieces.to(z.dtype)[interval]
        v = v[..., None]
        return self.values(z), (c[..., 1, :] + v * (2 * c[..., 2, :] + 3 * v * c[..., 3, :])) / self.width


def _uniform_pieces(order: int) -> np.ndarray:
    """The B-splines of an order on equal knots, on one interval: coefficients (power, spline), (order, order).

    By Cox and de Boor: with v in [0, 1], N_j of order n is ((v + n - 1 - j) N_{j-1} + (j + 1 - v) N_j) / (n - 1), of
    order n - 1 on the right, j counting the splines that do not vanish there, from the left.
    """
    pieces = np.ones((1, 1))
    for n in range(2, order + 1):
        raised = np.zeros((n, n))
        for j in range(n):
            if j > 0:  # rising part of the spline that begins earlier
                raised[:-1, j] += (n - 1 - j) * pieces[:, j - 1]
                raised[1:, j] += pieces[:, j - 1]
            if j < n - 1:
                raised[:-1, j] += (j + 1) * pieces[:, j]
                raised[1:, j] -= pieces[:, j]
        pieces = raised / (n - 1)
    return pieces


_MAKERS = {"hermite": hermite, "legendre": legendre, "chebyshev": chebyshev, "b-spline": Splines, "fourier": Fourier}


def basis(name: str, size: int, domain: float) -> Basis:
    """`size` functions of a family on [-domain, domain].

    Raises:
        UserError: no such family, fewer than 2 functions, or a domain that is not positive.
    """
    if name not in get_args(BasisName):
        raise UserError(f"basis: {name!r} is not valid: choose one of {', '.join(get_args(BasisName))}")
    if size < 2:
        raise UserError(f"degree: {size - 1} is not valid: must be at least 1")
    if not domain > 0:
        raise UserError(f"domain: {domain:g} is not valid: must be above 0")
    made: Basis = _MAKERS[name](size, domain)
    return made

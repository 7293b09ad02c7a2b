r"""Spatially linear interpolants (arXiv 2303.08797): x_t = alpha(t) x0 + beta(t) x1 + gamma(t) z for t in [0, 1].

x0 and x1 are drawn from two laws, z is standard normal and independent of both; alpha(0) = beta(1) = 1,
alpha(1) = beta(0) = 0, and gamma vanishes at both ends. The slope of gamma is infinite at the ends of most, so that no
function gives it: gamma comes with gamma gamma', which is finite wherever gamma^2 has a slope.

Two families depart from this. Of a one-sided path x0 itself is the standard normal noise and there is no other
(gamma = 0). A mirror has the same x1 at both ends (alpha = 0, beta = 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from osmose.configuration import Config, ConfigError
from osmose.errors import UserError
from osmose.gaussian.parametrization import column
from osmose.gaussian.schedule import as_time
from osmose.interpolants import GAMMAS

Number = TypeVar("Number", bound=float | Tensor)

_TOLERANCE = 1e-6  # of the values at the ends
_STEP, _SLOPE_TOLERANCE = 1e-5, 1e-3  # of derivatives by differences


class Gamma(Config, ABC):
    """How much noise an interpolant carries at t."""

    kind: str

    @abstractmethod
    def at(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Gamma and gamma gamma' at t in [0, 1], float64, both of t's shape.

        Raises:
            ValueError: t outside [0, 1].
        """


class NoGamma(Gamma):
    """gamma = 0: x_t is determined by x0 and x1."""

    kind: Literal["none"] = "none"

    def at(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return torch.zeros_like(t), torch.zeros_like(t)


class BrownianGamma(Gamma):
    """gamma = sqrt(a t (1 - t)). Its gamma gamma' is a/2 and -a/2 at the ends, where b then carries their scores."""

    kind: Literal["brownian"] = "brownian"
    a: float = Field(1.0, gt=0, description="variance of the noise, times 4 in the middle")

    def at(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return (self.a * t * (1 - t)).sqrt(), self.a * (1 - 2 * t) / 2


class QuadraticGamma(Gamma):
    """gamma = t (1 - t)."""

    kind: Literal["quadratic"] = "quadratic"

    def at(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        gamma = t * (1 - t)
        return gamma, gamma * (1 - 2 * t)


class SineGamma(Gamma):
    """gamma = sin^2(pi t)."""

    kind: Literal["sine"] = "sine"

    def at(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        sine = (math.pi * torch.minimum(t, 1 - t)).sin()  # exactly 0 at t = 1
        return sine**2, 2 * math.pi * sine**3 * (math.pi * t).cos()


GammaChoice = Annotated[SerializeAsAny[Gamma], BeforeValidator(GAMMAS.parse)]


@dataclass(frozen=True)
class Coefficients(Generic[Number]):
    """A path at t: float64 CPU tensors of t's shape, () or (B,), or Python floats at a single time.

    `alpha_dot` may be infinite where alpha is 0, `alpha_alpha_dot` is finite there, as `gamma_gamma_dot` is.
    """

    t: Number
    alpha: Number
    beta: Number
    gamma: Number
    alpha_dot: Number
    beta_dot: Number
    alpha_alpha_dot: Number
    gamma_gamma_dot: Number


class Path(Config, ABC):
    """The coefficients of an interpolant.

    Attributes:
        one_sided: x0 is standard normal noise, and gamma is 0.
        mirror: x0 and x1 are the same item; alpha is 0.
    """

    kind: str
    one_sided: ClassVar[bool] = False
    mirror: ClassVar[bool] = False

    @abstractmethod
    def at(self, t: Tensor | float) -> Coefficients[Tensor]:
        """The coefficients at t in [0, 1].

        Raises:
            ValueError: t outside [0, 1].
        """

    def point(self, t: float) -> Coefficients[float]:
        """The coefficients at one time as Python floats, remembered: what samplers ask for again with every batch."""
        return _point(self, t)

    def width(self, c: Coefficients[Number]) -> Number:
        """The factor of the Gaussian noise, to which score and denoiser belong: score = -eta / width."""
        return c.alpha if self.one_sided else c.gamma

    @property
    def noisy(self) -> bool:
        """Whether there is Gaussian noise between the ends, and so a denoiser and a score that can be learned."""
        return self.width(self.point(0.5)) > 0

    @property
    def flat(self) -> bool:
        """Whether gamma^2 begins without a slope.

        Then 1 / gamma, by which the error of a denoiser is multiplied in the score, has no finite integral, and an SDE
        of constant epsilon carries it to infinity.
        """
        return not self.one_sided and self.noisy and self.point(0.0).gamma_gamma_dot == 0


@lru_cache(maxsize=4096)
def _point(path: Path, t: float) -> Coefficients[float]:
    c = path.at(t)
    return Coefficients(*(float(getattr(c, field.name)) for field in fields(c)))


class _TwoSided(Path):
    """A path between two laws of data, with noise gamma."""

    gamma: GammaChoice = BrownianGamma()

    @model_validator(mode="after")
    def _gamma_vanishes(self) -> _TwoSided:
        check_gamma(self.gamma)
        return self

    @abstractmethod
    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, beta, alpha' and beta'."""

    def at(self, t: Tensor | float) -> Coefficients[Tensor]:
        t = as_time(t)
        alpha, beta, alpha_dot, beta_dot = self._mixture(t)
        gamma, product = self.gamma.at(t)
        return Coefficients(t, alpha, beta, gamma, alpha_dot, beta_dot, alpha * alpha_dot, product)


class _OneSided(Path):
    """A path from standard normal noise to a law of data."""

    one_sided: ClassVar[bool] = True

    @abstractmethod
    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, beta, alpha' and beta'."""

    def at(self, t: Tensor | float) -> Coefficients[Tensor]:
        t = as_time(t)
        alpha, beta, alpha_dot, beta_dot = self._mixture(t)
        none = torch.zeros_like(t)
        return Coefficients(t, alpha, beta, none, alpha_dot, beta_dot, alpha * alpha_dot, none)


def _line(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return 1 - t, t.clone(), -torch.ones_like(t), torch.ones_like(t)


def _quarter(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The cosine as a sine is exactly 0 at t = 1.
    cosine, sine = ((1 - t) * (math.pi / 2)).sin(), (t * (math.pi / 2)).sin()
    return cosine, sine, -(math.pi / 2) * sine, (math.pi / 2) * cosine


class LinearPath(_TwoSided):
    """alpha = 1 - t, beta = t."""

    kind: Literal["linear"] = "linear"

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _line(t)


class TrigPath(_TwoSided):
    """alpha = cos(pi t / 2), beta = sin(pi t / 2)."""

    kind: Literal["trig"] = "trig"

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _quarter(t)


class TrigVPPath(_TwoSided):
    """Trig times sqrt(1 - gamma^2): ends of unit covariance stay so, alpha^2 + beta^2 + gamma^2 = 1.

    At gamma = 1 the factor would have a kink and the velocity a jump, so that gamma has to stay below.
    """

    kind: Literal["trig-vp"] = "trig-vp"

    @model_validator(mode="after")
    def _room_for_data(self) -> TrigVPPath:
        highest = float(self.gamma.at(torch.linspace(0, 1, 1001, dtype=torch.float64))[0].max())
        if highest >= 1 - 1e-9:
            raise ConfigError("gamma", f"reaches {highest:.4g}, and trig-vp has room below 1 only; scale it down")
        return self

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cosine, sine, cosine_dot, sine_dot = _quarter(t)
        gamma, product = self.gamma.at(t)
        rest = (1 - gamma**2).sqrt()
        slope = -product / rest
        return cosine * rest, sine * rest, cosine_dot * rest + cosine * slope, sine_dot * rest + sine * slope


class EncDecPath(_TwoSided):
    """alpha = cos^2(pi t) until t = 1/2, beta = cos^2(pi t) after it, where x_t is noise alone."""

    kind: Literal["encdec"] = "encdec"
    gamma: GammaChoice = SineGamma()

    @model_validator(mode="after")
    def _noise_between(self) -> EncDecPath:
        if not self.noisy:
            raise ConfigError("gamma", "without noise encdec passes through a single point at t = 1/2; take sine")
        return self

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = t < 0.5
        near = torch.where(first, t, t - 1)  # its sine and cosine are exact at both ends
        value, slope, none = (math.pi * near).cos() ** 2, -math.pi * (2 * math.pi * near).sin(), torch.zeros_like(t)
        return (
            torch.where(first, value, none),
            torch.where(first, none, value),
            torch.where(first, slope, none),
            torch.where(first, none, slope),
        )


class MirrorPath(_TwoSided):
    """x_t = x1 + gamma z, with x1 at both ends."""

    kind: Literal["mirror"] = "mirror"
    mirror: ClassVar[bool] = True

    @model_validator(mode="after")
    def _noise_between(self) -> MirrorPath:
        if not self.noisy:
            raise ConfigError("gamma", "without noise a mirror is a path that stands still; take brownian")
        return self

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t), torch.zeros_like(t), torch.zeros_like(t)


class OneSidedLinearPath(_OneSided):
    """alpha = 1 - t, beta = t: flow matching and rectified flow."""

    kind: Literal["one-sided-linear"] = "one-sided-linear"

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _line(t)


class OneSidedTrigPath(_OneSided):
    """alpha = cos(pi t / 2), beta = sin(pi t / 2)."""

    kind: Literal["one-sided-trig"] = "one-sided-trig"

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _quarter(t)


class OneSidedVPPath(_OneSided):
    """alpha = sqrt(1 - t^2), beta = t: dZ = -Z dtau + sqrt(2) dW at t = e^-tau. alpha'(1) is infinite."""

    kind: Literal["one-sided-vp"] = "one-sided-vp"

    def _mixture(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha = ((1 - t) * (1 + t)).sqrt()
        return alpha, t.clone(), -t / alpha, torch.ones_like(t)

    def at(self, t: Tensor | float) -> Coefficients[Tensor]:
        t = as_time(t)
        alpha, beta, alpha_dot, beta_dot = self._mixture(t)
        none = torch.zeros_like(t)
        return Coefficients(t, alpha, beta, none, alpha_dot, beta_dot, -t, none)


def interpolate(c: Coefficients, x0: Tensor, x1: Tensor, z: Tensor | None = None) -> Tensor:
    """x_t = alpha x0 + beta x1 + gamma z, shape (B, *event).

    Args:
        c: at t of shape (B,) or (), or at one time.
        x0: shape (B, *event); of a mirror it is not looked at, of a one-sided path it is the noise.
        x1: the same shape.
        z: standard noise, the same shape; none for paths without gamma.

    Raises:
        UserError: shapes that differ.
    """
    for name, other in (("x0", x0), ("z", z)):
        if other is not None and other.shape != x1.shape:
            raise UserError(f"{name}: shape {tuple(other.shape)} is not x1's {tuple(x1.shape)}")
    x = column(c.alpha, x1) * x0 + column(c.beta, x1) * x1
    return x if z is None else x + column(c.gamma, x1) * z


def check_gamma(gamma: Gamma) -> None:
    """See whether gamma vanishes at both ends, is positive or 0 between them, and has the slope it says.

    Raises:
        ConfigError: one line that names the value.
    """
    for t in (0.0, 1.0):
        value, product = (float(v) for v in gamma.at(t))
        _require("gamma", value, 0.0, t)
        if not math.isfinite(product):
            raise ConfigError("gamma", f"gamma gamma' is {product} at t = {t:g}, and must be finite")
    inner, before, after = _probes()
    values, products = gamma.at(inner)
    _require_at_least("gamma", values, inner)
    _require_slope("gamma gamma'", products, gamma.at(before)[0] ** 2 / 2, gamma.at(after)[0] ** 2 / 2, inner)


def check_path(path: Path) -> None:
    """See whether the coefficients of a path, a user's own too, are those of an interpolant.

    At t = 0 and 1 they have the values that make x_t the one or the other end, and between them derivatives are those
    of the values and x_t does not collapse to a point. Checked in numbers, at the ends and at 41 times between.

    Raises:
        ConfigError: one line that names the coefficient, its value, and what is right.
    """
    ends = (
        ({"alpha": 0.0, "beta": 1.0},) * 2
        if path.mirror
        else ({"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0})
    )
    for t, wanted in zip((0.0, 1.0), ends, strict=True):
        c = path.at(t)
        for name, value in (wanted | {"gamma": 0.0}).items():
            _require(name, float(getattr(c, name)), value, t)
        for name in ("alpha_alpha_dot", "beta_dot", "gamma_gamma_dot"):
            if not math.isfinite(float(getattr(c, name))):
                raise ConfigError(name, f"{float(getattr(c, name))} at t = {t:g} is not valid: must be finite")
    inner, before, after = _probes()
    c, left, right = path.at(inner), path.at(before), path.at(after)
    if path.one_sided and bool((c.gamma != 0).any()):
        raise ConfigError("gamma", f"{float(c.gamma.max()):.6g} is not valid: must be 0 on a one-sided path")
    _require_at_least("gamma", c.gamma, inner)
    _require_at_least("alpha^2 + beta^2 + gamma^2", c.alpha**2 + c.beta**2 + c.gamma**2, inner, least=1e-9)
    for name in ("alpha", "beta"):
        _require_slope(f"{name}_dot", getattr(c, f"{name}_dot"), getattr(left, name), getattr(right, name), inner)
    for name in ("alpha", "gamma"):
        product, before, after = getattr(c, f"{name}_{name}_dot"), getattr(left, name), getattr(right, name)
        _require_slope(f"{name}_{name}_dot", product, before**2 / 2, after**2 / 2, inner)


def _probes() -> tuple[Tensor, Tensor, Tensor]:
    """Times inside (0, 1), the middle among them, and their neighbours for differences."""
    t = torch.cat([torch.linspace(0.0137, 0.9901, 40, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)])
    return t, t - _STEP, t + _STEP


def _require(name: str, value: float, wanted: float, t: float) -> None:
    if not abs(value - wanted) <= _TOLERANCE:
        raise ConfigError(name, f"{value:.6g} at t = {t:g} is not valid: must be {wanted:g}")


def _require_at_least(name: str, values: Tensor, t: Tensor, least: float = 0.0) -> None:
    wrong = ~((values >= least) & values.isfinite())
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0])
        raise ConfigError(
            name, f"{float(values[k]):.6g} at t = {float(t[k]):.4g} is not valid: must be at least {least:g}"
        )


def _require_slope(name: str, slope: Tensor, left: Tensor, right: Tensor, t: Tensor) -> None:
    differences = (right - left) / (2 * _STEP)
    wrong = ~((slope - differences).abs() <= _SLOPE_TOLERANCE * (1 + differences.abs()))
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0])
        raise ConfigError(
            name,
            f"{float(slope[k]):.6g} at t = {float(t[k]):.4g} is not valid: "
            f"the values there have the slope {float(differences[k]):.6g}",
        )

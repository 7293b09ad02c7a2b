r"""Diffusion of a field mode by mode, forwards and backwards (arXiv 2303.00800).

With rates b_k > 0, variances r_k >= 0 and a speed beta(t), B(t) = int_0^t beta, t in [0, 1], 0 data, 1 noise,

    dx_k = -beta b_k x_k dt + sqrt(2 beta r_k) dw_k
    x_k(t) | x_k(s) ~ N(m x_k(s), (r_k / b_k) (1 - m^2)),   m = exp(-b_k (B(t) - B(s))),

which leaves N(0, diag(r_k / b_k)) as it is. b_k = 1 with beta half of VP's is the variance preserving process.

**Backwards**, and the ODE of the same laws, with half the score and no noise:

    dx_k = [beta b_k x_k + 2 beta r_k d_k log rho_t] dt + sqrt(2 beta r_k) dw_k
    r_k d_k log rho_t = -b_k (x_k - m_k E[x_k(0) | x(t)]) / (1 - m_k^2),   m_k = exp(-b_k B(t)).

All but the noise is free of r_k: variances as small as one likes do no harm.

**On a grid** coefficients are folded (`processes.spectrum`). Where rates differ, modes that are one on the grid would
decay at their own: there the rate is that of the lowest, and their stationary variance, sum_j r_{k+jn} / b_{k+jn}, is
kept. Noise is thereby the same field on all grids, and with equal rates the whole process is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from osmose.configuration import Config
from osmose.errors import UserError
from osmose.processes.spectrum import Harmonics, Spectrum


class Drift(Config, ABC):
    """b_k, the rates at which modes forget what they were."""

    kind: str

    @abstractmethod
    def rate(self, squared: Tensor) -> Tensor:
        """b_k as a function of |k|^2."""


class ConstDrift(Drift):
    """The same for all modes."""

    kind: Literal["const"] = "const"
    value: float = Field(1.0, gt=0)

    def rate(self, squared: Tensor) -> Tensor:
        return torch.full_like(squared, self.value)


class PublishedDrift(Drift):
    """1 / (|k|^2 + 0.3) + ((|k|^2 + 2) / 33^2)^(1/4): slowest in the middle."""

    kind: Literal["published"] = "published"

    def rate(self, squared: Tensor) -> Tensor:
        return 1 / (squared + 0.3) + ((squared + 2) / 33**2) ** 0.25


class Speed(Config, ABC):
    """beta(t) and B(t), for t float64 of any shape, or a number."""

    kind: str
    beta_min: float = Field(0.1, ge=0)
    beta_max: float = Field(20.0, gt=0)

    @abstractmethod
    def at(self, t: Tensor | float) -> Tensor:
        """beta(t)."""

    @abstractmethod
    def total(self, t: Tensor | float) -> Tensor:
        """B(t)."""


class VPSpeed(Speed):
    """Half of VP's (arXiv 2011.13456): beta = (beta_min + t (beta_max - beta_min)) / 2."""

    kind: Literal["vp"] = "vp"

    def at(self, t: Tensor | float) -> Tensor:
        return (self.beta_min + _time(t) * (self.beta_max - self.beta_min)) / 2

    def total(self, t: Tensor | float) -> Tensor:
        t = _time(t)
        return (self.beta_min * t + t.square() * (self.beta_max - self.beta_min) / 2) / 2


class PublishedSpeed(Speed):
    """beta = kappa c e^(c t), with c such that B(1) = (beta_min + beta_max) / 2."""

    kind: Literal["published"] = "published"
    beta_max: float = Field(5.0, gt=0)
    kappa: float = Field(0.02, gt=0)

    @property
    def growth(self) -> float:
        """The exponent c."""
        return math.log1p((self.beta_min + self.beta_max) / 2 / self.kappa)

    def at(self, t: Tensor | float) -> Tensor:
        return self.kappa * self.growth * (self.growth * _time(t)).exp()

    def total(self, t: Tensor | float) -> Tensor:
        return self.kappa * (self.growth * _time(t)).expm1()


class Posterior(NamedTuple):
    """Normal laws of modes: x_s given x_t and x_0."""

    mean: Tensor
    variance: Tensor


class ModeProcess:
    """The process of some modes.

    Times are numbers, or float64 tensors whose shape comes before that of the modes in what is returned; states are
    coefficients of any type (..., *modes), and what is added to them comes in it.

    Attributes:
        rate: b_k, float64.
        state: r_k / b_k, the stationary variances, float64; 0 where a mode has no noise.

    Args:
        r: float64 (*modes), at least 0.
        rate: float64 (*modes), above 0.
        speed: beta(t).

    Raises:
        UserError: a rate or variance out of its range, or not finite.
    """

    def __init__(self, r: Tensor, rate: Tensor, speed: Speed):
        for name, values, right in (("b", rate, bool((rate > 0).all())), ("r", r, bool((r >= 0).all()))):
            if not right or not bool(values.isfinite().all()):
                need = "rates of modes must be above 0" if name == "b" else "variances of modes must be at least 0"
                raise UserError(f"{name}: {float(values.min()):g} is not valid: {need}, and finite")
        self.rate, self.state, self.speed = rate, r / rate, speed

    @classmethod
    def of(cls, spectrum: Spectrum, drift: Drift, speed: Speed, harmonics: Harmonics) -> ModeProcess:
        """The process on a grid; see the module."""
        rate = drift.rate(harmonics.squared)
        return cls(rate * spectrum.variances(harmonics, drift.rate), rate, speed)

    @property
    def residual(self) -> float:
        """max_k m_k(1): the largest share of the data that is left where samples begin with none."""
        return float(self.kept(1.0).max())

    def kept(self, t: Tensor | float, s: Tensor | float = 0.0) -> Tensor:
        """The factor m from s to t."""
        return self._decay(t, s).exp()

    def fresh(self, t: Tensor | float, s: Tensor | float = 0.0) -> Tensor:
        """1 - m^2 from s to t, with all its digits."""
        return -(2 * self._decay(t, s)).expm1()

    def _decay(self, t: Tensor | float, s: Tensor | float) -> Tensor:
        passed = self.speed.total(t) - self.speed.total(s)
        return -passed.view(*passed.shape, *(1,) * self.rate.ndim) * self.rate

    def diffuse(self, x: Tensor, s: float, t: float, eps: Tensor) -> Tensor:
        """x_t given x_s and standard normal modes."""
        return self.kept(t, s).to(x) * x + (self.state * self.fresh(t, s)).sqrt().to(x) * eps

    def posterior(self, x: Tensor, x0: Tensor, t: float, s: float) -> Posterior:
        """Of x_s given x_t = x and x_0, s before t."""
        late, early, whole = self.fresh(t, s), self.fresh(s), self.fresh(t)
        mean = (self.kept(t, s) * early / whole).to(x) * x + (self.kept(s) * late / whole).to(x) * x0
        return Posterior(mean, self.state * early * late / whole)

    def backwards(self, x: Tensor, x0: Tensor, t: float, s: float, eps: Tensor | None) -> Tensor:
        """A step of Euler's from t to s, before it, with E[x_0 | x_t] = x0: of the SDE, or without noise of the ODE."""
        beta, step = float(self.speed.at(t)), t - s
        pull = (self.rate / self.fresh(t)).to(x) * (self.kept(t).to(x) * x0 - x)  # r_k times the score
        moved = x + step * beta * (self.rate.to(x) * x + (1 if eps is None else 2) * pull)
        return moved if eps is None else moved + (2 * beta * step * self.rate * self.state).sqrt().to(x) * eps

    def corrected(self, x: Tensor, x0: Tensor, t: float, snr: float, eps: Tensor) -> Tensor:
        """A step of Langevin's at t, as long as snr says in each mode: 2 snr^2 of the variance of its noise."""
        noise = (self.state * self.fresh(t)).sqrt().to(x)
        return x + 2 * snr**2 * (self.kept(t).to(x) * x0 - x) + 2 * snr * noise * eps

    def variance(self, t: Tensor | float, data: Tensor) -> Tensor:
        """Of x_t, for modes of the data with given variances."""
        return self.kept(t).square() * data + self.state * self.fresh(t)

    def filter(self, t: Tensor | float, data: Tensor) -> Tensor:
        """Wiener's filter: of E[x_0 | x_t] = filter x_t, for Gaussian data with given variances of modes."""
        total = self.variance(t, data)
        return torch.where(total > 0, self.kept(t) * data / total, 0.0)

    def prior_kl(self, data: Tensor) -> float:
        """KL(law of x_1 || stationary law) in nats, for Gaussian data with given variances; of modes with noise."""
        noisy = self.state > 0
        ratio = (self.variance(1.0, data) / self.state)[noisy]
        return float((ratio - 1 - ratio.log()).sum()) / 2

    def start_kl(self, x0: Tensor) -> Tensor:
        """KL(law of x_1 given x_0 || stationary law) in nats, float64 (*modes), for each mode; 0 without noise."""
        fresh = self.fresh(1.0)
        far = (self.kept(1.0) * x0.double()).square()
        return torch.where(self.state > 0, (far / self.state - (1 - fresh) - fresh.log()) / 2, 0.0)

    def step_weights(self, t: float, s: float) -> Tensor:
        """What squared errors of x_0 cost in the step from t to s, before it, in nats: `bound_weights` for steps.

        KL(x_s given x_t and x_0 || the same given an estimate) is the sum over modes of weight |x_0 - x0_hat|^2.
        """
        passed = self.fresh(t, s) / (self.fresh(s) * self.fresh(t))
        return self.kept(s).square() * passed * self.weights() / 2

    def weights(self) -> Tensor:
        """b_k / r_k, what errors of modes are weighed by; 0 for modes without noise."""
        return torch.where(self.state > 0, 1 / self.state, 0.0)

    def bound_weights(self, t: Tensor | float) -> Tensor:
        """What bounds the KL divergence in nats, over all t: beta m^2 b_k^2 / (r_k (1 - m^2)^2)."""
        beta = self.speed.at(t)
        share = self.kept(t).square() * self.rate / self.fresh(t).square()
        return beta.view(*beta.shape, *(1,) * self.rate.ndim) * share * self.weights()


def _time(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)

r"""Noise schedules: `x_t = alpha(t) x0 + sigma(t) eps` for process time t in [0, 1], 0 = data, 1 = prior.

All functions take and return float64 tensors on the CPU and are cast where they are used: `1 - alpha(t)^2` at small
t and the cumulative products lose digits in float32. A point of a schedule is a `Level`, which is all that
parametrizations and solvers know of time.

The discrete schedules (`linear`, `cosine`) are tables of `log alpha^2` at t = k/T, k = 0..T, interpolated linearly
between the grid points, so that they equal the products of the published betas exactly on the grid and can still
be evaluated anywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from osmose.configuration import Config

Number = TypeVar("Number", bound=float | Tensor)


class Level(NamedTuple, Generic[Number]):
    """One point of a schedule, or one for each item of a batch: Python floats, or float64 tensors of shape (B,)."""

    t: Number
    alpha: Number
    sigma: Number

    @property
    def size(self) -> float:
        """sqrt(alpha^2 + sigma^2) of one level, the deviation of noisy data whose own is 1."""
        return math.hypot(float(self.alpha), float(self.sigma))


#: The end of every sampling grid: clean data.
CLEAN = Level(0.0, 1.0, 0.0)


def as_time(t: Tensor | float) -> Tensor:
    """Process time as a float64 CPU tensor.

    Raises:
        ValueError: a value outside [0, 1] or not finite.
    """
    t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t = {t[~((t >= 0) & (t <= 1))].flatten()[0].item()} is outside [0, 1]")
    return t


class Schedule(Config, ABC):
    """alpha, sigma and what follows from them; t is a tensor of any shape, or a number.

    Raises (every function of t):
        ValueError: t outside [0, 1].
    """

    kind: str

    @property
    def native_steps(self) -> int | None:
        """T of a discrete schedule, whose training times are k/T, k = 1..T; None for a continuous one."""
        return None

    @property
    def prior_std(self) -> float:
        """Standard deviation of x_1, from which sampling starts."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """Factor of the clean data."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Factor of the noise."""

    @abstractmethod
    def alpha_dot(self, t: Tensor | float) -> Tensor:
        """D alpha / dt."""

    @abstractmethod
    def sigma_dot(self, t: Tensor | float) -> Tensor:
        """D sigma / dt."""

    @abstractmethod
    def time_of(self, log_snr: Tensor | float) -> Tensor:
        """The t at which `log_snr(t)` has a value: inverse of `log_snr`, clamped to [0, 1]."""

    def log_snr(self, t: Tensor | float) -> Tensor:
        """2 log(alpha / sigma), decreasing in t; infinite where sigma or alpha is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def level(self, t: Tensor | float) -> Level[Tensor]:
        """The point of the schedule at t."""
        t = as_time(t)
        return Level(t, self.alpha(t), self.sigma(t))

    def label(self, level: Level) -> float | Tensor:
        """What the network is told of the time, on the scale 0..1000 that its embedding resolves."""
        return level.t * 1000


class _Tabulated(Schedule):
    """A schedule given by beta_1..beta_T."""

    num_steps: int = Field(1000, ge=1, description="T, the number of steps of the chain")

    @abstractmethod
    def _betas(self) -> Tensor:
        """beta_1..beta_T in float64."""

    @model_validator(mode="after")
    def _betas_are_variances(self) -> _Tabulated:
        betas = self._betas()
        bad = (betas <= 0) | (betas >= 1)
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise ValueError(f"beta_{k + 1} = {betas[k]:.4g} is outside (0, 1); use more steps or a smaller beta_end")
        return self

    @property
    def native_steps(self) -> int | None:
        return self.num_steps

    @property
    def betas(self) -> Tensor:
        """beta_1..beta_T, shape (T,), float64."""
        return self._betas()

    @property
    def _log_abar(self) -> Tensor:
        return _log_abar_table(self)

    def _position(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        place = as_time(t) * self.num_steps
        # k / T * T misses k by a rounding error: on the grid the table's entry is meant.
        place = torch.where((place - place.round()).abs() < 1e-9 * self.num_steps, place.round(), place)
        left = place.floor().clamp(max=self.num_steps - 1)
        return left.long(), place - left

    def _log_alpha_squared(self, t: Tensor | float) -> Tensor:
        left, share = self._position(t)
        return self._log_abar[left] * (1 - share) + self._log_abar[left + 1] * share

    def _slope(self, t: Tensor | float) -> Tensor:
        left, _ = self._position(t)
        return (self._log_abar[left + 1] - self._log_abar[left]) * self.num_steps

    def alpha(self, t: Tensor | float) -> Tensor:
        return (self._log_alpha_squared(t) / 2).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        return (-torch.expm1(self._log_alpha_squared(t))).sqrt()

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return self.alpha(t) * self._slope(t) / 2

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return -self._log_alpha_squared(t).exp() * self._slope(t) / (2 * self.sigma(t))

    def time_of(self, log_snr: Tensor | float) -> Tensor:
        log_abar = -torch.nn.functional.softplus(-torch.as_tensor(log_snr, dtype=torch.float64))
        rising = -self._log_abar
        right = torch.searchsorted(rising, -log_abar.contiguous()).clamp(1, self.num_steps)
        share = (-log_abar - rising[right - 1]) / (rising[right] - rising[right - 1])
        return ((right - 1 + share) / self.num_steps).clamp(0, 1)

    def label(self, level: Level) -> float | Tensor:
        """The 0-based step k - 1 that DDPM's network is given, rescaled to 0..1000 when T is not 1000."""
        return (level.t * self.num_steps - 1) * (1000 / self.num_steps)


@lru_cache(maxsize=64)  # not a cached property: pydantic compares those when it compares configurations
def _log_abar_table(schedule: _Tabulated) -> Tensor:
    """Log alpha^2 at t = k/T, k = 0..T."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-schedule.betas).cumsum(0)])


class LinearSchedule(_Tabulated):
    """DDPM (arXiv 2006.11239): beta rises linearly; both ends are multiplied by 1000 / T (arXiv 2102.09672)."""

    kind: Literal["linear"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1, description="beta_1 at T = 1000")
    beta_end: float = Field(0.02, gt=0, lt=1, description="beta_T at T = 1000")

    def _betas(self) -> Tensor:
        scale = 1000 / self.num_steps
        return torch.linspace(self.beta_start * scale, self.beta_end * scale, self.num_steps, dtype=torch.float64)


class ScaledLinearSchedule(_Tabulated):
    """Latent diffusion's (arXiv 2112.10752): the root of beta rises linearly; ends are multiplied as DDPM's.

    It ends with alpha = 0.068, though sampling begins with noise alone.
    """

    kind: Literal["scaled-linear"] = "scaled-linear"
    beta_start: float = Field(0.00085, gt=0, lt=1, description="beta_1 at T = 1000")
    beta_end: float = Field(0.012, gt=0, lt=1, description="beta_T at T = 1000")

    def _betas(self) -> Tensor:
        low, high = ((beta * 1000 / self.num_steps) ** 0.5 for beta in (self.beta_start, self.beta_end))
        return torch.linspace(low, high, self.num_steps, dtype=torch.float64) ** 2


class CosineSchedule(_Tabulated):
    """Improved DDPM (arXiv 2102.09672, eq. 17): alpha(t)^2 follows a squared cosine; the last beta is clipped."""

    kind: Literal["cosine"] = "cosine"
    offset: float = Field(0.008, gt=0, lt=1, description="s, which keeps the first beta from vanishing")
    max_beta: float = Field(0.999, gt=0, lt=1)

    def _betas(self) -> Tensor:
        u = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)
        abar = torch.cos((u + self.offset) / (1 + self.offset) * (math.pi / 2)) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=self.max_beta)


class VPSchedule(Schedule):
    """The variance-preserving SDE (arXiv 2011.13456): alpha^2 = exp(-B), sigma^2 = 1 - alpha^2, in continuous time.

    B(t) = beta_min t + (beta_max - beta_min) t^2 / 2, the integral of a rate that rises linearly.
    """

    kind: Literal["vp"] = "vp"
    beta_min: float = Field(0.1, gt=0)
    beta_max: float = Field(20.0, gt=0)

    def _integral(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2

    def _rate(self, t: Tensor | float) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def alpha(self, t: Tensor | float) -> Tensor:
        return (-self._integral(t) / 2).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        return (-(-self._integral(t)).expm1()).sqrt()

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return -self._rate(t) / 2 * self.alpha(t)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return self._rate(t) / 2 * (-self._integral(t)).exp() / self.sigma(t)

    def time_of(self, log_snr: Tensor | float) -> Tensor:
        # alpha^2 = sigmoid(log_snr), so B = softplus(-log_snr); B(t) is a parabola.
        wanted = torch.nn.functional.softplus(-torch.as_tensor(log_snr, dtype=torch.float64), threshold=700)
        wanted = wanted.clamp(max=2 * float(self._integral(1.0)))  # beyond t = 1, but not infinite
        slope = self.beta_max - self.beta_min
        root = (self.beta_min**2 + 2 * slope * wanted).clamp(min=0).sqrt()
        return (2 * wanted / (self.beta_min + root)).clamp(0, 1)


class VarianceExploding(Schedule):
    """EDM (arXiv 2206.00364): alpha = 1 and sigma from sigma_min to sigma_max.

    t is uniform in sigma^(1/rho): a uniform grid in t is EDM's eq. 5. sigma(0) is sigma_min, not 0.
    """

    kind: Literal["ve"] = "ve"
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    rho: float = Field(7.0, gt=0, description="how strongly the grid is refined towards small sigma")

    @model_validator(mode="after")
    def _ordered(self) -> VarianceExploding:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def _root(self, t: Tensor | float) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return low + as_time(t) * (high - low)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return self._root(t) ** self.rho

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return self.rho * self._root(t) ** (self.rho - 1) * (high - low)

    def time_of(self, log_snr: Tensor | float) -> Tensor:
        sigma = (torch.as_tensor(log_snr, dtype=torch.float64) / -2).exp()
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((sigma ** (1 / self.rho) - low) / (high - low)).clamp(0, 1)

    def label(self, level: Level) -> float | Tensor:
        """EDM's c_noise = log(sigma) / 4, times 100 to spread it over the embedding's range."""
        sigma = level.sigma
        return 25 * (sigma.log() if isinstance(sigma, Tensor) else math.log(sigma))


class TrigSchedule(Schedule):
    """TrigFlow (arXiv 2410.11081): alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    kind: Literal["trig"] = "trig"

    def alpha(self, t: Tensor | float) -> Tensor:
        # As a sine it is exactly 0 at t = 1.
        return ((1 - as_time(t)) * (math.pi / 2)).sin()

    def sigma(self, t: Tensor | float) -> Tensor:
        return (as_time(t) * (math.pi / 2)).sin()

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return -(math.pi / 2) * self.sigma(t)

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return (math.pi / 2) * self.alpha(t)

    def time_of(self, log_snr: Tensor | float) -> Tensor:
        return torch.atan((torch.as_tensor(log_snr, dtype=torch.float64) / -2).exp()) / (math.pi / 2)


class StraightSchedule(Schedule):
    """Flow matching and rectified flow (arXiv 2210.02747): alpha = 1 - t, sigma = t."""

    kind: Literal["straight"] = "straight"

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t).clone()

    def alpha_dot(self, t: Tensor | float) -> Tensor:
        return -torch.ones_like(as_time(t))

    def sigma_dot(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_time(t))

    def time_of(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(torch.as_tensor(log_snr, dtype=torch.float64) / -2)

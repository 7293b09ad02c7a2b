r"""TrigFlow: every Gaussian process as a rotation, and how a network's prediction changes along its flow.

With sd the standard deviation of the data and noise z ~ N(0, sd^2 I), TrigFlow (arXiv 2410.11081) noises by an angle,

    x = cos(theta) x0 + sin(theta) z,   theta in [0, pi/2],   tan(theta) = sigma / (alpha sd),

and a point of any other schedule, x_t = alpha x0 + sigma eps, is a multiple of the point with the same signal-to-noise
ratio: x_t = (sqrt(alpha^2 sd^2 + sigma^2) / sd) x. So a denoiser of any schedule and parametrization is one of
TrigFlow. The flow is

    dx / dtheta = V(x, theta),   V = (cos(theta) x - D) / sin(theta),   D = E[x0 | x],

sd times the network F of the paper. It is affine in what the network gives: V = slope x + gain F. The factors are
computed in float64, where the small sin(theta) costs nothing; with EDM's parametrization slope is 0 and gain -sd, with
v on a variance-preserving schedule and sd = 1 they are 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.parametrization import column
from osmose.gaussian.schedule import Level, Schedule

#: How a directional derivative of a network is computed: exactly, or from two further evaluations.
Derivative = Literal["forward", "finite-diff"]

#: No angle is nearer to pi / 2, where no data are left in x and the derivatives of a network's label may have no end,
#: nor ten times as near to 0.
_MARGIN = 1e-4
#: Steps of finite differences: of the network's input and of its label, and of the factors, relative to the angle.
_STEP, _LABEL_STEP, _FINE_STEP = 5e-3, 0.1, 1e-3


def angle_of(level: Level, sigma_data: float) -> Tensor:
    """Theta of a point of any schedule, float64, in [0, pi / 2]."""
    sigma, alpha = (torch.as_tensor(value, dtype=torch.float64) for value in (level.sigma, level.alpha))
    return torch.atan2(sigma, alpha * sigma_data)


def level_of(angle: Tensor, schedule: Schedule, sigma_data: float) -> Level[Tensor]:
    """The point of a schedule at an angle, float64; the nearest that it has."""
    return schedule.level(schedule.time_of(-2 * (angle.double().tan() * sigma_data).log()))


def turned(x: Tensor, velocity: Tensor, angle: Tensor | float) -> Tensor:
    """Where a straight rotation by an angle takes x back to: cos x - sin V, shape of x.

    By theta itself it is D; by the difference of two angles it is the DDIM step between them.

    Args:
        x: shape (B, *event).
        velocity: V at x.
        angle: radians, one number or float64 (B,).
    """
    if isinstance(angle, Tensor):
        return column(angle.cos(), x) * x - column(angle.sin(), x) * velocity
    return math.cos(angle) * x - math.sin(angle) * velocity


class _Factors(NamedTuple):
    """What lies between TrigFlow and the network, float64 (B,)."""

    scale: Tensor  # network input / x
    label: Tensor
    slope: Tensor
    gain: Tensor


class TrigFlow:
    """A denoiser in TrigFlow's coordinates. Angles are float64 tensors (B,) on the CPU.

    Args:
        denoiser: on any schedule; of a learned variance the mean is taken.
        sigma_data: sd.

    Attributes:
        lowest: the smallest angle at which the denoiser was made for.
        highest: the largest.
    """

    def __init__(self, denoiser: NetworkDenoiser, sigma_data: float):
        self.denoiser, self.sigma_data = denoiser, sigma_data
        schedule = denoiser.schedule
        earliest = 1 / schedule.native_steps if schedule.native_steps else 0.0
        ends = angle_of(schedule.level(torch.tensor([earliest, 1.0])), sigma_data).tolist()
        inside = 1 + 3 * _FINE_STEP  # the rates of the factors are differences: all angles in them are the schedule's
        self.lowest = max(ends[0], _MARGIN / 10) * inside
        self.highest = math.pi / 2 - max(math.pi / 2 - ends[1], _MARGIN) * inside

    def velocity(self, x: Tensor, angle: Tensor, condition: Tensor | None = None) -> Tensor:
        """V, shape of x (B, *event)."""
        factors = self._factors(angle)
        out = self._network(column(factors.scale, x) * x, factors.label.to(x.device, torch.float32), condition)
        return self._read(x, out, factors)

    def x0(self, x: Tensor, angle: Tensor, condition: Tensor | None = None) -> Tensor:
        """D = E[x0 | x], shape of x; of a consistency model, where the flow through x ends."""
        return turned(x, self.velocity(x, angle, condition), angle)

    @torch.no_grad()
    def derivative(
        self,
        x: Tensor,
        angle: Tensor,
        direction: Tensor,
        factor: Tensor,
        condition: Tensor | None = None,
        how: Derivative = "forward",
    ) -> tuple[Tensor, Tensor]:
        """V, and factor times its derivative with respect to theta along a path through x.

        The factor multiplies the directions that the network is differentiated along, not the result: where the
        derivative is large and the factor small, nothing overflows.

        Args:
            x: shape (B, *event).
            angle: of the items.
            direction: dx / dtheta of the path, shape of x.
            factor: float64 (B,).
            condition: class of each item, or None.
            how: exactly, by forward-mode differentiation, or by a central difference (two more evaluations).
        """
        factors, rates = self._factors(angle), self._rates(angle)
        scale, rate = column(factors.scale, x), column(factor * rates.scale, x)
        moved = column(factor, x) * direction
        y, dy = scale * x, scale * moved + rate * x
        label, dlabel = (value.to(x.device, torch.float32) for value in (factors.label, factor * rates.label))
        if how == "forward":
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
                dual = self._network(forward_ad.make_dual(y, dy), forward_ad.make_dual(label, dlabel), condition)
                out, change = forward_ad.unpack_dual(dual)
            change = torch.zeros_like(out) if change is None else change
        else:
            # Every evaluation begins in the same random state: dropout is not what they are to differ by.
            devices = [x.device] if x.device.type == "cuda" else []

            def moved_by(h: Tensor | float, k: Tensor) -> Tensor:
                with torch.random.fork_rng(devices):
                    return self._network(y + h * dy, label + k * dlabel, condition)

            change = _difference(moved_by, dy, dlabel)
            out = self._network(y, label, condition)
        read = self._read(x, out, factors)
        moving = column(factor * rates.slope, x) * x + column(factor * rates.gain, x) * out
        return read, column(factors.slope, x) * moved + column(factors.gain, x) * change + moving

    @torch.no_grad()
    def tangent(
        self,
        x: Tensor,
        angle: Tensor,
        direction: Tensor,
        left: Tensor,
        share: float = 1.0,
        condition: Tensor | None = None,
        how: Derivative = "forward",
    ) -> tuple[Tensor, Tensor]:
        """The tangent g of f, which turns x back by an angle, and cos sin dV/dtheta in it, both of x's shape.

        g = -cos^2 (V - dx/dtheta) - share (cos sin x + cos sin dV/dtheta), cos and sin of the angle that is left. With
        share 1 it is cos df/dtheta (arXiv 2410.11081, algorithm 1); with 0 it is cos^2 times the error of V.

        Args:
            x: shape (B, *event).
            angle: of the items.
            direction: dx/dtheta, shape of x.
            left: what f turns x back by, float64 (B,): the angle itself, if f leads to the data.
            share: of the second part, in [0, 1].
            condition: class of each item, or None.
            how: as for `derivative`.
        """
        both = left.cos() * left.sin()
        v, change = self.derivative(x, angle, direction, both, condition, how)
        return column(left.cos().square(), x) * (direction - v) - share * (column(both, x) * x + change), change

    def _network(self, y: Tensor, label: Tensor, condition: Tensor | None) -> Tensor:
        out: Tensor = self.denoiser.network(y, label, condition).to(y.dtype)
        return out.chunk(2, dim=1)[0] if self.denoiser.learned_variance else out

    def _read(self, x: Tensor, out: Tensor, factors: _Factors) -> Tensor:
        return column(factors.slope, x) * x + column(factors.gain, x) * out

    def _factors(self, angle: Tensor) -> _Factors:
        schedule, sd = self.denoiser.schedule, self.sigma_data
        level = level_of(angle, schedule, sd)
        c = self.denoiser.parametrization.coefficients(level)
        size = ((level.alpha * sd) ** 2 + level.sigma**2).sqrt() / sd
        values = (
            c.c_in * size,
            torch.as_tensor(schedule.label(level), dtype=torch.float64),
            (angle.cos() - c.c_skip * size) / angle.sin(),
            -c.c_out / angle.sin(),
        )
        return _Factors(*(value.expand_as(angle) for value in values))

    def _rates(self, angle: Tensor) -> _Factors:
        """Derivatives of the factors with respect to theta: differences of fourth order.

        They are good to ten digits on smooth schedules; on one of T steps, whose tables have kinks, to three.
        """
        h = _FINE_STEP * torch.minimum(angle, math.pi / 2 - angle)
        far, near, after, beyond = (self._factors(angle + k * h) for k in (-2, -1, 1, 2))
        pairs = zip(far, near, after, beyond, strict=True)
        return _Factors(*((8 * (c - b) - (d - a)) / (12 * h) for a, b, c, d in pairs))


def _difference(network: Callable[[Tensor | float, Tensor], Tensor], dy: Tensor, dlabel: Tensor) -> Tensor:
    """A network's derivative along (dy, dlabel) by a central difference, in steps that are small for each item."""
    step = torch.minimum(_STEP / dy.flatten(1).square().mean(1).sqrt(), _LABEL_STEP / dlabel.abs()).clamp(max=1e6)
    h = column(step, dy)
    return (network(h, step) - network(-h, -step)) / (2 * h)


class NoForwardDerivativeError(RuntimeError):
    """A module that cannot be differentiated in forward mode: `name` in its network, `module`, and torch's `reason`."""

    def __init__(self, name: str, module: nn.Module, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.module, self.reason = name, module, reason


def require_forward_derivative(network: nn.Module, run: Callable[[], object]) -> None:
    """Run something that differentiates a network in forward mode.

    Raises:
        NoForwardDerivativeError: the innermost module that failed.
    """
    inside: list[str] = []

    def leave(*_: object) -> None:
        inside.pop()

    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        run()
    except RuntimeError as error:
        name = inside[-1] if inside else ""
        reason = str(error).strip().splitlines()[0]
        raise NoForwardDerivativeError(name, network.get_submodule(name), reason) from None
    finally:
        for hook in hooks:
            hook.remove()

r"""Samplers of stochastic interpolants, and log-densities by the ODE (arXiv 2303.08797).

With the velocity b and the score s of rho(t), and any noise level epsilon(t) >= 0,

    forwards   dX = (b + epsilon s) dt + sqrt(2 epsilon) dW        from rho(t0) to rho(t1), t0 < t1
    backwards  X <- X - h (b - epsilon s) + sqrt(2 epsilon h) xi   from t to t - h

have the law rho(t) at every t; epsilon = 0 is the ODE. In both directions a step dt, of either sign, is
X <- X + dt b + |dt| epsilon s + sqrt(2 epsilon |dt|) xi.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from osmose.errors import UserError, nearest
from osmose.gaussian.derivatives import with_divergence
from osmose.interpolants.fields import Fields
from osmose.interpolants.paths import Path

FieldsAt = Callable[[float, Tensor], Fields]
#: `heun` sees the noise of its step in the second stage only; `heun-noise-first` follows it, as in the paper.
Solver = Literal["euler", "heun-noise-first", "heun", "rk4"]
Divergence = Literal["exact", "hutchinson"]

#: Explicit Runge-Kutta rules of which every stage needs only the one before it: each stage's place in the step, weight.
_Rule = tuple[tuple[float, float], ...]
_RULES: dict[str, _Rule] = {
    "euler": ((0, 1),),
    "heun-noise-first": ((0, 1 / 2), (1, 1 / 2)),
    "heun": ((0, 1 / 2), (1, 1 / 2)),
    "rk4": ((0, 1 / 6), (1 / 2, 1 / 3), (1 / 2, 1 / 3), (1, 1 / 6)),
}


@dataclass(frozen=True)
class Epsilon:
    """The noise level of an SDE: `scale`, or `scale` times the path's gamma (of a one-sided path, its alpha).

    One that follows the path vanishes at its noiseless ends, where the product epsilon s = -scale eta stays finite.

    Raises:
        UserError: a scale that is negative or not finite, or a path without noise to follow.
    """

    scale: float = 0.0
    follows: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise UserError(f"epsilon: {self.scale:g} is not valid: must be a finite number, at least 0")
        if self.follows is not None and not self.follows.noisy:
            raise UserError(f"epsilon: 'gamma' follows the noise of {self.follows.kind}, which has none")

    def along(self, times: Sequence[float]) -> list[float]:
        """Epsilon at each of the times."""
        if self.follows is None:
            return [self.scale] * len(times)
        c = self.follows.at(torch.tensor(times, dtype=torch.float64))
        return (self.scale * self.follows.width(c)).tolist()

    def product(self, epsilon: float, fields: Fields, t: float) -> Tensor:
        """Epsilon s at t, where epsilon has the value given.

        Raises:
            UserError: the score is not known there.
        """
        if fields.s is not None:
            return epsilon * fields.s
        if self.follows is not None and fields.eta is not None:
            return -self.scale * fields.eta
        raise UserError(
            f"an SDE needs the score, and there is none at t = {t:g}: learn b-eta on a path with noise, and keep the "
            "grid away from ends without noise or take an epsilon that vanishes there (gamma)"
        )


class State(NamedTuple):
    """What a sampler has after a step: its time, and x there."""

    t: float
    x: Tensor


def grid(num_steps: int, t0: float = 0.0, t1: float = 1.0) -> list[float]:
    """num_steps + 1 evenly spaced times from t0 to t1; backwards where t0 > t1.

    Raises:
        UserError: no steps, times outside [0, 1], or no way to go.
    """
    if num_steps < 1:
        raise UserError(f"num_steps: {num_steps} is not valid: must be at least 1")
    for name, t in (("t0", t0), ("t1", t1)):
        if not 0 <= t <= 1:
            raise UserError(f"{name}: {t:g} is not valid: must be in [0, 1]")
    if t0 == t1:
        raise UserError(f"t1: {t1:g} is t0 as well, and leaves no way to go")
    return torch.linspace(t0, t1, num_steps + 1, dtype=torch.float64).tolist()


def evaluations(solver: Solver, num_steps: int, denoise: bool = False) -> int:
    """How often `transport` evaluates the fields in `num_steps` steps; the last is one evaluation if it denoises."""
    stages = len(_rule(solver))
    return stages * (num_steps - 1) + 1 if denoise else stages * num_steps


def transport(
    fields_at: FieldsAt,
    x: Tensor,
    times: Sequence[float],
    epsilon: Epsilon,
    normal: Callable[[], Tensor],
    solver: Solver = "heun",
    denoise: bool = False,
) -> Iterator[State]:
    """Carry x from the law at times[0] to that at times[-1]; yields the state after each step.

    `heun` sees the noise of its step in the second stage only, and is of second order in the law. `heun-noise-first`
    adds the noise and then makes a step of Heun's rule in the drift, at t and at the next time (the paper's; its
    released code has both at the next time): right to the first order in the step only, and no better than `euler` at
    large epsilon. Both cost the same, and without noise they are one.

    Args:
        fields_at: the fields at a time and x; b is needed, with noise the score too.
        x: shape (B, *event).
        times: ascending or descending, in [0, 1]; see `grid`.
        epsilon: the noise level; 0 is the ODE.
        normal: draws a standard noise of x's shape; not called where epsilon is 0.
        solver: `rk4` for the ODE only.
        denoise: end with eta1 (going backwards, eta0) as seen from times[-2], in place of the last step; the end of a
            one-sided path at t = 0 is noise, of which that is a mean and not a sample.

    Raises:
        UserError: times that are not monotone or outside [0, 1], `rk4` with noise, an unknown solver; while stepping,
            a field that is needed and not known.
    """
    _check_times(times)
    rule = _rule(solver)
    if solver == "rk4" and epsilon.scale > 0:
        raise UserError("solver: 'rk4' is for the ODE (epsilon = 0) only; take heun or euler")
    return _transport(fields_at, x, times, epsilon, normal, rule, solver == "heun-noise-first", denoise)


def _transport(
    fields_at: FieldsAt,
    x: Tensor,
    times: Sequence[float],
    epsilon: Epsilon,
    normal: Callable[[], Tensor],
    rule: _Rule,
    noise_first: bool,
    denoise: bool,
) -> Iterator[State]:
    levels, backwards, last = epsilon.along(times), times[-1] < times[0], len(times) - 2
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        if denoise and k == last:
            fields = fields_at(t, x)
            yield State(s, _known(fields.eta0 if backwards else fields.eta1, "estimate of the data", t))
            return

        def drift(place: float, x: Tensor, k: int = k, t: float = t, s: float = s) -> Tensor:
            at = _between(t, s, place)
            fields = fields_at(at, x)
            b = _known(fields.b, "velocity", at)
            if epsilon.scale == 0:
                return b
            push = epsilon.product(levels[k + int(place)], fields, at)
            return b - push if backwards else b + push

        # One stage sees epsilon at the start of the step; two see both ends, and the noise has the mean variance.
        level = levels[k] if len(rule) == 1 else (levels[k] + levels[k + 1]) / 2
        noise = normal() * math.sqrt(2 * level * abs(s - t)) if level > 0 else None
        if noise is not None and noise_first:
            x, noise = x + noise, None
        x = _step(drift, x, s - t, rule, noise)
        yield State(s, x)


def ddim(fields_at: FieldsAt, path: Path, x: Tensor, times: Sequence[float]) -> Iterator[State]:
    """X' = alpha(t') eta + beta(t') eta1 on a one-sided path (arXiv 2010.02502, 2303.08797); yields each state.

    Equal to (beta' / beta) X + (alpha' - alpha beta' / beta) eta, and defined at t = 0. On a linear path it is Euler's
    rule for the ODE, on `one-sided-vp` DDIM at eta = 0. One evaluation a step.

    Raises:
        UserError: a path with two sides, bad times; while stepping, an estimate that is not known.
    """
    if not path.one_sided:
        raise UserError(f"ddim: needs a path whose x0 is noise, and {path.kind} has two sides; take the ODE")
    _check_times(times)
    return _ddim(fields_at, path, x, times)


def _ddim(fields_at: FieldsAt, path: Path, x: Tensor, times: Sequence[float]) -> Iterator[State]:
    c = path.at(torch.tensor(times, dtype=torch.float64))
    alphas, betas = c.alpha.tolist(), c.beta.tolist()
    for (t, s), alpha, beta in zip(itertools.pairwise(times), alphas[1:], betas[1:], strict=True):
        fields = fields_at(t, x)
        x = alpha * _known(fields.eta, "denoiser", t) + beta * _known(fields.eta1, "estimate of the data", t)
        yield State(s, x)


def log_density(
    velocity: Callable[[float, Tensor], Tensor],
    x: Tensor,
    times: Sequence[float],
    log_prior: Callable[[Tensor], Tensor],
    divergence: Divergence = "exact",
    probes: int = 1,
    normal: Callable[[], Tensor] | None = None,
    solver: Solver = "rk4",
) -> tuple[Tensor, Tensor]:
    r"""The two parts of log rho(times[0], x) by the ODE; their sum over steps is the log-density.

    log rho(t, x) = log rho(s, X_s) + \int_t^s div b(u, X_u) du,   dX = b du from X_t = x

    Args:
        velocity: b, to be differentiated in x; items of a batch must not depend on each other.
        x: shape (n, *event).
        times: from where x is to where the density is known: from 1 to 0 for data.
        log_prior: log-density at times[-1], shape (n,).
        divergence: exact by as many backward passes an evaluation as an event has values, or Hutchinson's estimate
            v . grad(b . v) with v of random signs. v is drawn once and kept along the trajectory: the estimate is then
            that of one smooth function of time.
        probes: how many v Hutchinson's estimate is the mean of.
        normal: draws a standard noise of x's shape, for the signs; called only for Hutchinson's estimate.
        solver: any rule; the two of Heun are one here.

    Returns:
        log rho at the end of each trajectory, shape (n,), and the integral of the divergence over each step, float64
        (n, K).

    Raises:
        UserError: bad times, an unknown solver or divergence, no probes or nothing to draw them from.
        ValueError: a velocity that does not depend on x, or hides that from autograd.
    """
    _check_times(times)
    rule = _rule(solver)
    if divergence not in get_args(Divergence):
        raise UserError(f"divergence: {divergence!r} is not valid; {nearest(divergence, get_args(Divergence))}")
    signs: list[Tensor] | None = None
    if divergence == "hutchinson":
        if normal is None or probes < 1:
            raise UserError(
                f"probes: {probes} is not valid: Hutchinson's estimate needs at least 1, and noise to draw it"
            )
        signs = [torch.where(normal() < 0, -1.0, 1.0).to(x) for _ in range(probes)]
    integrals = []
    for t, s in itertools.pairwise(times):
        found: list[Tensor] = []

        def slope(place: float, x: Tensor, t: float = t, s: float = s, found: list[Tensor] = found) -> Tensor:
            at = _between(t, s, place)
            b, values = with_divergence(lambda moved: velocity(at, moved), x, signs)
            found.append(values.mean(0))
            return b

        x = _step(slope, x, s - t, rule)
        weighted = torch.stack([weight * value for (_, weight), value in zip(rule, found, strict=True)])
        integrals.append(weighted.sum(0) * (s - t))
    return log_prior(x), torch.stack(integrals, dim=1)


def _step(
    slope_at: Callable[[float, Tensor], Tensor], x: Tensor, h: float, rule: _Rule, noise: Tensor | None = None
) -> Tensor:
    """One step of a rule; the stages after the first see the noise, and it is added in the end."""
    slope: Tensor | None = None
    total: Tensor | None = None
    for place, weight in rule:
        moved = x
        if slope is not None:
            moved = x + slope * (place * h)
            moved = moved if noise is None else moved + noise
        slope = slope_at(place, moved)
        total = slope * weight if total is None else total.add_(slope, alpha=weight)
    assert total is not None
    x = x + total * h
    return x if noise is None else x + noise


def _between(t: float, s: float, place: float) -> float:
    """A time of the step from t to s, the ends exactly: t + (s - t) might round beyond s, and out of [0, 1]."""
    return t if place == 0 else s if place == 1 else t + (s - t) * place


def _known(field: Tensor | None, name: str, t: float) -> Tensor:
    if field is None:
        raise UserError(
            f"the {name} is not determined at t = {t:g} by what was learned; start or stop the grid inside (0, 1)"
        )
    return field


def _rule(solver: str) -> _Rule:
    if solver not in _RULES:
        raise UserError(f"solver: {solver!r} is not valid; {nearest(solver, _RULES)}")
    return _RULES[solver]


def _check_times(times: Sequence[float]) -> None:
    steps = [s - t for t, s in itertools.pairwise(times)]
    if not steps or not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise UserError(f"times: {len(times)} of them that neither all rise nor all fall are not valid")
    if not (min(times) >= 0 and max(times) <= 1):
        raise UserError(f"times: from {times[0]:g} to {times[-1]:g} is not valid: must be in [0, 1]")

r"""What is known at (t, x_t) of an interpolant, and how one field follows from others (arXiv 2303.08797).

    velocity   b   = E[alpha' x0 + beta' x1 + gamma' z | x_t],   the drift of the ODE
    drift      v   = E[alpha' x0 + beta' x1 | x_t],              b = v + gamma' eta
    denoiser   eta = E[z | x_t]
    score      s   = grad log rho(t, x_t) = -eta / gamma         (one-sided: x0 is z, s = -eta / alpha)
    ends       eta0 = E[x0 | x_t], eta1 = E[x1 | x_t],           alpha eta0 + beta eta1 + gamma eta = x_t

gamma' eta = -gamma gamma' s is computed from the score where that is known: it is finite at the ends of time, where
gamma' is not. What has no value at some t is None, rather than a number that is infinite or made up.
Factors are computed in float64 and cast where they meet a batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osmose.errors import UserError, nearest
from osmose.gaussian.parametrization import column
from osmose.interpolants.paths import Coefficients, Path

#: What may be learned -> which fields the network's outputs are, in their order.
LEARNED: dict[str, tuple[str, ...]] = {
    "b": ("b",),
    "b-eta": ("b", "eta"),
    "v-eta": ("v", "eta"),
    "b-s": ("b", "s"),
    "v-s": ("v", "s"),
    "eta": ("eta",),
    "w": ("w",),
}


@dataclass(frozen=True)
class Fields:
    """Fields at (t, x): tensors of x's shape, None where they are not determined at one of the times at least.

    Attributes:
        b: velocity.
        s: score.
        eta: E[z | x_t]; of a one-sided path, E[x0 | x_t].
        eta0: E[x0 | x_t].
        eta1: E[x1 | x_t].
    """

    b: Tensor | None = None
    s: Tensor | None = None
    eta: Tensor | None = None
    eta0: Tensor | None = None
    eta1: Tensor | None = None


def check_learned(learn: str, path: Path) -> None:
    """Refuse what cannot be learned on a path, or does not give its velocity.

    Raises:
        UserError: naming both and what to learn instead.
    """
    if learn not in LEARNED:
        raise UserError(f"learn: {learn!r} is not valid; {nearest(learn, LEARNED)}")
    if path.one_sided and learn not in ("b", "w"):
        raise UserError(f"learn: {learn!r} is not for {path.kind}: all its fields follow from b, or from w")
    if learn == "w" and not path.one_sided:
        raise UserError(f"learn: 'w' leaves the noise of {path.kind} unknown; learn b-eta")
    if learn == "eta" and not path.mirror:
        raise UserError(f"learn: 'eta' alone leaves the velocity of {path.kind} unknown; learn b-eta")
    if learn != "b" and not path.noisy:
        raise UserError(f"learn: {learn!r} asks for the noise of {path.kind}, whose gamma is none; learn b")


def has_score(learn: str, path: Path) -> bool:
    """Whether what is learned determines the score, and so an SDE."""
    return path.noisy and (path.one_sided or learn != "b")


def require_score(learn: str, path: Path) -> None:
    """Refuse an SDE where there is no score.

    Raises:
        UserError: saying what to learn, or to take the ODE.
    """
    if not has_score(learn, path):
        remedy = "learn b-eta" if path.noisy else "give the path a gamma and learn b-eta"
        raise UserError(
            "an SDE needs the score, and a two-sided path on which only b was learned has none; "
            f"{remedy}, or take the ODE (epsilon = 0)"
        )


def read(learn: str, path: Path, c: Coefficients, x: Tensor, outputs: Sequence[Tensor]) -> Fields:
    """The fields from what a network was taught.

    Args:
        learn: a key of `LEARNED` that `check_learned` accepts on the path.
        path: the interpolant's.
        c: its coefficients at t of shape (B,) or (), or at one time (`path.point`), which costs least.
        x: x_t, shape (B, *event).
        outputs: the fields that were learned, each of x's shape.

    Raises:
        ValueError: not as many outputs as `learn` names, or shapes that are not x's.
    """
    c, given = _plain(c), dict(zip(LEARNED[learn], outputs, strict=True))
    for name, output in given.items():
        if output.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(output.shape)}, and x has {tuple(x.shape)}")
    if path.one_sided:
        return one_sided_of_b(c, x, given["b"]) if learn == "b" else one_sided_of_w(c, x, given["w"])
    eta, s = given.get("eta"), given.get("s")
    if s is not None:
        eta = eta_of_score(s, c.gamma)
    elif eta is not None:
        s = score_of_eta(eta, c.gamma)
    push, v = noise_velocity(c, eta, s), given.get("v")
    if learn == "eta":  # of a mirror, which stands still without its noise
        b = push
    elif v is not None:
        b = None if push is None else v + push
    else:
        b = given["b"]
        v = b if _quiet(c) else None if push is None else b - push
    eta0, eta1 = (None, None) if eta is None and not _quiet(c) else ends(c, x, v, eta)
    return Fields(b, s, eta, eta1 if path.mirror else eta0, eta1)


def score_of_eta(eta: Tensor, width: float | Tensor) -> Tensor | None:
    """The score -eta / width, width being gamma, or alpha of a one-sided path; None where that is 0."""
    return None if _any(width == 0) else -eta * column(1 / width, eta)


def eta_of_score(s: Tensor, width: float | Tensor) -> Tensor:
    """The denoiser -width s."""
    return -s * column(width, s)


def noise_velocity(c: Coefficients, eta: Tensor | None, s: Tensor | None) -> Tensor | None:
    """The velocity of the noise, gamma' eta = -gamma gamma' s; None where neither field determines it.

    Where gamma is 0 and only eta is known, it is 0 if gamma gamma' is: the score is bounded there.
    """
    if s is not None:
        return -s * column(c.gamma_gamma_dot, s)
    if eta is None or _any((c.gamma == 0) & (c.gamma_gamma_dot != 0)):
        return None
    return eta * column(c.gamma_gamma_dot / _nonzero(c.gamma), eta)


def ends(c: Coefficients, x: Tensor, v: Tensor | None, eta: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """eta0 and eta1 from alpha eta0 + beta eta1 = x - gamma eta and alpha' eta0 + beta' eta1 = v.

    Where x_t does not depend on an end at all (encdec), or v would be needed and is not known, that end is None. Only
    where gamma is 0 may eta be None.
    """
    rest = x if eta is None else x - column(c.gamma, x) * eta
    eta1 = _end(rest, v, (c.alpha, c.alpha_dot), (c.beta, c.beta_dot))
    eta0 = _end(rest, v, (c.beta, c.beta_dot), (c.alpha, c.alpha_dot))
    return eta0, eta1


def _end(rest: Tensor, v: Tensor | None, other: tuple[Any, Any], own: tuple[Any, Any]) -> Tensor | None:
    """The end whose factor and its slope are `own`, by Cramer's rule; by division where x has nothing of the other."""
    determinant = other[0] * own[1] - other[1] * own[0]
    alone = (other[0] == 0) & (own[0] != 0)
    if _any((determinant == 0) & ((other[0] != 0) | (own[0] == 0) | (other[1] != 0))):
        return None
    by_rest = column(_where(alone, 1 / _nonzero(own[0]), -other[1] / _nonzero(determinant)), rest)
    by_v = _where(alone, 0.0, other[0] / _nonzero(determinant))
    if not _any(by_v != 0):
        return rest * by_rest
    return None if v is None else rest * by_rest + v * column(by_v, rest)


def one_sided_of_b(c: Coefficients, x: Tensor, b: Tensor) -> Fields:
    """All fields of a one-sided path from its velocity: alpha eta + beta eta1 = x, alpha' eta + beta' eta1 = b.

    With alpha times the determinant, which is finite where alpha' is not: s = (beta b - beta' x) / (alpha determinant).
    """
    c = _plain(c)
    scaled = c.alpha**2 * c.beta_dot - c.alpha_alpha_dot * c.beta
    # Where alpha is 0 and alpha' is finite, it vanishes with alpha; the determinant itself is -alpha' beta there.
    end = scaled == 0
    whole = _nonzero(scaled)
    at_end = _nonzero(_where(end, -c.alpha_dot * c.beta, 1.0))
    eta_b = _where(end, -c.beta / at_end, -c.alpha * c.beta / whole)
    eta_x = _where(end, c.beta_dot / at_end, c.alpha * c.beta_dot / whole)
    one_x = _where(end, 1 / _nonzero(c.beta), -c.alpha_alpha_dot / whole)
    one_b = _where(end, 0.0, c.alpha**2 / whole)
    s = None if _any(end) else b * column(c.beta / whole, x) - x * column(c.beta_dot / whole, x)
    eta = b * column(eta_b, x) + x * column(eta_x, x)
    return Fields(b, s, eta, eta, b * column(one_b, x) + x * column(one_x, x))


def one_sided_of_w(c: Coefficients, x: Tensor, w: Tensor) -> Fields:
    """All fields of a one-sided path from w = E[alpha x1 - beta x0 | x_t], the v-prediction of a diffusion.

    Both ends follow with factors that are at most 1 where alpha^2 + beta^2 = 1, and bounded on every path: an error of
    the network is magnified nowhere. From the denoiser alone eta1 = (x - alpha eta) / beta, and samples would begin
    with an error that is divided by t.
    """
    c = _plain(c)
    size = c.alpha**2 + c.beta**2
    eta = x * column(c.alpha / size, x) - w * column(c.beta / size, x)
    eta1 = x * column(c.beta / size, x) + w * column(c.alpha / size, x)
    b = None
    if not _any(abs(c.alpha_dot) == math.inf):
        b = eta * column(c.alpha_dot, x) + eta1 * column(c.beta_dot, x)
    return Fields(b, score_of_eta(eta, c.alpha), eta, eta, eta1)


def _plain(c: Coefficients) -> Coefficients:
    """Coefficients at one time as floats: arithmetic on tensors of one number costs more than that on a small batch."""
    if not isinstance(c.t, Tensor) or c.t.ndim:
        return c
    return Coefficients(*(float(getattr(c, field.name)) for field in dataclasses.fields(c)))


def _any(condition: bool | Tensor) -> bool:
    return bool(condition.any()) if isinstance(condition, Tensor) else condition


def _where(condition: Any, one: Any, other: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, one, other)
    return one if condition else other


def _nonzero(value: Any) -> Any:
    """A denominator; 1 in place of 0, where the quotient is not used."""
    return _where(value == 0, 1.0, value)


def _quiet(c: Coefficients) -> bool:
    """Whether there is neither noise at these times nor a velocity of it."""
    return not _any((c.gamma != 0) | (c.gamma_gamma_dot != 0))

"""Laws on manifolds whose dimension is known, somewhere in R^D: what estimates of dimension are tried on.

* plane:K:D: K independent standard normal coordinates.
* sphere:K:D: uniform on the K-dimensional unit sphere.
* torus:K:D: K independent points of unit circles, a product.
* strata:D: one of the cubes [-1, 1]^k with k of `STRATA`, with equal probability, each in a subspace of its own; their
  centres are `APART` from 0, in orthogonal directions. Its components are the labels.

Each is carried to R^D by an isometry: the first columns of the orthogonal factor of a normal matrix of NumPy's
generator with seed `SEED`, a function of D alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from osmose.data.laws import Draw
from osmose.errors import UserError

SEED = 20_240
STRATA = (1, 2, 4)
APART = 3.0
#: Values in a point at most: the isometry is a matrix of D x D.
_MOST = 1024


@dataclass(frozen=True, eq=False)
class Manifold:
    """A law on a manifold, or on several.

    Attributes:
        draw: (num_points, generator) -> points (N, D) and labels, if there are several.
        dimension: D.
        intrinsic: dimension of each component.
    """

    draw: Callable[[int, np.random.Generator], Draw]
    dimension: int
    intrinsic: tuple[int, ...]

    @property
    def num_components(self) -> int | None:
        """How many manifolds the labels tell apart; None for one."""
        return len(self.intrinsic) if len(self.intrinsic) > 1 else None


def frame(dimension: int) -> np.ndarray:
    """The isometry's columns, (D, D) orthogonal."""
    normal = np.random.default_rng(SEED).standard_normal((dimension, dimension))
    orthogonal: np.ndarray = np.linalg.qr(normal)[0]
    return orthogonal


def plane(k: int, dimension: int) -> Manifold:
    """plane:K:D."""
    axes = frame(dimension)[:, :k]

    def draw(count: int, rng: np.random.Generator) -> Draw:
        return rng.standard_normal((count, k)) @ axes.T, None

    return Manifold(draw, dimension, (k,))


def sphere(k: int, dimension: int) -> Manifold:
    """sphere:K:D."""
    axes = frame(dimension)[:, : k + 1]

    def draw(count: int, rng: np.random.Generator) -> Draw:
        u = rng.standard_normal((count, k + 1))
        return u / np.linalg.norm(u, axis=1, keepdims=True) @ axes.T, None

    return Manifold(draw, dimension, (k,))


def torus(k: int, dimension: int) -> Manifold:
    """torus:K:D."""
    axes = frame(dimension)[:, : 2 * k]

    def draw(count: int, rng: np.random.Generator) -> Draw:
        angle = rng.uniform(0, 2 * np.pi, (count, k))
        return np.concatenate([np.cos(angle), np.sin(angle)], 1) @ axes.T, None

    return Manifold(draw, dimension, (k,))


def strata(dimension: int) -> Manifold:
    """strata:D."""
    rng = np.random.default_rng(SEED)
    spaces = [np.linalg.qr(rng.standard_normal((dimension, k)))[0] for k in STRATA]
    centres = APART * frame(dimension)[:, : len(STRATA)].T

    def draw(count: int, rng: np.random.Generator) -> Draw:
        component = rng.integers(len(STRATA), size=count)
        points = np.empty((count, dimension))
        for index, (space, centre) in enumerate(zip(spaces, centres, strict=True)):
            here = component == index
            points[here] = centre + rng.uniform(-1, 1, (int(here.sum()), space.shape[1])) @ space.T
        return points, component

    return Manifold(draw, dimension, STRATA)


#: Name: the law of (K, D), and how many of the D values K dimensions need at least.
_CURVED: dict[str, tuple[Callable[[int, int], Manifold], Callable[[int], int]]] = {
    "plane": (plane, lambda k: k),
    "sphere": (sphere, lambda k: k + 1),
    "torus": (torus, lambda k: 2 * k),
}
#: How each is written, by name.
FORMS = {**{name: f"{name}:K:D" for name in _CURVED}, "strata": "strata:D"}


def parse(name: str, arguments: list[str]) -> Manifold:
    """The manifold of a name with the arguments that follow it.

    Raises:
        UserError: arguments that are missing, too many or out of range; the message says what would be right.
    """
    source, wanted = ":".join(["toy", name, *arguments]), FORMS[name].count(":")
    if len(arguments) != wanted:
        example = f"toy:{name}:10" if wanted == 1 else f"toy:{name}:2:10"
        raise UserError(f"{source}: {len(arguments)} numbers given; write toy:{FORMS[name]}, for example {example}")
    for text in arguments:
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= _MOST):
            raise UserError(f"{source}: {text!r} is not valid: should be an integer from 1 to {_MOST}")
    *shape, dimension = map(int, arguments)
    if name == "strata":
        if dimension < max(STRATA):
            raise UserError(f"{source}: D = {dimension} is too small: should be at least {max(STRATA)}")
        return strata(dimension)
    law, least = _CURVED[name]
    if dimension < max(2, least(shape[0])):
        raise UserError(
            f"{source}: {shape[0]} dimensions do not fit into {dimension} values: D should be at least "
            f"{max(2, least(shape[0]))}"
        )
    return law(shape[0], dimension)

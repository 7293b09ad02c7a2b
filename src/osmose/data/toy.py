"""Points from known laws: in the plane, small enough to see, or of any dimension (`data.laws`, `data.manifolds`).

Every law is sampled exactly (no rejection, no training data) and vectorised, in its own units. Its parameters are the
constants of this module, so that an evaluation can compute what is true:

* 8-gaussians: a mixture of `EIGHT_CENTRES` (8, 2), equal weights, each N(centre, `EIGHT_DEVIATION`^2 I).
* checkerboard: uniform on `BLACK_SQUARES` (8, 2), the lower left corners of squares of side `SQUARE_SIDE`;
  `on_black_square` says which points are in the support.
* swiss-roll: t (cos t, sin t) + `ROLL_NOISE` N(0, I), t uniform on `ROLL_ANGLES`.
* two-moons: (cos a, sin a) or (1 - cos a, 1/2 - sin a), with equal probability, + `MOON_NOISE` N(0, I), a uniform on
  [0, pi].
* pinwheel: one of `PINWHEEL_ARMS` arms, equal weights; (1 + 0.3 n1, 0.1 n2) with normal n1, n2, turned by
  2 pi arm / arms + exp(1 + 0.3 n1) / 4, times 2.

Mixture components are the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from osmose.data import manifolds
from osmose.data.assembly import Part, points_dataset
from osmose.data.dataset import DataConfig, Dataset
from osmose.data.laws import FAMILIES, Draw, Law, Mixture, parse
from osmose.errors import UserError, nearest

_EIGHTHS = 2 * math.pi * np.arange(8) / 8
EIGHT_CENTRES = 4.0 * np.stack([np.cos(_EIGHTHS), np.sin(_EIGHTHS)], axis=1)
EIGHT_DEVIATION = 0.5

SQUARE_SIDE = 2.0
BLACK_SQUARES = np.array(
    [(SQUARE_SIDE * (i - 2), SQUARE_SIDE * (j - 2)) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
)

ROLL_ANGLES = (1.5 * math.pi, 4.5 * math.pi)
ROLL_NOISE = 0.5
MOON_NOISE = 0.1
PINWHEEL_ARMS = 5


def checkerboard(num_points: int, rng: np.random.Generator) -> Draw:
    """Uniform on the 8 black squares of a 4 x 4 board over [-4, 4]^2; density 1/32 there."""
    square = rng.integers(len(BLACK_SQUARES), size=num_points)
    return BLACK_SQUARES[square] + SQUARE_SIDE * rng.random((num_points, 2)), square


def on_black_square(points: np.ndarray) -> np.ndarray:
    """Which of the points (N, 2) lie in the support of `checkerboard`: bool, shape (N,)."""
    cell = np.floor(points / SQUARE_SIDE)
    inside = ((cell >= -2) & (cell < 2)).all(axis=1)
    black: np.ndarray = inside & (cell.sum(axis=1) % 2 == 0)
    return black


def swiss_roll(num_points: int, rng: np.random.Generator) -> Draw:
    """A spiral of one and a half turns, blurred."""
    angle = rng.uniform(*ROLL_ANGLES, size=num_points)
    curve = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return curve + ROLL_NOISE * rng.standard_normal((num_points, 2)), None


def two_moons(num_points: int, rng: np.random.Generator) -> Draw:
    """Two interleaved half circles of radius 1, blurred."""
    moon = rng.integers(2, size=num_points)
    angle = rng.uniform(0.0, math.pi, size=num_points)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    curve = np.where(moon[:, None] == 0, upper, np.array([1.0, 0.5]) - upper)
    return curve + MOON_NOISE * rng.standard_normal((num_points, 2)), moon


def pinwheel(num_points: int, rng: np.random.Generator) -> Draw:
    """Five curved arms (Johnson et al. 2016, structured VAEs)."""
    arm = rng.integers(PINWHEEL_ARMS, size=num_points)
    along, across = (np.array([0.3, 0.1]) * rng.standard_normal((num_points, 2))).T
    along = along + 1.0
    turn = 2 * math.pi * arm / PINWHEEL_ARMS + 0.25 * np.exp(along)
    cos, sin = np.cos(turn), np.sin(turn)
    return 2.0 * np.stack([along * cos - across * sin, along * sin + across * cos], axis=1), arm


class PlanarLaw(NamedTuple):
    """How to draw (num_points, generator) -> points and labels, and how many components the labels tell apart."""

    draw: Callable[[int, np.random.Generator], Draw]
    num_components: int | None
    dimension: int = 2


#: The names in `toy:NAME`.
LAWS: dict[str, Law] = {
    "8-gaussians": Mixture(EIGHT_CENTRES, EIGHT_DEVIATION),
    "checkerboard": PlanarLaw(checkerboard, len(BLACK_SQUARES)),
    "swiss-roll": PlanarLaw(swiss_roll, None),
    "two-moons": PlanarLaw(two_moons, 2),
    "pinwheel": PlanarLaw(pinwheel, PINWHEEL_ARMS),
}


def law_of(argument: str) -> Law:
    """The law that is named in `toy:ARGUMENT`: one in the plane (`pinwheel`) or of any dimension (`chain:8:0.1`).

    Raises:
        UserError: no such law; the message names the nearest one. Arguments that the law refuses.
    """
    name, *arguments = argument.split(":")
    if name in FAMILIES:
        return parse(name, arguments)
    if name in manifolds.FORMS:
        return manifolds.parse(name, arguments)
    if name not in LAWS:
        if arguments:
            known = [*FAMILIES, *manifolds.FORMS]
            raise UserError(f"toy:{argument}: no such law with arguments; {nearest(name, known)}")
        forms = ", ".join([*(family.form for family in FAMILIES.values()), *manifolds.FORMS.values()])
        raise UserError(f"toy:{argument}: no such law; {nearest(name, LAWS)}, or of any dimension D: {forms}")
    if arguments:
        raise UserError(f"toy:{argument}: {name!r} is a law in the plane, without arguments; write toy:{name}")
    return LAWS[name]


def load_toy(argument: str, config: DataConfig) -> Dataset:
    """`config.num_points` points (D,) from the law named by `argument`, drawn and split with `config.split_seed`.

    Raises:
        UserError: see `law_of`.
    """
    law = law_of(argument)
    points, labels = law.draw(config.num_points, np.random.default_rng(config.split_seed))
    whole = Part(torch.from_numpy(points).float(), None if labels is None else torch.from_numpy(labels).long())
    names = None if law.num_components is None else [str(component) for component in range(law.num_components)]
    return points_dataset(f"toy:{argument}", config, whole, class_names=names)

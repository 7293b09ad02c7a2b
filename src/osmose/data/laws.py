"""Laws of points in any dimension whose moments, and whose denoisers, are known: what regression is studied on.

Each is an object that holds its parameters, so that an evaluation can compute what is true (`toy.law_of` makes one from
its name; `analysis.noise_error` has their denoisers):

* gaussian:D: N(0, C), C_ij = `CORRELATION`^|i - j|.
* product:D: independent coordinates. Coordinate i is the mixture of row i mod 4 of `PRODUCT_TABLE`, two or three
  univariate Gaussians of deviation `PRODUCT_DEVIATION`.
* chain:D or chain:D:P: x_i = s_i + `CHAIN_DEVIATION` n_i with normal n_i and a Markov chain of signs: s_1 is uniform,
  and s_{i+1} = -s_i with probability P, `FLIP` if none is given. 2^D modes; P = 0.5 makes the coordinates independent.
* mixture:D: `MIXTURE_COMPONENTS` Gaussians N(centre, `MIXTURE_DEVIATION`^2 I) of equal weights. The centres are the
  rows of the first standard normal matrix of NumPy's generator with seed `MIXTURE_SEED`: a function of D alone.

Only the components of mixture:D are labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from osmose.errors import UserError

#: Points (N, D) float64 and component labels (N,), or None for a law without components.
Draw = tuple[np.ndarray, np.ndarray | None]

CORRELATION = 0.8

#: (centre, weight) of each component.
PRODUCT_TABLE = (
    ((-1.5, 0.5), (1.5, 0.5)),
    ((-2.0, 0.25), (0.0, 0.5), (2.0, 0.25)),
    ((-1.0, 0.7), (2.0, 0.3)),
    ((-2.0, 0.2), (-0.5, 0.3), (1.5, 0.5)),
)
PRODUCT_DEVIATION = 0.2

CHAIN_DEVIATION = 0.3
FLIP = 0.2

MIXTURE_COMPONENTS = 8
MIXTURE_DEVIATION = 0.3
MIXTURE_SEED = 20_060

#: Values in a point beyond which covariances D x D are no longer cheap.
_MOST = 4096


class Law(Protocol):
    """What a data set of points is drawn from."""

    @property
    def dimension(self) -> int:
        """D, number of values in a point."""

    @property
    def num_components(self) -> int | None:
        """How many components the labels tell apart; None without labels."""

    def draw(self, num_points: int, rng: np.random.Generator) -> Draw:
        """Exact and independent points, and their labels."""


class LawWithMoments(Law, Protocol):
    """A law whose mean and covariance are known."""

    @property
    def mean(self) -> np.ndarray:
        """Shape (D,), float64."""

    @property
    def covariance(self) -> np.ndarray:
        """Shape (D, D), float64."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, covariance): shapes (D,) and (D, D)."""

    mean: np.ndarray
    covariance: np.ndarray
    num_components: None = None

    @property
    def dimension(self) -> int:
        """D."""
        return len(self.mean)

    def draw(self, num_points: int, rng: np.random.Generator) -> Draw:
        root = np.linalg.cholesky(self.covariance)
        return self.mean + rng.standard_normal((num_points, self.dimension)) @ root.T, None


@dataclass(frozen=True, eq=False)
class Product:
    """Independent coordinates, each a mixture of K univariate Gaussians of one deviation.

    Attributes:
        centres: shape (D, K).
        weights: shape (D, K), rows summing to 1; 0 where a coordinate has fewer components than K.
        deviation: of every component of every coordinate.
    """

    centres: np.ndarray
    weights: np.ndarray
    deviation: float
    num_components: None = None

    @property
    def dimension(self) -> int:
        """D."""
        return len(self.centres)

    @property
    def mean(self) -> np.ndarray:
        """Shape (D,)."""
        mean: np.ndarray = (self.weights * self.centres).sum(1)
        return mean

    @property
    def covariance(self) -> np.ndarray:
        """Shape (D, D), diagonal."""
        return np.diag((self.weights * (self.centres - self.mean[:, None]) ** 2).sum(1) + self.deviation**2)

    def draw(self, num_points: int, rng: np.random.Generator) -> Draw:
        u = rng.random((num_points, self.dimension))
        # Without the last: a sum of weights that misses 1 by a rounding error would lead beyond the components.
        component = (u[:, :, None] >= self.weights.cumsum(1)[:, :-1]).sum(2)
        centres = self.centres[np.arange(self.dimension), component]
        return centres + self.deviation * rng.standard_normal(centres.shape), None


@dataclass(frozen=True, eq=False)
class Chain:
    """A Markov chain of D signs, uniform at first, each the opposite of the one before with probability `flip`.

    Every coordinate is its sign and normal noise of deviation `deviation`.
    """

    dimension: int
    flip: float
    deviation: float
    num_components: None = None

    @property
    def mean(self) -> np.ndarray:
        """Shape (D,), zero."""
        return np.zeros(self.dimension)

    @property
    def covariance(self) -> np.ndarray:
        """Shape (D, D): E s_i s_j = (1 - 2 flip)^|i - j|, and the noise."""
        return _powers(1 - 2 * self.flip, self.dimension) + self.deviation**2 * np.eye(self.dimension)

    def draw(self, num_points: int, rng: np.random.Generator) -> Draw:
        shape = (num_points, self.dimension)
        changes = rng.random(shape) < np.array([0.5] + [self.flip] * (self.dimension - 1))
        signs = np.where(changes, -1.0, 1.0).cumprod(1)
        return signs + self.deviation * rng.standard_normal(shape), None


@dataclass(frozen=True, eq=False)
class Mixture:
    """Components of equal weights around the centres (K, D), isotropic with one deviation; they are the labels."""

    centres: np.ndarray
    deviation: float

    @property
    def dimension(self) -> int:
        """D."""
        return self.centres.shape[1]

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.centres)

    @property
    def mean(self) -> np.ndarray:
        """Shape (D,)."""
        mean: np.ndarray = self.centres.mean(0)
        return mean

    @property
    def covariance(self) -> np.ndarray:
        """Shape (D, D)."""
        centred = self.centres - self.mean
        return centred.T @ centred / len(centred) + self.deviation**2 * np.eye(self.dimension)

    def draw(self, num_points: int, rng: np.random.Generator) -> Draw:
        component = rng.integers(len(self.centres), size=num_points)
        return self.centres[component] + self.deviation * rng.standard_normal((num_points, self.dimension)), component


def _powers(base: float, dimension: int) -> np.ndarray:
    """base^|i - j|, shape (D, D)."""
    index = np.arange(dimension)
    powers: np.ndarray = base ** np.abs(index[:, None] - index)
    return powers


def gaussian(dimension: int) -> Gaussian:
    """gaussian:D: neighbours are correlated."""
    return Gaussian(np.zeros(dimension), _powers(CORRELATION, dimension))


def product(dimension: int) -> Product:
    """product:D: the rows of the table in turn."""
    parameters = np.zeros((dimension, max(map(len, PRODUCT_TABLE)), 2))
    for i in range(dimension):
        row = PRODUCT_TABLE[i % len(PRODUCT_TABLE)]
        parameters[i, : len(row)] = row
    return Product(parameters[:, :, 0], parameters[:, :, 1], PRODUCT_DEVIATION)


def chain(dimension: int, flip: float = FLIP) -> Chain:
    """chain:D:P: the smaller P, the more of the other coordinates is in each."""
    return Chain(dimension, flip, CHAIN_DEVIATION)


def mixture(dimension: int) -> Mixture:
    """mixture:D: a few clusters at random places."""
    rng = np.random.default_rng(MIXTURE_SEED)
    return Mixture(rng.standard_normal((MIXTURE_COMPONENTS, dimension)), MIXTURE_DEVIATION)


class Family(NamedTuple):
    """The law of (D) or (D, number) and how it is written; whether there may be a number after D."""

    law: Callable[..., LawWithMoments]
    form: str
    numbered: bool = False


#: The names in `toy:NAME:D`.
FAMILIES = {
    "chain": Family(chain, "chain:D or chain:D:P", numbered=True),
    "gaussian": Family(gaussian, "gaussian:D"),
    "mixture": Family(mixture, "mixture:D"),
    "product": Family(product, "product:D"),
}


def parse(name: str, arguments: list[str]) -> LawWithMoments:
    """The law of a family with the arguments that follow its name.

    Raises:
        UserError: no dimension, one that is no integer in range, a probability out of range, an argument too many.
    """
    family, source = FAMILIES[name], ":".join(["toy", name, *arguments])
    if not arguments or not arguments[0]:
        raise UserError(f"{source}: the dimension D is missing; write toy:{family.form}, for example toy:{name}:8")
    text, *rest = arguments
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 2 <= int(text) <= _MOST):
        raise UserError(f"{source}: D = {text!r} is not valid: should be an integer from 2 to {_MOST}")
    if len(rest) > int(family.numbered):
        raise UserError(f"{source}: {rest[-1]!r} is one argument too many; write toy:{family.form}")
    return family.law(int(text), *(_probability(source, number) for number in rest))


def _probability(source: str, text: str) -> float:
    try:
        flip = float(text)
    except ValueError:
        flip = float("nan")
    if not 0 < flip <= 0.5:
        raise UserError(f"{source}: P = {text!r} is not valid: should be a number above 0 and at most 0.5")
    return flip

"""The metrics as functions of two sets: (generated, real) to a value and its standard error where that is cheap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from osmose.metrics import distances
from osmose.metrics.matrices import resample, seeded
from osmose.metrics.moments import Moments
from osmose.metrics.neighbours import coverage, nearest_distances

#: Above this many features a bootstrap of the Frechet distance would take minutes, and no error is given.
BOOTSTRAP_DIM = 512
RESAMPLES = 10


class Measured(NamedTuple):
    """A value and its standard error, or None where there is none."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Measure:
    """One metric: how it is computed and which way is better.

    Attributes:
        of: generated set and real set to a value, with its error where that costs nothing more.
        better: which way.
        error: standard error of the value where it has a cost of its own, or None; floors do without.
    """

    of: Callable[[Tensor, Tensor], Measured]
    better: Literal["lower", "higher", "one"]
    error: Callable[[Tensor, Tensor], float | None] | None = None

    def compute(self, x: Tensor, y: Tensor) -> Measured:
        """The value with its standard error."""
        value, error = self.of(x, y)
        return Measured(value, self.error(x, y) if self.error else error)


def _frechet(x: Tensor, y: Tensor) -> Measured:
    return Measured(distances.frechet_distance(Moments.of(x), Moments.of(y)))


def _frechet_error(x: Tensor, y: Tensor) -> float | None:
    # A resample has about 63 % different rows; with too few of them its covariance is singular and its spread wrong.
    if x.shape[1] > BOOTSTRAP_DIM or min(len(x), len(y)) < 2 * x.shape[1]:
        return None
    return distances.frechet_standard_error(x, y, RESAMPLES)


def _kernel(x: Tensor, y: Tensor) -> Measured:
    return Measured(*distances.kernel_distance(x, y)[:2])


def _score(x: Tensor, _y: Tensor) -> Measured:
    return Measured(*distances.inception_score(x)[:2])


def _precision(x: Tensor, y: Tensor) -> Measured:
    return share(coverage(x, y), len(x))


def _recall(x: Tensor, y: Tensor) -> Measured:
    return share(coverage(y, x), len(y))


def share(value: float, n: int) -> Measured:
    """A share of n items with its binomial error; for precision and recall that takes the balls as fixed."""
    return Measured(value, (value * (1 - value) / n) ** 0.5)


def _confidence(x: Tensor, _y: Tensor) -> Measured:
    surest = x.to(torch.float64).max(dim=1).values
    return Measured(float(surest.mean()), float(surest.std() / len(x) ** 0.5))


def _class_tv(x: Tensor, y: Tensor) -> Measured:
    # Predicted classes on both sides, so that what the classifier gets wrong cancels.
    made, real = (p.argmax(dim=1).bincount(minlength=p.shape[1]) for p in (x, y))
    return Measured(distances.total_variation(made, real))


def _projected(x: Tensor) -> Tensor:
    return distances.project(x.to(torch.float64), num_directions=200, seed=0)


def _sliced(x: Tensor, y: Tensor) -> Measured:
    return Measured(distances.wasserstein_of_projections(_projected(x), _projected(y)))


def _sliced_error(x: Tensor, y: Tensor) -> float:
    x, y = _projected(x), _projected(y)
    generator = seeded(0)
    values = [
        distances.wasserstein_of_projections(resample(x, generator), resample(y, generator)) for _ in range(RESAMPLES)
    ]
    return float(torch.tensor(values, dtype=torch.float64).std())


def _energy(x: Tensor, y: Tensor) -> Measured:
    return Measured(*distances.energy_distance(x, y)[:2])


def _mmd(x: Tensor, y: Tensor) -> Measured:
    return Measured(*distances.mmd(x, y)[:2])


#: Of features (n, d).
ON_FEATURES = {
    "fd": Measure(_frechet, "lower", _frechet_error),
    "kid": Measure(_kernel, "lower"),
    "precision": Measure(_precision, "higher"),
    "recall": Measure(_recall, "higher"),
}
#: Of class probabilities (n, classes).
ON_PROBABILITIES = {
    "score": Measure(_score, "higher"),
    "conf": Measure(_confidence, "higher"),
    "class_tv": Measure(_class_tv, "lower"),
}
#: Of the values themselves in model units (n, dimension).
ON_VALUES = {
    "sw2": Measure(_sliced, "lower", _sliced_error),
    "energy": Measure(_energy, "lower"),
    "mmd": Measure(_mmd, "lower"),
    "prec_raw": Measure(_precision, "higher"),
    "rec_raw": Measure(_recall, "higher"),
}


def neighbour_ratio(generated: Tensor, train: Tensor, held_out: Tensor) -> tuple[Measured, float | None]:
    """`nearest_neighbour_ratio` with its bootstrap error, and what it is between two halves of the held-out items.

    Args:
        generated: shape (n, d).
        train: shape (N, d), the whole training part.
        held_out: shape (m, d).

    Raises:
        UserError: bad matrices, or held-out items that are copies of training items.
    """
    made, unseen = nearest_distances(generated, train), nearest_distances(held_out, train)
    value = distances.ratio_of_medians(made, unseen)
    generator = seeded(0)

    def again(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (100, len(values)), generator=generator)].median(dim=1).values

    ratios = again(made) / again(unseen)
    ratios = ratios[ratios.isfinite()]
    error = float(ratios.std()) if len(ratios) > 1 else None
    half = len(unseen) // 2
    floor = float(unseen[:half].median() / unseen[half:].median()) if half else None
    return Measured(value, error), floor if floor is not None and floor < float("inf") else None

"""Filling a list of scores: each measure on the samples and, for its floor, on two disjoint real sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from osmose.errors import UserError
from osmose.metrics.features import FeatureNetwork
from osmose.metrics.matrices import seeded, subset
from osmose.metrics.measures import Measure, Measured
from osmose.metrics.real import Part, RealSets
from osmose.metrics.score import Score


@dataclass(frozen=True)
class Sides:
    """The four sets that a metric needs, all of one kind: generated, reference, and the pair of the floor."""

    x: Tensor
    y: Tensor
    floor_x: Tensor
    floor_y: Tensor

    @classmethod
    def of(cls, made: Tensor, real: Tensor, sets: RealSets) -> Sides:
        """From what belongs to the samples (n, ...) and to all drawn real items (N, ...)."""
        return cls(made, real[sets.reference], real[sets.floor_x], real[sets.floor_y])

    def at_most(self, limit: int, seed: int) -> Sides:
        """Every set cut to `limit` items."""
        # Samples may be sorted by class and are cut at random; the real items are in random order already.
        x = self.x if len(self.x) <= limit else self.x[subset(len(self.x), limit, seeded(seed))]
        return Sides(x, self.y[:limit], self.floor_x[:limit], self.floor_y[:limit])

    def map(self, function: Callable[[Tensor], Tensor]) -> Sides:
        """The same function on every set."""
        return Sides(function(self.x), function(self.y), function(self.floor_x), function(self.floor_y))


class Scorecard:
    """Collects the scores that are wanted.

    Args:
        names: measure to the name it goes by, only the wanted ones.
        reference: part of the real data.
        strict: raise where a measure cannot be computed; otherwise leave it out and say so in every note.
    """

    def __init__(self, names: Mapping[str, str], reference: Part, strict: bool):
        self.names, self.reference, self.strict = names, reference, strict
        self.scores: list[Score] = []
        self.left_out: list[str] = []

    def add(
        self,
        measures: Mapping[str, Measure],
        sides: Sides,
        network: FeatureNetwork | None = None,
        note: str | None = None,
    ) -> None:
        """Every wanted measure on these sets.

        Raises:
            UserError: strict, and a measure refuses its input.
        """
        for key, measure in measures.items():

            def compute(measure: Measure = measure) -> tuple[Measured, float | None]:
                return measure.compute(sides.x, sides.y), _floor(measure, sides)

            self.put(key, compute, measure.better, len(sides.x), len(sides.y), network, note)

    def put(
        self,
        key: str,
        compute: Callable[[], tuple[Measured, float | None]],
        better: Literal["lower", "higher", "one"],
        n: int,
        m: int,
        network: FeatureNetwork | None = None,
        note: str | None = None,
    ) -> None:
        """One measure, if it is wanted; `compute` gives its value with error, and its floor.

        Raises:
            UserError: strict, and the measure refuses its input.
        """
        if key not in self.names:
            return
        try:
            measured, floor = compute()
        except UserError as error:
            if self.strict:
                raise
            self.left_out.append(f"{self.names[key]} is left out: {error}")
            return
        score = Score(
            name=self.names[key],
            value=measured.value,
            standard_error=measured.error,
            floor=floor,
            better=better,
            features=network.name if network else None,
            features_sha256=network.sha256 if network else None,
            n=n,
            m=m,
            reference=self.reference,
            note=note,
        )
        self.scores.append(score)

    def finished(self, notes: list[str]) -> list[Score]:
        """The scores, with `notes` and what was left out added to each, one line per note."""
        common = [*notes, *self.left_out]
        return [
            score.replace(note="\n".join(([score.note] if score.note else []) + common) or None)
            for score in self.scores
        ]


def _floor(measure: Measure, sides: Sides) -> float | None:
    try:
        return measure.of(sides.floor_x, sides.floor_y).value
    except UserError:
        # Halves of a small data set can be too small for the metric where its samples are not.
        return None

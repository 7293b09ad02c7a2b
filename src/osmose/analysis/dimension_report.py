"""Local dimension of a run's data: all estimators on the same points, whether they settle and agree, with pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from osmose.analysis.dimension import Estimates, Problem, by_pixel, choose, estimate
from osmose.data.dataset import Dataset
from osmose.data.manifolds import Manifold
from osmose.data.toy import law_of
from osmose.errors import UserError
from osmose.gaussian.derivatives import probes_for
from osmose.gaussian.draws import seeded
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import OnStep

#: Ratios when none are named: so many between these, as far as the run was trained there.
_COUNT, _QUIET, _LOUD = 9, 0.01, 1.0
#: An estimate has settled where it moves by no more than this, or this share of itself, over this much of log10 r.
_STILL, _STILL_SHARE, _LONG = 0.5, 0.1, 0.45
#: A share of all values from which on a dimension tells nothing apart.
_FULL = 0.9
#: Hutchinson's probes when nothing is said, of items whose traces are not exact.
PROBES = 32
#: Points when nothing is said.
_POINTS = 64


@dataclass(frozen=True)
class Plateau:
    """Where an estimate's mean over the points does not depend on the ratio.

    Attributes:
        value: its mean there.
        low: the ratio where it begins.
        high: where it ends.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Dimension:
    """What the estimators said.

    Attributes:
        ambient: D.
        ratios: (R,).
        estimates: by estimator.
        plateaus: by estimator, None where its mean has none; of those that know a ratio.
        labels: class of each point, or None.
        truth: the known dimension of each point, or None.
        points: data units, (n, *event).
        map: what each value adds to flipd at the ratio of `place`, (n, *event); None without flipd or images.
        conditions: part, n, probes, seed: what the numbers hold for.
    """

    ambient: int
    ratios: Tensor
    estimates: dict[str, Estimates]
    plateaus: dict[str, Plateau | None]
    labels: Tensor | None
    truth: Tensor | None
    points: Tensor
    map: Tensor | None
    conditions: dict[str, Any]

    def verdict(self) -> str:
        """Whether the estimators agree, in a sentence."""
        if math.log10(float(self.ratios.max() / self.ratios.min())) < _LONG:
            where = "at one scale" if len(self.ratios) == 1 else f"over less than {_LONG} of a decade"
            told = ", ".join(f"{name} {float(found.values.mean()):.2f}" for name, found in self.estimates.items())
            return f"{where} there is nothing to say of settling: {told} of {self.ambient}"
        known = {name: round(found.value) for name, found in self.plateaus.items() if found is not None}
        known |= {
            name: round(float(found.values.mean())) for name, found in self.estimates.items() if not found.by_ratio
        }
        loose = [name for name, found in self.plateaus.items() if found is None]
        said = f"; {', '.join(loose)} {'does' if len(loose) == 1 else 'do'} not settle at any scale" if loose else ""
        if not known:
            return (
                "no estimate settles: of how many dimensions the data are depends on the scale. Of images that is the "
                "rule, and the curve is the answer; of points more training is the first thing to try"
            )
        full = [name for name, found in self.plateaus.items() if found is not None and self.fills(found)]
        if 0 < len(full) < len(known):  # what says that nothing is missing tells less than what finds something
            said = f"; {', '.join(full)}: all {self.ambient}, of noise below what data or network resolve{said}"
            known = {name: value for name, value in known.items() if name not in full}
        low, high = min(known.values()), max(known.values())
        if low == high and len(known) > 1:
            return f"the estimates agree on {low} of {self.ambient}{said}"
        listed = ", ".join(f"{name} {value}" for name, value in known.items())
        if len(known) == 1:
            return f"one estimate settles, {listed} of {self.ambient}{said}"
        return f"the estimates disagree, from {low} to {high} of {self.ambient}: {listed}{said}"

    def fills(self, settled: Plateau) -> bool:
        """Whether an estimate settles at next to all values: no direction is told from the others there."""
        return settled.value >= _FULL * self.ambient

    @property
    def place(self) -> int:
        """Which ratio is shown of flipd: the middle of its plateau, or where it is nearest to half of all values."""
        settled = self.plateaus.get("flipd")
        if settled is None or self.fills(settled):
            return int((self.estimates["flipd"].values.mean(0) - self.ambient / 2).abs().argmin())
        return int((self.ratios.log() - math.log(settled.low * settled.high) / 2).abs().argmin())

    def to_json(self) -> dict[str, Any]:
        """Plain values; of each estimator the mean and spread over the points for each ratio."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        def curve(name: str, found: Estimates) -> dict[str, Any]:
            values = found.values
            spread = values.std(0) if len(values) > 1 else torch.zeros(values.shape[1])
            said: dict[str, Any] = {
                "mean": [number(v) for v in values.mean(0).tolist()],
                "std": [number(v) for v in spread.tolist()],
            }
            if name in self.plateaus:
                plateau = self.plateaus[name]
                said["plateau"] = None if plateau is None else {**vars(plateau)}
            if self.truth is not None:
                off = (values - self.truth[:, None]).abs().mean(0)
                said["error"] = [number(v) for v in off.tolist()]
            return said

        return {
            "ambient": self.ambient,
            **self.conditions,
            "ratios": self.ratios.tolist(),
            "truth": None if self.truth is None else float(self.truth.mean()),
            "estimates": {name: curve(name, found) for name, found in self.estimates.items()},
            "verdict": self.verdict(),
        }


def dimension(
    model: GenerativeModel,
    dataset: Dataset,
    *,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    part: str = "held-out",
    n: int | None = None,
    ratios: Sequence[float] | None = None,
    estimators: Sequence[str] | None = None,
    probes: int | Literal["exact"] | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Dimension:
    """Estimate local dimension at items of the data, or at given points.

    Args:
        model: a model with a score field.
        dataset: the data it was trained on.
        points: data units, (n, *event), in place of items of the data.
        labels: their classes, which a conditional model needs.
        part: "held-out" or "train": where the points come from.
        n: how many, at random; 64, or all of fewer, if None.
        ratios: noise-to-signal ratios, rising; nine from 0.01 to 1 if None, as far as the run was trained there.
        estimators: see `analysis.dimension`; if None, those that the size of the data allows.
        probes: Hutchinson's, or "exact"; None is exact traces up to 64 values an item, and 32 probes beyond.
        seed: of points, probes and noise.
        on_step: called with the parts done and all of them.

    Raises:
        UserError: a model without a field, points of another form, ratios that it was not trained at, an estimator
            that such data cannot afford.
    """
    field = model.score_field()
    spec, truth = model.spec, None
    given = points is not None
    if n is not None and n < 1:
        raise UserError(f"n: {n} is not valid: must be at least 1")
    if points is None:
        if part not in ("train", "held-out"):
            raise UserError(f"part: {part!r} is not valid: should be train or held-out")
        items, classes = dataset.part(part)
        if n is not None and n > len(items):
            raise UserError(f"n: {n} is more than the {len(items)} {part} items")
        rows = torch.randperm(len(items), generator=seeded(seed, "dimension"))[: n or _POINTS]
        points, labels = items[rows], None if classes is None else classes[rows]
        truth = _truth(dataset, labels, len(points))
    elif tuple(points.shape[1:]) != spec.shape:
        raise UserError(f"points: have shape {tuple(points.shape[1:])}, and this run's data {spec.shape}")
    if model.config.conditional:
        if labels is None:
            raise UserError("labels: the run is told the class of each item; give those of the points (--label)")
        field = field.given(labels.to(model.device))
    names = choose(estimators, spec.dimension, model.config.conditional)
    chosen = field.ratios(_COUNT, _QUIET, _LOUD) if ratios is None else field.known(ratios)
    counted = probes_for(probes, spec.dimension, PROBES)
    problem = Problem(
        field,
        spec.encode(points.to(model.device)),
        spec.encode(dataset.train.to(model.device)),
        chosen,
        counted,
        seed,
    )
    training = model.training
    model.eval()
    found: dict[str, Estimates] = {}
    try:
        for index, name in enumerate(names):

            def report(done: int, of: int, index: int = index) -> None:
                if on_step is not None:
                    on_step(round(1000 * (index + done / of)), 1000 * len(names))

            found[name] = estimate(name, problem, report)
        plateaus = {
            name: plateau(chosen, estimates.values.mean(0)) for name, estimates in found.items() if estimates.by_ratio
        }
    finally:
        model.train(training)
    result = Dimension(
        ambient=spec.dimension,
        ratios=chosen,
        estimates=found,
        plateaus=plateaus,
        labels=labels,
        truth=truth,
        points=points.cpu(),
        map=None,
        conditions={
            "part": "given" if given else part,
            "n": len(points),
            "probes": counted,
            "lowest": field.lowest,
            "highest": field.highest,
            "seed": seed,
        },
    )
    if "flipd" in found and spec.kind == "image":
        result = replace(result, map=by_pixel(problem, float(chosen[result.place])))
    return result


def plateau(ratios: Tensor, means: Tensor) -> Plateau | None:
    """The longest stretch of neighbouring ratios over which a mean stays where it is; None if all are short.

    Of stretches alike in length, that of the smallest noise.
    """
    best: Plateau | None = None
    places, values = ratios.log10().tolist(), means.tolist()
    for first in range(len(values)):
        for last in range(first + 1, len(values)):
            part = values[first : last + 1]
            middle = sum(part) / len(part)
            if not all(map(math.isfinite, part)) or max(part) - min(part) > max(_STILL, _STILL_SHARE * abs(middle)):
                break
            length = places[last] - places[first]
            longest = _LONG if best is None else math.log10(best.high / best.low) + 1e-9
            if length >= longest:
                best = Plateau(middle, float(ratios[first]), float(ratios[last]))
    return best


def _truth(dataset: Dataset, labels: Tensor | None, count: int) -> Tensor | None:
    name = dataset.source.removeprefix("toy:")
    law = law_of(name) if name != dataset.source else None
    if not isinstance(law, Manifold):
        return None
    intrinsic = torch.tensor(law.intrinsic, dtype=torch.float64)
    return intrinsic.expand(count) if labels is None else intrinsic[labels.cpu()]

r"""Is a run's field the gradient of anything, and does it matter?

With the score s of `gaussian.score` at noisy items, y = x0 + r eps, and J = ds / dy:

asymmetry   A = E|J - J^T|^2 / (4 E|J|^2), in Frobenius norms: 0 of a gradient, 1 of a rotation. It is local: a small A
            does not mean that little is missing to a gradient, nor a large one that much is.
remainder   of the split into the gradient part of s under p_r and a gauge field (`analysis.helmholtz`): E|s - grad
            phi|^2 / E|s|^2, an upper bound of the gauge field's share, beside what a free network leaves, which is
            error of fitting alone.
residual    a gauge field g has E_p[g . grad f] = 0 for every f, which is div(p g) = 0 tested: the root mean square over
            random waves f, in units of what unrelated fields of these sizes would have by chance.

Where the data's law is known (`toy:8-gaussians`, `toy:gaussian:D`, ...), the error e = s - s* of the field is told
apart too: what changes samples, |grad phi - s*|^2, and the residual of the gauge condition div e + e . s* = 0 itself,
in units of what a field of that size without any structure would have, ((E|e|^2 |s*|^2 + E|de/dy|^2) / D)^(1/2): 0 of
a pure gauge field, of the order of 1 of any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from osmose.analysis.helmholtz import Split, split
from osmose.analysis.noise_error import oracle_of
from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.gaussian.derivatives import EXACT, jacobian, probes_for, products, signs_like
from osmose.gaussian.draws import seeded
from osmose.gaussian.schedule import VarianceExploding
from osmose.gaussian.score import ScoreField, score_field
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import OnStep
from osmose.training import files

#: Ratios when none are named: so many between these, as far as the run was trained there.
_COUNT, _QUIET, _LOUD = 7, 0.05, 10.0
#: Items when nothing is said.
_POINTS = 64
#: Hutchinson's probes of large items when nothing is said.
PROBES = 16
#: Random waves of the residual.
_WAVES = 64
#: Noisy items at which the split is measured, for each that Jacobians are taken at.
_MORE = 8


@dataclass(frozen=True)
class Conservativity:
    """What was measured at each of R ratios; lists have R entries, or are None where it was not.

    Attributes:
        ratios: noise-to-signal ratios.
        antisymmetric: E|J - J^T|^2 of the score's Jacobian.
        size: E|J|^2.
        asymmetry: A, of the score.
        denoiser: A of the denoiser's Jacobian, whose zeros off the data are not counted as symmetric.
        remainder: share of E|s|^2 that the gradient part leaves.
        floor: that a free network leaves.
        overlap: cosine of the angle between gradient part and remainder: 0 at the best gradient.
        residual: of the remainder, in units of chance.
        error: E|s - s*|^2 / E|s*|^2, of a known law.
        harmful: E|grad phi - s*|^2 / E|s*|^2.
        condition: residual of the gauge condition of s - s*.
        conditions: n, probes, steps, seed: what the numbers hold for.
    """

    ratios: list[float]
    antisymmetric: list[float]
    size: list[float]
    asymmetry: list[float]
    denoiser: list[float]
    remainder: list[float] | None
    floor: list[float] | None
    overlap: list[float] | None
    residual: list[float] | None
    error: list[float] | None
    harmful: list[float] | None
    condition: list[float] | None
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {name: value for name, value in vars(self).items() if name != "conditions"}
        return {**self.conditions, **values, "reading": self.reading()}

    def reading(self) -> list[str]:
        """What it says, in sentences."""
        most = max(self.asymmetry)
        where = self.ratios[self.asymmetry.index(most)]
        lines = [
            "the score's Jacobian is symmetric to rounding: a gradient"
            if most < 1e-9
            else f"at most {most:.2g} of the score's Jacobian is antisymmetric (at sigma / alpha = {where:.2g})"
        ]
        if self.conditions["dimension"] == 1:
            return [*lines, "of one value every field is a gradient: there is nothing to measure"]
        if self.remainder is not None and self.floor is not None:
            over = [max(0.0, a - b) for a, b in zip(self.remainder, self.floor, strict=True)]
            worst = over.index(max(over))
            lines.append(
                f"a gradient leaves {self.remainder[worst]:.2g} of the field's square at sigma / alpha = "
                f"{self.ratios[worst]:.2g}, a free network {self.floor[worst]:.2g}: "
                + (
                    "all of it may be error of fitting, of which --steps leaves less"
                    if self.remainder[worst] <= 2 * self.floor[worst]
                    else "the field has a part that is no gradient, which changes no sample where it is a gauge field"
                )
            )
        if self.error is not None and self.condition is not None:
            worst = self.error.index(max(self.error))
            lines.append(
                f"against the exact score the field is off by {self.error[worst]:.2g} of its square at sigma / alpha = "
                f"{self.ratios[worst]:.2g}; residual of the gauge condition {self.condition[worst]:.2g} (0: a gauge "
                "field, harmless; 1: an error like any other)"
            )
        return lines


def conservativity(
    model: GenerativeModel,
    dataset: Dataset,
    *,
    n: int | None = None,
    ratios: Sequence[float] | None = None,
    probes: int | Literal["exact"] | None = None,
    steps: int = 1000,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Conservativity:
    """Measure how far a run's field is from a gradient, at noisy held-out items.

    Args:
        model: a model with a score field.
        dataset: the data it was trained on.
        n: items that Jacobians are taken at, at random; 64, or all of fewer, if None.
        ratios: noise-to-signal ratios; seven from 0.05 to 10 if None, as far as the run was trained there.
        probes: Hutchinson's, or "exact"; None is exact Jacobians up to 64 values an item, and 16 probes beyond.
        steps: of teaching each network of the split; 0 leaves it out.
        seed: of items, noise, probes and the split.
        on_step: called with the parts done and all of them.

    Raises:
        UserError: a model without a field, ratios that it was not trained at, a number that is not valid.
    """
    field = model.score_field()
    for name, value, least in (("n", n, 1), ("steps", steps, 0)):
        if value is not None and value < least:
            raise UserError(f"{name}: {value} is not valid: must be at least {least}")
    found = field.ratios(_COUNT, _QUIET, _LOUD) if ratios is None else field.known(ratios)
    chosen = found.tolist()
    if steps and len(chosen) < 2:
        raise UserError("ratios: the split is learned between the smallest and the largest: give 2, or --steps 0")
    counted = probes_for(probes, model.spec.dimension, PROBES)
    training = model.training
    model.eval()
    try:
        return _Measurement(model, field, dataset, chosen, n, counted, steps, seed, on_step).run()
    finally:
        model.train(training)


class _Measurement:
    def __init__(
        self,
        model: GenerativeModel,
        field: ScoreField,
        dataset: Dataset,
        ratios: list[float],
        n: int | None,
        probes: int | None,
        steps: int,
        seed: int,
        on_step: OnStep | None,
    ):
        self.model, self.dataset, self.ratios = model, dataset, ratios
        self.probes, self.steps, self.seed = probes, steps, seed
        items, labels = dataset.part("held-out")
        if n is not None and n > len(items):
            raise UserError(f"n: {n} is more than the {len(items)} held-out items")
        n = min(_POINTS, len(items)) if n is None else n
        rows = torch.randperm(len(items), generator=seeded(seed, "conservativity"))
        few, many = rows[:n], rows[: n * _MORE]
        told = model.config.conditional and labels is not None
        self.items, self.more = (model.spec.encode(items[part].to(model.device)) for part in (few, many))
        classes = [labels[part].to(model.device) if told and labels is not None else None for part in (few, many)]
        self.classes, self.more_classes = classes
        self.field = field
        self.on_step, self.done, self.of = on_step, 0, 1000 * (len(ratios) + (4 if steps else 0))

    def _report(self, amount: int) -> None:
        self.done += amount
        if self.on_step is not None:
            self.on_step(min(self.done, self.of), self.of)

    def run(self) -> Conservativity:
        parts = self._split() if self.steps else None
        exact = self._exact()
        columns: dict[str, list[float]] = {}
        for index, ratio in enumerate(self.ratios):
            row = self._asymmetry(index, ratio)
            if parts is not None:
                row |= self._remainder(index, ratio, parts, exact)
            if exact is not None:
                row |= self._against(index, ratio, exact)
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
            self._report(1000)
        names = ("remainder", "floor", "overlap", "residual", "error", "harmful", "condition")
        return Conservativity(
            ratios=self.ratios,
            antisymmetric=columns["antisymmetric"],
            size=columns["size"],
            asymmetry=columns["asymmetry"],
            denoiser=columns["denoiser"],
            **{name: columns.get(name) for name in names},
            conditions={
                "method": self.model.config.kind,
                "dimension": self.model.spec.dimension,
                "n": len(self.items),
                "probes": self.probes,
                "steps": self.steps,
                "seed": self.seed,
            },
        )

    def _noisy(self, index: int, ratio: float, items: Tensor, name: str) -> Tensor:
        generator = seeded(self.seed, "conservativity", name, index)
        return items + ratio * torch.randn(items.shape, generator=generator, dtype=items.dtype).to(items)

    def _asymmetry(self, index: int, ratio: float) -> dict[str, float]:
        y, field = self._noisy(index, ratio, self.items, "points"), self.field.given(self.classes)

        if self.probes is None:
            _, whole = jacobian(field.at(ratio), y)
            whole = whole.cpu().double()
            odd = (whole - whole.mT).square().sum((1, 2))
            score = (whole - torch.eye(whole.shape[1], dtype=torch.float64)).square().sum((1, 2))
            own = whole.square().sum((1, 2))
        else:
            odd = score = own = torch.zeros(len(y), dtype=torch.float64)
            for v in signs_like(y, self.probes, seeded(self.seed, "conservativity", "signs", index)):
                pushed, pulled = products(field.at(ratio), y, v)
                sizes = [_squares(value) / self.probes for value in (pushed - pulled, pushed - v, pushed)]
                odd, score, own = (total + size for total, size in zip((odd, score, own), sizes, strict=True))
        antisymmetric, size, whole_size = (float(value.mean()) for value in (odd, score, own))
        return {
            "antisymmetric": antisymmetric / ratio**4,
            "size": size / ratio**4,
            "asymmetry": antisymmetric / (4 * size),
            "denoiser": antisymmetric / (4 * whole_size) if whole_size else 0.0,
        }

    def _split(self) -> Split:
        spec, told = self.model.spec, self.classes is not None
        labels = self.dataset.train_labels
        return split(
            self.field,
            spec.encode(self.dataset.train.to(self.model.device)),
            labels.to(self.model.device) if told and labels is not None else None,
            spec.num_classes if told else None,
            (self.ratios[0], self.ratios[-1]),
            steps=self.steps,
            seed=self.seed,
            on_step=lambda done, of: self._report(round(4000 * done / of) - round(4000 * (done - 1) / of)),
        )

    def _exact(self) -> ScoreField | None:
        """Of the data's law, where it is known and small enough for whole Jacobians, and the model told no classes."""
        if self.model.spec.dimension > EXACT or self.model.config.conditional:
            return None
        try:
            return score_field(
                oracle_of(self.dataset), VarianceExploding(sigma_min=self.ratios[0] / 2, sigma_max=self.ratios[-1] * 2)
            )
        except UserError:
            return None

    def _remainder(self, index: int, ratio: float, parts: Split, exact: ScoreField | None) -> dict[str, float]:
        y = self._noisy(index, ratio, self.more, "split")
        with torch.no_grad():
            own, gradient, free = (
                field.given(self.more_classes).score(y, ratio).flatten(1).cpu().double()
                for field in (self.field, parts.gradient, parts.free)
            )
        rest, size = own - gradient, _squares(own).mean()
        both = (_squares(gradient).mean() * _squares(rest).mean()).sqrt()
        row = {
            "remainder": float(_squares(rest).mean() / size),
            "floor": float(_squares(own - free).mean() / size),
            "overlap": float((gradient * rest).sum(1).mean() / both) if float(both) else 0.0,
            "residual": weak_residual(y.flatten(1).cpu().double(), rest, seeded(self.seed, "waves", index)),
        }
        if exact is not None:
            true = exact.score(y.cpu().double(), ratio).flatten(1)
            row["harmful"] = float(_squares(gradient - true).mean() / _squares(true).mean())
        return row

    def _against(self, index: int, ratio: float, exact: ScoreField) -> dict[str, float]:
        y, field = self._noisy(index, ratio, self.items, "law"), self.field.given(self.classes)
        score, slope = jacobian(lambda y: field.score(y, ratio), y)
        true, expected = jacobian(lambda y: exact.score(y, ratio), y.cpu().double())
        off, change = score.cpu().double() - true, slope.cpu().double() - expected
        return {
            "error": float(_squares(off).mean() / _squares(true).mean()),
            "condition": gauge_residual(off.flatten(1), change, true.flatten(1)),
        }


def gauge_residual(field: Tensor, slope: Tensor, score: Tensor) -> float:
    """Root mean square of div g + g . s, in units of what a field of that size without any structure would have.

    Args:
        field: g, float64 (n, D).
        slope: its Jacobians, (n, D, D).
        score: s of the law, (n, D).
    """
    left = slope.diagonal(dim1=1, dim2=2).sum(1) + (field * score).sum(1)
    chance = (_squares(field) * _squares(score) + _squares(slope)).mean() / field.shape[1]
    return float((left.square().mean() / chance.clamp(min=1e-300)).sqrt())


def weak_residual(y: Tensor, field: Tensor, generator: torch.Generator) -> float:
    """How far E[g . grad f] is from 0 over waves f = cos(w . y + b): root mean square, 1 for no more than chance.

    Args:
        y: points of the law, float64 (n, D).
        field: g there, (n, D).
        generator: of the waves, whose lengths are of the order of the points' spread.
    """
    spread = y.std(0).mean().clamp(min=1e-12)
    waves = torch.randn(_WAVES, y.shape[1], generator=generator, dtype=torch.float64) / (spread * math.sqrt(y.shape[1]))
    phase = 2 * math.pi * torch.rand(_WAVES, generator=generator, dtype=torch.float64)
    along = -(y @ waves.T + phase).sin() * (field @ waves.T)  # g . grad f
    chance = along.std(0) / math.sqrt(len(y))
    return float((along.mean(0) / chance.clamp(min=1e-300)).square().mean().sqrt())


def _squares(values: Tensor) -> Tensor:
    return values.cpu().double().flatten(1).square().sum(1)


def write_conservativity(result: Conservativity, folder: Path) -> list[Path]:
    """Write conservativity.json and conservativity.png."""
    from matplotlib.figure import Figure

    count = 1 + (result.remainder is not None) + (result.error is not None)
    figure = Figure(figsize=(5.4 * count, 4.2), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    panels: list[tuple[str, list[tuple[str, list[float] | None]]]] = [
        ("antisymmetric share of the Jacobian", [("score", result.asymmetry), ("denoiser", result.denoiser)])
    ]
    if result.remainder is not None:
        lines = [("a gradient leaves", result.remainder), ("a free network leaves", result.floor)]
        panels.append(("share of the score's square", lines))
    if result.error is not None:
        lines = [("score: off, share of the exact square", result.error), ("its gradient part: off", result.harmful)]
        panels.append(("against the exact score", [*lines, ("residual of the gauge condition", result.condition)]))
    for panel, (title, lines) in zip(axes, panels, strict=True):
        for label, values in lines:
            if values is not None:
                panel.plot(result.ratios, values, "o-", markersize=3, linewidth=1.2, label=label)
        panel.set(xscale="log", yscale="log", xlabel="sigma / alpha", title=title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    paths = [folder / "conservativity.json", folder / "conservativity.png"]
    files.write_json(paths[0], result.to_json())
    files.write_figure(paths[1], figure)
    return paths

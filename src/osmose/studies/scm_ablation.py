"""`osmose study scm-ablation`: which of the things that are said to stabilise consistency models matter here?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from osmose.metrics.evaluate import score_samples
from osmose.studies.few_step import LOW, told_slowly
from osmose.studies.few_steps import FewSteps
from osmose.studies.plots import panels
from osmose.studies.study import Cell, Claim, Results, Row, Trained
from osmose.studies.verdicts import Finding, lower

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is changed of sCD as it is by default, and what is said of it.
_CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "scd": ({}, "normalised tangent, adaptive weight, warm-up over a fifth"),
    "clip": ({"tangent": "clip"}, "tangent clipped to [-1, 1]"),
    "raw": ({"tangent": "none"}, "tangent as it is"),
    "no-weight": ({"adaptive_weight": False}, "every t has weight 1"),
    "no-warmup": ({"warmup": 0}, "no warm-up"),
    "raw-bare": ({"tangent": "none", "adaptive_weight": False, "warmup": 0}, "none of the three"),
    "rms": ({"norm": "rms"}, "normalised by the RMS instead of the L2 norm"),
    "finite-diff": ({"jvp": "finite-diff"}, "derivative from a central difference"),
}
#: Of these, the ones that other data than the digits are used for.
_SOME = {
    "checkerboard": ("scd", "clip", "raw", "no-weight", "no-warmup", "raw-bare"),
    "fashion-mnist": ("scd", "raw-bare"),
}


class SCMAblation(FewSteps):
    """sCD with one thing changed at a time, from one teacher, with the same number of updates.

    The teacher is that of the study `few-step`: TrigFlow, v-prediction, time in low frequencies (0.02 a unit of a label
    of 1000), time added in each block. `double-norm` has adaptive double normalisation instead, in teacher and student.
    `ddpm` has a teacher whose time embedding has DDPM's frequencies, and so has the student; `lowered` is a student of
    that teacher with low frequencies and all other weights of the teacher, which is what `osmose distill scd` does by
    itself. `segments-2` and `segments-4` lead to the ends of so many segments. `sct` and `sct-cold` learn from the
    data, with the teacher's weights to begin with, and without.

    A seed has `diverged` if its one-step score is worse than that of the teacher's own single step. Gradients are
    clipped at norm 1 throughout, which keeps what diverges finite.
    """

    title = "What stabilises a consistency model in continuous time?"
    source = "sCM (arXiv 2410.11081): ablations on CIFAR-10 and ImageNet-64, in figures alone"
    full: ClassVar[int] = 64
    shown: ClassVar[tuple[str, ...]] = ("diverged",)

    def budgets(self) -> dict[str, int]:
        """Updates of each data set's students."""
        return {"checkerboard": 30} if self.quick else {"checkerboard": 600, "digits": 800, "fashion-mnist": 80}

    def network(self, data: str) -> dict[str, Any]:
        return told_slowly(super().network(data))

    def changes(self, data: str) -> dict[str, tuple[dict[str, Any], str]]:
        """What is changed on a data set."""
        if self.quick:
            return {name: _CHANGES[name] for name in ("scd", "raw-bare")}
        return {name: _CHANGES[name] for name in _CHANGES if data == "digits" or name in _SOME[data]}

    def cells(self) -> list[Cell]:
        cells = []
        for data, steps in self.budgets().items():
            cells.append(self.teacher(data, (1, 2, self.full)))
            for name, (changes, note) in self.changes(data).items():
                cells.append(self.student(data, name, "scd", changes | {"steps": steps}, (1, 2), note))
            if data == "digits":
                cells += self._more(data, steps)
        return cells

    def _more(self, data: str, steps: int) -> list[Cell]:
        """What only one data set is used for."""
        cells = self._embedded(data, "double-norm", {"network.modulation": "double-norm"}, steps)
        cells += self._embedded(data, "ddpm", {"network.time_frequency": 1.0}, steps)
        note = "low frequencies in the student alone"
        cells.append(self.student(data, "lowered", "scd", {"steps": steps, **LOW}, (1, 2), note, "teacher-ddpm"))
        for count in (2, 4):
            said: dict[str, Any] = {"steps": steps, "segments": count}
            cells.append(self.student(data, f"segments-{count}", "scd", said, (count,), f"{count} segments"))
        cells.append(self.student(data, "sct", "sct", {"steps": steps}, (1, 2), "from data, warm"))
        alike = {"schedule": "trig", "parametrization": "v", "network.modulation": "add"} | self.network(data)
        alike |= {"training.steps": steps, "training.lr": 1e-3}
        return [*cells, self._cell(data, "sct-cold", "sct", alike, (1, 2), "from data, cold")]

    def _embedded(self, data: str, name: str, changes: dict[str, Any], steps: int) -> list[Cell]:
        """A teacher whose network is told the time in another way, and a student with the same network."""
        teacher = self.teacher(data, (1, 2, self.full))
        own = {**teacher.changes, **changes}
        teacher = replace(teacher, name=f"{data}-teacher-{name}", changes=own, note=f"teacher, {name}")
        kept = {n: value for n, value in changes.items() if n == "network.time_frequency"}
        student = self.student(data, name, "scd", kept | {"steps": steps}, (1, 2), name, f"teacher-{name}")
        return [teacher, student]

    def measure(self, trained: Trained) -> list[Row]:
        rows = super().measure(trained)
        if not trained.cell.uses:
            return rows
        settings, teacher = trained.cell.settings, trained.of(trained.cell.uses[-1]).model(trained.device)
        alone = teacher.sample(settings["n"], seed=trained.seed, num_steps=1, solver="ddim").data
        (score,) = score_samples(alone, trained.dataset, seed=trained.seed, metrics=[settings["metric"]])
        known = score.value * (1000.0 if score.name == "energy" else 1.0)
        return [Row(row.labels, {**row.values, "diverged": float(row.values["score"] > known)}) for row in rows]

    def claims(self) -> list[Claim]:
        claims = []

        def beats(data: str, words: str, a: str, b: str, steps: int = 1) -> None:
            text = f"{data}, {steps} step{'s' if steps > 1 else ''}: {words}"
            claims.append(Claim.lower(text, f"{data}-{a}", f"{data}-{b}", "score", steps=steps))

        for data in self.budgets():
            for name in self.changes(data):
                if name != "scd":
                    beats(data, f"sCD as it is beats {name}", "scd", name)
            if data == "digits":
                beats(data, "sCD with low frequencies beats DDPM's", "scd", "ddpm")
                beats(data, "low frequencies in the student alone rescue a teacher with DDPM's", "lowered", "ddpm")
                claims.append(_no_loss(data, self.full))
                beats(data, "adaptive double normalisation beats adding the time", "double-norm", "scd")
                beats(data, "the teacher's weights are a better beginning for sCT than none", "sct", "sct-cold")
                beats(data, "two segments beat noising again", "segments-2", "scd", 2)
        return claims

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(len(self.budgets()))
        for panel, data in zip(axes, self.budgets(), strict=True):
            cells = [cell for cell in results.rows if cell.startswith(data) and "teacher" not in cell]
            for place, cell in enumerate(cells):
                for labels, values in results.groups(cell):
                    colour = {1: "C0", 2: "C1", 4: "C2"}[int(labels["steps"])]
                    panel.plot(values["score"], [place] * len(values["score"]), ".", color=colour, alpha=0.6)
                    panel.plot(values["score"].mean(), place, "D", color=colour, markersize=5)
            panel.set_yticks(range(len(cells)), [cell.removeprefix(f"{data}-") for cell in cells], fontsize=7)
            panel.set(xlabel="score (lower is better)", title=data)
            if data == "digits":
                panel.set_xscale("log")
            panel.invert_yaxis()
        for count, colour in ((1, "C0"), (2, "C1"), (4, "C2")):
            axes[-1].plot([], [], "D", color=colour, label=f"{count} step{'s' if count > 1 else ''}")
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return {"score-of-changes": figure}


def _no_loss(data: str, full: int) -> Claim:
    low, high = f"{data}-teacher", f"{data}-teacher-ddpm"

    def check(results: Results) -> Finding:
        a, b = (results.values(cell, "score", steps=full) for cell in (low, high))
        return lower(a, b + 0.1 * np.abs(b))

    return Claim(f"{data}: low frequencies cost the teacher less than 10 %", [low, high], check)

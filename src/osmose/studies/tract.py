"""`osmose study tract`: two phases of any length, or ten halvings?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.studies.few_steps import FewSteps
from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results
from osmose.studies.verdicts import Finding, lower

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEITHER = {"ema_residual": 0.0, "training.decay": "none"}
DECAY = _NEITHER | {"training.decay": "linear"}
AVERAGE = _NEITHER | {"ema_residual": 1e-3}
#: Four ways of training a phase: `decay` is progressive distillation's, `average` TRACT's.
WAYS: dict[str, dict[str, Any]] = {
    "neither": _NEITHER,
    "decay": DECAY,
    "average": AVERAGE,
    "both": AVERAGE | {"training.decay": "linear"},
}
FEW = (1, 2, 4, 8)


class Tract(FewSteps):
    """One teacher, distilled to one step by halving (btd) and by TRACT in two phases and in one, at equal updates.

    The teacher is a v-prediction diffusion on the cosine schedule whose angle is linear in t, 1024 DDIM steps. Every
    student takes the same number of optimiser updates in all, on batches of the same size, shared equally by its
    phases, and begins each phase with its teacher's weights. What differs is named: `decay` lets the learning rate fall
    to 0 in each phase and keeps no average of the weights, as progressive distillation does; `average` keeps the rate
    constant and samples from the average with residual 0.001, as TRACT does; `both` and `neither` complete the table,
    so that phases, decay and averaging are read off separately. All else is equal: Adam, 1e-3 after a warm-up over a
    twentieth of the phase, gradients clipped at norm 1, weight max(SNR, 1), mu_S = 0.5, float32. An update of btd
    evaluates the teacher twice, one of TRACT the teacher and the self-teacher once each.

    Students of 2, 4, 8 steps are on btd's way to one step, where it has used 0.9, 0.8, 0.7 of its updates; TRACT's are
    distilled from its student of 32 steps (half of the updates) with as many updates as make the same sum, one student
    each; training seconds include both.

    `64-` begins with 64 steps of the same teacher instead of 1024: btd in six phases, TRACT by way of 8.

    `edm` is an EDM teacher of the same network in 40 steps of Heun; its students go to 1 in one phase, and in two by
    way of 8. They differ from the others in schedule, parametrization, loss weights (EDM's own), in that estimates are
    not clipped to the data's range, and in the Heun phase by one more evaluation in each update.

    `score` is fd_clf on images and 1,000 times the energy distance on points, which is unbiased: near 0 it can be
    negative. Distances to the teacher are to its samples in 1024 steps (EDM: 40).
    """

    title = "Distil a thousand steps into one: TRACT against binary distillation"
    source = (
        "TRACT (arXiv 2303.04248), CIFAR-10, FID at 1 step: 5.02 against 9.12 cited for progressive distillation "
        "(arXiv 2202.00512), 4.17 with an EDM teacher"
    )

    def budgets(self) -> dict[str, tuple[int, ...]]:
        """Updates in all of each data set's students; the last is the main one."""
        if self.quick:
            return {"checkerboard": (20,)}
        return {"checkerboard": (400, 1500), "digits": (500, 2000), "fashion-mnist": (400,)}

    def ways(self, data: str, budget: int) -> dict[str, tuple[str, ...]]:
        """The ways of training btd, and TRACT in two phases, at a budget."""
        if data == "fashion-mnist":
            return {"btd": ("decay", "average"), "tract-2": ("average",)}
        whole = tuple(WAYS) if budget == self.budgets()[data][-1] else ("decay", "average")
        return {"btd": whole, "tract-2": whole}

    def cells(self) -> list[Cell]:
        cells = []
        for data, budgets in self.budgets().items():
            full = (128,) if data == "fashion-mnist" else (128, self.full)
            cells.append(self.teacher(data, (*FEW, 32, *full)))
            for budget in budgets:
                cells += self._students(data, budget)
            main = budgets[-1]
            for used, count in zip((0.9, 0.8, 0.7), FEW[1:], strict=True):
                said = {"schedule": [32, count], "steps": round((used - 0.5) * main)} | AVERAGE
                note = f"TRACT's 32 steps to {count}, {round(used * main)} updates with those to 32"
                uses = (f"tract-2-average-{main}", "teacher")
                cells.append(self.student(data, f"tract-2-to-{count}-{main}", "tract", said, (count,), note, *uses))
            if data != "fashion-mnist":
                cells += self._edm(data, main)
        return cells

    def _students(self, data: str, budget: int) -> list[Cell]:
        full = self.full
        made: list[tuple[str, str, list[int], str, tuple[int, ...]]] = []
        ways = self.ways(data, budget)
        made += [(f"btd-{way}", "btd", _halves(full), way, FEW) for way in ways["btd"]]
        made += [(f"tract-2-{way}", "tract", [full, 32, 1], way, (1, 32)) for way in ways["tract-2"]]
        made.append(("tract-1-average", "tract", [full, 1], "average", (1,)))
        if data != "fashion-mnist" and budget == self.budgets()[data][-1]:
            made.append(("64-btd-both", "btd", _halves(64), "both", FEW))
            made.append(("64-tract-2-both", "tract", [64, 8, 1], "both", (1, 8)))
        return [
            self.student(
                data, f"{name}-{budget}", method, WAYS[way] | {"schedule": schedule, "steps": budget}, counts,
                f"{method}, {schedule[0]} to 1 in {len(schedule) - 1} phases, {way}, {budget} updates",
            )
            for name, method, schedule, way, counts in made
        ]  # fmt: skip

    def _edm(self, data: str, budget: int) -> list[Cell]:
        sampling = {"num_steps": 40, "solver": "heun"}
        note = "EDM teacher"
        cells = [self._cell(data, "edm", "edm", self.network(data), (*FEW, 40), note, sampling=sampling)]
        for name, schedule in (("edm-tract-1", [40, 1]), ("edm-tract-2", [40, 8, 1])):
            said = {"schedule": schedule, "solver": "heun", "weight": "v", "steps": budget} | AVERAGE
            note = f"TRACT of the EDM teacher, {' to '.join(map(str, schedule))}"
            cells.append(self.student(data, f"{name}-average-{budget}", "tract", said, (1,), note, "edm"))
        return cells

    def claims(self) -> list[Claim]:
        return [
            claim
            for data, budgets in self.budgets().items()
            for budget in budgets
            for claim in (
                *self._claims(data, budget),
                *(self._more(data, budget) if budget == budgets[-1] else ()),
            )
        ]

    def _against(self, data: str, budget: int, text: str, a: str, b: str, metric: str = "score") -> Claim:
        names = f"{data}-{a}-{budget}", f"{data}-{b}-{budget}"
        return Claim.lower(f"{data}, {budget} updates, 1 step: {text}", *names, metric, steps=1)

    def _claims(self, data: str, budget: int) -> list[Claim]:
        """At every budget."""

        def against(*words: str) -> Claim:
            return self._against(data, budget, *words)

        teacher = f"{data}-teacher"

        def beats_teacher(student: str) -> Claim:
            cell = f"{data}-{student}-{budget}"
            text = f"{data}, {budget} updates, 1 step: {student} beats the teacher in 1 step"
            return Claim(text, [cell, teacher], lambda results: lower(_score(results, cell), _score(results, teacher)))

        both_ways = [
            against("both with decay, TRACT in two phases beats btd", "tract-2-decay", "btd-decay"),
            against("TRACT in two phases: average beats decay", "tract-2-average", "tract-2-decay"),
        ]
        return [
            against("TRACT in two phases (average) beats btd as published (decay)", "tract-2-average", "btd-decay"),
            against("TRACT in two phases beats btd trained alike (average)", "tract-2-average", "btd-average"),
            against("the same of the distance to the teacher", "tract-2-average", "btd-average", "rmse"),
            against("btd: average beats decay", "btd-average", "btd-decay"),
            *(both_ways if data != "fashion-mnist" else ()),
            against("TRACT in two phases beats TRACT in one", "tract-2-average", "tract-1-average"),
            beats_teacher("tract-2-average"),
            beats_teacher("btd-decay"),
        ]

    def _more(self, data: str, budget: int) -> list[Claim]:
        """At the main budget."""

        def against(*words: str) -> Claim:
            return self._against(data, budget, *words)

        def few(count: int) -> Claim:
            a, b = f"{data}-tract-2-to-{count}-{budget}", f"{data}-btd-average-{budget}"
            text = f"{data}, {count} steps, equal updates: TRACT beats btd trained alike"
            return Claim.lower(text, a, b, "score", steps=count)

        claims = [few(count) for count in FEW[1:]]
        if data == "fashion-mnist":
            return [*claims, self._near(data, f"btd-decay-{budget}", "teacher", 128)]
        if data == "digits":
            claims.append(self._near(data, f"64-btd-both-{budget}", "teacher", self.full))
            claims.append(self._near(data, f"edm-tract-1-average-{budget}", "edm", 40))
        for name in ("btd", "tract-2"):
            claims += [
                against(f"{name}: averaging pays without decay", f"{name}-average", f"{name}-neither"),
                against(f"{name}: averaging pays on top of decay", f"{name}-both", f"{name}-decay"),
                against(f"{name}: decay pays without averaging", f"{name}-decay", f"{name}-neither"),
            ]
        return [
            *claims,
            against("btd: 64 steps of the teacher are a better beginning than 1024", "64-btd-both", "btd-both"),
            against("TRACT: 64 steps are a better beginning than 1024", "64-tract-2-both", "tract-2-both"),
            against("from 64 steps TRACT in two phases beats btd", "64-tract-2-both", "64-btd-both"),
            against("two phases of an EDM teacher beat two of the VP one", "edm-tract-2-average", "tract-2-average"),
            against("EDM teacher: two phases beat one", "edm-tract-2-average", "edm-tract-1-average"),
        ]

    def _near(self, data: str, student: str, teacher: str, steps: int) -> Claim:
        a, b = f"{data}-{student}", f"{data}-{teacher}"

        def check(results: Results) -> Finding:
            return lower(_score(results, a), 2 * results.values(b, "score", steps=steps))

        return Claim(f"{data}: {student} scores in 1 step below twice {teacher} in {steps}", [a, b], check)

    def figures(self, results: Results) -> dict[str, Figure]:
        figures = {}
        for data, budgets in self.budgets().items():
            main = budgets[-1]
            lines = {
                "teacher": ["teacher"],
                "btd, decay": [f"btd-decay-{main}"],
                "btd, average": [f"btd-average-{main}"],
                "TRACT, two phases, average": [
                    f"tract-2-average-{main}", *(f"tract-2-to-{count}-{main}" for count in FEW[1:])
                ],
                "TRACT, one phase": [f"tract-1-average-{main}"],
            }  # fmt: skip
            if data != "fashion-mnist":
                lines["btd from 64 steps"] = [f"64-btd-both-{main}"]
                lines["TRACT from 64 steps"] = [f"64-tract-2-both-{main}"]
            figure, axes = panels(2)
            for panel, metric in zip(axes, ("score", "rmse"), strict=True):
                for (name, cells), marker in zip(lines.items(), "osD^v*P", strict=False):
                    points = sorted(
                        (float(labels["steps"]), index, values[metric])
                        for cell in cells
                        for index, (labels, values) in enumerate(results.groups(f"{data}-{cell}"))
                        if values[metric].mean() > 0
                    )
                    draw(panel, [steps for steps, _, _ in points], [values for _, _, values in points], name, marker)
                panel.set(xscale="log", xlabel="sampling steps", ylabel=f"{metric} (lower is better)")
                log_scale(panel)
            floor = results.groups(f"{data}-teacher")[0][1]["score_real"].mean()
            if floor > 0:
                real(axes[0], floor)
            axes[0].set_title(f"{data}, {main} updates")
            axes[1].set_title("distance from the teacher in full")
            axes[0].legend(fontsize=7)
            figures[f"{data}-score-against-steps"] = figure
        return figures


def _halves(full: int) -> list[int]:
    return [full >> power for power in range(full.bit_length())]


def _score(results: Results, cell: str) -> np.ndarray:
    return results.values(cell, "score", steps=1)

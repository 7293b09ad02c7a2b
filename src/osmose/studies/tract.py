"""`osmose study tract`: two phases of any length, or ten halvings?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.studies.few_steps import FewSteps
from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results
from osmose.studies.verdicts import Finding, lower

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Two ways of training a phase: progressive distillation's, and TRACT's.
DECAY = {"ema_residual": 0.0, "training.decay": "linear"}
AVERAGE = {"ema_residual": 1e-3, "training.decay": "none"}
FEW = (1, 2, 4, 8)


class Tract(FewSteps):
    """One teacher, distilled to one step by halving (btd) and by TRACT in two phases and in one, at equal updates.

    The teacher is a v-prediction diffusion on the cosine schedule whose angle is linear in t, 1024 DDIM steps. Every
    student takes the same number of optimiser steps on batches of the same size in all, shared equally by its phases,
    and starts each phase from its teacher's weights. `decay` trains as progressive distillation does (the learning rate
    falls to 0 in each phase, no average of the weights), `average` as TRACT does (constant learning rate, average with
    residual 0.001); all else is equal (Adam, 1e-3, gradients clipped at norm 1, weight max(SNR, 1), float32): what is
    due to phases and what to averaging are read off separately. Students of 2, 4, 8 steps are on btd's way; TRACT's are
    distilled from its student of 32 steps, with as many updates as its second phase. A step of btd evaluates the
    teacher twice, one of TRACT the teacher and the self-teacher once each.

    `edm` is an EDM teacher of the same network, Heun's 40 steps; its students, taught with EDM's own weights, go from
    40 to 1 in one phase, and in two by way of 8, with one more evaluation in each update.

    `score` is fd_clf on images and the energy distance on points.
    """

    title = "Distil a thousand steps into one: TRACT against binary distillation"
    source = (
        "TRACT (arXiv 2303.04248), CIFAR-10, FID at 1 step: 5.02 against 9.12 cited for progressive distillation "
        "(arXiv 2202.00512); EDM teacher 4.17; supervised btd on TRACT's own ten phases 5.95 against 6.8"
    )

    def budgets(self) -> dict[str, tuple[int, ...]]:
        """Optimiser steps in all of each data set's students; the last is the main one."""
        if self.quick:
            return {"checkerboard": (30,)}
        return {"checkerboard": (500, 2500), "digits": (750, 3000), "fashion-mnist": (500,)}

    def cells(self) -> list[Cell]:
        cells = []
        for data, budgets in self.budgets().items():
            full = self.full
            cells.append(self.teacher(data, (*FEW, 32, 128)))
            for budget in budgets:
                kinds: list[tuple[str, str, dict[str, Any], tuple[int, ...]]] = [
                    ("btd", "btd", {"schedule": _halves(full)}, FEW),
                    ("tract-2", "tract", {"schedule": [full, 32, 1]}, (1, 32)),
                ]
                for name, method, said, counts in kinds:
                    for way, changes in (("decay", DECAY), ("average", AVERAGE)):
                        note = f"{method}, {budget} steps in all"
                        said = said | changes | {"steps": budget}
                        cells.append(self.student(data, f"{name}-{way}-{budget}", method, said, counts, note))
                said = {"schedule": [full, 1], "steps": budget} | AVERAGE
                cells.append(self.student(data, f"tract-1-average-{budget}", "tract", said, (1,), "tract, one phase"))
            main = budgets[-1]
            for count in FEW[1:]:
                said = {"schedule": [32, count], "steps": main // 2} | AVERAGE
                uses = (f"tract-2-average-{main}", "teacher")
                note = f"tract from its 32 steps to {count}"
                cells.append(
                    self.student(data, f"tract-2-average-{main}-to-{count}", "tract", said, (count,), note, *uses)
                )
            if data != "fashion-mnist":  # for lack of time
                cells += self._edm(data, main)
        return cells

    def _edm(self, data: str, budget: int) -> list[Cell]:
        sampling = {"num_steps": 40, "solver": "heun"}
        teacher = self._cell(data, "edm", "edm", self.network(data), (1, 2, 4, 8, 40), "EDM teacher", sampling=sampling)
        cells = [teacher]
        for name, schedule in (("edm-tract-1", [40, 1]), ("edm-tract-2", [40, 8, 1])):
            said = {"schedule": schedule, "solver": "heun", "weight": "v", "steps": budget} | AVERAGE
            note = f"tract of the EDM teacher, {' to '.join(map(str, schedule))}"
            cells.append(self.student(data, f"{name}-average-{budget}", "tract", said, (1,), note, "edm"))
        return cells

    def claims(self) -> list[Claim]:
        return [
            claim
            for data, budgets in self.budgets().items()
            for at in budgets
            for claim in self._claims(data, at, budgets)
        ]

    def _claims(self, data: str, budget: int, budgets: tuple[int, ...]) -> list[Claim]:
        head = f"{data}, {budget} updates, 1 step"

        def against(text: str, a: str, b: str, metric: str = "score") -> Claim:
            a, b = f"{data}-{a}-{budget}", f"{data}-{b}-{budget}"
            return Claim.lower(f"{head}: {text}", a, b, metric, steps=1)

        teacher = f"{data}-teacher"
        student = f"{data}-tract-2-average-{budget}"

        def near_full(results: Results) -> Finding:
            return lower(_score(results, student, 1), 2 * _score(results, teacher, self.full))

        def beats_teacher(name: str) -> Callable[[Results], Finding]:
            return lambda results: lower(_score(results, name, 1), _score(results, teacher, 1))

        claims = [
            against("TRACT in two phases beats btd as it is published", "tract-2-average", "btd-decay"),
            against("TRACT in two phases beats btd trained in TRACT's way", "tract-2-average", "btd-average"),
            against("the same of the RMSE to the teacher", "tract-2-average", "btd-average", "rmse"),
            against("btd: averaging beats decay (what is due to EMA)", "btd-average", "btd-decay"),
            against(
                "TRACT in two phases: averaging beats decay (what is due to EMA)", "tract-2-average", "tract-2-decay"
            ),
            against("both with decay, TRACT in two phases beats btd (due to phases)", "tract-2-decay", "btd-decay"),
            against("TRACT in two phases beats TRACT in one", "tract-2-average", "tract-1-average"),
            *(
                Claim(f"{head}: {name} beats the teacher at 1 step", [cell, teacher], beats_teacher(cell))
                for name, cell in (("TRACT in two phases", student), ("btd", f"{data}-btd-decay-{budget}"))
            ),
            Claim(f"{head}: TRACT in two phases scores below twice the teacher in full", [student, teacher], near_full),
        ]
        if budget != budgets[-1]:
            return claims
        more = [
            Claim(
                f"{data}, {budget} updates, {count} steps: TRACT beats btd trained in its way",
                [f"{student}-to-{count}", f"{data}-btd-average-{budget}"],
                self._few(student, f"{data}-btd-average-{budget}", count),
            )
            for count in FEW[1:]
        ]
        if data == "fashion-mnist":
            return [*claims, *more]
        return [
            *claims,
            *more,
            against("two phases of an EDM teacher beat two of the VP one", "edm-tract-2-average", "tract-2-average"),
            against("EDM teacher: two phases beat one", "edm-tract-2-average", "edm-tract-1-average"),
        ]

    @staticmethod
    def _few(student: str, other: str, count: int) -> Callable[[Results], Finding]:
        return lambda results: lower(_score(results, f"{student}-to-{count}", count), _score(results, other, count))

    def figures(self, results: Results) -> dict[str, Figure]:
        figures = {}
        for data, budgets in self.budgets().items():
            main = budgets[-1]
            lines = {
                "teacher": ["teacher"],
                "btd, decay": [f"btd-decay-{main}"],
                "btd, average": [f"btd-average-{main}"],
                "TRACT, two phases": [
                    f"tract-2-average-{main}", *(f"tract-2-average-{main}-to-{count}" for count in FEW[1:])
                ],
                "TRACT, one phase": [f"tract-1-average-{main}"],
            }  # fmt: skip
            if f"{data}-edm" in results.rows:
                lines |= {"EDM teacher": ["edm"], "EDM, TRACT, two phases": [f"edm-tract-2-average-{main}"]}
            figure, axes = panels(2)
            for panel, metric in zip(axes, ("score", "rmse"), strict=True):
                for (name, cells), marker in zip(lines.items(), "osD^v*P", strict=False):
                    found = sorted(
                        (float(labels["steps"]), tuple(values[metric]))
                        for cell in cells
                        for labels, values in results.groups(f"{data}-{cell}")
                        if (metric == "score" or values["rmse"].mean() > 0) and values["score"].mean() < np.inf
                    )
                    draw(panel, [at for at, _ in found], [np.array(values) for _, values in found], name, marker)
                panel.set(xscale="log", xlabel="sampling steps", ylabel=f"{metric} (lower is better)")
                log_scale(panel)
            real(axes[0], results.groups(f"{data}-teacher")[0][1]["score_real"].mean())
            axes[0].set_title(f"{data}, {main} updates")
            axes[1].set_title("distance from the teacher in full")
            axes[0].legend(fontsize=7)
            figures[f"{data}-score-against-steps"] = figure
        return figures


def _halves(full: int) -> list[int]:
    return [full >> power for power in range(full.bit_length())]


def _score(results: Results, cell: str, steps: int) -> np.ndarray:
    return results.values(cell, "score", steps=steps)

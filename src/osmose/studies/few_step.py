"""`osmose study few-step`: one, two or four steps by every way there is, at equal updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from matplotlib.ticker import NullFormatter

from osmose.studies.few_steps import METRIC, FewSteps
from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results
from osmose.studies.verdicts import Finding, lower

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Frequency of the time embedding of all networks; the consistency models need it low, the teachers lose nothing.
LOW = {"network.time_frequency": 0.02}
FEW = (1, 2, 4)
_SOLVERS = {"ddim": (1, 2, 4, 8, 18, 50), "heun": (1, 2, 4, 9, 25), "dpmpp-2m": (1, 2, 4, 8, 18, 50)}
_CONSISTENT = ("scd", "sct", "ect")


def told_slowly(values: dict[str, Any]) -> dict[str, Any]:
    """A network and its training, told the time in low frequencies; of the UNet fewer steps than in other studies."""
    return values | LOW | ({"training.steps": 800} if values["training.steps"] == 1000 else {})


class FewStep(FewSteps):
    """One teacher, and students of it that sample in 1, 2 or 4 steps: every method, with the same number of updates.

    The teacher is a v-prediction diffusion on TrigFlow's schedule, whose network is told the time in low frequencies.
    `btd` goes from 64 steps to 1 by halves, `tract` from 64 by way of 4 and 2; `scd` learns the teacher's flow in
    continuous time, `sct` and `ect` begin with the teacher's weights and learn from the data; `dsno` is regressed onto
    stored trajectories of 64 steps of the teacher, at 4 times. All take the same number of optimiser updates on batches
    of the same size. What an update costs differs: training seconds, with the making of the trajectories, have a
    column; one call of `dsno` is the work of 4 evaluations, and counted as 4.

    `score` is fd_clf on images and 1,000 times the energy distance on points, which is unbiased: near 0 it can be
    negative. Distances are to the teacher in 256 steps of DDIM from the same noise; with 2 and 4 steps consistency
    models draw further noise. Recall is the share of real items that lie among the samples.
    """

    title = "One, two or four steps: consistency models, distillation in time and a neural operator, at equal updates"
    source = (
        "sCM (arXiv 2410.11081), CIFAR-10, FID at 1 / 2 steps: sCT 2.97 / 2.06, sCD 3.66 / 2.52, ECT 3.60 / 2.11, "
        "teacher 2.01; TRACT 3.78, progressive distillation 8.34 at 1; DSNO (arXiv 2211.13449) 3.78 in one call"
    )
    full: ClassVar[int] = 256
    shown: ClassVar[tuple[str, ...]] = ("rec_raw", "rec_clf")

    def budgets(self) -> dict[str, int]:
        """Updates of each data set's students."""
        return {"checkerboard": 30} if self.quick else {"checkerboard": 1500, "digits": 2000, "fashion-mnist": 120}

    def network(self, data: str) -> dict[str, Any]:
        return told_slowly(super().network(data))

    def counts(self, data: str, counts: tuple[int, ...]) -> list[int]:
        """Steps that the teacher is run with; without the largest where a sample takes long."""
        return [8] if self.quick else [count for count in counts if data != "fashion-mnist" or count < 20]

    def cells(self) -> list[Cell]:
        cells = []
        num = {"checkerboard": 20_000, "digits": 12_000, "fashion-mnist": 400}
        for data, steps in self.budgets().items():
            recall = {"more": ["rec_raw" if data == "checkerboard" else "rec_clf"]}
            solvers = {name: self.counts(data, counts) for name, counts in _SOLVERS.items()}
            counts = (*solvers.pop("ddim"), self.full)
            cells.append(self.teacher(data, counts, solvers=solvers, **recall))
            made: list[tuple[str, str, dict[str, Any], tuple[int, ...]]] = [
                ("btd", "btd", {"schedule": [64, 32, 16, 8, 4, 2, 1]}, FEW),
                ("tract", "tract", {"schedule": [64, 4, 2, 1]}, FEW),
                *((method, method, {}, FEW) for method in _CONSISTENT),
                ("dsno", "dsno", {"trajectories.num": 200 if self.quick else num[data]}, (1,)),
            ]
            for name, method, said, own in made:
                cells.append(self.student(data, name, method, said | {"steps": steps}, own, name, **recall))
        return cells

    def claims(self) -> list[Claim]:
        claims = []
        for data in self.budgets():
            teacher = f"{data}-teacher"
            for name in _CONSISTENT:
                claims.append(_near(data, name, 2, self.full))
                claims.append(_fewer(data, name))
            one = [
                ("scd", "btd"), ("scd", "tract"), ("sct", "scd"), ("sct", "ect"), ("scd", "dsno"), ("dsno", "btd"),
                ("dsno", "tract"),
            ]  # fmt: skip
            for a, b in one:
                text = f"{data}, 1 step, equal updates: {a} beats {b}"
                claims.append(Claim.lower(text, f"{data}-{a}", f"{data}-{b}", "score", steps=1))
            for a, b in (("scd", "btd"), ("dsno", "scd")):
                text = f"{data}, 1 step: {a} is nearer to the teacher than {b}"
                claims.append(Claim.lower(text, f"{data}-{a}", f"{data}-{b}", "rmse", steps=1))
            claims.append(_beats_teacher(data, "dsno", 1, "ddim", 8))
            claims.append(_beats_teacher(data, "scd", 2, "dpmpp-2m", 8))
            claims.append(_recall(data, "scd", teacher, self.full))
        return claims

    def figures(self, results: Results) -> dict[str, Figure]:
        figures = {}
        for data in self.budgets():
            figure, axes = panels(2)
            lines = [(f"teacher, {name}", "teacher", {"solver": name}) for name in ("ddim", "heun", "dpmpp-2m")]
            lines += [(name, name, {}) for name in ("btd", "tract", *_CONSISTENT, "dsno")]
            for (name, cell, wanted), marker in zip(lines, "osD^v*PXp", strict=True):
                found = results.groups(f"{data}-{cell}")
                groups = [(labels, values) for labels, values in found if wanted.items() <= labels.items()]
                scores = [values["score"] for _, values in groups]
                draw(axes[0], [float(values["nfe"].mean()) for _, values in groups], scores, name, marker)
                times = [1000 * float(values["seconds_per_sample"].mean()) for _, values in groups]
                draw(axes[1], times, scores, name, marker)
            axes[0].set(xlabel="network evaluations", ylabel="score (lower is better)", title=data)
            axes[1].set(xlabel="ms a sample", title="Pareto: down and to the left is better")
            floor = results.groups(f"{data}-teacher")[0][1]["score_real"].mean()
            for panel in axes:
                panel.set_xscale("log")
                panel.xaxis.set_minor_formatter(NullFormatter())
                if METRIC[data] == "energy":  # unbiased: what is good is near 0, on either side
                    panel.set_yscale("symlog", linthresh=2)
                    panel.set_ylim(-3, 1500)
                else:
                    log_scale(panel)
                real(panel, floor)
            axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
            figures[f"{data}-score-against-cost"] = figure
        return figures


def _teacher(results: Results, data: str, metric: str, solver: str, steps: int) -> np.ndarray:
    return results.values(f"{data}-teacher", metric, steps=steps, solver=solver)


def _near(data: str, name: str, steps: int, full: int) -> Claim:
    cell, teacher = f"{data}-{name}", f"{data}-teacher"

    def check(results: Results) -> Finding:
        known = _teacher(results, data, "score", "ddim", full)
        return lower(results.values(cell, "score", steps=steps), known + 0.1 * np.abs(known))

    return Claim(f"{data}: {name} in {steps} steps scores within 10 % of the teacher in {full}", [cell, teacher], check)


def _fewer(data: str, name: str) -> Claim:
    cell = f"{data}-{name}"

    def check(results: Results) -> Finding:
        return lower(results.values(cell, "score", steps=2), results.values(cell, "score", steps=1))

    return Claim(f"{data}: {name} in 2 steps beats {name} in 1", [cell], check)


def _beats_teacher(data: str, name: str, steps: int, solver: str, count: int) -> Claim:
    cell, teacher = f"{data}-{name}", f"{data}-teacher"

    def check(results: Results) -> Finding:
        return lower(results.values(cell, "score", steps=steps), _teacher(results, data, "score", solver, count))

    few = "1 step" if steps == 1 else f"{steps} steps"
    text = f"{data}: {name} in {few} beats the teacher in {count} of {solver}"
    return Claim(text, [cell, teacher], check)


def _recall(data: str, name: str, teacher: str, full: int) -> Claim:
    cell, metric = f"{data}-{name}", "rec_raw" if data == "checkerboard" else "rec_clf"

    def check(results: Results) -> Finding:
        return lower(0.9 * _teacher(results, data, metric, "ddim", full), results.values(cell, metric, steps=1))

    return Claim(f"{data}: {name} in 1 step keeps 90 % of the teacher's recall", [cell, teacher], check)

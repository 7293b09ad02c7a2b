"""`osmose study tract-phases`: into how many phases is a distillation best cut?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from osmose.studies.few_steps import FewSteps
from osmose.studies.plots import draw, log_scale, panels
from osmose.studies.study import Cell, Claim, Results
from osmose.studies.tract import AVERAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Schedules by number of phases, all from 1024 steps to 1.
SCHEDULES = {
    1: (1024, 1),
    2: (1024, 32, 1),
    3: (1024, 128, 16, 1),
    5: (1024, 256, 64, 16, 4, 1),
    10: (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1),
}


class TractPhases(FewSteps):
    """TRACT from 1024 steps to 1 in one to ten phases, at a fixed number of updates in all, and in each phase.

    Teacher, optimiser and averaging as in the study `tract` (`average`); btd on the same ten halvings is the control.
    With a fixed number in all, every student sees as many samples; with a fixed number in each phase, ten phases see
    ten times those of one. A summary of the paper by others gives FIDs on CIFAR-10: 14.40 in one phase, 5.24 in two,
    6.06 in three (from 4096 steps) and 7.27 in four; in ten phases btd 5.95 and TRACT 6.8.
    """

    title = "In how many phases? TRACT's two ablations"
    source = (
        "TRACT (arXiv 2303.04248), section 4.3: two phases are best at fixed total length and at fixed phase length"
    )

    def budgets(self) -> dict[str, tuple[int, int]]:
        """Updates in all, and in each phase."""
        if self.quick:
            return {"checkerboard": (20, 2)}
        return {"checkerboard": (1200, 240)}

    def cells(self) -> list[Cell]:
        cells = []
        for data, (total, each) in self.budgets().items():
            cells.append(self.teacher(data, (1, self.full)))
            for phases, schedule in SCHEDULES.items():
                for name, steps in (("total", total), ("each", each * phases)):
                    said = {"schedule": list(schedule), "steps": steps} | AVERAGE
                    note = f"{phases} phases, {steps} updates in all"
                    cells.append(self.student(data, f"{name}-{phases}", "tract", said, (1,), note))
            said = {"schedule": list(SCHEDULES[10]), "steps": total} | AVERAGE
            cells.append(self.student(data, "total-btd", "btd", said, (1,), "btd in the same ten phases"))
        return cells

    def claims(self) -> list[Claim]:
        claims = []
        for data, (total, each) in self.budgets().items():
            for name, text in (("total", f"{total} updates in all"), ("each", f"{each} updates a phase")):
                for phases in SCHEDULES:
                    if phases != 2:
                        sentence = f"{data}, {text}: two phases beat {_words(phases)}"
                        claims.append(
                            Claim.lower(sentence, f"{data}-{name}-2", f"{data}-{name}-{phases}", "score", steps=1)
                        )
            claims.append(
                Claim.lower(
                    f"{data}, {total} updates in all, ten phases: btd beats TRACT",
                    f"{data}-total-btd",
                    f"{data}-total-10",
                    "score",
                    steps=1,
                )
            )
        return claims

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(len(self.budgets()))
        for panel, (data, (total, each)) in zip(axes, self.budgets().items(), strict=True):
            for name, text in (("total", f"{total} updates in all"), ("each", f"{each} updates a phase")):
                values = [results.values(f"{data}-{name}-{phases}", "score", steps=1) for phases in SCHEDULES]
                draw(panel, [float(phases) for phases in SCHEDULES], values, text)
            draw(panel, [10.0], [results.values(f"{data}-total-btd", "score", steps=1)], "btd, in all", "s")
            panel.set(title=f"{data}, 1 step", xlabel="phases", ylabel="score (lower is better)")
            log_scale(panel)
            panel.legend(fontsize=8)
        return {"score-against-phases": figure}


def _words(phases: int) -> str:
    return {1: "one", 3: "three", 5: "five", 10: "ten"}[phases]

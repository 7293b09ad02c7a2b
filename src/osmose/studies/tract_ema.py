"""`osmose study tract-ema`: how long should the two averages of a student be?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from osmose.studies.few_steps import FewSteps
from osmose.studies.plots import draw, log_scale, panels
from osmose.studies.study import Cell, Claim, Results
from osmose.studies.tract import AVERAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Decay of the self-teaching average, mu_S.
SELF = (0.0, 0.1, 0.5, 0.9, 0.99)
#: Residual of the inference average: mu_I is its N-th root for a phase of N updates.
RESIDUALS = (0.0, 1e-6, 1e-3, 0.1)


class TractEMA(FewSteps):
    """TRACT from 1024 to 32 to 1 step, with several self-teaching averages, and at mu_S = 0.5 several inference ones.

    Teacher and optimiser as in the study `tract` (`average`). mu_I is given by rho = mu_I^N for a phase of N updates:
    the weight of the first state relative to the last. 0 is no average, 0.001 is the published code's (mu_I = 0.99995
    is 0.00005 for phases of 196,608 updates), and with 0.1 early states weigh nearly as much as late ones.
    """

    title = "TRACT's two averages: mu_S teaches, mu_I is sampled from"
    source = (
        "TRACT (arXiv 2303.04248): mu_S in 0.1 to 0.9 is good, 0.5 best, mu_I = 0.99995 best; FIDs at 1 step on "
        "CIFAR-10 from a summary by others: mu_S = 0, 0.5, 0.9, 0.99: 6.32, 5.24, 6.04, 7.61; mu_I = 0.999, 0.9999, "
        "0.99995, 0.99999: 6.91, 5.50, 5.24, 8.73"
    )

    def budgets(self) -> dict[str, int]:
        """Updates in all."""
        return {"checkerboard": 20 if self.quick else 1200}

    def cells(self) -> list[Cell]:
        cells = []
        for data, total in self.budgets().items():
            cells.append(self.teacher(data, (1, self.full)))
            base = {"schedule": [self.full, 32, 1], "steps": total} | AVERAGE
            for decay in SELF:
                note = f"mu_S = {decay:g}, rho = {AVERAGE['ema_residual']}"
                cells.append(self.student(data, f"self-{decay:g}", "tract", base | {"ema_self": decay}, (1,), note))
            for residual in RESIDUALS:
                if residual != AVERAGE["ema_residual"]:
                    decay = residual ** (2 / total)
                    note = f"rho = {residual:g}: mu_I = {decay:.5g}, mu_S = 0.5"
                    said = base | {"ema_residual": residual}
                    cells.append(self.student(data, f"inference-{residual:g}", "tract", said, (1,), note))
        return cells

    def claims(self) -> list[Claim]:
        claims = []
        for data in self.budgets():
            for other in SELF:
                if other != 0.5:
                    text = f"{data}: mu_S = 0.5 beats {other:g}"
                    claims.append(Claim.lower(text, f"{data}-self-0.5", f"{data}-self-{other:g}", "score", steps=1))
            claims.append(
                Claim.lower(f"{data}: mu_S = 0.9 beats 0.99", f"{data}-self-0.9", f"{data}-self-0.99", "score", steps=1)
            )
            for residual in RESIDUALS:
                if residual != AVERAGE["ema_residual"]:
                    text = f"{data}: the inference average with rho = 0.001 beats rho = {residual:g}"
                    claims.append(
                        Claim.lower(text, f"{data}-self-0.5", f"{data}-inference-{residual:g}", "score", steps=1)
                    )
        return claims

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(2)
        for data in self.budgets():
            draw(axes[0], list(range(len(SELF))), [_one(results, f"{data}-self-{decay:g}") for decay in SELF], data)
            cells = [
                f"{data}-self-0.5" if residual == AVERAGE["ema_residual"] else f"{data}-inference-{residual:g}"
                for residual in RESIDUALS
            ]
            draw(axes[1], list(range(len(RESIDUALS))), [_one(results, cell) for cell in cells], data)
        for panel, ticks, name in ((axes[0], SELF, "mu_S"), (axes[1], RESIDUALS, "rho = mu_I^N")):
            panel.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
            panel.set(xlabel=name, ylabel="score at 1 step (lower is better)")
            log_scale(panel)
            panel.legend(fontsize=8)
        return {"score-against-averages": figure}


def _one(results: Results, cell: str) -> np.ndarray:
    return results.values(cell, "score", steps=1)

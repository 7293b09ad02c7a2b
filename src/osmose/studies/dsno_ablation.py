"""`osmose study dsno-ablation`: do the layers along time, and the states on the way, help a one-call student?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from osmose.acceleration.trajectories import Trajectories
from osmose.methods.operator import DSNO
from osmose.studies.few_step import told_slowly
from osmose.studies.few_steps import FewSteps
from osmose.studies.plots import draw, log_scale, panels
from osmose.studies.study import Cell, Claim, Results, Row, Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How many trajectories the training error is measured on.
_CHECKED = 256
#: The students on other data than the digits.
_SOME = {"checkerboard": ("m1", "m2", "m4", "m8", "m4-none"), "fashion-mnist": ("m1", "m4", "m4-none")}


class DSNOAblation(FewSteps):
    """Students of the same teacher, trajectories and number of updates, that differ in times and temporal layers.

    `m1` is regressed onto the end of the trajectories alone; `m1-layers` has besides what the layers are for one time,
    linear layers on the channels with a nonlinearity: parameters without any time. `m2`, `m4`, `m8` return the state at
    so many times and have the layers, of 2 modes; `m4-none` and `m8-none` have no layers. `m4-cap-10` caps the weights
    of the times at 10 instead of 10,000, `m4-quarter` has a quarter of the trajectories.

    Trajectories are of 64 steps of DDIM. `rmse` is the distance at the end from new noise, from the teacher in the same
    64 steps, `rmse_train` that on trajectories that were trained on, `rmse_path` that at all times but the end. An
    update costs about M times that of `m1`: training seconds have a column.
    """

    title = "Does mixing the states along time help a one-call student?"
    source = (
        "DSNO (arXiv 2211.13449), CIFAR-10, FID in one call: without temporal layers 7.85, with 4.12; M = 2, 4, 8: "
        "5.01, 4.21, 3.98 (from a summary by others)"
    )
    full: ClassVar[int] = 64
    shown: ClassVar[tuple[str, ...]] = ("rmse_train", "rmse_path")

    def budgets(self) -> dict[str, tuple[int, int]]:
        """Updates, and trajectories, of each data set's students."""
        if self.quick:
            return {"checkerboard": (30, 200)}
        return {"checkerboard": (800, 8000), "digits": (800, 8000), "fashion-mnist": (80, 300)}

    def network(self, data: str) -> dict[str, Any]:
        return told_slowly(super().network(data))

    def variants(self, data: str) -> dict[str, dict[str, Any]]:
        """What is said of each student."""
        steps, num = self.budgets()[data]
        base = {"steps": steps, "trajectories.num": num}
        found: dict[str, dict[str, Any]] = {
            "m1": {"num_times": 1, "modes": 0},
            "m1-layers": {"num_times": 1, "modes": 1},
            "m2": {"num_times": 2},
            "m4": {},
            "m8": {"num_times": 8},
            "m4-none": {"modes": 0},
            "m8-none": {"num_times": 8, "modes": 0},
            "m4-cap-10": {"weight_cap": 10.0},
            "m4-quarter": {"trajectories.num": num // 4},
        }
        names = found if data == "digits" else _SOME[data]
        return {name: base | found[name] for name in names}

    def cells(self) -> list[Cell]:
        cells = []
        for data in self.budgets():
            cells.append(self.teacher(data, (1, 8, self.full)))
            for name, said in self.variants(data).items():
                cells.append(self.student(data, name, "dsno", said, (1,), name))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        rows, model = super().measure(trained), trained.model
        if not isinstance(model, DSNO):
            return rows
        stored = Trajectories.open(trained.run.folder / "trajectories")
        states, condition = stored.rows(torch.arange(min(_CHECKED, len(stored) // 2)))
        times = [level.t for level in stored.levels]
        columns = [min(range(len(times)), key=lambda i: abs(times[i] - own.t)) for own in model.levels]
        with torch.inference_mode():
            off = (model.solve(states[:, 0], condition) - states[:, columns]).flatten(2).square().mean(2)
        more = {"rmse_train": float(off[:, -1].mean().sqrt())}
        if off.shape[1] > 1:
            more["rmse_path"] = float(off[:, :-1].mean().sqrt())
        return [Row(row.labels, {**row.values, **more}) for row in rows]

    def claims(self) -> list[Claim]:
        pairs = [
            ("temporal layers and the way there (M = 4) beat the end alone", "m4", "m1"),
            ("the same against the end alone with as many further layers", "m4", "m1-layers"),
            ("at M = 4, temporal layers beat none", "m4", "m4-none"),
            ("without layers the way there helps", "m4-none", "m1"),
            ("M = 4 beats M = 2", "m4", "m2"),
            ("M = 8 beats M = 4", "m8", "m4"),
            ("at M = 8, temporal layers beat none", "m8", "m8-none"),
            ("four times the trajectories are better", "m4", "m4-quarter"),
        ]
        claims = []
        for data in self.budgets():
            there = self.variants(data)
            for words, a, b in pairs:
                for metric, what in (("rmse", "distance to the teacher"), ("score", "score")):
                    if a in there and b in there:
                        text = f"{data}, {what}: {words}"
                        claims.append(Claim.lower(text, f"{data}-{a}", f"{data}-{b}", metric, steps=1))
            if "m4-cap-10" in there:
                text = f"{data}: with weights up to 10 the states on the way are nearer"
                claims.append(Claim.lower(text, f"{data}-m4-cap-10", f"{data}-m4", "rmse_path", steps=1))
        return claims

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(len(self.budgets()))
        for panel, data in zip(axes, self.budgets(), strict=True):
            for label, names, marker in (
                ("temporal layers", ("m1-layers", "m2", "m4", "m8"), "o"),
                ("no layers", ("m1", "m4-none", "m8-none"), "s"),
            ):
                cells = [f"{data}-{name}" for name in names if f"{data}-{name}" in results.rows]
                times = [float(cell.rsplit("-m", 1)[1][0]) for cell in cells]
                draw(panel, times, [_rmse(results, cell) for cell in cells], label, marker)
            panel.set(xlabel="M, times", title=data, xscale="log")
            panel.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
            panel.minorticks_off()
            log_scale(panel)
        axes[0].set(ylabel="distance to the teacher in one call")
        axes[0].legend(fontsize=8)
        return {"distance-against-times": figure}


def _rmse(results: Results, cell: str) -> np.ndarray:
    return results.values(cell, "rmse", steps=1)

"""A picture of a distillation: the loss over all phases, and where in time each phase's student is still off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from osmose.training import files

_QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")


def write_losses(path: Path, lines: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> None:
    """Draw the log of a distillation.

    Args:
        path: the .png to write.
        lines: of its metrics.jsonl, with `phase` from 1.
        counts: steps of the teacher and of each student.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), dpi=120, layout="constrained")
    curve, profile = figure.subplots(1, 2)
    for phase, (fine, coarse) in enumerate(pairwise(counts), 1):
        own = [line for line in lines if line["phase"] == phase]
        name, colour = f"{fine} to {coarse}", f"C{(phase - 1) % 10}"
        trained = [(line["step"], line["loss"]) for line in own if line.get("loss", 0) > 0]
        if trained:
            curve.plot(*zip(*trained, strict=True), color=colour, linewidth=0.8)
        checked = [line for line in own if line.get("validation_loss", 0) > 0]
        curve.plot(
            [line["step"] for line in checked], [line["validation_loss"] for line in checked], "o", color=colour,
            markersize=3,
        )  # fmt: skip
        if checked:
            found = [(i, checked[-1].get(f"validation_{quarter}", 0.0)) for i, quarter in enumerate(_QUARTERS)]
            shown = [(0.125 + 0.25 * i, value) for i, value in found if value > 0]
            if shown:
                profile.plot(*zip(*shown, strict=True), "o-", color=colour, markersize=4, label=name)
    curve.set(yscale="log", xlabel="updates", ylabel="loss", title="loss (dots: held-out data)")
    profile.set(yscale="log", xlabel="t (quarters)", title="held-out loss at the end of each phase", xlim=(0, 1))
    if profile.get_lines():
        profile.legend(fontsize=7, title="steps", title_fontsize=7)
    for axes in (curve, profile):
        axes.grid(alpha=0.25, linewidth=0.6)
    files.write_figure(path, figure)

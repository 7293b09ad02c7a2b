"""Writing down what runs cost: all numbers as JSON, and bars of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from osmose.analysis.budget import Budget
from osmose.analysis.training_memory import TrainingMemory
from osmose.training import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_budgets(budgets: Sequence[Budget], folder: Path) -> list[Path]:
    """Write cost.json and, of several runs, cost.png: bars of what each costs, on logarithmic axes."""
    paths = [folder / "cost.json"]
    files.write_json(paths[0], {"runs": [budget.to_json() for budget in budgets]})
    if len(budgets) > 1:
        paths.append(folder / "cost.png")
        files.write_figure(paths[1], _picture(budgets))
    return paths


def _picture(budgets: Sequence[Budget]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    def of_training(value: Callable[[TrainingMemory], float]) -> list[float | None]:
        return [None if budget.training is None else value(budget.training) for budget in budgets]

    each = [None if b.seconds is None or b.training is None else b.seconds / b.training.batch_size for b in budgets]
    panels: list[tuple[str, dict[str, Sequence[float | None]]]] = [
        ("parameters", {"": [budget.cost.parameters for budget in budgets]}),
        (
            "bytes at the peak",
            {
                "evaluation": [b.parameters + b.buffers + b.evaluation for b in budgets],
                "training": of_training(lambda training: training.peak),
            },
        ),
        (
            "multiply-adds for one item",
            {
                "evaluation": [budget.cost.macs for budget in budgets],
                "evaluation, by formula": [budget.macs for budget in budgets],
                "training step": of_training(lambda training: training.macs),
            },
        ),
        (
            "seconds for one item",
            {"evaluation": [b.cost.seconds if b.cost.macs else None for b in budgets], "training step": each},
        ),
    ]
    colours = {"": "0.4", "evaluation": "C0", "evaluation, by formula": "C2"}
    figure = Figure(figsize=(14, 1.8 + 0.55 * len(budgets)), dpi=110, layout="constrained")
    for axes, (title, bars) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        shown = {name: values for name, values in bars.items() if any(values)}
        height = 0.8 / max(1, len(shown))
        for row, (name, values) in enumerate(shown.items()):
            places = [index - 0.4 + (row + 0.5) * height for index in range(len(budgets))]
            here = [(place, value) for place, value in zip(places, values, strict=True) if value]
            drawn = axes.barh(*zip(*here, strict=True), height=0.9 * height, color=colours.get(name, "C1"), label=name)
            axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
        axes.set(title=title, xscale="log")
        numbers = [value for values in shown.values() for value in values if value]
        if numbers:  # a decade of room for the shortest bar, and some for the longest one's number
            axes.set_xlim(
                10.0 ** (math.floor(math.log10(min(numbers))) - 1),
                max(numbers) * (max(numbers) / min(numbers)) ** 0.2 * 5,
            )
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        if any(shown):
            axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=len(shown), frameon=False)
        axes.set_yticks(range(len(budgets)), [budget.conditions["run"] for budget in budgets])
        axes.set_ylim(len(budgets) - 0.5, -0.5)
    return figure

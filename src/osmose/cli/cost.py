"""`osmose analyze cost`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from osmose.cli.command import Result, at_least, output_folder
from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.training.progress import sampling_bar

if TYPE_CHECKING:
    from osmose.analysis.budget import Budget


@dataclass
class Cost:
    """What trained runs cost to hold, to run and to train: operations, bytes and seconds, side by side.

    Bytes are those of tensors: parameters, gradients, the optimiser's state, the averaged weights, what waits for the
    backward pass, and the peak of a whole training step on random data. Operations are multiply-adds of matrix products
    and convolutions. Where there is a formula, its number stands behind the measured one: measured | by formula. Writes
    cost.json and, for several runs, cost.png.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN2 ...]", help="run folders")] = ()
    batch_size: Annotated[int | None, arg(help="items per training step; each run's own if not given")] = None
    out: Annotated[Path | None, arg(help="folder to write to; RUN/cost of the first run if not given")] = None
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Measure, write, answer."""
        if not self.runs:
            raise UserError("RUN: give at least one run folder")
        at_least(self, 1, "batch_size", "threads")
        import torch
        from rich.table import Table

        from osmose.analysis.budget import budget_of
        from osmose.analysis.budget_report import write_budgets
        from osmose.cli.devices import device
        from osmose.training.run import Run

        if self.threads:
            torch.set_num_threads(self.threads)
        runs = [Run.open(folder) for folder in self.runs]
        out = output_folder(self.out, runs[0].folder / "cost")
        where = device(self.device)
        for run in runs:  # what is wrong with the last one is said before the first is measured
            run.require_real("has no training whose cost could be told")
            try:
                run.config.training.replace(batch_size=self.batch_size or run.config.training.batch_size)
            except ConfigError as error:
                raise UserError(f"--batch-size: {error.reason} of {run.folder}") from None
        models = [run.model(where) for run in runs]
        budgets = []
        with sampling_bar("costs", not (self.quiet or self.json)) as on_step:
            for run, model in zip(runs, models, strict=True):
                budgets.append(budget_of(run, batch_size=self.batch_size, device=where, model=model))
                if on_step is not None:
                    on_step(len(budgets), len(runs))
        paths = write_budgets(budgets, out)
        threads = torch.get_num_threads()
        table = Table(title=f"cost on {where}, {threads} thread{'s' if threads != 1 else ''}: measured | by formula")
        table.add_column()
        for run in runs:
            table.add_column(str(run.folder), justify="right", overflow="fold")
        columns = [_column(budget) for budget in budgets]
        for name in max(columns, key=len):
            cells = [column.get(name, "") for column in columns]
            if any(cells):
                table.add_row(name, *cells)
        lines: list[Any] = [table]
        for budget in budgets:
            if budget.untrained is not None:
                lines.append(f"{budget.conditions['run']}: no training to measure: {budget.untrained}")
        lines.append("wrote " + ", ".join(map(str, paths)))
        names = " ".join(map(str, self.runs))
        return Result(
            {"runs": [budget.to_json() for budget in budgets], "wrote": [str(path) for path in paths]},
            lines,
            f"osmose compare {names}" if len(runs) > 1 else f"osmose analyze cost {names} RUN2",
        )


def _column(budget: Budget) -> dict[str, str]:
    """What the table says of one run, by row; empty where there is nothing to say."""
    cost, training = budget.cost, budget.training
    rows = {
        "method": budget.conditions["method"],
        "parameters": f"{cost.parameters:,}",
        "weights on disk": _bytes(budget.weights),
        "weights in memory": _both(_bytes, budget.parameters, budget.formula()),
        "buffers": _bytes(budget.buffers),
        "an evaluation of": _items(budget.items),
        "  peak besides the weights": _bytes(budget.evaluation),
        "  multiply-adds for one item": _both(_count, cost.macs or None, budget.macs),
        "  other operations for one item": _both(_count, None, budget.elementwise),
        "  time for one item": _seconds(cost.seconds) if cost.macs else "",
    }
    if training is None or budget.seconds is None:
        return rows
    formula = training.formula()
    passes = training.batch_size // training.items
    return rows | {
        "a training step of": _items(training.batch_size) + (f" in {passes} passes" if passes > 1 else ""),
        "  with": f"{training.method}, {training.precision}",
        "  gradients": _both(_bytes, training.gradients, formula.get("gradients")),
        "  optimiser's state": _both(_bytes, training.optimizer, formula.get("optimizer")),
        "  averaged weights": _both(_bytes, training.average, formula.get("average")),
        "  teacher": _bytes(training.teacher) if training.teacher else "",
        "  activations of a pass": _bytes(training.activations),
        "  peak besides what is held": _bytes(training.step),
        "  peak, all in all": _bytes(training.peak),
        "  multiply-adds per item": _count(training.macs) if training.macs else "",
        "  those of so many evaluations": "" if budget.ratio is None else f"{budget.ratio:.2f}",
        "  time per item": _seconds(budget.seconds / training.batch_size),
        "  time": _seconds(budget.seconds),
    }


def _both(write: Callable[[float], str], measured: float | None, formula: float | None) -> str:
    """Measured | by formula."""
    if formula is None:
        return "" if measured is None else write(measured)
    return f"{'' if measured is None else write(measured)} | {write(formula)}".strip()


def _items(count: int) -> str:
    return f"{count} item{'s' if count != 1 else ''}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _count(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"

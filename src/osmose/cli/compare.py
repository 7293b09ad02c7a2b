"""`osmose compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from osmose.cli.command import Result
from osmose.errors import UserError


@dataclass
class Compare:
    """Put evaluated runs side by side: a Markdown and a CSV table, and quality against seconds per sample.

    Every evaluation that the runs' evaluation.json hold is a row, so score each run first, at the numbers of steps that
    matter: osmose evaluate RUN --steps 4,20,100. Distances depend on the number of samples, so only evaluations with
    the same number are compared: the largest that all runs have.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN RUN ...", help="run folders")] = ()
    out: Annotated[Path, arg(help="folder for comparison.md, comparison.csv and pareto.png")] = Path("comparison")
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Read the evaluations, write table and plot."""
        if not self.runs:
            raise UserError("RUN: give at least one run folder")
        from rich.table import Table

        from osmose.analysis.cost import num_parameters
        from osmose.metrics.comparison import Row, same_count, write_comparison
        from osmose.metrics.evaluation import headline, read_evaluations
        from osmose.training.run import Run

        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out: {self.out} is a file; name a folder")
        rows = []
        for folder in self.runs:
            run = Run.open(folder)
            evaluations = read_evaluations(run)
            if not evaluations:
                raise UserError(f"{folder}: its weights have not been evaluated yet; run: osmose evaluate {folder}")
            parameters = num_parameters(run.model())
            rows += [Row(run, parameters, evaluation) for evaluation in evaluations]
        rows = same_count(rows)
        paths = write_comparison(rows, self.out)
        metric = headline([row.evaluation for row in rows])
        cells = [row.cells() for row in rows]
        table = Table()
        shown = ["run", "method", "steps", "solver", "nfe", "seconds_per_sample", metric, f"{metric}_real"]
        for name in shown:
            table.add_column(name, justify="left" if name in ("run", "method", "solver") else "right")
        for row in cells:
            table.add_row(*(str(row.get(name, "")) for name in shown))
        wrote = "wrote " + ", ".join(map(str, paths))
        return Result({"rows": cells, "wrote": [str(path) for path in paths]}, [table, wrote])

"""`osmose impute`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, keep_inputs, quiet_warnings, sampling_options
from osmose.errors import UserError
from osmose.training.progress import sampling_bar


@dataclass
class Impute:
    """Fill the gaps of a table: the median of samples in it, and their quantiles in a table of their own.

    FILE has the columns that the run learned from; what is empty in it is drawn given all the rest of its window.
    Writes the table with its gaps filled and all other cells as they stand, beside it a row for each filled value with
    mean and quantiles (.quantiles.csv), and a picture (.png).
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder of series: dspd, cspd, fdp")]
    file: Annotated[Positional[Path], arg(metavar="FILE", help="the table: a .csv or .csv.gz")]
    samples: Annotated[int, arg(help="samples of each value")] = 100
    quantiles: Annotated[str | None, arg(metavar="Q,Q,...", help="levels; 0.05,0.25,0.5,0.75,0.95")] = None
    out: Annotated[Path, arg(help="where to write the filled table: .csv")] = Path("filled.csv")
    steps: Annotated[int | None, arg(help="solver steps; the method's own number if not given")] = None
    solver: Annotated[str | None, arg(help="ancestral, ddim, heun or dpmpp-2m")] = None
    seed: Annotated[int, arg(help="same seed, same samples")] = 0
    batch_size: Annotated[int | None, arg(help="samples computed together")] = None
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Draw, write, answer."""
        import numpy as np

        from osmose.analysis.filling import impute
        from osmose.cli.devices import device
        from osmose.cli.tables import (
            QUANTILES,
            fan_chart,
            quantile_rows,
            read_quantiles,
            series_of,
            write_filled,
            write_table,
        )
        from osmose.training import files
        from osmose.training.run import Run

        if self.out.suffix.lower() != ".csv":
            raise UserError(f"--out: {self.out} is not valid: should end in .csv")
        quantiles, chart = self.out.with_suffix(".quantiles.csv"), self.out.with_suffix(".png")
        keep_inputs([self.out, quantiles, chart], self.file)
        if self.samples < 2:
            raise UserError(f"--samples: {self.samples} is not valid: must be at least 2")
        levels = QUANTILES if self.quantiles is None else read_quantiles(self.quantiles)
        model = Run.open(self.model).model(device(self.device))
        form = model.spec.series
        if form is None:
            raise UserError(f"RUN: {self.model} learned from {model.spec.kind}, and gaps are those of series")
        options = sampling_options(self.overrides, num_steps=self.steps, solver=self.solver)
        table = series_of(self.file, form)
        wanting = [series for series in table.series if np.isnan(series.values).any()]
        if not wanting:
            raise UserError(f"FILE: {self.file.name} has no missing value; nothing to fill")
        found = []
        with quiet_warnings(), sampling_bar("filling", not (self.quiet or self.json)) as on_step:
            for index, series in enumerate(wanting):

                def report(done: int, of: int, index: int = index) -> None:
                    if on_step is not None:
                        on_step(index * of + done, len(wanting) * of)

                filled = impute(
                    model,
                    series,
                    num_samples=self.samples,
                    seed=self.seed + index,
                    batch_size=self.batch_size,
                    on_step=report,
                    **options,
                )
                found.append((series.name, filled))
        drawn = [filled.values.isnan() for _, filled in found]
        write_filled(self.out, self.file, table, dict(found))
        write_table(quantiles, *quantile_rows(found, form, levels, drawn))
        files.write_figure(chart, fan_chart(found, form, drawn))
        count = sum(int(where.sum()) for where in drawn)
        values = {"out": str(self.out), "quantiles": str(quantiles), "chart": str(chart), "filled": count}
        first = f"wrote {self.out}, {quantiles}, {chart}: {count} values filled, {self.samples} samples of each"
        return Result(
            values | {"samples": self.samples, "nfe": found[0][1].nfe, "seed": self.seed},
            [first],
        )

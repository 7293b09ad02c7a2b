"""`osmose forecast`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, keep_inputs, quiet_warnings, sampling_options
from osmose.errors import UserError
from osmose.training.progress import sampling_bar


@dataclass
class Forecast:
    """Draw what comes after a history, and write its quantiles.

    The history is a table as the run learned from: the same time, id and value columns, empty cells where a value is
    missing. Each of its series is continued from its last row, by --horizon times one median gap apart, or at the times
    of the table --at. Writes a row for each series, time and column, and a fan chart beside it (.png).
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder of series: dspd, cspd, fdp")]
    history: Annotated[Path | None, arg(metavar="FILE", help="what is known: a .csv or .csv.gz; required")] = None
    horizon: Annotated[int | None, arg(help="times to forecast; as many as the run learned if not given")] = None
    at: Annotated[Path | None, arg(metavar="FILE", help="a table with the times to forecast, for all series")] = None
    samples: Annotated[int, arg(help="paths of each series")] = 100
    quantiles: Annotated[str | None, arg(metavar="Q,Q,...", help="levels; 0.05,0.25,0.5,0.75,0.95")] = None
    out: Annotated[Path, arg(help="where to write: .csv or .parquet")] = Path("forecast.csv")
    paths: Annotated[Path | None, arg(metavar="FILE", help="also write all paths: an .npz")] = None
    steps: Annotated[int | None, arg(help="solver steps; the method's own number if not given")] = None
    solver: Annotated[str | None, arg(help="ancestral, ddim, heun or dpmpp-2m")] = None
    seed: Annotated[int, arg(help="same seed, same paths")] = 0
    batch_size: Annotated[int | None, arg(help="paths computed together")] = None
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Draw, write, answer."""
        import torch

        from osmose.analysis.filling import forecast
        from osmose.cli.devices import device
        from osmose.cli.tables import QUANTILES, fan_chart, quantile_rows, read_quantiles, series_of, write_table
        from osmose.data.timetables import times_in
        from osmose.training import files
        from osmose.training.run import Run

        if self.history is None:
            raise UserError("--history: required: the table to continue")
        if self.out.suffix.lower() not in (".csv", ".parquet"):
            raise UserError(f"--out: {self.out} is not valid: should end in .csv or .parquet")
        if self.paths is not None and self.paths.suffix.lower() != ".npz":
            raise UserError(f"--paths: {self.paths} is not valid: should end in .npz")
        keep_inputs([self.out, self.out.with_suffix(".png"), self.paths], self.history, self.at)
        if self.samples < 2:
            raise UserError(f"--samples: {self.samples} is not valid: must be at least 2")
        if self.horizon is not None and self.at is not None:
            raise UserError("--horizon: given with --at, whose times are the horizon; give one of them")
        levels = QUANTILES if self.quantiles is None else read_quantiles(self.quantiles)
        model = Run.open(self.model).model(device(self.device))
        form = model.spec.series
        if form is None:
            raise UserError(f"RUN: {self.model} learned from {model.spec.kind}, and forecasts are of series")
        options = sampling_options(self.overrides, num_steps=self.steps, solver=self.solver)
        table = series_of(self.history, form)
        horizon = (
            getattr(model.config, "horizon", max(1, model.spec.shape[1] // 3)) if self.horizon is None else self.horizon
        )
        if horizon < 1:
            raise UserError(f"--horizon: {horizon} is not valid: must be at least 1")
        given = None if self.at is None else times_in(self.at, form.time_column, form.unit)
        found, drawn = [], []
        with quiet_warnings(), sampling_bar("forecasting", not (self.quiet or self.json)) as on_step:
            for index, series in enumerate(table.series):
                last, gap = float(series.times[-1]), form.gap
                if given is None:
                    if len(series.times) > 1:
                        gap = float(torch.from_numpy(series.times).diff().median())
                    times = last + gap * torch.arange(1, horizon + 1, dtype=torch.float64)
                else:
                    times = given

                def report(done: int, of: int, index: int = index) -> None:
                    if on_step is not None:
                        on_step(index * of + done, len(table.series) * of)

                filled = forecast(
                    model,
                    series,
                    times,
                    num_samples=self.samples,
                    seed=self.seed + index,
                    batch_size=self.batch_size,
                    on_step=report,
                    **options,
                )
                where = torch.zeros(filled.values.shape, dtype=torch.bool)
                where[:, -len(times) :] = True
                found.append((series.name, filled))
                drawn.append(where)
        write_table(self.out, *quantile_rows(found, form, levels, drawn))
        chart = self.out.with_suffix(".png")
        files.write_figure(chart, fan_chart(found, form, drawn))
        wrote = [self.out, chart]
        if self.paths is not None:
            wrote.append(self.paths)
            _write_paths(self.paths, found, len(times))
        count = len(table.series)
        names = ", ".join(map(str, wrote))
        nfe = found[0][1].nfe
        first = f"wrote {names}: {count} series, {len(times)} times, {self.samples} paths of {nfe} evaluations"
        values = {"out": str(self.out), "chart": str(chart), "series": count, "horizon": len(times)}
        again = f"osmose backtest {self.model}"
        return Result(values | {"samples": self.samples, "nfe": nfe, "seed": self.seed}, [first], again)


def _write_paths(path: Path, found: Any, horizon: int) -> None:
    import numpy as np

    from osmose.training import files

    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            samples=np.stack([filled.samples[..., -horizon:].numpy() for _, filled in found]),
            times=np.stack([filled.times[-horizon:].numpy() for _, filled in found]),
            series=np.array([name for name, _ in found]),
        )

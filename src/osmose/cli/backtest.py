"""`osmose backtest`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, quiet_warnings, sampling_options
from osmose.errors import UserError
from osmose.training.progress import sampling_bar

#: Scores in the table, and what they are in a word.
_SHOWN = ("crps", "crps_sum", "nd", "nrmse", "energy", "path_energy", "steps")


@dataclass
class Backtest:
    """Score forecasts of what is known already, beside forecasts that need no training.

    Of a table that was cut into windows the last --windows stretches of --horizon rows are forecast, each from all rows
    before it; all of them lie in the part that was held out. Of whole series the ends of held-out ones are. Scores are
    GluonTS's, and two energy scores; `steps` is how large steps of the paths are beside those that came, 1 is right.
    Writes backtest.json and backtest.png.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder of series: dspd, cspd, fdp")]
    windows: Annotated[int, arg(help="windows of each series, or held-out series")] = 5
    horizon: Annotated[int | None, arg(help="times to forecast; as many as the run learned if not given")] = None
    period: Annotated[int | None, arg(help="rows of a season (24 for hours): adds seasonal forecasts")] = None
    samples: Annotated[int, arg(help="paths of each window")] = 100
    out: Annotated[Path | None, arg(help="folder to write to; RUN/backtest if not given")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    steps: Annotated[int | None, arg(help="solver steps; the method's own number if not given")] = None
    solver: Annotated[str | None, arg(help="ancestral, ddim, heun or dpmpp-2m")] = None
    seed: Annotated[int, arg(help="same seed, same paths")] = 0
    batch_size: Annotated[int | None, arg(help="paths computed together")] = None
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Forecast, score, write, answer."""
        import torch
        from rich.table import Table

        from osmose.analysis.backtest import cases_of, contest
        from osmose.cli.devices import device
        from osmose.cli.tables import fan_chart
        from osmose.metrics.forecasts import forecast_scores
        from osmose.training import files
        from osmose.training.run import Run, data_of

        for name in ("samples", "windows"):
            least = 2 if name == "samples" else 1
            if getattr(self, name) < least:
                raise UserError(f"--{name}: {getattr(self, name)} is not valid: must be at least {least}")
        run = Run.open(self.model)
        model = run.model(device(self.device))
        options = sampling_options(self.overrides, num_steps=self.steps, solver=self.solver)
        with quiet_warnings():
            dataset = data_of(run, self.data_root)
        longest = dataset.spec.shape[1]
        horizon = getattr(run.config.method, "horizon", max(1, longest // 3)) if self.horizon is None else self.horizon
        data = run.config.data if self.data_root is None else run.config.data.replace(root=str(self.data_root))
        cases = cases_of(data, dataset, self.windows, horizon)
        with quiet_warnings(), sampling_bar("forecasting", not (self.quiet or self.json)) as on_step:
            made = contest(
                model,
                cases,
                run.config.method.kind,
                num_samples=self.samples,
                period=self.period,
                seed=self.seed,
                batch_size=self.batch_size,
                on_step=on_step,
                **options,
            )
        scale = torch.tensor(model.spec.scale)
        scores = {name: forecast_scores(p, made.truth, made.last, scale) for name, p in made.paths.items()}
        folder = self.out or run.folder / "backtest"
        values = {
            "run": str(self.model),
            "windows": len(cases),
            "horizon": horizon,
            "samples": self.samples,
            "period": self.period,
            "seed": self.seed,
            "nfe": made.first.nfe,
            "scores": scores,
        }
        files.write_json(folder / "backtest.json", values)
        where = torch.zeros(made.first.values.shape, dtype=torch.bool)
        where[:, -horizon:] = True
        form = model.spec.series
        assert form is not None
        name = f"{cases[0].history.name} (window 1 of {len(cases)})".strip()
        chart = fan_chart([(name, made.first)], form, [where], [cases[0].future])
        files.write_figure(folder / "backtest.png", chart)
        table = Table(
            title=f"{len(cases)} windows of {horizon} times, {self.samples} paths of {made.first.nfe} evaluations"
        )
        table.add_column("forecast")
        for name in _SHOWN:
            table.add_column(name, justify="right")
        for name, found in scores.items():
            table.add_row(name, *(f"{found[score]:.4g}" for score in _SHOWN))
        lines = [table, f"wrote {folder / 'backtest.json'}, {folder / 'backtest.png'}"]
        return Result(values, lines, f"osmose forecast {self.model} --history FILE")

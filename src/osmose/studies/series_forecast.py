"""Study `series-forecast`: forecasts of real series against simple ones and those of other libraries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from osmose.analysis import baselines
from osmose.analysis.backtest import Case, cases_of, contest, simple_forecasts
from osmose.data.dataset import DataConfig
from osmose.data.series_sources import ETTH1_ROWS
from osmose.metrics.forecasts import forecast_scores
from osmose.studies.libraries import deepar, statistical
from osmose.studies.plots import panels
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import lower, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from osmose.methods.base import GenerativeModel

_FX_ROWS = 6955
_NETWORK = {"network": "transformer", "network.width": 48, "network.depth": 2, "task": "forecast", "local": True}
#: Variants of dspd: what is changed of the recipe, and what it is.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "brownian": (
        {"kernel": {"kind": "brownian", "length_scale": 10.0, "origin": -1.0}},
        "a random walk from the last value",
    ),
    "ou": ({}, "an Ornstein-Uhlenbeck process given the last values, of the memory that the recipe finds"),
    "gp": ({"kernel": {"kind": "gp", "length_scale": 5.0}}, "a smooth Gaussian process given the last values"),
    "white": ({"kernel": "white"}, "independent noise"),
    "loose": ({"pinned": False}, "as ou, but noise ignores what is known, as published"),
    "timegrad": ({"kernel": "white", "horizon": 1}, "independent noise, one time after the other, as TimeGrad does"),
}
_METRICS = ("crps", "crps_sum", "nd", "nrmse", "energy", "path_energy", "steps")


class SeriesForecast(Study):
    """Rolling forecasts at the end of real series, of dspd under several noises and of everything beside it.

    ETTh1: 7 columns, the first 14,400 hours; 7 windows of 24 hours at their end, seen are 48 hours. FX-8: 8 exchange
    rates, 6,955 days; 5 windows of 30, seen are 30. All before the first window is for training. dspd: one network
    (attention, 2 layers of 48), v-prediction, items in units of their own history, 700 updates of 48; 100 paths of 100
    steps. `timegrad` learned the next time alone, given all other rows of a window (71 and 59), and is rolled out with
    25 steps a time (fixed_small variance); it is to be compared with `white`, whose noise it has.

    `walk`: Gaussian random walk with the covariance of the last 250 increments. `seasonal-walk`: the last day plus
    earlier differences from day to day. `kriging`: an Ornstein-Uhlenbeck process around the mean of what is seen.
    `ets`, `arima`: AutoETS and AutoARIMA (statsforecast) of each column by itself, on the last 500 rows; their paths
    are normal with the published intervals, independent between columns and at one quantile all along, so that their
    path_energy and steps mean little. On ETTh1 AutoETS has a season of 24, AutoARIMA none, which would take minutes a
    column. `deepar`: GluonTS's DeepAR, one model for all columns, 2 layers of 40, 10 epochs
    of 50 batches of 32: its paths are independent between columns.

    Scores: crps, crps_sum (of the sum over columns), nd, nrmse as GluonTS defines them; energy of all columns at a time
    and path_energy of whole paths in deviations of each column; steps, squared differences of neighbouring times over
    those that came, 1 is right.
    """

    title = "Probabilistic forecasts of real series: correlated noise, and what it is up against"
    source = (
        "Modeling Temporal Data as Continuous Functions with Stochastic Process Diffusion (arXiv 2211.02590): "
        "competitive forecasts; on exchange rates the random walk is the forecast to fear"
    )

    @property
    def data(self) -> dict[str, tuple[DataConfig, int, int, int | None]]:
        """Data sets: configuration, windows, horizon and period."""
        if self.quick:
            config = DataConfig.parse({"source": "process:sine:24", "num_points": 200})
            return {"sine": (config, 4, 6, None)}
        etth1 = DataConfig.parse({"source": "etth1", "window": 72, "held_out": 168 / ETTH1_ROWS})
        fx8 = DataConfig.parse({"source": "fx-8", "window": 60, "held_out": 150 / _FX_ROWS})
        return {"etth1": (etth1, 7, 24, 24), "fx-8": (fx8, 5, 30, None)}

    @property
    def variants(self) -> tuple[str, ...]:
        """Of dspd."""
        return ("ou", "white") if self.quick else tuple(VARIANTS)

    def cells(self) -> list[Cell]:
        cells = []
        training = {"training.steps": 700, "training.batch_size": 48}
        if self.quick:
            training = {"training.steps": 20, "training.batch_size": 16, "network.width": 16, "network.depth": 1}
        for data, (config, windows, horizon, period) in self.data.items():
            settings = {"windows": windows, "horizon": horizon, "period": period, "paths": 10 if self.quick else 100}
            for name in self.variants:
                changes, note = VARIANTS[name]
                whole = _NETWORK | training | {"horizon": horizon} | changes
                cells.append(Cell(f"{data}-{name}", "dspd", config, whole, settings | {"variant": name}, note))
            cells.append(Cell(f"{data}-simple", None, config, {}, settings, "forecasts that need no training"))
            if not self.quick:
                library = settings | {"frequency": "B"} if data == "fx-8" else settings  # business days, or hours
                cells.append(Cell(f"{data}-library", None, config, {}, library, "forecasts of other libraries"))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings, dataset = trained.cell.settings, trained.dataset
        assert trained.data is not None
        cases = cases_of(trained.data, dataset, settings["windows"], settings["horizon"])
        form, count, seed = dataset.spec.series, settings["paths"], trained.seed
        assert form is not None
        longest = dataset.spec.shape[1]
        truth = torch.stack([torch.from_numpy(case.future.values.T).float() for case in cases])
        last = torch.stack([baselines.last_known(torch.from_numpy(case.history.values.T)).float() for case in cases])
        paths: dict[str, Tensor]
        if trained.cell.method is not None:
            if settings["variant"] == "timegrad":
                made = [
                    rolled_out(trained.model, case, settings["horizon"], count, seed + i)
                    for i, case in enumerate(cases)
                ]
                paths = {"timegrad": torch.stack(made)}
            else:
                found = contest(trained.model, cases, "dspd", num_samples=count, seed=seed)
                paths = {settings["variant"]: found.paths["dspd"]}
        elif trained.cell.name.endswith("simple"):
            simple = [
                simple_forecasts(case, form, longest, count, settings["period"], seed + i)
                for i, case in enumerate(cases)
            ]
            paths = {name: torch.stack([made[name] for made in simple]).float() for name in simple[0]}
        else:
            season = settings["period"] or 1
            paths = statistical(cases, season, count, seed)
            horizon = settings["horizon"]
            paths["deepar"] = deepar(cases, horizon, longest - horizon, settings.get("frequency", "h"), count, seed)
        scale = torch.tensor(dataset.spec.scale)
        return [
            Row({"forecast": name}, _with_distance(forecast_scores(p, truth, last, scale))) for name, p in paths.items()
        ]

    def claims(self) -> list[Claim]:
        claims = []

        def less(text: str, data: str, a: str, b: str, metric: str) -> None:
            cells = [f"{data}-{self._cell(name)}" for name in (a, b)]

            def check(r: Results) -> Any:
                ours, theirs = (r.values(cell, metric, forecast=n) for cell, n in zip(cells, (a, b), strict=True))
                return lower(ours, theirs)

            claims.append(Claim(f"{data}: {text}", cells, check))

        for data in self.data:
            best = "ou" if self.quick else "brownian" if data == "fx-8" else "ou"
            for metric in ("crps", "crps_sum", "path_energy"):
                less(f"{best} noise scores better than white noise ({metric})", data, best, "white", metric)
            less(f"steps of paths under {best} noise are nearer to those that came", data, best, "white", "log_steps")
            rivals = ["walk", "last", "kriging"] + (["seasonal-walk"] if data == "etth1" else [])
            for rival in ["last", "kriging"] if self.quick else rivals:
                for metric in ("crps_sum", "nrmse"):
                    less(f"dspd ({best}) is better than {rival} ({metric})", data, best, rival, metric)
            if not self.quick:
                for rival in ("deepar", "ets", "arima"):
                    less(f"dspd ({best}) is better than {rival} (crps_sum)", data, best, rival, "crps_sum")
                text = "noise that is pinned to the last values scores better than noise that is not (crps)"
                less(text, data, "ou", "loose", "crps")
                less("smooth noise is worse than the rough one (crps)", data, best, "gp", "crps")
                text = "drawing the horizon at once is better than time after time, both with white noise"
                for metric in ("crps_sum", "path_energy"):
                    less(f"{text} ({metric})", data, "white", "timegrad", metric)
        return claims

    def _cell(self, forecast: str) -> str:
        """The cell that makes a forecast."""
        if forecast in VARIANTS:
            return forecast
        return "library" if forecast in ("deepar", "ets", "arima") else "simple"

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables = {}
        for data, (_, windows, horizon, _) in self.data.items():
            rows = []
            for cell in [name for name in results.rows if name.startswith(f"{data}-")]:
                for labels, values in results.groups(cell):
                    shown = {metric: mean_and_spread(values[metric]) for metric in _METRICS}
                    kind = "dspd " if cell.removeprefix(f"{data}-") in VARIANTS else ""
                    rows.append({"forecast": f"{kind}{labels['forecast']}"} | shown)
            tables[f"{data}: {windows} windows of {horizon}"] = rows
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(len(self.data))
        for panel, data in zip(axes, self.data, strict=True):
            for cell in [name for name in results.rows if name.startswith(f"{data}-")]:
                for labels, values in results.groups(cell):
                    ours = cell.removeprefix(f"{data}-") in VARIANTS
                    x, y = float(values["crps_sum"].mean()), float(values["path_energy"].mean())
                    panel.plot(x, y, "o" if ours else "x", c="tab:blue" if ours else "tab:red", markersize=6)
                    panel.annotate(
                        str(labels["forecast"]), (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points"
                    )
            panel.set(title=f"{data}: lower is better", xlabel="crps_sum", ylabel="path energy")
        return {"forecasts": figure}


def _with_distance(scores: dict[str, float]) -> dict[str, float]:
    """How far steps are from the right size besides; of a forecast without steps, as if they were a thousandth."""
    return scores | {"log_steps": abs(math.log(max(scores["steps"], 1e-3)))}


def rolled_out(model: GenerativeModel, case: Case, horizon: int, count: int, seed: int) -> Tensor:
    """Paths of a model that learned the next time alone, one time after the other, (count, C, horizon)."""
    longest = model.spec.shape[1]
    seen = torch.from_numpy(case.history.values[-longest + 1 :].T).float()
    paths = seen.expand(count, -1, -1).clone()
    times = torch.arange(longest, dtype=torch.float64)
    for step in range(horizon):
        known = torch.cat([paths[..., -longest + 1 :], torch.full((count, len(seen), 1), torch.nan)], 2)
        made = model.sample(
            count, known=known, times=times, seed=1000 * seed + step, num_steps=25, **{"solver": {"kind": "ancestral"}}
        )
        paths = torch.cat([paths, made.data[..., -1:]], 2)
    return paths[..., -horizon:]

"""Forecasts and imputations: simple ones against their formulas, a run's against what it is given."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from osmose.analysis import baselines
from osmose.analysis.backtest import cases_of, contest, simple_forecasts
from osmose.analysis.filling import forecast, impute
from osmose.data.dataset import DataConfig, DataSpec
from osmose.data.timetables import Series
from osmose.errors import UserError
from osmose.methods import METHODS
from osmose.metrics.forecasts import forecast_scores

#: Where the series that are not embedded lie, if they are there.
DATA = os.environ.get("OSMOSE_DATA_ROOT")

GENERATOR = torch.Generator


def history(columns=2, rows=60):
    return torch.randn(columns, rows, generator=GENERATOR().manual_seed(0), dtype=torch.float64).cumsum(1)


def test_a_walk_has_the_covariance_of_the_increments():
    x = history(rows=400)
    made = baselines.walk(x, 4, 40_000, GENERATOR().manual_seed(1), recent=399)
    covariance = torch.cov(x.diff(dim=1))
    ends = made[..., 3] - x[:, -1]
    assert torch.allclose(ends.mean(0), torch.zeros(2, dtype=torch.float64), atol=0.05)
    assert torch.allclose(torch.cov(ends.T), 4 * covariance, rtol=0.05, atol=0.05)


def test_seasons_repeat():
    x = torch.arange(24.0, dtype=torch.float64).repeat(2, 5)
    x[1] += torch.arange(120, dtype=torch.float64)
    made = baselines.seasonal(x, 30, 24, 3)
    assert torch.equal(made[0, 0], x[0, :30] % 24)
    walked = baselines.seasonal_walk(x, 48, 24, 5, GENERATOR().manual_seed(0))
    assert torch.allclose(walked[:, 0], x[0, :48].expand(5, -1))
    # A trend goes on: every difference of one period is 24.
    assert torch.allclose(
        walked[:, 1], (x[1, -24:].repeat(2) + 24 * torch.tensor([1.0, 2.0]).repeat_interleave(24)).expand(5, -1)
    )


def test_last_values_pass_over_gaps():
    x = history()
    x[1, -3:] = math.nan
    assert torch.equal(baselines.last_known(x), torch.stack([x[0, -1], x[1, -4]]))
    assert baselines.last_value(x, 3, 2).shape == (2, 2, 3)
    with pytest.raises(UserError, match="column 1 has no known value"):
        baselines.last_known(torch.tensor([[1.0], [math.nan]]))


def test_straight_lines():
    values = torch.tensor([[math.nan, 1.0, math.nan, 4.0, math.nan]], dtype=torch.float64)
    times = torch.tensor([0.0, 1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    assert baselines.linear(values, times).tolist() == [[1.0, 1.0, 2.0, 4.0, 4.0]]


def test_kriging_passes_through_what_is_known_and_forgets():
    values = torch.tensor([[2.0, math.nan, math.nan]], dtype=torch.float64)
    times = torch.tensor([0.0, 1.0, 50.0], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    made = baselines.kriging(values, times, one, 2 * one, 2.0, 20_000, GENERATOR().manual_seed(0))[:, 0]
    assert torch.equal(made[:, 0], torch.full((20_000,), 2.0, dtype=torch.float64))
    assert made[:, 1].mean().item() == pytest.approx(1 + math.exp(-0.5), abs=0.05)
    assert made[:, 1].var().item() == pytest.approx(4 * (1 - math.exp(-1)), rel=0.05)
    assert made[:, 2].mean().item() == pytest.approx(1, abs=0.05)
    assert made[:, 2].var().item() == pytest.approx(4, rel=0.05)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("series") / "t.csv"
    rows = ["t,a,b", *(f"{i},{math.sin(i / 4):.5f},{i % 6}" for i in range(200))]
    path.write_text("\n".join(rows))
    return path


def model_of(table, task="any", window=20, **data):
    config = DataConfig.parse({"source": f"series:{table}", "window": window, "held_out": 0.2, **data})
    dataset = config.load()
    torch.manual_seed(0)
    method = METHODS.parse("dspd").replace(
        task=task, horizon=6, network={"kind": "rnn", "width": 8, "depth": 1}, sampling={"num_steps": 3}
    )
    return method.build(dataset.spec), config, dataset


def series(table, stop=None):
    from osmose.data.timetables import read_table

    whole = read_table(table).series[0]
    return Series("", whole.times[:stop], whole.values[:stop].copy())


def test_a_forecast_sees_the_last_rows_and_draws_the_horizon(table):
    model, _, _ = model_of(table)
    found = forecast(model, series(table), torch.arange(200.0, 205.0), num_samples=4)
    assert found.values.shape == (2, 20)
    assert found.times.tolist() == list(range(185, 205))
    assert torch.equal(found.samples[:, :, :15], found.values[:, :15].expand(4, -1, -1))
    assert found.samples[..., 15:].std() > 0
    again = forecast(model, series(table), torch.arange(200.0, 205.0), num_samples=4)
    assert torch.equal(again.samples, found.samples)


def test_gaps_are_filled_window_by_window(table):
    model, _, _ = model_of(table)
    whole = series(table, 73)
    whole.values[3:6, 0] = np.nan
    whole.values[40, 1] = np.nan
    whole.values[72, :] = np.nan
    found = impute(model, whole, num_samples=3)
    gaps = torch.from_numpy(whole.values.T).isnan()
    assert found.samples.isfinite().all()
    assert torch.equal(found.samples[:, ~gaps], found.values[~gaps].expand(3, -1))
    assert bool((found.samples[:, gaps].std(0) > 0).all())


def test_a_backtest_uses_rows_that_training_did_not_see(table):
    model, config, dataset = model_of(table)
    cases = cases_of(config, dataset, 3, 6)
    assert [len(case.history.times) for case in cases] == [182, 188, 194]
    assert cases[-1].future.times.tolist() == list(range(194, 200))
    with pytest.raises(UserError, match="7 of 6 rows reach into training: 40 rows were held out; use at most 6"):
        cases_of(config, dataset, 7, 6)
    found = contest(model, cases, "dspd", num_samples=5, period=6)
    assert list(found.paths) == ["dspd", "last", "walk", "seasonal", "seasonal-walk", "kriging"]
    for paths in found.paths.values():
        assert paths.shape == (3, 5, 2, 6)
        assert paths.isfinite().all()
    assert torch.allclose(found.truth[:, 1], found.paths["seasonal"][:, 0, 1])
    assert torch.allclose(found.last[0], torch.tensor([math.sin(181 / 4), 181 % 6]), atol=1e-4)


@pytest.mark.skipif(not DATA or not Path(DATA, "timeseries").is_dir(), reason="needs $OSMOSE_DATA_ROOT/timeseries")
def test_simple_forecasts_of_real_series_score_what_is_known_of_them():
    """FX-8, 5 windows of 30 days: CRPS_sum of the last value and of a random walk; ETTh1: of the last value."""
    for source, windows, horizon, rows, known in (
        ("fx-8", 5, 30, 6955, {"last": 0.0095, "walk": 0.0070}),
        ("etth1", 7, 24, 14_400, {"last": 0.384}),
    ):
        config = DataConfig.parse(
            {"source": source, "root": DATA, "window": 2 * horizon, "held_out": windows * horizon / rows}
        )
        dataset = config.load()
        cases = cases_of(config, dataset, windows, horizon)
        truth = torch.stack([torch.from_numpy(case.future.values.T).float() for case in cases])
        last = torch.stack([baselines.last_known(torch.from_numpy(case.history.values.T)).float() for case in cases])
        made = [simple_forecasts(case, dataset.spec.series, 2 * horizon, 400, None, i) for i, case in enumerate(cases)]
        for name, score in known.items():
            paths = torch.stack([one[name] for one in made]).float()
            found = forecast_scores(paths, truth, last, torch.tensor(dataset.spec.scale))
            assert found["crps_sum"] == pytest.approx(score, rel=0.06)


def test_a_backtest_of_whole_series_takes_held_out_ones():
    config = DataConfig.parse({"source": "process:sine:12", "num_points": 60})
    cases = cases_of(config, config.load(), 4, 5)
    assert len(cases) == 4
    assert all(len(case.history.times) == 7 and len(case.future.times) == 5 for case in cases)
    with pytest.raises(UserError, match="horizon: 12 is not valid: no held-out series"):
        cases_of(config, config.load(), 4, 12)


def test_what_cannot_be_forecast_or_filled(table):
    model, _, _ = model_of(table)
    times = torch.arange(200.0, 206.0)
    refused = [
        (lambda: forecast(model, series(table), times - 3), "have to ascend from after 199, the history's last"),
        (
            lambda: forecast(model, series(table), torch.arange(200.0, 220.0)),
            "20 times asked for, and items",
        ),
        (lambda: forecast(model, series(table), times[:0]), "0 times asked for"),
        (lambda: impute(model, series(table)), "nothing is missing"),
        (lambda: impute(model_of(table, "forecast")[0], series(table)), "learned with task=forecast"),
        (
            lambda: forecast(model, Series("", np.arange(5.0), np.zeros((5, 1))), times),
            "columns: 1 given, and this run has 2: a, b",
        ),
        (
            lambda: forecast(model, Series("", np.arange(5.0), np.full((5, 2), np.nan)), times),
            "its last 14 times, which the model sees, have no known value",
        ),
        (lambda: impute(model, Series("", np.arange(5.0), np.full((5, 2), np.nan))), "has no known value"),
        (lambda: forecast(_of_points(), series(table), times), "learned from points"),
    ]
    for act, message in refused:
        with pytest.raises(UserError, match=message):
            act()


def _of_points():
    return METHODS.parse({"kind": "ddpm", "network": "mlp"}).build(DataSpec(kind="points", shape=(2,)))

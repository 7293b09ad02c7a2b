"""GluonTS at the edge: its data sets, its predictors, its evaluator."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

gluonts = pytest.importorskip("gluonts")

import pandas  # noqa: E402
from gluonts.dataset.common import ListDataset  # noqa: E402
from gluonts.evaluation import Evaluator, MultivariateEvaluator, make_evaluation_predictions  # noqa: E402

from osmose.errors import UserError  # noqa: E402
from osmose.interop.gluonts import OsmosePredictor, train, write_table  # noqa: E402
from osmose.metrics.forecasts import LEVELS, forecast_scores  # noqa: E402

SMALL = {"network": {"kind": "rnn", "width": 8, "depth": 1}, "training": {"steps": 4, "batch_size": 8}}


def entries(series=3, columns=1, rows=80):
    rng = np.random.default_rng(0)
    made = []
    for index in range(series):
        values = np.sin(np.arange(rows) / 4)[None] + 0.1 * rng.normal(size=(columns, rows)) + 3 + index
        target = values[0] if columns == 1 else values
        made.append({"start": pandas.Period("2024-01-01", freq="h"), "target": target, "item_id": f"s{index}"})
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gluonts")
    return train(entries(), folder / "one", prediction_length=5, progress=False, **SMALL)


def test_a_run_learns_from_a_list_of_dicts(run):
    config = run.config
    assert (config.method.task, config.method.horizon, config.data.window) == ("forecast", 5, 20)
    assert config.spec.series.columns == ("x0",)
    assert Path(f"{run.folder}.csv").read_text().splitlines()[:2][0] == "item,steps of h,x0"


def test_frequencies_are_not_mixed(run, tmp_path):
    mixed = entries()
    mixed[1] = mixed[1] | {"start": pandas.Period("2024-01-01", freq="D")}
    with pytest.raises(UserError, match="start: series 1 has the frequency D, and the first h"):
        train(mixed, tmp_path / "x", prediction_length=5, progress=False, **SMALL)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="start: entry 1 has the frequency D, and this run learned from h"):
        list(OsmosePredictor(run, num_samples=2, num_steps=2).predict(mixed))


def test_a_run_is_a_predictor_for_the_evaluator(run):
    predictor = OsmosePredictor(run, num_samples=20, num_steps=5)
    data = ListDataset(entries(), freq="h")
    forecasts, truth = make_evaluation_predictions(data, predictor=predictor, num_samples=20)
    forecasts, truth = list(forecasts), list(truth)
    assert [forecast.samples.shape for forecast in forecasts] == [(20, 5)] * 3
    assert forecasts[1].start_date == pandas.Period("2024-01-01", freq="h") + 75
    assert forecasts[1].item_id == "s1"
    metrics, _ = Evaluator(quantiles=LEVELS, num_workers=0)(truth, forecasts)
    paths = torch.from_numpy(np.stack([f.samples for f in forecasts]))[:, :, None]
    known = torch.stack([torch.from_numpy(t.to_numpy()[-5:, 0]) for t in truth])[:, None]
    ours = forecast_scores(paths, known, known[..., 0], torch.ones(1))
    assert ours["crps"] == pytest.approx(metrics["mean_wQuantileLoss"], rel=1e-4)
    assert ours["nd"] == pytest.approx(metrics["ND"], rel=1e-4)
    assert ours["nrmse"] == pytest.approx(metrics["NRMSE"], rel=1e-4)


def test_several_columns_and_the_sum_over_them(tmp_path):
    made = train(entries(2, columns=3), tmp_path / "many", prediction_length=4, progress=False, **SMALL)
    predictor = OsmosePredictor(made, num_samples=10, num_steps=4)
    data = ListDataset(entries(2, columns=3), freq="h", one_dim_target=False)
    forecasts, truth = make_evaluation_predictions(data, predictor=predictor, num_samples=10)
    forecasts, truth = list(forecasts), list(truth)
    assert forecasts[0].samples.shape == (10, 4, 3)
    evaluator = MultivariateEvaluator(quantiles=LEVELS, target_agg_funcs={"sum": np.sum}, num_workers=0)
    metrics, _ = evaluator(truth, forecasts)
    paths = torch.from_numpy(np.stack([f.samples for f in forecasts])).transpose(2, 3)
    known = torch.stack([torch.from_numpy(t.to_numpy()[-4:].T.astype(float)) for t in truth])
    ours = forecast_scores(paths, known, known[..., 0], torch.ones(3))
    assert ours["crps_sum"] == pytest.approx(metrics["m_sum_mean_wQuantileLoss"], rel=1e-4)


def test_gaps_are_empty_cells(tmp_path):
    made = entries(1, rows=4)
    made[0]["target"][2] = math.nan
    assert write_table(made, tmp_path / "t.csv") == (1, 4)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[3] == "0:s0,2,"


def test_data_sets_that_cannot_be(tmp_path, run):
    with pytest.raises(UserError, match="has no series"):
        write_table([], tmp_path / "t.csv")
    with pytest.raises(UserError, match="series 1 has 2 columns, and the first 1"):
        write_table([*entries(1), *entries(1, columns=2)], tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"prediction_length: 9 leaves no history: .* which has 16 times"):
        train(entries(rows=16), tmp_path / "short", prediction_length=9, progress=False)
    with pytest.raises(UserError, match="columns: 2 given, and this run has 1"):
        list(OsmosePredictor(run).predict(entries(1, columns=2)))

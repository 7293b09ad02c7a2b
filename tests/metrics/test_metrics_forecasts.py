"""Scores of forecasts and of series: identities, hand-made cases, and what is blind to what."""

import math

import pytest
import torch

from osmose.errors import UserError
from osmose.metrics.forecasts import LEVELS, energy_score, forecast_scores, weighted_quantile_loss
from osmose.metrics.series import common_grid, on_grid, roughness, squared_steps


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_point_forecast_has_the_normalised_deviation_as_its_crps():
    truth, point = drawn(4, 3, 5), drawn(4, 3, 5, seed=1)
    scores = forecast_scores(point[:, None].expand(-1, 10, -1, -1), truth, truth[..., 0], torch.ones(3))
    assert scores["crps"] == pytest.approx(scores["nd"])
    total, made = truth.sum(1), point.sum(1)
    assert scores["crps_sum"] == pytest.approx(float((total - made).abs().sum() / total.abs().sum()))
    assert scores["energy"] == pytest.approx(float((truth - point).norm(dim=1).mean()))
    assert scores["path_energy"] == pytest.approx(float((truth - point).flatten(1).norm(dim=1).mean()))
    assert scores["nrmse"] == pytest.approx(float((truth - point).square().mean().sqrt() / truth.abs().mean()))


def test_the_quantile_loss_is_its_formula():
    paths, truth = drawn(2, 200, 1, 3), drawn(2, 1, 3, seed=1)
    losses = []
    for tau in LEVELS:
        q = paths.sort(dim=1).values[:, round(199 * tau)]
        below = (truth < q).double()
        losses.append(float((2 * (truth - q) * (tau - below)).sum() / truth.abs().sum()))
    assert weighted_quantile_loss(paths, truth) == pytest.approx(sum(losses) / 19)
    assert pytest.approx([k / 20 for k in range(1, 20)]) == LEVELS


def test_the_energy_score_is_least_for_the_right_law():
    truth = drawn(3000, 2)
    scores = {s: energy_score(s * drawn(3000, 60, 2, seed=2), truth) for s in (0.5, 1.0, 2.0)}
    assert scores[1.0] < scores[0.5]
    assert scores[1.0] < scores[2.0]
    # Unbiased: the mean is that of the energy distance to a point, whatever the number of samples.
    few = energy_score(drawn(3000, 3, 2, seed=3), truth)
    assert few == pytest.approx(scores[1.0], abs=0.03)


def test_only_whole_paths_see_correlation_in_time():
    walks = drawn(300, 1, 1, 20).cumsum(3)
    loose = torch.stack(
        [walks[torch.randperm(300, generator=torch.Generator().manual_seed(i))][..., i] for i in range(20)], 3
    )
    truth, last = walks[:60, 0], torch.zeros(60, 1, dtype=torch.float64)
    right, wrong = walks[60:, 0][None].expand(60, -1, -1, -1), loose[60:, 0][None].expand(60, -1, -1, -1)
    a, b = (forecast_scores(paths, truth, last, torch.ones(1)) for paths in (right, wrong))
    for blind in ("crps", "nd", "energy"):
        assert a[blind] == pytest.approx(b[blind], rel=0.1)
    assert a["steps"] == pytest.approx(1, abs=0.2)
    assert b["steps"] > 5
    assert a["path_energy"] < b["path_energy"]


def test_missing_truth_counts_for_nothing():
    paths, truth = drawn(3, 50, 2, 4), drawn(3, 2, 4, seed=1)
    gaps = truth.clone()
    gaps[:, :, 3] = math.nan
    short = forecast_scores(paths[..., :3], truth[..., :3], truth[..., 0], torch.ones(2))
    long = forecast_scores(paths, gaps, truth[..., 0], torch.ones(2))
    for name, value in short.items():
        assert long[name] == pytest.approx(value), name


def test_paths_that_cannot_be_scored():
    with pytest.raises(UserError, match="with S at least 2"):
        forecast_scores(drawn(1, 1, 1, 2), drawn(1, 1, 2), drawn(1, 1), torch.ones(1))
    bad = drawn(1, 3, 1, 2)
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="hold NaN or infinity"):
        forecast_scores(bad, drawn(1, 1, 2), drawn(1, 1), torch.ones(1))


def test_series_are_brought_to_one_grid_by_straight_lines():
    times = torch.tensor([[0.0, 1.0, 3.0], [0.0, 2.0, math.nan]], dtype=torch.float64)
    values = torch.tensor([[[0.0, 2.0, 6.0]], [[1.0, math.nan, math.nan]]])
    grid = torch.tensor([-1.0, 0.5, 2.0, 9.0], dtype=torch.float64)
    assert on_grid(values, times, grid, torch.zeros(1))[:, 0].tolist() == [[0, 1, 4, 6], [1, 1, 1, 1]]
    assert common_grid(times).tolist() == [0.0, 1.0, 2.0]
    empty = torch.full((1, 1, 3), math.nan)
    assert on_grid(empty, times[:1], grid, torch.tensor([5.0]))[0, 0].tolist() == [5.0] * 4


def test_roughness_looks_at_close_neighbours_alone():
    times = torch.tensor([[0.0, 0.1, 1.0, 1.1]], dtype=torch.float64)
    values = torch.tensor([[[0.0, 1.0, 50.0, 52.0]]])
    assert squared_steps(values, times, 0.1).tolist() == [2.5]
    assert roughness(2 * values, times, values, times, 0.1) == pytest.approx(4)

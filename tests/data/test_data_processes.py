"""Simulated series: their exact moments and equations, and their times."""

import math

import numpy as np
import pytest
import torch

from osmose.data.dataset import DataConfig
from osmose.data.processes import PROCESSES, ornstein_uhlenbeck, sines
from osmose.errors import UserError

RNG = np.random.default_rng


def load(name, count=3000, **options):
    return DataConfig.parse({"source": f"process:{name}", "num_points": count, **options}).load()


@pytest.mark.parametrize("name", list(PROCESSES))
def test_every_process_has_series_at_times_of_their_own(name):
    found = load(name, 50)
    assert found.train.isfinite().all()
    assert found.spec.shape[1] == 64
    assert not found.spec.series.regular
    assert bool((found.train_times.diff(dim=1) > 0).all())
    assert 0 <= float(found.train_times.min()) < float(found.train_times.max()) <= 1
    assert torch.equal(found.train, load(name, 50).train)


def test_ornstein_uhlenbeck_has_its_moments():
    times = np.tile([1.0, 20.0, 60.0], (40_000, 1))
    x = ornstein_uhlenbeck(times, RNG(0))[..., 0]
    for i, t in enumerate((1.0, 20.0, 60.0)):
        assert x[:, i].mean() == pytest.approx(0.2 * t - 2 + 2 * math.exp(-0.1 * t), abs=0.02)
        assert x[:, i].var() == pytest.approx(0.8 * (1 - math.exp(-0.2 * t)), rel=0.03)
    between = np.cov(x[:, 1], x[:, 2])[0, 1]
    assert between == pytest.approx(0.8 * (1 - math.exp(-4)) * math.exp(-4), abs=0.02)


def test_cox_ingersoll_ross_stays_in_its_stationary_law():
    x = PROCESSES["cir"].draw(np.tile([0.5, 3.0, 9.0], (40_000, 1)), RNG(0))[..., 0]
    assert x.min() > 0
    assert x.mean(0) == pytest.approx(1.2, abs=0.005)
    assert x.var(0) == pytest.approx(0.04 * 1.2 / 2, rel=0.03)
    assert np.corrcoef(x[:, 0], x[:, 1])[0, 1] == pytest.approx(math.exp(-2.5), abs=0.02)


def test_sines_are_their_formula():
    times = np.sort(RNG(1).random((3, 5)), axis=1) * 10
    rng = RNG(2)
    a, b, c = (rng.uniform(low, high, size=(3, 5, 1)) for low, high in ((3, 4), (0, 0.5), (0, 1)))
    expected = sum(c[:, k] * np.sin(a[:, k] * times + b[:, k]) for k in range(5))
    assert sines(times, RNG(2))[..., 0] == pytest.approx(expected)


def test_sink_is_its_matrix_exponential():
    times = np.sort(RNG(1).random((4, 64)), axis=1) * 3
    x = PROCESSES["sink"].draw(times, RNG(3))
    start = torch.from_numpy(RNG(3).standard_normal((4, 2)))
    matrix = torch.tensor([[-4.0, 10.0], [-3.0, 2.0]], dtype=torch.float64)
    for item in range(4):
        expected = torch.linalg.matrix_exp(matrix * float(times[item, -1])) @ start[item]
        assert x[item, -1] == pytest.approx(expected.numpy(), abs=2e-4)


def test_predators_and_prey_go_round():
    x = PROCESSES["predator-prey"].draw(np.tile(np.linspace(0.1, 10, 64), (20, 1)), RNG(0))
    kept = x[..., 0] - np.log(x[..., 0]) + 2 / 3 * (x[..., 1] - np.log(x[..., 1]))
    assert kept.std(axis=1).max() < 1e-4


def test_names_and_lengths_that_cannot_be():
    with pytest.raises(UserError, match="process:ornstein: no such process"):
        load("ornstein", 50)
    for length in ("1", "x", "-3"):
        with pytest.raises(UserError, match="is not a number of times; use at least 2"):
            load(f"ou:{length}", 50)
    assert load("sine:12", 50).spec.shape == (1, 12)

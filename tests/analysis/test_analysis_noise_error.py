"""Noise errors of models whose denoiser is put in its place, on laws whose exact denoiser is known."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from osmose.analysis import noise_error as noise_errors
from osmose.analysis.noise_error import linear_of, noise_error, oracle_of
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian import SCHEDULES
from osmose.gaussian.draws import StepDraws
from osmose.gaussian.parametrization import column, noised
from osmose.methods.diffusion import DDPMConfig

EVERY = ("toy:gaussian:4", "toy:product:5", "toy:chain:6:0.1", "toy:mixture:4", "toy:8-gaussians")
every_law = pytest.mark.parametrize("source", EVERY)
N = 2000


def load(source, **settings):
    return DataConfig(source=source, **({"num_points": 4000} | settings)).load()


class Known(nn.Module):
    """A denoiser whose noise estimate is that of another one and `error(t)` more."""

    def __init__(self, denoiser, error=None):
        super().__init__()
        self.denoiser, self.error, self.unused = denoiser, error, nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, x_t, level, condition=None):  # noqa: ARG002
        self.seen.append((x_t.dtype, self.training))
        x0 = self.denoiser(x_t.double(), level)
        if self.error is not None:
            x0 = x0 - column(level.sigma / level.alpha * self.error(level.t), x0)
        return x0.to(x_t)


def in_odd_units(dataset):
    """The same points, which the model sees with another shift and scale in every coordinate."""
    places = range(dataset.spec.dimension)
    spec = dataset.spec.replace(shift=tuple(0.3 - 0.5 * i for i in places), scale=tuple(0.7 * 1.6**i for i in places))
    return replace(dataset, spec=spec)


def model_of(dataset, denoiser, error=None, dtype=torch.float64, **parts):
    model = DDPMConfig(network={"kind": "mlp", "width": 8, "depth": 1}, **parts).build(dataset.spec)
    model.denoiser = Known(denoiser, error)
    return model.to(dtype)


def trig(**parts):
    return {"schedule": "trig", "parametrization": "v"} | parts


# --- exact functions ------------------------------------------------------------------------------------------------


@every_law
def test_the_exact_denoiser_has_no_excess(source):
    dataset = load(source)
    found = noise_error(model_of(dataset, oracle_of(dataset)), dataset, n=N)
    assert found.excess == found.standard_error == 0
    assert found.by_quartile == (0, 0, 0, 0)
    assert found.explained == (None if source == "toy:gaussian:4" else 1)
    assert found.irreducible > 0.05
    # In float32 it has no more than rounding.
    single = noise_error(model_of(dataset, oracle_of(dataset), dtype=torch.float32), dataset, n=N)
    assert single.excess < 1e-9


@every_law
def test_the_linear_denoiser_explains_nothing(source):
    dataset = load(source)
    found = noise_error(model_of(dataset, linear_of(dataset)), dataset, n=N)
    assert found.excess == found.linear
    if source == "toy:gaussian:4":
        assert found.linear < 1e-16
        assert found.explained is None
    else:
        assert found.explained == 0
        assert found.linear > 0.01


@every_law
@pytest.mark.parametrize("schedule", ["linear", "cosine", "trig"])
def test_losses_of_the_exact_and_the_linear_denoiser_differ_by_the_nonlinear_part(source, schedule):
    # E|eps - eps_lin|^2 is a matter of the covariance alone: alpha^2 l / (alpha^2 l + sigma^2) for every eigenvalue l.
    # It is the sum of what is irreducible and what is nonlinear, whatever the law.
    dataset = load(source, num_points=20_000, held_out=0.5)
    parts = trig() if schedule == "trig" else {"schedule": schedule}
    found = noise_error(model_of(dataset, oracle_of(dataset), **parts), dataset, n=30_000)
    t = (torch.arange(1000, dtype=torch.float64) + (0.5 if schedule == "trig" else 1)) / 1000
    _, alpha, sigma = SCHEDULES.parse(schedule).level(t)
    variances = linear_of(dataset).variances
    loss = alpha[:, None] ** 2 * variances / (alpha[:, None] ** 2 * variances + sigma[:, None] ** 2)
    assert found.irreducible + found.linear == pytest.approx(float(loss.mean()), rel=0.02)


@every_law
def test_the_oracle_is_the_mean_of_the_items_given_the_noised_ones(source):
    # What is left of x0 has no part in any function of x_t: here in waves of each coordinate and its neighbour.
    dataset = in_odd_units(load(source, num_points=40_000))
    x0 = dataset.spec.encode(dataset.train).double()
    oracle, straight = oracle_of(dataset), linear_of(dataset)
    level = SCHEDULES.parse("cosine").level(torch.linspace(0.1, 0.9, len(x0), dtype=torch.float64))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = noised(x0, eps, level)

    def worst(denoiser):
        rest = x0 - denoiser(x_t, level)
        waves = ((x_t.roll(shift, 1) * rate).sin() for shift in (0, 1) for rate in (0.7, 2))
        parts = torch.cat([rest, *(rest * wave for wave in waves)], 1)
        return float((parts.mean(0) / parts.std(0)).abs().max()) * len(parts) ** 0.5

    assert worst(oracle) < 5
    if source != "toy:gaussian:4":
        assert worst(straight) > 10


def test_where_the_exact_model_is_linear_up_to_rounding_nothing_is_to_be_explained(monkeypatch):
    dataset = load("toy:gaussian:3")
    linear = linear_of(dataset)
    linear.variances = linear.variances * (1 + 1e-11)
    monkeypatch.setattr(noise_errors, "linear_of", lambda _: linear)
    found = noise_error(model_of(dataset, oracle_of(dataset), lambda t: t), dataset, n=100)
    assert 0 < found.linear < 1e-20
    assert found.explained is None


def test_excess_is_what_was_added_to_the_exact_noise():
    dataset = load("toy:chain:5")
    found = noise_error(model_of(dataset, oracle_of(dataset), lambda t: 0 * t + 0.1), dataset, n=N)
    assert found.excess == pytest.approx(0.01, rel=1e-9)
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    assert found.by_quartile == pytest.approx((0.01,) * 4, rel=1e-9)
    assert found.explained == pytest.approx(1 - 0.01 / found.linear)
    assert noise_error(model_of(dataset, oracle_of(dataset), lambda t: 0 * t + 2), dataset, n=N).explained < 0


def test_quartiles_are_those_of_t_and_times_are_spread_evenly():
    dataset = load("toy:product:3")
    found = noise_error(model_of(dataset, oracle_of(dataset), lambda t: t), dataset, n=N)
    edges = torch.linspace(0, 1, 5, dtype=torch.float64)
    want = (edges[1:] ** 3 - edges[:-1] ** 3) / 3 * 4
    assert found.by_quartile == pytest.approx(want.tolist(), rel=0.01)
    # Stratified: with times drawn anyhow the deviation of this mean would be 0.3 / sqrt(n) = 0.007.
    assert found.excess == pytest.approx(1 / 3, abs=0.001)
    assert found.standard_error == pytest.approx((4 / 45) ** 0.5 / N**0.5, rel=0.02)


def test_quartiles_without_a_step_are_empty():
    dataset = load("toy:gaussian:2")
    parts = {"schedule": {"kind": "cosine", "num_steps": 2}, "sampling": {"num_steps": 2}}
    found = noise_error(model_of(dataset, oracle_of(dataset), lambda t: t, **parts), dataset, n=100)
    assert found.by_quartile == (None, None, pytest.approx(0.25), pytest.approx(1))


def test_a_continuous_schedule_is_not_asked_where_it_has_no_noise(monkeypatch):
    dataset = load("toy:mixture:3")
    monkeypatch.setattr(StepDraws, "stratified", lambda draws: torch.zeros(draws.total, dtype=torch.float64))
    found = noise_error(model_of(dataset, linear_of(dataset), **trig()), dataset, n=100)
    assert 0 < found.excess < float("inf")


# --- what it depends on ---------------------------------------------------------------------------------------------


def test_batches_change_nothing_and_seeds_do():
    dataset = load("toy:chain:4")
    model = model_of(dataset, linear_of(dataset))
    whole, cut = (noise_error(model, dataset, n=500, batch_size=size) for size in (500, 7))
    assert cut.excess == pytest.approx(whole.excess, rel=1e-12)
    assert cut.by_quartile == pytest.approx(whole.by_quartile, rel=1e-12)
    other = noise_error(model, dataset, n=500, seed=1)
    assert other.excess != whole.excess
    assert other.excess == pytest.approx(whole.excess, abs=6 * whole.standard_error)
    # Here the error is a matter of the times alone, and not of the items.
    timed = model_of(dataset, oracle_of(dataset), lambda t: t)
    assert noise_error(timed, dataset, n=500, seed=1).excess != noise_error(timed, dataset, n=500).excess


def test_items_are_held_out_ones_and_come_again(monkeypatch):
    # At the quietest step, next to no noise, what the model sees are the items themselves.
    dataset = load("toy:gaussian:3", num_points=30)
    monkeypatch.setattr(StepDraws, "stratified", lambda draws: torch.zeros(draws.total, dtype=torch.float64))
    points = []

    def see(x_t, level):
        points.append(x_t / level.alpha[:, None])
        return x_t

    noise_error(model_of(dataset, see), dataset, n=30)
    distance = torch.cdist(points[0], dataset.spec.encode(dataset.held_out).double())
    assert float(distance.min(1).values.max()) < 0.05
    assert distance.argmin(1).bincount().tolist() == [10, 10, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_computes_in_its_own_precision_and_is_left_as_it_was(dtype):
    dataset = load("toy:mixture:3")
    model = model_of(dataset, oracle_of(dataset), dtype=dtype)
    for training in (True, False):
        model.train(training)
        noise_error(model, dataset, n=10)
        assert model.training == model.denoiser.training == training
        assert model.denoiser.seen.pop() == (dtype, False)


def test_a_network_is_measured():
    dataset = load("toy:chain:3")
    torch.manual_seed(0)
    model = DDPMConfig(network={"kind": "mlp", "width": 16, "depth": 1}).build(dataset.spec)
    found = noise_error(model, dataset, n=200)
    # A network that has not learned anything predicts next to no noise.
    assert 0.3 < found.excess < 3
    assert found.explained < 0.5


def test_the_result_is_plain_values():
    dataset = load("toy:gaussian:3")
    found = noise_error(model_of(dataset, oracle_of(dataset), lambda t: t), dataset, n=50, seed=3)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {name: values[name] for name in ("data", "method", "n", "seed")} == {
        "data": "toy:gaussian:3",
        "method": "ddpm",
        "n": 50,
        "seed": 3,
    }
    assert values["excess"] == found.excess
    assert values["by_quartile"] == list(found.by_quartile)
    assert values["explained"] is None


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["digits", "toy:checkerboard"])
@pytest.mark.parametrize("of", [oracle_of, linear_of])
def test_data_without_a_closed_form_are_refused(source, of):
    message = f"^data: {source} has no denoiser in closed form; these have: toy:8-gaussians, toy:chain:D or chain:D:P, "
    with pytest.raises(UserError, match=message):
        of(load(source))


def test_what_does_not_fit_is_refused():
    dataset = load("toy:mixture:3", num_points=100)
    model = model_of(dataset, oracle_of(dataset))
    for options, message in (
        ({"n": 1}, "^n: 1 is not valid: must be at least 2$"),
        ({"batch_size": 0}, "^batch_size: 0 is not valid: must be at least 1$"),
        ({"seed": -1}, "^seed: -1 is not valid: must be between 0"),
    ):
        with pytest.raises(UserError, match=message):
            noise_error(model, dataset, **options)
    for other in (load("toy:mixture:4", num_points=100), load("toy:mixture:3", num_points=101)):
        with pytest.raises(UserError, match=f"^data: {other.source} differs in dimension, mean or deviation from what"):
            noise_error(model, other)
    with pytest.raises(UserError, match=r"^method.conditional: true is not valid here"):
        noise_error(model_of(dataset, oracle_of(dataset), conditional=True), dataset)

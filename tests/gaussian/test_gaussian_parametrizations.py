import itertools
import math

import pytest
import torch
from torch import nn

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.gaussian import PARAMETRIZATIONS, SCHEDULES
from osmose.gaussian.denoiser import Conditioned, NetworkDenoiser
from osmose.gaussian.parametrization import (
    EDMParametrization,
    EpsParametrization,
    VParametrization,
    X0Parametrization,
    convert,
    noised,
    velocity,
)
from osmose.gaussian.schedule import Level, LinearSchedule, StraightSchedule, TrigSchedule, VarianceExploding

SCHEDULE = [SCHEDULES.parse(kind) for kind in SCHEDULES.entries]
PARAMETRIZATION = [
    EpsParametrization(),
    X0Parametrization(),
    VParametrization(),
    EDMParametrization(),
    EDMParametrization(sigma_data=1.7),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULE, ids=lambda s: s.kind)
every_parametrization = pytest.mark.parametrize(
    "parametrization", PARAMETRIZATION, ids=lambda p: f"{p.kind}{getattr(p, 'sigma_data', '')}"
)


class Answers(nn.Module):
    """A network that answers with what it was told, and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, label, condition=None):
        self.x, self.label, self.condition = x, label, condition
        return self.answer


def pair(count=9, event=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, *event, generator=generator, dtype=torch.float64).unbind(0)


def times(schedule, count=9):
    return torch.linspace(0.01, 1.0 if float(schedule.alpha(1.0)) > 0 else 0.99, count, dtype=torch.float64)


def test_every_registered_parametrization_is_tested_here():
    assert {p.kind for p in PARAMETRIZATION} == set(PARAMETRIZATIONS.entries)


@every_schedule
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(["x0", "eps", "v", "score"], 2)))
def test_predictions_convert_to_their_definitions(schedule, source, target):
    x0, eps = pair()
    level = schedule.level(times(schedule))
    alpha, sigma = (value.view(-1, 1, 1) for value in (level.alpha, level.sigma))
    x_t = noised(x0, eps, level)
    assert torch.equal(x_t, alpha * x0 + sigma * eps)
    truth = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma}
    got = convert(truth[source], source, target, x_t, level)
    # Dividing by alpha or sigma once amplifies rounding by as much.
    scale = (1 + sigma / alpha + alpha / sigma) * (1 + 1 / sigma)
    assert bool(((got - truth[target]).abs() <= 1e-13 * scale).all())
    back = convert(got, target, source, x_t, level)
    assert bool(((back - truth[source]).abs() <= 1e-12 * scale**2).all())


def test_convert_takes_levels_of_plain_numbers():
    x0, eps = pair()
    level = Level(0.5, 0.6, 0.8)
    x_t = noised(x0, eps, level)
    assert torch.allclose(convert(eps, "eps", "v", x_t, level), 0.6 * eps - 0.8 * x0, rtol=1e-12)
    assert convert(x0, "x0", "x0", x_t, level) is x0


@pytest.mark.parametrize(
    ("source", "target", "level", "message"),
    [
        ("x0", "eps", Level(0.0, 1.0, 0.0), "eps is not determined"),
        ("x0", "v", Level(0.0, 1.0, 0.0), "eps is not determined"),
        ("eps", "score", Level(0.0, 1.0, 0.0), "score is not defined"),
        ("score", "x0", Level(0.0, 1.0, 0.0), "score is not defined"),
        ("eps", "x0", Level(1.0, 0.0, 1.0), "x0 is not determined"),
        ("eps", "v", Level(1.0, 0.0, 1.0), "x0 is not determined"),
        ("score", "x0", Level(1.0, 0.0, 1.0), "x0 is not determined"),
    ],
)
def test_undetermined_conversions_are_refused(source, target, level, message):
    x = torch.ones(2, 3)
    batch = Level(*(torch.full((2,), value, dtype=torch.float64) for value in level))
    for at in (level, batch):
        with pytest.raises(ValueError, match=message):
            convert(x, source, target, x, at)


def test_v_is_determined_at_both_ends():
    x0, eps = pair()
    for level in (Level(0.0, 1.0, 0.0), Level(1.0, 0.0, 1.0)):
        x_t = noised(x0, eps, level)
        v = level.alpha * eps - level.sigma * x0
        assert torch.equal(convert(v, "v", "x0", x_t, level), x0)
        assert torch.equal(convert(v, "v", "eps", x_t, level), eps)


@every_schedule
def test_velocity_is_the_derivative_of_the_path(schedule):
    x0, eps = pair(event=(3,))
    t = (torch.arange(9, dtype=torch.float64) + 50.5) / 1000
    h = 1e-4
    slope = (noised(x0, eps, schedule.level(t + h)) - noised(x0, eps, schedule.level(t - h))) / (2 * h)
    got = velocity(x0, eps, schedule.alpha_dot(t), schedule.sigma_dot(t))
    assert torch.allclose(got, slope, rtol=1e-4, atol=1e-5)


@every_schedule
@every_parametrization
def test_the_denoiser_fed_with_the_target_gives_the_data(schedule, parametrization):
    if parametrization.kind == "eps" and float(schedule.alpha(1.0)) == 0:
        pytest.skip("refused: see below")
    x0, eps = pair()
    for t in (times(schedule), *times(schedule)[[0, 4, 8]]):
        level = schedule.level(t)
        if t.ndim == 0:
            level = Level(*(float(value) for value in level))
        denoiser = NetworkDenoiser(Answers(None), schedule, parametrization)
        denoiser.network.answer = denoiser.target(x0, eps, level)
        got = denoiser(noised(x0, eps, level), level)
        assert got.dtype == torch.float64
        worst = float(torch.as_tensor(1 + level.sigma / level.alpha).max())
        assert torch.allclose(got, x0, rtol=0, atol=1e-13 * worst)


@every_schedule
@every_parametrization
def test_target_is_the_inverse_of_denoise_in_the_output_too(schedule, parametrization):
    # F -> x0 -> eps -> F: every output F is the target of the pair that it denotes.
    if parametrization.kind == "eps" and float(schedule.alpha(1.0)) == 0:
        pytest.skip("refused: see below")
    x_t, output = pair()
    level = schedule.level(torch.linspace(0.2, 0.9, 9, dtype=torch.float64))
    denoiser = NetworkDenoiser(Answers(output), schedule, parametrization)
    x0 = denoiser(x_t, level)
    eps = convert(x0, "x0", "eps", x_t, level)
    assert torch.allclose(denoiser.target(x0, eps, level), output, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_is_karras_table_1(sigma_data):
    sigma = torch.logspace(-3, 2, 20, dtype=torch.float64)
    level = Level(torch.zeros(20, dtype=torch.float64), torch.ones(20, dtype=torch.float64), sigma)
    c = EDMParametrization(sigma_data=sigma_data).coefficients(level)
    total = sigma**2 + sigma_data**2
    assert torch.allclose(c.c_skip, sigma_data**2 / total, rtol=1e-14)
    assert torch.allclose(c.c_out, sigma * sigma_data / total.sqrt(), rtol=1e-14)
    assert torch.allclose(c.c_in, 1 / total.sqrt(), rtol=1e-14)
    x0, eps = torch.randn(2, 20, dtype=torch.float64).unbind(0)
    effective_target = (x0 - c.c_skip * (x0 + sigma * eps)) / c.c_out
    assert torch.allclose(c.target_x0 * x0 + c.target_eps * eps, effective_target, rtol=1e-6, atol=1e-9)


def test_edm_is_minus_v_where_variance_is_preserved_and_the_data_has_unit_variance():
    for schedule in (LinearSchedule(), TrigSchedule()):
        level = schedule.level(torch.linspace(0, 1, 33, dtype=torch.float64))
        edm = EDMParametrization(sigma_data=1.0).coefficients(level)
        v = VParametrization().coefficients(level)
        one = torch.ones_like(level.alpha)
        assert torch.allclose(edm.c_in, one, rtol=1e-12)
        assert torch.allclose(edm.c_skip, v.c_skip, rtol=1e-12)
        for field in ("c_out", "target_x0", "target_eps"):
            assert torch.allclose(getattr(edm, field), -getattr(v, field), rtol=1e-12)


@every_schedule
@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_edm_input_and_target_have_unit_variance(schedule, sigma_data):
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 40_000, generator=generator, dtype=torch.float64).unbind(0)
    for t in (0.02, 0.3, 0.7, 1.0):
        level = Level(*(float(value) for value in schedule.level(t)))
        denoiser = NetworkDenoiser(Answers(x0), schedule, EDMParametrization(sigma_data=sigma_data))
        denoiser.output(noised(sigma_data * x0, eps, level), level)
        for value in (denoiser.network.x, denoiser.target(sigma_data * x0, eps, level)):
            assert value.var().item() == pytest.approx(1, abs=0.03)
        # In closed form: no Monte Carlo error.
        c = EDMParametrization(sigma_data=sigma_data).coefficients(level)
        assert c.c_in**2 * ((level.alpha * sigma_data) ** 2 + level.sigma**2) == pytest.approx(1, rel=1e-12)
        assert (c.target_x0 * sigma_data) ** 2 + c.target_eps**2 == pytest.approx(1, rel=1e-12)


def test_edm_target_keeps_its_digits_at_small_noise():
    tiny = Level(0.0, 1.0, 1e-9)
    c = EDMParametrization().coefficients(tiny)
    assert c.target_x0 == pytest.approx(1e-9 / 0.25, rel=1e-12)
    assert c.target_eps == pytest.approx(-1, rel=1e-12)
    clean = EDMParametrization().coefficients(Level(0.0, 1.0, 0.0))
    assert (clean.c_skip, clean.c_out) == (1.0, 0.0)


@pytest.mark.parametrize("schedule", [TrigSchedule(), StraightSchedule()], ids=lambda s: s.kind)
def test_eps_needs_data_at_the_loudest_level(schedule):
    with pytest.raises(UserError, match=f"'eps' cannot recover x0 at t = 1.*'{schedule.kind}'.*use v, x0 or edm"):
        NetworkDenoiser(Answers(None), schedule, EpsParametrization())
    for good in PARAMETRIZATION[1:]:
        NetworkDenoiser(Answers(None), schedule, good)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "edm", "sigma_data": 0}, "sigma_data.*greater than 0"),
        ({"kind": "epss"}, "did you mean 'eps'"),
        ({"kind": "eps", "sigma_data": 1}, "sigma_data: unknown field"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        PARAMETRIZATIONS.parse(values)


def test_the_network_sees_scaled_data_labels_and_the_condition():
    schedule = VarianceExploding()
    x_t = torch.randn(4, 3)
    network = Answers(torch.zeros(4, 3))
    denoiser = NetworkDenoiser(network, schedule, EDMParametrization(sigma_data=0.5))
    level = schedule.level(torch.tensor([0.1, 0.4, 0.7, 1.0]))
    condition = torch.arange(4)
    assert torch.allclose(denoiser(x_t, level, condition), x_t * (0.25 / (0.25 + level.sigma**2)).float()[:, None])
    assert torch.allclose(network.x, x_t / (0.25 + level.sigma**2).sqrt().float()[:, None])
    assert torch.allclose(network.label, 25 * level.sigma.log().float())
    assert network.label.dtype == torch.float32
    assert network.condition is condition
    number = Level(*(float(value) for value in schedule.level(0.4)))
    denoiser(x_t, number)
    assert network.label.shape == (4,)
    assert network.label[0].item() == pytest.approx(25 * math.log(number.sigma), rel=1e-6)


def test_an_eps_network_is_fed_and_compared_without_copies():
    denoiser = NetworkDenoiser(Answers(torch.zeros(2, 3)), LinearSchedule(), EpsParametrization())
    x, eps = torch.randn(2, 3), torch.randn(2, 3)
    level = LinearSchedule().level(torch.tensor([0.5, 1.0]))
    denoiser.output(x, level)
    assert denoiser.network.x is x
    assert denoiser.target(x, eps, level) is eps


def test_clipped_keeps_the_estimate_in_range_and_the_input_as_it_was():
    x = torch.tensor([[-3.0, 0.5, 3.0]])
    clipped = Conditioned(lambda x_t, level, condition=None: x_t, limits=(-1.0, 1.0))  # noqa: ARG005
    assert torch.equal(clipped(x, Level(0.5, 0.8, 0.6)), torch.tensor([[-1.0, 0.5, 1.0]]))
    assert x[0, 0] == -3

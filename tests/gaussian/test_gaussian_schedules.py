import math
import pickle

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.gaussian import SCHEDULES
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import (
    CosineSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    StraightSchedule,
    TrigSchedule,
    VarianceExploding,
    VPSchedule,
)

EVERY = [
    LinearSchedule(),
    LinearSchedule(num_steps=100),
    ScaledLinearSchedule(),
    ScaledLinearSchedule(num_steps=50),
    CosineSchedule(),
    CosineSchedule(num_steps=4000),
    VPSchedule(),
    VPSchedule(beta_min=20.0, beta_max=20.0),
    VarianceExploding(),
    VarianceExploding(sigma_min=0.1, sigma_max=3.0, rho=1.0),
    TrigSchedule(),
    StraightSchedule(),
]
every_schedule = pytest.mark.parametrize("schedule", EVERY, ids=lambda s: f"{s.kind}-{s.native_steps or ''}")


def test_every_registered_schedule_is_tested_here():
    assert {schedule.kind for schedule in EVERY} == set(SCHEDULES.entries)
    for kind in SCHEDULES.entries:
        assert SCHEDULES.parse(kind).kind == kind


@pytest.mark.parametrize("num_steps", [1000, 4000, 100, 21])
def test_linear_endpoints_scale_with_the_number_of_steps(num_steps):
    betas = LinearSchedule(num_steps=num_steps).betas
    assert betas.shape == (num_steps,)
    assert betas.dtype == torch.float64
    assert betas[0].item() == pytest.approx(1e-4 * 1000 / num_steps, rel=1e-14)
    assert betas[-1].item() == pytest.approx(0.02 * 1000 / num_steps, rel=1e-14)
    assert betas.diff().min().item() == pytest.approx(betas.diff().max().item(), rel=1e-9)


@pytest.mark.parametrize("num_steps", [1000, 50])
def test_roots_of_scaled_linear_betas_rise_evenly(num_steps):
    roots = ScaledLinearSchedule(num_steps=num_steps).betas.sqrt()
    assert (roots[0] ** 2).item() == pytest.approx(0.00085 * 1000 / num_steps, rel=1e-14)
    assert (roots[-1] ** 2).item() == pytest.approx(0.012 * 1000 / num_steps, rel=1e-14)
    assert roots.diff().min().item() == pytest.approx(roots.diff().max().item(), rel=1e-9)


def test_linear_ends_almost_at_pure_noise():
    assert LinearSchedule().alpha(1.0).item() ** 2 == pytest.approx(4.04e-5, rel=2e-3)
    assert LinearSchedule(num_steps=100).alpha(1.0).item() ** 2 == pytest.approx(2.1e-5, rel=0.05)
    short_chain = LinearSchedule(num_steps=100, beta_start=4e-5, beta_end=0.018)
    assert short_chain.alpha(1.0).item() ** 2 == pytest.approx(6.6e-5, rel=0.02)


def test_vp_is_the_limit_of_linear_betas():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    fine = LinearSchedule(num_steps=100_000)
    assert torch.allclose(VPSchedule().alpha(t), fine.alpha(t), rtol=2e-3)
    assert float(VPSchedule().alpha(1.0)) == pytest.approx(math.exp(-10.05 / 2))


@pytest.mark.parametrize("num_steps", [1000, 4000])
def test_cosine_equals_its_formula_and_clips_one_beta(num_steps):
    def f(k):
        return math.cos((k / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = CosineSchedule(num_steps=num_steps)
    assert int((schedule.betas == 0.999).sum()) == 1
    assert schedule.betas[-1] == 0.999
    abar = (1 - schedule.betas).cumprod(0)
    want = torch.tensor([f(k) / f(0) for k in range(1, num_steps)], dtype=torch.float64)
    # Relative to abar the last values are small differences of cosines: their own rounding is 1e-16 / abar.
    assert torch.allclose(abar[:-1], want, rtol=1e-9, atol=1e-15)
    k = torch.arange(1, num_steps, dtype=torch.float64)
    assert torch.allclose(schedule.alpha(k / num_steps) ** 2, want, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("schedule", [s for s in EVERY if s.native_steps], ids=lambda s: f"{s.kind}-{s.native_steps}")
def test_tables_equal_the_products_of_the_betas_on_the_grid(schedule):
    T = schedule.native_steps
    abar = torch.tensor([1.0], dtype=torch.float64)
    abar = torch.cat([abar, (1 - schedule.betas).cumprod(0)])
    t = torch.tensor([k / T for k in range(T + 1)], dtype=torch.float64)
    assert torch.allclose(schedule.alpha(t), abar.sqrt(), rtol=1e-11, atol=0)
    assert torch.allclose(schedule.sigma(t), (1 - abar).sqrt(), rtol=1e-9, atol=0)
    assert schedule.sigma(1 / T).item() ** 2 == pytest.approx(schedule.betas[0].item(), rel=1e-12)
    ratio = (schedule.alpha(t[1:]) / schedule.alpha(t[:-1])) ** 2
    assert torch.allclose(1 - ratio, schedule.betas, rtol=1e-9, atol=0)


@every_schedule
def test_ends(schedule):
    assert schedule.alpha(0.0) == 1
    assert schedule.sigma(0.0).item() == pytest.approx(getattr(schedule, "sigma_min", 0.0), rel=1e-12)
    foreign = schedule.kind == "scaled-linear"  # known for what it leaves of the data at its end
    assert schedule.sigma(1.0).item() == pytest.approx(schedule.prior_std, rel=3e-3 if foreign else 1e-4)
    if schedule.kind in ("straight", "trig"):
        assert schedule.alpha(1.0) == 0
    # Sampling starts from noise alone: what is left of the data must not show.
    assert schedule.alpha(1.0) / schedule.sigma(1.0) < (0.5 if schedule.kind == "ve" else 0.07 if foreign else 0.01)


@every_schedule
def test_derivatives_match_central_differences(schedule):
    T = schedule.native_steps
    if T:
        # In the middle between two table entries: the table has a kink at each.
        t = (torch.arange(T, dtype=torch.float64)[:: max(1, T // 50)] + 0.5) / T
        h = 0.2 / T
    else:
        t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
        h = 1e-4
    for value, derivative in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        slope = (8 * (value(t + h / 2) - value(t - h / 2)) - (value(t + h) - value(t - h))) / (6 * h)
        assert derivative(t).shape == t.shape
        assert torch.allclose(derivative(t), slope, rtol=2e-3 if T else 1e-9, atol=1e-9)


@every_schedule
def test_derivatives_match_autograd(schedule):
    T = schedule.native_steps or 64
    t = ((torch.arange(T, dtype=torch.float64) + 0.37) / T).requires_grad_()
    for value, derivative in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        y = value(t)
        slope = torch.autograd.grad(y.sum(), t)[0] if y.requires_grad else torch.zeros_like(t)
        assert torch.allclose(derivative(t), slope, rtol=1e-9, atol=1e-12)


@every_schedule
def test_log_snr_decreases_strictly_and_time_of_inverts_it(schedule):
    t = torch.linspace(1e-4, 1 - 1e-4, 1234, dtype=torch.float64)
    log_snr = schedule.log_snr(t)
    assert torch.allclose(log_snr, (schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2).log(), rtol=1e-9, atol=1e-9)
    assert bool((log_snr.diff() < 0).all())
    assert torch.allclose(schedule.time_of(log_snr), t, rtol=0, atol=1e-9)
    assert schedule.time_of(float(log_snr[7])).item() == pytest.approx(t[7].item(), abs=1e-9)
    assert schedule.time_of(math.inf) == 0
    assert schedule.time_of(-math.inf) == 1


@pytest.mark.parametrize("num_steps", [2, 5, 18])
def test_ve_grid_is_edm_eq_5(num_steps):
    schedule = VarianceExploding()
    i = torch.arange(num_steps, dtype=torch.float64)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    want = (high + i / (num_steps - 1) * (low - high)) ** 7
    levels = TimeGrid.of(schedule, num_steps).levels
    assert torch.allclose(torch.tensor([level.sigma for level in levels[:-1]], dtype=torch.float64), want, rtol=1e-12)
    assert all(level.alpha == 1 for level in levels)
    assert schedule.prior_std == 80


def test_labels_are_on_the_scale_of_the_embedding():
    assert LinearSchedule().label(LinearSchedule().level(0.001)).item() == pytest.approx(0, abs=1e-12)
    assert LinearSchedule().label(LinearSchedule().level(1.0)).item() == pytest.approx(999)
    quarter = CosineSchedule(num_steps=4000)
    assert quarter.label(quarter.level(7 / 4000)).item() == pytest.approx(6 / 4)
    assert TrigSchedule().label(TrigSchedule().level(0.25)).item() == 250
    for sigma in (0.002, 1.0, 80.0):
        ve = VarianceExploding()
        level = ve.level(ve.time_of(-2 * math.log(sigma)))
        assert ve.label(level).item() == pytest.approx(100 * math.log(sigma) / 4, abs=1e-9)
        assert ve.label(type(level)(*(float(x) for x in level))) == pytest.approx(25 * math.log(sigma), abs=1e-9)


@every_schedule
def test_values_are_float64_on_the_cpu_in_the_shape_of_t(schedule):
    for t in (0.3, torch.tensor(0.3), torch.rand(5), torch.rand(2, 3, dtype=torch.float32)):
        for function in (schedule.alpha, schedule.sigma, schedule.alpha_dot, schedule.sigma_dot, schedule.log_snr):
            assert function(t).dtype == torch.float64
            assert function(t).shape == torch.as_tensor(t).shape


@every_schedule
@pytest.mark.parametrize("t", [-1e-9, 1.0001, math.nan, math.inf])
def test_times_outside_the_process_are_refused(schedule, t):
    for function in (schedule.alpha, schedule.sigma, schedule.alpha_dot, schedule.sigma_dot, schedule.level):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            function(torch.tensor([0.5, t]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "linear", "num_steps": 0}, "num_steps.*greater than or equal to 1"),
        ({"kind": "cosine", "num_steps": -5}, "num_steps.*greater than or equal to 1"),
        ({"kind": "linear", "num_steps": 10}, r"beta_6 = 1\.1\d+ is outside \(0, 1\)"),
        ({"kind": "linear", "beta_end": 1.5}, "beta_end.*less than 1"),
        ({"kind": "linear", "beta_start": 0}, "beta_start.*greater than 0"),
        ({"kind": "linear", "num_step": 10}, "num_step: unknown field; did you mean 'num_steps'"),
        ({"kind": "linar"}, "unknown schedule 'linar'; did you mean 'linear'"),
        ({"kind": "ve", "sigma_min": 2.0, "sigma_max": 2.0}, "sigma_min 2.0 must be below sigma_max 2.0"),
        ({"kind": "ve", "sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min 3.0 must be below sigma_max 2.0"),
        ({"kind": "ve", "sigma_max": math.nan}, "sigma_max"),
        ({"num_steps": 10}, "kind: missing"),
    ],
)
def test_refused_with_the_field_and_the_reason(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SCHEDULES.parse(values)
    assert isinstance(caught.value, UserError)


def test_one_step_is_a_schedule():
    schedule = LinearSchedule(num_steps=1, beta_start=1e-4, beta_end=2e-4)
    assert schedule.alpha(1.0).item() ** 2 == pytest.approx(0.9)


@every_schedule
def test_used_schedules_compare_copy_and_pickle(schedule):
    other = SCHEDULES.parse(schedule.to_json())
    schedule.level(0.5), other.level(0.5)
    assert schedule == other
    assert hash(schedule) == hash(other)
    assert schedule != LinearSchedule(num_steps=77)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert SCHEDULES.parse(schedule) is schedule


def test_a_changed_copy_has_its_own_table():
    first = LinearSchedule(num_steps=50)
    first.level(1.0)
    second = first.model_copy(update={"beta_end": 0.01})
    assert second.alpha(1.0) > first.alpha(1.0)
    assert first.replace(beta_end=0.01).alpha(1.0) == second.alpha(1.0)


def test_a_table_made_while_sampling_serves_training():
    with torch.inference_mode():
        schedule = LinearSchedule(num_steps=123)
        schedule.level(0.5)
    t = torch.tensor([0.51234], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(schedule.sigma(t).sum(), t)[0]
    assert torch.allclose(slope, schedule.sigma_dot(t.detach()))

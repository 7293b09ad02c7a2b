import itertools
import math
from decimal import Decimal, getcontext

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.discrete import SURVIVALS
from osmose.discrete.death import (
    CosineSurvival,
    LogitSurvival,
    binomial_matrix,
    end_for,
    loss_odds,
    mean_surprise,
    regained,
    step_matrix,
    steps,
    survival,
)
from osmose.discrete.markov import Death
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws

KINDS = ["bridge", "bridge-round", "tau-leap", "binomial"]
SCHEDULES = [LogitSurvival(), LogitSurvival(t_end=15, num_steps=50), CosineSurvival(), CosineSurvival(t_end=3)]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind}-{s.t_end:g}")


def law_of(most, **chances):
    law = torch.zeros(most + 1, dtype=torch.float64)
    for count, chance in chances.items():
        law[int(count[1:])] = chance
    return law / law.sum()


#: Laws of one value and the end of the schedule, as in the table of the method's card.
LAWS = {
    "bernoulli .3": (law_of(1, n0=0.7, n1=0.3), 10),
    "bernoulli .6": (law_of(1, n0=0.4, n1=0.6), 10),
    "bimodal": (law_of(16, n0=0.5, n14=0.1, n15=0.15, n16=0.25), 8),
    "uniform": (torch.full((17,), 1 / 17, dtype=torch.float64), 8),
}
LAW = law_of(6, n0=0.2, n1=0.05, n2=0.3, n3=0.1, n5=0.05, n6=0.3)


def counts(most):
    return torch.arange(most + 1, dtype=torch.float64)


def binomial(n, p):
    """[P(Binomial(n, p) = m) for m in 0..n]."""
    return [math.comb(n, m) * p**m * (1 - p) ** (n - m) for m in range(n + 1)]


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def oracle(law, p):
    """E[n0 - n | n] at each n, (..., most + 1), by Bayes' rule; 0 where n cannot be."""
    joint = binomial_matrix(len(law) - 1, p) * law  # [..., n, n0]
    missing = counts(len(law) - 1) - counts(len(law) - 1)[:, None]
    whole = joint.sum(-1)
    return torch.where(whole > 0, (joint * missing).sum(-1) / whole, 0.0)


def generated(kind, law, t_end, num_steps, mean=None):
    """The law of what a chain of so many steps ends in, without any randomness."""
    most, schedule = len(law) - 1, LogitSurvival(t_end=t_end, num_steps=num_steps)
    u = schedule.log_odds(schedule.grid())
    y = oracle(law, survival(u)) if mean is None else mean(survival(u))
    now = torch.zeros(most + 1, dtype=torch.float64)
    now[0] = 1
    for k in reversed(range(num_steps)):
        r = float(regained(u[k - 1], u[k])) if k else 1.0
        now = step_matrix(kind, y[k], r, most) @ now
    return now


def total_variation(a, b):
    return float((a - b).abs().sum() / 2)


# --- the process ----------------------------------------------------------------------------------------------------


def test_the_matrix_is_binomial():
    for p in (0.0, 1e-9, 0.3, 1 - 1e-9, 1.0):
        table = binomial_matrix(9, p)
        for n in range(10):
            close(table[: n + 1, n], binomial(n, p), 1e-11)
            assert bool((table[n + 1 :, n] == 0).all())
    many = binomial_matrix(4, torch.tensor([[0.2, 0.7]]))
    assert many.shape == (1, 2, 5, 5)
    assert torch.allclose(many[0, 1], binomial_matrix(4, 0.7), atol=1e-7)  # 0.7 was float32
    close(binomial_matrix(255, 0.37).sum(0), torch.ones(256, dtype=torch.float64), 1e-11)


@pytest.mark.parametrize(("p_s", "p_t"), [(0.9, 0.2), (0.5, 0.49), (1.0, 0.3), (0.7, 1e-6)])
def test_deaths_compose(p_s, p_t):
    close(binomial_matrix(12, p_t / p_s) @ binomial_matrix(12, p_s), binomial_matrix(12, p_t))


def test_it_is_the_chain_of_deaths():
    for tau in (0.1, 1.3):
        close(Death().chain(8).transition(tau), binomial_matrix(7, math.exp(-tau)))


@pytest.mark.parametrize(("s", "t"), [(0.2, 1.5), (0.0, 0.4), (1.0, 1.01)])
def test_the_bridge_is_binomial(s, t):
    most, p_s, p_t = 6, math.exp(-s), math.exp(-t)
    bridge, r = Death().chain(most + 1).bridge(s, t), (p_s - p_t) / (1 - p_t)
    for n0, n_t in itertools.product(range(most + 1), repeat=2):
        want = torch.zeros(most + 1, dtype=torch.float64)
        if n_t <= n0:
            want[n_t : n0 + 1] = torch.tensor(binomial(n0 - n_t, r), dtype=torch.float64)
        close(bridge[n0, n_t], want)
    u_s = torch.tensor(math.inf if s == 0 else math.log(p_s / (1 - p_s)))
    assert regained(u_s, torch.tensor(math.log(p_t / (1 - p_t)), dtype=torch.float64)).item() == pytest.approx(
        r, rel=1e-6 if s else 1e-12
    )


@pytest.mark.parametrize("p", [1e-3, 0.2, 0.9, 0.999])
def test_the_rate_back_is_the_missing_units_times_the_odds(p):
    at, y = binomial_matrix(6, p) @ LAW, oracle(LAW, p)
    rates = (counts(6)[:-1] + 1) * at[1:] / at[:-1]
    close(rates, (p / (1 - p) * y)[:-1])
    # It is the rate of the general machinery.
    close(Death().chain(7).reverse_rates(LAW, -math.log(p)).diagonal(-1), rates, 1e-9)


def test_the_limits():
    y = oracle(LAW, 1 - 1e-9)
    held = LAW > 0
    assert float(y[held].max()) < 1e-7  # nothing is missing near the data
    close(oracle(LAW, 1e-12)[:1], [float(counts(6) @ LAW)], 1e-9)  # at black nothing is known but the mean
    assert bool((oracle(LAW, 0.4) <= 6 - counts(6)).all())


@pytest.mark.parametrize("p", [1e-4, 0.3, 0.95])
def test_closed_forms_of_what_is_missing(p):
    b = 0.3
    assert oracle(LAWS["bernoulli .3"][0], p)[0].item() == pytest.approx(b * (1 - p) / (1 - b * p), rel=1e-12)
    y = oracle(torch.tensor(binomial(9, b), dtype=torch.float64), p)
    close(y, (9 - counts(9)) * b * (1 - p) / (1 - b * p))
    rate, most = 2.0, 60
    poisson = (counts(most) * math.log(rate) - rate - torch.lgamma(counts(most) + 1)).exp()
    close(oracle(poisson, p)[:20], [rate * (1 - p)] * 20, 1e-9)


# --- digits where 1 - p is small ------------------------------------------------------------------------------------


def test_what_is_lost_keeps_its_digits_near_the_data():
    getcontext().prec = 50

    def lost(u):
        return 1 / (1 + Decimal(u).exp())

    naive = []
    for u_s, u_t in [(30.0, 29.5), (20.0, 18.0), (12.0, 11.99), (3.0, -2.0), (-8.0, -8.1), (-30.0, -30.5)]:
        q_s, q_t = lost(u_s), lost(u_t)
        r = (q_t - q_s) / q_t
        u = torch.tensor([u_s, u_t], dtype=torch.float64)
        assert loss_odds(u)[0].item() == pytest.approx(float(q_s), rel=1e-13)
        assert survival(u)[1].item() == pytest.approx(float(1 - q_t), rel=1e-13)
        assert regained(u[0], u[1]).item() == pytest.approx(float(r), rel=1e-12)
        p = survival(u)
        naive.append(abs(float((p[0] - p[1]) / (1 - p[1])) / float(r) - 1))
    assert max(naive) > 1e-5  # from p it would not have


def test_all_of_it_is_regained_at_the_data():
    u = torch.tensor([-9.0, 0.0, 9.0])
    for value in (regained(torch.full((3,), math.inf), u), regained(torch.tensor(math.inf), u)):
        close(value, [1.0, 1.0, 1.0], 1e-15)
    close(regained(u, u), [0.0, 0.0, 0.0])
    assert regained(u, u - 1).dtype == loss_odds(u).dtype == survival(u).dtype == torch.float64


# --- schedules ------------------------------------------------------------------------------------------------------


@every_schedule
def test_a_schedule_goes_from_end_to_end(schedule):
    u = schedule.log_odds(torch.tensor([0.0, 1.0], dtype=torch.float64))
    for got in (-survival(u)[1].log(), -loss_odds(u)[0].log()):
        assert got.item() == pytest.approx(schedule.t_end, rel=1e-7)
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    u = schedule.log_odds(s)
    assert u.dtype == torch.float64
    assert bool((u.diff() < 0).all())
    close(u, -u.flip(0), 1e-6)


@every_schedule
def test_position_inverts_and_slope_is_the_derivative(schedule):
    s = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    u = schedule.log_odds(s)
    close(schedule.position(u), s.detach(), 1e-9)
    (gradient,) = torch.autograd.grad(u.sum(), s)
    close(schedule.slope(s).detach(), -gradient, 1e-9)
    assert bool((schedule.slope(s) > 0).all())
    # Beyond the ends it stays at the ends.
    close(schedule.position(torch.tensor([99.0, -99.0])), [0.0, 1.0])


def test_the_two_schedules_are_what_they_are_called():
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    logit = LogitSurvival(t_end=8).log_odds(s)
    close(logit.diff(), [float(logit[1] - logit[0])] * 10, 1e-10)
    assert logit[0].item() == pytest.approx(math.log((1 - math.exp(-8)) / math.exp(-8)), rel=1e-12)
    angle = survival(CosineSurvival(t_end=8).log_odds(s)).sqrt().acos()
    close(angle.diff(), [float(angle[1] - angle[0])] * 10, 1e-7)
    assert {SURVIVALS.parse(kind).kind for kind in SURVIVALS.entries} == {"logit", "cosine"}


@pytest.mark.parametrize("num_steps", [2, 3, 50, 1000])
def test_the_grid_has_both_ends_and_every_time_once(num_steps):
    schedule = LogitSurvival(num_steps=num_steps)
    whole = schedule.grid()
    close(whole, torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1))
    for count in {2, 3, 7, 49, num_steps // 2, num_steps - 1, num_steps} - {0, 1}:
        if count > num_steps:
            continue
        grid = schedule.grid(count)
        assert grid.dtype == torch.float64
        assert (len(grid), float(grid[0]), float(grid[-1])) == (count, 0.0, 1.0)
        assert bool((grid.diff() > 0).all())
        assert bool(torch.isin(grid, whole).all())
        assert float(grid.diff().max() - grid.diff().min()) <= 1.001 / (num_steps - 1)
    assert schedule.grid(1).tolist() == [1.0]
    with pytest.raises(UserError, match=f"num_steps: {num_steps + 1} is more than the {num_steps} times of the grid"):
        schedule.grid(num_steps + 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"t_end": 0.5}, "t_end: 0.5"), ({"t_end": 31}, "t_end: 31"), ({"num_steps": 1}, "num_steps: 1 is not valid")],
)
def test_a_schedule_without_extent_is_refused(values, message):
    for cls in (LogitSurvival, CosineSurvival):
        with pytest.raises(ConfigError, match=message):
            cls.parse(values)


def test_the_end_leaves_a_tenth_of_a_unit():
    assert 312.6 * math.exp(-end_for(312.6)) == pytest.approx(0.1)
    assert end_for(312.6) == pytest.approx(8.05, abs=0.01)
    assert end_for(0.0) == end_for(2.0) == 5


# --- the surprise ---------------------------------------------------------------------------------------------------


def test_the_surprise_in_numbers():
    y, d = torch.tensor([2.0, 2.0, 0.5, 3.0, 0.0]), torch.tensor([3.0, 0.0, 1.0, 3.0, 0.0])
    want = [2 - 3 + 3 * math.log(1.5), 2.0, 0.5 - 1 + math.log(2), 0.0, 0.0]
    torch.testing.assert_close(mean_surprise(y, d), torch.tensor(want))


def test_the_surprise_is_least_at_the_mean_and_its_gradient_is_finite():
    d, chance = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    for y, sign in ((1.7, 0), (1.6, -1), (1.8, 1)):
        value = torch.full((3,), y, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad((chance * mean_surprise(value, d)).sum(), value)
        assert float(gradient.sum()) == pytest.approx(0, abs=1e-12) if sign == 0 else sign * float(gradient.sum()) > 0
    y = torch.tensor([0.0, 1e-30], requires_grad=True)
    (gradient,) = torch.autograd.grad(mean_surprise(y, torch.tensor([0.0, 0.0])).sum(), y)
    assert gradient.tolist() == [1.0, 1.0]


def test_a_surprise_beyond_all_bounds_is_still_a_number():
    # What softplus gives of -110 in float32, where 16 units come.
    assert bool(mean_surprise(torch.tensor([0.0]), torch.tensor([16.0])).isfinite().all())


@pytest.mark.parametrize(("name", "entropy"), [("bernoulli .3", 0.610864), ("uniform", 2.833213)])
def test_the_surprise_of_an_oracle_adds_up_to_the_entropy(name, entropy):
    # int du p E[y - d + d log(d / y)] over u = logit p; the trapezoidal rule, with tails below 1e-6.
    law, most = LAWS[name][0], len(LAWS[name][0]) - 1
    assert float(-(law * law.log()).sum()) == pytest.approx(entropy, abs=1e-6)
    u = torch.linspace(-18, 22, 401, dtype=torch.float64)
    y = oracle(law, survival(u))
    d = (counts(most) - counts(most)[:, None]).clamp(min=0)  # [n, n0]
    joint = binomial_matrix(most, survival(u)) * law

    def integral(y):
        surprise = mean_surprise(y[:, :, None].expand(joint.shape), d.expand(joint.shape))
        return float(torch.trapezoid((joint * surprise).sum((1, 2)) * survival(u), u))

    assert integral(y) == pytest.approx(entropy, abs=1e-5)
    # Any other model costs more: it is an upper bound.
    assert integral(1.3 * y) > entropy + 0.01
    assert integral(y / 1.3) > entropy + 0.005


# --- steps back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [0.0, 0.02, 0.45, 1.0])
def test_the_law_of_a_step(kind, r):
    most, size = 6, 3000
    y = torch.tensor([2.6, 0.0, 3.5, 1.2, 9.0, 0.3, 0.7], dtype=torch.float64)  # some more than is left
    law = step_matrix(kind, y, r, most)
    close(law.sum(0), torch.ones(most + 1))
    assert bool((law >= 0).all())
    assert bool((law.triu(1) == 0).all())  # counts only grow
    n = torch.arange(most + 1).expand(size, -1)
    got = steps[kind](n, y.float().expand(size, -1), r, most, SampleDraws(4, 0, size))
    assert got.dtype == torch.int64
    assert bool(((got >= n) & (got <= most)).all())
    seen = torch.stack([(got == m).sum(0) for m in range(most + 1)]).double()
    want = law * size
    assert bool((seen[want == 0] == 0).all())
    for column in range(most + 1):
        held = want[:, column] > 4
        chi_square = ((seen - want).square() / want)[held, column].sum()
        assert chi_square < 24  # at most 6 degrees of freedom; 112 columns in all, p = 5e-4


@pytest.mark.parametrize("kind", ["bridge", "tau-leap", "binomial"])
def test_a_step_gives_the_mean_back(kind):
    law, most, r = LAWS["uniform"][0], 16, 0.1
    y = oracle(law, 0.4)
    gained = counts(most) @ step_matrix(kind, y, r, most) - counts(most)
    held = slice(0, 8) if kind == "tau-leap" else slice(None)  # near the largest count a leap is cut off
    close(gained[held], (r * y)[held], 1e-4 if kind == "tau-leap" else 1e-10)


def test_rounding_is_to_the_nearest_and_keeps_what_it_rounds_off():
    y = torch.tensor([0.3, 0.0])
    close(step_matrix("bridge-round", y, 1.0, 1), [[1.0, 0.0], [0.0, 1.0]])
    close(step_matrix("bridge", y.double(), 1.0, 1), [[1 - float(y[0]), 0.0], [float(y[0]), 1.0]])
    close(step_matrix("bridge-round", torch.tensor([0.7, 0.0]), 0.25, 1)[:, 0], [0.75, 0.25])


#: Total variation with T = 1000, 100, 20 and 5 as the card has it, measured by its author with a program of his own.
TABLE = {
    ("bernoulli .3", "tau-leap"): (0.0002, 0.0015, 0.0075, 0.021),
    ("bernoulli .3", "bridge"): (0, 0, 0, 0),
    ("bernoulli .3", "bridge-round"): (0.30, 0.30, 0.30, 0.30),
    ("bernoulli .6", "tau-leap"): (0.0006, 0.0056, 0.028, 0.080),
    ("bernoulli .6", "bridge"): (0, 0, 0, 0),
    ("bernoulli .6", "bridge-round"): (0.27, 0.22, 0.23, 0.10),
    ("bimodal", "tau-leap"): (0.001, 0.023, 0.13, 0.47),
    ("bimodal", "bridge"): (0.001, 0.025, 0.14, 0.49),
    ("bimodal", "bridge-round"): (0.09, 0.10, 0.16, 0.73),
    ("uniform", "tau-leap"): (0.001, 0.012, 0.061, 0.21),
    ("uniform", "bridge"): (0.002, 0.022, 0.11, 0.41),
    ("uniform", "bridge-round"): (0.034, 0.056, 0.16, 0.50),
}


@pytest.mark.parametrize(("name", "kind"), TABLE, ids=lambda value: value)
def test_the_errors_of_samplers_are_those_of_the_card(name, kind):
    law, t_end = LAWS[name]
    for num_steps, want in zip((1000, 100, 20, 5), TABLE[name, kind], strict=True):
        got = total_variation(generated(kind, law, t_end, num_steps), law)
        # The numbers are rounded to two digits; .0005 is what is left of the data at the end of the schedule.
        assert got == pytest.approx(want, rel=0.06, abs=0.0005), num_steps


@pytest.mark.parametrize("num_steps", [2, 3, 20])
@pytest.mark.parametrize("law", [LAWS["bernoulli .3"][0], LAWS["bernoulli .6"][0], binomial(9, 0.35)], ids=len)
def test_the_binomial_leap_is_exact_for_binomial_counts(law, num_steps):
    law = torch.as_tensor(law, dtype=torch.float64)
    # But for what survives to the end, e^-t_end of the mean.
    assert total_variation(generated("binomial", law, 20, num_steps), law) < 1e-8
    if len(law) > 2:
        assert total_variation(generated("bridge", law, 20, num_steps), law) > 1e-3
        assert total_variation(generated("tau-leap", law, 20, num_steps), law) > 1e-3


@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_tau_leaping_is_exact_for_poisson_counts(num_steps):
    rate, most = 3.0, 40
    law = (counts(most) * math.log(rate) - rate - torch.lgamma(counts(most) + 1)).exp()
    missing = lambda p: (rate * (1 - p))[:, None].expand(-1, most + 1)  # noqa: E731
    assert total_variation(generated("tau-leap", law, 20, num_steps, missing), law) < 2e-8
    assert total_variation(generated("bridge", law, 20, num_steps, missing), law) > 1e-3


def test_rounding_has_a_floor_and_the_others_are_of_first_order():
    law, t_end = LAWS["uniform"]
    for kind in ("bridge", "tau-leap"):
        errors = [total_variation(generated(kind, law, 12, count), law) for count in (60, 120)]
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert total_variation(generated("bridge-round", law, t_end, 300), law) > 0.03
    # A Bernoulli of less than a half is never generated at all.
    close(generated("bridge-round", LAWS["bernoulli .3"][0], 10, 50), [1.0, 0.0])


def test_a_step_draws_for_each_item_by_itself():
    n, y = torch.zeros(6, 3, dtype=torch.int64), torch.linspace(0.1, 5, 18).view(6, 3)
    for kind in KINDS:
        whole = steps[kind](n, y, 0.5, 9, SampleDraws(0, 0, 6))
        part = steps[kind](n[2:5], y[2:5], 0.5, 9, SampleDraws(0, 2, 3))
        assert torch.equal(whole[2:5], part)

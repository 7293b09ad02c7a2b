"""Jumps between levels: their inverse, mixtures of two, closed forms on Gaussian data, Heun's step, groups of steps."""

import itertools
import math

import pytest
import torch

from osmose.gaussian import SCHEDULES
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.jumps import Partition, gap, heun_x0, implied_x0, jump, share_of_first, take
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.gaussian.parametrization import column
from osmose.gaussian.schedule import CLEAN, Level, LinearSchedule, TrigSchedule, VarianceExploding
from osmose.gaussian.solvers import DDIM, Heun

every_schedule = pytest.mark.parametrize("kind", list(SCHEDULES.entries))
# Pairs of times, far and near, with both ends; 0 is clean data here.
PAIRS = [(1.0, 0.0), (1.0, 0.3), (1.0, 0.999), (0.9, 0.4), (0.501, 0.5), (0.5, 0.0), (0.002, 0.001), (0.001, 0.0)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def floats(level):
    return Level(*(float(value) for value in level))


def at(schedule, t):
    return CLEAN if t == 0 else floats(schedule.level(t))


def batched(levels):
    return Level(*(torch.tensor(values, dtype=torch.float64) for values in zip(*levels, strict=True)))


def bent(x_t, level, condition=None):  # noqa: ARG001
    """A denoiser that is neither linear nor the same at all levels."""
    return torch.sin(x_t + column(level.t, x_t)) + 0.3


# ------------------------------------------------------------------------------------------------ one jump


@every_schedule
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_a_jump_and_what_it_implies_are_inverse(kind, t, s):
    schedule = SCHEDULES.parse(kind)
    t, s = at(schedule, t), at(schedule, s)
    x_t, x0, x_s = randn(5, 3) * t.sigma, randn(5, 3, seed=1), randn(5, 3, seed=2)
    # Of x0 only the share gap / sigma_t is in x_s: between near levels, rounding of x_s counts for so much more.
    tolerance = max(1e-12, 1e-15 * float(x_t.abs().max()) * t.sigma / gap(t, s))
    assert torch.allclose(implied_x0(x_t, jump(x_t, x0, t, s), t, s), x0, rtol=tolerance, atol=tolerance)
    back = jump(x_t, implied_x0(x_t, x_s, t, s), t, s)
    assert torch.allclose(back, x_s, rtol=1e-12, atol=1e-12 * max(1.0, float(x_t.abs().max())))


@every_schedule
def test_a_batch_of_levels_is_each_of_them(kind):
    schedule = SCHEDULES.parse(kind)
    pairs = [(at(schedule, t), at(schedule, s)) for t, s in PAIRS]
    t, s = (batched(side) for side in zip(*pairs, strict=True))
    x, y = randn(len(pairs), 2, 3), randn(len(pairs), 2, 3, seed=1)
    for function in (jump, implied_x0):
        singly = torch.cat([function(x[i : i + 1], y[i : i + 1], *pair) for i, pair in enumerate(pairs)])
        assert torch.allclose(function(x, y, t, s), singly, rtol=1e-14, atol=1e-14)
    assert take(t, torch.tensor([6, 0])).sigma.tolist() == [pairs[6][0].sigma, pairs[0][0].sigma]


@every_schedule
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_a_jump_is_a_step_of_ddim(kind, t, s):
    schedule = SCHEDULES.parse(kind)
    t, s = at(schedule, t), at(schedule, s)
    x_t, x0 = randn(4, 3) * t.sigma, randn(4, 3, seed=1)
    step = next(DDIM().run(lambda x, level: x0, x_t, TimeGrid((t, s)), None))  # noqa: ARG005
    assert torch.allclose(jump(x_t, x0, t, s), step.x, rtol=1e-12, atol=1e-12)
    if s.sigma == 0:
        assert torch.allclose(jump(x_t, x0, t, s), x0, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "trig"])
def test_where_variance_is_preserved_the_gap_is_a_sine(kind):
    schedule = SCHEDULES.parse(kind)
    level = schedule.level(torch.linspace(0, 1, 101, dtype=torch.float64))
    t, s = (take(level, rows) for rows in torch.combinations(torch.arange(101)).flip(1).T)
    angle_t, angle_s = torch.atan2(t.sigma, t.alpha), torch.atan2(s.sigma, s.alpha)
    assert torch.allclose(gap(t, s), torch.sin(angle_t - angle_s), rtol=0, atol=1e-15)
    assert float(gap(t, s).min()) > 0
    # The whole of it: x_s = (sin s / sin t) x_t + (sin(t - s) / sin t) f.
    x, f = randn(len(angle_t), 1), randn(len(angle_t), 1, seed=1)
    step = (angle_s.sin()[:, None] * x + (angle_t - angle_s).sin()[:, None] * f) / angle_t.sin()[:, None]
    assert torch.allclose(jump(x, f, t, s), step, rtol=1e-12, atol=1e-12)
    assert float(angle_t.max()) > 1.5


def test_jumps_where_variance_explodes():
    """x_s = D + (sigma_s / sigma_t)(x_t - D), x_hat = (sigma_t x_s - sigma_s x_t) / (sigma_t - sigma_s)."""
    schedule = VarianceExploding()
    for t, s in [(1.0, 0.9), (0.7, 0.2), (0.3, 0.0)]:
        t, s = floats(schedule.level(t)), floats(schedule.level(s))
        x_t, other = randn(4, 2) * t.sigma, randn(4, 2, seed=1)
        assert gap(t, s) == t.sigma - s.sigma
        assert torch.allclose(jump(x_t, other, t, s), other + s.sigma / t.sigma * (x_t - other), rtol=1e-12, atol=1e-12)
        want = (t.sigma * other - s.sigma * x_t) / (t.sigma - s.sigma)
        assert torch.allclose(implied_x0(x_t, other, t, s), want, rtol=1e-12, atol=1e-12)


def test_single_precision_keeps_its_digits():
    """Coefficients are computed in float64: at two near levels the differences of float32 numbers would be noise."""
    t, s = (LinearSchedule().level(torch.tensor([k / 1000], dtype=torch.float64)) for k in (3, 2))
    x_t, x0 = randn(1, 5), randn(1, 5, seed=1)
    near = jump(x_t.float(), x0.float(), t, s)
    assert near.dtype == torch.float32
    assert torch.allclose(near.double(), jump(x_t, x0, t, s), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ two jumps


@every_schedule
@pytest.mark.parametrize(
    ("t", "m", "s"), [(1.0, 0.6, 0.0), (1.0, 0.6, 0.2), (0.8, 0.79, 0.1), (0.8, 0.11, 0.1), (0.03, 0.02, 0.01)]
)
def test_two_jumps_imply_a_convex_mixture(kind, t, m, s):
    schedule = SCHEDULES.parse(kind)
    t, m, s = (at(schedule, time) for time in (t, m, s))
    x_t, first, second = randn(5, 3) * t.sigma, randn(5, 3, seed=1), randn(5, 3, seed=2)
    end = jump(jump(x_t, first, t, m), second, m, s)
    share = share_of_first(t, m, s)
    assert 0 <= share < 1
    assert torch.allclose(implied_x0(x_t, end, t, s), share * first + (1 - share) * second, rtol=1e-10, atol=1e-10)
    assert (share == 0) == (s.sigma == 0)


@every_schedule
def test_one_share_is_known_at_once(kind):
    schedule = SCHEDULES.parse(kind)
    t, m = at(schedule, 0.8), at(schedule, 0.3)
    assert share_of_first(t, m, m) == pytest.approx(1, rel=1e-15)
    assert share_of_first(t, m, CLEAN) == 0
    # Of three jumps the first two count as one.
    k, s = at(schedule, 0.2), at(schedule, 0.1)
    first = share_of_first(t, m, s)
    assert share_of_first(t, k, s) * share_of_first(t, m, k) == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "trig"])
def test_the_share_where_variance_is_preserved(kind):
    schedule = SCHEDULES.parse(kind)
    for times in [(0.9, 0.5, 0.2), (1.0, 0.99, 0.01), (0.3, 0.2, 0.1)]:
        t, m, s = (at(schedule, time) for time in times)
        a, b, c = (math.atan2(level.sigma, level.alpha) for level in (t, m, s))
        want = math.sin(c) * math.sin(a - b) / (math.sin(b) * math.sin(a - c))
        assert share_of_first(t, m, s) == pytest.approx(want, rel=1e-11)


def test_the_share_where_variance_explodes():
    schedule = VarianceExploding()
    t, m, s = (floats(schedule.level(time)) for time in (0.9, 0.5, 0.2))
    want = s.sigma * (t.sigma - m.sigma) / (m.sigma * (t.sigma - s.sigma))
    assert share_of_first(t, m, s) == pytest.approx(want, rel=1e-12)


# ------------------------------------------------------------------------------------------------ Gaussian data


@pytest.mark.parametrize(
    ("count", "std"), [(1, 0.0), (2, 0.5), (4, 0.7286), (8, 0.8562), (32, 0.9622), (1024, 0.99880)]
)
def test_a_standard_normal_shrinks_by_a_cosine_a_step(count, std):
    """The exact denoiser is alpha x, and a step between angles a and b multiplies x by cos(a - b)."""
    x = torch.ones(1, 1, dtype=torch.float64)
    for t, s in TimeGrid.of(TrigSchedule(), count).steps():
        before, x = x, jump(x, t.alpha * x, t, s)
        assert float(x) == pytest.approx(float(before) * math.cos((t.t - s.t) * math.pi / 2), rel=1e-12, abs=1e-15)
    assert float(x) == pytest.approx(math.cos(math.pi / 2 / count) ** count, rel=1e-11, abs=1e-15)
    assert float(x) == pytest.approx(std, abs=6e-5 if count < 1000 else 6e-6)


@every_schedule
def test_many_jumps_are_the_flow_of_a_gaussian(kind):
    schedule = SCHEDULES.parse(kind)
    mean, variance = torch.tensor([[0.7], [0.3]], dtype=torch.float64)
    oracle = GaussianDenoiser(mean, variance)
    start, end = at(schedule, 0.9), at(schedule, 0.1)
    x = start.alpha * 0.7 + torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    errors = []
    for count in (500, 1000):
        y = x
        times = torch.linspace(0.9, 0.1, count + 1, dtype=torch.float64).tolist()
        for t, s in itertools.pairwise(times):
            here, there = at(schedule, t), at(schedule, s)
            y = jump(y, oracle(y, here), here, there)
        # From the mean to the mean, and by the ratio of the deviations away from it.
        wanted = math.sqrt(
            (end.alpha**2 * 0.3 + end.sigma**2) / (start.alpha**2 * 0.3 + start.sigma**2)
        ) * torch.tensor([0.0, 1.0], dtype=torch.float64)
        found = y[:, 0] - end.alpha * 0.7
        assert float(found[0]) == pytest.approx(0, abs=1e-12)
        errors.append(abs(float(found[1] - wanted[1])) / float(wanted[1]))
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    assert torch.allclose(oracle.flow(x, start, end)[:, 0] - end.alpha * 0.7, wanted, rtol=1e-12, atol=1e-12)


def test_the_flow_to_clean_data_has_the_gain_of_a_deviation():
    """s / sqrt(alpha^2 s^2 + sigma^2) from anywhere to data N(m, s^2)."""
    mean, variance = torch.tensor([[0.7], [0.09]], dtype=torch.float64)
    oracle = GaussianDenoiser(mean, variance)
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    times = torch.linspace(0.6, 0, 2001, dtype=torch.float64).tolist()
    levels = [at(TrigSchedule(), t) for t in times]
    for t, s in itertools.pairwise(levels):
        x = jump(x, oracle(x, t), t, s)
    a, b = levels[0].alpha, levels[0].sigma
    assert float(x[1] - x[0]) == pytest.approx(0.3 / math.sqrt(a**2 * 0.09 + b**2), rel=1e-3)
    assert float(x[0]) == pytest.approx(0.7 + 0.3 / math.sqrt(a**2 * 0.09 + b**2) * (1 - a * 0.7), rel=1e-3)


# ------------------------------------------------------------------------------------------------ Heun


def heun_pairs(kind):
    """Levels of a schedule on both sides of sigma / alpha = 100, the loudest among them."""
    schedule = SCHEDULES.parse({"kind": "ve", "sigma_max": 500.0} if kind == "ve" else kind)
    times = [(1.0, 0.9), (1.0, 0.01), (0.999, 0.5), (0.9, 0.8), (0.5, 0.1), (0.2, 0.199), (0.002, 0.001)]
    return [(at(schedule, t), at(schedule, s)) for t, s in times]


@every_schedule
def test_a_jump_with_heun_s_estimate_is_a_step_of_heun(kind):
    pairs = heun_pairs(kind)
    loud = [t.sigma > 100 * t.alpha for t, _ in pairs]
    assert any(loud) or kind == "scaled-linear"  # which ends with a fifteenth of the data
    assert not all(loud)
    t, s = (batched(side) for side in zip(*pairs, strict=True))
    x = randn(len(pairs), 4) * t.sigma[:, None]
    calls = []

    def denoise(x_t, level, condition=None):
        calls.append(condition)
        return bent(x_t, level)

    labels = torch.arange(len(pairs))
    f = heun_x0(denoise, x, bent(x, t), t, s, labels)
    assert [call.tolist() for call in calls] == [labels.tolist()]
    found = jump(x, f, t, s)
    for i, pair in enumerate(pairs):
        step = next(Heun().run(bent, x[i : i + 1], TimeGrid(pair), None))
        scale = float(x[i].abs().max())
        assert torch.allclose(found[i : i + 1], step.x, rtol=1e-11, atol=1e-12 * max(1.0, scale)), pair


@every_schedule
def test_the_error_of_one_step_of_heun_is_of_third_order(kind):
    schedule = SCHEDULES.parse(kind)
    oracle = GaussianDenoiser(torch.tensor([0.5, -0.2]).double(), torch.tensor([0.3, 2.0]).double())
    errors = {"heun": [], "euler": []}
    for h in (0.08, 0.04, 0.02, 0.01):
        t, s = (schedule.level(torch.full((16,), time, dtype=torch.float64)) for time in (0.5, 0.5 - h))
        x = randn(16, 2) * float(t.sigma[0])
        first = oracle(x, t)
        exact = oracle.flow(x, floats(take(t, torch.tensor(0))), floats(take(s, torch.tensor(0))))
        for name, f in (("heun", heun_x0(oracle, x, first, t, s)), ("euler", first)):
            errors[name].append(float((jump(x, f, t, s) - exact).square().mean().sqrt()))
    orders = {name: math.log2(error[-2] / error[-1]) for name, error in errors.items()}
    assert orders["heun"] == pytest.approx(3, abs=0.15), errors
    assert orders["euler"] == pytest.approx(2, abs=0.15), errors


# ------------------------------------------------------------------------------------------------ groups


def test_groups_of_equal_length():
    partition = Partition.of(4, 8)
    assert partition.tops == (2, 4, 6, 8)
    assert len(partition) == 4
    assert partition.bottoms().tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert Partition.of(1, 8).bottoms().tolist() == [0] * 8
    assert Partition.of(8, 8).bottoms().tolist() == list(range(8))
    assert Partition.of(4, 8).bottoms().dtype == torch.int64


def test_groups_of_given_lengths():
    partition = Partition.of([1, 4, 6], 6)
    assert partition.tops == (1, 4, 6)
    assert partition.bottoms().tolist() == [0, 1, 1, 1, 4, 4]
    assert Partition.of([6], 6) == Partition.of(1, 6)
    assert Partition.of((2, 4, 6), 6) == Partition.of(3, 6)


@pytest.mark.parametrize("tops", [(3,), (1, 2, 3), (2, 3, 9, 16), (1, 16)])
def test_a_bottom_is_below_its_step_and_the_top_of_the_group_below(tops):
    bottoms = Partition(tops).bottoms()
    steps = torch.arange(1, tops[-1] + 1)
    assert bool((bottoms < steps).all())
    for step, bottom in zip(steps.tolist(), bottoms.tolist(), strict=True):
        assert bottom == max(top for top in (0, *tops) if top < step)


def test_groups_of_groups():
    finer = Partition.of(8, 64)
    assert Partition.of(2, 64).within(finer).tops == (4, 8)
    assert Partition.of([8, 24, 64], 64).within(finer).tops == (1, 3, 8)
    assert finer.within(finer).tops == tuple(range(1, 9))
    assert Partition.of([4, 64], 64).within(Partition.of([1, 4, 16, 64], 64)).tops == (2, 4)


@pytest.mark.parametrize(
    ("groups", "total", "message"),
    [
        (3, 64, "3 groups cannot have equal shares of 64 steps"),
        (0, 64, "0 groups cannot have equal shares of 64 steps"),
        (-4, 64, "-4 groups"),
        (128, 64, "128 groups cannot have equal shares of 64 steps"),
        ([16, 32], 64, "the last group ends at step 32, and the grid has 64"),
        ([16, 65], 64, "the last group ends at step 65, and the grid has 64"),
        ([16, 16, 64], 64, r"groups that end at \[16, 16, 64\]: the ends should rise"),
        ([32, 16, 64], 64, r"groups that end at \[32, 16, 64\]: the ends should rise"),
        ([0, 64], 64, r"groups that end at \[0, 64\]: the ends should rise, from at least 1"),
        ([], 64, r"groups that end at \[\]: the ends should rise"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, total, message):
    with pytest.raises(ValueError, match=message):
        Partition.of(groups, total)


def test_groups_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match="step 12 ends a group, but none of the 8 groups"):
        Partition.of([8, 12, 64], 64).within(Partition.of(8, 64))
    with pytest.raises(ValueError, match="step 8 ends a group, but none of the 4 groups"):
        Partition.of(8, 64).within(Partition.of(4, 64))

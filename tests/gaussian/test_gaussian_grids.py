import itertools
import math

import pytest
import torch

from osmose.errors import UserError
from osmose.gaussian.grid import TimeGrid, strided
from osmose.gaussian.schedule import (
    CLEAN,
    CosineSchedule,
    LinearSchedule,
    StraightSchedule,
    TrigSchedule,
    VarianceExploding,
)

DISCRETE = [LinearSchedule(), CosineSchedule(), LinearSchedule(num_steps=37)]
CONTINUOUS = [VarianceExploding(), TrigSchedule(), StraightSchedule()]
T_AND_K = [(1000, 2), (1000, 10), (1000, 18), (1000, 50), (1000, 333), (4000, 25), (37, 5), (30, 30)]


def round_half_even(x: float) -> int:
    return round(x)  # Python's rule, NumPy's and PyTorch's


DEFINITIONS = {
    "even": lambda T, K: [1 + round_half_even(i * (T - 1) / (K - 1)) for i in range(K)],
    "leading": lambda T, K: [i * (T // K) + 1 for i in range(K)],
    "trailing": lambda T, K: [round_half_even(T - i * T / K) for i in reversed(range(K))],
    "quadratic": lambda T, K: [int((i * math.sqrt(0.8 * T) / (K - 1)) ** 2 + 1e-9) + 1 for i in range(K)],
}


@pytest.mark.parametrize("spacing", DEFINITIONS)
@pytest.mark.parametrize(("total", "num_steps"), T_AND_K)
def test_discrete_spacings_follow_their_definition(spacing, total, num_steps):
    want = DEFINITIONS[spacing](total, num_steps)
    if len(set(want)) < num_steps:
        with pytest.raises(UserError, match=f"{spacing}.*different steps of {total} for {num_steps}"):
            strided(total, num_steps, spacing)
        return
    got = strided(total, num_steps, spacing)
    # floor of a square that is a whole number up to rounding may fall on either side of it.
    slack = 1 if spacing == "quadratic" else 0
    assert all(abs(a - b) <= slack for a, b in zip(got, want, strict=True))
    assert got == sorted(set(got))
    assert got[0] >= 1
    assert got[-1] <= total


def test_known_grids():
    assert strided(1000, 10, "leading") == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert strided(1000, 10, "trailing") == [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
    assert strided(1000, 4, "even") == [1, 334, 667, 1000]
    assert strided(1000, 3, "quadratic")[:2] == [1, 201]
    assert strided(1000, 3, "quadratic")[2] in (800, 801)


@pytest.mark.parametrize("spacing", DEFINITIONS)
def test_a_single_step_starts_from_pure_noise(spacing):
    assert strided(1000, 1, spacing) == [1000]


@pytest.mark.parametrize("spacing", ["even", "leading", "trailing"])
@pytest.mark.parametrize("total", [1, 2, 37, 1000])
def test_as_many_steps_as_there_are_visits_each(spacing, total):
    assert strided(total, total, spacing) == list(range(1, total + 1))


@pytest.mark.parametrize("spacing", ["even", "leading", "trailing"])
def test_agrees_with_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing={"even": "linspace"}.get(spacing, spacing))
    for num_steps in (2, 3, 10, 18, 50, 250, 1000):
        scheduler.set_timesteps(num_steps)
        theirs = sorted(int(t) + 1 for t in scheduler.timesteps)  # 0-based there
        assert strided(1000, num_steps, spacing) == theirs


@pytest.mark.parametrize("schedule", DISCRETE, ids=lambda s: f"{s.kind}-{s.native_steps}")
@pytest.mark.parametrize("spacing", DEFINITIONS)
def test_levels_are_the_schedule_at_the_kept_steps(schedule, spacing):
    T = schedule.native_steps
    grid = TimeGrid.of(schedule, 5, spacing)
    steps = strided(T, 5, spacing)[::-1]
    assert grid.num_steps == 5
    assert grid.levels[-1] == CLEAN
    abar = (1 - schedule.betas).cumprod(0)
    for step, level in zip(steps, grid.levels, strict=False):
        assert level.t == step / T
        assert level.alpha == pytest.approx(math.sqrt(abar[step - 1]), rel=1e-12)
        assert level.sigma == pytest.approx(math.sqrt(1 - abar[step - 1]), rel=1e-9)
        assert schedule.label(level) == pytest.approx((step - 1) * 1000 / T, abs=1e-9)


@pytest.mark.parametrize("schedule", [*DISCRETE, *CONTINUOUS], ids=lambda s: f"{s.kind}-{s.native_steps or ''}")
@pytest.mark.parametrize("spacing", ["even", "leading", "trailing", "quadratic", "log-snr", "karras"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 20])
def test_every_grid_descends_to_clean_data(schedule, spacing, num_steps):
    if schedule.native_steps is None and spacing in ("leading", "trailing", "quadratic"):
        with pytest.raises(UserError, match=f"spacing: '{spacing}' needs a schedule with discrete steps"):
            TimeGrid.of(schedule, num_steps, spacing)
        return
    if schedule.native_steps == 37 and spacing == "quadratic" and num_steps >= 10:
        with pytest.raises(UserError, match="different steps"):
            TimeGrid.of(schedule, num_steps, spacing)
        return
    grid = TimeGrid.of(schedule, num_steps, spacing)
    assert grid.num_steps == num_steps == len(list(grid.steps()))
    assert grid.levels[-1] == CLEAN
    assert all(isinstance(value, float) for level in grid.levels for value in level)
    assert all(level.sigma > 0 for level in grid.levels[:-1])
    times = [level.t for level in grid.levels[:-1]]
    assert all(a > b for a, b in itertools.pairwise(times))
    ratios = [level.sigma / level.alpha if level.alpha else math.inf for level in grid.levels]
    assert all(a > b for a, b in itertools.pairwise(ratios))
    assert list(grid.steps()) == [(grid.levels[i], grid.levels[i + 1]) for i in range(num_steps)]


@pytest.mark.parametrize("schedule", [TrigSchedule(), StraightSchedule()], ids=lambda s: s.kind)
def test_even_on_a_continuous_schedule_is_uniform_in_time(schedule):
    levels = TimeGrid.of(schedule, 4).levels
    assert [level.t for level in levels] == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("schedule", [*DISCRETE, *CONTINUOUS], ids=lambda s: f"{s.kind}-{s.native_steps or ''}")
@pytest.mark.parametrize(("spacing", "power"), [("log-snr", None), ("karras", 1 / 7)])
def test_log_snr_and_karras_are_uniform_in_their_variable(schedule, spacing, power):
    levels = TimeGrid.of(schedule, 9, spacing).levels[:-1]
    ratio = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
    variable = ratio.log() if power is None else ratio**power
    gaps = variable.diff()
    assert torch.allclose(gaps, gaps.mean().expand(8), rtol=1e-6)
    T = schedule.native_steps
    assert levels[0].t == (1 if T or schedule.kind == "ve" else 0.999)
    assert levels[-1].t == (1 / T if T else (0 if schedule.kind == "ve" else 0.001))


def test_karras_on_ve_is_the_even_grid():
    a, b = (TimeGrid.of(VarianceExploding(), 12, spacing).levels for spacing in ("even", "karras"))
    assert torch.allclose(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_at_least_one_step(num_steps):
    with pytest.raises(UserError, match=f"num_steps: {num_steps} is not valid: must be at least 1"):
        TimeGrid.of(LinearSchedule(), num_steps)


@pytest.mark.parametrize("spacing", [*DEFINITIONS, "log-snr", "karras"])
def test_no_more_steps_than_the_schedule_has(spacing):
    with pytest.raises(UserError, match="num_steps: 1001 is more than the 1000 steps"):
        TimeGrid.of(LinearSchedule(), 1001, spacing)


def test_steps_that_coincide_are_refused():
    with pytest.raises(UserError, match=r"'quadratic' has only \d+ different steps of 1000 for 900"):
        TimeGrid.of(LinearSchedule(), 900, "quadratic")


@pytest.mark.parametrize("times", [[0.5, 0.5], [0.2, 0.5], [0.9, 0.4, 0.4]])
def test_times_must_decrease(times):
    with pytest.raises(ValueError, match="must decrease strictly"):
        TimeGrid.at(TrigSchedule(), torch.tensor(times))


def test_only_the_end_is_clean():
    with pytest.raises(ValueError, match="only the end of a grid may be without noise"):
        TimeGrid.at(TrigSchedule(), torch.tensor([0.5, 0.0]))
    assert TimeGrid.at(VarianceExploding(), torch.tensor([0.5, 0.0])).levels[-2].sigma == pytest.approx(0.002)

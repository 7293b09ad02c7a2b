"""Time distillation: targets and fixed points in closed form, the self-teacher, weights, refusals; students."""

import itertools
import json
import math
from typing import Literal

import pytest
import torch
from torch import nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian import SCHEDULES
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.jumps import Partition, implied_x0, jump
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.gaussian.parametrization import EDMParametrization, VParametrization, X0Parametrization, column, noised
from osmose.gaussian.schedule import CLEAN, Level
from osmose.gaussian.solvers import DDIM, Heun
from osmose.methods import METHODS
from osmose.methods.diffusion import DDPMConfig, EDMConfig
from osmose.methods.messages import Batch
from osmose.methods.students import DistilledConfig
from osmose.methods.time_distillation import BTDConfig, TractConfig
from osmose.networks.averaging import newest_share
from osmose.networks.base import NetworkConfig
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

LINE = DataSpec(kind="points", shape=(1,))
PLANE = DataSpec(kind="points", shape=(2,))
CLASSES = DataSpec(kind="points", shape=(2,), num_classes=3)
BOUNDED = DataSpec(kind="points", shape=(1,), range=(-1, 1))
IMAGES = DataSpec(kind="image", shape=(1, 8, 8), range=(-1, 1), num_classes=3)
TINY = MLPConfig(width=8, depth=1)
every_schedule = pytest.mark.parametrize("schedule", list(SCHEDULES.entries))
KINDS = {"tract": TractConfig, "btd": BTDConfig}


class Table(nn.Module):
    """An affine function of x for each of the steps 1..N and each class, float64; step 0 is never looked up."""

    def __init__(self, labels, classes):
        super().__init__()
        self.register_buffer("labels", torch.tensor(labels, dtype=torch.float64))
        self.gains = nn.Parameter(torch.zeros(classes, len(labels) + 1, dtype=torch.float64))
        self.shifts = nn.Parameter(torch.zeros_like(self.gains))

    def forward(self, x, label, condition=None):
        distance, nearest = (label.double()[:, None] - self.labels).abs().min(1)
        assert distance.max() < 1e-3, "asked at a level that is no step"
        row = torch.zeros_like(nearest) if condition is None else condition
        gain, shift = (values[row, nearest + 1] for values in (self.gains, self.shifts))
        return column(gain, x) * x + column(shift, x)


class TableConfig(NetworkConfig):
    kind: Literal["table"] = "table"
    labels: tuple[float, ...]

    def build(self, event_shape, *, num_classes=None):  # noqa: ARG002
        return Table(self.labels, num_classes or 1)


class Given:
    """Draws that are chosen."""

    def __init__(self, u=None, noise=None):
        self.u, self.noise = u, noise

    def uniform(self):
        return self.u

    def normal(self, event_shape):
        assert self.noise.shape[1:] == event_shape
        return self.noise


def quiet(done, of, state=None):
    pass


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scheduled(kind, total):
    """A schedule of which `total` steps are a grid."""
    discrete = {"num_steps": total} if kind in ("linear", "cosine") else {}
    return SCHEDULES.parse({"kind": kind, **discrete})


def chain_of(schedule, total, conditional=False):
    levels = TimeGrid.of(schedule, total).levels[-2::-1]
    network = TableConfig(labels=tuple(float(schedule.label(level)) for level in levels))
    return DDPMConfig(
        network=network,
        schedule=schedule,
        parametrization=X0Parametrization(),
        conditional=conditional,
        sampling={"num_steps": total, "clip": False},
    )


def phase(kind, teacher_grid, grid, *, schedule="trig", total=64, spec=LINE, **values):
    """A student of affine tables."""
    chain = chain_of(scheduled(schedule, total), total, values.get("conditional", False))
    config = KINDS[kind].parse(
        {
            "model": chain,
            "num_steps": total,
            "teacher_grid": teacher_grid,
            "grids": [grid],
            "sampling": {"num_steps": len(Partition.of(grid, total))},
            **values,
        }
    )
    return config.build(spec)


def exact(model, mean=0.4, variance=0.3):
    """A teacher with the closed form of N(mean, variance), another one for each class."""
    table = Table(model.learner.network.labels.tolist(), len(model.learner.network.gains))
    with torch.no_grad():
        for c in range(len(table.gains)):
            oracle = GaussianDenoiser(*torch.tensor([[mean - c], [variance + c]], dtype=torch.float64))
            for step, level in enumerate(model.finest[1:], 1):
                low, high = (float(oracle(x, level)) for x in torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64))
                table.gains[c, step], table.shifts[c, step] = high - low, low
    return NetworkDenoiser(table, model.schedule, model.learner.parametrization)


def random(model, seed=0, std=1.0):
    """A teacher whose tables are anything."""
    teacher = exact(model)
    with torch.no_grad():
        for index, values in enumerate(teacher.parameters()):
            values.copy_(std * randn(*values.shape, seed=10 * seed + index))
    return teacher


def fill(denoiser, value, seed=0):
    with torch.no_grad():
        for index, parameter in enumerate(denoiser.parameters()):
            new = torch.full_like(parameter, value) if isinstance(value, float) else value(parameter, seed + index)
            parameter.copy_(new)


def own_steps(model):
    """The teacher's steps, 0 first, in steps of the finest grid."""
    return (0, *Partition.of(model.config.teacher_grid, model.config.num_steps).tops)


def bottom_of(model, step):
    """The bottom of a teacher's step, by its definition."""
    return max(top for top in (0, *model.groups.tops) if top < step)


def levels(model, steps):
    """The levels of some of the teacher's steps, as a batch."""
    own = own_steps(model)
    rows = [model.finest[own[step]] for step in steps]
    return Level(*(torch.tensor(values, dtype=torch.float64) for values in zip(*rows, strict=True)))


def target(model, x, steps, condition=None):
    """`model.target` at some of the teacher's steps, one for each item."""
    bottoms = [bottom_of(model, step) for step in steps]
    with torch.no_grad():
        return model.target(x, *(levels(model, at) for at in (steps, [k - 1 for k in steps], bottoms)), condition)


def at_steps(model, steps):
    """Uniform numbers for which these of the teacher's steps are taught."""
    if model.config.kind == "btd":
        return torch.tensor([(step / 2 - 0.5) / len(model.groups) for step in steps], dtype=torch.float64)
    return torch.tensor([(step - 0.5) / model.groups.tops[-1] for step in steps], dtype=torch.float64)


def taught(model):
    """The steps that a method teaches."""
    return list(model.groups.tops) if model.config.kind == "btd" else list(range(1, model.groups.tops[-1] + 1))


def losses(model, seed=0, steps=None, condition=None):
    """The loss of one item at each step, the times of these, and x_t."""
    steps = steps or taught(model)
    x0, noise = randn(len(steps), *model.spec.shape, seed=seed), randn(len(steps), *model.spec.shape, seed=seed + 1)
    terms = model.loss(Batch(x0, condition), Given(at_steps(model, steps), noise))
    return terms, noised(x0, noise, levels(model, steps))


def swept(model, teacher):
    """Solve a phase exactly, from the bottom of each group up; a student that has converged is its own average."""
    model.begin(teacher)
    fill(model.learner, 1e3)  # what is used before it is solved is seen
    network, ends = model.learner.network, torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for step in taught(model):
        low, high = target(model, ends, [step, step])
        with torch.no_grad():
            network.gains[0, own_steps(model)[step]] = float(high - low)
            network.shifts[0, own_steps(model)[step]] = float(low)
        if model.config.kind == "tract":
            model.after_step([])
    return model


def walked(model, denoiser, x, step):
    """Where the teacher's steps of DDIM carry x from one of them to the bottom of its group."""
    own = own_steps(model)
    way = tuple(model.finest[own[k]] for k in range(step, bottom_of(model, step) - 1, -1))
    return list(DDIM().run(lambda x_t, level: denoiser(x_t, level), x, TimeGrid(way), None))[-1].x


# ------------------------------------------------------------------------------------------------ fixed points

NESTINGS = [
    ([64, 8, 1], ("tract", "tract")),
    ([64, 1], ("tract",)),
    ([64, 32, 16, 8, 4, 2, 1], ("tract",) * 6),
    ([64, 32, 16, 8, 4, 2, 1], ("btd",) * 6),
    ([64, 32, 8, 1], ("btd", "tract", "tract")),
    ([64, (1, 5, 6, 40, 64), (5, 64), 1], ("tract",) * 3),
    ([(1, 2, 4, 8, 16, 32, 63, 64), (2, 8, 32, 64), 1], ("btd", "tract")),
]


@every_schedule
@pytest.mark.parametrize(("grids", "kinds"), NESTINGS, ids=lambda value: "-".join(map(str, value)))
def test_any_nesting_of_phases_ends_in_the_composed_steps(schedule, grids, kinds):
    x = randn(5, 1)
    first = teacher = exact(phase("tract", 64, 1, schedule=schedule))
    for kind, (fine, coarse) in zip(kinds, itertools.pairwise(grids), strict=True):
        values = {"ema_self": 0.0} if kind == "tract" else {}
        model = swept(phase(kind, fine, coarse, schedule=schedule, **values), teacher)
        for step in taught(model):
            here, there = (model.finest[own_steps(model)[at]] for at in (step, bottom_of(model, step)))
            start = x * here.sigma
            with torch.no_grad():
                end = jump(start, model.learner(start, here), here, there)
                wanted = walked(model, model.teacher, start, step)
            assert torch.allclose(end, wanted, rtol=1e-9, atol=1e-9), (step, here)
        assert losses(model)[0].per_item.max() < 1e-16
        teacher = model.learner
    # One step of the last student against all steps of the first teacher, from the prior.
    wanted = model.schedule.prior_std * x
    way = TimeGrid(tuple(model.finest[step] for step in (*Partition.of(grids[0], 64).tops[::-1], 0)))
    with torch.no_grad():
        for state in DDIM().run(first, wanted, way, None):
            wanted = state.x
        found, nfe = model.generate(Given(noise=x), model.sampling(), None, quiet)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    assert nfe == 1


@every_schedule
def test_tract_and_btd_have_the_same_fixed_point(schedule):
    tract = phase("tract", 64, 32, schedule=schedule, ema_self=0.0)
    btd = phase("btd", 64, 32, schedule=schedule)
    teacher = exact(tract)
    swept(tract, teacher)
    swept(btd, teacher)
    for a, b in zip(tract.learner.parameters(), btd.learner.parameters(), strict=True):
        assert torch.allclose(a[:, 2::2], b[:, 2::2], rtol=1e-10, atol=1e-12)
    btd.learner.load_state_dict(tract.learner.state_dict())
    assert losses(btd)[0].per_item.max() < 1e-16
    fill(btd.learner, lambda values, seed: values + 1e-3 * randn(*values.shape, seed=seed))
    assert losses(btd)[0].per_item.min() > 1e-12


@pytest.mark.parametrize(("count", "std"), [(4, 0.7286), (8, 0.8562), (32, 0.9622), (1024, 0.99880)])
def test_a_perfect_student_keeps_its_teacher_s_error(count, std):
    """Of N(0, 1) the teacher's K steps make N(0, cos(pi / 2K)^2K), and so does the student's one."""
    model = phase("tract", count, 1, total=count, ema_self=0.0)
    swept(model, exact(model, mean=0.0, variance=1.0))
    with torch.no_grad():
        found, _ = model.generate(Given(noise=torch.ones(1, 1, dtype=torch.float64)), model.sampling(), None, quiet)
    assert float(found) == pytest.approx(math.cos(math.pi / 2 / count) ** count, rel=1e-9)
    assert float(found) == pytest.approx(std, abs=6e-5 if count < 1000 else 6e-6)


# ------------------------------------------------------------------------------------------------ targets


@every_schedule
@pytest.mark.parametrize("grid", [16, 4, 1, (1, 7, 8, 64)], ids=str)
def test_the_target_is_what_two_jumps_imply(schedule, grid):
    model = phase("tract", 64, grid, schedule=schedule)
    model.begin(random(model))
    fill(model.self_teacher, lambda values, seed: randn(*values.shape, seed=seed), seed=7)
    steps = list(range(1, 65))
    x = randn(64, 1) * levels(model, steps).sigma[:, None]
    found = target(model, x, steps)
    for i, step in enumerate(steps):
        t, m, s = (model.finest[k] for k in (step, step - 1, bottom_of(model, step)))
        with torch.no_grad():
            first = model.teacher(x[i : i + 1], t)
            y = jump(x[i : i + 1], first, t, m)
            end = jump(y, model.self_teacher(y, m), m, s) if step - 1 > bottom_of(model, step) else y
        assert torch.allclose(found[i : i + 1], implied_x0(x[i : i + 1], end, t, s), rtol=1e-9, atol=1e-9), step


@pytest.mark.parametrize("grid", [16, (1, 7, 8, 64)], ids=str)
@every_schedule
def test_a_step_to_the_bottom_is_the_teacher_s_alone(schedule, grid):
    """The self-teacher belongs to the group below there: poison shows that it is not asked."""
    model = phase("tract", 64, grid, schedule=schedule)
    model.begin(random(model))
    firsts = [step for step in range(1, 65) if bottom_of(model, step) == step - 1]
    x = randn(len(firsts), 1)
    with torch.no_grad():
        want = model.teacher(x, levels(model, firsts))
        # Jumps start above the bottom of a group and below its top.
        for values in model.self_teacher.parameters():
            values[:, list(model.groups.tops)] = float("nan")
    assert torch.equal(target(model, x, firsts), want)
    assert target(model, randn(64, 1), list(range(1, 65))).isfinite().all()
    fill(model.self_teacher, float("nan"))
    assert torch.equal(target(model, x, firsts), want)
    others = [step for step in range(1, 65) if step not in firsts]
    assert target(model, randn(len(others), 1), others).isnan().all()


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@every_schedule
def test_groups_of_one_step_leave_the_teacher_as_it_is(schedule, solver):
    model = phase("tract", 4, 4, schedule=schedule, solver=solver)
    model.begin(random(model))
    fill(model.self_teacher, float("nan"))
    x = randn(4, 1)
    if solver == "ddim":
        with torch.no_grad():
            assert torch.equal(target(model, x, [1, 2, 3, 4]), model.teacher(x, levels(model, [1, 2, 3, 4])))
        assert losses(model)[0].per_item.tolist() == [0.0] * 4
    # Four jumps with the targets are four steps of the teacher's solver.
    way = TimeGrid(tuple(model.finest[step] for step in own_steps(model)[::-1]))
    states = list((Heun() if solver == "heun" else DDIM()).run(model.teacher, x, way, None))
    for step, (t, s), state in zip((4, 3, 2, 1), way.steps(), states, strict=True):
        x = jump(x, target(model, x, [step] * 4), t, s)
        assert torch.allclose(x, state.x.detach(), rtol=1e-9, atol=1e-9)


@every_schedule
def test_heun_s_step_comes_before_the_self_teacher_s_jump(schedule):
    model = phase("tract", 64, 8, schedule=schedule, solver="heun")
    model.begin(random(model, std=0.5))
    fill(model.self_teacher, lambda values, seed: randn(*values.shape, seed=seed), seed=7)
    x = randn(64, 1)
    found = target(model, x, list(range(1, 65)))
    for i, step in enumerate(range(1, 65)):
        t, m, s = (model.finest[k] for k in (step, step - 1, bottom_of(model, step)))
        with torch.no_grad():
            y = next(Heun().run(model.teacher, x[i : i + 1], TimeGrid((t, m)), None)).x
            end = jump(y, model.self_teacher(y, m), m, s) if step - 1 > bottom_of(model, step) else y
        assert torch.allclose(found[i : i + 1], implied_x0(x[i : i + 1], end, t, s), rtol=1e-8, atol=1e-8), step


@every_schedule
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_tract_by_twos_with_the_teacher_in_both_places_is_btd(schedule, solver):
    tract, btd = (phase(kind, 64, 32, schedule=schedule, solver=solver) for kind in ("tract", "btd"))
    teacher, tops = random(tract), list(tract.groups.tops)
    for model in (tract, btd):
        model.begin(teacher)
        fill(model.learner, lambda values, seed: randn(*values.shape, seed=seed), seed=5)
    tract.self_teacher.load_state_dict(teacher.state_dict())
    x = randn(32, 1)
    if solver == "ddim":  # a self-teacher jumps, whatever the teacher's steps are
        assert torch.equal(target(tract, x, tops), target(btd, x, tops))
        (a, _), (b, _) = losses(tract, steps=tops), losses(btd)
        assert torch.equal(a.per_item, b.per_item)
        assert torch.equal(a.t, b.t)
    # Two steps of the teacher, and the one jump that equals them.
    for top in (2, 34, 64):
        t, m, s = (tract.finest[k] for k in (top, top - 1, top - 2))
        with torch.no_grad():
            end = walked(btd, teacher, x, top)
            if solver == "heun":
                end = x
                for grid in (TimeGrid((t, m)), TimeGrid((m, s))):
                    end = next(Heun().run(teacher, end, grid, None)).x
            wanted = implied_x0(x, end, t, s)
        assert torch.allclose(target(btd, x, [top] * 32), wanted, rtol=1e-8, atol=1e-8)


def test_items_of_a_batch_keep_their_classes_and_levels():
    model = phase("tract", 64, (1, 7, 8, 64), spec=CLASSES, conditional=True, solver="heun")
    model.begin(random(model))
    fill(model.self_teacher, lambda values, seed: randn(*values.shape, seed=seed), seed=7)
    steps = torch.randperm(64, generator=torch.Generator().manual_seed(0)).add(1).tolist()
    x, classes = randn(64, 2), torch.arange(64) % 3
    whole = target(model, x, steps, classes)
    for i, step in enumerate(steps):
        t, m, s = (model.finest[k] for k in (step, step - 1, bottom_of(model, step)))
        one, own = x[i : i + 1], classes[i : i + 1]
        with torch.no_grad():
            y = next(
                Heun().run(lambda x_t, level, own=own: model.teacher(x_t, level, own), one, TimeGrid((t, m)), None)
            ).x
            end = jump(y, model.self_teacher(y, m, own), m, s) if step - 1 > bottom_of(model, step) else y
        assert torch.allclose(whole[i : i + 1], implied_x0(one, end, t, s), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(whole, target(model, x, steps, (classes + 1) % 3), rtol=0.1)
    # The student is told them too: its loss vanishes where it says the targets, and there only.
    terms, x_t = losses(model, steps=steps, condition=classes)
    with torch.no_grad():
        own = model.learner(x_t, levels(model, steps), classes)
    wanted = (own - target(model, x_t, steps, classes)).square().mean(1) * model.weight(levels(model, steps))
    assert torch.allclose(terms.per_item, wanted, rtol=1e-10)


def test_estimates_are_clipped_for_bounded_data_alone():
    found = {}
    for spec, clip in ((BOUNDED, True), (BOUNDED, False), (LINE, False)):
        model = phase("tract", 64, 8, spec=spec, clip=clip)
        model.begin(random(model, std=5.0))
        fill(model.self_teacher, lambda values, seed: 5 * randn(*values.shape, seed=seed), seed=7)
        fill(model.learner, lambda values, seed: 5 * randn(*values.shape, seed=seed), seed=3)
        x, steps = randn(64, 1), list(range(1, 65))
        found[spec.range is None, clip] = target(model, x, steps)
        if clip:
            assert found[False, True].abs().max() <= 1 + 1e-12
            for i, step in enumerate(steps):
                t, m, s = (model.finest[k] for k in (step, step - 1, bottom_of(model, step)))
                with torch.no_grad():
                    y = jump(x[i : i + 1], model.teacher(x[i : i + 1], t).clamp(-1, 1), t, m)
                    inside = bottom_of(model, step) < step - 1
                    end = jump(y, model.self_teacher(y, m).clamp(-1, 1), m, s) if inside else y
                assert torch.allclose(found[False, True][i], implied_x0(x[i], end[0], t, s), rtol=1e-9, atol=1e-9)
            # What the student itself says is not clipped in the loss: it would have no gradient.
            terms, x_t = losses(model)
            error = (model.learner(x_t, levels(model, steps)) - target(model, x_t, steps)).square().flatten()
            assert torch.allclose(terms.parts["x0_error"], error.detach(), rtol=1e-10)
            assert error.max() > 9
    assert torch.equal(found[False, False], found[True, False])
    assert found[True, False].abs().max() > 3
    with pytest.raises(UserError, match="clip: true needs data with a range"):
        phase("tract", 64, 8, clip=True)


def test_heun_s_second_estimate_is_clipped_too():
    model = phase("tract", 64, 64, spec=BOUNDED, clip=True, solver="heun")
    model.begin(random(model, std=5.0))
    way = TimeGrid(tuple(model.finest[k] for k in (33, 32)))
    x = randn(9, 1)
    with torch.no_grad():
        step = next(Heun().run(lambda x_t, level: model.teacher(x_t, level).clamp(-1, 1), x, way, None))
    wanted = implied_x0(x, step.x, *way.levels)
    assert torch.allclose(target(model, x, [33] * 9), wanted, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ the loss


def test_weights_at_a_level():
    level = Level(*(torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.5, 1.0], [0.8, 0.6, 0.0], [0.1, 0.8, 1.0])))
    for values, wanted in [
        ({}, [64, 1, 1]),
        ({"snr_cap": 10}, [10, 1, 1]),
        ({"snr_cap": 0.5}, [1, 1, 1]),
        ({"weight": "v"}, [65, 1 + 0.5625, 1]),
        ({"weight": "v", "snr_cap": 10}, [11, 1 + 0.5625, 1]),
        ({"weight": "constant"}, [1, 1, 1]),
    ]:
        weight = phase("tract", 64, 8, **values).weight(level)
        assert weight.dtype == torch.float64
        assert weight.tolist() == pytest.approx(wanted, rel=1e-12)
    assert TractConfig.model_fields["weight"].default == "truncated-snr"
    assert TractConfig.model_fields["snr_cap"].default is None


def test_the_weight_of_edm():
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    chain = EDMConfig(network=TINY, parametrization=EDMParametrization(sigma_data=0.7))
    values = {"model": chain, "num_steps": 40, "teacher_grid": 40, "grids": [1], "weight": "v"}
    model = TractConfig.parse(values).build(PLANE)
    level = levels(model, list(range(1, 41)))
    wanted = (level.sigma**2 + 0.49) / (level.sigma * 0.7) ** 2
    assert torch.allclose(model.weight(level), wanted, rtol=1e-12)


@pytest.mark.parametrize("kind", ["tract", "btd"])
@every_schedule
def test_the_loss_is_the_weighted_error_of_x0(kind, schedule):
    model = phase(kind, 64, 32, schedule=schedule, spec=PLANE)
    model.begin(random(model))
    fill(model.learner, lambda values, seed: randn(*values.shape, seed=seed), seed=5)
    terms, x_t = losses(model)
    steps = taught(model)
    level = levels(model, steps)
    with torch.no_grad():
        error = (model.learner(x_t, level) - target(model, x_t, steps)).square().mean(1)
    assert terms.per_item.shape == (len(steps),)
    assert torch.allclose(terms.per_item, error * ((level.alpha / level.sigma) ** 2).clamp(min=1), rtol=1e-12)
    assert torch.allclose(terms.parts["x0_error"], error, rtol=1e-12)
    assert terms.per_item.requires_grad
    assert not terms.parts["x0_error"].requires_grad
    assert torch.equal(terms.t, level.t)
    assert terms.t.dtype == torch.float64


@pytest.mark.parametrize(
    ("schedule", "parametrization"),
    [("trig", VParametrization()), ("cosine", VParametrization()), ("ve", EDMParametrization(sigma_data=0.6))],
    ids=["trig", "cosine", "edm"],
)
def test_weight_v_is_the_squared_error_of_the_network_s_own_output(schedule, parametrization):
    chain = DDPMConfig(network=TINY, schedule=scheduled(schedule, 64), parametrization=parametrization)
    values = {"model": chain, "num_steps": 64, "teacher_grid": 64, "grids": [8], "sampling": {"num_steps": 8}}
    torch.manual_seed(0)
    model = TractConfig.parse({**values, "weight": "v"}).build(PLANE).double()
    model.begin(model.learner)
    fill(model.learner, lambda values, seed: 0.3 * randn(*values.shape, seed=seed))
    terms, x_t = losses(model)
    steps = taught(model)
    level, wanted = levels(model, steps), target(model, x_t, steps)
    # The output that stands for the target, by F = target_x0 x0 + target_eps eps.
    c = parametrization.coefficients(level)
    eps = (x_t - column(level.alpha, x_t) * wanted) / column(level.sigma, x_t)
    output = column(c.target_x0, x_t) * wanted + column(c.target_eps, x_t) * eps
    with torch.no_grad():
        error = (model.learner.output(x_t, level) - output).square().mean(1)
    assert torch.allclose(terms.per_item, error, rtol=1e-8, atol=1e-10)


def test_every_step_of_the_teacher_is_taught_alike():
    for kind, grid, wanted in (("tract", 8, range(1, 65)), ("btd", 32, range(2, 65, 2)), ("tract", (1, 7, 64), None)):
        model = phase(kind, 64, grid)
        model.begin(random(model))
        wanted = list(wanted or range(1, 65))
        count = 5 * 64
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        terms = model.loss(Batch(randn(count, 1)), Given(u, randn(count, 1)))
        steps, seen = (terms.t * 64).round().unique(return_counts=True)
        assert steps.tolist() == wanted
        assert set(seen.tolist()) == {count // len(wanted)}


def test_the_teacher_s_own_grid_is_taught():
    """Of a teacher of the steps 1, 4, 6, 30 and 64 these are the only starts."""
    model = phase("tract", (1, 4, 6, 30, 64), (4, 64))
    model.begin(random(model))
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    terms = model.loss(Batch(randn(100, 1)), Given(u, randn(100, 1)))
    steps, seen = (terms.t * 64).round().unique(return_counts=True)
    assert steps.tolist() == [1, 4, 6, 30, 64]
    assert seen.tolist() == [20] * 5


@every_schedule
@pytest.mark.parametrize(
    ("kind", "fine", "coarse"), [("tract", 64, 8), ("tract", 64, 1), ("tract", 64, 64), ("btd", 64, 32)]
)
def test_the_loss_is_finite_for_every_number_that_can_be_drawn(schedule, kind, fine, coarse):
    model = phase(kind, fine, coarse, schedule=schedule)
    model.begin(exact(model))
    fill(model.learner, 0.5)
    u = torch.tensor([0.0, 1e-300, 0.5, 1 / 3, 63 / 64, 1 - 1e-16], dtype=torch.float64)
    assert float(u[-1]) < 1
    edges = torch.arange(1, 64, dtype=torch.float64) / 64
    u = torch.cat([u, edges, edges.nextafter(torch.zeros(())), edges.nextafter(torch.ones(()))])
    terms = model.loss(Batch(randn(len(u), 1)), Given(u, randn(len(u), 1)))
    terms.per_item.mean().backward()
    assert terms.per_item.isfinite().all()
    assert all(value.grad.isfinite().all() for value in model.learner.parameters())
    assert float(terms.t[5]) == 1.0
    first = {"tract": 1, "btd": 2}[kind]
    assert float(terms.t[0]) == model.finest[first].t


def test_the_loudest_level_has_a_gradient():
    """Where alpha = 0 the plain SNR is 0: a student of one step would learn nothing of the level it starts from."""
    model = phase("tract", 64, 1)
    model.begin(random(model))
    fill(model.learner, 0.5)
    terms, _ = losses(model, steps=[64])
    terms.per_item.sum().backward()
    assert float(model.learner.network.gains.grad[0, 64].abs()) > 1e-3
    assert float(levels(model, [64]).alpha) == 0


@pytest.mark.parametrize("kind", ["tract", "btd"])
def test_targets_are_constants(kind):
    model = phase(kind, 64, 32)
    teacher = random(model)
    model.begin(teacher)
    fill(model.learner, lambda values, seed: randn(*values.shape, seed=seed), seed=5)
    terms, x_t = losses(model)
    steps = taught(model)
    terms.per_item.sum().backward()
    with torch.no_grad():
        error = (model.learner(x_t, levels(model, steps)) - target(model, x_t, steps)).flatten()
        slope = 2 * model.weight(levels(model, steps)) * error
        at = torch.tensor(steps)
        assert torch.allclose(model.learner.network.gains.grad[0, at], slope * x_t.flatten(), rtol=1e-10)
        assert torch.allclose(model.learner.network.shifts.grad[0, at], slope, rtol=1e-10)
    others = [teacher, model.teacher, *([model.self_teacher] if kind == "tract" else [])]
    assert all(value.grad is None for other in others for value in other.parameters())
    assert not any(value.requires_grad for value in model.teacher.parameters())
    assert {id(v) for v in model.parameters() if v.requires_grad} == {id(v) for v in model.learner.parameters()}
    places = [
        value.data_ptr() for other in (model.learner, *others) for value in (*other.parameters(), *other.buffers())
    ]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("kind", ["tract", "btd"])
def test_teachers_are_not_changed_by_what_the_student_learns(kind):
    model = phase(kind, 64, 32)
    given = random(model)
    model.begin(given)
    before = [[value.clone() for value in other.parameters()] for other in (given, model.teacher)]
    optimiser = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], 0.1)
    losses(model)[0].per_item.mean().backward()
    optimiser.step()
    model.after_step([])
    for kept, other in zip(before, (given, model.teacher), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, other.parameters(), strict=True))
    # Nor by what becomes of the one that was given.
    fill(given, 9.0)
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.teacher.parameters(), strict=True))


def test_a_student_starts_from_its_teacher_s_weights():
    for kind in ("tract", "btd"):
        model = phase(kind, 64, 32)
        teacher = random(model)
        model.begin(teacher)
        denoisers = [model.learner, *([model.self_teacher] if kind == "tract" else [])]
        for own in denoisers:
            assert all(torch.equal(a, b) for a, b in zip(own.parameters(), teacher.parameters(), strict=True))
        assert all(value.requires_grad for value in model.learner.parameters())
        cold = phase(kind, 64, 32)
        fill(cold.learner, 0.25)
        cold.begin(teacher, warm=False)
        for own in [cold.learner, *([cold.self_teacher] if kind == "tract" else [])]:
            assert all(bool((value == 0.25).all()) for value in own.parameters())
        assert torch.equal(cold.teacher.network.gains, teacher.network.gains)


def test_a_teacher_is_not_saved_with_its_student():
    model = phase("tract", 64, 32)
    names = set(model.state_dict())
    model.begin(random(model))
    assert set(model.state_dict()) == names
    assert {name.partition(".")[0] for name in names} == {"students", "self_teacher", "updates"}
    assert {id(network) for network in model.networks()} == {
        id(other.network) for other in (model.learner, model.teacher, model.self_teacher)
    }


@pytest.mark.parametrize("kind", ["tract", "btd"])
def test_nothing_is_taught_without_a_teacher(kind):
    model = phase(kind, 64, 32)
    with pytest.raises(UserError, match=f"{kind}: has no teacher; .* osmose distill {kind} RUN"):
        losses(model)
    model.sample(2)  # needs none


# ------------------------------------------------------------------------------------------------ the self-teacher


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99995])
def test_an_average_without_bias(decay):
    values = randn(30).tolist()
    average = float("nan")  # has no share
    for n, value in enumerate(values, 1):
        share = newest_share(decay, n)
        average = value if share == 1 else (1 - share) * average + share * value
        weights = [decay ** (n - i) for i in range(1, n + 1)]
        wanted = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert average == pytest.approx(wanted, rel=1e-10, abs=1e-10)
    assert newest_share(decay, 1) == 1


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_self_teacher_is_an_average_of_the_student_s_states(decay):
    model = phase("tract", 64, 8, ema_self=decay)
    model.begin(random(model))
    states = []
    for update in range(1, 7):
        fill(model.learner, lambda values, seed: randn(*values.shape, seed=seed), seed=100 * update)
        model.learner.network.labels.add_(1e-9)
        states.append([value.detach().clone() for value in model.learner.parameters()])
        model.after_step([])
        weights = [decay ** (update - i) for i in range(1, update + 1)]
        for index, own in enumerate(model.self_teacher.parameters()):
            wanted = sum(w * state[index] for w, state in zip(weights, states, strict=True)) / sum(weights)
            assert torch.allclose(own, wanted, rtol=1e-12, atol=1e-12)
            assert not own.requires_grad
        assert torch.equal(model.self_teacher.network.labels, model.learner.network.labels)
    assert int(model.updates) == 6
    if decay == 0:
        assert torch.equal(model.self_teacher.network.gains, model.learner.network.gains)


def test_an_average_goes_on_where_it_was_saved():
    def update(model, seed):
        fill(model.learner, lambda values, index: randn(*values.shape, seed=index), seed=seed)
        model.after_step([])

    model, again = phase("tract", 64, 8, ema_self=0.9), phase("tract", 64, 8, ema_self=0.9)
    teacher = random(model)
    for one in (model, again):
        one.begin(teacher)
    for seed in (10, 20, 30):
        update(model, seed)
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        update(one, 40)
    assert torch.equal(model.self_teacher.network.gains, again.self_teacher.network.gains)


def test_dropout_stays_off():
    chain = DDPMConfig(network=MLPConfig(width=16, depth=1, dropout=0.5), schedule="trig", parametrization="x0")
    values = {"model": chain, "num_steps": 64, "teacher_grid": 64, "grids": [8], "sampling": {"num_steps": 8}}
    torch.manual_seed(0)
    model = TractConfig.parse(values).build(PLANE)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    noisy = model.learner.network.train()
    x, label = torch.ones(4, 2), torch.full((4,), 500.0)
    assert not torch.equal(noisy(x, label), noisy(x, label))
    source = NetworkDenoiser(noisy, chain.schedule, chain.parametrization)
    model.begin(source)
    assert model.train() is model
    first, second = (model.loss(Batch(torch.ones(64, 2)), StepDraws(0, 1, 0, 64, 64)).per_item for _ in range(2))
    assert torch.equal(first, second)
    assert not any(part.training for other in (model, model.teacher) for part in other.modules())


# ------------------------------------------------------------------------------------------------ with networks


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(
    ("kind", "grid", "solver", "chain", "network"),
    [
        ("tract", 8, "ddim", {"kind": "ddpm", "schedule": "cosine", "parametrization": "v"}, TINY),
        ("tract", 1, "heun", {"kind": "edm"}, TINY),
        ("btd", 32, "ddim", {"kind": "ddpm"}, TINY),
        ("btd", 32, "heun", {"kind": "edm"}, UNetConfig(channels=8, mult=(1,), blocks=1, attention=())),
    ],
)
def test_single_precision_batches_of_real_networks(conditional, kind, grid, solver, chain, network):
    values = {
        "kind": kind,
        "model": {**chain, "network": network.to_json(), "conditional": conditional},
        "num_steps": 64,
        "teacher_grid": 64,
        "grids": [grid],
        "solver": solver,
        "conditional": conditional,
        "clip": True,
        "sampling": {"num_steps": grid},
    }
    torch.manual_seed(0)
    config = METHODS.parse(json.loads(json.dumps(values)))
    model = config.build(IMAGES)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.begin(model.learner)
    fill(model.learner, lambda values, seed: values + 0.01 * randn(*values.shape, seed=seed).float())
    model.train()
    condition = torch.arange(16) % 3 if conditional else None
    batch = Batch(randn(16, 1, 8, 8).float(), condition)
    terms = model.loss(batch, StepDraws(0, 1, 0, 16, 16))
    terms.per_item.mean().backward()
    assert terms.per_item.dtype == torch.float32
    assert terms.per_item.isfinite().all()
    assert (terms.per_item > 0).all()
    assert all(value.grad.isfinite().all() for value in model.learner.parameters())
    # The parts of a batch have the losses that they have in the whole.
    half = Batch(batch.x0[8:], None if condition is None else condition[8:])
    part = model.loss(half, StepDraws(0, 1, 8, 16, 16)).per_item
    assert torch.allclose(part, terms.per_item[8:], rtol=1e-3, atol=1e-5)
    model.after_step([(batch, None)])
    model.probe(2)
    samples = model.sample(5, seed=1)
    assert samples.nfe == grid
    assert samples.data.abs().max() <= 1
    assert METHODS.parse(json.loads(json.dumps(config.to_json()))) == config


def test_learning_approaches_the_fixed_point():
    torch.manual_seed(0)
    model = phase("tract", 8, 2, total=8)
    teacher = exact(model)
    best = swept(phase("tract", 8, 2, total=8, ema_self=0.0), teacher)
    model.begin(teacher)
    optimiser = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], 0.02)
    for step in range(600):
        optimiser.zero_grad()
        terms = model.loss(Batch(0.4 + 0.3**0.5 * randn(64, 1, seed=step)), StepDraws(0, step, 0, 64, 64))
        terms.per_item.mean().backward()
        optimiser.step()
        model.after_step([])
    for own, wanted in zip(model.learner.parameters(), best.learner.parameters(), strict=True):
        assert torch.allclose(own[:, 1:], wanted[:, 1:], atol=2e-3)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("btd", {"grids": [16]}, r"btd makes one step of two; 64 steps to 16 in groups of \[4\]; use tract"),
        ("btd", {"grids": [64]}, "btd makes one step of two; 64 steps to 64 in groups of"),
        ("btd", {"grids": [[1, 4, 64]]}, "btd makes one step of two; 64 steps to 3 in groups of"),
        ("btd", {"teacher_grid": 16, "grids": [4]}, "btd makes one step of two; 16 steps to 4 in groups of"),
        ("btd", {"teacher_grid": 4, "grids": [[16, 64]]}, "btd makes one step of two"),
        ("tract", {"grids": [3]}, "3 groups cannot have equal shares of 64 steps"),
        ("tract", {"teacher_grid": 48}, "48 groups cannot have equal shares of 64 steps"),
        ("tract", {"teacher_grid": 8, "grids": [16]}, "step 4 ends a group, but none of the 8 groups"),
        ("tract", {"teacher_grid": 16, "grids": [[10, 64]]}, "step 10 ends a group, but none of the 16 groups"),
        ("tract", {"grids": [[8, 32]]}, "the last group ends at step 32, and the grid has 64"),
        ("tract", {"grids": [[32, 8, 64]]}, "should rise"),
        ("tract", {"grids": [8, 1]}, "grids: 2 given, a phase has one"),
        ("tract", {"grids": []}, "grids"),
        ("tract", {"ema_self": 1.0}, "ema_self: 1.0 is not valid"),
        ("tract", {"ema_self": -0.1}, "ema_self: -0.1 is not valid"),
        ("btd", {"ema_self": 0.5, "grids": [32]}, "ema_self: unknown field"),
        ("tract", {"weight": "snr"}, "weight: 'snr' is not valid"),
        ("tract", {"snr_cap": 0}, "snr_cap: 0 is not valid"),
        ("tract", {"solver": "dpmpp-2m"}, "solver: 'dpmpp-2m' is not valid"),
        ("tract", {"num_steps": 0}, "num_steps: 0 is not valid"),
        ("tract", {"conditional": True}, "conditional has to be as the diffusion's, False"),
    ],
)
def test_phases_that_do_not_fit_are_refused(kind, values, message):
    model = DDPMConfig(network=TINY, schedule="trig", parametrization="x0").to_json()
    given = {"model": model, "num_steps": 64, "teacher_grid": 64, "grids": [8], "sampling": {"num_steps": 8}}
    with pytest.raises(ConfigError, match=message) as caught:
        KINDS[kind].parse({**given, **values})
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_distilled_are_refused():
    values = {"num_steps": 64, "teacher_grid": 64, "grids": [8], "sampling": {"num_steps": 8}}
    inner = TractConfig.parse({"model": DDPMConfig(network=TINY), **values})
    with pytest.raises(UserError, match="tract: is no diffusion that can be distilled; ddpm, iddpm and edm are"):
        TractConfig.parse({"model": inner, **values}).build(PLANE)
    with pytest.raises(UserError, match="num_steps: 2000 is more than the 1000 steps that the schedule has"):
        TractConfig.parse({"model": DDPMConfig(network=TINY), **values, "num_steps": 2000, "teacher_grid": 2000}).build(
            PLANE
        )
    with pytest.raises(UserError, match="num_steps: 4 is no grid that was distilled; those are 8"):
        TractConfig.parse({"model": DDPMConfig(network=TINY), **values, "sampling": {"num_steps": 4}}).build(PLANE)
    with pytest.raises(UserError, match="needs data with classes"):
        TractConfig.parse({"model": DDPMConfig(network=TINY, conditional=True), **values, "conditional": True}).build(
            PLANE
        )


@pytest.mark.parametrize("kind", ["tract", "btd", "distilled"])
def test_a_student_is_not_trained_from_nothing(kind):
    with pytest.raises(UserError, match=f"{kind}: is distilled from a trained run, not trained; use osmose distill"):
        METHODS.resolve(kind).recipe(PLANE, 1.0)


# ------------------------------------------------------------------------------------------------ students


def students(grids, spec=PLANE, chain=None, **values):
    """Of 64 steps, with weights that are not trained."""
    chain = chain or DDPMConfig(network=TINY, schedule="trig", parametrization="v")
    sampling = {"num_steps": len(Partition.of(grids[0], 64))}
    torch.manual_seed(0)
    given = {"model": chain, "num_steps": 64, "teacher_grid": 64, "grids": grids, "sampling": sampling, **values}
    given["taught"] = "tract"
    model = DistilledConfig.parse(given).build(spec)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def seen(network):
    inputs = []
    network.register_forward_pre_hook(lambda _, given: inputs.append((given[0].clone(), float(given[1][0]))))
    return inputs


def test_only_the_grids_that_were_distilled_can_be_sampled():
    model = students([[1, 16, 64], 8, 1])
    assert sorted(model.grids) == [1, 3, 8]
    for wrong in (2, 4, 64, 50):
        with pytest.raises(UserError, match=f"num_steps: {wrong} is no grid that was distilled; those are 1, 3, 8"):
            model.sample(2, num_steps=wrong)
    for name, value in {"solver": "heun", "spacing": "karras", "clip": False, "eta": 0.3}.items():
        with pytest.raises(UserError, match=f"{name}: .* given, but of a student only num_steps can be chosen"):
            model.sample(2, **{name: value})
    with pytest.raises(ConfigError, match="num_steps: 0 is not valid"):
        model.sample(2, num_steps=0)
    assert model.sample(2).nfe == 3
    with pytest.raises(UserError, match="nothing to train"):
        model.loss(Batch(torch.zeros(1, 2)), StepDraws(0, 0, 0, 1, 1))


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_each_grid_has_its_own_student(num_steps):
    model = students([[1, 16, 64], 8, 1])
    networks = [student.network for student in model.students]
    counted, steps = [seen(network) for network in networks], []
    samples = model.sample(4, num_steps=num_steps, on_step=lambda done, of: steps.append((done, of)))
    place = [3, 8, 1].index(num_steps)
    assert samples.nfe == num_steps
    assert [len(calls) for calls in counted] == [num_steps if i == place else 0 for i in range(3)]
    assert steps == [(k + 1, num_steps) for k in range(num_steps)]
    tops = {3: [64, 16, 1], 8: [64, 56, 48, 40, 32, 24, 16, 8], 1: [64]}[num_steps]
    assert [label for _, label in counted[place]] == pytest.approx([1000 * top / 64 for top in tops], rel=1e-6)
    assert model.student(num_steps).network is networks[place]


def test_the_last_step_returns_the_estimate():
    model = students([8, 1])
    for num_steps in (8, 1):
        estimates = []
        model.student(num_steps).register_forward_hook(lambda *call, kept=estimates: kept.append(call[-1].clone()))
        samples = model.sample(6, seed=2, num_steps=num_steps)
        assert len(estimates) == num_steps
        assert torch.allclose(samples.data, estimates[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddpm", "edm"])
def test_samples_are_paired_with_the_teacher_s(kind):
    chain = METHODS.parse({"kind": kind, "network": TINY.to_json(), "sampling": {"num_steps": 64, "solver": "ddim"}})
    torch.manual_seed(1)
    teacher = chain.build(PLANE)
    for parameter in teacher.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    model = students([4, 64], chain=chain)
    inputs = {n: seen(model.student(n).network) for n in (4, 64)}
    theirs = seen(teacher.denoiser.network)
    wanted = teacher.sample(5, seed=3)
    for num_steps in (4, 64):
        model.sample(5, seed=3, num_steps=num_steps)
        assert torch.equal(inputs[num_steps][0][0], theirs[0][0])
        assert inputs[num_steps][0][1] == theirs[0][1]
    # On the teacher's own grid, with its weights, a student is the teacher.
    model.student(64).load_state_dict(teacher.denoiser.state_dict())
    assert torch.equal(model.sample(5, seed=3, num_steps=64).data, wanted.data)
    assert not torch.equal(model.sample(5, seed=4, num_steps=64).data, wanted.data)


def test_a_coarse_grid_is_made_of_steps_of_the_finest():
    """On 1000 discrete steps four groups start at 1000, 750, 500 and 250: not where four even steps would."""
    model = students([4, [64]], chain=DDPMConfig(network=TINY))
    finest = TimeGrid.of(model.schedule, 64).levels[::-1]
    assert model.finest == finest
    assert model.grids[4].levels == (finest[64], finest[48], finest[32], finest[16], CLEAN)
    assert model.grids[1].levels == (finest[64], CLEAN)
    sizes = {"num_steps": 1000, "teacher_grid": 1000, "grids": [4], "sampling": {"num_steps": 4}, "taught": "tract"}
    whole = DistilledConfig.parse({"model": DDPMConfig(network=TINY), **sizes}).build(PLANE)
    assert [level.t for level in whole.grids[4].levels] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_samples_do_not_depend_on_the_batch_and_follow_classes():
    chain = DDPMConfig(network=TINY, schedule="trig", parametrization="v", conditional=True)
    model = students([4, 1], spec=CLASSES, chain=chain, conditional=True)
    whole = model.sample(7, seed=1)
    assert whole.condition.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.allclose(model.sample(7, seed=1, batch_size=3).data, whole.data, atol=1e-5)
    assert not torch.allclose(model.sample(7, seed=1, condition=1).data, whole.data, atol=1e-3)


def test_students_of_bounded_data_stay_inside():
    spec = DataSpec(kind="points", shape=(2,), range=(-1, 1))
    for clip in (True, False):
        model = students([4], spec=spec, clip=clip)
        for parameter in model.parameters():
            parameter.data.mul_(4)
        with torch.no_grad():
            x, _ = model.generate(SampleDraws(0, 0, 64), model.sampling(), None, quiet)
        assert (float(x.abs().max()) <= 1) == clip


def test_two_grids_of_one_length_are_refused():
    with pytest.raises(ConfigError, match=r"grids: two have the same number of steps \(2, 2\)"):
        students([2, [16, 64]])


def test_a_student_is_what_its_phase_trained():
    """The weights of a phase's student, put into a model of students, give the same samples."""
    model = phase("tract", 64, 8, schedule="trig")
    model.begin(random(model, std=0.5))
    sizes = {"num_steps": 64, "teacher_grid": 64, "grids": [8, 1], "sampling": {"num_steps": 1}, "taught": "tract"}
    together = DistilledConfig.parse({"model": model.config.model, **sizes}).build(LINE)
    together.student(8).load_state_dict(model.learner.state_dict())
    assert torch.equal(together.sample(9, seed=5, num_steps=8).data, model.sample(9, seed=5).data)
    assert list(model.grids) == [8]
    assert model.grids[8] == together.grids[8]

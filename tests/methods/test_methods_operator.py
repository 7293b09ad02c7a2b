"""The neural operator: its slices, their weights, what it is regressed onto, what it samples, what is refused."""

import math

import pytest
import torch
from torch import nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian import PARAMETRIZATIONS, SCHEDULES
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.gaussian.jumps import jump
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.gaussian.parametrization import VParametrization
from osmose.gaussian.schedule import CLEAN, Level, TrigSchedule
from osmose.methods.messages import Batch
from osmose.methods.operator import DSNOConfig
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

PLANE = DataSpec(kind="points", shape=(2,))
CLASSES = DataSpec(kind="points", shape=(2,), num_classes=3)
IMAGES = DataSpec(kind="image", shape=(1, 8, 8), range=(-1, 1))
TINY = MLPConfig(width=12, depth=2)
#: Schedules and parametrizations, of all kinds that an operator may have.
FORMS = [
    (schedule, parametrization)
    for schedule in SCHEDULES.entries
    for parametrization in PARAMETRIZATIONS.entries
    if parametrization != "eps"
]
every_form = pytest.mark.parametrize(("schedule", "parametrization"), FORMS)


def build(spec=PLANE, seed=0, **options):
    """An operator with weights of chance."""
    options = {"network": TINY, "schedule": TrigSchedule(), "parametrization": VParametrization(), **options}
    torch.manual_seed(seed)
    model = DSNOConfig(**options).build(spec)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model


class Stored:
    """Trajectories in memory that keep what they were asked for."""

    def __init__(self, levels, states, classes=None):
        self.levels, self.states, self.classes, self.asked = tuple(levels), states, classes, []

    def __len__(self):
        return len(self.states)

    def rows(self, indices):
        self.asked += indices.tolist()
        return self.states[indices], None if self.classes is None else self.classes[indices]


def level_at(schedule, t):
    return Level(*(float(value) for value in schedule.level(t)))


def stored(schedule, count=60, points=8, shape=(2,), seed=0):
    """Trajectories at (k / points)^2 whose states are noise."""
    generator = torch.Generator().manual_seed(seed)
    steps = schedule.native_steps or 10**9
    levels = [level_at(schedule, round((k / points) ** 2 * steps) / steps) for k in range(points, -1, -1)]
    return Stored(levels, torch.randn(count, points + 1, *shape, generator=generator))


def close(one, other, tolerance=1e-5):
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def draws(count=8, step=0):
    return StepDraws(0, step, 0, count, count)


def size(count=8, shape=(2,)):
    """A batch of which only the size matters."""
    return Batch(torch.full((count, *shape), math.nan))


# --- slices ---------------------------------------------------------------------------------------------------------


@every_form
def test_without_temporal_layers_a_slice_is_the_network_told_its_time(schedule, parametrization):
    schedule, parametrization = SCHEDULES.parse(schedule), PARAMETRIZATIONS.parse(parametrization)
    model = build(schedule=schedule, parametrization=parametrization, modes=0)
    other = TINY.build((2,))
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    teacher = NetworkDenoiser(other, schedule, parametrization)
    model.begin(teacher, stored(schedule))
    x = torch.randn(5, 2) * schedule.prior_std
    top = level_at(schedule, 1.0)
    c_in = parametrization.coefficients(top).c_in
    raw = model.operator(c_in * x, model._labels)
    solved = model.solve(x)
    assert raw.shape == solved.shape == (5, 4, 2)
    for index, k in enumerate((3, 2, 1, 0)):
        time = (k / 4) ** 2
        if schedule.native_steps:
            time = round(time * schedule.native_steps) / schedule.native_steps
        level = level_at(schedule, time)
        assert model.levels[index] == level
        label = torch.full((5,), float(schedule.label(level)))
        out = other(c_in * x, label)
        assert close(raw[:, index], out, 1e-6)
        x0 = teacher.denoised(out, x, top)
        expected = x0 if k == 0 else jump(x, x0, top, level)
        assert close(solved[:, index], expected)
        eps = (x - top.alpha * x0) / top.sigma
        if k:
            assert close(solved[:, index], level.alpha * x0 + level.sigma * eps)


@every_form
def test_with_the_right_answers_it_is_the_flow_of_gaussian_data(schedule, parametrization):
    """x(t) = alpha m + std(t) / std(T) (x_T - alpha_T m), which a network can give by its F at the level T."""
    schedule, parametrization = SCHEDULES.parse(schedule), PARAMETRIZATIONS.parse(parametrization)
    model = build(schedule=schedule, parametrization=parametrization, modes=0, num_times=6, grid="even").double()
    mean, deviations = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 2.0]).double()
    oracle = GaussianDenoiser(mean, deviations**2)
    top = level_at(schedule, 1.0)
    c = parametrization.coefficients(top)
    ends = [*model.levels[:-1], CLEAN]

    class Knowing(nn.Module):
        def forward(self, y, label, condition=None):  # noqa: ARG002
            x = y / c.c_in
            index = (label[:, None].double() - model._labels).abs().argmin(1)
            x0 = torch.stack(
                [
                    (oracle.flow(x[i : i + 1], top, ends[j]) - ends[j].sigma / top.sigma * x[i : i + 1])
                    / (ends[j].alpha - ends[j].sigma / top.sigma * top.alpha)
                    for i, j in enumerate(index.tolist())
                ]
            )[:, 0]
            return (x0 - c.c_skip * x) / c.c_out

    model.operator.backbone = Knowing()
    x = torch.randn(3, 2, dtype=torch.float64) * schedule.prior_std
    solved = model.solve(x)
    for index, end in enumerate(ends):
        assert close(solved[:, index], oracle.flow(x, top, end), 1e-6 * schedule.prior_std)


def test_times_fall_to_the_data():
    def times(**options):
        model = build(**options)
        assert model.path_levels[1:] == model.levels
        return [level.t for level in model.path_levels]

    assert times(num_times=4) == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert times(num_times=4, grid="even") == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert times(num_times=1, modes=1) == [1.0, 0.0]
    assert times(schedule={"kind": "cosine", "num_steps": 100}) == [1.0, 0.56, 0.25, 0.06, 0.0]


def test_the_last_slice_is_clean_data_also_where_the_schedule_keeps_noise():
    model = build(schedule="ve", parametrization="x0", modes=0)
    assert model.levels[-1].sigma == pytest.approx(0.002)
    x = 80 * torch.randn(3, 2)
    assert close(model.solve(x)[:, -1], model.operator(x, model._labels)[:, -1], 1e-6)


def test_temporal_layers_begin_near_nothing_and_mix_the_slices():
    torch.manual_seed(0)
    config = DSNOConfig(network=TINY, schedule=TrigSchedule(), parametrization=VParametrization())
    model = config.build(PLANE)
    assert len(model.operator.mixers) == 2
    model.operator.backbone.head[-1].weight.data.normal_()
    x = torch.randn(4, 2)
    with_layers = model.solve(x)
    backbone = NetworkDenoiser(model.operator.backbone, config.schedule, config.parametrization)
    plain = config.replace(modes=0).build(PLANE)
    plain.operator.backbone = backbone.network
    assert close(with_layers, plain.solve(x), 0.3)
    assert not close(with_layers, plain.solve(x), 1e-4)
    for layer in model.operator.mixers:
        layer.weight.data.zero_()
    assert close(model.solve(x), plain.solve(x), 1e-6)


def test_items_do_not_meet():
    model = build(CLASSES, conditional=True)
    x, classes = torch.randn(6, 2), torch.arange(6) % 3
    whole, order = model.solve(x, classes), torch.randperm(6)
    assert close(model.solve(x[order], classes[order]), whole[order], 1e-5)
    assert close(model.solve(x[2:3], classes[2:3]), whole[2:3], 1e-5)
    assert not close(model.solve(x, classes.flip(0)), whole, 1e-3)


def test_images_and_their_unet():
    unet = UNetConfig(channels=4, mult=(1, 1), blocks=1, attention=(4,))
    model = build(IMAGES, network=unet)
    x = torch.randn(2, 1, 8, 8)
    assert model.solve(x).shape == (2, 4, 1, 8, 8)
    # Down, the middle, and up.
    assert len(model.operator.mixers) >= 4


# --- the loss -------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_published_schedule():
    """Clip(alpha / sigma, 1, cap); 1, 2.4, 10.2, 10^4 on the published grid with arctangent-shaped times."""
    model = build()
    ratios = [1 / math.tan(t * math.pi / 2) for t in (0.5625, 0.25, 0.0625)]
    expected = torch.tensor([max(1.0, ratios[0]), ratios[1], ratios[2], 1e4])
    assert ratios[0] < 1
    assert expected[1:3].tolist() == pytest.approx([2.414, 10.153], abs=1e-3)
    assert close(model._weights, expected / expected.sum(), 1e-6)
    assert float(model._weights.sum()) == pytest.approx(1)
    assert float(model._weights[-1]) > 0.998
    low = build(weight_cap=2.0)
    assert close(low._weights, torch.tensor([1.0, 2.0, 2.0, 2.0]) / 7, 1e-6)
    assert close(build(weight_cap=1.0)._weights, torch.full((4,), 0.25), 1e-6)
    # Of a schedule whose last time has noise, the ratio there.
    noisy = build(schedule="ve", parametrization={"kind": "edm", "sigma_data": 1.0})
    sigmas = SCHEDULES.parse("ve").level(torch.tensor([0.5625, 0.25, 0.0625, 0.0])).sigma
    expected = (1 / sigmas).clamp(min=1)
    assert float(expected[-1]) == pytest.approx(500)
    assert close(noisy._weights.double(), expected / expected.sum(), 1e-6)


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("training", [True, False])
def test_value_of_the_loss(kind, training):
    model = build(loss=kind, weight_cap=5.0)
    paths = stored(model.config.schedule)
    teacher = NetworkDenoiser(TINY.build((2,)), model.config.schedule, model.config.parametrization)
    model.begin(teacher, paths)
    model.train(training)
    terms = model.loss(size(), draws())
    states = paths.states[paths.asked]
    # Of points at (k / 8)^2, k = 8..0, those at (k / 4)^2 are every other.
    difference = model.solve(states[:, 0]) - states[:, [2, 4, 6, 8]]
    error = difference.abs().mean(2) if kind == "l1" else difference.square().mean(2)
    weight = torch.tensor([1.0, 2.4142136, 5.0, 5.0])
    assert close(terms.per_item, (error * weight).sum(1) / weight.sum())
    assert terms.per_item.requires_grad
    assert terms.t is None
    assert close(terms.parts["end_squared_error"], difference[:, -1].square().mean(1))
    assert not terms.parts["end_squared_error"].requires_grad


def test_trajectories_of_training_and_of_validation_are_others():
    model = build()
    paths = stored(model.config.schedule, count=60)
    model.begin(NetworkDenoiser(TINY.build((2,)), model.config.schedule, model.config.parametrization), paths)
    for step in range(100):
        model.loss(size(), draws(step=step))
    training = set(paths.asked)
    paths.asked.clear()
    model.eval()
    for step in range(20):
        model.loss(size(), draws(step=step))
    held_out = set(paths.asked)
    assert training == set(range(57))
    assert held_out == {57, 58, 59}


def test_what_is_drawn_does_not_depend_on_how_the_batch_is_cut():
    model = build()
    paths = stored(model.config.schedule)
    model.begin(NetworkDenoiser(TINY.build((2,)), model.config.schedule, model.config.parametrization), paths)
    whole = model.loss(size(8), StepDraws(0, 3, 0, 8, 8)).per_item
    parts = [model.loss(size(4), StepDraws(0, 3, i, i + 4, 8)).per_item for i in (0, 4)]
    assert close(whole, torch.cat(parts))


def test_classes_go_with_their_trajectories():
    model = build(CLASSES, conditional=True)
    paths = stored(model.config.schedule)
    paths.classes = torch.arange(60) % 3
    network = TINY.build((2,), num_classes=3)
    model.begin(NetworkDenoiser(network, model.config.schedule, model.config.parametrization), paths)
    seen = []
    solve = model.solve
    model.solve = lambda x, condition: (seen.extend(condition.tolist()), solve(x, condition))[1]
    # The batch's own classes say nothing.
    model.loss(Batch(torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64)), draws())
    assert seen == [index % 3 for index in paths.asked]
    assert set(seen) == {0, 1, 2}


def test_it_learns_trajectories():
    """Those of Gaussian data are linear in the noise."""
    schedule = TrigSchedule()
    oracle = GaussianDenoiser(torch.tensor([0.5, 0.0]), torch.tensor([0.09, 1.0]))
    levels = [level_at(schedule, (k / 4) ** 2) for k in range(4, -1, -1)]
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    states = torch.stack([oracle.flow(noise, levels[0], level) for level in levels], 1)
    torch.manual_seed(0)
    model = DSNOConfig(
        network=TINY, schedule=schedule, parametrization=VParametrization(), weight_cap=3.0, warm_start=False
    ).build(PLANE)
    model.begin(NetworkDenoiser(TINY.build((2,)), schedule, VParametrization()), Stored(levels, states))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def error():
        with torch.no_grad():
            return float((model.solve(noise[380:]) - states[380:, 1:]).square().mean().sqrt())

    before = error()
    for step in range(150):
        optimizer.zero_grad()
        model.loss(size(64), draws(64, step)).per_item.mean().backward()
        optimizer.step()
    assert error() < before / 4


# --- what it begins with --------------------------------------------------------------------------------------------


def test_it_begins_with_the_weights_of_its_teacher():
    model = build()
    layers = [layer.weight.clone() for layer in model.operator.mixers]
    network = TINY.build((2,))
    for parameter in network.parameters():
        parameter.data.normal_()
    teacher = NetworkDenoiser(network, model.config.schedule, model.config.parametrization)
    paths = stored(model.config.schedule)
    model.begin(teacher, paths)
    assert all(map(torch.equal, model.operator.backbone.state_dict().values(), network.state_dict().values()))
    assert all(map(torch.equal, layers, [layer.weight for layer in model.operator.mixers]))
    cold = build(warm_start=False)
    cold.begin(teacher, paths)
    assert not torch.equal(cold.operator.backbone.stem.weight, network.stem.weight)
    with pytest.raises(UserError, match="they have to be alike"):
        build(network=TINY.replace(width=16)).begin(teacher, paths)
    assert not any("paths" in name or "_labels" in name for name in model.state_dict())


def test_trajectories_that_do_not_fit_are_refused():
    model = build(num_times=3)
    teacher = NetworkDenoiser(TINY.build((2,)), model.config.schedule, model.config.parametrization)
    with pytest.raises(
        UserError, match=r"num_times: 3 needs the state at t = 0\.444444, which the trajectories do not"
    ):
        model.begin(teacher, stored(model.config.schedule))
    with pytest.raises(UserError, match=r"theirs are 1, 0\.7656, 0\.5625"):
        model.begin(teacher, stored(model.config.schedule))
    with pytest.raises(UserError, match=r"num_times: 4 needs the state at t = 0\.75"):
        build(grid="even").begin(teacher, stored(model.config.schedule))
    with pytest.raises(UserError, match="trajectories: 1 is not enough: one at least is held out"):
        build().begin(teacher, stored(model.config.schedule, count=1))
    build().begin(teacher, stored(model.config.schedule, count=2))


def test_there_is_no_training_without_trajectories():
    with pytest.raises(UserError, match="dsno: has no trajectories; it is continued by osmose distill dsno"):
        build().loss(size(), draws())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_times": 4, "modes": 4}, "modes: 4 is more than 4 times have, 3"),
        ({"num_times": 1, "modes": 2}, "modes: 2 is more than 1 times have, 1"),
        ({"num_times": 5, "modes": 4}, "modes: 4 is more than 5 times have, 3"),
        ({"num_times": 0}, "num_times"),
        ({"modes": -1}, "modes"),
        ({"weight_cap": 0.5}, "weight_cap"),
        ({"loss": "perceptual"}, "loss"),
        ({"grid": "cosine"}, "grid"),
        ({"parametrization": "eps"}, "parametrization: 'eps' cannot give x0 from pure noise; use v, x0 or edm"),
    ],
)
def test_settings_that_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        DSNOConfig.parse({"network": TINY, "schedule": "trig", "parametrization": "v", **values})


@pytest.mark.parametrize(("num_times", "modes"), [(4, 3), (1, 1), (5, 3), (4, 0)])
def test_as_many_modes_as_there_are(num_times, modes):
    assert build(num_times=num_times, modes=modes).solve(torch.randn(2, 2)).shape == (2, num_times, 2)


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["trig", "ve", "cosine"])
def test_samples_are_the_ends_of_its_trajectories(schedule):
    model = build(CLASSES, schedule=schedule, conditional=True)
    samples = model.sample(7, seed=3)
    assert samples.nfe == 4
    assert samples.condition.tolist() == [0, 1, 2, 0, 1, 2, 0]
    noise = SampleDraws(3, 0, 7).normal((2,)) * SCHEDULES.parse(schedule).prior_std
    with torch.no_grad():
        assert close(samples.data, model.solve(noise, samples.condition)[:, -1])
    found = model.trajectories(7, seed=3, batch_size=3)
    paths, sizes = found.states, torch.tensor([level.size for level in model.path_levels])
    assert paths.shape == (7, 5, 2)
    assert found.done == (0, 1, 2, 3, 4)
    assert close(paths[:, 0] * sizes[0], noise)
    with torch.no_grad():
        assert close(paths[:, 1:] * sizes[1:, None], model.solve(noise, samples.condition))
    assert close(model.spec.decode(paths[:, -1]), samples.data)
    assert len(model.path_levels) == 5
    ones = model.trajectories(7, seed=3, condition=1).states
    assert close(ones[:, -1], model.sample(7, seed=3, condition=1).data)
    assert close(model.sample(7, seed=3, batch_size=2).data, samples.data)


def test_samples_of_images_are_kept_in_their_range_and_trajectories_are_not():
    model = build(IMAGES, network=UNetConfig(channels=4, mult=(1,), blocks=1, attention=()))
    model.operator.backbone.conv_out.weight.data.mul_(50)
    samples, paths = model.sample(3, seed=1).data, model.trajectories(3, seed=1).states
    assert float(samples.abs().max()) == 1
    assert float(paths[:, -1].abs().max()) > 1
    assert torch.equal(samples, model.spec.decode(paths[:, -1]))


def test_one_call_is_all_there_is():
    model = build()
    assert model.sample(2, num_steps=1).nfe == 4
    for count in (0, 2, 4):
        with pytest.raises(UserError, match=f"num_steps: {count} is not valid"):
            model.sample(2, num_steps=count)
    seen = []
    model.sample(4, batch_size=2, on_step=lambda done, of: seen.append((done, of)))
    assert seen == [(k, 8) for k in range(1, 9)]
    calls = []
    model.operator.backbone.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    model.sample(3)
    assert calls == [12]
    calls.clear()
    model.probe(5)
    assert calls == [20]
    assert model.networks() == [model.operator]


def test_the_recipe_and_its_configuration_survive_writing():
    model = build(num_times=8, modes=3, grid="even", weight_cap=10.0)
    again = DSNOConfig.parse(model.config.to_json())
    assert again == model.config
    assert set(DSNOConfig.recipe(PLANE, 1.0)) == {"network"}

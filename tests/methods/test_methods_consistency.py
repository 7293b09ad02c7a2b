"""Consistency models: tangents and gradients in closed form, targets, warm-up, segments, sampling, refusals."""

import itertools
import math
import warnings
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian import SCHEDULES
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.gaussian.oracles import MixtureDenoiser
from osmose.gaussian.parametrization import EDMParametrization, column
from osmose.gaussian.schedule import TrigSchedule
from osmose.gaussian.trigflow import TrigFlow, angle_of, level_of, turned
from osmose.methods import METHODS
from osmose.methods.consistency import AdaptiveWeight, ECTConfig, SCDConfig, SCTConfig
from osmose.methods.messages import Batch
from osmose.networks.base import NetworkConfig
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

LINE = DataSpec(kind="points", shape=(1,))
PLANE = DataSpec(kind="points", shape=(2,))
CLASSES = DataSpec(kind="points", shape=(2,), num_classes=3)
IMAGES = DataSpec(kind="image", shape=(1, 8, 8), range=(-1, 1))
SD = 0.6
TINY = MLPConfig(width=12, depth=1, time_frequency=0.01, modulation="double-norm")
EDM = EDMParametrization(sigma_data=SD)
KINDS = {"scd": SCDConfig, "sct": SCTConfig, "ect": ECTConfig}
every_kind = pytest.mark.parametrize("kind", list(KINDS))
#: Name: schedule and parametrization, of all kinds that a consistency model may have.
FORMS: dict[str, dict[str, Any]] = {
    "edm-trig": {"parametrization": EDM},
    "edm-ve": {"parametrization": EDM, "schedule": "ve"},
    "v-trig": {"parametrization": "v"},
    "v-cosine": {"parametrization": "v", "schedule": {"kind": "cosine", "num_steps": 8}},
    "v-straight": {"parametrization": "v", "schedule": "straight"},
}


class Closed(nn.Module):
    """A network whose output is minus a function of the angle times its input: EDM's F on the trig schedule."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, y, label, condition=None):  # noqa: ARG002
        angle = torch.atan(torch.tan(label.double() * (math.pi / 2000)) / SD)
        return (-y * column(self.function(angle), y)).to(y.dtype)


def spread(angle, deviation):
    """Of x at an angle, for data of a deviation."""
    return ((angle.cos() * deviation) ** 2 + (angle.sin() * SD) ** 2).sqrt()


def exact_teacher(deviation):
    """V / sd = F y for data N(0, s^2)."""
    return Closed(lambda t: t.cos() * t.sin() * (SD**2 - deviation**2) / spread(t, deviation) ** 2)


def exact_student(deviation, bottom=0.0):
    """Of f(x, t) = x std(bottom) / std(t), which leads to a bottom."""

    def function(t):
        end = spread(torch.full_like(t, bottom), deviation)
        return ((t - bottom).cos() - end / spread(t, deviation)) / (t - bottom).sin()

    return Closed(function)


def denoiser(network, schedule=None, parametrization=EDM):
    return NetworkDenoiser(network, schedule or TrigSchedule(), parametrization)


def build(kind, spec=PLANE, given=None, seed=0, **options):
    """A model with weights of chance, or with a given network."""
    options = {"network": TINY, "parametrization": EDM, **options}
    torch.manual_seed(seed)
    model = KINDS[kind](**options).build(spec)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    if given is not None:
        model.denoiser.network = given
    return model


def exactly(model):
    """The model with a network in float64."""
    model.denoiser.double()
    return model


def taught(spec=PLANE, teacher=None, **options):
    """A scd with another network of chance for its teacher, float64."""
    model = exactly(build("scd", spec, **options))
    other = exactly(build("scd", spec, seed=5, **options)).denoiser
    own = model.denoiser
    model.begin(other if teacher is None else denoiser(teacher, own.schedule, own.parametrization))
    if teacher is None:  # not at the teacher itself, where the first term vanishes
        for parameter in own.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def items(count=8, spec=PLANE, seed=1):
    """A batch and noise, float64, and angles all over the range."""
    generator = torch.Generator().manual_seed(seed)
    x0, z = torch.randn(2, count, *spec.shape, generator=generator, dtype=torch.float64)
    condition = torch.arange(count) % spec.num_classes if spec.num_classes else None
    return Batch(x0, condition), torch.linspace(0.05, 1.5, count, dtype=torch.float64), SD * z


def at(batch, angle, z):
    return column(angle.cos(), z) * batch.x0 + column(angle.sin(), z) * z


def close(one, other, tolerance):
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def draws(count=8, step=0):
    return StepDraws(0, step, 0, count, count)


# --- the tangent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [0.2, SD, 2.0])
def test_the_tangent_of_the_exact_consistency_model_vanishes(deviation):
    model = build("scd", given=exact_student(deviation))
    model._teacher = [TrigFlow(denoiser(exact_teacher(deviation)), SD)]
    batch, angle, z = items()
    batch = Batch(batch.x0 * deviation)
    x, g, change = model.tangent(batch, angle, z, 1.0)
    assert torch.equal(x, at(batch, angle, z))
    assert float(g.abs().max()) < 2e-5
    assert float(change.abs().max()) > 0.01
    assert float(model.tangent(batch, angle, z, 0.5)[1].abs().max()) > 0.01
    # At f itself: the deviation of the data, whatever the angle.
    assert close(model.flow.x0(x, angle), column(deviation / spread(angle, deviation), x) * x, 1e-5)


@pytest.mark.parametrize("segments", [2, 3])
def test_the_tangent_of_exact_segments_vanishes(segments):
    deviation = 0.2
    model = build("scd", segments=segments)
    model._teacher = [TrigFlow(denoiser(exact_teacher(deviation)), SD)]
    for segment in range(segments):
        bottom = model.start * segment / segments
        model.denoiser.network = exact_student(deviation, bottom)
        batch, _, z = items()
        angle = bottom + torch.linspace(0.02, 0.98, 8, dtype=torch.float64) * model.start / segments
        _, g, _ = model.tangent(batch, angle, z, 1.0)
        assert close(model.bottom(angle), torch.full_like(angle, bottom), 1e-12)
        assert float(g.abs().max()) < 5e-5
        wrong = exact_student(deviation, 0.0 if segment else 0.1)
        model.denoiser.network = wrong
        assert float(model.tangent(batch, angle, z, 1.0)[1].abs().max()) > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("segments", [1, 3])
def test_the_tangent_is_the_derivative_along_the_teachers_flow(form, segments):
    """G = cos(t - t_k) df_k/dt of f_k = cos(t - t_k) x - sin(t - t_k) V, as torch differentiates the denoiser."""
    model = taught(segments=segments, **FORMS[form])
    own, sd = model.denoiser, model.config.sigma_data
    batch, angle, z = items()
    if form == "v-cosine":  # away from where the slopes of a table have jumps
        places = torch.tensor([1.3, 1.6, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5])
        angle = angle_of(own.schedule.level(places / 8), sd)
    bottom = model.bottom(angle)

    def f(x, angle):
        level = level_of(angle, own.schedule, sd)
        size = ((level.alpha * sd) ** 2 + level.sigma**2).sqrt() / sd
        x0 = own(column(size, x) * x, level)
        velocity = (column(angle.cos(), x) * x - x0) / column(angle.sin(), x)
        return column((angle - bottom).cos(), x) * x - column((angle - bottom).sin(), x) * velocity

    x, g, _ = model.tangent(batch, angle, z, 1.0)
    direction = model.teacher.velocity(x, angle)
    _, change = torch.func.jvp(f, (x, angle), (direction, torch.ones_like(angle)))
    expected = column((angle - bottom).cos(), x) * change
    assert float(expected.abs().max()) > 0.1
    assert close(g, expected, 2e-5)
    assert segments == 1 or not close(g, taught(**FORMS[form]).tangent(batch, angle, z, 1.0)[1], 1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_the_direction_of_consistency_training_is_that_of_the_pair(form):
    model = exactly(build("sct", **FORMS[form]))
    batch, angle, z = items()
    x = at(batch, angle, z)
    direction = model.direction(x, batch.x0, z, angle, None)
    assert close(direction, column(angle.cos(), z) * z - column(angle.sin(), z) * batch.x0, 1e-12)
    h = 1e-5
    assert close(direction, (at(batch, angle + h, z) - at(batch, angle - h, z)) / (2 * h), 1e-8)
    velocity, change = model.flow.derivative(x, angle, direction, torch.ones_like(angle))
    cos, sin = column(angle.cos(), x), column(angle.sin(), x)
    expected = -(cos**2) * (velocity - direction) - cos * sin * (x + change)
    assert close(model.tangent(batch, angle, z, 1.0)[1], expected, 1e-6)


@pytest.mark.parametrize("kind", ["scd", "sct"])
def test_the_share_of_the_second_part(kind):
    model = taught() if kind == "scd" else exactly(build("sct"))
    batch, angle, z = items()
    x = at(batch, angle, z)
    none, half, full = (model.tangent(batch, angle, z, share)[1] for share in (0.0, 0.5, 1.0))
    assert close(half, (none + full) / 2, 1e-9)
    direction = model.direction(x, batch.x0, z, angle, None)
    assert close(none, column(angle.cos().square(), x) * (direction - model.flow.velocity(x, angle)), 1e-9)
    assert not close(none, full, 0.05)


def test_finite_differences_give_nearly_the_same_tangent():
    exact, near = (taught(jvp=jvp) for jvp in ("forward", "finite-diff"))
    near.load_state_dict(exact.state_dict())
    batch, angle, z = items()
    one, other = (model.tangent(batch, angle, z, 1.0) for model in (exact, near))
    assert close(one[1], other[1], 1e-3)
    assert not torch.equal(one[1], other[1])
    assert torch.equal(one[0], other[0])


def test_both_directions_agree_in_the_mean_over_the_data_behind_a_point():
    """E[g_sct | x] = g_scd for an exact teacher: g is affine in dx/dt. Normalised they do not agree."""
    deviation, count = 0.3, 20_000
    student = exactly(build("sct", LINE))
    teacher = build("scd", LINE)
    teacher.denoiser = student.denoiser
    teacher._teacher = [TrigFlow(denoiser(exact_teacher(deviation)), SD)]
    generator = torch.Generator().manual_seed(0)
    for angle in (0.2, 0.8, 1.3):
        t = torch.full((count,), angle, dtype=torch.float64)
        x = 0.5
        total = float(spread(t[0], deviation)) ** 2
        mean = math.cos(angle) * deviation**2 / total * x
        width = math.sqrt(deviation**2 - (math.cos(angle) * deviation**2) ** 2 / total)
        x0 = mean + width * torch.randn(count, 1, generator=generator, dtype=torch.float64)
        z = (x - math.cos(angle) * x0) / math.sin(angle)
        pairs = student.tangent(Batch(x0), t, z, 1.0)[1]
        flow = teacher.tangent(Batch(x0[:1]), t[:1], z[:1], 1.0)[1]
        assert pairs.std() > 0.01
        assert abs(float(pairs.mean() - flow.mean())) < 5 * float(pairs.std()) / math.sqrt(count) + 1e-6
        assert torch.allclose(student.tangent(Batch(x0), t, z, 1.0)[0], torch.tensor(x, dtype=torch.float64))
        tamed = student.tamed(pairs)
        assert abs(float(tamed.mean() - student.tamed(flow).mean())) > 5 * float(tamed.std()) / math.sqrt(count)


# --- how it is taught -----------------------------------------------------------------------------------------------


def test_the_length_of_a_normalised_tangent():
    g = torch.randn(5, *IMAGES.shape, dtype=torch.float64) * torch.tensor([1e-6, 1e-2, 1, 30, 1e4])[:, None, None, None]
    size = g.flatten(1).norm(dim=1)
    unet = UNetConfig(channels=4, mult=(1,), blocks=1, attention=(), time_frequency=0.01)
    l2 = build("sct", IMAGES, network=unet, tangent_c=0.3)
    assert close(l2.tamed(g).flatten(1).norm(dim=1), size / (size + 0.3), 1e-12)
    # The place where c bites is at 0.3 itself, or at 0.3 sqrt(D).
    rms = build("sct", IMAGES, network=unet, tangent_c=0.3, norm="rms")
    length = rms.tamed(g).flatten(1).norm(dim=1)
    assert close(length, size / (size / 8 + 0.3), 1e-12)
    at_c = g / column(size, g) * 0.3
    assert close(l2.tamed(at_c).flatten(1).norm(dim=1), torch.full((5,), 0.5).double(), 1e-12)
    assert close(rms.tamed(at_c * 8).flatten(1).square().mean(1).sqrt(), torch.full((5,), 0.5).double(), 1e-12)
    for model in (l2, rms):
        assert close(
            torch.nn.functional.cosine_similarity(model.tamed(g).flatten(1), g.flatten(1)), g.new_ones(5), 1e-6
        )
        assert torch.equal(model.tamed(torch.zeros_like(g)), torch.zeros_like(g))


def test_a_clipped_and_a_plain_tangent():
    g = torch.tensor([[0.5, -3.0], [1.0, 1e6]], dtype=torch.float64)
    assert build("sct", tangent="clip").tamed(g).tolist() == [[0.5, -1.0], [1.0, 1.0]]
    assert torch.equal(build("sct", tangent="none").tamed(g), g)


@pytest.mark.parametrize("options", [{"norm": "l2"}, {"norm": "rms"}, {"tangent": "clip"}, {"tangent": "none"}])
@pytest.mark.parametrize("adaptive_weight", [True, False])
@pytest.mark.parametrize("kind", ["scd", "sct"])
def test_value_and_gradient_of_the_loss(kind, adaptive_weight, options):
    """The gradient is -2 e^w / D (grad V / sd)^T g, the value e^w / D ||g||^2 - w."""
    options |= {"adaptive_weight": adaptive_weight, "warmup": 8}
    model = taught(**options) if kind == "scd" else exactly(build(kind, **options))
    model.steps_done += 2
    batch = items()[0]
    terms = model.loss(batch, draws())
    t, angle, z = model._drawn(batch, draws())
    x, g, _ = model.tangent(batch, angle, z, 0.25)
    w = model.weight(angle).detach() if adaptive_weight else torch.zeros(8)
    if adaptive_weight:
        assert float(w.abs().max()) > 0.1
    tamed = model.tamed(g)
    assert close(terms.per_item.detach(), (w.exp() * tamed.square().mean(1) - w).double(), 1e-9)
    assert torch.equal(terms.t, t)
    assert close(terms.parts["tangent"], g.square().mean(1).sqrt(), 1e-12)
    parameters = list(model.denoiser.parameters())
    found = torch.autograd.grad(terms.per_item.sum(), parameters)
    inner = (model.flow.velocity(x, angle) / model.config.sigma_data * tamed).sum(1) * w.exp() * (-2 / 2)
    expected = torch.autograd.grad(inner.sum(), parameters)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3
    assert all(close(one, other, 1e-9) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_without_the_second_part_it_is_diffusion_training(form):
    """At r = 0 the gradient is cos^2 / sd of that of the mean of (V - v)^2, v the velocity of noise and item."""
    model = exactly(build("sct", tangent="none", adaptive_weight=False, warmup=10, **FORMS[form]))
    for index in range(3):
        batch = items()[0]
        one = Batch(batch.x0[index : index + 1])
        found = torch.autograd.grad(model.loss(one, draws(1, index)).per_item.sum(), model.parameters())
        _, angle, z = model._drawn(one, draws(1, index))
        x, v = at(one, angle, z), angle.cos() * z - angle.sin() * one.x0
        error = (model.flow.velocity(x, angle) - v).square().mean()
        plain = torch.autograd.grad(error, model.parameters())
        factor = float(angle.cos() ** 2 / model.config.sigma_data)
        assert factor > 0.01
        assert all(close(a, factor * b, 1e-9) for a, b in zip(found, plain, strict=True))


def test_only_the_network_and_the_weight_are_trained():
    model = taught(adaptive_weight=True)
    model.loss(items()[0], draws()).per_item.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.teacher.denoiser.parameters())
    assert {name.split(".")[0] for name in model.state_dict()} == {"denoiser", "weight", "steps_done"}
    assert set(build("sct", adaptive_weight=False).state_dict()) == {
        "steps_done",
        *(f"denoiser.network.{name}" for name in model.denoiser.network.state_dict()),
    }


def test_the_learned_weight_begins_at_0_and_finds_the_size_of_what_it_weighs():
    torch.manual_seed(0)
    weight = AdaptiveWeight()
    angle = torch.linspace(0.01, 1.56, 256, dtype=torch.float64)
    assert torch.equal(weight(angle), torch.zeros(256))
    error = (0.2 + angle.sin() ** 2).float()
    optimizer = torch.optim.LBFGS(weight.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        w = weight(angle)
        loss = (w.exp() * error - w).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert close((-weight(angle)).exp().detach(), error, 0.05)


def test_the_share_rises_with_the_steps_and_is_kept_with_the_weights():
    model = build("sct", warmup=4)
    assert model.share == 0
    for expected in (0.25, 0.5, 0.75, 1, 1):
        model.after_step([])
        assert model.share == expected
    other = build("sct", warmup=4)
    other.load_state_dict(model.state_dict())
    assert other.share == 1
    assert int(other.steps_done) == 5
    assert build("sct", warmup=0).share == 1
    batch, start = items()[0], exactly(build("sct", warmup=4))
    before = start.loss(batch, draws()).per_item
    start.after_step([])
    assert not torch.equal(before, start.loss(batch, draws()).per_item)


@every_kind
def test_the_recipe_follows_the_data_and_the_length(kind):
    config = METHODS.resolve(kind)
    values = config.recipe(IMAGES, 0.4321)
    assert values["parametrization"] == {"kind": "edm", "sigma_data": 0.432}
    assert values["network"]["modulation"] == "double-norm"
    assert values["network"]["time_frequency"] <= 0.02
    assert config.length_recipe(1000) == ({"stage_steps": 125} if kind == "ect" else {"warmup": 200})
    assert config.length_recipe(1) == ({"stage_steps": 1} if kind == "ect" else {"warmup": 0})
    assert config.training_recipe(IMAGES)["precision"] == "fp32"
    assert config.parse(values | config.length_recipe(3)).build(IMAGES).config.sigma_data == 0.432


class Noted(nn.Module):
    """A network with dropout that keeps what it answered."""

    def __init__(self, network):
        super().__init__()
        self.network, self.dropout, self.answers = network, nn.Dropout(0.5), []

    def forward(self, y, label, condition=None):
        out = self.dropout(self.network(y, label, condition))
        self.answers.append(forward_ad.unpack_dual(out).primal.detach().clone())
        return out


@pytest.mark.parametrize("jvp", ["forward", "finite-diff"])
@pytest.mark.parametrize("kind", ["scd", "sct"])
def test_dropout_is_the_same_in_the_tangent_and_in_what_is_taught(kind, jvp):
    model = taught(jvp=jvp) if kind == "scd" else exactly(build(kind, jvp=jvp))
    if kind == "scd":
        inner = model.teacher.denoiser.network
        noted = Noted(inner).eval()
        model.teacher.denoiser.network = noted
    model.denoiser.network = Noted(model.denoiser.network)
    torch.manual_seed(0)
    model.loss(items()[0], draws())
    *_, tangent, taught_one = model.denoiser.network.answers
    assert 0.2 < float((taught_one == 0).double().mean()) < 0.8
    assert torch.equal(tangent, taught_one)
    if kind == "scd":
        assert not any((answer == 0).any() for answer in noted.answers)
    torch.manual_seed(1)
    model.loss(items()[0], draws())
    assert not torch.equal(model.denoiser.network.answers[-1] == 0, taught_one == 0)


@every_kind
def test_the_loss_does_not_depend_on_the_rest_of_the_batch(kind):
    model = taught() if kind == "scd" else exactly(build(kind))
    model.steps_done += 400
    batch = items(8)[0]
    whole = model.loss(batch, StepDraws(0, 0, 0, 8, 8)).per_item
    halves = [model.loss(Batch(batch.x0[i : i + 4]), StepDraws(0, 0, i, i + 4, 8)).per_item for i in (0, 4)]
    assert close(whole, torch.cat(halves), 1e-6)


def test_a_tangent_that_is_no_number_shows_in_its_item_alone():
    model = taught()
    flow = model.teacher.velocity

    def broken(x, angle, condition=None):
        velocity = flow(x, angle, condition)
        velocity[3] = math.nan
        return velocity

    model.teacher.velocity = broken
    terms = model.loss(items()[0], draws())
    assert terms.per_item.isfinite().tolist() == [index != 3 for index in range(8)]
    assert terms.parts["tangent"].isfinite().tolist() == [index != 3 for index in range(8)]


@every_kind
def test_classes_are_told(kind):
    model = build(kind, CLASSES, conditional=True)
    if kind == "scd":
        model.begin(build("scd", CLASSES, seed=5, conditional=True).denoiser)
    batch = items(8, CLASSES)[0]
    batch = Batch(batch.x0.float(), batch.condition)
    model.steps_done += 1000
    losses = [model.loss(Batch(batch.x0, batch.condition * 0 + label), draws()).per_item for label in (0, 1)]
    assert not torch.allclose(*losses)
    samples = [model.sample(6, condition=label).data for label in (0, 1)]
    assert not torch.allclose(*samples)
    turns = model.sample(6)
    assert turns.condition.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.allclose(turns.data[::3], samples[0][::3], atol=1e-6)


def test_the_teacher_is_a_copy_and_begins_the_student():
    teacher = build("scd", seed=5).denoiser
    model = build("scd")
    model.begin(teacher)
    assert all(map(torch.equal, model.denoiser.state_dict().values(), teacher.state_dict().values()))
    before = model.teacher.denoiser.state_dict()["network.stem.weight"].clone()
    with torch.no_grad():
        teacher.network.stem.weight.zero_()
        model.denoiser.network.stem.weight.zero_()
    assert torch.equal(model.teacher.denoiser.network.stem.weight, before)
    cold = build("scd", warm_start=False)
    cold.begin(teacher)
    assert not torch.equal(cold.denoiser.network.stem.weight, teacher.network.stem.weight)
    assert len(cold.networks()) == 2
    with pytest.raises(UserError, match="has no teacher; a distillation is continued by osmose distill scd"):
        build("scd").loss(Batch(torch.zeros(8, 2)), draws())
    with pytest.raises(UserError, match=r"network: '.*' is \(.*\) in one network and \(.*\) in the other"):
        build("scd", network=TINY.replace(width=16)).begin(teacher)
    with pytest.raises(UserError, match="is in one of the two networks alone"):
        build("sct", network=TINY.replace(depth=2)).begin(teacher)


def test_weights_of_a_learned_variance_are_left_out():
    network = TINY.build((2,), num_outputs=2)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    teacher = NetworkDenoiser(network, SCHEDULES.parse("cosine"), EDM, learned_variance=True)
    model = build("scd", schedule="cosine")
    model.begin(teacher)
    batch, angle, z = items()
    x = at(batch, angle, z).float()
    assert close(model.flow.velocity(x, angle), model.teacher.velocity(x, angle), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_student_begins_as_the_denoiser_of_its_teacher(form):
    teacher = build("scd", seed=5, **FORMS[form]).denoiser
    model = build("scd", **FORMS[form])
    model.begin(teacher)
    batch, angle, z = items()
    x, sd = at(batch, angle, z).float(), model.config.sigma_data
    level = level_of(angle, teacher.schedule, sd)
    size = ((level.alpha * sd) ** 2 + level.sigma**2).sqrt() / sd
    assert close(model.flow.x0(x, angle), teacher(column(size, x) * x, level), 1e-5)
    batch = Batch(batch.x0.float())
    _, g, _ = model.tangent(batch, angle.clamp(model.flow.lowest, model.flow.highest), z.float(), 0.0)
    assert float(g.abs().max()) < 1e-5


# --- consistency by stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 5])
@pytest.mark.parametrize("numbers", [{}, {"q": 4.0, "k": 2.0, "b": 3.0}])
def test_the_earlier_time_is_the_published_one(stage, numbers):
    """R = max(0, t (1 - q^-(stage + 1) (1 + k sigmoid(-b t)))) at deviation 0.5."""
    q, k, b = (numbers.get(name, default) for name, default in (("q", 2.0), ("k", 8.0), ("b", 1.0)))
    model = build("ect", stage_steps=10, **numbers)
    model.steps_done += 10 * stage + 9
    t = torch.logspace(-4, 3, 50, dtype=torch.float64)
    angle = torch.atan(t / 0.5)
    expected = (t * (1 - q ** -(stage + 1) * (1 + k / (1 + (b * t).exp())))).clamp(min=0)
    found = model.earlier(angle)
    assert close(0.5 * found.tan(), expected, 1e-10)
    assert bool((found < angle).all())
    if not numbers:
        assert bool((found == 0).any()) is (stage <= 1)  # 1 + k / 2 is 5, below 2^3


def test_stages_come_after_their_steps():
    model = build("ect", stage_steps=3)
    angle = torch.tensor([1.2], dtype=torch.float64)
    seen = []
    for _ in range(9):
        seen.append(float(model.earlier(angle)))
        model.after_step([])
    assert seen[0] == seen[1] == seen[2] < seen[3] == seen[4] == seen[5] < seen[6] == seen[7] == seen[8] < 1.2


def test_times_below_the_schedules_first_are_clean_data():
    model = build("ect", schedule="ve", stage_steps=1)
    model.steps_done += 4
    angle = torch.tensor([0.0035, 0.05], dtype=torch.float64)
    assert model.flow.lowest == pytest.approx(math.atan(0.002 / SD), rel=5e-3)
    found = model.earlier(angle)
    assert found[0] == 0
    assert found[1] > model.flow.lowest


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("huber_c", [0.0, 0.3])
def test_value_of_the_loss_by_stages(form, huber_c):
    model = exactly(build("ect", stage_steps=1, huber_c=huber_c, **FORMS[form]))
    batch = items()[0]
    for stage in (0, 3):
        model.steps_done.fill_(stage)
        terms = model.loss(batch, draws())
        t, angle, z = model._drawn(batch, draws())
        before = model.earlier(angle)
        clean = before == 0
        assert stage or bool(clean.any())
        target = model.flow.x0(at(batch, before, z), before.clamp(min=max(model.flow.lowest, 1e-6)))
        target = torch.where(clean[:, None], batch.x0, target)
        distance = (model.flow.x0(at(batch, angle, z), angle) - target).norm(dim=1)
        value = ((distance**2 + huber_c**2).sqrt() - huber_c) / (0.5 * (angle.tan() - before.tan()))
        assert close(terms.per_item, value, 1e-6)
        assert torch.equal(terms.t, t)
        assert bool(terms.per_item.isfinite().all())


def test_the_first_target_is_the_data_itself():
    """With a network that gives the data wherever it is asked, nothing is left to learn, and gradients stay finite."""
    model = exactly(build("ect"))
    batch = items()[0]
    terms = model.loss(batch, draws())
    _, angle, z = model._drawn(batch, draws())
    clean = model.earlier(angle) == 0
    assert bool(clean.any())
    distance = (model.flow.x0(at(batch, angle, z), angle) - batch.x0).norm(dim=1)
    assert torch.equal((terms.per_item * 0.5 * angle.tan())[clean].detach() != 0, torch.ones(int(clean.sum())).bool())
    assert close(terms.parts["distance"][clean], distance[clean], 1e-9)
    zero = torch.zeros(8, 2, dtype=torch.float64)
    model.denoiser.network = Closed(lambda t: (t.cos() - 0 * t) / t.sin())  # f = 0 everywhere
    model.loss(Batch(zero), draws()).per_item.sum().isfinite()
    assert float(model.loss(Batch(zero), draws()).per_item.abs().max()) < 1e-6


def test_gradients_by_stages_come_from_the_later_time_alone():
    model = exactly(build("ect", stage_steps=1))
    model.steps_done += 3
    batch = items()[0]
    found = torch.autograd.grad(model.loss(batch, draws()).per_item.sum(), model.parameters())
    _, angle, z = model._drawn(batch, draws())
    before = model.earlier(angle)
    with torch.no_grad():
        target = model.flow.x0(at(batch, before, z), before)
    distance = (model.flow.x0(at(batch, angle, z), angle) - target).norm(dim=1)
    expected = torch.autograd.grad((distance / (0.5 * (angle.tan() - before.tan()))).sum(), model.parameters())
    assert all(close(one, other, 1e-7) for one, other in zip(found, expected, strict=True))


def test_dropout_by_stages_is_the_same_at_both_times():
    model = exactly(build("ect"))
    model.steps_done += 1000
    model.denoiser.network = noted = Noted(model.denoiser.network)
    torch.manual_seed(0)
    model.loss(items()[0], draws())
    one, other = (answer == 0 for answer in noted.answers)
    assert torch.equal(one, other)
    assert bool(one.any())
    assert not bool(one.all())


# --- segments -------------------------------------------------------------------------------------------------------


def test_segments_have_their_bottoms():
    model = build("scd", segments=4)
    length = model.start / 4
    angle = torch.tensor([0.0, 0.5, 0.999, 1.5, 2.25, 3.9999, 4.0], dtype=torch.float64) * length
    assert close(model.bottom(angle) / length, torch.tensor([0, 0, 0, 1, 2, 3, 3]).double(), 1e-12)
    beyond = torch.tensor([model.flow.highest], dtype=torch.float64)
    assert close(model.bottom(beyond), torch.full((1,), 3 * length, dtype=torch.float64), 1e-12)
    assert build("scd").bottom(angle).tolist() == [0.0] * 7


@pytest.mark.parametrize("segments", [2, 5])
def test_segments_are_sampled_from_end_to_end(segments):
    model = build("scd", segments=segments)
    samples = model.sample(6, seed=3)
    assert samples.nfe == segments
    x = SampleDraws(3, 0, 6).normal((2,)) * SD
    assert torch.equal(samples.data, model.sample(6, seed=3, num_steps=segments).data)
    with torch.no_grad():
        for k in range(segments, 0, -1):
            top, bottom = (torch.full((6,), model.start * i / segments, dtype=torch.float64) for i in (k, k - 1))
            x = turned(x, model.flow.velocity(x, top), top - bottom)
    assert close(samples.data, x, 1e-5)


def test_segments_on_unit_gaussian_data_shrink_it_by_a_known_factor():
    """V = 0 for data N(0, sd^2): M straight steps multiply by cos(t_max / M)^M."""
    for segments in (1, 2, 8):
        options = {"num_steps": 1} if segments == 1 else {}
        model = build("scd", segments=segments, given=Closed(torch.zeros_like))
        noise = SampleDraws(0, 0, 5).normal((2,)) * SD
        found = model.sample(5, **options).data
        assert close(found, math.cos(model.start / segments) ** segments * noise, 1e-5)


def test_segments_cannot_be_sampled_otherwise():
    model = build("scd", segments=3)
    for count in (1, 2, 4):
        with pytest.raises(UserError, match=rf"num_steps: {count} is not valid: the model was taught 3 segments"):
            model.sample(2, num_steps=count)
    with pytest.raises(UserError, match=r"t_mid: \[1\.0\] given, but steps end where the 3 segments do"):
        model.sample(2, t_mid=1.0)


# --- sampling -------------------------------------------------------------------------------------------------------


@every_kind
def test_one_step_is_the_function_at_the_start(kind):
    model = build(kind)
    assert model.start == pytest.approx(math.atan(160))
    samples = model.sample(7, seed=2, num_steps=1)
    noise = SampleDraws(2, 0, 7).normal((2,)) * SD
    with torch.no_grad():
        expected = model.flow.x0(noise, torch.full((7,), model.start, dtype=torch.float64))
    assert samples.nfe == 1
    assert close(samples.data, expected, 1e-6)


@pytest.mark.parametrize(
    ("schedule", "start"),
    [
        ({"kind": "ve", "sigma_max": 80.0}, math.atan(80 / SD)),
        ({"kind": "ve", "sigma_max": 1000.0}, math.atan(160)),
        ("trig", math.atan(160)),
        ("cosine", math.atan(160)),
    ],
)
def test_sampling_begins_at_the_largest_noise_or_at_the_published_one(schedule, start):
    assert build("sct", schedule=schedule).start == pytest.approx(start, abs=1e-4)


@pytest.mark.parametrize("mids", [None, (1.1,), (0.3,), (1.4, 0.7, 0.2)])
def test_further_steps_begin_with_fresh_noise(mids):
    """Of the exact consistency model of Gaussian data each step is linear, and its samples have the right deviation."""
    deviation = 0.25
    model = build("sct", given=exact_student(deviation))
    options = {} if mids is None else {"t_mid": mids, "num_steps": len(mids) + 1}
    samples = model.sample(1000, seed=4, **options)
    mids = mids or (1.1,)
    assert samples.nfe == len(mids) + 1
    draws = SampleDraws(4, 0, 1000)
    x, seen = SD * draws.normal((2,)), []
    for angle in (model.start, *mids):
        if angle != model.start:
            z = SD * draws.normal((2,))
            assert not any(torch.allclose(z, other) for other in seen)
            seen.append(z)
            x = math.cos(angle) * x + math.sin(angle) * z
        x = x * deviation / float(spread(torch.tensor(angle, dtype=torch.float64), deviation))
    assert close(samples.data, x, 1e-5)
    assert samples.data.std() == pytest.approx(deviation, rel=0.1)


def test_angles_between_steps_where_nothing_is_said():
    model = build("sct")
    assert model.sampling().num_steps == 2
    assert model.sampling().t_mid == (1.1,)
    assert model.sampling(num_steps=1).t_mid == ()
    assert model.sampling(num_steps=3).t_mid == pytest.approx((1.1, 0.55))
    assert model.sampling(num_steps=5).t_mid == pytest.approx((1.1, 0.825, 0.55, 0.275))
    assert model.sampling(t_mid=0.9).t_mid == (0.9,)
    own = build("sct", sampling={"num_steps": 3, "t_mid": [1.0, 0.5]})
    assert own.sampling().t_mid == (1.0, 0.5)
    assert own.sample(2).nfe == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_mid": 1.565}, r"t_mid: \[1\.565\] is not valid: angles have to fall from below 1\.5645 to above 0"),
        ({"t_mid": 0.0}, r"t_mid: \[0\.0\] is not valid"),
        ({"t_mid": -0.1}, r"t_mid: \[-0\.1\] is not valid"),
        ({"t_mid": math.nan}, "nan is not valid"),
        ({"t_mid": (0.5, 1.0), "num_steps": 3}, r"t_mid: \[0\.5, 1\.0\] is not valid"),
        ({"t_mid": (0.5, 0.5), "num_steps": 3}, r"t_mid: \[0\.5, 0\.5\] is not valid"),
        ({"t_mid": (1.0, 0.5)}, "t_mid: 2 given for num_steps=2; each step but the first has one angle"),
        ({"t_mid": 1.1, "num_steps": 1}, "t_mid: 1 given for num_steps=1"),
        ({"t_mid": 1.1, "num_steps": 4}, "t_mid: 1 given for num_steps=4"),
        ({"num_steps": 0}, "num_steps: 0 is not valid"),
        ({"solver": "heun"}, "solver: "),
    ],
)
def test_steps_that_are_refused(options, message):
    model = build("sct")
    with pytest.raises(UserError, match=message):
        model.sample(2, **options)


@every_kind
def test_samples_do_not_depend_on_the_batch(kind):
    model = build(kind)
    whole = model.sample(10, seed=1, num_steps=3)
    assert close(whole.data, model.sample(10, seed=1, num_steps=3, batch_size=3).data, 1e-6)
    assert close(whole.data[:4], model.sample(4, seed=1, num_steps=3).data, 1e-6)
    assert not torch.allclose(whole.data, model.sample(10, seed=2, num_steps=3).data)
    seen = []
    model.sample(10, num_steps=3, batch_size=5, on_step=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_angles_are_never_outside_the_schedule():
    for form, mean in itertools.product(FORMS.values(), (-30.0, 30.0)):
        model = taught(times={"kind": "log-normal", "mean": mean, "std": 1.0}, **form)
        model.steps_done += 1000
        _, angle, _ = model._drawn(items()[0], draws())
        assert bool(((angle >= model.flow.lowest) & (angle <= model.flow.highest)).all())
        terms = model.loss(items()[0], draws())
        if mean > 0 or model.flow.lowest > 0:
            assert bool(terms.per_item.isfinite().all())


# --- what is refused ------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("parametrization", ["x0", "eps"])
def test_parametrizations_without_a_bound_are_refused(kind, parametrization):
    with pytest.raises(ConfigError, match=f"parametrization: '{parametrization}' does not give .*; use edm"):
        KINDS[kind].parse({"network": TINY, "parametrization": parametrization})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("sct", "tangent_c", 0.0),
        ("sct", "warmup", -1),
        ("sct", "tangent", "normalise"),
        ("sct", "norm", "l1"),
        ("sct", "jvp", "reverse"),
        ("sct", "segments", 2),
        ("scd", "segments", 0),
        ("ect", "q", 1.0),
        ("ect", "stage_steps", 0),
        ("ect", "huber_c", -1.0),
        ("ect", "warmup", 3),
        ("sct", "parametrization", {"kind": "edm", "sigma_data": 0.0}),
    ],
)
def test_values_that_are_refused(kind, field, value):
    with pytest.raises(ConfigError, match=field):
        KINDS[kind].parse({"kind": kind, "network": {"kind": "mlp"}, field: value})


class Broken(torch.autograd.Function):
    """Without a forward derivative."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        return x * 2

    @staticmethod
    def backward(ctx, gradient):  # noqa: ARG004
        return gradient * 2


class Twice(nn.Module):
    def forward(self, x):
        return Broken.apply(x)


class Foreign(nn.Module):
    def __init__(self, dimension):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dimension, dimension), Twice())

    def forward(self, y, label, condition=None):  # noqa: ARG002
        return self.body(y)


class ForeignConfig(NetworkConfig):
    kind: Literal["foreign"] = "foreign"

    def build(self, event_shape, *, num_classes=None, num_outputs=1):  # noqa: ARG002
        return Foreign(math.prod(event_shape))


@pytest.mark.parametrize("kind", ["scd", "sct"])
def test_a_network_without_a_forward_derivative_is_refused_at_once(kind):
    with pytest.raises(UserError) as caught:
        KINDS[kind](network=ForeignConfig(), parametrization=EDM).build(PLANE)
    said = str(caught.value)
    assert said.startswith("network: body.1 (Twice) has no forward-mode derivative (")
    assert said.endswith("; use jvp=finite-diff, attention by plain matrix products, or train ect, which needs none")
    assert "\n" not in said
    model = KINDS[kind](network=ForeignConfig(), parametrization=EDM, jvp="finite-diff").build(PLANE)
    if kind == "scd":
        model.begin(model.denoiser)
    assert bool(model.loss(Batch(torch.randn(8, 2)), draws()).per_item.isfinite().all())
    ECTConfig(network=ForeignConfig(), parametrization=EDM).build(PLANE)


def test_attention_over_many_pixels_is_differentiated():
    spec = DataSpec(kind="image", shape=(3, 32, 32), range=(-1, 1))
    unet = UNetConfig(channels=4, mult=(1,), blocks=1, attention=(32,), time_frequency=0.01, modulation="double-norm")
    model = build("sct", spec, network=unet, warmup=0)
    terms = model.loss(Batch(0.5 * torch.randn(1, *spec.shape)), draws(1))
    terms.per_item.mean().backward()
    assert bool(terms.per_item.isfinite().all())


@pytest.mark.parametrize("kind", ["sct", "ect"])
@pytest.mark.parametrize(("said", "warns"), [(0.5, False), (0.26, False), (0.24, True), (1.01, True), (5.0, True)])
def test_a_deviation_far_from_the_datas_is_told(kind, said, warns):
    model = build(kind, parametrization={"kind": "edm", "sigma_data": said})
    x0 = torch.tensor([0.5, -0.5]).repeat(50, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.prepare([Batch(x0[:30]), Batch(x0[30:])])
    assert len(caught) == warns
    if warns:
        assert str(caught[0].message) == f"parametrization.sigma_data: {said:g} is far from the data's 0.5"


# --- that it works --------------------------------------------------------------------------------------------------


class Exact(nn.Module):
    """EDM's F on the trig schedule of the exact denoiser of a mixture on a line."""

    def __init__(self, sd):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.oracle = MixtureDenoiser(torch.tensor([[-1.0], [1.0]]), 0.25)
        self.parametrization = EDMParametrization(sigma_data=sd)

    def forward(self, y, label, condition=None):  # noqa: ARG002
        level = TrigSchedule().level(label.double() / 1000)
        c = self.parametrization.coefficients(level)
        x_t = y / column(c.c_in, y)
        return (self.oracle(x_t, level) - column(c.c_skip, y) * x_t) / column(c.c_out, y)


def test_a_student_of_an_exact_teacher_learns_where_its_trajectories_end():
    torch.manual_seed(0)
    edm = EDMParametrization(sigma_data=1.0)
    network = MLPConfig(width=32, depth=2, time_frequency=0.01, modulation="double-norm")
    model = SCDConfig(network=network, parametrization=edm, warmup=100, warm_start=False).build(LINE)
    teacher = NetworkDenoiser(Exact(1.0), TrigSchedule(), edm)
    model._teacher = [TrigFlow(teacher, 1.0)]
    generator = torch.Generator().manual_seed(0)
    noise, steps = torch.randn(400, 1, generator=generator), 200
    x = noise.clone()
    for k in range(steps, 0, -1):
        angle = torch.full((400,), model.start * k / steps, dtype=torch.float64)
        x = turned(x, model.teacher.velocity(x, angle), model.start / steps)

    def error():
        top = torch.full((400,), model.start, dtype=torch.float64)
        with torch.no_grad():
            return float((model.flow.x0(noise, top) - x).square().mean().sqrt())

    untrained = error()
    assert untrained == pytest.approx(1.03, abs=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        sign = torch.randint(0, 2, (128, 1), generator=generator) * 2 - 1
        x0 = sign + 0.25 * torch.randn(128, 1, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (400 - step) / 200)
        optimizer.zero_grad()
        model.loss(Batch(x0), StepDraws(0, step, 0, 128, 128)).per_item.mean().backward()
        optimizer.step()
        model.after_step([])
    assert error() < untrained / 4

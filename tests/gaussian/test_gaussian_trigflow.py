"""TrigFlow: the same denoiser in other coordinates, its velocity, and how both change along a path."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osmose.gaussian import PARAMETRIZATIONS, SCHEDULES
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.gaussian.parametrization import column
from osmose.gaussian.schedule import Level
from osmose.gaussian.solvers import DDIM
from osmose.gaussian.trigflow import (
    NoForwardDerivativeError,
    TrigFlow,
    _difference,
    angle_of,
    level_of,
    require_forward_derivative,
    turned,
)
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

SD = 0.7
#: A table of few steps has long stretches without a jump in its slope.
COARSE = {"kind": "cosine", "num_steps": 8}
#: Name: schedule, parametrization, sd.
DENOISERS = {
    f"{parametrization}-{schedule if isinstance(schedule, str) else 'coarse'}": (
        schedule,
        parametrization,
        SD if parametrization == "edm" else 1.0,
    )
    for schedule in (*SCHEDULES.entries, COARSE)
    for parametrization in PARAMETRIZATIONS.entries
    if not (parametrization == "eps" and schedule in ("trig", "straight"))
}
every_schedule = pytest.mark.parametrize("schedule", list(SCHEDULES.entries))
every_denoiser = pytest.mark.parametrize("name", list(DENOISERS))


class Random(nn.Module):
    """A smooth function of (y, label), of some outputs for each value."""

    def __init__(self, dimension=3, outputs=1, classes=1):
        super().__init__()
        generator = torch.Generator().manual_seed(dimension)

        def weights(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[0])

        self.inside, self.outside, self.phase = weights(dimension, 9), weights(9, outputs * dimension), weights(9)
        self.classes = weights(classes, 9)

    def forward(self, y, label, condition=None):
        h = (y.double() @ self.inside + torch.sin(0.02 * label.double()[:, None] + self.phase)).tanh()
        if condition is not None:
            h = h * self.classes[condition].exp()
        return (h @ self.outside).to(y.dtype)


class Oracle(nn.Module):
    """The network that is exact for data N(0, s^2 I)."""

    def __init__(self, schedule, parametrization, deviation):
        super().__init__()
        self.schedule, self.parametrization, self.variance = schedule, parametrization, deviation**2

    def forward(self, y, label, condition=None):  # noqa: ARG002
        label = label.double()
        if self.schedule.kind == "ve":
            sigma = (label / 25).exp()
            level = Level(sigma, torch.ones_like(sigma), sigma)
        else:
            steps = self.schedule.native_steps
            level = self.schedule.level((label / 1000 + (1 / steps if steps else 0)).clamp(0, 1))
        c = self.parametrization.coefficients(level)
        gain = level.alpha * self.variance / (level.alpha**2 * self.variance + level.sigma**2)
        return y * column((gain - c.c_skip) / (c.c_out * c.c_in), y)


def made(name, network=None, **more):
    """The denoiser of a name, and its flow."""
    schedule, parametrization, sd = DENOISERS[name]
    options = {"sigma_data": sd} if parametrization == "edm" else {}
    denoiser = NetworkDenoiser(
        network or Random(),
        SCHEDULES.parse(schedule),
        PARAMETRIZATIONS.parse({"kind": parametrization, **options}),
        **more,
    )
    return denoiser, TrigFlow(denoiser, sd)


def some(flow, count=8, dimension=3):
    """Angles inside the range of a flow, points, and directions, float64."""
    generator = torch.Generator().manual_seed(count)
    angles = torch.linspace(max(flow.lowest, 0.02), min(flow.highest, 1.56), count + 2, dtype=torch.float64)[1:-1]
    x, direction = torch.randn(2, count, dimension, generator=generator, dtype=torch.float64)
    return angles, x, direction


def close(one, other, tolerance=1e-12):
    return torch.allclose(torch.as_tensor(one), torch.as_tensor(other), rtol=tolerance, atol=tolerance)


# --- angles ---------------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("sd", [0.5, 1.0, 3.0])
def test_angles_and_levels_are_inverse(schedule, sd):
    schedule = SCHEDULES.parse({"kind": schedule})
    level = schedule.level(torch.linspace(0.01, 0.99, 23))
    angle = angle_of(level, sd)
    assert angle.dtype == torch.float64
    assert close(angle.tan() * level.alpha * sd, level.sigma)
    back = level_of(angle, schedule, sd)
    assert all(close(a, b, 1e-8) for a, b in zip(level, back, strict=True))  # a table's times are rounded that much
    assert close(angle_of(back, sd), angle, 1e-8)


def test_angles_of_known_points():
    assert angle_of(Level(1.0, 0.0, 1.0), 0.5).item() == math.pi / 2
    assert angle_of(Level(0.0, 1.0, 0.0), 0.5).item() == 0
    assert angle_of(Level(0.5, 1.0, 0.5), 0.5).item() == pytest.approx(math.pi / 4)
    assert angle_of(Level(0.5, 0.5, 0.5), 0.5).item() == pytest.approx(math.atan(2))
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    assert close(angle_of(SCHEDULES.parse("trig").level(t), 1.0), t * math.pi / 2)


def test_the_range_of_angles_is_that_of_the_levels():
    _, flow = made("edm-ve")
    assert flow.lowest == pytest.approx(math.atan(0.002 / SD), rel=5e-3)
    assert math.pi / 2 - flow.highest == pytest.approx(math.atan(SD / 80), rel=5e-3)
    # Inside by as much as the differences of the rates need: all of their angles are angles of the schedule.
    ends = angle_of(SCHEDULES.parse("ve").level(torch.tensor([0.0, 1.0])), SD)
    assert flow.lowest * (1 - 2e-3) > ends[0]
    assert math.pi / 2 - (math.pi / 2 - flow.highest) * (1 - 2e-3) < ends[1]
    _, flow = made("v-linear")
    first, last = SCHEDULES.parse("linear").level(torch.tensor([0.001, 1.0])).sigma.tolist()
    assert (flow.lowest, flow.highest) == pytest.approx((math.asin(first), math.asin(last)), rel=5e-3)
    for name in ("edm-trig", "v-straight"):
        _, flow = made(name)
        assert 0 < flow.lowest < 2e-5
        assert math.pi / 2 - 1e-3 < flow.highest < math.pi / 2


# --- the same denoiser ----------------------------------------------------------------------------------------------


@every_denoiser
def test_x0_is_what_the_denoiser_gives_at_the_same_signal_to_noise_ratio(name):
    denoiser, flow = made(name)
    sd = flow.sigma_data
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    level = denoiser.schedule.level(torch.linspace(0.02, 0.98, 12))
    x_t = column(level.alpha, x0) * x0 + column(level.sigma, x0) * eps
    angle = angle_of(level, sd)
    # The same clean data and noise, in the new coordinates.
    x = column(angle.cos(), x0) * x0 + column(angle.sin(), x0) * sd * eps
    size = ((level.alpha * sd) ** 2 + level.sigma**2).sqrt() / sd
    assert close(column(size, x) * x, x_t)
    denoised = denoiser(x_t, level)
    assert close(flow.x0(x, angle), denoised, 1e-6)  # labels are float32
    velocity = flow.velocity(x, angle)
    assert close(velocity, (column(angle.cos(), x) * x - denoised) / column(angle.sin(), x), 1e-6)
    assert close(turned(x, velocity, angle), flow.x0(x, angle), 0)


@every_denoiser
def test_velocity_of_gaussian_data_in_closed_form(name):
    schedule, _, sd = DENOISERS[name]
    deviation = 1.7
    denoiser, _ = made(name)
    _, flow = made(name, Oracle(denoiser.schedule, denoiser.parametrization, deviation))
    angle, x, _ = some(flow)
    variance = (angle.cos() * deviation) ** 2 + (angle.sin() * sd) ** 2
    exact = column(angle.cos() * angle.sin() * (sd**2 - deviation**2) / variance, x) * x
    assert close(flow.velocity(x, angle), exact, 2e-4 if schedule == "ve" else 2e-5)  # of a label in float32
    clean = column(angle.cos() * deviation**2 / variance, x) * x
    assert close(flow.x0(x, angle), clean, 2e-4 if schedule == "ve" else 2e-5)
    # On the straight rotation of data of the coordinates' own deviation there is no velocity.
    _, still = made(name, Oracle(denoiser.schedule, denoiser.parametrization, sd))
    assert float(still.velocity(x, angle).abs().max()) < 1e-4


def test_edm_and_v_need_no_input_beside_the_network():
    for name, gain in (("edm-ve", -SD), ("edm-cosine", -SD), ("edm-trig", -SD), ("v-trig", 1.0), ("v-linear", 1.0)):
        _, flow = made(name)
        angle, _, _ = some(flow)
        factors = flow._factors(angle)
        assert float(factors.slope.abs().max()) < 1e-13
        assert close(factors.gain, torch.full_like(angle, gain), 1e-13)
        assert close(factors.scale, torch.full_like(angle, 1 / flow.sigma_data), 1e-13)


def test_x0_and_eps_have_factors_without_bound():
    small = torch.tensor([1e-4], dtype=torch.float64)
    assert float(made("x0-trig")[1]._factors(small).slope) > 9e3
    big = torch.tensor([math.pi / 2 - 1e-3], dtype=torch.float64)
    assert float(made("eps-cosine")[1]._factors(big).gain) > 9e2


def test_a_learned_variance_is_left_out():
    network = Random(outputs=2)
    _, flow = made("eps-cosine", network, learned_variance=True)
    plain = Random()
    plain.outside = network.outside[:, :3]
    plain.inside, plain.phase = network.inside, network.phase
    _, other = made("eps-cosine", plain)
    angle, x, direction = some(flow)
    assert close(flow.velocity(x, angle), other.velocity(x, angle))
    for how in ("forward", "finite-diff"):
        found = flow.derivative(x, angle, direction, angle.sin(), how=how)
        expected = other.derivative(x, angle, direction, angle.sin(), how=how)
        assert all(map(close, found, expected, (1e-9, 1e-9)))


def test_classes_are_passed_on():
    _, flow = made("edm-trig", Random(classes=4))
    angle, x, direction = some(flow)
    classes = torch.arange(len(x)) % 4
    with_classes = flow.velocity(x, angle, classes)
    assert not close(with_classes, flow.velocity(x, angle), 1e-3)
    assert torch.equal(flow.derivative(x, angle, direction, angle, classes)[0], with_classes)
    some_class = flow.derivative(x, angle, direction, angle, torch.zeros_like(classes))[1]
    assert torch.equal(flow.derivative(x, angle, direction, angle, classes)[1][::4], some_class[::4])


# --- rotations ------------------------------------------------------------------------------------------------------


def test_a_turn_by_nothing_is_nothing():
    x, velocity = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turned(x, velocity, 0.0), x)
    assert torch.equal(turned(x, velocity, torch.zeros(5, dtype=torch.float64)), x)
    assert turned(x, velocity, torch.ones(5, dtype=torch.float64)).dtype == torch.float32
    assert close(turned(x, velocity, torch.full((5,), 0.3, dtype=torch.float64)), turned(x, velocity, 0.3), 1e-6)
    assert torch.equal(turned(x, velocity, math.pi / 2), math.cos(math.pi / 2) * x - velocity)


def test_turns_of_a_constant_field_add_up():
    """A point that moves with its velocity, x' = V and V' = -x, is on a circle."""
    x, velocity = torch.randn(2, 5, 3, dtype=torch.float64)
    back = turned(x, velocity, 0.4)
    slower = turned(velocity, -x, 0.4)
    assert close(turned(back, slower, 0.9), turned(x, velocity, 1.3))


@pytest.mark.parametrize("steps", [1, 2, 5, 64])
def test_steps_on_unit_gaussian_data_shrink_it_by_a_known_factor(steps):
    """Of data N(0, sd^2) V is 0: K even steps multiply by cos(t_max / K)^K."""
    denoiser, _ = made("edm-trig")
    _, flow = made("edm-trig", Oracle(denoiser.schedule, denoiser.parametrization, SD))
    top, x = 1.5, torch.randn(4, 3, dtype=torch.float64)
    y = x
    for k in range(steps, 0, -1):
        y = turned(y, flow.velocity(y, torch.full((4,), top * k / steps, dtype=torch.float64)), top / steps)
    assert close(y, math.cos(top / steps) ** steps * x, 1e-5)


def test_a_turn_is_the_step_of_ddim():
    denoiser, flow = made("v-trig")
    levels = denoiser.schedule.level(torch.tensor([0.9, 0.55, 0.2])).t
    grid = TimeGrid.at(denoiser.schedule, levels)
    x = torch.randn(4, 3, dtype=torch.float64)

    def asked_for_noise():
        raise AssertionError

    states = [x, *(state.x for state in DDIM().run(denoiser, x, grid, asked_for_noise))]
    angles = [*(levels * math.pi / 2).tolist(), 0.0]
    for before, after, angle, lower in zip(states, states[1:], angles, angles[1:], strict=False):
        velocity = flow.velocity(before, torch.full((4,), angle, dtype=torch.float64))
        assert close(turned(before, velocity, angle - lower), after, 1e-7)


def test_small_turns_follow_the_flow_of_gaussian_data():
    deviation, sd = 0.3, DENOISERS["edm-trig"][2]
    denoiser, _ = made("edm-trig")
    _, flow = made("edm-trig", Oracle(denoiser.schedule, denoiser.parametrization, deviation))
    oracle = GaussianDenoiser(torch.zeros(3).double(), torch.full((3,), deviation**2).double())
    x, top, low, steps = torch.randn(4, 3, dtype=torch.float64), 1.2, 0.3, 400
    y, step = x, (top - low) / steps
    for k in range(steps):
        y = turned(y, flow.velocity(y, torch.full((4,), top - k * step, dtype=torch.float64)), step)

    def level(angle):  # the coordinates' own
        return Level(0.0, math.cos(angle), sd * math.sin(angle))

    assert close(y, oracle.flow(x, level(top), level(low)), 2e-3)


# --- derivatives ----------------------------------------------------------------------------------------------------


def consistency(denoiser, sd, x, angle):
    """f by the denoiser alone, so that torch can differentiate it."""
    level = level_of(angle, denoiser.schedule, sd)
    size = ((level.alpha * sd) ** 2 + level.sigma**2).sqrt() / sd
    return denoiser(column(size, x) * x, level)


@every_denoiser
def test_the_derivative_is_that_of_the_denoiser(name):
    """G = -cos^2 (V - dx) - (cos sin x + cos sin dV) is cos times df, as torch differentiates f through everything."""
    schedule, _, sd = DENOISERS[name]
    denoiser, flow = made(name)
    angle, x, direction = some(flow)
    if schedule == COARSE:  # between the jumps
        angle = angle_of(denoiser.schedule.level((torch.arange(8) + 0.5) / 8), sd)
    _, change = torch.func.jvp(
        lambda x, angle: consistency(denoiser, sd, x, angle), (x, angle), (direction, torch.ones_like(angle))
    )
    cos, sin = column(angle.cos(), x), column(angle.sin(), x)
    velocity, moving = flow.derivative(x, angle, direction, angle.cos() * angle.sin())
    assert close(velocity, flow.velocity(x, angle))
    g = -(cos**2) * (velocity - direction) - (cos * sin * x + moving)
    assert float((cos * change).abs().max()) > 0.1
    # The slopes of a table have jumps, over which ours are averages.
    assert close(g, cos * change, 3e-3 if schedule in ("linear", "scaled-linear", "cosine") else 1e-5)


@pytest.mark.parametrize("name", ["edm-ve", "edm-trig", "v-trig", "v-ve", "eps-ve", "x0-straight", "edm-cosine"])
def test_the_derivative_is_the_limit_of_differences(name):
    _, flow = made(name)
    angle, x, direction = some(flow)
    factor = torch.rand(len(angle), dtype=torch.float64) + 0.5
    h = 2e-3  # labels are float32: smaller steps gain nothing
    ahead, behind = (flow.velocity(x + s * h * direction, angle + s * h) for s in (1, -1))
    _, moving = flow.derivative(x, angle, direction, factor)
    assert close(moving, column(factor, x) * (ahead - behind) / (2 * h), 5e-3)


@every_denoiser
def test_finite_differences_are_near_the_exact_derivative(name):
    _, flow = made(name)
    angle, x, direction = some(flow)
    factor = angle.cos() * angle.sin()
    exact = flow.derivative(x, angle, direction, factor)
    near = flow.derivative(x, angle, direction, factor, how="finite-diff")
    assert torch.equal(exact[0], near[0])
    assert close(exact[1], near[1], 2e-4)
    single = flow.derivative(x.float(), angle, direction.float(), factor, how="finite-diff")
    assert single[1].dtype == torch.float32
    assert close(single[1].double(), exact[1], 5e-3)


@pytest.mark.parametrize("how", ["forward", "finite-diff"])
def test_directions_of_all_sizes(how):
    """The step of a difference suits each item, whatever the sizes of its directions; nothing is 0 / 0."""
    _, flow = made("edm-trig")
    angle, x, direction = some(flow)
    once = flow.derivative(x, angle, direction, torch.ones_like(angle))[1]
    still = flow.derivative(x, angle, 0 * direction, torch.ones_like(angle))[1]
    assert float((once - still).abs().max()) > 0.1
    sizes = 10.0 ** torch.arange(-6, 9, 2, dtype=torch.float64)[:, None].repeat_interleave(2, 0)
    angle, x = angle.repeat(2)[: len(sizes)], x.repeat(2, 1)[: len(sizes)]
    direction, once, still = (value.repeat(2, 1)[: len(sizes)] for value in (direction, once, still))
    _, found = flow.derivative(x, angle, sizes * direction, torch.ones_like(angle), how=how)
    assert close((found - still) / sizes.clamp(min=1), (once - still) * sizes.clamp(max=1), 1e-3)
    found = flow.derivative(x, angle, direction, torch.zeros_like(angle), how=how)[1]
    assert torch.equal(found, torch.zeros_like(x))


def test_differences_of_a_parabola_are_exact():
    y, dy = torch.randn(2, 5, 3, dtype=torch.float64)
    label, dlabel = torch.rand(2, 5, dtype=torch.float64)
    found = _difference(lambda h, k: (y + h * dy) ** 2 + (label + k * dlabel)[:, None] ** 2, dy, dlabel)
    assert close(found, 2 * y * dy + 2 * (label * dlabel)[:, None], 1e-9)


@pytest.mark.parametrize("name", ["edm-trig", "v-ve", "x0-straight"])
def test_the_factor_and_the_direction_enter_linearly(name):
    _, flow = made(name)
    angle, x, direction = some(flow)
    factor = torch.rand(len(angle), dtype=torch.float64)
    one = flow.derivative(x, angle, direction, torch.ones_like(angle))[1]
    assert close(flow.derivative(x, angle, direction, factor)[1], column(factor, x) * one, 1e-6)
    still = flow.derivative(x, angle, torch.zeros_like(x), torch.ones_like(angle))[1]
    assert not close(still, torch.zeros_like(x), 1e-3)
    twice = flow.derivative(x, angle, 2 * direction, torch.ones_like(angle))[1]
    assert close(twice - still, 2 * (one - still), 1e-6)


def test_a_consistency_function_does_not_change_along_its_flow():
    """Data N(0, s^2): f = x s / sqrt(V_t), F = y (cos t - s / sqrt(V_t)) / sin t, dx/dt the exact velocity."""
    deviation, sd = 1.3, SD

    class Consistent(nn.Module):
        def forward(self, y, label, condition=None):  # noqa: ARG002
            angle = torch.atan(torch.tan(label.double() * (math.pi / 2000)) / sd)
            size = ((angle.cos() * deviation) ** 2 + (angle.sin() * sd) ** 2).sqrt()
            return -y * column((angle.cos() - deviation / size) / angle.sin(), y)  # EDM's F is minus TrigFlow's

    _, flow = made("edm-trig", Consistent())
    angle, x, _ = some(flow)
    variance = (angle.cos() * deviation) ** 2 + (angle.sin() * sd) ** 2
    assert close(flow.x0(x, angle), column(deviation / variance.sqrt(), x) * x, 1e-6)
    direction = column(angle.cos() * angle.sin() * (sd**2 - deviation**2) / variance, x) * x
    both = angle.cos() * angle.sin()
    velocity, moving = flow.derivative(x, angle, direction, both)
    first = column(angle.cos() ** 2, x) * (direction - velocity)
    second = column(both, x) * x + moving
    assert float(first.abs().max()) > 0.05
    assert float((first - second).abs().max()) < 1e-5
    assert float((first + second).abs().max()) > 0.1
    assert float((first - second + moving - column(both, x) * moving).abs().max()) > 0.01  # not twice the factor


def test_what_does_not_depend_on_time_or_place():
    class Constant(nn.Module):
        def forward(self, y, label, condition=None):  # noqa: ARG002
            return torch.ones_like(y.detach())

    _, flow = made("edm-ve", Constant())
    angle, x, direction = some(flow)
    for how in ("forward", "finite-diff"):
        _, change = flow.derivative(x, angle, direction, angle.sin(), how=how)
        assert close(change, torch.zeros_like(x), 1e-9)


def test_a_derivative_has_no_gradient():
    network = MLPConfig(width=8, depth=1, time_frequency=0.01).build((3,))
    _, flow = made("edm-trig", network)
    angle, x, direction = some(flow)
    x, direction = x.float().requires_grad_(), direction.float()
    for how in ("forward", "finite-diff"):
        assert not any(value.requires_grad for value in flow.derivative(x, angle, direction, angle.sin(), how=how))
    assert flow.velocity(x, angle).requires_grad


class Dropped(nn.Module):
    """Smooth, with dropout."""

    def __init__(self):
        super().__init__()
        self.net = Random()
        self.dropout = nn.Dropout(0.5)

    def forward(self, y, label, condition=None):  # noqa: ARG002
        return self.dropout(self.net(y, label))


@pytest.mark.parametrize("how", ["forward", "finite-diff"])
def test_value_and_derivative_have_the_same_dropout(how):
    _, flow = made("edm-trig", Dropped())
    angle, x, direction = some(flow, 40)
    torch.manual_seed(3)
    velocity, change = flow.derivative(x, angle, direction, torch.ones_like(angle), how=how)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(velocity, flow.velocity(x, angle))
    assert torch.equal(torch.get_rng_state(), after)
    kept = velocity.abs() > 1e-9
    assert 0.3 < kept.double().mean() < 0.7
    flow.denoiser.eval()
    smooth = flow.derivative(x, angle, direction, torch.ones_like(angle))[1]
    assert close(change, torch.where(kept, 2 * smooth, torch.zeros_like(smooth)), 1e-3)


# --- what can be differentiated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("modulation", ["add", "scale-shift", "double-norm"])
def test_the_networks_can_be_differentiated(modulation):
    config = UNetConfig(
        channels=8, mult=(1, 1), blocks=1, attention=(4, 8), modulation=modulation, time_frequency=0.01, dropout=0.1
    )
    torch.manual_seed(0)
    network = config.build((1, 8, 8), num_classes=3)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    _, flow = made("edm-trig", network.eval())
    angle = torch.tensor([0.3, 0.8, 1.4], dtype=torch.float64)
    x, direction = torch.randn(2, 3, 1, 8, 8)
    classes = torch.arange(3)
    _, exact = flow.derivative(x, angle, direction, angle.sin(), classes)
    _, near = flow.derivative(x, angle, direction, angle.sin(), classes, how="finite-diff")
    assert float(exact.abs().max()) > 1e-3
    assert float((exact - near).norm() / exact.norm()) < 0.02


def test_attention_over_many_pixels_can_be_differentiated():
    """More than 256 tokens: there torch takes a fused kernel without a forward derivative."""
    config = UNetConfig(channels=4, mult=(1,), blocks=1, attention=(32,), time_frequency=0.01)
    torch.manual_seed(0)
    network = config.build((3, 32, 32))
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    _, flow = made("edm-trig", network)
    angle = torch.tensor([0.8], dtype=torch.float64)
    x, direction = torch.randn(2, 1, 3, 32, 32)
    _, exact = flow.derivative(x, angle, direction, angle.sin())
    _, near = flow.derivative(x, angle, direction, angle.sin(), how="finite-diff")
    assert float((exact - near).norm() / exact.norm()) < 0.02


class Broken(torch.autograd.Function):
    """Without a forward derivative."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        return x * 2

    @staticmethod
    def backward(ctx, gradient):  # noqa: ARG004
        return gradient * 2


class Custom(nn.Module):
    def forward(self, x):
        return Broken.apply(x)


class Network(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Sequential(part, nn.ReLU()))

    def forward(self, y, label, condition=None):  # noqa: ARG002
        return self.inner(y)


class Fused(nn.Module):
    def forward(self, x):
        q = x[:, None, None, :].expand(-1, 1, 4, -1).contiguous()
        return F.scaled_dot_product_attention(q, q, q)[:, 0, 0]


def test_the_module_without_a_forward_derivative_is_named():
    part = Custom()
    network = Network(part)
    _, flow = made("edm-trig", network)
    angle, x, direction = some(flow, 2)
    x, direction = x.float(), direction.float()

    def run():
        flow.derivative(x, angle, direction, angle)

    with pytest.raises(NoForwardDerivativeError) as caught:
        require_forward_derivative(network, run)
    assert (caught.value.name, caught.value.module) == ("inner.1.0", part)
    assert caught.value.reason
    assert "\n" not in caught.value.reason
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    flow.derivative(x, angle, direction, angle, how="finite-diff")


@pytest.mark.parametrize("part", [nn.Identity(), nn.BatchNorm1d(3), nn.Dropout(0.5), Fused()])
def test_what_has_a_forward_derivative_passes(part):
    network = Network(part)
    _, flow = made("edm-trig", network)
    angle, x, direction = some(flow, 4)
    require_forward_derivative(network, lambda: flow.derivative(x.float(), angle, direction.float(), angle))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())

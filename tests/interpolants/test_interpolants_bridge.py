import itertools
import math

import pytest
import torch

from osmose.errors import UserError
from osmose.interpolants.bounds import best_epsilon, divergence_bound
from osmose.interpolants.bridge import GaussianBridge
from osmose.interpolants.fields import Fields
from osmose.interpolants.oracles import GaussianMixture, MixturePath
from osmose.interpolants.paths import BrownianGamma, LinearPath
from osmose.interpolants.transport import Epsilon, grid, transport


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def turned(angle, variances):
    c, s = math.cos(angle), math.sin(angle)
    axes = f64([[c, -s], [s, c]])
    return axes @ torch.diag(f64(variances)) @ axes.T


def one_dimensional(s0=1.0, s1=2.0, epsilon=0.7, shift=0.0):
    return GaussianBridge(f64([0.0]), f64([[s0**2]]), f64([shift]), f64([[s1**2]]), epsilon)


def integral(values):
    """Simpson's rule over [0, 1]."""
    h = 1 / (len(values) - 1)
    return h / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))


def energy_of(variance, epsilon, count=400):
    """Of the centred Gaussian process with these variances: int (C'/2 - epsilon)^2 / C dt, by differences."""
    t = [k / count for k in range(count + 1)]
    values, h = [], 1e-5
    for time in t:
        low, high = max(time - h, 0.0), min(time + h, 1.0)
        slope = (variance(high) - variance(low)) / (high - low)
        values.append((slope / 2 - epsilon) ** 2 / variance(time))
    return integral(values)


def test_the_numbers_of_the_card():
    bridge = one_dimensional()
    assert bridge.energy() == pytest.approx(0.272180, abs=3e-5)
    assert energy_of(lambda t: float(bridge.variances(t)), 0.7) == pytest.approx(bridge.energy(), abs=1e-4)
    d = math.sqrt(4 * 4 + 4 * 0.49)
    for t in (0.0, 0.3, 1.0):
        wanted = (1 - t) ** 2 + t**2 * 4 + t * (1 - t) * (d - 1.4) + 1.4 * t * (1 - t)
        assert float(bridge.variances(t)) == pytest.approx(wanted, abs=1e-14)
    # The linear interpolant of independent ends, with the gamma of a Brownian bridge of the same noise.
    true = MixturePath(
        LinearPath(gamma=BrownianGamma(a=1.4)),
        GaussianMixture(f64([[0.0]]), f64([[[4.0]]])),
        GaussianMixture(f64([[0.0]]), f64([[[1.0]]])),
    )

    def squared(t):  # E |b + epsilon s|^2, which is linear in x
        fields, variance = true.fields(t, f64([[1.0]])), (1 - t) ** 2 + 4 * t**2 + 1.4 * t * (1 - t)
        return float((fields.b + 0.7 * fields.s) ** 2) * variance

    assert integral([squared(k / 200) for k in range(201)]) == pytest.approx(0.674, abs=5e-4)


@pytest.mark.parametrize("epsilon", [0.05, 0.7, 3.0])
def test_no_other_variance_has_less_energy(epsilon):
    bridge = one_dimensional(epsilon=epsilon)
    least = energy_of(lambda t: float(bridge.variances(t)), epsilon)
    for bump in (lambda t: t * (1 - t), lambda t: math.sin(2 * math.pi * t), lambda t: t**2 * (1 - t)):
        both = [
            energy_of(lambda t, h=h, bump=bump: float(bridge.variances(t)) + h * bump(t), epsilon)
            for h in (0.05, -0.05)
        ]
        assert min(both) > least + 1e-5
        assert abs(both[0] - both[1]) < 0.2 * (sum(both) - 2 * least)  # no slope, only curvature


def test_the_energy_is_that_of_the_drift_in_two_dimensions():
    cov0, cov1 = turned(0.4, [0.5, 2.0]), turned(0.4, [1.5, 0.3])
    bridge = GaussianBridge(f64([0.0, 1.0]), cov0, f64([2.0, -1.0]), cov1, 0.4)

    def squared(t):
        mean, units = bridge.mean(t), torch.eye(2, dtype=torch.float64)
        centre = bridge.drift(t, mean[None])[0]
        gain = (bridge.drift(t, mean + units) - centre).T
        return float(centre @ centre + (gain @ bridge.covariance(t) @ gain.T).trace())

    assert integral([squared(k / 200) for k in range(201)]) == pytest.approx(bridge.energy(), abs=1e-6)


def test_the_drift_leads_from_the_one_gaussian_to_the_other():
    cov0, cov1 = turned(0.4, [0.5, 2.0]), turned(0.4, [1.5, 0.3])
    bridge = GaussianBridge(f64([0.0, 1.0]), cov0, f64([2.0, -1.0]), cov1, 0.4)
    units, steps = torch.eye(2, dtype=torch.float64), 100
    x = bridge.mean0.expand(1 + 2 * (steps + 1), 2).clone()
    x[1:3] += units
    drawn = itertools.count(1)

    def normal():
        noise, first = torch.zeros_like(x), 1 + 2 * next(drawn)
        noise[first : first + 2] = units
        return noise

    def drift(t, x):
        return Fields(b=bridge.drift(t, x), s=torch.zeros_like(x))

    (*_, (_, end)) = transport(drift, x, grid(steps), Epsilon(0.4), normal, "heun")
    gain, spread = (end[1:3] - end[0]).T, end[3:] - end[0]
    assert torch.allclose(end[0], bridge.mean1, atol=1e-3)
    assert torch.allclose(gain @ cov0 @ gain.T + spread.T @ spread, cov1, atol=1e-3)
    # Both ends together: c of the module's text, in the common axes.
    cross = bridge.axes.T @ gain @ cov0 @ bridge.axes
    assert torch.allclose(cross, torch.diag(bridge.cross), atol=1e-3)
    product = bridge.cross**2 + 0.8 * bridge.cross
    assert torch.allclose(product, bridge.var0 * bridge.var1)


def test_without_noise_it_is_optimal_transport():
    bridge = one_dimensional(epsilon=0.0, shift=3.0)
    assert bridge.energy() == pytest.approx(1 + 9, abs=1e-12)
    x = f64([[0.0], [1.5]])
    assert torch.allclose(x + bridge.drift(0.0, x), 3 + 2 * x)  # straight lines of constant speed
    assert one_dimensional(epsilon=1e-7, shift=3.0).energy() == pytest.approx(10, abs=1e-5)


def test_equal_covariances_have_any_axes_and_the_means_move_straight():
    cov = turned(0.3, [2.0, 0.5])
    bridge = GaussianBridge(f64([0.0, 0.0]), cov, f64([1.0, 1.0]), torch.eye(2), 0.3)
    assert torch.allclose(bridge.covariance(0.0), cov)
    assert torch.allclose(bridge.covariance(1.0), torch.eye(2).double())
    assert bridge.mean(0.25).tolist() == [0.25, 0.25]
    assert bridge.drift(0.2, torch.zeros(3, 2)).dtype == torch.float32


def test_bridges_that_are_none_are_refused():
    zero, unit = torch.zeros(2), torch.eye(2)
    with pytest.raises(UserError, match="do not commute"):
        GaussianBridge(zero, turned(0.4, [0.5, 2.0]), zero, turned(0.9, [0.5, 2.0]), 0.5)
    with pytest.raises(UserError, match="do not belong together"):
        GaussianBridge(zero, unit, torch.zeros(3), unit, 0.5)
    with pytest.raises(UserError, match="not positive definite"):
        GaussianBridge(zero, torch.diag(f64([1.0, -0.5])), zero, unit, 0.5)
    for epsilon in (-0.1, math.nan):
        with pytest.raises(UserError, match="epsilon: "):
            GaussianBridge(zero, unit, zero, unit, epsilon)


def test_the_bound_on_the_likelihood_holds_and_the_printed_one_does_not():
    # rho(t) = N(0, 1) for all t, b = 0 and s = -x, learned with constant errors c / 2 and c / (2 epsilon).
    c, epsilon = 1.0, 1.2564

    def learned(_t, x):
        return Fields(b=torch.full_like(x, c / 2), s=-x + c / (2 * epsilon))

    x = f64([[0.0], [1.0]])
    (*_, (_, end)) = transport(learned, x, grid(200), Epsilon(epsilon), lambda: torch.zeros(2, 1), "heun")
    assert float(end[1] - end[0]) == pytest.approx(math.exp(-epsilon), abs=1e-4)  # so that the variance stays 1
    divergence = float(end[0]) ** 2 / 2
    assert divergence == pytest.approx(0.1621, abs=1e-4)
    excess_b, excess_s = (c / 2) ** 2 / 2, (c / (2 * epsilon)) ** 2 / 2
    bound = divergence_bound(excess_b, excess_s, epsilon)
    assert bound == pytest.approx(0.1990, abs=1e-4)
    assert bound / 2 == pytest.approx(0.0995, abs=1e-4)
    assert bound / 2 < divergence <= bound


def test_the_best_epsilon_has_the_least_bound():
    best = best_epsilon(0.03, 0.2)
    least = divergence_bound(0.03, 0.2, best)
    assert least == pytest.approx(2 * math.sqrt(0.03 * 0.2))
    assert all(divergence_bound(0.03, 0.2, best * factor) > least for factor in (0.8, 1.25))


def test_a_bound_needs_noise_and_errors():
    for epsilon in (0.0, -1.0, math.inf):
        with pytest.raises(UserError, match="holds for an SDE"):
            divergence_bound(0.1, 0.1, epsilon)
    with pytest.raises(UserError, match="excess losses"):
        divergence_bound(-0.1, 0.1, 1.0)
    for excess in ((0.0, 0.1), (0.1, 0.0), (math.nan, 0.1)):
        with pytest.raises(UserError, match="excess losses"):
            best_epsilon(*excess)

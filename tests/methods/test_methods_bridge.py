"""The Schroedinger bridge as a saddle point: its path, its two gradients, and where it goes between Gaussians."""

from __future__ import annotations

import math

import pytest
import torch

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.interpolants.bridge import GaussianBridge
from osmose.methods.bridge import Bridge, BridgeConfig, _bends
from osmose.methods.messages import Batch
from osmose.networks.mlp import MLPConfig

LINE = DataSpec(kind="points", shape=(1,))
PLANE = DataSpec(kind="points", shape=(2,))


def build(spec=PLANE, noise=0.0, **parts) -> Bridge:
    torch.manual_seed(0)
    network = MLPConfig(width=16, depth=1)
    model = BridgeConfig.parse({"network": network, "path": "linear", **parts}).build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def steps_of(count, seed=0):
    return StepDraws(seed, 0, 0, count, count)


def test_a_bend_vanishes_at_both_ends_and_has_the_slope_that_it_says():
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    values, slopes = _bends(t)
    assert values.shape == slopes.shape == (4, 9)
    assert float(values[:, [0, -1]].abs().max()) == 0
    inner, step = t[1:-1], 1e-6
    differences = (_bends(inner + step)[0] - _bends(inner - step)[0]) / (2 * step)
    assert torch.allclose(slopes[:, 1:-1], differences, atol=1e-8)
    # Orthogonal with the weight 1 / (t (1 - t))^2, as Legendre polynomials are.
    fine = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    p = _bends(fine)[0] / (fine * (1 - fine))
    gram = p @ p.T / 20000
    assert torch.allclose(gram, torch.diag(1 / (2 * torch.arange(4.0, dtype=torch.float64) + 1)), atol=1e-6)


def test_fields_have_the_gradient_of_their_losses_and_the_path_that_of_the_energy():
    model, count = build(noise=0.2, epsilon=0.7), 64
    batch = Batch(torch.randn(count, 2, generator=torch.Generator().manual_seed(1)), None)
    model.loss(batch, steps_of(count)).per_item.mean().backward()
    both = [{n: p.grad.clone() for n, p in part.named_parameters()} for part in (model.network, model.bend)]
    bent = model._bent(model._meet(batch, steps_of(count)))
    fields = list(model.network.parameters())
    still = bent._replace(place=bent.place.detach(), slope=bent.slope.detach())
    alone = torch.autograd.grad(torch.stack(list(model._regress(still).values())).sum(0).mean(), fields)
    for (name, one), other in zip(both[0].items(), alone, strict=True):
        assert torch.allclose(one, other, atol=1e-6), name
    bent = model._bent(model._meet(batch, steps_of(count)))
    path = [p for p in model.bend.parameters() if p.requires_grad]
    uphill = torch.autograd.grad(-model._objective(bent).mean(), path)
    for (name, one), other in zip(both[1].items(), uphill, strict=True):
        assert torch.allclose(one, other, atol=1e-6), name
    assert all(p.requires_grad for p in model.parameters())
    assert float(max(g.abs().max() for g in both[1].values())) > 0


def test_at_the_exact_drift_the_objective_is_half_the_energy():
    """Of the straight path between N(0, 1) and N(0, 1) in one dimension; b and s of its one-time laws are linear."""
    epsilon, count = 0.7, 200_000
    model = build(LINE, epsilon=epsilon)
    for parameter in model.bend.parameters():
        parameter.data.zero_()

    def outputs(x, t, condition):  # noqa: ARG001
        t = t.to(x)[:, None]
        variance = (1 - t) ** 2 + t**2 + t * (1 - t)
        slope = (-2 * (1 - t) + 2 * t + 1 - 2 * t) / 2
        return slope / variance * x, -x / variance

    model._outputs = outputs
    x1 = torch.randn(count, 1, generator=torch.Generator().manual_seed(2))
    found = model.loss(Batch(x1, None), steps_of(count)).parts["energy"]
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    variance = (1 - t) ** 2 + t**2 + t * (1 - t)
    gain = (2 * t - 1) / 2 / variance - epsilon / variance
    exact = float(torch.trapezoid(gain**2 * variance, t))
    error = float(found.std()) / math.sqrt(count)
    assert abs(float(found.mean()) - exact) < 4 * error
    assert error < 0.02 * exact


class LinearBend(torch.nn.Module):
    """f_k = p_k x0 + q_k x1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 2))

    def forward(self, ends, label, condition):  # noqa: ARG002
        return ends @ self.weight.T


def test_with_the_exact_fields_descent_on_the_path_reaches_the_bridge_between_gaussians():
    """From N(0, 1) to N(0, 4) at epsilon = 0.7: the least energy is 0.27218, that of the straight path far above."""
    epsilon, count, deviation = 0.7, 4096, 2.0
    model = build(LINE, epsilon=epsilon)
    model.bend = LinearBend()
    least = GaussianBridge(*(torch.tensor(v) for v in ([0.0], [[1.0]], [0.0], [[deviation**2]])), epsilon).energy()
    assert least == pytest.approx(0.272180, abs=1e-6)

    def moments(t):
        """The variance of x_t and its slope, float64, without gradient."""
        shape, slopes = _bends(t)
        p, q = 0.2 * model.bend.weight.detach().double().T
        alpha, beta, alpha_dot, beta_dot = 1 - t + p @ shape, t + q @ shape, -1 + p @ slopes, 1 + q @ slopes
        variance = alpha**2 + (beta * deviation) ** 2 + t * (1 - t)
        return variance, 2 * (alpha * alpha_dot + beta * beta_dot * deviation**2) + 1 - 2 * t

    def outputs(x, t, condition):  # noqa: ARG001
        variance, slope = (value[:, None].to(x) for value in moments(t.double()))
        return slope / 2 / variance * x, -x / variance

    def energy():
        t = torch.linspace(0, 1, 20001, dtype=torch.float64)
        variance, slope = moments(t)
        return float(torch.trapezoid((slope / 2 - epsilon) ** 2 / variance, t))

    model._outputs = outputs
    straight = energy()
    optimizer = torch.optim.Adam(model.bend.parameters(), lr=0.3)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 150)
    for step in range(150):
        x1 = deviation * StepDraws(1, step, 0, count, count).normal((1,))
        optimizer.zero_grad()
        model.loss(Batch(x1, None), StepDraws(0, step, 0, count, count)).per_item.mean().backward()
        optimizer.step()
        rates.step()
    assert straight > 1.5 * least
    assert energy() == pytest.approx(least, rel=0.02)


def test_its_own_noise_is_the_default_and_any_other_may_be_taken():
    model = build(noise=0.1, epsilon=0.3).eval()
    own = model.sample(6, num_steps=5).data
    assert torch.equal(own, model.sample(6, num_steps=5, epsilon=0.3).data)
    assert not torch.equal(own, model.sample(6, num_steps=5, epsilon=0.0).data)
    fields = model.fields_at()(0.5, torch.zeros(3, 2))
    assert fields.eta0 is None and fields.eta1 is None  # noqa: PT018
    assert fields.b is not None and fields.s is not None  # noqa: PT018


@pytest.mark.parametrize(
    ("spec", "parts", "message"),
    [
        (PLANE, {"path": "one-sided-linear"}, "one-sided-linear"),
        (PLANE.replace(start=PLANE.to_json()), {"path": "mirror"}, "mirror"),
        (PLANE, {"path": {"kind": "linear", "gamma": "none"}}, "gamma is none"),
        (PLANE.replace(start=PLANE.to_json(), paired=True), {}, "data.paired: true is not for a bridge"),
        (PLANE, {"epsilon": -0.1}, "epsilon: -0.1 is not valid"),
    ],
)
def test_paths_that_cannot_become_bridges_are_refused(spec, parts, message):
    with pytest.raises(UserError, match=message):
        build(spec, **parts)

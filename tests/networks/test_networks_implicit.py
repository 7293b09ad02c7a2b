"""The network that is fitted to its input: inner steps against closed forms, loops and finite differences."""

import math

import pytest
import torch
from torch.func import functional_call

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks.implicit import ImplicitConfig
from osmose.processes.spectrum import Harmonics

SMALL = {"width": 8, "depth": 2, "w0": 5.0, "inner_steps": 2}


def built(shape=(1, 9), num_classes=None, seed=0, **options):
    torch.manual_seed(seed)
    return ImplicitConfig(**{**SMALL, **options}).build(shape, num_classes=num_classes).double()


def noisy(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def count(module):
    return sum(p.numel() for p in module.parameters())


LABELS = torch.tensor([10.0, 500.0, 900.0])


def test_the_published_sizes():
    sizes = {"w0": 30.0, "envelope": 10.0}
    mnist = ImplicitConfig(width=128, depth=8, meta_sgd=False, inner_lr=1e-2, **sizes).build((1, 32, 32))
    assert count(mnist) == 118_916
    celeba = ImplicitConfig(width=256, depth=15, y_input=True, inner_lr=0.1, **sizes).build((3, 64, 64))
    assert count(celeba.field) == 945_173
    assert count(celeba.rates) == 945_173
    rates = torch.cat([p.detach().flatten() for p in celeba.rates.values()])
    assert 0.005 - 1e-6 <= float(rates.min()) < float(rates.max()) <= 0.1 + 1e-6


@pytest.mark.parametrize("shape", [(1, 9), (2, 8), (3, 4, 5)])
@pytest.mark.parametrize("adapt", ["weights", "modulation"])
@pytest.mark.parametrize("y_input", [False, True])
def test_any_grid_and_finite_gradients_everywhere(shape, adapt, y_input):
    network = built(shape, num_classes=4, adapt=adapt, y_input=y_input)
    for factor in (1, 2):
        x = noisy(3, shape[0], *(factor * side for side in shape[1:]))
        out = network(x, LABELS, torch.tensor([0, 3, 1]))
        assert out.shape == x.shape
    out.square().mean().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.isfinite().all()), name


def test_without_inner_steps_it_is_the_shared_network():
    network = built((1, 9), inner_steps=0, y_input=True)
    x = noisy(3, 1, 9)
    points = torch.linspace(-1, 1, 19, dtype=torch.float64)[1::2]
    for index in range(3):
        time = (LABELS[index].double() / 500 - 1).expand(9)
        inputs = torch.stack([points, time, x[index, 0]], 1)
        torch.testing.assert_close(network(x, LABELS)[index, 0], network.field(inputs)[:, 0])


def test_one_step_is_the_gradient_step_which_for_the_linear_head_has_a_closed_form():
    rate = 0.03
    network = built((1, 9), inner_steps=1, meta_sgd=False, inner_lr=rate, adapt="weights")
    x, label = 0.3 * noisy(1, 1, 9), LABELS[1:2]
    points = torch.linspace(-1, 1, 19, dtype=torch.float64)[1::2]
    inputs = torch.stack([points, torch.zeros(9).double()], 1)
    own = dict(network.field.named_parameters())
    residual = network.field(inputs)[:, 0] - x[0, 0]
    slopes = torch.autograd.grad(residual.square().mean(), list(own.values()))
    slopes = dict(zip(own, slopes, strict=True))
    torch.testing.assert_close(slopes["head.bias"], 2 * residual.mean()[None])
    stepped = {name: value - rate * slopes[name].clamp(-1, 1) for name, value in own.items()}
    expected = functional_call(network.field, stepped, (inputs,))[:, 0]
    torch.testing.assert_close(network(x, label)[0, 0], expected)

    # The network is linear in its head: with features A the gradient is 2/P A^T (A psi - x).
    features = []
    network.field.head.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    network.field(inputs)
    design = torch.cat([features[0], torch.ones(9, 1).double()], 1)
    psi = torch.cat([network.field.head.weight[0], network.field.head.bias])
    slope = 2 / 9 * design.mT @ (design @ psi - x[0, 0])
    torch.testing.assert_close(slope, torch.cat([slopes["head.weight"][0], slopes["head.bias"]]))


def test_gradients_are_clipped_and_rates_kept_between_0_and_1():
    x, label = 1e6 * noisy(1, 1, 9), LABELS[:1]
    fixed = built((1, 9), inner_steps=1, meta_sgd=False, inner_lr=0.01)
    moved = (fixed(x, label) - built((1, 9), inner_steps=1, meta_sgd=False, inner_lr=1e-12)(x, label)).abs().max()
    assert 0 < float(moved.detach()) < 10
    learned = built((1, 9), inner_steps=1)
    with torch.no_grad():
        for rate in learned.rates.values():
            rate.fill_(-3.0)
    torch.testing.assert_close(learned(x, label), built((1, 9), inner_steps=1, inner_lr=1e-12)(x, label))


@pytest.mark.parametrize("adapt", ["weights", "modulation"])
def test_second_order_gradients_are_those_of_finite_differences(adapt):
    x, target = noisy(2, 1, 9), noisy(2, 1, 9, seed=2)
    networks = {order: built(adapt=adapt, first_order=order) for order in (False, True)}

    def loss(network):
        return (network(x, LABELS[:2]) - target).square().mean()

    found = {}
    for order, network in networks.items():
        loss(network).backward()
        found[order] = network.field.head.weight.grad.clone()
    weight, h = networks[False].field.head.weight, 1e-6
    for place in range(0, weight.shape[1], 3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[0, place] += sign * h
            values.append(float(loss(networks[False]).detach()))
            with torch.no_grad():
                weight[0, place] -= sign * h
        numeric = (values[0] - values[1]) / (2 * h)
        assert float(found[False][0, place]) == pytest.approx(numeric, rel=1e-4, abs=1e-8)
    assert (found[False] - found[True]).abs().max() > 1e-4  # the other method is another one, with the same values
    torch.testing.assert_close(loss(networks[False]), loss(networks[True]))


@pytest.mark.parametrize("chunk", [1, 2, 32])
def test_inputs_are_fitted_one_by_one(chunk):
    network = built((2, 6), chunk=chunk)
    x = noisy(3, 2, 6)
    alone = [network(x[i : i + 1], LABELS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(network(x, LABELS), torch.cat(alone))


def test_inner_steps_bring_it_nearer_to_its_input_in_the_measure_it_is_given():
    x = Harmonics("fourier", (16,)).values(torch.eye(16).double()[1:4].view(3, 1, 16))
    network, idle = built((1, 16), inner_lr=0.2), built((1, 16), inner_lr=1e-9)
    error = [(n(x, LABELS) - x).square().mean() for n in (network, idle)]
    assert error[0] < 0.9 * error[1]
    network.whiten = lambda residual: 0 * residual
    torch.testing.assert_close(network(x, LABELS), idle(x, LABELS))


def test_it_works_in_inference_mode_and_sees_its_input():
    network = built()
    x = noisy(2, 1, 9)
    with torch.inference_mode():
        out = network(x.clone(), LABELS[:2])
    torch.testing.assert_close(out, network(x, LABELS[:2]).detach())
    assert (network(x + 1, LABELS[:2]) - out).abs().max() > 1e-3
    assert math.isfinite(float(out.detach().sum()))


def test_what_is_refused():
    with pytest.raises(ConfigError, match="inner_steps: 0 without y_input never sees the input"):
        ImplicitConfig.parse({"inner_steps": 0})
    with pytest.raises(UserError, match=r"needs values on a grid .* not events of \(2,\)"):
        built((2,))
    with pytest.raises(UserError, match="has one output; 2 asked for"):
        ImplicitConfig(**SMALL).build((1, 8), num_outputs=2)
    with pytest.raises(UserError, match=r"built for events \(1, 9\); \(2, 9\) given"):
        built()(noisy(3, 2, 9), LABELS)


def test_sampling_keeps_no_graph_of_the_inner_steps():
    made = ImplicitConfig(width=8, depth=2, inner_steps=2).build((1, 6))
    x, label = torch.randn(2, 1, 6), torch.full((2,), 300.0)
    with torch.inference_mode():
        out = made(x, label)
    with torch.no_grad():
        again = made(x.clone(), label.clone())
    assert not out.requires_grad
    assert not again.requires_grad
    assert torch.allclose(made(x.clone(), label.clone()), out, atol=1e-6)
    assert made(x.clone(), label.clone()).requires_grad

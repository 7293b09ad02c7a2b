import math

import pytest
import torch

from osmose.errors import UserError
from osmose.networks.base import sinusoids
from osmose.networks.mlp import MLPConfig


@pytest.mark.parametrize("event_shape", [(1,), (2,), (64,), (3, 5), (1, 4, 4)])
@pytest.mark.parametrize("width", [4, 6, 32])
def test_any_event_and_zero_at_the_start(event_shape, width):
    network = MLPConfig(width=width, depth=2).build(event_shape)
    x = torch.randn(3, *event_shape)
    out = network(x, torch.tensor([0.0, 500.0, 999.0]))
    assert out.shape == x.shape
    assert bool((out == 0).all())


@pytest.mark.parametrize(("event_shape", "out_shape"), [((2,), (6,)), ((3, 5), (9, 5)), ((1, 4, 4), (3, 4, 4))])
def test_several_outputs_lie_along_the_first_axis(event_shape, out_shape):
    network = MLPConfig(width=8).build(event_shape, num_outputs=3)
    out = network(torch.randn(4, *event_shape), torch.zeros(4))
    assert out.shape == (4, *out_shape)
    assert bool((out == 0).all())


@pytest.mark.parametrize(("x", "label"), [((4, 3), 4), ((4, 2), 3), ((2,), 2), ((4, 2, 1), 4)])
def test_input_of_another_form_is_refused(x, label):
    with pytest.raises(UserError, match=r"network: built for events \(2,\) with one label each"):
        MLPConfig(width=8).build((2,))(torch.zeros(x), torch.zeros(label))


def perturbed(config, event_shape, num_classes=None):
    torch.manual_seed(0)
    network = config.build(event_shape, num_classes=num_classes).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def test_every_parameter_learns_within_a_few_steps():
    network = MLPConfig(width=16).build((2,), num_classes=3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, target = torch.randn(2, 6, 2).unbind(0)
    for _ in range(3):
        optimizer.zero_grad()
        out = network(x, torch.linspace(0, 999, 6), torch.arange(6) % 3)
        (out - target).square().mean().backward()
        optimizer.step()
    assert [name for name, p in network.named_parameters() if not bool((p.grad != 0).any())] == []


def test_items_time_and_class():
    network = perturbed(MLPConfig(width=16), (2,), num_classes=3)
    x, label, classes = torch.randn(5, 2).double(), torch.linspace(0, 999, 5), torch.tensor([0, 1, 2, 0, 1])
    together = network(x, label, classes)
    for i in range(5):
        alone = network(x[i : i + 1], label[i : i + 1], classes[i : i + 1])
        assert torch.allclose(alone, together[i : i + 1], rtol=1e-10)
    assert (network(x, label.flip(0), classes) - together)[:2].abs().min() > 1e-6
    assert (network(x, label, (classes + 1) % 3) - together).abs().min() > 1e-6


def test_dropout_is_for_training():
    network = perturbed(MLPConfig(width=16, dropout=0.5), (2,))
    x, label = torch.randn(5, 2).double(), torch.zeros(5)
    assert not torch.equal(network(x, label), network(x, label))
    network.eval()
    assert torch.equal(network(x, label), network(x, label))


@pytest.mark.parametrize("width", [4, 8, 128])
def test_the_embedding_is_ddpm_s(width):
    label = torch.tensor([0.0, 1.0, 37.5, 999.0])
    got = sinusoids(label, width)
    half = width // 2
    for row, value in zip(got, label.tolist(), strict=True):
        omega = [math.exp(-math.log(10_000) * j / (half - 1)) for j in range(half)]
        want = [math.sin(value * w) for w in omega] + [math.cos(value * w) for w in omega]
        assert torch.allclose(row, torch.tensor(want), atol=1e-4)  # float32 angles up to 999


def test_the_embedding_is_diffusers_with_freq_shift_1():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    label = torch.linspace(0, 999, 20)
    theirs = embeddings.get_timestep_embedding(label, 64, flip_sin_to_cos=False, downscale_freq_shift=1)
    assert torch.allclose(sinusoids(label, 64), theirs, atol=1e-4)

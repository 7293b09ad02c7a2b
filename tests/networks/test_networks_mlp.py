import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from osmose.errors import UserError
from osmose.networks.base import sinusoids
from osmose.networks.mlp import MLPConfig

MODULATIONS = ("add", "scale-shift", "double-norm")
every_modulation = pytest.mark.parametrize("modulation", MODULATIONS)


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


@every_modulation
def test_every_parameter_learns_within_a_few_steps(modulation):
    network = MLPConfig(width=16, modulation=modulation).build((2,), num_classes=3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, target = torch.randn(2, 6, 2).unbind(0)
    for _ in range(3):
        optimizer.zero_grad()
        out = network(x, torch.linspace(0, 999, 6), torch.arange(6) % 3)
        (out - target).square().mean().backward()
        optimizer.step()
    assert [name for name, p in network.named_parameters() if not bool((p.grad != 0).any())] == []


@every_modulation
def test_items_time_and_class(modulation):
    network = perturbed(MLPConfig(width=16, modulation=modulation), (2,), num_classes=3)
    x, label, classes = torch.randn(5, 2).double(), torch.linspace(0, 999, 5), torch.tensor([0, 1, 2, 0, 1])
    together = network(x, label, classes)
    for i in range(5):
        alone = network(x[i : i + 1], label[i : i + 1], classes[i : i + 1])
        assert torch.allclose(alone, together[i : i + 1], rtol=1e-10)
    assert (network(x, label.flip(0), classes) - together)[:2].abs().min() > 1e-6
    assert (network(x, label, (classes + 1) % 3) - together).abs().min() > 1e-6


@every_modulation
@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_network_is_its_definition(modulation, num_classes):
    network = perturbed(MLPConfig(width=8, depth=2, modulation=modulation), (2,), num_classes)
    x, label, classes = torch.randn(5, 2).double(), torch.linspace(0, 999, 5), torch.tensor([0, 1, 2, 0, 1])
    p = dict(network.named_parameters())
    linear = lambda name, h: h @ p[f"{name}.weight"].T + p[f"{name}.bias"]  # noqa: E731
    norm = lambda name, h: F.layer_norm(h, (8,), p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
    time = F.silu(linear("embed.2", F.silu(linear("embed.0", sinusoids(label, 8).double()))))
    if num_classes:
        time = time + p["classes.weight"][classes]
    h = linear("stem", x)
    for i in range(2):
        inner = norm(f"blocks.{i}.norm", h)
        if modulation == "add":
            inner = linear(f"blocks.{i}.first", inner) + time
        else:
            s, b = linear(f"blocks.{i}.time_emb_proj", time).chunk(2, 1)
            if modulation == "double-norm":
                s, b = (a / (a.square().mean(1, keepdim=True) + 1e-8).sqrt() for a in (s, b))
            inner = linear(f"blocks.{i}.first", inner * (1 + s if modulation == "scale-shift" else s) + b)
        h = h + linear(f"blocks.{i}.second", F.silu(inner))
    want = linear("head.2", F.silu(norm("head.0", h)))
    assert torch.allclose(network(x, label, classes if num_classes else None), want, rtol=1e-10, atol=1e-12)


def test_the_default_draws_and_names_its_parameters_as_ever():
    torch.manual_seed(0)
    network = MLPConfig(width=4, depth=1).build((2,))
    assert list(network.state_dict()) == [
        *("embed.0.weight", "embed.0.bias", "embed.2.weight", "embed.2.bias", "stem.weight", "stem.bias"),
        *("blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.first.weight", "blocks.0.first.bias"),
        *("blocks.0.second.weight", "blocks.0.second.bias", "head.0.weight", "head.0.bias"),
        *("head.2.weight", "head.2.bias"),
    ]
    torch.manual_seed(0)
    for name in ("embed.0", "embed.2", "stem", "blocks.0.first"):
        layer = network.get_submodule(name)
        expected = torch.nn.Linear(layer.in_features, layer.out_features)
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)


@every_modulation
def test_forward_derivatives(modulation):
    network = perturbed(MLPConfig(width=16, modulation=modulation, time_frequency=0.02), (3,), num_classes=3)
    x, dx = torch.randn(2, 4, 3).double().unbind(0)
    label, dlabel, classes = torch.linspace(100, 900, 4), torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.arange(4) % 3

    def slope(dx, dlabel):
        with forward_ad.dual_level():
            duals = forward_ad.make_dual(x, dx), forward_ad.make_dual(label, dlabel)
            return forward_ad.unpack_dual(network(*duals, classes)).tangent

    def quotient(dx, dlabel, h):
        forward, back = (network(x + step * dx, label + step * dlabel, classes) for step in (h, -h))
        return (forward - back) / (2 * h)

    still, zeros = torch.zeros_like(x), torch.zeros(4)
    with torch.no_grad():
        for direction, h, tolerance in (((dx, zeros), 1e-5, 1e-7), ((still, dlabel), 0.5, 1e-3)):  # labels are float32
            want = quotient(*direction, h)
            assert want.abs().max() > 1e-5
            assert (slope(*direction) - want).abs().max() < tolerance * want.abs().max()
        assert torch.allclose(slope(dx, dlabel), slope(dx, zeros) + slope(still, dlabel), rtol=1e-9, atol=1e-12)
    # With a graph: the weights can be trained through it.
    got = torch.func.jvp(lambda x: network(x, label, classes), (x,), (dx,))[1]
    assert torch.allclose(got, slope(dx, zeros), rtol=1e-8, atol=1e-10)
    assert bool((torch.autograd.grad(got.square().sum(), network.stem.weight)[0] != 0).any())


class Recorder(torch.nn.Module):
    def forward(self, h):
        self.seen = h
        return 2 * h


@every_modulation
def test_modules_after_the_blocks(modulation):
    network = perturbed(MLPConfig(width=8, depth=3, modulation=modulation), (2,))
    x, label = torch.randn(4, 2).double(), torch.linspace(0, 999, 4)
    assert network.widths == (8, 8, 8)
    recorders, outputs = [Recorder() for _ in range(3)], []
    for block in network.blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    changed = network(x, label, after=recorders)
    assert all(recorder.seen is out for recorder, out in zip(recorders, outputs, strict=True))
    assert not torch.allclose(changed, network(x, label))
    assert torch.equal(network(x, label, after=[torch.nn.Identity()] * 3), network(x, label))
    with pytest.raises(UserError, match="2 modules for 3 blocks; give one for each"):
        network(x, label, after=recorders[:2])


@pytest.mark.parametrize("frequency", [0.002, 0.02, 3.0])
def test_the_time_frequency_scales_the_slope_along_the_label(frequency):
    label = torch.tensor([0.0, 0.3]).requires_grad_()

    def slope(*settings):
        return torch.autograd.functional.jacobian(lambda t: sinusoids(t, 8, *settings).sum(0), label).T[0]

    assert torch.allclose(slope(frequency), frequency * slope(), rtol=1e-6)  # at 0 the slopes are the frequencies
    assert slope(frequency).abs().max() == pytest.approx(frequency)
    later = torch.tensor([37.5, 500.0])
    assert torch.allclose(sinusoids(later, 8, frequency), sinusoids(later * frequency, 8), atol=1e-3)
    assert torch.equal(sinusoids(later, 8), sinusoids(later, 8, 1.0))


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

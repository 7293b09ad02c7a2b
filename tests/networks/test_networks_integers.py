"""Layers of integers: identities of the affine quantiser, its derivatives, and integer sums."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from osmose.configuration import ConfigError
from osmose.networks import NETWORKS
from osmose.networks.base import Joining
from osmose.networks.integers import (
    Form,
    IntegerLayer,
    RoundedLayer,
    dequantize,
    grid_of,
    quantize,
    rounded,
    signed,
    unsigned,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(smallest, largest, bits=8):
    return grid_of(torch.tensor(smallest), torch.tensor(largest), unsigned(bits))


def layer_of(kind="conv", c_in=6, c_out=5, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(c_in, c_out, **options) if kind == "linear" else nn.Conv2d(c_in, c_out, 3, padding=1, **options)


def both(layer, form, smallest=-1.3, largest=2.7):
    """A rounded layer with ranges, and the integer layer that it rounds to."""
    one, other = RoundedLayer(layer, form), IntegerLayer(layer, form)
    if form.inputs == "static":
        count = len(one.parts)
        low = torch.as_tensor(smallest, dtype=torch.float32).expand(count)
        one.measured(low, torch.as_tensor(largest, dtype=torch.float32).expand(count))
    one.integers(other)
    return one.eval(), other.eval()


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_rounding_twice_is_rounding_once_and_every_integer_is_its_own(bits):
    limits = unsigned(bits)
    scale, zero = grid(-0.7, 1.9, bits)
    q = torch.arange(limits.low, limits.high + 1, dtype=torch.float32)
    torch.testing.assert_close(quantize(dequantize(q, scale, zero), scale, zero, limits), q, rtol=0, atol=0)
    x = torch.empty(10_000).uniform_(-0.7, 1.9, generator=generator())
    once = dequantize(quantize(x, scale, zero, limits), scale, zero)
    torch.testing.assert_close(dequantize(quantize(once, scale, zero, limits), scale, zero), once, rtol=0, atol=0)
    # The ends of the range move by what it takes for zero to be an integer: half a step at most.
    inside = (x >= dequantize(q[0], scale, zero)) & (x <= dequantize(q[-1], scale, zero))
    assert inside.float().mean() > 0.8
    assert float((x - once)[inside].abs().max()) <= float(scale) / 2 * (1 + 1e-5)
    assert float(dequantize(quantize(torch.zeros(1), scale, zero, limits), scale, zero)) == 0.0


def test_a_range_always_holds_zero_and_is_never_nothing():
    scale, zero = grid_of(torch.tensor([0.5, -3.0, 0.0]), torch.tensor([2.0, -1.0, 0.0]), unsigned(8))
    torch.testing.assert_close(scale[:2], torch.tensor([2.0, 3.0]) / 255)
    assert zero[:2].tolist() == [0, 255]
    assert scale[2] > 0
    assert float(quantize(torch.zeros(1), scale[2], zero[2], unsigned(8))) == float(zero[2])


def test_the_noise_of_rounding_is_a_twelfth_of_a_step_squared_and_a_bit_is_six_decibels():
    x = torch.empty(400_000, dtype=torch.float64).uniform_(-1, 1, generator=generator())
    ratios = []
    for bits in (5, 6, 7, 8):
        scale, zero = grid_of(torch.tensor(-1.0).double(), torch.tensor(1.0).double(), unsigned(bits))
        error = float((dequantize(quantize(x, scale, zero, unsigned(bits)), scale, zero) - x).square().mean())
        assert error == pytest.approx(float(scale) ** 2 / 12, rel=0.03)
        ratios.append(10 * math.log10(float(x.square().mean()) / error))
    assert [after - before for before, after in pairwise(ratios)] == pytest.approx([20 * math.log10(2)] * 3, abs=0.35)


def test_gaussian_values_lose_what_is_rounded_and_what_lies_beyond_the_range():
    v, r = 1.7, 2.5
    x = v * torch.randn(1_000_000, dtype=torch.float64, generator=generator())
    scale = torch.tensor(2 * r * v / 254).double()
    error = float((dequantize(quantize(x, scale, 0.0, signed(8)), scale, 0.0) - x).square().mean())
    density = math.exp(-(r**2) / 2) / math.sqrt(2 * math.pi)
    beyond = math.erfc(r / math.sqrt(2)) / 2
    clipped = 2 * v**2 * ((1 + r**2) * beyond - r * density)
    inside = 1 - 2 * beyond
    assert error == pytest.approx(inside * float(scale) ** 2 / 12 + clipped, rel=0.02)


def test_straight_through_gradients_are_one_inside_and_zero_beyond():
    limits = unsigned(4)
    scale, zero = torch.tensor(0.25), torch.tensor(6.0)
    x = torch.linspace(-4, 4, 801, requires_grad=True)
    (derivative,) = torch.autograd.grad(rounded(x, scale, zero, limits).sum(), x)
    whole = (x.detach() / scale).round() + zero
    torch.testing.assert_close(derivative, ((whole >= 0) & (whole <= 15)).float(), rtol=0, atol=0)
    assert 0 < derivative.mean() < 1


def test_gradients_by_the_scale_are_those_of_the_pieces():
    limits, zero = signed(5), 0.0
    x = 3 * torch.randn(500, dtype=torch.float64, generator=generator())
    scale = torch.tensor(0.21, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(500, dtype=torch.float64, generator=generator(1))
    weight[((x / scale.detach()).round().abs() == limits.high)] = 0  # at the corner there is none
    (derivative,) = torch.autograd.grad((weight * rounded(x, scale, zero, limits)).sum(), scale)
    # Rounding goes straight through: round(x / s) is x / s and what was rounded off, which does not move.
    s = scale.detach()
    off = (x / s).round() - x / s

    def pieces(other):
        return (weight * (x / other + off).clamp(*limits) * other).sum()

    h = 1e-6
    assert float(derivative) == pytest.approx(float((pieces(s + h) - pieces(s - h)) / (2 * h)), rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("parts", [(), (2, 4)])
def test_integer_layers_are_sums_of_integers(kind, parts):
    layer = layer_of(kind)
    one, other = both(layer, Form(parts=parts))
    x = 1.5 * torch.randn(*((7, 6) if kind == "linear" else (2, 6, 4, 4)), generator=generator())
    torch.testing.assert_close(other(x), one(x), rtol=1e-5, atol=1e-5)
    # y_c = sum over parts of s_a s_c (sum q w - z sum w) + b_c, with sums of whole numbers.
    columns = x if kind == "linear" else nn.functional.unfold(x, 3, padding=1).mT.unflatten(-1, (6, 9))
    weight = other.weight.flatten(2) if kind == "conv" else other.weight
    total = other.bias.double()
    for index, (own, w) in enumerate(
        zip(columns.split(parts or (6,), -1 if kind == "linear" else -2), weight.split(parts or (6,), 1), strict=True)
    ):
        scale, zero = other.scale[index], other.zero[index].float()
        q = quantize(own, scale, zero, other.limits).to(torch.int64).flatten(2 if kind == "conv" else 1)
        whole = w.to(torch.int64).flatten(1)
        sums = q @ whole.T
        assert torch.equal(sums.double(), q.double() @ whole.double().T)  # what 32 bits hold, 64 hold exactly
        assert int(sums.abs().max()) < 2**31
        corrected = sums - int(zero) * whole.sum(1)
        total = total + corrected.double() * float(scale) * other.weight_scale[index].double()
    right = total if kind == "linear" else total.mT.unflatten(-1, (4, 4))
    torch.testing.assert_close(other(x).double(), right, rtol=1e-5, atol=1e-5)


def test_a_constant_that_is_an_integer_gives_the_layers_own_output():
    layer = layer_of("conv", bias=True)
    with torch.no_grad():  # weights that are integers times a scale, so that nothing but the input could be off
        layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape, generator=generator()) / 127 * 0.3)
        layer.weight[:, 0, 0, 0] = 0.3
    _, other = both(layer, Form(), -1.0, 1.55)
    scale, zero = grid(-1.0, 1.55)
    x = dequantize(torch.tensor(200.0), scale, zero).expand(1, 6, 5, 5)
    torch.testing.assert_close(other(x), layer(x), rtol=1e-5, atol=1e-6)


def test_parts_with_scales_of_their_own():
    layer = layer_of("conv")
    x = torch.randn(3, 6, 4, 4, generator=generator())
    split, whole = both(layer, Form(parts=(2, 4)))[1], both(layer, Form())[1]
    # With equal ranges, and weights of equal reach, it is the same.
    split.weight_scale.copy_(whole.weight_scale.expand(2, -1))
    split.weight.copy_(whole.weight)
    torch.testing.assert_close(split(x), whole(x), rtol=1e-5, atol=1e-5)
    # A part a thousand times as large takes nothing from the other's precision.
    large = torch.cat([x[:, :2], 1000 * x[:, 2:]], 1)
    with torch.no_grad():
        layer.weight[:, 2:] = 0
    low, high = torch.tensor([-4.0, -4000.0]), torch.tensor([4.0, 4000.0])
    together = both(layer, Form(), -4000.0, 4000.0)[1]
    apart, small = both(layer, Form(parts=(2, 4)), low, high)[1], both(layer, Form(), -4.0, 4.0)[1]
    torch.testing.assert_close(apart(large), small(x), rtol=1e-4, atol=1e-4)
    right = layer(x)
    assert (together(large) - right).norm() > 20 * (apart(large) - right).norm()


@pytest.mark.parametrize("inputs", ["static", "dynamic", "float"])
def test_the_error_of_a_layer_is_bounded_by_half_steps(inputs):
    layer = layer_of("conv")
    x = torch.randn(4, 6, 5, 5, generator=generator())
    _, other = both(layer, Form(inputs), float(x.min()) - 0.1, float(x.max()) + 0.1)
    step = {"static": lambda: other.scale.max(), "dynamic": lambda: other.item_grid(x)[0].max(), "float": lambda: 0.0}
    half, kept = float(step[inputs]()) / 2 * 1.5, nn.functional.conv2d  # a range moves by half a step for its zero
    ones = torch.ones_like(layer.weight)
    of_inputs = half * layer.weight.abs().flatten(1).sum(1).view(-1, 1, 1)
    of_weights = kept((x.abs() + half), ones, padding=1) * (other.weight_scale[0] / 2).view(-1, 1, 1)
    error = (other(x) - layer(x)).abs()
    assert bool((error <= of_inputs + of_weights + 1e-5).all())
    assert float(error.max()) > 0


def test_dynamic_ranges_are_of_each_item():
    _, other = both(layer_of("linear"), Form("dynamic"))
    x = torch.randn(5, 6, generator=generator())
    x[0] *= 100
    torch.testing.assert_close(other(x)[1:], other(x[1:]), rtol=1e-6, atol=1e-6)


def test_weights_shrink_where_few_of_them_are_large():
    layer = layer_of("linear", 256, 3)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(3, 256, generator=generator()))
        layer.weight[0, 0] = 0.08

    def error(one):
        weight = IntegerLayer(layer, one.form)
        one.integers(weight)
        return (weight.real_weight() - layer.weight)[0].square().sum()

    one = RoundedLayer(layer, Form(weight_bits=4))
    before = error(one)
    one.shrink_weights()
    assert float(one.shrink[0, 0]) < 1
    assert error(one) < before


CONFIG = {"kind": "unet", "channels": 8, "mult": [1, 2], "attention": [4], "blocks": 1}


def test_networks_tell_where_their_inputs_are_joined():
    for values in (CONFIG, {"kind": "uvit", "width": 16, "heads": 2, "depth": 3}):
        network = NETWORKS.parse(values).build((1, 8, 8))
        parts = {}
        for place, module in network.named_modules():
            if isinstance(module, Joining):
                parts |= {f"{place}.{name}".lstrip("."): own for name, own in module.joined().items()}
        assert parts
        for name, own in parts.items():
            layer = network.get_submodule(name)
            assert sum(own) == (layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)


def test_quantized_networks_hold_their_layers_and_name_those_that_there_are_not():
    config = NETWORKS.parse(
        {"kind": "quantized", "network": CONFIG, "layers": {"up_blocks.0.upsamplers.0.conv": "static"}}
    )
    network = config.build((1, 8, 8), num_classes=3)
    x, label, told = torch.randn(2, 1, 8, 8), torch.full((2,), 500.0), torch.tensor([0, -1])
    assert network(x, label, told).shape == (2, 1, 8, 8)
    layer = network.get_submodule("up_blocks.0.upsamplers.0.conv")
    assert isinstance(layer, IntegerLayer)
    assert layer.weight.dtype is torch.int8
    for values, said in (
        ({"layers": {"nothing.here": "static"}}, "layers.nothing.here: unet has no such linear layer or convolution"),
        ({"layers": {}, "bits": 9}, "bits: 9 is not valid"),
        ({"layers": {}, "weight_bits": 1}, "weight_bits: 1 is not valid"),
        ({"layers": {"a": "int4"}}, "layers.a: 'int4' is not valid"),
    ):
        with pytest.raises(ConfigError, match=said):
            NETWORKS.parse({"kind": "quantized", "network": CONFIG} | values).build((1, 8, 8))


def test_an_upsampling_convolution_of_integers_is_the_same_map():
    torch.manual_seed(0)
    network = NETWORKS.parse(CONFIG).build((1, 8, 8))
    upsample = network.up_blocks[0].upsamplers[0]
    x = torch.randn(2, 16, 4, 4)
    right = upsample(x)
    one, other = both(upsample.conv, Form("float"))
    torch.testing.assert_close(one(x), other(x))
    upsample.conv = other
    assert (upsample(x) - right).norm() < 0.02 * right.norm()


def test_bf16_networks_keep_their_labels_in_float32():
    torch.manual_seed(0)
    real = NETWORKS.parse(CONFIG).build((1, 8, 8))
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    half = NETWORKS.parse({"kind": "bf16", "network": CONFIG}).build((1, 8, 8))
    half.network.load_state_dict(real.state_dict())
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([999.0, 1000.0])
    out, right = half(x, label), real(x, label)
    assert out.dtype is torch.float32
    assert 0 < (out - right).norm() < 0.05 * right.norm()
    assert torch.equal(label[:1].bfloat16(), label[1:].bfloat16())
    assert not torch.equal(half(x[:1].expand(2, -1, -1, -1), label)[0], half(x[:1].expand(2, -1, -1, -1), label)[1])

"""DSNO's temporal layers and the network around a backbone: exact identities."""

import pytest
import torch
from torch.nn import functional as F

from osmose.errors import UserError
from osmose.networks.mlp import MLPConfig
from osmose.networks.temporal import TemporalFourier, TemporalNetwork
from osmose.networks.unet import UNetConfig

SIZES = [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1), (4, 2), (4, 3), (5, 3), (6, 2), (8, 3), (8, 5)]
every_size = pytest.mark.parametrize(("num_times", "modes"), SIZES)
every_space = pytest.mark.parametrize("space", [(), (5,), (2, 3)], ids=["points", "lines", "images"])


@pytest.fixture(autouse=True)
def _in_double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layer_and_input(num_times, modes, space=(2, 3), channels=3, items=2):
    layer = TemporalFourier(channels, num_times, modes)
    with torch.no_grad():
        layer.weight.normal_()
    return layer, torch.randn(items * num_times, channels, *space)


def by_fft(layer, u):
    """K u with torch's Fourier transforms."""
    slices = u.reshape(-1, layer.num_times, u.shape[1], u[0, 0].numel())
    transformed = torch.fft.rfft(slices, dim=1)
    kept = torch.zeros_like(transformed)
    factors = torch.view_as_complex(layer.weight)
    kept[:, : layer.modes] = torch.einsum("joi,bjip->bjop", factors, transformed[:, : layer.modes])
    return torch.fft.irfft(kept, n=layer.num_times, dim=1).reshape(u.shape)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@every_size
@every_space
def test_the_filter_is_that_of_the_fourier_transform(num_times, modes, space):
    layer, u = layer_and_input(num_times, modes, space)
    u.requires_grad_()
    got, want = layer.filtered(u), by_fft(layer, u)
    assert want.std() > 0.1
    assert close(got, want)
    grad = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(out, (u, layer.weight), grad) for out in (got, want)), strict=True):
        assert close(a, b)
    assert close(layer(u), u + F.leaky_relu(want, 0.01))


@every_size
@every_space
def test_the_filter_is_a_circulant_matrix(num_times, modes, space):
    layer, u = layer_and_input(num_times, modes, space)
    kernel = layer.kernel()
    assert kernel.shape == (num_times, 3, 3)
    slices = u.view(2, num_times, 3, -1)
    want = torch.zeros_like(slices)
    for t in range(num_times):
        for s in range(num_times):
            want[:, t] += kernel[(t - s) % num_times] @ slices[:, s]
    assert close(layer.filtered(u), want.view_as(u))


@every_space
def test_without_factors_the_layer_is_the_identity(space):
    layer, u = layer_and_input(4, 2, space)
    torch.nn.init.zeros_(layer.weight)
    assert torch.equal(layer(u), u)


@every_size
def test_a_shift_of_the_slices_is_a_shift_of_the_result(num_times, modes):
    layer, u = layer_and_input(num_times, modes)

    def shifted(x):
        return x.unflatten(0, (2, num_times)).roll(1, 1).flatten(0, 1)

    assert close(layer.filtered(shifted(u)), shifted(layer.filtered(u)))
    if num_times > 1:
        assert not torch.allclose(shifted(u), u)


@pytest.mark.parametrize("num_times", [1, 2, 3, 4, 7, 8])
def test_all_modes_with_factor_one_are_everything(num_times):
    layer, u = layer_and_input(num_times, num_times // 2 + 1)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.eye(3), torch.zeros(3, 3)], -1).expand_as(layer.weight))
    assert close(layer.filtered(u), u)


@every_size
def test_what_is_constant_in_time_is_mode_0(num_times, modes):
    layer, u = layer_and_input(num_times, modes)
    u = u[::num_times].repeat_interleave(num_times, 0)
    want = torch.einsum("oi,bihw->bohw", layer.weight[0, ..., 0], u)
    assert close(layer.filtered(u), want)


def test_one_slice_is_mixed_among_the_channels_only():
    layer, u = layer_and_input(1, 1)
    want = torch.einsum("oi,bihw->bohw", layer.weight[0, ..., 0], u)
    assert close(layer(u), u + F.leaky_relu(want, 0.01))


@every_size
def test_only_what_is_used_has_gradients(num_times, modes):
    layer, u = layer_and_input(num_times, modes)
    layer.filtered(u).square().sum().backward()
    for mode in range(modes):
        real, imaginary = layer.weight.grad[mode].unbind(-1)
        assert bool((real != 0).all())
        if 2 * mode in (0, num_times):
            assert bool((imaginary == 0).all())
        else:
            assert bool((imaginary != 0).all())


def test_slices_meet_and_items_and_pixels_do_not():
    layer, u = layer_and_input(4, 2)
    base = layer(u)
    other = u.clone()
    other[5, :, 1, 2] += 1  # of item 1 slice 1, one pixel
    moved = (layer(other) - base).abs().amax(1)
    assert bool((moved[4:, 1, 2] > 1e-6).all())
    moved[4:, 1, 2] = 0
    assert bool((moved == 0).all())


@pytest.mark.parametrize(("num_times", "modes"), [(4, 2), (1, 1)])
def test_at_the_start_the_factors_are_small_and_positive(num_times, modes):
    torch.set_default_dtype(torch.float32)
    weight = TemporalFourier(16, num_times, modes).weight
    assert weight.shape == (modes, 16, 16, 2)
    assert weight.dtype == torch.float32
    scaled = weight * 256
    assert 0 <= scaled.min() < 0.02
    assert 0.98 < scaled.max() <= 1
    assert scaled.mean().item() == pytest.approx(0.5, abs=0.05)
    assert list(TemporalFourier(2, num_times, modes).state_dict()) == ["weight"]


def test_under_autocast_the_filter_is_float32():
    torch.set_default_dtype(torch.float32)
    layer, u = layer_and_input(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(u)
        assert layer(u.bfloat16()).dtype == torch.bfloat16
        assert layer.filtered(u.bfloat16()).dtype == torch.float32
    assert torch.equal(inside, layer(u))


@pytest.mark.parametrize(
    ("num_times", "modes", "message"),
    [
        (4, 4, r"modes: 4 with num_times=4, which has 3 \(num_times // 2 \+ 1\); use 1 to 3"),
        (1, 2, r"modes: 2 with num_times=1, which has 1 .*use 1 to 1"),
        (5, 4, r"modes: 4 with num_times=5, which has 3"),
        (4, 0, r"modes: 0 .*use 1 to 3"),
        (4, -1, r"modes: -1 .*use 1 to 3"),
        (0, 1, r"num_times: 0 is not a number of times; use at least 1"),
    ],
)
def test_modes_that_do_not_exist_are_refused(num_times, modes, message):
    with pytest.raises(UserError, match=message):
        TemporalFourier(3, num_times, modes)


BACKBONES = {
    "mlp": (MLPConfig(width=8, depth=2), (2,)),
    "unet": (UNetConfig(channels=8, mult=(1, 2), blocks=1, attention=(4,)), (1, 8, 8)),
    "mbconv": (UNetConfig(channels=8, mult=(1, 2), blocks=1, attention=(), block="mbconv"), (3, 8, 8)),
}
LABELS = torch.tensor([562.5, 250.0, 62.5, 0.0])


@pytest.fixture(params=BACKBONES.values(), ids=BACKBONES)
def backbone(request):
    config, event_shape = request.param
    torch.manual_seed(0)
    network = config.build(event_shape, num_classes=3, num_outputs=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network, torch.randn(3, *event_shape), torch.tensor([0, 2, 1])


def silenced(network):
    for mixer in network.mixers:
        torch.nn.init.zeros_(mixer.weight)
    return network


@pytest.mark.parametrize("modes", [0, 2])
def test_without_factors_a_slice_is_the_backbone_at_its_label(backbone, modes):
    single, x, classes = backbone
    network = silenced(TemporalNetwork(single, 4, modes))
    assert network.backbone is single
    assert [mixer.weight.shape[1] for mixer in network.mixers] == (list(single.widths) if modes else [])
    for condition in (None, classes):
        out = network(x, LABELS, condition)
        wanted = [single(x, label.expand(3), condition) for label in LABELS]
        assert out.shape == (3, 4, *wanted[0].shape[1:])
        for i, want in enumerate(wanted):
            assert close(out[:, i], want)
    assert (out[:, 0] - out[:, 3]).abs().max() > 1e-3


def test_items_are_by_themselves_and_slices_are_not(backbone):
    single, x, classes = backbone
    network = TemporalNetwork(single, 4, 2)
    with torch.no_grad():
        for mixer in network.mixers:
            mixer.weight.normal_(0, 0.1)
    out = network(x, LABELS, classes)
    order = torch.tensor([2, 0, 1])
    assert close(network(x[order], LABELS, classes[order]), out[order])
    assert close(network(x[:1], LABELS, classes[:1]), out[:1])
    # The label of one slice reaches the others, and only through the layers.
    labels = LABELS.clone()
    labels[0] = 900.0
    moved = (network(x, labels, classes) - out).abs().flatten(2).amax((0, 2))
    assert bool((moved > 1e-6).all())
    silenced(network)
    moved = (network(x, labels, classes) - network(x, LABELS, classes)).abs().flatten(2).amax((0, 2))
    assert moved[0] > 1e-3
    assert bool((moved[1:] < 1e-12).all())


def test_gradients_flow_through_time(backbone):
    single, x, _ = backbone
    network = TemporalNetwork(single, 4, 2)
    network(x, LABELS)[:, 3].square().sum().backward()
    for mixer in network.mixers:
        assert bool((mixer.weight.grad[0, ..., 0] != 0).any())
        assert bool((mixer.weight.grad[1] != 0).any())
        assert bool((mixer.weight.grad[0, ..., 1] == 0).all())
    unreached = [name for name, p in single.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert [name for name in unreached if not name.endswith(("to_k.bias", "class_embedding.weight"))] in (
        [],
        ["classes.weight"],
    )


def test_a_backbone_without_places_is_refused():
    with pytest.raises(
        UserError, match=r"network: Identity has no places .*use a network that lists the `widths`.*or modes=0"
    ):
        TemporalNetwork(torch.nn.Identity(), 4, 2)


def test_modes_and_labels_that_do_not_fit_are_refused():
    single = MLPConfig(width=4, depth=1).build((2,))
    with pytest.raises(UserError, match=r"modes: 4 with num_times=4.*use 0 to 3"):
        TemporalNetwork(single, 4, 4)
    with pytest.raises(UserError, match=r"num_times: 0"):
        TemporalNetwork(single, 0, 0)
    with pytest.raises(UserError, match=r"built for 4 times; labels of shape \(3,\) given, use \(4,\)"):
        TemporalNetwork(single, 4, 2)(torch.zeros(2, 2), LABELS[:3])


def test_the_published_network_has_22_layers():
    with torch.device("meta"):
        single = UNetConfig(channels=128, mult=(2, 2, 2), blocks=3, attention=(16, 8)).build((3, 32, 32))
        network = TemporalNetwork(single, 4, 2)
    assert single.widths == (256,) * 22
    assert sum(mixer.weight.numel() for mixer in network.mixers) == 22 * 2 * 256**2 * 2

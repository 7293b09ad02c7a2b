import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from osmose.networks.base import pixel_norm
from osmose.networks.blocks import Attention, MBConv, Norm, NormSiLU, Residual, Upsample
from osmose.networks.unet import UNetConfig


def inputs(shape=(2, 8, 2, 3), channels=8):
    generator = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    return make(*shape), make(channels), make(channels)


def norm_silu(x, weight, bias):
    return NormSiLU.apply(x, weight, bias, 4, 1e-3)[0]


def plain(x, weight, bias):
    return F.silu(F.group_norm(x, 4, weight, bias, 1e-3))


LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "channels_last"])


@every_layout
def test_norm_silu_and_its_gradient_equal_autograd(layout):
    x, weight, bias = inputs()
    x = x.detach().to(memory_format=layout).requires_grad_()
    out, want = norm_silu(x, weight, bias), plain(x, weight, bias)
    assert torch.allclose(out, want, rtol=1e-12, atol=1e-14)
    grad = torch.randn_like(out)
    for given in (grad, grad.contiguous(memory_format=torch.channels_last), grad[..., :1].expand_as(grad)):
        got = torch.autograd.grad(out, (x, weight, bias), given, retain_graph=True)
        expected = torch.autograd.grad(want, (x, weight, bias), given, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_norm_silu_remembers_only_its_input():
    x, weight, bias = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_silu(x, weight, bias)
    assert sum(t.numel() for t in saved) == x.numel() + 2 * 8 + 2 * 2 * 4  # weight and bias, mean and rstd


def test_norm_silu_passes_every_gradcheck():
    assert torch.autograd.gradcheck(norm_silu, inputs(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm_silu, inputs(), check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(norm_silu, inputs((2, 8, 3)), check_forward_ad=True)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_norm_silu_where_only_some_inputs_vary(needed):
    chosen = [value.detach().requires_grad_(need) for value, need in zip(inputs(), needed, strict=True)]
    assert torch.autograd.gradcheck(norm_silu, chosen, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm_silu, chosen)


def test_norm_silu_under_function_transforms():
    primals = tuple(value.detach() for value in inputs())
    tangents = tuple(torch.randn_like(value) for value in primals)
    out, tangent = torch.func.jvp(norm_silu, primals, tangents)
    want, want_tangent = torch.func.jvp(plain, primals, tangents)
    assert torch.allclose(out, want, rtol=1e-12)
    assert torch.allclose(tangent, want_tangent, rtol=1e-9, atol=1e-12)
    cotangent = torch.randn_like(out)
    for a, b in zip(*(torch.func.vjp(f, *primals)[1](cotangent) for f in (norm_silu, plain)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 8, 2, 3), (1, 8, 5, 5), (3, 8, 4)])
@pytest.mark.parametrize("varied", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
def test_the_forward_derivative_without_a_graph(shape, varied):
    primals = tuple(value.detach() for value in inputs(shape))
    tangents = {name: torch.randn_like(value) for name, value in zip("xwb", primals, strict=True) if name in varied}

    def slope(f):
        with forward_ad.dual_level():
            named = zip("xwb", primals, strict=True)
            duals = [forward_ad.make_dual(p, tangents[name]) if name in tangents else p for name, p in named]
            return forward_ad.unpack_dual(f(*duals))

    want = slope(plain)
    with torch.no_grad():
        got = slope(norm_silu)
    assert torch.allclose(got.primal, want.primal, rtol=1e-12)
    assert torch.allclose(got.tangent, want.tangent, rtol=1e-9, atol=1e-12)
    with torch.enable_grad():
        assert torch.allclose(slope(norm_silu).tangent, want.tangent, rtol=1e-9, atol=1e-12)


def test_the_forward_derivative_without_a_graph_of_other_layouts():
    x, weight, bias = (value.detach() for value in inputs())
    for dx in (torch.randn(2, 8, 2, 1).double().expand(2, 8, 2, 3), torch.randn(2, 2, 3, 8).double().movedim(3, 1)):
        for layout in LAYOUTS:
            given = x.to(memory_format=layout)
            with torch.no_grad():
                got = torch.func.jvp(lambda x: norm_silu(x, weight, bias), (given,), (dx,))[1]
            want = torch.func.jvp(lambda x: plain(x, weight, bias), (x,), (dx,))[1]
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


KINDS = {
    "residual": {},
    "mbconv": {"block": "mbconv"},
    "scale-shift": {"modulation": "scale-shift"},
    "double-norm": {"modulation": "double-norm"},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def network(request):
    torch.manual_seed(0)
    config = UNetConfig(channels=8, mult=(1, 2), blocks=1, attention=(4,), **request.param)
    network = config.build((1, 8, 8), num_classes=3).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def test_forward_derivatives_of_the_whole_network(network):
    x, dx = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64).unbind(0)
    label, dlabel, h = torch.tensor([20.0, 45.0]), torch.tensor([1.0, -0.5]), 0.01  # labels are float32

    def quotient(h):
        with torch.no_grad():
            return (network(x + h * dx, label + h * dlabel) - network(x - h * dx, label - h * dlabel)) / (2 * h)

    finite = (4 * quotient(h / 2) - quotient(h)) / 3
    _, by_transform = torch.func.jvp(network, (x, label), (dx, dlabel))
    with forward_ad.dual_level():
        dual = network(forward_ad.make_dual(x, dx), forward_ad.make_dual(label, dlabel))
        by_dual = forward_ad.unpack_dual(dual).tangent
    with torch.no_grad(), forward_ad.dual_level():
        dual = network(forward_ad.make_dual(x, dx), forward_ad.make_dual(label, dlabel))
        without_graph = forward_ad.unpack_dual(dual)
    assert not without_graph.tangent.requires_grad
    with torch.no_grad():
        assert torch.equal(without_graph.primal, network(x, label))
    scale = float(finite.abs().max())
    assert (by_transform - finite).abs().max() < 1e-3 * scale
    assert torch.allclose(by_dual, by_transform, rtol=1e-6, atol=1e-8 * scale)
    assert torch.allclose(without_graph.tangent, by_transform, rtol=1e-6, atol=1e-8 * scale)
    # In x alone everything is float64 and the difference quotient is sharp.
    h = 1e-4
    finite = (network(x + h * dx, label) - network(x - h * dx, label)) / (2 * h)
    assert torch.allclose(torch.func.jvp(lambda x: network(x, label), (x,), (dx,))[1], finite, rtol=1e-5, atol=1e-6)
    # And reverse mode agrees: <J dx, w> = <dx, J^T w>.
    w = torch.randn_like(x)
    x.requires_grad_()
    pulled = torch.autograd.grad(network(x, label), x, w)[0]
    assert (pulled * dx).sum().item() == pytest.approx((finite * w).sum().item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_derivatives_through_long_attention(kind):
    torch.manual_seed(0)
    config = UNetConfig(channels=4, mult=(1,), blocks=1, attention=(32,), **KINDS[kind])
    network = config.build((1, 32, 16)).double()  # 512 positions: torch's attention
    assert Attention.SHORT < 32 * 16
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        x, dx = torch.randn(2, 2, 1, 32, 16, dtype=torch.float64).unbind(0)
        label, h = torch.tensor([20.0, 45.0]), 1e-5
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            got = forward_ad.unpack_dual(network(forward_ad.make_dual(x, dx), label)).tangent
        want = (network(x + h * dx, label) - network(x - h * dx, label)) / (2 * h)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-7)


def test_a_forward_derivative_can_be_trained_through(network):
    x, dx = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64).unbind(0)
    label = torch.tensor([20.0, 45.0])

    def loss():
        return torch.func.jvp(lambda x: network(x, label), (x,), (dx,))[1].square().mean()

    weight = network.conv_in.weight
    slope = torch.autograd.grad(loss(), weight)[0][0, 0, 1, 1].item()
    h, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0, 1, 1] += sign * h
            values.append(loss().item())
            weight[0, 0, 1, 1] -= sign * h
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)


@every_layout
@pytest.mark.parametrize("side", [(1, 1), (2, 3), (7, 7)])
def test_upsampling_is_nearest_and_a_convolution(layout, side):
    torch.manual_seed(0)
    layer = Upsample(4).double()
    torch.nn.init.normal_(layer.conv.bias)
    x = torch.randn(2, 4, *side, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    got = layer(x)
    want = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.conv.weight, layer.conv.bias, padding=1)
    assert got.shape == want.shape == (2, 4, 2 * side[0], 2 * side[1])
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(got)
    variables = [x, layer.conv.weight, layer.conv.bias]
    for a, b in zip(*(torch.autograd.grad(y, variables, grad) for y in (got, want)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_both_ways_to_attend_agree(heads, monkeypatch):
    torch.manual_seed(0)
    layer = Attention(UNetConfig(heads=heads), 8).double()
    torch.nn.init.normal_(layer.to_out[0].weight)
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    short = layer(x)
    monkeypatch.setattr(Attention, "SHORT", 0)
    assert torch.allclose(layer(x), short, rtol=1e-9, atol=1e-10)
    # By the definition: softmax(q k^T / sqrt(c)) v, channels split among the heads.
    tokens = layer.group_norm(x).flatten(2).mT
    q, k, v = (f(tokens).unflatten(2, (heads, -1)) for f in (layer.to_q, layer.to_k, layer.to_v))
    scores = torch.einsum("bihc,bjhc->bhij", q, k) / (8 / heads) ** 0.5
    mixed = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v).flatten(2)
    want = x + layer.to_out[0](mixed).mT.unflatten(2, (4, 6))
    assert torch.allclose(short, want, rtol=1e-9, atol=1e-10)


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("c_out", [8, 12])
def test_the_residual_block_is_its_definition(c_out):
    for modulation in ("add", "scale-shift", "double-norm"):
        block = randomised(Residual(UNetConfig(channels=4, modulation=modulation), 8, c_out))
        x, embedding = torch.randn(2, 8, 4, 6).double(), torch.randn(2, 16).double()
        time = block.time_emb_proj(embedding)[:, :, None, None]
        h = block.conv1(F.silu(block.norm1(x)))
        if modulation == "scale-shift":
            h = F.silu(block.norm2(h) * (1 + time[:, :c_out]) + time[:, c_out:])
        elif modulation == "double-norm":
            s, b = (a / (a.square().mean(1, keepdim=True) + 1e-8).sqrt() for a in time.chunk(2, 1))
            h = F.silu(block.norm2(h) * s + b)
        else:
            h = F.silu(block.norm2(h + time))
        want = block.conv2(h) + (x if c_out == 8 else block.conv_shortcut(x))
        assert torch.allclose(block(x, embedding), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("c_out", [10, 12])
def test_the_mbconv_block_is_its_definition(c_out):
    block = randomised(MBConv(UNetConfig(channels=4), 10, c_out))
    x, embedding = torch.randn(2, 10, 4, 6).double(), torch.randn(2, 16).double()
    weights = dict(block.named_parameters())

    def norm_silu(name, groups, h):
        return F.silu(F.group_norm(h, groups, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6))

    h = torch.einsum("oi,bihw->bohw", weights["conv1.weight"][:, :, 0, 0], norm_silu("norm1", 2, x))
    h = h + F.linear(embedding, weights["time_emb_proj.weight"], weights["time_emb_proj.bias"])[:, :, None, None]
    h = norm_silu("norm2", 10, h)
    padded = F.pad(h, (1, 1, 1, 1))
    shifted = [padded[:, :, i : i + 4, j : j + 6] * weights["conv2.weight"][:, 0, i, j, None, None]
               for i in range(3) for j in range(3)]  # fmt: skip
    h = norm_silu("norm3", 10, sum(shifted))
    squeezed = F.silu(h.mean((2, 3)) @ weights["squeeze.weight"].T)
    assert squeezed.shape == (2, 2)  # a quarter of the input's channels, rounded down
    h = h * torch.sigmoid(squeezed @ weights["excite.weight"].T)[:, :, None, None]
    h = torch.einsum("oi,bihw->bohw", weights["conv3.weight"][:, :, 0, 0], h)
    want = h + (x if c_out == 10 else block.conv_shortcut(x))
    assert torch.allclose(block(x, embedding), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (2, 8, 4, 4)])
def test_pixel_norm_has_a_unit_root_mean_square(shape):
    x = torch.randn(shape, dtype=torch.float64)
    normed = pixel_norm(x)
    assert torch.allclose(normed.square().mean(1), torch.ones_like(x[:, 0]), atol=1e-6)
    assert torch.allclose(normed, pixel_norm(5 * x), atol=1e-6)
    assert torch.allclose(normed / x, (normed / x)[:, :1].expand_as(x))
    assert bool((pixel_norm(torch.zeros(2, 3)) == 0).all())


def scaled(x, factor, shift, weight, bias):
    norm = Norm(UNetConfig(norm_groups=4, group_channels=1, norm_eps=1e-3), 8).double()
    return torch.func.functional_call(Scaled(norm), {"norm.weight": weight, "norm.bias": bias}, (x, factor, shift))


class Scaled(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, factor, shift):
        return self.norm.scaled_silu(x, factor, shift)


def scaled_inputs():
    x, weight, bias = inputs()
    factor, shift = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind(0)
    return x, factor.requires_grad_(), shift.requires_grad_(), weight, bias


@every_layout
def test_scaled_normalisation_is_its_definition(layout):
    x, factor, shift, weight, bias = scaled_inputs()
    x = x.detach().to(memory_format=layout).requires_grad_()
    variables = (x, factor, shift, weight, bias)
    got = scaled(*variables)
    normed = F.group_norm(x, 4, weight, bias, 1e-3)
    want = F.silu(normed * factor[:, :, None, None] + shift[:, :, None, None])
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-13)
    grad = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, variables, grad) for y in (got, want)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_scaled_normalisation_passes_every_gradcheck():
    assert torch.autograd.gradcheck(scaled, scaled_inputs(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scaled, scaled_inputs())


def test_scaled_normalisation_remembers_no_second_image():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scaled(*scaled_inputs())
    assert [t.shape for t in saved if t.numel() >= 2 * 8 * 6] == [(1, 16, 2, 3)]


def test_a_depthwise_convolution_starts_with_the_fan_of_one_channel():
    torch.manual_seed(0)
    network = UNetConfig(channels=64, mult=(1,), attention=(), block="mbconv").build((1, 8, 8))
    for block in network.mid_block.resnets:
        # Xavier's bound is sqrt(6 / (fan in + fan out)), here 9 + 9; of the 1x1 convolution 64 + 256.
        assert 0.95 < block.conv2.weight.abs().max() / (6 / 18) ** 0.5 <= 1
        assert 0.95 < block.conv1.weight.abs().max() / (6 / 320) ** 0.5 <= 1


def test_normalisation_takes_activations_in_bf16_and_parameters_in_float32():
    norm = Norm(UNetConfig(), 16)
    x = torch.randn(2, 16, 4, 4).bfloat16().requires_grad_()
    out = norm.silu(x)
    out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32
    exact = torch.nn.functional.silu(norm(x.detach().float()))
    assert (out.float() - exact).abs().max() < 0.05
    factor, shift = torch.randn(2, 2, 16).bfloat16().unbind(0)
    scaled = norm.scaled_silu(x, factor, shift)
    exact = norm(x.detach().float()) * factor.float()[:, :, None, None] + shift.float()[:, :, None, None]
    assert scaled.dtype == torch.bfloat16
    assert (scaled.float() - F.silu(exact)).abs().max() < 0.1

"""Linear layers: torch's values and derivatives, and no evaluation that is not needed."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from osmose.networks.blocks import Upsample
from osmose.networks.layers import Conv2d, Linear

LAYERS = {
    "linear": (lambda: Linear(3, 4), lambda: torch.nn.Linear(3, 4), (5, 3)),
    "linear without bias": (lambda: Linear(3, 4, bias=False), lambda: torch.nn.Linear(3, 4, bias=False), (5, 2, 3)),
    "convolution": (lambda: Conv2d(3, 4, 3, stride=2), lambda: torch.nn.Conv2d(3, 4, 3, stride=2), (2, 3, 5, 5)),
    "depthwise": (
        lambda: Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        lambda: torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        (2, 4, 5, 5),
    ),
}


class Products(TorchDispatchMode):
    """Counts products of matrices and convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(name in str(func) for name in ("convolution", ".mm", ".addmm", ".bmm"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def case(request):
    make, make_torch, shape = request.param
    torch.manual_seed(0)
    ours, theirs = make().double(), make_torch().double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, *torch.randn(2, *shape, dtype=torch.float64).unbind(0)


def slope(layer, x, dx, parameters):
    with forward_ad.dual_level():
        given = {
            name: forward_ad.make_dual(value, torch.ones_like(value)) if name in parameters else value
            for name, value in layer.named_parameters()
        }
        dual = forward_ad.make_dual(x, dx) if dx is not None else x
        return forward_ad.unpack_dual(torch.func.functional_call(layer, given, (dual,)))


def test_values_draws_and_gradients_are_torch_s(case):
    ours, theirs, x, grad = case
    x.requires_grad_()
    assert torch.equal(ours(x), theirs(x))
    grad = torch.randn_like(ours(x))
    for a, b in zip(*(torch.autograd.grad(f(x), [x, *f.parameters()], grad) for f in (ours, theirs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parameters", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("along_x", [True, False])
def test_forward_derivatives_are_torch_s(case, parameters, along_x):
    ours, theirs, x, dx = case
    if not along_x and not set(parameters) & set(dict(ours.named_parameters())):
        return
    got, want = (slope(layer, x, dx if along_x else None, parameters) for layer in (ours, theirs))
    assert torch.equal(got.primal, want.primal)
    assert torch.allclose(got.tangent, want.tangent, rtol=1e-12, atol=1e-13)


def test_gradients_of_a_forward_derivative(case):
    ours, theirs, x, dx = case

    def gradients(layer):
        tangent = torch.func.jvp(lambda x: layer(x.square()), (x,), (dx,))[1]
        return torch.autograd.grad(tangent.square().sum(), layer.weight)[0]

    assert torch.allclose(gradients(ours), gradients(theirs), rtol=1e-12)


def test_a_forward_derivative_of_a_forward_derivative(case):
    ours, theirs, x, dx = case

    def second(layer):
        return torch.func.jvp(lambda x: torch.func.jvp(lambda x: layer(x**3), (x,), (dx,))[1], (x,), (dx,))[1]

    assert torch.allclose(second(ours), second(theirs), rtol=1e-12)


def test_a_forward_derivative_costs_one_more_evaluation(case):
    ours, theirs, x, dx = case
    counts = []
    for layer in (ours, theirs):
        with torch.no_grad(), Products() as products:
            slope(layer, x, dx, ())
        counts.append(products.count)
    assert counts == [2, 3]


def test_upsampling_too():
    torch.manual_seed(0)
    layer = Upsample(4).double()
    x, dx = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64).unbind(0)
    with torch.no_grad(), Products() as products:
        tangent = slope(layer, x, dx, ()).tangent
    assert products.count == 2
    want = F.conv2d(F.interpolate(dx, scale_factor=2, mode="nearest"), layer.conv.weight, padding=1)
    assert torch.allclose(tangent, want, rtol=1e-10, atol=1e-12)

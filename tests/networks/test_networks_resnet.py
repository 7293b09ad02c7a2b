"""Between vectors and events: sides, halvings, spectral norms."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osmose.errors import UserError
from osmose.networks.resnet import Contracting, Expanding, _Down, _Up, halvings

SHAPES = {(1, 8, 8): 1, (1, 28, 28): 2, (3, 32, 32): 3, (2, 16, 24): 2, (1, 7, 7): 0, (1, 5, 9): 0, (1, 2, 2): 0}


def batch(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "count"), SHAPES.items())
def test_an_image_of_any_sides_is_halved_down_to_four_to_seven_pixels(shape, count):
    assert halvings(shape) == count
    expanding, contracting = Expanding(6, shape, 4), Contracting(shape, 5, 4)
    x = expanding(batch(3, 6))
    assert x.shape == (3, *shape)
    assert contracting(x).shape == (3, 5)
    widest = 4 * min(4, 2**count)
    base = [side >> count for side in shape[1:]]
    assert expanding.stem[0].out_features == contracting.head.in_features == widest * base[0] * base[1]


@pytest.mark.parametrize("dimension", [1, 2, 30])
def test_points_get_perceptrons(dimension):
    x = Expanding(6, (dimension,), 16)(batch(3, 6))
    assert x.shape == (3, dimension)
    assert Contracting((dimension,), 5, 16)(x).shape == (3, 5)


@pytest.mark.parametrize("make", [lambda shape: Expanding(4, shape, 8), lambda shape: Contracting(shape, 4, 8)])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3, 4)])
def test_other_events_are_refused(make, shape):
    with pytest.raises(UserError, match="not for events of shape"):
        make(shape)


def test_a_block_up_repeats_pixels_and_a_block_down_averages_them():
    x = batch(2, 8, 4, 4)
    up, down = _Up(8, 4, doubles=True), _Down(8, 4, halves=True)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        up.conv2.weight.zero_(), up.conv2.bias.zero_(), down.conv2.weight.zero_(), down.conv2.bias.zero_()
        torch.testing.assert_close(up(x), up.shortcut(repeated))
        torch.testing.assert_close(down(repeated), down.shortcut(x))
        nn.init.dirac_(down.conv2.weight)
        h = F.relu(down.conv1(F.relu(x)))[:, :4]
        means = h.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        torch.testing.assert_close(down(x) - down.shortcut(F.avg_pool2d(x, 2)), means)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_an_item_depends_on_no_other(shape):
    expanding, contracting = Expanding(6, shape, 8).train(), Contracting(shape, 5, 8, spectral=True).train()
    z = batch(7, 6)
    together = expanding(z)
    torch.testing.assert_close(torch.cat([expanding(part) for part in z.split(2)]), together)
    torch.testing.assert_close(torch.cat([contracting(x[None]) for x in together]), contracting(together))


def matrices(network):
    return [layer.weight.detach().flatten(1) for layer in network.layers()]


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_every_spectral_norm_is_one_after_enough_iterations(shape):
    torch.manual_seed(0)
    network = Contracting(shape, 3, 8, spectral=True)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("original"):
                parameter.copy_(3 * torch.randn_like(parameter))
    before = [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in matrices(network)]
    assert min(abs(norm - 1) for norm in before) > 0.01  # the estimates are of other weights
    for _ in range(300):
        network.iterate()
    after = [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in matrices(network)]
    assert len(after) >= 4
    assert after == pytest.approx([1.0] * len(after), abs=2e-3)


def test_perceptrons_with_spectral_norms_are_1_lipschitz():
    torch.manual_seed(0)
    network = Contracting((5,), 1, 32, spectral=True)
    for _ in range(300):
        network.iterate()
    x, y = batch(500, 5), batch(500, 5, seed=1)
    slopes = (network(x) - network(y)).abs()[:, 0] / (x - y).norm(dim=1)
    assert 0.005 < slopes.max() < 1.002


def test_only_iterate_moves_the_estimates():
    network = Contracting((1, 8, 8), 3, 8, spectral=True)
    x, before = batch(4, 1, 8, 8), copy.deepcopy(network.state_dict())
    for mode in (True, False, True):
        network.train(mode)
        network(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    network.iterate()
    moved = {name for name, value in network.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in network.named_buffers()}
    assert len(moved) == 2 * len(network.layers())


def test_without_spectral_norms_there_are_no_estimates():
    network = Contracting((1, 8, 8), 3, 8)
    network.iterate()
    assert not list(network.buffers())

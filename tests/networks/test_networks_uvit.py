"""The transformer over points and patches: tokens, coordinates, other grids."""

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks.base import coordinates
from osmose.networks.uvit import UViTConfig

SMALL = {"width": 16, "depth": 3, "heads": 2}
LABELS = torch.tensor([3.0, 700.0])


def built(shape=(1, 8, 8), trained=True, num_classes=None, num_outputs=1, **options):
    torch.manual_seed(0)
    network = UViTConfig(**{**SMALL, **options}).build(shape, num_classes=num_classes, num_outputs=num_outputs)
    if trained:
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return network


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 8), (2, 6), (1, 8, 8), (3, 4, 10)])
@pytest.mark.parametrize("patch", [1, 2])
def test_any_event_outputs_in_order_and_zero_at_the_start(shape, patch):
    x = values(2, *shape)
    assert bool((built(shape, trained=False, patch=patch)(x, LABELS) == 0).all())
    network = built(shape, patch=patch, num_outputs=2)
    assert network(x, LABELS).shape == (2, 2 * shape[0], *shape[1:])
    for factor in (1, 2, 3):
        fine = values(2, 2 * shape[0], *(factor * side for side in shape[1:]))
        torch.testing.assert_close(network._joined(network._cut(fine), tuple(fine.shape[2:])), fine, rtol=0, atol=0)


def test_every_parameter_learns_and_items_and_classes_do_not_mix():
    network = built((1, 8), num_classes=3, patch=2)
    x = values(2, 1, 8)
    out = network(x, LABELS, torch.tensor([0, 2]))
    out.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not bool((p.grad != 0).any())] == []
    alone = network(x[1:], LABELS[1:], torch.tensor([2]))
    torch.testing.assert_close(out[1:], alone)
    assert (network(x, LABELS, torch.tensor([1, 2])) - out).abs().max() > 1e-3
    assert (network(x, LABELS + 100, torch.tensor([0, 2])) - out).abs().max() > 1e-3


def test_coordinates_are_those_of_the_points():
    assert coordinates((4,), 0.0)[:, 0].tolist() == [0, 0.25, 0.5, 0.75]
    found = coordinates((2, 3), 0.5)
    assert found.shape == (6, 2)
    torch.testing.assert_close(found[1], torch.tensor([0.25, 0.5]))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_tokens_of_a_grid_are_among_those_of_a_finer_one(patch):
    """On a circle, whose points a finer grid has among its own: the same values at the same places."""
    network = built((1, 8), patch=patch)
    network.offset = 0.0
    x = values(1, 1, 24)
    tokens, places = network._cut(x)[0], network._places((24,))
    some, where = network._cut(x[..., ::3])[0], network._places((8,))
    for token, place in zip(some, where, strict=True):
        same = ((tokens - token).abs().sum(1) == 0) & ((places - place).abs().sum(1) < 1e-4)
        assert int(same.sum()) == 1


@pytest.mark.parametrize("patch", [1, 2])
def test_a_smooth_function_gives_nearly_the_same_on_a_finer_grid(patch):
    network = built((1, 8, 8), patch=patch)

    def field(side):
        y, x = coordinates((side, side), network.offset).T.view(2, side, side)
        return ((2 * torch.pi * x).cos() + 0.5 * (torch.pi * y).cos())[None, None]

    coarse, fine = (network(field(side), LABELS[:1]) for side in (8, 24))
    assert fine.shape == (1, 1, 24, 24)
    # The middle of every third cell of a third is that of a cell.
    assert (fine[..., 1::3, 1::3] - coarse).square().mean().sqrt() < 0.2 * coarse.std()


def test_what_is_refused():
    with pytest.raises(ConfigError, match="width: 18 is not valid: a multiple of 8, twice the heads"):
        UViTConfig.parse({"width": 18})
    with pytest.raises(UserError, match=r"a uvit needs images .* not events of shape \(2,\)"):
        built((2,))
    with pytest.raises(UserError, match=r"network.patch: 3 does not divide the sides 8 x 8; use 1, or a divisor of 8"):
        built(patch=3)
    with pytest.raises(UserError, match=r"resolution: 12 x 12 is no multiple of 8 x 8"):
        built(patch=2)(values(2, 1, 12, 12), LABELS)
    with pytest.raises(UserError, match=r"built for events \(1, 8, 8\); \(2, 8, 8\) given"):
        built()(values(2, 2, 8, 8), LABELS)

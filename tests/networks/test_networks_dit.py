"""The transformer that time and class modulate, and networks that share the labels among them."""

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks import NETWORKS
from osmose.networks.base import StackConfig
from osmose.networks.dit import DiTConfig
from osmose.networks.experts import ExpertsConfig
from osmose.networks.mlp import MLPConfig

SMALL = {"width": 16, "depth": 2, "heads": 2}
LABELS = torch.tensor([3.0, 700.0])


def shaken(network, size=0.2):
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn_like(p))
    return network


def built(shape=(1, 8, 8), trained=True, num_classes=None, num_outputs=1, **options):
    torch.manual_seed(0)
    network = DiTConfig(**{**SMALL, **options}).build(shape, num_classes=num_classes, num_outputs=num_outputs)
    return shaken(network) if trained else network


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 10)])
@pytest.mark.parametrize("patch", [1, 2])
def test_any_image_outputs_in_order_and_zero_at_the_start(shape, patch):
    x = values(2, *shape)
    assert bool((built(shape, trained=False, patch=patch)(x, LABELS) == 0).all())
    assert built(shape, patch=patch, num_outputs=2)(x, LABELS).shape == (2, 2 * shape[0], *shape[1:])


def test_patches_come_back_where_they_were():
    """With one layer that says nothing, a head that repeats the patch gives the image again."""
    network = built((1, 4, 6), trained=False, depth=1, width=16, patch=2)
    with torch.no_grad():
        network.places.zero_()
        network.embed.weight.zero_()
        network.embed.bias.zero_()
        network.embed.weight[:4, 0] = torch.eye(4).view(4, 2, 2)
        network.norm = torch.nn.Identity()
        network.head.weight.copy_(torch.eye(4, 16))
    x = values(2, 1, 4, 6)
    torch.testing.assert_close(network(x, LABELS), x)


def test_every_parameter_learns_and_items_and_classes_do_not_mix():
    network = built(num_classes=3)
    x = values(2, 1, 8, 8)
    out = network(x, LABELS, torch.tensor([0, 2]))
    out.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not bool((p.grad != 0).any())] == []
    torch.testing.assert_close(out[1:], network(x[1:], LABELS[1:], torch.tensor([2])))
    assert (network(x, LABELS, torch.tensor([1, 2])) - out).abs().max() > 1e-3
    assert (network(x, LABELS + 100, torch.tensor([0, 2])) - out).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["dit", "unet", "mlp", "uvit", "implicit"])
def test_a_class_below_zero_is_none(kind):
    torch.manual_seed(0)
    small = {"width": 16, "depth": 2} if kind != "unet" else {"channels": 8, "mult": (1, 2), "attention": ()}
    network = NETWORKS.parse({"kind": kind, **small}).build((1, 8, 8), num_classes=3)
    network = shaken(network, 0.02 if kind == "implicit" else 0.2).eval()
    x = values(3, 1, 8, 8)
    labels = torch.tensor([3.0, 700.0, 5.0])
    mixed = network(x, labels, torch.tensor([-1, 2, -1]))
    torch.testing.assert_close(mixed[[0, 2]], network(x, labels, None)[[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1:2], network(x[1:2], labels[1:2], torch.tensor([2])), rtol=1e-4, atol=1e-5)
    assert (mixed[0] - network(x, labels, torch.tensor([0, 2, 0]))[0]).abs().max() > 1e-4


def test_published_sizes():
    for name, shape, millions in (("dit-s2", (3, 32, 32), 32.5), ("dit-l2", (4, 32, 32), 457.6)):
        with torch.device("meta"):
            network = NETWORKS.parse(name).build(shape, num_classes=10)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_what_a_dit_is_not_for():
    with pytest.raises(UserError, match=r"a dit needs images .* not events of \(2,\)"):
        DiTConfig().build((2,))
    with pytest.raises(UserError, match=r"network.patch: 3 does not divide the sides 8 x 8"):
        DiTConfig(patch=3).build((1, 8, 8))
    with pytest.raises(ConfigError, match="width: 20 is not valid: a multiple of 16"):
        DiTConfig.parse({"width": 20})
    with pytest.raises(UserError, match="built for events"):
        built()(values(2, 1, 4, 4), LABELS)


def test_what_is_a_stack():
    stacks = {name for name in ("dit", "mlp", "unet", "uvit") if isinstance(NETWORKS.parse(name), StackConfig)}
    assert stacks == {"dit", "mlp"}
    assert DiTConfig(width=32, depth=7).replace(depth=3) == DiTConfig(width=32, depth=3)


# --- experts --------------------------------------------------------------------------------------------------------


def experts(**options):
    torch.manual_seed(0)
    parts = [MLPConfig(width=8, depth=1)] * 3
    return shaken(ExpertsConfig(parts=parts, edges=(20.0, -5.0)).build((2,), **options), 0.5)


def test_each_label_has_one_owner_and_an_edge_is_the_larger_ones():
    network = experts()
    assert network.owner(torch.tensor([100.0, 20.0, 19.99, 0.0, -5.0, -5.01, -100.0])).tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_items_are_seen_by_their_owner_alone():
    network = experts(num_classes=2)
    label, condition = torch.tensor([50.0, 0.0, -50.0, 30.0]), torch.tensor([0, 1, 1, -1])
    x = values(4, 2)
    out = network(x, label, condition)
    for row, part in enumerate((0, 1, 2, 0)):
        rows = slice(row, row + 1)
        torch.testing.assert_close(out[rows], network.parts[part](x[rows], label[rows], condition[rows]))
    out[0].sum().backward()
    assert all(p.grad is None or not bool(p.grad.any()) for part in (1, 2) for p in network.parts[part].parameters())
    assert network(x[:0], label[:0], condition[:0]).shape == (0, 2)


def test_what_is_no_set_of_experts():
    parts = [{"kind": "mlp"}] * 3
    with pytest.raises(ConfigError, match="edges: 1 given for 3 parts"):
        ExpertsConfig.parse({"parts": parts, "edges": (1.0,)})
    with pytest.raises(ConfigError, match=r"edges: .* have to descend"):
        ExpertsConfig.parse({"parts": parts, "edges": (1.0, 1.0)})

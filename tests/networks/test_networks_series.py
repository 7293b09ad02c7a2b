"""Networks for sets of (time, value): what does not exist has no influence, and what order and place mean."""

import math

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.networks import SERIES_NETWORKS

KINDS = ["transformer", "rnn", "cnn"]


def network(kind, classes=None, **changes):
    torch.manual_seed(0)
    made = SERIES_NETWORKS.parse({"kind": kind, "width": 16, "depth": 2, **changes}).build(4, 2, 0.1, 3.0, classes)
    for parameter in made.parameters():  # outputs begin at 0; here they shall say something
        torch.nn.init.normal_(parameter, std=0.2)
    return made.double().eval()


def inputs(batch=3, length=10):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, 4, length, generator=generator, dtype=torch.float64)
    times = torch.rand(batch, length, generator=generator, dtype=torch.float64).sort(dim=1).values * 3
    return features, torch.tensor([10.0, 500.0, 900.0]), times, torch.ones(batch, length, dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_begins_at_zero_and_answers_at_every_time(kind):
    features, label, times, there = inputs()
    fresh = SERIES_NETWORKS.parse({"kind": kind, "width": 16}).build(4, 2, 0.1, 3.0).double()
    out = fresh(features, label, None, times, there)
    assert out.shape == (3, 2, 10)
    assert not out.any()
    assert network(kind)(features, label, None, times, there).std() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_exist_has_no_influence(kind):
    features, label, times, there = inputs()
    times, there = times.clone(), there.clone()
    times[1, 6:], there[1, 6:] = math.nan, False
    made = network(kind)
    out = made(features, label, None, times, there)
    alone = made(features[1:2, :, :6], label[1:2], None, times[1:2, :6], there[1:2, :6])
    assert torch.allclose(out[1:2, :, :6], alone, atol=1e-12)
    assert not out[1, :, 6:].any()
    whole = made(features, label, None, inputs()[2], inputs()[3])
    assert torch.allclose(out[[0, 2]], whole[[0, 2]], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_attention_is_blind_to_order(kind):
    features, label, times, there = inputs()
    made, order = network(kind), torch.randperm(10, generator=torch.Generator().manual_seed(2))
    out = made(features, label, None, times, there)
    turned = made(features[:, :, order], label, None, times[:, order], there)
    assert torch.allclose(turned, out[:, :, order], atol=1e-10) == (kind == "transformer")


@pytest.mark.parametrize("kind", KINDS)
def test_times_count_from_the_first_and_matter(kind):
    features, label, times, there = inputs()
    made = network(kind)
    out = made(features, label, None, times, there)
    assert torch.allclose(made(features, label, None, times + 17_000.0, there), out, atol=1e-9)
    assert not torch.allclose(made(features, label, None, times * 1.5, there), out, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_label_and_class_matter(kind):
    features, label, times, there = inputs()
    made = network(kind, classes=3)
    classes = torch.tensor([0, 1, 2])
    out = made(features, label, classes, times, there)
    assert not torch.allclose(made(features, label + 50, classes, times, there), out, atol=1e-3)
    assert not torch.allclose(made(features, label, classes.flip(0), times, there), out, atol=1e-3)


def test_a_kernel_of_one_sees_each_time_by_itself():
    features, label, times, there = inputs()
    made = network("cnn", kernel=1)
    out, changed = made(features, label, None, times, there), features.clone()
    changed[:, :, 4] += 1
    moved = (made(changed, label, None, times, there) - out).abs().amax((0, 1)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "transformer", "width": 30}, "width 30 must be a multiple of heads 4"),
        ({"kind": "cnn", "kernel": 4}, "kernel 4 must be odd"),
        ({"kind": "gru"}, "unknown series network 'gru'"),
    ],
)
def test_bad_networks_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SERIES_NETWORKS.parse(values)

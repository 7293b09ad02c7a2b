"""Networks with names: DDPM's model of CIFAR-10, five variants of it, IDDPM's, and two small ones.

The sizes published for the six, in units of 2^20, count a frozen table of 1000 x channels sinusoids besides what is
trained.
"""

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks import NETWORKS
from osmose.networks.presets import EVENTS, PRESETS
from osmose.networks.unet import UNetConfig

PUBLISHED = {
    "ddpm-cifar10": (35_746_307, 34.21),
    "deepres1": (24_275_587, 23.27),
    "shallowres2": (25_838_595, 24.76),
    "shallowres1": (17_714_563, 17.02),
    "mbconv64": (12_001_859, 11.51),
    "mbconv96": (26_831_715, 25.68),
}
#: What a small image and thin levels leave of each preset; all else is the preset's.
THIN = {"channels": 16, "attention": [8]}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def on_meta(config, event_shape=(3, 32, 32), **options):
    with torch.device("meta"):
        return config.build(event_shape, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = NETWORKS.parse(name)
    trainable, published = PUBLISHED[name]
    assert count(on_meta(config)) == trainable
    assert round((trainable + 1000 * config.channels) / 2**20, 2) == published


def test_published_sizes_with_a_learned_variance():
    assert count(on_meta(NETWORKS.parse("iddpm-cifar10"), num_outputs=2)) == 52_546_438
    assert count(on_meta(NETWORKS.parse("ddpm-cifar10"), num_outputs=2)) == 35_749_766


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_six_normalise_32_groups_everywhere(name):
    norms = [m for m in on_meta(NETWORKS.parse(name)).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {32}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_events_and_their_summaries(name):
    event_shape = EVENTS.get(name, (3, 32, 32))
    network = on_meta(NETWORKS.parse(name), event_shape)
    assert network(torch.empty(2, *event_shape, device="meta"), torch.empty(2, device="meta")).shape[1:] == event_shape
    assert f"{count(network) / 1e6:.1f} million" in NETWORKS.choices[name]


@pytest.mark.parametrize("name", [*PUBLISHED, "iddpm-cifar10"])
def test_presets_start_at_zero_and_train(name):
    torch.manual_seed(0)
    network = NETWORKS.parse(name).build((3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    out = network(x, torch.tensor([500.0]))
    assert out.shape == x.shape
    assert bool((out == 0).all())
    (out - x).square().mean().backward()
    reached = [name for name, p in network.named_parameters() if bool((p.grad != 0).any())]
    assert reached == ["conv_out.weight", "conv_out.bias"]  # whatever lies before it is multiplied by zero, as yet
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_a_preset_learns_within_a_few_steps(name):
    torch.manual_seed(0)
    thin = {"width": 24, "depth": 2, "heads": 2} if name.startswith("dit") else {**THIN, "dropout": 0}
    network = NETWORKS.parse({"kind": name, **thin}).build((1, 16, 16))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    x, target = torch.randn(2, 2, 1, 16, 16).unbind(0)
    for _ in range(3):
        optimizer.zero_grad()
        (network(x, torch.tensor([20.0, 900.0])) - target).square().mean().backward()
        optimizer.step()
    silent = {name for name, p in network.named_parameters() if not bool((p.grad != 0).any())}
    # Softmax does not see a constant added to all scores, so the bias of the keys has no effect.
    assert {name for name in silent if not name.endswith("to_k.bias")} == set()


def test_iddpm_s_attention_and_blocks():
    network = on_meta(NETWORKS.parse("iddpm-cifar10"))
    attends = [len(level.attentions) for level in network.down_blocks], [len(b.attentions) for b in network.up_blocks]
    assert attends == ([0, 3, 3, 0], [0, 4, 4, 0])
    assert {m.heads for m in network.modules() if hasattr(m, "heads")} == {4}
    assert {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert {m.modulation for m in network.modules() if hasattr(m, "modulation")} == {"scale-shift"}


def test_the_table_is_the_network():
    config = NETWORKS.parse({"kind": "deepres1", "attention": [32, 8]})  # of the larger side
    network, table = on_meta(config, (3, 32, 64)), config.table((3, 32, 64))
    assert [(row["part"], row["height"], row["width"], row["channels"], row["blocks"]) for row in table] == [
        ("down", 32, 64, 128, 1),
        ("down", 16, 32, 256, 1),
        ("down", 8, 16, 256, 1),
        ("down", 4, 8, 256, 1),
        ("middle", 4, 8, 256, 2),
        ("up", 4, 8, 256, 2),
        ("up", 8, 16, 256, 2),
        ("up", 16, 32, 256, 2),
        ("up", 32, 64, 128, 2),
    ]
    assert [row["attention"] for row in table] == [False, True, False, True, True, True, False, True, False]
    parts = [*network.down_blocks, network.mid_block, *network.up_blocks]
    assert [len(part.resnets) for part in parts] == [row["blocks"] for row in table]
    assert [len(part.attentions) > 0 for part in parts] == [row["attention"] for row in table]
    assert [part.resnets[-1].norm2.num_groups for part in parts] == [row["norm_groups"] for row in table]
    assert [part.resnets[-1].norm2.num_channels for part in parts] == [row["channels"] for row in table]
    assert NETWORKS.parse("mlp").table((2,)) == []


def test_a_preset_is_a_name_for_values_of_a_unet():
    config = NETWORKS.parse("mbconv64")
    assert config == UNetConfig(channels=64, block="mbconv", dropout=0.1, group_channels=2)
    assert config.to_json()["kind"] == "unet"
    assert NETWORKS.parse(config.to_json()) == config
    assert NETWORKS.parse({"kind": "mbconv64", "dropout": 0, "channels": 32}) == config.replace(dropout=0, channels=32)


@pytest.mark.parametrize(
    ("values", "event_shape", "message"),
    [
        ({"kind": "ddpm-cifar10"}, (3, 28, 28), r"mult: 4 levels need sides divisible by 8, .*use at most 3 levels"),
        ({"kind": "shallowres1"}, (3, 28, 28), r"attention: 16 does not occur; the resolutions.*are 28, 14, 7"),
        ({"kind": "iddpm-cifar10", "heads": 5}, (3, 32, 32), r"heads: 5 does not divide the 256 channels of a level"),
        ({"kind": "mbconv96"}, (2,), r"a unet needs images"),
    ],
)
def test_presets_refuse_what_does_not_fit(values, event_shape, message):
    with pytest.raises(UserError, match=message):
        on_meta(NETWORKS.parse(values), event_shape)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"kind: unknown network 'mbconv69'; did you mean 'mbconv96'\? \(one of .*unet"
    ):
        NETWORKS.parse("mbconv69")

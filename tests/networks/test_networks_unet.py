import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.networks import NETWORKS
from osmose.networks.blocks import Norm
from osmose.networks.presets import network_for
from osmose.networks.unet import UNetConfig

SMALL = UNetConfig(channels=16, mult=(1, 2), blocks=1, attention=(8,))
BLOCKS = {
    "residual": {},
    "mbconv": {"block": "mbconv"},
    "scale-shift": {"modulation": "scale-shift"},
    "double-norm": {"modulation": "double-norm"},
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def built(config, event_shape, *, num_classes=None, perturb=0.1, dtype=torch.float32):
    """A network with weights that are not at their initial zeros."""
    torch.manual_seed(0)
    network = config.build(event_shape, num_classes=num_classes).to(dtype)
    if perturb:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(perturb * torch.randn_like(parameter))
    return network


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_default_has_the_published_size():
    with torch.device("meta"):
        network = UNetConfig().build((3, 32, 32))
    assert count(network) == 35_746_307


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"blocks": 1}, 24_275_587),
        ({"mult": (1, 2, 2)}, 25_838_595),
        ({"mult": (1, 2, 2), "blocks": 1}, 17_714_563),
    ],
)
def test_published_variants_have_their_sizes(options, expected):
    with torch.device("meta"):
        network = UNetConfig(**options).build((3, 32, 32))
    assert count(network) == expected


@pytest.mark.parametrize(
    ("config", "event_shape"),
    [
        (UNetConfig(channels=8, mult=(1, 2), attention=(4,)), (1, 8, 8)),
        (UNetConfig(channels=8, mult=(1, 2, 2), attention=(14,)), (1, 28, 28)),
        (UNetConfig(channels=8), (3, 32, 32)),
        (UNetConfig(channels=8, mult=(1, 2, 2)), (2, 16, 32)),
        (UNetConfig(channels=8, mult=(1,), attention=()), (1, 7, 5)),
        (UNetConfig(channels=8, mult=(1, 2, 2, 2), attention=()), (1, 8, 8)),
        (UNetConfig(channels=8, mult=(1, 2), attention=(4,), padding="asymmetric"), (1, 8, 8)),
        *((UNetConfig(channels=8, mult=(1, 2, 2), attention=(14,), **block), (1, 28, 28)) for block in BLOCKS.values()),
        (UNetConfig(channels=4, mult=(1, 2), attention=(), block="mbconv"), (3, 8, 8)),
        (UNetConfig(channels=8, mult=(1, 2, 2, 2), attention=(16, 8), heads=4, modulation="scale-shift"), (3, 32, 32)),
    ],
)
def test_shapes_and_the_zero_at_the_start(config, event_shape):
    network = built(config, event_shape, perturb=0)
    x = torch.randn(3, *event_shape)
    out = network(x, torch.tensor([0.0, 500.0, 999.0]))
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert bool((out == 0).all())
    perturbed = built(config, event_shape)(x, torch.tensor([0.0, 500.0, 999.0]))
    assert perturbed.shape == x.shape
    assert bool((perturbed != 0).any())
    assert bool(perturbed.isfinite().all())


@every_block
def test_branches_start_as_nothing(block):
    network = built(SMALL.replace(**block), (1, 16, 16), perturb=0)
    x, embedding = torch.randn(2, 32, 4, 4), torch.randn(2, 64)
    for part in network.mid_block.resnets:
        assert torch.equal(part(x, embedding), x)
    first, x16 = network.down_blocks[1].resnets[0], x[:, :16].contiguous()
    assert torch.equal(first(x16, embedding), first.conv_shortcut(x16))
    assert torch.equal(network.mid_block.attentions[0](x), x)


@every_block
def test_every_parameter_learns_within_a_few_steps(block):
    network = built(SMALL.replace(**block), (1, 16, 16), num_classes=3, perturb=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    x, target = torch.randn(2, 4, 1, 16, 16).unbind(0)
    label, classes = torch.tensor([3.0, 200.0, 700.0, 950.0]), torch.tensor([0, 1, 2, 0])
    for _ in range(3):
        optimizer.zero_grad()
        (network(x, label, classes) - target).square().mean().backward()
        optimizer.step()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    # Softmax does not see a constant added to all scores, so the bias of the keys has no effect.
    keys = [name for name, _ in network.named_parameters() if name.endswith("to_k.bias")]
    assert [name for name in silent if name not in keys] == []


@every_block
def test_items_of_a_batch_do_not_meet(block):
    network = built(SMALL.replace(**block), (1, 16, 16), num_classes=4, dtype=torch.float64)
    x, label, classes = torch.randn(4, 1, 16, 16).double(), torch.tensor([1.0, 300, 600, 999]), torch.arange(4)
    together = network(x, label, classes)
    for i in range(4):
        alone = network(x[i : i + 1], label[i : i + 1], classes[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-10, atol=1e-12)
    other = x.clone()
    other[0] += 100
    assert torch.allclose(network(other, label, classes)[1:], together[1:], rtol=1e-10, atol=1e-12)


@every_block
@pytest.mark.parametrize("channels", [4, 8, 16, 24, 32, 64])
def test_every_level_sees_the_time_and_the_class(channels, block):
    # One channel to a group of the normalisation would wipe out what the embedding adds to a whole channel.
    config = UNetConfig(channels=channels, mult=(1, 2), blocks=1, attention=(), **block)
    network = built(config, (1, 8, 8), num_classes=2, dtype=torch.float64)
    seen = {}
    for name, module in network.named_modules():
        if name.endswith("conv2"):
            module.register_forward_hook(lambda *call, name=name: seen.setdefault(name, []).append(call[-1]))
    x = torch.randn(2, 1, 8, 8).double()
    base = network(x, torch.tensor([10.0, 10.0]), torch.tensor([0, 0]))
    first = next(iter(seen))
    for label, classes in (([10.0, 900.0], [0, 0]), ([10.0, 10.0], [0, 1])):
        out = network(x, torch.tensor(label), torch.tensor(classes))
        assert torch.allclose(out[0], base[0], rtol=1e-10)
        assert (out[1] - base[1]).abs().max() > 1e-3
        # The very first block, before anything else can have brought the time in.
        assert (seen[first][-1][1] - seen[first][0][1]).abs().max() > 1e-3


@every_block
def test_time_changes_the_output_after_one_step_of_training(block):
    network = built(SMALL.replace(**block), (1, 16, 16), perturb=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    x, target = torch.randn(2, 4, 1, 16, 16).unbind(0)
    for _ in range(3):  # one step for each layer of zeros between the embedding and the output
        optimizer.zero_grad()
        (network(x, torch.full((4,), 100.0)) - target).square().mean().backward()
        optimizer.step()
    a, b = (network(x, torch.full((4,), label)) for label in (100.0, 800.0))
    assert (a - b).abs().max() > 1e-4


@every_block
def test_evaluation_is_deterministic_and_training_drops(block):
    network = built(SMALL.replace(dropout=0.5, **block), (1, 16, 16))
    x, label = torch.randn(2, 1, 16, 16), torch.tensor([1.0, 900.0])
    network.eval()
    assert torch.equal(network(x, label), network(x, label))
    network.train()
    assert not torch.equal(network(x, label), network(x, label))


@every_block
def test_channels_last_gives_the_same_result(block):
    network = built(SMALL.replace(**block), (3, 16, 16), dtype=torch.float64)
    x, label = torch.randn(2, 3, 16, 16).double().requires_grad_(), torch.tensor([1.0, 900.0])
    plain = network(x, label)
    plain_grad = torch.autograd.grad(plain.square().sum(), [x, *network.parameters()])
    last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), label)
    assert torch.allclose(last, plain, rtol=1e-9, atol=1e-10)
    for a, b in zip(torch.autograd.grad(last.square().sum(), [x, *network.parameters()]), plain_grad, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-8 * float(b.abs().max()) + 1e-12)


@every_block
@pytest.mark.parametrize("num_outputs", [1, 2, 3])
def test_several_outputs_lie_along_the_channels_and_start_at_zero(block, num_outputs):
    config = SMALL.replace(**block)
    torch.manual_seed(0)
    network = config.build((3, 16, 16), num_outputs=num_outputs)
    x, label = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 900.0])
    out = network(x, label)
    assert out.shape == (2, 3 * num_outputs, 16, 16)
    assert bool((out == 0).all())
    torch.manual_seed(0)
    single = config.build((3, 16, 16))
    extra = (num_outputs - 1) * (9 * 16 * 3 + 3)
    assert count(network) == count(single) + extra
    with torch.no_grad():  # the outputs do not meet: the first is that of a network that has no other
        for name, value in single.named_parameters():
            value.add_(0.1 * torch.randn_like(value))
            network.get_parameter(name)[: len(value)] = value
    assert torch.allclose(network(x, label)[:, :3], single(x, label), rtol=1e-4, atol=1e-5)


@every_block
@pytest.mark.parametrize("frequency", [0.5, 0.01])
def test_a_low_time_frequency_is_a_slower_label(block, frequency):
    config = SMALL.replace(**block)
    slow = built(config.replace(time_frequency=frequency), (1, 16, 16), dtype=torch.float64)
    network = built(config, (1, 16, 16), dtype=torch.float64)
    x, label = torch.randn(3, 1, 16, 16).double(), torch.tensor([3.0, 40.0, 100.0]).requires_grad_()
    out, want = slow(x, label), network(x, frequency * label)
    assert torch.allclose(out, want, rtol=1e-4, atol=1e-4)  # angles are float32
    assert (network(x, label) - want).abs().max() > 0.01
    # The slope along the label is as much smaller as the label is slower.
    w = torch.randn_like(x)
    slope = torch.autograd.grad((out * w).sum(), label)[0]
    scaled = (frequency * label).detach().requires_grad_()
    assert torch.allclose(
        slope, frequency * torch.autograd.grad((network(x, scaled) * w).sum(), scaled)[0], rtol=1e-2, atol=1e-4
    )


class Recorder(torch.nn.Module):
    """Doubles what passes and keeps it."""

    def forward(self, x):
        self.seen = x
        return 2 * x


@every_block
@pytest.mark.parametrize(
    ("mult", "blocks", "attention"), [((1, 2), 1, (8,)), ((1, 2, 2), 2, (16, 4)), ((2,), 3, ()), ((1, 3), 1, (16, 8))]
)
def test_modules_after_the_blocks(block, mult, blocks, attention):
    config = UNetConfig(channels=8, mult=mult, blocks=blocks, attention=attention, **block)
    network = built(config, (1, 16, 16), dtype=torch.float64)
    x, label = torch.randn(2, 1, 16, 16).double(), torch.tensor([1.0, 900.0])
    plain = network(x, label)
    recorders = [Recorder() for _ in network.widths]
    # What should come there, from the parts' own outputs: the attention's where there is one, else the block's.
    outputs = []
    for level in [*network.down_blocks, network.mid_block, *network.up_blocks]:
        places = level.attentions if len(level.attentions) else level.resnets
        for part in places:
            part.register_forward_hook(lambda *call: outputs.append(call[-1]))
    changed = network(x, label, after=recorders)
    assert len(outputs) == len(recorders) == len(mult) * (2 * blocks + 1) + 1
    for recorder, width, out in zip(recorders, network.widths, outputs, strict=True):
        assert recorder.seen is out
        assert recorder.seen.shape[1] == width
    assert not torch.allclose(changed, plain)
    assert torch.equal(network(x, label, after=[torch.nn.Identity()] * len(recorders)), plain)
    with pytest.raises(UserError, match=rf"1 modules for {len(recorders)} blocks; give one for each"):
        network(x, label, after=recorders[:1])


def test_the_condition_counts_only_where_it_is_given():
    network = built(SMALL, (1, 16, 16), num_classes=2)
    x, label = torch.randn(2, 1, 16, 16), torch.tensor([1.0, 900.0])
    given = [network(x, label, classes) for classes in (torch.tensor([0, 0]), torch.tensor([1, 1]), None)]
    assert not torch.allclose(given[0], given[1])
    assert not torch.allclose(given[0], given[2])


@pytest.mark.parametrize("channels", range(4, 400, 2))
def test_groups_divide_the_channels_and_leave_four_to_each(channels):
    norm = Norm(UNetConfig(), channels)
    groups = norm.num_groups
    assert channels % groups == 0
    assert groups <= 32
    assert channels // groups >= 4
    if channels % 128 == 0:
        assert groups == 32  # DDPM's


@pytest.mark.parametrize(("wanted", "channels", "groups"), [(32, 24, 6), (32, 48, 12), (8, 64, 8), (32, 384, 32)])
def test_groups_are_lowered_to_fit(wanted, channels, groups):
    assert Norm(UNetConfig(norm_groups=wanted), channels).num_groups == groups


@pytest.mark.parametrize(("wanted", "channels"), [(7, 64), (3, 32), (64, 96)])
def test_groups_that_were_asked_for_and_do_not_divide_are_refused(wanted, channels):
    config = UNetConfig(channels=channels, mult=(1,), blocks=1, attention=(), norm_groups=wanted)
    with pytest.raises(
        UserError, match=rf"norm_groups: {wanted} does not divide the {channels} channels .* use one of 1"
    ):
        config.build((1, 8, 8))


def test_a_base_of_24_channels_runs():
    network = built(UNetConfig(channels=24, mult=(1, 2), attention=(4,)), (1, 8, 8))
    assert bool(network(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])).isfinite().all())


@pytest.mark.parametrize(
    ("config", "event_shape", "message"),
    [
        (UNetConfig(), (1, 28, 28), r"mult: 4 levels need sides divisible by 8.*28x28; use at most 3 levels"),
        (UNetConfig(), (1, 32, 12), r"32x12; use at most 3 levels"),
        (UNetConfig(mult=(1, 2)), (1, 7, 7), r"2 levels need sides divisible by 2.*use at most 1 level or"),
        (UNetConfig(mult=(1, 2, 2)), (1, 28, 28), r"attention: 16 does not occur; the resolutions.*28, 14, 7"),
        (UNetConfig(attention=(16, 5)), (3, 32, 32), r"attention: 5 does not occur.*32, 16, 8, 4"),
        (UNetConfig(channels=10, mult=(1, 2), attention=(8,), heads=4), (1, 8, 8), r"heads: 4 does not divide the 10"),
        (UNetConfig(channels=8, mult=(1,), attention=(), heads=3), (1, 8, 8), r"heads: 3 does not divide the 8"),
        (UNetConfig(), (2,), r"a unet needs images \(channels, height, width\), not events of shape \(2,\)"),
        (UNetConfig(), (3, 16), r"a unet needs images"),
    ],
)
def test_refused_for_the_data(config, event_shape, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        config.build(event_shape)


@pytest.mark.parametrize(
    ("x", "label", "message"),
    [
        ((2, 3, 16, 16), 2, r"built for images \(1, 16, 16\) with one label each; \(2, 3, 16, 16\) with labels \(2,\)"),
        ((2, 1, 8, 8), 2, r"\(2, 1, 8, 8\) with labels \(2,\) given"),
        ((2, 1, 16, 16), 3, r"\(2, 1, 16, 16\) with labels \(3,\) given"),
        ((1, 16, 16), 1, r"\(1, 16, 16\) with labels \(1,\) given"),
    ],
)
def test_input_of_another_form_is_refused(x, label, message):
    with pytest.raises(UserError, match=message):
        built(SMALL, (1, 16, 16))(torch.zeros(x), torch.zeros(label))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "unet", "channels": 5}, "channels.*multiple of 2"),
        ({"kind": "unet", "channels": 2}, "channels.*greater than or equal to 4"),
        ({"kind": "unet", "mult": []}, "mult.*at least 1 item"),
        ({"kind": "unet", "mult": [1, 0]}, r"mult\.1.*greater than 0"),
        ({"kind": "unet", "blocks": 0}, "blocks.*greater than or equal to 1"),
        ({"kind": "unet", "dropout": 1.0}, "dropout.*less than 1"),
        ({"kind": "unet", "padding": "same"}, "padding"),
        ({"kind": "unet", "block": "conv"}, "block: 'conv' is not valid: should be 'residual' or 'mbconv'"),
        (
            {"kind": "mbconv64", "modulation": "scale-shift"},
            "^modulation: scale-shift is for residual blocks; use block",
        ),
        (
            {"kind": "mbconv64", "modulation": "double-norm"},
            "^modulation: double-norm is for residual blocks; use block",
        ),
        (
            {"kind": "unet", "modulation": "film"},
            "modulation: 'film' is not valid: should be 'add', 'scale-shift' or 'do",
        ),
        ({"kind": "unet", "time_frequency": 0}, "time_frequency.*greater than 0"),
        ({"kind": "mlp", "modulation": "film"}, "modulation: 'film' is not valid"),
        ({"kind": "mlp", "time_frequency": -1}, "time_frequency.*greater than 0"),
        ({"kind": "unet", "chanels": 8}, "did you mean 'channels'"),
        ({"kind": "une"}, "did you mean 'unet'"),
        ({"kind": "mlp", "width": 7}, "width.*multiple of 2"),
    ],
)
def test_refused_as_a_configuration(values, message):
    with pytest.raises(ConfigError, match=message):
        NETWORKS.parse(values)


PRESET = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 5, 5), (3, 16, 32), (3, 64, 64), (2,), (784,)]


@pytest.mark.parametrize("event_shape", PRESET)
def test_the_preset_fits_its_data(event_shape):
    config = NETWORKS.parse(network_for(event_shape))
    assert NETWORKS.parse(config.to_json()) == config
    with torch.device("meta"):
        network = config.build(event_shape)
        out = network(torch.empty(2, *event_shape), torch.empty(2))
    assert out.shape == (2, *event_shape)


def test_no_preset_for_other_data():
    with pytest.raises(UserError, match="none is known for events of shape"):
        network_for((1, 2, 3, 4))

"""Weights of diffusers' UNet2DModel load without renaming and give the same function.

osmose                         diffusers
channels, mult                 block_out_channels = channels * mult, where mult starts with 1
blocks                         layers_per_block
attention (resolutions)        AttnDownBlock2D / AttnUpBlock2D at those levels
heads = channels / width       attention_head_dim = the width of a head; None is one head
norm_groups                    norm_num_groups; group_channels=1 where that leaves fewer than four channels to a group
modulation = scale-shift       resnet_time_scale_shift = "scale_shift" (for add "default")
padding                        downsample_padding = 1 (symmetric) or 0 (asymmetric)
(DDPM's embedding)             flip_sin_to_cos = False, freq_shift = 1
"""

import pytest
import torch

from osmose.networks.unet import UNetConfig

CASES = {
    "fashion": ((1, 28, 28), UNetConfig(channels=32, mult=(1, 2, 2), attention=(14,), norm_groups=8)),
    "one channel to a group": (
        (1, 28, 28),
        UNetConfig(channels=32, mult=(1, 2, 2), attention=(14,), group_channels=1),
    ),
    "cifar": ((3, 32, 32), UNetConfig(channels=16, mult=(1, 2, 2, 2), attention=(16,), norm_groups=4)),
    "digits": ((1, 8, 8), UNetConfig(channels=16, mult=(1, 2), attention=(8, 4), norm_groups=4)),
    "shallow": ((1, 8, 8), UNetConfig(channels=16, mult=(1,), blocks=1, attention=(), norm_groups=4)),
    "scale and shift": (
        (1, 8, 8),
        UNetConfig(channels=16, mult=(1, 2), attention=(8,), norm_groups=4, modulation="scale-shift"),
    ),
    "wide": ((2, 16, 32), UNetConfig(channels=16, mult=(1, 1, 3), blocks=1, attention=(16,), norm_groups=4)),
}


def reference(config, event_shape, *, num_classes=None, head_dim=None):
    diffusers = pytest.importorskip("diffusers")
    resolutions = config.resolutions(event_shape)
    attends = [resolution in config.attention for resolution in resolutions]
    return diffusers.UNet2DModel(
        sample_size=event_shape[1:],
        in_channels=event_shape[0],
        out_channels=event_shape[0],
        block_out_channels=[config.channels * m for m in config.mult],
        layers_per_block=config.blocks,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=head_dim,
        norm_num_groups=config.norm_groups,
        attn_norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        resnet_time_scale_shift="scale_shift" if config.modulation == "scale-shift" else "default",
        downsample_padding=1 if config.padding == "symmetric" else 0,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=num_classes,
    )


def agree(config, event_shape, **options):
    torch.manual_seed(0)
    theirs = reference(config, event_shape, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = config.build(event_shape, num_classes=options.get("num_classes"))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, label = torch.randn(3, *event_shape), torch.tensor([0, 400, 999])
    classes = torch.tensor([0, 2, 1]) if "num_classes" in options else None
    with torch.no_grad():
        want = theirs(x, label, class_labels=classes).sample
        got = ours(x, label.float(), classes)
    assert want.std() > 0.05
    assert (got - want).abs().max() < 1e-4 * max(1.0, float(want.abs().max()))
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", ["symmetric", "asymmetric"])
def test_diffusers_weights_load_and_agree(case, padding):
    event_shape, config = CASES[case]
    agree(config.replace(padding=padding), event_shape)


def test_with_classes():
    event_shape, config = CASES["digits"]
    agree(config, event_shape, num_classes=3)


@pytest.mark.parametrize("heads", [2, 4])
def test_with_several_heads(heads):
    # diffusers fixes the width of a head and not their number, so the levels must be equally wide.
    config = UNetConfig(channels=16, mult=(1, 1), attention=(8, 4), norm_groups=4, heads=heads)
    agree(config, (1, 8, 8), head_dim=16 // heads)


def test_the_parameters_of_the_default_are_those_of_google_ddpm_cifar10_32():
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours, theirs = UNetConfig().build((3, 32, 32)), reference(UNetConfig(), (3, 32, 32))
    a, b = ({name: tuple(p.shape) for name, p in network.state_dict().items()} for network in (ours, theirs))
    assert a == b

"""Networks with names, and networks that suit data of a given shape on modest hardware."""

from __future__ import annotations

from typing import Any

from osmose.errors import UserError

_DDPM = {"kind": "unet", "channels": 128, "mult": (1, 2, 2, 2), "blocks": 2, "attention": (16,), "dropout": 0.1}
_MBCONV = {**_DDPM, "block": "mbconv", "group_channels": 2}  # 32 groups on 64 channels too

#: Name: the values that a UNet of that name starts from, and what it is.
PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "ddpm-cifar10": (_DDPM, "DDPM's model of CIFAR-10: 35.7 million parameters"),
    "deepres1": ({**_DDPM, "blocks": 1}, "ddpm-cifar10 with one block per level: 24.3 million"),
    "shallowres2": ({**_DDPM, "mult": (1, 2, 2)}, "ddpm-cifar10 without the 4x4 level: 25.8 million"),
    "shallowres1": ({**_DDPM, "mult": (1, 2, 2), "blocks": 1}, "one block per level, no 4x4 level: 17.7 million"),
    "mbconv64": ({**_MBCONV, "channels": 64}, "ddpm-cifar10 with MBConv blocks, 64 channels: 12.0 million"),
    "mbconv96": ({**_MBCONV, "channels": 96}, "ddpm-cifar10 with MBConv blocks, 96 channels: 26.8 million"),
    "iddpm-cifar10": (
        {**_DDPM, "blocks": 3, "attention": (16, 8), "heads": 4, "modulation": "scale-shift", "dropout": 0.3},
        "IDDPM's model of CIFAR-10: 52.5 million parameters",
    ),
    "dit-s2": ({"kind": "dit", "width": 384, "depth": 12, "heads": 6}, "DiT-S/2: 32.5 million parameters"),
    "dit-l2": ({"kind": "dit", "width": 1024, "depth": 24, "heads": 16}, "DiT-L/2: 457.6 million parameters"),
    "unet-28": (
        {"kind": "unet", "channels": 32, "mult": (1, 2, 2), "blocks": 2, "attention": (14,)},
        "a small UNet for 28x28 images: 1.6 million parameters",
    ),
    "unet-8": (
        {"kind": "unet", "channels": 32, "mult": (1, 2), "blocks": 2, "attention": (4,)},
        "a small UNet for 8x8 images: 1.0 million parameters",
    ),
}

#: The events that a network of a name is for; images of 3x32x32 where it is not among them.
EVENTS = {"unet-28": (1, 28, 28), "unet-8": (1, 8, 8), "mlp": (2,)}


def network_for(event_shape: tuple[int, ...]) -> dict[str, Any]:
    """Configuration of a network for events of a shape, as plain values that the user can override.

    Images get a UNet that is thin where the image is large and widens as it halves, down to 4 to 7 pixels, with
    attention where the side is at most 8: on a CPU a wide first level costs more than it teaches. Flat events get a
    residual MLP.

    Raises:
        UserError: no network is known for such events.
    """
    if len(event_shape) < 3:  # points, and series that are all alike
        return {"kind": "mlp"}
    if len(event_shape) != 3:
        raise UserError(f"network: none is known for events of shape {event_shape}; name one with --network")
    sides = event_shape[1:]
    mult, side = [1], min(sides)
    while side >= 8 and all(s % 2 ** len(mult) == 0 for s in sides) and len(mult) < 5:
        mult.append(min(4, 2 * mult[-1]))
        side //= 2
    levels = [max(sides) // 2**level for level in range(len(mult))]
    channels = 16 if 16 < max(sides) <= 32 else 32
    attention = [level for level in levels[1:] if level <= 8]
    return {"kind": "unet", "channels": channels, "mult": mult, "blocks": 1, "attention": attention}

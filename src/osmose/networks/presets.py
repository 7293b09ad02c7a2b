"""Networks that suit data of a given shape on modest hardware."""

from __future__ import annotations

from typing import Any

from osmose.errors import UserError


def network_for(event_shape: tuple[int, ...]) -> dict[str, Any]:
    """Configuration of a network for events of a shape, as plain values that the user can override.

    Images get a UNet that is thin where the image is large and widens as it halves, down to 4 to 7 pixels, with
    attention where the side is at most 8: on a CPU a wide first level costs more than it teaches. Flat events get a
    residual MLP.

    Raises:
        UserError: no network is known for such events.
    """
    if len(event_shape) == 1:
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

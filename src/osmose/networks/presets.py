"""Networks that suit data of a given shape on modest hardware."""

from __future__ import annotations

from typing import Any

from osmose.errors import UserError


def network_for(event_shape: tuple[int, ...]) -> dict[str, Any]:
    """Configuration of a network for events of a shape, as plain values that the user can override.

    Images get a UNet whose deepest level is 4 to 8 pixels wide and that attends at its second level and below;
    flat events get a residual MLP.

    Raises:
        UserError: no network is known for such events.
    """
    if len(event_shape) == 1:
        return {"kind": "mlp"}
    if len(event_shape) != 3:
        raise UserError(f"network: none is known for events of shape {event_shape}; name one with --network")
    sides = event_shape[1:]
    mult, side = [1], min(sides)
    while side >= 8 and all(s % 2 ** len(mult) == 0 for s in sides) and len(mult) < 4:
        mult.append(2)
        side //= 2
    attention = [] if len(mult) < 2 else [max(sides) // 2]
    if max(sides) > 32:
        attention = [max(sides) // 2**level for level in range(len(mult)) if max(sides) // 2**level <= 16]
    return {"kind": "unet", "channels": 32, "mult": mult, "blocks": 2, "attention": attention}

"""Weights from one network to another that is built alike."""

from __future__ import annotations

import torch
from torch import nn

from osmose.errors import UserError


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a network the weights of another; of one that has a learned variance besides, without that output.

    Raises:
        UserError: networks that are not alike; the message names the first tensor that does not fit.
    """
    given, own = source.state_dict(), target.state_dict()
    for name in sorted(given.keys() ^ own.keys()):
        raise UserError(
            f"network: {name!r} is in one of the two networks alone; to share weights they have to be alike"
        )
    fitting = {}
    for name, value in given.items():
        wanted = own[name].shape
        # The outputs come first along the first axis of the last layer, their variances second.
        doubled = value.ndim > 0 and value.shape == (2 * wanted[0], *wanted[1:])
        fitting[name] = value[: wanted[0]] if doubled else value
        if fitting[name].shape != wanted:
            raise UserError(
                f"network: {name!r} is {tuple(value.shape)} in one network and {tuple(wanted)} in the other; they have "
                "to be alike to share weights"
            )
    target.load_state_dict(fitting)

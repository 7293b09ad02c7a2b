"""Which device to compute on."""

from __future__ import annotations

import torch

from osmose.errors import UserError


def device(name: str) -> torch.device:
    """The named device; `auto` is the fastest there is.

    Raises:
        UserError: a device that torch does not know or that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device: {name!r} is not on this machine; choose auto or cpu") from None
    return found

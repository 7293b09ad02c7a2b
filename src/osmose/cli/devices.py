"""Which device to compute on, and what computes there."""

from __future__ import annotations

from typing import get_args

import torch

from osmose.errors import UserError
from osmose.training.runtime import Runtime


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


def where(name: str, runtime: str) -> tuple[torch.device, Runtime]:
    """The named device and runtime; OpenVINO's is the CPU.

    Raises:
        UserError: as `device`; an unknown runtime.
    """
    if runtime not in get_args(Runtime):
        raise UserError(f"--runtime: {runtime!r} is not valid: should be {', '.join(get_args(Runtime))}")
    return device("cpu" if (name, runtime) == ("auto", "openvino") else name), runtime  # type: ignore[return-value]

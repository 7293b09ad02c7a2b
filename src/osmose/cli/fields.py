"""What is said on the command line to those that look at score fields: noise-to-signal ratios, and probes."""

from __future__ import annotations

from typing import Literal

from osmose.errors import UserError


def numbers(text: str) -> list[float]:
    """What --ratios says.

    Raises:
        UserError: something that is no list of numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--ratios: {text!r} is not valid: should be numbers with commas, as 0.02,0.05,0.1") from None


def probes_of(text: str | None) -> int | Literal["exact"] | None:
    """What --probes says.

    Raises:
        UserError: neither a whole number nor exact.
    """
    if text is None or text == "exact":
        return text  # type: ignore[return-value]
    if not (text.isascii() and text.removeprefix("-").isdecimal()):
        raise UserError(f"--probes: {text!r} is not valid: should be a whole number, or exact")
    return int(text)

"""The one exception that a user of osmose is meant to see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Input that osmose refuses: one line that names the field, the value and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the allowed name closest to `name`, or the list of them."""
    names = sorted(allowed)
    if not names:
        return "there is nothing here to set"
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if match:
        return f"did you mean {match[0]!r}? (one of {', '.join(names)})"
    return f"choose one of {', '.join(names)}"

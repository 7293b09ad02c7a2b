"""Being asked to stop, in the middle of what has to be finished first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stopping_on_signal() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them; a second one kills as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
                previous[number] = signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

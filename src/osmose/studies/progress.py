"""What a person sees while a study runs: a bar over its cells, or one line each."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """A progress bar on a terminal, plain lines elsewhere, nothing when `show` is False."""

    def __init__(self, show: bool = True):
        self.show = show
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TimeElapsedColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Say how much there is to do."""
        self.total, self.done, self.began, self.first = total, done, time.perf_counter(), done
        if self._bar is not None:
            self._task = self._bar.add_task("cells", total=total, completed=done, left="")
        if done:
            self.note(f"{done} of {total} cells are there already")

    def advance(self, label: str, seconds: float, error: str | None) -> None:
        """One more cell is over, after `seconds`."""
        self.done += 1
        elapsed = time.perf_counter() - self.began
        left = elapsed / (self.done - self.first) * (self.total - self.done)
        left_text = f"about {duration(left)} left" if self.done < self.total else "the last one"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, left=left_text)
        said = f"{duration(seconds)}, {left_text}" if error is None else f"FAILED after {duration(seconds)}: {error}"
        self.note(f"{self.done}/{self.total} {label}: {said}")

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.show:
            print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

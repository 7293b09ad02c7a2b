"""What a person sees while a model trains or samples: a bar with rate and time left, a line at each validation."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Progress:
    """A progress bar on a terminal, plain lines elsewhere, nothing when `show` is False."""

    def __init__(self, show: bool = True, label: str = "training"):
        self.show, self.label = show, label
        self._bar: Any = None
        self._events: Any = None

    def start(self, step: int, steps: int, batch_size: int) -> None:
        """Say where training starts and how far it goes."""
        self.first, self.steps, self.batch_size, self.began = step, steps, batch_size, time.perf_counter()
        self.step, self.busy, self.recent, self.status = step, 0.0, 0.0, ""

    def __enter__(self) -> Progress:
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(self.label),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.label, total=self.steps, completed=self.first, status="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._events is not None:
            self._events.close()

    def advance(self, window: Any) -> None:
        """One more step is done."""
        self.step += 1
        rate = window.items / window.seconds if window.seconds else 0.0
        self.status = f"loss {window.sums[0, 0] / window.sums[1, 0]:.4f}  {rate:.0f} items/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step, status=self.status)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self.show:
            print(text, file=sys.stderr, flush=True)

    def log(self, line: dict[str, Any], folder: Path | None) -> None:
        """Show a line of the log if it is a validation; write every line to TensorBoard when a folder is given."""
        if "validation_loss" in line:
            elapsed = time.perf_counter() - self.began
            left = elapsed / max(1, self.step - self.first) * (self.steps - self.step)
            status = f"{self.status}  " if self.status else ""
            prefix = "" if self.label == "training" else f"{self.label}: "
            self.note(
                f"{prefix}step {self.step}/{self.steps}  {status}held-out loss {line['validation_loss']:.4f}  "
                f"{_clock(elapsed)} elapsed, {_clock(left)} left"
            )
        if folder is not None:
            self._events = self._events or _tensorboard(folder, line["step"])
            for name, value in line.items():
                if name not in ("step", "epoch"):
                    self._events.add_scalar(name, value, line["step"])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run had written of this step and later ones is hidden, as metrics.jsonl forgets it.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step)


@contextlib.contextmanager
def sampling_bar(label: str, show: bool) -> Iterator[Any]:
    """A progress bar for sampling; yields the callback that moves it, or None where nothing is to be shown."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)

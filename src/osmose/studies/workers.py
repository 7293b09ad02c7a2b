"""A function over many tasks in processes of one thread each: small models gain nothing from more threads."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import torch

from osmose.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """One task that is over: its place in the sequence, what went wrong (or None), and its wall seconds."""

    index: int
    error: str | None
    seconds: float


def run_all(
    function: Callable[[T], None], tasks: Sequence[T], jobs: int, after: Sequence[Collection[int]] | None = None
) -> Generator[Done]:
    """Call `function` on every task and tell of each as it ends; one that raises does not stop the others.

    With one job the work is done in this process. With more, `function` and the tasks are sent to fresh processes, so
    they have to be importable and picklable. Every task sees one torch thread either way, so that its result is the
    same. When this process stops, however it stops, the others do; a training run saves its state first if it can.

    Args:
        function: returns nothing: it leaves files.
        tasks: in the order in which they are begun, as far as `after` lets them.
        jobs: processes, at least 1.
        after: for each task the places of earlier ones that have to be over, well or not, before it begins.
    """
    jobs = min(jobs, len(tasks))
    return _in_processes(function, tasks, jobs, after or [()] * len(tasks)) if jobs > 1 else _here(function, tasks)


def _here(function: Callable[[T], None], tasks: Sequence[T]) -> Generator[Done]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index, task in enumerate(tasks):
            began = time.perf_counter()
            yield Done(index, _attempt(function, task), time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    function: Callable[[T], None], tasks: Sequence[T], jobs: int, after: Sequence[Collection[int]]
) -> Generator[Done]:
    context = get_context("spawn")  # torch has threads, which a fork would leave locked
    waiting = list(range(len(tasks)))
    over: set[int] = set()
    staff: dict[Any, Any] = {}
    busy: dict[Any, tuple[int, float]] = {}

    def hire() -> Any:
        line, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        staff[line] = process
        return line

    def begin() -> None:
        """Give out the tasks that can begin, as far as there are processes."""
        free = [line for line in staff if line not in busy]
        ready = [index for index in waiting if over.issuperset(after[index])]
        for index in ready[: jobs - len(busy)]:
            line = free.pop() if free else hire()
            busy[line] = index, time.perf_counter()
            waiting.remove(index)
            line.send(tasks[index])

    try:
        begin()
        while busy:
            ready: list[Any] = connection.wait(list(staff))
            for line in ready:
                try:
                    error = line.recv()
                except (EOFError, ConnectionError):
                    error = "its process was killed (by lack of memory? try fewer --jobs)"
                    staff.pop(line).join()
                if line in busy:  # otherwise it was killed with nothing to do
                    index, began = busy.pop(line)
                    over.add(index)
                    yield Done(index, error, time.perf_counter() - began)
            begin()
    finally:
        for line, process in staff.items():
            line.close()
            process.terminate()
        for process in staff.values():
            process.join()


def _serve(function: Callable[[Any], None], line: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one tells the others
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            line.send(_attempt(function, line.recv()))
        except (EOFError, ConnectionError, KeyboardInterrupt):
            return


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)  # killed: nobody is left to tell, and whoever starts again must not find us writing


def _attempt(function: Callable[[T], None], task: T) -> str | None:
    """What went wrong, in one line, or None."""
    try:
        function(task)
    except UserError as error:
        return str(error)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename] or frames
        where = f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}"
        return f"{type(error).__name__}: {' '.join(str(error).split())} ({where})"
    return None

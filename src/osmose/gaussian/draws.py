"""Where random numbers come from.

`Draws` stands for the randomness of a set of items (the items of a training batch, the samples that are asked for)
and hands out one value or one tensor for each item. The two implementations make results independent of how the
work is cut up: a training step draws for the global batch and keeps its own part, a sample has a stream of its own.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


def mix(*parts: int | str) -> int:
    """A 63-bit seed from several numbers or names; nearby inputs give unrelated seeds (torch uses 32 of the bits)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seeded(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `mix(*parts)`."""
    return torch.Generator(device).manual_seed(mix(*parts))


def _stream(*parts: int | str) -> np.random.Generator:
    """A stream of its own for every key: torch's CPU generator keeps 32 bits of its seed, too few for many samples."""
    text = "/".join(str(part) for part in parts)
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


class Draws(Protocol):
    """Random numbers for `count` items; every call draws anew."""

    @property
    def count(self) -> int:
        """Number of items."""

    def normal(self, event_shape: tuple[int, ...]) -> Tensor:
        """Standard normal values, float32, shape (count, *event_shape), on the device of the items."""

    def uniform(self) -> Tensor:
        """Uniform values in [0, 1), float64 on the CPU, shape (count,)."""

    def binomial(self, n: Tensor, p: Tensor) -> Tensor:
        """How many of n succeed, each with the probability p: int64, shape (count, *event_shape), where n is.

        Args:
            n: int64, at least 0, shape (count, *event_shape).
            p: in [0, 1], of the same shape.
        """

    def poisson(self, rate: Tensor) -> Tensor:
        """Poisson counts of a rate, at least 0, shape (count, *event_shape): int64, where the rate is."""

    def stratified(self) -> Tensor:
        """As `uniform`, but evenly spread over [0, 1) across all items of the batch: (i + u) / n, shuffled."""

    def branch(self, *names: int | str) -> Draws:
        """Independent randomness for the same items.

        It depends on whose randomness this is and on the names, not on how much has been drawn: what a method draws
        besides changes nothing of what it draws otherwise. The same names give the same values again.
        """


def _counts(streams: Sequence[np.random.Generator], draw: Callable[..., Any], first: Tensor, *others: Tensor) -> Tensor:
    """Counts of given parameters, each item's from its own stream, by NumPy on the CPU: exact for any parameters."""
    arrays = [value.detach().cpu().numpy() for value in (first, *others)]
    made = np.empty(first.shape, dtype=np.int64)
    for index, stream in enumerate(streams):
        made[index] = draw(stream, *(array[index] for array in arrays))
    return torch.from_numpy(made).to(first.device)


class StepDraws:
    """The randomness of one training step: a pure function of (seed, step), cut to the items start..stop of the batch.

    Every process and every micro-batch draws the values of the whole batch and keeps its own, so one process and
    many, one pass and gradient accumulation, see the same noise.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        start: int,
        stop: int,
        total: int,
        device: torch.device | str = "cpu",
        *,
        path: tuple[int | str, ...] = (),
    ):
        """`path` is the names of the branch; none for the step itself."""
        self.seed, self.step, self.path = seed, step, path
        self.start, self.stop, self.total, self.device = start, stop, total, torch.device(device)
        self._host = seeded(seed, "step", step, *path)
        self._device = self._host if self.device.type == "cpu" else seeded(seed, "step", step, *path, device=device)
        self._streams: list[np.random.Generator] = []

    @property
    def count(self) -> int:
        return self.stop - self.start

    def binomial(self, n: Tensor, p: Tensor) -> Tensor:
        return _counts(self._own(), np.random.Generator.binomial, n, p.double())

    def poisson(self, rate: Tensor) -> Tensor:
        return _counts(self._own(), np.random.Generator.poisson, rate.double())

    def _own(self) -> list[np.random.Generator]:
        """A stream for each item: what is drawn depends on the item's values, which other processes do not have."""
        if not self._streams:
            keys = range(self.start, self.stop)
            self._streams = [_stream(self.seed, "step", self.step, *self.path, "item", key) for key in keys]
        return self._streams

    def normal(self, event_shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(self.total, *event_shape, generator=self._device, device=self.device)
        return drawn[self.start : self.stop]

    def uniform(self) -> Tensor:
        return torch.rand(self.total, generator=self._host, dtype=torch.float64)[self.start : self.stop]

    def stratified(self) -> Tensor:
        u = torch.rand(self.total, generator=self._host, dtype=torch.float64)
        place = torch.randperm(self.total, generator=self._host)
        return ((place + u) / self.total)[self.start : self.stop]

    def again(self) -> StepDraws:
        """The same randomness from where this one is now, to be drawn once more."""
        other = StepDraws(self.seed, self.step, self.start, self.stop, self.total, self.device, path=self.path)
        other._host.set_state(self._host.get_state())
        if other._device is not other._host:
            other._device.set_state(self._device.get_state())
        other._streams = copy.deepcopy(self._streams)
        return other

    def branch(self, *names: int | str) -> StepDraws:
        path = (*self.path, "branch", *names)
        return StepDraws(self.seed, self.step, self.start, self.stop, self.total, self.device, path=path)


class SampleDraws:
    """The randomness of the samples `first`..`first + count - 1` of a seed: each has its own stream.

    Sample i is the same whichever batch it is computed in, and on whichever device: values are drawn on the CPU.
    After the first draw, small events are drawn several steps ahead, so that many streams cost little per step.
    """

    #: Values that one sample draws at a time, at most; depends on nothing but the event, or samples would change.
    AHEAD = 16 * 1024

    def __init__(
        self,
        seed: int,
        first: int,
        count: int,
        device: torch.device | str = "cpu",
        *,
        path: tuple[int | str, ...] = (),
    ):
        """`path` is the names of the branch; none for the samples themselves."""
        self.seed, self.first, self.path, self.device = seed, first, path, torch.device(device)
        self._streams = [_stream(seed, "sample", index, *path) for index in range(first, first + count)]
        self._buffer: list[Tensor] = []
        self._first = True

    @property
    def count(self) -> int:
        return len(self._streams)

    def normal(self, event_shape: tuple[int, ...]) -> Tensor:
        if not self._buffer or tuple(self._buffer[-1].shape[1:]) != event_shape:
            # A deterministic solver draws once: drawing ahead then would be for nothing.
            steps = 1 if self._first else max(1, min(16, self.AHEAD // math.prod(event_shape)))
            self._first = False
            block = torch.empty(self.count, steps, *event_shape)
            for row, stream in zip(block, self._streams, strict=True):
                stream.standard_normal(dtype=np.float32, out=row.numpy())
            self._buffer = list(block.to(self.device).unbind(1))[::-1]
        return self._buffer.pop().contiguous()

    def binomial(self, n: Tensor, p: Tensor) -> Tensor:
        return _counts(self._streams, np.random.Generator.binomial, n, p.double())

    def poisson(self, rate: Tensor) -> Tensor:
        return _counts(self._streams, np.random.Generator.poisson, rate.double())

    def uniform(self) -> Tensor:
        return torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64)

    def stratified(self) -> Tensor:
        return self.uniform()

    def branch(self, *names: int | str) -> SampleDraws:
        return SampleDraws(self.seed, self.first, self.count, self.device, path=(*self.path, "branch", *names))

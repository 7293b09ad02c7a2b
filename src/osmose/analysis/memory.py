"""How many bytes of tensors a computation has at once.

The resident size of a process says little: allocators keep what was freed, libraries take buffers of their own, and
garbage of the past is used again. What is counted here are the tensors' storages themselves, to the byte, and the same
on every machine. Each operation says what it returns: storages that none of its inputs had are new, and their bytes
count until nothing holds them any longer, be it a variable or the graph that waits for the backward pass.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Its input is a tensor that was made from Python values a moment ago, out of sight.
_LIFTED = torch.ops.aten.lift_fresh.default


class peak_bytes:  # noqa: N801 - a context manager, named as it is used
    """Counts the bytes of tensors that are allocated inside it; what was there before does not count.

    Views and results of operations in place are no new bytes. What one kernel takes for itself and gives back before it
    returns is not seen, except on CUDA, where the numbers are those of the allocator (in blocks of 512 bytes).

    Args:
        device: where the computation is.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._mode = _Storages()
        self._start = 0
        self._most: int | None = None  # on CUDA, once it is over

    @property
    def live(self) -> int:
        """Bytes of what was allocated inside and is alive now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._start
        return self._mode.live

    @property
    def peak(self) -> int:
        """The largest number of bytes that were alive at once."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._start if self._most is None else self._most
        return self._mode.peak

    def __enter__(self) -> peak_bytes:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._most = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self._mode.__exit__(kind, error, trace)


class _Storages(TorchDispatchMode):
    """The storages that operations made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        # By address, which is given anew once a storage is gone: the reference says whether it still is this one.
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # without gradients torch hands over whole functions; what they are made of allocates, too
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        old = set() if func is _LIFTED else {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            self._note(storage, old)
        return result

    def _note(self, storage: torch.UntypedStorage, old: set[int]) -> None:
        address, size = storage._cdata, storage.nbytes()
        reference, before = self._known.get(address, (None, 0))
        if reference is None or reference() is not storage:
            if address in old:
                return
            reference, before = weakref.ref(storage, lambda gone: self._forget(address, gone)), 0
        self._known[address] = reference, size
        self.live += size - before  # where it was there before, it has been resized
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int, gone: weakref.ref[torch.UntypedStorage]) -> None:
        reference, size = self._known[address]
        if reference is gone:
            del self._known[address]
            self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage()
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided
    ]


def bytes_of(tensors: Any) -> int:
    """Bytes of the storages of some tensors (or of what holds them, in lists and dictionaries), each counted once."""
    return sum({storage._cdata: storage.nbytes() for storage in _storages(tensors)}.values())

"""Exponential moving average of weights, in the bias-corrected form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from osmose.networks.averaging import newest_share


class EMA:
    """Average of a module's trainable parameters after each update, by `newest_share`.

    The initial values have no share, and early averages are as meaningful as late ones. Buffers and parameters that are
    not trained are copied, not averaged.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = module, decay, 0
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in trained.items()}
        self._averages = list(self.average.values())

    @property
    def _live(self) -> list[Tensor]:
        # Looked up every time: whatever moves the module (accelerate, on several CPU processes) gives it new storage.
        return [value.detach() for name, value in self.module.named_parameters() if name in self.average]

    def update(self) -> None:
        """Take in the module's current weights: call after each optimiser step."""
        self.updates += 1
        if self.average:
            torch._foreach_lerp_(self._averages, self._live, newest_share(self.decay, self.updates))

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The module with averaged weights inside, its own weights after, whatever happens in between."""
        kept = [value.clone() for value in self._live]
        _put(self._live, self._averages)
        try:
            yield self.module
        finally:
            _put(self._live, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, and the module's buffers: weights to run the module with."""
        return {**self.module.state_dict(), **self.average}

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Continue from what `state_dict` gave after `updates` updates."""
        self.updates = updates
        for name, value in self.average.items():
            value.copy_(state[name])


@torch.no_grad()
def _put(places: list[Tensor], values: list[Tensor]) -> None:
    if places:  # torch refuses to copy nothing
        torch._foreach_copy_(places, values)

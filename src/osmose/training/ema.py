"""Exponential moving average of weights, in the bias-corrected form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Average of a module's parameters after each of n updates, with weights decay^(n - i) normalised to sum to 1.

    The normalisation is Adam's bias correction (arXiv 1412.6980, section 3) applied to the weights: the initial
    values have no share, and early averages are as meaningful as late ones. Buffers are copied, not averaged.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = module, decay, 0
        self.average = {name: value.detach().clone() for name, value in module.named_parameters()}
        self._averages = list(self.average.values())

    @property
    def _live(self) -> list[Tensor]:
        # Looked up every time: whatever moves the module (accelerate, on several CPU processes) gives it new storage.
        return [value.detach() for value in self.module.parameters()]

    def update(self) -> None:
        """Take in the module's current weights: call after each optimiser step."""
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates) if self.decay > 0 else 1.0
        torch._foreach_lerp_(self._averages, self._live, share)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The module with averaged weights inside, its own weights after, whatever happens in between."""
        kept = [value.clone() for value in self._live]
        with torch.no_grad():
            torch._foreach_copy_(self._live, self._averages)
        try:
            yield self.module
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, and the module's buffers: weights to run the module with."""
        return {**self.module.state_dict(), **self.average}

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Continue from what `state_dict` gave after `updates` updates."""
        self.updates = updates
        for name, value in self.average.items():
            value.copy_(state[name])

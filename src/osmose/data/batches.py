"""The order in which training sees the data: a pure function of the seed and the step.

Nothing is stored in a checkpoint and nothing is replayed: step 12,345 of a resumed run asks for the same items as step
12,345 of an uninterrupted one, on any number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.data.splitting import permutation
from osmose.errors import UserError


class BatchOrder:
    """Which items make up the global batch of each optimisation step.

    Batches run through the permutations of epoch 0, 1, 2, ... laid end to end: every epoch covers every item once, no
    item is dropped, a batch may reach into the next epoch and may be larger than the data set. Processes slice the
    global batch by rank.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int):
        for name, value in (("num_items", num_items), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name}: {value} is not valid: must be at least 1")
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self._permutations: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """Items of the global batch at optimisation step `step` (from 0): int64, shape (batch_size,)."""
        if step < 0:
            raise UserError(f"step: {step} is not valid: steps count from 0")
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.num_items)
            piece = self._permutation(epoch)[offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
        # cat copies: a caller that writes into the result does not change the order.
        return torch.cat(pieces)

    def epoch(self, step: int) -> float:
        """How many times the data have been gone through when step `step` begins."""
        return step * self.batch_size / self.num_items

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            # Two are enough for a run that goes forward; more would hold on to memory for nothing.
            while len(self._permutations) >= 2:
                del self._permutations[next(iter(self._permutations))]
            self._permutations[epoch] = permutation(self.num_items, "order", self.seed, epoch)
        return self._permutations[epoch]

"""Seeded permutations, and the one random split of data sets that bring no test part.

A permutation is a pure function of its size and a key (what it is for, a seed, an epoch, ...), so that nothing has
to be stored to find the same order again.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def permutation(num_items: int, *key: str | int) -> Tensor:
    """The permutation of 0..num_items-1 that belongs to `key`: int64, shape (num_items,)."""
    # torch's CPU generator keeps only the low 32 bits of its seed, so neighbouring keys are mixed by a real hash:
    # seed 1 of epoch 0 and seed 0 of epoch 1 share nothing.
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(num_items, generator=generator)


def split_indices(num_items: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Choose at random which items are held out.

    Both parts stay in random order, so that the first n items of a part are a fair sample of it even where the
    source is sorted by class.

    Args:
        num_items: at least 2.
        share: of the items to hold out, in (0, 1); rounded, but each part gets at least one item.
        seed: of the permutation.

    Returns:
        Indices of the training and of the held-out part, int64.
    """
    order = permutation(num_items, "split", seed)
    num_held_out = min(max(round(share * num_items), 1), num_items - 1)
    return order[num_held_out:], order[:num_held_out]

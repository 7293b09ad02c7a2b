"""Texts beside texts: how often sequences of characters occur, and whether words are words."""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.data.dataset import Dataset
from osmose.data.text import texts
from osmose.metrics.measures import Measured, share


def ngram_distance(x: Tensor, y: Tensor, n: int) -> Measured:
    """Total variation distance of the frequencies of n characters in a row, of codes (items, length): 0 to 1.

    Of finite texts it is never 0: compare it with that of real data.
    """

    def counted(codes: Tensor) -> tuple[Tensor, Tensor]:
        windows = codes.long().unfold(1, n, 1).reshape(-1, n)
        base = torch.tensor([1 << (8 * place) for place in range(n)])
        return (windows * base).sum(1).unique(return_counts=True)

    (keys_x, counts_x), (keys_y, counts_y) = counted(x), counted(y)
    keys = torch.cat([keys_x, keys_y]).unique()
    p, q = torch.zeros(2, len(keys), dtype=torch.float64).unbind(0)
    p[torch.searchsorted(keys, keys_x.contiguous())] = counts_x.double() / counts_x.sum()
    q[torch.searchsorted(keys, keys_y.contiguous())] = counts_y.double() / counts_y.sum()
    return Measured(float((p - q).abs().sum() / 2))


def words_of(text: str) -> list[str]:
    """The words of a piece of text, without the first and the last, which may be cut."""
    return text.split()[1:-1]


def known_words(samples: Tensor, real: Tensor, dataset: Dataset) -> tuple[Measured, float]:
    """The share of the words of samples that occur in the training text, and the same of other real items."""
    known = {word for text in texts(dataset.train, dataset.spec) for word in words_of(text)}

    def found(items: Tensor) -> Measured:
        words = [word for text in texts(items, dataset.spec) for word in words_of(text)]
        return share(sum(word in known for word in words) / max(1, len(words)), max(1, len(words)))

    return found(samples), found(real).value

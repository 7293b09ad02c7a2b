"""The real side of a comparison: a seeded reference set, and disjoint real sets whose distance is the floor."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from osmose.data.dataset import Dataset
from osmose.metrics.features import Embedding, FeatureNetwork
from osmose.metrics.matrices import seeded

Part = Literal["train", "held-out"]


@dataclass(frozen=True)
class RealSets:
    """Real items, drawn once; both sets of the floor are slices of them.

    Attributes:
        items: data units, shape (N, *spec.shape).
        labels: shape (N,), or None.
        reference: which of the items the samples are compared with.
        floor_x, floor_y: two disjoint sets; in the usual case the second one is the reference.
        note: what differs from "two disjoint sets of n items of the same part", or None.
    """

    items: Tensor
    labels: Tensor | None
    reference: slice
    floor_x: slice
    floor_y: slice
    note: str | None


def draw_real(dataset: Dataset, part: Part, n: int, m: int, seed: int) -> RealSets:
    """A random reference of (at most) m items of `part`, and a floor between n other real items and it.

    Where `part` has fewer than n + m items, the other part fills up; where that is still too few, the floor is
    taken between the two largest disjoint halves.

    Args:
        dataset: the real data.
        part: which part is the reference.
        n: number of generated samples.
        m: number of real items wanted.
        seed: of the choice.
    """
    generator = seeded(seed)
    values, labels = dataset.part(part)
    order = torch.randperm(len(values), generator=generator)[: n + m]
    items, kinds = values[order], None if labels is None else labels[order]
    m = min(m, len(items))
    note = None
    lacking = n + m - len(items)
    if lacking > 0:
        other = "held-out" if part == "train" else "train"
        more, more_labels = dataset.part("held-out" if part == "train" else "train")
        fill = torch.randperm(len(more), generator=generator)[:lacking]
        items = torch.cat([items, more[fill]])
        kinds = None if kinds is None or more_labels is None else torch.cat([kinds, more_labels[fill]])
        note = f"{part} has {len(values)} items, too few for two disjoint sets; {len(fill)} {other} items fill up"
    if len(items) >= n + m:
        return RealSets(items, kinds, slice(0, m), slice(m, m + n), slice(0, m), note)
    half = min(len(items) // 2, n)
    note = f"the real data have only {len(items)} items: the floor is between disjoint halves of {half}, not {n}"
    return RealSets(items, kinds, slice(0, m), slice(half, 2 * half), slice(0, half), note)


#: Embeddings of real items, least recently used first; one entry per data set, network, sizes and seed.
_CACHE: OrderedDict[tuple[str | int, ...], Embedding] = OrderedDict()
_CACHE_ENTRIES = 4


def embed_real(
    real: RealSets, network: FeatureNetwork, dataset: Dataset, part: Part, n: int, m: int, seed: int
) -> Embedding:
    """Features of all drawn real items; kept in memory, since many models are compared with the same ones."""
    key = (dataset.identity.sha256, network.sha256, part, n, m, seed)
    if key not in _CACHE:
        _CACHE[key] = network.embed(real.items, dataset.spec.range)
    _CACHE.move_to_end(key)
    while len(_CACHE) > _CACHE_ENTRIES:
        _CACHE.popitem(last=False)
    return _CACHE[key]

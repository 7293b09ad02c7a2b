"""Which steps of a chain need more precision: found from how far their errors move the samples.

Steps are taken in groups of neighbours. Each group alone is computed in low precision, and the samples are compared
with those of the same noise in high precision. Squared deviations of all groups add up to about that of all of them in
low precision, where errors do not pull the same way. Groups are then given high precision, the worst first, until the
samples stay within a budget.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osmose.gaussian.draws import SampleDraws
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import OnStep
from osmose.training.runtime import networks_of

#: Groups that steps are taken in, at most.
_GROUPS = 16
#: Samples that are drawn at once.
_BATCH = 256


class Switch(nn.Module):
    """A network that takes labels of one set from another network.

    Attributes:
        high_labels: those that `high` answers for.
    """

    def __init__(self, low: nn.Module, high: nn.Module):
        super().__init__()
        self.low, self.high, self.high_labels = low, high, frozenset[float]()

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        network = self.high if float(label[0]) in self.high_labels else self.low
        out: Tensor = network(x, label, condition)
        return out


def labels_of(model: GenerativeModel) -> list[float]:
    """The labels of a model's evaluations in the order in which its sampler comes to them, each once."""
    seen: dict[float, None] = {}

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.setdefault(float(given[1][0]))

    handles = [network.register_forward_pre_hook(note) for _, _, network in networks_of(model)]
    try:
        drawn(model, 1, 0)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def drawn(model: GenerativeModel, items: int, seed: int) -> Tensor:
    """Samples in the model's units, not brought to the levels of the data, which would hide small differences."""
    parts = []
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        classes = model.classes_for(items, None)
        for first in range(0, items, _BATCH):
            count = min(_BATCH, items - first)
            draws = SampleDraws(seed, first, count, model.device)
            own = None if classes is None else classes[first : first + count].to(model.device)
            parts.append(model.generate(draws, model.sampling(), own, lambda *_: None)[0].cpu())
    return torch.cat(parts).clone()


@contextlib.contextmanager
def switched(model: GenerativeModel, low: Sequence[nn.Module]) -> Iterator[list[Switch]]:
    """A model whose networks are switches to others of low precision, until the end of the block."""
    holders = networks_of(model)
    switches = [Switch(other, network) for (_, _, network), other in zip(holders, low, strict=True)]
    for (holder, name, _), switch in zip(holders, switches, strict=True):
        setattr(holder, name, switch)
    try:
        yield switches
    finally:
        for holder, name, network in holders:
            setattr(holder, name, network)


def deviation(samples: Tensor, right: Tensor) -> float:
    """Root mean square of the difference, in deviations of the right ones from their mean."""
    spread = (right - right.mean(0)).square().mean().clamp(min=1e-30)
    return float(((samples - right).square().mean() / spread).sqrt())


class Group(NamedTuple):
    """Steps that are in low precision alone.

    Attributes:
        labels: of its steps.
        deviation: of samples from those in high precision.
    """

    labels: tuple[float, ...]
    deviation: float


class Precision(NamedTuple):
    """What was found.

    Attributes:
        groups: in the order of the chain.
        high: the labels that are to be in high precision.
        deviation: of samples with these.
        low: of samples with all steps in low precision.
        budget: that was asked for.
    """

    groups: list[Group]
    high: tuple[float, ...]
    deviation: float
    low: float
    budget: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        groups = [{"labels": list(group.labels), "deviation": group.deviation} for group in self.groups]
        rest = {"high": list(self.high), "deviation": self.deviation, "low": self.low, "budget": self.budget}
        return {"groups": groups, **rest}


def search(
    model: GenerativeModel,
    low: Sequence[nn.Module],
    budget: float,
    *,
    right: Tensor | None = None,
    items: int = 32,
    seed: int = 0,
    most_groups: int = _GROUPS,
    on_step: OnStep | None = None,
) -> Precision:
    """Find the fewest steps in high precision with which samples deviate no more than a budget.

    Args:
        model: in high precision.
        low: its networks in low precision.
        budget: of `deviation`.
        right: what samples should be, `drawn` with the same seed; those of the model if None.
        items: samples to compare.
        seed: of their noise.
        most_groups: in which steps are taken together; as many as there are steps for each by itself.
        on_step: called after each set of samples.

    Returns:
        With all steps in high precision where no fewer keep the budget, and `deviation` above it where not even these.
    """
    labels = labels_of(model)
    size = -(-len(labels) // most_groups)
    cut = [tuple(labels[first : first + size]) for first in range(0, len(labels), size)]
    right = drawn(model, items, seed) if right is None else right
    of, done = len(cut) + 2 + max(1, len(cut)).bit_length(), 0

    with switched(model, low) as switches:

        def measure(high: Sequence[float]) -> float:
            nonlocal done
            for switch in switches:
                switch.high_labels = frozenset(high)
            found = deviation(drawn(model, items, seed), right)
            done += 1
            if on_step is not None:
                on_step(min(done, of), of)
            return found

        groups = [Group(own, measure([label for label in labels if label not in own])) for own in cut]
        whole = measure([])
        worst = sorted(groups, key=lambda group: -group.deviation)

        def of_first(count: int) -> tuple[float, ...]:
            chosen = {label for group in worst[:count] for label in group.labels}
            return tuple(label for label in labels if label in chosen)

        few, many, reached = 0, len(worst), {0: whole}
        if whole > budget:
            while many - few > 1:  # `few` deviates too much
                middle = (few + many) // 2
                reached[middle] = measure(of_first(middle))
                few, many = (few, middle) if reached[middle] <= budget else (middle, many)
        else:
            many = 0
        if many not in reached:
            reached[many] = measure(of_first(many))
    return Precision(groups, of_first(many), reached[many], whole, budget)


def intervals(labels: Sequence[float], high: Sequence[float]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Intervals of labels, and which of two networks answers there: 0 in high precision, 1 in low.

    Args:
        labels: all that there are.
        high: those in high precision.

    Returns:
        Edges between intervals, descending, half way between labels, and the network of each interval.
    """
    edges: list[float] = []
    owners: list[int] = []
    before: float | None = None
    for label in sorted(set(labels), reverse=True):
        owner = 0 if label in set(high) else 1
        if not owners or owner != owners[-1]:
            if before is not None:
                edges.append((before + label) / 2)
            owners.append(owner)
        before = label
    return tuple(edges), tuple(owners)

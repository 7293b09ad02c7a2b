"""What passes between a model and those who use it: batches, losses, bounds, samples, and news of how far they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from osmose.data.dataset import Dataset, DataSpec

#: Called after each solver step with the number of steps done and the number in all.
OnStep = Callable[[int, int], None]


class Watch(Protocol):
    """What a batch of samples is watched by: told of its beginning, where it is worth seeing, and of each step."""

    def __call__(self, done: int, of: int, state: Tensor | None = None, /) -> None:
        """Steps done and in all, and what the samples are by now, of some unit variance in the model's units."""


@dataclass(frozen=True)
class Batch:
    """Training items.

    Attributes:
        x0: model units, shape (B, *event).
        condition: classes, int64 (B,), or None.
        start: items of the data that samples begin with, in the units that the model has for them, (B, *event); None
            where that is noise.
        times: of series, float64 (B, L) on the CPU, NaN at the end of shorter ones; x0 is NaN where nothing is known.
    """

    x0: Tensor
    condition: Tensor | None = None
    start: Tensor | None = None
    times: Tensor | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        part: str,
        rows: Tensor,
        conditional: bool,
        device: torch.device | str,
    ) -> Batch:
        """The items `rows` (int64, on the CPU) of a part, train or held-out, with their classes if a model is told."""
        items, labels = dataset.part(part)
        times = dataset.times(part)
        classes = labels[rows].to(device) if conditional and labels is not None else None
        return cls(dataset.spec.encode(items[rows].to(device)), classes, times=None if times is None else times[rows])

    @classmethod
    def made(cls, spec: DataSpec, count: int, conditional: bool, device: torch.device | str, seed: int = 0) -> Batch:
        """Items of the form of some data, with values that such data can have: for counting and timing."""
        x = torch.randn(count, *spec.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        classes = torch.zeros(count, dtype=torch.int64, device=device) if conditional else None
        return cls(spec.encode(spec.decode(x)), classes, times=spec.some_times(count))


@dataclass(frozen=True)
class LossTerms:
    """What a method returns for a batch; the trainer reduces, weighs and logs it.

    Attributes:
        per_item: the loss of each item, shape (B,), with gradient.
        t: the process time of each item, float64 (B,) on the CPU, or None where there is none.
        parts: named detached per-item terms (B,) to log.
        weight: the importance weight that `per_item` already carries, float64 (B,) on the CPU, or None where all are 1.
    """

    per_item: Tensor
    t: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None


@dataclass(frozen=True)
class Regression:
    """A batch's loss as least squares: weight times the mean over dimensions of (network(x, label) - target)^2.

    Attributes:
        network: called as network(x, label, condition).
        x, label, condition: what it is given, (B, *event), (B,), and (B,) or None.
        target: what it should say, (B, *event).
        weight: of each item, (B,).
    """

    network: nn.Module
    x: Tensor
    label: Tensor
    condition: Tensor | None
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class BoundTerms:
    """A bound on the negative log-likelihood of n items, or that itself, term by term, in nats per dimension.

    Attributes:
        t: times of the K steps, quietest first, float64 (K,), 0 for data and 1 for noise.
        prior: L_T, float64 (n,).
        steps: L_0 (of the data given the quietest step) to L_{K-1}, float64 (n, K).
        x0_error: mean over dimensions of (x0 - x0_hat)^2 at each step, as the bound saw it, float64 (n, K); None
            where nothing is estimated.
        eps_error: the same of Gaussian noise, before x0_hat was kept inside the data's range, float64 (n, K); None
            where there is none.
        is_density: whether it is of a density in the data's units, and not of levels.
        is_exact: whether it is -log of that density, and no bound.
    """

    t: Tensor
    prior: Tensor
    steps: Tensor
    x0_error: Tensor | None = None
    eps_error: Tensor | None = None
    is_density: bool = False
    is_exact: bool = False


@dataclass(frozen=True)
class Samples:
    """Generated data and what it cost.

    Attributes:
        data: float32, data units, shape (n, *event), on the CPU.
        nfe: network evaluations spent on each sample.
        seconds: wall time of the sampling alone.
        condition: the class of each sample, or None.
        times: of series, float64 (n, L), NaN at the end of shorter ones, where data are NaN too; of others None.
    """

    data: Tensor
    nfe: int
    seconds: float
    condition: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True)
class SamplePaths:
    """How samples came about.

    Attributes:
        states: float32, model units, as far as need be divided by their deviation, (n, K, *event), on the CPU; the
            last is the sample.
        done: the steps after which they are, (K,), 0 the beginning.
    """

    states: Tensor
    done: tuple[int, ...]

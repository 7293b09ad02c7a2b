"""What is remembered of the losses between two lines of the log."""

from __future__ import annotations

from typing import Any

import torch

from osmose.methods.messages import LossTerms

_LOSSES = ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4")


class Window:
    """Losses since the last line of the log: in all, by quartile of t, and the parts that the method names."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.parts: list[str] = []
        self.sums = torch.zeros(2, len(_LOSSES), dtype=torch.float64)  # sum and weight of the losses, then of the parts
        self.seconds, self.grad_norm = 0.0, 0.0
        self.notes: dict[str, float] = {}  # of the optimizer, on its last step
        self.items = 0

    def add(self, terms: LossTerms) -> None:
        """Take in the losses of some items.

        Importance weights are part of `loss`, whose mean is that over the method's own law of t; a quartile and a part
        are means with these weights divided by their sum, so that they too stand for that law.
        """
        loss = terms.per_item.detach().cpu().double()
        weight = torch.ones_like(loss) if terms.weight is None else terms.weight
        self.items += len(loss)
        self.sums[0, 0] += loss.sum()
        self.sums[1, 0] += len(loss)
        if terms.t is not None:
            quartile = 1 + (terms.t * 4).long().clamp(0, 3)
            self.sums[0].index_add_(0, quartile, loss)
            self.sums[1].index_add_(0, quartile, weight)
        for name, part in terms.parts.items():
            if name not in self.parts:
                self.parts.append(name)
                self.sums = torch.cat([self.sums, self.sums.new_zeros(2, 1)], 1)
            place = len(_LOSSES) + self.parts.index(name)
            self.sums[0, place] += (weight * part.detach().cpu().double()).sum()
            self.sums[1, place] += weight.sum()

    def losses(self, reduce: Any) -> dict[str, Any]:
        """Means over all processes: `loss`, `loss_q1`..`loss_q4` where t is known, and each part by its own name."""
        total, count = reduce(self.sums)
        names = [*_LOSSES, *self.parts]
        return {name: float(s / n) for name, s, n in zip(names, total, count, strict=True) if n > 0}

    def drain(self, reduce: Any) -> dict[str, Any]:
        """What to log; starts a new window."""
        values = self.losses(reduce)
        rate = float(self.sums[1, 0]) / self.seconds if self.seconds else 0.0
        values |= {"grad_norm": self.grad_norm, "seconds": round(self.seconds, 4), "items_per_second": round(rate, 2)}
        values |= self.notes
        self.clear()
        return values

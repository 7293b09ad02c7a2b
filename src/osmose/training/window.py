"""What is remembered of the losses between two lines of the log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Window:
    """Losses since the last line of the log, in all and by quartile of t."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.sums = torch.zeros(2, 5, dtype=torch.float64)  # loss and count; all, then the four quartiles
        self.seconds, self.grad_norm = 0.0, 0.0
        self.items = 0

    def add(self, per_item: Tensor, t: Tensor | None) -> None:
        """Take in the losses (B,) of items at times t (B,)."""
        loss = per_item.detach().cpu().double()
        self.items += len(loss)
        self.sums[0, 0] += loss.sum()
        self.sums[1, 0] += len(loss)
        if t is not None:
            quartile = 1 + (t * 4).long().clamp(0, 3)
            self.sums[0].index_add_(0, quartile, loss)
            self.sums[1].index_add_(0, quartile, torch.ones_like(loss))

    def losses(self, reduce: Any) -> dict[str, Any]:
        """Mean losses over all processes: `loss`, and `loss_q1`..`loss_q4` where t is known."""
        total, count = reduce(self.sums)
        names = ["loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"]
        return {name: float(s / n) for name, s, n in zip(names, total, count, strict=True) if n > 0}

    def drain(self, reduce: Any) -> dict[str, Any]:
        """What to log; starts a new window."""
        values = self.losses(reduce)
        rate = float(self.sums[1, 0]) / self.seconds if self.seconds else 0.0
        values |= {"grad_norm": self.grad_norm, "seconds": round(self.seconds, 4), "items_per_second": round(rate, 2)}
        self.clear()
        return values

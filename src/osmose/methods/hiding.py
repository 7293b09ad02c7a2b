"""What is hidden of series, what is known, and the noise that goes with it: the tasks of a diffusion of series.

Each value of an item is hidden, known or absent (missing in the data); what is hidden in training is the task:

=========== ==============================================================================================
generate    all that there is
forecast    the last `horizon` times
impute      values at random, their share uniform in [0, 1]
any         each of these for a third of the items
=========== ==============================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from osmose.gaussian.draws import Draws
from osmose.methods.messages import Batch
from osmose.processes.factors import Factor
from osmose.processes.kernels import Kernel

Task = Literal["generate", "forecast", "impute", "any"]

#: Added to the deviation of what is known of a column, in deviations of the training part: a flat stretch is not blown
#: up, and does not drown all others in the loss.
_LEAST = 0.05


@dataclass(frozen=True)
class Setting:
    """What is known of a batch of items, and the noise that goes with it.

    Attributes:
        times, there: from the first on, (B, L), and where they exist.
        known, hidden: 1 where a value is, 0 elsewhere, (B, C, L).
        base: what the process expects: the known values where known, m where hidden, 0 elsewhere; local units.
        factor: of the noise at the hidden values.
        shift, scale: local units of each item are (x - shift) / scale, (B, C, 1).
        classes: of a conditional model.
    """

    times: Tensor
    there: Tensor
    known: Tensor
    hidden: Tensor
    base: Tensor
    factor: Factor
    shift: Tensor
    scale: Tensor
    classes: Tensor | None

    @property
    def count(self) -> Tensor:
        """Hidden values of each item, at least 1, (B,)."""
        return self.hidden.flatten(1).sum(1).clamp(min=1)


@dataclass(frozen=True)
class Hiding:
    """How items are hidden, and what their noise is.

    Attributes:
        kernel: of the noise.
        pinned: whether noise vanishes at known values.
        local: whether items are measured from the mean of their known values, in their deviation.
        task: what is hidden in training.
        horizon: last times that are hidden for a forecast.
    """

    kernel: Kernel
    pinned: bool
    local: bool
    task: Task
    horizon: int

    def hide(self, batch: Batch, draws: Draws, task: Task | None = None) -> tuple[Setting, Tensor]:
        """Items with some of their values hidden as the task has it, and their values in local units."""
        assert batch.times is not None
        there = batch.x0.isfinite().cpu()
        hidden = self._hidden(there, batch.times, draws, self.task if task is None else task)
        setting = self.setting(batch.x0, batch.times, hidden, batch.condition)
        x = torch.where(batch.x0.isfinite(), (batch.x0 - setting.shift) / setting.scale, 0.0)
        return setting, x

    def _hidden(self, there: Tensor, times: Tensor, draws: Draws, task: Task) -> Tensor:
        """Which of the values that there are, bool (B, C, L) on the CPU, are hidden."""
        if task == "generate":
            return there
        forecast = self.late(there, times)
        if task == "forecast":
            return forecast
        share = draws.uniform().view(-1, 1, 1)
        drawn = torch.special.ndtr(draws.normal(tuple(there.shape[1:])).cpu())
        some = there & (drawn < share)
        if task == "impute":
            return some
        kind = (3 * draws.uniform()).view(-1, 1, 1)
        return torch.where(kind < 1, there, torch.where(kind < 2, forecast, some))

    def late(self, there: Tensor, times: Tensor) -> Tensor:
        """Which of the values that there are belong to the horizon."""
        lengths = times.isfinite().sum(1, keepdim=True)
        late = torch.arange(times.shape[1])[None] >= lengths - self.horizon
        return there & late[:, None]

    def setting(self, x0: Tensor, times: Tensor, hidden: Tensor, classes: Tensor | None) -> Setting:
        """See `Setting`; x0 (B, C, L) in the model's units, NaN where absent; hidden bool, on the CPU."""
        device, exists = x0.device, times.isfinite()
        known = x0.isfinite().cpu() & ~hidden & exists[:, None]
        hidden = hidden & exists[:, None]
        seen = known.to(device)
        values = torch.where(seen, x0, 0.0)
        shift, scale = torch.zeros_like(values[..., :1]), torch.ones_like(values[..., :1])
        if self.local:
            count = seen.sum(2, keepdim=True)
            some = count.clamp(min=1)
            shift = values.sum(2, keepdim=True) / some
            spread = (torch.where(seen, values - shift, 0.0).square().sum(2, keepdim=True) / some).sqrt()
            scale = torch.where(count > 0, (spread.square() + _LEAST**2).sqrt(), 1.0)
            values = torch.where(seen, (values - shift) / scale, 0.0)
        factor = self.kernel.factor(times, hidden, known, pinned=self.pinned).to(device)
        dtype = x0.dtype
        return Setting(
            # From the first on: where there is no float64, an hour would be lost beside a date.
            times=(times - times[:, :1]).to(device, torch.float64 if device.type != "mps" else torch.float32),
            there=exists.to(device),
            known=seen.to(dtype),
            hidden=hidden.to(device, dtype),
            base=factor.expect(values),
            factor=factor,
            shift=shift,
            scale=scale,
            classes=classes,
        )

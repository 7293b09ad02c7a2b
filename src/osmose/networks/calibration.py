r"""What a network may be told of its inputs and targets before training: their law at each label, up to second order.

At every label the input of a network is x = a x0 + b e, and what it is to say is y = c x0 + d e, for items x0 of the
data and standard normal e. The four numbers are a `Levels` table; mean m and covariance C of x0 are fitted to the data.
The best prediction of y that is linear in x is then

    c m + (a c C + b d I) (a^2 C + b^2 I)^{-1} (x - a m),

which is all there is to say for Gaussian data. A network that adds it learns what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from osmose.errors import UserError


class Levels(NamedTuple):
    """Rows of rising labels, float64 (T,) each: x = signal x0 + noise e, y = target_signal x0 + target_noise e.

    `time` is a feature of the label that never falls, from -1 to 1.
    """

    label: Tensor
    time: Tensor
    signal: Tensor
    noise: Tensor
    target_signal: Tensor
    target_noise: Tensor

    def check(self) -> None:
        """Refuse rows that are out of order.

        Raises:
            UserError: labels that do not rise, or a time that falls or leaves [-1, 1].
        """
        if not bool((self.label.diff() > 0).all()):
            raise UserError("schedule: labels of the time have to rise along it, and these do not")
        if not bool((self.time.diff() >= 0).all()) or float(self.time.abs().max()) > 1 + 1e-9:
            raise UserError("schedule: the network's feature of time has to rise from -1 to 1, and this one does not")


#: Values of an event beyond which the matrix of its covariance is no longer small.
_MOST = 8192
#: Before a network is told of its levels: labels up to 1000, inputs as they come, nothing to predict.
_PLAIN = Levels(*torch.tensor([[0.0, -1.0, 1.0, 0.0, 0.0, 0.0], [1000.0, 1.0, 1.0, 0.0, 0.0, 0.0]]).double().T)


class Calibration(nn.Module):
    """Levels, and the moments of the items (D,), which are fitted, not trained.

    Attributes:
        mean: m, (D,).
        axes: eigenvectors of C in columns, the largest eigenvalue first, (D, D).
        spread: eigenvalues, (D,).
    """

    table: Tensor

    def __init__(self, dimension: int):
        super().__init__()
        if dimension > _MOST:
            raise UserError(
                f"network: events of {dimension} values are too large for its linear prediction (at most {_MOST}); "
                "train on smaller images (--downsample), or take another network"
            )
        self.mean = nn.Parameter(torch.zeros(dimension), requires_grad=False)
        self.axes = nn.Parameter(torch.eye(dimension), requires_grad=False)
        self.spread = nn.Parameter(torch.ones(dimension), requires_grad=False)
        self.register_buffer("table", torch.empty(0), persistent=False)  # follows from the schedule, wherever it is
        self.set_levels(_PLAIN)

    def set_levels(self, levels: Levels) -> None:
        """Take a table of labels.

        Raises:
            UserError: see `Levels.check`.
        """
        levels.check()
        table = torch.stack(list(levels), 1)
        if len(table) == 1:  # a schedule of one step: the same at every label
            table = torch.cat([table, table])
            table[1, 0] += 1
        self.table = table.to(self.mean)

    @torch.no_grad()
    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the moments of the items, float64 (D,) and (D, D)."""
        spread, axes = torch.linalg.eigh(covariance.double().cpu())
        largest = axes.abs().argmax(0, keepdim=True)
        axes = axes * torch.where(axes.gather(0, largest) < 0, -1.0, 1.0)
        self.mean.copy_(mean)
        self.axes.copy_(axes.flip(1))
        self.spread.copy_(spread.flip(0).clamp(min=0))

    def at(self, label: Tensor) -> Levels:
        """The row at each label (B,), (B, 1) each, by linear interpolation; beyond the ends, the row there."""
        labels = self.table[:, 0].contiguous()
        place = label.to(labels)
        right = torch.searchsorted(labels, place.detach().contiguous()).clamp(1, len(labels) - 1)
        low, high = self.table[right - 1], self.table[right]
        share = ((place - low[:, 0]) / (high[:, 0] - low[:, 0])).clamp(0, 1)[:, None]
        return Levels(*torch.lerp(low, high, share).split(1, 1))

    def centred(self, x: Tensor, levels: Levels) -> Tensor:
        """X - a m, (B, D)."""
        return x - levels.signal * self.mean

    def predicted(self, centred: Tensor, levels: Levels) -> Tensor:
        """The best linear prediction, (B, D), from what `centred` gave."""
        a, b = levels.signal, levels.noise
        total = (a**2 * self.spread + b**2).clamp(min=1e-20)
        gain = (a * levels.target_signal * self.spread + b * levels.target_noise) / total
        return levels.target_signal * self.mean + (centred @ self.axes * gain) @ self.axes.T

    def variances(self, levels: Levels, items: Tensor) -> Tensor:
        """The variances a^2 v + b^2 of inputs whose items have variances v (K,), (B, K)."""
        return levels.signal**2 * items + levels.noise**2


def calibrations(network: nn.Module) -> list[Calibration]:
    """Those in a network; none in most."""
    return [module for module in network.modules() if isinstance(module, Calibration)]

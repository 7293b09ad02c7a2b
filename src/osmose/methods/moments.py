"""Mean and covariance of training data, gathered in one pass: what methods are fitted to or started from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.methods.messages import Batch

#: Values in an item beyond which D x D matrices, and their decompositions, are no longer a cheap beginning.
_MOST = 8192
#: Added to the variances of data without levels, as a share of their mean.
_RELATIVE_RIDGE = 1e-6


def level_step(spec: DataSpec) -> Tensor | None:
    """The distance of neighbouring levels in model units, float64, broadcastable to an event; None without levels."""
    if spec.levels is None or spec.range is None:
        return None
    low, high = spec.range
    step = (high - low) / (spec.levels - 1) / torch.tensor(spec.scale, dtype=torch.float64)
    return step.view(-1, *(1,) * (len(spec.shape) - 1))


def require_affordable(spec: DataSpec) -> None:
    """Refuse data whose covariance would fill the memory.

    Raises:
        UserError: too many values in an item.
    """
    if spec.dimension > _MOST:
        raise UserError(
            f"data: items of {spec.dimension} values need a covariance of {spec.dimension} x {spec.dimension}; at most "
            f"{_MOST} values can be fitted: train on smaller images (--downsample), or take vae or sngan"
        )


class Moments:
    """Sizes and means of the classes of a data set and the covariance that they share, float64, on the CPU.

    Batches are joined by the pairwise update (Chan, Golub, LeVeque 1979, eq. 2.1), class by class, so that nothing is
    lost to the difference of two large sums and the result does not depend on how the data are cut up.

    Args:
        spec: the form of the data.
        num_classes: classes that are told apart; 1 for the moments of everything together.

    Attributes:
        counts: items of each class, shape (K,).
        means: of each class, model units, shape (K, D), D = spec.dimension.
        scatter: sum over items of (x - mean)(x - mean)^T, each about the mean of its class, shape (D, D).
    """

    def __init__(self, spec: DataSpec, num_classes: int = 1):
        self.spec = spec
        self.counts = torch.zeros(num_classes, dtype=torch.float64)
        self.means = torch.zeros(num_classes, spec.dimension, dtype=torch.float64)
        self.scatter = torch.zeros(spec.dimension, spec.dimension, dtype=torch.float64)

    @classmethod
    def of(cls, items: Iterable[Batch], spec: DataSpec, num_classes: int = 1) -> Moments:
        """The moments of all items; with several classes each batch says the classes of its items."""
        moments = cls(spec, num_classes)
        for batch in items:
            moments.update(batch.x0, batch.condition if num_classes > 1 else None)
        return moments

    def update(self, x: Tensor, classes: Tensor | None = None) -> None:
        """Take in items, shape (B, *event), of given classes, int64 (B,), or of the only one.

        Raises:
            UserError: several classes, and items that do not say theirs.
        """
        if classes is None and len(self.counts) > 1:
            raise UserError("data: the class of every training item is needed, and these have none")
        rows = x.detach().flatten(1).cpu().double()
        classes = torch.zeros(len(rows), dtype=torch.int64) if classes is None else classes.cpu()
        counts = torch.bincount(classes, minlength=len(self.counts)).double()
        means = torch.zeros_like(self.means).index_add_(0, classes, rows) / counts.clamp(min=1)[:, None]
        centred, shift = rows - means[classes], means - self.means
        total = self.counts + counts
        share = (counts / total.clamp(min=1))[:, None]
        self.scatter += centred.T @ centred + (shift * self.counts[:, None] * share).T @ shift
        self.means += shift * share
        self.counts = total

    def covariance(self) -> Tensor:
        """The covariance within classes (maximum likelihood), with a ridge that makes it definite, shape (D, D).

        Data with levels get step^2 / 12 on the diagonal, the variance of uniform noise one level wide: this is the
        covariance of the dequantised data. Others get a millionth of the mean variance.
        """
        covariance = self.scatter / self.counts.sum()
        step = level_step(self.spec)
        if step is None:
            ridge = (_RELATIVE_RIDGE * covariance.diagonal().mean()).clamp(min=1e-12).expand(self.spec.dimension)
        else:
            ridge = (step.square() / 12).expand(self.spec.shape).flatten()
        return covariance + ridge.diag()

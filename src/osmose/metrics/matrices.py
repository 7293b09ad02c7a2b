"""Feature matrices: what every distance takes, and how big ones are gone through in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from osmose.errors import UserError

#: Entries of a distance or kernel matrix held at once: 2**22 float64 are 32 MiB.
BLOCK_ENTRIES = 2**22


def matrix(x: Tensor, name: str, least: int = 2) -> Tensor:
    """`x` as float64 of shape (n, d).

    Args:
        x: shape (n, d), or (n,) which is read as (n, 1).
        name: what the message calls it.
        least: smallest n that makes sense for the caller.

    Raises:
        UserError: not a matrix, fewer than `least` rows, or NaN and infinity, with their number.
    """
    x = torch.as_tensor(x).detach().to(torch.float64)
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2 or x.shape[1] == 0:
        raise UserError(f"{name}: shape {tuple(x.shape)} given where a matrix (n, d) is due; flatten the events first")
    if len(x) < least:
        raise UserError(f"{name}: {len(x)} rows given, at least {least} needed")
    bad = int((~torch.isfinite(x)).any(dim=1).sum())
    if bad:
        raise UserError(f"{name}: {bad} of {len(x)} rows hold NaN or infinity")
    return x


def pair(x: Tensor, y: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both matrices, generated `x` (n, d) and real `y` (m, d).

    Raises:
        UserError: as `matrix`, or different numbers of columns.
    """
    x, y = matrix(x, "generated samples", least), matrix(y, "real samples", least)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"generated samples have {x.shape[1]} columns and real samples {y.shape[1]}")
    return x, y


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a (rows, columns) matrix, each of at most `BLOCK_ENTRIES` entries."""
    step = max(1, BLOCK_ENTRIES // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def subset(total: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of `total` row numbers without replacement, int64 (size,)."""
    return torch.randperm(total, generator=generator)[:size]


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, so that measuring never moves the global random state."""
    return torch.Generator().manual_seed(seed)


def resample(x: Tensor, generator: torch.Generator) -> Tensor:
    """As many rows of x (n, d), drawn with replacement: one bootstrap resample."""
    return x[torch.randint(len(x), (len(x),), generator=generator)]

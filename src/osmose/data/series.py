"""Data sets of time series: whole series or windows of them, scaled by the training part.

Stated rules. Without a window every series is one item; with one, items are windows of so many rows, and the last rows
of each series are held out, so that no window of the training part knows of them. Times of windows and of dates count
from their item's first; numbers of whole series stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from osmose.data.dataset import DataConfig, Dataset, DataSpec, SeriesForm
from osmose.data.splitting import split_indices
from osmose.data.timetables import Series, SeriesTable
from osmose.errors import UserError

#: Windows of one file hold so many numbers at most; longer files are cut with a stride.
_MOST_NUMBERS = 2**25
#: Median gaps of two series that differ by such a factor are two frequencies.
_FREQUENCIES = 8.0
#: Whole series of which a part can be held out.
FEWEST = 3


def series_dataset(source: str, config: DataConfig, table: SeriesTable) -> Dataset:
    """A data set of the series of a table, or of windows of them.

    Raises:
        UserError: a series without any value, of another frequency, or too short; too few series or windows; a column
            that is constant or empty in the training part.
    """
    _check(source, table)
    if config.window is None:
        if len(table.series) < FEWEST:
            raise UserError(
                f"{source}: {len(table.series)} series, of which each is one item; give --id-column for a table of "
                "many series, or --window ROWS to learn from windows of this one"
            )
        train_rows, held_out_rows = split_indices(len(table.series), config.held_out, config.split_seed)
        train, held_out = (
            [_from_zero(table.series[int(i)]) if table.unit else table.series[int(i)] for i in rows]
            for rows in (train_rows, held_out_rows)
        )
        split = f"{len(held_out)} series chosen at random with split seed {config.split_seed}"
    else:
        stretches = [_windows(source, series, config) for series in table.series]
        stride = config.stride or _stride(stretches, config.window, len(table.columns))
        train, held_out = ([s for pair in stretches for s in pair[k].cut(stride)] for k in (0, 1))
        split = f"windows of the last {config.held_out:.2%} of the rows of each series"
    from_first = bool(table.unit) or config.window is not None
    parts = _stacked(source, "training", train), _stacked(source, "held-out", held_out)
    return assembled(
        source,
        table.columns,
        *parts,
        split,
        time_column=table.time_column,
        id_column=table.id_column,
        unit=table.unit,
        from_first=from_first,
    )


@dataclass(frozen=True)
class Arrays:
    """Items of one part: values (N, C, L) float32 and times (N, L) float64, NaN where there is none."""

    values: Tensor
    times: Tensor


@dataclass(frozen=True)
class _Stretch:
    """Rows of a series of which windows are cut."""

    series: Series
    first: int
    stop: int
    window: int

    @property
    def count(self) -> int:
        return self.stop - self.first - self.window + 1

    def cut(self, stride: int) -> Iterator[Series]:
        for start in range(self.first, self.stop - self.window + 1, stride):
            rows = slice(start, start + self.window)
            window = Series(self.series.name, self.series.times[rows], self.series.values[rows])
            if np.isfinite(window.values).any():
                yield _from_zero(window)


def _windows(source: str, series: Series, config: DataConfig) -> tuple[_Stretch, _Stretch]:
    """The training and the held-out rows of a series."""
    assert config.window is not None
    rows, which = len(series.times), f" of series {series.name!r}" if series.name else ""
    held_out = round(config.held_out * rows)
    found = _Stretch(series, 0, rows - held_out, config.window), _Stretch(series, rows - held_out, rows, config.window)
    for name, part in zip(("training", "held-out"), found, strict=True):
        if part.count < 1:
            raise UserError(
                f"{source}: the {name} part{which} has {part.stop - part.first} rows, and window={config.window} needs "
                "as many; use a smaller window, or another data.held_out (the share of rows)"
            )
    return found


def _stride(parts: Sequence[tuple[_Stretch, _Stretch]], window: int, channels: int) -> int:
    numbers = sum(part.count for pair in parts for part in pair) * window * channels
    return max(1, math.ceil(numbers / _MOST_NUMBERS))


def _from_zero(series: Series) -> Series:
    return Series(series.name, series.times - series.times[0], series.values)


def _check(source: str, table: SeriesTable) -> None:
    gaps = {}
    for series in table.series:
        which = f"series {series.name!r}" if table.id_column else "the series"
        if not np.isfinite(series.values).any():
            raise UserError(f"{source}: {which} has no value at all; leave it out")
        if len(series.times) < 2:
            raise UserError(f"{source}: {which} has one row; at least 2 are needed")
        gaps[series.name] = float(np.median(np.diff(series.times)))
    usual = float(np.median(list(gaps.values())))
    for name, gap in gaps.items():
        if not usual / _FREQUENCIES < gap < usual * _FREQUENCIES:
            raise UserError(
                f"{source}: series {name!r} has a median gap of {gap:g} {table.unit}, others {usual:g}: these are two "
                "frequencies; train on them apart, or bring them to one"
            )


def _stacked(source: str, part: str, items: Sequence[Series]) -> Arrays:
    if not items:
        raise UserError(f"{source}: the {part} part has no window with a value in it")
    longest = max(len(series.times) for series in items)
    values = np.full((len(items), items[0].values.shape[1], longest), np.nan, dtype=np.float32)
    times = np.full((len(items), longest), np.nan)
    for index, series in enumerate(items):
        values[index, :, : len(series.times)] = series.values.T
        times[index, : len(series.times)] = series.times
    return Arrays(torch.from_numpy(values), torch.from_numpy(times))


def assembled(
    source: str,
    columns: tuple[str, ...],
    train: Arrays,
    held_out: Arrays,
    split: str,
    *,
    time_column: str = "time",
    id_column: str | None = None,
    unit: str = "",
    from_first: bool = False,
) -> Dataset:
    """A data set of two parts, scaled by the training part alone.

    Args:
        source: what the identity shall call it.
        columns: names of the values.
        train, held_out: the parts.
        split: how the second was chosen, in words.
        time_column, id_column: names in a table.
        unit: of times that were dates.
        from_first: whether times of an item count from its first.

    Raises:
        UserError: a column that is constant or empty in the training part.
    """
    length = max(train.values.shape[2], held_out.values.shape[2])
    train, held_out = _padded(train, length), _padded(held_out, length)
    wide = train.values.double()
    there = wide.isfinite()
    mean, deviation = _moments(wide, there)
    for index, name in enumerate(columns):
        known = wide[:, index][there[:, index]]
        if not len(known):
            raise UserError(f"{source}: column {name!r} has no value in the training part; leave it out (--columns)")
        if float(known.min()) == float(known.max()):
            raise UserError(
                f"{source}: column {name!r} is constant ({float(known[0]):g}) in the training part; leave it out "
                "(--columns)"
            )
    gaps = train.times.diff(dim=1)
    gap = float(gaps[gaps.isfinite()].median())
    regular = _regular(train, train.times[:1], gap) and _regular(held_out, train.times[:1], gap)
    form = SeriesForm(
        columns=columns,
        time_column=time_column,
        id_column=id_column,
        unit=unit,
        gap=gap,
        span=float(torch.nan_to_num(train.times - train.times[:, :1], nan=0.0).max()),
        memory=_memory(wide, train.times),
        from_first=from_first,
        first=float(train.times[:, 0].min()),
        regular=regular,
        times=tuple(train.times[0].tolist()) if regular else None,
    )
    return Dataset(
        source=source,
        spec=DataSpec(
            kind="series",
            shape=(len(columns), length),
            shift=tuple(mean.tolist()),
            scale=tuple(deviation.tolist()),
            series=form,
        ),
        train=train.values,
        held_out=held_out.values,
        split=split,
        train_times=train.times,
        held_out_times=held_out.times,
    )


def _moments(values: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the values of each column, float64 (C,)."""
    count = there.sum((0, 2))
    known = torch.where(there, values, 0.0)
    mean = known.sum((0, 2)) / count
    centred = torch.where(there, values - mean[:, None], 0.0)
    return mean, (centred.square().sum((0, 2)) / count).sqrt()


def _padded(part: Arrays, length: int) -> Arrays:
    more = length - part.values.shape[2]
    if not more:
        return part
    pad = torch.nn.functional.pad
    return Arrays(pad(part.values, (0, more), value=math.nan), pad(part.times, (0, more), value=math.nan))


def _regular(part: Arrays, times: Tensor, gap: float) -> bool:
    """Whether nothing is missing and all items have the same times, to rounding."""
    return bool(part.values.isfinite().all()) and bool(((part.times - times).abs() <= 1e-6 * gap).all())


def _memory(values: Tensor, times: Tensor) -> float:
    """The time in which correlations within an item fall to 1/e, from the squared differences of neighbours.

    It is that of an Ornstein-Uhlenbeck process with the variance that items have around their own means.
    """

    def mean_square(of: Tensor, known: Tensor) -> Tensor:
        return torch.where(known, of, 0).square().sum((0, 2)) / known.sum((0, 2)).clamp(min=1)

    there, jump = values.isfinite(), values.diff(dim=2)
    both = jump.isfinite()
    gap = times.diff(dim=1)
    if not bool(both.any()):
        return float(gap.nanmedian())
    own = torch.where(there, values, 0).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)
    within = mean_square(values - own, there).clamp(min=1e-30)
    kept = 1 - float((mean_square(jump, both) / (2 * within)).mean())
    return -float(gap[both.any(1)].mean()) / math.log(min(max(kept, 0.05), 0.9995))

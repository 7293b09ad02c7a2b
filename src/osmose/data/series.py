"""Time series that a user brings: tables with a time in each row, gaps and missing values allowed.

Stated rules. The time column is the first (besides that of ids), unless another is named; it holds numbers, or ISO
dates, which become numbers of the largest unit (days, hours, minutes, seconds) that fits into the median gap. Rows
may stand in any order, and are sorted within each series; two rows of one series with one time are refused. An empty
cell, NaN and NA are a missing value. Without a window every series is one item; with one, items are windows of so
many rows, and the last rows of each series are held out, so that no window of the training part knows of them. Times
of windows and of dates count from their item's first; numbers of whole series stay as they are.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from osmose.data.arrays import Archive
from osmose.data.assembly import named_path
from osmose.data.dataset import DataConfig, Dataset, DataSpec, SeriesForm
from osmose.data.locating import under_root
from osmose.data.splitting import split_indices
from osmose.errors import UserError, nearest

_MISSING = ("", "nan", "na", "n/a", "null", "none")
#: Seconds in each unit, the largest first.
UNITS = {"days": 86_400.0, "hours": 3_600.0, "minutes": 60.0, "seconds": 1.0}
#: Windows of one file hold so many numbers at most; longer files are cut with a stride.
_MOST_NUMBERS = 2**25
#: Median gaps of two series that differ by such a factor are two frequencies.
_FREQUENCIES = 8.0
_FEWEST = 3


@dataclass(frozen=True)
class Series:
    """One series of a table.

    Attributes:
        name: its id, "" where the table has none.
        times: float64 (n,), ascending, in units of time.
        values: float64 (n, C), NaN where missing.
    """

    name: str
    times: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class SeriesTable:
    """The series of one file.

    Attributes:
        unit: of times that were dates: days, hours, minutes or seconds since 1970; "" for numbers.
        time_column, id_column, columns: names in the file.
    """

    series: tuple[Series, ...]
    unit: str
    time_column: str
    id_column: str | None
    columns: tuple[str, ...]


#: ETTh1 of Zhou et al. 2021: hourly loads and oil temperature; the part that is used in print has 20 months.
ETTH1_ROWS = 14_400
#: Eight currencies of the Federal Reserve's H.10 release, from 1990-01-02 on.
FX8 = ("Australia", "United Kingdom", "Canada", "Switzerland", "China", "Japan", "New Zealand", "Singapore")
_FX8_FROM = 7306.0


def load_etth1(argument: str, config: DataConfig) -> Dataset:
    """ETTh1 under ROOT/timeseries: 6 loads and the oil temperature of a transformer, its first 14,400 hours.

    Raises:
        UserError: an argument, no such file, or what `series_dataset` refuses.
    """
    return series_dataset("etth1", config, _etth1(argument, config))


def load_fx8(argument: str, config: DataConfig) -> Dataset:
    """Dollars for a unit of 8 currencies under ROOT/timeseries, day by day, counted in rows: holidays have none.

    Rows in which a quotation is missing are left out, as in the benchmark `exchange_rate` that it stands for.

    Raises:
        UserError: an argument, no such file, or what `series_dataset` refuses.
    """
    return series_dataset("fx-8", config, _fx8(argument, config))


def _etth1(argument: str, config: DataConfig) -> SeriesTable:
    table = _named("etth1", argument, config, "ETTh1.csv.gz", None)
    series = table.series[0]
    return replace(table, series=(Series("", series.times[:ETTH1_ROWS], series.values[:ETTH1_ROWS]),))


def _fx8(argument: str, config: DataConfig) -> SeriesTable:
    table = _named("fx-8", argument, config, "fed_h10_daily_1971_2017.csv.gz", FX8)
    series = table.series[0]
    kept = (series.times >= _FX8_FROM) & np.isfinite(series.values).all(1)
    values = 1 / series.values[kept]
    return SeriesTable((Series("", np.arange(len(values), dtype=float), values),), "", "row", None, FX8)


def _named(source: str, argument: str, config: DataConfig, file: str, columns: Sequence[str] | None) -> SeriesTable:
    if argument:
        raise UserError(f"{source}:{argument}: takes no argument; write {source}")
    return read_table(under_root(source, config, ["timeseries"], file) / file, columns=columns)


def table_of(config: DataConfig) -> SeriesTable:
    """The table that a data set of windows was cut from.

    Raises:
        UserError: data that come from none, or a table that cannot be read.
    """
    name, _, argument = config.source.partition(":")
    if name in ("etth1", "fx-8"):
        return {"etth1": _etth1, "fx-8": _fx8}[name](argument, config)
    if name != "series":
        raise UserError(f"data: {config.source} is no table of series")
    return read_table(named_path("series", argument)[0], config.time_column, config.id_column, config.columns)


def load_series(argument: str, config: DataConfig) -> Dataset:
    """Series from the table `argument`, a .csv or .csv.gz, or from an .npz.

    An archive holds `x` (N, C, L), NaN where missing, `times` (N, L) or (L,), and may hold `columns`; `test` and
    `test_times` are a held-out part. Its series are items as they are.

    Raises:
        UserError: another ending; what `read_table` and `series_dataset` refuse.
    """
    path, source = named_path("series", argument)
    if path.suffix.lower() == ".npz":
        return _archive(path, source, config)
    table = read_table(path, config.time_column, config.id_column, config.columns)
    return series_dataset(source, config, table)


def read_table(
    path: Path,
    time_column: str | None = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    unit: str | None = None,
) -> SeriesTable:
    """The series of a .csv or .csv.gz with a header line.

    Args:
        path: the file.
        time_column: the first column that is not `id_column` if None.
        id_column: tells series apart; one series if None.
        columns: of values, in this order; all that are left if None.
        unit: of dates; found in the data if None.

    Raises:
        UserError: not a table of text, a column that is not there, a cell that is no number or no time (named by line
            and column), two rows of a series with one time.
    """
    source = path.name
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not source.lower().endswith((".csv", ".csv.gz")):
        raise UserError(f"{source}: should end in .csv, .csv.gz or .npz")
    header, rows = _rows(path)
    if id_column is not None:
        _column(source, "id_column", id_column, header)
    time_column = time_column or next(name for name in header if name != id_column)
    _column(source, "time_column", time_column, header)
    others = [name for name in header if name not in (time_column, id_column)]
    names = others if columns is None else [_column(source, "columns", name, others) for name in columns]
    if not names:
        raise UserError(f"{source}: a header line with a time and at least one column of values is needed")
    place = {name: header.index(name) for name in header}
    order = [place[name] for name in names]
    lines = np.array([line for line, _ in rows])
    values = np.array([[_value(source, header, line, row, i) for i in order] for line, row in rows])
    seconds, dated = _times(source, header, place[time_column], rows)
    if unit is not None and bool(unit) != dated:
        wanted = f"dates, in {unit}" if unit else "numbers"
        raise UserError(
            f"{source}: column {time_column!r} holds {'dates' if dated else 'numbers'}; needed are {wanted}"
        )
    ids = np.array([row[place[id_column]].strip() for _, row in rows]) if id_column else np.zeros(len(rows), dtype="U1")
    found = []
    for name in dict.fromkeys(ids.tolist()):
        own = (ids == name).nonzero()[0]
        own = own[np.argsort(seconds[own], kind="stable")]
        same = (np.diff(seconds[own]) == 0).nonzero()[0]
        if len(same):
            a, b = sorted(int(lines[own[same[0] + k]]) for k in (0, 1))
            which = f" of series {name!r}" if id_column else ""
            raise UserError(f"{source}: lines {a} and {b}{which} have one time; each can occur once: merge them")
        found.append(Series(name, seconds[own], values[own]))
    if dated:
        unit = unit or _unit_of(np.concatenate([np.diff(series.times) for series in found]))
        found = [Series(s.name, s.times / UNITS[unit], s.values) for s in found]
    return SeriesTable(tuple(found), unit or "", time_column, id_column, tuple(names))


def times_in(path: Path, time_column: str, unit: str) -> Tensor:
    """The times of a table, whatever else stands in it, float64 (L,), ascending, each once.

    Raises:
        UserError: not a table of text, no such column, a cell that is no time, dates for numbers or numbers for dates.
    """
    header, rows = _rows(path)
    place = header.index(_column(path.name, "time_column", time_column, header))
    seconds, dated = _times(path.name, header, place, rows)
    if bool(unit) != dated:
        wanted = f"dates, in {unit}" if unit else "numbers"
        held = "dates" if dated else "numbers"
        raise UserError(f"{path.name}: column {time_column!r} holds {held}; needed are {wanted}")
    return torch.from_numpy(np.unique(seconds) / (UNITS[unit] if unit else 1.0))


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row of cells with its line."""
    source = path.name
    opened = gzip.open if source.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: not a readable table of text ({error})") from None
    if len(header) == 1 and ";" in header[0]:
        raise UserError(f"{source}: has semicolons between its columns; commas are needed")
    if not header:
        raise UserError(f"{source}: empty; a header line with a time and columns of values is needed")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{source}: two columns are called {twice!r}")
    if not rows:
        raise UserError(f"{source}: has a header line and nothing below it")
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{source}: line {line} has {len(row)} cells where the header has {len(header)}")
    return header, rows


def _column(source: str, field: str, name: str, header: Sequence[str]) -> str:
    if name not in header:
        raise UserError(f"{source}: {field}: {name!r} is not a column; {nearest(name, header)}")
    return name


def _value(source: str, header: Sequence[str], line: int, row: Sequence[str], place: int) -> float:
    cell = row[place].strip()
    if cell.lower() in _MISSING:
        return math.nan
    try:
        number = float(cell)
    except ValueError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(
            f"{source}: line {line}, column {header[place]!r}: {cell!r} is not a finite number; leave a missing value "
            "empty"
        )
    return number


def _times(
    source: str, header: Sequence[str], place: int, rows: Sequence[tuple[int, list[str]]]
) -> tuple[np.ndarray, bool]:
    """The time of each row: numbers, or seconds since 1970 of dates; and whether they are dates."""
    first = rows[0][1][place].strip()
    dated = _number(first) is None
    if re.fullmatch(r"(19|20)\d{6}", first) and _seconds(first) is not None:
        raise UserError(f"{source}: column {header[place]!r} has dates like {first}; write them as 2024-05-31")
    found = np.empty(len(rows))
    for index, (line, row) in enumerate(rows):
        value = _seconds(row[place].strip()) if dated else _number(row[place])
        if value is None or not math.isfinite(value):
            kind = "finite number"
            if dated:
                kind = "date, as 2024-05-31 or 2024-05-31 13:00, all of one clock and without an offset"
            if line == rows[0][0]:
                kind += "; --time-column names another column of times, --id-column one that tells series apart"
            raise UserError(f"{source}: line {line}, column {header[place]!r}: {row[place]!r} is no {kind}")
        found[index] = value
    return found, dated


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _seconds(cell: str) -> float | None:
    try:
        moment = datetime.fromisoformat(cell)
    except ValueError:
        return None
    return None if moment.tzinfo else moment.replace(tzinfo=UTC).timestamp()


def _unit_of(gaps: np.ndarray) -> str:
    """The largest unit that the median gap (seconds) holds."""
    middle = float(np.median(gaps)) if len(gaps) else 1.0
    return next((unit for unit, seconds in UNITS.items() if middle >= seconds), "seconds")


def format_time(time: float, unit: str) -> str:
    """A time as it would stand in a file: a number, or an ISO date."""
    if not unit:
        return f"{time:.15g}"
    moment = datetime(1970, 1, 1) + timedelta(seconds=round(time * UNITS[unit], 3))
    text = moment.isoformat(sep=" ")
    return text.removesuffix(" 00:00:00") if unit == "days" else text


def series_dataset(source: str, config: DataConfig, table: SeriesTable) -> Dataset:
    """A data set of the series of a table, or of windows of them.

    Raises:
        UserError: a series without any value, of another frequency, or too short; too few series or windows; a column
            that is constant or empty in the training part.
    """
    _check(source, table)
    if config.window is None:
        if len(table.series) < _FEWEST:
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
    return assembled(source, table, *parts, split, from_first)


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
    source: str, table: SeriesTable, train: Arrays, held_out: Arrays, split: str, from_first: bool = False
) -> Dataset:
    """A data set of two parts, scaled by the training part alone.

    Args:
        source: what the identity shall call it.
        table: gives the names and the unit; its series are not looked at.
        train, held_out: the parts.
        split: how the second was chosen, in words.
        from_first: whether times of an item count from its first.

    Raises:
        UserError: a column that is constant or empty in the training part.
    """
    length = max(train.values.shape[2], held_out.values.shape[2])
    train, held_out = _padded(train, length), _padded(held_out, length)
    wide = train.values.double()
    there = wide.isfinite()
    mean, deviation = _moments(wide, there)
    for index, name in enumerate(table.columns):
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
        columns=table.columns,
        time_column=table.time_column,
        id_column=table.id_column,
        unit=table.unit,
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
            shape=(len(table.columns), length),
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


def _archive(path: Path, source: str, config: DataConfig) -> Dataset:
    for option in ("window", "stride", "time_column", "id_column", "columns"):
        if (given := getattr(config, option)) is not None:
            raise UserError(f"{option}: {given!r} given, and the series of {source}, an archive, are items as they are")
    with Archive(path) as archive:
        key = archive.first(("x", "train")) or "x"
        values = archive[key]
        columns: tuple[str, ...] = ()
        if values.ndim != 3 or values.dtype.kind not in "fiu" or not values.size:
            raise UserError(
                f"{source}: array {key!r} has dtype {values.dtype}, shape {values.shape}; series (N, C, L) are needed"
            )
        if "columns" in archive.keys:
            columns = tuple(str(name) for name in archive["columns"])
        columns = columns or tuple(f"x{i}" for i in range(values.shape[1]))
        if len(columns) != values.shape[1]:
            raise UserError(f"{source}: {len(columns)} names of columns for {values.shape[1]} columns")
        whole = _checked(source, key, values, archive["times"])
        held_out = None
        if "test" in archive.keys:
            held_out = _checked(source, "test", archive["test"], archive["test_times"])
            if held_out.values.shape[1] != values.shape[1]:
                raise UserError(
                    f"{source}: 'test' has {held_out.values.shape[1]} columns, and {key!r} {values.shape[1]}; both "
                    "parts need the same"
                )
    split = "the array 'test'"
    if held_out is None:
        if len(whole.values) < _FEWEST:
            raise UserError(f"{source}: {len(whole.values)} series; at least {_FEWEST} are needed")
        first, second = split_indices(len(whole.values), config.held_out, config.split_seed)
        held_out = Arrays(whole.values[second], whole.times[second])
        whole = Arrays(whole.values[first], whole.times[first])
        split = f"{len(second)} series chosen at random with split seed {config.split_seed}"
    return assembled(source, SeriesTable((), "", "time", None, columns), whole, held_out, split)


def _checked(source: str, key: str, values: np.ndarray, times: np.ndarray) -> Arrays:
    if values.ndim == 3 and values.shape[2] < 2:
        raise UserError(f"{source}: {key!r} has one time; series need at least 2")
    if values.ndim != 3 or times.shape not in ((values.shape[2],), (values.shape[0], values.shape[2])):
        raise UserError(
            f"{source}: {key!r} is {values.shape} and its times {times.shape}; (N, C, L) and (N, L) or (L,) are needed"
        )
    if np.isinf(values).any() or np.isinf(times).any():
        raise UserError(f"{source}: {key!r} or its times hold infinity; a missing value is NaN")
    x = torch.from_numpy(values.astype(np.float32))
    t = torch.from_numpy(np.array(np.broadcast_to(times.astype(np.float64), (len(x), x.shape[2]))))
    wrong = (t.diff(dim=1) <= 0).nonzero()
    if len(wrong):
        row, place = (int(v) for v in wrong[0])
        raise UserError(f"{source}: times of {key!r}[{row}] do not ascend at {place + 1}; sort them, each once")
    if bool((t.isnan().diff(dim=1).int() < 0).any()) or bool((x.isfinite() & t.isnan()[:, None]).any()):
        raise UserError(f"{source}: {key!r} has values without a time, or a missing time that is not at the end")
    empty = (~x.isfinite().flatten(1).any(1)).nonzero()
    if len(empty):
        raise UserError(f"{source}: {key!r}[{int(empty[0])}] has no value at all; leave it out")
    return Arrays(x, t)

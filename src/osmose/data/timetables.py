"""Tables with a time in each row: reading them, writing their times.

Stated rules. The time column is the first (besides that of ids), unless another is named; it holds numbers, or ISO
dates without an offset, which become numbers of the largest unit (days, hours, minutes, seconds) that fits into the
median gap. Rows may stand in any order, and are sorted within each series; two rows of one series with one time are
refused. An empty cell, NaN and NA are a missing value.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from osmose.data.arrays import number
from osmose.errors import UserError, nearest

_MISSING = ("", "nan", "na", "n/a", "null", "none")
#: Seconds in each unit, the largest first.
UNITS = {"days": 86_400.0, "hours": 3_600.0, "minutes": 60.0, "seconds": 1.0}


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
    if id_column is not None and not bool((ids != "").all()):
        line = int(lines[(ids == "").nonzero()[0][0]])
        raise UserError(f"{source}: line {line}, column {id_column!r}: is empty; it tells series apart")
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


def with_values(
    path: Path, table: SeriesTable, values: dict[str, np.ndarray], text: Callable[[float], str]
) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a file as they stand, each missing value replaced by what is given.

    Args:
        path: the file.
        table: what `read_table` made of it.
        values: by the name of a series, of the form of its values; others are left as they are.
        text: how a value is written.
    """
    header, rows = _rows(path)
    place = {name: header.index(name) for name in header}
    seconds, _ = _times(path.name, header, place[table.time_column], rows)
    times = seconds / (UNITS[table.unit] if table.unit else 1.0)
    where = {(s.name, time): index for s in table.series for index, time in enumerate(s.times.tolist())}
    found = []
    for time, (_, row) in zip(times.tolist(), rows, strict=True):
        name = row[place[table.id_column]].strip() if table.id_column else ""
        cells = list(row)
        if name in values:
            for column, label in enumerate(table.columns):
                if cells[place[label]].strip().lower() in _MISSING:
                    cells[place[label]] = text(float(values[name][where[name, time], column]))
        found.append(cells)
    return header, found


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
    value = number(cell)
    if value is None or not math.isfinite(value):
        raise UserError(
            f"{source}: line {line}, column {header[place]!r}: {cell!r} is not a finite number; leave a missing value "
            "empty, or name the columns that hold values (--columns)"
        )
    return value


def _times(
    source: str, header: Sequence[str], place: int, rows: Sequence[tuple[int, list[str]]]
) -> tuple[np.ndarray, bool]:
    """The time of each row: numbers, or seconds since 1970 of dates; and whether they are dates."""
    first = rows[0][1][place].strip()
    dated = number(first) is None
    if re.fullmatch(r"(19|20)\d{6}", first) and _seconds(first) is not None:
        raise UserError(f"{source}: column {header[place]!r} has dates like {first}; write them as 2024-05-31")
    found = np.empty(len(rows))
    for index, (line, row) in enumerate(rows):
        value = _seconds(row[place].strip()) if dated else number(row[place])
        if value is None or not math.isfinite(value):
            kind = "finite number"
            if dated:
                kind = "date, as 2024-05-31 or 2024-05-31 13:00, all of one clock and without an offset"
            if line == rows[0][0]:
                kind += "; --time-column names another column of times, --id-column one that tells series apart"
            raise UserError(f"{source}: line {line}, column {header[place]!r}: {row[place]!r} is no {kind}")
        found[index] = value
    return found, dated


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
        return f"{time:.13g}"
    moment = datetime(1970, 1, 1) + timedelta(seconds=round(time * UNITS[unit], 3))
    text = moment.isoformat(sep=" ")
    return text.removesuffix(" 00:00:00") if unit == "days" else text

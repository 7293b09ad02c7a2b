"""Tables of series: times as they are written, quantiles at each of them, pictures of both."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from osmose.analysis.filling import Filled
from osmose.data.dataset import SeriesForm
from osmose.data.timetables import UNITS, Series, SeriesTable, format_time, read_table, with_values
from osmose.errors import UserError
from osmose.training import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Levels of quantiles that are written unless others are asked for.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def read_times(text: str) -> Tensor:
    """Times that are written as T,T,... or as FROM:TO:COUNT, float64 (L,).

    Raises:
        UserError: neither, or times that do not ascend.
    """
    try:
        if text.count(":") == 2:
            first, last, count = text.split(":")
            times = torch.linspace(float(first), float(last), int(count), dtype=torch.float64)
        else:
            times = torch.tensor([float(part) for part in text.split(",")], dtype=torch.float64)
    except (ValueError, RuntimeError):
        raise UserError(f"--times: {text!r} is not valid: write T,T,... or FROM:TO:COUNT, as 0:1:50") from None
    if not len(times) or not bool(times.isfinite().all()) or bool((times.diff() <= 0).any()):
        raise UserError(f"--times: {text!r} is not valid: times have to ascend, each once")
    return times


def read_quantiles(text: str) -> tuple[float, ...]:
    """Levels that are written as 0.1,0.5,0.9.

    Raises:
        UserError: something that is not between 0 and 1, or twice the same.
    """
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels) or len(set(levels)) < len(levels):
        raise UserError(f"--quantiles: {text!r} is not valid: write levels between 0 and 1, as 0.1,0.5,0.9")
    return tuple(sorted(levels))


def series_of(path: Path, form: SeriesForm) -> SeriesTable:
    """The series of a file that has the columns of a run.

    Raises:
        UserError: a column that is not there, dates for numbers or numbers for dates, and what `read_table` refuses.
    """
    return read_table(path, form.time_column, form.id_column, form.columns, form.unit)


def write_series(path: Path, data: Tensor, times: Tensor, form: SeriesForm) -> None:
    """Write sampled series (n, C, L) at times (n, L) as a .csv: a row for each time of each."""
    header = ["sample", form.time_column, *form.columns]

    def rows() -> Iterable[list[Any]]:
        for index, (values, at) in enumerate(zip(data.mT, times, strict=True)):
            for time, row in zip(at.tolist(), values.tolist(), strict=True):
                if time == time:
                    yield [index, format_time(time, ""), *(_number(value) for value in row)]

    _write_csv(path, header, rows())


def quantile_rows(
    filled: Sequence[tuple[str, Filled]], form: SeriesForm, levels: Sequence[float], at: Sequence[Tensor]
) -> tuple[list[str], list[list[Any]]]:
    """A header, and a row for each value that was drawn: series, time, column, mean and quantiles.

    Args:
        filled: name and samples of each series.
        form: of the run.
        levels: of the quantiles.
        at: of each series the values that were drawn, bool (C, L).
    """
    ids = [form.id_column] if form.id_column else []
    header = [*ids, form.time_column, "column", "mean", *(f"q{level:g}" for level in levels)]
    rows: list[list[Any]] = []
    wanted = torch.tensor(levels, dtype=torch.float64)
    for (name, found), where in zip(filled, at, strict=True):
        quantiles = found.samples.double().quantile(wanted, dim=0)
        means = found.samples.double().mean(0)
        for place in range(len(found.times)):
            time = format_time(float(found.times[place]), form.unit)
            for column, label in enumerate(form.columns):
                if bool(where[column, place]):
                    numbers = [means[column, place], *quantiles[:, column, place]]
                    start = [name] if form.id_column else []
                    rows.append([*start, time, label, *(float(f"{float(number):.7g}") for number in numbers)])
    return header, rows


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write rows as .csv or .parquet.

    Raises:
        UserError: parquet without pandas and pyarrow.
    """
    if path.suffix.lower() == ".csv":
        _write_csv(path, header, rows)
        return
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            f"--out: {path.name} needs pandas and pyarrow; install them with: pip install 'osmose[series]', or write "
            ".csv"
        ) from None
    with files.replacing(path) as temporary:
        pandas.DataFrame([list(row) for row in rows], columns=list(header)).to_parquet(temporary, index=False)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    files.write_bytes(path, text.getvalue().encode())


def _number(value: float) -> str:
    return "" if value != value else f"{value:.7g}"


def write_filled(path: Path, source: Path, table: SeriesTable, filled: dict[str, Filled]) -> None:
    """Write the table of `source` again as it stands, each missing value replaced by the median of its samples."""
    medians = {name: found.samples.double().quantile(0.5, dim=0).T.numpy() for name, found in filled.items()}
    _write_csv(path, *with_values(source, table, medians, _number))


def fan_chart(
    filled: Sequence[tuple[str, Filled]], form: SeriesForm, drawn: Sequence[Tensor], truth: Sequence[Series] = ()
) -> Figure:
    """What is known and what was drawn: medians, and bands of 50 and 90 %, a panel for each column.

    Args:
        filled: name and samples of each series; the first three are shown.
        form: of the run.
        drawn: of each series the values that were drawn, bool (C, L).
        truth: what came, if it is known, to be shown besides.
    """
    from matplotlib.figure import Figure

    shown = list(zip(filled, drawn, strict=True))[:3]
    columns = list(enumerate(form.columns))[:8]
    across = min(2, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(6 * across, 2.6 * down * len(shown)), dpi=110, layout="constrained")
    panels = figure.subplots(down * len(shown), across, squeeze=False).ravel()
    for axes in panels[len(columns) * len(shown) :]:
        axes.set_axis_off()
    for index, ((name, found), where) in enumerate(shown):
        for column, label in columns:
            axes = panels[index * len(columns) + column]
            times = _axis(found.times.numpy(), form.unit)
            axes.plot(times, found.values[column], ".-", c="0.35", linewidth=0.9, markersize=2, label="known")
            samples, gaps = found.samples[:, column].double(), where[column]
            for low, high, alpha in ((0.05, 0.95, 0.2), (0.25, 0.75, 0.35)):
                band = samples.quantile(torch.tensor([low, high], dtype=torch.float64), dim=0)
                for number, run in enumerate(_runs(gaps)):
                    # From the last known value on, so that nothing is between the two.
                    name_of = None if number else f"{high - low:.0%}"
                    axes.fill_between(
                        times[run], *band[:, run].numpy(), color="tab:blue", alpha=alpha, linewidth=0, label=name_of
                    )
            median = samples.quantile(0.5, dim=0)
            for number, run in enumerate(_runs(gaps)):
                axes.plot(times[run], median[run], c="tab:blue", linewidth=1.2, label=None if number else "median")
            if index < len(truth):
                axes.plot(
                    _axis(truth[index].times, form.unit),
                    truth[index].values[:, column],
                    c="tab:red",
                    linewidth=0.9,
                    label="what came",
                )
            axes.set_title(f"{name} {label}".strip(), fontsize=9)
            axes.set_xlabel("" if form.unit else form.time_column, fontsize=7)
            axes.tick_params(labelsize=7)
            if form.unit:
                axes.tick_params(axis="x", rotation=20)
    panels[0].legend(fontsize=7)
    return figure


def _axis(times: np.ndarray, unit: str) -> np.ndarray:
    """Times as an axis shows them: dates, or the numbers that they are."""
    return (times * UNITS[unit] * 1000).round().astype("datetime64[ms]") if unit else times


def _runs(where: Tensor) -> list[slice]:
    """Stretches of neighbouring places, each with the known ones at its ends."""
    places = where.nonzero().flatten().tolist()
    found: list[slice] = []
    for place in places:
        if found and place < found[-1].stop:
            found[-1] = slice(found[-1].start, min(place + 2, len(where)))
        else:
            found.append(slice(max(place - 1, 0), min(place + 2, len(where))))
    return found

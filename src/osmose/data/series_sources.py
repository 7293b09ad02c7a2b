"""Where series come from: a user's table or archive, and two data sets by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from osmose.data.arrays import Archive
from osmose.data.assembly import named_path
from osmose.data.dataset import DataConfig, Dataset
from osmose.data.locating import under_root
from osmose.data.series import FEWEST, Arrays, assembled, series_dataset
from osmose.data.splitting import split_indices
from osmose.data.timetables import Series, SeriesTable, read_table
from osmose.errors import UserError

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
        if len(whole.values) < FEWEST:
            raise UserError(f"{source}: {len(whole.values)} series; at least {FEWEST} are needed")
        first, second = split_indices(len(whole.values), config.held_out, config.split_seed)
        held_out = Arrays(whole.values[second], whole.times[second])
        whole = Arrays(whole.values[first], whole.times[first])
        split = f"{len(second)} series chosen at random with split seed {config.split_seed}"
    return assembled(source, columns, whole, held_out, split)


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

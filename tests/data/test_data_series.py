"""Tables of time series: what is read, how it is cut and scaled, and every refusal with the line it names."""

import gzip
import math

import numpy as np
import pytest
import torch

from osmose.data.dataset import DataConfig
from osmose.data.timetables import format_time, read_table
from osmose.errors import UserError


def write(folder, text, name="series.csv"):
    path = folder / name
    path.write_text(text)
    return path


def load(path, **options):
    return DataConfig.parse({"source": f"series:{path}", **options}).load()


def long_table(folder, rows=100, dates=False):
    lines = ["when,a,b"]
    for i in range(rows):
        when = f"2024-01-{1 + i // 24:02d} {i % 24:02d}:00" if dates else str(0.5 * i)
        lines.append(f"{when},{math.sin(i / 5):.6f},{i % 7}")
    return write(folder, "\n".join(lines))


def many(folder, series=12):
    rng = np.random.default_rng(0)
    lines = ["id,t,x,y"]
    for s in range(series):
        for t in np.sort(rng.random(5 + s % 3)):
            lines.append(f"s{s},{t:.6f},{rng.normal():.6f},{rng.normal():.6f}")
    return write(folder, "\n".join(lines))


def test_windows_of_one_table(tmp_path):
    found = load(long_table(tmp_path), window=10)
    form = found.spec.series
    assert found.spec.shape == (2, 10)
    assert (form.columns, form.unit, form.gap, form.span, form.regular) == (("a", "b"), "", 0.5, 4.5, True)
    assert form.from_first
    # The last 10 rows are held out: one window; 90 rows of training hold 81.
    assert (len(found.train), len(found.held_out)) == (81, 1)
    assert torch.equal(found.train_times[3], 0.5 * torch.arange(10, dtype=torch.float64))
    assert torch.allclose(found.train[3, 0], torch.sin(torch.arange(3, 13) / 5), atol=1e-5)
    assert float(found.held_out[0, 1, 0]) == 90 % 7


def test_no_window_of_training_knows_what_is_held_out(tmp_path):
    text = "t,x\n" + "\n".join(f"{i},{i}" for i in range(200))
    found = load(write(tmp_path, text), window=20, held_out=0.25)
    assert float(found.train.max()) == 149
    assert float(found.held_out.min()) == 150
    assert float(found.held_out.max()) == 199


def test_scaling_is_that_of_the_training_part_alone(tmp_path):
    text = "t,x\n" + "\n".join(f"{i},{(i % 5) if i < 90 else 1000 + i}" for i in range(100))
    found = load(write(tmp_path, text), window=5)
    assert found.spec.shift[0] == pytest.approx(2, abs=0.1)
    assert found.spec.scale[0] == pytest.approx(math.sqrt(2), abs=0.1)


def test_many_series_of_their_own_lengths(tmp_path):
    found = load(many(tmp_path), id_column="id")
    assert found.spec.shape == (2, 7)
    assert not found.spec.series.regular
    assert (len(found.train), len(found.held_out)) == (11, 1)
    lengths = found.train_times.isfinite().sum(1)
    assert set(lengths.tolist()) == {5, 6, 7}
    assert torch.equal(found.train[:, 0].isfinite(), found.train_times.isfinite())
    assert bool((found.train_times.diff(dim=1).nan_to_num(1.0) > 0).all())
    assert not found.spec.series.from_first
    again = load(many(tmp_path), id_column="id")
    assert again.identity.sha256 == found.identity.sha256
    assert load(many(tmp_path), id_column="id", split_seed=1).identity.sha256 != found.identity.sha256


def test_dates_become_numbers_of_the_largest_unit(tmp_path):
    hours = load(long_table(tmp_path, dates=True), window=10)
    assert (hours.spec.series.unit, hours.spec.series.gap) == ("hours", 1.0)
    table = read_table(tmp_path / "series.csv")
    assert format_time(float(table.series[0].times[30]), "hours") == "2024-01-02 06:00:00"
    days = write(tmp_path, "d,x\n2024-02-28,1\n2024-02-29,2\n2024-03-01,3\n", "days.csv")
    table = read_table(days)
    assert table.unit == "days"
    assert np.diff(table.series[0].times).tolist() == [1.0, 1.0]
    assert format_time(float(table.series[0].times[1]), "days") == "2024-02-29"
    assert [format_time(t, "") for t in (0.25, 1700000000123.0, 1700000000.123)] == [
        "0.25",
        "1700000000123",
        "1700000000.123",
    ]


def test_rows_in_any_order_and_missing_cells(tmp_path):
    text = "t,x,y\n" + "\n".join(f"{i},{'' if i % 4 == 0 else i},{'NA' if i == 7 else -i}" for i in reversed(range(60)))
    found = load(write(tmp_path, text), window=6)
    assert not found.spec.series.regular
    first = found.train[0]
    assert first[0].isnan().tolist() == [True, False, False, False, True, False]
    assert first[1].tolist() == [0, -1, -2, -3, -4, -5]
    assert bool(found.train_times.isfinite().all())


def test_chosen_columns_and_gzip(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(long_table(tmp_path).read_bytes()))
    found = load(path, window=10, columns=["b"])
    assert found.spec.series.columns == ("b",)
    assert found.train.shape[1] == 1


def test_an_archive_of_series(tmp_path):
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(20, 2, 6)), np.sort(rng.random((20, 6)), axis=1)
    x[3, 0, 2] = np.nan
    np.savez(tmp_path / "a.npz", x=x, times=t, test=x[:4] + 1, test_times=t[:4], columns=["u", "v"])
    found = load(tmp_path / "a.npz")
    assert (len(found.train), len(found.held_out), found.spec.series.columns) == (20, 4, ("u", "v"))
    assert found.train[3, 0, 2].isnan()
    np.savez(tmp_path / "b.npz", x=x[:, :, :], times=np.arange(6.0))
    assert load(tmp_path / "b.npz").split.startswith("2 series chosen at random")


def test_memory_is_that_of_the_process(tmp_path):
    rng, rho = np.random.default_rng(0), math.exp(-1 / 4)
    x = np.zeros(4000)
    for i in range(1, 4000):
        x[i] = rho * x[i - 1] + math.sqrt(1 - rho**2) * rng.normal()
    text = "t,x\n" + "\n".join(f"{i},{v:.6f}" for i, v in enumerate(x))
    found = load(write(tmp_path, text), window=400)
    assert found.spec.series.memory == pytest.approx(4, rel=0.15)


REFUSED = [
    ("t,x\n1,2\n1,3\n2,4\n", {}, "lines 2 and 3 have one time; each can occur once"),
    ("t,x\n1,2\ntwo,3\n", {}, "line 3, column 't': 'two' is no finite number"),
    ("t,x\n2024-01-01,2\n5,3\n", {}, "line 3, column 't': '5' is no date"),
    ("t,x\n2024-01-01T00:00+02:00,2\n", {}, "is no date, .* all of one clock and without an offset"),
    ("t,x\n20240131,2\n20240201,3\n", {}, "column 't' has dates like 20240131; write them as 2024-05-31"),
    ("t,x\n1,2\n2,inf\n", {}, "line 3, column 'x': 'inf' is not a finite number; leave a missing value empty"),
    ("t,x\n1,2\n2,abc\n", {}, "line 3, column 'x': 'abc' is not a finite number"),
    ("t,x\n1,2\n2,3,4\n", {}, "line 3 has 3 cells where the header has 2"),
    ("t\n1\n", {}, "a header line with a time and at least one column of values is needed"),
    ("t,x,x\n1,2,3\n", {}, "two columns are called 'x'"),
    ("t,x\n", {}, "has a header line and nothing below it"),
    ("t,x\n1,2\n2,3\n", {"time_column": "time"}, "time_column: 'time' is not a column; choose one of t, x"),
    ("t,x\n1,2\n2,3\n", {"columns": ["y"]}, "columns: 'y' is not a column"),
    ("t,x\n1,2\n2,3\n", {"id_column": "id"}, "id_column: 'id' is not a column"),
    ("t,x\n1,2\n2,3\n3,4\n", {}, "1 series, of which each is one item; give --id-column .* or --window ROWS"),
    ("t,x\n1,2\n2,3\n3,4\n", {"window": 5}, "the training part has 3 rows, and window=5 needs as many"),
    ("t,x\n" + "\n".join(f"{i},5" for i in range(40)), {"window": 3}, r"column 'x' is constant \(5\) in the training"),
    ("t,x,y\n" + "\n".join(f"{i},{i}," for i in range(40)), {"window": 3}, "column 'y' has no value in the training"),
    ("t,x\n" + "\n".join(f"{i}," for i in range(40)), {"window": 3}, "the series has no value at all"),
    (
        "id,t,x\n" + "\n".join(f"{s},{t * (24 if s == 'c' else 1)},{t}" for s in "abcd" for t in range(5)),
        {"id_column": "id", "time_column": "t"},
        "series 'c' has a median gap of 24 , others 1: these are two frequencies",
    ),
    (
        "id,t,x\na,1,2\na,2,3\nb,1,2\nb,2,\nc,1,\nc,2,\n",
        {"id_column": "id", "time_column": "t"},
        "series 'c' has no value at all; leave it out",
    ),
    ("id,t,x\na,1,2\na,1,3\n", {"id_column": "id", "time_column": "t"}, "lines 2 and 3 of series 'a' have one time"),
]


@pytest.mark.parametrize(("text", "options", "message"), REFUSED)
def test_tables_that_cannot_be(tmp_path, text, options, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, text), **options)


def test_archives_and_files_that_cannot_be(tmp_path):
    x, t = np.zeros((5, 1, 4)), np.arange(4.0)
    cases = [
        ({"x": x[0], "times": t}, r"shape \(1, 4\); series \(N, C, L\) are needed"),
        ({"x": x, "times": t[:3]}, "its times"),
        ({"x": x, "times": t[::-1]}, "do not ascend"),
        ({"x": np.full_like(x, np.inf), "times": t}, "infinity"),
        ({"x": x, "times": np.where(t == 1, np.nan, t)}, "without a time"),
        ({"x": np.where(np.arange(5)[:, None, None] == 2, np.nan, x), "times": t}, r"'x'\[2\] has no value at all"),
        ({"x": x, "times": t, "columns": ["a", "b"]}, "2 names of columns for 1 columns"),
        ({"x": x}, "no array 'times'"),
        ({"x": x[..., :1], "times": t[:1]}, "'x' has one time; series need at least 2"),
        ({"x": x + t, "times": t, "test": np.zeros((2, 3, 4)), "test_times": t}, "'test' has 3 columns, and 'x' 1"),
    ]
    for arrays, message in cases:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=message):
            load(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"should end in \.csv, \.csv\.gz or \.npz"):
        load(write(tmp_path, "t,x\n1,2\n", "t.txt"))
    np.savez(tmp_path / "a.npz", x=x, times=t)
    with pytest.raises(UserError, match=r"columns: .* given, and the series of series:a\.npz, an archive"):
        load(tmp_path / "a.npz", columns=["x"])
    with pytest.raises(UserError, match=r"window: 4 is for series: and text: data"):
        DataConfig.parse({"source": "digits", "window": 4}).load()


def test_dates_where_numbers_were_learned(tmp_path):
    path = write(tmp_path, "t,x\n2024-01-01,1\n2024-01-02,2\n")
    with pytest.raises(UserError, match="column 't' holds dates; needed are numbers"):
        read_table(path, unit="")
    path = write(tmp_path, "t,x\n1,1\n2,2\n")
    with pytest.raises(UserError, match="column 't' holds numbers; needed are dates, in days"):
        read_table(path, unit="days")


def test_windows_without_a_value_are_left_out_and_a_part_of_them_is_refused(tmp_path):
    rows = [f"{i},{'' if i >= 90 else i % 7}" for i in range(100)]
    with pytest.raises(UserError, match="the held-out part has no window with a value in it"):
        load(write(tmp_path, "t,x\n" + "\n".join(rows)), window=8)


def test_times_that_differ_by_rounding_are_alike(tmp_path):
    text = "t,x\n" + "\n".join(f"{i / 10},{i % 7}" for i in range(100))
    form = load(write(tmp_path, text), window=8).spec.series
    assert form.regular
    assert form.times == pytest.approx([i / 10 for i in range(8)])


def test_common_times_need_not_be_even(tmp_path):
    x, t = np.random.default_rng(0).normal(size=(20, 1, 4)), np.array([0.0, 1, 2, 9])
    np.savez(tmp_path / "a.npz", x=x, times=t)
    spec = load(tmp_path / "a.npz").spec
    assert spec.some_times(2).tolist() == [[0, 1, 2, 9]] * 2

"""Time series through every command: train, resume, sample, forecast, impute, backtest, evaluate, refusals."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import osmose as library
from osmose.cli.main import main
from osmose.methods.stochastic_process import DSPDConfig
from osmose.training.run import Run
from osmose.training.trainer import Trainer

NET = ["network=rnn", "network.width=8", "network.depth=1", "sampling.num_steps=4", "schedule.num_steps=30"]
SHORT = ["training.batch_size=8", "training.preview_samples=3", "--steps", "4", "--threads", "1", "--quiet"]
HOURS = ["--window", "24", "horizon=6", "data.held_out=0.2", *NET]
MANY = ["--data", "series:many.csv", "--id-column", "id", *NET]


def hourly(rows, gaps=()):
    lines = ["when,a,b"]
    for i in range(rows):
        a, b = f"{math.sin(i / 4):.4f}", f"{10 + i % 5}"
        lines.append(f"2024-03-{1 + i // 24:02d} {i % 24:02d}:00,{'' if i in gaps else a},{b}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with tables, and runs: hours (any task), ahead (forecasts), many (series by id); not to be changed."""
    folder = tmp_path_factory.mktemp("series")
    (folder / "hours.csv").write_text(hourly(200))
    (folder / "gaps.csv").write_text(hourly(60, gaps=(5, 6, 30, 59)))
    rng = np.random.default_rng(0)
    rows = [["id", "t", "x"]]
    for name in range(12):
        rows += [[f"s{name}", f"{t:.4f}", f"{math.sin(6 * t) + name / 10:.4f}"] for t in np.sort(rng.random(9))]
    with (folder / "many.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    data = ["--data", f"series:{folder}/hours.csv", *HOURS]
    main(["train", "dspd", *data, *SHORT, "--out", str(folder / "hours")])
    main(["train", "dspd", *data, *SHORT, "task=forecast", "local=true", "--out", str(folder / "ahead")])
    cspd = ["--data", f"series:{folder}/many.csv", "--id-column", "id", *NET[:4]]
    main(["train", "cspd", *cspd, *SHORT, "task=generate", "--out", str(folder / "many")])
    return folder


pytestmark = pytest.mark.usefixtures("work")


def table(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def test_what_was_trained():
    run = Run.open(Path("hours"))
    form = run.config.spec.series
    assert (form.columns, form.unit, form.gap, form.regular, form.from_first) == (("a", "b"), "hours", 1.0, True, True)
    assert (run.config.method.kind, run.config.method.task, run.config.method.horizon) == ("dspd", "any", 6)
    assert run.config.method.kernel.kind == "ou"
    assert run.model().kernel.length_scale == pytest.approx(form.memory, rel=0.01)
    assert run.config.identity.source == "series:hours.csv"
    assert all((Path(name) / "samples" / "step_00000004.png").is_file() for name in ("hours", "ahead", "many"))


@pytest.mark.parametrize("kind", ["hours", "many"])
def test_a_run_that_was_stopped_is_taken_up_again(osmose, monkeypatch, kind):
    if kind == "hours":
        words = ["dspd", "--data", "series:hours.csv", *HOURS]
    else:
        words = ["cspd", "--data", "series:many.csv", "--id-column", "id", *NET[:4], "task=generate"]
    optimise = Trainer.optimise
    monkeypatch.setattr(Trainer, "optimise", lambda t, w: 1 / 0 if t.step == 2 else optimise(t, w))
    with pytest.raises(ZeroDivisionError):
        osmose("train", *words, *SHORT, "--out", "parts", "training.checkpoint_every=1")
    monkeypatch.setattr(Trainer, "optimise", optimise)
    assert osmose("train", "--out", "parts", "--resume", "--quiet", "--threads", "1").status == 0
    whole, parts = Run.open(Path(kind)), Run.open(Path("parts"))
    assert whole.hash() == parts.hash()


def test_samples_as_a_picture_an_archive_and_a_table(osmose):
    assert osmose("sample", "many", "-n", "5", "--out", "s.png", "--quiet").status == 0
    assert Image.open("s.png").size[0] > 300
    assert osmose("sample", "many", "-n", "5", "--out", "s.npz", "--quiet", "--batch-size", "2").status == 0
    with np.load("s.npz") as made:
        assert made["samples"].shape == (5, 1, 9)
        assert made["times"].shape == (5, 9)
        assert (np.diff(made["times"]) > 0).all()
        samples = made["samples"]
    assert osmose("sample", "many", "-n", "5", "--out", "s.csv", "--quiet").status == 0
    rows = table("s.csv")
    assert list(rows[0]) == ["sample", "t", "x"]
    assert len(rows) == 45
    assert float(rows[9]["x"]) == pytest.approx(float(samples[1, 0, 0]), rel=1e-4)
    assert osmose("sample", "many", "-n", "2", "--times", "0:1:4", "--out", "at.csv", "--quiet").status == 0
    assert [float(row["t"]) for row in table("at.csv")] == pytest.approx([0, 1 / 3, 2 / 3, 1] * 2)
    assert osmose("sample", "hours", "-n", "3", "--trajectory", "--out", "t.png", "--quiet").status == 0


def test_a_forecast(osmose):
    answer = osmose(
        "forecast", "ahead", "--history", "hours.csv", "--samples", "20", "--out", "f.csv", "--paths", "p.npz"
    )
    assert answer.status == 0, answer.err
    rows = table("f.csv")
    assert list(rows[0]) == ["when", "column", "mean", "q0.05", "q0.25", "q0.5", "q0.75", "q0.95"]
    assert [row["when"] for row in rows[::2]] == [f"2024-03-09 {8 + i:02d}:00:00" for i in range(6)]
    with np.load("p.npz") as paths:
        assert paths["samples"].shape == (1, 20, 2, 6)
        last = np.quantile(paths["samples"][0, :, 1, 5].astype(float), 0.25)
        assert float(rows[-1]["q0.25"]) == pytest.approx(last, rel=1e-5)
    assert all(float(row["q0.05"]) <= float(row["q0.5"]) <= float(row["q0.95"]) for row in rows)
    assert Image.open("f.png").size[1] > 200
    again = osmose(
        "forecast", "ahead", "--history", "hours.csv", "--samples", "20", "--out", "g.csv", "--quiet", "--json"
    )
    assert Path("f.csv").read_text() == Path("g.csv").read_text()
    assert json.loads(again.out)["horizon"] == 6


def test_a_forecast_at_other_times_and_levels(osmose):
    Path("at.csv").write_text("when,x\n2024-03-09 09:30,\n2024-03-09 11:00,\n")
    words = ["--history", "hours.csv", "--samples", "5", "--quantiles", "0.9,0.1", "--quiet"]
    assert osmose("forecast", "hours", *words, "--at", "at.csv", "--out", "f.csv").status == 0
    rows = table("f.csv")
    assert list(rows[0])[2:] == ["mean", "q0.1", "q0.9"]
    assert sorted({row["when"] for row in rows}) == ["2024-03-09 09:30:00", "2024-03-09 11:00:00"]


def test_a_forecast_of_every_series_of_a_table_as_parquet(osmose):
    pandas = pytest.importorskip("pandas")
    main(["train", "dspd", *MANY, *SHORT, "horizon=3", "--out", "by-id"])
    assert (
        osmose("forecast", "by-id", "--history", "many.csv", "--samples", "4", "--out", "f.parquet", "--quiet").status
        == 0
    )
    found = pandas.read_parquet("f.parquet")
    assert found["id"].nunique() == 12
    assert len(found) == 36


def test_info_of_a_table_takes_what_training_takes(osmose):
    answer = osmose("info", "series:hours.csv", "window=24", "held_out=0.2")
    assert answer.status == 0, answer.err
    assert "series of a, b at up to 24 times, 1 hours apart (median), all alike" in answer.out
    assert "osmose train dspd" in answer.out
    assert "unknown field" in osmose("info", "series:hours.csv", "windows=24").err


def test_gaps_are_filled(osmose):
    answer = osmose("impute", "hours", "gaps.csv", "--samples", "10", "--out", "filled.csv", "--quiet")
    assert answer.status == 0, answer.err
    before, after = table("gaps.csv"), table("filled.csv")
    assert len(after) == 60
    assert all(row["a"] for row in after)
    assert [float(row["b"]) for row in after] == [float(row["b"]) for row in before]
    known = [i for i, row in enumerate(before) if row["a"]]
    assert [float(after[i]["a"]) for i in known] == pytest.approx([float(before[i]["a"]) for i in known], abs=1e-6)
    quantiles = table("filled.quantiles.csv")
    assert [row["when"][8:13] for row in quantiles] == ["01 05", "01 06", "02 06", "03 11"]
    assert float(after[30]["a"]) == pytest.approx(float(quantiles[2]["q0.5"]), rel=1e-4)
    assert Path("filled.png").is_file()


def test_what_is_not_missing_stays_as_it_is_written(osmose):
    """Rows in their order, other columns, numbers with their zeros."""
    lines = Path("gaps.csv").read_text().splitlines()
    head, rows = lines[0], lines[1:]
    rows = [row + f",note {i}" for i, row in enumerate(reversed(rows))]
    when, _, b, note = rows[2].split(",")
    rows[2] = ",".join([when, "7.00", b, note])
    Path("odd.csv").write_text("\n".join([head + ",remark", *rows]) + "\n")
    answer = osmose("impute", "hours", "odd.csv", "--samples", "4", "--out", "filled.csv", "--quiet")
    assert answer.status == 0, answer.err
    before, after = (Path(name).read_text().splitlines() for name in ("odd.csv", "filled.csv"))
    assert len(before) == len(after) == 61
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert len(changed) == 4
    assert all(not before[i].split(",")[1] for i in changed)
    assert all(float(after[i].split(",")[1]) == float(after[i].split(",")[1]) for i in changed)


def test_a_side_file_is_no_more_written_over_its_source_than_the_table(osmose):
    Path("x.quantiles.csv").write_text(Path("gaps.csv").read_text())
    answer = osmose("impute", "hours", "x.quantiles.csv", "--out", "x.csv", "--quiet")
    assert answer.status == 2
    assert "--out: x.quantiles.csv is read here, and would be lost" in answer.err
    assert Path("x.quantiles.csv").read_text() == Path("gaps.csv").read_text()


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_column_of_which_nothing_is_known_is_a_guess(osmose):
    table = [line.split(",") for line in Path("hours.csv").read_text().splitlines()]
    place = table[0].index("a")
    lines = [table[0], *[[cell if i != place else "" for i, cell in enumerate(row)] for row in table[1:]]]
    Path("empty.csv").write_text("\n".join(",".join(line) for line in lines))
    answer = osmose("impute", "hours", "empty.csv", "--samples", "2", "--out", "guess.csv")
    assert answer.status == 0, answer.err
    assert "column 'a': has no known value at all; what fills it is a guess" in answer.err


def test_information_on_a_long_series_takes_what_training_takes(osmose):
    answer = osmose("info", "series:hours.csv", "--window", "12")
    assert answer.status == 0, answer.err
    assert "osmose train dspd --data series:hours.csv --window 12 --out RUN" in answer.out


@pytest.mark.parametrize(
    ("task", "command"),
    [
        ("any", "osmose sample RUN -n 64"),
        ("generate", "osmose sample RUN -n 64"),
        ("forecast", "osmose backtest RUN"),
        ("impute", "osmose impute RUN FILE"),
    ],
)
def test_what_one_does_next_is_what_the_run_is_for(task, command):
    assert DSPDConfig(task=task).use.format(run="RUN").startswith(command)


def test_a_backtest(osmose):
    answer = osmose("backtest", "ahead", "--windows", "3", "--samples", "5", "--period", "5", "--json")
    assert answer.status == 0, answer.err
    values = json.loads(answer.out)
    assert (values["windows"], values["horizon"]) == (3, 6)
    assert list(values["scores"]) == ["dspd", "last", "walk", "seasonal", "seasonal-walk", "kriging"]
    # Column b repeats after 5 rows: a seasonal forecast has it exactly.
    assert values["scores"]["seasonal"]["crps"] < values["scores"]["last"]["crps"]
    assert json.loads(Path("ahead/backtest/backtest.json").read_text()) == values
    shown = osmose("backtest", "many", "--windows", "2", "--samples", "4", "--quiet", "--out", "b")
    assert shown.status == 2  # it learned to draw whole series
    assert "task=generate" in shown.err


def test_scores_of_series_with_times_of_their_own(osmose):
    answer = osmose("evaluate", "many", "-n", "5", "--json", "--quiet")
    assert answer.status == 0, answer.err
    names = {score["name"] for score in json.loads(answer.out)["evaluations"][0]["scores"]}
    assert {"sw2", "energy", "roughness"} <= names
    assert osmose("evaluate", "ahead", "-n", "6", "--quiet").status == 0


def test_likelihoods_and_costs(osmose):
    bound = osmose("analyze", "likelihood", "hours", "-n", "3", "--steps", "3", "--quiet")
    assert "-log2 of the density at most" in bound.out
    exact = osmose("analyze", "likelihood", "many", "-n", "2", "--part", "train", "--steps", "2", "--quiet")
    assert exact.status == 0, exact.err
    assert "at most" not in exact.out
    cost = osmose("analyze", "cost", "hours", "--quiet")
    assert cost.status == 0, cost.err


def test_python_says_the_same():
    model = library.load("hours")
    times = torch.arange(24.0)
    known = torch.full((3, 2, 24), math.nan)
    known[:, :, :10] = torch.tensor([[0.5], [12.0]])
    made = model.sample(3, known=known, times=times)
    assert torch.equal(made.data[:, :, :10], known[:, :, :10])
    assert made.data.isfinite().all()


TRAIN = ["train", "dspd", "--data", "series:hours.csv", "--out", "n", "data.held_out=0.2"]
AHEAD = ["forecast", "ahead", "--history", "hours.csv"]
REFUSED = [
    (["train", "ddpm", *MANY[:4], "--out", "n"], "method: ddpm needs items alike, and these series have gaps or times"),
    (["train", "dspd", "--data", "digits", "--out", "n"], "method: dspd learns from series"),
    (TRAIN, "1 series, of which each is one item"),
    ([*TRAIN, "--window", "24", "horizon=24"], "horizon: 24 is not valid"),
    ([*TRAIN, "--window", "24", "network=unet"], "network.*'unet'"),
    ([*TRAIN, "--window", "24", "--columns", "a,c"], "columns: 'c' is not a column"),
    (["forecast", "hours"], "--history: required"),
    (["forecast", "hours", "--history", "many.csv"], r"many\.csv: time_column: 'when' is not a column"),
    ([*AHEAD, "--horizon", "9"], "horizon: 9 times asked for, and this run learned to forecast 6"),
    ([*AHEAD, "--horizon", "0"], "--horizon: 0 is not valid"),
    ([*AHEAD, "--horizon", "24"], "24 times asked for, and items of this run have 24"),
    ([*AHEAD, "--samples", "1"], "--samples: 1 is not valid: must be at least 2"),
    ([*AHEAD, "--quantiles", "0.5,1"], "--quantiles: '0.5,1' is not valid"),
    ([*AHEAD, "--out", "f.txt"], r"--out: f\.txt is not valid: should end in"),
    (["impute", "ahead", "gaps.csv"], "learned with task=forecast; gaps are filled by one"),
    (
        ["forecast", "ahead", "--history", "hours.csv", "--out", "hours.csv"],
        r"--out: hours\.csv is read here, and would",
    ),
    (
        ["forecast", "ahead", "--history", "hours.csv", "--at", "at.csv", "--out", "at.csv"],
        r"--out: at\.csv is read here",
    ),
    (["info", "hours", "--window", "3"], "--window: 3 is for data of series, and hours is none"),
    (["impute", "hours", "gaps.csv", "--out", "gaps.csv"], r"--out: gaps\.csv is read here, and would be lost"),
    (["train", "edm", *MANY[:4], "--out", "n"], "method: edm needs items alike, and these series have gaps"),
    (["impute", "hours", "hours.csv"], r"FILE: hours\.csv has no missing value; nothing to fill"),
    (["backtest", "ahead", "--windows", "9"], "windows: 9 of 6 rows reach into training: 40 rows were held out"),
    (["sample", "many", "--times", "0,0.5,0.2"], r"--times: '0,0\.5,0\.2' is not valid: times have to ascend"),
    (["sample", "many", "--times", "now"], "--times: 'now' is not valid: write T,T"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_refusals(osmose, words, message):
    answer = osmose(*words)
    assert answer.status == 2
    assert len(answer.err.strip().splitlines()) == 1
    assert re.search(message, answer.err), answer.err
    assert not Path("n").exists()
    assert not Path("f.csv").exists()

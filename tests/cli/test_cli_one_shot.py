"""Methods that sample in one go, and methods that are fitted in closed form, go through every command."""

import csv
import json
from pathlib import Path

import pytest

QUIET = ["--quiet", "--threads", "1"]
FLOW = ["transforms=2", "width=8", "--steps", "2", "--batch-size", "8"]


@pytest.fixture
def fitted(osmose, tmp_path, monkeypatch):
    """A working directory with the run `gaussian`."""
    monkeypatch.chdir(tmp_path)
    answer = osmose("train", "gaussian", "--data", "digits", "--out", "gaussian", *QUIET)
    assert answer.status == 0, answer
    return tmp_path


@pytest.mark.usefixtures("fitted")
def test_a_fit_is_a_run(osmose):
    assert sorted(path.name for path in Path("gaussian").iterdir()) == [
        *("checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "samples")
    ]
    assert [path.name for path in Path("gaussian/samples").iterdir()] == ["step_00000000.png"]
    lines = [json.loads(line) for line in Path("gaussian/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0]
    assert lines[0]["validation_loss"] < 1
    weights = Path("gaussian/model.safetensors").read_bytes()
    assert osmose("train", "--out", "gaussian", "--resume", "--quiet").status == 0
    assert Path("gaussian/model.safetensors").read_bytes() == weights
    assert osmose("sample", "gaussian", "-n", "9", "--out", "some.png").status == 0
    assert "9 samples, 0 network evaluations each" in osmose("sample", "gaussian", "-n", "9", "--out", "a.npz").out


@pytest.mark.usefixtures("fitted")
def test_a_fit_that_was_interrupted_is_made_again(osmose):
    weights = Path("gaussian/model.safetensors").read_bytes()
    Path("gaussian/model.safetensors").unlink()
    for path in sorted(Path("gaussian/checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert osmose("train", "--out", "gaussian", "--resume", "--quiet").status == 0
    assert Path("gaussian/model.safetensors").read_bytes() == weights


@pytest.mark.usefixtures("fitted")
def test_info_of_a_fit(osmose):
    told = json.loads(osmose("info", "gaussian", "--json").out)
    assert told["parameters"] == 1 + 64 + 64**2
    assert told["macs"] == 0
    assert told["seconds_per_step"] is None
    page = osmose("info", "gaussian").out
    assert "0.004 million (4,161)" in page
    assert "operations" not in page
    assert "time here" not in page
    assert "trained     0 of 0 steps" in page


@pytest.mark.usefixtures("fitted")
def test_one_shot_methods_are_evaluated_and_compared(osmose):
    words = ["--data", "digits", "training.preview_samples=4", *QUIET]
    assert osmose("train", "flow", *FLOW, "--out", "flow", *words).status == 0
    steps = ["--steps", "1", "--batch-size", "4", "sampling.num_steps=2", "network=mlp", "network.width=16"]
    assert osmose("train", "ddpm", *steps, "--out", "ddpm", *words).status == 0
    few = ["-n", "16", "--metrics", "sw2", *QUIET]
    titles = {run: osmose("evaluate", run, *few).out.split("samples/s")[0] for run in ("gaussian", "flow", "ddpm")}
    assert "gaussian: 0 network evaluations, " in titles["gaussian"]
    assert "flow: 1 network evaluations, " in titles["flow"]
    assert "ddpm: 2 steps, 2 network evaluations, " in titles["ddpm"]
    answer = osmose("compare", "gaussian", "flow", "ddpm", "--out", "side")
    assert answer.status == 0, answer
    rows = list(csv.DictReader(Path("side/comparison.csv").read_text().splitlines()))
    assert [(row["steps"], row["solver"], row["nfe"]) for row in rows] == [
        *(("", "", "0"), ("", "", "1"), ("2", "ddim", "2"))
    ]
    assert rows[0]["parameters_millions"] == "0.004"
    assert "None" not in Path("side/comparison.md").read_text() + answer.out
    told = json.loads(osmose("info", "flow", "--json").out)
    assert told["macs"] > 0
    assert told["seconds_per_step"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "gaussian", "--steps", "4"], "num_steps: 4 given, but gaussian samples in one go"),
        (["evaluate", "gaussian", "--solver", "ddim"], "solver: 'ddim' given, but gaussian samples in one go"),
        (["sample", "gaussian", "--steps", "4"], "num_steps: 4 given, but gaussian samples in one go"),
        (["sample", "gaussian", "clip=false"], "clip: False given, but gaussian samples in one go"),
        (["sample", "gaussian", "--label", "3"], "condition: this model was trained without classes"),
        (
            ["train", "gaussian", "--data", "digits", "--out", "new", "--steps", "5"],
            "training.steps: 5 is not valid: gaussian is fitted in closed form, in 0 steps",
        ),
        (
            ["train", "flow", "--data", "digits", "--out", "new", "--steps", "0"],
            "training.steps: 0 is not valid: must be at least 1",
        ),
        (
            ["train", "gaussian", "--data", "digits", "--out", "new", "--conditional"],
            "conditional: True is not valid: one Gaussian knows no classes; class-means does",
        ),
        (
            ["train", "class-means", "--data", "toy:swiss-roll", "--out", "new"],
            "class-means: needs data with classes, and these have none; take gaussian",
        ),
    ],
)
@pytest.mark.usefixtures("fitted")
def test_refused(refused, words, message):
    assert message in refused(*words)

"""`osmose surrogate` and `osmose analyze surrogate`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from osmose.cli.main import main

pytestmark = pytest.mark.usefixtures("runs")


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """A fitted Gaussian; not to be changed."""
    out = tmp_path_factory.mktemp("fitted") / "gaussian"
    main(["train", "gaussian", "--data", "digits", "--out", str(out), "--quiet"])
    return out


def test_two_runs_become_one_that_does_everything(osmose, gaussian):
    answer = osmose("surrogate", "digits", "--with", gaussian, "--t-mid", 0.5, "--out", "pair", "--steps", 4)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines() == [
        "wrote pair: samples of gaussian enter the chain of digits at t = 0.334 (step 334 of 1000), where "
        "sigma / alpha is 1.46",
        "next: osmose compare digits pair --out comparison",
    ]
    assert "2 network evaluations each" in osmose("sample", "pair", "-n", 4, "--out", "pair.png").out
    assert osmose("sample", "pair", "-n", 4, "--out", "whole.npz", "t_mid=1").status == 0
    assert osmose("evaluate", "pair", "-n", 100, "--metrics", "sw2", "--quiet").status == 0
    assert osmose("evaluate", "digits", "-n", 100, "--metrics", "sw2", "--quiet").status == 0
    assert osmose("compare", "digits", "pair", "--out", "comparison").status == 0
    told = osmose("info", "pair")
    assert told.status == 0
    assert "surrogate" in told.out
    assert "parent      digits (" in told.out


def test_the_time_may_be_a_step_number(osmose, gaussian):
    answer = osmose("surrogate", "digits", "--with", gaussian, "--t-mid", 250, "--out", "pair", "--json")
    assert json.loads(answer.out)["t_mid"] == 0.25
    assert json.loads(Path("pair/config.json").read_text())["method"]["sampling"]["t_mid"] == 0.25


def test_the_time_may_be_found(osmose, gaussian):
    words = ["--with", gaussian, "--t-mid", "auto", "--threshold", 1000, "-n", 100, "--steps", 20, "--quiet"]
    answer = osmose("surrogate", "digits", *words, "--out", "pair", "--json")
    values = json.loads(answer.out)
    assert values["t_mid"] == 0.05
    assert [one["t_mid"] for one in values["hand_overs"]][:3] == [0.05, 0.1, 0.15]
    answer = osmose("surrogate", "digits", *words, "--out", "pair2")
    assert answer.out.startswith("t_mid = 0.05: there and above, the surrogate is at most 1000 times as far from data")


def test_the_sweep(osmose, gaussian):
    words = ["-n", 100, "--t-mid", "100,0.5", "--threads", 1, "--quiet", "--metrics", "sw2,fd_clf"]
    answer = osmose("analyze", "surrogate", "digits", "--with", gaussian, *words, "solver=dpmpp-2m")
    assert (answer.status, answer.err) == (0, "")
    assert "chain alone" in answer.out
    stored = json.loads(Path("digits/surrogate/gaussian/surrogate.json").read_text())
    assert [point["t_mid"] for point in stored["points"]] == [0, 0.1, 0.5, None]
    assert stored["conditions"]["sampling"]["solver"]["kind"] == "dpmpp-2m"
    for name in ("surrogate", "beside"):
        with Image.open(f"digits/surrogate/gaussian/{name}.png") as image:
            assert image.size[0] > 200
    values = json.loads(osmose("analyze", "surrogate", "digits", "--with", gaussian, *words, "--json").out)
    assert values["wrote"][0] == "digits/surrogate/gaussian/surrogate.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "pair"], "--with: required: the surrogate"),
        (["--with", "toy"], "--out: required"),
        (["--with", "toy", "--out", "classes"], "--out: classes exists already"),
        (["--with", "toy", "--out", "pair"], "toy was trained on data of another source, toy:two-moons, than digits"),
        (["--with", "digits", "--out", "pair", "--t-mid", "half"], "--t-mid: 'half' is not valid: should be a time"),
        (["--with", "digits", "--out", "pair", "--t-mid", "1001"], "or a step number up to 1000"),
        (["--with", "digits", "--out", "pair", "--t-mid", "1.5"], "or a step number up to 1000"),
        (["--with", "digits", "--out", "pair", "--t-mid", "-1"], "t_mid: -1.0 is not valid"),
        (["--with", "digits", "--out", "pair", "--t-mid", "nan"], "t_mid: "),
        (["--with", "digits", "--out", "pair", "--threshold", "2"], "--threshold: is for --t-mid auto alone"),
        (["--with", "digits", "--out", "pair", "--t-mid", "auto", "--threshold", "0"], "--threshold: 0.0 is not valid"),
        (["--with", "digits", "--out", "pair", "--t-mid", "auto", "-n", "5000"], "n: 5000 is not valid: twice as many"),
        (["--with", "digits", "--out", "pair", "--steps", "3", "num_steps=4"], "num_steps: given twice"),
    ],
)
def test_a_pair_is_refused(refused, words, message):
    assert message in refused("surrogate", "digits", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--with: required"),
        (["--with", "digits", "--t-mid", "0.1,x"], "--t-mid: 'x' is not valid"),
        (["--with", "digits", "--t-mid", "0"], "none given above 0"),
        (["--with", "digits", "-n", "0"], "--num: 0 is not valid"),
        (["--with", "digits", "--metrics", "fidd", "-n", "100"], "unknown metric 'fidd'"),
        (["--with", "digits", "--out", "digits/config.json"], "is a file; name a folder"),
    ],
)
def test_a_sweep_is_refused(refused, words, message):
    assert message in refused("analyze", "surrogate", "digits", *words)


def test_a_pair_is_not_trained(refused):
    assert "surrogate: is put together, not trained" in refused("train", "surrogate", "--data", "digits", "--out", "x")

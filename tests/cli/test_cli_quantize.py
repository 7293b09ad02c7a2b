"""`osmose quantize`, and what computes a run, through the commands."""

import json
from pathlib import Path

import pytest

SHORT = ["--steps", "2", "--batch-size", "4", "training.validation_items=4", "training.preview_samples=0", "--quiet"]
MLP = ["--network", "mlp", "network.width=16", "network.depth=1", "sampling.num_steps=4"]

pytestmark = [pytest.mark.usefixtures("work"), pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from osmose.cli.main import main

    folder = tmp_path_factory.mktemp("quantize")
    main(["train", "edm", "--data", "toy:8-gaussians", *MLP, *SHORT, "--out", str(folder / "run")])
    return folder


@pytest.fixture
def no_openvino(monkeypatch):
    """As where `osmose[export]` is not installed."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else find(name, *more)
    )


@pytest.mark.usefixtures("no_openvino")
def test_a_run_of_integers_without_openvino(osmose):
    answer = osmose("quantize", "run", "--out", "small", "--items", 8, "--train", 3, "--batch-size", 4, "--quiet")
    assert answer.status == 0, answer
    assert "wrote small:" in answer.out
    assert "layers with" in answer.out
    assert "computed by torch, no faster than before: openvino is not installed; pip install 'osmose[export]'" in (
        " ".join(answer.out.split())
    )
    assert "next: osmose evaluate small --against run" in answer.out
    answer = osmose("sample", "small", "-n", 2, "--out", "x.png", "--quiet")
    assert answer.status == 0, answer
    assert "openvino is not installed" in answer.err
    assert osmose("sample", "small", "-n", 2, "--out", "y.png", "--runtime", "torch", "--quiet").err == ""
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()
    shown = osmose("info", "small").out
    assert "quantized   7-bit weights, 8-bit inputs" in shown or "quantized   8-bit weights, 8-bit inputs" in shown
    assert "trained     as the run that it was made from, and quantized" in shown
    assert "training step" not in shown
    refused = osmose("train", "--resume", "--out", "small", "--quiet")
    assert refused.status == 2
    assert "small: is quantized, and has nothing to train; take the run that it was made from" in refused.err
    again = osmose("quantize", "run", "--out", "small", "--resume", "--json")
    assert again.status == 0
    assert json.loads(again.out)["config"]["tuning"]["steps"] == 3
    evaluated = osmose("evaluate", "small", "--against", "run", "-n", 40, "--metrics", "sw2", "--quiet")
    assert evaluated.status == 0, evaluated
    refused = osmose("sample", "run", "-n", 2, "--out", "z.png", "--runtime", "openvino", "--quiet")
    assert refused.status == 2
    assert "runtime: openvino is not installed; pip install 'osmose[export]'" in refused.err


@pytest.mark.usefixtures("no_openvino")
def test_precision_by_step(osmose):
    words = ["quantize", "run", "--items", 4, "--bits", 3, "--weight-bits", 3, "--quiet", "--json"]
    found = json.loads(osmose(*words, "--out", "a", "--budget", 1e-6).out)
    assert found["steps"]["high"] > 0
    assert found["precision"]["low"] > found["precision"]["deviation"]
    found = json.loads(osmose(*words, "--out", "b", "--ends", 1, "--high", "bf16").out)
    assert found["steps"] == {"of": 4, "high": 2, "precision": "bf16"}
    answer = osmose(*words[:-1], "--out", "c", "--ends", 2)
    assert "all 4 steps are in fp32: nothing is left to integers" in answer.out
    assert "layers with" not in answer.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out: required"),
        (
            ["--out", "q", "--lr", 0.1],
            "--lr: given, and is of training with rounded weights",
        ),
        (["--out", "q", "--bits", 9], "--bits: 9 is not valid"),
        (["--out", "q", "--to", "int4"], "to: 'int4' is not valid"),
        (["--out", "q", "--ends", 3], "ends: 3 steps at each end are more than the 4 steps of the chain"),
        (["--out", "q", "--inputs", "some"], "inputs: 'some' is not valid"),
        (["--out", "q", "--calibration", "images"], "calibration: 'images' is not valid"),
        (["--out", "q", "--train", 0], "--train: 0 is not valid"),
        (["--out", "q", "--inputs", "dynamic", "--calibration", "noise"], "--calibration: given, and dynamic"),
        (["--out", "q", "--keep", "conv*"], "keep: 'conv*' matches no layer"),
        (["--out", "run"], "run exists already"),
        (["--out", "q", "--resume"], "no quantization was begun here"),
        (["--out", "q", "--resume", "--bits", 4], "--bits: given, but q is continued by its own settings"),
        (["--out", "q", "--threads", 0], "--threads: 0 is not valid"),
    ],
)
def test_refusals(osmose, words, message):
    answer = osmose("quantize", "run", *words)
    assert answer.status == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert not Path("q").exists()


def test_an_unknown_runtime(osmose):
    answer = osmose("sample", "run", "--runtime", "tensorrt")
    assert answer.status == 2
    assert "--runtime: 'tensorrt' is not valid: should be auto, torch, openvino" in answer.err

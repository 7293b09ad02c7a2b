"""Export and import through the commands."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

SHORT = ["--steps", "2", "--batch-size", "4", "training.validation_items=4", "training.preview_samples=0", "--quiet"]
UNET = [
    "network.mult=[1,2]",
    "network.attention=[]",
    "network.channels=8",
    "network.norm_groups=4",
    "network.group_channels=1",
]

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from osmose.cli.main import main

    folder = tmp_path_factory.mktemp("export")
    main(["train", "ddpm", "--data", "digits", *UNET, *SHORT, "--out", str(folder / "run")])
    small = ["--network", "dit", "network.width=16", "network.depth=1", "network.heads=2"]
    main(["train", "ddpm", "--data", "digits", *small, *SHORT, "--out", str(folder / "patches")])
    return folder


def test_there_and_back(osmose):
    answer = osmose("export", "run", "--to", "diffusers", "--out", "folder")
    assert answer.status == 0, answer
    assert "diffusers.DDPMPipeline.from_pretrained('folder')" in answer.out
    answer = osmose("import", "diffusers", "folder", "--data", "digits", "--out", "back")
    assert answer.status == 0, answer
    a, b = (load_file(Path(name, "model.safetensors")) for name in ("run", "back"))
    assert all((a[key] == b[key]).all() for key in a)
    assert osmose("sample", "back", "-n", 2, "--steps", 2, "--out", "x.png", "--quiet").status == 0
    words = ["distill", "tract", "back", "--out", "student", "--schedule", "4,1", "--steps", 2, "--batch-size", 4]
    words += ["--parametrization", "v"]
    assert osmose(*words, "--quiet").status == 0


def test_the_ten_lines_of_the_page(osmose):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    answer = osmose("export", "patches", "--to", "openvino", "--out", "FOLDER", "--steps", "4")
    assert answer.status == 0, answer
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    code = re.search(r"(    import json, numpy, openvino\n(?:    .*\n)+)", page).group(1)
    found = {}
    exec("\n".join(line[4:] for line in code.splitlines()), found)
    assert found["images"].shape == (16, 1, 8, 8)
    assert -0.1 <= float(found["images"].min()) <= float(found["images"].max()) <= 16.1
    assert np.std(found["images"]) > 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "run", "--out", "x"], "--to: required: one of diffusers, onnx, openvino"),
        (["export", "run", "--to", "tflite", "--out", "x"], "--to: 'tflite' is not valid: one of diffusers"),
        (["export", "run", "--to", "onnx"], "--out: required: the folder to make"),
        (["export", "run", "--to", "onnx", "--out", "run"], "--out: run exists already"),
        (["export", "run", "--to", "diffusers", "--steps", "3", "--out", "x"], "--steps: given, and a pipeline"),
        (["export", "nothing", "--to", "onnx", "--out", "x"], "nothing: not a run folder"),
        (["import", "diffusers", "run", "--data", "digits", "--out", "x"], "config.json: no such file; a folder of"),
        (["import", "diffusers", "run", "--out", "x"], "--data: required"),
        (["import", "diffusers", "run", "--data", "digits"], "--out: required"),
    ],
)
def test_what_is_refused(refused, words, message):
    assert message in refused(*words)

"""Functional diffusion through the commands."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import osmose as library
from osmose.cli.main import main
from osmose.training.run import Run
from osmose.training.trainer import Trainer

UVIT = [
    "--data",
    "digits",
    "--network",
    "uvit",
    "network.width=16",
    "network.depth=2",
    "network.heads=2",
    "sampling.num_steps=3",
]
IMPLICIT = ["--data", "digits", "--network", "implicit", "network.width=8", "network.inner_steps=1"]
SHORT = ["training.batch_size=8", "training.preview_samples=4", "training.validation_items=8", "--steps", "4"]
SHORT += ["sampling.num_steps=3", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the runs field (uvit), grid (mlp) and small (implicit); not to be changed."""
    folder = tmp_path_factory.mktemp("fdp")
    main(["train", "fdp", *UVIT, "--conditional", *SHORT, "--out", str(folder / "field")])
    main(["train", "fdp", "--data", "digits", "--network", "mlp", *SHORT, "--out", str(folder / "grid")])
    main(["train", "fdp", *IMPLICIT, *SHORT, "--out", str(folder / "small")])
    return folder


pytestmark = pytest.mark.usefixtures("work")


def test_what_was_trained(osmose):
    config = Run.open(Path("field")).config
    assert (config.method.kind, config.method.basis, config.method.network.patch) == ("fdp", "dct", 2)
    model = library.load("field")
    assert float(model.spread.std()) > 0  # fitted before training, and kept with the weights
    for name in ("field", "small"):
        answer = osmose("info", name)
        assert (answer.status, answer.err) == (0, "")
        assert list(Path(name, "samples").glob("*.png"))


@pytest.mark.parametrize("name", ["field", "small"])
def test_samples_at_another_resolution(osmose, name):
    for side in (8, 16):
        answer = osmose("sample", name, "-n", 4, f"resolution={side}", "--out", f"x{side}.npz", "--quiet")
        assert answer.status == 0, answer
        assert np.load(f"x{side}.npz")["samples"].shape == (4, 1, side, side)
    assert osmose("sample", name, "-n", 4, "resolution=24", "--out", "x.png", "--quiet").status == 0
    with Image.open("x.png") as image:
        assert image.size[0] >= 2 * 24


@pytest.mark.parametrize("solver", ["em", "pf-ode", "pc"])
def test_solvers(osmose, solver):
    answer = osmose(
        "sample", "field", "-n", 2, "--solver", solver, "--steps", 4, "--label", 3, "--out", "x.npz", "--json"
    )
    assert answer.status == 0, answer
    assert f'"nfe": {10 if solver == "pc" else 4}' in answer.out


def test_a_run_that_was_stopped_is_taken_up_again(osmose, monkeypatch):
    optimise = Trainer.optimise
    monkeypatch.setattr(Trainer, "optimise", lambda t, w: 1 / 0 if t.step == 2 else optimise(t, w))
    with pytest.raises(ZeroDivisionError):
        osmose("train", "fdp", *UVIT, "--conditional", *SHORT, "--out", "parts", "training.checkpoint_every=1")
    monkeypatch.setattr(Trainer, "optimise", optimise)
    assert osmose("train", "--out", "parts", "--resume", "--quiet").status == 0
    assert Run.open(Path("parts")).hash() == Run.open(Path("field")).hash()
    one, other = (library.load(name).state_dict() for name in ("field", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "field", "resolution=12"], "resolution: 12 x 12 is no multiple of 8 x 8"),
        (["sample", "field", "resolution=0"], "resolution: 0 is not valid"),
        (["sample", "field", "--solver", "ddim"], "solver: 'ddim' is not valid: should be 'posterior', 'em'"),
        (
            ["sample", "grid", "resolution=16"],
            "resolution: 16 is not that of the data, 8, and mlp is bound to its grid",
        ),
        (
            ["evaluate", "field", "resolution=16", "--quiet"],
            "resolution: samples of shape (1, 16, 16) are not compared",
        ),
        (["train", "fdp", "--data", "toy:two-moons", "--out", "x"], "fdp: needs functions on a grid"),
        (["train", "fdp", *IMPLICIT[:4], "network.inner_steps=0", "--out", "x"], "inner_steps: 0 without y_input"),
        (["train", "fdp", "--data", "digits", "spectrum=powr", "--out", "x"], "unknown spectrum 'powr'"),
        (["train", "fdp", "--data", "digits", "drift.value=0", "--out", "x"], "drift.value: 0 is not valid"),
    ],
)
def test_what_is_refused(refused, words, message):
    assert message in refused(*words)

"""Functional diffusion through the commands."""

import re
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
        answer = osmose("sample", name, "-n", 4, "--resolution", side, "--out", f"x{side}.npz", "--quiet")
        assert answer.status == 0, answer
        assert np.load(f"x{side}.npz")["samples"].shape == (4, 1, side, side)
    assert osmose("sample", name, "-n", 4, "resolution=24", "--out", "x.png", "--quiet").status == 0
    with Image.open("x.png") as image:
        assert image.size[0] >= 2 * 24


@pytest.mark.parametrize("name", ["field", "small", "grid"])
def test_samples_at_any_points(osmose, name):
    Path("points.csv").write_text("down,across\n0.0625,0.1875\n0.3,0.31\n1,0\n")
    for extra, out in ((["--at", "points.csv"], "some.npz"), ([], "all.npz")):
        answer = osmose("sample", name, "-n", 4, *extra, "--out", out, "--quiet")
        assert answer.status == 0, answer
    some, whole = (np.load(out)["samples"] for out in ("some.npz", "all.npz"))
    assert (some.shape, some.dtype, whole.dtype) == ((4, 1, 3), np.float32, np.uint8)
    assert np.array_equal(some[..., 0].round(), whole[:, :, 0, 1])  # the pixel there, between two levels
    answer = osmose("sample", name, "-n", 4, "--at", "points.csv", "--trajectory", "--out", "way.npz", "--quiet")
    assert answer.status == 0, answer
    assert np.load("way.npz")["states"].shape == (4, 4, 1, 3)


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        ("p,q\n0.5,1.5\n", [], "at: point 0 is (0.5, 1.5); coordinates have to be in [0, 1]"),
        ("p\n0.5\n", [], "at: point 0 has 1 coordinates, and functions here have 2"),
        ("p,q\n0.5,x\n", [], "line 2, column 'q': 'x' is not a finite number"),
        ("p,q\n0.5,0.5\n", ["--resolution", "16"], "resolution: given with at, whose points take the place of a grid"),
        ("p,q\n", [], "0 rows of numbers; at least 1 are needed"),
        ("p,q\n0.5,0.5\n", ["--out", "x.png"], "data of kind 'function' and shape (1, 1) have no picture; write .npz"),
    ],
)
def test_points_that_are_refused(refused, table, words, message):
    Path("points.csv").write_text(table)
    assert message in refused("sample", "field", "--at", "points.csv", "--out", "x.npz", *words)
    assert not Path("x.npz").exists()


def test_the_likelihood_of_the_levels(osmose):
    answer = osmose("analyze", "likelihood", "field", "-n", 20, "--steps", 50, "--quiet")
    assert answer.status == 0, answer
    assert "at most" in answer.out
    assert "17 levels" in answer.out
    assert "chain of 50 steps" in answer.out


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
        (
            ["analyze", "likelihood", "field", "--variance", "fixed_small"],
            "variance: 'fixed_small' given, and the chain",
        ),
        (["analyze", "likelihood", "field", "--steps", "1"], "num_steps: 1 is not valid: the bound needs 2 steps"),
        (["train", "fdp", "--data", "digits", "sampling.at=[[0.5,0.5]]", "--out", "x"], "sampling.at: is said when"),
        (["complete", "field", "x.npz", "at=[[0.5,0.5]]"], "at: whole items are completed"),
        (["train", "fdp", "--data", "toy:two-moons", "--out", "x"], "fdp: needs functions on a grid"),
        (["train", "fdp", *IMPLICIT[:4], "network.inner_steps=0", "--out", "x"], "inner_steps: 0 without y_input"),
        (["train", "fdp", "--data", "digits", "spectrum=powr", "--out", "x"], "unknown spectrum 'powr'"),
        (["train", "fdp", "--data", "digits", "drift.value=0", "--out", "x"], "drift.value: 0 is not valid"),
    ],
)
def test_what_is_refused(refused, words, message):
    assert message in refused(*words)


def test_completing_items_of_which_something_is_known(osmose):
    known = np.full((2, 1, 8, 8), np.nan, dtype=np.float32)
    known[:, :, :3] = 7.5
    np.savez("known.npz", known=known)
    answer = osmose("complete", "grid", "known.npz", "--samples", 3, "--out", "made.npz", "--quiet")
    assert answer.status == 0, answer.err
    with np.load("made.npz") as made:
        assert made["samples"].shape == (2, 3, 1, 8, 8)
        assert np.array_equal(made["samples"][:, :, :, :3], np.broadcast_to(known[:, None, :, :3], (2, 3, 1, 3, 8)))
        assert np.isfinite(made["samples"]).all()
        assert np.array_equal(made["known"], known, equal_nan=True)


def test_hiding_most_of_whole_items(osmose):
    assert osmose("sample", "grid", "-n", 3, "--out", "some.npz", "--quiet").status == 0
    words = ["complete", "grid", "some.npz", "--keep", 0.25, "--quiet"]
    answer = osmose(*words, "--samples", 2, "--out", "x.png", "--json")
    assert answer.status == 0, answer.err
    assert Image.open("x.png").size[0] > 200
    with np.load("some.npz") as some:  # of what is not whole nobody knows the truth
        part = np.where(np.arange(8) < 4, some["samples"], np.nan)
    np.savez("part.npz", known=part)
    assert osmose("complete", "grid", "part.npz", "--samples", 2, "--out", "y.png", "--quiet").status == 0
    across, down = zip(*(Image.open(name).size for name in ("x.png", "y.png")), strict=True)
    assert across[0] / down[0] > 1.2 * across[1] / down[1]  # a column more
    assert osmose(*words, "--out", "a.npz").status == 0
    assert osmose(*words, "--out", "b.npz").status == 0
    with np.load("a.npz") as a, np.load("b.npz") as b, np.load("some.npz") as some:
        assert np.array_equal(a["samples"], b["samples"])
        seen = ~np.isnan(a["known"])
        assert 0.1 < seen.mean() < 0.4
        assert np.array_equal(a["known"][seen], some["samples"][seen])


COMPLETE = ["complete", "grid", "some.npz"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (COMPLETE, r"FILE: some\.npz has no unknown value; nothing to complete \(--keep 0\.2"),
        ([*COMPLETE, "--keep", "1.5"], r"--keep: 1\.5 is not valid: must be at least 0 and below 1"),
        ([*COMPLETE, "--samples", "0"], "--samples: 0 is not valid: must be at least 1"),
        ([*COMPLETE, "--out", "x.txt"], r"--out: x\.txt is not valid: image does not go to a .txt"),
        (["complete", "grid", "odd.npz"], r"odd\.npz: items of shape \(1, 4, 4\); \(1, 8, 8\) are needed"),
        (["complete", "grid", "high.npz"], r"high\.npz: has values from 99 to 99; the data are in \(0\.0, 16\.0\)"),
        (["complete", "grid", "inf.npz"], r"inf\.npz: holds infinity; what is not known is NaN"),
        (["sample", "grid", "--resolution", "16"], "mlp is bound to its grid; uvit and implicit are not"),
    ],
)
def test_what_cannot_be_completed(osmose, words, message):
    arrays = {"some": np.ones((2, 1, 8, 8)), "odd": np.ones((2, 1, 4, 4)), "high": np.full((1, 1, 8, 8), 99.0)}
    for name, values in (arrays | {"inf": np.full((1, 1, 8, 8), np.inf)}).items():
        np.savez(f"{name}.npz", x=values.astype(np.float32))
    answer = osmose(*words)
    assert answer.status == 2
    assert re.search(message, answer.err), answer.err


def test_other_methods_do_not_complete(osmose):
    main(["train", "ddpm", "--data", "digits", "--network", "mlp", *SHORT, "--out", "plain"])
    np.savez("known.npz", known=np.full((1, 1, 8, 8), np.nan, dtype=np.float32))
    answer = osmose("complete", "plain", "known.npz")
    assert answer.status == 2
    assert "ddpm draws whole items; dspd, cspd, fdp, masked and token-diffusion fill in what is missing" in answer.err

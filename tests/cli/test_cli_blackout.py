"""Blackout diffusion and count data through every command."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import osmose as library
from osmose.analysis.likelihood import likelihood
from osmose.cli.main import main
from osmose.training.run import Run
from osmose.training.trainer import Trainer

MLP = ["network=mlp", "network.width=16", "network.depth=1", "schedule.num_steps=12", "sampling.num_steps=4"]
SHORT = ["training.batch_size=8", "training.preview_samples=4", "--steps", "4", "--threads", "1", "--quiet"]
TABLE = np.random.default_rng(0).poisson([1.0, 30.0, 400.0], (60, 3))
BITS = ["--data", "digits", "--levels", "2", *MLP]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with counts.csv and the runs bits (images) and rows (counts); not to be changed."""
    folder = tmp_path_factory.mktemp("blackout")
    with (folder / "counts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["few", "some", "many"], *TABLE.tolist()])
    main(["train", "blackout", *BITS, *SHORT, "--out", str(folder / "bits")])
    rows = ["--data", f"counts:{folder}/counts.csv", "--max-count", "500"]
    main(["train", "blackout", *rows, *MLP, *SHORT, "--out", str(folder / "rows")])
    return folder


pytestmark = pytest.mark.usefixtures("work")


def test_what_was_trained():
    bits, rows = Run.open(Path("bits")).config, Run.open(Path("rows")).config
    assert (bits.method.kind, bits.data.levels, bits.spec.levels, bits.spec.range) == ("blackout", 2, 2, (0, 16))
    assert (rows.spec.kind, rows.spec.levels, rows.data.max_count) == ("counts", 501, 500)
    # The ends of the schedules: 64 units at most of bits; of rows, as many as there are in the mean.
    assert bits.method.schedule.t_end == pytest.approx(math.log(640), abs=0.01)
    assert rows.method.schedule.t_end == pytest.approx(math.log(4310), abs=0.02)
    assert (bits.method.objective, bits.method.weighting) == ("continuous", "paper")
    model = library.load("rows")
    train = rows.data.load().train.double()
    assert model.mean.tolist() == pytest.approx(train.mean(0).tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["bits", "rows"])
def test_a_run_that_was_stopped_is_taken_up_again(osmose, monkeypatch, name):
    words = BITS if name == "bits" else ["--data", "counts:counts.csv", "--max-count", "500", *MLP]
    optimise = Trainer.optimise
    monkeypatch.setattr(Trainer, "optimise", lambda t, w: 1 / 0 if t.step == 2 else optimise(t, w))
    with pytest.raises(ZeroDivisionError):
        osmose("train", "blackout", *words, *SHORT, "--out", "parts", "training.checkpoint_every=1")
    monkeypatch.setattr(Trainer, "optimise", optimise)
    assert osmose("train", "--out", "parts", "--resume", "--quiet").status == 0
    assert Run.open(Path("parts")).hash() == Run.open(Path(name)).hash()


def test_accumulation_changes_nothing(osmose):
    answer = osmose("train", "blackout", *BITS, *SHORT, "--out", "parts", "training.accumulate=2")
    assert answer.status == 0, answer
    one, other = (library.load(name).state_dict() for name in ("bits", "parts"))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solver", ["bridge", "bridge-round", "tau-leap", "binomial"])
def test_samples_are_whole_numbers(osmose, solver):
    for name, dtype, shape, allowed in (
        ("bits", np.uint8, (1, 8, 8), {0, 16}),
        ("rows", np.int64, (3,), set(range(501))),
    ):
        found = []
        for size in (5, 23):
            words = ["--steps", 5, "--solver", solver, "--seed", 5, "--batch-size", size, "--out", f"{name}{size}.npz"]
            assert osmose("sample", name, "-n", 23, *words, "--quiet").status == 0
            found.append(np.load(f"{name}{size}.npz")["samples"])
        assert (found[0].dtype, found[0].shape) == (dtype, (23, *shape))
        assert set(found[0].flatten().tolist()) <= allowed
        assert len(set(found[0].flatten().tolist())) > 1 or solver == "bridge-round"
        assert np.array_equal(*found)
        want = library.load(name).sample(23, num_steps=5, solver=solver, seed=5).data
        assert np.array_equal(found[0], want.numpy().astype(dtype))


def test_pictures(osmose):
    for name in ("bits", "rows"):
        assert osmose("sample", name, "-n", 9, "--out", f"{name}.png", "--quiet").status == 0
        with Image.open(f"{name}.png") as image:
            assert min(image.size) > 20
        assert list(Path(name, "samples").glob("*.png"))


def test_counts_beyond_bytes_in_images_keep_their_values(osmose):
    images = np.random.default_rng(0).integers(0, 901, (40, 4, 4))
    images[0, 0, 0] = 900
    np.savez("deep.npz", x=images)
    answer = osmose("train", "blackout", "--data", "counts:deep.npz", *MLP, *SHORT, "--out", "deep")
    assert answer.status == 0, answer
    assert osmose("sample", "deep", "-n", 20, "--out", "x.npz", "--quiet").status == 0
    samples = np.load("x.npz")["samples"]
    assert (samples.dtype, samples.shape) == (np.int64, (20, 1, 4, 4))
    assert samples.max() > 255
    assert samples.max() <= 900


def test_scores(osmose):
    for name in ("bits", "rows"):
        answer = osmose("evaluate", name, "-n", 6 if name == "rows" else 100, "--metrics", "sw2", "--quiet", "--json")
        assert answer.status == 0, answer
        assert "sw2" in answer.out


def test_info(osmose):
    for name in ("bits", "rows"):
        answer = osmose("info", name)
        assert (answer.status, answer.err) == (0, "")
        assert "blackout" in answer.out
        assert json.loads(osmose("info", name, "--json").out)["parameters"] > 1000


@pytest.mark.parametrize("name", ["bits", "rows"])
def test_bits_per_dimension(osmose, name):
    answer = osmose("analyze", "likelihood", name, "-n", 6, "--out", "found", "--quiet")
    assert (answer.status, answer.err) == (0, "")
    assert "chain of 12 steps\n" in answer.out
    assert "noise, all t alike" not in answer.out
    stored = json.loads(Path("found/likelihood.json").read_text())
    assert stored["eps_error"] is None
    assert (stored["levels"], stored["prior"], len(stored["terms"])) == ({"bits": 2, "rows": 501}[name], 0, 12)
    run = Run.open(Path(name))
    want = likelihood(run.model(torch.device("cpu")), run.config.data.load(), n=6)
    assert stored["bits_per_dim"] == pytest.approx(want.bits, rel=1e-4)
    assert 0 < want.bits < 1.3 * math.log2(stored["levels"]) + 3
    with Image.open("found/likelihood.png") as image:
        assert image.size[0] > 800
    fewer = osmose("analyze", "likelihood", name, "-n", 6, "--steps", 3, "--out", "few", "--quiet", "--json")
    assert len(json.loads(fewer.out)["terms"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "bits", "--solver", "brige"], "solver: 'brige' is not valid: should be 'bridge', 'bridge-round'"),
        (["sample", "bits", "--steps", 13], "num_steps: 13 is more than the 12 times of the grid"),
        (["sample", "bits", "clip=true"], "clip: unknown field"),
        (["analyze", "likelihood", "bits", "--no-clip", "--quiet"], "clip: blackout has none to choose"),
        (["analyze", "likelihood", "bits", "--variance", "fixed_small", "--quiet"], "variance: blackout has none"),
        (
            ["train", "blackout", "--data", "toy:two-moons", "--out", "x"],
            "blackout: needs counts, and these data (points",
        ),
        (["train", "blackout", "--data", "digits", "--downsample", 2, "--out", "x"], "have no levels"),
        (["train", "blackout", "--data", "digits", "--levels", 1, "--out", "x"], "levels: 1 is not valid"),
        (
            ["train", "blackout", "--data", "digits", "--max-count", 20, "--out", "x"],
            "max_count: 20 is for counts: data",
        ),
        (["train", "blackout", "--data", "counts:counts.csv", "--max-count", 300, "--out", "x"], "column 'many': "),
        (["train", "blackout", *BITS, "weighting=likely", "--out", "x"], "weighting: 'likely' is not valid"),
        (["train", "blackout", *BITS, "schedule=linear", "--out", "x"], "unknown survival schedule 'linear'"),
        (["train", "blackout", *BITS, "schedule.num_steps=3", "--out", "x"], "num_steps: 4 is more than the 3 times"),
    ],
)
def test_what_is_refused(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize("method", ["tract", "scd", "dsno"])
def test_it_is_not_distilled(refused, method):
    message = refused("distill", method, "bits", "--out", "student")
    assert "blackout" in message


@pytest.mark.filterwarnings("default:schedule.t_end")
def test_survivors_are_warned_of(osmose):
    answer = osmose("train", "blackout", *BITS, *SHORT, "--out", "short", "schedule.t_end=2")
    assert answer.status == 0
    assert answer.err.startswith("osmose: note: schedule.t_end: at 2 2.5 units of an item are left in the mean")
    assert answer.err.count("\n") == 1

"""Interpolants through every command: from noise, and between two data sets, there and back."""

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

MLP = ["--network", "mlp", "network.width=16", "network.depth=1", "sampling.num_steps=4"]
SHORT = [
    "training.batch_size=8",
    "training.preview_samples=4",
    "--steps",
    "5",
    "--threads",
    "1",
    "--quiet",
    "training.validate_every=1",
]
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((60, 2))
WORDS = {
    "noise": ["--data", "toy:two-moons", "data.num_points=200"],
    "between": ["--data", "toy:two-moons", "--source", "toy:8-gaussians", "data.num_points=200"],
    "pairs": ["--data", "npz:after.npz", "--source", "npz:before.npz", "--paired"],
    "images": ["--data", "digits", "--source", "npz:images.npz", "--size", "8", "--conditional", "coupling=ot"],
    "mirror": ["--data", "npz:after.npz", "--source", "npz:after.npz", "path=mirror"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with arrays and a run for each of WORDS; not to be changed."""
    folder = tmp_path_factory.mktemp("interpolant")
    np.savez(folder / "before.npz", x=ROWS)
    np.savez(folder / "after.npz", x=ROWS * [2.0, -3.0] + [5.0, -5.0])
    np.savez(folder / "images.npz", x=RNG.integers(0, 256, (30, 12, 12), dtype=np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in WORDS.items():
            main(["train", "interpolant", *words, *MLP, *SHORT, "--out", name])
    return folder


pytestmark = pytest.mark.usefixtures("work")


def drawn(osmose, name, *words):
    """What `osmose sample` writes."""
    answer = osmose("sample", name, *words, "--out", "drawn.npz", "--quiet")
    assert (answer.status, answer.err) == (0, ""), answer
    with np.load("drawn.npz") as archive:
        return archive["samples"]


def test_what_was_trained():
    runs = {name: Run.open(Path(name)).config for name in WORDS}
    assert {name: config.method.path.kind for name, config in runs.items()} == {
        "noise": "one-sided-linear",
        "between": "linear",
        "pairs": "linear",
        "images": "linear",
        "mirror": "mirror",
    }
    learned = {name: config.method.learned for name, config in runs.items()}
    assert learned == {"noise": "b", "between": "b-eta", "pairs": "b-eta", "images": "b-eta", "mirror": "eta"}
    assert [config.method.learn for config in runs.values()] == [None] * 5
    assert (runs["pairs"].data.start, runs["pairs"].data.paired) == ("npz:before.npz", True)
    assert (runs["between"].data.start, runs["between"].data.paired) == ("toy:8-gaussians", False)
    assert runs["noise"].spec.start is None
    assert (runs["images"].spec.shape, runs["images"].spec.start.shape) == ((1, 8, 8), (1, 8, 8))
    assert (runs["images"].spec.range, runs["images"].spec.start.range) == ((0, 16), (0, 255))
    for name in WORDS:
        lines = Run.open(Path(name)).metrics()
        assert all(math.isfinite(value) for line in lines for value in line.values())
        assert [line["step"] for line in lines if "validation_loss" in line][-1] == 5
        assert list(Path(name, "samples").glob("*.png"))


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("words", [[], ["epsilon=1"], ["epsilon=2", "follow=true"]], ids=" ".join)
def test_samples(osmose, name, words):
    found = [drawn(osmose, name, "-n", 11, "--steps", 3, "--seed", 5, *words, "--batch-size", size) for size in (4, 11)]
    shape, dtype = ((1, 8, 8), np.uint8) if name == "images" else ((2,), np.float32)
    assert (found[0].shape, found[0].dtype) == ((11, *shape), dtype)
    np.testing.assert_allclose(*found, atol=1 if name == "images" else 1e-4)
    options = {key: json.loads(value) for key, value in (word.split("=") for word in words)}
    want = library.load(name).sample(11, num_steps=3, seed=5, **options).data
    np.testing.assert_allclose(found[1], want.numpy().astype(dtype), atol=1 if name == "images" else 1e-4)
    assert not np.allclose(found[1], drawn(osmose, name, "-n", 11, "--steps", 3, "--seed", 6, *words))


def test_the_answer_counts_evaluations(osmose):
    for words, nfe in (
        ([], 8),
        (["--steps", 6, "--solver", "euler"], 6),
        (["--steps", 6, "epsilon=1"], 12),
        (["--steps", 6, "epsilon=1", "denoise=true"], 11),
    ):
        answer = osmose("sample", "between", "-n", 3, *words, "--out", "x.npz", "--json")
        assert json.loads(answer.out)["nfe"] == nfe
    assert json.loads(osmose("sample", "pairs", "--from", "before.npz", "--out", "x.npz", "--json").out)["n"] == 60


def test_translation_of_an_archive_and_of_a_table(osmose):
    forward = drawn(osmose, "pairs", "--from", "before.npz", "--batch-size", 7)
    assert forward.shape == (60, 2)
    start = torch.from_numpy(ROWS)
    np.testing.assert_allclose(forward, library.load("pairs").sample(60, start=start).data.numpy(), atol=1e-5)
    with Path("rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], *ROWS.tolist()])
    np.testing.assert_allclose(drawn(osmose, "pairs", "--from", "rows.csv"), forward, atol=1e-5)
    # Fewer than there are: the first of them. Of the ODE, the seed changes nothing; of the SDE it does.
    np.testing.assert_allclose(drawn(osmose, "pairs", "--from", "rows.csv", "-n", 9), forward[:9], atol=1e-5)
    np.testing.assert_allclose(drawn(osmose, "pairs", "--from", "rows.csv", "--seed", 3), forward, atol=1e-5)
    noisy = [drawn(osmose, "pairs", "--from", "rows.csv", "--seed", seed, "epsilon=1") for seed in (0, 1)]
    assert np.abs(noisy[0] - noisy[1]).mean() > 0.1
    assert np.isfinite(noisy).all()


def test_what_was_translated_goes_back(osmose):
    assert drawn(osmose, "pairs", "--from", "before.npz", "--steps", 60).shape == (60, 2)
    Path("drawn.npz").rename("there.npz")
    back = drawn(osmose, "pairs", "--from", "there.npz", "--steps", 60, "direction=backward")
    np.testing.assert_allclose(back, ROWS, atol=2e-2)
    with np.load("there.npz") as there:
        assert np.abs(there["samples"] - ROWS).mean() > 1  # the units are those of the other end
    noisy = drawn(osmose, "pairs", "--from", "there.npz", "direction=backward", "epsilon=1")
    assert 0.05 < np.abs(noisy - ROWS).mean() < 5


def test_a_mirror_gives_back_what_it_is_given(osmose):
    with np.load("after.npz") as archive:
        given = archive["x"]
    same = drawn(osmose, "mirror", "--from", "after.npz", "--steps", 200)
    np.testing.assert_allclose(same, given, atol=0.2)
    others = drawn(osmose, "mirror", "--from", "after.npz", "--steps", 50, "epsilon=1")
    assert np.abs(others - given).mean() > 0.3


def test_images_both_ways(osmose):
    pixels = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save("one.png")
    np.savez("one.npz", samples=pixels[None].astype(np.float32))
    found = [drawn(osmose, "images", "--from", f"one.{end}", "--label", 3) for end in ("png", "npz")]
    assert (found[0].shape, found[0].dtype) == ((1, 1, 8, 8), np.uint8)
    assert found[0].max() <= 16
    np.testing.assert_allclose(*found, atol=1)
    # The other way values have no levels and the range of the source; a digit that is an image is scaled to 0..16.
    back = drawn(osmose, "images", "--from", "one.png", "direction=backward", "--label", 3)
    assert (back.shape, back.dtype) == ((1, 1, 8, 8), np.float32)
    assert 20 < back.max() <= 255
    assert back.min() >= 0
    answer = osmose("sample", "images", "--from", "one.npz", "direction=backward", "--out", "x.npz", "--quiet")
    assert answer.status == 2
    assert "start: has values from" in answer.err
    assert "(0.0, 16.0)" in answer.err


def test_pictures(osmose):
    for name, words in (("images", ["-n", 9]), ("between", ["-n", 9]), ("pairs", ["--from", "before.npz"])):
        for more in ([], ["direction=backward", "--from", "drawn.npz"]):
            if more:
                drawn(osmose, name, *words)
                words = [*more, "--label", 1] if name == "images" else more
            answer = osmose("sample", name, *words, "--out", f"{name}.png", "--quiet")
            assert (answer.status, answer.err) == (0, "")
            with Image.open(f"{name}.png") as image:
                assert min(image.size) > 20


# --- training again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
def test_a_run_that_was_stopped_is_taken_up_again(osmose, monkeypatch, name):
    optimise = Trainer.optimise
    monkeypatch.setattr(Trainer, "optimise", lambda t, w: 1 / 0 if t.step == 3 else optimise(t, w))
    with pytest.raises(ZeroDivisionError):
        osmose("train", "interpolant", *WORDS[name], *MLP, *SHORT, "--out", "parts", "training.checkpoint_every=1")
    monkeypatch.setattr(Trainer, "optimise", optimise)
    assert osmose("train", "--out", "parts", "--resume", "--quiet").status == 0
    assert Run.open(Path("parts")).hash() == Run.open(Path(name)).hash()
    losses = [[line for line in Run.open(Path(run)).metrics() if line["step"] == 5] for run in ("parts", name)]
    assert [line.get("validation_loss") for line in losses[0]] == [line.get("validation_loss") for line in losses[1]]


@pytest.mark.parametrize("name", ["noise", "between", "pairs"])
def test_accumulation_changes_nothing(osmose, name):
    answer = osmose("train", "interpolant", *WORDS[name], *MLP, *SHORT, "--out", "parts", "training.accumulate=2")
    assert answer.status == 0, answer
    one, other = (
        [line["validation_loss"] for line in Run.open(Path(run)).metrics() if "validation_loss" in line]
        for run in (name, "parts")
    )
    assert len(one) == 5
    assert one[0] != one[-1]
    assert other == pytest.approx(one, rel=1e-3)


def test_what_a_run_began_with_cannot_be_changed(refused):
    resume = ["train", "--out", "pairs", "--resume", "--quiet"]
    message = refused(*resume, "--source", "npz:after.npz")
    assert message == "data: 'npz:after.npz' is not the data this run was made with (its hash differs)"
    message = refused("train", "--out", "between", "--resume", "--quiet", "--paired")
    assert message == "data.paired: True given, but between was started with False; resume without it"
    message = refused("train", "--out", "noise", "--resume", "--quiet", "--source", "toy:8-gaussians")
    assert message == "data: 'toy:two-moons' is not the data this run was made with (its hash differs)"


def test_data_that_have_moved_are_named_again(osmose, refused, work):
    (work / "before.npz").rename(work / "moved.npz")
    assert "before.npz" in refused("evaluate", "pairs", "-n", 6, "--metrics", "sw2", "--quiet")
    answer = osmose("train", "--out", "pairs", "--resume", "--source", "npz:moved.npz", "--quiet")
    assert answer.status == 0, answer
    answer = osmose("evaluate", "pairs", "-n", 6, "--metrics", "sw2", "--quiet", "--source", "npz:moved.npz")
    assert answer.status == 0, answer
    message = refused("evaluate", "--samples", "after.npz", "--data", "npz:after.npz", "--source", "npz:moved.npz")
    assert message == "--source: has no meaning with --samples, which are scored by their end alone"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling.direction=backward"], "sampling.direction: 'backward' needs items to begin with"),
        (["sampling.solver=rk4", "sampling.epsilon=1"], "sampling.solver: 'rk4' is for the ODE; take heun"),
        (["path.gamma=none", "sampling.follow=true"], "sampling.follow: true is not valid: linear has no noise here"),
        (["path=mirror"], "path: mirror begins with the data themselves; name one data set as --data and --source"),
    ],
)
def test_what_could_not_be_sampled_is_not_trained(refused, words, message):
    assert refused("train", "interpolant", *WORDS["pairs"], *MLP, *SHORT, *words, "--out", "no").startswith(message)
    assert not Path("no").exists()


def test_a_bridge_goes_both_ways(osmose, refused):
    words = ["--data", "toy:two-moons", "--source", "toy:8-gaussians", "data.num_points=200", *MLP, *SHORT]
    assert osmose("train", "bridge", *words, "epsilon=0.3", "--out", "bridge").status == 0
    made = drawn(osmose, "bridge", "-n", 5)
    assert made.shape == (5, 2)
    back = drawn(osmose, "bridge", "--from", "after.npz", "-n", 5, "direction=backward")
    assert back.shape == (5, 2)
    assert not np.array_equal(drawn(osmose, "bridge", "-n", 5, "epsilon=0"), made)
    message = refused("train", "bridge", *words, "--out", "no", "epsilon=-1")
    assert message == "epsilon: -1 is not valid: should be greater than or equal to 0"
    message = refused("sample", "bridge", "denoise=true", "--out", "no.npz", "--quiet")
    assert message.startswith("denoise: unknown field")


def test_a_source_that_has_changed_is_noticed(refused, made, work):
    Path("before.npz").unlink()
    np.savez(work / "before.npz", x=ROWS + 1)
    message = refused("train", "--out", "pairs", "--resume", "--quiet")
    assert message == "data: 'npz:after.npz' is not the data this run was made with (its hash differs)"
    assert "hash differs" in refused("evaluate", "pairs", "-n", 6, "--metrics", "sw2", "--quiet")
    with np.load(made / "before.npz") as archive:
        assert np.array_equal(archive["x"], ROWS)


# --- info, scores, densities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
def test_info(osmose, name):
    answer = osmose("info", name)
    assert (answer.status, answer.err) == (0, "")
    kind = Run.open(Path(name)).config.method.path.kind
    assert "method      interpolant\n" in answer.out
    assert f'path.kind = "{kind}"' in answer.out
    assert "trained     5 of 5 steps" in answer.out
    begins = {"between": "toy:8-gaussians: points", "pairs": "npz:before.npz, each with its own item: points"}
    assert ("begins with" in answer.out) == (name != "noise")
    assert begins.get(name, "") in answer.out
    said = json.loads(osmose("info", name, "--json").out)
    weights = sum(value.numel() for value in library.load(name).parameters())
    assert said["parameters"] == weights > 1000


@pytest.mark.parametrize("name", WORDS)
def test_scores(osmose, name):
    words = ["-n", 6, "--metrics", "sw2", "--quiet", "--json"]
    answer = osmose("evaluate", name, *words, "--steps", "2,3", "epsilon=1")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.count("sw2") >= 2
    assert Path(name, "evaluation.json").is_file()


@pytest.mark.parametrize("exact", [True, False])
def test_likelihood_of_a_run_that_begins_with_noise(osmose, exact):
    name = "noise"
    if not exact:  # images have 64 values, with levels
        name = "digits"
        words = ["--data", "digits", "path=one-sided-trig", *MLP, *SHORT]
        assert osmose("train", "interpolant", *words, "--out", name).status == 0
    answer = osmose("analyze", "likelihood", name, "-n", 6, "--steps", 5, "--out", "found", "--quiet")
    assert (answer.status, answer.err) == (0, "")
    stored = json.loads(Path("found/likelihood.json").read_text())
    assert (stored["is_density"], stored["eps_error"], len(stored["terms"])) == (exact, None, 5)
    first = "-log2 of the density " if exact else "at most "
    assert answer.out.startswith(f"{first}{stored['bits_per_dim']:.4f} ± {stored['standard_error']:.4f} bits per dim")
    assert "ODE of 5 steps" in answer.out
    assert ("17 levels" in answer.out) == (not exact)
    run = Run.open(Path(name))
    want = likelihood(run.model(torch.device("cpu")), run.config.data.load(), n=6, num_steps=5)
    assert stored["bits_per_dim"] == pytest.approx(want.bits, rel=1e-4)
    assert math.isfinite(want.bits)
    with Image.open("found/likelihood.png") as image:
        assert min(image.size) > 300


# --- what is refused ------------------------------------------------------------------------------------------------

PAIR = ["train", "interpolant", "--data", "npz:after.npz", "--source", "npz:before.npz", *MLP, *SHORT, "--out", "x"]
NOISE = ["train", "interpolant", "--data", "npz:after.npz", *MLP, *SHORT, "--out", "x"]
LIKELIHOOD = ["analyze", "likelihood", "--quiet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "between", "--from", "images.npz"], "images.npz: items of shape (12, 12); (2,) are needed"),
        (["sample", "images", "--from", "before.npz"], "before.npz: items of shape (2,); (1, 8, 8) are needed"),
        (["sample", "images", "--from", "images.npz"], "images.npz: items of shape (1, 12, 12); (1, 8, 8) are needed"),
        (["sample", "between", "--from", "nowhere.npz"], "nowhere.npz: no such file"),
        (["sample", "between", "--from", "between"], "between: no such file"),
        (["sample", "between", "--from", "between/config.json"], "config.json: should end in .npz, .csv, .png"),
        (["sample", "between", "--from", "before.npz", "-n", 61], "--num: 61 is more than the 60 items of --from"),
        (["sample", "between", "--from", "before.npz", "-n", 0], "num_samples: 0 is not valid: must be at least 1"),
        (
            ["sample", "noise", "--from", "before.npz"],
            "--from: samples of interpolant do not begin with data here; train",
        ),
        (["sample", "noise", "direction=backward"], "direction: backward ends in noise here"),
        (["sample", "between", "direction=backward"], "direction: backward begins with items of the data: give them"),
        (["sample", "between", "direction=backward", "--out", "x.npz"], "direction: backward begins with items"),
        (["sample", "between", "direction=sideways"], "direction: 'sideways' is not valid: should be 'forward' or"),
        (["sample", "between", "epsilon=-1"], "epsilon: -1 is not valid: should be greater than or equal to 0"),
        (["sample", "between", "epsilon=much"], "epsilon: 'much' is not valid"),
        (["sample", "between", "epsilon=1", "--solver", "rk4"], "solver: 'rk4' is for the ODE; take heun where"),
        (["sample", "between", "--solver", "ddim"], "solver: 'ddim' is not valid: should be 'euler', "),
        (["sample", "between", "--steps", 0], "num_steps: 0 is not valid"),
        (["sample", "between", "clip=true"], "clip: unknown field"),
        (["sample", "between", "--label", 1], "condition: this model was trained without classes"),
        (["sample", "images", "--label", 10], "condition: class 10 is not in 0..9"),
        ([*LIKELIHOOD, "between"], "interpolant: the density of the data to begin with is unknown"),
        ([*LIKELIHOOD, "mirror"], "interpolant: the density of the data to begin with is unknown"),
        ([*LIKELIHOOD, "noise", "--no-clip"], "clip: the ODE of interpolant has none to choose"),
        ([*LIKELIHOOD, "noise", "--variance", "fixed_small"], "variance: the ODE of interpolant has none"),
        ([*LIKELIHOOD, "noise", "--steps", 0], "--steps: 0 is not valid: must be at least 1"),
        (["evaluate", "between", "-n", 6, "--quiet", "direction=backward"], "direction: backward gives items of the"),
        ([*NOISE, "--paired"], "paired: true needs data to begin with"),
        ([*NOISE, "path=mirror"], "path: mirror begins with items of the data; name them as --source, too"),
        ([*NOISE, "path=liner"], "path.kind: unknown path 'liner'; did you mean 'linear'?"),
        ([*NOISE, "--source", "npz:nowhere.npz"], "npz:nowhere.npz: no such file or folder"),
        ([*NOISE, "--source", "images.npz"], "unknown data set 'images.npz'"),
        ([*NOISE, "--source", "npz:images.npz"], "npz:images.npz has events of shape (1, 12, 12), and npz:after.npz"),
        ([*NOISE, "--source", "digits", "--size", 8], "size: 8 is for square images; npz:after.npz has points (2,)"),
        ([*PAIR, "path=one-sided-linear"], "path: one-sided-linear begins with noise, and --source names data"),
        ([*PAIR, "path.gamma=none", "learn=b-eta"], "learn: 'b-eta' asks for the noise of linear, whose gamma is none"),
        ([*PAIR, "path.gamma.b=1"], "path.gamma.b: unknown field"),
        ([*PAIR, "learn=b", "sampling.epsilon=1"], "an SDE needs the score"),
        ([*PAIR, "sampling.epsilon=-1"], "sampling.epsilon: -1 is not valid"),
        ([*PAIR, "network.linear=true"], "network: mlp stands on the best linear prediction"),
        ([*PAIR, "coupling=emd"], "coupling: 'emd' is not valid: should be 'independent' or 'ot'"),
        ([*PAIR, "--conditional"], "conditional: true needs data with classes"),
        (["train", "ddpm", "--data", "digits", "--paired", "--out", "x"], "paired: true needs data to begin with"),
    ],
    ids=lambda value: " ".join(map(str, value[-2:])) if isinstance(value, list) else "",
)
def test_what_is_refused(refused, words, message):
    assert message in refused(*words)


def test_pairs_of_other_lengths_are_refused(refused):
    np.savez("short.npz", x=ROWS[:50])
    message = refused(*PAIR, "--source", "npz:short.npz", "--paired")
    assert message.startswith("paired: npz:after.npz has 54 + 6 items (")
    assert "npz:short.npz 45 + 5" in message
    assert message.endswith("pairs need as many of both, split alike")


def test_no_other_method_takes_a_start(osmose, refused):
    points = ["--data", "npz:after.npz", "network.width=16", "network.depth=1"]
    for method in ("ddpm", "edm", "vae"):
        message = refused("train", method, *points[:2], "--source", "npz:before.npz", "--out", "x")
        assert message == f"start: samples of {method} cannot begin with data; those of interpolant and bridge can"
    assert osmose("train", "edm", *points, *SHORT, "sampling.num_steps=2", "--out", "edm").status == 0
    message = refused("sample", "edm", "--from", "before.npz", "--out", "x.npz")
    assert message == "--from: samples of edm do not begin with data here; train interpolant or bridge with --source"
    assert "direction: unknown field" in refused("sample", "edm", "direction=backward")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3,many\n", "line 3, column 'b': 'many' is not a finite number"),
        ("a,b\n1,2\n3\n", "line 3 has 1 cells where the header has 2"),
        ("1,2\n3,4\n", "the first line holds numbers (1, 2); a header line is needed"),
        ("a,b,c\n1,2,3\n", "items of shape (3,); (2,) are needed"),
        ("a,b\n1,nan\n", "line 2, column 'b': 'nan' is not a finite number"),
        ("a,b\n", "0 rows of numbers; at least 1 are needed"),
        ("", "empty; a header line"),
    ],
)
def test_tables_that_cannot_be_translated_are_refused(refused, content, message):
    Path("rows.csv").write_text(content)
    assert message in refused("sample", "between", "--from", "rows.csv")


def test_archives_that_cannot_be_translated_are_refused(refused):
    Path("text.npz").write_text("no archive")
    assert "text.npz: not a readable npz file" in refused("sample", "between", "--from", "text.npz")
    np.savez("several.npz", a=ROWS, b=ROWS)
    assert "several.npz: no array samples or x; it holds a, b" in refused("sample", "between", "--from", "several.npz")
    np.savez("words.npz", x=np.array([["a", "b"]]))
    assert "words.npz: array 'x' has dtype <U1" in refused("sample", "between", "--from", "words.npz")
    np.savez("empty.npz", x=ROWS[:0])
    assert "shape (0, 2); numbers are needed" in refused("sample", "between", "--from", "empty.npz")
    np.savez("nan.npz", x=np.where(ROWS > 1, np.nan, ROWS))
    assert "is nan; every value must be finite" in refused("sample", "between", "--from", "nan.npz")
    Path("broken.png").write_text("no image")
    assert "broken.png: not a readable image" in refused("sample", "images", "--from", "broken.png")
    assert "broken.png: an image, and the items are points" in refused("sample", "between", "--from", "broken.png")

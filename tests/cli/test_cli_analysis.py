"""`osmose analyze dimension`, `conservativity` and `likelihood --by ode`: from the outside."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from osmose.analysis.outliers import Outliers, in_units_of
from osmose.cli.main import main
from osmose.data.dataset import DataConfig
from osmose.errors import UserError


def files_of(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.usefixtures("runs")
def test_dimension_of_points_and_of_images(osmose):
    answer = osmose("analyze", "dimension", "toy", "-n", 4, "--ratios", "0.1,0.3", "--quiet")
    assert (answer.status, answer.err) == (0, "")
    assert files_of("toy/dimension") == ["dimension.csv", "dimension.json", "dimension.png"]
    assert "wrote toy/dimension/dimension.json" in answer.out
    assert answer.out.splitlines()[-1] == "next: osmose analyze conservativity toy"
    images = ["-n", 3, "--ratios", "0.3,1", "--estimators", "flipd,normal-bundle", "--probes", 2, "--out", "maps"]
    answer = osmose("analyze", "dimension", "digits", *images, "--json")
    said = json.loads(answer.out)
    assert (said["ambient"], said["probes"], said["n"]) == (64, 2, 3)
    assert files_of("maps") == ["dimension-map.png", "dimension.csv", "dimension.json", "dimension.png"]
    with Image.open("maps/dimension-map.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    again = json.loads(osmose("analyze", "dimension", "digits", *images, "--json").out)
    assert again == said


@pytest.mark.usefixtures("runs")
def test_dimension_at_given_points_of_a_class(osmose, refused):
    np.savez("points.npz", samples=np.zeros((2, 1, 8, 8), dtype=np.float32))
    asked = ["classes", "--at", "points.npz", "--ratios", "0.5", "--estimators", "flipd", "--probes", 1]
    said = json.loads(osmose("analyze", "dimension", *asked, "--label", 3, "--json").out)
    assert said["n"] == 2
    other = json.loads(osmose("analyze", "dimension", *asked, "--label", 4, "--json").out)
    assert other["estimates"] != said["estimates"]
    message = "labels: the run is told the class of each item; give those of the points (--label)"
    assert refused("analyze", "dimension", *asked) == message
    assert refused("analyze", "dimension", "classes", "--label", 3).startswith("--label: is the class of the points")


@pytest.mark.usefixtures("runs")
def test_conservativity(osmose):
    answer = osmose("analyze", "conservativity", "toy", "-n", 4, "--ratios", "0.2,2", "--steps", 2, "--quiet")
    assert (answer.status, answer.err) == (0, "")
    assert files_of("toy/conservativity") == ["conservativity.json", "conservativity.png"]
    said = json.loads(Path("toy/conservativity/conservativity.json").read_text())
    assert len(said["asymmetry"]) == len(said["remainder"]) == 2
    assert said["reading"][0] in answer.out
    assert said["error"] is None  # the law of two moons has no closed form
    few = ["digits", "-n", 2, "--ratios", "0.5", "--probes", 2, "--steps", 0, "--json"]
    said = json.loads(osmose("analyze", "conservativity", *few).out)
    assert 0 < said["asymmetry"][0] < 1
    assert said["remainder"] is None


@pytest.mark.usefixtures("runs")
def test_likelihood_by_the_ode(osmose):
    answer = osmose("analyze", "likelihood", "toy", "--by", "ode", "-n", 5, "--quiet")
    assert (answer.status, answer.err) == (0, "")
    said = json.loads(Path("toy/likelihood/likelihood.json").read_text())
    assert said["is_density"]
    assert 0 < said["error"] < 0.05
    assert answer.out.startswith(f"-log2 of the density {said['bits_per_dim']:.4f} ± {said['standard_error']:.4f} bits")
    assert "exact traces" in answer.out
    other = ["--against", "toy:checkerboard", "--tolerance", "0.01", "--probes", 2, "--out", "apart", "--json"]
    beside = json.loads(osmose("analyze", "likelihood", "toy", "--by", "ode", "-n", 6, *other).out)
    assert files_of("apart") == ["likelihood.json", "likelihood.png", "outliers.json", "outliers.png"]
    assert 0 <= beside["outliers"]["auroc"] <= 1
    assert len(beside["outliers"]["per_item"]) == 6
    one, two = (
        json.loads(osmose("analyze", "likelihood", "toy", "--by", "ode", "-n", 4, "--batch-size", size, "--json").out)
        for size in (2, 4)
    )
    assert one["per_item"] == pytest.approx(two["per_item"], rel=1e-3)


@pytest.mark.usefixtures("runs")
def test_likelihood_by_the_chain_against_other_data_of_as_many_levels(osmose):
    asked = ["digits", "-n", 4, "--steps", 3, "--against", "digits", "--json"]
    said = json.loads(osmose("analyze", "likelihood", *asked).out)
    assert said["outliers"]["auroc"] == 0.5
    assert said["outliers"]["bits_per_dim"] == said["bits_per_dim"]


def test_other_data_are_brought_to_the_run_s_units_and_levels():
    digits = DataConfig(source="digits").load()
    values = np.random.default_rng(0).integers(0, 17, (6, 1, 8, 8))
    other = replace(
        digits,
        train=torch.from_numpy(values * 15.0).float(),
        spec=digits.spec.replace(range=(0.0, 240.0), shift=(120.0,), scale=(120.0,)),
    )
    assert torch.equal(in_units_of(other, digits.spec).train.double(), torch.from_numpy(values).double())
    with pytest.raises(UserError, match="against: digits has 9 levels, and the run's data 17: bits do not compare"):
        in_units_of(digits.quantised(9), digits.spec)


def test_auroc_counts_pairs():
    own, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 9.0])
    assert Outliers(own, other, "x", "train").auroc == pytest.approx((1.5 + 3) / 6)
    assert "more likely under this model than its own" in Outliers(other, own, "x", "train").reading()


@pytest.fixture(scope="module")
def student(tmp_path_factory, made):
    """A consistency model, and a run that is quantized; not to be changed."""
    folder = tmp_path_factory.mktemp("students")
    short = ["training.batch_size=8", "training.preview_samples=4", "--steps", "2", "--threads", "1", "--quiet"]
    small = ["data.num_points=400", "network.width=16", "network.depth=1"]
    main(["train", "sct", "--data", "toy:two-moons", *small, *short, "--out", str(folder / "sct")])
    half = {"kind": "bf16", "network": {"kind": "mlp", "width": 16, "depth": 1}}
    made(folder / "bf16", "edm", {"network": half})
    return folder


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("dimension", ["sct"], "sct: a student says where trajectories end, and not the mean of the data"),
        ("conservativity", ["sct"], "sct: a student says where trajectories end"),
        ("likelihood", ["sct", "--by", "ode"], "sct: a student says where trajectories end"),
        ("dimension", ["bf16"], "is quantized, and its network has no derivative; take the run that it was made from"),
        ("conservativity", ["bf16"], "is quantized, and its network has no derivative"),
        ("likelihood", ["bf16", "--by", "ode"], "is quantized, and its network has no derivative"),
        (
            "dimension",
            ["toy", "--ratios", "0.1;0.2"],
            "--ratios: '0.1;0.2' is not valid: should be numbers",
        ),
        ("dimension", ["toy", "--ratios", "0"], "ratios: 0 is not valid: should be one or more numbers above 0"),
        (
            "dimension",
            ["toy", "--ratios", "1e9"],
            "ratios: 1e+09 is not valid: the noise-to-signal ratios that",
        ),
        ("dimension", ["toy", "-n", "0"], "--num: 0 is not valid: must be at least 1"),
        ("dimension", ["toy", "--probes", "0"], "probes: 0 is not valid: must be at least 1, or exact"),
        ("dimension", ["toy", "--probes", "all"], "--probes: 'all' is not valid: should be a whole number, or exact"),
        (
            "dimension",
            ["toy", "--at", "x.npz", "-n", "3"],
            "--num: is for real items; with --at all points",
        ),
        ("dimension", ["toy", "--estimators", "flipp"], "estimators: 'flipp' is not valid; did you mean 'flipd'"),
        ("dimension", ["toy", "--at", "digits/config.json"], "digits/config.json"),
        ("dimension", ["toy", "--out", "toy/config.json"], "--out: toy/config.json is a file; name a folder"),
        (
            "conservativity",
            ["toy", "--out", "toy/config.json/x"],
            "toy/config.json/x: cannot be written (Not a directory)",
        ),
        ("conservativity", ["toy", "--steps", "-1"], "--steps: -1 is not valid: must be at least 0"),
        (
            "conservativity",
            ["toy", "--ratios", "1"],
            "ratios: the split is learned between the smallest and",
        ),
        ("likelihood", ["toy", "--by", "odd"], "--by: 'odd' is not valid: should be method or ode"),
        ("likelihood", ["toy", "--by", "ode", "--steps", "9"], "--steps: 9 given, but it is a chain's; leave it out"),
        ("likelihood", ["toy", "--by", "ode", "--no-clip"], "--no-clip: the ODE has no estimate to clip"),
        ("likelihood", ["toy", "--by", "ode", "--tolerance", "2"], "tolerance: 2 is not valid: must be between"),
        ("likelihood", ["toy", "--probes", "3"], "--probes: 3 given, but it is for --by ode; leave it out"),
        (
            "likelihood",
            ["digits", "--against", "toy:pinwheel"],
            "against: toy:pinwheel has points (2,), and the run",
        ),
        ("likelihood", ["classes", "--against", "digits"], "--against: the run is told classes"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_refused(refused, student, verb, words, message):
    named = str(student / words[0]) if words[0] in ("sct", "bf16") else words[0]
    assert message in refused("analyze", verb, named, *words[1:])

"""`osmose analyze cost`: what runs cost, side by side."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from osmose.acceleration.distill import distill
from osmose.analysis.budget import budget_of, formula_of
from osmose.analysis.cost import macs_of, num_parameters
from osmose.analysis.memory import bytes_of
from osmose.analysis.training_memory import training_memory
from osmose.data.dataset import DataConfig
from osmose.networks.mlp import MLP
from osmose.training.config import RunConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run
from osmose.training.trainer import built

VERB = ["analyze", "cost"]
FEW = ["--threads", 1, "--quiet"]
POINTS = DataConfig(source="toy:checkerboard", num_points=200)
SMALL = {"network": "mlp", "network.width": 16, "network.depth": 1, "training.batch_size": 8}
V = SMALL | {"schedule": "cosine", "schedule.num_steps": 8, "parametrization": "v", "sampling.num_steps": 4}


def made_from(method, like):
    """A configuration of a method that is made from a run alone, with the fields of one like it."""
    values = recipe(like, POINTS, POINTS.load(), 0, V if like == "ddpm" else SMALL).to_json()
    kept = ("network", "schedule", "parametrization", "noise", "conditional")
    given = values["method"] if like == "sct" else {name: values["method"][name] for name in kept}
    more = {"num_times": 2} if method == "dsno" else {}  # eight steps have no more that differ
    return RunConfig.parse(values | {"method": given | {"kind": method, **more}})


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Runs with weights of chance that are not trained from data alone; not to be changed."""
    folder = tmp_path_factory.mktemp("others")
    configs = {
        "points": recipe("ddpm", POINTS, POINTS.load(), 0, V),
        "gaussian": recipe("gaussian", POINTS, POINTS.load(), 0, {}),
        "scd": made_from("scd", "sct"),
        "dsno": made_from("dsno", "ddpm"),
        "sngan": recipe("sngan", POINTS, POINTS.load(), 0, {"channels": 8, "training.batch_size": 4}),
    }
    for name, config in configs.items():
        run = Run.create(folder / name, config)
        run.write_weights(built(run.config).state_dict())
    distill(
        folder / "points", folder / "students", schedule=[8, 1], steps=1, progress=False, **{"training.batch_size": 8}
    )
    return folder


@pytest.fixture
def all_runs(runs, others):
    """The runs of conftest.py, and these."""
    shutil.copytree(others, runs, dirs_exist_ok=True)
    return runs


def files():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.usefixtures("runs")
def test_a_run(osmose):
    before = files()
    answer = osmose(*VERB, "digits", *FEW)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines()[-2:] == ["wrote digits/cost/cost.json", "next: osmose analyze cost digits RUN2"]
    after = files()
    assert after.keys() - before.keys() == {"digits/cost/cost.json"}
    assert all(after[name] == content for name, content in before.items())

    (told,) = json.loads(after["digits/cost/cost.json"])["runs"]
    run = Run.open("digits")
    model, weights = run.model(), len(before["digits/model.safetensors"])
    memory = training_memory(model, run.config.training)
    numbers, tensors = num_parameters(model), len(list(model.parameters()))
    assert (told["run"], told["method"], told["device"], told["threads"]) == ("digits", "ddpm", "cpu", 1)
    assert told["untrained"] is None
    assert told["parameters"] == numbers
    assert told["bytes"] == {
        "weights": weights,
        "parameters": {"measured": 4 * numbers, "formula": 4 * numbers},
        "buffers": 0,
    }
    assert told["evaluation"]["items"] == told["training"]["items"] == told["training"]["batch_size"] == 8
    assert told["evaluation"]["macs"] == {"measured": macs_of(model), "formula": None}
    assert 0 < told["evaluation"]["seconds"] < told["training"]["seconds"]
    assert told["training"]["macs_per_evaluation"] == memory.macs / macs_of(model) == pytest.approx(3, rel=0.01)
    parts = told["training"]["bytes"]
    for name, formula in (("gradients", 4), ("average", 4), ("optimizer", 8)):
        more = 4 * tensors if name == "optimizer" else 0
        assert parts[name] == {"measured": formula * numbers + more, "formula": formula * numbers + more}
    assert parts["held"] == 16 * numbers + 4 * tensors
    assert parts["peak"] == parts["held"] + parts["step"]
    assert parts["activations"] == memory.activations < parts["step"]
    assert parts["teacher"] == 0

    # A training step holds more at once than an evaluation, which keeps nothing for a way back.
    assert told["evaluation"]["peak_bytes"] < parts["activations"]
    rows = dict([cell.strip() for cell in line.split("│")[1:3]] for line in answer.out.splitlines() if "│" in line)
    assert rows["parameters"] == f"{numbers:,}"
    size = f"{4 * numbers / 2**10:.2f} KiB"
    assert rows["gradients"] == f"{size} | {size}"
    assert rows["a training step of"] == "8 items"
    assert rows["multiply-adds for one item"] == f"{macs_of(model) / 1e3:.2f} k"
    assert "teacher" not in rows
    assert "other operations for one item" not in rows


@pytest.mark.usefixtures("runs")
def test_several_runs(osmose):
    answer = osmose(*VERB, "toy", "digits", "classes", *FEW, "--json", "--batch-size", 3, "--out", "deep/inside")
    assert (answer.status, answer.err) == (0, "")
    told = json.loads(answer.out)
    assert told["wrote"] == ["deep/inside/cost.json", "deep/inside/cost.png"]
    assert json.loads(Path("deep/inside/cost.json").read_text()) == {"runs": told["runs"]}
    assert [one["run"] for one in told["runs"]] == ["toy", "digits", "classes"]
    assert [one["training"]["batch_size"] for one in told["runs"]] == [3, 3, 3]
    toy, digits, classes = (one["training"]["bytes"]["peak"] for one in told["runs"])
    assert toy < digits < classes  # which has a table of its classes more
    assert not Path("toy/cost").exists()
    with Image.open("deep/inside/cost.png") as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    page = osmose(*VERB, "toy", "digits", *FEW).out
    assert "wrote toy/cost/cost.json, toy/cost/cost.png" in page
    assert page.splitlines()[-1] == "next: osmose compare toy digits"
    assert [cell.strip() for cell in page.splitlines()[2].split("┃")[1:-1]] == ["", "toy", "digits"]


@pytest.mark.usefixtures("runs")
def test_the_batch_and_its_passes_decide(osmose):
    path = Path("digits/config.json")
    values = json.loads(path.read_text())
    values["training"]["accumulate"] = 2
    path.write_text(json.dumps(values))
    small, large = (
        json.loads(osmose(*VERB, "digits", *FEW, "--json", *words).out)["runs"][0]
        for words in ([], ["--batch-size", 16])
    )
    assert (small["training"]["batch_size"], small["training"]["items"], small["evaluation"]["items"]) == (8, 4, 4)
    assert (large["training"]["batch_size"], large["training"]["items"], large["evaluation"]["items"]) == (16, 8, 8)
    activations = [one["training"]["bytes"]["activations"] for one in (small, large)]
    assert activations[1] == pytest.approx(2 * activations[0], rel=0.05)
    assert small["training"]["bytes"]["held"] == large["training"]["bytes"]["held"]
    assert "8 items in 2 passes" in osmose(*VERB, "digits", *FEW).out


@pytest.mark.usefixtures("all_runs")
def test_runs_that_need_a_teacher_have_one_like_themselves(osmose):
    names = ["points", "scd", "dsno", "students/phases/1"]
    points, scd, dsno, tract = json.loads(osmose(*VERB, *names, *FEW, "--json", "--out", "x").out)["runs"]
    assert [one["method"] for one in (points, scd, dsno, tract)] == ["ddpm", "scd", "dsno", "tract"]
    assert [one["untrained"] for one in (points, scd, dsno, tract)] == [None] * 4
    size = points["bytes"]["parameters"]["measured"]
    teachers = [one["training"]["bytes"]["teacher"] for one in (points, scd, dsno, tract)]
    own = bytes_of(list(Run.open("scd").model().denoiser.parameters()))
    assert teachers == [0, own, 0, size]  # dsno learns from what its teacher has stored
    assert tract["parameters"] == points["parameters"]
    # The student, and its average that teaches it; of the two, one is trained.
    assert tract["bytes"]["parameters"] == {"measured": 2 * size, "formula": 2 * size}
    assert tract["training"]["bytes"]["gradients"]["measured"] == size
    assert tract["training"]["bytes"]["held"] > points["training"]["bytes"]["held"]
    assert "teacher" in osmose(*VERB, "scd", *FEW).out


@pytest.mark.usefixtures("all_runs")
def test_runs_that_are_not_trained_have_one_side(osmose):
    assert osmose("surrogate", "points", "--with", "gaussian", "--t-mid", 0.5, "--out", "pair").status == 0
    why = {
        "students": "distilled is put together of trained runs, not trained",
        "pair": "surrogate is put together of trained runs, not trained",
        "gaussian": "gaussian is fitted in closed form: it has no parameter to train",
    }
    answer = osmose(*VERB, *why, *FEW, "--out", "x", "--batch-size", 8)
    assert (answer.status, answer.err) == (0, "")
    told = json.loads(Path("x/cost.json").read_text())["runs"]
    for one, (name, text) in zip(told, why.items(), strict=True):
        assert (one["run"], one["untrained"], one["training"]) == (name, text, None)
        assert f"{name}: no training to measure: {text}" in answer.out
    students, pair, gaussian = told
    assert students["evaluation"]["macs"] == pair["evaluation"]["macs"]
    assert students["evaluation"]["peak_bytes"] == pair["evaluation"]["peak_bytes"] > 0
    assert gaussian["evaluation"]["macs"]["measured"] == gaussian["evaluation"]["peak_bytes"] == 0
    assert gaussian["bytes"]["parameters"]["measured"] > 0
    assert "training step" not in answer.out
    assert Path("x/cost.png").is_file()
    # Beside one that is trained, its rows are there and theirs are empty.
    assert "a training step of" in osmose(*VERB, "gaussian", "points", *FEW).out


@pytest.mark.usefixtures("all_runs")
def test_a_network_s_own_formula_stands_beside(osmose, monkeypatch):
    run = Run.open("points")
    assert formula_of(run.model(), "macs") is None
    width = run.config.method.network.width
    # Embedding, stem, one block, head: what `macs_of` counts, and a number that it knows nothing of.
    monkeypatch.setattr(MLP, "macs", lambda _: 4 * width**2 + 4 * width, raising=False)
    monkeypatch.setattr(MLP, "elementwise", lambda _: 1234567, raising=False)
    answer = osmose(*VERB, "points", "gaussian", *FEW)
    told, fitted = json.loads(Path("points/cost/cost.json").read_text())["runs"]
    assert told["evaluation"]["macs"] == {"measured": 1088, "formula": 1088}
    assert told["evaluation"]["elementwise"] == {"measured": None, "formula": 1234567}
    assert fitted["evaluation"]["macs"] == {"measured": 0, "formula": None}
    assert "1.09 k | 1.09 k" in answer.out
    assert "| 1.23 M" in answer.out


@pytest.mark.usefixtures("all_runs")
def test_a_round_of_a_model_that_teaches_in_turn(osmose):
    (told,) = json.loads(osmose(*VERB, "sngan", *FEW, "--json").out)["runs"]
    gradients = told["training"]["bytes"]["gradients"]
    assert gradients["measured"] == gradients["formula"] == 4 * told["parameters"]


@pytest.mark.usefixtures("runs")
def test_measuring_again_replaces_the_file_and_says_the_same(osmose):
    told = []
    for _ in range(2):
        assert osmose(*VERB, "toy", *FEW).status == 0
        (one,) = json.loads(Path("toy/cost/cost.json").read_text())["runs"]
        assert one["evaluation"].pop("seconds") > 0
        assert one["training"].pop("seconds") > 0
        told.append(one)
    assert told[0] == told[1]
    assert [path.name for path in Path("toy/cost").iterdir()] == ["cost.json"]


@pytest.mark.usefixtures("runs")
def test_from_python():
    run = Run.open("toy")
    model = run.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = budget_of(run, batch_size=4, model=model)
    assert told.training.peak == budget_of(run, batch_size=4).training.peak
    assert told.items == 4
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN: give at least one run folder"),
        (["nowhere"], "nowhere: not a run folder (it has no config.json)"),
        (["toy", "nowhere"], "nowhere: not a run folder (it has no config.json)"),
        (["toy", "begun"], "begun: has no model.safetensors yet; train it first (osmose train ... --resume)"),
        (["toy", "--batch-size", "0"], "--batch-size: 0 is not valid: must be at least 1"),
        (["toy", "--batch-size", "x"], "--batch-size: 'x' is not valid: should be a whole number"),
        (
            ["toy", "thirds", "--batch-size", "4"],
            "--batch-size: batch_size 4 must be a multiple of accumulate 3 of thirds",
        ),
        (["toy", "--threads", "0"], "--threads: 0 is not valid: must be at least 1"),
        (["toy", "--out", "toy/config.json"], "--out: toy/config.json is a file; name a folder"),
        (["toy", "--device", "gpu"], "--device: 'gpu' is not on this machine; choose auto or cpu"),
        (["toy", "--batchsize", "8"], "unknown argument --batchsize; did you mean --batch-size?"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("runs")
def test_refused(refused, words, message):
    for name in ("begun", "thirds"):
        shutil.copytree("toy", name)
    Path("begun/model.safetensors").unlink()
    values = json.loads(Path("thirds/config.json").read_text())
    values["training"] |= {"batch_size": 9, "accumulate": 3}
    Path("thirds/config.json").write_text(json.dumps(values))
    assert message in refused(*VERB, *words)

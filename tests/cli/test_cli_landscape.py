"""`osmose analyze landscape`: the loss around the weights of runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from osmose.acceleration.distill import distill
from osmose.analysis.landscape import landscapes
from osmose.cli.main import main
from osmose.data.dataset import DataConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run
from osmose.training.trainer import built

VERB = ["analyze", "landscape"]
FEW = ["-n", 8, "--points", 3, "--threads", 1, "--quiet"]
POINTS, DIGITS = DataConfig(source="toy:two-moons", num_points=400), DataConfig(source="digits")
MLP = {"network": "mlp", "network.width": 16, "network.depth": 1}
#: Runs that have a loss, with weights of chance.
UNTRAINED = {
    "iddpm": ("iddpm", DIGITS, MLP | {"schedule.num_steps": 100}),
    "sct": ("sct", POINTS, MLP),
    "ect": ("ect", POINTS, MLP),
    "vae": ("vae", DIGITS, {"channels": 8}),
    "sngan": ("sngan", POINTS, {"channels": 8}),
    "flow": ("flow", POINTS, {"transforms": 2, "width": 8}),
}
SHORT = ["training.batch_size=8", "training.preview_samples=4", "sampling.num_steps=3", "--threads", "1", "--quiet"]
KEPT = ["training.checkpoint_every=1", "training.keep_checkpoints=9", "--steps", "4"]
TOY = ["--data", "toy:two-moons", "data.num_points=400", "network.depth=1", *SHORT, *KEPT]
STEPS = ["schedule=cosine", "schedule.num_steps=8", "parametrization=v"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with runs with checkpoints, runs with weights of chance, and runs without a loss; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    for name, words in (("one", []), ("two", ["--seed", "1"]), ("wide", ["network.width=24"])):
        words = [*(["network.width=16"] if name != "wide" else []), *words]
        main(["train", "edm", *TOY, *words, "--out", str(folder / name)])
    digits = ["--data", "digits", "network=mlp", "network.width=16", "network.depth=1"]
    main(["train", "ddpm", *digits, *STEPS, *SHORT, "--steps", "1", "--out", str(folder / "ddpm")])
    main(["train", "gaussian", "--data", "digits", "--quiet", "--threads", "1", "--out", str(folder / "gaussian")])
    words = {"schedule": [8, 1], "steps": 1, "progress": False, "training.batch_size": 8}
    distill(folder / "ddpm", folder / "students", **words)
    for name, (method, data, changes) in UNTRAINED.items():
        run = Run.create(folder / name, recipe(method, data, data.load(), 0, changes))
        model = built(run.config)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        run.write_weights(model.state_dict())
    return folder


@pytest.fixture
def made_runs(made, tmp_path, monkeypatch):
    """A working directory with copies of those runs."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["toy", "digits", "classes"])
def test_it_writes_its_two_files_and_says_what_it_found(osmose, runs, name):
    before = contents(runs)
    answer = osmose(*VERB, name, *FEW)
    assert (answer.status, answer.err) == (0, "")
    stored = json.loads(Path(name, "landscape/landscape.json").read_text())
    (run,) = stored["runs"]
    assert "loss on 3 x 3 points, directions: random" in answer.out
    (row,) = [line.split("│")[1:-1] for line in answer.out.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in row] == [
        name,
        f"{run['loss']:.4g}",
        *(f"{rise:.3g}" for rise in run["rise"].values()),
        *(f"{curvature:.3g}" for curvature in run["curvature"].values()),
        f"{run['curvature_ratio']:.3g}",
        f"{run['below_twice']:.1%}",
        f"{run['seconds']:.1f}",
    ]
    assert f"{name}: the plane holds {100 * run['trajectories'][0]['share']:.3g}% of the squares" in answer.out
    assert answer.out.splitlines()[-2:] == [
        f"wrote {name}/landscape/landscape.json, {name}/landscape/landscape.png",
        f"next: osmose evaluate {name}",
    ]
    with Image.open(f"{name}/landscape/landscape.png") as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 22)) > 100
    # The run is as it was, and nothing else was written.
    after = contents(runs)
    assert sorted(path.name for path in after.keys() - before.keys()) == ["landscape.json", "landscape.png"]
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.usefixtures("runs")
def test_its_json_is_the_library_s_answer(osmose):
    words = ["--seed", 3, "--batch-size", 3, "--part", "train", "--reach", 0.5, "--out", "elsewhere/deep"]
    answer = osmose(*VERB, "toy", *words, *FEW, "--device", "cpu", "--json")
    assert (answer.status, answer.err) == (0, "")
    said, run = json.loads(answer.out), Run.open("toy")
    dataset = run.config.data.load()
    want = landscapes([run], [dataset], seed=3, part="train", reach=0.5, n=8, points=3)
    for row, expected in zip(said["runs"][0]["grid"], want.runs[0].loss.tolist(), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    wrote = ["elsewhere/deep/landscape.json", "elsewhere/deep/landscape.png"]
    assert said == {**json.loads(Path(wrote[0]).read_text()), "wrote": wrote}
    assert (said["reach"], said["part"], said["seed"], said["points"]) == (0.5, "train", 3, 3)
    assert not Path("toy/landscape").exists()


@pytest.mark.parametrize(
    ("name", "caution"),
    [
        ("iddpm", None),
        ("sct", "the loss of sct is the size of a normalised tangent"),
        ("ect", "the target of ect moves with the weights"),
        ("vae", None),
        ("sngan", "the loss of sngan is the sum of two that play against each other"),
        ("flow", None),
    ],
)
@pytest.mark.usefixtures("made_runs")
def test_every_run_with_a_loss_has_a_landscape(osmose, name, caution):
    answer = osmose(*VERB, name, *FEW)
    assert (answer.status, answer.err) == (0, "")
    assert (caution or "wrote") in answer.out
    assert answer.out.count("the loss of ") + answer.out.count("the target of ") == (caution is not None)
    (run,) = json.loads(Path(name, "landscape/landscape.json").read_text())["runs"]
    assert run["method"] == name
    assert run["trajectories"] == []
    assert all(value is not None for row in run["grid"] for value in row)
    assert len({value for row in run["grid"] for value in row}) > 5


@pytest.mark.usefixtures("made_runs")
def test_the_trajectory_of_a_run(osmose):
    answer = osmose(*VERB, "one", *FEW)
    assert answer.out.splitlines()[-1] == "next: osmose analyze landscape one --directions trajectory"
    answer = osmose(*VERB, "one", "--directions", "trajectory", *FEW)
    assert (answer.status, answer.err) == (0, "")
    stored = json.loads(Path("one/landscape/landscape.json").read_text())
    (run,) = stored["runs"]
    (path,) = run["trajectories"]
    assert stored["reach"] == 1.2
    assert path["steps"] == [1, 2, 3, 4]
    assert len(path["points"]) == 5
    assert max(abs(value) for point in path["points"] for value in point) == pytest.approx(1)
    assert path["points"][-1] == pytest.approx([0, 0], abs=1e-6)
    assert path["share"] == pytest.approx(sum(run["shares"].values()), rel=1e-4)
    u, v = run["shares"].values()
    assert f"(4 checkpoints): u {u:.1%}, v {v:.1%}" in answer.out
    assert answer.out.splitlines()[-1] == "next: osmose evaluate one"


@pytest.mark.usefixtures("made_runs")
def test_several_runs_side_by_side(osmose):
    answer = osmose(*VERB, "one", "wide", "ect", *FEW, "--out", "side")
    assert (answer.status, answer.err) == (0, "")
    stored = json.loads(Path("side/landscape.json").read_text())
    assert [run["run"] for run in stored["runs"]] == ["one", "wide", "ect"]
    alone = json.loads(osmose(*VERB, "wide", *FEW, "--json").out)["runs"][0]
    assert [alone[name] == stored["runs"][1][name] for name in ("grid", "rise", "loss")] == [True] * 3
    with Image.open("side/landscape.png") as image:
        assert image.size[0] > image.size[1]
    assert len([line for line in answer.out.splitlines() if line.startswith("│")]) == 3
    # Without a folder they go into the first run's.
    assert osmose(*VERB, "two", "one", *FEW).status == 0
    assert Path("two/landscape/landscape.png").is_file()
    assert not Path("one/landscape").exists()


@pytest.mark.usefixtures("made_runs")
def test_several_runs_on_a_plane_that_they_share(osmose):
    answer = osmose(*VERB, "one", "two", "--directions", "trajectory", "--shared", *FEW, "--out", "side")
    assert (answer.status, answer.err) == (0, "")
    stored = json.loads(Path("side/landscape.json").read_text())
    assert stored["shared"]
    one, two = stored["runs"]
    assert one["shares"] == two["shares"]
    assert one["trajectories"] == two["trajectories"]
    assert [path["run"] for path in one["trajectories"]] == ["one", "two"]
    assert one["centre"] == one["trajectories"][0]["points"][-1]
    assert two["centre"] == two["trajectories"][1]["points"][-1]
    assert one["centre"] != two["centre"]
    alone = json.loads(osmose(*VERB, "two", *FEW, "--json").out)["runs"][0]
    assert two["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    u, v = one["shares"].values()
    assert f"all runs: u holds {u:.1%} and v {v:.1%} of the squares around their mean" in answer.out


@pytest.mark.usefixtures("made_runs")
def test_measuring_again_replaces_the_files(osmose):
    said = [json.loads(osmose(*VERB, "one", *FEW, "--seed", seed, "--json").out) for seed in (1, 1, 2)]
    for answer in said:
        answer["runs"][0].pop("seconds")
    assert said[0] == said[1]
    assert said[0] != said[2]
    assert json.loads(Path("one/landscape/landscape.json").read_text())["seed"] == 2
    assert sorted(path.name for path in Path("one/landscape").iterdir()) == ["landscape.json", "landscape.png"]


@pytest.mark.usefixtures("made_runs")
def test_runs_that_are_evaluated_are_compared_next(osmose):
    assert osmose(*VERB, "ect", "flow", *FEW).out.splitlines()[-1] == "next: osmose evaluate ect"
    Path("ect/evaluation.json").write_text("[]")
    assert osmose(*VERB, "ect", "flow", *FEW).out.splitlines()[-1] == "next: osmose evaluate flow"
    Path("flow/evaluation.json").write_text("[]")
    assert osmose(*VERB, "ect", "flow", *FEW).out.splitlines()[-1] == "next: osmose compare ect flow"


@pytest.mark.usefixtures("made_runs")
def test_what_is_not_finite_is_said(osmose):
    answer = osmose(*VERB, "vae", *FEW, "--reach", 1e6)
    assert answer.status == 0
    assert "vae: 8 of 9 losses are not finite and left blank" in answer.out
    grid = json.loads(Path("vae/landscape/landscape.json").read_text())["runs"][0]["grid"]
    assert [value is None for row in grid for value in row] == [*[True] * 4, False, *[True] * 4]


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN: give at least one run folder"),
        (["nowhere"], "nowhere: not a run folder (it has no config.json)"),
        (["one", "nowhere"], "nowhere: not a run folder (it has no config.json)"),
        (["one", "./one"], "RUN: one is given twice"),
        (["students"], "students: a run of distilled is put together of trained runs and has no loss of its own"),
        (["students/phases/1"], "students/phases/1: the loss of tract is measured against its teacher, which the"),
        (["gaussian"], "gaussian: a run of gaussian is fitted in closed form and has no parameters to move"),
        (["one", "gaussian"], "gaussian: a run of gaussian is fitted in closed form and has no parameters to move"),
        (["one", "--directions", "up"], "directions: 'up' is not valid: should be random or trajectory"),
        (["vae", "--directions", "trajectory"], "vae: has 0 checkpoints, and a trajectory needs 3 or more; train with"),
        (
            ["ddpm", "--directions", "trajectory"],
            "ddpm: has 1 checkpoint, and a trajectory needs 3 or more; train with",
        ),
        (["one", "two", "--shared"], "shared: random directions are made for each run alone"),
        (["one", "--shared", "--directions", "trajectory"], "shared: a plane that is shared needs two runs or more"),
        (["one", "wide", "--shared", "--directions", "trajectory"], "runs that share a plane have the same parameters"),
        (["one", "--points", "2"], "--points: 2 is not valid: must be at least 3"),
        (["one", "--points", "many"], "--points: 'many' is not valid: should be a whole number"),
        (["one", "--reach", "0"], "reach: 0.0 is not valid: must be a number above 0"),
        (["one", "-n", "0"], "--num: 0 is not valid: must be at least 1"),
        (["one", "--batch-size", "0"], "--batch-size: 0 is not valid: must be at least 1"),
        (["one", "--threads", "0"], "--threads: 0 is not valid: must be at least 1"),
        (["one", "--seed", "-1"], "seed: -1 is not valid: must be between 0 and 2^63 - 1"),
        (["one", "--part", "all"], "part: 'all' is not valid: should be held-out or train"),
        (["one", "--out", "one/config.json"], "--out: one/config.json is a file; name a folder"),
        (["one", "--device", "gpu"], "--device: 'gpu' is not on this machine; choose auto or cpu"),
        (["one", "--direction", "random"], "--direction"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("made_runs")
def test_refused(refused, words, message):
    assert message in refused(*VERB, *words)

"""`osmose analyze tangents`: how far runs are from consistency models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from osmose.acceleration.distill import distill
from osmose.analysis.tangents import tangents
from osmose.data.dataset import DataConfig
from osmose.training.config import RunConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run
from osmose.training.trainer import built

VERB = ["analyze", "tangents"]
POINTS = DataConfig(source="toy:checkerboard", num_points=200)
DIGITS = DataConfig(source="digits")
MLP = {"network": "mlp", "network.width": 16, "network.depth": 1}
V = MLP | {"schedule": "cosine", "schedule.num_steps": 8, "parametrization": "v", "sampling.num_steps": 4}
RUNS = {
    "points": ("edm", POINTS, MLP),
    "other": ("edm", POINTS, MLP),
    "scd": ("scd", POINTS, MLP),
    "sct": ("sct", POINTS, MLP | {"adaptive_weight": False}),
    "ect": ("ect", POINTS, MLP),
    "classes": ("ddpm", DIGITS, V | {"conditional": True}),
    "iddpm": ("iddpm", DIGITS, MLP | {"schedule.num_steps": 100}),
    "vae": ("vae", DIGITS, {}),
}
FEW = ["-n", 5, "--bins", 3, "--threads", 1, "--quiet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with runs that have weights of chance, and students of one; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    for name, (method, data, changes) in RUNS.items():
        config = recipe("sct" if method == "scd" else method, data, data.load(), 0, changes)
        if method == "scd":  # which is made from a run alone, and has the fields of sct and more
            values = config.to_json()
            config = RunConfig.parse(values | {"method": values["method"] | {"kind": "scd"}})
        if method in ("scd", "sct"):
            config = config.replace(parent=Run.open(folder / "points").as_parent())
        run = Run.create(folder / name, config)
        model = built(run.config)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        run.write_weights(model.state_dict())
    distill(
        folder / "classes", folder / "students", schedule=[8, 1], steps=1, progress=False, **{"training.batch_size": 8}
    )
    return folder


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """A working directory with copies of those runs."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def test_it_writes_its_two_files_and_says_what_it_found(osmose, runs):
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    answer = osmose(*VERB, "scd", "--teacher", "points", *FEW)
    assert (answer.status, answer.err) == (0, "")
    stored = json.loads(Path("scd/tangents/tangents.json").read_text())
    assert "tangents of scd, 5 items a bin, direction: teacher" in answer.out
    assert (stored["direction"], stored["teacher"]) == ("teacher", "points")
    rows = [line.split("│")[1:-1] for line in answer.out.splitlines() if line.startswith("│")]
    assert len(rows) == len(stored["bins"]) == 3
    for row, one in zip(rows, stored["bins"], strict=True):
        assert [cell.strip() for cell in row] == [
            f"{one['t'][0]:.3f}..{one['t'][1]:.3f}",
            "..".join(f"{ratio:.3g}" for ratio in one["sigma_over_alpha"]),
            f"{one['trained']:.1%}",
            f"{one['tangent']['mean']:.4g}",
            f"{one['tangent']['p10']:.3g}..{one['tangent']['p90']:.3g}",
            f"{one['jvp']['mean']:.4g}",
            f"{one['rate']['mean']:.4g}",
            f"{one['weight']:.4g}",
            "0.0%",
        ]
    assert "direction dx/dt: the flow of points: g is 0 for its consistency model" in answer.out
    assert answer.out.splitlines()[-2:] == [
        "wrote scd/tangents/tangents.json, scd/tangents/tangents.png",
        "next: osmose evaluate scd",
    ]
    with Image.open("scd/tangents/tangents.png") as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    # The run is as it was, and nothing else was written.
    after = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert sorted(path.name for path in after.keys() - before.keys()) == ["tangents.json", "tangents.png"]
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.usefixtures("runs")
def test_its_json_is_the_library_s_answer(osmose):
    words = ["--direction", "own", "--seed", 3, "--jvp", "finite-diff", "--batch-size", 2, "--out", "elsewhere/deep"]
    answer = osmose(*VERB, "points", *words, *FEW, "--device", "cpu", "--json")
    assert (answer.status, answer.err) == (0, "")
    said, run = json.loads(answer.out), Run.open("points")
    want = tangents(run, POINTS.load(), direction="own", seed=3, jvp="finite-diff", n=5, bins=3)
    assert [one["tangent"]["mean"] for one in said["bins"]] == pytest.approx(want.tangent[:, 0].tolist(), rel=1e-4)
    assert said["wrote"] == ["elsewhere/deep/tangents.json", "elsewhere/deep/tangents.png"]
    stored = json.loads(Path("elsewhere/deep/tangents.json").read_text())
    assert said == {"run": "points", "wrote": said["wrote"], **stored}
    assert not Path("points/tangents").exists()


@pytest.mark.parametrize(
    ("words", "direction", "told", "following"),
    [
        (["points"], "data", "the data's, cos(t) z - sin(t) x0", "osmose distill scd points --out RUN2"),
        (["points", "--direction", "own"], "own", "V of the run itself", "osmose distill scd points --out RUN2"),
        (["scd"], "data", "the data's, cos(t) z - sin(t) x0", "osmose analyze tangents scd --teacher points"),
        (["sct", "--teacher", "points"], "teacher", "the flow of points", "osmose evaluate sct"),
        (["ect"], "data", "the data's, cos(t) z - sin(t) x0", "osmose evaluate ect"),
        (["classes"], "data", "the data's, cos(t) z - sin(t) x0", "osmose distill scd classes --out RUN2"),
        (["iddpm", "--direction", "own"], "own", "V of the run itself", "osmose distill scd iddpm --out RUN2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("runs")
def test_every_run_with_a_denoiser_has_tangents(osmose, words, direction, told, following):
    answer = osmose(*VERB, *words, *FEW)
    assert (answer.status, answer.err) == (0, "")
    assert f"direction: {direction}" in answer.out
    assert f"direction dx/dt: {told}" in " ".join(answer.out.split())
    assert answer.out.splitlines()[-1] == f"next: {following}"
    assert "exp(w)" not in answer.out or words[0] == "scd"
    assert "not finite; the means" not in answer.out


@pytest.mark.usefixtures("runs")
def test_measuring_again_replaces_the_files(osmose):
    first, again = (osmose(*VERB, "points", *FEW, "--seed", 1) for _ in range(2))
    assert first == again
    assert json.loads(Path("points/tangents/tangents.json").read_text())["seed"] == 1
    assert sorted(path.name for path in Path("points/tangents").iterdir()) == ["tangents.json", "tangents.png"]


@pytest.mark.usefixtures("runs")
def test_what_is_not_finite_is_said(osmose):
    run = Run.open("points")
    model = run.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e20)
    run.write_weights(model.state_dict())
    answer = osmose(*VERB, "points", *FEW)
    assert answer.status == 0
    assert "some tangents are not finite; the means leave them out" in answer.out
    assert "100.0%" in answer.out
    bins = json.loads(Path("points/tangents/tangents.json").read_text())["bins"]
    assert bins[0]["tangent"] is None
    assert bins[0]["not_finite"] == 1


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vae"], "vae: a run of vae has no denoiser; ddpm, iddpm, edm, scd, sct and ect have one"),
        (["students"], "students: a run of distilled has no denoiser; ddpm, "),
        (["students/phases/1"], "students/phases/1: a run of tract has no denoiser; ddpm, "),
        (
            ["scd", "--teacher", "other"],
            "teacher: other is not what scd was made from, 'points' (their weights differ)",
        ),
        (["scd", "--teacher", "vae"], "vae: a run of vae has no denoiser"),
        (["scd", "--teacher", "nowhere"], "nowhere: not a run folder (it has no config.json)"),
        (["ect", "--teacher", "points"], "teacher: points given, but ect was made from no other run"),
        (
            ["scd", "--direction", "teacher"],
            "teacher: missing; the direction 'teacher' needs the run that scd was made from, 'points'",
        ),
        (["scd", "--direction", "own"], "direction: 'own' is for ddpm, iddpm and edm; scd is no flow to follow"),
        (["scd", "--teacher", "points", "--direction", "data"], "teacher: given, but the direction is 'data'; leave"),
        (["scd", "--direction", "up"], "direction: 'up' is not valid: should be data, own or teacher"),
        (["scd", "--jvp", "exact"], "jvp: 'exact' is not valid: should be forward or finite-diff"),
        (["scd", "--seed", "-1"], "seed: -1 is not valid: must be between 0 and 2^63 - 1"),
        (["scd", "-n", "0"], "--num: 0 is not valid: must be at least 1"),
        (["scd", "--bins", "0"], "--bins: 0 is not valid: must be at least 1"),
        (["scd", "--batch-size", "0"], "--batch-size: 0 is not valid: must be at least 1"),
        (["scd", "--threads", "0"], "--threads: 0 is not valid: must be at least 1"),
        (["scd", "--out", "scd/config.json"], "--out: scd/config.json is a file; name a folder"),
        (["scd", "--device", "gpu"], "gpu"),
        (["scd", "--direciton", "own"], "unknown argument --direciton; did you mean --direction?"),
        (["nowhere"], "nowhere: not a run folder (it has no config.json)"),
        ([], "RUN"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("runs")
def test_refused(refused, words, message):
    assert message in refused(*VERB, *words)

"""What each command does, seen from outside."""

import csv
import dataclasses
import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from tyro.conf import Positional

import osmose as library
from osmose.cli import COMMANDS
from osmose.training import files
from osmose.training.run import Run

TOY = ["ddpm", "--data", "toy:two-moons", "data.num_points=400", "network.width=16", "network.depth=1"]
SHORT = ["training.batch_size=8", "training.preview_samples=4", "sampling.num_steps=3"]

# --- help and version -----------------------------------------------------------------------------------------------


def test_help_names_every_command(osmose):
    pages = [osmose(*words) for words in ([], ["--help"], ["-h"], ["help"])]
    assert len(set(pages)) == 1
    assert pages[0].status == 0
    assert pages[0].err == ""
    for name, (_, summary) in COMMANDS.items():
        assert name in pages[0].out
        assert summary in pages[0].out


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_of_a_command_explains_every_argument(osmose, verb):
    answer = osmose(*verb.split(), "--help")
    assert answer.status == 0
    assert answer.err == ""
    module, _, name = COMMANDS[verb][0].partition(":")
    command = getattr(importlib.import_module(module), name)
    words = " ".join(answer.out.replace("│", " ").replace("|", " ").split())
    assert command.__doc__.strip().splitlines()[0] in words
    hints = get_type_hints(command, include_extras=True)
    for name, kind in ((field.name, hints[field.name]) for field in dataclasses.fields(command)):
        (said,) = [part for part in getattr(kind, "__metadata__", ()) if hasattr(part, "help")] or [None]
        if said is None:
            assert name == "overrides"
            continue
        assert f"--{said.name or name.replace('_', '-')} " in words or Positional in kind.__metadata__
        assert " ".join(said.help.split()) in words


def test_version(osmose):
    for flag in ("--version", "-V"):
        assert osmose(flag).out == f"osmose {importlib.metadata.version('osmose')}\n"


@pytest.mark.parametrize(
    "code",
    [
        "import osmose",
        "from osmose.cli.main import main; main(['--help'])",
        "from osmose.cli.main import main; main(['train', '--help'])",
        "from osmose.cli.main import main; main(['train', 'dpm', '--data', 'digits', '--out', 'nowhere'])",
    ],
)
def test_no_torch_is_imported_before_it_is_needed(code, tmp_path):
    program = f"import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "Traceback" not in done.stderr


def test_interruption_is_one_line_and_status_130(osmose, monkeypatch):
    from osmose.cli.info import Info

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Info, "run", interrupted)
    assert osmose("info", "digits") == (130, "", "osmose: interrupted\n")


# --- the whole path -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", ["digits", "toy"])
def test_from_training_to_comparison(osmose, name):
    sampled = osmose("sample", name, "-n", 9, "--steps", 2, "--out", "out/grid.png", "--quiet")
    assert sampled.status == 0
    assert "wrote out/grid.png: 9 samples, 2 network evaluations each" in sampled.out
    assert f"next: osmose evaluate {name}" in sampled.out
    with Image.open("out/grid.png") as image:
        assert min(image.size) > 100
        assert image.mode == ("L" if name == "digits" else "RGB")

    evaluated = osmose("evaluate", name, "--steps", "2,4", "-n", 100, "--quiet")
    assert evaluated.status == 0, evaluated.err
    assert f"{name}: 2 steps, 2 network evaluations" in evaluated.out
    assert f"wrote {name}/evaluation.json" in evaluated.out
    stored = json.loads(Path(name, "evaluation.json").read_text())["evaluations"]
    assert [(e["sampling"]["num_steps"], e["nfe"], e["n"]) for e in stored] == [(2, 2, 100), (4, 4, 100)]
    scores = {score["name"]: score["value"] for score in stored[0]["scores"]}
    assert {"sw2", "energy", "nn_ratio"} < scores.keys()
    assert all(np.isfinite(value) for value in scores.values())

    compared = osmose("compare", name, "--out", "compared", "--json")
    assert compared.status == 0, compared.err
    answer = json.loads(compared.out)
    assert [row["nfe"] for row in answer["rows"]] == [2, 4]
    assert sorted(path.name for path in Path("compared").iterdir()) == ["comparison.csv", "comparison.md", "pareto.png"]
    rows = list(csv.DictReader(Path("compared/comparison.csv").read_text().splitlines()))
    assert [float(row["sw2"]) for row in rows] == [row["sw2"] for row in answer["rows"]]
    table = Path("compared/comparison.md").read_text()
    assert table.count(f"| {name} | ddpm |") == 2
    with Image.open("compared/pareto.png") as image:
        assert image.size[0] > 300

    told = osmose("info", name)
    assert told.status == 0
    assert "trained     4 of 4 steps, seed 0" in told.out
    assert "score" in told.out


@pytest.mark.usefixtures("runs")
def test_two_runs_side_by_side(osmose):
    for name in ("digits", "classes"):
        osmose("evaluate", name, "--steps", "2", "-n", 50, "--metrics", "sw2", "--quiet")
    compared = osmose("compare", "digits", "classes", "--out", "both", "--json")
    assert [row["run"] for row in json.loads(compared.out)["rows"]] == ["digits", "classes"]


# --- train ----------------------------------------------------------------------------------------------------------


def test_training_writes_the_run_folder_and_says_what_is_next(osmose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = osmose("train", *TOY, *SHORT, "--steps", 4, "--out", "a=b", "--seed", 7)
    assert answer.status == 0
    assert answer.out.splitlines()[0].startswith("wrote a=b: 360 items, 4 steps, held-out loss ")
    assert answer.out.splitlines()[1] == "next: osmose sample a=b -n 64 --out samples.png"
    assert "step 4/4" in answer.err
    assert sorted(path.name for path in Path("a=b").iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "samples",
    ]
    config = json.loads(Path("a=b/config.json").read_text())
    assert config["seed"] == 7
    assert config["method"]["network"]["width"] == 16
    assert config["identity"]["num_train"] == 360
    assert set(config["versions"]) == {"osmose", "torch", "python", "machine"}


def test_overrides_stand_anywhere_even_after_flags(osmose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "network.width=16", "--quiet", "schedule.num_steps=50", "ddpm", "--conditional", *SHORT]
    words += ["--data", "toy:two-moons", "data.num_points=400", "--json", "training.betas=0.8,0.9", "--out", "run"]
    words += ["--steps", "2", "schedule.beta_end=0.03", "sampling.solver=heun", "sampling.solver.kind=ddim"]
    answer = osmose(*words, "sampling.solver.eta=0.5", "network.depth=1")
    assert answer.status == 0, answer.err
    config = Run.open("run").config
    assert config.method.network.width == 16
    assert (config.method.schedule.kind, config.method.schedule.num_steps) == ("linear", 50)
    assert config.method.schedule.beta_end == 0.03
    assert config.method.conditional
    assert config.training.betas == (0.8, 0.9)
    assert (config.method.sampling.solver.kind, config.method.sampling.solver.eta) == ("ddim", 0.5)


def test_the_json_answer_of_training_is_one_object(osmose, tmp_path):
    answer = osmose("train", *TOY, *SHORT, "--steps", 4, "--out", tmp_path / "run", "--json")
    assert answer.err == ""
    told = json.loads(answer.out)
    assert (told["run"], told["step"], told["finished"]) == (str(tmp_path / "run"), 4, True)
    assert told["validation_loss"] == Run.open(tmp_path / "run").metrics()[-1]["validation_loss"]


def test_divergence_is_status_1_and_one_line(osmose, tmp_path):
    settings = [*TOY, *SHORT, "--lr", "1e30", "training.clip_grad=null", "training.warmup=0", "--steps", 4]
    for name, flag in (("text", "--quiet"), ("machine", "--json")):
        answer = osmose("train", *settings, "--out", tmp_path / name, flag)
        assert answer.status == 1
        assert answer.err.startswith("osmose: ")
        assert "finite at step" in answer.err
        assert answer.err.count("\n") == 1
        if flag == "--json":
            assert "finite at step" in json.loads(answer.out)["error"]
        else:
            assert answer.out == ""


@pytest.mark.usefixtures("runs")
def test_resuming_with_the_same_settings_continues(osmose):
    before = Path("toy/model.safetensors").read_bytes()
    words = ["train", *TOY, *SHORT, "--resume", "--out", "toy", "--steps", 4, "--json", "--seed", 0]
    answer = osmose(*words)
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["step"] == 4
    assert Path("toy/model.safetensors").read_bytes() == before


def test_an_empty_folder_is_a_place_for_a_run(osmose, tmp_path):
    (tmp_path / "run").mkdir()
    assert osmose("train", *TOY, *SHORT, "--steps", 1, "--out", tmp_path / "run", "--quiet").status == 0


# --- sample ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("name", "dtype", "shape"), [("digits", np.uint8, (1, 8, 8)), ("toy", np.float32, (2,))])
def test_an_archive_written_batch_by_batch_holds_what_sample_gives(osmose, name, dtype, shape):
    words = ["sample", name, "-n", 23, "--steps", 3, "--seed", 5, "--batch-size", 7, "--json"]
    answer = osmose(*words, "--out", "new/x.npz")
    assert answer.status == 0, answer.err
    told = json.loads(answer.out)
    assert (told["out"], told["n"], told["nfe"], told["seed"]) == ("new/x.npz", 23, 3, 5)
    with np.load("new/x.npz", allow_pickle=False) as archive:
        assert archive.files == ["samples"]
        samples = archive["samples"]
    assert samples.dtype == dtype
    assert samples.shape == (23, *shape)
    expected = library.load(name).sample(23, num_steps=3, seed=5, batch_size=7).data.numpy()
    assert np.array_equal(samples, expected.astype(dtype))
    assert [path.name for path in Path("new").iterdir()] == ["x.npz"]
    first = Path("new/x.npz").read_bytes()
    osmose(*words, "--out", "new/y.npz")
    assert [np.load(f"new/{name}.npz")["samples"].tobytes() for name in "xy"] == [samples.tobytes()] * 2
    assert len(first) == Path("new/y.npz").stat().st_size
    osmose(*[*words, "--seed", 6], "--out", "new/y.npz")
    assert not np.array_equal(np.load("new/y.npz")["samples"], samples)


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_the_batch_size_does_not_change_the_samples(osmose, solver):
    found = []
    for size in (1, 4, 11, 64):
        words = ["--steps", 4, "--solver", solver, "--batch-size", size, "--out", f"{size}.npz", "--quiet"]
        assert osmose("sample", "toy", "-n", 11, *words).status == 0
        found.append(np.load(f"{size}.npz")["samples"])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-5)
    assert np.abs(found[0][0] - found[0][1]).max() > 1e-3


@pytest.mark.usefixtures("runs")
def test_fewer_samples_are_the_first_ones(osmose):
    for number in (3, 10):
        osmose("sample", "toy", "-n", number, "--steps", 3, "--out", f"{number}.npz", "--quiet")
    few, many = (np.load(f"{number}.npz")["samples"] for number in (3, 10))
    np.testing.assert_allclose(few, many[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("runs")
def test_classes_all_in_turn_or_one(osmose):
    # Four steps of training teach the classes nothing: give them something to say.
    state = files.read_tensors(Path("classes/model.safetensors"))
    embedding = next(name for name, value in state.items() if value.ndim == 2 and len(value) == 10)
    state[embedding] = 30 * torch.randn(state[embedding].shape, generator=torch.Generator().manual_seed(0))
    for name in state:
        if name.endswith("conv_out.weight"):
            state[name] = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1))
    files.write_tensors(Path("classes/model.safetensors"), state)
    osmose("sample", "classes", "-n", 12, "--steps", 2, "--out", "all.npz", "--quiet")
    osmose("sample", "classes", "-n", 12, "--steps", 2, "--label", 3, "--out", "three.npz", "--quiet")
    every, three = np.load("all.npz"), np.load("three.npz")
    assert every["labels"].tolist() == [*range(10), 0, 1]
    assert three["labels"].tolist() == [3] * 12
    assert np.array_equal(every["samples"][3], three["samples"][3])
    assert not np.array_equal(every["samples"][4], three["samples"][4])


@pytest.mark.usefixtures("runs")
def test_options_of_the_method_by_name(osmose):
    words = ["sample", "toy", "-n", 5, "--steps", 4, "--quiet", "spacing=karras", "clip=false"]
    for eta in (0, 1):
        assert osmose(*words, f"solver.eta={eta}", "--out", f"{eta}.npz").status == 0
    assert not np.array_equal(np.load("0.npz")["samples"], np.load("1.npz")["samples"])


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp", "PNG"])
def test_other_pictures(osmose, ending):
    assert osmose("sample", "digits", "-n", 4, "--steps", 1, "--out", f"x.{ending}", "--quiet").status == 0
    with Image.open(f"x.{ending}") as image:
        assert image.format == {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "PNG": "PNG"}[ending]


# --- evaluate -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runs")
def test_an_evaluation_replaces_one_under_the_same_conditions_only(osmose):
    def evaluate(*words):
        answer = osmose("evaluate", "toy", "--metrics", "sw2", "--json", *words)
        assert answer.status == 0, answer.err
        (made,) = json.loads(answer.out)["evaluations"]
        stored = json.loads(Path("toy/evaluation.json").read_text())["evaluations"]
        assert made == stored[-1]
        return [(e["sampling"]["num_steps"], e["n"], e["seed"], e["scores"][0]["reference"]) for e in stored]

    first = (2, 20, 0, "train")
    assert evaluate("--steps", 2, "-n", 20) == [first]
    stamp = json.loads(Path("toy/evaluation.json").read_text())
    assert evaluate("--steps", 2, "-n", 20) == [first]
    assert json.loads(Path("toy/evaluation.json").read_text()) != stamp  # its seconds at least
    assert evaluate("--steps", 3, "-n", 20) == [first, (3, 20, 0, "train")]
    assert evaluate("--steps", 2, "-n", 30)[-1] == (2, 30, 0, "train")
    assert evaluate("--steps", 2, "-n", 20, "--seed", 1)[-1] == (2, 20, 1, "train")
    assert evaluate("--steps", 2, "-n", 20, "--reference", "held-out")[-1] == (2, 20, 0, "held-out")
    assert len(evaluate("--steps", 2, "-n", 20, "--solver", "ancestral")) == 6
    assert len(evaluate("--steps", 2, "-n", 20)) == 6


@pytest.mark.usefixtures("runs")
def test_scores_of_other_weights_are_passed_over(osmose):
    osmose("evaluate", "toy", "--steps", "2", "-n", 20, "--metrics", "sw2", "--quiet")
    assert len(json.loads(osmose("info", "toy", "--json").out)["evaluations"]) == 1
    state = files.read_tensors(Path("toy/model.safetensors"))
    files.write_tensors(Path("toy/model.safetensors"), {name: 2 * value for name, value in state.items()})
    assert json.loads(osmose("info", "toy", "--json").out)["evaluations"] == []


@pytest.mark.usefixtures("runs")
def test_the_same_evaluation_twice_gives_the_same_scores(osmose):
    found = []
    for _ in range(2):
        answer = json.loads(osmose("evaluate", "toy", "--steps", "2", "-n", 50, "--json").out)
        found.append([(score["name"], score["value"]) for score in answer["evaluations"][0]["scores"]])
    assert found[0] == found[1]


@pytest.mark.usefixtures("runs")
def test_an_archive_is_scored_like_the_run_it_came_from(osmose):
    osmose("sample", "digits", "-n", 60, "--steps", 2, "--out", "x.npz", "--quiet")
    words = ["--metrics", "sw2,energy", "--json"]
    archive = json.loads(osmose("evaluate", "--samples", "x.npz", "--data", "digits", *words).out)["scores"]
    run = json.loads(osmose("evaluate", "digits", "-n", 60, "--steps", 2, *words).out)["evaluations"][0]["scores"]
    assert [score["name"] for score in archive] == ["sw2", "energy"]
    assert [score["value"] for score in archive] == pytest.approx([score["value"] for score in run])


# --- info -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runs")
def test_info_of_a_run_says_what_it_is(osmose):
    told = json.loads(osmose("info", "digits", "--json").out)
    model = library.load("digits")
    assert told["parameters"] == sum(value.numel() for value in model.parameters())
    assert told["macs"] > 10_000
    assert told["step"] == 4
    assert told["config"] == json.loads(Path("digits/config.json").read_text())
    page = osmose("info", "digits").out
    assert "network.channels = 8" in page
    assert "training.batch_size = 8" in page


def test_info_of_data(osmose):
    told = json.loads(osmose("info", "digits", "--json").out)
    assert told["spec"]["shape"] == [1, 8, 8]
    assert told["identity"]["num_train"] + told["identity"]["num_held_out"] == 1797
    page = osmose("info", "digits")
    assert told["identity"]["sha256"] in page.out
    assert "next: osmose train ddpm --data digits --out RUN" in page.out


@pytest.mark.usefixtures("runs")
def test_info_of_a_run_that_has_no_weights_yet(osmose):
    Path("toy/model.safetensors").unlink()
    Path("toy/metrics.jsonl").unlink()
    shutil.rmtree("toy/checkpoints")
    told = json.loads(osmose("info", "toy", "--json").out)
    assert told["step"] == 0
    assert told["parameters"] > 100

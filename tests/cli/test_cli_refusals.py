"""Input that is refused: status 2, one line that names what is wrong, and nothing made or changed."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from osmose.training import files

TOY = ["train", "ddpm", "--data", "toy:two-moons", "data.num_points=200", "--quiet", "--out", "new"]
DIGITS = ["train", "ddpm", "--data", "digits", "--quiet", "--out", "new"]

# --- train ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train", "dppm", "--data", "digits", "--out", "new"], "unknown method 'dppm'; did you mean 'ddpm'?"),
        (["train", "ddpm", "--data", "digit", "--out", "new"], "unknown data set 'digit'; did you mean 'digits'?"),
        (["train", "ddpm", "--data", "toy:moons", "--out", "new"], "did you mean 'two-moons'?"),
        (["train", "--data", "digits", "--out", "new"], "METHOD: required"),
        (["train", "ddpm", "--out", "new"], "--data: required"),
        (["train", "ddpm", "--data", "digits"], "--out: required"),
        (["train", "--resume"], "--out: required"),
        ([*TOY, "--stesp", "3"], "unknown argument --stesp; did you mean --steps?"),
        ([*TOY, "surplus"], "unknown argument surplus"),
        ([*TOY, "training.steps"], "unknown argument training.steps"),
        ([*TOY, "a..b=3"], "unknown argument a..b=3"),
        ([*TOY, "--lr"], "--lr"),
        ([*TOY, "training.stpes=3"], "training.stpes: unknown field; did you mean 'steps'?"),
        ([*TOY, "network.widht=3"], "network.widht: unknown field; did you mean 'width'?"),
        ([*TOY, "nework.width=3"], "nework: unknown field; did you mean 'network'?"),
        ([*TOY, "data.sise=3"], "data.sise: unknown field; did you mean 'size'?"),
        ([*TOY, "sampling.solver.eat=1"], "sampling.solver.eat: unknown field; did you mean 'eta'?"),
        ([*TOY, "sampling.solver=dimm"], "sampling.solver.kind: unknown solver 'dimm'; did you mean 'ddim'?"),
        ([*TOY, "--schedule", "cosin"], "schedule.kind: unknown schedule 'cosin'; did you mean 'cosine'?"),
        ([*TOY, "--network", "unett"], "network.kind: unknown network 'unett'; did you mean 'unet'?"),
        ([*TOY, "network.width.deep=3"], "network.width.deep: network.width is a plain value without fields"),
        ([*TOY, "--steps", "abc"], "--steps: 'abc' is not valid: should be a whole number"),
        ([*TOY, "--steps", "2.5"], "--steps: '2.5' is not valid: should be a whole number"),
        ([*TOY, "--lr", "fast"], "--lr: 'fast' is not valid: should be a number"),
        ([*TOY, "--steps", "0"], "training.steps: 0 is not valid: must be at least 1"),
        ([*TOY, "--batch-size", "-4"], "training.batch_size: -4 is not valid"),
        ([*TOY, "--lr", "0"], "training.lr: 0.0 is not valid: should be greater than 0"),
        ([*TOY, "--lr", "nan"], "training.lr: nan is not valid: should be a finite number"),
        ([*TOY, "training.lr=inf"], "training.lr: 'inf' is not valid: should be a finite number"),
        ([*TOY, "training.ema=1"], "training.ema: 1 is not valid: should be less than 1"),
        ([*TOY, "training.betas=0.9,1"], "training.betas.1: 1 is not valid: should be less than 1"),
        ([*TOY, "--precision", "fp8"], "training.precision: 'fp8' is not valid: should be 'auto', 'fp32' or 'bf16'"),
        ([*TOY, "training.batch_size=10", "training.accumulate=3"], "batch_size 10 must be a multiple of accumulate 3"),
        ([*TOY, "training.decay=cosin"], "training.decay: 'cosin' is not valid"),
        ([*TOY, "schedule.num_steps=0"], "schedule.num_steps: 0 is not valid: should be greater than or equal to 1"),
        ([*TOY, "schedule.num_steps=10"], "beta_6 = 1.116 is outside (0, 1); use more steps or a smaller beta_end"),
        ([*TOY, "sampling.num_steps=0"], "sampling.num_steps: 0 is not valid"),
        ([*TOY, "sampling.solver.eta=2"], "sampling.solver.eta: 2 is not valid: should be less than or equal to 1"),
        ([*TOY, "--seed", "-1"], "seed: -1 is not valid: should be greater than or equal to 0"),
        ([*TOY, "--seed", "18446744073709551616"], "seed: 18446744073709551616 is not valid: should be less than"),
        ([*TOY, "seed=x"], "seed: 'x' is not valid"),
        ([*TOY, "--threads", "0"], "--threads: 0 is not valid: must be at least 1"),
        ([*TOY, "network.kind=unet"], "a unet needs images"),
        ([*TOY, "data.held_out=1"], "data.held_out: 1 is not valid: should be less than 1"),
        ([*TOY, "--size", "0"], "data.size: 0 is not valid"),
        (
            ["train", "ddpm", "--data", "toy:swiss-roll", "--out", "new", "--conditional"],
            "conditional: true needs data",
        ),
        ([*DIGITS, "network.channels=x"], "network.channels: 'x' is not valid: should be a valid integer"),
        ([*DIGITS, "network.channels=7"], "network.channels: 7 is not valid: should be a multiple of 2"),
        ([*DIGITS, "network.mult=1,x"], "network.mult.1: 'x' is not valid: should be a valid integer"),
        ([*DIGITS, "network.mult=[]"], "network.mult: [] is not valid: Tuple should have at least 1 item"),
        (
            [*DIGITS, "network.mult=1,2,2,2,2"],
            "network.mult: 5 levels need sides divisible by 16, but",
        ),
        (
            [*DIGITS, "network.attention=[5]"],
            "network.attention: 5 does not occur; the resolutions of these images are 8, 4",
        ),
        ([*DIGITS, "network.dropout=1"], "network.dropout: 1 is not valid: should be less than 1"),
        (["train", "ddpm", "--data", "npz", "--out", "new"], "npz needs a path: write it as npz:PATH"),
        (["train", "ddpm", "--data", "folder:nowhere", "--out", "new"], "folder:nowhere: no such file or folder"),
    ],
    ids=lambda value: "_".join(value[-2:]) if isinstance(value, list) else "",
)
def test_training_is_refused(refused, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*words)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_refused(refused, runs):
    (runs / "file").write_text("kept")
    full = "exists already; choose another folder (--resume continues a run)"
    assert refused(*TOY[:-1], "toy") == f"--out: toy {full}"
    assert refused(*TOY[:-1], "file") == f"--out: file {full}"
    assert refused(*TOY[:-1], ".") == f"--out: . {full}"
    assert refused(*TOY[:-1], "file/run").endswith("cannot be written (Not a directory)")
    (runs / "half").mkdir()
    (runs / "half" / "notes.txt").write_text("mine")
    assert refused(*TOY[:-1], "half") == f"--out: half {full}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "9"], "training.steps: 9 given, but toy was started with 4"),
        (["network.width=32"], "network.width: 32 given, but toy was started with 16"),
        (["--network", "unet"], "network.kind: 'unet' given, but toy was started with 'mlp'"),
        (["--network", "mbconv64"], "network.kind: 'unet' given, but toy was started with 'mlp'"),
        (["--seed", "5"], "seed: 5 given, but toy was started with 0"),
        (["--data", "digits"], "'digits' is not the data this run was made with"),
        (["data.num_points=500"], "data.num_points: 500 given, but toy was started with 400"),
        (["--size", "16"], "data.size: 16 given, but toy was started with None"),
        (["--skip-bad"], "data.skip_bad: True given, but toy was started with False"),
        (["edm"], "METHOD: 'edm' given, but toy was started with 'ddpm'"),
        (["--conditional"], "conditional: True given, but toy was started with False"),
        (["sampling.num_steps=5"], "sampling.num_steps: 5 given, but toy was started with 3"),
        (["training.tensorboard=true"], "training.tensorboard: True given, but toy was started with False"),
        (["network.widht=16"], "network.widht: unknown field; did you mean 'width'?"),
        (["--threads", "-1"], "--threads: -1 is not valid"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_resuming_with_another_setting_is_refused(refused, words, message):
    assert message in refused("train", "--out", "toy", "--resume", *words)


@pytest.mark.usefixtures("runs")
def test_resuming_what_is_no_run_is_refused(refused):
    assert refused("train", "--out", "nowhere", "--resume") == "nowhere: not a run folder (it has no config.json)"


def test_resuming_with_other_data_is_refused(osmose, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = np.random.default_rng(0).normal(size=(50, 3))
    np.savez("points.npz", x=points)
    settings = ["training.batch_size=8", "network.width=16", "--steps", "2", "--quiet"]
    assert osmose("train", "ddpm", "--data", "npz:points.npz", "--out", "run", *settings).status == 0
    np.savez("points.npz", x=points + 1e-3)
    assert "its hash differs" in refused("train", "--out", "run", "--resume")
    assert "its hash differs" in refused("evaluate", "run", "--steps", "2", "-n", "10")
    Path("points.npz").unlink()
    assert "no such file" in refused("evaluate", "run", "--steps", "2", "-n", "10")


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(f"pictures/{index}.png")
    return Path("pictures")


@pytest.mark.filterwarnings("default")
def test_an_image_that_is_cut_off_is_named_or_left_out(osmose, refused, pictures):
    os.truncate(pictures / "3.png", 60)
    words = ["train", "ddpm", "--data", "folder:pictures", "--out", "run", "--quiet", "network.channels=8"]
    words += ["training.batch_size=4", "--steps", "1"]
    assert "3.png" in refused(*words)
    answer = osmose(*words, "--skip-bad")
    assert answer.status == 0, answer.err
    assert "3.png" in answer.err
    assert answer.err.startswith("osmose: note: ")
    assert answer.out.startswith("wrote run: 6 items")


@pytest.mark.usefixtures("pictures")
def test_folders_without_pictures_are_refused(refused):
    Path("empty").mkdir()
    assert "no images" in refused("train", "ddpm", "--data", "folder:empty", "--out", "run")
    Path("empty/notes.txt").write_text("")
    assert "for example notes.txt" in refused("train", "ddpm", "--data", "folder:empty", "--out", "run")
    assert "no images" in refused("info", "folder:empty")


def with_nan():
    points = np.zeros((20, 2)) + np.arange(20)[:, None]
    points[7, 1] = np.nan
    return points


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (with_nan(), "[7, 1] is nan"),
        (np.array([["a", "b"]] * 20), "has dtype <U1"),
        (np.array([{}] * 20, dtype=object), "pickled Python objects"),
        (np.zeros((20, 2), complex), "has dtype complex128"),
        (np.zeros((20, 2)), "column 0 is constant"),
        (np.zeros((0, 2)), "none of them empty"),
        (np.full((20, 8, 8), 300), "0..255 are needed"),
        (np.full((20, 8, 8), 7.5e9), "bring them into one of"),
        (np.arange(4.0).reshape(2, 2), "at least 3 are needed"),
    ],
)
def test_arrays_that_cannot_be_trained_on_are_refused(refused, tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=values)
    assert message in refused("train", "ddpm", "--data", "npz:x.npz", "--out", "run")
    assert message in refused("info", "npz:x.npz")


# --- sample ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0"], "0 is not valid: must be at least 1"),
        (["-n", "-5"], "-5 is not valid: must be at least 1"),
        (["-n", "1e3"], "'1e3' is not valid: should be a whole number"),
        (["--seed", "-1"], "seed: -1 is not valid"),
        (["--seed", "18446744073709551616"], "seed: 18446744073709551616 is not valid"),
        (["--steps", "0"], "num_steps: 0 is not valid"),
        (["--steps", "abc"], "--steps: 'abc' is not valid"),
        (["--steps", "2000"], "num_steps: 2000 is more than the 1000 steps that the schedule has"),
        (["--solver", "huen"], "solver.kind: unknown solver 'huen'; did you mean 'heun'?"),
        (["solver.eta=2"], "solver.eta: 2 is not valid: should be less than or equal to 1"),
        (["eta=2"], "eta: unknown field"),
        (["spacing=log"], "spacing: 'log' is not valid: should be 'even', 'leading'"),
        (["step=3"], "step: unknown field"),
        (["--label", "3"], "trained without classes"),
        (["--batch-size", "0"], "batch_size: 0 is not valid"),
        (["--device", "nonsense"], "--device: 'nonsense' is not on this machine"),
        (["--device", "meta"], "--device: 'meta' is not on this machine"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not on this machine"),
    ],
)
@pytest.mark.parametrize("out", ["new/x.npz", "new/x.png"])
@pytest.mark.usefixtures("runs")
def test_sampling_is_refused(refused, words, message, out):
    assert message in refused("sample", "digits", "--steps", "2", "--out", out, *words)


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.usefixtures("runs")
def test_a_class_that_is_not_there_is_refused(refused, label):
    for out in ("new/x.npz", "new/x.png"):
        assert f"class {label} is not in 0..9" in refused("sample", "classes", "--label", label, "--out", out)


def test_places_that_cannot_be_written_are_refused(refused, runs):
    (runs / "file").write_text("kept")
    (runs / "folder.png").mkdir()
    words = ["sample", "digits", "-n", "2", "--steps", "1", "--out"]
    for name in ("file/x.png", "file/x.npz", "file/deeper/x.png", "file/deeper/x.npz"):
        assert "cannot be written" in refused(*words, name)
    assert refused(*words, "folder.png") == "--out: folder.png is a folder"
    assert "should end in .npz, .csv, .txt, .png" in refused(*words, "x.gif")
    assert "should end in .npz, .csv, .txt, .png" in refused(*words, "x")
    assert "do not fit in a picture" in refused("sample", "digits", "-n", "100000", "--out", "x.png")


@pytest.mark.usefixtures("runs")
def test_more_samples_than_the_disk_holds_are_refused(osmose, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 6399, 6399))
    words = ["sample", "digits", "--steps", "1", "--out", "new/x.npz", "--quiet"]
    assert "--out: 100 samples need 0.0 GiB, but . has" in refused(*words, "-n", "100")
    assert osmose(*words, "-n", "99").status == 0


# --- what a run folder may hold -------------------------------------------------------------------------------------


def edit(change):
    def damage(run):
        values = json.loads((run / "config.json").read_text())
        change(values)
        (run / "config.json").write_text(json.dumps(values))

    return damage


def retensor(change):
    def damage(run):
        state = files.read_tensors(run / "model.safetensors")
        change(state)
        files.write_tensors(run / "model.safetensors", state)

    return damage


def spoil(state):
    state[min(state)].view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").write_bytes(b"\x93\x00\xff\xfe"), "config.json: not a JSON file"),
        (lambda run: (run / "config.json").write_bytes(b""), "config.json: not a JSON file"),
        (lambda run: (run / "config.json").write_text("[" * 100_000), "config.json: not a JSON file"),
        (lambda run: os.truncate(run / "config.json", 300), "config.json: not a JSON file"),
        (lambda run: (run / "config.json").write_text('{"_class_name": "DDPMPipeline"}'), "not written by osmose"),
        (lambda run: (run / "config.json").write_text("[1, 2]"), "not written by osmose"),
        (edit(lambda v: v.update(format="osmose-run-9")), "its format is not 'osmose-run-1'"),
        (edit(lambda v: v.update(extra=1)), "config.json: extra: unknown field"),
        (edit(lambda v: v["training"].update(stepz=1)), "config.json: training.stepz: unknown field; did you mean"),
        (
            edit(lambda v: v["method"]["network"].update(widht=1)),
            "config.json: method.network.widht: unknown field; did",
        ),
        (edit(lambda v: v["method"].update(kind="ddim")), "config.json: method.kind: unknown method 'ddim'; did you"),
        (edit(lambda v: v.pop("spec")), "config.json: spec: required, but not given"),
        (edit(lambda v: v.update(seed="x")), "config.json: seed: 'x' is not valid"),
        (edit(lambda v: v["spec"].update(scale=[0, 1])), "scale must be positive"),
        (edit(lambda v: v["training"].update(lr=float("nan"))), "config.json: training.lr: nan is not valid"),
        (lambda run: (run / "config.json").unlink(), "not a run folder (it has no config.json)"),
        (lambda run: (run / "model.safetensors").unlink(), "has no model.safetensors yet"),
        (lambda run: (run / "model.safetensors").write_bytes(b""), "not a readable safetensors file"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\x80\x04" + bytes(5000)), "not a readable safetensors"),
        (
            lambda run: os.truncate(run / "model.safetensors", 2000),
            "model.safetensors: not a readable safetensors file",
        ),
        (lambda run: os.truncate(run / "model.safetensors", 4), "model.safetensors: not a readable safetensors file"),
        (
            lambda run: shutil.copy(run.parent / "digits" / "model.safetensors", run / "model.safetensors"),
            "these weights are not of this run's network",
        ),
        (edit(lambda v: v["method"]["network"].update(width=32)), "this run's network wants"),
        (retensor(lambda state: state.update(more=torch.zeros(1))), "holds 'more', which this run's network does not"),
        (retensor(spoil), "holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("verb", ["sample", "evaluate", "compare", "info", "train"])
def test_a_damaged_run_is_refused_by_every_command(osmose, refused, runs, damage, message, verb):
    if verb == "compare":
        osmose("evaluate", "toy", "-n", "10", "--steps", "1", "--metrics", "sw2")
    damage(runs / "toy")
    weights_only = (runs / "toy" / "config.json").exists() and "config.json" not in message and "osmose" not in message
    if verb == "info" and "has no model.safetensors" in message:
        return  # a run that has only begun can be described
    if verb == "train" and weights_only:
        return  # continues from its checkpoint, which is sound, and writes the weights anew
    words = {
        "sample": ["sample", "toy", "--out", "new/x.npz"],
        "evaluate": ["evaluate", "toy", "-n", "10"],
        "compare": ["compare", "toy", "--out", "new"],
        "info": ["info", "toy"],
        "train": ["train", "--resume", "--out", "toy"],
    }
    said = refused(*words[verb])
    if verb != "compare" or not weights_only:  # other weights have not been evaluated: compare says so first
        assert message in said
    assert "toy" in said


def test_broken_weights_are_made_anew_from_a_sound_checkpoint(osmose, runs):
    before = (runs / "toy" / "model.safetensors").read_bytes()
    os.truncate(runs / "toy" / "model.safetensors", 100)
    assert osmose("train", "--resume", "--out", "toy", "--quiet").status == 0
    assert (runs / "toy" / "model.safetensors").read_bytes() == before


# --- evaluate, compare, info ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0"], "--num: 0 is not valid: must be at least 1"),
        (["-n", "-3"], "--num: -3 is not valid: must be at least 1"),
        (["-n", "2"], "at least 4 needed"),
        (["--metrics", "sw3"], "unknown metric 'sw3'"),
        (["--metrics", "fid"], "fid is not available"),
        (["--reference", "test"], "--reference: 'test' is not valid: should be train or held-out"),
        (["--threads", "0"], "--threads: 0 is not valid: must be at least 1"),
        (["--threads", "-1"], "--threads: -1 is not valid: must be at least 1"),
        (["--steps", "2,x"], "--steps: '2,x' is not valid: should be whole numbers"),
        (["--steps", "0"], "--steps: 0 is not valid"),
        (["--steps", "2000"], "num_steps: 2000 is more than the 1000 steps"),
        (["--seed", "-1"], "seed: -1 is not valid"),
        (["--seed", "18446744073709551616"], "seed: 18446744073709551616 is not valid"),
        (["--device", "nonsense"], "--device: 'nonsense' is not on this machine"),
        (["--batch-size", "0"], "batch_size: 0 is not valid"),
        (["--solver", "huen"], "did you mean 'heun'?"),
        (["--inception-weights", "nowhere"], "nowhere: no such file"),
        (["--inception-weights", "toy/model.safetensors"], "not the FID network of 2015"),
        (["--samples", "x.npz"], "RUN: give a run folder, or --samples FILE.npz with --data"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_evaluation_is_refused(refused, words, message):
    assert message in refused("evaluate", "toy", "--steps", "2", "-n", "20", *words)


@pytest.mark.usefixtures("runs")
def test_too_many_steps_are_refused_before_the_first_are_scored(refused):
    assert "num_steps: 2000" in refused("evaluate", "toy", "--steps", "2,2000", "-n", "20")


def test_a_default_that_its_own_schedule_does_not_have_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["--steps", "1", "network.width=16", "training.batch_size=4", "sampling.num_steps=2000"]
    assert "2000" in refused(*TOY, *settings)


@pytest.mark.usefixtures("runs")
def test_samples_that_cannot_be_scored_are_refused(osmose, refused):
    words = ["evaluate", "--data", "digits", "--samples"]
    assert refused(*words, "nowhere.npz") == "nowhere.npz: no such file"
    assert "not a readable .npz" in refused(*words, "digits/model.safetensors")
    assert "--data: required with --samples" in refused("evaluate", "--samples", "x.npz")
    assert "RUN: give a run folder" in refused("evaluate")
    np.savez("two.npz", a=np.zeros((9, 1, 8, 8)), b=np.zeros(9))
    assert "should be called 'samples'" in refused(*words, "two.npz")
    np.savez("shape.npz", samples=np.zeros((9, 1, 4, 4)))
    assert "shape (9, 1, 4, 4)" in refused(*words, "shape.npz")
    np.savez("nan.npz", samples=np.full((9, 1, 8, 8), np.nan))
    assert "samples" in refused(*words, "nan.npz")
    np.savez("object.npz", samples=np.array([{}] * 9, dtype=object))
    assert "not a readable .npz" in refused(*words, "object.npz")
    np.savez("text.npz", samples=np.array(["a"] * 9))
    assert "have dtype <U1" in refused(*words, "text.npz")
    np.save("one.npy", np.zeros((9, 1, 8, 8)))
    assert "not a readable .npz" in refused(*words, "one.npy")
    osmose("sample", "digits", "-n", "9", "--steps", "1", "--out", "good.npz", "--quiet")
    os.truncate("good.npz", 300)
    assert "not a readable .npz" in refused(*words, "good.npz")


@pytest.mark.usefixtures("runs")
def test_runs_that_cannot_be_compared_are_refused(osmose, refused):
    assert refused("compare") == "RUN: give at least one run folder"
    assert "nowhere: not a run folder" in refused("compare", "nowhere")
    assert "toy: its weights have not been evaluated yet; run: osmose evaluate toy" in refused("compare", "toy")
    for name, number in (("toy", 10), ("digits", 10), ("classes", 12)):
        osmose("evaluate", name, "--steps", "1", "-n", number, "--metrics", "sw2")
    assert "toy were evaluated on different data" in refused("compare", "toy", "digits").replace("digits and ", "")
    assert "classes was evaluated on 12 samples and digits on 10" in refused("compare", "digits", "classes")
    assert refused("compare", "toy", "--out", "toy/config.json") == "--out: toy/config.json is a file; name a folder"
    assert "cannot be written" in refused("compare", "toy", "--out", "toy/config.json/deeper")
    Path("toy/evaluation.json").write_text('{"evaluations": [{"n": 3}]}')
    assert "required, but not given" in refused("compare", "toy")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{'evaluations': []}",
        "[]",
        "{}",
        '{"evaluations": 3}',
        '{"evaluations": [3]}',
    ],
)
@pytest.mark.usefixtures("runs")
def test_an_evaluation_file_of_something_else_is_refused(refused, text):
    Path("toy/evaluation.json").write_text(text)
    for words in (["compare", "toy"], ["info", "toy"]):
        assert "toy" in refused(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN|DATA: required"),
        (["nowhere"], "nowhere: neither a run folder nor a data set"),
        (["toy:moon"], "did you mean 'two-moons'?"),
        (["."], "not a run folder (it has no config.json)"),
        (["digits", "more"], "unknown argument more"),
        (["mnist", "--data-root", "nowhere"], "nowhere"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_info_is_refused(refused, words, message):
    assert message in refused("info", *words)

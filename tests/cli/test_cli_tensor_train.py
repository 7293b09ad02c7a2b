"""Tensor trains from the command line: trained by each optimizer, looked at, distilled, and what is refused."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from osmose.cli.main import main
from osmose.training.run import Run
from osmose.training.trainer import Trainer

TRAIN = ["train", "ddpm", "--network", "tensor-train"]
POINTS = ["--data", "toy:8-gaussians", "data.num_points=200"]
SMALL = ["network.rank=3", "network.degree=3", "sampling.num_steps=3"]
QUICK = ["--quiet", "--threads", "1", "training.preview_samples=4", "training.validation_items=50"]
RUNS = {
    "adam": [*POINTS, "--optimizer", "adam", "--steps", "3", "--batch-size", "32"],
    "als": [
        *("--data", "csv:points.csv", "--optimizer", "als", "--steps", "3", "--batch-size", "256"),
        *("network.output=separate", "training.optimizer.tolerance=0.3"),
    ],
    "riemannian": [
        *("--data", "digits", "--optimizer", "riemannian", "--steps", "3", "--batch-size", "128"),
        *("--conditional", "network.output=block", "training.log_every=1", "training.checkpoint_every=1"),
    ],
    "digits": ["--data", "digits", "--optimizer", "riemannian", "--steps", "2", "--batch-size", "64"],
}
#: So little training leaves samples anywhere.
pytestmark = pytest.mark.filterwarnings("ignore:network.domain")


def write_points(path, columns=3):
    values = np.random.default_rng(0).normal(size=(60, columns))
    values[:, 0] = np.sign(values[:, 0]) + 0.2 * values[:, 0]
    rows = [",".join(f"x{k}" for k in range(columns)), *(",".join(f"{v:.5f}" for v in row) for row in values)]
    Path(path).write_text("\n".join(rows) + "\n")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take longer than everything else."""
    monkeypatch.setattr(Trainer, "preview", lambda _: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of each optimizer; not to be changed."""
    folder, here = tmp_path_factory.mktemp("trains"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "preview", lambda _: None)
        patch.chdir(folder)
        write_points("points.csv")
        for name, words in RUNS.items():
            main([*TRAIN, *words, *SMALL, *QUICK, "--out", name])
    assert Path.cwd() == here
    return folder


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """A working directory with copies of those runs."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def network_of(run):
    return Run.open(run).model().denoiser.network


# --- what is made ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", ["adam", "als", "riemannian"])
def test_a_run_of_each_optimizer(osmose, name):
    config = json.loads(Path(name, "config.json").read_text())
    assert config["training"]["optimizer"]["kind"] == name
    assert config["method"]["network"]["kind"] == "tensor-train"
    lines = Run.open(name).metrics()
    assert any("validation_loss" in line for line in lines)
    trained = [line for line in lines if "lr" in line]
    assert all(0 <= line["outside"] < 0.5 for line in trained)
    assert all(("loss_after" in line) == (name != "adam") for line in trained)
    # Sampled, scored, described, and at its end.
    assert osmose("sample", name, "-n", 12, "--steps", 3, "--out", "x.npz", "--quiet").status == 0
    assert np.load("x.npz")["samples"].shape[0] == 12
    assert osmose("evaluate", name, "--steps", 2, "-n", 30, "--metrics", "sw2").status == 0
    told = osmose("info", name, "--json")
    assert told.status == 0, told
    values = json.loads(told.out)
    network = network_of(name)
    assert values["macs"] == network.macs()
    assert values["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert values["seconds_per_step"] > 0
    answer = osmose("info", name)
    for word in ("network.rank = 3", "network.degree = 3", f'training.optimizer.kind = "{name}"'):
        assert word in answer.out
    assert "was at its last step" in osmose("train", "--resume", "--out", name, "--quiet").out


def test_what_was_asked_for_is_what_is_trained(made):
    adam, als, riemannian = (network_of(made / name) for name in ("adam", "als", "riemannian"))
    assert (adam.count, adam.principal, adam.config.output) == (2, False, "potential")
    assert (als.count, als.principal, als.cores[0].shape[0]) == (3, False, 3)
    assert (riemannian.count, riemannian.principal, riemannian.num_classes) == (16, True, 10)
    assert adam.bonds.tolist() == riemannian.bonds.tolist()[:2] == [3, 3]
    # Ranks that were adapted, in the weights and in the network that is made of them.
    assert max(als.bonds.tolist()) <= 3
    assert als.bonds.tolist() == load_file(made / "als" / "model.safetensors")["denoiser.network.bonds"].tolist()
    assert [core.shape[3] for core in als.trains()[:-1]] == als.bonds.tolist()
    # The linear prediction is that of the data.
    law = riemannian.calibration
    assert torch.allclose(law.axes.T @ law.axes, torch.eye(64), atol=1e-5)
    assert bool((law.spread.diff() <= 1e-6).all())
    assert law.mean.abs().max() > 0.5


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("optimizer", ["adam", "als", "riemannian"])
def test_a_run_that_is_stopped_is_resumed(osmose, contents_of, monkeypatch, optimizer):
    words = [*TRAIN, *POINTS, *SMALL, *QUICK, "--optimizer", optimizer, "--steps", "4", "--batch-size", "64"]
    words += ["training.log_every=1", "training.checkpoint_every=1", "training.validate_every=2"]
    words += ["training.ema=0", "training.clip_grad=null", "training.keep_checkpoints=1"]
    assert osmose(*words, "--out", "whole").status == 0
    optimise = Trainer.optimise

    def signalled(self, window):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimise(self, window)

    monkeypatch.setattr(Trainer, "optimise", signalled)
    answer = osmose(*words, "--out", "parts")
    assert answer.status == 130
    assert "stopped at step 2; everything is saved" in answer.out
    monkeypatch.setattr(Trainer, "optimise", optimise)
    assert osmose("train", "--resume", "--out", "parts", "--quiet").status == 0
    assert contents_of("parts") == contents_of("whole")


@pytest.fixture
def contents_of():
    """Weights and everything else of a run, but the log."""

    def read(folder):
        files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in files
            if path.name not in ("config.json", "metrics.jsonl")
        }

    return read


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", ["adam", "als"])
def test_a_run_is_distilled(osmose, name):
    words = ["--batch-size", 16, "--quiet", "--threads", 1, "training.validation_items=8"]
    answer = osmose(
        "distill",
        "tract",
        name,
        "--out",
        "tract",
        "--schedule",
        "1000,4,1",
        "--steps",
        4,
        "--parametrization",
        "v",
        *words,
    )
    assert answer.status == 0, answer
    weights, teacher = load_file("tract/model.safetensors"), network_of(name)
    for student in (0, 1):
        # What is fitted, and the ranks, are the teacher's.
        assert weights[f"students.{student}.network.bonds"].tolist() == teacher.bonds.tolist()
        for part in ("mean", "axes", "spread"):
            own = weights[f"students.{student}.network.calibration.{part}"]
            assert torch.equal(own, getattr(teacher.calibration, part))
    assert any(not torch.equal(weights[f"students.0.network.cores.{k}"], core) for k, core in enumerate(teacher.cores))
    answer = osmose("distill", "scd", name, "--out", "scd", "--steps", 3, *words)
    assert answer.status == 0, answer
    assert torch.equal(load_file("scd/model.safetensors")["denoiser.network.bonds"], teacher.bonds)
    for run, steps in (("tract", 1), ("scd", 2)):
        assert osmose("sample", run, "-n", 5, "--steps", steps, "--out", f"{run}.npz", "--quiet").status == 0
        assert np.isfinite(np.load(f"{run}.npz")["samples"]).all()
        assert osmose("info", run).status == 0


@pytest.mark.usefixtures("runs")
def test_a_student_that_begins_cold_is_calibrated_all_the_same(osmose):
    words = ["--batch-size", 16, "--quiet", "--threads", 1, "training.validation_items=8", "--cold-start"]
    words += ["--parametrization", "v", "--steps", 2]
    assert osmose("distill", "tract", "digits", "--out", "tract", "--schedule", "1000,1", *words).status == 0
    # Its moments are fitted to the data, not weights of the teacher: without them its components are no components.
    weights, law = load_file("tract/model.safetensors"), network_of("digits").calibration
    for part in ("mean", "spread", "axes"):
        own = weights[f"students.0.network.calibration.{part}"]
        assert torch.allclose(own, getattr(law, part), atol=1e-4), part


@pytest.mark.usefixtures("runs")
def test_a_consistency_model_begins_with_a_train_or_is_one(osmose):
    quick = ["--steps", 2, "--batch-size", 16, *QUICK]
    assert osmose("train", "sct", "--init", "adam", "--out", "tuned", *quick).status == 0
    assert osmose("train", "sct", "--network", "tensor-train", *POINTS, "--out", "fresh", *quick).status == 0
    for run in ("tuned", "fresh"):
        assert osmose("sample", run, "-n", 5, "--steps", 2, "--out", "x.npz", "--quiet").status == 0


def test_networks_are_described(osmose):
    answer = osmose("info", "tensor-train", "--shape", "8", "network.rank=4", "network.degree=5")
    assert answer.status == 0, answer
    rows = [re.findall(r"[\w ]+", line) for line in answer.out.splitlines() if "value" in line or "time  " in line]
    found = {row[0].strip(): [int(number) for number in row[1:] if number.strip().isdigit()] for row in rows if row}
    assert found["value 1"] == [6, 1, 4, 1, 24]
    assert found["value 5"] == [6, 4, 4, 1, 96]
    assert found["time"] == [6, 4, 4, 1, 96]
    answer = osmose("info", "tensor-train", "--shape", "1,8,8", "network.output=block", "--json")
    values = json.loads(answer.out)
    assert len(values["table"]) == 17
    assert values["table"][8]["mode"] == "time, values"
    trained = sum(row["parameters"] for row in values["table"])
    assert values["parameters"] == trained + 64 + 64**2 + 64


# --- what is refused ------------------------------------------------------------------------------------------------

TOY = [*TRAIN, *POINTS, "--quiet", "--out", "new"]
ALS, RIEMANNIAN = [*TOY, "--optimizer", "als"], [*TOY, "--optimizer", "riemannian"]
CSV = [*TRAIN, "--data", "csv:points.csv", "--quiet", "--out", "new"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*CSV, "network.rank=40", "network.degree=2"],
            "network.rank: 40 is more than any bond allows; at most 9 with these degrees",
        ),
        ([*TOY, "network.rank=99"], "network.rank: 99 is more than any bond allows; at most "),
        (
            [*CSV, "network.rank=4,4,3", "network.degree=2"],
            "network.rank: 4 of bond 1 is more than its modes allow; at m",
        ),
        (
            [*CSV, "network.rank=2,9,9", "network.degree=2"],
            "network.rank: 9 of bond 3 is more than its modes allow; at m",
        ),
        ([*TOY, "network.rank=2,2,2"], "network.rank: 3 numbers for 2; give one for each bond, or one for all"),
        ([*TOY, "network.rank=0"], "network.rank: 0 is not valid: must be at least 1"),
        ([*TOY, "network.rank=2.5"], "network.rank: 2.5 is not valid: should be a valid integer"),
        ([*TOY, "network.rank=big"], "network.rank: 'big' is not valid: should be a valid integer"),
        ([*TOY, "network.degree=0"], "network.degree: 0 is not valid: must be at least 1"),
        (
            [*TOY, "network.degree=2,2,2"],
            "network.degree: 3 numbers for 2; give one for each coordinate, or one for all",
        ),
        ([*TOY, "network.time_degree=0"], "network.time_degree: 0 is not valid: should be greater than or equal to 1"),
        ([*TOY, "network.domain=0"], "network.domain: 0 is not valid: should be greater than 0"),
        ([*TOY, "network.domain=inf"], "network.domain: 'inf' is not valid: should be a finite number"),
        ([*TOY, "network.basis=hermit"], "network.basis: 'hermit' is not valid: should be 'hermite', 'legendre'"),
        ([*TOY, "network.output=scalar"], "network.output: 'scalar' is not valid: should be 'potential', 'block' or"),
        ([*TOY, "network.coordinates=5"], "network.coordinates: 5 is more than the 2 values of an event"),
        ([*TOY, "network.coordinates=1"], "network.coordinates: 1 is not valid: should be greater than or equal to 2"),
        ([*TOY, "network.width=8"], "network.width: unknown field"),
        (
            [*TOY, "--network", "tensor-trian"],
            "network.kind: unknown network 'tensor-trian'; did you mean 'tensor-train'?",
        ),
        (
            [*TRAIN, "--data", "csv:column.csv", "--quiet", "--out", "new"],
            "network: a tensor train needs at least 2 coordinates; events of shape (1,) have 1",
        ),
        (
            ["train", "iddpm", *TOY[2:]],
            "network: tensor-train has no second output for a learned variance; use method ddpm or edm",
        ),
        ([*TOY, "--optimizer", "adma"], "unknown optimizer 'adma'; did you mean 'adam'?"),
        ([*TOY, "--optimizer", "riemanian"], "unknown optimizer 'riemanian'; did you mean 'riemannian'?"),
        (
            [*ALS, "--network", "mlp"],
            "training.optimizer: als trains one tensor train and nothing else, and this model has none; use",
        ),
        ([*ALS, "--lr", "2"], "training.lr: 2 is not valid with optimizer als: it is a share, at most 1"),
        ([*ALS, "training.ema=0.9"], "training.ema: 0.9 is not valid with optimizer als"),
        (
            [*ALS, "--data", "digits", "objective=vlb"],
            "training.optimizer: als solves least squares, and the loss of ddpm is none",
        ),
        ([*ALS, "objective=tilted"], "training.optimizer: als solves least squares, and the loss of ddpm is none"),
        (
            [*ALS, "training.optimizer.tolerance=2"],
            "training.optimizer.tolerance: 2 is not valid: should be less than 1",
        ),
        (
            [*CSV, "--optimizer", "als", "network.rank=60", "network.degree=20", "network.time_degree=9"],
            "training.optimizer: als would solve for the ",
        ),
        ([*RIEMANNIAN, "training.clip_grad=1"], "training.clip_grad: 1.0 is not valid with optimizer riemannian"),
        ([*RIEMANNIAN, "--compile"], "training.compile: True is not valid with optimizer riemannian"),
        ([*TOY, "training.optimizer.ridge=1"], "training.optimizer.kind: missing; choose one of adam, als, riemannian"),
        ([*RIEMANNIAN, "training.optimizer.ridge=1"], "training.optimizer.ridge: unknown field"),
    ],
    ids=lambda value: "_".join(value[-2:]) if isinstance(value, list) else "",
)
def test_training_is_refused(refused, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_points("points.csv")
    write_points("column.csv", columns=1)
    assert message in refused(*words)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "als"], "training.optimizer.kind: 'als' given, but adam was started with 'adam'"),
        (["network.rank=4"], "network.rank: 4 given, but adam was started with 3"),
        (["training.optimizer.ridge=1"], "training.optimizer.ridge: unknown field"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_resuming_with_another_setting_is_refused(refused, words, message):
    assert message in refused("train", "--out", "adam", "--resume", *words)


@pytest.mark.usefixtures("runs")
def test_a_train_cannot_be_an_operator(refused):
    assert "network: TensorTrain has no places for temporal layers; use" in refused(
        "distill", "dsno", "adam", "--out", "new", "--num", 24, "--batch-size", 8, "--steps", 2
    )

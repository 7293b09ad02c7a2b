"""`osmose distill scd`, `osmose distill dsno`, `osmose train sct --init`, and what the other commands make of them."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from osmose.acceleration.distill import distill
from osmose.acceleration.trajectories import TrajectoriesConfig
from osmose.acceleration.trajectory_making import make
from osmose.data.dataset import DataConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run, load
from osmose.training.trainer import Trainer, built

POINTS = DataConfig(source="toy:checkerboard", num_points=200)
DIGITS = DataConfig(source="digits")
MLP = {"network": "mlp", "network.width": 16, "network.depth": 1, "network.time_frequency": 0.01}
V = {**MLP, "schedule": "cosine", "parametrization": "v", "sampling.num_steps": 4}
RUNS = {
    "points": ("ddpm", POINTS, V),
    "digits": ("edm", DIGITS, {**MLP, "sampling.num_steps": 4}),
    "other": ("edm", DIGITS, {**MLP, "sampling.num_steps": 4}),
    "gaussian": ("gaussian", DIGITS, {}),
}
QUICK = ["--quiet", "--threads", 1, "training.validation_items=8", "training.preview_samples=1"]
SMALL = [*QUICK, "--batch-size", 8, "--steps", 4, "training.validate_every=99", "training.preview_every=99"]
LOW = "network.time_frequency=0.02"
FEW = ["--num", 24, "trajectories.num_steps=16", "trajectories.points=4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs that have weights of chance, `scd` and `dsno`, made of them, and `paths`; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    for name, (method, data, changes) in RUNS.items():
        run = Run.create(folder / name, recipe(method, data, data.load(), 0, changes))
        model = built(run.config)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        run.write_weights(model.state_dict())
    make(folder / "points", folder / "paths", TrajectoriesConfig(num=24, num_steps=16, points=4, clip=False))
    quick = {"training.batch_size": 8, "training.validation_items": 8, "training.preview_samples": 1, "steps": 2}
    few = {"trajectories.num": 24, "trajectories.num_steps": 16, "trajectories.points": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "preview", lambda _: None)
        distill(folder / "digits", folder / "scd", method="scd", progress=False, **quick)
        distill(folder / "points", folder / "dsno", method="dsno", progress=False, **quick, **few)
    return folder


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """A working directory with copies of those runs."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


pytestmark = [pytest.mark.usefixtures("runs"), pytest.mark.filterwarnings("default::UserWarning")]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take longer than everything else."""
    monkeypatch.setattr(Trainer, "preview", lambda _: None)


# --- what is made ---------------------------------------------------------------------------------------------------


def test_a_run_becomes_a_consistency_model(osmose):
    words = ["--lr", 0.01, "--seed", 3, "--segments", 2, "tangent=clip", "times.mean=-0.5", "jvp=finite-diff"]
    answer = osmose("distill", "scd", "digits", "--out", "made", *words, *SMALL)
    assert (answer.status, answer.err) == (0, "")
    wrote, following = answer.out.splitlines()
    assert re.fullmatch("wrote made: 4 steps in [0-9]+ s", wrote)
    assert following == "next: osmose evaluate made --against digits"
    config = Run.open("made").config
    method = config.method
    assert (config.training.lr, config.seed, config.training.batch_size) == (0.01, 3, 8)
    assert (method.segments, method.tangent, method.times.mean, method.jvp) == (2, "clip", -0.5, "finite-diff")
    assert load("made").sample(2).nfe == 2
    whole = osmose("distill", "scd", "digits", "--out", "whole", *SMALL, "--cold-start", "--json")
    values = json.loads(whole.out)
    assert values.pop("seconds") >= 0
    assert values == {"run": "whole", "finished": True, "data_seconds": 0.0}
    assert Run.open("whole").config.method.warm_start is False
    plain = osmose("distill", "scd", "points", "--out", "plain", *SMALL, "--parametrization", "edm")
    assert plain.out.splitlines()[1] == "next: osmose evaluate plain --steps 1,2,4 --against points"
    assert Run.open("plain").config.method.parametrization.to_json() == {"kind": "edm", "sigma_data": 1.0}


def test_a_run_becomes_an_operator(osmose):
    answer = osmose("distill", "dsno", "points", "--out", "made", *FEW, "--modes", 3, "weight_cap=10", *SMALL)
    assert (answer.status, answer.err) == (0, "")
    assert re.fullmatch("wrote made: 4 steps in [0-9]+ s; its trajectories took [0-9]+ s", answer.out.splitlines()[0])
    assert (Run.open("made").config.method.modes, Run.open("made").config.method.weight_cap) == (3, 10)
    assert Path("made/trajectories/trajectories.json").is_file()
    stored = osmose("distill", "dsno", "points", "--out", "other-one", "--trajectories", "paths", *SMALL)
    assert (stored.status, stored.err) == (0, "")
    assert not Path("other-one/trajectories").exists()


def test_training_begins_with_the_weights_of_a_run(osmose, monkeypatch):
    answer = osmose("train", "sct", "--init", "digits", "--out", "made", *SMALL, "norm=rms")
    assert (answer.status, answer.err) == (0, "")
    assert re.fullmatch(r"wrote made: 1617 items, 4 steps, held-out loss [0-9.e-]+", answer.out.splitlines()[0])
    config = Run.open("made").config
    assert (config.method.kind, config.method.norm, config.parent.folder) == ("sct", "rms", "digits")
    assert config.method.network == Run.open("digits").config.method.network
    again = osmose("train", "--out", "made", "--resume", "--quiet")
    assert "was at its last step, 4, already" in again.out
    # Stopped and taken up, it is the same.
    optimise = Trainer.optimise
    monkeypatch.setattr(Trainer, "optimise", lambda t, w: 1 / 0 if t.step == 2 else optimise(t, w))
    with pytest.raises(ZeroDivisionError):
        osmose("train", "sct", "--init", "digits", "--out", "parts", *SMALL, "norm=rms", "training.checkpoint_every=1")
    monkeypatch.setattr(Trainer, "optimise", optimise)
    assert osmose("train", "--out", "parts", "--resume", "--quiet").status == 0
    assert Run.open("parts").hash() == Run.open("made").hash()


@pytest.mark.parametrize("method", ["sct", "ect"])
def test_training_from_nothing(osmose, method):
    words = ["--data", "digits", "--network", "mlp", "network.width=16", "network.depth=1", LOW]
    answer = osmose("train", method, *words, "--out", "made", *SMALL)
    assert (answer.status, answer.err) == (0, "")
    config = Run.open("made").config
    assert config.parent is None
    assert config.method.parametrization.sigma_data == pytest.approx(0.847, abs=0.01)
    own = config.method.warmup if method == "sct" else config.method.stage_steps
    assert own == (0 if method == "sct" else 1)
    assert osmose("sample", "made", "--out", "s.npz", "-n", 3, "--quiet").status == 0


def test_a_deviation_far_from_the_datas_is_a_note_of_one_line(osmose):
    words = ["--data", "digits", "--network", "mlp", "network.width=16", "network.depth=1", LOW]
    note = "osmose: note: parametrization.sigma_data: 5 is far from the data's 0.847\n"
    answer = osmose("train", "ect", *words, "--out", "made", *SMALL, "parametrization.sigma_data=5")
    assert (answer.status, answer.err) == (0, note)
    answer = osmose("train", "sct", "--init", "digits", "--out", "sct", *SMALL, "parametrization.sigma_data=5")
    assert (answer.status, answer.err) == (0, note)
    answer = osmose("distill", "scd", "digits", "--out", "scd-5", *SMALL, "parametrization.sigma_data=5")
    assert (answer.status, answer.err) == (0, note)


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name", "more"), [("scd", "digits", []), ("dsno", "points", FEW)])
def test_stopped_and_continued(osmose, monkeypatch, method, name, more):
    optimise = Trainer.optimise
    whole = osmose("distill", method, name, "--out", "whole", *more, *SMALL)
    assert whole.status == 0

    def stopped(trainer, window):
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return optimise(trainer, window)

    monkeypatch.setattr(Trainer, "optimise", stopped)
    answer = osmose("distill", method, name, "--out", "parts", *more, *SMALL)
    assert answer.status == 130
    assert answer.out.splitlines() == [
        "stopped; everything is saved",
        f"next: osmose distill {method} {name} --out parts --resume",
    ]
    monkeypatch.setattr(Trainer, "optimise", optimise)
    answer = osmose("distill", method, name, "--out", "parts", "--resume", "--quiet")
    assert (answer.status, answer.err) == (0, "")
    assert Run.open("parts").hash() == Run.open("whole").hash()
    again = osmose("distill", method, name, "--out", "parts", "--resume", "--quiet")
    assert again.out.splitlines()[0] == "parts is finished already"


def test_divergence_is_told_in_a_line(osmose):
    words = ["--lr", 1e30, "training.clip_grad=null", "training.warmup=0"]
    answer = osmose("distill", "scd", "digits", "--out", "made", *words, *SMALL)
    assert answer.status == 1
    assert re.fullmatch(r"osmose: .* no longer finite at step [0-9]+.*\n", answer.err)


# --- what others make of it -----------------------------------------------------------------------------------------


def test_consistency_models_sample_in_any_number_of_steps(osmose):
    for words, options in (
        (["--steps", 1], {"num_steps": 1}),
        (["--steps", 2], {"num_steps": 2, "t_mid": 1.1}),
        (["--steps", 2, "t_mid=0.8"], {"t_mid": 0.8}),
        (["--steps", 2, "--t-mid", 0.8], {"t_mid": 0.8}),
        (["--steps", 3, "t_mid=1.2,0.4"], {"num_steps": 3, "t_mid": (1.2, 0.4)}),
    ):
        answer = osmose("sample", "scd", "-n", 5, "--seed", 3, "--out", "s.npz", "--quiet", *words)
        assert (answer.status, answer.err) == (0, "")
        expected = load("scd").sample(5, seed=3, **options)
        assert f"{expected.nfe} network evaluations each" in answer.out
        assert np.allclose(np.load("s.npz")["samples"], expected.data.numpy(), atol=1e-4)
    mids = [load("scd").sample(5, seed=3, t_mid=t_mid).data for t_mid in (0.8, 1.1)]
    assert not torch.equal(*mids)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scd", "--steps", 2, "t_mid=1.57"], "t_mid: [1.57] is not valid: angles have to fall from below 1.56"),
        (["scd", "--steps", 3, "t_mid=0.5,1.0"], "t_mid: [0.5, 1.0] is not valid"),
        (["scd", "--steps", 3, "t_mid=0.5"], "t_mid: 1 given for num_steps=3"),
        (["scd", "--steps", 2, "t_mid=soon"], "t_mid"),
        (["scd", "--solver", "heun"], "solver"),
        (["scd", "--steps", 0], "num_steps: 0 is not valid"),
        (["dsno", "--steps", 2], "num_steps: 2 is not valid"),
        (["dsno", "t_mid=1.1"], "t_mid"),
    ],
)
def test_steps_that_are_refused(refused, words, message):
    assert message in refused("sample", *words, "-n", 4)


def test_they_are_evaluated_and_described(osmose):
    answer = osmose("evaluate", "scd", "--steps", "1,2", "-n", 20, "--quiet", "--json", "--metrics", "energy")
    assert (answer.status, answer.err) == (0, ""), answer
    assert json.loads(answer.out)
    for run in ("scd", "dsno"):
        answer = osmose("info", run)
        assert answer.status == 0
        assert run in answer.out
    answer = osmose("evaluate", "dsno", "-n", 20, "--quiet", "--metrics", "energy", "--against", "points")
    assert (answer.status, answer.err) == (0, ""), answer


def test_help_names_everything(osmose):
    shown = osmose("distill", "--help").out
    assert "distill scd" in shown
    assert "distill dsno" in shown
    assert "--segments" in osmose("distill", "scd", "--help").out
    assert "--trajectories" in osmose("distill", "dsno", "--help").out
    assert "--init" in osmose("train", "--help").out


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scd", "digits"], "--out: required: the run folder to make"),
        (["scd", "digits", "--out", "other"], "other"),
        (["scd", "nowhere", "--out", "made"], "nowhere: not a run folder"),
        (["scd", "gaussian", "--out", "made"], "gaussian: is no diffusion that scd can begin with"),
        (["scd", "scd", "--out", "made"], "scd: is no diffusion with a flow to learn; ddpm, iddpm and edm are"),
        (["dsno", "scd", "--out", "made"], "scd: is no diffusion with a flow to learn"),
        (["scd", "digits", "--out", "made", "schedule=trig"], "schedule: is that of the run that scd begins with"),
        (["scd", "digits", "--out", "made", "network.width=8"], "network.width: is that of the run"),
        (["scd", "digits", "--out", "made", "warmpu=3"], "warmpu: unknown field; did you mean 'warmup'"),
        (["scd", "digits", "--out", "made", "--parametrization", "x0"], "parametrization: 'x0' does not give"),
        (["scd", "digits", "--out", "made", "--segments", 0], "segments: 0 is not valid"),
        (["scd", "digits", "--out", "made", "--steps", -1], "training.steps: -1 is not valid"),
        (["scd", "digits", "--out", "made", "--lr", 0.1, "training.lr=0.2"], "training.lr: given twice"),
        (["scd", "digits", "--out", "made", "training.compile=true"], "use jvp=finite-diff, or false"),
        (["scd", "digits", "--out", "made", "--threads", 0], "--threads: 0 is not valid"),
        (["dsno", "points", "--out", "made", "--modes", 4], "modes: 4 is more than 4 times have, 3"),
        (["dsno", "points", "--out", "made", "--num", 0], "num: 0 is not valid"),
        (["dsno", "points", "--out", "made", "num_times=3", "modes=1"], "num_times: 3 needs the state at t = 0.444"),
        (["dsno", "digits", "--out", "made", "--trajectories", "paths"], "made from another teacher, 'points'"),
        (["dsno", "points", "--out", "made", "--trajectories", "digits"], "digits"),
        (["dsno", "points", "--out", "made", "--trajectories", "paths", "--num", 9], "are made already"),
    ],
)
def test_a_distillation_is_refused(refused, words, message):
    assert message in refused("distill", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scd", "other", "--out", "scd"], "RUN: other is not what scd was made from, 'digits'"),
        (["dsno", "digits", "--out", "scd"], "scd: was begun with scd, not with dsno"),
        (["tract", "digits", "--out", "scd"], "scd: no distillation was begun here"),
        (["scd", "digits", "--out", "scd", "--steps", 9], "--steps: given, but scd is continued by its own settings"),
        (["scd", "digits", "--out", "scd", "warmup=9"], "warmup: given, but scd is continued by its own settings"),
        (["scd", "digits", "--out", "scd", "--segments", 2], "--segments: given, but scd is continued"),
        (["scd", "digits", "--out", "made"], "made"),
        (["dsno", "points", "--out", "dsno", "--num", 9], "--num: given, but dsno is continued by its own settings"),
    ],
)
def test_going_on_is_refused(refused, words, message):
    assert message in refused("distill", *words, "--resume")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ddpm", "--init", "digits", "--out", "made"], "--init: ddpm does not begin with another run; sct and ect do"),
        (["scd", "--data", "digits", "--out", "made"], "scd: is distilled from a trained run, not trained; use osmose"),
        (["dsno", "--data", "digits", "--out", "made"], "use osmose distill dsno RUN --out RUN2"),
        (["sct", "--init", "gaussian", "--out", "made"], "gaussian: is no diffusion that sct can begin with"),
        (["sct", "--init", "nowhere", "--out", "made"], "nowhere"),
        (["sct", "--init", "digits", "--data", "digits", "--out", "made"], "--data: given, but the data are those of"),
        (["sct", "--init", "digits", "--network", "mlp", "--out", "made"], "network.kind: is that of the run"),
        (["sct", "--init", "digits", "--out", "other"], "other"),
        (["sct", "--init", "digits", "segments=2", "--out", "made"], "segments: unknown field"),
        (["ect", "--init", "digits", "warmup=2", "--out", "made"], "warmup: unknown field"),
        (["sct", "--init", "dsno", "--out", "made"], "dsno: is no diffusion that sct can begin with"),
        (["sct", "--data", "digits", "parametrization=x0", "--out", "made"], "parametrization: 'x0' does not give"),
        (["sct", "--data", "digits", "sampling.t_mid=1.6", "--out", "made"], "t_mid: [1.6] is not valid"),
    ],
)
def test_training_is_refused(refused, words, message):
    assert message in refused("train", *words)


def test_training_stopped_before_it_had_its_weights_begins_anew(refused, osmose, monkeypatch):
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        osmose("train", "sct", "--init", "digits", "--out", "made", *SMALL)
    monkeypatch.setattr(Trainer, "save", save)
    message = refused("train", "--out", "made", "--resume", "--quiet")
    assert message == "made: stopped before it had the weights of 'digits'; delete it and start again"


def test_what_is_taught_is_continued_with_its_teacher_alone(refused, osmose, monkeypatch):
    optimise = Trainer.optimise
    monkeypatch.setattr(Trainer, "optimise", lambda t, w: 1 / 0 if t.step == 2 else optimise(t, w))
    with pytest.raises(ZeroDivisionError):
        osmose("distill", "scd", "digits", "--out", "made", *SMALL, "training.checkpoint_every=1")
    monkeypatch.setattr(Trainer, "optimise", optimise)
    message = refused("train", "--out", "made", "--resume", "--quiet")
    assert "osmose distill scd" in message
    assert "--resume" in message

"""Runs that are trained from another one: what they begin with, that interruptions leave no trace, what is refused."""

import json
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from osmose.acceleration import trajectory_making
from osmose.acceleration.distill import distill
from osmose.acceleration.teaching import Teaching, denoiser_of, prepared
from osmose.acceleration.trajectories import Trajectories, TrajectoriesConfig
from osmose.acceleration.trajectory_making import make
from osmose.configuration import Entry
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.gaussian.parametrization import column
from osmose.gaussian.trigflow import TrigFlow, angle_of
from osmose.methods.consistency import Tangent
from osmose.methods.messages import Batch
from osmose.methods.operator import DSNOConfig
from osmose.studies import STUDIES
from osmose.studies.running import run_study
from osmose.studies.study import Cell, Row, Study
from osmose.training.recipes import recipe
from osmose.training.run import Run, load
from osmose.training.trainer import DivergedError, Trainer, built

POINTS = DataConfig(source="toy:checkerboard", num_points=200)
DIGITS = DataConfig(source="digits")
TINY = {"network": "mlp", "network.width": 16, "network.depth": 1, "network.time_frequency": 0.01}
V = {"schedule": "cosine", "parametrization": "v", "sampling.num_steps": 4}
#: Name: method, data, changes. Networks, schedules and parametrizations of all kinds.
TEACHERS = {
    "v": ("ddpm", POINTS, V),
    "trig": ("ddpm", POINTS, {"schedule": "trig", "parametrization": "v", "sampling.num_steps": 4}),
    "eps": ("ddpm", POINTS, V | {"parametrization": "eps"}),
    "x0": ("ddpm", POINTS, V | {"parametrization": "x0"}),
    "edm": ("edm", POINTS, {"sampling.num_steps": 4}),
    "classes": ("ddpm", DIGITS, V | {"conditional": True}),
    "iddpm": ("iddpm", DIGITS, V | {"parametrization": "eps"}),
    "short": ("ddpm", POINTS, V | {"schedule.num_steps": 8}),
    "other": ("ddpm", POINTS, V),
    "dropout": ("edm", POINTS, {"sampling.num_steps": 4, "network.dropout": 0.3}),
    "gaussian": ("gaussian", POINTS, None),
}
#: Nothing but training; the last step does the rest once.
QUIET = {
    "training.batch_size": 8,
    "training.validation_items": 8,
    "training.validate_every": 1000,
    "training.preview_every": 1000,
    "training.preview_samples": 1,
    "training.log_every": 1,
    "progress": False,
}
#: Few short trajectories.
FEW = {"trajectories.num": 24, "trajectories.num_steps": 16, "trajectories.points": 4}
MORE = {"scd": {}, "dsno": FEW, "sct": {}, "ect": {}}


def write_teacher(folder, name):
    """A run with weights of chance, as different from those of a fresh network as training makes them."""
    method, data, changes = TEACHERS[name]
    run = Run.create(folder / name, recipe(method, data, data.load(), 0, {} if changes is None else TINY | changes))
    model, generator = built(run.config), torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    run.write_weights(model.state_dict())
    return run


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Runs to learn from; not to be changed."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in TEACHERS:
        write_teacher(folder, name)
    make(folder / "v", folder / "paths", TrajectoriesConfig(num=24, num_steps=16, points=4, clip=False))
    taught(folder / "edm", folder / "scd")
    taught(folder / "v", folder / "dsno", "dsno")
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Pictures take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "preview", lambda _: None)
        yield


def taught(run, out, method="scd", **options):
    few = {} if "trajectories" in options else MORE[method]
    return distill(run, out, method=method, **{"steps": 6, **QUIET, **few, **options})


def contents(folder):
    """Everything below a run folder, by its name there; of logs, what does not depend on the clock."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            timings = ("seconds", "items_per_second")
            found[name] = [{k: v for k, v in x.items() if k not in timings} for x in lines]
        elif name.startswith("trajectories/shard") and path.suffix == ".json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def begun(teachers, name, out, method, **options):
    """The training of a run before its first step, and its data."""
    said = {"steps": 6, **{k: v for k, v in QUIET.items() if k != "progress"}, **MORE[method], **options}
    teaching, dataset = prepared(Run.open(teachers / name), out, method, said)
    return teaching.trainer(dataset, progress=False), dataset


# --- what is made ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v", "trig", "eps", "x0", "edm", "classes", "iddpm"])
@pytest.mark.parametrize("method", ["scd", "dsno", "sct", "ect"])
def test_runs_of_all_kinds_are_made_of_all_diffusions(teachers, tmp_path, name, method):
    before = contents(teachers / name)
    made = taught(teachers / name, tmp_path / "made", method, steps=2)
    parent = Run.open(teachers / name)
    assert contents(teachers / name) == before
    assert made.config.method.kind == method
    assert (made.config.parent.folder, made.config.parent.sha256) == (name, parent.hash())
    assert made.config.identity == parent.config.identity
    for field in ("network", "schedule", "noise", "conditional"):
        assert getattr(made.config.method, field) == getattr(parent.config.method, field)
    own, head = parent.config.method.parametrization, made.config.method.parametrization
    kept = own.kind in ("v", "edm") or (method == "dsno" and own.kind == "x0")
    assert head == own if kept else head.kind == "edm"
    if not kept:
        assert head.sigma_data == pytest.approx(0.847 if name == "iddpm" else 1.0, abs=0.01)
    samples = load(tmp_path / "made").sample(3, seed=1)
    assert samples.nfe == (4 if method == "dsno" else 2)
    assert bool(samples.data.isfinite().all())
    assert (samples.condition is not None) is (name == "classes")
    last = made.metrics()[-1]
    assert (last["step"], "validation_loss" in last) == (2, True)
    if method == "dsno":
        paths = Trajectories.open(tmp_path / "made" / "trajectories", parent)
        assert len(paths) == 24
        assert paths.config.to_json() == made.config.method.trajectories
    else:
        assert not (tmp_path / "made" / "trajectories").exists()


@pytest.mark.parametrize("method", ["scd", "sct", "ect"])
@pytest.mark.parametrize("name", ["v", "trig", "edm", "classes"])
def test_before_the_first_step_it_is_the_denoiser_of_its_teacher(teachers, tmp_path, name, method):
    trainer, dataset = begun(teachers, name, tmp_path / "made", method)
    assert trainer.step == 0
    teacher = denoiser_of(Run.open(teachers / name))
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(8, *dataset.spec.shape, generator=generator)
    level = teacher.schedule.level(torch.linspace(0.1, 0.99, 8))
    classes = torch.arange(8) if name == "classes" else None
    models = [trainer.model, Run.open(tmp_path / "made").model()]
    for model in models:
        sd = model.config.sigma_data
        angle, size = angle_of(level, sd), ((level.alpha * sd) ** 2 + level.sigma**2).sqrt() / sd
        found = model.eval().flow.x0(x_t / column(size, x_t), angle, classes)
        assert torch.allclose(found, teacher(x_t, level, classes), atol=1e-5)
    assert torch.equal(models[0].sample(3).data, models[1].sample(3).data)


def test_of_a_learned_variance_only_the_mean_is_taken_over(teachers, tmp_path):
    trainer, _ = begun(teachers, "iddpm", tmp_path / "made", "scd")
    own, theirs = trainer.model.denoiser.network.state_dict(), denoiser_of(Run.open(teachers / "iddpm")).network
    for name, value in theirs.state_dict().items():
        assert torch.equal(own[name], value[: len(own[name])])
    assert trainer.model.teacher.denoiser.learned_variance
    assert not trainer.model.denoiser.learned_variance


def test_a_teacher_is_not_saved_with_its_student(teachers):
    names = set(load_file(Run.open(teachers / "scd").weights))
    assert {name.split(".")[0] for name in names} == {"denoiser", "weight", "steps_done"}
    weights = load_file(Run.open(teachers / "scd").weights)
    assert int(weights["steps_done"]) == 6
    operator = set(load_file(Run.open(teachers / "dsno").weights))
    assert {name.split(".")[0] for name in operator} == {"operator"}


def test_cold_starts(teachers, tmp_path):
    teacher = denoiser_of(Run.open(teachers / "v")).network.state_dict()
    for method, place in (("scd", "denoiser.network."), ("dsno", "operator.backbone.")):
        trainer, _ = begun(teachers, "v", tmp_path / method, method, warm_start=False)
        own = {k.removeprefix(place): v for k, v in trainer.model.state_dict().items() if k.startswith(place)}
        assert own.keys() == teacher.keys()
        assert not torch.equal(own["stem.weight"], teacher["stem.weight"])
        assert trainer.step == 0


def test_what_is_said_is_done(teachers, tmp_path):
    made = taught(
        teachers / "edm", tmp_path / "scd", lr=0.01, seed=4, segments=3, warmup=2, tangent="clip", times={"mean": -0.5},
        training={"ema": 0.5},
    )  # fmt: skip
    method = made.config.method
    assert (made.config.training.lr, made.config.seed, made.config.training.ema) == (0.01, 4, 0.5)
    assert (method.segments, method.warmup, method.tangent) == (3, 2, "clip")
    assert (method.times.mean, method.times.std) == (-0.5, 1.4)
    assert made.model().sample(2).nfe == 3
    quick = taught(teachers / "edm", tmp_path / "quick", steps=5)
    assert quick.config.method.warmup == 1
    one = taught(teachers / "edm", tmp_path / "one", steps=2, sampling={"num_steps": 1})
    assert one.model().sample(2).nfe == 1
    edm = taught(teachers / "v", tmp_path / "edm", steps=2, parametrization={"kind": "edm", "sigma_data": 0.9})
    assert edm.config.method.sigma_data == 0.9
    operator = taught(
        teachers / "v", tmp_path / "dsno", "dsno", num_times=2, modes=1, loss="l2", weight_cap=10, grid="even",
        **{"trajectories.points": 2},
    )  # fmt: skip
    assert (operator.config.method.trajectories["grid"], operator.model().sample(2).nfe) == ("even", 2)


def test_a_seed_decides_everything(teachers, tmp_path):
    one, other, third = (
        taught(teachers / "v", tmp_path / str(index), "sct", seed=seed, steps=2) for index, seed in enumerate((1, 1, 2))
    )
    assert one.hash() == other.hash() != third.hash()


def test_the_operator_learns_from_trajectories_that_are_there(teachers, tmp_path):
    made = taught(teachers / "v", tmp_path / "made", "dsno", trajectories=teachers / "paths")
    assert not (made.folder / "trajectories").exists()
    assert made.config.method.trajectories == Trajectories.open(teachers / "paths").config.to_json()
    # The same trajectories, made on the way, teach the same.
    own = {f"trajectories.{name}": value for name, value in made.config.method.trajectories.items()}
    again = taught(teachers / "v", tmp_path / "again", "dsno", **own)
    assert again.hash() == made.hash()


def test_what_the_teacher_is_compared_by(teachers, tmp_path):
    made = taught(teachers / "v", tmp_path / "made", "dsno", steps=2)
    sampling = made.config.method.teacher_sampling
    teacher = Run.open(teachers / "v").model()
    assert teacher.sample(2, **sampling).nfe == 16
    noise_to_data = Trajectories.open(made.folder / "trajectories")
    assert sampling["clip"] == noise_to_data.config.clip


def test_dropout_of_the_student_alone(teachers, tmp_path):
    for method in ("scd", "sct"):
        for jvp in ("forward", "finite-diff"):
            made = taught(teachers / "dropout", tmp_path / f"{method}-{jvp}", method, jvp=jvp, warmup=0, steps=3)
            tangents = [line["tangent"] for line in made.metrics() if "tangent" in line]
            assert len(tangents) == 3
            assert max(tangents) < 10  # not the difference of two masks over a small step


# --- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["scd", "dsno", "sct", "ect"])
def test_interrupted_and_continued_is_as_if_nothing_had_been(teachers, tmp_path, monkeypatch, method):
    more = {"training.accumulate": 2}
    name = "dropout" if method != "dsno" else "v"
    whole = taught(teachers / name, tmp_path / "whole", method, **more)
    optimise = Trainer.optimise

    def interrupted(trainer, window):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimise(trainer, window)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            taught(teachers / name, tmp_path / "parts", method, **more)
    assert Trainer.optimise is optimise
    assert not (tmp_path / "parts" / "checkpoints" / "step_00000006").exists()
    stopped = [line["step"] for line in Run.open(tmp_path / "parts").metrics()]
    assert max(stopped) == 4
    parts = distill(teachers / name, tmp_path / "parts", method=method, resume=True, progress=False)
    one, other = contents(whole.folder), contents(parts.folder)
    for found in (one, other):  # how often it was saved is another matter
        for path in [path for path in found if path.startswith("checkpoints") and "00000006" not in path]:
            del found[path]
    assert one.keys() == other.keys()
    assert [path for path in one if one[path] != other[path]] == []
    # Finished, it stays as it is.
    again = distill(teachers / name, tmp_path / "parts", method=method, resume=True, progress=False)
    assert contents(again.folder).keys() >= other.keys()
    assert again.hash() == whole.hash()


def test_killed_before_anything_was_saved(teachers, tmp_path, monkeypatch):
    whole = taught(teachers / "edm", tmp_path / "whole")

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        with pytest.raises(SystemExit):
            taught(teachers / "edm", tmp_path / "parts")
    assert not Run.open(tmp_path / "parts").weights.exists()
    parts = distill(teachers / "edm", tmp_path / "parts", method="scd", resume=True, progress=False)
    assert parts.hash() == whole.hash()


def test_killed_while_trajectories_were_made(teachers, tmp_path, monkeypatch):
    more = {"trajectories.shard_size": 6}
    whole = taught(teachers / "v", tmp_path / "whole", "dsno", **more)
    states, calls = trajectory_making.states, []

    def killed(*given, **options):
        calls.append(1)
        if len(calls) == 3:
            raise SystemExit
        return states(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trajectory_making, "states", killed)
        with pytest.raises(SystemExit):
            taught(teachers / "v", tmp_path / "parts", "dsno", **more)
    assert len(list((tmp_path / "parts" / "trajectories").glob("shard-*.json"))) == 2
    parts = distill(teachers / "v", tmp_path / "parts", method="dsno", resume=True, progress=False)
    assert parts.hash() == whole.hash()
    kept, fresh = (Trajectories.open(run.folder / "trajectories") for run in (parts, whole))
    assert kept.sha256 == fresh.sha256


def test_the_share_of_the_tangent_goes_on_where_it_was(teachers, tmp_path, monkeypatch):
    shares, tangent = [], Tangent.tangent

    def noted(model, batch, angle, z, share):
        shares.append(share)
        return tangent(model, batch, angle, z, share)

    monkeypatch.setattr(Tangent, "tangent", noted)
    optimise = Trainer.optimise

    def interrupted(trainer, window):
        if trainer.step == 3 and not shares.count("stopped"):
            shares.append("stopped")
            os.kill(os.getpid(), signal.SIGTERM)
        return optimise(trainer, window)

    monkeypatch.setattr(Trainer, "optimise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        taught(teachers / "edm", tmp_path / "made", warmup=4)
    assert shares == [0, 0.25, 0.5, "stopped", 0.75]
    shares.append("again")
    made = distill(teachers / "edm", tmp_path / "made", method="scd", resume=True, progress=False)
    assert shares[6:8] == [1, 1]
    assert int(load_file(made.weights)["steps_done"]) == 6


# --- what is refused ------------------------------------------------------------------------------------------------


def test_another_teacher_or_method_cannot_take_over(teachers, tmp_path):
    shutil.copytree(teachers / "scd", tmp_path / "scd")
    shutil.copytree(teachers / "dsno", tmp_path / "dsno")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"RUN: .*v is not what .*scd was made from, 'edm' \(their weights differ\)"):
        distill(teachers / "v", tmp_path / "scd", method="scd", resume=True)
    with pytest.raises(UserError, match="was begun with scd, not with dsno"):
        distill(teachers / "edm", tmp_path / "scd", method="dsno", resume=True)
    with pytest.raises(UserError, match="was begun with scd, not with sct"):
        distill(teachers / "edm", tmp_path / "scd", method="sct", resume=True)
    with pytest.raises(UserError, match="no distillation was begun here"):
        distill(teachers / "edm", tmp_path / "scd", method="tract", resume=True)
    with pytest.raises(UserError, match=r"steps: given, but .*scd is continued by its own settings"):
        distill(teachers / "edm", tmp_path / "scd", method="scd", resume=True, steps=3)
    with pytest.raises(UserError, match=r"is not what .* was made from, another run"):
        Teaching.open(teachers / "trig", Run.open(teachers / "v"), "ddpm")
    with pytest.raises(UserError):
        taught(teachers / "edm", tmp_path / "scd")
    with pytest.raises(UserError):
        distill(teachers / "edm", tmp_path / "nothing", method="scd", resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "method", "options", "message"),
    [
        ("edm", "scd", {"schedule": "trig"}, "schedule: is that of the run that scd begins with"),
        ("edm", "scd", {"network.width": 8}, r"network\.width: is that of the run that scd begins with"),
        ("edm", "sct", {"conditional": True}, "conditional: is that of the run"),
        ("edm", "scd", {"noise": "white"}, "noise: is that of the run"),
        ("edm", "scd", {"warmpu": 3}, "warmpu: unknown field; did you mean 'warmup'"),
        ("edm", "scd", {"batch_size": 3}, "batch_size: unknown field; did you mean 'training.batch_size'"),
        ("edm", "scd", {"training.btach_size": 3}, "btach_size"),
        ("edm", "scd", {"modes": 2}, "modes: unknown field"),
        ("edm", "sct", {"segments": 2}, "segments: unknown field"),
        ("edm", "sct", {"warm_start": False}, "warm_start: unknown field"),
        ("edm", "scd", {"segments": 0}, "segments: 0 is not valid"),
        ("edm", "scd", {"steps": -1}, "steps: -1 is not valid"),
        ("edm", "scd", {"steps": "many"}, "steps: 'many' is not valid"),
        ("edm", "scd", {"tangent": "big"}, "tangent: 'big' is not valid"),
        ("edm", "scd", {"parametrization": "eps"}, "parametrization: 'eps' does not give"),
        ("edm", "scd", {"sampling.t_mid": 2.0}, r"t_mid: \[2\.0\] is not valid"),
        ("edm", "scd", {"times": "loss-aware"}, "times: 'loss-aware' remembers losses step by step"),
        ("edm", "scd", {"trajectories.num": 3}, "trajectories: given, but scd learns from none"),
        ("edm", "scd", {"trajectories": "paths"}, "trajectories: "),
        ("v", "dsno", {"parametrization": "eps"}, "parametrization: 'eps' cannot give x0"),
        ("v", "dsno", {"modes": 4}, "modes: 4 is more than 4 times have, 3"),
        ("v", "dsno", {"trajectories.num_steps": 10}, "num_steps: 10 is not valid"),
        ("v", "dsno", {"trajectories.nmu": 10}, "nmu"),
        ("v", "dsno", {"trajectories": "nowhere"}, "nowhere"),
        ("gaussian", "scd", {}, "gaussian: is no diffusion that scd can begin with"),
        ("gaussian", "sct", {}, "gaussian: is no diffusion that sct can begin with"),
        ("scd", "dsno", {}, "scd: is no diffusion with a flow to learn"),
        ("scd", "scd", {}, "scd: is no diffusion with a flow to learn"),
        ("dsno", "scd", {}, "dsno: is no diffusion that scd can begin with"),
        ("dsno", "sct", {}, "dsno: is no diffusion that sct can begin with"),
        ("edm", "sdc", {}, "sdc"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    teachers, tmp_path, name, method, options, message
):
    with pytest.raises(UserError, match=message) as caught:
        distill(teachers / name, tmp_path / "made", method=method, **{"steps": 2, **options})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_trajectories_that_do_not_fit_are_refused_before_anything_is_written(teachers, tmp_path):
    with pytest.raises(UserError, match="made from another teacher, 'v', not from"):
        distill(teachers / "other", tmp_path / "made", method="dsno", trajectories=teachers / "paths")
    small = {"num_times": 3, "training.batch_size": 8}
    with pytest.raises(UserError, match=r"num_times: 3 needs the state at t = 0\.444, which the trajectories do not"):
        distill(teachers / "v", tmp_path / "made", method="dsno", trajectories=teachers / "paths", **small)
    with pytest.raises(UserError, match=r"trajectories\.num: given, but the trajectories of .* are made already"):
        distill(
            teachers / "v", tmp_path / "made", method="dsno", trajectories=teachers / "paths", **{"trajectories.num": 3}
        )
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(teachers / "paths", tmp_path / "cut")
    shard = tmp_path / "cut" / "shard-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match="truncated or changed since it was written"):
        distill(teachers / "v", tmp_path / "made", method="dsno", trajectories=tmp_path / "cut")
    (tmp_path / "cut" / "shard-00000.json").unlink()
    with pytest.raises(UserError, match="has 0 of 1 shards"):
        distill(teachers / "v", tmp_path / "made", method="dsno", trajectories=tmp_path / "cut")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("v", {"num_times": 3, "modes": 1}, "num_times: 3 needs the state at t = "),
        ("v", {"trajectories.num": 1}, "trajectories.num: 1 is fewer than the 8 of a batch"),
        ("short", {"num_times": 4}, "num_times: 4 is too many for a schedule of 8 steps"),
        ("short", {"trajectories.num_steps": 64, "num_times": 2}, "num_steps: 64 is more than the 8 steps"),
        ("v", {"trajectories.clip": True}, "clip: true needs data with a range"),
    ],
)
def test_trajectories_that_would_not_fit_are_refused_before_they_are_made(teachers, tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        taught(teachers / name, tmp_path / "made", "dsno", **options)
    assert list(tmp_path.iterdir()) == []


def test_other_trajectories_cannot_take_over(teachers, tmp_path, monkeypatch):
    optimise = Trainer.optimise

    def interrupted(trainer, window):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimise(trainer, window)

    whole = taught(teachers / "v", tmp_path / "whole", "dsno", trajectories=teachers / "paths")
    out = tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            taught(teachers / "v", out, "dsno", trajectories=teachers / "paths")
    make(teachers / "v", tmp_path / "more", TrajectoriesConfig(num=30, num_steps=16, points=4, clip=False))
    again = {"method": "dsno", "resume": True, "progress": False}
    with pytest.raises(UserError, match=r"trajectories: .*more are not those that .*made was begun with"):
        distill(teachers / "v", out, trajectories=tmp_path / "more", **again)
    with pytest.raises(UserError, match=r"trajectories: those that .*made was begun with lie elsewhere; name their"):
        distill(teachers / "v", out, **again)
    assert distill(teachers / "v", out, trajectories=teachers / "paths", **again).hash() == whole.hash()


def test_a_run_without_weights_teaches_nothing(teachers, tmp_path):
    Run.create(tmp_path / "empty", Run.open(teachers / "v").config)
    with pytest.raises(UserError, match=r"has no model\.safetensors yet"):
        distill(tmp_path / "empty", tmp_path / "made", method="scd")
    assert not (tmp_path / "made").exists()


def test_training_goes_through_the_distillation(teachers, tmp_path):
    shutil.copytree(teachers / "scd", tmp_path / "scd")
    run = Run.open(tmp_path / "scd")
    trainer = Trainer(run, POINTS.load())
    with pytest.raises(UserError, match="scd: has no teacher"):
        trainer.model.loss(Batch(torch.zeros(8, 2)), StepDraws(0, 0, 0, 8, 8))


def test_numbers_that_run_away_name_their_times(teachers, tmp_path, monkeypatch):
    velocity = TrigFlow.velocity

    def broken(flow, x, angle, condition=None):
        found = velocity(flow, x, angle, condition)
        if not found.requires_grad:
            found[2] = torch.nan
        return found

    monkeypatch.setattr(TrigFlow, "velocity", broken)
    draws = StepDraws(0, 0, 0, 8, 8)
    with pytest.raises(DivergedError) as caught:
        taught(teachers / "edm", tmp_path / "made")
    t = float(Run.open(teachers / "scd").model().times.draw(draws)[0][2])
    assert f"the loss is no longer finite at step 1 (last batch: t from {t:.3f} to {t:.3f}, median" in str(caught.value)


def test_a_deviation_that_is_not_the_datas_is_told(teachers, tmp_path):
    with pytest.warns(UserWarning, match=r"parametrization\.sigma_data: 5 is far from the data's (1|0\.99|1\.0)"):
        taught(teachers / "edm", tmp_path / "made", "sct", parametrization={"kind": "edm", "sigma_data": 5.0}, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        taught(teachers / "edm", tmp_path / "other", "sct", steps=1)


# --- studies --------------------------------------------------------------------------------------------------------


class Academy(Study):
    """Whatever is made of a teacher."""

    title = "An academy"
    source = "nowhere"
    #: Knobs.
    teacher_steps = 3
    uses = ("teacher",)

    def seeds(self):
        return (0,)

    def cells(self):
        quick = {"training.batch_size": 8, "steps": 4}
        plain = {"training.batch_size": 8, "training.steps": type(self).teacher_steps, **TINY}
        return [
            Cell("scd", "scd", "digits", quick, uses=("teacher",)),
            Cell("dsno", "dsno", "digits", quick | FEW, uses=("teacher",)),
            Cell("sct", "sct", "digits", {"training.batch_size": 8, "training.steps": 4}, uses=type(self).uses),
            Cell("teacher", "edm", "digits", plain),
        ]

    def measure(self, trained):
        return [Row({}, {"mean": float(trained.model.sample(2, seed=0).data.mean())})]

    def claims(self):
        return []


@pytest.fixture
def academy(tmp_path, monkeypatch):
    """Run it; the steps that were trained by run folder, and the outcome."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES.entries, "academy", Entry("test_acceleration_teaching:Academy", "a teacher, students"))
    steps, optimise = {}, Trainer.optimise

    def counted(trainer, window):
        steps[trainer.run.folder.name] = steps.get(trainer.run.folder.name, 0) + 1
        return optimise(trainer, window)

    monkeypatch.setattr(Trainer, "optimise", counted)

    def run():
        steps.clear()
        outcome = run_study("academy", "out", progress=False)
        assert not outcome.failures
        return dict(steps)

    return run


def test_a_study_teaches_and_does_nothing_twice(academy, monkeypatch):
    # Whatever precision a method would have by itself.
    monkeypatch.setattr(DSNOConfig, "training_recipe", classmethod(lambda *_: {}))
    made = {"teacher-0": 3, "scd-0": 4, "dsno-0": 4, "sct-0": 4}
    assert academy() == made
    teacher = Run.open("out/runs/teacher-0").hash()
    for name in ("scd", "dsno", "sct"):
        run = Run.open(f"out/runs/{name}-0")
        assert (run.config.parent.folder, run.config.parent.sha256) == ("teacher-0", teacher)
        assert run.config.training.precision == "fp32"
    assert academy() == {}
    for path in Path("out/measurements").glob("*.json"):
        path.unlink()
    assert academy() == {}
    # Another teacher makes all of them anew.
    monkeypatch.setattr(Academy, "teacher_steps", 5)
    assert academy() == made | {"teacher-0": 5}
    assert Run.open("out/runs/sct-0").config.parent.sha256 == Run.open("out/runs/teacher-0").hash() != teacher


def test_a_cell_may_begin_by_itself_and_then_with_another(academy, monkeypatch):
    """The same name, from scratch first, from a run's weights after, and back."""
    monkeypatch.setattr(Academy, "uses", ())
    cells = Academy.cells
    alone = [TINY | {"training.batch_size": 8, "training.steps": 4}, {"training.batch_size": 8, "training.steps": 4}]

    def changed(self):
        own = alone[0] if not type(self).uses else alone[1]
        return [
            Cell("sct", "sct", "digits", own, uses=type(self).uses) if cell.name == "sct" else cell
            for cell in cells(self)
            if cell.name in ("sct", "teacher")
        ]

    monkeypatch.setattr(Academy, "cells", changed)
    assert academy() == {"teacher-0": 3, "sct-0": 4}
    assert Run.open("out/runs/sct-0").config.parent is None
    monkeypatch.setattr(Academy, "uses", ("teacher",))
    assert academy() == {"sct-0": 4}
    assert Run.open("out/runs/sct-0").config.parent.folder == "teacher-0"
    monkeypatch.setattr(Academy, "uses", ())
    assert academy() == {"sct-0": 4}
    assert Run.open("out/runs/sct-0").config.parent is None

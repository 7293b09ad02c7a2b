"""From a run to students of a few steps: what is made, from what, and that interruptions leave no trace."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from osmose.acceleration.distill import distill
from osmose.acceleration.plan import default_steps, plan
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.grid import TimeGrid
from osmose.methods.time_distillation import BTD, Tract
from osmose.training.config import Parent
from osmose.training.recipes import recipe
from osmose.training.run import Run, load
from osmose.training.trainer import DivergedError, Trainer, built

POINTS = DataConfig(source="toy:checkerboard", num_points=200)
DIGITS = DataConfig(source="digits")
TINY = {"network": "mlp", "network.width": 16, "network.depth": 1}
V64 = {"schedule": "cosine", "schedule.num_steps": 64, "parametrization": "v", "sampling.num_steps": 8}
#: Nothing but training; the last step of a phase does the rest once.
QUIET = {
    "training.batch_size": 8,
    "training.validation_items": 8,
    "training.validate_every": 1000,
    "training.preview_every": 1000,
    "training.preview_samples": 1,
    "training.log_every": 1,
    "progress": False,
}
#: Adam's steps are as long as the rate: so small that none shows.
STILL = {"lr": 1e-12}
#: Name: method, data, changes. Networks, schedules and parametrizations of all kinds.
TEACHERS = {
    "v": ("ddpm", POINTS, V64),
    "eps": ("ddpm", POINTS, V64 | {"parametrization": "eps"}),
    "x0": ("ddpm", POINTS, V64 | {"parametrization": "x0"}),
    "edm": ("edm", POINTS, {"sampling.num_steps": 8}),
    "trig": ("ddpm", POINTS, {"schedule": "trig", "parametrization": "v", "sampling.num_steps": 8}),
    "straight": ("ddpm", POINTS, {"schedule": "straight", "parametrization": "v", "sampling.num_steps": 8}),
    "classes": ("ddpm", DIGITS, V64 | {"conditional": True}),
    "iddpm": ("iddpm", DIGITS, {**V64, "parametrization": "eps"}),
    "other": ("ddpm", POINTS, V64),
    "gaussian": ("gaussian", POINTS, None),
}


def write_teacher(folder, name):
    """A run with weights of chance, as different from those of a fresh network as training makes them."""
    method, data, changes = TEACHERS[name]
    changes = {} if changes is None else {**TINY, **changes}
    run = Run.create(folder / name, recipe(method, data, data.load(), 0, changes))
    model = built(run.config)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    run.write_weights(model.state_dict())
    return run


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Runs to distil; not to be changed."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in TEACHERS:
        write_teacher(folder, name)
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take longer than everything else."""
    without_pictures(monkeypatch)


def without_pictures(patch):
    patch.setattr(Trainer, "preview", lambda _: None)
    patch.setattr("osmose.acceleration.distill.write_losses", lambda *_: None)


@pytest.fixture(scope="module")
def whole(teachers, tmp_path_factory):
    """A distillation in two phases that nothing disturbed; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        return distilled(teachers / "v", tmp_path_factory.mktemp("whole") / "run").folder


def distilled(run, out, schedule=(64, 8, 1), **options):
    return distill(run, out, **{"schedule": schedule, "steps": 8, **QUIET, **options})


def weights_of(run, index=0):
    """The weights of a student's or a diffusion's network, by name."""
    tensors = load_file(Run.open(run).weights)
    prefixes = (f"students.{index}.network.", "denoiser.network.")
    return {n.removeprefix(p): value for n, value in tensors.items() for p in prefixes if n.startswith(p)}


def same(one, other, **tolerance):
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], **tolerance) for n in one)


def contents(folder):
    """Everything below a run folder, by its name there; of logs, what does not depend on the clock."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            timings = ("seconds", "items_per_second")
            found[str(path.relative_to(folder))] = [{k: v for k, v in x.items() if k not in timings} for x in lines]
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


# --- what is made ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tract", "btd"])
def test_phases_are_runs_and_the_result_is_made_of_their_averaged_students(teachers, tmp_path, method):
    schedule, data = ([64, 16, 4, 1] if method == "tract" else [8, 4, 2, 1]), DIGITS.load()
    made = distilled(teachers / "classes", tmp_path / "made", schedule, method=method, steps=9)
    assert made.config == Run.open(tmp_path / "made").config
    assert made.config.identity.sha256 == data.identity.sha256
    parent, expected, lines = Run.open(teachers / "classes"), {}, []
    assert (made.config.parent.folder, made.config.parent.sha256) == ("classes", parent.hash())
    for index, count in enumerate(schedule[1:]):
        phase = Run.open(tmp_path / "made" / "phases" / str(count))
        assert phase.config.method.kind == method
        assert (phase.config.parent.folder, phase.config.parent.sha256) == (parent.folder.name, parent.hash())
        assert phase.config.versions == made.config.versions != {}
        samples = load(phase.folder).sample(5, seed=3)
        assert samples.nfe == count
        again = load(made.folder).sample(5, seed=3, num_steps=count)
        assert torch.equal(samples.data, again.data)
        assert again.condition.tolist() == [0, 1, 2, 3, 4]
        average = load_file(phase.folder / "checkpoints" / "step_00000003" / "average.safetensors")
        assert average.keys() == dict(phase.model().named_parameters(prefix="")).keys() - {
            name for name, _ in phase.model().named_parameters() if name.startswith("self_teacher")
        }
        expected |= {name.replace("students.0", f"students.{index}"): value for name, value in average.items()}
        lines += [{**line, "step": line["step"] + 3 * index, "phase": index + 1} for line in phase.metrics()]
        parent = phase
    weights = load_file(made.weights)
    learned = {name for name, _ in load(made.folder).named_parameters()}
    assert learned == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert made.metrics() == lines
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 10))
    assert load(made.folder).sample(2).nfe == 1
    assert {"config.json", "distillation.json", "metrics.jsonl", "model.safetensors", "phases"} <= {
        path.name for path in made.folder.iterdir()
    }


@pytest.mark.parametrize(
    ("name", "schedule", "options"),
    [
        ("v", [64, 8, 1], {}),
        ("x0", [64, 8, 1], {}),
        ("eps", [64, 8, 2], {}),
        ("edm", [16, 4, 1], {}),
        ("edm", [16, 4, 1], {"solver": "heun", "weight": "v"}),
        ("trig", [32, 4, 1], {"solver": "heun"}),
        ("straight", [32, 4, 1], {"snr_cap": 100.0}),
        ("classes", [32, 4, 1], {"spacing": "karras"}),
        ("iddpm", [64, 8, 2], {}),
        ("v", [8, 4, 2, 1], {"method": "btd"}),
        ("edm", [8, 4, 2], {"method": "btd", "solver": "heun", "weight": "constant"}),
    ],
)
def test_students_of_every_kind_of_teacher_begin_as_their_teacher(teachers, tmp_path, name, schedule, options):
    made = distilled(teachers / name, tmp_path / "made", schedule, **STILL, **options)
    teacher, students = load(teachers / name), load(made.folder)
    for index, count in enumerate(schedule[1:]):
        assert same(weights_of(made.folder, index), weights_of(teachers / name), atol=1e-8)
        samples = students.sample(4, num_steps=count)
        assert samples.nfe == count
        assert bool(samples.data.isfinite().all())
        levels = students.grids[count].levels
        assert (len(levels), levels[-1]) == (count + 1, students.grids[schedule[-1]].levels[-1])
        condition = torch.arange(4) if name == "classes" else None
        for level in levels[:-1]:
            x = torch.randn(4, *teacher.spec.shape, generator=torch.Generator().manual_seed(1))
            expected, given = (own(x, level, condition) for own in (teacher.denoiser, students.student(count)))
            assert torch.allclose(given, expected, rtol=1e-5, atol=1e-5)
    spacing = options.get("spacing", "trailing" if teacher.schedule.native_steps else "even")
    assert students.grids[schedule[1]].levels[0] == TimeGrid.of(teacher.schedule, schedule[0], spacing).levels[0]
    assert made.config.method.teacher_sampling["num_steps"] == schedule[0]
    full = teacher.sample(3, **made.config.method.teacher_sampling)
    assert full.nfe == schedule[0] * (2 if options.get("solver") == "heun" else 1) - (options.get("solver") == "heun")


def test_a_teacher_of_noise_teaches_one_step_to_a_student_of_another_kind(teachers, tmp_path):
    with pytest.raises(UserError, match=r"'eps' cannot give x0 in one step, .* use parametrization=v"):
        distilled(teachers / "eps", tmp_path / "made")
    assert not any(tmp_path.iterdir())
    made = distilled(teachers / "eps", tmp_path / "made", parametrization="v", **STILL)
    assert made.config.method.model.parametrization.kind == "v"
    assert same(weights_of(made.folder), weights_of(teachers / "eps"), atol=1e-8)
    assert bool(load(made.folder).sample(4).data.isfinite().all())


def test_a_student_imitates_its_teacher(teachers, tmp_path):
    """In one step, from the same noise, and better than the teacher itself can in one step."""
    more = {"steps": 300, "training.batch_size": 64, "lr": 3e-3}
    made = distilled(teachers / "v", tmp_path / "made", **more)
    teacher, student = load(teachers / "v"), load(made.folder)
    whole = teacher.sample(200, **made.config.method.teacher_sampling).data

    def error(samples):
        return float((samples - whole).square().mean().sqrt())

    spread = float(whole.std())
    assert error(student.sample(200, num_steps=8).data) < 0.1 * spread
    assert error(student.sample(200).data) < 0.4 * spread
    assert error(student.sample(200).data) < 0.5 * error(teacher.sample(200, num_steps=1, spacing="trailing").data)


def test_a_cold_start_is_a_fresh_network_of_the_seed(teachers, tmp_path):
    def cold(name, **options):
        return distilled(teachers / "v", tmp_path / name, warm_start=False, **STILL, **options).folder

    one, again, other = cold("one"), cold("again"), cold("other", seed=1)
    for index, count in enumerate((8, 1)):
        fresh = built(Run.open(one / "phases" / str(count)).config).state_dict()
        fresh = {n.removeprefix("students.0.network."): v for n, v in fresh.items() if n.startswith("students.0.net")}
        assert same(weights_of(one, index), fresh, atol=1e-8)
        assert not same(weights_of(one, index), weights_of(teachers / "v"), atol=0.01)
        assert same(weights_of(one, index), weights_of(again, index), rtol=0, atol=0)
        assert not same(weights_of(one, index), weights_of(other, index), atol=0.01)
    assert not same(weights_of(one, 0), weights_of(one, 1), atol=0.01), "phases have seeds of their own"


def test_the_same_seed_gives_the_same_weights(teachers, tmp_path, whole):
    torch.manual_seed(5)
    again = distilled(teachers / "v", tmp_path / "again").folder
    assert contents(again) == contents(whole)
    other = distilled(teachers / "v", tmp_path / "other", seed=1).folder
    assert not same(weights_of(other), weights_of(whole), atol=1e-6)


# --- what is decided ------------------------------------------------------------------------------------------------


def decided(method, data, changes, kind="tract", **said):
    """The plan for a teacher that need not exist."""
    config = recipe(method, data, data.load(), 0, {**TINY, **changes})
    return plan(config, Parent(folder="teacher", sha256=""), kind, said)


@pytest.mark.parametrize(
    ("method", "changes", "kind", "said", "counts"),
    [
        ("ddpm", {"parametrization": "v"}, "tract", {}, [64, 8, 1]),
        ("ddpm", V64 | {"schedule.num_steps": 1024}, "tract", {"schedule": [1024, 32, 1]}, [1024, 32, 1]),
        ("ddpm", V64, "tract", {}, [64, 8, 1]),
        ("ddpm", V64 | {"schedule.num_steps": 40}, "tract", {}, [40, 5, 1]),
        ("ddpm", V64 | {"schedule.num_steps": 13}, "tract", {}, [13, 1]),
        ("ddpm", V64 | {"schedule.num_steps": 2, "sampling.num_steps": 2}, "tract", {}, [2, 1]),
        ("ddpm", V64 | {"schedule.num_steps": 40}, "btd", {}, [32, 16, 8, 4, 2, 1]),
        ("edm", {}, "tract", {}, [64, 8, 1]),
        ("edm", {}, "tract", {"solver": "heun"}, [40, 5, 1]),
        ("edm", {}, "btd", {}, [64, 32, 16, 8, 4, 2, 1]),
        ("edm", {}, "btd", {"solver": "heun"}, [32, 16, 8, 4, 2, 1]),
        ("edm", {}, "tract", {"schedule": [3000, 10]}, [3000, 10]),
    ],
)
def test_schedules(method, changes, kind, said, counts):
    made = decided(method, POINTS, changes, kind, **said)
    assert made.counts() == counts
    assert [phase.method.kind for phase in made.phases] == [kind] * (len(counts) - 1)
    assert {phase.method.num_steps for phase in made.phases} == {counts[0]}
    assert [phase.method.sampling.num_steps for phase in made.phases] == counts[1:]


def test_each_phase_has_its_length_and_its_rate():
    made = decided("ddpm", POINTS, V64, steps=[30, 50], lr=[1e-3, 2e-4], **{"training.warmup": 7})
    assert [phase.training.steps for phase in made.phases] == [30, 50]
    assert [phase.training.lr for phase in made.phases] == [1e-3, 2e-4]
    assert [phase.training.warmup for phase in made.phases] == [7, 7]
    assert [phase.training.ema for phase in made.phases] == pytest.approx([1e-3 ** (1 / 30), 1e-3 ** (1 / 50)])
    shared = decided("ddpm", POINTS, V64, schedule=[64, 16, 4, 1], steps=20, lr=0.5, ema_residual=0.1)
    assert [phase.training.steps for phase in shared.phases] == [7, 7, 6]
    assert [phase.training.lr for phase in shared.phases] == [0.5] * 3
    assert [phase.training.ema for phase in shared.phases] == pytest.approx([0.1 ** (1 / n) for n in (7, 7, 6)])
    assert len({phase.seed for phase in shared.phases}) == 3
    for data in (POINTS, DIGITS):
        spec = data.load().spec
        assert sum(phase.training.steps for phase in decided("ddpm", data, V64).phases) == default_steps(spec)


def test_no_residual_is_no_average(teachers, tmp_path, whole):
    made = distilled(teachers / "v", tmp_path / "made", ema_residual=0).folder
    live = "phases/8/checkpoints/step_00000004/weights.safetensors"
    for folder, equal in ((made, True), (whole, False)):
        last = {n.removeprefix("students.0.network."): v for n, v in load_file(folder / live).items()}
        averaged = weights_of(folder)
        assert same(averaged, {name: last[name] for name in averaged}, rtol=0, atol=0) == equal
    assert Run.open(made / "phases" / "8").config.training.ema == 0


def test_groups_may_be_unequal(teachers, tmp_path):
    made = distilled(teachers / "v", tmp_path / "made", [64, [4, 16, 64], 1])
    assert made.config.method.grids == ((4, 16, 64), 1)
    one, two = (Run.open(made.folder / "phases" / name).config.method for name in ("3", "1"))
    assert (one.teacher_grid, one.grids) == (64, ((4, 16, 64),))
    assert (two.teacher_grid, two.grids) == ((4, 16, 64), (1,))
    model = load(made.folder)
    assert [round(level.t * 64) for level in model.grids[3].levels] == [64, 16, 4, 0]
    assert [round(level.t * 64) for level in model.grids[1].levels] == [64, 0]
    assert [model.sample(2, num_steps=count).nfe for count in (3, 1)] == [3, 1]
    # equal shares of unequal groups are unequal
    grids = [phase.method.grids[0] for phase in decided("ddpm", POINTS, V64, schedule=[64, [8, 16, 32, 64], 2]).phases]
    assert grids == [(8, 16, 32, 64), (16, 64)]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"schedule": [64, 7, 1]}, "schedule: 7 does not divide 64"),
        ({"schedule": [64, 8, 16]}, "schedule: 16 after 8 is not valid: the numbers of steps have to fall"),
        ({"schedule": [64, 8, 8]}, "schedule: 8 after 8 is not valid"),
        ({"schedule": [128, 1]}, "schedule: begins with 128 steps, but the teacher was trained on 64; .* 64 or less"),
        ({"schedule": [64]}, "schedule: 64 alone is not valid"),
        ({"schedule": [[4, 64], 1]}, r"schedule: \[4, 64\] is not valid: the teacher's steps"),
        ({"schedule": [64, [4, 60], 1]}, "schedule: the last group ends at step 60, and the grid has 64"),
        ({"schedule": [64, [16, 4, 64], 1]}, r"schedule: groups that end at \[16, 4, 64\]: the ends should rise"),
        ({"schedule": [64, 8, [4, 64]]}, "schedule: step 4 ends a group, but none of the 8 groups"),
        ({"schedule": [64, [4, 16, 64], 2]}, "schedule: 2 does not divide 3"),
        ({"kind": "btd", "schedule": [64, 32, 8]}, "schedule: btd halves, and 32 to 8 does not; use distill tract"),
        ({"kind": "btd", "ema_self": 0.5}, "ema_self: unknown field"),
        ({"kind": "ddpm"}, "method: 'ddpm' is not valid: should be one of tract, btd"),
        ({"steps": [1, 2, 3]}, "steps: 3 values given for 2 phases"),
        ({"lr": [0.1]}, "lr: 1 values given for 2 phases"),
        ({"lr": 0.0}, r"^lr: 0\.0 is not valid"),
        ({"steps": 1}, "steps: 1 is not valid: 2 phases need at least one each"),
        ({"ema_self": 1.0}, r"ema_self: 1\.0 is not valid: should be less than 1"),
        ({"ema_residual": 1.0}, r"ema_residual: 1\.0 is not valid: should be less than 1"),
        ({"clip": True}, "clip: true needs data with a range"),
        ({"spacing": "wide"}, "spacing: 'wide' is not valid"),
        ({"parametrization": "w"}, "unknown parametrization 'w'"),
        ({"training.steps": 5}, r"training\.steps: is said of each phase, by steps"),
        ({"training.flip": True}, "training.flip: true mirrors images"),
        ({"colour": 1}, "colour: unknown field"),
    ],
)
def test_what_does_not_fit_is_refused(said, message):
    with pytest.raises(UserError, match=message):
        decided("ddpm", POINTS, V64, said.pop("kind", "tract"), **said)


@pytest.mark.parametrize(
    "said",
    [
        {"teacher_grid": 32},
        {"grids": [4], "sampling": {"num_steps": 4}},
        {"model.network.width": 8},
        {"model.schedule.num_steps": 128},
        {"teacher_sampling.num_steps": 3},
    ],
    ids=str,
)
def test_what_the_plan_decides_itself_cannot_be_overridden(teachers, tmp_path, said):
    with pytest.raises(UserError):
        distilled(teachers / "v", tmp_path / "made", **said)
    assert not any(tmp_path.iterdir())


def test_students_are_not_stepped_by_heun_s_rule(whole, tmp_path):
    """A student has learned where to jump, not a slope: of what it says at two levels no mean can be taken."""
    made = decided("edm", POINTS, {}, solver="heun")
    assert [phase.method.solver for phase in made.phases] == ["heun", "ddim"]
    assert made.phases[-1].method.teacher_sampling["solver"]["kind"] == "heun"
    with pytest.raises(UserError, match="solver"):
        distilled(whole, tmp_path / "made", [8, 1], solver="heun")


def test_the_teacher_samples_as_it_teaches():
    for data, clip in ((DIGITS, True), (DIGITS, False), (POINTS, False)):
        said = {"clip": clip} if data is DIGITS else {}
        for phase in decided("ddpm", data, V64, **said).phases:
            assert (phase.method.clip, phase.method.teacher_sampling["clip"]) == (clip, clip)


@pytest.mark.parametrize("name", ["gaussian", "unfinished", "nothing"])
def test_what_is_no_trained_diffusion_is_refused_and_nothing_is_written(teachers, tmp_path, name):
    if name == "unfinished":
        (tmp_path / "unfinished").mkdir()
        shutil.copy(teachers / "v" / "config.json", tmp_path / "unfinished")
    said = {
        "gaussian": "gaussian: is no diffusion",
        "unfinished": "has no model.safetensors yet",
        "nothing": "not a run",
    }
    with pytest.raises(UserError, match=said[name]):
        distilled(teachers / name if name == "gaussian" else tmp_path / name, tmp_path / "made")
    assert not (tmp_path / "made").exists()


# --- distilling students --------------------------------------------------------------------------------------------


def test_students_are_distilled_further(teachers, whole, tmp_path):
    made = distilled(whole, tmp_path / "made", [8, 4, 2], **STILL)
    assert (made.config.parent.folder, made.config.parent.sha256) == ("run", Run.open(whole).hash())
    assert made.config.method.model == Run.open(teachers / "v").config.method
    assert (made.config.method.num_steps, made.config.method.grids) == (64, (4, 2))
    assert Run.open(made.folder / "phases" / "4").config.method.teacher_grid == 8
    eight, one = weights_of(whole, 0), weights_of(whole, 1)
    for index in (0, 1):
        assert same(weights_of(made.folder, index), eight, atol=1e-8)
    assert not same(eight, one, atol=1e-6)
    before, after = load(whole).grids[8].levels, load(made.folder).grids[4].levels
    assert after == before[::2]
    assert torch.equal(
        load(whole).sample(3, **made.config.method.teacher_sampling).data, load(whole).sample(3, num_steps=8).data
    )
    halved = distilled(whole, tmp_path / "halved", None, method="btd", steps=3)
    assert sorted(load(halved.folder).grids) == [1, 2, 4]
    phase = distilled(whole / "phases" / "8", tmp_path / "phase", None, **STILL)
    assert sorted(load(phase.folder).grids) == [1, 2]
    assert same(weights_of(phase.folder), eight, atol=1e-8)


def test_students_are_distilled_from_their_own_grids_alone(whole, tmp_path):
    with pytest.raises(UserError, match="begins with 16 steps, but the teacher was distilled to 1, 8; begin with one"):
        distilled(whole, tmp_path / "made", [16, 4, 1])
    with pytest.raises(UserError, match="begins with 64 steps, but the teacher was distilled to 1, 8"):
        distilled(whole, tmp_path / "made", [64, 4, 1])
    with pytest.raises(UserError, match="1 after 1 is not valid"):
        distilled(whole / "phases" / "1", tmp_path / "made", None)
    assert not any(tmp_path.iterdir())


def test_students_keep_the_spacing_that_they_have_learned(whole, tmp_path):
    with pytest.raises(UserError, match="spacing"):
        distilled(whole, tmp_path / "made", [8, 1], spacing="karras")


# --- interruptions --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


class Killer:
    """When a file or folder is about to get its name, neither that nor any later operation below a folder happens."""

    def __init__(self):
        self.folder = None
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.folder is None or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        self.killed |= event == "os.rename" and str(arguments[1]) == self.at
        if self.killed and (event in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(self.folder)):
            raise Killed

    @contextlib.contextmanager
    def __call__(self, folder, name):
        self.folder, self.at, self.killed = str(folder), str(folder / name), False
        try:
            with pytest.raises(Killed):
                yield
        finally:
            self.folder = None


killer = Killer()


@pytest.mark.parametrize(
    "name",
    [
        "phases/8/config.json",
        "phases/8/metrics.jsonl",
        "phases/8/checkpoints/step_00000004",
        "phases/8/model.safetensors",
        "phases/1/config.json",
        "phases/1/checkpoints/step_00000004",
        "phases/1/model.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "config.json",
    ],
)
def test_killed_before_a_file_has_its_name_it_goes_on_to_the_same_result(teachers, whole, tmp_path, name):
    out = tmp_path / "run"
    with killer(out, name):
        distilled(teachers / "v", out)
    for torn in list(out.rglob(".*.tmp")):
        torn.rename(torn.with_name(torn.name.replace(str(os.getpid()), "1")))  # who goes on is another process
    with pytest.raises(UserError, match="exists already"):
        distilled(teachers / "v", out)
    distill(teachers / "v", out, resume=True, progress=False)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "config.json"])
def test_killed_while_the_students_are_put_together_it_samples_afterwards(teachers, whole, tmp_path, name):
    out = tmp_path / "run"
    with killer(out, name):
        distilled(teachers / "v", out)
    with pytest.raises(UserError, match="a distillation that is not finished"):
        Run.open(out)
    made = distill(teachers / "v", out, resume=True, progress=False)
    for file in ("metrics.jsonl", "model.safetensors", "config.json"):
        assert contents(out)[file] == contents(whole)[file]
    assert torch.equal(made.model().sample(3).data, load(whole).sample(3).data)


def stop_at(monkeypatch, folder, step):
    """Send SIGTERM while this step of the phase in `folder` is made."""
    optimise = Trainer.optimise

    def signalled(trainer, window):
        if trainer.run.folder.name == folder and trainer.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return optimise(trainer, window)

    monkeypatch.setattr(Trainer, "optimise", signalled)


@pytest.mark.parametrize(("folder", "step"), [("8", 1), ("8", 3), ("1", 2)])
def test_stopped_in_a_phase_it_goes_on_there(teachers, whole, tmp_path, monkeypatch, folder, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, folder, step)
        with pytest.raises(KeyboardInterrupt):
            distilled(teachers / "v", out)
    assert [path.name for path in (out / "phases" / folder / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    assert not (out / "config.json").exists()
    seen = []
    optimise = Trainer.optimise
    monkeypatch.setattr(
        Trainer, "optimise", lambda t, w: (seen.append((t.run.folder.name, t.step + 1)), optimise(t, w))[1]
    )
    distill(teachers / "v", out, resume=True, progress=False)
    assert seen == [(name, n) for name in ("8", "1") for n in range(1, 5)][4 * (folder == "1") + step :]
    assert contents(out) == contents(whole)


def test_stopped_in_the_last_step_of_a_phase_the_next_one_does_not_begin(teachers, tmp_path, monkeypatch):
    stop_at(monkeypatch, "8", 4)
    with pytest.raises(KeyboardInterrupt):
        distilled(teachers / "v", tmp_path / "run")
    assert not (tmp_path / "run" / "phases" / "1").exists()


def test_a_finished_distillation_is_left_as_it_is(teachers, whole, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    monkeypatch.setattr(Trainer, "optimise", lambda *_: pytest.fail("trains again"))
    assert distill(teachers / "v", whole, resume=True, progress=False).config == Run.open(whole).config
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_another_teacher_cannot_go_on(teachers, whole, tmp_path):
    with pytest.raises(UserError, match=r"other is not the teacher of .*run, 'v'"):
        distill(teachers / "other", whole, resume=True)
    with pytest.raises(UserError, match="no distillation was begun here"):
        distill(teachers / "v", tmp_path, resume=True)
    with pytest.raises(UserError, match="no distillation was begun here"):
        distill(teachers / "v", teachers / "other", resume=True)


@pytest.mark.parametrize(
    ("said", "message"),
    [({"steps": 3}, "steps"), ({"ema_self": 0.1}, "ema_self"), ({"method": "btd"}, "tract, not with btd")],
)
def test_what_is_said_of_a_distillation_that_goes_on_is_refused(teachers, whole, said, message):
    with pytest.raises(UserError, match=message):
        distill(teachers / "v", whole, resume=True, **said)


@pytest.mark.parametrize(("phase", "place"), [(0, "phase 1/2, 64 to 8 steps"), (1, "phase 2/2, 8 to 1 steps")])
def test_divergence_names_phase_step_and_time(teachers, tmp_path, phase, place):
    rates = [1e-3, 1e-3]
    rates[phase] = 1e30
    more = {"lr": rates, "training.clip_grad": None, "training.warmup": 0}
    with pytest.raises(DivergedError) as caught:
        distilled(teachers / "v", tmp_path / "run", **more)
    assert str(caught.value).startswith(f"{place}: the loss is no longer finite at step 2 (last batch: t from ")
    assert not (tmp_path / "run" / "config.json").exists()
    assert (tmp_path / "run" / "phases" / "1").exists() == bool(phase)


@pytest.mark.parametrize("method", [Tract, BTD])
def test_a_target_that_is_not_a_number_stops_the_distillation(teachers, tmp_path, monkeypatch, method):
    target = method.target
    monkeypatch.setattr(method, "target", lambda *items: target(*items) * float("nan"))
    kind, schedule = method.__name__.lower(), [4, 2, 1]
    with pytest.raises(
        DivergedError, match=r"phase 1/2, 4 to 2 steps: the loss is no longer finite at step 1 .*t from"
    ):
        distilled(teachers / "v", tmp_path / "run", schedule, method=kind)


# --- processes ------------------------------------------------------------------------------------------------------

#: Distils, is stopped in the first phase by a signal to the second process, and goes on.
SCRIPT = """
import os, signal, sys
import osmose.acceleration.distill
from osmose.cli.main import main
from osmose.training.trainer import Trainer

Trainer.preview = lambda self: None
osmose.acceleration.distill.write_losses = lambda *_: None
def run(*words):
    try:
        main([*sys.argv[1:], "--quiet", *words])
    except SystemExit as stop:
        return stop.code
options = os.environ["OPTIONS"].split()
optimise = Trainer.optimise
def signalled(self, window):
    if self.step == 2 and self.run.folder.name == "8" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return optimise(self, window)
Trainer.optimise = signalled
assert run("--out", "together", *options) == 130
Trainer.optimise = optimise
status = run("--out", "together", "--resume")
if status is not None:
    print(f"RANK {os.environ['RANK']} ends with {status}")
"""


@pytest.fixture(scope="module")
def together(teachers, tmp_path_factory):
    """A distillation by two processes; its folder, and what they said."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    names = ("batch_size", "validation_items", "validate_every", "log_every")
    options = [f"training.{name}={QUIET[f'training.{name}']}" for name in names]
    words = ["--schedule", "64,8,1", "--steps", "8", *options]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "script.py", "distill", "tract", str(teachers / "v")],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPTIONS": " ".join(words)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder / "together", done.stdout, done.stderr


def test_two_processes_are_one_and_stop_and_go_on_together(together, whole):
    folder, said, _ = together
    assert "stopped; everything is saved" in said
    one, two = ([x for x in Run.open(f).metrics() if "loss" in x] for f in (whole, folder))
    assert [line["step"] for line in two] == list(range(1, 9))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    for index in (0, 1):
        assert same(weights_of(folder, index), weights_of(whole, index), atol=1e-5)


def test_all_of_two_processes_end_well(together):
    _, said, complained = together
    assert "ends with" not in said, complained


def test_sigterm_to_the_command_saves_and_says_how_to_go_on(teachers, whole, tmp_path, capfd):
    from osmose.cli.main import main

    out, run = tmp_path / "stopped", str(teachers / "v")
    settings = [f"{name}={value}" for name, value in QUIET.items() if name != "progress"]
    words = ["distill", "tract", run, "--schedule", "64,8,1", *settings, "--quiet", "--steps", "8"]

    def slowly():
        optimise = Trainer.optimise
        Trainer.optimise = lambda trainer, window: (time.sleep(0.05), optimise(trainer, window))[1]
        main([*words, "--out", str(out)])

    process = torch.multiprocessing.get_context("fork").Process(target=slowly)
    process.start()
    log = out / "phases" / "1" / "metrics.jsonl"
    while process.is_alive() and (not log.exists() or not log.read_text()):
        time.sleep(0.005)
    process.terminate()
    process.join(60)
    said, complained = capfd.readouterr()
    assert (process.exitcode, complained) == (130, "")
    again = f"osmose distill tract {run} --out {out} --resume"
    assert said.splitlines() == ["stopped; everything is saved", f"next: {again}"]
    steps = [int(path.name.removeprefix("step_")) for path in (log.parent / "checkpoints").iterdir()]
    assert len(steps) == 1
    assert 0 < steps[0] < 4
    main([*again.split()[1:], "--quiet"])
    assert contents(out) == contents(whole)

"""Stored trajectories: that they solve the teacher's equation, and that what is on the disk is what was computed."""

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from osmose.acceleration.trajectories import Trajectories, TrajectoriesConfig, recorded
from osmose.acceleration.trajectory_making import _own_device, make, states
from osmose.acceleration.trajectory_pictures import write_picture
from osmose.configuration import ConfigError
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian import SCHEDULES, SOLVERS
from osmose.gaussian.draws import SampleDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.training import files
from osmose.training.recipes import recipe
from osmose.training.run import Run, load
from osmose.training.trainer import built

POINTS = DataConfig(source="toy:checkerboard", num_points=200)
DIGITS = DataConfig(source="digits")
TINY = {"network": "mlp", "network.width": 16, "network.depth": 1, "sampling.num_steps": 4}
V64 = {**TINY, "schedule": "cosine", "schedule.num_steps": 64, "parametrization": "v"}
#: Name: method, data, changes. Schedules of all kinds.
TEACHERS = {
    "cosine": ("ddpm", POINTS, V64),
    "linear": ("ddpm", POINTS, {**TINY, "parametrization": "v"}),
    "edm": ("edm", POINTS, TINY),
    "trig": ("ddpm", POINTS, {**TINY, "schedule": "trig", "parametrization": "v"}),
    "classes": ("ddpm", DIGITS, V64 | {"conditional": True}),
    "iddpm": ("iddpm", DIGITS, V64 | {"parametrization": "eps"}),
    "other": ("ddpm", POINTS, V64),
    "gaussian": ("gaussian", POINTS, None),
}
SMALL = {"num": 10, "num_steps": 16, "points": 4, "shard_size": 4}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Runs with weights of chance; `student` has grids of 16 and 4 steps. Not to be changed."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, (method, data, changes) in TEACHERS.items():
        write(folder / name, recipe(method, data, data.load(), 0, changes or {}), len(name))
    config = Run.open(folder / "edm").config
    student = {
        "kind": "distilled",
        "taught": "tract",
        "model": config.method.to_json(),
        "num_steps": 64,
        "teacher_grid": 64,
        "grids": [16, [4, 8, 32, 64]],
        "sampling": {"num_steps": 4},
    }
    write(folder / "student", config.replace(method=student), 5)
    return folder


def write(folder, config, seed):
    run = Run.create(folder, config)
    model, generator = built(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    run.write_weights(model.state_dict())


def made(run, folder, **said):
    return make(run, folder, TrajectoriesConfig.suited(Run.open(run).config, **{**SMALL, **said}))


def everything(trajectories):
    return trajectories.rows(torch.arange(len(trajectories)))


@pytest.fixture(scope="module")
def whole(teachers, tmp_path_factory):
    """Ten trajectories of digits with classes, in three shards; not to be changed."""
    return made(teachers / "classes", tmp_path_factory.mktemp("whole") / "T")


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "T")
    return tmp_path / "T"


# --- the solution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trig", "straight", "ve"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_states_converge_to_the_flow_of_gaussian_data(kind, solver, order):
    schedule = SCHEDULES.parse(kind)
    generator = torch.Generator().manual_seed(0)
    oracle = GaussianDenoiser(torch.tensor([0.5, -1.0]).double(), torch.tensor([0.36, 0.09]).double())
    x = torch.randn(32, 2, generator=generator, dtype=torch.float64) * schedule.prior_std
    errors = []
    for num_steps in (64, 128, 256):
        config = TrajectoriesConfig(num=1, num_steps=num_steps, points=4, solver=solver, clip=False)
        grid = TimeGrid.at(schedule, torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps)
        found = states(oracle, x, grid, config.kept, SOLVERS.parse(solver))
        exact = [oracle.flow(x, grid.levels[0], grid.levels[step]) for step in config.kept]
        assert torch.equal(found[:, 0], x)
        errors.append(float((found - torch.stack(exact, 1)).abs().max()))
    assert errors[0] < (0.15 if order == 1 else 0.02)
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cosine", {"num_steps": 64, "spacing": "trailing"}),
        ("trig", {"num_steps": 16, "spacing": "even"}),
        ("classes", {"num_steps": 64, "spacing": "trailing", "clip": True}),
        ("classes", {"num_steps": 16, "spacing": "trailing", "clip": False, "solver": "heun"}),
        ("iddpm", {"num_steps": 16, "spacing": "trailing", "clip": True}),
        ("student", {"num_steps": 16}),
        ("student", {"num_steps": 4, "points": 2}),
    ],
)
def test_the_end_is_what_the_teacher_samples_from_that_noise(teachers, tmp_path, name, said):
    wanted = {key: value for key, value in said.items() if key != "spacing"}
    trajectories = made(teachers / name, tmp_path / "T", **{"shard_size": 10} | wanted)
    model = load(teachers / name)
    sampling = model.sampling(**{"solver": "ddim" if name != "student" else None} | {**said, "points": None})
    draws = SampleDraws(0, 0, 10).branch("trajectories")
    with torch.inference_mode():
        expected, nfe = model.generate(draws, sampling, model.classes_for(10), lambda *_: None)
    assert nfe == (2 * 16 - 1 if said.get("solver") == "heun" else said["num_steps"])
    found, _ = everything(trajectories)
    assert torch.equal(found[:, -1], expected)
    assert not torch.equal(found[:, -2], expected)


def test_clipping_is_of_estimates_not_of_states(teachers, tmp_path):
    clipped, free = (made(teachers / "classes", tmp_path / str(clip), clip=clip) for clip in (True, False))
    kept, left = everything(clipped)[0], everything(free)[0]
    assert torch.equal(kept[:, 0], left[:, 0])
    assert float(kept[:, 0].abs().max()) > 1.5
    assert float(kept[:, -1].abs().max()) <= 1 < float(left[:, -1].abs().max())


# --- levels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "linear", "edm", "trig"])
@pytest.mark.parametrize("grid", ["quadratic", "even"])
def test_levels_are_the_schedule_s_at_the_stored_times(teachers, tmp_path, name, grid):
    made(teachers / name, tmp_path / "T", num=1, grid=grid)
    trajectories = Trajectories.open(tmp_path / "T", Run.open(teachers / name))
    schedule = load(teachers / name).schedule
    power, total = 2 if grid == "quadratic" else 1, schedule.native_steps
    times = [(k / 4) ** power for k in (4, 3, 2, 1, 0)]
    if total is not None:
        times = [round(t * total) / total for t in times]
    assert [level.t for level in trajectories.levels] == pytest.approx(times, rel=1e-12)
    for level, t in zip(trajectories.levels, times, strict=True):
        assert level.alpha == pytest.approx(float(schedule.alpha(t)), rel=1e-9)
        assert level.sigma == pytest.approx(float(schedule.sigma(t)), rel=1e-9)
        assert schedule.label(level) == pytest.approx(schedule.label(schedule.level(t)).item())
        assert all(type(value) is float for value in level)
    last = trajectories.levels[-1]
    assert last.t == 0
    assert last.sigma == pytest.approx(0.002 if name == "edm" else 0)
    states, condition = everything(trajectories)
    assert states.shape == (1, 5, 2)
    assert states.dtype == torch.float32
    assert condition is None


def test_levels_of_a_student_are_those_of_its_grid(teachers, tmp_path):
    trajectories = made(teachers / "student", tmp_path / "T", num_steps=4, points=2)
    grid = load(teachers / "student").grids[4]
    assert trajectories.levels[:2] == (grid.levels[0], grid.levels[3])
    assert trajectories.levels[2].t == 0
    assert TrajectoriesConfig.suited(Run.open(teachers / "student").config, num=1, points=4).num_steps == 16


# --- randomness ---------------------------------------------------------------------------------------------------


def test_states_do_not_depend_on_the_shards(teachers, tmp_path, whole):
    expected, classes = everything(whole)
    for size in (1, 7, 100):
        found, again = everything(made(teachers / "classes", tmp_path / str(size), shard_size=size))
        assert torch.equal(found[:, 0], expected[:, 0])
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(again, classes)
    more, _ = everything(made(teachers / "classes", tmp_path / "more", num=12))
    assert torch.allclose(more[:10], expected, rtol=1e-4, atol=1e-5)
    other, _ = everything(made(teachers / "classes", tmp_path / "other", seed=1))
    assert not bool((other[:, 0] == expected[:, 0]).any())


@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_noise_is_of_the_prior_and_of_no_sample(teachers, tmp_path, name):
    trajectories = made(teachers / name, tmp_path / "T", num=500, num_steps=1, points=1, seed=7)
    noise = everything(trajectories)[0][:, 0] / load(teachers / name).schedule.prior_std
    assert float(noise.mean()) == pytest.approx(0, abs=0.1)
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    samples = SampleDraws(7, 0, 500).normal((2,))
    assert float(torch.cdist(noise, samples).min()) > 1e-5
    assert float((noise * samples).mean()) == pytest.approx(0, abs=0.1)
    assert len(noise.unique(dim=0)) == 500


def test_classes_in_turn_are_stored(whole):
    _, condition = everything(whole)
    assert condition.dtype == torch.int64
    assert condition.tolist() == [i % 10 for i in range(10)]
    assert json.loads((whole.folder / "shard-00002.json").read_text())["condition"] == [8, 9]


# --- on the disk --------------------------------------------------------------------------------------------------


def test_round_trip(teachers, whole):
    again = Trajectories.open(whole.folder, Run.open(teachers / "classes"))
    assert again.config == whole.config == recorded(whole.folder)
    assert (again.levels, again.sha256, again.seconds) == (whole.levels, whole.sha256, whole.seconds)
    assert (again.teacher.folder, again.teacher.sha256) == ("classes", Run.open(teachers / "classes").hash())
    assert again.seconds > 0
    assert len(again) == 10
    names = sorted(path.name for path in whole.folder.iterdir())
    shards = [f"shard-{i:05d}.{kind}" for i in range(3) for kind in ("json", "npy")]
    assert names == [*shards, "trajectories.json"]
    arrays = [np.load(whole.folder / f"shard-{i:05d}.npy", allow_pickle=False) for i in range(3)]
    assert [(a.shape, a.dtype) for a in arrays] == [((n, 5, 1, 8, 8), np.float32) for n in (4, 4, 2)]
    assert torch.equal(everything(again)[0], torch.from_numpy(np.concatenate(arrays)))
    header = json.loads((whole.folder / "trajectories.json").read_text())
    assert header["format"] == "osmose-trajectories-1"
    assert header["versions"].keys() == {"osmose", "torch", "python", "machine"}
    assert header["shape"] == [1, 8, 8]
    for i in range(3):
        said = json.loads((whole.folder / f"shard-{i:05d}.json").read_text())
        assert said["sha256"] == hashlib.sha256((whole.folder / f"shard-{i:05d}.npy").read_bytes()).hexdigest()


def test_rows_come_in_the_order_that_is_asked_for(whole):
    states, condition = everything(whole)
    for indices in ([9, 0, 4, 4, 3, 8], [5], [], list(range(9, -1, -1))):
        rows, classes = whole.rows(torch.tensor(indices, dtype=torch.int64))
        assert torch.equal(rows, states[indices])
        assert torch.equal(classes, condition[indices])
    rows.zero_()
    assert torch.equal(everything(whole)[0], states), "rows are copies"
    for outside in (-1, 10):
        with pytest.raises(IndexError, match=f"from {min(outside, 0)} to {max(outside, 0)} of 10 trajectories"):
            whole.rows(torch.tensor([0, outside]))


def test_the_hash_is_of_what_was_computed_not_of_when(teachers, tmp_path, whole):
    again = made(teachers / "classes", tmp_path / "T")
    assert again.sha256 == whole.sha256
    hashes = {made(teachers / "classes", tmp_path / str(i), **said).sha256 for i, said in enumerate(
        [{"seed": 1}, {"num": 9}, {"solver": "heun"}, {"grid": "even"}, {"clip": False}]
    )}  # fmt: skip
    assert len(hashes | {whole.sha256}) == 6


def damaged(folder, how):
    path = folder / "shard-00001.npy"
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-4:]
    elif how == "changed":
        content[-3] ^= 1
    elif how == "swapped":
        content = (folder / "shard-00000.npy").read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "changed", "swapped", "missing"])
def test_a_damaged_shard_is_refused_and_can_be_made_again(teachers, copy, whole, how):
    damaged(copy, how)
    with pytest.raises(UserError, match=r"shard-00001\.npy: (truncated or changed|missing).* delete shard-00001\.json"):
        Trajectories.open(copy)
    (copy / "shard-00001.json").unlink()
    assert make(teachers / "classes", copy, whole.config, resume=True).sha256 == whole.sha256


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shard-00002.json", {"num": 3}, r"shard-00002\.json: does not describe 2 trajectories"),
        ("shard-00002.json", {"condition": [1]}, r"shard-00002\.json: does not describe 2 trajectories"),
        ("shard-00002.json", {"sha256": None}, r"shard-00002\.json: sha256: None is not valid"),
        ("trajectories.json", {"format": "other"}, "its format is not 'osmose-trajectories-1'"),
        ("trajectories.json", {"levels": 3}, r"trajectories\.json: levels: 3 is not valid"),
    ],
)
def test_a_damaged_description_is_refused(copy, name, change, message):
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Trajectories.open(copy)


def test_trajectories_of_another_teacher_are_refused(teachers, copy):
    for name in ("other", "iddpm"):
        with pytest.raises(UserError, match=r"T: made from another teacher, 'classes', not from .* \(their weights"):
            Trajectories.open(copy, Run.open(teachers / name))
    with pytest.raises(UserError, match=r"nowhere: no trajectories were begun here \(it has no trajectories\.json\)"):
        Trajectories.open(copy.parent / "nowhere")


# --- interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_and_what_is_resumed_is_the_same(teachers, tmp_path, whole, number):
    def ask(done, of):
        assert of == 10 * 16
        if done == 6 * 16:  # in the middle of the second shard, which is one batch
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        make(teachers / "classes", tmp_path / "T", whole.config, on_step=ask)
    names = sorted(path.name for path in (tmp_path / "T").iterdir())
    shards = [f"shard-{i:05d}.{kind}" for i in range(2) for kind in ("json", "npy")]
    assert names == [*shards, "trajectories.json"]
    with pytest.raises(UserError, match=r"T: has 2 of 3 shards; make the others with osmose trajectories RUN --out "):
        Trajectories.open(tmp_path / "T")
    before = (tmp_path / "T" / "shard-00001.npy").stat().st_mtime_ns
    (tmp_path / "T" / ".shard-00002.npy.123.tmp").write_bytes(b"left by a killed process")
    calls = []
    again = make(
        teachers / "classes", tmp_path / "T", whole.config, resume=True, on_step=lambda *call: calls.append(call)
    )
    assert again.sha256 == whole.sha256
    assert calls == [(2 * step, 2 * 16) for step in range(1, 17)], "only the last shard was missing"
    assert (tmp_path / "T" / "shard-00001.npy").stat().st_mtime_ns == before
    assert not list((tmp_path / "T").glob(".*"))


def test_an_interrupted_shard_is_not_written(teachers, tmp_path, monkeypatch):
    write_json = files.write_json

    def killed(path, values):
        if path.name == "shard-00001.json":
            raise RuntimeError
        write_json(path, values)

    config = TrajectoriesConfig.suited(Run.open(teachers / "cosine").config, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", killed)
        with pytest.raises(RuntimeError):
            make(teachers / "cosine", tmp_path / "T", config)
    assert (tmp_path / "T" / "shard-00001.npy").is_file()
    with pytest.raises(UserError, match="has 1 of 3 shards"):
        Trajectories.open(tmp_path / "T")
    again = make(teachers / "cosine", tmp_path / "T", config, resume=True)
    assert again.sha256 == made(teachers / "cosine", tmp_path / "whole").sha256


def test_a_batch_is_the_most_that_a_signal_waits_for(teachers, tmp_path):
    config = TrajectoriesConfig.suited(Run.open(teachers / "cosine").config, num=600, num_steps=1, points=1)
    calls = []

    def ask(done, of):
        calls.append((done, of))
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        make(teachers / "cosine", tmp_path / "T", config, on_step=ask)
    assert calls == [(256, 600)]
    assert [path.name for path in (tmp_path / "T").iterdir()] == ["trajectories.json"]


def test_processes_share_the_shards(teachers, tmp_path, whole, monkeypatch):
    program = (
        "import sys, torch\n"
        "from osmose.acceleration.trajectories import TrajectoriesConfig\n"
        "from osmose.acceleration.trajectory_making import make\n"
        "torch.set_num_threads(1)\n"
        "calls = []\n"
        "config = TrajectoriesConfig.parse(__import__('json').loads(sys.argv[3]))\n"
        "made = make(sys.argv[1], sys.argv[2], config, on_step=lambda *call: calls.append(call))\n"
        "print(calls[-1], made.sha256)\n"
    )
    words = [teachers / "classes", tmp_path / "T", json.dumps(whole.config.to_json())]
    second = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"},
        stdout=subprocess.PIPE,
        text=True,
    )
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    try:
        first = make(teachers / "classes", tmp_path / "T", whole.config, on_step=lambda *call: calls.append(call))
        said, _ = second.communicate(timeout=60)
    finally:
        second.kill()
    assert said.split() == ["(64,", "64)", first.sha256]
    assert calls[-1] == (96, 96)
    assert first.sha256 == whole.sha256


def test_another_process_takes_part_in_what_the_first_began_alone(teachers, copy, whole, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    before = contents(copy)
    with pytest.raises(UserError, match=r"seed: 5 given, but .* was begun with 0"):
        make(teachers / "classes", copy, whole.config.replace(seed=5))
    assert contents(copy) == before


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert _own_device(torch.device("cuda")) == torch.device("cuda:2")
    assert _own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert _own_device(torch.device("cpu")) == torch.device("cpu")


# --- what is refused ----------------------------------------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num": 0}, "num: 0 is not valid: should be greater than or equal to 1"),
        ({"num_steps": 50}, r"num_steps: 50 is not valid: the quadratic grid of points=8 .* a multiple of 64; take "
         "num_steps=64 or points=5"),
        ({"num_steps": 200}, "take num_steps=192 or points=5"),
        ({"num_steps": 17, "points": 4}, "a multiple of 16; take num_steps=16 or points=1"),
        ({"num_steps": 50, "grid": "even"}, "the even grid of points=8 .* a multiple of 8; take num_steps=48 or poi"),
        ({"points": 0}, "points: 0 is not valid"),
        ({"grid": "cubic"}, "grid: 'cubic' is not valid: should be 'quadratic' or 'even'"),
        ({"solver": "ancestral"}, "solver: 'ancestral' is not valid: should be 'ddim' or 'heun'"),
        ({"shard_size": 0}, "shard_size: 0 is not valid"),
        ({"seed": -1}, "seed: -1 is not valid"),
        ({"colour": 1}, "colour: unknown field"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(said, message):
    with pytest.raises(ConfigError, match=message):
        TrajectoriesConfig.parse({"num": 4, "clip": False, **said})


@pytest.mark.parametrize(("grid", "power"), [("quadratic", 2), ("even", 1)])
def test_what_is_advised_works(grid, power):
    for num_steps in range(1, 80):
        for points in range(1, 9):
            try:
                TrajectoriesConfig(num=1, num_steps=num_steps, points=points, grid=grid, clip=False)
                assert num_steps % points**power == 0
            except ValueError as error:
                words = str(error).split("take num_steps=")[1].split()
                TrajectoriesConfig(num=1, num_steps=int(words[0]), points=points, grid=grid, clip=False)
                fewer = int(words[2].removeprefix("points="))
                TrajectoriesConfig(num=1, num_steps=num_steps, points=fewer, grid=grid, clip=False)


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("cosine", {"num_steps": 128}, "num_steps: 128 is more than the 64 steps that the schedule has"),
        ("cosine", {"clip": True}, "clip: true needs data with a range, and these have none"),
        ("student", {"num_steps": 64}, "num_steps: 64 is no grid that was distilled; those are 4, 16"),
        ("student", {"solver": "heun"}, "solver: 'heun' is for a diffusion's steps; the jumps of a student are ddim's"),
        ("gaussian", {"clip": False}, "gaussian: has no trajectories from noise to data; ddpm, iddpm, edm and"),
    ],
)
def test_what_a_teacher_does_not_have_is_refused_and_nothing_is_written(teachers, tmp_path, name, said, message):
    with pytest.raises(UserError, match=message):
        make(teachers / name, tmp_path / "T", TrajectoriesConfig.parse({"clip": False, **SMALL, **said}))
    assert not list(tmp_path.iterdir())


def test_a_method_without_trajectories_suits_none(teachers):
    with pytest.raises(UserError, match="gaussian: has no trajectories"):
        TrajectoriesConfig.suited(Run.open(teachers / "gaussian").config, num=1)


def test_clipping_is_the_teacher_s_own(teachers):
    found = {n: TrajectoriesConfig.suited(Run.open(teachers / n).config, **SMALL).clip for n in ("classes", "cosine")}
    assert found == {"classes": True, "cosine": False}, "points have no range"


def test_folders_are_taken_or_continued_never_overwritten(teachers, copy, whole):
    before = contents(copy)
    with pytest.raises(UserError, match=r"--out: .*T exists already"):
        make(teachers / "classes", copy, whole.config)
    for field, value, was in (("num", 20, 10), ("points", 2, 4), ("seed", 3, 0), ("clip", False, True)):
        with pytest.raises(UserError, match=f"{field}: {value} given, but .* was begun with {was}; resume without it"):
            make(teachers / "classes", copy, whole.config.replace(**{field: value}), resume=True)
    with pytest.raises(UserError, match=r"RUN: .*iddpm is not the teacher of .*, 'classes' \(their weights differ\)"):
        make(teachers / "iddpm", copy, whole.config, resume=True)
    with pytest.raises(UserError, match="no trajectories were begun here"):
        make(teachers / "classes", copy.parent / "nowhere", whole.config, resume=True)
    assert contents(copy) == before
    assert make(teachers / "classes", copy, whole.config, resume=True).sha256 == whole.sha256
    assert contents(copy) == before


def test_states_that_are_no_numbers_are_not_written(teachers, tmp_path, monkeypatch):
    generate = TrajectoriesConfig.suited(Run.open(teachers / "cosine").config, **SMALL)
    denoised = states

    def broken(denoise, x, grid, kept, solver, on_step=None):
        found = denoised(denoise, x, grid, kept, solver, on_step)
        if len(x) == 2:  # the last shard
            found[1, 3:, 0] = math.inf
        return found

    monkeypatch.setattr("osmose.acceleration.trajectory_making.states", broken)
    message = (
        r"shard-00002\.npy: not written, .* not finite after step 15 of 16 \(t = 0\.0625\), in trajectories 8 to 9"
    )
    with pytest.raises(UserError, match=message):
        make(teachers / "cosine", tmp_path / "T", generate)
    names = {path.name for path in (tmp_path / "T").iterdir()}
    assert {"shard-00001.json"} == {name for name in names if name.startswith("shard-0000") and "1.json" in name}
    assert not any("shard-00002" in name for name in names)


def test_a_teacher_that_overflows_is_noticed(teachers, tmp_path):
    shutil.copytree(teachers / "cosine", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    run.write_weights({name: value * 1e30 for name, value in run.model().state_dict().items()})
    with pytest.raises(UserError, match=r"shard-00000\.npy: not written, for a state is not finite after step"):
        made(tmp_path / "run", tmp_path / "T")
    assert [path.name for path in (tmp_path / "T").iterdir()] == ["trajectories.json"]


def test_a_full_disk_is_one_line(teachers, tmp_path):
    program = (
        "import resource, signal, sys, json\n"
        "from osmose.acceleration.trajectories import TrajectoriesConfig\n"
        "from osmose.acceleration.trajectory_making import make\n"
        "from osmose.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "config = TrajectoriesConfig(num=3000, num_steps=1, points=1, shard_size=2000, clip=False)\n"
        "try:\n"
        "    make(sys.argv[1], sys.argv[2], config)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    words = [sys.executable, "-c", program, str(teachers / "cosine"), str(tmp_path / "T")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "shard-00000.npy: no space left on the disk" in done.stdout, done.stderr
    assert [path.name for path in (tmp_path / "T").iterdir()] == ["trajectories.json"]


# --- pictures -----------------------------------------------------------------------------------------------------


def test_pictures(teachers, tmp_path, whole, copy):
    spec = Run.open(teachers / "classes").config.spec
    path = write_picture(Trajectories.open(copy), spec)
    assert path == copy / "trajectories.png"
    assert Image.open(path).size[1] > 500
    points = made(teachers / "edm", tmp_path / "P", num=20)
    picture = np.asarray(Image.open(write_picture(points, Run.open(teachers / "edm").config.spec)).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    assert Trajectories.open(copy).sha256 == whole.sha256, "the picture is none of the trajectories"

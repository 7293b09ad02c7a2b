"""`osmose trajectories`."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from osmose.acceleration import trajectory_making as module
from osmose.acceleration.trajectories import Trajectories
from osmose.training.run import Run

SMALL = ["--num", 6, "--steps", 16, "--points", 4, "--shard-size", 4, "--threads", 1]

pytestmark = pytest.mark.usefixtures("runs")


def test_trajectories_are_made_described_and_drawn(osmose):
    answer = osmose("trajectories", "digits", "--out", "T", *SMALL, "--grid", "even", "--solver", "heun", "--seed", 3)
    assert (answer.status, answer.err) == (0, "")
    wrote, picture, again = answer.out.splitlines()
    assert re.fullmatch(
        r"wrote T: 6 trajectories of 16 steps, 5 states each, 0\.0 MB, [0-9.]+ s \([0-9.e+]+ ms a trajectory\)", wrote
    )
    assert picture == "picture: T/trajectories.png"
    assert again == "next: osmose distill dsno digits --trajectories T --out RUN2"
    assert Image.open("T/trajectories.png").size[0] > 400
    made = Trajectories.open("T", Run.open("digits"))
    config = made.config
    assert (config.num, config.num_steps, config.points, config.shard_size, config.seed) == (6, 16, 4, 4, 3)
    assert (config.grid, config.solver, config.clip) == ("even", "heun", True)
    assert [level.t for level in made.levels] == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-3)


def test_defaults_and_json(osmose):
    answer = osmose("trajectories", "toy", "--out", "T", "--num", 3, "--json")
    assert (answer.status, answer.err) == (0, "")
    values, made = json.loads(answer.out), Trajectories.open("T")
    assert made.config.to_json() == {
        "num": 3,
        "num_steps": 64,
        "points": 8,
        "grid": "quadratic",
        "solver": "ddim",
        "clip": False,
        "seed": 0,
        "shard_size": 1024,
    }
    assert values.items() >= made.config.to_json().items()
    assert (values["out"], values["finished"], values["sha256"]) == ("T", True, made.sha256)
    assert values["bytes"] == Path("T/shard-00000.npy").stat().st_size
    assert values["ms_per_trajectory"] == pytest.approx(1000 * made.seconds / 3)
    assert values["picture"] == "T/trajectories.png"


def test_the_number_that_is_made_if_none_is_said(osmose):
    values = json.loads(
        osmose("trajectories", "toy", "--out", "T", "--steps", 1, "--points", 1, "--quiet", "--json").out
    )
    assert values["num"] == len(Trajectories.open("T")) == 4000


def test_an_override_and_classes(osmose):
    assert osmose("trajectories", "classes", "--out", "T", *SMALL, "--quiet", "clip=false").status == 0
    made = Trajectories.open("T")
    assert made.config.clip is False
    assert made.rows(torch.arange(6))[1].tolist() == list(range(6))


def test_interruption_and_resumption(osmose, monkeypatch):
    assert osmose("trajectories", "digits", "--out", "whole", *SMALL, "--quiet").status == 0
    with monkeypatch.context() as patch:
        step = module.states

        def interrupted(*args):
            os.kill(os.getpid(), signal.SIGINT)
            return step(*args)

        patch.setattr(module, "states", interrupted)
        answer = osmose("trajectories", "digits", "--out", "T", *SMALL, "--quiet")
    assert (answer.status, answer.err) == (130, "")
    assert answer.out == ("stopped; complete shards are kept\nnext: osmose trajectories digits --out T --resume\n")
    assert Path("T/shard-00000.json").is_file()
    assert not Path("T/shard-00001.json").is_file()
    answer = osmose("trajectories", "digits", "--out", "T", "--resume", "--quiet", "--json")
    assert (answer.status, answer.err) == (0, "")
    assert json.loads(answer.out)["sha256"] == Trajectories.open("whole").sha256
    # again: nothing to do, nothing changed
    assert osmose("trajectories", "digits", "--out", "T", "--resume", "--num", 6, "--quiet").status == 0
    assert Trajectories.open("T").sha256 == Trajectories.open("whole").sha256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out: required: the folder to make"),
        (["--out", "toy"], "--out: toy exists already"),
        (["--out", "T", "--threads", 0], "--threads: 0 is not valid: must be at least 1"),
        (["--out", "T", "--num", 0], "num: 0 is not valid: should be greater than or equal to 1"),
        (["--out", "T", "--steps", "many"], "--steps: 'many' is not valid: should be a whole number"),
        (
            ["--out", "T", "--steps", 50],
            "num_steps: 50 is not valid: the quadratic grid of points=8 lies on the solver",
        ),
        (["--out", "T", "--steps", 2048], "num_steps: 2048 is more than the 1000 steps that the schedule has"),
        (["--out", "T", "--grid", "cubic"], "grid: 'cubic' is not valid: should be 'quadratic' or 'even'"),
        (["--out", "T", "--solver", "ancestral"], "solver: 'ancestral' is not valid: should be 'ddim' or 'heun'"),
        (["--out", "T", "--device", "abacus"], "--device: 'abacus' is not on this machine"),
        (["--out", "T", "--steps", 64, "num_steps=128"], "num_steps: given twice, as a flag and as num_steps=128"),
        (["--out", "T", "clip=true"], "clip: true needs data with a range, and these have none"),
        (["--out", "T", "colour=blue"], "colour: unknown field"),
        (["--out", "T", "--resume"], "T: no trajectories were begun here (it has no trajectories.json)"),
    ],
)
def test_bad_input_is_refused(refused, words, message):
    assert message in refused("trajectories", "toy", *words)


def test_what_is_no_diffusion_is_refused(osmose, refused):
    assert osmose("train", "gaussian", "--data", "digits", "--out", "gaussian", "--quiet").status == 0
    assert "gaussian: has no trajectories from noise" in refused("trajectories", "gaussian", "--out", "T")
    Path("toy/model.safetensors").unlink()
    assert "toy: has no model.safetensors yet" in refused("trajectories", "toy", "--out", "T")
    assert "nowhere: not a run folder" in refused("trajectories", "nowhere", "--out", "T")


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("digits", ["--steps", 32], "num_steps: 32 given, but T was begun with 16; resume without it"),
        ("digits", ["--num", 7], "num: 7 given, but T was begun with 6"),
        ("digits", ["clip=false"], "clip: False given, but T was begun with True"),
        ("classes", [], "RUN: classes is not the teacher of T, 'digits' (their weights differ)"),
    ],
)
def test_going_on_otherwise_is_refused(osmose, refused, model, words, message):
    assert osmose("trajectories", "digits", "--out", "T", *SMALL, "--quiet").status == 0
    assert message in refused("trajectories", model, "--out", "T", "--resume", *words)

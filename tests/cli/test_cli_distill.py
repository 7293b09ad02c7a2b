"""`osmose distill tract` and `osmose distill btd`, and what the other commands make of the result."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from osmose.acceleration.distill import distill
from osmose.acceleration.surrogate import surrogate
from osmose.data.dataset import DataConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run, load
from osmose.training.trainer import Trainer, built

POINTS = DataConfig(source="toy:checkerboard", num_points=200)
DIGITS = DataConfig(source="digits")
MLP = {"network": "mlp", "network.width": 16, "network.depth": 1, "sampling.num_steps": 4}
COSINE = {**MLP, "schedule": "cosine", "schedule.num_steps": 64}
V = COSINE | {"parametrization": "v"}
RUNS = {
    "points": ("ddpm", POINTS, V),
    "digits": ("ddpm", DIGITS, V),
    "other": ("ddpm", DIGITS, V),
    "eps": ("ddpm", DIGITS, COSINE),
    "edm": ("edm", DIGITS, MLP),
    "gaussian": ("gaussian", DIGITS, {}),
    "vae": ("vae", DIGITS, {}),
}
QUICK = ["--quiet", "--threads", 1, "training.validation_items=8", "training.preview_samples=1"]
SMALL = [*QUICK, "training.batch_size=8", "training.validate_every=99", "training.preview_every=99"]
SCHEDULE = ["--schedule", "64,8,1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with runs that have weights of chance, one without, and `student`, distilled; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    for name, (method, data, changes) in RUNS.items():
        run = Run.create(folder / name, recipe(method, data, data.load(), 0, changes))
        model = built(run.config)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        run.write_weights(model.state_dict())
    surrogate(folder / "digits", folder / "gaussian", folder / "pair", t_mid=0.5)
    (folder / "unfinished").mkdir()
    shutil.copy(folder / "digits" / "config.json", folder / "unfinished")
    quick = {"training.batch_size": 8, "training.validation_items": 8, "training.preview_samples": 1}
    distill(folder / "digits", folder / "student", schedule=[64, 8, 1], steps=2, progress=False, **quick)
    return folder


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """A working directory with copies of those runs."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


pytestmark = pytest.mark.usefixtures("runs")


def test_a_run_becomes_one_that_samples_in_few_steps(osmose):
    words = ["--schedule", "64,4:16:64,1", "--steps", "3,2", "--lr", "0.01,0.001", "--batch-size", 8, "--seed", 3]
    more = ["--loss-weight", "v", "--snr-cap", 50, "--ema-self", 0.3, "--ema-residual", 0.2, "--solver", "ddim"]
    quiet = [*QUICK, "training.validate_every=99", "training.preview_every=99"]
    answer = osmose("distill", "tract", "digits", "--out", "few", *words, *more, *quiet, "spacing=log-snr")
    assert (answer.status, answer.err) == (0, "")
    wrote, again = answer.out.splitlines()
    assert re.fullmatch(
        "wrote few: 64 to 3 to 1 steps in [0-9]+ s, held-out loss of the phases [0-9.e-]+, [0-9.e-]+; "
        "it samples in 1, 3 steps",
        wrote,
    )
    assert again == "next: osmose evaluate few --steps 1,3 --against digits"
    phases = [Run.open(f"few/phases/{count}").config for count in (3, 1)]
    assert [phase.training.steps for phase in phases] == [3, 2]
    assert [phase.training.lr for phase in phases] == [0.01, 0.001]
    assert [phase.training.batch_size for phase in phases] == [8, 8]
    for method in (phase.method for phase in phases):
        assert (method.weight, method.snr_cap, method.ema_self, method.spacing) == ("v", 50, 0.3, "log-snr")
    assert phases[0].training.ema == pytest.approx(0.2 ** (1 / 3))
    assert json.loads(Path("few/distillation.json").read_text())["warm_start"] is True
    assert not torch.equal(load("few").sample(4).data, load("student").sample(4).data)


def test_the_answer_as_json(osmose):
    words = [*SMALL, "--schedule", "4,2,1", "--steps", 2, "--cold-start", "--parametrization", "x0"]
    answer = osmose("distill", "btd", "eps", "--out", "few", *words, "--json")
    assert (answer.status, answer.err) == (0, "")
    values = json.loads(answer.out)
    assert values.pop("seconds") >= 0
    assert len(values.pop("held_out_losses")) == 2
    assert values == {"run": "few", "schedule": [4, 2, 1], "finished": True}
    assert json.loads(Path("few/distillation.json").read_text())["warm_start"] is False
    assert load("few").config.model.parametrization.kind == "x0"


def test_progress_names_the_phase(osmose):
    words = [word for word in SMALL if word != "--quiet"]
    answer = osmose("distill", "tract", "digits", "--out", "few", *SCHEDULE, "--steps", 2, *words)
    lines = [line for line in answer.err.splitlines() if "held-out loss" in line]
    assert [line.partition(": step 1/1")[0] for line in lines] == [
        "phase 1/2, 64 to 8 steps",
        "phase 2/2, 8 to 1 steps",
    ]


def test_help_names_everything(osmose):
    shown = osmose("distill", "--help").out
    assert "distill tract" in shown
    assert "distill btd" in shown
    assert "distill tract" in osmose("--help").out
    tract, btd = (osmose("distill", kind, "--help").out for kind in ("tract", "btd"))
    for name in ("schedule", "steps", "lr", "solver", "loss-weight", "snr-cap", "ema-residual", "cold-start", "resume"):
        assert f"--{name}" in tract
        assert f"--{name}" in btd
    assert "--ema-self" in tract
    assert "--ema-self" not in btd
    listed = re.search(r"METHOD +one of:(.*?)\(default", osmose("train", "--help").out, re.DOTALL).group(1)
    assert "ddpm" in listed
    assert not {"tract", "btd", "distilled"} & set(re.findall(r"[a-z-]+", listed))


@pytest.mark.parametrize("words", [["distill"], ["distill", "tracts", "digits"]])
def test_an_unknown_distillation_is_refused(refused, words):
    assert "choose one of: distill tract, distill btd" in refused(*words)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule", "64,7,1"], "schedule: 7 does not divide 64, the steps before it"),
        (["--schedule", "64,8,16"], "schedule: 16 after 8 is not valid: the numbers of steps have to fall"),
        (["--schedule", "64,8,8"], "schedule: 8 after 8 is not valid"),
        (["--schedule", "128,8,1"], "begins with 128 steps, but the teacher was trained on 64; begin with 64 or less"),
        (["--schedule", "64"], "schedule: 64 alone is not valid: the steps of at least one student come after it"),
        (["--schedule", "64,eight,1"], "--schedule: '64,eight,1' is not valid: should be whole numbers, as in 1024,"),
        (["--schedule", "64,8.5"], "--schedule: '64,8.5' is not valid: should be whole numbers"),
        (["--schedule", "64,,1"], "--schedule: '64,,1' is not valid"),
        (["--schedule", "64,16:4:64,1"], "schedule: groups that end at [16, 4, 64]: the ends should rise"),
        (["--schedule", "64,16:60,1"], "schedule: the last group ends at step 60, and the grid has 64"),
        (["--schedule", "16:64,1"], "schedule: [16, 64] is not valid: the teacher's steps, which come first"),
        (["--schedule", "64,8,0"], "schedule: [64, 8, 0] is not valid: should be whole numbers, at least 1"),
        (["--steps", "many"], "--steps: 'many' is not valid: should be whole numbers, as in 2000 or 500,1500"),
        (["--steps", "1,2,3"], "steps: 3 values given for 2 phases; give one, or one for each"),
        (["--steps", "1"], "steps: 1 is not valid: 2 phases need at least one each"),
        (["--lr", "fast"], "--lr: 'fast' is not valid: should be numbers, as in 0.001"),
        (["--lr", "1,2,3"], "lr: 3 values given for 2 phases"),
        (["--lr", "-1"], "lr: -1.0 is not valid: should be a number above 0"),
        (["--lr", "nan"], "lr: nan is not valid: should be a number above 0"),
        (["--ema-self", "1"], "ema_self: 1.0 is not valid: should be less than 1"),
        (["--ema-self", "-0.1"], "ema_self: -0.1 is not valid: should be greater than or equal to 0"),
        (["--ema-residual", "1"], "ema_residual: 1.0 is not valid: should be less than 1"),
        (["--snr-cap", "0"], "snr_cap: 0.0 is not valid: should be greater than 0"),
        (["--loss-weight", "snr"], "weight: 'snr' is not valid: should be 'truncated-snr', 'v' or 'constant'"),
        (["--solver", "rk4"], "solver: 'rk4' is not valid: should be 'ddim' or 'heun'"),
        (["--parametrization", "w"], "unknown parametrization 'w'; choose one of edm, eps, v, x0"),
        (["--seed", "-1"], "seed: -1 is not valid"),
        (["--batch-size", "0"], "training.batch_size: 0 is not valid"),
        (["--threads", "0"], "--threads: 0 is not valid: must be at least 1"),
        (["--colour", "blue"], "unknown argument --colour"),
        (["colour=blue"], "colour: unknown field"),
        (["spacing=wide"], "spacing: 'wide' is not valid: should be 'even', 'leading', 'trailing', 'quadratic'"),
        (["spacing=quadratic"], "spacing: 'quadratic' has only 44 different steps of 64 for 64"),
        (["training.steps=5"], "training.steps: is said of each phase, by steps (--steps 2000, or --steps 500,1500)"),
        (["training.ema=0.5"], "training.ema: is said of each phase, by ema_residual"),
        (["--ema-self", "0.4", "ema_self=0.5"], "ema_self: given twice"),
    ],
)
def test_bad_options_are_refused(refused, words, message):
    schedule = [] if "--schedule" in words else SCHEDULE
    assert message in refused("distill", "tract", "digits", "--out", "few", *schedule, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--out", "few", "--schedule", "64,16"], "schedule: btd halves, and 64 to 16 does not; use distill"),
        (["digits", "--out", "few", "--schedule", "64,32,20"], "btd halves, and 32 to 20 does not"),
        (["digits", "--out", "few", "--ema-self", "0.4"], "unknown argument --ema-self"),
        (["eps", "--out", "few"], "parametrization: 'eps' cannot give x0 in one step, from pure noise; use parametriz"),
        (["points", "--out", "few", "clip=true"], "clip: true needs data with a range, and these have none"),
        (["edm", "--out", "few", "spacing=trailing"], "spacing: 'trailing' needs a schedule with discrete steps"),
        (["digits"], "--out: required: the run folder to make"),
        (["digits", "--out", "points"], "--out: points exists already"),
        (["digits", "--out", "digits/config.json"], "--out: digits/config.json exists already"),
        (["gaussian", "--out", "few"], "gaussian: is no diffusion that can be distilled; ddpm, iddpm and edm are"),
        (["vae", "--out", "few"], "vae: is no diffusion that can be distilled"),
        (["pair", "--out", "few"], "surrogate: is no diffusion that can be distilled"),
        (["unfinished", "--out", "few"], "unfinished: has no model.safetensors yet"),
        (["nowhere", "--out", "few"], "nowhere: not a run folder"),
        (["digits/config.json", "--out", "few"], "not a run folder"),
        (
            ["student", "--out", "few", "--schedule", "16,8"],
            "begins with 16 steps, but the teacher was distilled to 1, 8",
        ),
        (["student/phases/1", "--out", "few"], "schedule: 1 alone is not valid"),
    ],
)
def test_a_distillation_is_refused(refused, words, message):
    assert message in refused("distill", "btd", *words)


@pytest.mark.parametrize("words", [["--schedule", "64,8,0"], ["--steps", "0"], ["--steps", "1,0"], ["--lr", "nan"]])
def test_messages_name_the_option_alone(refused, words):
    message = refused("distill", "tract", "digits", "--out", "few", *words)
    assert re.match(r"(schedule|steps|lr): \S.* is not valid: should be (a number|whole numbers)", message)


@pytest.mark.parametrize(
    "words",
    [["--steps", "4", "steps=6"], ["--lr", "1", "lr=2"], ["--seed", "1", "seed=2"], [*SCHEDULE, "schedule=[64,4,1]"]],
)
def test_what_is_given_twice_is_refused(refused, words):
    steps = [] if "--steps" in words else ["--steps", "2"]
    assert "given twice" in refused("distill", "tract", "digits", "--out", "few", *words, *SMALL, *steps)


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["digits", "--out", "student", "--steps", "2"],
            "--steps: given, but student is continued by its own settings",
        ),
        (["digits", "--out", "student", "--cold-start"], "--cold-start: given, but student is continued"),
        (["digits", "--out", "student", "--seed", "0"], "--seed: given, but"),
        (["digits", "--out", "student", "ema_self=0.5"], "ema_self: given, but"),
        (["digits", "--out", "few"], "few: no distillation was begun here (it has no distillation.json)"),
        (["digits", "--out", "points"], "points: no distillation was begun here"),
        (["other", "--out", "student"], "RUN: other is not the teacher of student, 'digits' (their weights differ)"),
        (["digits"], "--out: required"),
    ],
)
def test_going_on_is_refused(refused, words, message):
    assert message in refused("distill", "tract", *words, "--resume")


def test_a_finished_distillation_has_nothing_to_do(osmose):
    before = {path: path.read_bytes() for path in Path("student").rglob("*") if path.is_file()}
    answer = osmose("distill", "tract", "digits", "--out", "student", "--resume", "--quiet")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(
        "student is finished already; it samples in 1, 8 steps\nnext: osmose evaluate student "
    )
    assert {path: path.read_bytes() for path in Path("student").rglob("*") if path.is_file()} == before


def test_another_method_cannot_go_on(refused):
    assert "tract" in refused("distill", "btd", "digits", "--out", "student", "--resume")


def test_divergence_is_told_and_can_be_looked_at(osmose):
    words = ["--lr", "0.001,1e30", "training.clip_grad=null", "training.warmup=0", "--steps", "2,9", *SMALL]
    answer = osmose("distill", "tract", "digits", "--out", "few", *SCHEDULE, *words, "--json")
    assert answer.status == 1
    message = "phase 2/2, 8 to 1 steps: the loss is no longer finite at step 2 (last batch: t from "
    assert answer.err.startswith(f"osmose: {message}")
    assert answer.err.count("\n") == 1
    assert json.loads(answer.out)["error"].startswith(message)
    # what is half done is neither a run nor trained by itself
    assert "few: a distillation that is not finished" in osmose("sample", "few").err
    assert osmose("info", "few/phases/1").status == 0


def test_phases_are_continued_by_distilling_alone(osmose, refused, monkeypatch):
    optimise = Trainer.optimise
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimise", lambda t, w: 1 / 0 if t.step == 1 else optimise(t, w))
        with pytest.raises(ZeroDivisionError):
            osmose("distill", "tract", "digits", "--out", "few", *SCHEDULE, "--steps", 4, *SMALL)
    message = refused("train", "--out", "few/phases/8", "--resume", "--quiet")
    assert message == (
        "tract: has no teacher; a distillation is continued by osmose distill tract RUN --out RUN2 --resume"
    )
    assert osmose("distill", "tract", "digits", "--out", "few", "--resume", "--quiet").status == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tract", "--data", "digits", "--out", "few"],
            "tract: is distilled from a trained run, not trained; use osmo",
        ),
        (["btd", "--data", "digits", "--out", "few"], "use osmose distill btd RUN --out RUN2"),
        (["distilled", "--data", "digits", "--out", "few"], "use osmose distill tract RUN --out RUN2"),
        (["--out", "student", "--resume"], "student: distilled is put together, not trained: nothing to continue"),
    ],
)
def test_students_are_not_trained_from_data(refused, words, message):
    assert message in refused("train", *words)


# --- the other commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student", "--steps", "2"], "num_steps: 2 is no grid that was distilled; those are 1, 8"),
        (["student/phases/8", "--steps", "1"], "num_steps: 1 is no grid that was distilled; those are 8"),
        (["student", "--solver", "heun"], "solver: 'heun' given, but of a student only num_steps can be chosen"),
        (["student", "clip=false"], "clip: False given, but of a student only num_steps can be chosen"),
    ],
)
def test_students_sample_on_their_grids_alone(refused, words, message):
    assert message in refused("sample", *words, "-n", 4)


def test_students_are_sampled_scored_compared_and_described(osmose):
    for name, steps in (("student", (1, 8)), ("student/phases/8", (8,)), ("student/phases/1", (1,))):
        for count in steps:
            answer = osmose("sample", name, "--steps", count, "-n", 4, "--out", f"{count}.npz", "--json")
            assert json.loads(answer.out)["nfe"] == count
        assert osmose("sample", name, "-n", 4, "--out", "few.png").status == 0
        numbers = ",".join(map(str, steps))
        answer = osmose("evaluate", name, "--steps", numbers, "-n", 40, "--metrics", "sw2", "--quiet", "--json")
        assert [one["nfe"] for one in json.loads(answer.out)["evaluations"]] == list(steps)
    with np.load("8.npz") as archive:
        assert archive["samples"].max() <= 16
    assert "2 is no grid" in osmose("evaluate", "student", "--steps", "2", "-n", 40, "--quiet").err
    assert osmose("evaluate", "digits", "-n", 40, "--metrics", "sw2", "--quiet").status == 0
    rows = json.loads(osmose("compare", "digits", "student", "student/phases/8", "--json").out)["rows"]
    assert [(row["run"], row["method"], row["nfe"]) for row in rows] == [
        ("digits", "ddpm", 4),
        ("student", "distilled", 1),
        ("student", "distilled", 8),
        ("student/phases/8", "tract", 8),
    ]


@pytest.mark.parametrize(
    ("name", "method", "parent"), [("student", "distilled", "digits"), ("student/phases/1", "tract", "8")]
)
def test_info_describes_students(osmose, name, method, parent):
    answer = osmose("info", name)
    assert (answer.status, answer.err) == (0, "")
    assert f"method      {method}\n" in answer.out
    assert f"parent      {parent} (" in answer.out
    values = json.loads(osmose("info", name, "--json").out)
    assert (values["seconds_per_step"] is None) == (method == "distilled")
    assert values["macs"] == json.loads(osmose("info", "digits", "--json").out)["macs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["surrogate", "student", "--with", "gaussian", "--out", "few"], "distilled: has no chain that can be entered"),
        (["surrogate", "student/phases/8", "--with", "gaussian", "--out", "few"], "tract: has no chain that can be"),
        (["analyze", "surrogate", "student", "--with", "gaussian"], "distilled: has no chain that can be entered"),
        (["analyze", "likelihood", "student"], "distilled: has no likelihood bound; ddpm, iddpm, edm"),
        (["analyze", "likelihood", "student/phases/1"], "tract: has no likelihood bound"),
    ],
)
def test_what_needs_a_chain_refuses_students(refused, words, message):
    assert message in refused(*words)


def test_a_student_may_be_a_surrogate(osmose):
    assert osmose("surrogate", "digits", "--with", "student", "--t-mid", 0.5, "--out", "few").status == 0
    assert osmose("sample", "few", "-n", 4, "--out", "few.npz").status == 0

"""`osmose evaluate RUN --against RUN2`: two runs, sample by sample, from the same noise."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from osmose.acceleration.distill import distill
from osmose.cli.main import main
from osmose.errors import UserError
from osmose.gaussian.noise import Noise
from osmose.metrics.evaluation import Evaluation, EvaluationFile, evaluate_run, record
from osmose.metrics.pairing import Pair, full_sampling, paired_rmse
from osmose.training.run import Run

NETWORK = ["network=mlp", "network.width=16", "network.depth=1"]
CHAIN = ["schedule=cosine", "schedule.num_steps=64", "parametrization=v", "sampling.num_steps=10"]
SHORT = ["training.batch_size=16", "training.preview_samples=4", "--threads", "1", "--quiet"]
TOY, OTHER = (["--data", f"toy:{name}", "data.num_points=400"] for name in ("checkerboard", "two-moons"))
SCORED = ["-n", 40, "--metrics", "sw2,energy", "--threads", 1, "--quiet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Teachers `points` and `digits`, their students, another teacher, runs that cannot be paired."""
    folder = tmp_path_factory.mktemp("against")

    def train(name, method, *words):
        main(["train", method, *words, *SHORT, "--out", str(folder / name)])

    train("points", "ddpm", *TOY, *NETWORK, *CHAIN, "--steps", "6")
    train("longer", "ddpm", *TOY, *NETWORK, *CHAIN, "--steps", "7")
    train("edm", "edm", *TOY, *NETWORK, "sampling.num_steps=5", "--steps", "6")
    train("moons", "ddpm", *OTHER, *NETWORK, *CHAIN, "--steps", "2")
    train("ancestral", "ddpm", *TOY, *NETWORK, *CHAIN, "sampling.solver=ancestral", "--steps", "2")
    train("gaussian", "gaussian", *TOY)
    train("digits", "ddpm", "--data", "digits", *NETWORK, *CHAIN, "--steps", "2")
    for name in ("points", "digits"):
        distill(folder / name, folder / f"few-{name}", schedule=[64, 8, 1], steps=8, progress=False)
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A working directory with copies of those runs."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def by_hand(name, against, theirs, **options):
    """Root mean square difference of the samples of two runs from seed 0, model units."""
    mine, other = Run.open(name).model(), Run.open(against).model()
    mine, other, spec = mine.sample(40, **options).data, other.sample(40, **theirs).data, mine.spec
    shift, scale = (torch.tensor(value).view(1, -1, *[1] * (len(spec.shape) - 1)) for value in (spec.shift, spec.scale))
    difference = (mine - shift) / scale - (other - shift) / scale
    return float(difference.double().square().mean() ** 0.5)


def stored(name):
    return EvaluationFile.parse(json.loads(Path(name, "evaluation.json").read_text())).evaluations


@pytest.mark.parametrize("name", ["points", "digits"])
@pytest.mark.usefixtures("work")
def test_students_against_their_teacher(osmose, name):
    answer = osmose("evaluate", f"few-{name}", "--against", name, *SCORED, "--json")
    assert answer.status == 0, answer.err
    values = json.loads(answer.out)
    full, *rows = values["rows"]
    # Not --steps, but every grid; the teacher as its students were taught, not in its own 10 steps.
    assert [(row["steps"], row["nfe"], row["call_ratio"]) for row in rows] == [(1, 1, 64), (8, 8, 8)]
    assert (full["run"], full["steps"], full["nfe"], full["call_ratio"], full["paired_rmse"]) == (name, 64, 64, 1, None)
    theirs = Run.open(f"few-{name}").config.method.teacher_sampling
    assert theirs == {
        "num_steps": 64,
        "solver": {"kind": "ddim", "eta": 0.0},
        "spacing": "trailing",
        "clip": theirs["clip"],
    }
    for row in rows:
        expected = by_hand(f"few-{name}", name, theirs, num_steps=row["steps"])
        assert row["paired_rmse"] == pytest.approx(expected, rel=1e-5)
        assert row["paired_rmse"] > 0.01
        assert row["seconds_per_sample"] == row["seconds"] / 40

    # What is printed is what is recorded, on both sides.
    (teacher,), students = stored(name), stored(f"few-{name}")
    assert teacher.sampling["num_steps"] == 64
    assert teacher.paired is None
    assert [student.paired.rmse for student in students] == [row["paired_rmse"] for row in rows]
    assert {(s.paired.folder, s.paired.sha256) for s in students} == {(name, Run.open(name).hash())}
    assert all(student.paired.sampling == teacher.sampling for student in students)
    for row, evaluation in zip(values["rows"], [teacher, *students], strict=True):
        score = evaluation.score("sw2")
        assert (row["metric"], row["score"], row["real"]) == ("sw2", score.value, score.floor)
        assert row["standard_error"] == score.standard_error
        assert evaluation.score("energy") is not None
    assert [e["sampling"]["num_steps"] for e in (values["full"], *values["evaluations"])] == [64, 1, 8]

    pictures = [f"few-{name}/samples/against-{name}-scores.png", f"few-{name}/samples/against-{name}.png"]
    assert values["wrote"] == [f"few-{name}/evaluation.json", f"{name}/evaluation.json", *pictures]
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) > 200


def test_the_picture_has_a_row_for_each_way_and_a_column_for_each_noise(work, osmose):
    osmose("evaluate", "few-digits", "--against", "digits", *SCORED)
    teacher = Run.open("few-digits").config.method.teacher_sampling
    rows = [Run.open("digits").model().sample(12, **teacher).data]
    rows += [Run.open("few-digits").model().sample(12, num_steps=steps).data for steps in (1, 8)]
    with Image.open(work / "few-digits/samples/against-digits.png") as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    # 3 rows of 12 images of 8x8, each pixel 10 wide, with gaps of 5 around them, right of the labels.
    left = pixels.shape[1] - (12 * 85 + 5)
    assert pixels.shape[0] == 3 * 85 + 5
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, start = 5 + 85 * row, left + 5 + 85 * column
            found = pixels[top : top + 80, start : start + 80].reshape(8, 10, 8, 10)[:, 5, :, 5]
            assert np.abs(found - (image[0] * 255 / 16).numpy()).max() <= 2
    assert (pixels[:, : left - 5].reshape(-1) < 100).any(), "the rows have labels"


@pytest.mark.usefixtures("work")
def test_one_table_for_people(osmose):
    answer = osmose("evaluate", "few-points", "--steps", "1", "--against", "points", *SCORED)
    assert answer.status == 0, answer.err
    lines = answer.out.splitlines()
    assert sum("━┓" in line for line in lines) == 1
    cells = [line.strip("│┃ ").replace("┃", "│").split("│") for line in lines if "│" in line or "┃" in line]
    heading, full, one = [[cell.strip() for cell in row] for row in cells]
    score = stored("few-points")[0].score("sw2")
    assert heading == ["run", "steps", "sw2", "±", "RMSE to points", "nfe", "fewer calls", "ms per sample"]
    assert (full[0], full[1], full[4], full[6]) == ("points", "64", "-", "1x")
    assert (one[0], one[1], one[2], one[6]) == ("few-points", "1", f"{score.value:.4g}", "64x")
    assert one[4] == f"{stored('few-points')[0].paired.rmse:.4g}"
    assert f"sw2 of real data: {score.floor:.4g}" in answer.out
    assert (
        "wrote few-points/evaluation.json, points/evaluation.json, few-points/samples/against-points-scores"
        in answer.out
    )
    assert "next: osmose compare few-points points" in answer.out


@pytest.mark.usefixtures("work")
def test_a_run_against_itself(osmose):
    answer = osmose("evaluate", "points", "--steps", "5,10", "--against", "points", *SCORED, "--json")
    assert answer.status == 0, answer.err
    full, five, ten = json.loads(answer.out)["rows"]
    assert (full["steps"], five["steps"], ten["steps"]) == (10, 5, 10)
    assert ten["paired_rmse"] == 0
    assert ten["score"] == full["score"]
    assert five["paired_rmse"] == pytest.approx(by_hand("points", "points", {}, num_steps=5), rel=1e-5)
    # In full and in its 10 steps are the same evaluation.
    assert [(e.sampling["num_steps"], e.paired.rmse) for e in stored("points")] == [(5, five["paired_rmse"]), (10, 0.0)]

    # --solver is of this side only.
    heun = osmose("evaluate", "points", "--steps", 64, "--solver", "heun", "--against", "points", *SCORED, "--json")
    (row,) = json.loads(heun.out)["rows"][1:]
    assert row["nfe"] == 127
    assert row["paired_rmse"] == pytest.approx(by_hand("points", "points", {}, num_steps=64, solver="heun"), rel=1e-5)


@pytest.mark.usefixtures("work")
def test_runs_that_are_no_family(osmose):
    """Schedules may differ, of variance 1 and exploding: the standard noise is the same."""
    values = json.loads(osmose("evaluate", "edm", "--steps", "3", "--against", "points", *SCORED, "--json").out)
    assert values["rows"][0]["steps"] == 10
    assert values["rows"][1]["paired_rmse"] == pytest.approx(by_hand("edm", "points", {}, num_steps=3), rel=1e-5)
    # Of a student, but not of this teacher, which is on the same schedule. num_steps=8 chooses one grid.
    values = json.loads(osmose("evaluate", "few-points", "num_steps=8", "--against", "longer", *SCORED, "--json").out)
    assert [row["steps"] for row in values["rows"]] == [64, 8]


def test_how_a_teacher_samples_in_full(work):
    few, teacher = Run.open("few-points"), Run.open("points")
    assert full_sampling(few, teacher)["num_steps"] == 64
    # Another diffusion on the same schedule is asked for the same; none is asked for what only a teacher did.
    assert full_sampling(few, Run.open("longer")) == full_sampling(few, teacher)
    assert full_sampling(teacher, few) == {}
    # The run of a phase has its predecessor for a parent, which has one grid and no solver to choose.
    phases = [Run.open(work / "few-points/phases" / name) for name in ("8", "1")]
    assert full_sampling(phases[0], teacher)["num_steps"] == 64
    assert full_sampling(phases[1], phases[0]) == {}
    Pair(phases[1], phases[1].model(), [{}], phases[0])


def test_rmse_is_in_the_units_of_the_model(made):
    spec = Run.open(made / "points").config.spec.replace(shift=[1.0, -3.0], scale=[2.0, 5.0])
    a = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    b = a + torch.tensor([[2.0, 0.0], [0.0, 10.0], [4.0, -15.0]])
    assert paired_rmse(a, b, spec) == pytest.approx(((1 + 4 + 4 + 9) / 6) ** 0.5)
    assert paired_rmse(a.repeat(3000, 1), b.repeat(3000, 1), spec) == pytest.approx(3**0.5)


@pytest.mark.usefixtures("work")
def test_without_against_nothing_changes(osmose):
    answer = json.loads(osmose("evaluate", "few-points", *SCORED, "--json").out)
    assert [e["sampling"]["num_steps"] for e in answer["evaluations"]] == [1]
    assert not list(Path("few-points/samples").glob("against-*"))


@pytest.mark.usefixtures("work")
def test_records_before_and_after(osmose):
    osmose("evaluate", "few-points", "--steps", "8", "-n", 40, "--metrics", "energy", "--quiet")
    # As it was written before there were pairs.
    path = Path("few-points/evaluation.json")
    old = json.loads(path.read_text())
    assert old["evaluations"][0].pop("paired") is None
    path.write_text(json.dumps(old))
    osmose("evaluate", "few-points", "--steps", "8", "--against", "points", *SCORED)
    (merged,) = stored("few-points")
    assert merged.paired is not None
    # Scores that come later join, and what was measured against the teacher stays; a later pair replaces it.
    osmose("evaluate", "few-points", "--steps", "8", "-n", 40, "--metrics", "nn_ratio", "--quiet")
    (later,) = stored("few-points")
    assert sorted(score.name for score in later.scores) == ["energy", "nn_ratio", "sw2"]
    assert later.paired == merged.paired
    osmose("evaluate", "few-points", "--steps", "8", "--against", "longer", *SCORED)
    (last,) = stored("few-points")
    assert (last.paired.folder, last.paired.sampling["num_steps"]) == ("longer", 64)
    assert len(last.scores) == 3


@pytest.mark.usefixtures("work")
def test_compare_shows_pairs(osmose):
    osmose("evaluate", "few-points", "--against", "points", *SCORED)
    rows = json.loads(osmose("compare", "few-points", "points", "--out", "both", "--json").out)["rows"]
    pairs = [(row["steps"], row.get("paired_with")) for row in rows]
    assert pairs == [(1, "points, 64 steps"), (8, "points, 64 steps"), (64, None)]
    written = list(csv.DictReader(Path("both/comparison.csv").read_text().splitlines()))
    assert [row["paired_rmse"] for row in written] == [
        *(f"{e.paired.rmse:.4g}" for e in stored("few-points")),
        "",
    ]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["few-points", "--steps", "1,4", "--against", "points"], "num_steps: 4 is no grid that was distilled"),
        (["points", "--steps", "65", "--against", "points"], "num_steps: 65 is more than the 64 steps"),
        (["few-points", "--against", "moons"], "--against: moons was trained on 'toy:two-moons', points of shape (2,)"),
        (["points", "--against", "digits"], "--against: digits was trained on 'digits', image of shape (1, 8, 8)"),
        (["points", "--against", "gaussian"], "--against: gaussian is a run of gaussian, whose samples do not come"),
        (["gaussian", "--against", "points"], "--against: gaussian is a run of gaussian, whose samples do not come"),
        (["points", "--against", "ancestral"], "--against: ancestral samples with ancestral, which draws further"),
        (["ancestral", "--against", "points"], "--against: ancestral samples with ancestral, which draws further"),
        (["points", "--solver", "ancestral", "--against", "points"], "only samples that follow from the noise"),
        (["points", "solver.eta=0.5", "--against", "points"], "--against: points samples with ddim with eta = 0.5"),
        (["points", "--against", "nowhere"], "nowhere: not a run folder"),
        (["--samples", "x.npz", "--data", "digits", "--against", "points"], "--against: has no meaning with --samples"),
    ],
)
def test_what_cannot_be_paired_is_refused_before_sampling(refused, monkeypatch, words, said):
    monkeypatch.setattr("osmose.methods.base.GenerativeModel.stream", None)
    assert said in refused("evaluate", *words, *SCORED)


def test_another_noise_is_refused(made):
    class Pink(Noise):
        kind: str = "pink"

        def sample(self, draws, event_shape):
            return draws.normal(event_shape)

    run = Run.open(made / "points")
    method = run.config.method.model_copy(update={"noise": Pink()})
    other = Run(run.folder, run.config.model_copy(update={"method": method}))
    with pytest.raises(UserError, match=r"starts from noise \{'kind': 'pink'\}, and .* from \{'kind': 'white'\}"):
        Pair(run, run.model(), [{}], other)


def test_a_pair_belongs_to_its_conditions(work):
    """Of other seeds and numbers of samples nothing is said."""
    run = Run.open("points")
    dataset = run.config.data.load()
    pair = {"folder": "x", "sha256": "y", "sampling": {"num_steps": 9}, "rmse": 0.5}
    for index, seed in enumerate((0, 1, 0)):
        evaluation, _ = evaluate_run(run, dataset, n=20, seed=seed, metrics=["energy"], num_steps=2)
        changes = {} if index else {"paired": pair}
        record(run, Evaluation.parse({**evaluation.to_json(), **changes}))
    assert [(e.seed, e.paired and e.paired.rmse) for e in stored(work / "points")] == [(1, None), (0, 0.5)]

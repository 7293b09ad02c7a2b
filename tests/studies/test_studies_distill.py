"""Cells that distil the run of another cell."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from toy_study import TINY

from osmose.configuration import Entry
from osmose.errors import UserError
from osmose.studies import STUDIES, running
from osmose.studies.running import run_study
from osmose.studies.study import Cell, Row, Study
from osmose.studies.workers import run_all
from osmose.training.run import Run
from osmose.training.trainer import Trainer

SCHOOL = Entry("test_studies_distill:School", "a teacher and its students")
CHAIN = {**TINY, "schedule": "cosine", "schedule.num_steps": 8, "parametrization": "v", "sampling.num_steps": 8}


class School(Study):
    """Students stand before their teacher."""

    title = "A school"
    source = "nowhere"
    #: Knobs.
    steps: ClassVar[int] = 4
    schedule: ClassVar[list[int]] = [8, 4, 1]
    extra: ClassVar[dict[str, Any]] = {}
    on_measure: ClassVar[Any] = None

    def seeds(self):
        return (0, 2)

    def cells(self):
        few = {
            "schedule": self.schedule,
            "steps": 6,
            "training.batch_size": 8,
            "training.checkpoint_every": 1,
            **self.extra,
        }
        return [
            Cell("student", "tract", "digits", few, uses=("teacher",)),
            Cell("teacher", "ddpm", "digits", CHAIN | {"training.steps": self.steps}),
            Cell("alone", "ddpm", "digits", CHAIN | {"training.steps": 3}),
        ]

    def measure(self, trained):
        if type(self).on_measure is not None:
            type(self).on_measure(trained)
        return [Row({}, {"mean": float(trained.model.sample(2, num_steps=1, seed=0).data.mean())})]

    def claims(self):
        return []


@pytest.fixture(autouse=True)
def school(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES.entries, "school", SCHOOL)
    return School


@pytest.fixture
def run(monkeypatch):
    """Run the school; the cells that were measured, the steps that were trained by run folder, and the outcome."""
    labels, steps = [], {}
    optimise = Trainer.optimise

    def counted(trainer, window):
        name = str(trainer.run.folder.relative_to("out/runs"))
        steps[name] = steps.get(name, 0) + 1
        return optimise(trainer, window)

    monkeypatch.setattr(Trainer, "optimise", counted)
    measured = staticmethod(lambda trained: labels.append(f"{trained.cell.name}/{trained.seed}"))
    monkeypatch.setattr(School, "on_measure", measured)

    def run(**options):
        labels.clear()
        steps.clear()
        outcome = run_study("school", "out", progress=False, **options)
        return list(labels), dict(steps), outcome

    return run


def stored(name):
    return json.loads(Path("out", name).read_text())


def weights():
    return {str(path.relative_to("out")): path.read_bytes() for path in Path("out").rglob("model.safetensors")}


def test_a_cell_distils_the_run_of_its_own_seed(run):
    labels, steps, outcome = run()
    assert labels == [f"{cell}/{seed}" for seed in (0, 2) for cell in ("teacher", "student", "alone")]
    assert not outcome.failures
    assert {name for name in steps if "teacher" not in name and "alone" not in name} == {
        f"student-{seed}/phases/{count}" for seed in (0, 2) for count in (4, 1)
    }
    for seed in (0, 2):
        student, teacher = (Run.open(f"out/runs/{name}-{seed}") for name in ("student", "teacher"))
        assert student.config.method.kind == "distilled"
        assert (student.config.parent.folder, student.config.parent.sha256) == (f"teacher-{seed}", teacher.hash())
        assert student.model().sample(2, num_steps=4).nfe == 4
        assert student.config.training.precision == "fp32"
    assert len(set(weights().values())) == len(weights())
    config = stored("configs/student.json")
    assert [phase["method"]["grids"] for phase in config["phases"]] == [[4], [1]]
    assert config["warm_start"] is True
    assert "teacher" not in config
    assert "[student](configs/student.json)" in Path("out/README.md").read_text()
    assert outcome.results["rows"][0]["cell"] == "student"
    assert outcome.results["rows"][0]["values"]["mean"]["per_seed"][0] is not None
    assert run()[:2] == ([], {})


def test_tasks_of_distillations_go_to_other_processes(run, monkeypatch):
    def spy(function, tasks, *_):
        assert pickle.loads(pickle.dumps(tasks)) == tasks
        return run_all(function, tasks, 1)

    monkeypatch.setattr(running, "run_all", spy)
    assert run(only="student/0", jobs=2)[0] == ["teacher/0", "student/0"]


def test_another_teacher_makes_the_distillation_anew(run, school, monkeypatch):
    run()
    before = weights()
    monkeypatch.setattr(school, "steps", 5)
    labels, steps, outcome = run()
    assert labels == [f"{cell}/{seed}" for seed in (0, 2) for cell in ("teacher", "student")]
    assert not outcome.failures
    assert steps["teacher-0"] == 5
    assert steps["student-0/phases/4"] == steps["student-0/phases/1"] == 3
    after = weights()
    assert {name for name in after if before[name] == after[name]} == {
        f"runs/alone-{seed}/model.safetensors" for seed in (0, 2)
    }
    assert Run.open("out/runs/student-0").config.parent.sha256 == Run.open("out/runs/teacher-0").hash()


def test_another_plan_makes_the_distillation_anew_and_the_teacher_stays(run, school, monkeypatch):
    run(only="student/0")
    monkeypatch.setattr(school, "schedule", [8, 2, 1])
    labels, steps, _ = run(only="student/0")
    assert labels == ["student/0"]
    assert set(steps) == {"student-0/phases/2", "student-0/phases/1"}
    assert sorted(Run.open("out/runs/student-0").model().grids) == [1, 2]
    assert not Path("out/runs/student-0/phases/4").exists()


@pytest.mark.parametrize("count", ["4", "1"])
def test_an_interrupted_distillation_goes_on(run, monkeypatch, count):
    run(only="student/0")
    whole = weights()
    shutil.rmtree("out")
    optimise = Trainer.optimise

    def interrupted(trainer, window):
        if trainer.run.folder.name == count and trainer.step == 1:
            raise KeyboardInterrupt
        return optimise(trainer, window)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(only="student/0")
    assert not Path("out/measurements/student-0.json").exists()
    labels, steps, _ = run(only="student/0")
    assert labels == ["student/0"]
    assert steps == {"student-0/phases/4": 2, "student-0/phases/1": 3} if count == "4" else {"student-0/phases/1": 2}
    assert weights() == whole


def test_a_teacher_that_is_gone_is_made_again_with_its_students(run):
    run(only="student/0")
    before = weights()
    shutil.rmtree("out/runs/teacher-0")
    Path("out/measurements/student-0.json").unlink()
    assert run(only="student/0")[0] == ["teacher/0", "student/0"]
    assert weights() == before


def test_a_teacher_stopped_before_it_has_weights_goes_on(run, school, monkeypatch):
    run(only="student/0")
    monkeypatch.setattr(school, "steps", 5)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not Path("out/runs/teacher-0/model.safetensors").exists()
    labels, _, outcome = run()
    assert not outcome.failures
    assert labels[:2] == ["teacher/0", "student/0"]


@pytest.fixture
def generations(school, monkeypatch):
    """A student of a student of a teacher."""
    school_cells = school.cells

    def cells(self):
        younger = {"schedule": [4, 2, 1], "steps": 2, "training.batch_size": 8}
        return [*school_cells(self), Cell("pupil", "btd", "digits", younger, uses=("student",))]

    monkeypatch.setattr(school, "cells", cells)


@pytest.mark.usefixtures("generations")
def test_students_are_distilled_further(run):
    assert run(only="pupil/0")[0] == ["teacher/0", "student/0", "pupil/0"]
    pupil, student = (Run.open(f"out/runs/{name}-0") for name in ("pupil", "student"))
    assert (pupil.config.parent.folder, pupil.config.parent.sha256) == ("student-0", student.hash())
    assert sorted(pupil.model().grids) == [1, 2]


@pytest.mark.usefixtures("generations")
def test_another_teacher_makes_all_generations_anew(run, school, monkeypatch):
    run(only="pupil/0")
    before = weights()
    monkeypatch.setattr(school, "steps", 5)
    again = run()[0]
    assert [label for label in again if label in ("teacher/0", "student/0", "pupil/0")] == [
        "teacher/0", "student/0", "pupil/0"
    ]  # fmt: skip
    after = weights()
    assert not {name for name in before if before[name] == after[name]}


def test_a_teacher_that_fails_takes_its_students_along(run, monkeypatch):
    optimise = Trainer.optimise
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimise", lambda t, w: 1 / 0 if t.run.folder.name == "teacher-2" else optimise(t, w))
        _, _, outcome = run()
    assert [failure.split(":")[0] for failure in outcome.failures] == ["teacher/2", "student/2"]
    assert outcome.failures[1] == "student/2: it uses teacher/2, which has failed"
    assert not Path("out/runs/student-2").exists()
    assert run()[0] == ["teacher/2", "student/2"]


def test_divergence_fails_the_cell_alone(run, school, monkeypatch):
    more = {"lr": 1e30, "training.clip_grad": None, "training.warmup": 0}
    monkeypatch.setattr(school, "extra", more)
    _, _, outcome = run()
    assert [failure.split(": ")[0] for failure in outcome.failures] == ["student/0", "student/2"]
    assert "phase 1/2, 8 to 4 steps: the loss is no longer finite at step 2" in outcome.failures[0]


@pytest.mark.parametrize("method", ["tract", "btd"])
@pytest.mark.parametrize("quick", [False, True])
def test_a_cell_that_distils_needs_a_teacher(school, monkeypatch, method, quick):
    monkeypatch.setattr(school, "cells", lambda _: [Cell("student", method, "digits")])
    with pytest.raises(ValueError, match="cell 'student' distils, but uses no cell that could be the teacher"):
        run_study("school", "out", quick=quick)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ("gaussian", {}, "cell student: gaussian: is no diffusion that can be distilled"),
        ("ddpm", {"schedule": [8, 3]}, "cell student: schedule: 3 does not divide 8"),
        ("ddpm", {"ema_self": 1.0}, r"cell student: ema_self: 1\.0 is not valid"),
    ],
)
def test_cells_that_cannot_be_distilled_are_refused(school, monkeypatch, teacher, changes, message):
    chain = CHAIN | {"training.steps": 3}
    cells = [
        Cell("teacher", teacher, "digits", chain if teacher == "ddpm" else {}),
        Cell("student", "tract", "digits", changes, uses=("teacher",)),
    ]
    monkeypatch.setattr(school, "cells", lambda _: cells)
    with pytest.raises(UserError, match=message):
        run_study("school", "out")
    assert not Path("out").exists()

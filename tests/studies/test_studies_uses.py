"""Cells that measure the runs of other cells: what is run before what, what goes out of date, what fails."""

import hashlib
import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from toy_study import TINY

from osmose.configuration import Entry
from osmose.studies import STUDIES, running
from osmose.studies.running import run_study
from osmose.studies.study import Cell, Row, Study
from osmose.studies.workers import run_all
from osmose.training import files
from osmose.training.run import Run
from osmose.training.trainer import Trainer

FAMILY = Entry("test_studies_uses:Family", "a parent and its children")
ORDER = ["chain", "pair", "twin", "alone"]
LABELS = [f"{cell}/{seed}" for seed in (0, 1) for cell in ORDER]


class Family(Study):
    """Children stand before their parent."""

    title = "A family"
    source = "nowhere"
    #: Knobs.
    steps: ClassVar[int] = 6
    samples: ClassVar[int] = 4
    on_measure: ClassVar[Any] = None

    def seeds(self):
        return (0, 1)

    def cells(self):
        chain, fixed = ({"training.steps": steps, **TINY} for steps in (self.steps, 5))
        return [
            Cell("pair", None, "digits", uses=("chain",)),
            Cell("twin", "ddpm", "digits", fixed, uses=("chain",)),
            Cell("chain", "ddpm", "digits", chain, {"n": self.samples}),
            Cell("alone", "ddpm", "digits", fixed),
        ]

    def measure(self, trained):
        if type(self).on_measure is not None:
            type(self).on_measure(trained)
        means = {
            name: float(trained.of(name).model(trained.device).sample(4, num_steps=1, seed=0).data.mean())
            for name in trained.cell.uses
        }
        own = {"own": trained.run.config.training.steps} if trained.trained_run else {}
        return [Row({}, own | means)]

    def claims(self):
        return []


@pytest.fixture(autouse=True)
def family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES.entries, "family", FAMILY)
    return Family


@pytest.fixture
def seen(family, monkeypatch):
    """The cells that are measured, as they are."""
    labels = []
    monkeypatch.setattr(
        family, "on_measure", staticmethod(lambda trained: labels.append(f"{trained.cell.name}/{trained.seed}"))
    )
    return labels


@pytest.fixture
def run(seen):
    """Run the family; the cells that were measured, and the outcome."""

    def run(**options):
        seen.clear()
        outcome = run_study("family", "out", progress=False, **options)
        return list(seen), outcome

    return run


def hashes():
    return {path.stem: json.loads(path.read_text())["hash"] for path in Path("out/measurements").iterdir()}


def test_what_is_used_is_run_first_and_is_of_the_same_seed(run):
    labels, outcome = run()
    assert labels == LABELS
    rows = {row["cell"]: row["values"] for row in outcome.results["rows"]}
    for seed in (0, 1):
        model = Run.open(f"out/runs/chain-{seed}").model()
        mean = float(model.sample(4, num_steps=1, seed=0).data.mean())
        assert rows["pair"]["chain"]["per_seed"][seed] == pytest.approx(mean, rel=1e-5)
    assert rows["pair"]["chain"] == rows["twin"]["chain"]
    assert [row["cell"] for row in outcome.results["rows"]] == ["pair", "twin", "chain", "alone"]
    assert run()[0] == []


def test_processes_are_told_what_to_wait_for(run, monkeypatch):
    given = {}

    def spy(function, tasks, _, after):
        given.update({task.label: [tasks[index].label for index in after[i]] for i, task in enumerate(tasks)})
        assert pickle.loads(pickle.dumps(tasks)) == tasks
        return run_all(function, tasks, 1)

    monkeypatch.setattr(running, "run_all", spy)
    run(only="chain/0", jobs=2)
    given.clear()
    run(jobs=2)
    waiting = {"pair/1": ["chain/1"], "twin/1": ["chain/1"]}
    assert given == {label: waiting.get(label, []) for label in LABELS if label != "chain/0"}


def stamp(task):
    """Leave the times of beginning and end; `slow` takes until `fails` has left its own."""
    name, folder = task
    began = time.monotonic()
    while name == "slow" and not Path(folder, "fails").exists():
        if time.monotonic() > began + 60:
            raise TimeoutError
        time.sleep(0.01)
    with files.replacing(Path(folder, name)) as temporary:
        temporary.write_text(f"{began} {time.monotonic()}")
    if name == "fails":
        raise ValueError("on purpose")


def test_processes_wait_for_what_is_needed_and_for_nothing_else(tmp_path):
    names = ["slow", "after-slow", "free", "fails", "after-both"]
    after = [(), (0,), (), (), (1, 3)]
    ended = {names[done.index]: done.error for done in run_all(stamp, [(name, tmp_path) for name in names], 2, after)}
    assert {name for name, error in ended.items() if error} == {"fails"}
    assert ended.keys() == set(names)
    began, over = ({name: float((tmp_path / name).read_text().split()[i]) for name in names} for i in (0, 1))
    assert began["after-slow"] >= over["slow"]
    assert began["after-both"] >= max(over["after-slow"], over["fails"])


@pytest.mark.parametrize("place", ["training", "measuring"])
def test_a_failure_takes_those_that_use_it_along_and_no_others(run, family, monkeypatch, place):
    def fail(trained):
        if (trained.cell.name, trained.seed) == ("chain", 1):
            raise KeyError("no such thing")

    fit = Trainer.fit
    with monkeypatch.context() as patch:
        if place == "measuring":
            patch.setattr(family, "on_measure", staticmethod(fail))
        else:
            wrong = lambda trainer: trainer.run.folder.name == "chain-1"  # noqa: E731
            patch.setattr(Trainer, "fit", lambda trainer: fit(trainer) if not wrong(trainer) else 1 / 0)
        _, outcome = run()
    first, *rest = outcome.failures
    assert first.startswith("chain/1: " + ("KeyError" if place == "measuring" else "ZeroDivisionError"))
    assert rest == [f"{cell}/1: it uses chain/1, which has failed" for cell in ("pair", "twin")]
    assert not Path("out/runs/twin-1").exists()
    assert len(hashes()) == 5
    labels, outcome = run()
    assert (labels, outcome.failures) == (["chain/1", "pair/1", "twin/1"], [])


def test_what_is_trained_of_a_parent_is_part_of_its_children(run, family, monkeypatch):
    run()
    before = hashes()
    monkeypatch.setattr(family, "steps", 7)
    optimise, trained = Trainer.optimise, set()
    monkeypatch.setattr(
        Trainer, "optimise", lambda trainer, step: (trained.add(trainer.run.folder.name), optimise(trainer, step))[1]
    )
    labels, outcome = run()
    assert labels == [label for label in LABELS if "alone" not in label]
    assert trained == {"chain-0", "chain-1"}, "twins are measured again, and not trained again"
    assert outcome.results["rows"][2]["values"]["own"]["mean"] == 7
    assert {name for name, value in hashes().items() if before[name] == value} == {"alone-0", "alone-1"}
    before = hashes()
    monkeypatch.setattr(family, "samples", 5)  # what is measured on a parent is no matter of its children
    assert run()[0] == ["chain/0", "chain/1"]
    assert {name for name, value in hashes().items() if before[name] != value} == {"chain-0", "chain-1"}


def test_cells_that_use_nothing_have_the_hash_that_they_had(run):
    run(only="chain/0")
    trained = json.loads(Path("out/runs/chain-0/config.json").read_text())
    del trained["versions"]
    content = json.dumps({"trained": trained, "settings": {"n": 4}}, sort_keys=True)
    assert hashes() == {"chain-0": hashlib.sha256(content.encode()).hexdigest()}


def test_only_makes_what_is_missing_first(run):
    labels, outcome = run(only="pair/1")
    assert labels == ["chain/1", "pair/1"]
    assert [row["cell"] for row in outcome.rows] == ["pair"]
    assert {path.stem for path in Path("out/configs").iterdir()} == {"chain", "pair"}
    trained = Path("out/runs/chain-1/model.safetensors").stat().st_mtime_ns
    assert run(only="pair/1")[0] == ["pair/1"]
    assert run(only="twin/1")[0] == ["twin/1"]
    assert Path("out/runs/chain-1/model.safetensors").stat().st_mtime_ns == trained
    shutil.rmtree("out/runs/chain-1")
    assert run(only="twin/1")[0] == ["chain/1", "twin/1"]
    assert run(only="twin")[0] == ["chain/0", "twin/0", "twin/1"]
    assert run(only="chain/0")[0] == ["chain/0"]
    assert run()[0] == ["pair/0", "alone/0", "alone/1"]


def test_a_run_that_is_gone_is_made_again_where_it_is_needed(run):
    run()
    shutil.rmtree("out/runs")
    assert run()[0] == []
    Path("out/measurements/pair-0.json").unlink()
    assert run()[0] == ["chain/0", "pair/0"]


def test_no_measurement_outlives_its_run(run, family, monkeypatch):
    run(only="chain/0")
    with monkeypatch.context() as patch:
        patch.setattr(family, "steps", 7)
        patch.setattr(Trainer, "optimise", lambda *_: 1 / 0)
        assert len(run(only="chain/0")[1].failures) == 1
    labels, outcome = run(only="pair/0")  # the run that is there is of 7 steps, and not finished
    assert (labels, outcome.failures) == (["chain/0", "pair/0"], [])
    assert Run.open("out/runs/chain-0").config.training.steps == 6


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([Cell("a", "ddpm", "digits", uses=("b",))], "cell 'a' uses 'b', which the study does not have"),
        (
            [Cell("a", "ddpm", "digits", uses=("b",)), Cell("b", None, "digits")],
            r"cell 'a' uses 'b', which has no run \(its method is None\)",
        ),
        ([Cell("a", "ddpm", "digits", uses=("a",))], r"cells \['a', 'a'\] use each other in a circle"),
        (
            [Cell(x, "ddpm", "digits", uses=(y,)) for x, y in ("ab", "bc", "ca")],
            r"cells \['(a|b|c)', .*\] use each other in a circle",
        ),
    ],
)
@pytest.mark.parametrize("quick", [False, True])
def test_cells_that_cannot_use_each_other_are_refused(family, monkeypatch, cells, message, quick):
    monkeypatch.setattr(family, "cells", lambda _: cells)
    with pytest.raises(ValueError, match=message):
        run_study("family", "out", quick=quick)
    assert not Path("out").exists()


def test_a_cell_may_be_there_only_to_be_used(run, family, monkeypatch):
    measure = family.measure
    monkeypatch.setattr(family, "measure", lambda self, t: [] if t.cell.name == "chain" else measure(self, t))
    _, outcome = run()
    assert [row["cell"] for row in outcome.results["rows"]] == ["pair", "twin", "alone"]
    assert "[chain](configs/chain.json)" in Path("out/README.md").read_text()


def test_runs_that_a_cell_does_not_name_are_not_given(run, family, monkeypatch):
    monkeypatch.setattr(family, "on_measure", staticmethod(lambda trained: trained.of("alone")))
    first = run(only="chain/0")[1].failures[0]
    assert "LookupError: cell 'chain' does not use 'alone'; in its `uses` are none" in first

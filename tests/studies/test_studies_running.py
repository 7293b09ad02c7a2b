"""Running a study: what is missing is done, what is there is kept, and the report says what was found."""

import fcntl
import itertools
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import toy_study

from osmose.cli.main import main
from osmose.errors import UserError
from osmose.studies.running import run_study
from osmose.studies.study import Cell, Results, Row
from osmose.training.run import Run
from osmose.training.trainer import Trainer

LABELS = ["short/0", "long/0", "facts/0", "short/3", "long/3", "facts/3"]


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """The toy is a study, and the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OSMOSE_DATA_ROOT", raising=False)
    return toy_study.register(monkeypatch)


@pytest.fixture
def seen(toy, monkeypatch):
    """The cells that are measured, as they are."""
    labels = []
    monkeypatch.setattr(
        toy, "on_measure", staticmethod(lambda trained: labels.append(f"{trained.cell.name}/{trained.seed}"))
    )
    return labels


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The report of the toy, run in one go."""
    with pytest.MonkeyPatch.context() as patch:
        toy_study.register(patch)
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        run_study("toy", out, progress=False)
    return out


def content(out):
    """results.json without what depends on the clock."""
    values = json.loads((Path(out) / "results.json").read_text())
    for cell in values["cells"]:
        del cell["cpu_seconds"]
    return {name: value for name, value in values.items() if name not in ("cpu_seconds", "resumed", "date", "commits")}


def osmose(capsys, *words):
    capsys.readouterr()
    status = 0
    try:
        main(["study", *map(str, words)])
    except SystemExit as stop:
        status = stop.code
    answer = capsys.readouterr()
    return status, answer.out, answer.err


# --- what is found ---------------------------------------------------------------------------------------------------


def test_results_have_every_seed(undisturbed):
    values = json.loads((undisturbed / "results.json").read_text())
    assert [values[key] for key in ("study", "form", "seeds", "source")] == ["toy", "full", [0, 3], "nowhere, table 0"]
    rows = [(row["cell"], row["labels"]) for row in values["rows"]]
    expected = [(cell, {"steps": steps}) for cell in ("short", "long") for steps in (1, 2)] + [("facts", {})]
    assert rows == expected
    mean = values["rows"][0]["values"]["mean"]
    model = Run.open(undisturbed / "runs" / "short-3").model()
    assert mean["per_seed"][1] == pytest.approx(float(model.sample(6, num_steps=1, seed=3).data.mean()), rel=1e-5)
    assert mean["mean"] == pytest.approx(sum(mean["per_seed"]) / 2, rel=1e-5)
    assert mean["std"] == pytest.approx(abs(mean["per_seed"][0] - mean["per_seed"][1]) / 2**0.5, rel=1e-4)
    assert values["claims"][1]["verdict"] == "reproduced"
    assert values["commits"]["report"] is None or len(values["commits"]["report"].split()[0]) == 40
    assert values["cpu_seconds"] > 0


def test_the_report_says_it_all_and_its_links_lead_somewhere(undisturbed):
    page = (undisturbed / "README.md").read_text()
    assert page.startswith("# A toy\n\nWhat the toy is about.\n\nA second paragraph, with a | in it.\n")
    assert (
        "| **reproduced** | there are 1617 digits | 1617; claimed 1617 to 1617 | [facts](configs/facts.json) |" in page
    )
    assert "short \\| is lower" in page
    assert "nothing (digits)" in page
    assert "    osmose study toy --out studies/toy --only short/0" in page
    assert "quick" not in page.lower()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert {"a-figure.png", "configs/short.json", "configs/facts.json", "results.json"} <= set(links)
    assert all((undisturbed / link).is_file() for link in links)
    tables = [line for line in page.splitlines() if line.startswith("|")]
    for above, below in itertools.pairwise(tables):
        if set(below) <= set("|-"):
            assert above.count("|") == below.count("|")


def test_configurations_are_those_of_the_runs(undisturbed):
    written = json.loads((undisturbed / "configs" / "long.json").read_text())
    ran = json.loads((undisturbed / "runs" / "long-0" / "config.json").read_text())
    assert ran.pop("versions")
    written.pop("versions", None)
    assert written == ran
    assert written["training"]["steps"] == 12
    assert (written["training"]["preview_every"], written["training"]["validate_every"]) == (12, 12)
    assert written["training"]["checkpoint_every"] == 3


def test_a_cell_s_own_settings_win(toy, monkeypatch):
    monkeypatch.setattr(toy, "extra", {"training.validate_every": 4, "training.keep_checkpoints": 2})
    run_study("toy", "out", only="short/0", progress=False)
    run = Run.open("out/runs/short-0")
    assert [line["step"] for line in run.metrics() if "validation_loss" in line] == [4, 8]
    assert run.config.training.keep_checkpoints == 2


def test_the_quick_form_says_so(capsys):
    status, out, _ = osmose(capsys, "toy", "--quick", "--quiet", "--jobs", 1)
    assert status == 0
    assert "REPRODUCED: there are 1617 digits" in out
    assert "prove nothing" in Path("studies/toy-quick/README.md").read_text()
    assert json.loads(Path("studies/toy-quick/results.json").read_text())["form"] == "quick"


def test_json_is_the_results(undisturbed, capsys):
    status, out, err = osmose(capsys, "toy", "--out", undisturbed, "--json")
    answer = json.loads(out)
    assert (status, err, answer["finished"]) == (0, "", True)
    assert answer["results"] == json.loads((undisturbed / "results.json").read_text())


def test_without_a_name_the_studies_are_listed(capsys):
    for words in ([], ["--list"]):
        status, out, _ = osmose(capsys, *words)
        assert status == 0
        assert re.search(r"^toy +a toy$", out, re.M)
        assert "train-steps" in out


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_cells_are_run_seed_by_seed_and_once(seen, capsys):
    run_study("toy", "out")
    assert seen == LABELS
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"1/6 short/0: \d+ s, about \d+ s left", lines[0])
    assert re.fullmatch(r"6/6 facts/3: \d+ s, the last one", lines[5])
    before = content("out")
    Path("out/README.md").unlink()
    run_study("toy", "out")
    assert seen == LABELS
    assert content("out") == before
    assert Path("out/README.md").is_file()


@pytest.mark.parametrize("place", ["measuring", "training"])
def test_an_interrupted_study_comes_to_the_same_result(toy, seen, undisturbed, monkeypatch, capsys, place):
    optimise = Trainer.optimise

    def interrupted(trainer, window):
        if trainer.run.config.seed == 3 and trainer.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimise(trainer, window)

    with monkeypatch.context() as patch:
        if place == "training":
            patch.setattr(Trainer, "optimise", interrupted)
        else:
            patch.setattr(toy, "on_measure", staticmethod(lambda t: t.seed and os.kill(os.getpid(), signal.SIGTERM)))
        status, out, _ = osmose(capsys, "toy", "--out", "out", "--jobs", 1, "--quiet")
    assert status == 130
    assert "the same command continues" in out
    assert not Path("out/results.json").exists()
    assert len(list(Path("out/measurements").iterdir())) == 3
    seen.clear()
    status, _, _ = osmose(capsys, "toy", "--out", "out", "--jobs", 1, "--quiet")
    assert status == 0
    assert seen == LABELS[3:]
    assert content("out") == content(undisturbed)
    measured = json.loads(Path("out/measurements/short-3.json").read_text())
    assert measured["training"]["from_step"] == {"training": 6, "measuring": 8}[place]


def test_a_changed_configuration_is_run_again(toy, seen, monkeypatch, capsys):
    run_study("toy", "out", progress=False)
    kept = Path("out/runs/short-0/model.safetensors").stat().st_mtime_ns
    seen.clear()
    monkeypatch.setattr(toy, "steps", {"short": 8, "long": 16})
    run_study("toy", "out")
    assert seen == ["long/0", "long/3"]
    assert "long/0: its configuration has changed" in capsys.readouterr().err
    assert Run.open("out/runs/long-3").config.training.steps == 16
    assert max(line["step"] for line in Run.open("out/runs/long-3").metrics()) == 16
    assert Path("out/runs/short-0/model.safetensors").stat().st_mtime_ns == kept
    assert "16" in Path("out/README.md").read_text()


def test_a_changed_setting_is_measured_again_and_not_trained_again(toy, seen, monkeypatch, capsys):
    run_study("toy", "out", progress=False)
    seen.clear()
    monkeypatch.setattr(toy, "samples", 7)
    monkeypatch.setattr(Trainer, "optimise", lambda *_: pytest.fail("trained again"))
    run_study("toy", "out")
    assert seen == ["short/0", "long/0", "short/3", "long/3"]
    assert "short/0: what is measured has changed" in capsys.readouterr().err
    assert content("out")["rows"][0]["values"]["items"]["per_seed"] == [7, 7]


def test_cells_that_are_gone_leave_the_report(toy, monkeypatch):
    run_study("toy", "out", progress=False)
    monkeypatch.setattr(toy, "steps", {"short": 8, "long": 12, "longer": 14})
    run_study("toy", "out", progress=False)
    assert Path("out/configs/longer.json").is_file()
    monkeypatch.setattr(toy, "steps", {"short": 8, "long": 12})
    run_study("toy", "out", progress=False)
    assert not Path("out/configs/longer.json").exists()
    assert "longer" not in Path("out/README.md").read_text()


def test_a_cell_that_fails_does_not_stop_the_others(toy, monkeypatch, capsys):
    def fail(trained):
        if (trained.cell.name, trained.seed) == ("long", 0):
            raise KeyError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(toy, "on_measure", staticmethod(fail))
        status, out, err = osmose(capsys, "toy", "--out", "out", "--jobs", 1)
    assert status == 1
    assert re.search(r"^failed: long/0: KeyError: 'no such thing' \(test_studies_running.py, line \d+\)$", out, re.M)
    assert out.count("failed:") == 1
    assert "2/6 long/0: FAILED" in err
    assert "Traceback" not in out + err
    assert len(list(Path("out/measurements").iterdir())) == 5
    assert not Path("out/results.json").exists()
    assert osmose(capsys, "toy", "--out", "out", "--jobs", 1)[0] == 0


def test_only_runs_a_cell_alone_and_anew(seen, capsys):
    status, out, _ = osmose(capsys, "toy", "--out", "out", "--jobs", 1, "--only", "long/3")
    assert (status, seen) == (0, ["long/3"])
    rows = re.findall(r"^long/3: steps (\d), mean (\S+), items 6$", out, re.M)
    assert [steps for steps, _ in rows] == ["1", "2"]
    assert not Path("out/results.json").exists()
    status, out, err = osmose(capsys, "toy", "--out", "out", "--jobs", 1, "--only", "long/3")
    assert "long/3: was run before; it is run again from the beginning" in err
    assert json.loads(Path("out/measurements/long-3.json").read_text())["training"]["from_step"] == 0
    assert re.findall(r"^long/3: steps (\d), mean (\S+), items 6$", out, re.M) == rows
    status, out, _ = osmose(capsys, "toy", "--out", "out", "--jobs", 1, "--only", "long", "--json")
    assert [row["seed"] for row in json.loads(out)["rows"]] == [0, 0, 3, 3]
    seen.clear()
    run_study("toy", "out", progress=False)
    assert seen == ["short/0", "facts/0", "short/3", "facts/3"]


def test_what_ran_before_leaves_no_trace(toy, monkeypatch):
    seen = []

    def measure(_, trained):
        seen.append(torch.get_num_threads())
        return [Row({}, {"x": float(torch.rand(1)), "seed": trained.seed})]

    monkeypatch.setattr(toy, "measure", measure)
    monkeypatch.setattr(toy, "data", "none")  # the facts need no other
    torch.set_num_threads(2)
    try:
        drawn = []
        for before in range(2):
            torch.manual_seed(before)
            drawn.append([row["values"] for row in run_study("toy", f"{before}", only="facts", progress=False).rows])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert drawn[0] == drawn[1]
    assert drawn[0][0]["x"] != drawn[0][1]["x"]
    assert seen == [1] * 4


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train-step"], "unknown study 'train-step'; did you mean 'train-steps'?"),
        (["toy", "--only", "shrt"], "--only: unknown cell 'shrt'; did you mean 'short'?"),
        (["toy", "--only", "short/7"], "--only: '7' is not a seed of this study; choose one of 0, 3"),
        (["toy", "--jobs", "0"], "--jobs: 0 is not valid: must be at least 1"),
        (["toy", "--out", "taken"], "--out: taken exists already and is not the folder of a study"),
        (["toy", "--out", "taken/file"], "--out: taken/file exists already and is not the folder of a study"),
        (["toy", "--out", "other"], "--out: other is the folder of train-steps, full form, not of toy, full form"),
        (["toy", "--out", "short"], "--out: short is the folder of toy, quick form, not of toy, full form"),
        (["train-steps"], "fashion-mnist: give --data-root FOLDER"),
        (["train-steps", "--data-root", "taken"], "fashion-mnist: --data-root taken has no folder"),
    ],
)
def test_refusals_are_one_line_and_touch_nothing(capsys, words, message):
    for name, study, form in (("other", "train-steps", "full"), ("short", "toy", "quick")):
        Path(name).mkdir()
        mark = {"format": "osmose-study-1", "study": study, "form": form}
        (Path(name) / "study.json").write_text(json.dumps(mark))
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    before = sorted(Path().rglob("*"))
    status, out, err = osmose(capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(Path().rglob("*")) == before


def test_a_wrong_configuration_is_refused_before_anything_is_run(toy, monkeypatch):
    monkeypatch.setattr(toy, "extra", {"network.widht": 3})
    with pytest.raises(UserError, match=r"cell short: network.widht: unknown field; did you mean 'width'\?"):
        run_study("toy", "out")
    assert not Path("out").exists()


def test_two_at_work_in_one_folder_are_one_too_many():
    run_study("toy", "out", only="facts/0", progress=False)
    with open("out/study.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another osmose study is at work in out"):
            run_study("toy", "out")


def test_claims_on_cells_that_do_not_exist_are_refused(toy, monkeypatch):
    monkeypatch.setattr(toy, "steps", {"short": 8})
    with pytest.raises(ValueError, match=r"names \{'long'\}"):
        run_study("toy", "out")
    run_study("toy", "quick", quick=True, progress=False)  # the quick form leaves such claims out
    assert len(content("quick")["claims"]) == 1


@pytest.mark.parametrize("name", ["Upper", "a/b", "", ".hidden", "a b"])
def test_names_of_cells_are_names_of_files(name):
    with pytest.raises(ValueError, match="a name is made of"):
        Cell(name, None, "digits")


def test_rows_hold_numbers():
    with pytest.raises(ValueError, match="fd is nan"):
        Row({}, {"fd": float("nan")})


def test_rows_of_a_cell_differ_in_their_labels(toy, monkeypatch, capsys):
    monkeypatch.setattr(toy, "measure", lambda *_: [Row({"a": 1}, {"x": 1}), Row({"a": 1}, {"x": 2})])
    assert (
        "labels have to tell the rows of a cell apart" in osmose(capsys, "toy", "--only", "facts/0", "--out", "out")[1]
    )


def test_looking_up_results():
    rows = [[Row({"steps": s, "kind": "k"}, {"x": s + seed}) for s in (1, 2)] for seed in (0, 10)]
    results = Results((0, 1), {"cell": rows})
    assert results.values("cell", "x", steps=2).tolist() == [2, 12]
    for cell, metric, labels, message in (
        ("sell", "x", {}, "no cell 'sell'; there are cell"),
        ("cell", "y", {"steps": 1}, "no 'y'; it has x"),
        ("cell", "x", {"kind": "k"}, "2 rows with"),
        ("cell", "x", {"steps": 3}, "0 rows with"),
    ):
        with pytest.raises(LookupError, match=message):
            results.values(cell, metric, **labels)
    with pytest.raises(ValueError, match="different rows"):
        Results((0, 1), {"cell": [rows[0], rows[1][:1]]})

"""`osmose verdicts`: one page of all claims."""

import json
from pathlib import Path

from osmose.studies.verdict_page import MARK, finished, table

ROOT = Path(__file__).parents[2]


def study(folder, name, form="full", verdict="reproduced"):
    claim = {"claim": "a | b is lower", "verdict": verdict, "evidence": "1 against 2", "cells": ["a"]}
    values = {"study": name, "title": "A title", "source": "a paper", "form": form, "seeds": [0, 1, 2]}
    values |= {"command": f"osmose study {name} --out studies/{name}", "claims": [claim]}
    (folder / name).mkdir(parents=True)
    (folder / name / "results.json").write_text(json.dumps(values))
    return values


def test_a_page_of_all_claims(osmose, tmp_path):
    shown = [study(tmp_path, "one"), study(tmp_path, "two", verdict="inconclusive")]
    study(tmp_path, "three-quick", form="quick")
    page = tmp_path / "README.md"
    page.write_text("# Studies\n\nBy hand.\n")
    answer = osmose("verdicts", tmp_path)
    assert (answer.status, answer.err) == (0, "")
    assert "2 claims of 2 studies: 1 reproduced, 0 not reproduced, 1 inconclusive" in answer.out
    text = page.read_text()
    assert text == f"# Studies\n\nBy hand.\n\n{table(shown)}"
    assert "| reproduced | a \\| b is lower | 1 against 2 |" in text
    assert "`osmose study two --out studies/two` (3 seeds; 1 inconclusive)" in text
    osmose("verdicts", tmp_path)  # again: nothing is doubled
    assert page.read_text() == text
    said = json.loads(osmose("verdicts", tmp_path, "--json").out)
    assert [claim["theirs"] for claim in said["claims"]] == ["a paper", "a paper"]


def test_the_committed_page_is_what_the_command_writes():
    text = (ROOT / "studies" / "README.md").read_text()
    assert MARK in text
    assert text[text.index(MARK) :] == table(finished(ROOT / "studies"))


def test_a_folder_without_studies_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("verdicts", tmp_path).startswith(f"{tmp_path}: holds no finished study (NAME/results.json in full")

"""Several processes: the same results, no work lost when one dies, none left behind when all do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import psutil
import pytest
from test_studies_quantize import compose_measures, quantize_measures

from osmose.studies import STUDIES
from osmose.studies.running import run_study
from osmose.studies.workers import run_all


def act(task):
    """Fail, die or leave a file."""
    word, folder = task
    if word == "fail":
        raise ValueError("on purpose")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)  # there is work left when the other process is found dead
    Path(folder, word).write_text(str(os.getpid()))


def test_a_process_that_dies_takes_one_task_with_it(tmp_path):
    words = ["die", "a", "fail", "b", "c"]
    ended = {words[done.index]: done.error for done in run_all(act, [(word, tmp_path) for word in words], 2)}
    assert ended.keys() == set(words)
    assert [ended[word] for word in "abc"] == [None] * 3
    assert re.fullmatch(r"ValueError: on purpose \(test_studies_processes.py, line \d+\)", ended["fail"])
    assert "was killed" in ended["die"]
    assert str(os.getpid()) not in {(tmp_path / word).read_text() for word in "abc"}


@pytest.fixture(scope="session")
def quick_form(tmp_path_factory):
    """The quick form of a study, run once in this process without any data but the embedded ones."""

    @lru_cache
    def run(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("OSMOSE_DATA_ROOT", raising=False)
            return run_study(name, tmp_path_factory.mktemp(name) / "out", quick=True, progress=False)

    return run


#: What reports have to hold besides.
REPORTED = {"tensor-train": ["Verdict", *(f"## {k}. " for k in range(1, 10))]}


#: What rows have to be besides.
MEASURED = {"quantize": quantize_measures, "compose": compose_measures}


@pytest.mark.parametrize("name", STUDIES.entries)
def test_the_quick_form_of_every_study(name, quick_form):
    outcome = quick_form(name)
    assert outcome.failures == []
    assert outcome.results["claims"]
    assert outcome.results["rows"]
    page = (outcome.folder / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert all((outcome.folder / link).is_file() for link in links if not link.startswith("http"))
    assert all(path.stat().st_size > 0 for path in outcome.wrote)
    assert all(heading in page for heading in REPORTED.get(name, ()))
    MEASURED.get(name, lambda _: None)(outcome.results)


def test_killed_and_continued_in_several_processes_is_the_same(tmp_path, quick_form):
    whole = quick_form("blocks").results
    out = tmp_path / "killed"
    words = ["study", "blocks", "--quick", "--jobs", "2", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "osmose", *words], stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: any(out.glob("measurements/*.json")))
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2
    finally:
        process.kill()
        process.wait()
    time.sleep(0.3)
    measured = sorted(out.glob("measurements/*.json"))
    _wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    assert sorted(out.glob("measurements/*.json")) == measured, "a process went on without the one that started it"
    assert not (out / "results.json").exists()
    parts = run_study("blocks", out, quick=True, progress=False).results
    for key in ("claims", "rows"):
        assert json.dumps(parts[key]) == json.dumps(whole[key])


def _wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited a minute in vain")

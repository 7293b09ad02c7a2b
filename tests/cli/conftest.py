"""Small trained runs, and a way to run a command in this process."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from osmose.cli.main import main

TOY = ["--data", "toy:two-moons", "data.num_points=400", "network.width=16", "network.depth=1"]
DIGITS = ["--data", "digits", "network.channels=8", "network.blocks=1"]
SHORT = ["training.batch_size=8", "training.preview_samples=4", "sampling.num_steps=3", "--threads", "1"]


class Answer(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def osmose(capsys):
    """Run a command line; what it printed and its exit status."""

    def run(*words):
        capsys.readouterr()
        status = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code or 0
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with the runs toy (points), digits (images) and classes (images, conditional); not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in (("toy", TOY), ("digits", DIGITS), ("classes", [*DIGITS, "--conditional"])):
        steps = ["--steps", "4", "--quiet"]
        main(["train", "ddpm", *settings, *SHORT, *steps, "--out", str(folder / name)])
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A working directory with copies of those runs."""
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A working directory with links to all that a file of tests has `made`."""
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def refused(osmose):
    """Run a command that must be refused: status 2, one line, nothing touched below the working directory."""

    def run(*words):
        before = tree()
        answer = osmose(*words)
        assert answer.status == 2, answer
        assert answer.out == ""
        assert answer.err.startswith("osmose: ")
        assert answer.err.count("\n") == 1
        assert answer.err.endswith("\n")
        assert tree() == before
        return answer.err.removeprefix("osmose: ").rstrip("\n")

    return run


def tree():
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}

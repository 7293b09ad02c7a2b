"""Options given twice or in any order, scores added to earlier ones, paths that stay private."""

import json
from pathlib import Path

import pytest

from osmose.cli.main import main
from osmose.configuration import override


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options") / "run"
    main(
        [
            "train",
            "ddpm",
            "--data",
            "toy:two-moons",
            "--out",
            str(folder),
            "--steps",
            "2",
            "--quiet",
            "network.width=16",
        ]
    )
    return folder


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_kinds_are_chosen_before_their_fields_whatever_the_order():
    values = {"schedule": {"kind": "linear", "num_steps": 1000}, "times": {"kind": "uniform", "stratified": True}}
    for changes in (
        {"schedule.num_steps": 100, "schedule": "cosine"},
        {"schedule": "cosine", "schedule.num_steps": 100},
        {"schedule.num_steps": 100, "schedule.kind": "cosine"},
    ):
        assert override(values, changes)["schedule"] == {"kind": "cosine", "num_steps": 100}
    assert override(values, {"times": "uniform"})["times"] == {"kind": "uniform", "stratified": True}


def test_an_option_given_twice_is_refused(run, tmp_path, capsys):
    assert "num_steps: given twice" in refused(capsys, "evaluate", run, "--steps", "2", "num_steps=3")
    out = tmp_path / "x.npz"
    assert "solver: given twice" in refused(capsys, "sample", run, "--solver", "ddim", "solver=heun", "--out", out)
    assert not out.exists()


def test_later_scores_join_earlier_ones(run):
    common = ["evaluate", str(run), "--steps", "2", "-n", "60", "--quiet", "--metrics"]
    main([*common, "sw2,energy"])
    before = json.loads((run / "evaluation.json").read_text())["evaluations"]
    main([*common, "energy,nn_ratio"])
    (after,) = json.loads((run / "evaluation.json").read_text())["evaluations"]
    assert [score["name"] for score in before[-1]["scores"]] == ["sw2", "energy"]
    assert sorted(score["name"] for score in after["scores"]) == ["energy", "nn_ratio", "sw2"]
    assert next(score for score in after["scores"] if score["name"] == "nn_ratio")["better"] == "one"


def test_mirroring_points_is_refused(tmp_path, capsys):
    words = ["train", "ddpm", "--data", "toy:two-moons", "--out", tmp_path / "r", "training.flip=true"]
    assert "training.flip" in refused(capsys, *words)
    assert not (tmp_path / "r").exists()


def test_options_that_data_cannot_use_are_refused(tmp_path, capsys):
    words = ["train", "ddpm", "--data", "toy:two-moons", "--size", "16", "--out", tmp_path / "r"]
    assert "size: 16 is for square images" in refused(capsys, *words)
    words = ["train", "ddpm", "--data", "digits", "--channels", "3", "--out", tmp_path / "r"]
    assert "channels: 3" in refused(capsys, *words)


def test_the_data_root_stays_out_of_the_run_folder(tmp_path):
    words = ["train", "ddpm", "--data", "toy:two-moons", "--data-root", str(tmp_path), "--out", str(tmp_path / "r")]
    main([*words, "--steps", "1", "--quiet", "network.width=16"])
    assert str(tmp_path) not in Path(tmp_path / "r" / "config.json").read_text()


def test_the_file_s_own_names_are_understood(tmp_path):
    words = ["train", "ddpm", "--data", "toy:two-moons", "--out", str(tmp_path / "r"), "--steps", "1", "--quiet"]
    main([*words, "method.network.width=24"])
    assert json.loads((tmp_path / "r" / "config.json").read_text())["method"]["network"]["width"] == 24

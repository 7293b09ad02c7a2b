"""Training in blocks through the commands."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from osmose.acceleration.blocks import Blocks
from osmose.training.run import Run

SHORT = ["network.width=16", "network.depth=4", "network.heads=2", "--steps", "4", "--batch-size", "8", "--quiet"]
SHORT += ["training.validation_items=8", "--threads", "1", "sampling.num_steps=3"]
TRAIN = ["train", "blocks", "--data", "digits", "--blocks", "2", *SHORT]

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the run whole, and parts of it in first and second; not to be changed."""
    from osmose.cli.main import main

    folder = tmp_path_factory.mktemp("blocks")
    main([*TRAIN, "--conditional", "label_dropout=0.1", "--out", str(folder / "whole")])
    for block, name in enumerate(("first", "second")):
        main([*TRAIN, "--conditional", "label_dropout=0.1", "--only", str(block), "--out", str(folder / name)])
    return folder


def test_what_is_made_samples_like_any_other(osmose):
    run = Run.open(Path("whole"))
    assert [part.kind for part in run.config.method.network.parts] == ["dit", "dit"]
    assert [part.depth for part in run.config.method.network.parts] == [2, 2]
    answer = osmose(
        "sample", "whole", "-n", 4, "--label", 3, "guidance=2", "spacing=equal-mass", "--out", "x.png", "--json"
    )
    assert answer.status == 0, answer
    assert json.loads(answer.out)["nfe"] == 10
    assert "experts" in osmose("info", "whole").out


def test_parts_are_named_and_put_together(osmose):
    answer = osmose("train", "blocks", "--out", "first", "--resume", "--only", 0, "--json")
    assert answer.status == 0, answer
    assert json.loads(answer.out) == {"run": "first", "blocks": 2, "missing": [1], "finished": False}
    answer = osmose("blocks", "merge", "first", "second", "--out", "both")
    assert answer.status == 0, answer
    assert "wrote both: 2 blocks of 2 folders" in answer.out
    a, b = (load_file(Path(name, "model.safetensors")) for name in ("both", "whole"))
    assert all((a[key] == b[key]).all() for key in b)
    assert a.keys() == b.keys()


def test_a_training_goes_on_with_what_is_missing(osmose):
    answer = osmose("train", "blocks", "--out", "second", "--resume", "--order", "interleaved", "--quiet")
    assert answer.status == 0, answer
    a, b = (load_file(Path(name, "model.safetensors")) for name in ("second", "whole"))
    assert all((a[key] == b[key]).all() for key in b)
    assert Blocks.open(Path("second")).finished


def test_networks_that_are_no_stacks_are_experts(osmose):
    words = ["train", "blocks", "--data", "digits", "--blocks", 2, "--network", "unet", "network.channels=8"]
    answer = osmose(*words, "--steps", 2, "--batch-size", 4, "training.validation_items=8", "--quiet", "--out", "u")
    assert answer.status == 0, answer
    assert [part.kind for part in Run.open(Path("u")).config.method.network.parts] == ["unet", "unet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "blocks", "--data", "digits", "--out", "x"], "--blocks: required: how many"),
        (["train", "blocks", "--blocks", 2, "--out", "x"], "--data: required: one of"),
        (["train", "blocks", "ddpm", "--data", "digits", "--blocks", 2, "--out", "x"], "METHOD: 'ddpm' is not valid"),
        ([*TRAIN, "--out", "x", "--order", "mixed"], "--order: 'mixed' is not valid: should be sequential or"),
        ([*TRAIN, "--out", "x", "--split", "1,x"], "--split: '1,x' is not valid: should be whole numbers"),
        ([*TRAIN, "--out", "x", "--split", "1,2"], "split: (1, 2) is not valid: 2 numbers from 1 whose sum is 4"),
        ([*TRAIN, "--out", "x", "--only", "2"], "only: there is no block 2; they are 0 to 1"),
        ([*TRAIN, "--out", "whole"], "--out: whole exists already"),
        ([*TRAIN, "--out", "x", "--init", "whole"], "--init: given, and blocks begin with fresh weights"),
        ([*TRAIN, "--out", "x", "schedule=cosine"], "blocks share noise levels of edm"),
        ([*TRAIN, "--out", "x", "network.widht=3"], "network.widht: unknown field"),
        (["train", "blocks", "--out", "x", "--resume"], "x: no blocks were begun here"),
        (["train", "blocks", "--out", "first", "--resume", "--blocks", 3], "blocks: given, but first is continued"),
        (["train", "blocks", "--out", "first", "--resume", "--steps", 3], "training.steps: given, but first is"),
        (["sample", "first"], "first: blocks that are not all trained; osmose train blocks --out first --resume"),
        (["blocks", "merge", "first", "--out", "x"], "number 1 of the blocks 0 to 1 is trained in none of the folders"),
        (["blocks", "merge", "--out", "x"], "RUN: required: the folders"),
        (["blocks", "merge", "first", "second"], "--out: required"),
        (["sample", "whole", "guidance=-1"], "guidance: -1 is not valid"),
    ],
)
def test_what_is_refused(refused, words, message):
    assert message in refused(*words)
    assert not Path("x").exists()

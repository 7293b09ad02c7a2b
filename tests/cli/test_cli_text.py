"""Text through the commands."""

import json
from pathlib import Path

import numpy as np
import pytest

SMALL = ["network.width=16", "network.heads=2", "network.depth=2"]
SHORT = ["--steps", "3", "--batch-size", "4", "training.validation_items=8", "--quiet"]
DATA = ["--data", "text:python", "--window", "16", "data.letters=true"]

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from osmose.cli.main import main

    folder = tmp_path_factory.mktemp("text")
    main(["train", "masked", *DATA, *SMALL, *SHORT, "--out", str(folder / "run")])
    return folder


def test_samples_scores_and_bits(osmose):
    answer = osmose("sample", "run", "-n", 3, "--steps", 4, "--out", "x.txt", "--quiet")
    assert answer.status == 0, answer
    texts = Path("x.txt").read_text().split("\n\n")
    assert [len(text.removesuffix("\n")) for text in texts] == [16] * 3
    found = json.loads(osmose("evaluate", "run", "-n", 50, "--steps", 4, "--json").out)
    assert "trigram_tv" in json.dumps(found)
    found = json.loads(osmose("analyze", "likelihood", "run", "-n", 20, "--steps", 4, "--json").out)
    assert 3 < found["bits_per_dim"] < 6
    told = osmose("analyze", "likelihood", "run", "-n", 20, "--steps", 4, "--quiet").out
    assert "chain of 4 steps" in told
    assert "ODE" not in told
    shown = osmose("info", "text:python", "--window", 16).out
    assert "text, 16 characters an item, of an alphabet of" in shown
    assert "next: osmose train masked --data text:python --window 16" in shown


def test_gaps_are_filled(osmose):
    known = np.full((2, 16), np.nan, np.float32)
    known[:, :4] = [3, 1, 20, 0]
    np.savez("known.npz", samples=known)
    answer = osmose("complete", "run", "known.npz", "--samples", 2, "--steps", 4, "--out", "filled.npz", "--quiet")
    assert answer.status == 0, answer
    samples = np.load("filled.npz")["samples"]
    assert samples.shape == (2, 2, 16)
    assert (samples[:, :, :4] == [3, 1, 20, 0]).all()
    answer = osmose("complete", "run", "known.npz", "--samples", 2, "--steps", 4, "--out", "filled.txt", "--quiet")
    assert answer.status == 0, answer
    assert len(Path("filled.txt").read_text().split("\n\n")) == 4
    assert "next: osmose sample run -n 8 --out samples.txt" in answer.out
    known[0, 5] = 0.5
    np.savez("half.npz", samples=known)
    assert (
        "codes of characters are whole numbers, 0 to 26" in osmose("complete", "run", "half.npz", "--out", "z.npz").err
    )
    assert "text goes to a .txt or an .npz" in osmose("complete", "run", "known.npz").err


def test_blocks_of_text(osmose):
    words = ["train", "blocks", "token-diffusion", "--blocks", 2, *DATA, *SMALL, *SHORT, "--out", "blocks"]
    answer = osmose(*words)
    assert answer.status == 0, answer
    assert "2 blocks, sigma 0.002, 0.3012, 80" in answer.out
    assert osmose("sample", "blocks", "-n", 1, "--out", "y.txt", "--quiet").status == 0


def test_refusals(osmose):
    answer = osmose("sample", "run", "--out", "x.png")
    assert answer.status == 2
    assert "--out: x.png is not valid: text goes to a .txt or an .npz" in answer.err
    answer = osmose("train", "edm", *DATA, "--out", "no")
    assert answer.status == 2
    assert "method: edm learns numbers, and these data are text; masked and token-diffusion learn it" in answer.err
    answer = osmose("train", "edm", "--data", "digits", "--out", "no", "data.letters=true")
    assert answer.status == 2
    assert "letters: True is for text: data" in answer.err
    answer = osmose("train", "blocks", "ddpm", "--blocks", 2, "--data", "digits", "--out", "no")
    assert answer.status == 2
    assert "blocks share the noise of edm, or of masked and token-diffusion" in answer.err

"""`osmose analyze likelihood`: bits per dimension of real data under a run."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from osmose.analysis.likelihood import likelihood
from osmose.cli.main import main
from osmose.training import files
from osmose.training.run import Run

VERB = ["analyze", "likelihood"]
FEW = ["-n", 6, "--steps", 5, "--quiet"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run with a learned variance; not to be changed."""
    out = tmp_path_factory.mktemp("learned") / "run"
    small = ["network.channels=8", "network.blocks=1", "schedule.num_steps=40", "sampling.num_steps=3"]
    short = ["training.batch_size=8", "training.preview_samples=4", "--steps", "2", "--threads", "1", "--quiet"]
    main(["train", "iddpm", "--data", "digits", *small, *short, "--out", str(out)])
    return out


def test_it_writes_its_two_files_and_says_what_it_found(osmose, runs):
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    answer = osmose(*VERB, "digits", *FEW)
    assert (answer.status, answer.err) == (0, "")
    stored = json.loads(Path("digits/likelihood/likelihood.json").read_text())
    lines = answer.out.splitlines()
    assert lines[0] == (
        f"at most {stored['bits_per_dim']:.4f} ± {stored['standard_error']:.4f} bits per dimension (standard error), "
        "6 held-out items, 17 levels"
    )
    assert f"prior L_T       {stored['prior']:.5f}" in answer.out
    assert f"transitions     {stored['transitions']:.4f}  (4 terms)" in answer.out
    assert f"decoder L_0     {stored['decoder']:.4f}" in answer.out
    assert "chain of 5 steps, variance fixed_small, clipped" in answer.out
    assert f"mean squared error of the noise, all t alike: {stored['eps_error']:.4f}" in answer.out
    assert "wrote digits/likelihood/likelihood.json, digits/likelihood/likelihood.png" in answer.out
    assert lines[-1] == "next: osmose evaluate digits"
    with Image.open("digits/likelihood/likelihood.png") as image:
        assert image.size[0] > 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    # The run is as it was, and nothing else was written.
    after = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert sorted(p.name for p in after.keys() - before.keys()) == ["likelihood.json", "likelihood.png"]
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.usefixtures("runs")
def test_its_json_is_the_library_s_answer(osmose):
    options = ["--part", "train", "--seed", 3, "--no-clip", "--variance", "fixed_large", "--batch-size", 4]
    answer = osmose(*VERB, "classes", "-n", 6, "--steps", 5, *options, "--out", "elsewhere/deep", "--json")
    assert (answer.status, answer.err) == (0, "")
    said = json.loads(answer.out)
    run = Run.open(Path("classes"))
    want = likelihood(
        run.model(torch.device("cpu")),
        run.config.data.load(),
        part="train",
        n=6,
        num_steps=5,
        variance="fixed_large",
        clip=False,
        seed=3,
    )
    assert said["bits_per_dim"] == pytest.approx(want.bits, rel=1e-4)
    assert said["terms"] == pytest.approx(want.terms.tolist(), rel=1e-3)
    assert said["run"] == "classes"
    assert said["wrote"] == ["elsewhere/deep/likelihood.json", "elsewhere/deep/likelihood.png"]
    stored = json.loads(Path("elsewhere/deep/likelihood.json").read_text())
    assert said == {"run": "classes", "wrote": said["wrote"], **stored}
    assert {name: said[name] for name in ("part", "n", "num_steps", "variance", "clip", "seed", "levels")} == {
        "part": "train",
        "n": 6,
        "num_steps": 5,
        "variance": "fixed_large",
        "clip": False,
        "seed": 3,
        "levels": 17,
    }
    assert not Path("classes/likelihood").exists()


@pytest.mark.usefixtures("runs")
def test_a_learned_variance_is_used_unless_another_is_asked_for(osmose, learned):
    answers = []
    for words in ([], ["--variance", "learned_range"], ["--variance", "fixed_large"]):
        answer = osmose(*VERB, learned, "-n", 4, *words, "--out", "scored", "--json")
        assert answer.status == 0, answer.err
        answers.append(json.loads(answer.out))
    assert [answer["variance"] for answer in answers] == ["learned_range", "learned_range", "fixed_large"]
    assert [answer["num_steps"] for answer in answers] == [40] * 3
    assert answers[0]["terms"] == answers[1]["terms"]
    assert answers[0]["bits_per_dim"] != answers[2]["bits_per_dim"]
    assert 0 < answers[0]["bits_per_dim"] < 100


@pytest.mark.usefixtures("runs")
def test_scoring_again_replaces_the_files(osmose):
    first = osmose(*VERB, "digits", *FEW)
    again = osmose(*VERB, "digits", *FEW)
    assert first == again
    osmose(*VERB, "digits", *FEW, "--seed", 1)
    stored = json.loads(Path("digits/likelihood/likelihood.json").read_text())
    assert stored["seed"] == 1
    assert sorted(path.name for path in Path("digits/likelihood").iterdir()) == ["likelihood.json", "likelihood.png"]


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toy"], "likelihood: bits per dimension need data with a known number of levels (256 for 8-bit images"),
        (["digits", "-n", "100000"], "n: 100000 is not valid: must be between 2 and the "),
        (["digits", "-n", "1"], "n: 1 is not valid: must be between 2 and the "),
        (["digits", "-n", "0"], "n: 0 is not valid: must be between 2 and the "),
        (["digits", "-n", "few"], "'few' is not valid: should be a whole number"),
        (["digits", "--part", "test"], "part: 'test' is not valid: should be train or held-out"),
        (["digits", "--steps", "1001"], "num_steps: 1001 is more than the 1000 steps that the schedule has"),
        (["digits", "--steps", "0"], "--steps: 0 is not valid: must be at least 1"),
        (["digits", "--batch-size", "0"], "--batch-size: 0 is not valid: must be at least 1"),
        (["digits", "--threads", "-1"], "--threads: -1 is not valid: must be at least 1"),
        (
            ["digits", "--variance", "learned_range"],
            "variance: learned_range needs a model with a learned variance (train with variance=learned_range "
            "objective=hybrid); this one has 'fixed_small'",
        ),
        (
            ["digits", "--variance", "small"],
            "variance: 'small' is not valid: should be 'fixed_small', 'fixed_large' or 'learned_range'",
        ),
        (["digits", "--out", "digits/config.json"], "--out: digits/config.json is a file; name a folder"),
        (["digits", "--device", "gpu"], "gpu"),
        (["digits", "--stesp", "3"], "unknown argument --stesp; did you mean --steps?"),
        (["digits", "schedule=cosine"], "unknown argument schedule=cosine"),
        (["nowhere"], "nowhere: not a run folder (it has no config.json)"),
        ([], "RUN"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("runs")
def test_refused(refused, words, message):
    assert message in refused(*VERB, *words)


@pytest.mark.usefixtures("runs")
def test_other_data_are_refused(refused):
    config = files.read_json(Path("digits/config.json"))
    config["identity"]["sha256"] = "0" * 64
    Path("digits/config.json").write_text(json.dumps(config))
    assert refused(*VERB, "digits", *FEW) == "data: 'digits' is not what this run was trained on (its hash differs)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["analyze"], "unknown command 'analyze'; choose one of: analyze likelihood"),
        (["analyze", "nonsense"], "unknown command 'analyze nonsense'; choose one of: analyze likelihood"),
        (["analyze", "digits", "likelihood"], "unknown command 'analyze digits'; choose one of: analyze likelihood"),
        (["analyse", "likelihood", "digits"], "unknown command 'analyse'; "),
        (["likelihood", "digits"], "unknown command 'likelihood'; "),
        (["analyze likelihood", "digits"], "unknown command 'analyze likelihood'; "),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("runs")
def test_a_command_of_two_words_needs_both(refused, words, message):
    assert refused(*words).startswith(message)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_on_the_first_word_lists_what_is_below_it(osmose, flag):
    answer = osmose("analyze", flag)
    assert (answer.status, answer.err) == (0, "")
    assert "analyze likelihood" in answer.out
    assert "\n  train " not in answer.out


def test_help_is_found_under_both_words(osmose):
    answer = osmose(*VERB, "--help")
    assert (answer.status, answer.err) == (0, "")
    assert "usage: osmose analyze likelihood" in answer.out
    assert "analyze likelihood" in osmose("--help").out

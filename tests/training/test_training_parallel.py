"""However a batch is cut up, among micro-batches or processes, it is the same training."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from osmose.errors import UserError
from osmose.training.run import Run
from osmose.training.trainer import Trainer

# Rounding in another order moves a loss by one part in 10^7. Adam divides gradients by their own size, so that where a
# gradient is next to nothing a weight may move by another fraction of the learning rate.
LOSSES = {"rel": 1e-5}
LR = 0.01
#: A law of training times that is learned: full after the first steps, and of use to the later ones.
LOSS_AWARE = {
    "schedule": "cosine",
    "schedule.num_steps": 10,
    "times": "loss-aware",
    "times.history": 2,
    "times.extra_updates": 1,
}


def losses(run):
    return [(line["step"], name, value) for line in run.metrics() for name, value in line.items() if "loss" in name]


def assert_same_training(one, other):
    a, b = losses(one), losses(other)
    assert [x[:2] for x in a] == [x[:2] for x in b]
    assert [x[2] for x in b] == pytest.approx([x[2] for x in a], **LOSSES)
    assert len(a) > 20
    p, q = load_file(one.weights), load_file(other.weights)
    assert p.keys() == q.keys()
    for name in p:
        assert (p[name] - q[name]).abs().max() < 0.01 * LR, name


@pytest.fixture
def undropped(start):
    """Dropout draws other numbers where the batch is cut otherwise; everything else must not."""

    def make(name, **more):
        return start(name, network__dropout=0.0, training__lr=LR, training__log_every=1, **more)

    return make


def assert_learned(run):
    """The law was learned early enough to be used, and from all items: each twice, the second time as an extra."""
    used = [line["loss_aware"] for line in run.metrics() if "loss_aware" in line]
    assert sum(used) > 6
    training = run.config.training
    assert load_file(run.weights)["times.counts"].sum() == 2 * training.steps * training.batch_size


@pytest.mark.parametrize("times", [{}, LOSS_AWARE], ids=["uniform", "loss-aware"])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_micro_batches_are_one_batch(undropped, dataset, accumulate, times):
    one, cut = undropped("one", **times), undropped("cut", training__accumulate=accumulate, **times)
    Trainer(one, dataset).fit()
    Trainer(cut, dataset).fit()
    assert_same_training(one, cut)
    if times:
        assert_learned(cut)


def test_a_batch_twice_as_large_is_another_training(undropped, dataset):
    one, other = undropped("one"), undropped("other", training__batch_size=16)
    Trainer(one, dataset).fit()
    Trainer(other, dataset).fit()
    with pytest.raises(AssertionError):
        assert_same_training(one, other)


SCRIPT = """
import os, signal, sys
from osmose.cli.main import main
from osmose.training.trainer import Trainer

main([*sys.argv[1:], "--out", "whole"])
optimise = Trainer.optimise
def signalled(self, window):
    if self.step == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return optimise(self, window)
Trainer.optimise = signalled
try:
    main([*sys.argv[1:], "--out", "parts"])
except SystemExit as stop:
    assert stop.code == 130, stop.code
Trainer.optimise = optimise
main(["train", "--resume", "--quiet", "--out", "parts"])
"""


def test_two_processes_are_one_and_stop_and_resume_together(tmp_path, contents, monkeypatch, capsys):
    from osmose.cli.main import main

    settings = "data.num_points=300 network.width=16 training.steps=12 training.batch_size=16 training.accumulate=2"
    every = "training.log_every=1 training.validate_every=4 training.checkpoint_every=5 training.keep_checkpoints=1"
    command = ["train", "ddpm", "--data", "toy:two-moons", "--lr", str(LR), "--precision", "fp32", "--quiet"]
    command += [*settings.split(), *every.split(), "training.preview_every=1000", "sampling.num_steps=5"]
    command += [f"{name}={value}" for name, value in LOSS_AWARE.items()]
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "script.py", *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # One of the two answers.
    assert [line.split(":")[0] for line in done.stdout.splitlines() if not line.startswith("next")] == [
        "wrote whole",
        "stopped at step 8; everything is saved",
        "wrote parts",
    ]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")

    monkeypatch.chdir(tmp_path)
    main([*command, "--out", "alone"])
    capsys.readouterr()
    together = Run.open("whole")
    assert [line["step"] for line in together.metrics() if "lr" in line] == list(range(1, 13))
    assert_same_training(Run.open("alone"), together)
    assert_learned(together)


def test_a_batch_that_processes_cannot_share_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    from osmose.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    command = ["train", "ddpm", "--data", "toy:two-moons", "--quiet", "--out", "run"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "training.batch_size=12", "training.accumulate=4"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "osmose: training.batch_size: 3 items per pass cannot be shared by 2 processes\n"
    )
    assert not list(tmp_path.iterdir())


def test_another_number_of_processes_is_checked_when_a_run_is_resumed(start, dataset, monkeypatch):
    import accelerate

    run = start(training__batch_size=9)
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(UserError, match="9 items per pass cannot be shared by 2 processes"):
        Trainer(run, dataset)


def test_precision_may_differ_between_runs_of_one_process(start, dataset):
    found = {}
    for name, precision in (("first", "fp32"), ("second", "bf16"), ("third", "fp32")):
        run = start(name, training__precision=precision, training__steps=3)
        Trainer(run, dataset).fit()
        found[name] = json.dumps(losses(run))
    assert found["first"] == found["third"] != found["second"]
    assert torch.get_default_dtype() == torch.float32

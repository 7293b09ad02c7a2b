"""A run that is interrupted, wherever and however, ends as if it had not been."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from osmose.errors import UserError
from osmose.training.progress import Progress
from osmose.training.run import Run, load
from osmose.training.trainer import DivergedError, Trainer


class Killed(BaseException):
    """The process is gone."""


class Interference:
    """Sees every operation on files below a folder before it happens (an audit hook), and may refuse it."""

    OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

    def __init__(self):
        self.folder, self.refuse = None, None
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.folder is None or event not in self.OPERATIONS:
            return
        path, relative = arguments[0], event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if relative or (isinstance(path, str | os.PathLike) and str(path).startswith(self.folder)):
            self.refuse(event, arguments)

    @contextlib.contextmanager
    def __call__(self, folder, refuse):
        self.folder, self.refuse = str(folder), refuse
        try:
            yield
        finally:
            self.folder = None

    @contextlib.contextmanager
    def paused(self):
        folder, self.folder = self.folder, None
        try:
            yield
        finally:
            self.folder = folder


interference = Interference()


def killing(k):
    """Kill the process at its k-th operation on files: that one and all later ones do not happen.

    What was being written stays behind torn: the temporary file that was to be renamed, the line of the log.
    """
    count = 0

    def refuse(event, arguments):
        nonlocal count
        count += 1
        if count == k:
            with interference.paused():
                path = Path(os.fsdecode(arguments[0]))
                if event == "os.rename" and path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
                if event == "open" and arguments[1] == "a":
                    path.open("a").write('{"step": 5, "epo')
        if count >= k:
            raise Killed

    return refuse


@pytest.fixture
def whole(start, dataset, contents):
    run = start("whole")
    assert Trainer(run, dataset).fit()
    found = contents(run.folder)
    assert {"model.safetensors", "checkpoints/step_00000012/optimizer.safetensors", "samples/step_00000006.png"} < set(
        found
    )
    assert [(line["step"], "loss" in line) for line in found["metrics"]] == [
        (5, True),
        (6, False),
        (10, True),
        (12, False),
    ]
    return found


def test_killed_at_every_operation_on_files_it_resumes_to_the_same_folder(start, dataset, whole, contents):
    operations = 0

    def counting(*_):
        nonlocal operations
        operations += 1

    run = start("counted")
    with interference(run.folder, counting):
        Trainer(run, dataset).fit()
    assert operations > 60
    for k in range(1, operations + 1):
        run = start(f"killed{k}")
        with interference(run.folder, killing(k)), pytest.raises(Killed):
            Trainer(run, dataset).fit()
        if k % 3 == 0:  # once more, soon after: while it recovers from the first time, or a little later
            with interference(run.folder, killing(1 + k % 17)), contextlib.suppress(Killed):
                Trainer(Run.open(run.folder), dataset).fit()
        resumed = Trainer(Run.open(run.folder), dataset)
        assert resumed.fit()
        assert contents(run.folder) == whole, f"killed at operation {k}"


def test_killed_at_random_moments_it_resumes_to_the_same_folder(tmp_path, contents):
    multiprocessing = torch.multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["osmose.training.trainer", "osmose.methods.diffusion", "accelerate"])
    from osmose.cli.main import main

    settings = "data.num_points=200 network.width=16 network.dropout=0.2 training.batch_size=16 training.log_every=1"
    every = "training.checkpoint_every=3 training.validate_every=50 training.preview_every=1000 training.steps=150"
    common = ["--quiet", "--threads", "1"]

    def begin(name, *more):
        process = multiprocessing.Process(target=main, args=(["train", "--out", str(tmp_path / name), *more],))
        process.start()
        return process

    first = ["ddpm", "--data", "toy:two-moons", *settings.split(), *every.split(), *common]
    process = begin("whole", *first)
    process.join()
    assert process.exitcode == 0
    random = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=random).item()

    kills, whole_runs, more = 0, 0, first
    while kills < 6:
        name = f"killed{whole_runs}"
        log = tmp_path / name / "metrics.jsonl"
        before = log.stat().st_size if log.exists() else 0
        process = begin(name, *more)
        if kills % 3 == 1:  # at any time after it was started
            time.sleep(uniform(0.05, 0.8))
        else:  # while it trains
            while process.is_alive() and (not log.exists() or log.stat().st_size <= before):
                time.sleep(0.002)
            time.sleep(uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster than the killer: begin another one
            whole_runs, more = whole_runs + 1, first
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        more = ["--resume", *common] if (tmp_path / name / "config.json").exists() else first
    process = begin(name, *more)
    process.join()
    assert process.exitcode == 0
    for killed in tmp_path.glob("killed*"):
        assert contents(killed) == contents(tmp_path / "whole")
        assert [line["step"] for line in Run.open(killed).metrics() if "loss" in line] == list(range(1, 151))


class Signalled(Progress):
    """Sends a signal to this process after a step."""

    def __init__(self, number, step):
        super().__init__(show=False)
        self.number, self.at = number, step

    def advance(self, window):
        super().advance(window)
        if self.step == self.at:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4, 7, 11])
def test_a_stopped_run_continues_bit_for_bit(start, dataset, whole, contents, number, step):
    run = start()
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    trainer = Trainer(run, dataset, progress=Signalled(number, step))
    assert not trainer.fit()
    assert trainer.step == step
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    resumed = Trainer(Run.open(run.folder), dataset)
    assert resumed.step == step
    assert resumed.fit()
    assert contents(run.folder) == whole


def test_stopped_after_every_step_it_is_the_same_run(start, dataset, whole, contents):
    run = start()
    for step in range(1, 12):
        assert not Trainer(Run.open(run.folder), dataset, progress=Signalled(signal.SIGTERM, step)).fit()
    assert Trainer(Run.open(run.folder), dataset).fit()
    assert contents(run.folder) == whole


def test_a_signal_during_the_last_step_lets_the_run_finish(start, dataset, whole, contents):
    run = start()
    assert Trainer(run, dataset, progress=Signalled(signal.SIGTERM, 12)).fit()
    assert contents(run.folder) == whole


def test_a_second_signal_is_not_held_back(start, dataset, request):
    # A shell that runs the tests in the background has them ignore SIGINT: put back what a terminal gives.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    class Impatient(Signalled):
        def advance(self, window):
            super().advance(window)
            if self.step == self.at:
                signal.raise_signal(self.number)

    with pytest.raises(KeyboardInterrupt):
        Trainer(start(), dataset, progress=Impatient(signal.SIGINT, 3)).fit()


def test_a_finished_run_is_left_as_it_is(start, dataset, whole, contents):
    run = start()
    Trainer(run, dataset).fit()
    assert Trainer(Run.open(run.folder), dataset).fit()
    assert contents(run.folder) == whole


def test_sigterm_to_the_command_saves_and_says_how_to_resume(tmp_path, contents, capsys):
    from osmose.cli.main import main

    settings = "data.num_points=200 network.width=16 training.batch_size=16 training.log_every=1 training.steps=150"
    every = "training.checkpoint_every=1000 training.keep_checkpoints=1 training.validate_every=1000"
    common = ["ddpm", "--data", "toy:two-moons", *settings.split(), *every.split(), "training.preview_every=1000"]
    stopped = tmp_path / "stopped"
    command = [sys.executable, "-m", "osmose", "train", *common, "--threads", "1", "--out", str(stopped)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = stopped / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 130, complained
    step = int(re.search(r"stopped at step (\d+); everything is saved", said).group(1))
    assert 5 <= step < 150
    again = re.search(r"next: osmose (.*)", said).group(1).split()
    assert again == ["train", "--out", str(stopped), "--resume"]
    assert complained == ""
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == [f"step_{step:08d}"]

    main([*again, "--quiet"])
    main(["train", *common, "--out", str(tmp_path / "whole"), "--quiet"])
    capsys.readouterr()
    assert contents(stopped) == contents(tmp_path / "whole")


# --- the disk -------------------------------------------------------------------------------------------------------


def full_from(k):
    """The disk is full from the k-th opening of a file for writing on."""
    count = 0

    def refuse(event, arguments):
        nonlocal count
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax"):
            count += 1
            if count >= k:
                raise OSError(errno.ENOSPC, "No space left on device")

    return refuse


def test_a_full_disk_leaves_what_was_there_and_the_run_goes_on_when_there_is_room(start, dataset, whole, contents):
    k, finished = 0, False
    while not finished:
        k += 1
        run = start(f"full{k}")
        finished = True
        with interference(run.folder, full_from(k)):
            trainer = Trainer(run, dataset)
            try:
                trainer.fit()
            except UserError as error:
                finished, message = False, str(error)
        assert finished or re.fullmatch("[^\n]*no space left on the disk[^\n]*", message)
        assert not list(run.folder.rglob(".*"))
        kept = [path.name for path in (run.folder / "checkpoints").glob("*")]
        assert (trainer.step > 4) <= len(kept) <= (trainer.step >= 4)
        for path in [*run.folder.rglob("*.safetensors")]:
            assert all(value.isfinite().all() for value in load_file(path).values())
        assert Trainer(Run.open(run.folder), dataset).fit()
        assert contents(run.folder) == whole, f"full from {k}"
    assert k > 15


@pytest.mark.parametrize("limit", ["of the log", "of the weights"])
def test_a_file_that_may_not_grow_is_a_full_disk(start, dataset, whole, contents, limit):
    run = start()
    before = {}

    class Limited(Progress):
        def advance(self, window):
            super().advance(window)
            if self.step == 9:
                before.update(contents(run.folder))
                size = (run.folder / "metrics.jsonl").stat().st_size + (10 if limit == "of the log" else 2000)
                assert size < (run.folder / "model.safetensors").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match="no space left on the disk"):
            Trainer(run, dataset, progress=Limited(show=False)).fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(run.folder.rglob(".*"))
    name = "checkpoints/step_00000008/weights.safetensors"
    after = {str(path.relative_to(run.folder)): path.read_bytes() for path in run.folder.rglob("*.safetensors")}
    assert len(after) == 4
    assert all(before[name] == after[name] for name in ("model.safetensors", name))
    assert Trainer(Run.open(run.folder), dataset).fit()
    assert contents(run.folder) == whole


# --- divergence -----------------------------------------------------------------------------------------------------


def test_divergence_names_step_time_and_a_checkpoint_that_is_sound(start, dataset):
    run = start(training__lr=1e30, training__clip_grad=None, training__warmup=0, training__checkpoint_every=1)
    with pytest.raises(DivergedError) as caught:
        Trainer(run, dataset).fit()
    found = re.search(
        r"no longer finite at step (\d+) \(last batch: t from (\S+) to (\S+), median .*\); last good checkpoint: "
        r"(\S+); ",
        str(caught.value),
    )
    step, first, last, checkpoint = int(found[1]), float(found[2]), float(found[3]), Path(found[4])
    assert step == 2
    assert 0 < first < last <= 1
    assert checkpoint == run.folder / "checkpoints" / "step_00000001"
    for path in checkpoint.glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    assert Trainer(Run.open(run.folder), dataset).step == 1
    assert load(run.folder).config == run.config.method


def test_divergence_after_the_only_step_is_found_by_validation(start, dataset):
    run = start(training__lr=1e30, training__clip_grad=None, training__warmup=0, training__steps=1)
    with pytest.raises(DivergedError, match=r"validation_loss is no longer finite at step 1; .*: none yet;"):
        Trainer(run, dataset).fit()
    assert not list(run.folder.rglob("*.safetensors"))


def test_weights_that_overflow_are_not_saved(start, dataset):
    changes = {"lr": 1e30, "clip_grad": None, "warmup": 0, "checkpoint_every": 1, "weight_decay": 1e12}
    run = start(**{f"training__{name}": value for name, value in changes.items()})
    trainer = Trainer(run, dataset)
    with torch.no_grad():  # the size that makes the decay of 1e30 * 1e12 overflow float32
        next(trainer.model.parameters()).fill_(1.0)
    with pytest.raises(DivergedError, match="a weight is no longer finite at step 1; last good checkpoint: none yet"):
        trainer.fit()
    assert not list(run.folder.rglob("*.safetensors"))


@pytest.mark.parametrize("gradient", ["spoilt", "sound"])
def test_a_loss_that_is_not_a_number_stops_the_run_and_the_log_stays_json(start, dataset, monkeypatch, gradient):
    run = start()
    trainer = Trainer(run, dataset)
    loss = type(trainer.model).loss

    def spoilt(self, batch, draws):
        terms = loss(self, batch, draws)
        if trainer.step != 9:
            return terms
        nan = torch.tensor([1, 1, float("nan"), 1, 1, 1, 1, 1])
        per_item = terms.per_item * nan if gradient == "spoilt" else terms.per_item + (nan - 1)
        return dataclasses.replace(terms, per_item=per_item)

    monkeypatch.setattr(type(trainer.model), "loss", spoilt)
    place = r"the loss is no longer finite at step 10 \(last batch: t from" if gradient == "spoilt" else "at step 10; "
    with pytest.raises(DivergedError, match=f"{place}.*step_00000008;"):
        trainer.fit()
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["step"] <= 9


# --- damage ---------------------------------------------------------------------------------------------------------


def garble(path):
    path.write_bytes(b"\x80\x04\x95garbage")


def truncate(path):
    os.truncate(path, path.stat().st_size - 5)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.safetensors", truncate),
        ("weights.safetensors", garble),
        ("weights.safetensors", Path.unlink),
        ("average.safetensors", truncate),
        ("average.safetensors", Path.unlink),
        ("average.safetensors", lambda path: path.write_bytes(path.with_name("optimizer.safetensors").read_bytes())),
        ("optimizer.safetensors", truncate),
        ("optimizer.safetensors", lambda path: path.write_bytes(path.with_name("average.safetensors").read_bytes())),
        ("state.json", garble),
        ("state.json", truncate),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_text('{"step": 12}')),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_works(start, dataset, contents, name, damage):
    run = start(training__keep_checkpoints=2)
    Trainer(run, dataset).fit()
    whole = contents(run.folder)
    newest = run.folder / "checkpoints" / "step_00000012"
    damage(newest / name)
    before = contents(run.folder)
    with pytest.raises(UserError, match="step_00000012") as caught:
        Trainer(Run.open(run.folder), dataset).fit()
    assert "\n" not in str(caught.value)
    assert contents(run.folder) == before
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    resumed = Trainer(Run.open(run.folder), dataset)
    assert resumed.step == 8
    resumed.fit()
    assert contents(run.folder) == whole


def test_a_checkpoint_of_another_seed_is_refused(start, dataset):
    one, other = start("one"), start("other", seed=1)
    Trainer(one, dataset).fit()
    (one.folder / "checkpoints").rename(other.folder / "checkpoints")
    with pytest.raises(UserError, match="made with seed 0, but this run has seed 1"):
        Trainer(other, dataset)


def test_other_data_are_refused(start, dataset):
    other = dataclasses.replace(dataset, train=dataset.train.flip(0))
    with pytest.raises(UserError, match="hash differs"):
        Trainer(start(), other)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_line_of_the_log_that_was_cut_off_is_forgotten(start, dataset, whole, contents, cut):
    run = start()
    Trainer(run, dataset, progress=Signalled(signal.SIGTERM, 8)).fit()
    os.truncate(run.folder / "metrics.jsonl", (run.folder / "metrics.jsonl").stat().st_size)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write((json.dumps({"step": 10, "loss": 0.5, "more": "x" * 300}))[:cut])
    Trainer(Run.open(run.folder), dataset).fit()
    assert contents(run.folder) == whole

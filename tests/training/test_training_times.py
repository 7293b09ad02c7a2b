"""What a step of training leads to besides new weights: a learned law of training times, and named parts in the log."""

import dataclasses
import signal

import pytest
import torch
from safetensors.torch import load_file

from osmose.methods.base import GenerativeModel
from osmose.methods.messages import LossTerms
from osmose.training import files
from osmose.training.progress import Progress
from osmose.training.run import Run
from osmose.training.trainer import DivergedError, Trainer
from osmose.training.window import Window

#: A memory that is full after three or four of the twelve steps.
LOSS_AWARE = {
    "schedule": "cosine",
    "schedule.num_steps": 10,
    "times": "loss-aware",
    "times.history": 2,
    "training.batch_size": 16,
}
HISTORY = ("times.losses", "times.counts")


class Stopped(Progress):
    """Asks to stop once some steps are done."""

    def __init__(self, at):
        super().__init__(show=False)
        self.at = at

    def advance(self, window):
        super().advance(window)
        if self.step == self.at:
            signal.raise_signal(signal.SIGTERM)


# --- the law of training times --------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_with_a_learned_law_ends_as_if_it_had_not_been(start, dataset, contents, extra, accumulate):
    changes = LOSS_AWARE | {"times.extra_updates": extra, "training.accumulate": accumulate}
    whole, parts = start("whole", **changes), start("parts", **changes)
    Trainer(whole, dataset).fit()
    for step in (2, 5, 7, 11):  # before and after the law is learned; in the middle of a window of the log
        assert not Trainer(Run.open(parts.folder), dataset, progress=Stopped(step)).fit()
    assert Trainer(Run.open(parts.folder), dataset).fit()
    assert contents(parts.folder) == contents(whole.folder)
    state = load_file(whole.weights)
    assert state["times.counts"].min() > 2
    assert state["times.counts"].sum() == 12 * 16 * (1 + extra)
    logged = [line["loss_aware"] for line in whole.metrics() if "loss_aware" in line]
    assert len(logged) == 2
    assert 0 < logged[0] < logged[1] == 1
    assert not any("validation_loss_aware" in line for line in whole.metrics())


def test_the_memory_holds_the_losses_without_their_weights(start, dataset, monkeypatch):
    run = start(**LOSS_AWARE)
    trainer = Trainer(run, dataset)
    loss, seen, weighted = type(trainer.model).loss, {}, 0

    def noted(self, batch, draws):
        nonlocal weighted
        terms = loss(self, batch, draws)
        if self.training:
            steps = (10 * terms.t).round().long() - 1
            weights = 1 / (10 * self.times.probabilities()[steps])
            weighted += bool((weights != 1).any())
            for step, value in zip(steps.tolist(), (terms.per_item.detach() / weights).tolist(), strict=True):
                seen.setdefault(step, []).append(value)
        return terms

    monkeypatch.setattr(type(trainer.model), "loss", noted)
    trainer.fit()
    assert weighted >= 6
    for step, losses in enumerate(trainer.model.times.losses):
        assert sorted(losses.tolist()) == pytest.approx(sorted(seen[step][-2:]), rel=1e-6)


def test_extra_updates_change_nothing_but_the_memory(start, dataset, contents):
    # A memory that does not fill leaves the law as it is: then the weights must not feel the extra updates either,
    # although these evaluate the network, with dropout.
    changes = LOSS_AWARE | {"times.history": 1000}
    none, two = start("none", **changes), start("two", **changes | {"times.extra_updates": 2})
    for run in (none, two):
        Trainer(run, dataset).fit()
    assert contents(none.folder)["metrics"] == contents(two.folder)["metrics"]
    a, b = load_file(none.weights), load_file(two.weights)
    assert {name for name in a if not torch.equal(a[name], b[name])} == set(HISTORY)
    assert (a["times.counts"].sum(), b["times.counts"].sum()) == (12 * 16, 3 * 12 * 16)


def test_validation_does_not_depend_on_the_law(start, dataset):
    run = start(**LOSS_AWARE)
    trainer = Trainer(run, dataset)
    trainer.fit()
    before = trainer.validate()
    assert trainer.model.times.active
    trainer.model.times.losses[3] = 100.0
    assert trainer.model.times.probabilities()[3] > 0.9
    assert trainer.validate() == before


def test_a_learned_law_on_a_continuous_schedule_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    from osmose.cli.main import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "edm", "--data", "toy:two-moons", "--quiet", "--out", "run", "times=loss-aware"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "osmose: times: 'loss-aware' remembers losses step by step, and schedule 've' is continuous; use schedule "
        "linear or cosine, or times uniform or log-normal\n"
    )
    assert not list(tmp_path.iterdir())


# --- after a step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_method_is_called_once_after_each_update_with_what_its_losses_were_given(
    start, dataset, monkeypatch, precision
):
    run = start(training__accumulate=2, training__precision=precision)
    trainer = Trainer(run, dataset)
    loss, given, calls = type(trainer.model).loss, [], []

    def noted(self, batch, draws):
        if self.training:
            given.append((batch, draws))
        return loss(self, batch, draws)

    def after_step(self, parts):
        assert self is trainer.model
        assert self.training
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
        assert [(id(batch), id(draws)) for batch, draws in parts] == [(id(b), id(d)) for b, d in given]
        assert [(draws.start, draws.stop, len(batch.x0)) for batch, draws in parts] == [(0, 4, 4), (4, 8, 4)]
        # Not `ema.updates == step + 1` alone: the weights are new, and so is the average.
        assert trainer.ema.updates == trainer.step + 1
        weights = [value.detach().clone() for value in self.parameters()]
        assert not calls or any(not torch.equal(a, b) for a, b in zip(weights, calls[-1], strict=True))
        calls.append(weights)
        given.clear()

    monkeypatch.setattr(type(trainer.model), "loss", noted)
    monkeypatch.setattr(type(trainer.model), "after_step", after_step)
    trainer.fit()
    assert len(calls) == 12
    assert all(torch.equal(a, b) for a, b in zip(calls[-1], trainer.model.parameters(), strict=True))


def test_a_method_has_nothing_to_do_after_a_step_unless_it_says_so(start, dataset):
    model = Trainer(start(), dataset).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert GenerativeModel.after_step(model, []) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- parts of the loss in the log -----------------------------------------------------------------------------------


def test_window_means_of_parts():
    window, t = Window(), torch.zeros(2, dtype=torch.float64)
    window.add(
        LossTerms(torch.tensor([1.0, 2.0]), t, {"b": torch.tensor([1.0, 5.0]), "a": torch.tensor([True, False])})
    )
    window.add(
        LossTerms(torch.tensor([3.0, 4.0]), t, {"b": torch.tensor([3.0, 3.0]), "a": torch.tensor([False, False])})
    )
    window.add(LossTerms(torch.tensor([5.0, 5.0]), t))
    want = {"loss": 20 / 6, "loss_q1": 20 / 6, "b": 3.0, "a": 0.25}
    assert window.losses(lambda sums: sums) == want
    drained = window.drain(lambda sums: 2 * sums)
    assert list(drained) == [*want, "grad_norm", "seconds", "items_per_second"]
    assert {name: drained[name] for name in want} == want
    assert window.losses(lambda sums: sums) == {}
    window.add(LossTerms(torch.tensor([1.0]), None, {"c": torch.tensor([0.5])}))
    assert window.losses(lambda sums: sums) == {"loss": 1.0, "c": 0.5}


def with_parts(monkeypatch, model):
    """Have a model name two parts of its loss."""
    loss = type(model).loss

    def parted(self, batch, draws):
        terms = loss(self, batch, draws)
        size = batch.x0.flatten(1).abs().mean(1)
        return dataclasses.replace(terms, parts={"double": 2 * terms.per_item.detach(), "size": size})

    monkeypatch.setattr(type(model), "loss", parted)


def test_parts_are_logged_under_their_names_and_change_nothing_else(start, dataset, contents, monkeypatch):
    plain, named, stopped = start("plain"), start("named"), start("stopped")
    Trainer(plain, dataset).fit()
    with_parts(monkeypatch, Trainer(plain, dataset).model)
    Trainer(named, dataset).fit()
    for line in named.metrics():
        prefix = "" if "loss" in line else "validation_"
        assert line[f"{prefix}double"] == pytest.approx(2 * line[f"{prefix}loss"], rel=1e-6)
        assert 0 < line[f"{prefix}size"] <= 1
    without = [{k: v for k, v in line.items() if "double" not in k and "size" not in k} for line in named.metrics()]
    timings = ("seconds", "items_per_second")
    for line, want in zip(without, plain.metrics(), strict=True):
        assert {**line, **{k: want[k] for k in timings if k in want}} == want
    # Interrupted in the middle of a window, it writes the same lines.
    for step in (3, 7):
        assert not Trainer(Run.open(stopped.folder), dataset, progress=Stopped(step)).fit()
    Trainer(Run.open(stopped.folder), dataset).fit()
    assert contents(stopped.folder) == contents(named.folder)
    assert contents(named.folder)["model.safetensors"] == contents(plain.folder)["model.safetensors"]


def test_a_checkpoint_without_parts_is_continued(start, dataset, contents):
    run, whole = start("run"), start("whole")
    Trainer(whole, dataset).fit()
    assert not Trainer(run, dataset, progress=Stopped(7)).fit()
    path = run.folder / "checkpoints" / "step_00000007" / "state.json"
    state = files.read_json(path)
    assert state.pop("parts") == []
    files.write_json(path, state)
    Trainer(Run.open(run.folder), dataset).fit()
    assert contents(run.folder)["metrics"] == contents(whole.folder)["metrics"]


@pytest.mark.parametrize(
    ("checkpoint_every", "message"),
    [(4, "the loss, or a part of it, is no longer finite at step 4"), (6, "size is no longer finite at step 5")],
)
def test_a_part_that_is_not_finite_stops_the_run(start, dataset, monkeypatch, checkpoint_every, message):
    run = start(training__checkpoint_every=checkpoint_every)
    trainer = Trainer(run, dataset)
    loss = type(trainer.model).loss

    def spoilt(self, batch, draws):
        terms = loss(self, batch, draws)
        return dataclasses.replace(terms, parts={"size": terms.per_item.detach() / 0})

    monkeypatch.setattr(type(trainer.model), "loss", spoilt)
    with pytest.raises(DivergedError, match=f"{message}; last good checkpoint: none yet"):
        trainer.fit()
    assert not list(run.folder.rglob("*.safetensors"))

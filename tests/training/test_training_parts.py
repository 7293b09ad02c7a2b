"""The parts of training: averaged weights, learning rate, the log's window, validation, TensorBoard, the script use."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import osmose
from osmose.errors import UserError
from osmose.methods.messages import LossTerms
from osmose.training import files
from osmose.training.config import TrainingConfig
from osmose.training.ema import EMA
from osmose.training.progress import Progress
from osmose.training.run import Run
from osmose.training.trainer import Trainer
from osmose.training.window import Window

# --- averaged weights -----------------------------------------------------------------------------------------------


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def shifted(net, by):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(by * torch.randn(parameter.shape))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_the_weighted_mean_of_what_was_seen(decay):
    net = module()
    ema, seen = EMA(net, decay), []
    for _ in range(30):
        shifted(net, 1.0)
        ema.update()
        seen.append([parameter.detach().double().clone() for parameter in net.parameters()])
    weights = torch.tensor([decay ** (30 - i) for i in range(1, 31)], dtype=torch.float64)
    for index, (name, _) in enumerate(net.named_parameters()):
        values = torch.stack([values[index] for values in seen])
        mean = (values * weights.view(-1, *[1] * (values.ndim - 1))).sum(0) / weights.sum()
        torch.testing.assert_close(ema.average[name].double(), mean, rtol=1e-5, atol=1e-6)


def test_decay_zero_keeps_the_live_weights():
    net = module()
    ema = EMA(net, 0.0)
    for _ in range(3):
        shifted(net, 1.0)
        ema.update()
    assert all(torch.equal(ema.average[name], value) for name, value in net.named_parameters())


def test_applied_puts_back_the_live_weights_after_an_exception():
    net = module()
    ema = EMA(net, 0.9)
    for _ in range(2):
        shifted(net, 1.0)
        ema.update()
    live = {name: value.clone() for name, value in net.state_dict().items()}

    def look():
        with ema.applied() as inside:
            assert inside is net
            assert all(torch.equal(value, ema.average[name]) for name, value in net.named_parameters())
            assert not torch.equal(net[0].weight, live["0.weight"])
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert all(torch.equal(value, live[name]) for name, value in net.state_dict().items())
    assert all(value.requires_grad for value in net.parameters())


def test_a_module_that_was_moved_is_still_the_one_averaged():
    net = module()
    ema = EMA(net, 0.0)
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    shifted(net, 1.0)
    ema.update()
    assert all(torch.equal(ema.average[name], value) for name, value in net.named_parameters())
    with torch.no_grad():
        ema.average["0.weight"].zero_()
    with ema.applied():
        assert not net[0].weight.any()
    assert net[0].weight.any()


def test_buffers_are_copied_and_loading_continues_the_average():
    one, other = module(), module()
    ema = EMA(one, 0.8)
    shifted(one, 1.0)
    ema.update()
    one[1].running_mean.fill_(7.0)
    state = ema.state_dict()
    assert state.keys() == one.state_dict().keys()
    assert torch.equal(state["1.running_mean"], torch.full((4,), 7.0))
    again = EMA(other, 0.8)
    again.load(state, ema.updates)
    other.load_state_dict(one.state_dict())
    for net, average in ((one, ema), (other, again)):
        torch.manual_seed(5)
        shifted(net, 1.0)
        average.update()
    assert all(torch.equal(ema.average[name], again.average[name]) for name in ema.average)


def test_the_run_samples_with_the_average_and_keeps_the_live_weights(start, dataset):
    averaged, plain = start("averaged"), start("plain", training__ema=0.0)
    for run in (averaged, plain):
        Trainer(run, dataset).fit()
    folder = "checkpoints/step_00000012"
    live = load_file(averaged.folder / folder / "weights.safetensors")
    average = load_file(averaged.weights)
    assert all(torch.equal(live[name], load_file(plain.weights)[name]) for name in live)
    assert all(
        torch.equal(average[name], load_file(averaged.folder / folder / "average.safetensors")[name])
        for name in average
    )
    assert any(not torch.equal(live[name], average[name]) for name in live)


# --- learning rate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", {0: 0.2, 3: 0.8, 4: 1.0, 52: 1.0, 99: 1.0, 100: 1.0}),
        ("linear", {0: 0.2, 3: 0.8, 4: 1.0, 52: 0.5, 99: 1 / 96, 100: 0.0}),
        ("cosine", {0: 0.2, 3: 0.8, 4: 1.0, 28: (1 + math.cos(math.pi / 4)) / 2, 52: 0.5, 100: 0.0}),
    ],
)
def test_learning_rate(decay, expected):
    config = TrainingConfig(steps=100, lr=3.0, warmup=4, decay=decay)
    assert {step: config.lr_at(step) for step in expected} == pytest.approx({k: 3 * v for k, v in expected.items()})


def test_a_run_shorter_than_its_warm_up_has_a_learning_rate():
    config = TrainingConfig(steps=5, lr=1.0, warmup=100)
    assert [config.lr_at(step) for step in range(5)] == pytest.approx([i / 101 for i in range(1, 6)])


def test_the_learning_rate_of_each_step_is_the_one_logged(start, dataset):
    run = start(training__log_every=1)
    seen = []

    class Looking(Progress):
        def advance(self, window):
            super().advance(window)
            seen.append(trainer.optimizer.param_groups[0]["lr"])

    trainer = Trainer(run, dataset, progress=Looking(show=False))
    trainer.fit()
    assert seen == [run.config.training.lr_at(step) for step in range(12)]
    assert [line["lr"] for line in run.metrics() if "lr" in line] == seen


# --- the log --------------------------------------------------------------------------------------------------------


def test_window_means_by_quartile():
    window = Window()
    window.add(LossTerms(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.2499, 0.25], dtype=torch.float64)))
    window.add(LossTerms(torch.tensor([5.0, 7.0]), torch.tensor([0.75, 1.0], dtype=torch.float64)))
    window.seconds, window.grad_norm = 2.0, 0.5
    assert window.losses(lambda sums: sums) == {"loss": 3.6, "loss_q1": 1.5, "loss_q2": 3.0, "loss_q4": 6.0}
    drained = window.drain(lambda sums: 2 * sums)
    assert drained == {
        "loss": 3.6,
        "loss_q1": 1.5,
        "loss_q2": 3.0,
        "loss_q4": 6.0,
        "grad_norm": 0.5,
        "seconds": 2.0,
        "items_per_second": 2.5,
    }
    assert window.losses(lambda sums: sums) == {}


def test_quartiles_and_parts_of_weighted_losses_stand_for_the_law_that_is_trained():
    # Two times, drawn three to one in place of one to one, so with weights 2/3 and 2; the losses are 3 and 1.
    weight = torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0], dtype=torch.float64)
    loss = torch.tensor([3.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    t = torch.tensor([0.9, 0.9, 0.9, 0.1], dtype=torch.float64)
    window = Window()
    window.add(LossTerms(loss * weight, t, {"plain": loss, "one": torch.ones(4)}, weight))
    want = {"loss": 2.0, "loss_q1": 1.0, "loss_q4": 3.0, "plain": 2.0, "one": 1.0}
    assert window.losses(lambda sums: sums) == pytest.approx(want)


def test_window_without_times():
    window = Window()
    window.add(LossTerms(torch.tensor([1.0, 2.0])))
    assert window.losses(lambda sums: sums) == {"loss": 1.5}


def test_the_logged_loss_is_the_mean_since_the_last_line(start, dataset, monkeypatch):
    run = start(training__log_every=4)
    trainer, losses = Trainer(run, dataset), []
    loss = type(trainer.model).loss

    def noted(self, batch, draws):
        terms = loss(self, batch, draws)
        if self.training:
            losses.append(terms.per_item.detach().double().mean().item())
        return terms

    monkeypatch.setattr(type(trainer.model), "loss", noted)
    trainer.fit()
    logged = [line["loss"] for line in run.metrics() if "loss" in line]
    assert len(losses) == 12
    assert logged == pytest.approx(np.mean(np.reshape(losses, (3, 4)), axis=1).tolist())


# --- validation -----------------------------------------------------------------------------------------------------


def test_validation_and_previews_are_the_same_every_time_and_change_nothing(start, dataset):
    often = start("often", training__validate_every=1, training__preview_every=2, training__log_every=1)
    never = start("never", training__validate_every=100, training__preview_every=100, training__log_every=1)
    for run in (often, never):
        trainer = Trainer(run, dataset)
        trainer.fit()
        assert trainer.validate() == trainer.validate()  # with a dropout of 0.3
    names = {str(path.relative_to(often.folder)) for path in often.folder.rglob("*.safetensors")}
    assert len(names) == 4
    for name in names:
        assert (often.folder / name).read_bytes() == (never.folder / name).read_bytes()
    train = [[line["loss"] for line in run.metrics() if "loss" in line] for run in (often, never)]
    assert train[0] == train[1]
    valid = [[line["validation_loss"] for line in run.metrics() if "validation_loss" in line] for run in (often, never)]
    assert (len(valid[0]), len(valid[1])) == (12, 1)
    assert valid[0][-1] == valid[1][-1]
    last = "samples/step_00000012.png"
    assert (often.folder / last).read_bytes() == (never.folder / last).read_bytes()
    assert len(list((often.folder / "samples").iterdir())) == 6


def test_validation_judges_the_average_on_held_out_items(start, dataset):
    import dataclasses

    run = start(training__validation_items=3)
    trainer = Trainer(run, dataset)
    trainer.fit()
    before = trainer.validate()["validation_loss"]
    with torch.no_grad():
        for value in trainer.model.parameters():
            value.add_(1.0)
    assert trainer.validate()["validation_loss"] == before
    with torch.no_grad():
        for value in trainer.ema.average.values():
            value.add_(1.0)
    assert trainer.validate()["validation_loss"] != before
    with torch.no_grad():
        for value in trainer.ema.average.values():
            value.sub_(1.0)
    trainer.dataset = dataclasses.replace(dataset, train=255 - dataset.train)
    assert trainer.validate()["validation_loss"] == pytest.approx(before, rel=1e-5)
    trainer.dataset = dataclasses.replace(dataset, held_out=255 - dataset.held_out)
    assert trainer.validate()["validation_loss"] != pytest.approx(before, rel=1e-3)


# --- files ----------------------------------------------------------------------------------------------------------


def test_equal_tensors_make_equal_files(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2).t()}
    written = set()
    for index in range(20):
        files.write_tensors(tmp_path / f"{index}", tensors)
        written.add((tmp_path / f"{index}").read_bytes())
    assert len(written) == 1
    read = files.read_tensors(tmp_path / "0")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_folder_in_the_place_of_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a: cannot be written"):
        files.write_bytes(tmp_path / "a", b"x")
    (tmp_path / "file").write_text("")
    for path in ("file/x", "file/y/x"):
        with pytest.raises(UserError, match=r"x: cannot be written"):
            files.write_bytes(tmp_path / path, b"x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file"]


def test_sweeping_removes_only_what_was_left_half_done(tmp_path):
    for name in (
        ".config.json.12.tmp",
        "checkpoints/.step_00000004.12.old/state.json",
        ".DS_Store",
        "kept.tmp",
        "x.old",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".DS_Store", "checkpoints", "kept.tmp", "x.old"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("denoiser.network.head.2.bias"), "has no tensor 'denoiser.network.head.2.bias'"),
        (lambda state: state.update(more=torch.zeros(1)), "holds 'more'"),
        (lambda state: state["denoiser.network.head.2.bias"].fill_(float("nan")), "holds NaN or infinity"),
        (
            lambda state: state.update({"denoiser.network.head.2.bias": torch.zeros(3)}),
            r"'denoiser.network.head.2.bias' .*\(3,\).*\(16,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_tensor(start, dataset, change, message):
    run = start()
    Trainer(run, dataset).fit()
    state = load_file(run.weights)
    change(state)
    save_file(state, run.weights)
    with pytest.raises(UserError, match=message):
        osmose.load(run.folder)


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_line_once_after_an_interruption(start, dataset):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Fails(Progress):
        def advance(self, window):
            super().advance(window)
            if self.step == 8:
                raise KeyboardInterrupt

    run = start(training__tensorboard=True, training__log_every=1, training__checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, dataset, progress=Fails(show=False)).fit()
    resumed = Trainer(Run.open(run.folder), dataset)
    assert resumed.step == 5
    resumed.fit()
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "grad_norm", "validation_loss"):
        expected = [(line["step"], pytest.approx(line[name])) for line in run.metrics() if name in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


def test_tensorboard_that_is_not_there_is_missed_before_anything_is_made(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    with pytest.raises(UserError, match=r"pip install 'osmose\[tensorboard\]'"):
        osmose.train("ddpm", "toy:two-moons", tmp_path / "run", progress=False, training={"tensorboard": True})
    assert not list(tmp_path.iterdir())


# --- the use from a script ------------------------------------------------------------------------------------------


def test_ten_lines_train_and_sample(tmp_path):
    data = osmose.DataConfig(source="toy:two-moons", num_points=200)
    changes = {"network": {"width": 16}, "training": {"steps": 4, "batch_size": 8}, "schedule": {"num_steps": 100}}
    run = osmose.train("ddpm", data, tmp_path / "run", seed=3, progress=False, **changes)
    assert (run.config.method.network.width, run.config.method.schedule.num_steps, run.config.seed) == (16, 100, 3)
    samples = osmose.load(tmp_path / "run").sample(6, num_steps=5, seed=1)
    assert samples.data.shape == (6, 2)
    assert samples.nfe == 5
    again = osmose.load(run.folder).sample(6, num_steps=5, seed=1)
    assert torch.equal(samples.data, again.data)


def test_trainer_and_recipe_are_the_same_as_train(tmp_path):
    data = osmose.DataConfig(source="toy:two-moons", num_points=200)
    dataset = data.load()
    changes = {"network.width": 16, "training.steps": 4, "training.batch_size": 8}
    run = Run.create(tmp_path / "one", osmose.recipe("ddpm", data, dataset, 0, changes))
    assert osmose.Trainer(run, dataset).fit()
    other = osmose.train("ddpm", data, tmp_path / "other", progress=False, **changes)
    assert run.config == other.config
    assert run.weights.read_bytes() == other.weights.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        osmose.train("ddpm", data, tmp_path / "other", progress=False, **changes)


def test_progress_says_where_a_run_stands_without_a_terminal(start, dataset, capsys):
    run = start()
    Trainer(run, dataset, progress=Progress()).fit()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 6/12", "step 12/12"]
    assert f"samples: {run.folder / 'samples' / 'step_00000012.png'}" in lines
    Trainer(start("quiet"), dataset, progress=Progress(show=False)).fit()
    assert capsys.readouterr().err == ""

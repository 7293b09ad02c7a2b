"""SNGAN: hinge values, who learns from what, and that a run is the same however it is cut."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from osmose.configuration import ConfigError
from osmose.data.assembly import Part, image_dataset
from osmose.data.dataset import DataConfig, DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.methods.messages import Batch
from osmose.methods.sngan import SNGANConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run, load
from osmose.training.trainer import Trainer

IMAGES = DataSpec(kind="image", shape=(1, 8, 8), range=(0.0, 1.0), shift=(0.5,), scale=(0.5,), num_classes=3)
POINTS = DataSpec(kind="points", shape=(2,))
TINY = {
    "channels": 4,
    "latent": 6,
    "critic_steps": 3,
    "training.steps": 8,
    "training.batch_size": 8,
    "training.lr": 0.01,
    "training.log_every": 1,
    "training.validate_every": 4,
    "training.preview_every": 8,
    "training.preview_samples": 4,
    "training.checkpoint_every": 2,
    "training.keep_checkpoints": 10,
    "training.precision": "fp32",
}


def build(spec=IMAGES, **changes):
    torch.manual_seed(0)
    return SNGANConfig(**{"channels": 4, "latent": 6, "critic_steps": 3, **changes}).build(spec)


def batch_of(spec, count=6, *, classes=False):
    x0 = torch.randn(count, *spec.shape, generator=torch.Generator().manual_seed(0))
    return Batch(x0, torch.arange(count) % 3 if classes else None)


def draws_of(count=6, step=0):
    return StepDraws(0, step, 0, count, count)


def run_of(tmp_path, name, **changes):
    values = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dataset = image_dataset("npz:tiny", DataConfig(source="npz:tiny"), Part(values, torch.arange(40) % 3))
    changed = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return Run.create(tmp_path / name, recipe("sngan", DataConfig(source="npz:tiny"), dataset, 0, changed)), dataset


class Sum(nn.Module):
    """A critic known by heart: a linear function of the sum of the values."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.weight * x.flatten(1).sum(1, keepdim=True)

    def iterate(self):
        pass


def test_the_hinge_losses_by_hand():
    model = build(POINTS).eval()
    model.critic = Sum()
    model.generator = nn.Linear(6, 2)
    with torch.no_grad():
        model.generator.weight.zero_()
        model.generator.bias.copy_(torch.tensor([0.1, 0.2]))  # D = 0.6
    x0 = torch.tensor([[0.1, 0.1], [1.0, 2.0], [-0.5, 0.0]])  # D = 0.4, 6, -1
    terms = model.loss(Batch(x0), draws_of(3))
    torch.testing.assert_close(terms.parts["critic"], torch.tensor([0.6 + 1.6, 0 + 1.6, 2 + 1.6]))
    torch.testing.assert_close(terms.parts["generator"], torch.full((3,), -0.6))
    torch.testing.assert_close(terms.per_item, terms.parts["critic"] + terms.parts["generator"])
    assert terms.t is None


def test_the_class_chooses_an_output_of_the_critic():
    model = build(conditional=True)
    batch = batch_of(IMAGES, classes=True)
    out = model.critic(batch.x0)
    assert out.shape == (6, 4)
    want = [out[i, 0] + out[i, 1 + i % 3] for i in range(6)]
    torch.testing.assert_close(model._score(batch.x0, batch.condition), torch.stack(want))
    moved = model._items(torch.zeros(3, 6), torch.arange(3))
    torch.testing.assert_close(moved, model._items(model.classes.weight, None))
    assert not torch.equal(moved[0], moved[1])


def gradients(model, terms):
    model.zero_grad()
    terms.mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("classes", [False, True])
def test_each_loss_teaches_only_its_own_network(classes):
    model = build(conditional=classes, critic_steps=1).train()
    batch = batch_of(IMAGES, classes=classes)
    both = gradients(model, model.loss(batch, draws_of()).per_item)

    fake = model._items(draws_of().normal((6,)), batch.condition)
    real, of_fake = (model._score(x, batch.condition) for x in (batch.x0, fake.detach()))
    critic = gradients(model, F.relu(1 - real) + F.relu(1 + of_fake))
    generator = gradients(model, -model._score(fake, batch.condition))
    for name, gradient in both.items():
        assert gradient.abs().sum() > 0, name
        own = critic if name.startswith("critic.") else generator
        torch.testing.assert_close(gradient, own[name], msg=name)
        assert not name.startswith("critic.") or not torch.equal(generator[name], gradient)


def test_the_generator_is_taught_every_so_many_steps_and_otherwise_left_alone():
    model = build(critic_steps=3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for step in range(9):
        before = {name: value.clone() for name, value in model.named_parameters()}
        terms = model.loss(batch_of(IMAGES), draws_of(step=step))
        assert set(terms.parts) == ({"critic", "generator"} if step % 3 == 2 else {"critic"})
        terms.per_item.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step([])
        same = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
        own = {name for name in before if name.startswith("generator.")}
        assert same == (set() if step % 3 == 2 else own)


def test_validation_holds_both_losses_and_changes_nothing():
    model = build().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        terms = model.loss(batch_of(IMAGES), draws_of(step=-1))
    assert set(terms.parts) == {"critic", "generator"}
    assert not terms.per_item.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("spec", [IMAGES, POINTS])
def test_the_same_seed_gives_the_same_samples_whatever_the_batch(spec):
    model = build(spec)
    one = model.sample(7, seed=3)
    assert one.data.shape == (7, *spec.shape)
    assert one.nfe == 1
    torch.testing.assert_close(model.sample(7, seed=3, batch_size=2).data, one.data)
    assert not torch.equal(model.sample(7, seed=4).data, one.data)


def test_samples_stay_inside_the_range():
    model = build()
    with torch.no_grad():
        model.generator.body[-1].conv.bias.fill_(100.0)
        assert model._items(torch.zeros(1, 6), None).max() == 1.0


def test_the_networks_and_the_probe():
    model = build(conditional=True)
    assert model.networks() == [model.generator, model.critic]
    called = []
    model.generator.register_forward_hook(lambda *_: called.append("generator"))
    model.critic.register_forward_hook(lambda *_: called.append("critic"))
    model.probe(2)
    assert called == ["generator"]


@pytest.mark.parametrize("conditional", [False, True])
def test_a_run_resumed_anywhere_is_the_same_run(tmp_path, conditional):
    whole, dataset = run_of(tmp_path, "whole", conditional=conditional)
    Trainer(whole, dataset).fit()
    want = load_file(whole.weights)
    assert int(want["updates"]) == 8
    live = load_file(whole.folder / "checkpoints/step_00000008/weights.safetensors")
    assert any(not torch.equal(value, live[name]) for name, value in want.items())  # the average
    for stop in (2, 4, 6):
        part, _ = run_of(tmp_path, f"part{stop}", conditional=conditional)
        (part.folder / "checkpoints").mkdir()
        (whole.folder / f"checkpoints/step_{stop:08d}").rename(part.folder / f"checkpoints/step_{stop:08d}")
        resumed = Trainer(Run.open(part.folder), dataset)
        assert resumed.step == stop
        resumed.fit()
        got = load_file(part.weights)
        assert all(torch.equal(value, want[name]) for name, value in got.items())
        again = load_file(part.folder / "checkpoints/step_00000008/weights.safetensors")
        assert all(torch.equal(value, live[name]) for name, value in again.items())
    model = load(whole.folder)
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert model.sample(3).data.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("taught", [False, True])
def test_accumulated_micro_batches_are_one_batch(accumulate, taught):
    model, batch, found = build(critic_steps=1 if taught else 3).train(), batch_of(IMAGES, 8), []
    for count in (1, accumulate):
        model.zero_grad()
        for x0, start in zip(batch.x0.chunk(count), range(0, 8, 8 // count), strict=True):
            terms = model.loss(Batch(x0), StepDraws(0, 0, start, start + 8 // count, 8))
            (terms.per_item.mean() / count).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("generator.") for name in found[0]) == taught
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def losses(run):
    return [value for line in run.metrics() for name, value in line.items() if "critic" in name or "generator" in name]


def test_two_processes_are_one(tmp_path, monkeypatch, capsys):
    from osmose.cli.main import main

    # Where real and generated items cancel exactly in a gradient, rounding decides its sign, and Adam the whole step.
    lr = 1e-4
    settings = [f"{name}={value}" for name, value in (TINY | {"training.lr": lr, "channels": 8}).items()]
    command = ["train", "sngan", "--data", "toy:two-moons", "data.num_points=200", "--quiet", *settings]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "osmose", *command, "--out", "two"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    main([*command, "--out", "one"])
    capsys.readouterr()
    one, two = Run.open("one"), Run.open("two")
    assert len(losses(two)) == 8 + 2 + 2 * 2
    assert losses(two) == pytest.approx(losses(one), abs=20 * lr)
    p, q = load_file(one.weights), load_file(two.weights)
    assert p.keys() == q.keys()
    assert max(float((p[name] - q[name]).abs().max()) for name in p if name.startswith("generator.")) < lr / 10


def test_bad_input_is_refused():
    for name in ("latent", "critic_steps", "channels"):
        with pytest.raises(ConfigError, match=f"{name}: 0 is not valid"):
            SNGANConfig.parse({name: 0})
    with pytest.raises(UserError, match="needs data with classes"):
        SNGANConfig(conditional=True).build(POINTS)
    with pytest.raises(UserError, match="not for events of shape"):
        SNGANConfig().build(DataSpec(kind="function", shape=(2, 8)))
    with pytest.raises(UserError, match="num_steps: 3 given, but sngan samples in one go"):
        build().sample(1, num_steps=3)

"""The VAE's bound: against the likelihood in closed form, against torch's distributions; then the outside."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from osmose.configuration import ConfigError
from osmose.data.assembly import Part, image_dataset
from osmose.data.dataset import DataConfig, DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.methods.messages import Batch
from osmose.methods.vae import VAEConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run, load
from osmose.training.trainer import Trainer

IMAGES = DataSpec(kind="image", shape=(1, 8, 8), range=(0.0, 1.0), shift=(0.5,), scale=(0.5,), num_classes=3)
POINTS = DataSpec(kind="points", shape=(6,))


def build(spec=IMAGES, **changes):
    torch.manual_seed(0)
    return VAEConfig(**{"channels": 4, "latent": 3, **changes}).build(spec)


def batch_of(spec, count=6, *, classes=False):
    x0 = torch.randn(count, *spec.shape, generator=torch.Generator().manual_seed(0))
    return Batch(x0, torch.arange(count) % 3 if classes else None)


class Cubature:
    """Points +-sqrt(d) e_i: their mean is the exact expectation, over d standard normal numbers, of any quadratic."""

    def __init__(self, latent):
        self.points = math.sqrt(latent) * torch.cat([torch.eye(latent), -torch.eye(latent)]).double()
        self.count = len(self.points)

    def normal(self, event_shape):
        assert event_shape == self.points.shape[1:]
        return self.points


class Posterior(nn.Module):
    """A linear encoder with a variance that is the same everywhere."""

    def __init__(self, matrix, variance):
        super().__init__()
        self.matrix, self.log_variance = matrix, variance.log()

    def forward(self, x):
        return torch.cat([x @ self.matrix.T, self.log_variance.expand(len(x), -1)], 1)


def test_the_bound_of_a_linear_model_is_the_likelihood_at_the_optimum_of_probabilistic_pca():
    """With x = W z + noise, and q the posterior, which is diagonal where the columns of W are orthogonal."""
    model = build(POINTS).double()
    columns = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    weight, noise = columns * torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64), 0.3
    inner = weight.T @ weight + noise * torch.eye(3, dtype=torch.float64)
    posterior = Posterior(inner.inverse() @ weight.T, noise / inner.diagonal())
    decoder = nn.Linear(3, 6, bias=False)
    with torch.no_grad():
        decoder.weight = nn.Parameter(weight)
        model.scaled_log_variance.fill_(math.log(noise) / 10)
    model.encoder, model.decoder = posterior, decoder
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    covariance = weight @ weight.T + noise * torch.eye(6, dtype=torch.float64)
    want = -MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance).log_prob(x) / 6

    def bound(x):
        return model.loss(Batch(x.expand(6, -1)), Cubature(3)).per_item.mean()

    torch.testing.assert_close(torch.stack([bound(row) for row in x]), want, rtol=1e-12, atol=1e-12)
    posterior.log_variance = posterior.log_variance + 0.1  # any other encoder gives less
    assert all(bound(row) > value + 1e-4 for row, value in zip(x, want, strict=True))


@pytest.mark.parametrize("classes", [False, True])
def test_the_terms_are_those_of_torch_s_distributions(classes):
    model = build(conditional=classes).double()
    with torch.no_grad():
        model.scaled_log_variance.fill_(-0.12)
    batch = batch_of(IMAGES, classes=classes)
    batch = Batch(batch.x0.double(), batch.condition)
    terms = model.loss(batch, StepDraws(0, 0, 0, 6, 6))

    out = model.encoder(batch.x0) + (model.encoder_classes(batch.condition) if classes else 0)
    q = Independent(Normal(out[:, :3], (out[:, 3:] / 2).exp()), 1)
    prior = Independent(Normal(torch.zeros(3).double(), torch.ones(3).double()), 1)
    z = q.mean + q.stddev * StepDraws(0, 0, 0, 6, 6).normal((3,)).double()
    mean = model.decoder(z + (model.decoder_classes(batch.condition) if classes else 0))
    p = Independent(Normal(mean, math.exp(-0.6)), 3)
    kl, log_p = kl_divergence(q, prior) / 64, p.log_prob(batch.x0) / 64
    torch.testing.assert_close(terms.parts["kl"], kl.detach())
    torch.testing.assert_close(terms.parts["reconstruction"], -log_p.detach())
    torch.testing.assert_close(terms.per_item, kl - log_p)
    terms.per_item.mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_the_best_variance_is_the_mean_squared_error():
    model = build().double().eval()
    batch = Batch(batch_of(IMAGES).x0.double())
    draws = lambda: StepDraws(0, 0, 0, 6, 6)  # noqa: E731
    with torch.no_grad():  # at log variance 0 the reconstruction is (error + log 2 pi) / 2
        error = 2 * model.loss(batch, draws()).parts["reconstruction"].mean() - math.log(2 * math.pi)
        model.scaled_log_variance.fill_(float(error.log()) / 10)
    (gradient,) = torch.autograd.grad(model.loss(batch, draws()).per_item.mean(), model.scaled_log_variance)
    assert abs(float(gradient)) < 1e-12


@pytest.mark.parametrize("spec", [IMAGES, POINTS])
def test_samples_are_the_decoder_s_means_and_the_same_whatever_the_batch(spec):
    model = build(spec)
    one = model.sample(7, seed=3)
    assert one.data.shape == (7, *spec.shape)
    assert one.nfe == 1
    torch.testing.assert_close(model.sample(7, seed=3, batch_size=2).data, one.data)
    assert not torch.equal(model.sample(7, seed=4).data, one.data)
    seen = []
    model.decoder.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    data = model.sample(4).data
    assert torch.equal(model.spec.decode(seen[0][1]), data)


def test_the_class_reaches_both_networks():
    model = build(conditional=True)
    x0 = batch_of(IMAGES, 1).x0.expand(3, -1, -1, -1)
    mean, log_variance = model._encode(x0, torch.arange(3))
    assert len(mean.unique(dim=0)) == len(log_variance.unique(dim=0)) == 3
    assert len(model._decode(torch.zeros(3, 3), torch.arange(3)).flatten(1).unique(dim=0)) == 3


def test_the_networks_and_the_probe():
    model = build(conditional=True)
    assert model.networks() == [model.encoder, model.decoder]
    called = []
    model.encoder.register_forward_hook(lambda *_: called.append("encoder"))
    model.decoder.register_forward_hook(lambda *_: called.append("decoder"))
    model.probe(2)
    assert called == ["decoder"]


@pytest.fixture
def start(tmp_path):
    values = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dataset = image_dataset("npz:tiny", DataConfig(source="npz:tiny"), Part(values, torch.arange(40) % 3))
    settings = {
        "conditional": True,
        "channels": 4,
        "latent": 3,
        "training.steps": 6,
        "training.batch_size": 8,
        "training.log_every": 1,
        "training.preview_every": 6,
        "training.checkpoint_every": 3,
        "training.precision": "fp32",
    }

    def make(name, **changes):
        changed = settings | {key.replace("__", "."): value for key, value in changes.items()}
        config = recipe("vae", DataConfig(source="npz:tiny"), dataset, 0, changed)
        return Run.create(tmp_path / name, config), dataset

    return make


def test_a_run_resumed_is_the_same_run_and_can_be_loaded(start):
    whole, dataset = start("whole")
    Trainer(whole, dataset).fit()
    part, _ = start("part")
    (part.folder / "checkpoints").mkdir()
    name = "checkpoints/step_00000003"
    (whole.folder / name).rename(part.folder / name)
    Trainer(Run.open(part.folder), dataset).fit()
    want, got = load_file(whole.weights), load_file(part.weights)
    assert want.keys() == got.keys()
    assert all(torch.equal(value, want[name]) for name, value in got.items())
    assert load(whole.folder).sample(3).data.shape == (3, 1, 8, 8)


def test_accumulated_micro_batches_are_one_batch(start):
    one, dataset = start("one")
    cut, _ = start("cut", training__accumulate=4)
    Trainer(one, dataset).fit()
    Trainer(cut, dataset).fit()
    a, b = ([line["loss"] for line in run.metrics() if "loss" in line] for run in (one, cut))
    assert len(a) == 6
    assert b == pytest.approx(a, rel=1e-4)


def test_training_lowers_the_bound(start):
    run, dataset = start("run", training__steps=60, training__batch_size=20)
    Trainer(run, dataset).fit()
    lines = [line for line in run.metrics() if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["reconstruction"] + lines[-1]["kl"])


def test_bad_input_is_refused():
    for name in ("latent", "channels"):
        with pytest.raises(ConfigError, match=f"{name}: 0 is not valid"):
            VAEConfig.parse({name: 0})
    with pytest.raises(UserError, match="needs data with classes"):
        VAEConfig(conditional=True).build(POINTS)
    with pytest.raises(UserError, match="not for events of shape"):
        VAEConfig().build(DataSpec(kind="function", shape=(2, 8)))
    with pytest.raises(UserError, match="num_steps: 3 given, but vae samples in one go"):
        build().sample(1, num_steps=3)

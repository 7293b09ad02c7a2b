"""Gaussians in closed form: their moments are numpy's, their densities torch's and scipy's, their samples theirs."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from osmose.data.assembly import Part, image_dataset
from osmose.data.dataset import DataConfig, DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.methods.gaussian_fit import ClassMeansConfig, GaussianConfig
from osmose.methods.messages import Batch
from osmose.methods.moments import Moments, level_step
from osmose.training.recipes import checked, recipe
from osmose.training.run import Run
from osmose.training.trainer import Trainer

POINTS = DataSpec(kind="points", shape=(3,), num_classes=4)
PIXELS = DataSpec(kind="image", shape=(2, 2, 1), range=(0.0, 16.0), levels=17, shift=(8.0,), scale=(8.0, 2.0))


def drawn(n=500, classes=4, offset=0.0):
    """Correlated points around class means far from each other; the last class has none."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes - 1, (n,), generator=generator)
    mixing = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.3, 0.2], [0.0, 0.0, 2.0]])
    x = torch.randn(n, 3, generator=generator) @ mixing + 3.0 * labels[:, None] * torch.tensor([1.0, -1.0, 0.5])
    return x + offset, labels


def batches(x, labels, size):
    return (Batch(a, b) for a, b in zip(x.split(size), labels.split(size), strict=True))


def fitted(config, x, labels, spec=POINTS):
    model = config.build(spec).double()
    model.prepare(batches(x, labels, 64))
    return model


def density(model, x, labels=None):
    return -model.loss(Batch(x, labels), StepDraws(0, 0, 0, len(x), len(x))).per_item * x[0].numel()


# --- moments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 500])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_moments_are_numpys_whatever_the_batches(size, offset):
    x, labels = drawn(offset=offset)
    moments = Moments.of(batches(x, labels, size), POINTS)
    rows = x.double().numpy()
    assert np.abs(moments.means[0].numpy() - rows.mean(0)).max() < 1e-10 * (1 + offset)
    assert np.abs(moments.scatter.numpy() / 500 - np.cov(rows.T, bias=True)).max() < 1e-10
    assert moments.counts.tolist() == [500]


@pytest.mark.parametrize("size", [3, 500])
def test_moments_of_classes(size):
    x, labels = drawn()
    moments = Moments.of(batches(x, labels, size), POINTS, 4)
    rows, groups = x.double().numpy(), labels.numpy()
    within = sum(np.cov(rows[groups == k].T, bias=True) * (groups == k).sum() for k in range(3)) / 500
    assert moments.counts.tolist() == [*np.bincount(groups), 0]
    for k in range(3):
        assert np.abs(moments.means[k].numpy() - rows[groups == k].mean(0)).max() < 1e-10
    assert np.abs(moments.scatter.numpy() / 500 - within).max() < 1e-10


def test_the_ridge_is_the_variance_of_a_level():
    x = torch.randint(0, 17, (50, 2, 2, 1), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0, 1] = 5  # constant
    moments = Moments.of([Batch(PIXELS.encode(x))], PIXELS)
    ridge = moments.covariance() - moments.scatter / 50
    assert level_step(PIXELS).flatten().tolist() == [1 / 8, 1 / 2]
    assert torch.allclose(ridge, torch.tensor([1 / 64, 1 / 64, 1 / 4, 1 / 4]).double().diag() / 12, atol=1e-15)
    assert torch.linalg.eigvalsh(moments.covariance()).min() > 1e-4
    x, labels = drawn()
    x[:, 0] = 2.0
    moments = Moments.of([Batch(x, labels)], POINTS)
    ridge = moments.covariance() - moments.scatter / 500
    assert torch.allclose(ridge, 1e-6 * moments.scatter.trace() / 1500 * torch.eye(3).double(), atol=1e-15)
    assert torch.linalg.cholesky(moments.covariance()).isfinite().all()


def test_data_that_do_not_vary_are_a_narrow_gaussian():
    model = fitted(GaussianConfig(), torch.full((20, 3), 2.0), torch.zeros(20, dtype=torch.int64))
    assert (model.sample(5).data - 2).abs().max() < 1e-4


# --- densities ------------------------------------------------------------------------------------------------------


def test_the_density_of_a_gaussian():
    x, labels = drawn()
    model = fitted(GaussianConfig(), x, labels)
    moments = Moments.of([Batch(x)], POINTS)
    exact = torch.distributions.MultivariateNormal(moments.means[0], moments.covariance())
    assert (density(model, x.double()) - exact.log_prob(x.double())).abs().max() < 1e-9
    assert density(model, x).dtype == torch.float32


def test_the_density_of_class_means():
    x, labels = drawn()
    moments = Moments.of([Batch(x, labels)], POINTS, 4)
    each = np.stack([multivariate_normal(moments.means[k], moments.covariance()).pdf(x.double()) for k in range(3)])
    mixture = density(fitted(ClassMeansConfig(), x, labels), x.double())
    assert np.abs(mixture.numpy() - np.log(moments.counts[:3].numpy() / 500 @ each)).max() < 1e-9
    told = density(fitted(ClassMeansConfig(conditional=True), x, labels), x.double(), labels)
    assert np.abs(told.numpy() - np.log(each[labels, np.arange(500)])).max() < 1e-9


# --- samples --------------------------------------------------------------------------------------------------------


def test_samples_have_the_moments_of_the_data():
    x, labels = drawn()
    for config in (GaussianConfig(), ClassMeansConfig()):
        samples = fitted(config, x, labels).sample(6000)
        assert samples.nfe == 0
        assert (samples.data.mean(0) - x.mean(0)).abs().max() < 0.1
        assert (samples.data.T.cov() - x.T.cov()).abs().max() < 0.5
    # Only a mixture leaves the space between the classes empty.
    first = samples.data[:, 0] - samples.data[:, 1]
    assert ((first - 3).abs() < 0.3).double().mean() < 0.5 * ((first - 0).abs() < 0.3).double().mean()


def test_classes_come_as_often_as_in_the_data():
    labels = torch.tensor([0] * 60 + [2] * 30 + [1] * 10)
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 10.0 * labels[:, None]
    samples = fitted(ClassMeansConfig(), x, labels).sample(4000).data
    found = torch.bincount((samples[:, 0] / 10).round().long(), minlength=4) / 4000
    assert (found - torch.tensor([0.6, 0.1, 0.3, 0.0])).abs().max() < 0.03


def test_a_class_that_is_asked_for():
    x, labels = drawn()
    model = fitted(ClassMeansConfig(conditional=True), x, labels)
    for k in range(3):
        samples = model.sample(4000, condition=k).data
        assert (samples.mean(0) - x[labels == k].mean(0)).abs().max() < 0.15
    assert (model.sample(4000, condition=3).data.mean(0) - x.mean(0)).abs().max() < 0.15  # has no items
    with pytest.raises(UserError, match="class 4 is not in"):
        model.sample(1, condition=4)


@pytest.mark.parametrize("config", [GaussianConfig(), ClassMeansConfig(), ClassMeansConfig(conditional=True)])
def test_the_same_samples_whatever_the_batch_size(config):
    model = fitted(config, *drawn())
    want = model.sample(9, seed=3, batch_size=9).data
    for batch_size in (1, 4, None):
        assert (model.sample(9, seed=3, batch_size=batch_size).data - want).abs().max() < 1e-5
    assert (model.sample(9, seed=4).data - want).abs().max() > 0.1
    assert len(want.unique(dim=0)) == 9


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return image_dataset("npz:tiny", DataConfig(source="npz:tiny"), Part(pixels, torch.arange(50) % 3))


def test_a_run_is_fitted_to_the_training_part_and_kept(dataset, tmp_path):
    config = recipe("class-means", DataConfig(source="npz:tiny"), dataset, 0, {"conditional": True})
    run = Run.create(tmp_path / "run", checked(config))
    assert Trainer(run, dataset).fit()
    model, x = run.model(), dataset.spec.encode(dataset.train).flatten(1)
    for k in range(3):
        assert (model.means[k] - x[dataset.train_labels == k].mean(0)).abs().max() < 1e-6
    line = run.metrics()[-1]
    held = dataset.spec.encode(dataset.held_out)
    told = model.loss(Batch(held, dataset.held_out_labels), StepDraws(0, 0, 0, len(held), len(held))).per_item
    assert line["step"] == 0
    assert line["validation_loss"] == pytest.approx(told.mean().item(), rel=1e-5)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    again = Trainer(Run.open(run.folder), dataset)
    assert again.fit()
    assert torch.equal(again.model.means, model.means)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_refused(dataset):
    def start(method, **changes):
        checked(recipe(method, DataConfig(source="npz:tiny"), dataset, 0, changes))

    with pytest.raises(UserError, match=r"training\.steps: 5 is not valid: gaussian is fitted in closed form"):
        start("gaussian", **{"training.steps": 5})
    with pytest.raises(UserError, match=r"training\.steps: 0 is not valid: must be at least 1"):
        start("ddpm", **{"training.steps": 0, "network": "mlp"})
    with pytest.raises(UserError, match="conditional: True is not valid: one Gaussian knows no classes; class-means"):
        start("gaussian", conditional=True)
    with pytest.raises(UserError, match="class-means: needs data with classes, and these have none; take gaussian"):
        ClassMeansConfig().build(PIXELS)
    with pytest.raises(UserError, match="data: the class of every training item is needed"):
        ClassMeansConfig().build(POINTS).prepare([Batch(drawn()[0])])
    with pytest.raises(UserError, match="num_steps: 4 given, but gaussian samples in one go"):
        GaussianConfig().build(PIXELS).sample(1, num_steps=4)

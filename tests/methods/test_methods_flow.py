"""A flow: an exact inverse, an exact determinant, a density that sums to 1, the fitted Gaussian to begin with."""

import sys

import pytest
import torch

from osmose.analysis.cost import macs_of
from osmose.data.assembly import Part, image_dataset
from osmose.data.dataset import DataConfig, DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.methods.flow import FlowConfig
from osmose.methods.gaussian_fit import GaussianConfig
from osmose.methods.messages import Batch
from osmose.training.recipes import checked, recipe
from osmose.training.run import Run
from osmose.training.trainer import Trainer

POINTS = DataSpec(kind="points", shape=(5,), num_classes=3)
PLANE = DataSpec(kind="points", shape=(2,), num_classes=3)
PIXELS = DataSpec(kind="image", shape=(1, 2, 3), range=(0.0, 16.0), levels=17, shift=(8.0,), scale=(8.0,))
SMALL = {"transforms": 3, "width": 8}


def data(spec, n=400):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(spec.dimension, spec.dimension, generator=generator)
    return (torch.randn(n, spec.dimension, generator=generator) @ mixing + 0.5).view(n, *spec.shape)


def built(spec, learned=True, **values):
    """In float64, whitened, and with weights that are not those of the beginning."""
    torch.manual_seed(0)
    model = FlowConfig(**{**SMALL, **values}).build(spec).double()
    model.prepare([Batch(data(spec))])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * learned * torch.randn_like(parameter))
    return model


def draws(n, step=0):
    return StepDraws(0, step, 0, n, n)


@pytest.mark.parametrize("values", [{}, {"components": 3}, {"conditional": True}, {"transforms": 1}])
def test_the_inverse(values):
    model, x = built(POINTS, **values), data(POINTS).double()
    classes = torch.arange(400) % 3 if "conditional" in values else None
    with torch.no_grad():
        z, _ = model.normalise(x, classes)
        assert (model.invert(z, classes) - x).abs().max() < 1e-8
        assert (z - built(POINTS, learned=False, **values).normalise(x, classes)[0]).abs().max() > 0.1
        if classes is not None:
            assert (model.invert(z, (classes + 1) % 3) - x).abs().max() > 0.01


@pytest.mark.parametrize("values", [{}, {"components": 3}, {"conditional": True}])
def test_the_determinant(values):
    model, x = built(POINTS, **values), data(POINTS, 20).double()
    classes = torch.arange(20) % 3 if "conditional" in values else None
    log_det = model.normalise(x, classes)[1]
    for i in range(20):
        one = None if classes is None else classes[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, one=one: model.normalise(v[None], one)[0][0], x[i])
        assert abs(torch.linalg.slogdet(jacobian)[1] - log_det[i]) < 1e-9


@pytest.mark.parametrize("conditional", [False, True])
def test_the_density_sums_to_1(conditional):
    model = built(PLANE, conditional=conditional)
    side = torch.linspace(-8, 8, 401, dtype=torch.float64)
    along = torch.cartesian_prod(side, side) * model.deviations  # a grid along the principal components
    grid = along @ model.directions.T + model.mean
    classes = torch.full((len(grid),), 2) if conditional else None
    with torch.no_grad():
        log_p = -2 * model.loss(Batch(grid, classes), draws(len(grid))).per_item
    area = (16 / 400) ** 2 * model.deviations.prod()
    assert abs(log_p.exp().sum() * area - 1) < 1e-3


def test_it_begins_as_the_fitted_gaussian():
    for spec in (POINTS, PIXELS):
        x = spec.encode(spec.decode(data(spec)))
        flow, gaussian = FlowConfig(**SMALL).build(spec).double(), GaussianConfig().build(spec).double()
        for model in (flow, gaussian):
            model.prepare(Batch(part) for part in x.split(64))
        if spec is PIXELS:  # the density at the places that the flow's noise brings the values to
            u = torch.special.ndtr(draws(400).normal(spec.shape))
            assert 0 < u.min() < 0.02
            assert 0.98 < u.max() < 1
            moved = x + (u - 0.5) / 8
        else:
            moved = x
        want = gaussian.loss(Batch(moved.double()), draws(400)).per_item
        got = flow.loss(Batch(x.double()), draws(400)).per_item
        assert (got - want).abs().max() < 1e-6


def test_samples_are_the_inverse_of_noise():
    model = built(PIXELS)
    x, nfe = model.generate(draws(50), model.sampling(), None, lambda *_: None)
    assert nfe == 1
    assert (model.normalise(x)[0] - draws(50).normal(PIXELS.shape).flatten(1)).abs().max() < 1e-5
    state = torch.get_rng_state()
    want = model.sample(9, seed=3, batch_size=9).data
    for batch_size in (1, 4, None):
        assert (model.sample(9, seed=3, batch_size=batch_size).data - want).abs().max() < 1e-4
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(want, want.round())
    assert (model.sample(9, seed=4).data - want).abs().max() >= 1


def test_the_loss_is_in_full_precision():
    model = built(PIXELS).float()
    x = PIXELS.encode(PIXELS.decode(data(PIXELS)))
    want = model.loss(Batch(x), draws(400)).per_item
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.loss(Batch(x), draws(400)).per_item, want)
    assert want.dtype == torch.float32


def test_only_the_layers_learn_and_their_networks_are_counted():
    model = FlowConfig(**SMALL, components=4).build(POINTS)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"layers"}
    outputs = 2 * (3 * 4 - 1)  # of half of 4 components, with 4 bins
    assert macs_of(model) == 3 * (2 * 8 + 8 * 8 + 8 * outputs) + 5 * 5  # the directions besides
    assert len(model.networks()) == 3


def test_it_learns_what_a_gaussian_misses():
    angle = 6.28 * torch.rand(256, generator=torch.Generator().manual_seed(0))
    ring = torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * data(PLANE, 256)
    torch.manual_seed(0)
    model = FlowConfig(transforms=4, width=16).build(PLANE)
    model.prepare([Batch(ring)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        loss = model.loss(Batch(ring), draws(256, step)).per_item.mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    radius = ((model.sample(500).data - model.mean) / ring.std(0)).norm(dim=1)
    assert (radius < 0.7).double().mean() < 0.1  # 0.22 of a Gaussian's


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return image_dataset("npz:tiny", DataConfig(source="npz:tiny"), Part(pixels, torch.arange(50) % 3))


@pytest.fixture
def start(dataset, tmp_path):
    def make(name, **changes):
        values = {"training.batch_size": 16, "training.log_every": 1, "training.checkpoint_every": 5, **SMALL}
        values |= {"conditional": True, "training.preview_samples": 4, "training.steps": 12, **changes}
        config = recipe("flow", DataConfig(source="npz:tiny"), dataset, 0, values)
        return Run.create(tmp_path / name, checked(config))

    return make


def test_it_resumes_bit_for_bit(dataset, start, monkeypatch):
    whole, cut = start("whole"), start("cut")
    assert Trainer(whole, dataset).fit()

    class KilledError(Exception):
        pass

    optimise = Trainer.optimise

    def killed(self, window):
        if self.step == 7:
            raise KilledError
        return optimise(self, window)

    monkeypatch.setattr(Trainer, "optimise", killed)
    with pytest.raises(KilledError):
        Trainer(cut, dataset).fit()
    monkeypatch.undo()
    assert Trainer(cut, dataset).fit()
    assert whole.weights.read_bytes() == cut.weights.read_bytes()
    losses = [line["loss"] for line in whole.metrics() if "loss" in line]
    assert losses == [line["loss"] for line in cut.metrics() if "loss" in line]
    samples = whole.model().sample(6)
    assert samples.condition.tolist() == [0, 1, 2, 0, 1, 2]
    assert samples.data.isfinite().all()


def test_refused(start, monkeypatch):
    with pytest.raises(UserError, match="flow: couples the values of an item, and these data have one each"):
        FlowConfig().build(DataSpec(kind="points", shape=(1,)))
    with pytest.raises(UserError, match="transforms: 0 is not valid: should be greater than or equal to 1"):
        start("zero", transforms=0)
    with pytest.raises(UserError, match="bins: 1 is not valid: should be greater than or equal to 2"):
        start("zero", bins=1)
    with pytest.raises(UserError, match="components: 1 is not valid: should be greater than or equal to 2"):
        start("zero", components=1)
    with pytest.raises(UserError, match=r"training\.steps: 0 is not valid: must be at least 1"):
        start("zero", **{"training.steps": 0})
    with pytest.raises(UserError, match="num_steps: 4 given, but flow samples in one go"):
        built(POINTS).sample(2, num_steps=4)
    monkeypatch.setitem(sys.modules, "zuko.flows.coupling", None)
    with pytest.raises(UserError) as refusal:
        FlowConfig().build(POINTS)
    assert str(refusal.value) == "flow needs the package zuko: pip install 'osmose[flow]'"

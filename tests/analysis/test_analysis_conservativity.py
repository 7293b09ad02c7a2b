"""How far fields are from gradients, on fields whose answer is known."""

import json

import pytest
import torch

from osmose.analysis.conservativity import conservativity, weak_residual, write_conservativity
from osmose.analysis.noise_error import oracle_of
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.oracles import RotatedDenoiser
from osmose.gaussian.schedule import VarianceExploding
from osmose.gaussian.score import score_field
from osmose.methods.diffusion import Diffusion
from osmose.training.recipes import recipe

TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
RATIOS = [0.3, 1.0]


@pytest.fixture(scope="module")
def planar():
    """A model of 8 Gaussians, and its data; any weights will do."""
    data = DataConfig(source="toy:8-gaussians", num_points=4000)
    dataset = data.load()
    config = recipe("edm", data, dataset, 0, {"network.width": 8, "network.depth": 1})
    return config.method.build(config.spec), dataset


@pytest.fixture
def with_gauge(planar, monkeypatch):
    """Replaces the model's field by the exact one with a rotation added; gives the model and its data."""
    model, dataset = planar

    def replace(weight):
        field = score_field(RotatedDenoiser(oracle_of(dataset), weight * TURN), VarianceExploding())
        monkeypatch.setattr(Diffusion, "score_field", lambda _: field)
        return model, dataset

    return replace


def test_the_exact_score_is_a_gradient_without_error(with_gauge):
    found = conservativity(*with_gauge(0.0), n=16, ratios=RATIOS, steps=0)
    assert max(found.asymmetry) < 1e-10  # items are float32
    assert max(found.error) < 1e-10
    assert found.remainder is found.floor is found.harmful is None
    assert found.reading()[0] == "the score's Jacobian is symmetric to rounding: a gradient"


def test_an_added_rotation_is_found_and_known_to_be_harmless(with_gauge):
    # s + w A s with A a quarter turn: |e|^2 = w^2 |s|^2, J' = (1 + w A) J, and the gauge condition holds.
    weight = 2.0
    model, dataset = with_gauge(weight)
    found = conservativity(model, dataset, n=64, ratios=RATIOS, steps=0)
    assert found.error == pytest.approx([weight**2] * 2, rel=1e-5)
    assert max(found.condition) < 1e-4
    plain = conservativity(*with_gauge(0.0), n=64, ratios=RATIOS, steps=0)
    assert found.size == pytest.approx([(1 + weight**2) * size for size in plain.size], rel=1e-5)
    assert min(found.asymmetry) > 0.1
    # Hutchinson's estimates tell the same, and are not biased by the choice of points, which is the same.
    probed = conservativity(*with_gauge(weight), n=64, ratios=RATIOS, steps=0, probes=64)
    assert probed.antisymmetric == pytest.approx(found.antisymmetric, rel=0.05)
    assert probed.size == pytest.approx(found.size, rel=0.05)
    assert probed.conditions["probes"] == 64


def test_the_split_takes_a_rotation_out_of_the_field(with_gauge, tmp_path):
    model, dataset = with_gauge(1.0)
    found = conservativity(model, dataset, n=128, ratios=RATIOS, steps=70)
    # Half of |s + A s|^2 = 2 |s|^2 is the rotation, which no gradient has; what is left is the exact score.
    assert found.remainder == pytest.approx([0.5, 0.5], abs=0.15)
    assert max(found.floor) < 0.25
    assert max(found.harmful) < 0.35
    assert max(map(abs, found.overlap)) < 0.2
    said = " ".join(found.reading())
    assert "the field has a part that is no gradient" in said
    paths = write_conservativity(found, tmp_path)
    assert [path.name for path in paths] == ["conservativity.json", "conservativity.png"]
    assert json.loads(paths[0].read_text())["remainder"] == found.remainder


def test_a_linear_gauge_has_the_asymmetry_of_its_matrices(monkeypatch):
    # Of N(0, C) and s + w A s the Jacobian is -(1 + w A) (C + r^2)^-1 everywhere.
    data = DataConfig(source="toy:gaussian:3", num_points=400)
    dataset = data.load()
    config = recipe("edm", data, dataset, 0, {"network.width": 8, "network.depth": 1})
    model, exact = config.method.build(config.spec), oracle_of(dataset)
    skew = torch.tensor([[0.0, 2.0, -1.0], [-2.0, 0.0, 0.5], [1.0, -0.5, 0.0]], dtype=torch.float64)
    field = score_field(RotatedDenoiser(exact, skew), VarianceExploding())
    monkeypatch.setattr(Diffusion, "score_field", lambda _: field)
    found = conservativity(model, dataset, n=4, ratios=[0.5], steps=0)
    axes, variances = exact.axes.double(), exact.variances.double()
    spread = axes @ torch.diag(variances) @ axes.T + 0.25 * torch.eye(3, dtype=torch.float64)
    slope = -(torch.eye(3, dtype=torch.float64) + skew) @ spread.inverse()
    odd, whole = (slope - slope.T).square().sum(), slope.square().sum()
    assert found.antisymmetric == pytest.approx([float(odd)], rel=1e-4)
    assert found.asymmetry == pytest.approx([float(odd / (4 * whole))], rel=1e-4)
    assert found.asymmetry[0] > 0.1
    assert max(found.condition) < 1e-3


def test_a_model_that_is_told_classes_is_not_compared_with_the_law_of_all(planar):
    _, dataset = planar
    data = DataConfig(source="toy:8-gaussians", num_points=400)
    config = recipe("edm", data, dataset, 0, {"network.width": 8, "network.depth": 1, "conditional": True})
    found = conservativity(config.method.build(config.spec), dataset, n=4, ratios=RATIOS, steps=0)
    assert found.error is None


def test_the_weak_residual_knows_gauge_fields_from_others(planar):
    _, dataset = planar
    y = dataset.spec.encode(dataset.train).double()[:2000]
    y = y + 0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = score_field(oracle_of(dataset), VarianceExploding()).score(y, 0.5)
    gauge = weak_residual(y, score @ TURN.T, torch.Generator().manual_seed(1))
    gradient = weak_residual(y, score, torch.Generator().manual_seed(1))
    assert gauge < 1.5
    assert gradient > 4


def test_refused(planar):
    model, dataset = planar
    with pytest.raises(UserError, match=r"ratios: 100 is not valid: .* trained at are 0.002 to 80"):
        conservativity(model, dataset, ratios=[0.1, 100.0])
    with pytest.raises(UserError, match="n: 401 is more than the 400 held-out items"):
        conservativity(model, dataset, n=401)
    with pytest.raises(UserError, match="probes: 0 is not valid: must be at least 1, or exact"):
        conservativity(model, dataset, probes=0)
    with pytest.raises(UserError, match="steps: -1 is not valid: must be at least 0"):
        conservativity(model, dataset, steps=-1)
    with pytest.raises(UserError, match="ratios: the split is learned between the smallest and the largest: give 2"):
        conservativity(model, dataset, ratios=[0.1])
    with pytest.raises(UserError, match="ratios: none is not valid"):
        conservativity(model, dataset, ratios=[])

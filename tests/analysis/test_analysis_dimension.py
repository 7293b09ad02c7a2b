"""Estimators of local dimension on fields known in closed form: the fixtures of a sphere, a plane, a gauge field."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from osmose.analysis.dimension import ESTIMATORS, Problem, choose, estimate, flow_singular_values
from osmose.analysis.dimension_pictures import write_dimension
from osmose.analysis.dimension_report import Plateau, dimension, plateau
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.derivatives import MOST
from osmose.gaussian.oracles import GaussianDenoiser, RotatedDenoiser, SphereDenoiser
from osmose.gaussian.schedule import LinearSchedule, VarianceExploding
from osmose.gaussian.score import score_field
from osmose.methods.diffusion import Diffusion
from osmose.training.recipes import recipe

D = 10
RATIOS = torch.tensor([0.01, 0.1, 0.3], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ask(name, denoiser, points, items=None, ratios=RATIOS, probes=None, schedule=None):
    field = score_field(denoiser, schedule or VarianceExploding())
    problem = Problem(field, points, points if items is None else items, ratios, probes, 0)
    return estimate(name, problem, lambda *_: None)


def sphere(count, seed):
    u = draw(count, 3, seed=seed)
    frame = torch.linalg.qr(draw(D, 3, seed=1))[0]
    return frame, u / u.norm(dim=1, keepdim=True) @ frame.T


FRAME, POINTS = sphere(8, 2)
_, ITEMS = sphere(4000, 3)


@pytest.mark.parametrize("name", ["flipd", "normal-bundle", "rank", "flow", "lidl"])
def test_the_exact_score_of_a_sphere_says_two(name):
    ratios = torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64)
    points = POINTS[:2] if name in ("lidl", "flow") else POINTS
    ratios = ratios[:2] if name == "lidl" else ratios
    found = ask(name, SphereDenoiser(FRAME), points, ratios=ratios)
    assert found.values.shape == (len(points), len(ratios))
    assert torch.allclose(found.values, torch.full_like(found.values, 2.0), atol=2e-3)
    if name == "flow":
        assert found.spectra.shape == (2, 3, D)


def test_flipd_of_a_sphere_falls_short_where_the_noise_sees_its_curvature():
    half = torch.tensor([0.5], dtype=torch.float64)
    found = ask("flipd", SphereDenoiser(FRAME), POINTS, ratios=half).values
    assert float(found.mean()) == pytest.approx(1.9946, abs=1e-4)


@pytest.mark.parametrize("schedule", [VarianceExploding(), LinearSchedule()], ids=["ve", "linear"])
def test_flipd_of_a_gaussian_is_its_closed_form_by_any_schedule(schedule):
    # tr J + |D - x|^2 / r^2 with J = C (C + r^2)^-1 and D = J x.
    variances = torch.tensor([1.0, 0.5, 2.0] + [0.0] * 7, dtype=torch.float64)
    x = draw(6, D, seed=4) * variances.sqrt()
    found = ask("flipd", GaussianDenoiser(torch.zeros(D, dtype=torch.float64), variances), x, schedule=schedule).values
    for place, ratio in enumerate(RATIOS.tolist()):
        gain = variances / (variances + ratio**2)
        want = gain.sum() + ((1 - gain) * x / ratio).square().sum(1)
        assert torch.allclose(found[:, place], want, rtol=1e-6)
    hutchinson = ask(
        "flipd", GaussianDenoiser(torch.zeros(D, dtype=torch.float64), variances), x, schedule=schedule, probes=3
    )
    assert torch.allclose(hutchinson.values, found, rtol=1e-6)  # of a diagonal Jacobian every probe is exact


def gauged(weight):
    variances = torch.tensor([1.0, 0.5, 2.0] + [0.0] * 7, dtype=torch.float64)
    axes = torch.linalg.qr(draw(D, D, seed=5))[0]
    skew = draw(D, D, seed=6)
    denoiser = GaussianDenoiser(torch.zeros(D, dtype=torch.float64), axes @ torch.diag(variances) @ axes.T)
    x = draw(400, D, seed=7) * variances.sqrt() @ axes.T
    return variances, (skew - skew.T) / 4, RotatedDenoiser(denoiser, weight * (skew - skew.T) / 4), x


def test_a_gauge_field_moves_pointwise_estimates_by_a_known_amount_and_leaves_the_flow_s():
    variances, skew, exact, x = gauged(0.0)
    _, _, turned, _ = gauged(5.0)
    clean = ask("flipd", exact, x).values
    moved = ask("flipd", turned, x).values
    # The added field A s has no divergence and is orthogonal to s: flipd rises by r^2 |A s|^2 at each point.
    field = score_field(exact, VarianceExploding())
    for place, ratio in enumerate(RATIOS.tolist()):
        added = 25 * ratio**2 * (field.score(x, ratio) @ skew.T).square().sum(1)
        assert torch.allclose(moved[:, place], clean[:, place] + added, rtol=1e-8)
    few = x[:3]
    assert ask("rank", exact, few).values.unique().tolist() == [3]
    assert float(ask("rank", turned, few).values.min()) >= 7
    assert ask("normal-bundle", exact, few).values[:, 0].unique().tolist() == [3]
    assert float(ask("normal-bundle", turned, few).values[:, 1].mean()) > 5
    for denoiser in (exact, turned):
        taus, logs = flow_singular_values(score_field(denoiser, VarianceExploding()), few[:1], RATIOS.log())
        falling = variances.sort(descending=True).values
        want = ((falling + taus.exp()[:, None] ** 2) / (falling + 80.0**2)).sqrt()
        assert torch.allclose(logs[0].exp(), want, rtol=1e-2)
        assert ask("flow", denoiser, few[:2]).values[:, :2].unique().tolist() == [3]


def test_the_flow_is_followed_between_any_ratios():
    for ratios in ([0.05, 0.1, 0.2], [0.15], [0.3]):
        found = ask("flow", SphereDenoiser(FRAME), POINTS[:1], ratios=torch.tensor(ratios, dtype=torch.float64)).values
        assert found.tolist() == [[2.0] * len(ratios)]
    ends = ask("flow", SphereDenoiser(FRAME), POINTS[:1], ratios=torch.tensor([0.1, 80.0], dtype=torch.float64)).values
    assert ends[0, 0] == 2
    assert bool(ends[0, 1].isnan())
    taus, logs = flow_singular_values(
        score_field(SphereDenoiser(FRAME), VarianceExploding()), POINTS[:1], torch.tensor([0.01, 0.1]).double().log()
    )
    slopes = (logs[0, 2] - logs[0, 1]) / (taus[2] - taus[1])
    assert slopes[:2].tolist() == pytest.approx([0.002, 0.002], abs=3e-3)
    assert slopes[3:].tolist() == pytest.approx([1.0] * 7, abs=1e-6)


def test_what_needs_no_model_comes_near_too():
    pytest.importorskip("skdim")
    wide = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert ask("kde", None, POINTS, ITEMS, wide).values.mean(0).tolist() == pytest.approx([2, 2], abs=0.2)
    for name in ("mle", "lpca"):
        found = ask(name, None, POINTS[:4], ITEMS).values
        assert found.shape == (4, 1)
        assert float(found.mean()) == pytest.approx(2, abs=0.35)
    # A point that is one of the items is not its own neighbour.
    own = ask("mle", None, ITEMS[:4], ITEMS).values
    assert float(own.mean()) == pytest.approx(2, abs=0.5)
    assert float(ask("kde", None, ITEMS[:4], ITEMS, wide / 40).values.min()) > 2  # with itself it would be near 0


def test_a_plateau_is_where_a_curve_stays():
    ratios = torch.logspace(-2, 0, 5, dtype=torch.float64)
    still = plateau(ratios, torch.tensor([9.0, 2.1, 2.0, 1.9, 0.3]))
    assert still == Plateau(pytest.approx(2.0), float(ratios[1]), float(ratios[3]))
    assert plateau(ratios, torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0])) is None
    assert plateau(ratios, torch.tensor([2.0, float("nan"), 2.0, 2.0, 9.0])).low == float(ratios[2])
    large = plateau(ratios, torch.tensor([50.0, 47.0, 30.0, 10.0, 1.0]))  # 10 % of it
    assert large.value == pytest.approx(48.5)


@pytest.fixture(scope="module")
def untrained():
    """A model of points on a sphere, and its data; any weights will do."""
    data = DataConfig(source="toy:sphere:2:10", num_points=2000)
    dataset = data.load()
    config = recipe("edm", data, dataset, 0, {"network.width": 8, "network.depth": 1})
    return config.method.build(config.spec), dataset


def test_the_report_says_what_settles_and_what_agrees(untrained, tmp_path, monkeypatch):
    model, dataset = untrained
    exact = score_field(SphereDenoiser(FRAME), VarianceExploding())
    monkeypatch.setattr(Diffusion, "score_field", lambda _: exact)
    points = POINTS.float() * torch.tensor(model.spec.scale) + torch.tensor(model.spec.shift)  # POINTS in its units
    known = replace(dataset, held_out=points)
    done = []
    found = dimension(
        model,
        known,
        ratios=[0.3, 0.05, 0.1],
        estimators=["flipd", "rank"],
        on_step=lambda at, of: done.append(at / of),
    )
    assert found.ratios.tolist() == [0.05, 0.1, 0.3]
    assert found.verdict() == "the estimates agree on 2 of 10"
    assert found.plateaus["flipd"].value == pytest.approx(2, abs=0.02)
    assert done == sorted(done)
    assert done[-1] == 1
    paths = write_dimension(found, tmp_path, model.spec)
    assert [path.name for path in paths] == ["dimension.json", "dimension.csv", "dimension.png"]
    said = json.loads(paths[0].read_text())
    assert said["truth"] == 2
    assert said["estimates"]["rank"]["mean"] == [2, 2, 2]
    assert max(said["estimates"]["rank"]["error"]) == 0
    rows = list(csv.DictReader(paths[1].open()))
    assert len(rows) == 8 * 3 * 2
    assert {row["truth"] for row in rows} == {"2"}
    at_one = dimension(model, dataset, points=points[:2], ratios=[0.1], estimators=["flipd"])
    assert at_one.verdict() == "at one scale there is nothing to say of settling: flipd 2.00 of 10"
    near = dimension(model, dataset, points=points[:2], ratios=[0.05, 0.1], estimators=["rank"])
    assert near.verdict() == "over less than 0.45 of a decade there is nothing to say of settling: rank 2.00 of 10"
    assert (at_one.truth, at_one.conditions["part"]) == (None, "given")  # points of a file may lie anywhere


def test_refused(untrained):
    model, dataset = untrained
    with pytest.raises(UserError, match=r"points: have shape \(3,\), and this run's data \(10,\)"):
        dimension(model, dataset, points=torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"ratios: 1000 is not valid: .* trained at are 0.002 to 80"):
        dimension(model, dataset, ratios=[0.1, 1000.0])
    with pytest.raises(UserError, match=r"ratios: 0 is not valid: should be one or more numbers above 0"):
        dimension(model, dataset, ratios=[0.0])
    with pytest.raises(UserError, match="estimators: 'flipped' is not valid; did you mean 'flipd'"):
        dimension(model, dataset, estimators=["flipped"])
    with pytest.raises(UserError, match="probes: 0 is not valid"):
        dimension(model, dataset, probes=0)
    with pytest.raises(UserError, match="n: 201 is more than the 200 held-out items"):
        dimension(model, dataset, n=201)
    with pytest.raises(UserError, match="part: 'test' is not valid"):
        dimension(model, dataset, part="test")
    with pytest.raises(UserError, match="ratios: lidl takes a slope, and needs at least 2"):
        dimension(model, dataset, ratios=[0.1], estimators=["lidl"], n=2)
    with pytest.raises(UserError, match=f"rank needs whole Jacobians, of at most {MOST} values .* take flipd, with"):
        choose(["rank"], MOST + 1)
    with pytest.raises(UserError, match="normal-bundle needs a matrix of 16000 x 4000 for each point"):
        choose(["normal-bundle"], 4000)
    with pytest.raises(UserError, match="normal-bundle looks for a gap among singular values, and of one value is one"):
        choose(["normal-bundle"], 1)
    assert choose(None, 64) == ["flipd", "normal-bundle", "rank", "flow", "kde"]
    assert choose(None, 65) == ["flipd", "kde"]
    assert choose(None, 1) == ["flipd", "rank", "flow", "kde"]
    assert choose(None, 65, conditional=True) == ["flipd"]
    assert choose(list(ESTIMATORS), 10) == list(ESTIMATORS)

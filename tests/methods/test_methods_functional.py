"""Functional diffusion: what is learned, how it is read and sampled, on which grid, and what is known."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec, SeriesForm
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.methods import METHODS
from osmose.methods.functional import FunctionalConfig
from osmose.methods.messages import Batch
from osmose.networks.base import Everywhere
from osmose.networks.implicit import ImplicitConfig
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig
from osmose.networks.uvit import UViTConfig
from osmose.processes.modes import PublishedDrift, PublishedSpeed
from osmose.processes.spectrum import Harmonics, PowerSpectrum, PublishedSpectrum

UVIT = UViTConfig(width=16, depth=2, heads=2, patch=1)
IMPLICIT = ImplicitConfig(width=8, depth=2, inner_steps=1)
MLP = MLPConfig(width=32, depth=1)
LINE = DataSpec(kind="function", shape=(1, 8))
IMAGES = DataSpec(kind="image", shape=(2, 4, 6), range=(0, 4), shift=(2.0,), scale=(2.0,), num_classes=3)
SERIES = DataSpec(
    kind="series", shape=(1, 8), series=SeriesForm(columns=("x",), gap=0.5, span=3.5, memory=1.0, regular=True)
)
SOLVERS = ["posterior", "em", "pf-ode", "pc"]
WEIGHTINGS = ["prior", "posterior", "likelihood", "uniform"]
#: Variances of the modes of Gaussian data, which fall faster than those of the noise.
LAW = PowerSpectrum(exponent=1.5, variance=0.8)


def build(spec=LINE, noise=0.0, **parts):
    """A model whose network says 0, or with weights that are not zero, the same each time."""
    torch.manual_seed(0)
    model = FunctionalConfig(**{"network": UVIT, **parts}).build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def items(count, spec=LINE, basis="fourier", seed=0):
    """Gaussian functions, and the variances of their modes."""
    harmonics = Harmonics(basis, spec.shape[1:])
    variances = LAW.variances(harmonics)
    eps = torch.randn(count, *spec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(harmonics.values(eps * variances.sqrt()).float()), variances


class Silent(nn.Module, Everywhere):
    """A network that says nothing, sooner than others."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x, *_):
        return self.zero * x


def gaussian(**parts):
    """A model that knows the law of its Gaussian data, and whose network adds nothing."""
    model = build(**parts)
    model.network = Silent()
    model.spread.copy_(items(1)[1].expand(model.spread.shape))
    return model


def step(count=64, seed=0):
    return StepDraws(seed, 0, 0, count, count)


class Quick:
    """Draws of many items at once: a stream of its own for each takes longer than all else."""

    def __init__(self, count, seed=0):
        self.count, self.seed, self.generator = count, seed, torch.Generator().manual_seed(seed)

    def normal(self, shape):
        return torch.randn(self.count, *shape, generator=self.generator)

    def branch(self, name):
        return Quick(self.count, self.seed + len(name))


@torch.inference_mode()
def drawn(model, count=4000, seed=0, known=None, on_state=lambda *_: None, how="linear", **options):
    sampling = model.sampling(**options, fill=how)
    if known is None:
        return model.generate(Quick(count, seed), sampling, None, on_state)[0]
    return model.complete(known.expand(count, -1, -1), None, Quick(count, seed), sampling, None, on_state)[0]


# --- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    "parts", [{}, {"drift": PublishedDrift(), "speed": PublishedSpeed()}], ids=["const", "published"]
)
def test_the_loss_is_the_formula(weighting, parts):
    model = build(noise=0.3, weighting=weighting, **parts)
    model.spread.copy_(0.3 * torch.rand(1, 8, generator=torch.Generator().manual_seed(3)) + 0.1)
    batch, _ = items(64)
    terms = model.loss(batch, step())
    draws = step()
    t = 1e-3 + (1 - 1e-3) * draws.stratified()
    assert torch.equal(terms.t, t)
    harmonics, process = Harmonics("fourier", (8,)), model.fields.on((8,)).process
    c0 = harmonics.modes(batch.x0)
    m = (-process.rate * process.speed.total(t)[:, None])[:, None].exp()
    v = process.state
    c = m * c0 + (v * (1 - m**2)).sqrt() * draws.normal((1, 8))
    with torch.no_grad():
        error = (harmonics.modes(model.estimate(c.float(), t)) - c0).double().square()
    s = model.spread.double()
    weight = {
        "prior": 1 / v,
        "posterior": (m**2 * s + v * (1 - m**2)) / (s * v * (1 - m**2)),
        "likelihood": process.speed.at(t)[:, None, None] * m**2 * process.rate / (v * (1 - m**2) ** 2),
        "uniform": 8.0,
    }[weighting]
    torch.testing.assert_close(terms.per_item.double(), (weight * error).mean((1, 2)), rtol=2e-3, atol=1e-5)
    if weighting == "uniform":  # the mean over points
        torch.testing.assert_close(terms.parts["x0_error"], terms.per_item.detach())


def test_an_untrained_network_is_the_wiener_filter_and_its_error_that_of_gaussian_data():
    model = gaussian(weighting="posterior")
    _, s = items(1)
    process, t = model.fields.on((8,)).process, torch.tensor([0.1, 0.4]).double()
    c = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    gain = process.kept(t) * s / (process.kept(t) ** 2 * s + process.state * process.fresh(t))
    found = Harmonics("fourier", (8,)).modes(model.estimate(c, t))
    torch.testing.assert_close(found, gain[:, None].float() * c, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        loss = model.loss(items(4000)[0], step(4000)).per_item
    assert float(loss.mean()) == pytest.approx(1.0, abs=0.02)


def test_on_gaussian_data_a_trained_network_comes_near_the_filter_and_never_beats_it():
    model = build(network=MLP, parametrization="x0").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for index in range(250):
        optimizer.zero_grad()
        model.loss(items(128, seed=index + 1)[0], StepDraws(0, index, 0, 128, 128)).per_item.mean().backward()
        optimizer.step()
    batch, s = items(4000, seed=0)
    process, draws = model.fields.on((8,)).process, Quick(4000, 5)
    harmonics = Harmonics("fourier", (8,))
    c0 = harmonics.modes(batch.x0)
    for t in (0.2, 0.5):
        c = process.diffuse(c0, 0.0, t, draws.normal((1, 8)))
        with torch.no_grad():
            error = harmonics.modes(model.eval().estimate(c, torch.full((4000,), t).double())) - c0
        linear = process.filter(t, s).float() * c - c0
        trained, best = float(error.square().sum(2).mean()), float(linear.square().sum(2).mean())
        assert 0.98 * best < trained < 1.25 * best


def test_preparation_fits_the_moments_of_the_modes():
    model = build(IMAGES.replace(num_classes=None), basis="dct", spectrum=PowerSpectrum(exponent=1.25))
    x = torch.randn(500, 2, 4, 6, generator=torch.Generator().manual_seed(0)).cumsum(3) / 3 + 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare([Batch(x[:200]), Batch(x[200:])])
    c = Harmonics("dct", (4, 6)).modes(x)
    torch.testing.assert_close(model.mean, c.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.spread, c.var(0, correction=0), rtol=1e-4, atol=1e-6)


def test_what_people_should_know_of_the_noise():
    x = torch.randn(300, 1, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"the data are rougher than the noise: .* \|k\|\^-?0.\d and \|k\|\^-1.9"):
        build(spectrum=PowerSpectrum(exponent=1.5)).prepare([Batch(x)])
    with pytest.warns(UserWarning, match=r"speed.beta_max: 34% of a mode of the data are left at t = 1"):
        build(speed=PublishedSpeed(), drift=PublishedDrift(), spectrum=PowerSpectrum(exponent=0.6)).prepare([Batch(x)])
    model = build(DataSpec(kind="image", shape=(1, 16, 16)), spectrum=PublishedSpectrum())
    smooth = torch.randn(50, 1, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3)
    with pytest.warns(UserWarning, match="spectrum published: the variance of the noise has no limit"):
        model.prepare([Batch(smooth)])


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "low", "high"), [("posterior", 0.85, 1.0), ("em", 0.9, 1.15), ("pf-ode", 0.9, 1.1), ("pc", 0.9, 1.2)]
)
def test_samples_of_gaussian_data_have_their_variances(solver, low, high):
    model, (_, s) = gaussian(), items(1)
    found = Harmonics("fourier", (8,)).modes(drawn(model, count=3000, num_steps=120, solver=solver))[:, 0].var(0)
    ratio = found / s.float()
    assert low < float(ratio.min()) < float(ratio.max()) < high, ratio


@pytest.mark.parametrize(("solver", "nfe"), [("posterior", 6), ("em", 6), ("pf-ode", 6), ("pc", 16)])
def test_samples_do_not_depend_on_the_batch_and_say_what_they_cost(solver, nfe):
    model = build(IMAGES, noise=0.1, conditional=True, basis="dct")
    options = {"num_steps": 6, "solver": solver, "seed": 3}
    whole, parts = (model.sample(5, batch_size=size, **options) for size in (5, 2))
    torch.testing.assert_close(whole.data, parts.data, rtol=1e-3, atol=1e-4)
    assert (whole.nfe, tuple(whole.data.shape)) == (nfe, (5, 2, 4, 6))
    assert 0 <= float(whole.data.min()) <= float(whole.data.max()) <= 4
    assert whole.condition.tolist() == [0, 1, 2, 0, 1]
    paths = model.trajectories(2, **options)
    assert paths.done == tuple(range(7))


def test_of_pc_corrector_and_churn_can_be_set():
    model = build(noise=0.1)
    plain = model.sample(3, num_steps=4, solver="em").data
    assert model.sample(3, num_steps=4, solver="pc", churn=0).nfe == 7
    found = [model.sample(3, num_steps=4, solver="pc", **o).data for o in ({}, {"snr": 0.3}, {"churn": 2.0})]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations([plain, *found], 2))


def test_a_single_step_is_the_estimate_at_the_end():
    model = build(noise=0.2)
    draws = SampleDraws(0, 0, 4)
    c = draws.normal((1, 8)) * model.fields.on((8,)).process.state.sqrt().float()
    with torch.no_grad():
        expected = model.estimate(c, torch.ones(4).double())
    torch.testing.assert_close(model.sample(4, num_steps=1).data, expected)


# --- other grids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "resolution", "shape"),
    [(LINE, 16, (1, 16)), (LINE, 12, (1, 12)), (IMAGES, 9, (2, 6, 9)), (LINE, None, (1, 8))],
)
@pytest.mark.parametrize("network", [UVIT, IMPLICIT], ids=lambda n: n.kind)
def test_samples_on_other_grids(spec, resolution, shape, network):
    model = build(spec, noise=0.05, network=network)
    sampling = model.sampling(resolution=resolution)
    assert model.ends(sampling)[1].shape == shape
    assert model.ends(sampling)[1].range == spec.range
    data = model.sample(3, num_steps=3, resolution=resolution).data
    assert tuple(data.shape) == (3, *shape)
    assert bool(data.isfinite().all())


def test_a_seed_is_one_function_on_every_grid():
    model = gaussian()
    coarse, fine = (drawn(model, num_steps=40, resolution=n)[:, 0] for n in (8, 32))
    same = fine[:, ::4]
    assert float(torch.corrcoef(torch.stack([same.flatten(), coarse.flatten()]))[0, 1]) > 0.95
    assert float(same.var() / coarse.var()) == pytest.approx(1, abs=0.1)
    other = drawn(model, num_steps=40, seed=1)[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([other.flatten(), coarse.flatten()]))[0, 1])) < 0.1


def test_beyond_the_frequencies_of_the_data_samples_are_smooth():
    model = gaussian()
    mean, spread = model._moments((32,))
    assert float(mean.abs().max()) == 0
    torch.testing.assert_close(spread[0, :7], items(1)[1][:7], rtol=1e-5, atol=0)
    assert float(spread[0, 8:].max()) == 0
    c = Harmonics("fourier", (32,)).modes(drawn(model, count=50, num_steps=20, resolution=32))
    assert float(c[..., 8:].abs().max()) < 1e-5


# --- what is known --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_known_stays_and_nothing_known_is_nothing_new(solver):
    model = build(IMAGES, noise=0.05, basis="dct")
    known = torch.full((3, 2, 4, 6), math.nan)
    options = {"num_steps": 5, "solver": solver, "seed": 2}
    torch.testing.assert_close(model.sample(3, known=known, **options).data, model.sample(3, **options).data)
    known[:, :, 1, ::2] = torch.tensor([0.0, 1.5, 4.0])
    some = model.sample(3, known=known, **options).data
    assert torch.equal(some[~known.isnan()], known[~known.isnan()])
    assert (some - model.sample(3, **options).data)[known.isnan()].abs().max() > 1e-3
    whole = torch.rand(3, 2, 4, 6) * 4
    assert torch.equal(model.sample(3, known=whole, **options).data, whole)


def test_known_points_follow_the_diffused_truth():
    model = gaussian()
    known = torch.full((1, 1, 8), math.nan)
    known[..., 2], known[..., 5] = 1.5, -0.7
    states = []

    drawn(model, known=known, on_state=lambda _, __, state: states.append(state.clone()), num_steps=21)
    process = model.fields.on((8,)).process
    times = torch.linspace(1.0, 1e-3, 21, dtype=torch.float64)
    for index in (0, 10, 15):
        t, x = float(times[index]), states[index][:, 0]
        m = float(process.kept(t)[0])
        for place, value in ((2, 1.5), (5, -0.7)):
            begin = 0.0 if index == 0 else m * value
            assert float(x[:, place].mean()) == pytest.approx(begin, abs=0.06)
            assert float(x[:, place].std()) == pytest.approx(float(process.fresh(t)[0]) ** 0.5, abs=0.04)


def test_equal_rates_need_not_be_for_known_points_to_stay():
    model = build(noise=0.1, drift=PublishedDrift(), speed=PublishedSpeed(beta_max=20.0), basis="dct")
    known = torch.full((2, 1, 8), math.nan)
    known[..., 3] = 0.4
    for fill in ("linear", "replace"):
        x = model.sample(2, known=known, num_steps=5, fill=fill).data
        assert torch.equal(x[..., 3], known[..., 3])
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("solver", ["posterior", "em"])
def test_of_gaussian_data_what_is_unknown_has_its_law_given_what_is_known(solver):
    model, (_, s) = gaussian(), items(1)
    known = torch.full((1, 1, 8), math.nan)
    known[..., [0, 1, 4]] = torch.tensor([2.0, 1.0, -1.0])
    x = drawn(model, known=known, num_steps=100, solver=solver)[:, 0]
    points = Harmonics("fourier", (8,)).values(torch.eye(8).double())
    covariance, there = points.mT @ torch.diag(s) @ points, [0, 1, 4]
    gain = covariance[:, there] @ covariance[there][:, there].inverse()
    mean = (gain @ known[0, 0, there].double()).float()
    left = (covariance - gain @ covariance[there]).diagonal().clamp(min=0).sqrt().float()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(x.std(0), left, rtol=0.1, atol=0.01)
    # What is published hears of it too, and not enough.
    replaced = drawn(model, known=known, num_steps=100, solver=solver, how="replace")[:, 0].mean(0)
    assert float((replaced - mean).abs().max()) > 0.1
    assert float(((replaced - mean) * mean).sum()) < 0


# --- anywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [UVIT, IMPLICIT, IMPLICIT.replace(y_input=True)], ids=["uvit", "implicit", "told"])
def test_samples_may_be_looked_at_anywhere(network):
    model = build(network=network, noise=0.05)
    whole = model.sample(3, num_steps=4, seed=5)
    grid = [(i / 8,) for i in range(8)]
    some = model.sample(3, num_steps=4, seed=5, at=[*grid[3:5], (0.4375,)])
    assert some.data.shape == (3, 1, 3)
    torch.testing.assert_close(some.data[..., :2], whole.data[..., 3:5], rtol=1e-4, atol=1e-5)
    assert some.nfe == whole.nfe + (network is IMPLICIT)  # which is a function itself, and is asked there
    between = model.fields.on((8,)).harmonics
    band = between.at(between.modes(whole.data), torch.tensor([[0.4375]]))
    same = torch.allclose(some.data[..., 2:], band, rtol=1e-4, atol=1e-5)
    assert same == (network is not IMPLICIT)


def test_the_network_of_coordinates_says_between_points_what_it_says_on_a_finer_grid():
    torch.manual_seed(0)
    network = IMPLICIT.build((1, 8))
    network.offset = 0.0
    x = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([100.0, 700.0])
    own = torch.arange(8)[:, None] / 8
    torch.testing.assert_close(network(x, t, points=own), network(x, t))
    assert network(x, t, points=torch.tensor([[0.3], [0.31]])).shape == (2, 1, 2)


def test_what_is_known_has_no_points():
    model = build()
    known = torch.full((2, 1, 8), math.nan)
    with pytest.raises(UserError, match="at: given with known; whole items are completed"):
        model.sample(2, known=known, at=[(i / 9,) for i in range(8)], num_steps=2)


def test_images_have_two_coordinates_and_all_their_channels():
    model = build(IMAGES, network=UVIT, basis="dct")
    assert model.sample(3, num_steps=2, at=[(0.1, 0.9)] * 5).data.shape == (3, 2, 5)


@pytest.mark.parametrize(
    ("spec", "at", "message"),
    [
        (LINE, [(0.5, 0.5)], "at: point 0 has 2 coordinates, and functions here have 1"),
        (LINE, [(0.5,), (1.5,)], r"at: point 1 is \(1.5,\); coordinates have to be in \[0, 1\]"),
        (LINE, [(math.nan,)], "at.0.0: nan is not valid"),
        (LINE, [], "at: no points given"),
        (SERIES, [(0.5,)], "at: given, and series are looked at by their times; take times"),
    ],
)
def test_points_that_are_refused(spec, at, message):
    with pytest.raises(UserError, match=message):
        build(spec).sampling(at=at)


# --- the bound ------------------------------------------------------------------------------------------------------


def bound(model, x0, steps, **options):
    with torch.no_grad():
        return model.bound(Batch(x0), Quick(len(x0)), lambda *_: None, num_steps=steps, **options)


def test_the_bound_of_gaussian_data_is_their_entropy_from_above():
    """With the exact estimate all that it has too much are the steps and the start, both known in closed form."""
    model = gaussian()
    x0 = items(1500)[0].x0
    s, process = items(1)[1], model.fields.on((8,)).process
    # -log p of values: the entropy of the modes, and the size of a mode among values.
    entropy = float((1 + (2 * math.pi * s).log()).sum()) / 16 + math.log(8) / 2
    found = []
    for steps in (25, 100, 400):
        terms = bound(model, x0, steps)
        assert terms.is_density
        assert not terms.is_exact
        found.append(float((terms.prior + terms.steps.sum(1)).mean()) - entropy)
        if steps == 100:
            t = terms.t.tolist()
            excess = 0.0
            for late, early in itertools.pairwise(t[::-1]):
                error = s * process.state * process.fresh(late) / process.variance(late, s)
                excess += float((process.step_weights(late, early) * error).sum()) / 8
            torch.testing.assert_close(float(terms.steps[:, 1:].sum(1).mean()), excess, rtol=0.02, atol=0)
    assert found[0] > found[1] > found[2] > 0
    assert found[2] < 0.07
    with torch.no_grad():  # another model of the same data is worse
        model.network = build(noise=0.2).network
        assert float((bound(model, x0, 100).steps.sum(1)).mean()) - entropy > 2 * found[1]


def test_the_bound_is_in_units_of_the_data():
    x0 = items(50)[0].x0
    plain = gaussian()
    scaled = gaussian(spec=LINE.replace(shift=(5.0,), scale=(4.0,)))
    a, b = (bound(model, x0, 20) for model in (plain, scaled))
    torch.testing.assert_close(b.steps.sum(1) - a.steps.sum(1), torch.full((50,), math.log(4.0)).double())
    torch.testing.assert_close(a.x0_error, b.x0_error)


def test_levels_have_probabilities():
    spec = DataSpec(kind="image", shape=(1, 4, 6), range=(0, 4), levels=5, shift=(2.0,), scale=(2.0,))
    model = build(spec, basis="dct", spectrum=PowerSpectrum(exponent=1.25))
    x = torch.randint(0, 5, (200, 1, 4, 6), generator=torch.Generator().manual_seed(0)).float()
    x0 = spec.encode(x)
    with pytest.warns(UserWarning, match="the data are rougher than the noise"):
        model.prepare([Batch(x0)])
    terms = bound(model, x0, 200)
    assert not terms.is_density
    assert float(terms.steps[:, 0].mean()) < 1e-3  # of levels, so little noise hides nothing
    # The data are independent and all levels alike: nothing says them in less.
    assert float((terms.prior + terms.steps.sum(1)).mean()) > math.log(5) - 0.02
    with pytest.raises(
        UserError, match="variance: 'fixed_small' given, and the chain of fdp has that of its posterior"
    ):
        bound(model, x0, 5, variance="fixed_small")
    two = build(spec.replace(shape=(2, 4, 6), shift=(2.0, 1.0), scale=(2.0, 2.0)), basis="dct")
    with pytest.raises(UserError, match="likelihood: fdp needs the same levels in all channels"):
        bound(two, torch.zeros(1, 2, 4, 6), 5)


# --- kinds of data --------------------------------------------------------------------------------------------------


def test_regular_series_are_functions_of_their_times():
    model = build(SERIES, noise=0.05)
    samples = model.sample(4, num_steps=3)
    assert torch.equal(samples.times, torch.linspace(0, 3.5, 8).double().repeat(4, 1))
    known = torch.full((4, 1, 8), math.nan)
    known[..., :3] = 1.0
    found = model.sample(4, known=known, times=samples.times[0], num_steps=3).data
    assert torch.equal(found[..., :3], known[..., :3])
    # Drawn freely they are functions of any time, and the same ones.
    asked = torch.tensor([0.0, 1.5, 1.6, 3.5])
    between = model.sample(4, times=asked, num_steps=3)
    torch.testing.assert_close(between.data[..., [0, 1, 3]], samples.data[..., [0, 3, 7]], rtol=1e-4, atol=1e-5)
    assert torch.equal(between.times[0], asked.double())
    with pytest.raises(
        UserError, match=r"times: reach from 0 to 4, and functions here from 0 to 3.5; dspd and cspd go"
    ):
        model.sample(4, times=torch.arange(5), num_steps=3)
    with pytest.raises(UserError, match="times: differ between samples"):
        model.sample(2, times=torch.stack([asked, asked / 2]), num_steps=3)
    # Told of values, they are on a grid.
    some = torch.full((4, 1, 8), math.nan)
    some[..., 0] = 1.0
    with pytest.raises(UserError, match="times: 5 given, and fdp has a grid of 8; dspd and cspd take any times"):
        model.sample(4, known=some[..., :5], times=torch.arange(5), num_steps=3)
    with pytest.raises(UserError, match="times: are not evenly spaced, and fdp needs a grid; cspd takes any times"):
        model.sample(4, known=some, times=torch.arange(8) ** 2, num_steps=3)
    with pytest.raises(UserError, match=r"times: lie 2 apart, and those of the data 0.5; cspd takes any times"):
        model.sample(4, known=some, times=2 * torch.arange(8), num_steps=3)
    with pytest.raises(UserError, match="resolution: 16 given, and series have times of their own; take times"):
        model.sampling(resolution=16)
    with pytest.raises(UserError, match="not evenly spaced"):
        model.prepare([Batch(torch.zeros(2, 1, 8), times=torch.arange(8).double()[None] ** 2)])


@pytest.mark.parametrize(
    ("spec", "network"),
    [
        (IMAGES, UNetConfig(channels=8, mult=(1, 2), blocks=1, attention=())),
        (IMAGES, MLP),
        (LINE, IMPLICIT),
        (IMAGES, IMPLICIT.replace(adapt="modulation")),
    ],
    ids=["unet", "mlp", "implicit", "modulation"],
)
def test_any_network_will_do(spec, network):
    model = build(spec, network=network, basis="dct").train()
    assert (model.filters, model.weighting) == ((False, "prior") if network.kind == "implicit" else (True, "posterior"))
    assert (model.not_compiled is None) is model.filters
    terms = model.loss(items(8, spec, "dct")[0], step(8))
    terms.per_item.mean().backward()
    assert bool(terms.per_item.isfinite().all())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert tuple(model.eval().sample(2, num_steps=2).data.shape) == (2, *spec.shape)
    model.probe(2)


def test_the_inner_loss_weighs_modes_by_their_noise():
    model = build(network=IMPLICIT)
    eps = torch.randn(3000, 1, 8, generator=torch.Generator().manual_seed(0))
    noise = Harmonics("fourier", (8,)).values(eps * model.fields.on((8,)).process.state.sqrt().float())
    found = torch.stack([model.network.whiten(x) for x in noise[:50]])
    torch.testing.assert_close(found, eps[:50], rtol=1e-3, atol=1e-4)
    assert model.network.offset == 0.0
    assert build(IMAGES, network=IMPLICIT, basis="dct").network.offset == 0.5


def test_the_recipe():
    for shape in ((1, 8, 8), (3, 28, 28), (1, 5, 7)):
        recipe = FunctionalConfig.recipe(DataSpec(kind="image", shape=shape), 0.5)
        assert (recipe["basis"], recipe["network"]["kind"]) == ("dct", "unet")
        assert METHODS.parse({"kind": "fdp", **recipe}).build(DataSpec(kind="image", shape=shape)).filters
    for spec, basis in ((LINE, "fourier"), (SERIES, "dct")):
        recipe = FunctionalConfig.recipe(spec, 1.0)
        assert recipe["basis"] == basis
        assert METHODS.parse({"kind": "fdp", **recipe}).build(spec).config.network.patch == 1
        assert FunctionalConfig.training_recipe(spec)["steps"] == 2000


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"spec": DataSpec(kind="points", shape=(2,))},
            r"fdp: needs functions on a grid, .* are points of shape \(2,\)",
        ),
        ({"spec": DataSpec(kind="function", shape=(1, 9000))}, r"grid: \(9000,\) is not valid"),
        ({"network": IMPLICIT, "parametrization": "filter"}, "parametrization: 'filter' is not for a network that is"),
        (
            {"network": MLP, "sampling": {"resolution": 16}},
            "sampling.resolution: 16 is not that of the data, 8, and mlp",
        ),
        ({"network": UVIT.replace(patch=2), "sampling": {"resolution": 12}}, "resolution: 12 is no multiple of 8"),
        ({"spec": IMAGES, "sampling": {"resolution": 8}}, "resolution: 8 points to 6 leave no whole number"),
        (
            {"sampling": {"resolution": 4}},
            "resolution: 4 is below that of the data, 8; draw at theirs",
        ),
        ({"sampling": {"resolution": 5000}}, r"sampling.grid: \(5000,\) is not valid"),
    ],
)
def test_what_is_refused_at_building(parts, message):
    with pytest.raises(UserError, match=message):
        build(**parts)


def test_values_that_are_refused():
    for name, value in (("basis", "wavelet"), ("weighting", "none"), ("sampling.solver", "ddim"), ("sampling.snr", 0)):
        with pytest.raises(ConfigError, match=f"{name}: .* is not valid"):
            FunctionalConfig(network=MLP).replace(**{name: value})
    model = build()
    with pytest.raises(UserError, match="data: hold NaN or infinity, and fdp needs every value"):
        model.prepare([Batch(torch.full((2, 1, 8), math.nan))])
    with torch.no_grad():
        next(model.network.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="fdp: the network answers NaN or infinity; has training diverged"):
        model.sample(2, num_steps=2)

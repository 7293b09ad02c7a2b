"""Diffusion of series: equal to diffusion of whitened series, exact on Gaussian processes, and what is refused."""

import math
import warnings

import pytest
import torch
from torch import nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec, SeriesForm
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import LinearSchedule
from osmose.methods import METHODS
from osmose.methods.messages import Batch
from osmose.methods.stochastic_process import SeriesProcess
from osmose.processes.kernels import OUKernel
from osmose.processes.oracles import sampled_covariance

LENGTH = 8


def spec(columns=1, length=LENGTH, regular=True, scale=1.0):
    form = SeriesForm(
        columns=tuple(f"c{i}" for i in range(columns)), gap=0.1, span=0.1 * (length - 1), memory=0.3, regular=regular
    )
    return DataSpec(kind="series", shape=(columns, length), scale=(scale,) * columns, series=form)


def built(kind="dspd", columns=1, regular=True, scale=1.0, length=LENGTH, **changes):
    torch.manual_seed(0)
    config = METHODS.parse(kind) if isinstance(kind, str) else kind
    values = {"horizon": 3, "network": {"kind": "transformer", "width": 16, "depth": 1}, **changes}
    return config.replace(**values).build(spec(columns, length, regular, scale)).double()


def grid(batch=1, length=LENGTH):
    return (0.1 * torch.arange(length, dtype=torch.float64)).repeat(batch, 1)


def irregular(batch, length=LENGTH, seed=3):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(1).values


class Exact(nn.Module):
    """E[U_0 | U_t] where U_0 given what is known is N(mean, covariance) at the hidden values of one column."""

    def __init__(self, model, mean, covariance):
        super().__init__()
        self.network, self.schedule = model.denoiser.network, model.denoiser.schedule
        self.mean, self.covariance, self.calls = mean, covariance, 0

    def forward(self, u, level, condition=None):
        alpha, sigma = float(level.alpha), float(level.sigma)
        unit = torch.eye(u.shape[2], dtype=u.dtype)
        gain = torch.linalg.solve(alpha**2 * self.covariance + sigma**2 * unit, alpha * self.covariance, left=False)
        return (self.mean + (u - alpha * self.mean) @ gain.T) * condition.hidden


class Proportional(nn.Module):
    """Answers a multiple of one of the groups of features: 0 is X_t, 1 is U_t."""

    def __init__(self, columns, group, factor=0.3):
        super().__init__()
        self.rows, self.factor = slice(group * columns, (group + 1) * columns), factor

    def forward(self, features, *_):
        return self.factor * features[:, self.rows]


def drawn(count=4, columns=1, length=LENGTH, seed=1):
    return torch.randn(count, columns, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_white_noise_is_ordinary_diffusion_to_the_last_digit():
    ours = built(columns=2, kernel="white", task="generate", parametrization="eps")
    ours.denoiser.network.body = Proportional(2, 0)
    schedule = LinearSchedule(num_steps=100, beta_start=1e-5).to_json()
    plain = METHODS.parse({"kind": "ddpm", "schedule": schedule, "network": "mlp"}).build(spec(2)).double()
    plain.denoiser.network = _Times(0.3)
    x0 = drawn(columns=2)
    batch = Batch(x0, times=grid(4))
    losses = [m.loss(batch, StepDraws(0, 5, 0, 4, 4)).per_item for m in (ours.train(), plain.train())]
    assert torch.allclose(*losses, rtol=1e-12)
    for solver in ({"kind": "ancestral"}, {"kind": "ddim"}, {"kind": "dpmpp-2m"}):
        options = {"num_steps": 20, "solver": solver}
        nothing = torch.full((3, 2, LENGTH), math.nan)
        a, _ = ours.complete(nothing, grid(3), SampleDraws(0, 0, 3), ours.sampling(**options), None, _quiet)
        b, _ = plain.generate(SampleDraws(0, 0, 3), plain.sampling(**options), None, _quiet)
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)


class _Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, *_):
        return self.factor * x


def _quiet(*_):
    pass


@pytest.mark.parametrize("kernel", [{"kind": "ou", "length_scale": 0.3}, {"kind": "gp", "length_scale": 0.2}])
def test_correlated_noise_is_white_noise_of_the_whitened_series(kernel):
    coloured, white = built(kernel=kernel, task="generate"), built(kernel="white", task="generate")
    for model in (coloured, white):
        model.denoiser.network.body = Proportional(1, 1)  # a function of U alone
    times, nothing = irregular(3), torch.full((3, 1, LENGTH), math.nan, dtype=torch.float64)
    factor = coloured.config.kernel.factor(times)
    made = [
        m.complete(nothing, times, SampleDraws(0, 0, 3), m.sampling(num_steps=15), None, _quiet)[0]
        for m in (coloured, white)
    ]
    assert torch.allclose(made[0], factor.color(made[1]), atol=1e-9)
    x = drawn(3)
    draws = [StepDraws(0, 7, 0, 3, 3) for _ in range(2)]
    losses = [
        coloured.loss(Batch(x, times=times), draws[0]).per_item,
        white.loss(Batch(factor.whiten(x), times=times), draws[1]).per_item,
    ]
    assert torch.allclose(*losses, rtol=1e-9)
    bounds = [
        coloured.bound(Batch(x, times=times), SampleDraws(0, 0, 3), _quiet),
        white.bound(Batch(factor.whiten(x), times=times), SampleDraws(0, 0, 3), _quiet),
    ]
    nats = [LENGTH * (b.prior + b.steps.sum(1)) for b in bounds]
    assert torch.allclose(nats[0] - nats[1], factor.log_det().sum((1, 2)), atol=1e-9)


def test_errors_of_raw_output_are_weighted_by_the_covariance():
    whitened, raw = built(task="generate"), built(task="generate", output="raw")
    batch, draws = Batch(drawn(), times=grid(4)), StepDraws(0, 3, 0, 4, 4)
    # Networks begin at 0: the loss is the target itself, in one unit or the other.
    level = whitened.config.schedule.level(whitened.times.draw(draws.again())[0])
    assert level.t.shape == (4,)
    setting, x = whitened.hiding.hide(batch, draws)
    u0 = whitened._whiten(x, setting)
    t, _ = whitened.times.draw(draws)
    eps = whitened._noise(draws, setting).double()
    level = whitened.config.schedule.level(t)
    target = whitened.denoiser.target(u0, eps, level)
    expected = [target.square().mean((1, 2)), setting.factor.color(target).square().mean((1, 2))]
    for model, wanted in zip((whitened, raw), expected, strict=True):
        assert torch.allclose(model.loss(batch, StepDraws(0, 3, 0, 4, 4)).per_item, wanted, rtol=1e-6)


def test_the_sampler_has_the_covariance_of_the_closed_form():
    data, model = OUKernel(length_scale=0.2), built(kernel={"kind": "ou", "length_scale": 1.0}, task="generate")
    times = irregular(1)
    k, sigma = data.covariance(times)[0], model.config.kernel.covariance(times)[0]
    factor = model.config.kernel.factor(times)
    whole = factor.whiten(factor.whiten(k[None]).mT)[0]  # of U: C^-1 K C^-T
    model.denoiser = Exact(model, torch.zeros(LENGTH, dtype=torch.float64), whole)
    count = 10_000
    nothing = torch.full((count, 1, LENGTH), math.nan, dtype=torch.float64)
    options = model.sampling(num_steps=10)
    x, _ = model.complete(nothing, times.expand(count, -1), SampleDraws(0, 0, count), options, None, _quiet)
    expected = sampled_covariance(k, sigma, TimeGrid.of(model.config.schedule, 10))
    assert float((torch.cov(x[:, 0].T) - expected).abs().max()) < 0.05
    assert float((expected - k).abs().max()) > 0.1  # ten steps are few: the closed form is not that of the data


@pytest.mark.parametrize("pinned", [True, False])
def test_exact_conditional_denoisers_give_kriging(pinned):
    kernel = OUKernel(length_scale=0.3)
    model = built(kernel=kernel.to_json(), task="impute", pinned=pinned)
    times, count = irregular(1), 10_000
    hidden = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool)[None, None]
    values = torch.where(hidden, math.nan, drawn(1))
    right = kernel.factor(times, hidden, ~hidden)
    mean = right.expect(values.nan_to_num())[0, 0]
    unit = torch.eye(LENGTH, dtype=torch.float64)
    root = right.color(unit[:, None])[:, 0].T
    # The law of U = C^-1 (X - m) in the model's own C and m.
    own = kernel.factor(times, hidden, ~hidden, pinned=pinned)
    base = own.expect(values.nan_to_num())[0, 0]
    h = hidden[0, 0]
    whiten = own.whiten(unit[:, None])[:, 0].T
    model.denoiser = Exact(model, (whiten @ (mean - base)) * h, (whiten @ root @ root.T @ whiten.T))
    x, _ = model.complete(
        values.expand(count, -1, -1), times.expand(count, -1), SampleDraws(0, 0, count), model.sampling(), None, _quiet
    )
    assert torch.allclose(x[:, 0].mean(0)[h], mean[h], atol=0.04)
    assert torch.equal(x[:, 0, ~h], values[0, 0, ~h].expand(count, -1))
    assert float((torch.cov(x[:, 0].T) - root @ root.T).abs().max()) < 0.05
    if pinned:
        assert torch.allclose(whiten @ root @ root.T @ whiten.T, torch.diag(h.double()), atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_likelihoods_of_gaussian_series(scale):
    data, times = OUKernel(length_scale=0.15), irregular(1)
    k = data.covariance(times)[0]
    x = (torch.linalg.cholesky(k) @ drawn(6)[:, 0].T).T[:, None]
    root = torch.linalg.cholesky(k)
    right = -0.5 * torch.linalg.solve_triangular(root, x[:, 0].T, upper=False).square().sum(0)
    right = right - root.diagonal().log().sum() - LENGTH / 2 * math.log(2 * math.pi) - LENGTH * math.log(scale)
    found = {}
    for kind in ("dspd", "cspd"):
        model = built(kind, kernel={"kind": "ou", "length_scale": 0.4}, task="generate", scale=scale)
        factor = model.config.kernel.factor(times)
        model.denoiser = Exact(
            model, torch.zeros(LENGTH, dtype=torch.float64), factor.whiten(factor.whiten(k[None]).mT)[0]
        )
        copies, steps = (500, 4) if kind == "dspd" else (1, 100)  # each step of the bound is estimated with one noise
        batch = Batch(x.repeat(copies, 1, 1), times=times.expand(6 * copies, -1))
        terms = model.bound(batch, SampleDraws(0, 0, 6 * copies), _quiet, num_steps=steps)
        assert (terms.is_density, terms.is_exact) == (True, kind == "cspd")
        found[kind] = -LENGTH * (terms.prior + terms.steps.sum(1)).view(copies, 6).mean(0)
    assert torch.allclose(found["cspd"], right, atol=5e-3)
    gap = right - found["dspd"]
    assert 0.5 < float(gap.mean()) < 5.0  # four steps are few
    assert float(gap.min()) > -0.5


def test_the_bound_counts_hidden_values_alone():
    model = built(task="forecast", kernel="white")
    batch = Batch(drawn(5), times=grid(5))
    terms = model.bound(batch, SampleDraws(0, 0, 5), _quiet)
    # A network that answers 0 has x0_hat = alpha u: all terms in closed form, for 3 hidden values.
    total = torch.zeros(5, dtype=torch.float64)
    hidden = batch.x0[:, 0, 5:]
    schedule = model.config.schedule
    assert terms.steps.shape == (5, 100)
    last = float(schedule.alpha(1.0))
    total += 0.5 * ((last * hidden).square() - math.log(1 - last**2) + (1 - last**2) - 1).mean(1)
    assert torch.allclose(terms.prior, total, atol=1e-9)


TASKS = ["generate", "forecast", "impute", "any"]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_hidden_is_the_task(task):
    model, generator = built(columns=2, task=task, regular=False), torch.Generator().manual_seed(5)
    x0 = drawn(400, 2)
    x0[torch.rand(x0.shape, generator=generator) < 0.2] = math.nan
    times = irregular(400)
    times[:100, 6:] = math.nan
    x0[:100, :, 6:] = math.nan
    setting, _ = model.hiding.hide(Batch(x0, times=times), StepDraws(0, 0, 0, 400, 400))
    there, hidden = x0.isfinite(), setting.hidden > 0
    assert not (hidden & ~there).any()
    assert torch.equal((setting.known > 0) | hidden, there)
    late = torch.arange(LENGTH) >= torch.where(torch.arange(400)[:, None] < 100, 6, LENGTH) - 3
    all_hidden, horizon = (hidden == there).flatten(1).all(1), (hidden == (there & late[:, None])).flatten(1).all(1)
    if task == "generate":
        assert all_hidden.all()
    elif task == "forecast":
        assert horizon.all()
    else:
        share = hidden.sum((1, 2)) / there.sum((1, 2))
        assert float(share.std()) > 0.05
        assert float(share.mean()) == pytest.approx({"impute": 0.5, "any": (1 + 3 / 7.5 + 0.5) / 3}[task], abs=0.06)
        assert float(all_hidden.double().mean()) == pytest.approx({"impute": 0.1, "any": 0.36}[task], abs=0.1)


def test_local_units_are_those_of_what_is_known():
    model = built(task="forecast", local=True, kernel={"kind": "brownian", "origin": -1.0})
    x0 = 1000 * drawn(3) + 100  # what is added to a small deviation is nothing beside this one
    setting, x = model.hiding.hide(Batch(x0, times=grid(3)), StepDraws(0, 0, 0, 3, 3))
    seen = x[:, 0, :5]
    assert torch.allclose(seen.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(seen.std(1, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)
    # A walk that is pinned expects the last value.
    assert torch.allclose(setting.base[:, 0, 5:], x[:, 0, 4:5].expand(-1, 3), atol=1e-9)
    moved = [
        model.loss(Batch(values, times=grid(3)), StepDraws(0, 1, 0, 3, 3)).per_item for values in (x0, 7 * x0 - 50)
    ]
    assert torch.allclose(*moved, rtol=1e-5)
    flat = torch.full_like(x0, 3.0)
    assert model.loss(Batch(flat, times=grid(3)), StepDraws(0, 1, 0, 3, 3)).per_item.isfinite().all()


def test_absent_values_have_no_influence():
    model = built(columns=2, task="forecast", regular=False).eval()
    for parameter in model.denoiser.network.body.parameters():
        nn.init.normal_(parameter, std=0.2)
    x0, times = drawn(2, 2), irregular(2)
    x0[0, 1, 2] = math.nan
    x0[1, :, 6:], times[1, 6:] = math.nan, math.nan
    setting, x = model.hiding.hide(Batch(x0, times=times), StepDraws(0, 0, 0, 2, 2))
    u = model._whiten(x, setting)
    out = model.denoiser.network(u, torch.full((2,), 500.0), setting)
    alone = model.hiding.setting(x0[1:, :, :6], times[1:, :6], setting.hidden[1:, :, :6] > 0, None)
    again = model.denoiser.network(u[1:, :, :6], torch.full((1,), 500.0), alone)
    assert torch.allclose(out[1:, :, :6], again, atol=1e-9)
    assert not out[1, :, 6:].any()


def test_prepare_measures_whitened_columns_and_keeps_times():
    model = built(columns=2, task="generate", regular=False, kernel={"kind": "ou", "length_scale": 0.3})
    times, factor = irregular(640), model.config.kernel.factor(irregular(640))
    x = factor.color(drawn(640, 2)) * torch.tensor([[0.5], [3.0]])
    model.prepare([Batch(x, times=times)])
    assert model.denoiser.network.scale.flatten().tolist() == pytest.approx([0.5, 3.0], rel=0.1)
    nothing, kept = model.given_for(SampleDraws(0, 0, 50))
    assert nothing.isnan().all()
    assert all(bool(((row - times).abs() < 1e-12).all(1).any()) for row in kept)
    assert len(kept.unique(dim=0)) > 10
    assert torch.equal(model.given_for(SampleDraws(0, 10, 5))[1], kept[10:15])  # sample i is the same in any batch


def test_samples_are_what_is_asked_for():
    model = built(columns=2, task="any", regular=False, scale=2.0).float()
    model.prepare([Batch(drawn(64, 2).float(), times=irregular(64))])
    free = model.sample(5, num_steps=3, batch_size=2)
    assert free.data.shape == (5, 2, LENGTH)
    assert free.times.shape == (5, LENGTH)
    at = model.sample(3, num_steps=3, times=[0.0, 0.25, 0.5])
    assert at.data.shape == (3, 2, 3)
    known = torch.full((3, 2, 4), math.nan)
    known[:, 0, :2] = torch.tensor([1.2345678, -7.0])
    filled = model.sample(3, num_steps=3, known=known, times=[0.0, 0.25, 0.5, 0.75])
    assert torch.equal(filled.data[:, 0, :2], known[:, 0, :2])
    assert filled.data.isfinite().all()
    paths = model.trajectories(2, num_steps=3, known=known[:2], times=[0.0, 0.25, 0.5, 0.75])
    assert paths.states.shape == (2, 4, 2, 4)


def test_a_model_of_forecasts_continues_training_items_if_not_told_otherwise():
    model = built(columns=2, task="forecast", regular=False).float()
    x0, times = drawn(64, 2).float(), irregular(64)
    x0[::2, 1, 1] = math.nan
    model.prepare([Batch(x0, times=times)])
    made = model.sample(20, num_steps=2)
    known, at = model.given_for(SampleDraws(0, 0, 20))
    assert torch.equal(made.times, at)
    assert torch.equal(made.data[..., :5].isnan(), known[..., :5].isnan())
    seen = known.isfinite()
    assert torch.equal(made.data[seen], known[seen])
    assert made.data[..., 5:].isfinite().all()
    rows = [int((times - row).abs().sum(1).argmin()) for row in at]
    assert torch.allclose(made.data[..., :5], x0[rows][..., :5], equal_nan=True)


def test_a_forecast_leaves_gaps_before_it_alone():
    model = built(task="forecast").float()
    known = torch.tensor([[[1.0, math.nan, 2.0, math.nan, math.nan]]])
    made = model.sample(1, num_steps=2, known=known, times=0.1 * torch.arange(5.0)).data[0, 0]
    assert made.isfinite().tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("kind", ["v", "eps"])
def test_absent_values_add_nothing_to_a_density(kind):
    model = built("cspd", task="generate", regular=False, parametrization=kind, length=12)
    for parameter in model.denoiser.network.body.parameters():
        nn.init.normal_(parameter, std=0.1)
    x0, times = drawn(2, length=12), irregular(2, length=12)
    x0[:, :, 6:], short_times = math.nan, times[:, :6].clone()
    times[:, 6:] = math.nan
    long = model.bound(Batch(x0, times=times), SampleDraws(0, 0, 2), _quiet, num_steps=10)
    short = model.bound(Batch(x0[:, :, :6], times=short_times), SampleDraws(0, 0, 2), _quiet, num_steps=10)
    a, b = (terms.prior + terms.steps.sum(1) for terms in (long, short))
    assert torch.allclose(a, b, atol=1e-6)


def test_items_without_a_history_are_not_kept_to_go_on_from():
    model = built(task="forecast", regular=False).float()
    x0, times = drawn(64).float(), irregular(64)
    x0[::2, :, :5] = math.nan
    model.prepare([Batch(x0, times=times)])
    assert model.sample(30, num_steps=2).data[..., 5:].isfinite().all()
    x0[:, :, :5] = math.nan
    with pytest.raises(UserError, match="horizon: 3 is not valid: no series has a value before its last 3 times"):
        model.prepare([Batch(x0, times=times)])


@pytest.mark.parametrize(
    ("times", "words"), [([0.0, 500.0, 5000.0], "cover 5000, and those of training"), ([0.0, 1e-4], "apart, and those")]
)
def test_times_unlike_those_of_training_are_complained_of(times, words):
    model = built(task="generate").float()
    model.prepare([Batch(drawn().float(), times=grid(4))])
    with pytest.warns(UserWarning, match=words):
        model.sample(1, num_steps=2, times=times)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(1, num_steps=2, times=grid()[0])


def test_times_that_begin_elsewhere_are_complained_of_where_time_itself_matters():
    model = built(task="generate").float()
    model.prepare([Batch(drawn().float(), times=grid(4))])
    later = grid()[0] + 100
    with pytest.warns(UserWarning, match="times: begin between .* and those of training between"):
        model.sample(1, num_steps=2, times=later)
    counted = DataSpec.parse(model.spec.to_json() | {"series": model.spec.series.to_json() | {"from_first": True}})
    model.spec = counted  # its times count from the first of each item
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(1, num_steps=2, times=later)


def test_one_compiled_network_and_one_probe():
    model = built(columns=2)
    model.float().probe(3)
    assert [type(n).__name__ for n in model.networks()] == ["SeriesNetwork"]


REFUSED = [
    ({"horizon": 8}, r"horizon: 8 is not valid: items have 8 times, and some must be known"),
    ({"local": True, "task": "generate"}, "local: true measures from what is known"),
    (
        {"kernel": {"kind": "brownian", "origin": 0.0}},
        r"kernel\.origin: 0 is not valid: must lie before the first time",
    ),
    ({"sampling": {"num_steps": 200}}, r"sampling\.num_steps: 200 is more than the 100 steps"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        built(**changes)


def test_values_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="length_scale: -1 is not valid"):
        METHODS.parse({"kind": "dspd", "kernel": {"kind": "ou", "length_scale": -1}})
    with pytest.raises(UserError, match="learns from series"):
        METHODS.parse("dspd").build(DataSpec(kind="points", shape=(2,)))
    gaps = spec(regular=False)
    with pytest.raises(UserError, match="gaps or times of their own; dspd and cspd learn from them"):
        METHODS.parse({"kind": "ddpm", "network": "mlp"}).build(gaps)


def test_what_a_run_has_not_learned_to_fill_in_is_refused():
    known = torch.tensor([[[1.0, 2.0, math.nan, math.nan, math.nan, math.nan]]])
    times = 0.1 * torch.arange(6.0)
    with pytest.raises(UserError, match="learned with task=generate, to draw whole series"):
        built(task="generate").float().sample(1, known=known, times=times)
    with pytest.raises(UserError, match="horizon: 4 times asked for, and this run learned to forecast 3"):
        built(task="forecast").float().sample(1, known=known, times=times)
    with pytest.raises(UserError, match="nothing is, and this run learned with task=forecast"):
        built(task="forecast").float().sample(1, times=times)
    with pytest.raises(UserError, match="values of series need their times"):
        built().float().sample(1, known=known)
    with pytest.raises(UserError, match=r"known: shape \(1, 1, 6\) given for 2 samples; \(2, 1, 6\) is right"):
        built().float().sample(2, known=known, times=times)
    with pytest.raises(UserError, match=r"times: 0 comes after 0\.1 in series 0"):
        built().float().sample(1, times=[0.1, 0.0])


def test_a_kernel_in_other_units_is_complained_of():
    model = built(kernel={"kind": "ou", "length_scale": 1e-3})
    model.prepare([Batch(drawn(), times=grid(4))])
    assert "which is white noise" in model.complaints()[0]
    assert isinstance(model, SeriesProcess)

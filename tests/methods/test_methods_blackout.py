import math
import warnings

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.discrete.death import CosineSurvival, LogitSurvival, binomial_matrix, mean_surprise
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.methods import METHODS
from osmose.methods.blackout import BlackoutConfig
from osmose.methods.messages import Batch
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

MLP = MLPConfig(width=16, depth=1)
ROWS = DataSpec(kind="counts", shape=(3,), range=(0, 6), levels=7, shift=(1.0, 2.5, 4.0), scale=(0.8, 1.5, 2.0))
IMAGES = DataSpec(kind="image", shape=(2, 4, 4), range=(0, 16), levels=17, shift=(8.0,), scale=(8.0,), num_classes=3)
BINARY = DataSpec(kind="image", shape=(1, 2, 2), range=(0, 255), levels=2, shift=(127.5,), scale=(127.5,))
SOLVERS = ["bridge", "bridge-round", "tau-leap", "binomial"]
OBJECTIVES = ["continuous", "instantaneous", "finite-time"]
WEIGHTINGS = ["likelihood", "paper", "uniform"]
LAW = torch.tensor([0.2, 0.05, 0.3, 0.1, 0.05, 0.0, 0.3], dtype=torch.float64)


def build(spec=ROWS, noise=0.0, share=None, **parts):
    """A model whose network says 0, or with weights that are not zero, the same each time."""
    torch.manual_seed(0)
    model = BlackoutConfig(**{"network": MLP, "sampling": {"num_steps": 2}, **parts}).build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
        if share is not None:
            model.share.copy_(torch.as_tensor(share).expand(model.share.shape))
    return model.eval()


def batch_of(count, share, spec=ROWS, seed=0):
    """Items of independent Binomial values."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.as_tensor(share).expand(spec.shape)
    units = torch.rand(count, *spec.shape, spec.levels - 1, generator=generator) < chance[..., None]
    return Batch(spec.from_levels(units.sum(-1)))


class Quick:
    """Draws of many items at once: a stream of its own for each takes longer than all else."""

    def __init__(self, count, seed=0):
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def stratified(self):
        place = torch.randperm(self.count, generator=self.generator)
        return (place + torch.rand(self.count, generator=self.generator, dtype=torch.float64)) / self.count

    def uniform(self):
        return torch.rand(self.count, generator=self.generator, dtype=torch.float64)

    def binomial(self, n, p):
        return torch.binomial(n.double(), p.double(), generator=self.generator).long()


def entropy_of_binomial(most, b):
    law = torch.tensor([math.comb(most, k) * b**k * (1 - b) ** (most - k) for k in range(most + 1)]).double()
    return float(-(law * law.log()).sum())


def bound(model, batch, draws=None, **options):
    with torch.inference_mode():
        return model.bound(batch, draws or SampleDraws(3, 0, len(batch.x0)), lambda *_: None, **options)


def odds(n, most, p, b):
    return (most - n) * b * (1 - p) / (1 - b * p)


# --- what the network is read as ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LogitSurvival(t_end=15), CosineSurvival(t_end=6)], ids=lambda s: s.kind)
def test_a_network_that_says_nothing_is_the_best_of_independent_binomials(schedule):
    share = torch.tensor([0.03, 0.4, 0.995])
    model = build(share=share, schedule=schedule)
    n = torch.arange(7)[:, None].expand(7, 3)
    for s in (0.0, 0.003, 0.2, 0.5, 0.9, 1.0):
        u = schedule.log_odds(torch.tensor([s]))
        p, q = torch.sigmoid(u), torch.sigmoid(-u)
        b = share.double()
        want = (6 - n) * b * q / (1 - b + b * q)  # 1 - b p, with its digits
        got = model.missing(n, torch.full((7,), s, dtype=torch.float64))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-12)
        if s > 0.1:
            torch.testing.assert_close(got.double(), odds(n, 6, p, b), rtol=2e-5, atol=1e-7)


def test_by_odds_no_more_is_missing_than_what_can_be():
    model = build(noise=3.0)
    n = torch.randint(0, 7, (400, 3), generator=torch.Generator().manual_seed(0))
    y = model.missing(n, torch.linspace(0, 1, 400, dtype=torch.float64))
    assert bool(((y >= 0) & (y <= 6 - n)).all())
    assert y.std() > 0.3
    assert bool((y[n == 6] == 0).all())


def test_softplus_is_the_published_reading():
    model, said = build(noise=0.5, parametrization="softplus"), []
    model.network.register_forward_hook(lambda _, __, out: said.append(out))
    n = torch.tensor([[0, 1, 2], [3, 0, 6]])
    y = model.missing(n, torch.tensor([0.3, 0.8], dtype=torch.float64))
    torch.testing.assert_close(y, torch.log1p(said[0].exp()))
    # An answer above what can be missing comes back by its gradient, and steps cut it.
    y = model.missing(torch.full((2, 3), 6), torch.tensor([0.3, 0.8], dtype=torch.float64))
    y.sum().backward()
    assert all(p.grad is not None for p in model.network.head.parameters())
    assert int(model.sample(50, num_steps=4).data.max()) <= 6


def test_the_network_sees_standard_values_and_the_time():
    seen = []
    spec, share = IMAGES.replace(num_classes=None), torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))
    model = build(spec, network=UNetConfig(channels=8, mult=(1,), blocks=1, attention=()), schedule=LogitSurvival())
    model.prepare([batch_of(300, share, spec)])
    model.network.register_forward_pre_hook(lambda _, given: seen.append(given))
    x0, s = batch_of(3000, share, spec, 1).x0, torch.full((3000,), 0.62, dtype=torch.float64)
    with torch.no_grad():
        p = torch.sigmoid(model.config.schedule.log_odds(s)).view(-1, 1, 1, 1).expand(x0.shape)
        model.missing(Quick(3000).binomial(spec.to_levels(x0), p), s)
    x, label, condition = seen[0]
    assert condition is None
    assert torch.allclose(label, torch.tensor(620.0))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2), atol=0.05, rtol=0)
    assert bool((x.std((0, 2, 3)) - 1).abs().max() < 0.1)


# --- what it learns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_weights_are_the_formulas_of_the_card(objective, weighting):
    schedule = LogitSurvival(t_end=9, num_steps=40)
    model = build(noise=0.1, objective=objective, weighting=weighting, schedule=schedule)
    count = 400
    terms = model.loss(batch_of(count, 0.6), StepDraws(0, 0, 0, count, count))
    assert terms.t.dtype == torch.float64
    u = [schedule.extent * (1 - 2 * k / 39) for k in range(40)]  # k = 0 is the first time of the grid
    p = [1 / (1 + math.exp(-x)) for x in u]
    t = [math.log1p(math.exp(-x)) for x in u]
    for s, weight, surprise in zip(
        terms.t.tolist(), terms.per_item.tolist(), terms.parts["surprise"].tolist(), strict=True
    ):
        lost = 1 / (1 + math.exp(schedule.extent * (1 - 2 * s)))
        if objective == "continuous":
            want = (1 - lost) * 2 * schedule.extent
        else:
            k = round(s * 39)
            assert s == pytest.approx(k / 39, abs=1e-12)
            before = (p[k - 1], t[k - 1]) if k else (1.0, 0.0)
            if objective == "instantaneous":
                want = 40 * p[k] * (t[k] - before[1]) / lost
            else:
                want = 40 * (before[0] - p[k]) / lost
        want = {"likelihood": want, "paper": want * lost, "uniform": 1.0}[weighting]
        assert weight == pytest.approx(want * surprise, rel=1e-4)
    if objective != "continuous":
        assert len(set(terms.t.tolist())) == 40


def test_on_a_fine_grid_all_objectives_weigh_alike():
    schedule = LogitSurvival(t_end=9, num_steps=3000)
    for weighting in ("likelihood", "paper"):
        found = []
        for objective in OBJECTIVES:
            model = build(noise=0.1, objective=objective, weighting=weighting, schedule=schedule)
            terms = model.loss(batch_of(500, 0.6), StepDraws(0, 0, 0, 500, 500))
            found.append((terms.per_item / terms.parts["surprise"])[terms.t > 1e-3])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0.02, atol=1e-6)


def test_weights_keep_their_digits_near_the_data():
    # A long schedule: 1 - p = e^-28 at the first time of the grid, where p has no digits left.
    schedule = LogitSurvival(t_end=28, num_steps=200)
    u = schedule.log_odds(schedule.grid())
    t, lost = -torch.nn.functional.logsigmoid(u), torch.sigmoid(-u)
    want = {
        "instantaneous": 200 * torch.sigmoid(u) * torch.cat([t[:1], t.diff()]) / lost,
        # Of the two differences the one of small numbers.
        "finite-time": 200
        * torch.cat(
            [
                torch.ones(1).double(),
                torch.where(u[1:] > 0, lost.diff(), -torch.sigmoid(u).diff()) / lost[1:],
            ]
        ),
    }
    for objective, weights in want.items():
        model = build(noise=0.1, objective=objective, weighting="likelihood", schedule=schedule)
        s, got = model._times(torch.linspace(0, 1, 201, dtype=torch.float64)[:-1] + 1e-4)
        torch.testing.assert_close(s, schedule.grid())
        torch.testing.assert_close(got, weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("objective", "weighting"),
    [("continuous", "paper"), ("instantaneous", "likelihood"), ("finite-time", "paper"), ("finite-time", "uniform")],
)
def test_the_loss_is_least_at_the_conditional_expectation(objective, weighting):
    spec = DataSpec(kind="counts", shape=(1,), range=(0, 6), levels=7)
    schedule = LogitSurvival(t_end=5, num_steps=4)
    model, size = build(spec, objective=objective, weighting=weighting, schedule=schedule), 30_000
    x0 = torch.multinomial(LAW, size, replacement=True, generator=torch.Generator().manual_seed(0)).float()[:, None]
    missing = torch.arange(7.0).double() - torch.arange(7.0).double()[:, None]

    def mean(s):
        joint = binomial_matrix(6, torch.sigmoid(schedule.log_odds(s))) * LAW
        return (joint * missing).sum(-1) / joint.sum(-1)

    def gradient(scale):
        """Of the mean loss in the logarithm of a factor for every count."""
        factor = torch.full((7,), math.log(scale), requires_grad=True)

        def told(n, s, condition):  # noqa: ARG001
            return (mean(s).gather(1, n) * factor.exp()[n[:, 0], None]).float()

        model.missing = told
        loss = model.loss(Batch(x0), Quick(size)).per_item.mean()
        return torch.autograd.grad(loss, factor)[0]

    at, above, below = gradient(1.0), gradient(1.25), gradient(0.8)
    assert bool((above[:6] > 0).all())
    assert bool((below[:6] < 0).all())
    assert bool((at[:6].abs() < 0.25 * above[:6]).all())
    assert float(at.abs().sum()) < 0.1 * float(above.abs().sum())


def test_an_event_that_was_not_to_be_expected_has_a_gradient():
    # y = 6 sigmoid(z): the gradient in z is y - d (1 - sigmoid(z)), here -3, however small y is.
    z = torch.tensor([-20.0, -40.0, -60.0, -80.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(mean_surprise(6 * torch.sigmoid(z), torch.full((4,), 3.0)).sum(), z)
    torch.testing.assert_close(gradient, torch.full((4,), -3.0))


def test_the_loss_is_of_the_items_whatever_the_cut():
    model, batch = build(noise=0.1), batch_of(12, 0.4)
    whole = model.loss(batch, StepDraws(2, 5, 0, 12, 12))
    for a, b in ((0, 5), (5, 6), (6, 12)):
        part = model.loss(Batch(batch.x0[a:b]), StepDraws(2, 5, a, b, 12))
        torch.testing.assert_close(part.per_item, whole.per_item[a:b])
        assert torch.equal(part.t, whole.t[a:b])
    assert set(whole.parts) == {"surprise"}
    assert whole.per_item.requires_grad
    assert not whole.parts["surprise"].requires_grad


# --- the bound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [None, 7])
def test_the_bound_term_by_term(num_steps):
    # With the same draws, and y from the closed form of independent Binomial values.
    schedule, b = LogitSurvival(t_end=6, num_steps=20), torch.tensor([0.2, 0.5, 0.9]).double()
    model, batch = build(share=b.float(), schedule=schedule), batch_of(50, b.float())
    got = bound(model, batch, num_steps=num_steps)
    count = num_steps or 20
    grid = schedule.grid(count)
    lost = torch.sigmoid(-schedule.log_odds(grid)).tolist()
    draws, n0 = SampleDraws(3, 0, 50), ROWS.to_levels(batch.x0)
    terms = []
    for k in range(count):
        if k == 0:
            q = torch.full((50, 1), lost[0], dtype=torch.float64)
        else:  # a time between two of the grid, even in -log(1 - p); the last reach to black, where that is 0
            start, end = -math.log(lost[k - 1]), -math.log(lost[k]) if k < count - 1 else 0.0
            q = torch.exp(-(start + (end - start) * draws.uniform()))[:, None]
        n = draws.binomial(n0, (1 - q).expand(50, 3))
        d = (n0 - n).double()
        p = (1 - q).clamp(min=math.exp(-6))  # the network knows no later time
        y = odds(n, 6, p, b)
        if k == 0:
            law = torch.distributions.Binomial((6 - n).double(), y / (6 - n).clamp(min=1))
            terms.append(-law.log_prob(d).mean(1))
            assert torch.allclose(got.x0_error[:, 0], (((y - d) / ROWS_SCALE) ** 2).mean(1), rtol=1e-3, atol=1e-9)
        else:
            surprise = y - d + torch.xlogy(d, d / y.clamp(min=1e-300))
            terms.append((start - end) * surprise.mean(1))
    torch.testing.assert_close(got.steps, torch.stack(terms, 1), rtol=2e-3, atol=2e-6)
    assert torch.equal(got.t, grid)
    assert bool((got.prior == 0).all())
    assert got.eps_error is None
    assert got.steps.shape == got.x0_error.shape == (50, count)


ROWS_SCALE = torch.tensor(ROWS.scale, dtype=torch.float64)


@pytest.mark.parametrize(("spec", "b"), [(ROWS, 0.35), (BINARY, 0.3)], ids=["rows", "binary"])
@pytest.mark.parametrize("num_steps", [2, 12])
def test_the_bound_of_an_oracle_is_the_entropy(spec, b, num_steps):
    model, batch = build(spec, share=b, schedule=LogitSurvival(t_end=5, num_steps=12)), batch_of(6000, b, spec)
    found = bound(model, batch, Quick(6000), num_steps=num_steps).steps.sum(1)
    error = float(found.std()) / math.sqrt(6000)
    want = entropy_of_binomial(spec.levels - 1, b)
    assert error < 0.015 * want if num_steps == 12 else error < 0.06 * want
    assert abs(float(found.mean()) - want) < 3.5 * error


def test_one_step_still_is_a_bound():
    # A short schedule leaves much behind, which has to be paid for too.
    model, batch = build(BINARY, share=0.3, schedule=LogitSurvival(t_end=1)), batch_of(4000, 0.3, BINARY)
    for num_steps in (2, 1):
        terms = bound(model, batch, Quick(4000), num_steps=num_steps)
        found = terms.prior + terms.steps.sum(1)
        assert float(found.mean()) > entropy_of_binomial(1, 0.3) - 3 * float(found.std()) / math.sqrt(4000)


def test_the_loss_with_the_weight_of_the_likelihood_averages_to_the_bound():
    schedule, size = LogitSurvival(t_end=12, num_steps=30), 20_000
    model = build(noise=0.15, weighting="likelihood", schedule=schedule)
    batch = batch_of(size, 0.5)
    terms = bound(model, batch, Quick(size)).steps.sum(1)
    for objective in ("continuous", "finite-time"):
        model = build(
            noise=0.15,
            weighting="likelihood",
            objective=objective,
            schedule=schedule if objective == "continuous" else LogitSurvival(t_end=12, num_steps=1000),
        )
        with torch.no_grad():
            loss = model.loss(batch, Quick(size, 1)).per_item.double()
        error = math.hypot(float(loss.std()), float(terms.std())) / math.sqrt(size)
        assert error < 0.03 * float(terms.mean())
        assert float(loss.mean()) == pytest.approx(float(terms.mean()), abs=3.5 * error + 0.012 * float(terms.mean()))
    # This model is none of independent values: it costs more than the entropy.
    assert float(terms.mean()) > entropy_of_binomial(6, 0.5) + 5 * float(terms.std()) / math.sqrt(size)


def test_dependence_is_what_independent_values_cannot_say():
    # Two equal bits: 1 bit in all, and 2 of a model of independent ones.
    spec = DataSpec(kind="counts", shape=(2,), range=(0, 1), levels=2)
    x0 = (torch.arange(2000) % 2).float()[:, None].expand(2000, 2)
    found = bound(build(spec, share=0.5, schedule=LogitSurvival(num_steps=12)), Batch(x0), Quick(2000)).steps.sum(1)
    assert float(found.mean()) == pytest.approx(math.log(2), rel=0.04)
    equal = build(spec, schedule=LogitSurvival(num_steps=12))

    def told(n, s, condition):  # noqa: ARG001
        q = torch.sigmoid(-equal.config.schedule.log_odds(s))[:, None]
        seen = n.any(1, keepdim=True)  # one of them is there: so must be the other
        return ((1 - n) * torch.where(seen, 1.0, q**2 / (1 + q**2))).float()

    equal.missing = told
    found = bound(equal, Batch(x0), Quick(2000)).steps.sum(1)
    assert float(found.mean()) == pytest.approx(math.log(2) / 2, rel=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "fixed_small"}, "^variance: blackout has none to choose"),
        ({"clip": False}, "^clip: blackout has none to choose"),
        ({"num_steps": 21}, r"num_steps: 21 is more than the 20 times of the grid \(schedule.num_steps\)"),
    ],
)
def test_a_bound_with_what_it_has_not_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        bound(build(schedule=LogitSurvival(num_steps=20)), batch_of(3, 0.5), **options)


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spec", [ROWS, BINARY], ids=["rows", "binary"])
def test_samples_are_whole_and_do_not_depend_on_the_batch(solver, spec):
    model = build(spec, noise=0.5, schedule=LogitSurvival(t_end=6, num_steps=60))
    want = model.sample(9, num_steps=25, solver=solver, seed=4, batch_size=9)
    assert want.nfe == 25
    levels = want.data / spec.step
    assert torch.equal(levels, levels.round())
    assert levels.min() >= 0
    assert levels.max() <= spec.levels - 1
    assert len(want.data.unique()) > (1 if spec is BINARY else 3)
    for batch_size in (1, 4):
        assert torch.equal(model.sample(9, num_steps=25, solver=solver, seed=4, batch_size=batch_size).data, want.data)
    assert torch.equal(model.sample(5, num_steps=25, solver=solver, seed=4).data, want.data[:5])
    assert not torch.equal(model.sample(9, num_steps=25, solver=solver, seed=5).data, want.data)
    once = model.sample(9, num_steps=1, solver=solver, seed=4)
    assert once.nfe == 1
    assert torch.equal(once.data / spec.step, (once.data / spec.step).round())


@pytest.mark.parametrize("solver", SOLVERS)
def test_counts_grow_from_nothing_and_late_to_early(solver):
    model, seen, told = build(noise=0.5, schedule=LogitSurvival(t_end=6, num_steps=40)), [], []
    missing = model.missing
    model.missing = lambda n, s, condition: (seen.append((n, s)), missing(n, s, condition))[1]
    x = model.sample(64, num_steps=40, solver=solver, on_step=lambda *done: told.append(done)).data.long()
    assert told == [(k, 40) for k in range(1, 41)]
    states = torch.stack([n for n, _ in seen] + [x])
    assert states.dtype == torch.int64
    assert bool((states[0] == 0).all())
    assert bool((states.diff(dim=0) >= 0).all())
    assert states[-1].max() <= 6
    assert [float(s[0]) for _, s in seen] == pytest.approx([k / 39 for k in reversed(range(40))])
    assert all(bool((s == s[0]).all()) for _, s in seen)


@pytest.mark.parametrize(
    ("spec", "solver", "num_steps"), [(ROWS, "binomial", 3), (BINARY, "bridge", 3), (ROWS, "bridge", 30)]
)
def test_an_oracle_samples_the_law(spec, solver, num_steps):
    b, most, size = 0.35, spec.levels - 1, 3000 if num_steps == 3 else 800
    model = build(spec, share=b, schedule=LogitSurvival(t_end=12, num_steps=60))
    x = model.sample(size, num_steps=num_steps, solver=solver, seed=1).data / spec.step
    values = x.flatten().long()
    want = torch.tensor([math.comb(most, k) * b**k * (1 - b) ** (most - k) for k in range(most + 1)]) * len(values)
    chi_square = (torch.bincount(values, minlength=most + 1) - want).square() / want
    if (solver, most) == ("bridge", 6):  # of first order: the mean, and a law that is near
        assert float(x.mean()) == pytest.approx(b * most, rel=0.04)
    else:
        assert float(chi_square.sum()) < 22  # at most 6 degrees of freedom, p = 1e-3
    # And the values of an event are independent.
    assert (torch.corrcoef(x.flatten(1).T) - torch.eye(spec.dimension)).abs().max() < 4 / math.sqrt(size)


def test_the_last_step_gives_all_that_is_expected():
    # Rounded, from one step, nothing is random.
    model = build(share=0.6, schedule=LogitSurvival(t_end=12))
    x = model.sample(20, num_steps=1, solver="bridge-round").data
    assert bool((x == 4).all())  # 6 * 0.6 = 3.6
    share = torch.tensor([0.1, 0.5, 1 - 1e-6])
    x = build(share=share, schedule=LogitSurvival(t_end=12)).sample(4000, num_steps=1, solver="bridge").data
    torch.testing.assert_close(x.mean(0), torch.tensor([0.6, 3.0, 6.0]), atol=0.03, rtol=0)
    assert set(x[:, 0].tolist()) == {0.0, 1.0}


def test_classes_are_told():
    model = build(IMAGES, noise=0.3, conditional=True)
    seen = []
    model.network.register_forward_pre_hook(lambda _, given: seen.append(given[2].tolist()))
    samples = model.sample(5, condition=torch.tensor([0, 2, 1, 1, 0]))
    assert seen == [[0, 2, 1, 1, 0]] * 2
    assert samples.condition.tolist() == [0, 2, 1, 1, 0]
    other = model.sample(5, condition=torch.tensor([0, 2, 1, 1, 2]))
    assert torch.equal(other.data[:4], samples.data[:4])
    assert not torch.equal(other.data[4], samples.data[4])
    batch = batch_of(4, 0.5, IMAGES)
    losses = [
        model.loss(Batch(batch.x0, torch.tensor(c)), StepDraws(0, 0, 0, 4, 4)).per_item
        for c in ([0, 1, 2, 0], [0, 1, 2, 1])
    ]
    torch.testing.assert_close(losses[0][:3], losses[1][:3])
    assert losses[0][3] != losses[1][3]
    model.probe(2)
    with pytest.raises(UserError, match="without classes"):
        build().sample(2, condition=0)


# --- what it takes from the data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [ROWS, IMAGES], ids=["rows", "images"])
def test_the_statistics_are_those_of_the_counts(spec):
    share = torch.rand(spec.shape, generator=torch.Generator().manual_seed(2))
    whole, most = batch_of(90, share, spec), spec.levels - 1
    n = spec.to_levels(whole.x0).double()
    one, many = build(spec), build(spec)
    one.prepare([whole])
    many.prepare(Batch(whole.x0[k : k + 40]) for k in (0, 40, 80))
    channels = [n[:, c].flatten() for c in range(spec.shape[0])]
    for model in (one, many):
        torch.testing.assert_close(model.mean, torch.stack([c.mean() for c in channels]).float())
        torch.testing.assert_close(model.variance, torch.stack([c.var(correction=0) for c in channels]).float())
        want = (n.sum(0) + most / 2) / (91 * most)  # as if one more item had half of the largest count everywhere
        torch.testing.assert_close(model.share, want.float())
    assert {"share", "mean", "variance"} <= set(one.state_dict())


def test_values_that_are_always_or_never_full_are_no_certainty():
    model = build(BINARY)
    x0 = torch.tensor([-1.0, 1.0, 1.0, -1.0]).view(1, 1, 2, 2).expand(50, 1, 2, 2)
    model.prepare([Batch(x0)])
    assert bool(((model.share > 0) & (model.share < 1)).all())
    assert bool(torch.isfinite(bound(model, Batch(-x0), num_steps=2).steps).all())
    model.train()
    loss = model.loss(Batch(-x0), StepDraws(0, 0, 0, 50, 50)).per_item.mean()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_survivors_are_warned_of():
    batch = Batch(ROWS.from_levels(torch.full((20, 3), 5)))  # 15 units in all
    with pytest.warns(
        UserWarning, match=r"^schedule.t_end: at 2 2 units of an item are left in the mean.*; 5.0 leaves"
    ):
        build(schedule=LogitSurvival(t_end=2)).prepare([batch])
    big = DataSpec(kind="counts", shape=(1,), range=(0, 9999), levels=10_000)
    with pytest.warns(UserWarning, match=r"at 5 61 units .*; 11.4 leaves 0.1"):
        build(big, schedule=LogitSurvival(t_end=5)).prepare([Batch(torch.full((4, 1), 9000.0))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(schedule=LogitSurvival(t_end=5)).prepare([batch])


# --- its configuration ----------------------------------------------------------------------------------------------


def test_the_recipe_ends_where_a_tenth_of_a_unit_is_left():
    recipe = BlackoutConfig.recipe(ROWS, 1.0)
    assert recipe["schedule"] == {"kind": "logit", "t_end": 5}
    assert BlackoutConfig.recipe(IMAGES, 1.0)["schedule"]["t_end"] == pytest.approx(math.log(5120), abs=0.01)
    many = ROWS.replace(shift=(100.0, 200.0, 100.0), range=(0, 1000), levels=1001)
    assert BlackoutConfig.recipe(many, 1.0)["schedule"]["t_end"] == pytest.approx(math.log(4000), abs=0.01)
    # Of rows that are brought to fewer levels, units are levels.
    fewer = many.replace(levels=11)
    assert BlackoutConfig.recipe(fewer, 1.0)["schedule"]["t_end"] == 5


@pytest.mark.parametrize(
    "spec", [DataSpec(kind="points", shape=(2,)), DataSpec(kind="image", shape=(1, 4, 4), range=(0, 1))]
)
def test_data_without_levels_are_refused(spec):
    for use in (lambda: BlackoutConfig.recipe(spec, 1.0), lambda: build(spec)):
        with pytest.raises(UserError, match=rf"^blackout: needs counts.*\({spec.kind} of shape .* have no levels; .*-"):
            use()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="num_steps: 50 is more than the 20 times of the grid"):
        build(schedule=LogitSurvival(num_steps=20), sampling={"num_steps": 50})
    with pytest.raises(UserError, match="num_steps: 50 is more than the 20 times"):
        build(schedule=LogitSurvival(num_steps=20)).sample(2, num_steps=50)
    with pytest.raises(ConfigError, match="solver: 'brige' is not valid: should be 'bridge'"):
        build().sample(2, solver="brige")
    with pytest.raises(ConfigError, match="objective: 'discrete' is not valid"):
        METHODS.parse({"kind": "blackout", "network": "mlp", "objective": "discrete"})
    with pytest.raises(UserError, match=r"unknown survival schedule 'cosinus'.*cosine"):
        METHODS.parse({"kind": "blackout", "network": "mlp", "schedule": "cosinus"})
    with pytest.raises(UserError, match="conditional: true needs data with classes"):
        build(conditional=True)
    made = METHODS.parse({"kind": "blackout", "network": "mlp"})
    assert (made.schedule.kind, made.sampling.solver, made.parametrization) == ("logit", "bridge", "odds")
    assert METHODS.parse(made.to_json()) == made

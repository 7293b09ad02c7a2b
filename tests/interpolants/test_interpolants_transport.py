import itertools
import math

import pytest
import torch

from osmose.errors import UserError
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.oracles import GaussianDenoiser, MixtureDenoiser
from osmose.gaussian.schedule import Level, TrigSchedule
from osmose.gaussian.solvers import DDIM
from osmose.interpolants import PATHS
from osmose.interpolants.fields import Fields, read
from osmose.interpolants.oracles import GaussianMixture, MixturePath
from osmose.interpolants.paths import LinearPath, OneSidedLinearPath, OneSidedVPPath
from osmose.interpolants.transport import Epsilon, ddim, evaluations, grid, log_density, transport

SOLVERS = ("euler", "heun-noise-first", "heun", "rk4")
STILL = Epsilon(0.0)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise():
    raise AssertionError("noise drawn though its factor is zero")


def noise_of(x, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, generator=draw, dtype=x.dtype)


def last(states):
    return list(states)[-1].x


def gaussian(mean, covariance):
    return GaussianMixture(f64([mean]), f64([covariance]))


RHO0 = GaussianMixture(
    f64([[-2.0, 0.5], [1.0, 1.0]]), f64([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]]), f64([0.3, 0.7])
)
RHO1 = GaussianMixture(
    f64([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]),
    f64([[[0.3, 0.1], [0.1, 0.2]], [[0.5, 0.0], [0.0, 0.1]], [[0.2, -0.1], [-0.1, 0.3]]]),
    f64([0.5, 0.2, 0.3]),
)
G0 = gaussian([-1.0, 0.5], [[0.5, 0.3], [0.3, 0.8]])
G1 = gaussian([2.0, 1.0], [[1.7, -0.4], [-0.4, 0.3]])  # does not commute with G0's


def oracle(path, rho1=RHO1, rho0=RHO0):
    path = PATHS.parse(path) if isinstance(path, str) else path
    return MixturePath(path, rho1, None if path.one_sided or path.mirror else rho0)


def moments(fields_at, times, epsilon, solver, start):
    """Mean and covariance of the numerical process, exactly: with drifts affine in x a step is affine in x and noise.

    One trajectory for the mean, one for each unit of x, one for each unit of each step's noise.
    """
    dimension, steps = start.dimension, len(times) - 1
    drawn = itertools.count(1)
    x = torch.zeros(1 + dimension * (steps + 1), dimension, dtype=torch.float64)
    units = torch.eye(dimension, dtype=torch.float64)
    x[0], x[1 : 1 + dimension] = start.mean, start.mean + units
    x[1 + dimension :] = start.mean

    def normal():
        noise, first = torch.zeros_like(x), 1 + dimension * next(drawn)
        noise[first : first + dimension] = units
        return noise

    end = last(transport(fields_at, x, times, epsilon, normal, solver))
    gain = (end[1 : 1 + dimension] - end[0]).T
    spread = end[1 + dimension :] - end[0]
    return end[0], gain @ start.covariance @ gain.T + spread.T @ spread


def errors(true, a, b, counts, epsilon, solver):
    """How far the numerical moments at time b are from rho(b)'s, for grids from a to b."""

    def law(t):
        c = true.path.at(t)
        mean = c.alpha * true.rho0.mean + c.beta * true.rho1.mean
        covariance = c.alpha**2 * true.rho0.covariance + c.beta**2 * true.rho1.covariance
        return GaussianMixture(mean[None], (covariance + c.gamma**2 * torch.eye(len(mean)).double())[None])

    found = []
    for count in counts:
        mean, covariance = moments(true.fields, grid(count, a, b), epsilon, solver, law(a))
        gap = (mean - law(b).mean).abs().max(), (covariance - law(b).covariance).abs().max()
        found.append(max(float(v) for v in gap))
    return found


def order(found):
    return math.log2(found[-2] / found[-1])


@pytest.mark.parametrize(("solver", "wanted"), [("euler", 1), ("heun-noise-first", 2), ("rk4", 4)])
@pytest.mark.parametrize("kind", ["linear", "trig-vp", "one-sided-trig"])
def test_the_ode_has_the_right_moments_with_the_order_of_its_rule(kind, solver, wanted):
    for a, b in ((0.0, 1.0), (1.0, 0.0)):
        found = errors(oracle(kind, G1, G0), a, b, (20, 40), STILL, solver)
        assert order(found) == pytest.approx(wanted, abs=0.25)
        assert found[-1] < {1: 0.12, 2: 2e-2, 4: 2e-5}[wanted]


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize(("solver", "wanted"), [("euler", 1), ("heun-noise-first", 1), ("heun", 2)])
def test_the_sde_has_the_right_moments_with_the_order_of_its_rule(solver, wanted, scale):
    # The paper's order of noise and drift costs an order in the law, even at the right times.
    for a, b in ((0.0, 1.0), (1.0, 0.0)):
        found = errors(oracle("linear", G1, G0), a, b, (40, 80), Epsilon(scale), solver)
        assert order(found) == pytest.approx(wanted, abs=0.3)
        assert found[-1] < {1: 0.06, 2: 4e-3}[wanted]


@pytest.mark.parametrize("kind", ["encdec", "mirror", "one-sided-linear", "one-sided-trig", "one-sided-vp"])
@pytest.mark.parametrize("following", [False, True])
def test_the_sde_has_the_right_moments_on_every_path(kind, following):
    true = oracle(kind, G1, G0)
    epsilon = Epsilon(1.0, true.path if following else None)
    a, b = (0.0, 0.9) if kind == "one-sided-vp" else (0.0, 1.0)  # its alpha has no slope at t = 1
    for way in ((a, b), (b, a)):
        found = errors(true, *way, (30, 60), epsilon, "heun")
        assert order(found) > 1.5
        assert found[-1] < 1e-2


def test_a_stationary_path_stays_where_it_is():
    unit = gaussian([0.0], [[1.0]])
    true = MixturePath(PATHS.parse("trig-vp"), unit, unit)
    x = randn(5, 1)
    assert torch.allclose(last(transport(true.fields, x, grid(5), STILL, no_noise, "euler")), x, atol=1e-13)
    assert errors(true, 0.0, 1.0, (50, 100), Epsilon(1.0), "heun")[-1] < 1e-4


def test_the_first_step_has_the_drift_and_the_noise_of_the_equations():
    true, x, xi = oracle("linear"), randn(6, 2), randn(6, 2, seed=5)
    for (t, s), sign in (((0.3, 0.4), 1), ((0.4, 0.3), -1)):
        for solver in ("euler", "heun-noise-first", "heun"):
            got = last(transport(true.fields, x, [t, s], Epsilon(0.7), lambda: xi, solver))
            noise = math.sqrt(2 * 0.7 * 0.1) * xi

            def drift(t, x, sign=sign):
                fields = true.fields(t, x)
                return sign * 0.1 * fields.b + 0.1 * 0.7 * fields.s

            if solver == "euler":
                want = x + drift(t, x) + noise
            elif solver == "heun-noise-first":
                moved = x + noise
                want = moved + (drift(t, moved) + drift(s, moved + drift(t, moved))) / 2
            else:
                want = x + (drift(t, x) + drift(s, x + drift(t, x) + noise)) / 2 + noise
            assert torch.allclose(got, want, atol=1e-14)


def test_an_epsilon_that_follows_the_path_has_the_variance_of_the_whole_step():
    path = LinearPath()
    for epsilon, wanted in ((Epsilon(2.0, path), [0.0, 1.0, 0.0]), (Epsilon(2.0), [2.0, 2.0, 2.0])):
        assert epsilon.along([0.0, 0.5, 1.0]) == pytest.approx(wanted)
    assert Epsilon(2.0, OneSidedLinearPath()).along([0.0, 0.25, 1.0]) == pytest.approx([2.0, 1.5, 0.0])
    unmoved = Fields(b=torch.zeros(1, 1), s=torch.zeros(1, 1))
    for solver, variance in (("euler", 0.0), ("heun-noise-first", 0.5), ("heun", 0.5)):
        states = transport(
            lambda _t, _x: unmoved, torch.zeros(1, 1), [0.0, 0.5], Epsilon(2.0, path), lambda: torch.ones(1, 1), solver
        )
        assert last(states).item() ** 2 == pytest.approx(2 * variance * 0.5)


@pytest.mark.parametrize("kind", ["linear", "one-sided-linear"])
def test_denoisers_alone_are_enough_for_an_epsilon_that_follows_the_path(kind):
    true, x = oracle(kind), randn(50, 2)
    learn = "w" if true.path.one_sided else "b-eta"

    def learned(t, x):
        known = true.fields(t, x)
        c = true.path.at(t)
        outputs = [c.alpha * known.eta1 - c.beta * known.eta] if learn == "w" else [known.b, known.eta]
        return read(learn, true.path, c, x, outputs)

    epsilon, times = Epsilon(1.0, true.path), grid(40)
    got, want = (last(transport(f, x, times, epsilon, noise_of(x), "heun-noise-first")) for f in (learned, true.fields))
    assert torch.allclose(got, want, atol=1e-8)
    # A constant one meets a score that the denoiser does not determine at the ends, and says so.
    with pytest.raises(UserError, match="an SDE needs the score, and there is none at t = 1"):
        last(transport(learned, x, [0.9, 1.0], Epsilon(1.0), noise_of(x), "heun-noise-first"))
    last(transport(learned, x, grid(5, 0.01, 0.99), Epsilon(1.0), noise_of(x), "heun-noise-first"))


def statistics(x, rho):
    apart = x - rho.mean
    return x, (apart[:, :, None] * apart[:, None]).flatten(1), rho.log_prob(x)[:, None], torch.cos(3 * x)


def test_at_an_end_without_noise_the_denoiser_stands_for_the_score():
    # A network's eta is not 0 there; epsilon s = -scale eta is what it tends to.
    path, eta = LinearPath(), f64([[1.5]])
    for times in ([0.0, 0.1], [1.0, 0.9]):
        states = transport(
            lambda _t, x: Fields(b=torch.zeros_like(x), eta=eta),
            f64([[0.0]]),
            times,
            Epsilon(2.0, path),
            no_noise,
            "euler",
        )
        assert last(states).item() == pytest.approx(-0.1 * 2 * 1.5)
    epsilon, width = Epsilon(2.0, path), path.point(0.3).gamma
    (level,) = epsilon.along([0.3])
    assert torch.allclose(
        epsilon.product(level, Fields(eta=eta), 0.3), epsilon.product(level, Fields(s=-eta / width), 0.3)
    )


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["linear", "encdec"])
def test_mixtures_are_carried_into_each_other(kind, scale):
    true = oracle(kind)
    starts = true.sample(1500, torch.Generator().manual_seed(2))
    for (a, b), x, rho in (((0.0, 1.0), starts[0], RHO1), ((1.0, 0.0), starts[1], RHO0)):
        got = last(transport(true.fields, x, grid(30, a, b), Epsilon(scale), noise_of(x), "heun"))
        real = rho.sample(30_000, torch.Generator().manual_seed(9))
        for ours, theirs in zip(statistics(got, rho), statistics(real, rho), strict=True):
            spread = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
            assert float(((ours.mean(0) - theirs.mean(0)) / spread).abs().max()) < 4


@pytest.mark.parametrize("kind", ["linear", "encdec", "one-sided-linear"])
def test_forwards_and_back_the_ode_returns(kind):
    true = oracle(kind)
    x, _ = true.sample(20, torch.Generator().manual_seed(2))
    there = last(transport(true.fields, x, grid(40), STILL, no_noise, "rk4"))
    back = last(transport(true.fields, there, grid(40, 1.0, 0.0), STILL, no_noise, "rk4"))
    assert torch.allclose(back, x, atol=2e-3)
    assert float((there - x).abs().mean()) > 0.5


def test_a_mirror_s_ode_returns_its_input_and_its_sde_another_item():
    true = oracle("mirror")
    x = RHO1.sample(20, torch.Generator().manual_seed(2))
    assert torch.allclose(last(transport(true.fields, x, grid(100), STILL, no_noise, "rk4")), x, atol=1e-4)
    middle = last(transport(true.fields, x, grid(50, 0.0, 0.5), STILL, no_noise, "rk4"))
    assert float((middle - x).abs().mean()) > 0.1
    # Larger epsilon goes further away: what is left of x is the gain of the affine map.
    one = oracle("mirror", gaussian([0.5], [[0.8]]))
    left = []
    for scale in (0.0, 0.5, 2.0, 10.0):
        ends = last(transport(one.fields, f64([[0.0], [1.0]]), grid(50), Epsilon(scale), lambda: torch.zeros(2, 1)))
        left.append(float(ends[1] - ends[0]))
    assert left[0] == pytest.approx(1, abs=1e-3)
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.01


def test_vp_is_the_house_s_probability_flow():
    mean, variances = f64([0.3, -0.5]), f64([0.5, 2.0])
    true = MixturePath(OneSidedVPPath(), GaussianMixture(mean[None], torch.diag(variances)[None]))
    x = randn(6, 2)
    got = last(transport(true.fields, x, grid(60, 0.2, 0.9), STILL, no_noise, "rk4"))
    start, end = (Level(0.0, t, math.sqrt(1 - t**2)) for t in (0.2, 0.9))
    assert torch.allclose(got, GaussianDenoiser(mean, variances).flow(x, start, end), atol=1e-7)


def test_ddim_is_euler_on_a_linear_path_and_the_house_s_on_vp():
    centres = f64([[2.0, 0.0], [-1.0, 1.0]])
    rho1, x = GaussianMixture.isotropic(centres, 0.4), randn(6, 2)
    linear = MixturePath(OneSidedLinearPath(), rho1)
    euler = list(transport(linear.fields, x, grid(10), STILL, no_noise, "euler"))
    ours = list(ddim(linear.fields, linear.path, x, grid(10)))
    assert [state.t for state in ours] == [state.t for state in euler]
    assert all(torch.allclose(a.x, b.x, atol=1e-12) for a, b in zip(ours, euler, strict=True))
    schedule, vp = TrigSchedule(), MixturePath(OneSidedVPPath(), rho1)
    times = TimeGrid.at(schedule, torch.linspace(0.9, 0.2, 8, dtype=torch.float64))
    house = list(DDIM().run(MixtureDenoiser(centres, 0.4), x, times, no_noise))
    mine = list(ddim(vp.fields, vp.path, x, [level.alpha for level in times.levels]))
    assert all(torch.allclose(a.x, b.x, atol=1e-12) for a, b in zip(mine, house, strict=True))
    # The formula of the paper, where it is defined.
    c, d, eta = linear.path.at(0.4), linear.path.at(0.6), linear.fields(0.4, x).eta
    wanted = d.beta / c.beta * x + (d.alpha - c.alpha * d.beta / c.beta) * eta
    assert torch.allclose(last(ddim(linear.fields, linear.path, x, [0.4, 0.6])), wanted, atol=1e-13)
    with pytest.raises(UserError, match="linear has two sides"):
        ddim(linear.fields, LinearPath(), x, grid(2))


def test_the_last_step_may_denoise():
    true, x = oracle("linear"), randn(6, 2)
    for a, b, field in ((0.1, 0.9, "eta1"), (0.9, 0.1, "eta0")):
        plain = list(transport(true.fields, x, grid(5, a, b), Epsilon(0.5), noise_of(x)))
        short = list(transport(true.fields, x, grid(5, a, b), Epsilon(0.5), noise_of(x), denoise=True))
        assert all(torch.equal(p.x, s.x) for p, s in zip(plain[:-1], short[:-1], strict=True))
        assert short[-1].t == b
        assert torch.equal(short[-1].x, getattr(true.fields(plain[-2].t, plain[-2].x), field))
    with pytest.raises(UserError, match=r"the estimate of the data is not determined at t = 0\.5"):
        last(transport(lambda _t, x: Fields(b=x), x, [0.5, 0.6], STILL, no_noise, denoise=True))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("denoise", [False, True])
def test_evaluations_are_those_that_are_made_at_the_times_that_are_meant(solver, denoise):
    true, x, seen = oracle("linear"), randn(3, 2), []

    def fields_at(t, x):
        seen.append(t)
        return true.fields(t, x)

    epsilon = STILL if solver == "rk4" else Epsilon(0.5)
    states = list(transport(fields_at, x, [0.2, 0.4, 0.7], epsilon, noise_of(x), solver, denoise))
    assert [state.t for state in states] == [0.2, 0.4, 0.7][1:]
    assert len(seen) == evaluations(solver, 2, denoise)
    middles = {"euler": [], "rk4": [0.3, 0.3, 0.4]}.get(solver, [0.4])
    assert seen[: 1 + len(middles)] == pytest.approx([0.2, *middles])


def test_items_keep_their_shape_and_dtype():
    x = torch.ones(4, 1, 2, 2)
    got = last(transport(lambda _t, x: Fields(b=x, s=-x), x, grid(3), Epsilon(0.5), lambda: torch.ones_like(x)))
    assert got.dtype == torch.float32
    assert got.shape == x.shape
    assert torch.equal(x, torch.ones(4, 1, 2, 2))


def test_grids():
    assert grid(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert grid(2, 0.9, 0.1) == pytest.approx([0.9, 0.5, 0.1])
    for bad, message in (((0,), "num_steps: 0"), ((3, -0.1), "t0: -0.1"), ((3, 0, 1.2), "t1: 1.2"), ((3, 1), "no way")):
        with pytest.raises(UserError, match=message):
            grid(*bad)
    with pytest.raises(UserError, match="t0: nan"):
        grid(3, math.nan)


def test_what_makes_no_sense_is_refused_before_the_first_step():
    true, x = oracle("linear"), randn(3, 2)
    for scale in (-0.5, math.nan, math.inf):
        with pytest.raises(UserError, match=r"epsilon: .* is not valid: must be a finite number, at least 0"):
            Epsilon(scale)
    with pytest.raises(UserError, match="follows the noise of linear, which has none"):
        Epsilon(1.0, LinearPath(gamma="none"))
    with pytest.raises(UserError, match="'rk4' is for the ODE"):
        transport(true.fields, x, grid(3), Epsilon(0.5), no_noise, "rk4")
    with pytest.raises(UserError, match="did you mean 'euler'"):
        transport(true.fields, x, grid(3), STILL, no_noise, "eulr")
    for times in ([0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.2], [0.0, math.nan]):
        with pytest.raises(UserError, match="neither all rise nor all fall"):
            transport(true.fields, x, times, STILL, no_noise)
    with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
        transport(true.fields, x, [0.5, 1.5], STILL, no_noise)
    with pytest.raises(UserError, match="learn b-eta on a path with noise"):
        last(transport(lambda _t, x: Fields(b=x), x, grid(3), Epsilon(0.5), noise_of(x)))
    with pytest.raises(UserError, match="the velocity is not determined at t = 0 "):
        last(transport(lambda _t, _x: Fields(), x, grid(3), STILL, no_noise))


def velocity_of(true):
    return lambda t, x: true.fields(t, x).b


@pytest.mark.parametrize("kind", ["linear", "encdec", "one-sided-linear", "mirror"])
def test_the_density_by_the_ode_is_the_mixture_s(kind):
    true = oracle(kind)
    x = RHO1.sample(30, torch.Generator().manual_seed(4))
    prior, integrals = log_density(velocity_of(true), x, grid(25, 1.0, 0.0), true.rho0.log_prob)
    assert integrals.shape == (30, 25)
    assert torch.allclose(prior + integrals.sum(1), RHO1.log_prob(x), atol=1e-2)
    # The other way, from the middle.
    prior, integrals = log_density(velocity_of(true), x, grid(12, 0.6, 1.0), RHO1.log_prob)
    assert torch.allclose(prior + integrals.sum(1), true.log_prob(0.6, x), atol=1e-2)


def test_each_rule_converges_to_the_density_with_its_order():
    true = oracle("linear", G1, G0)
    x = randn(10, 2)
    for solver, wanted in (("euler", 1), ("heun-noise-first", 2), ("rk4", 4)):
        found = []
        for count in (10, 20):
            prior, steps = log_density(velocity_of(true), x, grid(count, 1.0, 0.0), G0.log_prob, solver=solver)
            found.append(float((prior + steps.sum(1) - G1.log_prob(x)).abs().max()))
        assert order(found) == pytest.approx(wanted, abs=0.3)


def test_hutchinson_s_estimate_is_unbiased_with_one_probe_for_a_trajectory():
    true = oracle("linear", G1, G0)
    x, drawn = randn(1, 2).expand(600, 2), []
    draw = noise_of(x)

    def normal():
        drawn.append(draw())
        return drawn[-1]

    times = grid(10, 0.9, 0.1)
    exact = log_density(velocity_of(true), x[:1], times, G0.log_prob)
    one = log_density(velocity_of(true), x, times, G0.log_prob, "hutchinson", 1, normal)
    assert len(drawn) == 1
    assert torch.allclose(one[0], exact[0].expand(600))
    gap = one[1].sum(1) - exact[1].sum(1)
    spread = float(gap.std())
    assert spread > 0.05
    assert abs(float(gap.mean())) < 4 * spread / 600**0.5
    # The divergence of a Gaussian's velocity in two dimensions takes two values only: signs, not normal values.
    assert len(torch.unique(one[1].sum(1).round(decimals=9))) == 2
    many = log_density(velocity_of(true), x, times, G0.log_prob, "hutchinson", 9, normal)
    assert len(drawn) == 10
    assert float((many[1].sum(1) - exact[1].sum(1)).std()) == pytest.approx(spread / 3, rel=0.15)


def test_densities_of_events_of_any_shape():
    x = randn(3, 1, 2, 2)
    _, steps = log_density(lambda _t, x: x.square() / 2, x, [0.5, 0.6], lambda x: x.flatten(1).sum(1), solver="euler")
    assert torch.allclose(steps[:, 0], 0.1 * x.flatten(1).sum(1))
    prior, steps = log_density(
        lambda _t, x: 2 * x, x.float(), [0.6, 0.5], lambda x: x.flatten(1).sum(1), solver="euler"
    )
    assert torch.allclose(steps, f64([[-0.8]] * 3), atol=1e-6)
    assert prior.dtype == torch.float32


def test_densities_that_cannot_be_had_are_refused():
    true, x = oracle("linear"), randn(3, 2)
    velocity = velocity_of(true)
    with pytest.raises(UserError, match="divergence: 'trace' is not valid"):
        log_density(velocity, x, grid(2), RHO1.log_prob, "trace")
    with pytest.raises(UserError, match="needs at least 1, and noise"):
        log_density(velocity, x, grid(2), RHO1.log_prob, "hutchinson")
    with pytest.raises(UserError, match="probes: 0"):
        log_density(velocity, x, grid(2), RHO1.log_prob, "hutchinson", 0, noise_of(x))
    with pytest.raises(UserError, match="neither all rise"):
        log_density(velocity, x, [0.5], RHO1.log_prob)
    with pytest.raises(UserError, match="solver: 'rk5'"):
        log_density(velocity, x, grid(2), RHO1.log_prob, solver="rk5")
    with pytest.raises(ValueError, match="no gradient in x"):
        log_density(lambda t, x: velocity(t, x).detach(), x, grid(2), RHO1.log_prob)

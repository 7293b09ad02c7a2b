import math

import pytest
import torch

from osmose.errors import UserError
from osmose.gaussian.oracles import MixtureDenoiser
from osmose.gaussian.schedule import Level, StraightSchedule, TrigSchedule
from osmose.interpolants import PATHS
from osmose.interpolants.oracles import GaussianMixture, MixturePath
from osmose.interpolants.paths import BrownianGamma, LinearPath, MirrorPath, OneSidedLinearPath, TrigPath, interpolate

every_path = pytest.mark.parametrize("kind", list(PATHS.entries))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


RHO0 = GaussianMixture(
    f64([[-2.0, 0.5], [1.0, 1.0]]), f64([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]]), f64([0.3, 0.7])
)
RHO1 = GaussianMixture(
    f64([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]),
    f64([[[0.3, 0.1], [0.1, 0.2]], [[0.5, 0.0], [0.0, 0.1]], [[0.2, -0.1], [-0.1, 0.3]]]),
    f64([0.5, 0.2, 0.3]),
)


def oracle(path):
    path = PATHS.parse(path) if isinstance(path, str) else path
    return MixturePath(path, RHO1, None if path.one_sided or path.mirror else RHO0)


def z_score(values):
    """Of a mean that should be 0, over the first dimension; the largest in absolute value."""
    return float((values.mean(0) / (values.std(0) / len(values) ** 0.5)).abs().max())


@every_path
@pytest.mark.parametrize("t", [0.15, 0.45, 0.85])
def test_fields_are_the_regressions_that_define_them(kind, t):
    true = oracle(kind)
    draw = generator(7)
    x0, x1 = true.sample(20_000, draw)
    z = torch.randn(x1.shape, generator=draw, dtype=torch.float64)
    c = true.path.at(t)
    x = interpolate(c, x0, x1, z)
    noise = x0 if true.path.one_sided else z
    moved = c.alpha_dot * x0 + c.beta_dot * x1
    push = 0.0 if true.path.one_sided else c.gamma_gamma_dot / c.gamma * z
    got = true.fields(t, x)
    residuals = {
        "b": moved + push - got.b,
        "v": moved - true.drift(t, x),
        "s": -noise / true.path.width(c) - got.s,
        "eta": noise - got.eta,
        "eta0": x0 - got.eta0,
        "eta1": x1 - got.eta1,
    }
    for name, residual in residuals.items():
        if float(residual.abs().max()) < 1e-9:  # what is known exactly has no spread to compare with
            continue
        for test in (torch.ones_like(x), x, x.flip(1), torch.tanh(3 * x), torch.cos(2 * x)):
            assert z_score(residual * test) < 4, name


@every_path
def test_fields_add_up_to_x(kind):
    true, x = oracle(kind), randn(6, 2) * 2
    for t in (0.0, 0.3, 0.8, 1.0):
        c, got = true.path.at(t), true.fields(t, x)
        assert torch.allclose(c.alpha * got.eta0 + c.beta * got.eta1 + c.gamma * got.eta, x, atol=1e-10)


@every_path
def test_fields_are_finite_at_both_ends_and_continuous_there(kind):
    true, x = oracle(kind), randn(6, 2)
    for end, near in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        at, beside = true.fields(end, x), true.fields(near, x)
        for name in ("b", "s", "eta", "eta0", "eta1"):
            assert torch.allclose(getattr(at, name), getattr(beside, name), atol=1e-3), name


@pytest.mark.parametrize("a", [0.5, 2.0])
def test_the_velocity_carries_the_scores_of_the_ends(a):
    x = randn(5, 2)
    for path in (LinearPath(gamma=BrownianGamma(a=a)), TrigPath(gamma=BrownianGamma(a=a))):
        true = oracle(path)
        start, end = path.at(0.0), path.at(1.0)
        s0, s1 = (grad_log(rho.log_prob, x) for rho in (RHO0, RHO1))
        first = start.alpha_dot * x + start.beta_dot * RHO1.mean - a / 2 * s0
        last = end.alpha_dot * RHO0.mean + end.beta_dot * x + a / 2 * s1
        assert torch.allclose(true.fields(0.0, x).b, first, atol=1e-10)
        assert torch.allclose(true.fields(1.0, x).b, last, atol=1e-10)


def grad_log(log_prob, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_prob(x).sum(), x)[0]


@every_path
def test_velocity_and_score_solve_the_continuity_equation(kind):
    # d_t log rho + div b + b . s = 0 and s = grad log rho: with div(s rho) = Laplacian of rho these are the
    # Fokker-Planck equations of every epsilon, forwards and backwards.
    true, x, step = oracle(kind), randn(8, 2), 1e-5
    for t in (0.2, 0.35, 0.9):
        got = true.fields(t, x)
        assert torch.allclose(got.s, grad_log(lambda x, t=t: true.log_prob(t, x), x), atol=1e-10)
        rate = (true.log_prob(t + step, x) - true.log_prob(t - step, x)) / (2 * step)
        point = x.clone().requires_grad_()
        b = true.fields(t, point).b
        divergence = sum(torch.autograd.grad(b[:, i].sum(), point, retain_graph=True)[0][:, i] for i in range(2))
        assert torch.allclose(rate + divergence + (got.b * got.s).sum(1), torch.zeros(8).double(), atol=2e-6)


def test_a_stationary_path_stands_still():
    unit, x = GaussianMixture.standard(3), randn(5, 3)
    true = MixturePath(PATHS.parse("trig-vp"), unit, unit)
    for t in (0.0, 0.3, 1.0):
        got = true.fields(t, x)
        assert torch.allclose(got.b, torch.zeros_like(x), atol=1e-13)
        assert torch.allclose(got.s, -x, atol=1e-13)
    # Without the factor of the variance the same ends do not.
    assert float(MixturePath(TrigPath(), unit, unit).fields(0.3, x).b.abs().max()) > 0.05


@every_path
def test_many_times_are_as_good_as_one(kind):
    true, x, times = oracle(kind), randn(4, 2), f64([0.0, 0.3, 0.7, 1.0])
    many, drift, log_prob = true.fields(times, x), true.drift(times, x), true.log_prob(times, x)
    for k, t in enumerate(times.tolist()):
        one = true.fields(t, x[k : k + 1])
        for name in ("b", "s", "eta", "eta0", "eta1"):
            assert torch.allclose(getattr(many, name)[k], getattr(one, name)[0], atol=1e-11)
        assert torch.allclose(drift[k], true.drift(t, x[k : k + 1])[0], atol=1e-11)
        assert torch.allclose(log_prob[k], true.log_prob(t, x[k : k + 1])[0], atol=1e-11)


def test_densities_are_those_of_torch_and_of_the_ends():
    x = randn(7, 2) * 2
    components = torch.distributions.MultivariateNormal(RHO1.means, RHO1.covariances)
    reference = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(RHO1.weights), components)
    assert torch.allclose(RHO1.log_prob(x), reference.log_prob(x), atol=1e-11)
    for kind in PATHS.entries:
        true = oracle(kind)
        start = RHO1 if true.path.mirror else GaussianMixture.standard(2) if true.path.one_sided else RHO0
        assert torch.allclose(true.log_prob(0.0, x), start.log_prob(x), atol=1e-11)
        assert torch.allclose(true.log_prob(1.0, x), RHO1.log_prob(x), atol=1e-11)
        assert torch.allclose(true.rho0.log_prob(x), start.log_prob(x), atol=1e-11)


def test_samples_have_the_moments_of_the_mixture():
    x0, x1 = oracle("linear").sample(40_000, generator(3))
    for x, rho in ((x0, RHO0), (x1, RHO1)):
        assert z_score(x - rho.mean) < 4
        apart = x - rho.mean
        assert z_score((apart[:, :, None] * apart[:, None]).flatten(1) - rho.covariance.flatten()) < 4
    assert z_score((x0 - RHO0.mean) * (x1 - RHO1.mean)) < 4  # independent
    same = oracle("mirror").sample(5, generator())
    assert torch.equal(*same)
    assert z_score(oracle("one-sided-vp").sample(20_000, generator())[0].square() - 1) < 4


def test_far_away_and_in_many_dimensions_nothing_underflows():
    means = randn(5, 64, seed=1) * 7.5
    true = MixturePath(LinearPath(), GaussianMixture.isotropic(means, 0.5), GaussianMixture.standard(64))
    for x in (randn(3, 64), randn(3, 64) * 1e4):
        got = true.fields(0.6, x)
        assert all(field.isfinite().all() for field in (got.b, got.s, got.eta, got.eta1))
        assert true.log_prob(0.6, x).isfinite().all()
    assert true.fields(0.6, x.float()).b.dtype == torch.float32


def test_weights_are_brought_to_a_sum_of_one_with_a_warning():
    means = f64([[0.0], [3.0]])
    with pytest.warns(UserWarning, match="weights sum to 4"):
        loose = GaussianMixture.isotropic(means, 1.0, f64([1.0, 3.0]))
    tight = GaussianMixture.isotropic(means, 1.0, f64([0.25, 0.75]))
    assert torch.equal(loose.weights, tight.weights)
    x = randn(4, 1)
    assert torch.equal(
        MixturePath(MirrorPath(), loose).fields(0.5, x).b, MixturePath(MirrorPath(), tight).fields(0.5, x).b
    )
    assert GaussianMixture.isotropic(randn(3, 1), 1.0).weights.tolist() == pytest.approx([1 / 3] * 3, abs=1e-16)
    # A component of weight 0 is as good as none.
    none = GaussianMixture.isotropic(means, 1.0, f64([1.0, 0.0]))
    assert torch.allclose(none.log_prob(x), GaussianMixture.standard(1).log_prob(x))


def test_mixtures_that_are_none_are_refused():
    means = f64([[0.0, 1.0], [3.0, 1.0]])
    for weights in ([-0.5, 1.5], [0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(UserError, match="must be at least 0, with a positive sum"):
            GaussianMixture.isotropic(means, 1.0, f64(weights))
    with pytest.raises(UserError, match=r"weights: shape \(3,\)"):
        GaussianMixture.isotropic(means, 1.0, torch.ones(3))
    with pytest.raises(UserError, match=r"must be \(K, D\) and \(K, D, D\)"):
        GaussianMixture(means, torch.ones(2, 2))
    for covariance in ([[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.5], [0.0, 1.0]]):
        with pytest.raises(UserError, match="symmetric and positive definite"):
            GaussianMixture(means, f64([covariance, [[1.0, 0.0], [0.0, 1.0]]]))
    with pytest.raises(UserError, match="rho0: one-sided-linear has one of its own"):
        MixturePath(OneSidedLinearPath(), RHO1, RHO0)
    with pytest.raises(UserError, match="rho0: linear has none of its own"):
        MixturePath(LinearPath(), RHO1)
    with pytest.raises(UserError, match="dimension 3 is not rho1's 2"):
        MixturePath(LinearPath(), RHO1, GaussianMixture.standard(3))
    with pytest.raises(ValueError, match="outside"):
        oracle("linear").fields(1.2, randn(2, 2))


def isotropic_pair():
    centres, weights = f64([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]), f64([0.5, 0.2, 0.3])
    return GaussianMixture.isotropic(centres, 0.4, weights), MixtureDenoiser(centres, 0.4, weights)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_one_sided_linear_is_flow_matching_with_time_reversed(t):
    rho1, denoiser = isotropic_pair()
    x = randn(6, 2)
    got = MixturePath(OneSidedLinearPath(), rho1).fields(t, x)
    schedule, u = StraightSchedule(), 1 - t
    level = Level(u, float(schedule.alpha(u)), float(schedule.sigma(u)))
    data = denoiser(x, level)
    eps = (x - level.alpha * data) / level.sigma
    assert torch.allclose(got.eta1, data, atol=1e-11)
    assert torch.allclose(got.eta, eps, atol=1e-11)
    assert torch.allclose(got.s, -eps / level.sigma, atol=1e-11)
    velocity = float(schedule.alpha_dot(u)) * data + float(schedule.sigma_dot(u)) * eps
    assert torch.allclose(got.b, -velocity, atol=1e-11)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_one_sided_vp_is_the_probability_flow_of_diffusion(t):
    rho1, denoiser = isotropic_pair()
    x = randn(6, 2)
    got = MixturePath(PATHS.parse("one-sided-vp"), rho1).fields(t, x)
    data = denoiser(x, Level(0.0, t, math.sqrt(1 - t**2)))
    assert torch.allclose(got.eta1, data, atol=1e-11)
    # dX = -(X + s) dtau is the flow of dZ = -Z dtau + sqrt(2) dW, and dtau = -dt / t.
    assert torch.allclose(got.b, (x + got.s) / t, atol=1e-11)
    # The house's own schedule with alpha = t, at u with dt / du = alpha'(u).
    schedule = TrigSchedule()
    u = 2 / math.pi * math.acos(t)
    eps = (x - t * data) / math.sqrt(1 - t**2)
    velocity = schedule.alpha_dot(u) * data + schedule.sigma_dot(u) * eps
    assert torch.allclose(got.b, velocity / schedule.alpha_dot(u), atol=1e-10)

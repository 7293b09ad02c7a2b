import math

import mpmath
import pytest
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence

from osmose.gaussian import SCHEDULES
from osmose.gaussian.chain import LevelDecoder, ReverseChain, reverse_step
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import CosineSchedule, LinearSchedule, VarianceExploding

DISCRETE = [LinearSchedule(), LinearSchedule(num_steps=50), CosineSchedule(), CosineSchedule(num_steps=4000)]
every_discrete = pytest.mark.parametrize("schedule", DISCRETE, ids=lambda s: f"{s.kind}{s.num_steps}")
every_schedule = pytest.mark.parametrize("kind", list(SCHEDULES.entries))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain_of(schedule, num_steps=None):
    return ReverseChain(TimeGrid.of(schedule, num_steps or schedule.native_steps))


def abar_of(schedule):
    """abar_0..abar_T as the papers define them: running products of 1 - beta."""
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - schedule.betas).cumprod(0)])


def steps_of(chain):
    return torch.arange(1, chain.num_steps + 1)


def fixed(chain, kind, k=None):
    """Sigma of a fixed variance at steps k, float64."""
    k = steps_of(chain) if k is None else k
    return chain.log_variance(kind, k, None, torch.zeros(len(k), dtype=torch.float64)).exp()


# --- one step -------------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize(("late", "early"), [(0.9, 0.5), (0.5, 0.499), (0.02, 0.01), (1.0, 0.3)])
def test_a_step_is_bayes_rule(kind, late, early):
    schedule = SCHEDULES.parse(kind)
    t, s = TimeGrid.at(schedule, torch.tensor([late, early], dtype=torch.float64)).levels[:2]
    step = reverse_step(t, s)
    # x_s given x0 is N(alpha_s x0, sigma_s^2); x_t given x_s is N(ratio x_s, beta): condition the one on the other.
    ratio = t.alpha / s.alpha
    assert (ratio * s.sigma) ** 2 + step.beta == pytest.approx(t.sigma**2, rel=1e-12)
    precision = ratio**2 / step.beta + 1 / s.sigma**2
    assert step.btilde == pytest.approx(1 / precision, rel=1e-8)
    assert step.keep == pytest.approx(ratio / step.beta / precision, rel=1e-8, abs=1e-12)
    assert step.pull == pytest.approx(s.alpha / s.sigma**2 / precision, rel=1e-8)
    # Its mean has the mean of x_s when x_t has that of x_t.
    assert step.keep * t.alpha + step.pull == pytest.approx(s.alpha, rel=1e-9)


@every_schedule
def test_the_step_to_clean_data_is_the_estimate(kind):
    t, s = TimeGrid.of(SCHEDULES.parse(kind), 1).levels
    assert reverse_step(t, s) == pytest.approx((0.0, 1.0, t.sigma**2, 0.0))


# --- the chain ------------------------------------------------------------------------------------------------------


@every_discrete
def test_over_all_steps_the_variances_are_the_schedule_s(schedule):
    chain, abar, T = chain_of(schedule), abar_of(schedule), schedule.native_steps
    assert chain.num_steps == T
    # Quietest first: step k starts at t = k / T.
    assert [round(level.t * T) for level in chain.levels] == list(range(1, T + 1))
    torch.testing.assert_close(fixed(chain, "fixed_large")[1:], schedule.betas[1:], rtol=1e-8, atol=0)
    btilde = schedule.betas * (1 - abar[:-1]) / (1 - abar[1:])
    torch.testing.assert_close(fixed(chain, "fixed_small")[1:], btilde[1:], rtol=1e-8, atol=0)


@every_discrete
@pytest.mark.parametrize("num_steps", [2, 7, 37])
def test_strided_variances_are_those_of_improved_ddpm(schedule, num_steps):
    chain, abar, T = chain_of(schedule, num_steps), abar_of(schedule), schedule.native_steps
    S = [0, *(1 + round(i * (T - 1) / (num_steps - 1)) for i in range(num_steps))]
    # The times stay those of the original steps.
    assert [round(level.t * T) for level in chain.levels] == S[1:]
    beta = 1 - abar[S[1:]] / abar[S[:-1]]
    btilde = (1 - abar[S[:-1]]) / (1 - abar[S[1:]]) * beta
    torch.testing.assert_close(fixed(chain, "fixed_large")[1:], beta[1:], rtol=1e-8, atol=0)
    torch.testing.assert_close(fixed(chain, "fixed_small")[1:], btilde[1:], rtol=1e-8, atol=0)
    # btilde_1 = 0 has no logarithm: both take the step before.
    for kind in ("fixed_small", "fixed_large"):
        assert fixed(chain, kind)[0].item() == pytest.approx(btilde[1].item(), rel=1e-8)


@pytest.mark.parametrize("kind", ["linear", "cosine", "ve", "trig"])
def test_one_step_has_no_step_before_and_takes_its_beta(kind):
    schedule = SCHEDULES.parse(kind)
    chain, one = chain_of(schedule, 1), torch.ones(1, dtype=torch.int64)
    want = 2 * math.log(float(schedule.sigma(1.0)))
    for variance in ("fixed_small", "fixed_large", "learned_range"):
        for share in (-1.0, 0.0, 0.5, 3.0):
            like = torch.zeros(1, 2, dtype=torch.float64)
            got = chain.log_variance(variance, one, like + share, like)
            assert torch.allclose(got, like + want, atol=1e-12)
    terms = chain.term(
        one, randn(1, 2), 0 * randn(1, 2), torch.full((1, 2), want, dtype=torch.float64), LevelDecoder(-1, 1, 9)
    )
    assert bool(terms.isfinite().all())


def test_the_learned_range_runs_between_the_fixed_variances_on_a_logarithmic_scale():
    chain = chain_of(LinearSchedule())
    k = torch.tensor([1, 2, 300, 1000])
    small, large = fixed(chain, "fixed_small", k).log(), fixed(chain, "fixed_large", k).log()
    large[0] = math.log(1e-4)  # the upper end at the last step is beta_1 itself
    share = randn(4, 3, 2) * 3  # neither squashed nor clipped, one for each dimension
    share[:, 0, 0], share[:, 0, 1] = 0, 1
    got = chain.log_variance("learned_range", k, share, share)
    want = share * large.view(4, 1, 1) + (1 - share) * small.view(4, 1, 1)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-9)
    assert torch.allclose(got[:, 0, 0], small, rtol=1e-12)
    assert torch.allclose(got[:, 0, 1], large, rtol=1e-12)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_has_the_form_of_the_data(kind, dtype):
    chain = chain_of(LinearSchedule(), 10)
    like = torch.zeros(3, 2, 4, 5, dtype=dtype)
    got = chain.log_variance(kind, torch.tensor([1, 4, 10]), like + 0.25, like)
    assert (got.shape, got.dtype) == (like.shape, dtype)
    assert bool((got == got[:, :1, :1, :1]).all())
    assert len(set(got[:, 0, 0, 0].tolist())) == 3


# --- weights of the squared errors ----------------------------------------------------------------------------------


@every_discrete
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_the_weight_of_the_error_is_ddpm_s(schedule, kind):
    chain, abar = chain_of(schedule), abar_of(schedule)
    k = steps_of(chain)
    beta, abar_t = schedule.betas, abar[1:]
    c = beta**2 / (2 * fixed(chain, kind) * (1 - beta) * (1 - abar_t))  # of (eps - eps_hat)^2
    got = chain.x0_weight(kind, k)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, c * abar_t / (1 - abar_t), rtol=1e-7, atol=0)
    if kind == "fixed_small":
        snr = abar[1:] / (1 - abar[1:])
        torch.testing.assert_close(c[1:], 0.5 * (snr[:-1] / snr[1:] - 1), rtol=1e-7, atol=0)
        torch.testing.assert_close(got[1:], 0.5 * (snr[:-1] - snr[1:]), rtol=1e-7, atol=0)


def test_a_learned_variance_has_no_such_weight():
    with pytest.raises(ValueError, match="not a function of the step for a learned variance"):
        chain_of(LinearSchedule(), 5).x0_weight("learned_range", torch.tensor([1]))


#: Nodes and weights of E f(z), z ~ N(0, 1): exact for polynomials up to the fifth degree.
HERMITE = [(-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6)]


@pytest.mark.parametrize("kind", ["linear", "ve", "trig"])
@pytest.mark.parametrize("k", [2, 10, 300])
def test_the_expected_log_ratio_of_a_step(kind, k):
    # E over q(x_s | x_t, x0) of -log q(x_t | x_s) and of -log p(x_s | x_t): both are quadratic.
    schedule = SCHEDULES.parse(kind)
    grid = TimeGrid.of(schedule, 1000)
    chain = ReverseChain(grid)
    t, s = grid.levels[-1 - k], grid.levels[-k]
    step = reverse_step(t, s)
    at = torch.tensor([k])
    variance = fixed(chain, "fixed_large", at).item()

    def expected(x0, x0_hat, eps):
        x_t, sum_q, sum_p = t.alpha * x0 + t.sigma * eps, 0.0, 0.0
        for z, weight in HERMITE:
            x_s = step.keep * x_t + step.pull * x0 + math.sqrt(step.btilde) * z
            q = scipy.stats.norm.logpdf(x_t, t.alpha / s.alpha * x_s, math.sqrt(step.beta))
            p = scipy.stats.norm.logpdf(x_s, step.keep * x_t + step.pull * x0_hat, math.sqrt(variance))
            sum_q, sum_p = sum_q - weight * q, sum_p - weight * p
        return sum_q, sum_p

    base = expected(0.3, 0.3, 0.0)
    got = expected(0.3, 0.5, 1.7)
    assert got[0] - base[0] == pytest.approx(chain.noise_weight(at).item() * 1.7**2, rel=1e-6)
    assert got[1] - base[1] == pytest.approx(chain.x0_weight("fixed_large", at).item() * 0.2**2, rel=1e-6)


# --- terms of the bound ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "cosine", "ve"])
def test_a_term_is_the_kl_divergence(kind):
    grid = TimeGrid.of(SCHEDULES.parse(kind), 100)
    chain, k = ReverseChain(grid), torch.tensor([100, 3, 2, 57])
    x0, x0_hat, x_t, log_variance = randn(4, 4, 3, 2).unbind(0)
    log_variance = log_variance / 3 + chain.log_variance("fixed_small", k, None, x0)
    pairs = list(grid.steps())
    want = []
    for row, step in enumerate(k.tolist()):
        keep, pull, _, btilde = reverse_step(*pairs[100 - step])
        q = Normal(keep * x_t[row] + pull * x0[row], math.sqrt(btilde))
        p = Normal(keep * x_t[row] + pull * x0_hat[row], (log_variance[row] / 2).exp())
        want.append(kl_divergence(q, p).mean())
    got = chain.term(k, x0, x0_hat, log_variance, LevelDecoder(-1, 1, 9))
    assert got.shape == (4,)
    assert torch.allclose(got, torch.stack(want), rtol=1e-8)


@every_discrete
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_a_term_of_a_fixed_variance_is_the_weighted_error_and_a_constant(schedule, kind):
    chain = chain_of(schedule)
    k = steps_of(chain)[1:]
    x0, x0_hat = randn(2, len(k), 6).unbind(0)
    log_variance = chain.log_variance(kind, k, None, x0)
    got = chain.term(k, x0, x0_hat, log_variance, None)
    share = fixed(chain, "fixed_small", k) / fixed(chain, kind, k)
    constant = 0.5 * (share - 1 - share.log())
    want = chain.x0_weight(kind, k) * (x0 - x0_hat).square().mean(1) + constant
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    exact = chain.term(k, x0, x0, log_variance, None)
    assert bool((exact == 0).all()) if kind == "fixed_small" else bool((exact > 0).all())


def test_the_last_step_scores_the_data_whoever_else_is_in_the_batch():
    chain, decoder = chain_of(LinearSchedule(), 40), LevelDecoder(-1.0, 1.0, 17)
    k = torch.tensor([1, 9, 1, 40])
    x0 = ((randn(4, 5) * 4).round() / 8).clamp(-1, 1)
    x0_hat = x0 + 0.02 * randn(4, 5, seed=1)
    log_variance = chain.log_variance("fixed_small", k, None, x0)
    levels, density = (chain.term(k, x0, x0_hat, log_variance, scored) for scored in (decoder, None))
    assert torch.equal(levels[[1, 3]], density[[1, 3]])
    for row in (0, 2):
        log_p = Normal(x0_hat[row], (log_variance[row] / 2).exp()).log_prob(x0[row])
        assert density[row].item() == pytest.approx(-log_p.mean().item(), rel=1e-12)
        want = decoder.nll(x0[row], x0_hat[row], log_variance[row]).mean()
        assert levels[row].item() == pytest.approx(want.item(), rel=1e-12)
        alone = chain.term(k[row : row + 1], *(v[row : row + 1] for v in (x0, x0_hat, log_variance)), decoder)
        assert torch.equal(alone, levels[row : row + 1])
    # Single precision is what training has.
    single = chain.term(k, x0.float(), x0_hat.float(), log_variance.float(), decoder)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), levels, rtol=1e-4)


def test_terms_teach_mean_and_variance_at_every_step():
    chain, k = chain_of(LinearSchedule(), 40), torch.tensor([1, 2, 40])
    x0, x0_hat = torch.zeros(3, 2), torch.full((3, 2), 0.1, requires_grad=True)
    share = torch.full((3, 2), 0.5, requires_grad=True)
    log_variance = chain.log_variance("learned_range", k, share, x0)
    chain.term(k, x0, x0_hat, log_variance, LevelDecoder(-1, 1, 17)).sum().backward()
    for gradient in (x0_hat.grad, share.grad):
        assert bool((gradient.isfinite() & (gradient != 0)).all())
    assert bool((x0_hat.grad > 0).all())  # nearer to x0 is better


@every_schedule
def test_the_prior_term_is_a_kl_divergence(kind):
    schedule = SCHEDULES.parse(kind)
    chain, x0 = chain_of(schedule, 20), randn(3, 2, 2)
    level, prior = chain.levels[-1], schedule.prior_std
    want = kl_divergence(Normal(level.alpha * x0, level.sigma), Normal(0.0, prior)).flatten(1).mean(1)
    assert torch.allclose(chain.prior_term(x0, prior), want, rtol=1e-6, atol=1e-15)
    if kind == "ve":
        assert torch.allclose(want, (x0 / 80).square().flatten(1).mean(1) / 2)


def test_the_prior_term_keeps_its_digits_next_to_nothing():
    # sigma_T^2 = 1 - 4e-5: what is left of v - 1 - log v is about 1e-9, a difference of numbers of size 1.
    chain = chain_of(LinearSchedule())
    with mpmath.workdps(50):
        abar = mpmath.exp(sum(mpmath.log(1 - mpmath.mpf(beta)) for beta in LinearSchedule().betas.tolist()))
        want = float((-abar - mpmath.log(1 - abar)) / 2)
    assert want == pytest.approx(4.07e-10, rel=1e-2)
    assert chain.prior_term(torch.zeros(1, 1).double(), 1.0).item() == pytest.approx(want, rel=1e-6)


# --- Gaussian data, where everything is known -----------------------------------------------------------------------


def exact_variance(schedule, s2, num_steps=None):
    """Variance of q(x_s | x_t) for data N(0, s2), and of x0 given x_t, at each step, quietest first."""
    found = []
    for t, s in list(TimeGrid.of(schedule, num_steps or schedule.native_steps).steps())[::-1]:
        step, posterior = reverse_step(t, s), s2 * t.sigma**2 / (t.alpha**2 * s2 + t.sigma**2)
        found.append((step.btilde + step.pull**2 * posterior, posterior))
    return torch.tensor(found, dtype=torch.float64).unbind(1)


@every_discrete
def test_the_exact_reverse_variance_is_the_published_formula_and_lies_in_the_learned_range(schedule):
    abar, beta, chain = abar_of(schedule), schedule.betas, chain_of(schedule)
    small, large = fixed(chain, "fixed_small"), fixed(chain, "fixed_large")
    for s2 in (1.0, 0.25, 0.01, 1e-4):
        m = abar * s2 + 1 - abar
        btilde = beta * (1 - abar[:-1]) / (1 - abar[1:])
        pull = abar[:-1].sqrt() * beta / (1 - abar[1:])
        want = btilde + pull**2 * s2 * (1 - abar[1:]) / m[1:]
        got, _ = exact_variance(schedule, s2)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=0)
        # Bayes' rule without x0: x_s ~ N(0, m_s), x_t given x_s is N(sqrt(1 - beta) x_s, beta).
        torch.testing.assert_close(got, beta * m[:-1] / m[1:], rtol=1e-7, atol=0)
        w = ((got / small).log() / (large / small).log())[1:]
        assert bool(((w > -1e-6) & (w < 1 + 1e-6)).all())
        if s2 == 1:
            torch.testing.assert_close(got, beta, rtol=1e-8, atol=0)
            assert torch.allclose(w, torch.ones_like(w), atol=1e-5)
    torch.testing.assert_close(exact_variance(schedule, 1e-12)[0][1:], btilde[1:], rtol=1e-6, atol=0)


def total_on_gaussian_data(chain, s2, posterior, log_variance):
    """E of the bound in nats: terms are quadratic in x0 - x0_hat, so its root mean square gives the expectation."""
    x0 = torch.full((chain.num_steps, 1), math.sqrt(s2), dtype=torch.float64)
    x0_hat = x0 - posterior.sqrt()[:, None]
    terms = chain.term(steps_of(chain), x0, x0_hat, log_variance[:, None], None)
    return (chain.prior_term(x0[:1], 1.0)[0] + terms.sum()).item()


@every_discrete
@pytest.mark.parametrize("s2", [1.0, 0.25, 0.01])
@pytest.mark.parametrize("num_steps", [None, 20, 1])
def test_with_the_exact_variance_the_bound_is_the_entropy_and_the_gap_of_the_prior(schedule, s2, num_steps):
    chain = chain_of(schedule, num_steps)
    variance, posterior = exact_variance(schedule, s2, num_steps)
    noisiest = chain.levels[-1]
    m = noisiest.alpha**2 * s2 + noisiest.sigma**2
    want = 0.5 * math.log(2 * math.pi * math.e * s2) + 0.5 * (m - 1 - math.log(m))
    # As the network would say it: through its share of the learned range.
    like = torch.zeros(chain.num_steps, 1, dtype=torch.float64)
    small = chain.log_variance("learned_range", steps_of(chain), like, like)
    large = chain.log_variance("learned_range", steps_of(chain), like + 1, like)
    if chain.num_steps > 1:
        share = (variance.log()[:, None] - small) / (large - small)
        log_variance = chain.log_variance("learned_range", steps_of(chain), share, like)[:, 0]
    else:
        log_variance = variance.log()  # the range of a single step is one point
    assert total_on_gaussian_data(chain, s2, posterior, log_variance) == pytest.approx(want, abs=2e-12)
    # Any other variance or estimate is worse.
    for factor in (0.9, 1.1):
        assert total_on_gaussian_data(chain, s2, posterior, log_variance + math.log(factor)) > want + 1e-4
        assert total_on_gaussian_data(chain, s2, posterior * 1.01, log_variance) > want + 1e-4


def test_the_bounds_of_the_three_variances_on_gaussian_data():
    schedule, s2 = LinearSchedule(), 0.25
    chain = chain_of(schedule)
    variance, posterior = exact_variance(schedule, s2)
    got = {"exact": total_on_gaussian_data(chain, s2, posterior, variance.log())}
    for kind in ("fixed_large", "fixed_small"):
        got[kind] = total_on_gaussian_data(chain, s2, posterior, fixed(chain, kind).log())
    assert got["exact"] == pytest.approx(0.7257913529, abs=5e-11)
    assert got["fixed_large"] == pytest.approx(0.84046, abs=5e-6)
    assert got["fixed_small"] == pytest.approx(1.29572, abs=5e-6)


# --- the decoder ----------------------------------------------------------------------------------------------------


def levels_of(decoder):
    return torch.linspace(decoder.low, decoder.high, decoder.levels, dtype=torch.float64)


def exactly(decoder, x, mean, log_variance):
    """-log p with 80 digits, and from the side where no digits are lost."""
    with mpmath.workdps(80):
        half = (mpmath.mpf(decoder.high) - decoder.low) / (decoder.levels - 1) / 2
        scale = mpmath.exp(-mpmath.mpf(log_variance) / 2)
        low = -mpmath.inf if x < decoder.low + half else (x - half - mean) * scale
        high = mpmath.inf if x > decoder.high - half else (x + half - mean) * scale
        if low > 0:
            low, high = -high, -low
        upper = mpmath.erfc(-high / mpmath.sqrt(2)) / 2
        lower = mpmath.erfc(-low / mpmath.sqrt(2)) / 2 if mpmath.isfinite(low) else mpmath.mpf(0)
        return float(-mpmath.log(upper - lower))


@pytest.mark.parametrize(
    "decoder", [LevelDecoder(-1, 1, 2), LevelDecoder(-1, 1, 17), LevelDecoder(-1, 1, 256)], ids=str
)
@pytest.mark.parametrize("log_variance", [-25.0, -9.2, -4.0, 0.0, 3.0, 10.0])
@pytest.mark.parametrize("mean", [-1e6, -1.0003, -0.31, 0.0, 0.5 / 255, 0.77, 1.0, 41.0])
def test_all_levels_together_have_probability_1(decoder, log_variance, mean):
    x = levels_of(decoder)
    nll = decoder.nll(x, torch.full_like(x, mean), torch.full_like(x, log_variance))
    assert nll.shape == x.shape
    assert bool((nll.isfinite() & (nll >= 0)).all())
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("decoder", [LevelDecoder(-1, 1, 256), LevelDecoder(0, 3, 4), LevelDecoder(-2, 5, 17)], ids=str)
def test_a_level_has_the_probability_of_its_interval(decoder):
    x = levels_of(decoder)
    half = float(x[1] - x[0]) / 2
    for mean, std in ((0.2, 0.3), (-1.0, 0.01), (0.9, 2.0)):
        edges = [-math.inf, *(float(value) + half for value in x[:-1]), math.inf]
        cdf = scipy.stats.norm.cdf(edges, mean, std)
        want = torch.from_numpy(cdf[1:] - cdf[:-1])
        got = (-decoder.nll(x, torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std)))).exp()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("sigmas", [-1e4, -200, -40, -9, -2, 0, 0.3, 5, 40, 200, 1e4])
@pytest.mark.parametrize("log_variance", [-20.0, -9.5, 2.0])
def test_it_is_exact_however_far_out(sigmas, log_variance):
    decoder = LevelDecoder(-1.0, 1.0, 17)
    x = levels_of(decoder)[[0, 1, 9, 15, 16]]
    mean = x + sigmas * math.exp(log_variance / 2)
    got = decoder.nll(x, mean, torch.full_like(x, log_variance))
    want = [exactly(decoder, *at, log_variance) for at in zip(x.tolist(), mean.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("sigmas", [-1e4, -40.0, -3.0, 0.0, 0.1, 40.0, 1e4])
@pytest.mark.parametrize("log_variance", [-20.0, -9.5, 2.0])
def test_its_gradient_is_finite_and_right(sigmas, log_variance):
    decoder = LevelDecoder(-1.0, 1.0, 17)
    x = levels_of(decoder)[[0, 1, 9, 15, 16]]
    std = math.exp(log_variance / 2)
    mean = (x + sigmas * std).requires_grad_()
    log_v = torch.full_like(x, log_variance).requires_grad_()
    for gradient in torch.autograd.grad(decoder.nll(x, mean, log_v).sum(), (mean, log_v)):
        assert bool(gradient.isfinite().all())
    d_mean, d_log_v = torch.autograd.grad(decoder.nll(x, mean, log_v).sum(), (mean, log_v))
    h = 1e-4
    for row in range(len(x)):
        at = lambda a, b, row=row: exactly(decoder, x[row].item(), mean[row].item() + a * std, log_variance + b)  # noqa: E731
        slope, slope_v = (at(h, 0) - at(-h, 0)) / (2 * h), (at(0, h) - at(0, -h)) / (2 * h)
        assert d_mean[row].item() * std == pytest.approx(slope, rel=1e-4, abs=1e-6)
        assert d_log_v[row].item() == pytest.approx(slope_v, rel=1e-4, abs=1e-6)


def test_it_computes_in_double_precision_whatever_it_is_given():
    decoder = LevelDecoder(-1.0, 1.0, 256)
    x = ((torch.arange(256) - 127.5) / 127.5).float()  # 8-bit images as models see them
    mean, log_v = x + 0.02, torch.full_like(x, -9.2)
    got = decoder.nll(x, mean, log_v)
    assert got.dtype == torch.float64
    want = decoder.nll(levels_of(decoder), mean.double(), log_v.double())
    assert torch.allclose(got, want, rtol=1e-4)
    # The ends reach to infinity in single precision too.
    outside = decoder.nll(x[[0, 255]], torch.tensor([-9.0, 9.0]), log_v[:2])
    assert outside.tolist() == [0, 0]


def test_the_number_of_levels_matters():
    # Digits have 17 levels; scored as if they had 256, 94 % of the probability lies between them.
    x = levels_of(LevelDecoder(-1.0, 1.0, 17))
    mean, log_v = torch.zeros_like(x), torch.full_like(x, 2 * math.log(0.3))
    total = {n: (-LevelDecoder(-1.0, 1.0, n).nll(x, mean, log_v)).exp().sum().item() for n in (17, 256)}
    assert total[17] == pytest.approx(1, abs=1e-10)
    assert total[256] == pytest.approx(0.06, abs=0.005)


def test_a_variance_exploding_chain_has_a_bound_too():
    # sigma never reaches 0: the last step goes from sigma_min to the data.
    schedule, s2 = VarianceExploding(), 0.25
    chain = chain_of(schedule, 400)
    variance, posterior = exact_variance(schedule, s2, 400)
    x0 = torch.full((400, 1), math.sqrt(s2), dtype=torch.float64)
    terms = chain.term(steps_of(chain), x0, x0 - posterior.sqrt()[:, None], variance.log()[:, None], None)
    got = (chain.prior_term(x0[:1], 80.0)[0] + terms.sum()).item()
    m = s2 + 80.0**2
    want = 0.5 * math.log(2 * math.pi * math.e * s2) + 0.5 * (m / 6400 - 1 - math.log(m / 6400))
    assert got == pytest.approx(want, abs=1e-8)

"""Diffusion mode by mode: closed forms, time reversal of Gaussian data, bounds, other processes as special cases."""

import itertools
import math

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.processes import DRIFTS, SPEEDS
from osmose.processes.kernels import OUKernel
from osmose.processes.modes import ConstDrift, ModeProcess, PublishedDrift, PublishedSpeed, VPSpeed
from osmose.processes.spectrum import Harmonics, PowerSpectrum, WhiteSpectrum

# Of the card: four modes, and data with other variances.
B = torch.tensor([3.5, 0.6, 0.42, 1.0], dtype=torch.float64)
R = torch.tensor([1.0, 0.3, 0.05, 0.01], dtype=torch.float64)
S = torch.tensor([2.0, 1.0, 0.2, 0.05], dtype=torch.float64)
SPEED_5 = PublishedSpeed(beta_max=5.0)
ONE, NONE = torch.ones(4).double(), torch.zeros(4).double()
every_speed = pytest.mark.parametrize("speed", [VPSpeed(), SPEED_5], ids=lambda s: s.kind)


def card(r=R, speed=SPEED_5):
    return ModeProcess(r, B, speed)


@every_speed
def test_the_total_is_the_integral_of_the_speed(speed):
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    assert float(speed.total(0.0)) == 0
    assert float(torch.trapezoid(speed.at(t), t)) == pytest.approx(float(speed.total(1.0)), rel=1e-6)
    assert float(PublishedSpeed(beta_max=5.0).total(1.0)) == pytest.approx((0.1 + 5) / 2)


@every_speed
def test_fine_steps_of_euler_have_the_moments_of_the_closed_form(speed):
    process, steps = card(speed=speed), 1000
    t0, t1 = 0.2, 0.7
    mean, variance, h = ONE.clone(), NONE.clone(), (t1 - t0) / steps
    for i in range(steps):
        beta = float(speed.at(t0 + (i + 0.5) * h))
        mean = mean * (1 - beta * B * h)
        variance = variance * (1 - beta * B * h) ** 2 + 2 * beta * R * h
    torch.testing.assert_close(mean, process.kept(t1, t0), rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(variance, process.state * process.fresh(t1, t0), rtol=1e-2, atol=0)


def test_two_transitions_are_one_and_the_stationary_law_stays():
    process = card()
    s, t = torch.tensor([0.01, 0.3]).double(), torch.tensor([0.02, 0.9]).double()
    assert process.kept(t).shape == (2, 4)
    torch.testing.assert_close(process.kept(s) * process.kept(t, s), process.kept(t))
    torch.testing.assert_close(process.kept(t, s) ** 2 * process.fresh(s) + process.fresh(t, s), process.fresh(t))
    torch.testing.assert_close(process.variance(t, process.state), process.state.expand(2, 4))
    assert process.prior_kl(process.state) == pytest.approx(0, abs=1e-12)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(process.diffuse(x, 0.1, 0.4, NONE), process.kept(0.4, 0.1) * x)
    torch.testing.assert_close(process.diffuse(NONE, 0.1, 0.4, ONE) ** 2, process.state * process.fresh(0.4, 0.1))


def test_bayes_rule_is_the_posterior():
    process, x, x0, t, s = card(), 0.7 * ONE, -1.2 * ONE, 0.5, 0.2
    mean, variance = process.posterior(x, x0, t, s)
    prior, noise = process.state * process.fresh(s), process.state * process.fresh(t, s)
    m = process.kept(t, s)
    gain = prior * m / (m**2 * prior + noise)
    torch.testing.assert_close(mean, process.kept(s) * x0 + gain * (x - m * process.kept(s) * x0))
    torch.testing.assert_close(variance, prior - gain * m * prior)
    # At time 0 the posterior is the estimate itself.
    last = process.posterior(x, x0, t, 0.0)
    torch.testing.assert_close(last.mean, x0)
    assert float(last.variance.abs().max()) == 0


def test_equal_rates_with_half_the_speed_are_the_variance_preserving_process():
    """r = 1 is VP of beta 0.1 .. 20; r = the eigenvalues of a kernel on a circle is CSPD with that kernel."""
    t = torch.linspace(0.01, 1, 7).double()
    log_alpha = -(0.1 * t / 2 + t**2 * (20 - 0.1) / 4)
    harmonics = Harmonics("fourier", (6,))
    white = ModeProcess.of(WhiteSpectrum(), ConstDrift(), VPSpeed(), harmonics)
    torch.testing.assert_close(white.kept(t), log_alpha.exp()[:, None].expand(7, 6))
    points = harmonics.values(torch.eye(6).double())
    cov = points.mT @ torch.diag(white.state * white.fresh(0.3)) @ points
    sigma2 = -math.expm1(2 * float(-(0.1 * 0.3 / 2 + 0.09 * 19.9 / 4)))
    torch.testing.assert_close(cov, sigma2 * torch.eye(6).double())

    distance = torch.minimum(torch.arange(6.0), 6 - torch.arange(6.0)).double() / 6
    row = OUKernel(length_scale=0.3).covariance(torch.tensor([[0.0, 1.0]]).double())[0, 0, 1].log().neg() * distance
    circulant = torch.stack([(-row).exp().roll(i) for i in range(6)])
    modes = points @ circulant @ points.mT / 36  # diagonal, since the kernel depends on the distance alone
    assert float((modes - modes.diag().diag()).abs().max()) < 1e-15
    process = ModeProcess(modes.diagonal(), torch.ones(6).double(), VPSpeed())
    cov = points.mT @ torch.diag(process.state * process.fresh(0.3)) @ points
    torch.testing.assert_close(cov, sigma2 * circulant)


def reversed_variance(process, steps, sde, start):
    """Of the law that Euler's steps with the exact estimate end with, without sampling: everything is linear."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    variance = start.clone()
    for t, s in itertools.pairwise(times):
        gain = process.filter(t, S)
        factor = process.backwards(ONE, gain, t, s, NONE if sde else None)
        noise = process.backwards(NONE, NONE, t, s, ONE) if sde else NONE
        variance = factor**2 * variance + noise**2
    return variance / S


@pytest.mark.parametrize(
    ("sde", "steps", "low", "high"),
    [
        (True, 50, 1.015, 1.023),
        (True, 200, 1.003, 1.006),
        (True, 1000, 1.0006, 1.0011),
        (False, 50, 0.96, 1.006),
        (False, 1000, 0.998, 1.0004),
    ],
)
def test_time_reversal_of_gaussian_data_errs_by_one_over_n(sde, steps, low, high):
    process = card()
    found = reversed_variance(process, steps, sde, process.variance(1.0, S))
    assert low <= float(found.min()) <= float(found.max()) <= high


def residual_of_the_start(process):
    """The share of a wrong variance at t = 1 that the exact SDE backwards keeps: corr(x_0, x_1)^2."""
    return process.kept(1.0) ** 2 * S / process.variance(1.0, S)


def test_from_the_stationary_law_the_sde_forgets_more_of_the_start_than_the_ode():
    process = card()
    sde, ode = (reversed_variance(process, 1000, kind, process.state) for kind in (True, False))
    assert 0.96 < float(sde.min()) < float(sde.max()) < 1.001
    # However many steps: the ODE carries what it began with.
    start = process.state / process.variance(1.0, S)
    torch.testing.assert_close(ode, start, rtol=3e-3, atol=0)
    assert float(start.min()) == pytest.approx(0.926, abs=1e-3)
    torch.testing.assert_close(sde - 1, (start - 1) * residual_of_the_start(process), rtol=0.1, atol=1.5e-3)


def test_posterior_steps_with_the_exact_estimate_and_langevin_keep_the_law():
    process, t, s = card(), 0.6, 0.3
    gain = process.filter(t, S)
    # x_s drawn from the posterior of x_0, itself drawn from its law given x_t, has the marginal law; with the mean for
    # x_0 the variance that is missing is what x_0 has left, times the square of its factor.
    mean, variance = process.posterior(ONE, gain, t, s)
    missing = S - gain**2 * process.variance(t, S)
    factor = process.posterior(NONE, ONE, t, s).mean
    total = mean**2 * process.variance(t, S) + variance + factor**2 * missing
    torch.testing.assert_close(total, process.variance(s, S))
    # A small step of Langevin's leaves the law as it is, to second order in its length.
    law = process.variance(t, S)
    drift = process.corrected(ONE, gain, t, 1e-3, NONE)
    noise = process.corrected(NONE, NONE, t, 1e-3, ONE)
    torch.testing.assert_close(drift**2 * law + noise**2, law, rtol=1e-10, atol=0)


def test_the_girsanov_bound_holds_and_is_tight():
    """Models with wrong linear scores: KL by their closed variances, the bound by its integral."""
    process, steps = card(), 400
    t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)

    def run(wrong, start):
        model, bound = start.clone(), process.prior_kl(S) if start is process.state else 0.0
        for a, b in itertools.pairwise(t.tolist()):
            x0, mid = process.filter((a + b) / 2, S), (a + b) / 2
            # Of x_0_hat off by a share of what is unknown: the estimate m x0 is wrong by that much.
            off = wrong * process.fresh(mid)
            weight = process.bound_weights(mid)
            bound += (a - b) * float((weight * off**2 * process.variance(mid, S)).sum())
            beta, fresh = float(SPEED_5.at(mid)), process.fresh(mid)
            drift = beta * B * (1 + 2 * (process.kept(mid) * (x0 + off) - 1) / fresh)
            grown = (2 * drift * (a - b)).exp()
            model = grown * model + 2 * beta * R * (a - b) * (1 + drift * (a - b))
        ratio = process.variance(1e-3, S) / model
        return float((ratio - 1 - ratio.log()).sum()) / 2, bound

    kl, bound = run(0.0, process.variance(1.0, S))
    assert (kl, bound) == (pytest.approx(0, abs=1e-4), 0)
    for wrong in (0.1, -0.2):
        kl, bound = run(wrong, process.variance(1.0, S))
        assert 0.5 * bound < kl < bound * (1 + 1e-3)
    kl, bound = run(0.0, process.state)  # all of it is the start's
    assert kl < bound
    assert bound == pytest.approx(process.prior_kl(S))


def test_steps_cost_the_divergence_of_their_normal_laws_and_in_the_limit_what_the_bound_says():
    process, x0, wrong = card(), torch.tensor([0.3, -1.0, 0.2, 0.5]).double(), torch.tensor([0.1, -0.2, 0.0, 0.4])
    x = torch.tensor([1.0, 0.5, -0.3, 0.1]).double()
    for t, s in ((1.0, 0.7), (0.3, 0.29)):
        right, off = (process.posterior(x, mean, t, s) for mean in (x0, x0 + wrong))
        size = right.variance.sqrt()
        laws = [torch.distributions.Normal(p.mean, size) for p in (right, off)]
        kl = torch.distributions.kl_divergence(*laws)
        torch.testing.assert_close(process.step_weights(t, s) * wrong.double().square(), kl, rtol=1e-9, atol=1e-15)
    last = process.start_kl(x0)
    law = torch.distributions.Normal(process.kept(1.0) * x0, (process.state * process.fresh(1.0)).sqrt())
    prior = torch.distributions.Normal(torch.zeros(4).double(), process.state.sqrt())
    torch.testing.assert_close(last, torch.distributions.kl_divergence(law, prior), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        process.step_weights(0.5, 0.5 - 1e-6) / 1e-6, process.bound_weights(0.5), rtol=1e-4, atol=0
    )


def test_variances_cancel_in_the_drift():
    x, x0 = torch.tensor([0.3, -1.0, 2.0, 0.1]).double(), torch.tensor([1.0, 0.5, -0.2, 0.0]).double()
    tiny = card(R * 1e-12)
    torch.testing.assert_close(tiny.backwards(x, x0, 0.5, 0.4, NONE), card().backwards(x, x0, 0.5, 0.4, NONE))
    torch.testing.assert_close(tiny.posterior(x, x0, 0.5, 0.4).mean, card().posterior(x, x0, 0.5, 0.4).mean)
    small = tiny.backwards(x.float(), x0.float(), 0.5, 0.4, torch.ones(4))
    assert bool(small.isfinite().all())
    assert small.dtype == torch.float32


def test_modes_without_noise_are_allowed_and_left_out_of_the_weights():
    process = card(torch.tensor([1.0, 0.0, 0.05, 0.0]).double())
    assert process.weights().tolist() == pytest.approx([3.5, 0, 0.42 / 0.05, 0])
    assert bool(process.bound_weights(0.3).isfinite().all())
    assert process.bound_weights(0.3)[1] == 0
    assert math.isfinite(process.prior_kl(S))
    mean, variance = process.posterior(ONE, ONE, 0.5, 0.2)
    assert float(variance[1]) == 0
    assert bool(mean.isfinite().all())
    torch.testing.assert_close(process.filter(0.4, NONE)[1], torch.tensor(0.0).double())


def test_the_residual_amplitude_is_the_largest_that_is_left():
    harmonics = Harmonics("fourier", (32, 32))
    for beta_max, left in ((5.0, 0.34), (10.0, 0.12)):  # the card: mode |k| ~ 3.6
        process = ModeProcess.of(PowerSpectrum(), PublishedDrift(), PublishedSpeed(beta_max=beta_max), harmonics)
        assert process.residual == pytest.approx(left, abs=0.01)


def test_with_unequal_rates_the_stationary_law_is_that_of_the_field():
    spectrum, drift = PowerSpectrum(exponent=1.0), PublishedDrift()
    coarse, fine = (ModeProcess.of(spectrum, drift, SPEED_5, Harmonics("fourier", (n,))) for n in (8, 16))
    at = [Harmonics("fourier", (n,)).values(torch.eye(n).double()) for n in (8, 16)]
    covs = [points.mT @ torch.diag(p.state) @ points for points, p in zip(at, (coarse, fine), strict=True)]
    torch.testing.assert_close(covs[1][::2, ::2], covs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("r", "b", "message"),
    [
        ([1.0, -0.1], [1.0, 1.0], "r: -0.1 is not valid"),
        ([1.0, 1.0], [1.0, 0.0], "b: 0 is not valid"),
        ([1.0, 1.0], [-2.0, 1.0], "b: -2 is not valid"),
        ([1.0, math.nan], [1.0, 1.0], "r: nan is not valid"),
        ([math.inf, 1.0], [1.0, 1.0], "finite"),
    ],
)
def test_what_is_no_process_is_refused(r, b, message):
    with pytest.raises(UserError, match=message):
        ModeProcess(torch.tensor(r).double(), torch.tensor(b).double(), VPSpeed())


def test_kinds_and_values_that_are_refused():
    with pytest.raises(ConfigError, match="unknown drift 'constant'; did you mean 'const'"):
        DRIFTS.parse("constant")
    with pytest.raises(ConfigError, match="value: 0 is not valid"):
        DRIFTS.parse({"kind": "const", "value": 0})
    with pytest.raises(ConfigError, match="beta_max: 0 is not valid"):
        SPEEDS.parse({"kind": "vp", "beta_max": 0})

import itertools
import math

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.gaussian import SCHEDULES, SOLVERS
from osmose.gaussian.chain import reverse_step
from osmose.gaussian.denoiser import Conditioned
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.oracles import GaussianDenoiser, MixtureDenoiser
from osmose.gaussian.schedule import CLEAN, Level, LinearSchedule, StraightSchedule, VarianceExploding
from osmose.gaussian.solvers import DDIM, Ancestral, DPMSolverPP2M, Heun

EVERY = [
    Ancestral(),
    Ancestral(variance="fixed_large"),
    DDIM(),
    DDIM(eta=0.4),
    DDIM(eta=1.0),
    Heun(),
    DPMSolverPP2M(),
]
every_solver = pytest.mark.parametrize("solver", EVERY, ids=lambda s: f"{s.kind}{getattr(s, 'eta', '')}")
every_schedule = pytest.mark.parametrize("kind", list(SCHEDULES.entries))
ORDERED = [SOLVERS.parse(kind) for kind in SOLVERS.entries if SOLVERS.resolve(kind).order > 0]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise():
    raise AssertionError("noise drawn though its factor is zero")


def last(states):
    return list(states)[-1].x


def test_every_registered_solver_is_tested_here():
    assert {solver.kind for solver in EVERY} == set(SOLVERS.entries)
    assert {solver.kind for solver in ORDERED} == {"ddim", "heun", "dpmpp-2m"}


@every_schedule
@pytest.mark.parametrize("solver", ORDERED, ids=lambda s: s.kind)
def test_the_error_falls_with_the_declared_order(kind, solver):
    schedule = SCHEDULES.parse(kind)
    oracle = GaussianDenoiser(torch.tensor([0.5, -0.2]).double(), torch.tensor([0.3, 2.0]).double())
    x = randn(16, 2) * schedule.prior_std
    errors = []
    for count in (32, 64, 128, 256):
        grid = TimeGrid.at(schedule, torch.linspace(0.9, 0.2, count + 1, dtype=torch.float64))
        end = list(solver.run(oracle, x, grid, no_noise))[-2].x  # the last step, to CLEAN, is of first order for all
        errors.append((end - oracle.flow(x, grid.levels[0], grid.levels[-2])).square().mean().sqrt().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(solver.order, abs=0.1), orders
    assert errors[-1] < 0.02


@pytest.mark.parametrize("kind", ["trig", "straight"])
@pytest.mark.parametrize("solver", ORDERED, ids=lambda s: s.kind)
def test_the_order_survives_a_start_without_data(kind, solver):
    # alpha(1) = 0, so sigma / alpha is infinite there; a second order is approached with a logarithm.
    schedule = SCHEDULES.parse(kind)
    oracle = GaussianDenoiser(torch.tensor([0.5, -0.2]).double(), torch.tensor([0.3, 2.0]).double())
    x, errors = randn(16, 2), []
    for count in (64, 128, 256, 512):
        grid = TimeGrid.at(schedule, torch.linspace(1.0, 0.2, count + 1, dtype=torch.float64))
        end = list(solver.run(oracle, x, grid, no_noise))[-2].x
        errors.append((end - oracle.flow(x, grid.levels[0], grid.levels[-2])).square().mean().sqrt().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(orders) > {1: 0.95, 2: 1.7}[solver.order], orders
    assert errors[-1] < {1: 5e-3, 2: 1e-4}[solver.order]


@every_schedule
@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_heun_neither_explodes_nor_loses_to_ddim_on_short_grids(kind, num_steps):
    # On the cosine schedule sigma / alpha falls from 20000 to about 10 in the first step.
    schedule = SCHEDULES.parse(kind)
    oracle = GaussianDenoiser(torch.tensor([0.5, -0.2]).double(), torch.tensor([0.3, 2.0]).double())
    x = randn(64, 2) * schedule.prior_std
    for spacing in ("even", "log-snr", "karras") if num_steps > 5 else ("even",):
        grid = TimeGrid.of(schedule, num_steps, spacing)

        def error(solver, grid=grid):
            end = list(solver.run(oracle, x, grid, no_noise))[-2].x
            return (end - oracle.flow(x, grid.levels[0], grid.levels[-2])).square().mean().sqrt().item()

        factor = 2 if kind == "ve" else 1.5 if spacing == "even" else 3
        assert error(Heun()) < factor * error(DDIM())


@every_schedule
@every_solver
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_evaluations_and_noise_are_counted_and_nothing_is_overwritten(kind, solver, num_steps):
    schedule = SCHEDULES.parse(kind)
    grid = TimeGrid.of(schedule, num_steps)
    calls = {"denoise": [], "noise": 0}

    def denoise(x_t, level):
        calls["denoise"].append((level, x_t, x_t.clone()))
        return 0.3 * x_t

    def noise():
        calls["noise"] += 1
        return randn(4, 3, seed=calls["noise"])

    x = randn(4, 3)
    kept = x.clone()
    states = list(solver.run(denoise, x, grid, noise))
    assert len(states) == num_steps
    assert len(calls["denoise"]) == solver.evaluations(num_steps)
    stochastic = solver.kind == "ancestral" or getattr(solver, "eta", 0) > 0
    assert calls["noise"] == (num_steps - 1 if stochastic else 0)
    assert torch.equal(x, kept)
    assert all(torch.equal(seen, copy) for _, seen, copy in calls["denoise"])
    assert {level for level, _, _ in calls["denoise"]} == set(grid.levels[:-1])
    for state, (_, at, _) in zip(states, [c for c in calls["denoise"] if solver.kind != "heun"], strict=False):
        assert torch.equal(state.x0, 0.3 * at)
    # The step to clean data is the estimate itself.
    assert torch.allclose(states[-1].x, states[-1].x0, rtol=1e-12)
    assert all(state.x.dtype == torch.float64 and not state.x.is_complex() for state in states)


@every_schedule
@pytest.mark.parametrize("spacing", ["even", "leading", "trailing", "log-snr", "karras"])
@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_ddim_with_eta_1_is_the_ancestral_chain(kind, spacing, num_steps):
    schedule = SCHEDULES.parse(kind)
    if schedule.native_steps is None and spacing in ("leading", "trailing"):
        pytest.skip("a discrete spacing")
    grid = TimeGrid.of(schedule, num_steps, spacing)
    oracle = MixtureDenoiser(randn(5, 3, seed=1), 0.2)

    def run(solver):
        generator = torch.Generator().manual_seed(3)
        noise = lambda: torch.randn(6, 3, generator=generator, dtype=torch.float64)  # noqa: E731
        return torch.stack([s.x for s in solver.run(oracle, randn(6, 3) * schedule.prior_std, grid, noise)])

    a, b = run(Ancestral()), run(DDIM(eta=1.0))
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    if num_steps > 1:
        assert not torch.allclose(a, run(DDIM(eta=0.9)), rtol=1e-3)


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
def test_both_forms_of_the_ancestral_mean_agree(num_steps):
    schedule = LinearSchedule()
    grid = TimeGrid.of(schedule, num_steps)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - schedule.betas).cumprod(0)])
    x_t, eps = randn(8, 2), randn(8, 2, seed=1)
    for t, s in grid.steps():
        x0 = (x_t - t.sigma * eps) / t.alpha
        step = next(Ancestral().run(lambda x, level: x0, x_t, TimeGrid((t, s)), lambda: torch.zeros(8, 2)))  # noqa: ARG005, B023
        k, j = round(t.t * 1000), round(s.t * 1000)
        beta = 1 - abar[k] / abar[j]
        from_eps = (x_t - beta / (1 - abar[k]).sqrt() * eps) / (1 - beta).sqrt()
        from_x0 = (abar[j].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - abar[j]) * x_t) / (1 - abar[k])
        assert torch.allclose(step.x, from_eps, rtol=1e-8, atol=1e-8)
        assert torch.allclose(step.x, from_x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
def test_ancestral_variances_are_the_strided_betas(num_steps):
    schedule = LinearSchedule()
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - schedule.betas).cumprod(0)])
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for t, s in TimeGrid.of(schedule, num_steps).steps():
        k, j = round(t.t * 1000), round(s.t * 1000)
        beta = float(1 - abar[k] / abar[j])
        if num_steps == 1000:
            assert beta == pytest.approx(float(schedule.betas[k - 1]), rel=1e-9)
        want = {"fixed_large": beta, "fixed_small": float((1 - abar[j]) / (1 - abar[k])) * beta}
        for variance, value in want.items():
            solver = Ancestral(variance=variance)
            step = next(solver.run(lambda x, level: zero, zero, TimeGrid((t, s)), lambda: one))  # noqa: ARG005
            assert step.x.item() ** 2 == pytest.approx(value if j else 0.0, rel=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@every_schedule
def test_a_ddim_step_is_eq_12(kind, eta):
    schedule = SCHEDULES.parse(kind)
    x_t, x0, z = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    t, s = (Level(*(float(v) for v in schedule.level(time))) for time in (0.7, 0.4))
    step = next(DDIM(eta=eta).run(lambda x, level: x0, x_t, TimeGrid((t, s, CLEAN)), lambda: z))  # noqa: ARG005
    eps = (x_t - t.alpha * x0) / t.sigma
    # With alpha not tied to sigma, 1 - abar_t / abar_s generalises to the variance of q(x_t | x_s) over sigma_t^2.
    transition = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    sigma = eta * s.sigma * math.sqrt(transition) / t.sigma
    if kind in ("linear", "cosine"):
        abar_t, abar_s = t.alpha**2, s.alpha**2
        assert sigma == pytest.approx(
            eta * math.sqrt((1 - abar_s) / (1 - abar_t)) * math.sqrt(1 - abar_t / abar_s), rel=1e-9
        )
    want = s.alpha * x0 + math.sqrt(s.sigma**2 - sigma**2) * eps + sigma * z
    assert torch.allclose(step.x, want, rtol=1e-11, atol=1e-11)


class Share:
    """A denoiser with a share of the learned range that is the same everywhere, or differs from value to value."""

    def __init__(self, share):
        self.share = share

    def __call__(self, x_t, level):
        return torch.sin(x_t + level.t)

    def with_variance(self, x_t, level):
        return self(x_t, level), torch.zeros_like(x_t) + self.share


@every_schedule
@pytest.mark.parametrize("num_steps", [1, 5, 40])
def test_the_learned_range_ends_in_the_fixed_variances(kind, num_steps):
    schedule = SCHEDULES.parse(kind)
    grid = TimeGrid.of(schedule, num_steps)

    def run(variance, share):
        generator = torch.Generator().manual_seed(3)
        noise = lambda: torch.randn(6, 3, generator=generator, dtype=torch.float64)  # noqa: E731
        solver = Ancestral(variance=variance)
        return torch.stack([s.x for s in solver.run(Share(share), randn(6, 3) * schedule.prior_std, grid, noise)])

    for share, variance in ((0.0, "fixed_small"), (1.0, "fixed_large")):
        assert torch.allclose(run("learned_range", share), run(variance, share), rtol=1e-11, atol=1e-11)
    # Each value has its own, and none is held inside the range.
    shares = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
    grid = TimeGrid(grid.levels[:2] if num_steps > 1 else grid.levels)
    x, (t, s) = run("learned_range", shares)[0], grid.levels[:2]
    step, z = reverse_step(t, s), torch.randn(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean = step.keep * randn(6, 3) * schedule.prior_std + step.pull * torch.sin(randn(6, 3) * schedule.prior_std + t.t)
    variance = step.beta**shares * step.btilde ** (1 - shares) if num_steps > 1 else 0.0
    assert torch.allclose(x, mean + variance**0.5 * z, rtol=1e-9, atol=1e-9)


def test_eta_1_stays_real_where_rounding_would_make_a_root_negative():
    grid = TimeGrid((Level(1.0, 1.0, 1_270_000.0), Level(0.5, 1.0, 0.000598), CLEAN))
    fresh = 0.000598 / 1_270_000.0 * (1_270_000.0**2 - 0.000598**2) ** 0.5
    assert 0.000598**2 - fresh**2 < 0
    states = DDIM(eta=1.0).run(lambda x, level: 0 * x, randn(2, 2), grid, lambda: randn(2, 2))  # noqa: ARG005
    assert torch.allclose(next(states).x, 0.000598 * randn(2, 2))


@every_schedule
@pytest.mark.parametrize("solver", ORDERED, ids=lambda s: s.kind)
def test_a_constant_estimate_is_followed_exactly(kind, solver):
    # With x0 the same everywhere the flow keeps eps, whatever the step: x_s = alpha_s x0 + sigma_s eps.
    schedule = SCHEDULES.parse(kind)
    x0, eps = randn(4, 2), randn(4, 2, seed=1)
    grid = TimeGrid.of(schedule, 4)
    first = grid.levels[0]
    states = solver.run(lambda x, level: x0, first.alpha * x0 + first.sigma * eps, grid, no_noise)  # noqa: ARG005
    for state, level in zip(states, grid.levels[1:], strict=True):
        scale = first.sigma / first.alpha if first.alpha > 0 else 1.0
        assert torch.allclose(state.x, level.alpha * x0 + level.sigma * eps, rtol=1e-10, atol=1e-14 * scale + 1e-12)


class ExactVariance:
    """The denoiser of data N(0, s2) over single values, and where the variance of q(x_s | x_t) lies in its range."""

    def __init__(self, s2, grid):
        self.s2, self.next = s2, dict(grid.steps())
        self.denoiser = GaussianDenoiser(torch.zeros(1).double(), torch.full((1,), s2, dtype=torch.float64))

    def __call__(self, x_t, level):
        return self.denoiser(x_t, level)

    def with_variance(self, x_t, level):
        step = reverse_step(level, self.next[level])
        posterior = self.s2 * level.sigma**2 / (level.alpha**2 * self.s2 + level.sigma**2)
        variance = step.btilde + step.pull**2 * posterior
        last = self.next[level] == CLEAN  # whose variance is never asked for
        share = math.nan if last else math.log(variance / step.btilde) / math.log(step.beta / step.btilde)
        return self(x_t, level), torch.full_like(x_t, share)


def output_variance(solver, num_steps, s2):
    """Variance of the samples of N(0, s2), exactly: the response to a unit impulse in each source of randomness."""
    grid = TimeGrid.of(LinearSchedule(), num_steps)
    oracle = ExactVariance(s2, grid)
    x = torch.zeros(num_steps, 1, dtype=torch.float64)
    x[0] = 1
    drawn = iter(range(1, num_steps))

    def noise():
        impulse = torch.zeros(num_steps, 1, dtype=torch.float64)
        impulse[next(drawn)] = 1
        return impulse

    return float(last(solver.run(oracle, x, grid, noise)).square().sum())


@pytest.mark.parametrize(
    ("variance", "num_steps", "want"),
    [
        ("fixed_large", 1000, 0.01015),
        ("fixed_large", 100, 0.01277),
        ("fixed_large", 10, 0.12557),
        ("fixed_small", 1000, 0.00928),
        ("fixed_small", 100, 0.00629),
        ("fixed_small", 10, 0.00072),
    ],
)
def test_output_variance_on_gaussian_data(variance, num_steps, want):
    assert output_variance(Ancestral(variance=variance), num_steps, 0.01) == pytest.approx(want, abs=6e-6)
    if variance == "fixed_small":
        assert output_variance(DDIM(eta=1.0), num_steps, 0.01) == pytest.approx(want, abs=6e-6)


@pytest.mark.parametrize("s2", [0.01, 0.25, 1.0])
@pytest.mark.parametrize("num_steps", [1000, 100, 10, 2, 1])
def test_the_exact_variance_gives_the_variance_of_the_data_in_any_number_of_steps(num_steps, s2):
    # Less the unsampled last step again: what is left unknown of x0 at the quietest level, and the prior's shortfall.
    quietest = TimeGrid.of(LinearSchedule(), num_steps).levels[-2]
    missing = s2 * quietest.sigma**2 / (quietest.alpha**2 * s2 + quietest.sigma**2)
    got = output_variance(Ancestral(variance="learned_range"), num_steps, s2)
    assert got == pytest.approx(s2 - missing, abs=5e-5 * s2)
    if s2 == 0.01 and num_steps >= 10:
        assert got == pytest.approx(0.0099, abs=5e-6)


def test_fixed_large_is_the_exact_variance_for_data_of_unit_variance():
    # Only the unsampled last step is missing: its posterior variance, (1 - abar_1) s2.
    assert output_variance(Ancestral(variance="fixed_large"), 1000, 1.0) == pytest.approx(1 - 1e-4, abs=1e-6)


CIRCLE = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)], dtype=torch.float64)


@every_schedule
@every_solver
@pytest.mark.parametrize("spacing", ["even", "karras"])
def test_sampling_eight_points_lands_on_them(kind, solver, spacing):
    if solver.kind == "ancestral" and solver.variance == "fixed_large":
        pytest.skip("leaves noise in the samples on short chains; covered by its variance")
    schedule = SCHEDULES.parse(kind)
    # Of 40 even steps of `vp` the last begins at a noise of 0.12, from which points between two of the eight end there.
    grid = TimeGrid.of(schedule, 100 if (kind, spacing) == ("vp", "even") else 40, spacing)
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(400, 2, generator=generator, dtype=torch.float64)  # noqa: E731
    x = last(solver.run(MixtureDenoiser(CIRCLE), noise() * schedule.prior_std, grid, noise))
    distance, nearest = torch.cdist(x, CIRCLE).min(1)
    assert (distance < 1e-3).double().mean() > 0.99
    counts = torch.bincount(nearest, minlength=8)
    assert int(counts.min()) > 20
    assert int(counts.max()) < 95


@every_schedule
def test_the_ancestral_chain_reproduces_a_mixture(kind):
    schedule = SCHEDULES.parse(kind)
    centres = torch.tensor([[-2.0], [1.0]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    grid = TimeGrid.of(schedule, 200)
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(8000, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    x = last(Ancestral().run(MixtureDenoiser(centres, 0.3, weights), noise() * schedule.prior_std, grid, noise))
    assert (x < -0.5).double().mean().item() == pytest.approx(0.3, abs=0.025)
    assert x.mean().item() == pytest.approx(0.1, abs=0.08)
    assert x[x > -0.5].std().item() == pytest.approx(0.3, rel=0.12)


@pytest.mark.parametrize(
    ("solver", "steps", "native", "warned"),
    [
        (Ancestral(variance="fixed_large"), 10, 1000, True),
        (Ancestral(variance="fixed_large"), 1000, 1000, False),
        (Ancestral(variance="fixed_large"), 10, None, True),
        (Ancestral(), 10, 1000, False),
        (DDIM(), 10, 1000, False),
        (Heun(), 10, None, False),
    ],
)
def test_fixed_large_warns_on_short_chains(solver, steps, native, warned):
    warning = solver.warning(steps, native)
    assert (warning is not None) == warned
    if warned:
        assert "fixed_large" in warning
        assert "10 of" in warning
        assert "fixed_small or ddim" in warning


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ddim", "eta": 1.01}, "eta.*less than or equal to 1"),
        ({"kind": "ddim", "eta": -0.1}, "eta.*greater than or equal to 0"),
        ({"kind": "ancestral", "variance": "fixed"}, "variance.*'fixed_small', 'fixed_large' or 'learned_range'"),
        ({"kind": "heun", "eta": 0.5}, "eta: unknown field"),
        ({"kind": "dpmpp2m"}, "did you mean 'dpmpp-2m'"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SOLVERS.parse(values)


# --- against diffusers ---------------------------------------------------------------------------------------------


def eps_model(x, step):
    """Something of the size of a noise that depends on x and on the 0-based step, nonlinearly."""
    return torch.sin(1.7 * x + step / 300) + 0.6 * x


def ours(solver, spacing, num_steps, clip, seed=11):
    schedule = LinearSchedule()
    generator = torch.Generator().manual_seed(seed)

    def denoise(x, level, condition=None):  # noqa: ARG001
        return (x - level.sigma * eps_model(x, round(level.t * 1000) - 1)) / level.alpha

    denoise = Conditioned(denoise, limits=(-1.0, 1.0)) if clip else denoise
    noise = lambda: torch.randn(3, 2, 4, 4, generator=generator)  # noqa: E731
    x = randn(3, 2, 4, 4).float()
    return [state.x for state in solver.run(denoise, x, TimeGrid.of(schedule, num_steps, spacing), noise)]


def close(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        # float32 tables there: relative to the size of the state, which grows without clipping.
        assert (a - b).abs().max() < 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 10), ("leading", 30), ("trailing", 20)])
def test_ddim_follows_diffusers(clip, eta, spacing, num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=clip, timestep_spacing=spacing, set_alpha_to_one=True)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(11)
    x, theirs = randn(3, 2, 4, 4).float(), []
    for step in scheduler.timesteps:
        noise = torch.randn(3, 2, 4, 4, generator=generator) if eta else None
        x = scheduler.step(
            eps_model(x, int(step)), step, x, eta=eta, use_clipped_model_output=clip, variance_noise=noise
        ).prev_sample
        theirs.append(x)
    close(ours(DDIM(eta=eta), spacing, num_steps, clip), theirs)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 10), ("even", 37), ("even", 200)])
def test_ancestral_follows_diffusers(clip, variance, spacing, num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        clip_sample=clip, variance_type=variance, timestep_spacing={"even": "linspace"}.get(spacing, spacing)
    )
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(11)
    x, theirs = randn(3, 2, 4, 4).float(), []
    for step in scheduler.timesteps:
        x = scheduler.step(eps_model(x, int(step)), step, x, generator=generator).prev_sample
        theirs.append(x)
    close(ours(Ancestral(variance=variance), spacing, num_steps, clip), theirs)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 20, 100])
def test_dpm_solver_follows_diffusers(clip, num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        timestep_spacing="trailing",
        prediction_type="sample",
        final_sigmas_type="zero",
        lower_order_final=num_steps > 2,
    )
    scheduler.set_timesteps(num_steps)
    schedule = LinearSchedule()
    x, theirs = randn(3, 2, 4, 4).float(), []
    for step in scheduler.timesteps:
        level = schedule.level((int(step) + 1) / 1000)
        x0 = (x - float(level.sigma) * eps_model(x, int(step))) / float(level.alpha)
        x = scheduler.step(x0.clamp(-1, 1) if clip else x0, step, x).prev_sample
        theirs.append(x)
    close(ours(DPMSolverPP2M(), "trailing", num_steps, clip), theirs)


def test_heun_is_karras_algorithm_1():
    schedule = VarianceExploding()
    oracle = MixtureDenoiser(CIRCLE, 0.1)
    grid = TimeGrid.of(schedule, 9)
    sigmas = [level.sigma for level in grid.levels]
    x = randn(20, 2) * 80
    states = list(Heun().run(oracle, x, grid, no_noise))
    for i, (a, b) in enumerate(itertools.pairwise(sigmas)):
        d = (x - oracle(x, Level(0.0, 1.0, a))) / a
        euler = x + (b - a) * d
        x = euler if b == 0 else x + (b - a) * (d + (euler - oracle(euler, Level(0.0, 1.0, b))) / b) / 2
        assert torch.allclose(states[i].x, x, rtol=1e-9, atol=1e-9)


def test_solvers_do_not_depend_on_the_parametrization_of_time():
    # The same levels reached through other times, or scaled by a common factor, give the same samples.
    oracle = MixtureDenoiser(CIRCLE, 0.1)
    grid = TimeGrid.of(StraightSchedule(), 8, "log-snr")
    for solver in ORDERED:
        plain = last(solver.run(oracle, randn(20, 2), grid, no_noise))
        norm = [math.hypot(level.alpha, level.sigma) for level in grid.levels]
        scaled = TimeGrid(
            tuple(Level(at.t**2, at.alpha / n, at.sigma / n) for at, n in zip(grid.levels, norm, strict=True))
        )
        x = last(solver.run(oracle, randn(20, 2) / norm[0], scaled, no_noise))
        assert torch.allclose(x, plain, rtol=1e-9, atol=1e-9)

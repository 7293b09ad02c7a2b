import itertools
import math

import pytest
import torch
from scipy.special import ive

from osmose.gaussian import SCHEDULES
from osmose.gaussian.derivatives import with_divergence
from osmose.gaussian.oracles import (
    ChainDenoiser,
    GaussianDenoiser,
    MixtureDenoiser,
    ProductDenoiser,
    RotatedDenoiser,
    SphereDenoiser,
    bessel_ratio,
    conservative_part,
)
from osmose.gaussian.schedule import Level

every_schedule = pytest.mark.parametrize("kind", list(SCHEDULES.entries))


def batch_of(level, index):
    return Level(*(float(value[index]) for value in level))


def levels(kind, count=6):
    return SCHEDULES.parse(kind).level(torch.linspace(0.05, 0.95, count, dtype=torch.float64))


@every_schedule
def test_gaussian_posterior_mean_by_the_textbook(kind):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    covariance = root @ root.T + 0.1 * torch.eye(3, dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    level = levels(kind)
    denoiser = GaussianDenoiser(mean, covariance)
    got = denoiser(x, level)
    for i in range(6):
        at = batch_of(level, i)
        noise = at.alpha**2 * covariance + at.sigma**2 * torch.eye(3, dtype=torch.float64)
        want = mean + at.alpha * covariance @ torch.linalg.solve(noise, x[i] - at.alpha * mean)
        assert torch.allclose(got[i], want, rtol=1e-10, atol=1e-10)
        assert torch.allclose(denoiser(x[i : i + 1], at)[0], want, rtol=1e-10, atol=1e-10)


def test_gaussian_posterior_mean_by_brute_force():
    # One dimension, the integral over x0 on a fine grid.
    x0 = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    prior = -0.5 * ((x0 - 0.7) / 0.6) ** 2
    for level in (Level(0.0, 0.9, 0.2), Level(0.0, 0.4, 1.3), Level(0.0, 1.0, 3.0)):
        for x in (-2.0, 0.1, 1.5):
            weight = torch.softmax(prior - 0.5 * ((x - level.alpha * x0) / level.sigma) ** 2, 0)
            one = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.36], dtype=torch.float64)
            got = GaussianDenoiser(*one)(torch.tensor([[x]], dtype=torch.float64), level)
            assert got.item() == pytest.approx(float(weight @ x0), abs=1e-9)


@every_schedule
def test_gaussian_flow_solves_its_ode(kind):
    # Runge-Kutta on d(x / alpha) / dr = eps, r = sigma / alpha, which does not use the schedule's derivatives.
    schedule = SCHEDULES.parse(kind)
    mean, variances = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, -0.5], [0.5, 2.0]))
    denoiser = GaussianDenoiser(mean, variances)
    start, end = (batch_of(schedule.level(torch.tensor([t])), 0) for t in (0.6, 0.3))
    x = torch.tensor([[1.0, -2.0], [0.2, 3.0]], dtype=torch.float64)

    def eps(y, r):
        # Any level with this ratio will do: E[x0 | x_t] depends on x / alpha and r alone.
        return (y - denoiser(y, Level(0.0, 1.0, r))) / r

    y, steps = x / start.alpha, 400
    r = torch.linspace(start.sigma / start.alpha, end.sigma / end.alpha, steps + 1, dtype=torch.float64).tolist()
    for a, b in itertools.pairwise(r):
        h = b - a
        k1 = eps(y, a)
        k2 = eps(y + h / 2 * k1, a + h / 2)
        k3 = eps(y + h / 2 * k2, a + h / 2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + eps(y + h * k3, b))
    assert torch.allclose(denoiser.flow(x, start, end), y * end.alpha, rtol=1e-7, atol=1e-8)


@every_schedule
@pytest.mark.parametrize("std", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixture_posterior_mean_by_brute_force(kind, std, dtype):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(40, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum()
    level = levels(kind, 30)
    picked = centres[torch.arange(30)]
    noise = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    x = level.alpha[:, None] * picked + level.sigma[:, None] * noise
    want = []
    for i in range(30):
        at = batch_of(level, i)
        variance = at.alpha**2 * std**2 + at.sigma**2
        log = weights.log() - ((x[i] - at.alpha * centres) ** 2).sum(1) / (2 * variance)
        posterior = (log - log.logsumexp(0)).exp()
        means = centres + at.alpha * std**2 / variance * (x[i] - at.alpha * centres)
        want.append(posterior @ means)
    want = torch.stack(want)
    denoiser = MixtureDenoiser(centres.to(dtype), std, weights.to(dtype))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    assert torch.allclose(denoiser(x.to(dtype), level).double(), want, **tolerance)
    for i in (0, 15, 29):
        one = denoiser(x.to(dtype), batch_of(level, i))[i]
        assert torch.allclose(one.double(), want[i], **tolerance)


def test_ideal_denoiser_of_a_data_set_is_exact_in_float32():
    # Far from the origin |x|^2 is large and the distances small: they must not be found by expanding the square.
    generator = torch.Generator().manual_seed(0)
    data = 0.9 + 0.001 * torch.randn(60, 300, generator=generator)
    level = Level(0.0, 1.0, 0.01)
    x = data[:50] + 0.01 * torch.randn(50, 300, generator=generator)
    assert torch.allclose(
        MixtureDenoiser(data).responsibilities(x, level).double(),
        MixtureDenoiser(data.double()).responsibilities(x.double(), level),
        atol=2e-4,
    )


def test_mixture_weights_and_limits():
    centres = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    loud = Level(1.0, 1e-6, 1.0)
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert MixtureDenoiser(centres)(x, loud).item() == pytest.approx(0, abs=1e-9)
    weighted = MixtureDenoiser(centres, weights=torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert weighted(x, loud).item() == pytest.approx(0.5, abs=1e-5)
    level = Level(0.5, 0.8, 0.6)
    x = torch.tensor([[0.3]], dtype=torch.float64)
    assert MixtureDenoiser(centres)(x, level).item() == pytest.approx(math.tanh(0.8 * 0.3 / 0.36), rel=1e-12)


def test_a_mixture_of_one_is_a_gaussian():
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64)
    for level in (Level(0.5, 0.8, 0.6), Level(0.5, 1.0, 4.0)):
        gaussian = GaussianDenoiser(mean, torch.full((2,), 0.09, dtype=torch.float64))
        assert torch.allclose(MixtureDenoiser(mean[None], 0.3)(x, level), gaussian(x, level), rtol=1e-12)


# --- a deviation, and modes, for each coordinate ---------------------------------------------------------------------

#: Coordinates and modes; parameters without any symmetry, so that nothing that is mixed up comes out right.
D, K = 5, 3


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(*shape, seed):
    return torch.softmax(normal(*shape, seed=seed), -1)


CENTRES, WEIGHTS = 1.5 * normal(D, K, seed=1), shares(D, K, seed=2)
DEVIATIONS = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3], dtype=torch.float64)
TRANSITIONS, START = shares(D - 1, K, K, seed=3), shares(K, seed=4)
PLACES, PLACE_WEIGHTS = normal(6, D, seed=5), shares(6, seed=6)


def modes(centres, log_law):
    """All combinations of modes: their centres (K^D, D), and their log weights, of a function of the combination."""
    combinations = list(itertools.product(range(centres.shape[1]), repeat=len(centres)))
    places = torch.stack([centres[torch.arange(len(centres)), list(modes)] for modes in combinations])
    return places, torch.stack([log_law(modes) for modes in combinations])


def of_product(combination):
    return sum(WEIGHTS[i, mode].log() for i, mode in enumerate(combination))


def of_chain(combination):
    steps = itertools.pairwise(combination)
    return START[combination[0]].log() + sum(TRANSITIONS[i, a, b].log() for i, (a, b) in enumerate(steps))


#: Each oracle, and the same law as a mixture: centres and log weights, all of deviations DEVIATIONS.
KNOWN = {
    "mixture": (MixtureDenoiser(PLACES, DEVIATIONS, PLACE_WEIGHTS), (PLACES, PLACE_WEIGHTS.log())),
    "product": (ProductDenoiser(CENTRES, DEVIATIONS, WEIGHTS), modes(CENTRES, of_product)),
    "chain": (ChainDenoiser(CENTRES, DEVIATIONS, TRANSITIONS, START), modes(CENTRES, of_chain)),
}
every_oracle = pytest.mark.parametrize("name", KNOWN)


def joint(x, at, places, log_weights):
    """log p(x_t, component) of one point (D,) at a level of numbers, shape (components,)."""
    total = at.alpha**2 * DEVIATIONS**2 + at.sigma**2
    return log_weights - ((x - at.alpha * places) ** 2 / (2 * total) + total.log() / 2).sum(1)


def between(kind, places, log_weights, count=8):
    """Noised points of a law, shape (count, D), and their levels."""
    level = levels(kind, count)
    generator = torch.Generator().manual_seed(7)
    drawn = places[torch.multinomial(log_weights.exp(), count, replacement=True, generator=generator)]
    x0 = drawn + DEVIATIONS * normal(count, D, seed=8)
    return level.alpha[:, None] * x0 + level.sigma[:, None] * normal(count, D, seed=9), level


@every_schedule
@every_oracle
def test_modes_of_each_coordinate_by_all_their_combinations(kind, name):
    denoiser, law = KNOWN[name]
    assert torch.allclose(law[1].exp().sum(), torch.ones((), dtype=torch.float64))
    x, level = between(kind, *law)
    got = denoiser(x, level)
    for i in range(len(x)):
        at = batch_of(level, i)
        gain = at.alpha * DEVIATIONS**2 / (at.alpha**2 * DEVIATIONS**2 + at.sigma**2)
        means = law[0] + gain * (x[i] - at.alpha * law[0])
        want = torch.softmax(joint(x[i], at, *law), 0) @ means
        assert torch.allclose(got[i], want, rtol=1e-10, atol=1e-10)
        assert torch.allclose(denoiser(x, at)[i], want, rtol=1e-10, atol=1e-10)


@every_oracle
def test_tweedie_s_formula_holds(name):
    # E[x0 | x_t] = (x_t + sigma^2 grad log p(x_t)) / alpha needs the density of x_t alone.
    denoiser, law = KNOWN[name]
    x, level = between("cosine", *law)
    got = denoiser(x, level)
    for i in range(len(x)):
        at, point = batch_of(level, i), x[i].clone().requires_grad_()
        (score,) = torch.autograd.grad(joint(point, at, *law).logsumexp(0), point)
        assert torch.allclose(got[i], (x[i] + at.sigma**2 * score) / at.alpha, rtol=1e-8, atol=1e-8)


@every_oracle
def test_they_answer_in_the_type_of_the_question(name):
    denoiser, law = KNOWN[name]
    x, level = between("linear", *law)
    for at in (level, batch_of(level, 4)):
        got = denoiser(x.float(), at)
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), denoiser(x.float().double(), at), atol=1e-4)


def test_a_product_is_one_mixture_for_each_coordinate():
    x, level = between("cosine", *KNOWN["product"][1])
    got = KNOWN["product"][0](x, level)
    for i in range(D):
        alone = MixtureDenoiser(CENTRES[i, :, None], float(DEVIATIONS[i]), WEIGHTS[i])
        assert torch.allclose(got[:, i : i + 1], alone(x[:, i : i + 1], level), rtol=1e-10, atol=1e-10)


def test_a_component_of_weight_0_is_not_there():
    weights = torch.tensor([[0.3, 0.7, 0.0]], dtype=torch.float64).expand(D, K)
    x, level = between("cosine", *KNOWN["product"][1])
    got = ProductDenoiser(CENTRES, DEVIATIONS, weights)(x, level)
    want = ProductDenoiser(CENTRES[:, :2], DEVIATIONS, weights[:, :2])(x, level)
    assert torch.allclose(got, want, rtol=1e-12)


def test_a_chain_without_memory_is_a_product():
    half = torch.full((D - 1, 2, 2), 0.5, dtype=torch.float64)
    x, level = between("cosine", *KNOWN["chain"][1])
    chain = ChainDenoiser(CENTRES[:, :2], DEVIATIONS, half)(x, level)
    product = ProductDenoiser(CENTRES[:, :2], DEVIATIONS, torch.full((D, 2), 0.5, dtype=torch.float64))(x, level)
    assert torch.allclose(chain, product, rtol=1e-12)
    # With a memory it is another: the test above can fail.
    flips = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).expand(D - 1, 2, 2)
    assert not torch.allclose(ChainDenoiser(CENTRES[:, :2], DEVIATIONS, flips)(x, level), product, atol=0.01)


def test_a_chain_that_never_changes_is_a_mixture_of_two():
    stay = torch.eye(2, dtype=torch.float64).expand(D - 1, 2, 2)
    x, level = between("cosine", *KNOWN["chain"][1])
    got = ChainDenoiser(CENTRES[:, :2], DEVIATIONS, stay)(x, level)
    assert torch.allclose(got, MixtureDenoiser(CENTRES[:, :2].T, DEVIATIONS)(x, level), rtol=1e-10)


def test_a_long_chain_stays_finite_where_noise_is_small():
    # Far from every mode the probabilities of 300 coordinates are no numbers of float32, their logarithms are.
    signs = torch.tensor([-1.0, 1.0]).expand(300, 2)
    flips = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).expand(299, 2, 2)
    chain = ChainDenoiser(signs, torch.full((300,), 0.01), flips)
    x = torch.full((2, 300), 5.0)
    x[1] = -5
    got = chain(x, Level(0.0, 1.0, 0.01))
    assert torch.allclose(got, torch.tensor([[3.0], [-3.0]]).expand(2, 300), rtol=1e-4)


def test_one_deviation_for_each_coordinate_is_the_number_where_all_are_equal():
    x, level = between("cosine", *KNOWN["mixture"][1])
    for at in (level, batch_of(level, 3)):
        number = MixtureDenoiser(PLACES, 0.4, PLACE_WEIGHTS)(x, at)
        each = MixtureDenoiser(PLACES, torch.full((D,), 0.4, dtype=torch.float64), PLACE_WEIGHTS)(x, at)
        assert torch.allclose(number, each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dimension", [2, 3, 4, 7, 30, 60])
def test_bessel_ratios_are_those_of_scipy(dimension):
    kappa = torch.tensor([1e-9, 1e-3, 0.7, 12.0, 19.0 + dimension, 21.0 + dimension, 800.0, 1e5], dtype=torch.float64)
    want = ive(dimension / 2, kappa.numpy()) / ive(dimension / 2 - 1, kappa.numpy())
    assert torch.allclose(bessel_ratio(kappa, dimension), torch.from_numpy(want), rtol=1e-10)


def test_a_bessel_ratio_beyond_what_it_is_right_for_is_refused():
    with pytest.raises(ValueError, match="a Bessel ratio of d = 61 is not computed here"):
        bessel_ratio(torch.ones(1), 61)


def frame_of(dimension, axes):
    normal = torch.randn(dimension, axes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.linalg.qr(normal)[0]


def test_the_sphere_s_denoiser_is_the_mean_over_the_sphere():
    frame, level = frame_of(5, 3), Level(0.0, 0.8, 0.3)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    height = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    turn = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    z, t = (value.flatten() for value in torch.meshgrid(height, turn, indexing="ij"))
    wide = (1 - z**2).clamp(min=0).sqrt()
    places = 1.5 * torch.stack([wide * t.cos(), wide * t.sin(), z], 1) @ frame.T
    ends = torch.where((z.abs() == 1), 0.5, 1.0).log()  # trapezoidal rule in height, on which the area is uniform
    weight = torch.softmax(ends - ((x[:, None] - 0.8 * places) / 0.3).square().sum(2) / 2, 1)
    got = SphereDenoiser(frame, radius=1.5)(x, level)
    assert torch.allclose(got, weight @ places, atol=1e-6)
    assert torch.allclose(got @ frame @ frame.T, got, atol=1e-12)


def test_a_rotated_score_keeps_every_law_and_turns_every_path():
    # div(p A s) = 0 for the mixture's score s, checked as div(A s) + (A s) . s by autograd.
    centres = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.4, 0.0]], dtype=torch.float64)
    exact = MixtureDenoiser(centres, 0.5)
    skew = torch.tensor([[0, 1.0, -0.3], [-1.0, 0, 0.6], [0.3, -0.6, 0]], dtype=torch.float64)
    for level in (Level(0.0, 1.0, 0.4), Level(0.0, 0.6, 0.8)):

        def added(y, level=level):
            scale = level.alpha / level.sigma**2
            return (RotatedDenoiser(exact, skew)(y, level) - exact(y, level)) * scale

        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        gauge, divergence = with_divergence(added, x, None)
        score = (level.alpha * exact(x, level) - x) / level.sigma**2
        assert torch.allclose(gauge, score @ skew.T, atol=1e-10)
        assert torch.allclose(divergence[0] + (gauge * score).sum(1), torch.zeros(6).double(), atol=1e-9)
        assert float(gauge.abs().min()) > 1e-4


def test_a_gauge_field_leaves_a_gaussian_s_flow_its_law():
    # Push N(0, C + r^2) from r = 5 to 0.05 along dy/d(log r) = y - D: the covariance at the end is exact for any gauge.
    covariance = torch.diag(torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64))
    eye = torch.eye(4, dtype=torch.float64)
    # At every r: with the flow's matrix M, d(C + r^2)/d(log r) = M (C + r^2) + (C + r^2) M^T has to be 2 r^2.
    for ratio in (0.01, 0.3, 4.0):
        here = covariance + ratio**2 * eye
        turn = torch.triu(torch.randn(4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64), 1)
        exact = GaussianDenoiser(torch.zeros(4, dtype=torch.float64), covariance)
        matrix = eye - RotatedDenoiser(exact, 5 * (turn - turn.T))(eye, Level(0.0, 1.0, ratio)).T
        assert torch.allclose(matrix @ here + here @ matrix.T, 2 * ratio**2 * eye, atol=1e-10)
    skew = torch.triu(torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64), 1)
    exact, pushed = GaussianDenoiser(torch.zeros(4, dtype=torch.float64), covariance), []
    for weight in (0.0, 1.0, 5.0):
        denoiser, Y = RotatedDenoiser(exact, weight * (skew - skew.T)), eye
        taus = torch.linspace(math.log(5), math.log(0.05), 1001, dtype=torch.float64).tolist()
        for a, b in itertools.pairwise(taus):
            slope = eye - denoiser(eye, Level(0.0, 1.0, math.exp((a + b) / 2))).T  # linear: its columns are images
            Y = torch.linalg.matrix_exp((b - a) * slope) @ Y
        pushed.append(Y @ (covariance + 25 * eye) @ Y.T)
        assert torch.allclose(pushed[-1], covariance + 0.05**2 * eye, atol=2e-4)
    assert not torch.allclose(Y, Y.T, atol=0.1)


def test_the_gradient_part_of_a_linear_field_is_lyapunov_s():
    generator = torch.Generator().manual_seed(6)
    root, matrix = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    covariance = root @ root.T + torch.eye(4, dtype=torch.float64)
    part = conservative_part(matrix, covariance)
    assert torch.allclose(part, part.T, atol=1e-12)
    assert torch.allclose(
        part @ covariance + covariance @ part, matrix @ covariance + covariance @ matrix.T, atol=1e-10
    )
    rest = part - matrix  # r = rest x: div(p r) = 0 is trace(rest) = 0 and x' rest' C^-1 x = 0
    odd = rest.T @ covariance.inverse()
    assert abs(float(rest.trace())) < 1e-10
    assert torch.allclose(odd, -odd.T, atol=1e-10)
    # E|s|^2 = E|grad phi|^2 + E|r|^2, and it is not the symmetric part.
    squares = [float((m @ covariance @ m.T).trace()) for m in (matrix, part, rest)]
    assert squares[0] == pytest.approx(squares[1] + squares[2], rel=1e-10)
    assert float((part - (matrix + matrix.T) / 2).norm()) > 0.1

"""The identities of the metrics: closed forms, invariances, unbiasedness, agreement with other implementations."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from osmose.errors import UserError
from osmose.metrics.distances import (
    Moments,
    crps_ensemble,
    energy_distance,
    frechet_distance,
    frechet_standard_error,
    inception_score,
    kernel_distance,
    mmd,
    nearest_neighbour_ratio,
    precision_recall,
    sliced_wasserstein,
    total_variation,
)
from osmose.metrics.neighbours import nearest_distances


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(mean, covariance, n=10_000):
    """Moments with exactly this mean and unbiased covariance."""
    return Moments(n, mean, covariance * (n - 1))


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed))[0]


def fd(x, y):
    return frechet_distance(Moments.of(x), Moments.of(y))


# --- moments and the Frechet distance -------------------------------------------------------------------------------


def test_streamed_moments_equal_those_of_all_rows_at_once():
    x = normal(1000, 20) * 3 + 100
    whole = Moments.of(x)
    streamed = Moments.of(x[:1])
    for chunk in x[1:600].split(77):
        streamed = streamed.update(chunk)
    merged = streamed.merge(Moments.of(x[600:]))
    assert merged.n == 1000
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-10, atol=0)
    assert torch.allclose(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-10)
    assert torch.allclose(whole.covariance, torch.from_numpy(np.cov(x.numpy().T)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dead", [0, 10])
def test_frechet_distance_of_a_set_to_itself_is_zero(dead):
    x = normal(300, 40) @ normal(40, 40, 1)
    x[:, :dead] = 2.5
    x[:, dead + 1] = x[:, dead + 2]  # and one feature that is a copy of another
    moments = Moments.of(x)
    assert abs(frechet_distance(moments, moments)) < 1e-8 * float(moments.covariance.trace())


def test_frechet_distance_has_its_closed_form_for_commuting_covariances():
    d = 12
    basis = rotation(d)
    a, b = torch.linspace(0.1, 4, d, dtype=torch.float64), torch.linspace(3, 0.5, d, dtype=torch.float64)
    x, y = exact(torch.zeros(d), basis * a @ basis.T), exact(torch.ones(d).double(), basis * b @ basis.T)
    expected = d + float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_agrees_with_scipy_and_ignores_a_common_rotation():
    x, y = normal(500, 16) @ normal(16, 16, 1), normal(400, 16, 2) @ normal(16, 16, 3) + 0.5
    sx, sy = Moments.of(x).covariance.numpy(), Moments.of(y).covariance.numpy()
    root = scipy.linalg.sqrtm(sx @ sy).real
    shift = (x.mean(0) - y.mean(0)).square().sum()
    expected = float(shift) + np.trace(sx + sy - 2 * root)
    turn = rotation(16, 5)
    assert fd(x, y) == pytest.approx(expected, rel=1e-7)
    assert fd(x @ turn, y @ turn) == pytest.approx(fd(x, y), rel=1e-9)
    assert fd(y, x) == pytest.approx(fd(x, y), rel=1e-9)


def test_frechet_distance_between_equal_laws_follows_its_bias_law():
    n, d, s = 2000, 64, 1.7
    values = [fd(s * normal(n, d, 2 * i), s * normal(n, d, 2 * i + 1)) for i in range(3)]
    law = s**2 * d**2 / (2 * n)
    assert 0.95 < np.mean(values) / law < 1.2
    half = [
        frechet_distance(Moments.of(s * normal(n, d, i)), exact(torch.zeros(d), s**2 * torch.eye(d).double()))
        for i in range(3)
    ]
    assert 0.45 < np.mean(half) / law < 0.62


def test_bootstrap_error_has_the_size_of_the_spread_over_repetitions():
    n, d = 400, 8
    y = normal(n, d, 1)
    values = np.array([fd(normal(n, d, 100 + i) + 0.3, normal(n, d, 500 + i)) for i in range(60)])
    error = np.mean([frechet_standard_error(normal(n, d, i) + 0.3, y, seed=i) for i in range(5)])
    assert 0.6 < error / values.std() < 1.7


def test_frechet_distance_refuses_singular_covariances_with_both_numbers():
    with pytest.raises(UserError, match=r"n = 64 generated samples for d = 64 features.*10 d = 640"):
        fd(normal(64, 64), normal(200, 64))
    with pytest.raises(UserError, match=r"n = 10 real samples"):
        fd(normal(200, 64), normal(10, 64))


# --- unbiasedness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distance",
    [
        energy_distance,
        lambda x, y: mmd(x, y, median=2.0),
        lambda x, y: kernel_distance(x, y, num_subsets=4),
    ],
    ids=["energy", "mmd", "kernel"],
)
def test_unbiased_distances_have_mean_zero_for_equal_laws(distance):
    resamples = [distance(normal(60, 5, 2 * i), normal(50, 5, 2 * i + 1)) for i in range(200)]
    values = np.array([estimate.value for estimate in resamples])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)
    assert values.min() < 0  # never clipped
    # The errors that come with the values are of the size of their actual spread.
    assert 0.7 < np.mean([estimate.standard_error for estimate in resamples]) / values.std() < 2


def test_standard_errors_hold_for_different_laws_too():
    resamples = [energy_distance(normal(80, 3, 2 * i) + 1, normal(60, 3, 2 * i + 1)) for i in range(100)]
    spread = np.std([estimate.value for estimate in resamples])
    assert 0.75 < np.mean([estimate.standard_error for estimate in resamples]) / spread < 1.4


def test_energy_distance_agrees_with_scipy_in_one_dimension():
    x, y = normal(300, 1), normal(200, 1, 1) * 2 + 1
    n, m = len(x), len(y)
    # scipy's is the biased square root: undo both.
    biased = scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    within = [float(torch.cdist(a, a).mean()) / (len(a) - 1) for a in (x, y)]
    assert energy_distance(x, y).value == pytest.approx(biased - sum(within), rel=1e-9)
    assert n != m


def test_a_set_given_twice_is_treated_like_two_sets():
    x = normal(30, 2)
    expected = -2 * float(torch.cdist(x, x).sum()) * (1 / (30 * 29) - 1 / 30**2)
    assert energy_distance(x, x).value == pytest.approx(expected, rel=1e-9)


def test_blocks_do_not_change_values(monkeypatch):
    x, y = normal(50, 4), normal(70, 4, 1) + 1
    whole = energy_distance(x, y), mmd(x, y), precision_recall(x, y), nearest_distances(x, y)
    monkeypatch.setattr("osmose.metrics.matrices.BLOCK_ENTRIES", 100)
    pieces = energy_distance(x, y), mmd(x, y), precision_recall(x, y), nearest_distances(x, y)
    for a, b in zip(whole[:2], pieces[:2], strict=True):
        assert a[:2] == pytest.approx(b[:2], rel=1e-10)
    assert whole[2] == pieces[2]
    assert torch.equal(whole[3], pieces[3])


def test_mmd_uses_the_scale_of_the_real_data():
    x, y = normal(100, 3), normal(100, 3, 1)
    assert mmd(10 * x, 10 * y).value == pytest.approx(mmd(x, y).value, rel=1e-9)
    assert mmd(10 * x, y).value > mmd(x, y).value + 0.1
    with pytest.raises(UserError, match="median distance of the real data is 0"):
        mmd(x, torch.zeros(100, 3))


# --- sliced Wasserstein ---------------------------------------------------------------------------------------------


def test_sliced_distance_of_a_translation():
    d, shift = 16, 3.0
    x = normal(200, d)
    step = torch.zeros(d).double()
    step[0] = shift
    assert sliced_wasserstein(x, x + step, num_directions=20_000) == pytest.approx(shift / math.sqrt(d), rel=0.03)


@pytest.mark.parametrize(("n", "m"), [(300, 300), (300, 170)])
def test_one_dimensional_wasserstein_agrees_with_scipy(n, m):
    x, y = normal(n, 1), normal(m, 1, 1) * 1.5 + 0.2
    expected = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0])
    assert sliced_wasserstein(x, y, p=1, num_directions=5) == pytest.approx(expected, rel=1e-9)


def test_sliced_distance_repeats_with_its_seed_and_is_zero_for_equal_sets():
    x, y = normal(100, 5), normal(100, 5, 1)
    assert sliced_wasserstein(x, y, seed=3) == sliced_wasserstein(x, y, seed=3) != sliced_wasserstein(x, y, seed=4)
    assert sliced_wasserstein(x, x[torch.randperm(100)]) == 0


def test_measuring_leaves_the_global_random_state_alone():
    x, y = normal(100, 5), normal(100, 5, 1)
    before = torch.get_rng_state()
    sliced_wasserstein(x, y), kernel_distance(x, y), mmd(x, y), frechet_standard_error(x, y)
    assert torch.equal(before, torch.get_rng_state())


# --- predictions ----------------------------------------------------------------------------------------------------


def test_inception_score_is_one_for_constant_and_the_number_of_classes_for_sure_predictions():
    constant = torch.full((100, 7), 1 / 7)
    assert inception_score(constant).value == pytest.approx(1, abs=1e-6)
    sure = torch.eye(10).repeat(500, 1)
    assert inception_score(sure, splits=1).value == pytest.approx(10, rel=1e-9)
    sorted_by_class = torch.eye(10).repeat_interleave(500, dim=0)
    assert inception_score(sorted_by_class).value > 9.8
    assert inception_score(sure, splits=5).std < 0.2


def test_inception_score_refuses_fewer_samples_than_splits_and_logits():
    with pytest.raises(UserError, match="7 samples cannot be cut into 10 splits"):
        inception_score(torch.full((7, 2), 0.5))
    with pytest.raises(UserError, match="softmax"):
        inception_score(normal(20, 4))


def test_crps_of_a_standard_normal_at_its_centre():
    draws = normal(200_000, 1)[:, 0]
    expected = math.sqrt(2 / math.pi) - 1 / math.sqrt(math.pi)  # 0.2337
    assert float(crps_ensemble(draws, torch.tensor(0.0))) == pytest.approx(expected, abs=3e-3)
    assert expected == pytest.approx(0.2337, abs=1e-4)


def test_crps_is_fair_and_equals_its_definition():
    z, y = normal(5, 3), normal(1, 3, 9)[0]
    pairs = (z[:, None] - z[None]).abs().sum(dim=(0, 1)) / (2 * 5 * 4)
    assert torch.allclose(crps_ensemble(z, y), (z - y).abs().mean(0) - pairs)
    small = crps_ensemble(normal(2, 40_000), torch.zeros(40_000))
    assert float(small.mean()) == pytest.approx(0.2337, abs=0.015)
    with pytest.raises(UserError, match="M of at least 2"):
        crps_ensemble(z[:1], y)


def test_total_variation():
    assert total_variation(torch.tensor([2, 2, 0]), torch.tensor([0, 10, 10])) == pytest.approx(0.5)
    assert total_variation(torch.tensor([1, 3]), torch.tensor([10, 30])) == 0
    with pytest.raises(UserError, match="empty"):
        total_variation(torch.tensor([0, 0]), torch.tensor([1, 1]))


# --- neighbours -----------------------------------------------------------------------------------------------------


def test_precision_and_recall_of_equal_sets_are_one():
    x = normal(200, 6) + 50
    assert precision_recall(x, x[torch.randperm(200)]) == (1, 1)
    repeated = x[:20].repeat(10, 1)  # radii of 0
    assert precision_recall(repeated, repeated) == (1, 1)


def test_precision_falls_with_noise_and_recall_with_missing_modes():
    modes = torch.tensor([[0.0, 0.0], [20.0, 0.0]])
    real = torch.cat([normal(200, 2) + modes[0], normal(200, 2, 1) + modes[1]])
    one_mode = normal(400, 2, 2) + modes[0]
    noisy = torch.cat([normal(100, 2, 3), normal(100, 2, 4) + modes[1], 40 * normal(200, 2, 5)])
    missing, mixed = precision_recall(one_mode, real), precision_recall(noisy, real)
    assert missing.precision > 0.9
    assert missing.recall < 0.6
    assert mixed.precision < 0.7
    assert mixed.recall > 0.9


def test_nearest_neighbour_ratio_sees_copies():
    train, unseen, fresh = normal(500, 4), normal(200, 4, 1), normal(200, 4, 2)
    assert nearest_neighbour_ratio(train[:100], train, unseen) == 0
    assert nearest_neighbour_ratio(fresh, train, unseen) == pytest.approx(1, abs=0.2)
    assert nearest_neighbour_ratio(5 * fresh, train, unseen) > 2
    with pytest.raises(UserError, match="exact copies"):
        nearest_neighbour_ratio(fresh, train, train[:50])


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [energy_distance, mmd, kernel_distance, sliced_wasserstein, precision_recall, fd])
def test_not_a_number_is_refused_with_its_count(distance):
    x = normal(100, 4)
    x[3, 1], x[7, 2] = math.nan, math.inf
    with pytest.raises(UserError, match="2 of 100 rows hold NaN or infinity"):
        distance(x, normal(100, 4))


def test_different_columns_images_and_too_few_rows_are_refused():
    with pytest.raises(UserError, match="4 columns and real samples 5"):
        energy_distance(normal(10, 4), normal(10, 5))
    with pytest.raises(UserError, match="flatten"):
        energy_distance(torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 8, 8))
    with pytest.raises(UserError, match="3 rows given, at least 4 needed"):
        precision_recall(normal(3, 4), normal(10, 4))


# --- against torchmetrics -------------------------------------------------------------------------------------------


class _Flatten(torch.nn.Module):
    num_features = 16

    def forward(self, x):
        return x.flatten(1).to(torch.float64)


def test_frechet_distance_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    metric = fid.FrechetInceptionDistance(feature=_Flatten(), input_img_size=(1, 4, 4), normalize=True)
    metric.set_dtype(torch.float64)
    x, y = torch.rand(300, 1, 4, 4), torch.rand(300, 1, 4, 4) ** 2
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert fd(x.flatten(1), y.flatten(1)) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_kernel_distance_agrees_with_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(100, 16).abs(), normal(100, 16, 1).abs() * 1.5
    metric = kid.KernelInceptionDistance(feature=_Flatten(), subsets=200, subset_size=50)
    metric.update(y.view(-1, 1, 4, 4), real=True)
    metric.update(x.view(-1, 1, 4, 4), real=False)
    mean, std = metric.compute()
    ours = kernel_distance(x, y, num_subsets=200)
    assert ours.value == pytest.approx(float(mean), abs=4 * float(std) / math.sqrt(200))
    assert ours.std == pytest.approx(float(std), rel=0.3)


def test_inception_score_agrees_with_torchmetrics():
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = 3 * normal(200, 16)
    metric = inception.InceptionScore(feature=_Flatten(), splits=1)
    metric.update(logits.view(-1, 1, 4, 4))
    ours = inception_score(logits.softmax(dim=1), splits=1)
    assert ours.value == pytest.approx(float(metric.compute()[0]), rel=1e-5)

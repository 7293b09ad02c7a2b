"""Noise of functions: factors against matrices, processes against each other, and what is refused."""

import math

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.processes import KERNELS
from osmose.processes.kernels import BrownianKernel, DenseFactor, GPKernel, OUKernel, WhiteKernel, check_times, kriging

KINDS = {
    "white": {},
    "ou": {"length_scale": 0.4},
    "brownian": {"length_scale": 0.7, "origin": -0.2},
    "gp": {"length_scale": 0.1},
    "matern32": {"length_scale": 0.3},
    "matern52": {"length_scale": 0.3},
}


def kernel(kind):
    return KERNELS.parse({"kind": kind, **KINDS[kind]})


def times(count=12, batch=3, seed=0):
    found = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.sort(dim=1).values


def columns(factor, t):
    """C as a matrix: the factor on unit vectors as channels."""
    unit = torch.eye(t.shape[1], dtype=torch.float64).expand(len(t), -1, -1)
    return factor.color(unit).mT


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_is_a_root_of_the_covariance_and_triangular(kind):
    t = times()
    root = columns(kernel(kind).factor(t), t)
    assert torch.allclose(root @ root.mT, kernel(kind).covariance(t), atol=1e-12)
    assert torch.equal(root, root.tril())
    assert torch.allclose(root, torch.linalg.cholesky(kernel(kind).covariance(t)), atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_whitening_undoes_colouring_and_log_det_is_that_of_the_matrix(kind):
    t, factor = times(), kernel(kind).factor(times())
    eps = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(factor.whiten(factor.color(eps)), eps, atol=1e-9)
    expected = torch.linalg.slogdet(kernel(kind).covariance(t)).logabsdet / 2
    assert torch.allclose(factor.log_det().sum(1), expected, atol=1e-9)
    assert factor.color(eps.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_noise_at_some_of_the_times_has_the_covariance_of_those(kind):
    t, some = times(), torch.tensor([0, 3, 4, 9])
    whole, part = kernel(kind).covariance(t), kernel(kind).covariance(t[:, some])
    assert torch.allclose(whole[:, some][:, :, some], part, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_filled_up_at_the_end_changes_nothing_before_it(kind):
    t = times()
    longer = torch.cat([t, t[:, -1:] + torch.tensor([0.5, 1.0])], 1)
    eps = torch.randn(3, 2, 14, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    short, long = kernel(kind).factor(t), kernel(kind).factor(longer)
    assert torch.allclose(long.color(eps)[..., :12], short.color(eps[..., :12]), atol=1e-12)
    assert torch.allclose(long.whiten(eps)[..., :12], short.whiten(eps[..., :12]), atol=1e-8)
    assert torch.allclose(long.log_det()[:, :12], short.log_det(), atol=1e-12)


@pytest.mark.parametrize("kind", ["ou", "gp", "matern32", "matern52"])
def test_time_has_no_origin_and_the_scale_of_the_kernel(kind):
    t, plain = times(), kernel(kind)
    assert torch.allclose(plain.covariance(t + 7), plain.covariance(t), atol=1e-10)
    scaled = plain.replace(length_scale=24 * plain.length_scale)
    assert torch.allclose(scaled.covariance(24 * t), plain.covariance(t), atol=1e-12)


def test_closed_forms_of_the_kernels():
    t = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    assert float(OUKernel(length_scale=2.0).covariance(t)[0, 0, 1]) == pytest.approx(math.exp(-0.75))
    assert float(GPKernel(length_scale=2.0, jitter=0.0).covariance(t)[0, 0, 1]) == pytest.approx(math.exp(-0.5625))
    assert float(BrownianKernel(length_scale=2.0).covariance(t)[0, 0, 1]) == pytest.approx(0.25)
    a = math.sqrt(3) * 0.75
    matern = KERNELS.parse({"kind": "matern32", "length_scale": 2.0, "jitter": 0.0})
    assert float(matern.covariance(t)[0, 0, 1]) == pytest.approx((1 + a) * math.exp(-a))
    a = math.sqrt(5) * 0.75
    matern = KERNELS.parse({"kind": "matern52", "length_scale": 2.0, "jitter": 0.0})
    assert float(matern.covariance(t)[0, 0, 1]) == pytest.approx((1 + a + a * a / 3) * math.exp(-a))


def test_the_noise_that_is_drawn_has_the_covariance():
    t = times(batch=1)
    factor = OUKernel(length_scale=0.4).factor(t)
    eps = torch.randn(1, 200_000, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.cov(factor.color(eps)[0].T)
    assert float((found - OUKernel(length_scale=0.4).covariance(t)[0]).abs().max()) < 0.015


def test_close_times_keep_their_digits():
    t = torch.tensor([[0.0, 1e-9, 1.0]], dtype=torch.float64)
    factor = OUKernel(length_scale=1.0).factor(t)
    assert float(factor.log_det()[0, 1]) == pytest.approx(math.log(2e-9) / 2, rel=1e-9)


def test_a_matrix_that_needs_jitter_gets_it_and_says_so():
    t = torch.linspace(0, 1, 60, dtype=torch.float64)[None]
    smooth = GPKernel(length_scale=2.0, jitter=0.0)
    with pytest.warns(UserWarning, match=r"kernel gp: needed a jitter of 1e-\d+ more to be positive definite"):
        factor = smooth.factor(t)
    assert isinstance(factor, DenseFactor)
    assert 0 < factor.jitter <= 1e-2
    with pytest.raises(UserError, match=r"mine: not positive definite, not even with a jitter of 0\.01"):
        DenseFactor(-torch.eye(3, dtype=torch.float64)[None], "mine")


@pytest.mark.parametrize(
    ("scale", "words"), [(0.001, "is white noise; the length_scale is in the units"), (1e5, "drown in rounding")]
)
def test_a_length_scale_in_other_units_is_noticed(scale, words):
    assert words in OUKernel(length_scale=scale).warning(times())
    assert OUKernel(length_scale=0.1).warning(times()) is None
    assert WhiteKernel().warning(times()) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.0, 1.0, 1.0]], "times: 1 comes after 1 in series 0"),
        ([[0.0, 1.0, 2.0], [0.0, 2.0, 1.5]], "times: 1.5 comes after 2 in series 1"),
        ([[0.0, math.nan]], "times: hold NaN or infinity"),
    ],
)
def test_times_that_do_not_ascend_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        check_times(torch.tensor(values, dtype=torch.float64))
    for kind in KINDS:
        with pytest.raises(UserError):
            kernel(kind).factor(torch.tensor(values, dtype=torch.float64))


def test_other_bad_values():
    with pytest.raises(ConfigError, match="length_scale: 0 is not valid: should be greater than 0"):
        OUKernel.parse({"length_scale": 0})
    with pytest.raises(UserError, match=r"kernel\.origin: 0 is not valid: must lie before the first time, 0"):
        BrownianKernel().factor(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="times must be float64"):
        check_times(torch.zeros(2, 3))


def test_kriging_is_gaussian_conditioning():
    known, at = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64), torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    values = torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.float64)
    ou = OUKernel(length_scale=0.5)
    mean, covariance = kriging(ou, known, values, at)
    # Of a Markov process only the neighbours count; beyond the last value it decays.
    assert float(mean[2, 0]) == pytest.approx(0.3 * math.exp(-1.2 / 0.5))
    assert float(covariance[2, 2]) == pytest.approx(1 - math.exp(-2 * 1.2 / 0.5))
    left, right = math.exp(-0.1 / 0.5), math.exp(-0.3 / 0.5)
    both = torch.tensor([[1.0, left * right], [left * right, 1.0]], dtype=torch.float64)
    gain = torch.linalg.solve(both, torch.tensor([left, right], dtype=torch.float64))
    assert float(mean[1, 0]) == pytest.approx(float(gain @ values[0, 1:]))
    assert float(covariance[1, 1]) == pytest.approx(1 - float(gain @ torch.tensor([left, right], dtype=torch.float64)))
    with pytest.raises(UserError, match="comes after"):
        kriging(ou, known, values, known[:1])

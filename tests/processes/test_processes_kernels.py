"""Noise of functions: factors against matrices, processes against each other, and what is refused."""

import math

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.processes import KERNELS
from osmose.processes.factors import DenseFactor
from osmose.processes.kernels import BrownianKernel, GPKernel, OUKernel, WhiteKernel, check_times

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
    assert torch.allclose(factor.log_det().sum(2)[:, 0], expected, atol=1e-9)
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
    assert torch.allclose(long.log_det()[..., :12], short.log_det(), atol=1e-12)


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
    assert float(BrownianKernel(length_scale=2.0, origin=0.0).covariance(t)[0, 0, 1]) == pytest.approx(0.25)
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
    assert float(factor.log_det()[0, 0, 1]) == pytest.approx(math.log(2e-9) / 2, rel=1e-9)


def test_a_matrix_that_needs_jitter_gets_it_and_says_so():
    t = torch.linspace(0, 1, 60, dtype=torch.float64)[None]
    smooth = GPKernel(length_scale=2.0, jitter=0.0)
    with pytest.warns(UserWarning, match=r"kernel gp: needed a jitter of 1e-\d+ more to be positive definite"):
        factor = smooth.factor(t)
    assert isinstance(factor, DenseFactor)
    assert 0 < factor.jitter <= 1e-2
    every = torch.ones(1, 1, 3, dtype=torch.bool)
    with pytest.raises(UserError, match=r"mine: not positive definite, not even with a jitter of 0\.01"):
        DenseFactor(-torch.eye(3, dtype=torch.float64)[None], every, ~every, pinned=True, what="mine")


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
        ([[0.0, math.nan, 1.0]], "times: hold infinity, or NaN before the end"),
        ([[math.nan, math.nan]], "times: hold infinity, or NaN before the end"),
        ([[0.0, math.inf]], "times: hold infinity, or NaN before the end"),
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
        BrownianKernel(length_scale=1.0, origin=0.0).factor(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="times must be float64"):
        check_times(torch.zeros(2, 3))


def conditioned(kernel, t, hidden, known):
    """Of one channel of one series: places, gain of the mean, covariance of what is hidden, by conditioning."""
    whole = kernel.covariance(t[None])[0]
    h, k = hidden.nonzero()[:, 0], known.nonzero()[:, 0]
    cross = whole[h][:, k]
    gain = torch.linalg.solve(whole[k][:, k], cross.T).T if len(k) else cross
    return h, k, gain, whole[h][:, h] - gain @ cross.T


def masks(count=12, batch=3, channels=2, seed=4):
    """Half of the values hidden, a third known, the rest absent; of item 0 nothing is known in the last channel."""
    drawn = torch.rand(batch, channels, count, generator=torch.Generator().manual_seed(seed))
    hidden, known = drawn < 0.5, (drawn > 0.5) & (drawn < 0.83)
    known[0, -1] = False
    return hidden, known


@pytest.mark.parametrize("kind", KINDS)
def test_pinned_noise_has_the_law_given_that_known_values_are_0(kind):
    t, (hidden, known) = times(), masks()
    factor = kernel(kind).factor(t, hidden, known)
    values = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = factor.expect(values)
    unit = torch.eye(12, dtype=torch.float64)
    root = torch.stack([factor.color(e.expand(3, 2, -1)) for e in unit], -1)
    for item in range(3):
        for channel in range(2):
            h, k, gain, covariance = conditioned(kernel(kind), t[item], hidden[item, channel], known[item, channel])
            found = root[item, channel] @ root[item, channel].T
            assert torch.allclose(found[h][:, h], covariance, atol=1e-9)
            assert float(found.diagonal().sum()) == pytest.approx(float(covariance.diagonal().sum()), abs=1e-9)
            assert torch.allclose(expected[item, channel, h], gain @ values[item, channel, k], atol=1e-9)
            assert torch.equal(expected[item, channel, k], values[item, channel, k])
            assert float(expected[item, channel].count_nonzero()) <= len(h) + len(k)
            log_det = factor.log_det().expand(3, 2, 12)[item, channel]
            assert float(log_det.sum()) == pytest.approx(float(torch.logdet(covariance)) / 2, abs=1e-8)
    eps = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert torch.allclose(factor.whiten(factor.color(eps)), eps * hidden, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_that_is_not_pinned_has_the_covariance_of_the_hidden_values(kind):
    t, (hidden, known) = times(), masks()
    factor = kernel(kind).factor(t, hidden, known, pinned=False)
    whole = kernel(kind).covariance(t)
    root = torch.stack([factor.color(e.expand(3, 2, -1)) for e in torch.eye(12, dtype=torch.float64)], -1)
    both = hidden[..., :, None] & hidden[..., None, :]
    assert torch.allclose(root @ root.mT, whole[:, None] * both, atol=1e-9)
    values = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(factor.expect(values), values * known)


@pytest.mark.parametrize("kind", KINDS)
def test_items_and_channels_that_are_alike_share_a_factor(kind):
    t, (hidden, known) = times(batch=1), masks(batch=1, channels=1)
    eps = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    one = kernel(kind).factor(t, hidden, known)
    many = kernel(kind).factor(t.repeat(4, 1), hidden.repeat(4, 3, 1), known.repeat(4, 3, 1))
    for act in ("color", "whiten", "expect"):
        assert torch.allclose(getattr(many, act)(eps), getattr(one, act)(eps), atol=1e-12)
    assert many.log_det().shape == one.log_det().shape == (1, 1, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_shorter_series_share_a_batch(kind):
    t, (hidden, known) = times(), masks()
    short = t.clone()
    short[1, 9:] = math.nan
    eps = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    known[1, :, 8] = hidden[1, :, 8] = False
    together, alone = (
        kernel(kind).factor(short, hidden, known),
        kernel(kind).factor(t[1:2, :9], hidden[1:2, :, :9], known[1:2, :, :9]),
    )
    for act in ("color", "whiten", "expect"):
        found = getattr(together, act)(eps)[1:2]
        assert torch.allclose(found[..., :9], getattr(alone, act)(eps[1:2, :, :9]), atol=1e-9)
        assert not found[..., 9:].any()


def test_a_walk_joins_on_to_what_is_known_last():
    t = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    known = (t < 4)[:, None]
    values = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    factor = BrownianKernel(length_scale=2.0, origin=0.0).factor(t, ~known, known)
    assert torch.allclose(factor.expect(values)[0, 0, 3:], values[0, 0, 2].expand(5))
    drawn = factor.color(torch.randn(1, 100_000, 8, generator=torch.Generator().manual_seed(10), dtype=torch.float64))
    assert torch.allclose(drawn[0].var(0)[3:], (t[0, 3:] - 3) / 2, rtol=0.02)


@pytest.mark.parametrize("kind", ["ou", "brownian", "gp", "matern32", "matern52"])
def test_what_is_left_open_is_taken_from_the_data(kind):
    left = KERNELS.parse(kind)
    with pytest.raises(UserError, match=r"needs one: it is null, and there are no data to tell"):
        left.factor(times())
    found = left.fitted(0.31234, 5.0)
    assert found.length_scale == 0.312
    assert KERNELS.parse({"kind": kind, "length_scale": 2.0}).fitted(0.3, 5.0).length_scale == 2.0
    if kind == "brownian":
        assert found.origin == pytest.approx(5 - 0.312)
    assert found.factor(times() + 5).log_det().isfinite().all()
    assert WhiteKernel().fitted(0.3, 5.0) == WhiteKernel()

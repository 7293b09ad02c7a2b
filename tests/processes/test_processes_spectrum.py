"""Noise of fields: modes against the FFT, folding against finer grids, and what has no limit."""

import math
import warnings

import pytest
import torch

from osmose.configuration import ConfigError
from osmose.errors import UserError
from osmose.processes import SPECTRA
from osmose.processes.spectrum import Harmonics, PowerSpectrum, PublishedSpectrum, WhiteSpectrum, slope

GRIDS = [(7,), (8,), (1,), (5, 6), (4, 4), (6, 3)]
every_basis = pytest.mark.parametrize("basis", ["fourier", "dct"])
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(harmonics, variances):
    """Of the values at all points, (N, N)."""
    count = math.prod(harmonics.grid)
    unit = torch.eye(count, dtype=torch.float64).view(count, *harmonics.grid)
    rows = harmonics.values(unit).view(count, count)
    return rows.mT @ torch.diag(variances.flatten()) @ rows


@every_basis
@every_grid
def test_values_and_modes_are_inverse_and_orthogonal(basis, grid):
    harmonics = Harmonics(basis, grid)
    x = normal(3, 2, *grid)
    c = harmonics.modes(x)
    torch.testing.assert_close(harmonics.values(c), x, rtol=0, atol=1e-12)
    # Parseval: the mean square of values is the sum of squares of coefficients.
    mean = x.square().flatten(2).mean(2)
    torch.testing.assert_close(c.square().flatten(2).sum(2), mean)
    assert harmonics.modes(x.float()).dtype == torch.float32
    assert harmonics.squared.shape == grid


@every_grid
def test_real_noise_is_that_of_hermitian_modes_of_the_fft(grid):
    """E |FFT(x) / N|^2 = r folded, mode by mode: white noise through the FFT gives the same field, and a real one."""
    harmonics, spectrum = Harmonics("fourier", grid), PowerSpectrum(exponent=1.3)
    variances = spectrum.variances(harmonics)
    count, dims = math.prod(grid), tuple(range(-len(grid), 0))
    cov = covariance(harmonics, variances)
    # The FFT of the covariance's first row is count times the power at each complex mode.
    power = torch.fft.fftn(cov[0].view(*grid), dim=dims) / count
    assert float(power.imag.abs().max()) < 1e-15
    wrapped = torch.meshgrid(*[torch.fft.fftfreq(n, 1 / n, dtype=torch.float64).abs() for n in grid], indexing="ij")
    law = spectrum.law("fourier", len(grid))
    reach = {1: 4096, 2: 512}[len(grid)]
    axes = [
        [int(k) + j * n for j in range(-reach // n - 1, reach // n + 2)]
        for k, n in zip([w.flatten()[-1] for w in wrapped], grid, strict=True)
    ]
    last = torch.meshgrid(
        *[torch.tensor([k for k in axis if abs(k) <= reach]).double() for axis in axes], indexing="ij"
    )
    torch.testing.assert_close(power.real.flatten()[-1], law(sum(k.square() for k in last)).sum(), rtol=1e-10, atol=0)
    # White noise through the FFT, coloured by the roots of the powers, has this covariance and no imaginary part.
    white = torch.eye(count, dtype=torch.float64).view(count, *grid)
    coloured = torch.fft.ifftn(torch.fft.fftn(white, dim=dims) * (power.real * count).sqrt(), dim=dims)
    assert float(coloured.imag.abs().max()) < 1e-13
    root = coloured.real.reshape(count, count)
    torch.testing.assert_close(root.mT @ root, cov, rtol=0, atol=1e-12)


def test_the_covariance_is_the_sum_of_cosines():
    harmonics, spectrum = Harmonics("fourier", (9,)), PowerSpectrum(exponent=1.0)
    k, p = torch.arange(-4096, 4097).double(), torch.arange(9).double() / 9
    r = spectrum.law("fourier", 1)(k.square())
    expected = (r * (2 * math.pi * k * p[:, None]).cos()).sum(1)
    torch.testing.assert_close(covariance(harmonics, spectrum.variances(harmonics))[0], expected, rtol=0, atol=1e-12)
    assert float(expected[0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("basis", "coarse", "factor", "first"),
    [
        ("fourier", (8,), 2, 0),
        ("fourier", (7,), 2, 0),
        ("fourier", (4, 5), 2, 0),
        ("fourier", (3, 4), 3, 0),
        ("dct", (5,), 3, 1),  # the middles of cells are those of every third of a third of them
        ("dct", (3, 4), 3, 1),
    ],
)
@pytest.mark.parametrize("spectrum", [PowerSpectrum(exponent=1.1), PublishedSpectrum()], ids=lambda s: s.kind)
def test_a_finer_grid_holds_the_coarser_one(basis, coarse, factor, first, spectrum):
    harmonics, fine = Harmonics(basis, coarse), Harmonics(basis, tuple(factor * side for side in coarse))
    whole = covariance(fine, spectrum.variances(fine)).view(*fine.grid, *fine.grid)
    some = whole[(slice(first, None, factor),) * (2 * len(coarse))].reshape(math.prod(coarse), -1)
    torch.testing.assert_close(some, covariance(harmonics, spectrum.variances(harmonics)), rtol=0, atol=1e-12)


def test_what_is_cut_off_or_white_is_another_field_on_every_grid():
    coarse, fine = Harmonics("fourier", (16,)), Harmonics("fourier", (32,))
    spectrum = PowerSpectrum(exponent=1.0)
    cut = [spectrum.law("fourier", 1)(h.squared) for h in (coarse, fine)]
    assert (covariance(fine, cut[1])[::2, ::2] - covariance(coarse, cut[0])).abs().max() > 0.01
    white = WhiteSpectrum(variance=2.0)
    for harmonics in (coarse, fine, Harmonics("dct", (3, 4))):
        expected = 2 * torch.eye(math.prod(harmonics.grid), dtype=torch.float64)
        torch.testing.assert_close(covariance(harmonics, white.variances(harmonics)), expected)


@every_basis
def test_the_variance_of_a_point_is_as_said(basis):
    for grid in ((12,), (6, 5)):
        harmonics = Harmonics(basis, grid)
        variances = PowerSpectrum(exponent=1.5, variance=4.0).variances(harmonics)
        # Modes that vanish on the points of a reflected grid are all that is missing.
        assert float(variances.sum()) == pytest.approx(4.0, rel=1e-9 if basis == "fourier" else 0.06)


def test_modes_of_a_coarser_grid_are_the_first_of_a_finer_one():
    for basis in ("fourier", "dct"):
        assert torch.equal(Harmonics(basis, (5, 6)).squared, Harmonics(basis, (12, 9)).squared[:5, :6])


@pytest.mark.parametrize(("basis", "first"), [("fourier", 0), ("dct", 1)])
@pytest.mark.parametrize("grid", [(4,), (5,), (4, 3), (6, 2)], ids=str)
def test_a_field_of_a_coarse_grid_goes_through_its_values_on_a_finer_one(basis, first, grid):
    coarse, fine = Harmonics(basis, grid), Harmonics(basis, tuple(3 * side for side in grid))
    x = normal(2, *grid)
    longer = fine.values(coarse.onto(coarse.modes(x), fine.grid))
    torch.testing.assert_close(longer[(slice(None), *[slice(first, None, 3)] * len(grid))], x)
    # And back, but for the highest cosine of a circle, of which a coarser grid has another measure.
    back = fine.onto(coarse.onto(coarse.modes(x), fine.grid), grid)
    if basis == "dct":
        torch.testing.assert_close(back, coarse.modes(x))
    assert back.shape == x.shape


@every_basis
@every_grid
def test_a_field_may_be_looked_at_anywhere(basis, grid):
    """At the points of its own grid its values, at those of a finer one what it is there, and between them too."""
    harmonics = Harmonics(basis, grid)
    c = normal(2, 3, *grid)

    def points(of):
        axes = [(torch.arange(side).double() + of.offset) / side for side in of.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)

    found = harmonics.at(c, points(harmonics))
    torch.testing.assert_close(found, harmonics.values(c).flatten(2), rtol=0, atol=1e-12)
    finer = Harmonics(basis, tuple(3 * side for side in grid))
    found = harmonics.at(c, points(finer))
    torch.testing.assert_close(found, finer.values(harmonics.onto(c, finer.grid)).flatten(2), rtol=0, atol=1e-12)
    assert harmonics.at(c.float(), points(harmonics)).dtype == torch.float32


def test_sums_that_have_no_limit_are_warned_of():
    published = PublishedSpectrum(amplitude=1.0)
    with pytest.warns(
        UserWarning, match=r"spectrum published: the variance of the noise has no limit .*\(11.6, 16, 20.3"
    ):
        trace = published.trace(Harmonics("fourier", (16, 16)))
    assert not trace.converges
    assert trace.sums == pytest.approx((11.6, 16.0, 20.3), abs=0.05)  # the card: 2 pi log n
    with pytest.warns(UserWarning, match="no limit"):
        assert WhiteSpectrum().trace(Harmonics("dct", (8,))).growth == pytest.approx(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = published.trace(Harmonics("fourier", (64,)))  # on one axis it has one
        assert trace.sums[2] == pytest.approx(2.22, abs=0.02)
        assert trace.growth == pytest.approx(0.5, abs=0.01)
        for basis in ("fourier", "dct"):
            assert PowerSpectrum(exponent=1.25).trace(Harmonics(basis, (8, 8))).converges
        assert PowerSpectrum().trace(Harmonics("fourier", (1,))).converges


def test_slopes_are_found_again():
    squared = Harmonics("dct", (9, 8)).squared
    variances = 3 * squared.clamp(min=1e-9) ** -1.2
    assert slope(variances, squared) == pytest.approx(-2.4)
    variances[2, 3] = 0
    assert slope(variances, squared) == pytest.approx(-2.4)
    assert slope(torch.zeros(9, 8).double(), squared) == 0
    assert slope(torch.ones(2).double(), Harmonics("fourier", (2,)).squared) == 0


@pytest.mark.parametrize("grid", [(), (2, 2, 2), (0,), (5000,), (600, 4)])
def test_grids_that_are_refused(grid):
    with pytest.raises(UserError, match=r"grid: \(.*\) is not valid"):
        Harmonics("fourier", grid)


def test_kinds_and_values_that_are_refused():
    with pytest.raises(ConfigError, match="unknown spectrum 'powr'; did you mean 'power'"):
        SPECTRA.parse("powr")
    with pytest.raises(ConfigError, match="variance: 0 is not valid"):
        SPECTRA.parse({"kind": "power", "variance": 0})

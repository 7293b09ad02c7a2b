"""The mean of a field given some of its values, against matrices."""

import math

import pytest
import torch

from osmose.processes.kriging import conditioned
from osmose.processes.spectrum import Harmonics, PowerSpectrum


@pytest.mark.parametrize("basis", ["fourier", "dct"])
@pytest.mark.parametrize("grid", [(9,), (4, 6)], ids=str)
def test_it_is_the_formula(basis, grid):
    harmonics, count = Harmonics(basis, grid), math.prod(grid)
    variances = torch.stack([PowerSpectrum(exponent=e).variances(harmonics) for e in (0.8, 1.5)])[None]
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 2, *grid, generator=generator, dtype=torch.float64)
    known = torch.randn(5, 2, *grid, generator=generator, dtype=torch.float64)
    known[torch.rand(known.shape, generator=generator) < 0.6] = math.nan
    known[3] = math.nan
    found = conditioned(mean, known, variances, harmonics)
    assert torch.equal(found[3], mean[3])
    points = harmonics.values(torch.eye(count).double().view(count, *grid)).view(count, count)
    for i in range(5):
        for channel in range(2):
            covariance = points.mT @ torch.diag(variances[0, channel].flatten()) @ points
            there = ~known[i, channel].flatten().isnan()
            system = covariance[there][:, there] + 1e-4 * variances[0, channel].sum() * torch.eye(int(there.sum()))
            left = (known - mean)[i, channel].flatten()[there]
            expected = mean[i, channel].flatten() + covariance[:, there] @ torch.linalg.solve(system, left)
            expected[there] = known[i, channel].flatten()[there]
            torch.testing.assert_close(found[i, channel].flatten(), expected, rtol=0, atol=2e-3)


def test_all_and_nothing_known_and_fields_without_variance():
    harmonics = Harmonics("dct", (6,))
    x, nothing = torch.randn(2, 1, 6), torch.full((2, 1, 6), math.nan)
    variances = PowerSpectrum().variances(harmonics)
    assert torch.equal(conditioned(x, nothing, variances, harmonics), x)
    assert torch.equal(conditioned(x, -x, variances, harmonics), -x)
    some = nothing.clone()
    some[..., 2] = 1.0
    found = conditioned(x, some, torch.zeros(6).double(), harmonics)
    assert torch.equal(found, torch.where(some.isnan(), x, some))
    assert found.dtype == torch.float32

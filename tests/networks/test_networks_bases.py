import math

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev, hermite_e, legendre, polynomial
from scipy.interpolate import BSpline

from osmose.errors import UserError
from osmose.networks.bases import basis

FAMILIES = ("hermite", "legendre", "chebyshev", "b-spline", "fourier")
POLYNOMIALS = FAMILIES[:3]
every_family = pytest.mark.parametrize("family", FAMILIES)
#: The table of splines is float32; everything else is as exact as its argument.
EXACT = {"b-spline": 1e-6}


def made(family, size, domain):
    return basis(family, size, domain).double()


def measured(family, size, domain):
    """Places and weights at which products of two functions of a family are integrated in its measure."""
    if family == "hermite":
        z, weight = hermite_e.hermegauss(40)
        return torch.from_numpy(z), torch.from_numpy(weight / weight.sum())
    if family == "chebyshev":
        z, weight = chebyshev.chebgauss(60)
        return torch.from_numpy(domain * z), torch.from_numpy(weight / weight.sum())
    z, weight = legendre.leggauss(12)  # piece by piece: splines are polynomials on equal intervals only
    pieces = max(1, size - 3) if family == "b-spline" else 20
    edges = np.linspace(-1, 1, pieces + 1)[:-1]
    z = (edges[:, None] + (z + 1) / pieces).flatten()
    return torch.from_numpy(domain * z), torch.from_numpy(np.tile(weight / 2 / pieces, pieces))


@every_family
@pytest.mark.parametrize("size", [2, 3, 4, 5, 9, 13])
@pytest.mark.parametrize("domain", [1.0, 3.5])
def test_functions_are_orthonormal_in_the_stated_measure(family, size, domain):
    z, weight = measured(family, size, domain)
    functions = made(family, size, 40.0 if family == "hermite" else domain)(z)
    assert functions.shape == (len(z), size)
    gram = functions.T @ (weight[:, None] * functions)
    assert (gram - torch.eye(size)).abs().max() < EXACT.get(family, 1e-10)


@every_family
@pytest.mark.parametrize("size", [2, 5, 12])
def test_the_first_function_is_1(family, size):
    z = torch.linspace(-9, 9, 101, dtype=torch.float64)
    assert (made(family, size, 4.0)(z)[:, 0] - 1).abs().max() < EXACT.get(family, 1e-15)


@pytest.mark.parametrize("domain", [0.7, 4.0])
def test_each_family_is_what_its_name_says(domain):
    z = np.linspace(-domain, domain, 33)
    unit = np.eye(8)
    waves = [math.sqrt(2) * f(math.pi * j * z / domain) for j in (1, 2, 3, 4) for f in (np.sin, np.cos)]
    want = {
        "hermite": [hermite_e.hermeval(z, unit[k]) / math.sqrt(math.factorial(k)) for k in range(8)],
        "legendre": [math.sqrt(2 * k + 1) * legendre.legval(z / domain, unit[k]) for k in range(8)],
        "chebyshev": [math.sqrt(2 if k else 1) * chebyshev.chebval(z / domain, unit[k]) for k in range(8)],
        "fourier": [np.ones_like(z), *waves[:7]],
    }
    for family, columns in want.items():
        got = made(family, 8, domain)(torch.from_numpy(z))
        assert (got - torch.from_numpy(np.stack(columns, 1))).abs().max() < 1e-10, family


@pytest.mark.parametrize("size", [2, 3, 4, 6, 10])
def test_splines_are_those_on_equal_knots(size):
    domain, order = 2.5, min(4, size)
    width = 2 * domain / (size - order + 1)
    knots = -domain + width * np.arange(1 - order, size + 1)
    z = np.linspace(-domain, domain - 1e-9, 300)
    theirs = BSpline(knots, np.eye(size), order - 1)(z)
    got = made("b-spline", size, domain)(torch.from_numpy(z)).numpy()
    # The same space: each of ours is a combination of theirs, and there are as many.
    coefficients, _, rank, _ = np.linalg.lstsq(theirs, got, rcond=None)
    assert rank == size
    assert np.abs(theirs @ coefficients - got).max() < 1e-5


@every_family
def test_slopes_are_the_derivatives(family):
    functions = made(family, 9, 2.0)
    z = torch.linspace(-1.93, 1.91, 41, dtype=torch.float64, requires_grad=True)
    values, slopes = functions.with_slope(z)
    assert torch.equal(values, functions(z))
    for k in range(9):
        (want,) = torch.autograd.grad(values[:, k].sum(), z, retain_graph=True)
        assert torch.allclose(slopes[:, k], want, rtol=1e-10, atol=1e-10)
    h = 1e-5
    quotient = (functions(z + h) - functions(z - h)) / (2 * h)
    assert (slopes - quotient).abs().max() < 1e-5 * slopes.abs().max()
    # And they can be differentiated once more: a potential is trained, and differentiated in x, through them.
    (second,) = torch.autograd.grad(slopes.sum(), z)
    ahead, back = (functions.with_slope(z.detach() + step)[1] for step in (h, -h))
    assert (second - ((ahead - back) / (2 * h)).sum(1)).abs().max() < 1e-4 * second.abs().max()


@every_family
def test_any_shape_is_taken_item_by_item(family):
    functions, z = made(family, 6, 2.0), torch.randn(4, 3, dtype=torch.float64)
    values, slopes = functions.with_slope(z)
    assert values.shape == slopes.shape == functions(z).shape == (4, 3, 6)
    for i in range(4):
        for j in range(3):
            assert torch.allclose(functions(z)[i, j], functions(z[i, j]), rtol=1e-14, atol=1e-14)
            assert torch.allclose(slopes[i, j], functions.with_slope(z[i, j])[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("family", ["hermite", "legendre", "chebyshev", "b-spline"])
def test_beyond_the_domain_values_are_those_of_its_end(family):
    functions = made(family, 10, 1.5)
    for end in (-1.5, 1.5):
        beyond = (end * torch.tensor([1.0001, 2.0, 1e6], dtype=torch.float64)).requires_grad_()
        values, slopes = functions.with_slope(beyond)
        at = functions(torch.tensor([end], dtype=torch.float64))
        assert torch.equal(values, at.expand(3, 10))
        assert torch.equal(functions(beyond), values)
        assert not slopes.any()
        assert not torch.autograd.grad(functions(beyond).sum(), beyond)[0].any()
    inside = torch.tensor([1.4999], dtype=torch.float64)
    assert functions.with_slope(inside)[1].abs().max() > 1


def test_waves_go_on():
    functions, z = made("fourier", 9, 1.5), torch.linspace(-1.4, 1.5, 30, dtype=torch.float64)
    for periods in (-2, 1, 5):
        for here, there in zip(functions.with_slope(z), functions.with_slope(z + periods * 3.0), strict=True):
            assert torch.allclose(here, there, rtol=1e-10, atol=1e-10)


@every_family
def test_least_squares_stays_well_conditioned_where_monomials_explode(family):
    # Degree 12 on 20,000 samples of the measure.
    domain, generator = 4.0, torch.Generator().manual_seed(0)
    u = torch.rand(20_000, generator=generator, dtype=torch.float64)
    z = {
        "hermite": torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)),
        "chebyshev": domain * (math.pi * u).cos(),
    }.get(family, domain * (2 * u - 1))
    gram = lambda functions: functions.T @ functions / len(z)  # noqa: E731
    condition = float(torch.linalg.cond(gram(made(family, 13, domain)(z))))
    monomials = float(torch.linalg.cond(gram(torch.from_numpy(polynomial.polyvander(z.numpy(), 12)))))
    # A Hermite function of degree 12 lives in the tails, where there are a few samples of 20,000.
    assert condition < (1e4 if family == "hermite" else 2)
    assert monomials > 1e12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hermit", 3, 1.0), "basis: 'hermit' is not valid: choose one of hermite, legendre, chebyshev, b-spline, f"),
        (("hermite", 1, 1.0), "degree: 0 is not valid: must be at least 1"),
        (("b-spline", 0, 1.0), "degree: -1 is not valid: must be at least 1"),
        (("legendre", 3, 0.0), "domain: 0 is not valid: must be above 0"),
        (("fourier", 3, -2.0), "domain: -2 is not valid: must be above 0"),
        (("fourier", 3, math.nan), "domain: nan is not valid: must be above 0"),
    ],
)
def test_what_is_no_basis_is_refused(arguments, message):
    with pytest.raises(UserError) as refused:
        basis(*arguments)
    assert message in str(refused.value)

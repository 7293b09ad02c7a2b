import pytest
import torch

from osmose.errors import UserError
from osmose.gaussian.derivatives import (
    EXACT,
    MOST,
    jacobian,
    probes_for,
    products,
    pulled_back,
    signs_like,
    with_divergence,
)


@pytest.fixture
def linear():
    """A linear field on events (2, 3), x -> M x, and M."""
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda x: (x.flatten(1) @ matrix.T).view_as(x), matrix


def points(count=4):
    return torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_linear_field_has_its_matrix_and_trace(linear):
    field, matrix = linear
    x = points()
    with torch.inference_mode():  # as analyses are called
        value, whole = jacobian(field, x.clone())
        _, trace = with_divergence(field, x.clone(), None)
    assert torch.equal(value, field(x))
    assert torch.allclose(whole, matrix.expand(4, 6, 6), atol=1e-12)
    assert torch.allclose(trace, matrix.trace().expand(1, 4), atol=1e-12)


def test_products_are_those_with_the_matrix_and_its_transpose(linear):
    field, matrix = linear
    x, v = points(), points().flip(0)
    pushed, pulled = products(lambda x: field(x).sin(), x, v)
    slope = field(x).cos().flatten(1)[:, :, None] * matrix
    assert torch.allclose(pushed.flatten(1), (slope @ v.flatten(1)[:, :, None])[..., 0], atol=1e-12)
    assert torch.allclose(pulled.flatten(1), (slope.mT @ v.flatten(1)[:, :, None])[..., 0], atol=1e-12)
    assert torch.allclose(pulled_back(lambda x: field(x).sin(), x, v)[1], pulled, atol=1e-12)


def test_hutchinson_s_estimates_are_unbiased(linear):
    field, matrix = linear
    x = points(1)
    signs = signs_like(x, 4000, torch.Generator().manual_seed(2))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    _, traces = with_divergence(field, x, signs)
    spread = traces.std() / 4000**0.5
    assert abs(float(traces.mean() - matrix.trace())) < 4 * float(spread)
    odd = torch.stack(
        [(pushed - pulled).square().sum() for pushed, pulled in (products(field, x, v) for v in signs[:400])]
    )
    want = (matrix - matrix.T).square().sum()
    assert abs(float(odd.mean() - want)) < 4 * float(odd.std() / 400**0.5)


def test_refused(linear):
    field, _ = linear
    with pytest.raises(UserError, match="probes: 0 is not valid: Hutchinson's estimate needs at least 1"):
        signs_like(points(), 0, torch.Generator())
    with pytest.raises(UserError, match=f"at most {MOST} values an item.*take Hutchinson's estimate, --probes 32"):
        jacobian(lambda x: x, torch.zeros(1, MOST + 1))
    with pytest.raises(UserError, match=f"probes: exact needs a Jacobian of {MOST + 1} x {MOST + 1}"):
        probes_for("exact", MOST + 1, 4)
    with pytest.raises(UserError, match="probes: 0 is not valid: must be at least 1, or exact"):
        probes_for(0, 2, 4)
    asked = [(None, EXACT), (None, EXACT + 1), ("exact", EXACT + 1), (7, 2)]
    assert [probes_for(probes, dimension, 4) for probes, dimension in asked] == [None, 4, None, 7]
    with pytest.raises(ValueError, match="no gradient in x"):
        with_divergence(lambda x: field(x).detach(), points(), None)
    with pytest.raises(ValueError, match=r"the field has shape \(4, 1, 3\), and x has \(4, 2, 3\)"):
        jacobian(lambda x: x[:, :1], points())

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(_, pulled):
            return 2 * pulled

    with pytest.raises(UserError, match="network: cannot be differentiated twice"):
        products(Once.apply, points(), points())

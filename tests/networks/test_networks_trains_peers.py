"""The algebra of trains against tntorch (Usvyatsov, Ballester-Ripoll, Schindler 2022)."""

import pytest
import tntorch
import torch

from osmose.networks.trains import add, dense, inner, orthogonalized, rounded

SIZES, RANKS = (4, 3, 5, 4, 3), (1, 3, 6, 5, 3, 1)


def a_train(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(1, RANKS[k], n, RANKS[k + 1], generator=generator, dtype=torch.float64)
        for k, n in enumerate(SIZES)
    ]


def theirs(cores):
    return tntorch.Tensor([core[0].clone() for core in cores])


def test_dense_inner_and_sum_are_theirs():
    a, b = a_train(0), a_train(1)
    torch.testing.assert_close(dense(a)[0], theirs(a).torch())
    assert float(inner(a, b)) == pytest.approx(float(tntorch.dot(theirs(a), theirs(b))))
    torch.testing.assert_close(dense(add(a, b, -0.5))[0], (theirs(a) + theirs(b) * -0.5).torch())


@pytest.mark.parametrize("centre", [0, 2, 4])
def test_orthogonalised_cores_span_what_theirs_do(centre):
    a = a_train(2)
    other = theirs(a)
    other.orthogonalize(centre)
    own = orthogonalized(a, centre)
    assert float(own[centre].norm()) == pytest.approx(float(other.cores[centre].norm()))
    torch.testing.assert_close(dense(own)[0], theirs(a).torch())


@pytest.mark.parametrize("most", [1, 2, 4])
def test_rounding_is_as_good_as_theirs(most):
    a = a_train(3)
    whole = dense(a)[0]
    other = theirs(a)
    other.round_tt(rmax=most)
    own = dense(rounded(a, [most] * 4))[0]
    # Neither sweep finds the best approximation: both are within sqrt(d - 1) = 2 of it, and so of each other.
    ours, them = float((own - whole).norm()), float((other.torch() - whole).norm())
    assert 0 < ours <= 2 * them
    assert them <= 2 * ours
    assert [core.shape[3] for core in rounded(a, [most] * 4)] == [int(rank) for rank in other.ranks_tt[1:]]

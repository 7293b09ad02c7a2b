import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from osmose.errors import UserError
from osmose.interpolants.coupling import ot_pairing


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(x0, x1, permutation):
    return float((x0[permutation] - x1).square().sum())


def test_no_other_permutation_costs_less():
    for seed in range(5):
        x0, x1 = randn(6, 2, seed=seed), 2 * randn(6, 2, seed=seed + 50) + 1
        every = [cost(x0, x1, list(order)) for order in itertools.permutations(range(6))]
        assert cost(x0, x1, ot_pairing(x0, x1)) == pytest.approx(min(every), abs=1e-12)


def test_large_batches_far_from_the_origin_agree_with_an_assignment():
    x0, x1 = randn(300, 8), randn(300, 8, seed=1) + 1e6
    permutation = ot_pairing(x0, x1)
    assert permutation.dtype == torch.int64
    assert sorted(permutation.tolist()) == list(range(300))
    shifted = x1 - 1e6
    rows, columns = linear_sum_assignment(torch.cdist(x0, shifted).square().numpy())
    assert cost(x0[rows], shifted[columns], torch.arange(300)) == pytest.approx(
        cost(x0, shifted, permutation), rel=1e-7
    )
    assert cost(x0, shifted, permutation) < 0.8 * cost(x0, shifted, torch.arange(300))


def test_items_that_were_shuffled_are_found_again():
    x1 = randn(40, 1, 2, 3).float()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    permutation = ot_pairing(x1[order], x1)
    assert torch.equal(x1[order][permutation], x1)
    assert ot_pairing(x1[:1], x1[:1]).tolist() == [0]


def test_equal_items_are_paired_all_the_same():
    x = torch.zeros(5, 2)
    assert sorted(ot_pairing(x, x).tolist()) == [0, 1, 2, 3, 4]


def test_labels_keep_to_themselves():
    x0, x1 = randn(60, 2), randn(60, 2, seed=1)
    groups = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(3))
    permutation = ot_pairing(x0, x1, groups)
    assert sorted(permutation.tolist()) == list(range(60))
    assert torch.equal(groups[permutation], groups)
    for label in range(4):
        rows = (groups == label).nonzero()[:, 0]
        own = ot_pairing(x0[rows], x1[rows])
        assert cost(x0[rows], x1[rows], own) == pytest.approx(
            float((x0[permutation] - x1)[rows].square().sum()), abs=1e-10
        )
    assert cost(x0, x1, permutation) > cost(x0, x1, ot_pairing(x0, x1))


def test_batches_that_cannot_be_paired_are_refused():
    x = torch.zeros(4, 2)
    for other in (torch.zeros(3, 2), torch.zeros(4, 3)):
        with pytest.raises(UserError, match="must have one shape"):
            ot_pairing(other, x)
    with pytest.raises(UserError, match="rows"):
        ot_pairing(x[:0], x[:0])
    with pytest.raises(UserError, match=r"groups: shape \(3,\)"):
        ot_pairing(x, x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match="not finite"):
        ot_pairing(x, x / 0)

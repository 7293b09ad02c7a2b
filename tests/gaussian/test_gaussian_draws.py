import itertools
import math

import pytest
import torch

from osmose.gaussian.draws import SampleDraws, StepDraws, mix, seeded
from osmose.gaussian.noise import WhiteNoise


def values(draws):
    """Draws of every kind, in an order that mixes them."""
    return [draws.normal((2, 3)), draws.uniform(), draws.stratified(), draws.normal((5,)), draws.uniform()]


@pytest.mark.parametrize("cuts", [[0, 12], [0, 1, 12], [0, 5, 6, 12], list(range(13))])
def test_the_parts_of_a_step_are_the_whole(cuts):
    whole = values(StepDraws(3, 7, 0, 12, 12))
    parts = [values(StepDraws(3, 7, a, b, 12)) for a, b in itertools.pairwise(cuts)]
    for index, value in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), value)


def test_a_step_is_a_function_of_seed_and_step():
    same = [values(StepDraws(3, 7, 0, 4, 4)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*same, strict=True))
    seen = {
        tuple(StepDraws(seed, step, 0, 4, 4).normal((2,)).flatten().tolist()) for seed in range(5) for step in range(5)
    }
    assert len(seen) == 25


def test_a_call_draws_anew():
    draws = StepDraws(0, 0, 0, 3, 3)
    assert not torch.equal(draws.normal((4,)), draws.normal((4,)))
    assert not torch.equal(draws.uniform(), draws.uniform())
    assert not torch.equal(draws.stratified(), draws.stratified())


def test_shapes_and_types():
    for draws in (StepDraws(0, 0, 2, 5, 8), SampleDraws(0, 2, 3)):
        assert draws.count == 3
        assert draws.normal((1, 4, 4)).shape == (3, 1, 4, 4)
        assert draws.normal((2,)).dtype == torch.float32
        assert draws.normal((2,)).is_contiguous()
        for value in (draws.uniform(), draws.stratified()):
            assert value.shape == (3,)
            assert value.dtype == torch.float64
            assert bool(((value >= 0) & (value < 1)).all())
        assert WhiteNoise().sample(draws, (7,)).shape == (3, 7)


def test_the_laws():
    draws = StepDraws(1, 1, 0, 40_000, 40_000)
    x = draws.normal((2,)).double()
    assert x.mean().abs() < 0.015
    assert (x.var() - 1).abs() < 0.03
    assert (x**4).mean().item() == pytest.approx(3, abs=0.12)
    assert torch.corrcoef(x.T)[0, 1].abs() < 0.02
    u = draws.uniform().sort().values
    assert (u - torch.linspace(0, 1, 40_000, dtype=torch.float64)).abs().max() < 0.01  # Kolmogorov-Smirnov, p = 1e-3


def test_stratified_puts_one_value_into_each_stratum():
    n = 24
    first = []
    for step in range(500):
        u = StepDraws(0, step, 0, n, n).stratified()
        assert sorted((u * n).floor().tolist()) == list(range(n))
        first.append(u[0].item())
    # Any one item still sees the uniform law: its stratum is shuffled and its place in the stratum is random.
    first = torch.tensor(first, dtype=torch.float64)
    assert (first.sort().values - torch.linspace(0, 1, 500, dtype=torch.float64)).abs().max() < 0.09
    inside = (first * n) % 1
    assert (inside.sort().values - torch.linspace(0, 1, 500, dtype=torch.float64)).abs().max() < 0.09


@pytest.mark.parametrize("cuts", [[0, 9], [0, 1, 9], [0, 4, 5, 9], list(range(10))])
def test_a_sample_does_not_depend_on_its_batch(cuts):
    def stream(first, count):
        draws = SampleDraws(5, first, count)
        return torch.stack([draws.normal((2, 2)) for _ in range(40)], 1)  # more than are drawn ahead at once

    whole = stream(0, 9)
    parts = torch.cat([stream(a, b - a) for a, b in itertools.pairwise(cuts)])
    assert torch.equal(parts, whole)
    # Nothing comes twice: neither within a stream nor across the samples.
    assert len(set(whole.flatten().tolist())) > 0.999 * whole.numel()


def test_a_sample_with_uniform_draws_does_not_depend_on_its_batch_either():
    whole = values(SampleDraws(5, 0, 6))
    for first, count in ((0, 2), (2, 3), (5, 1)):
        part = values(SampleDraws(5, first, count))
        assert all(torch.equal(a, b[first : first + count]) for a, b in zip(part, whole, strict=True))


def test_samples_are_independent_standard_normals():
    x = torch.stack([draws.normal((8,)) for draws in [SampleDraws(0, 0, 2000)] for _ in range(3)], 1).double()
    assert x.mean().abs() < 0.015
    assert (x.var() - 1).abs() < 0.03
    flat = x.reshape(2000, 24)
    correlation = torch.corrcoef(flat.T) - torch.eye(24, dtype=torch.float64)
    assert correlation.abs().max() < 0.11
    neighbours = (flat[:-1] * flat[1:]).mean()
    assert neighbours.abs() < 0.02


def test_seeds_of_samples_differ_and_training_and_sampling_do_not_share_a_stream():
    seen = {tuple(SampleDraws(seed, i, 1).normal((2,)).flatten().tolist()) for seed in range(4) for i in range(6)}
    steps = {tuple(StepDraws(seed, i, 0, 1, 1).normal((2,)).flatten().tolist()) for seed in range(4) for i in range(6)}
    assert len(seen | steps) == 48


@pytest.mark.parametrize("make", [lambda: StepDraws(3, 7, 2, 6, 12), lambda: SampleDraws(3, 2, 4)])
def test_a_branch_depends_on_whose_it_is_and_on_its_names_alone(make):
    root, used = make(), make()
    values(used)
    first = values(root.branch("noise", 1))
    for again in (root.branch("noise", 1), used.branch("noise", 1), make().branch("noise", 1)):
        assert again.count == 4
        assert all(torch.equal(a, b) for a, b in zip(values(again), first, strict=True))
    # Branching draws nothing of the parent's own.
    assert all(torch.equal(a, b) for a, b in zip(values(root), values(make()), strict=True))


@pytest.mark.parametrize("cuts", [[0, 12], [0, 5, 6, 12], list(range(13))])
def test_the_parts_of_a_branch_are_the_whole(cuts):
    for make in (lambda a, b: StepDraws(3, 7, a, b, 12), lambda a, b: SampleDraws(3, a, b - a)):
        whole = values(make(0, 12).branch("extra", 0))
        parts = [values(make(a, b).branch("extra", 0)) for a, b in itertools.pairwise(cuts)]
        for index, value in enumerate(whole):
            assert torch.equal(torch.cat([part[index] for part in parts]), value)


def test_branches_are_independent_of_each_other_and_of_where_they_come_from():
    for make in (lambda seed, step: StepDraws(seed, step, 0, 1, 1), lambda seed, step: SampleDraws(seed, step, 1)):
        seen = set()
        for root in (make(seed, step) for seed in range(3) for step in range(3)):
            branches = [root.branch(), root.branch("a"), root.branch("b"), root.branch("a", 1), root.branch("a", 2)]
            branches += [root.branch("a").branch("b"), root.branch("a", "b"), root.branch("a").branch(1)]
            seen |= {tuple(draws.normal((2,)).flatten().tolist()) for draws in (root, *branches)}
        assert len(seen) == 9 * 9
    for root in (StepDraws(0, 0, 0, 4000, 4000), SampleDraws(0, 0, 4000)):
        x = torch.cat([draws.normal((2,)) for draws in (root, root.branch("a"), root.branch("b"))], 1)
        assert (torch.corrcoef(x.T) - torch.eye(6)).abs().max() < 0.07


def test_the_streams_of_steps_and_samples_themselves_are_pinned():
    # A branch has a longer key; without names the key, and so every recorded run and sample, is what it was.
    step = torch.rand(4, generator=seeded(3, "step", 7), dtype=torch.float64)
    assert torch.equal(StepDraws(3, 7, 0, 4, 4).uniform(), step)
    branch = torch.rand(4, generator=seeded(3, "step", 7, "branch", "a", 1), dtype=torch.float64)
    assert torch.equal(StepDraws(3, 7, 0, 4, 4).branch("a", 1).uniform(), branch)
    assert SampleDraws(3, 7, 1).uniform().item() == 0.23506216443612105


def test_mix_spreads_and_separates():
    seeds = [mix(a, b) for a in range(60) for b in range(60)]
    assert len(set(seeds)) == 3600
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Every bit is set half of the time, and flipping one input changes half of the bits.
    bits = torch.tensor([[seed >> k & 1 for k in range(63)] for seed in seeds], dtype=torch.float64)
    assert (bits.mean(0) - 0.5).abs().max() < 0.05
    assert ((bits[1:] - bits[:-1]).abs().mean(0) - 0.5).abs().max() < 0.05
    assert mix(1, 23) != mix(12, 3)
    assert mix("a", 1) != mix("a1")
    assert mix(0) == mix(0)  # and in every process: Python's own hash would differ


def test_mix_is_pinned():
    # The samples of a seed must not change from one release to the next.
    pinned = 1170510158946665638
    assert mix(0, "sample", 0) == pinned
    drawn = torch.rand(1, generator=seeded(0, "sample", 0))
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(pinned)))


def test_many_samples_of_a_seed_are_all_different():
    # With 32 bits of seed these two were one and the same.
    one, other = (SampleDraws(0, index, 1).normal((8,)) for index in (23088, 112271))
    assert not torch.equal(one, other)


# --- counts ---------------------------------------------------------------------------------------------------------

#: Of 12 items: what is asked for differs from item to item, as it does where it depends on their values.
UNITS = torch.arange(24).view(12, 2) * 5
CHANCE = torch.linspace(0.05, 0.95, 24).view(12, 2)


def counts(draws, start, stop):
    """Counts of the items start..stop, among draws of other kinds."""
    n, p = UNITS[start:stop], CHANCE[start:stop]
    first = draws.binomial(n, p)
    return [first, draws.uniform(), draws.poisson(3 * p + first), draws.normal((2,)), draws.binomial(n, p)]


@pytest.mark.parametrize("cuts", [[0, 12], [0, 1, 12], [0, 5, 6, 12], list(range(13))])
def test_counts_of_an_item_do_not_depend_on_the_cut(cuts):
    for make in (lambda a, b: StepDraws(3, 7, a, b, 12), lambda a, b: SampleDraws(3, a, b - a)):
        whole = counts(make(0, 12), 0, 12)
        parts = [counts(make(a, b), a, b) for a, b in itertools.pairwise(cuts)]
        for index, value in enumerate(whole):
            assert torch.equal(torch.cat([part[index] for part in parts]), value)


def test_what_another_item_is_asked_for_changes_nothing():
    # How many random numbers a count takes depends on its parameters: other items must not feel it.
    for make in (lambda: StepDraws(3, 7, 0, 12, 12), lambda: SampleDraws(3, 0, 12)):
        other = UNITS.clone()
        other[0] = 1000
        one, two = make(), make()
        one.binomial(UNITS, CHANCE)
        two.binomial(other, CHANCE)
        assert torch.equal(one.binomial(UNITS, CHANCE)[1:], two.binomial(UNITS, CHANCE)[1:])
        assert torch.equal(one.uniform()[1:], two.uniform()[1:])


def test_counts_do_not_disturb_what_a_step_draws_besides():
    with_counts, without = StepDraws(3, 7, 0, 12, 12), StepDraws(3, 7, 0, 12, 12)
    counts(with_counts, 0, 12)
    without.uniform(), without.normal((2,))
    assert all(torch.equal(a, b) for a, b in zip(values(with_counts), values(without), strict=True))


def test_counts_may_be_drawn_once_more():
    draws = StepDraws(3, 7, 2, 8, 12)
    fresh, early = draws.again(), StepDraws(3, 7, 2, 8, 12)
    first = counts(draws, 2, 8)
    later = draws.again()
    second = counts(draws, 2, 8)
    for got, want in ((fresh, first), (early, first), (later, second)):
        assert all(torch.equal(a, b) for a, b in zip(counts(got, 2, 8), want, strict=True))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("make", [lambda: StepDraws(3, 7, 0, 12, 12), lambda: SampleDraws(3, 0, 12)])
def test_counts_of_a_branch_are_its_own(make):
    root, used = make(), make()
    counts(used, 0, 12)
    want = counts(root.branch("extra", 1), 0, 12)
    assert all(torch.equal(a, b) for a, b in zip(counts(used.branch("extra", 1), 0, 12), want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(counts(root, 0, 12), counts(make(), 0, 12), strict=True))
    seen = {tuple(draws.binomial(UNITS, CHANCE).flatten().tolist()) for draws in (make(), root.branch("extra", 1))}
    seen |= {tuple(StepDraws(3, step, 0, 12, 12).binomial(UNITS, CHANCE).flatten().tolist()) for step in (7, 8)}
    assert len(seen) >= 3


@pytest.mark.parametrize("make", [lambda n: StepDraws(1, 1, 0, n, n), lambda n: SampleDraws(1, 0, n)])
def test_the_laws_of_counts(make):
    size, draws = 2000, make(2000)
    for p in (0.004, 0.3, 0.97):
        got = draws.binomial(torch.full((size, 5), 6), torch.full((size, 5), p)).flatten()
        want = torch.tensor([math.comb(6, k) * p**k * (1 - p) ** (6 - k) for k in range(7)]) * len(got)
        seen, held = torch.bincount(got, minlength=7), want > 5
        assert float(((seen - want).square() / want)[held].sum()) < 22.5  # 6 degrees of freedom at most, p = 1e-3
        assert float(seen[~held].sum()) < 20
    rate = 2.5
    got = draws.poisson(torch.full((size, 5), rate)).flatten()
    want = torch.tensor([math.exp(-rate) * rate**k / math.factorial(k) for k in range(9)]) * len(got)
    assert float(((torch.bincount(got, minlength=9)[:9] - want).square() / want).sum()) < 26.2  # 8, p = 1e-3
    # Many units: mean and variance, and neither values of an item nor neighbours go together.
    got = draws.binomial(torch.full((size, 5), 10_000), torch.full((size, 5), 0.2)).double()
    assert got.mean().item() == pytest.approx(2000, abs=2)
    assert got.var().item() == pytest.approx(1600, rel=0.06)
    assert (torch.corrcoef(got.T) - torch.eye(5)).abs().max() < 0.08
    assert abs(float(torch.corrcoef(torch.stack([got[:-1, 0], got[1:, 0]]))[0, 1])) < 0.08


def test_shapes_types_and_ends_of_counts():
    for draws in (StepDraws(0, 0, 2, 5, 8), SampleDraws(0, 2, 3)):
        n = torch.full((3, 2, 4), 7)
        for p, want in ((torch.zeros(3, 2, 4), 0), (torch.ones(3, 2, 4, dtype=torch.float64), 7)):
            got = draws.binomial(n, p)
            assert (got.shape, got.dtype, got.device) == (n.shape, torch.int64, n.device)
            assert bool((got == want).all())
        assert bool((draws.binomial(torch.zeros_like(n), torch.full((3, 2, 4), 0.5)) == 0).all())
        got = draws.poisson(torch.tensor([0.0, 1e4, 3.0]).view(3, 1, 1).expand(3, 2, 4))
        assert (got.shape, got.dtype) == ((3, 2, 4), torch.int64)
        assert bool((got[0] == 0).all())
        assert bool((got[1] > 9000).all())
        assert draws.poisson(torch.ones(3)).shape == (3,)
        # A rate that a network gives has a gradient, which counts have not.
        assert not draws.poisson(torch.ones(3, 2, requires_grad=True)).requires_grad

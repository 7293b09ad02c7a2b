import math

import pytest
import torch

from osmose.networks.trains import (
    Point,
    add,
    dense,
    inner,
    largest_ranks,
    matrices,
    orthogonalized,
    products_left,
    products_right,
    ranks,
    rounded,
    split_left,
    split_right,
    step_left,
    step_right,
    tangent_inner,
)

SIZES, RANKS = (3, 4, 2, 5), (2, 4, 3)


def train(sizes=SIZES, bonds=RANKS, together=1, seed=0):
    """Cores of chance, float64, of norm about 1."""
    generator, edges = torch.Generator().manual_seed(seed), [1, *bonds, 1]
    return [
        torch.randn(together, edges[k], n, edges[k + 1], generator=generator, dtype=torch.float64)
        / math.sqrt(edges[k] * n)
        for k, n in enumerate(sizes)
    ]


def train_of(whole):
    """A full tensor (C, n_1, ..., n_d) as a train of the largest ranks: unit matrices from the left, then itself."""
    C, *sizes = whole.shape
    cores, left = [], 1
    for n in sizes[:-1]:
        cores.append(torch.eye(left * n, dtype=whole.dtype).reshape(1, left, n, left * n).expand(C, -1, -1, -1))
        left *= n
    return [*cores, whole.reshape(C, left, sizes[-1], 1)]


def gauged(cores, seed=0):
    """The same tensor with matrices of chance put into every bond."""
    generator, cores = torch.Generator().manual_seed(seed), list(cores)
    for k, r in enumerate(ranks(cores)):
        mix = torch.eye(r, dtype=torch.float64) + 0.5 * torch.randn(
            len(cores[k]), r, r, generator=generator, dtype=torch.float64
        )
        cores[k] = torch.einsum("crns,csq->crnq", cores[k], mix)
        cores[k + 1] = torch.einsum("cqr,crns->cqns", torch.linalg.inv(mix), cores[k + 1])
    return cores


def same(a, b, tolerance=1e-12):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def left_unfolding(core):
    return core.reshape(len(core), -1, core.shape[3])


def right_unfolding(core):
    return core.reshape(len(core), core.shape[1], -1)


def is_orthonormal(columns):
    return bool((columns.transpose(1, 2) @ columns - torch.eye(columns.shape[2])).abs().max() < 1e-12)


def cut_errors(cores, wanted):
    """Of each bond, the singular values of the full tensor that a cut leaves out, as one error (C,)."""
    whole = dense(cores)
    errors = []
    for k, keep in enumerate(wanted, 1):
        values = torch.linalg.svdvals(whole.reshape(len(whole), math.prod(whole.shape[1 : k + 1]), -1))
        errors.append(values[:, keep:].square().sum(1).sqrt())
    return errors


# --- trains as they are -------------------------------------------------------------------------------------------


def test_a_train_is_the_product_of_its_matrices():
    cores = train(together=2)
    whole = dense(cores)
    assert whole.shape == (2, *SIZES)
    for c in range(2):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in SIZES)).tolist():
            product = torch.eye(1, dtype=torch.float64)
            for core, i in zip(cores, place, strict=True):
                product = product @ core[c, :, i]
            assert abs(whole[(c, *place)] - product[0, 0]) < 1e-12
    assert ranks(cores) == list(RANKS)


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((3, 4, 2, 5), [3, 10, 5]), ((2, 2, 2, 2, 2), [2, 4, 4, 2]), ((4, 3), [3]), ((2, 30, 2), [2, 2])],
)
def test_the_largest_ranks_are_those_of_any_full_tensor(sizes, most):
    assert largest_ranks(sizes) == most
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(1, *sizes, generator=generator, dtype=torch.float64)
    cores = train_of(whole)
    assert same(dense(cores), whole)
    cut = rounded(cores, most)
    assert ranks(cut) == most
    assert same(dense(cut), whole)


def test_evaluation_at_features_is_the_dense_contraction():
    cores, generator = train(together=2), torch.Generator().manual_seed(1)
    features = [torch.randn(7, n, generator=generator, dtype=torch.float64) for n in SIZES]
    want = torch.einsum("cijkl,bi,bj,bk,bl->cb", dense(cores), *features)
    found = matrices(cores, features)
    rows, columns = products_right(found), products_left(found)
    assert len(rows) == len(columns) == 5
    assert same(rows[-1][:, 0], want)
    assert same(columns[0][:, 0], want)
    left = right = torch.ones(2, 7, 1, dtype=torch.float64)
    for k in range(4):
        assert same((rows[k] * columns[k]).sum(1), want)
        assert same(left, rows[k].transpose(1, 2))
        assert same(right, columns[4 - k].transpose(1, 2))
        left = step_right(left, features[k], cores[k])
        right = step_left(right, features[3 - k], cores[3 - k])
    assert same(left[:, :, 0], want)
    assert same(right[:, :, 0], want)


def test_channels_are_stepped_over_one_by_one():
    core, generator = train(together=2)[1], torch.Generator().manual_seed(1)
    features = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    left, right = (torch.randn(2, 7, 3, r, generator=generator, dtype=torch.float64) for r in (2, 4))
    for c in range(3):
        assert same(step_right(left, features, core)[:, :, c], step_right(left[:, :, c], features, core))
        assert same(step_left(right, features, core)[:, :, c], step_left(right[:, :, c], features, core))
    want = torch.einsum("cbr,bm,crms->cbs", left[:, :, 0], features, core)
    assert same(step_right(left, features, core)[:, :, 0], want)


def test_sums_and_inner_products():
    a, b = train(together=2), train(bonds=(3, 2, 5), together=2, seed=1)
    for scale in (1.0, -0.5, 0.0):
        both = add(a, b, scale)
        assert ranks(both) == [5, 6, 8]
        assert same(dense(both), dense(a) + scale * dense(b))
    assert same(inner(a, b), (dense(a) * dense(b)).flatten(1).sum(1))
    assert same(inner(a, a), dense(a).flatten(1).square().sum(1))


# --- gauges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bonds", [RANKS, (3, 10, 5), (1, 1, 1), (4, 12, 7)], ids=str)  # the last: more than there are
@pytest.mark.parametrize("centre", range(4))
def test_orthogonalisation_leaves_the_tensor_and_orthogonalises_all_other_cores(bonds, centre):
    cores = train(bonds=bonds, together=2)
    made = orthogonalized(cores, centre)
    assert same(dense(made), dense(cores))
    assert ranks(made) == list(bonds)
    for k, core in enumerate(made):
        columns = left_unfolding(core) if k < centre else right_unfolding(core).transpose(1, 2)
        if k == centre:
            # All of the norm is here.
            assert same(core.flatten(1).norm(dim=1), dense(cores).flatten(1).norm(dim=1))
        elif columns.shape[1] >= columns.shape[2]:
            assert is_orthonormal(columns)
        else:  # too many for the space: orthonormal ones that fill it, and zeros
            assert is_orthonormal(columns.transpose(1, 2))
    again = orthogonalized(made, centre)
    assert all(same(x, y, 1e-10) for x, y in zip(again, made, strict=True))


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 3, 3), (2, 2, 7), (1, 3, 1)])
def test_splits_are_factors_with_one_sign(shape):
    r, n, s = shape
    core = torch.randn(2, r, n, s, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, upper = split_right(core)
    assert (q.shape, upper.shape) == (core.shape, (2, s, s))
    assert same(torch.einsum("crnq,cqs->crns", q, upper), core)
    assert bool((upper.diagonal(dim1=1, dim2=2) >= 0).all())
    q, lower = split_left(core)
    assert (q.shape, lower.shape) == (core.shape, (2, r, r))
    assert same(torch.einsum("crq,cqns->crns", lower, q), core)
    assert bool((lower.diagonal(dim1=1, dim2=2) >= 0).all())


def test_the_canonical_form_does_not_depend_on_the_gauge():
    cores = train(together=2)
    want = rounded(cores, RANKS)
    assert same(dense(want), dense(cores))
    for seed in range(3):
        found = rounded(gauged(cores, seed), RANKS)
        assert same(dense(found), dense(cores), 1e-10)
        assert all(same(x, y, 1e-8) for x, y in zip(found, want, strict=True))
    assert all(same(x, y, 1e-10) for x, y in zip(rounded(want, RANKS), want, strict=True))
    for k, core in enumerate(want[:-1]):
        assert is_orthonormal(left_unfolding(core))
        # The bonds have the basis of singular vectors: what follows is orthogonal, with their values for lengths.
        after = dense([torch.eye(RANKS[k], dtype=torch.float64).expand(2, 1, -1, -1), *want[k + 1 :]]).flatten(2)
        values = torch.linalg.svdvals(dense(cores).reshape(2, math.prod(SIZES[: k + 1]), -1))[:, : RANKS[k]]
        assert same(after @ after.transpose(1, 2), torch.diag_embed(values**2), 1e-10)


# --- rounding -----------------------------------------------------------------------------------------------------


def test_rounding_is_exact_where_ranks_suffice():
    a, b = train(together=2), train(bonds=(1, 2, 1), together=2, seed=1)
    assert same(dense(rounded(add(a, a), RANKS)), 2 * dense(a))
    assert ranks(rounded(add(a, a), RANKS)) == list(RANKS)
    assert same(dense(rounded(add(a, b), (3, 6, 4))), dense(a) + dense(b))
    assert same(dense(rounded(a, (9, 99, 9))), dense(a))  # more than there is to keep


@pytest.mark.parametrize("wanted", [(1, 1, 1), (2, 2, 2), (2, 4, 3), (3, 5, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_quasi_optimal(wanted, seed):
    generator = torch.Generator().manual_seed(seed)
    cores = train_of(torch.randn(2, *SIZES, generator=generator, dtype=torch.float64))
    found = rounded(cores, wanted)
    assert all(own <= most for own, most in zip(ranks(found), wanted, strict=True))
    error = (dense(found) - dense(cores)).flatten(1).norm(dim=1)
    cuts = torch.stack(cut_errors(cores, ranks(found)))
    # No train of these ranks is nearer than the largest cut, so that this is sqrt(d - 1) times the best at most.
    assert bool((error >= cuts.amax(0) * (1 - 1e-12)).all())
    assert bool((error <= cuts.square().sum(0).sqrt() * (1 + 1e-12)).all())
    assert bool((error <= math.sqrt(3) * cuts.amax(0) * (1 + 1e-12)).all())


def test_rounding_finds_a_train_under_noise():
    cores, noise = train(together=2), torch.randn(2, *SIZES, generator=torch.Generator().manual_seed(3)).double()
    for size in (1e-1, 1e-4, 1e-7):
        noisy = train_of(dense(cores) + size * noise)
        error = (dense(rounded(noisy, RANKS)) - dense(noisy)).flatten(1).norm(dim=1)
        assert bool((error <= math.sqrt(3) * size * noise.flatten(1).norm(dim=1)).all())


# --- the manifold -------------------------------------------------------------------------------------------------


@pytest.fixture
def point():
    return Point(train(together=2))


def tangent(point, seed=0):
    """A tangent vector of chance, of norm about 1, as variations of the cores."""
    generator = torch.Generator().manual_seed(100 + seed)
    drawn = [torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in point.left]
    return point.gauged([v / math.sqrt(4 * v[0].numel()) for v in drawn])


def tangent_basis(cores):
    """Columns that span the tangent space of each train: the derivatives of the full tensor by every number of it."""
    bases = []
    for c in range(len(cores[0])):
        own = tuple(core[c : c + 1] for core in cores)
        jacobians = torch.autograd.functional.jacobian(lambda *cores: dense(cores).flatten(), own)
        bases.append(torch.cat([j.flatten(1) for j in jacobians], 1))
    return bases


def projected_densely(cores, whole):
    """The orthogonal projection on the tangent space, by least squares over a basis of it."""
    columns = []
    for basis, one in zip(tangent_basis(cores), whole, strict=True):
        u, values, _ = torch.linalg.svd(basis, full_matrices=False)
        u = u[:, values > 1e-10 * values[0]]
        columns.append((u @ (u.T @ one.flatten())).reshape(one.shape))
    return torch.stack(columns)


def test_a_point_is_its_tensor_in_both_gauges(point):
    whole = dense(train(together=2))
    assert same(dense(point.left), whole)
    assert same(dense(point.right), whole)
    for k in range(3):
        assert is_orthonormal(left_unfolding(point.left[k]))
        assert is_orthonormal(right_unfolding(point.right[k + 1]).transpose(1, 2))
        eye = torch.eye(RANKS[k], dtype=torch.float64).expand(2, 1, -1, -1)
        after = dense([eye, *point.right[k + 1 :]]).flatten(2)
        assert same(dense([eye, *point.left[k + 1 :]]).flatten(2), point.between[k] @ after)


def test_the_projection_is_orthogonal(point):
    whole = torch.randn(2, *SIZES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = train_of(whole), train(bonds=(3, 2, 4), together=2, seed=2)
    pa, pb = point.projected(a), point.projected(b)
    assert same(dense(point.train(pa)), projected_densely(point.left, whole), 1e-10)
    # Idempotent, self-adjoint, and what is left over is orthogonal to every tangent vector.
    for own, again in zip(pa, point.projected(point.train(pa)), strict=True):
        assert same(again, own)
    assert same(inner(point.train(pa), b), inner(a, point.train(pb)))
    left = add(a, point.train(pa), -1.0)
    for seed in range(3):
        assert inner(left, point.train(tangent(point, seed))).abs().max() < 1e-12
    assert same(inner(left, left) + inner(point.train(pa), point.train(pa)), inner(a, a))


def test_the_projection_fixes_tangent_vectors_and_the_point_itself(point):
    xi = tangent(point)
    assert all(same(a, b) for a, b in zip(point.projected(point.train(xi)), xi, strict=True))
    own = point.projected(point.left)
    assert all(not v.abs().max() > 1e-12 for v in own[:-1])
    assert same(own[-1], point.left[-1])
    assert same(dense(point.train(xi, 1.0)), dense(point.train(xi)) + dense(point.left))


def test_variations_are_in_the_gauge_and_their_norms_add_up(point):
    xi, eta = tangent(point), point.projected(train(bonds=(1, 3, 2), together=2, seed=5))
    for variations in (xi, eta):
        for u, v in zip(point.left[:-1], variations[:-1], strict=True):
            assert (left_unfolding(u).transpose(1, 2) @ left_unfolding(v)).abs().max() < 1e-12
        assert ranks(point.train(variations)) == [2 * r for r in RANKS]
    for a in (xi, eta):
        for b in (xi, eta):
            assert tangent_inner(a, b) == pytest.approx(float((dense(point.train(a)) * dense(point.train(b))).sum()))
    assert tangent_inner(xi, xi) == pytest.approx(float(inner(point.train(xi), point.train(xi)).sum()))


def test_a_tangent_vector_is_the_sum_of_trains_with_one_core_varied(point):
    xi = tangent(point)
    total = sum(dense([*point.left[:k], xi[k], *point.right[k + 1 :]]) for k in range(4))
    assert same(dense(point.train(xi)), total)
    assert same(projected_densely(point.left, total), total, 1e-10)
    # As wide as the manifold: so many tangent vectors are independent.
    dimension = sum(core[0].numel() for core in point.left) - sum(r * r for r in RANKS)
    assert [int(torch.linalg.matrix_rank(basis)) for basis in tangent_basis(point.left)] == [dimension] * 2


def test_the_retraction_is_of_second_order(point):
    for seed in range(3):
        xi = tangent(point, seed)
        assert 0.3 < tangent_inner(xi, xi) < 3
        lengths = [2.0**-i for i in range(4, 11)]
        errors = []
        for h in lengths:
            found = point.retracted(xi, h)
            assert ranks(found) == list(RANKS)
            wanted = dense(point.train([h * v for v in xi], 1.0))
            errors.append(float((dense(found) - wanted).norm()))
        x, y = torch.tensor(lengths).double().log(), torch.tensor(errors).double().log()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        assert 1.9 < slope < 2.2
    assert same(dense(point.retracted(xi, 0.0)), dense(point.left))


def derivatives(loss, cores):
    """Of a loss of the full tensors, by each core."""
    own = [core.clone().requires_grad_() for core in cores]
    return torch.autograd.grad(loss(dense(own)), own)


def test_the_riemannian_gradient_is_the_projection_of_the_euclidean_one(point):
    a, b = (torch.randn(2, *SIZES, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))

    def loss(whole):
        return ((whole - a).square() / 2 + (b * whole).sin()).sum()

    found = point.gradient(derivatives(loss, point.left))
    whole = dense(point.left).requires_grad_()
    (euclidean,) = torch.autograd.grad(loss(whole), whole)
    assert same(dense(point.train(found)), projected_densely(point.left, euclidean), 1e-10)
    for own, want in zip(found, point.projected(train_of(euclidean)), strict=True):
        assert same(own, want, 1e-10)
    # And so it is the slope along every tangent vector.
    for seed in range(3):
        xi = tangent(point, seed)
        h = 1e-5
        ahead, back = (loss(dense(point.retracted(xi, step))) for step in (h, -h))
        assert tangent_inner(found, xi) == pytest.approx(float(ahead - back) / (2 * h), rel=1e-6)


def test_the_gradient_does_not_depend_on_the_gauge():
    target = torch.randn(2, *SIZES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for cores in (train(together=2), gauged(train(together=2), 4)):
        point = Point(cores)
        by_core = derivatives(lambda whole: (whole - target).square().sum(), point.left)
        found.append(dense(point.train(point.gradient(by_core))))
    assert same(found[1], found[0], 1e-10)


def test_the_gradient_vanishes_just_where_all_variations_do(point):
    whole = torch.randn(2, *SIZES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    normal = whole - projected_densely(point.left, whole)
    assert normal.norm() > 1
    # X is critical for the distance to X + N, with N orthogonal to the tangent space.
    by_core = derivatives(lambda x: (x - dense(point.left) - normal).square().sum(), point.left)
    gradient = point.gradient(by_core)
    assert max(float(v.abs().max()) for v in (*by_core, *gradient)) < 1e-10
    # For the distance to X + N + xi it is -2 xi, core by core; it vanishes with xi and not before.
    xi = tangent(point)
    for kept in range(4):
        one = [v if k == kept else torch.zeros_like(v) for k, v in enumerate(xi)]
        target = dense(point.train(one, 1.0)) + normal
        gradient = point.gradient(derivatives(lambda x, target=target: (x - target).square().sum(), point.left))
        for own, want in zip(gradient, one, strict=True):
            assert (own + 2 * want).abs().max() < 1e-10


def test_trains_side_by_side_never_mix():
    cores, other = train(together=3), train(bonds=(3, 2, 4), together=3, seed=1)
    point = Point(cores)
    by_core = derivatives(lambda x: (x - 1).square().sum(), point.left)
    xi = tangent(point)
    for c in range(3):
        own, others = ([core[c : c + 1] for core in many] for many in (cores, other))
        alone = Point(own)
        variations = [v[c : c + 1] for v in xi]
        pairs = [
            (rounded(add(cores, other), RANKS), rounded(add(own, others), RANKS)),
            (orthogonalized(cores, 1), orthogonalized(own, 1)),
            (point.left, alone.left),
            (point.right, alone.right),
            (point.projected(other), alone.projected(others)),
            (point.gradient(by_core), alone.gradient([v[c : c + 1] for v in by_core])),
            (point.train(xi, 1.0), alone.train(variations, 1.0)),
            (point.retracted(xi, 0.1), alone.retracted(variations, 0.1)),
        ]
        for together, single in pairs:
            assert all(same(a[c : c + 1], b, 1e-9) for a, b in zip(together, single, strict=True))
        assert same(inner(cores, other)[c : c + 1], inner(own, others))


def test_a_train_of_one_core_is_a_vector_space():
    cores = train(sizes=(5,), bonds=())
    point = Point(cores)
    xi = [torch.ones(1, 1, 5, 1, dtype=torch.float64)]
    assert same(dense(point.retracted(xi, 0.5)), dense(cores) + 0.5)
    assert same(point.projected(xi)[0], xi[0])
    assert same(dense(add(cores, xi, 2.0)), dense(cores) + 2)

import copy
import math

import pytest
import torch
from numpy.polynomial import hermite_e, legendre
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from osmose.errors import UserError
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.gaussian.parametrization import (
    EDMParametrization,
    EpsParametrization,
    VParametrization,
    X0Parametrization,
)
from osmose.gaussian.schedule import (
    CosineSchedule,
    LinearSchedule,
    StraightSchedule,
    TrigSchedule,
    VarianceExploding,
)
from osmose.methods.chain import levels_of
from osmose.networks import tensor_train
from osmose.networks.calibration import Levels
from osmose.networks.mlp import MLPConfig
from osmose.networks.tensor_train import TensorTrainConfig
from osmose.networks.trains import add, dense, rounded

OUTPUTS = ("potential", "block", "separate")
every_output = pytest.mark.parametrize("output", OUTPUTS)
#: The same network, over all forms: points and images, classes and none.
FORMS = {
    "points": ((4,), None, {}),
    "classes": ((3,), 3, {}),
    "components": ((1, 3, 3), None, {"coordinates": 4}),
    "all": ((2, 2, 2), 2, {"coordinates": 3}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def built(event_shape=(3,), num_classes=None, seed=0, size=0.7, **settings):
    """A network in float64 whose train is far from 0."""
    torch.manual_seed(seed)
    settings = {"rank": 3, "degree": 3, "time_degree": 2, "basis": "hermite", "domain": 6.0} | settings
    network = TensorTrainConfig(**settings).build(event_shape, num_classes=num_classes).double()
    network.set_trains([size * torch.randn_like(core) for core in network.trains()])
    return network


def of_form(form, output, **settings):
    shape, classes, more = FORMS[form]
    return built(shape, classes, output=output, **more, **settings)


def inputs(network, count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *network.event_shape, generator=generator, dtype=torch.float64)
    label = 1000 * torch.rand(count, generator=generator, dtype=torch.float64)
    classes = network.num_classes
    return x, label, torch.arange(count) % classes if classes else None


def moments(dimension, seed=3):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    mean = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return mean, root @ root.T / dimension + 0.1 * torch.eye(dimension)


def calibrate(network, schedule=None, parametrization=None):
    """Fit a network to moments of chance, and tell it the levels of a process; the moments."""
    mean, covariance = moments(network.dimension)
    network.calibration.fit(mean, covariance)
    schedule, parametrization = schedule or LinearSchedule(num_steps=50), parametrization or EpsParametrization()
    network.calibration.set_levels(levels_of(schedule, parametrization))
    return mean, covariance


def hermite(z, degree):
    """He_k(z) / sqrt(k!), k = 0..degree, from their coefficients; (*z.shape, degree + 1)."""
    columns = []
    for k in range(degree + 1):
        powers = hermite_e.herme2poly([0] * k + [1]) / math.sqrt(math.factorial(k))
        columns.append(sum(float(c) * z**p for p, c in enumerate(powers)))
    return torch.stack([c if isinstance(c, torch.Tensor) else torch.full_like(z, c) for c in columns], -1)


def of_time(label, degree):
    """Normalised Legendre polynomials of the time of a network that has not been told its levels: 0..1000 to -1..1."""
    s = label / 500 - 1
    columns = [torch.from_numpy(legendre.legval(s.numpy(), [0] * k + [1])) for k in range(degree + 1)]
    return torch.stack([math.sqrt(2 * k + 1) * column for k, column in enumerate(columns)], 1)


def contracted(network, z, time, condition=None):
    """The full tensors of a network's trains at coordinates z (B, K), functions of time (B, m) and classes: (B, C)."""
    whole = dense(network.trains())
    half = network.count // 2
    features = [hermite(z[:, k], degree) for k, degree in enumerate(network.degrees)]
    middle = [time]
    if network.num_classes:
        middle.insert(0, nn.functional.one_hot(condition, network.num_classes).double())
    features[half:half] = middle
    if network.blocks:  # functions of time first, and values beside them
        place = network.middle + 1
        whole = whole.unflatten(place, (-1, network.count)).movedim(place + 1, 1)[0]
    total = whole[:, None].expand(-1, len(z), *whole.shape[1:])
    for columns in features:
        total = torch.einsum("cbi...,bi->cb...", total, columns)
    return total.T


def expected(network, x, label, condition=None):
    """What a network should say that has not been calibrated, from the dense contraction."""
    z, time = x.flatten(1), of_time(label, network.config.time_degree)
    z = z[:, : network.count].clone().requires_grad_()  # components are the first values until they are fitted
    with torch.enable_grad():
        values = contracted(network, z, time, condition)
        if network.config.output == "potential":
            (values,) = torch.autograd.grad(values.sum(), z)
    padded = nn.functional.pad(values.detach(), (0, network.dimension - network.count))
    return padded.unflatten(1, network.event_shape)


# --- the function -------------------------------------------------------------------------------------------------


@every_output
@every_form
def test_the_network_is_the_dense_contraction(output, form):
    network = of_form(form, output)
    x, label, condition = inputs(network, 7)
    want = expected(network, x, label, condition)
    assert want.abs().max() > 0.1
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = network(x, label, condition)
        assert got.shape == x.shape
        assert (got - want).abs().max() < 1e-11 * want.abs().max()


@every_output
@pytest.mark.parametrize("ragged", [{"rank": (2, 5, 4, 2)}, {"degree": (1, 4, 2, 3)}, {"rank": 1}, {"rank": 99}])
def test_ranks_and_degrees_may_differ(output, ragged):
    if ragged == {"rank": 99}:
        with pytest.raises(UserError, match=r"network.rank: 99 is more than any bond allows; at most \d+ with"):
            built((4,), output=output, **ragged)
        return
    network = built((4,), output=output, **ragged)
    x, label, _ = inputs(network)
    assert (network(x, label) - expected(network, x, label)).abs().max() < 1e-10
    if isinstance(ragged.get("rank"), tuple):
        assert [core.shape[3] for core in network.cores] == [*ragged["rank"], 1]
    if "degree" in ragged:
        sizes = [core.shape[2] for core in network.cores]
        assert [sizes[k] for k in (0, 1, 3, 4)] == [2, 5, 3, 4]


def test_one_rank_for_all_bonds_is_less_where_a_mode_allows_less():
    network = built((4,), output="separate", rank=9, degree=2, time_degree=1)
    assert [core.shape[3] for core in network.cores[:-1]] == [3, 9, 9, 3]
    # As many numbers as there are: the train is any function.
    assert [core.shape[2] for core in network.cores] == [3, 3, 2, 3, 3]


@pytest.mark.parametrize("family", ["legendre", "chebyshev", "b-spline", "fourier"])
@every_output
def test_other_bases(family, output):
    network = built((3,), output=output, basis=family, degree=4, domain=3.0)
    x, label, _ = inputs(network)
    x = x.clamp(-2.9, 2.9)
    functions = network.bases["4"]
    whole = dense(network.trains())
    time = of_time(label, 2)
    z = x.clone().requires_grad_()
    if output == "block":
        whole = whole.unflatten(2, (3, 3)).movedim(3, 1)[0]
    values = torch.einsum(
        "cijkl,bi,bj,bk,bl->bc", whole, functions(z[:, 0]), time, *(functions(z[:, k]) for k in (1, 2))
    )
    want = torch.autograd.grad(values.sum(), z)[0] if output == "potential" else values
    assert (network(x, label) - want).abs().max() < 1e-10 * want.abs().max()


@pytest.mark.parametrize("output", ["separate", "potential"])
def test_rank_one_is_a_product_of_univariate_functions(output):
    network = built((3,), output=output, rank=1)
    x, label, _ = inputs(network)
    x.requires_grad_()
    factors = [
        hermite(x[:, place], 3) @ core[:, 0, :, 0].T
        for place, core in zip(range(3), _without_time(network), strict=True)
    ]
    product = (of_time(label, 2) @ network.cores[1][:, 0, :, 0].T) * factors[0] * factors[1] * factors[2]
    want = torch.autograd.grad(product.sum(), x)[0] if output == "potential" else product
    assert (network(x, label) - want).abs().max() < 1e-12 * want.abs().max()


def _without_time(network):
    return [core for place, core in enumerate(network.cores) if network.is_coordinate(place)]


@every_form
def test_a_potential_is_conservative(form):
    for output, symmetric in (("potential", True), ("block", False), ("separate", False)):
        network = of_form(form, output)
        calibrate(network)
        x, label, condition = inputs(network, 1)
        jacobian = torch.func.jacrev(lambda x, *told, of=network: of(x, *told))(x, label, condition)
        jacobian = jacobian.detach().reshape(x.numel(), x.numel())
        skew = float((jacobian - jacobian.T).abs().max() / jacobian.abs().max())
        assert (skew < 1e-10) if symmetric else (skew > 1e-2)


@every_output
def test_classes_are_a_mode(output):
    network = built((3,), 4, output=output)
    x, label, _ = inputs(network, 4)
    of = [network(x, label, torch.full((4,), c)).detach() for c in range(4)]
    assert min(float((of[a] - of[b]).abs().max()) for a in range(4) for b in range(a)) > 1e-3
    mixed = network(x, label, torch.tensor([2, 0, 3, 1]))
    assert torch.allclose(mixed, torch.stack([of[c][i] for i, c in enumerate((2, 0, 3, 1))]), rtol=1e-12)
    # Who is not told the class gets the mean over all.
    assert torch.allclose(network(x, label), torch.stack(of).mean(0), rtol=1e-10, atol=1e-12)


@every_output
@pytest.mark.parametrize("form", ["points", "components"])
def test_a_calibrated_network_adds_its_train_in_scaled_coordinates(output, form):
    network = of_form(form, output)
    mean, covariance = calibrate(network)
    x, _, _ = inputs(network, 6)
    label = torch.tensor([0.0, 20, 100, 480, 800, 980], dtype=torch.float64)  # steps of the schedule
    levels = levels_of(LinearSchedule(num_steps=50), EpsParametrization())
    rows = [int((levels.label - value).abs().argmin()) for value in label]
    a, b, s = (column[rows][:, None] for column in (levels.signal, levels.noise, levels.time))
    vectors = torch.linalg.eigh(covariance).eigenvectors
    axes = vectors.flip(1)[:, : network.count] if network.principal else torch.eye(network.dimension).double()
    # The signs of components are conventions; those of the network are taken.
    if network.principal:
        axes = axes * (axes * network.calibration.axes[:, : network.count]).sum(0).sign()
        assert torch.allclose(axes, network.calibration.axes[:, : network.count], atol=1e-8)
    variances = torch.diagonal(axes.T @ covariance @ axes)
    deviation = (a**2 * variances + b**2).sqrt()
    centred = x.flatten(1) - a * mean
    z = (centred @ axes / deviation).requires_grad_()
    time = torch.stack(
        [math.sqrt(2 * k + 1) * torch.from_numpy(legendre.legval(s[:, 0].numpy(), [0] * k + [1])) for k in range(3)], 1
    )
    train = contracted(network, z, time)
    if output == "potential":
        (train,) = torch.autograd.grad(train.sum(), z)
        train = train / deviation
    linear = torch.stack(
        [
            b[i] * torch.linalg.solve(a[i] ** 2 * covariance + b[i] ** 2 * torch.eye(network.dimension), centred[i])
            for i in range(6)
        ]
    )
    want = linear + train @ axes.T
    assert (network(x, label).flatten(1) - want).abs().max() < 1e-9 * want.abs().max()
    # What is orthogonal to the components has the linear prediction alone.
    if network.principal:
        outside = torch.eye(network.dimension).double() - axes @ axes.T
        assert ((network(x, label).flatten(1) - linear) @ outside).abs().max() < 1e-10
        assert (linear @ outside).abs().max() > 1e-2


def test_images_have_16_components_unless_they_are_told():
    assert TensorTrainConfig().build((1, 8, 8)).count == 16
    assert TensorTrainConfig().build((1, 3, 3)).count == 9
    assert TensorTrainConfig(coordinates=5).build((1, 8, 8)).count == 5
    points = TensorTrainConfig().build((20,))
    assert (points.count, points.principal) == (20, False)
    assert TensorTrainConfig(coordinates=5).build((20,)).principal


@every_output
def test_the_start_is_small_and_on_the_manifold(output):
    torch.manual_seed(0)
    network = TensorTrainConfig(output=output, rank=4, degree=4).build((5,), num_classes=3)
    whole = dense([core.detach().double() for core in network.cores])
    assert torch.allclose(whole.flatten(1).norm(dim=1), torch.tensor(0.01).double(), rtol=1e-4)
    cut = dense(rounded([core.detach().double() for core in network.cores], [3] * 6))
    assert (cut - whole).norm() > 1e-6 * whole.norm()  # all ranks are there
    x = torch.randn(4, 5)
    assert network(x, torch.full((4,), 500.0), torch.arange(4) % 3).abs().max() < 0.2
    torch.manual_seed(0)
    again = TensorTrainConfig(output=output, rank=4, degree=4).build((5,), num_classes=3)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@every_output
def test_the_start_knows_no_class_from_the_others(output):
    torch.manual_seed(0)
    network = TensorTrainConfig(output=output, rank=4, degree=4).build((4,), num_classes=5)
    whole = dense([core.detach() for core in network.cores])
    by_class = whole.movedim(network.middle, 0).flatten(1).norm(dim=1)  # behind the axis of the trains
    assert by_class.max() < 3 * by_class.min()


def test_input_of_another_form_is_refused():
    network = TensorTrainConfig().build((2,))
    for x, label in (((4, 3), 4), ((4, 2), 3), ((4, 2, 1), 4)):
        with pytest.raises(UserError, match=r"network: built for events \(2,\) with one label each"):
            network(torch.zeros(x), torch.zeros(label))


# --- what it costs ------------------------------------------------------------------------------------------------


@every_output
@every_form
def test_parameters_and_operations_are_those_of_the_formulas(output, form):
    network = of_form(form, output)
    x, label, condition = inputs(network, 1)
    classes = network.num_classes
    K, m, D = network.count, 3, network.dimension
    bonds = [1, *network.bonds.tolist(), 1]
    sizes = [4] * K
    sizes[K // 2 : K // 2] = [*([classes] if classes else []), m * (K if output == "block" else 1)]
    trains = K if output == "separate" else 1
    storage = [trains * bonds[k] * n * bonds[k + 1] for k, n in enumerate(sizes)]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == sum(storage)
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(core) for core in network.cores}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, label, condition)
    assert network.macs() == counter.get_total_flops() // 2
    ends = [k for k in range(len(sizes)) if K // 2 <= k < len(sizes) - (K - K // 2)]
    slopes = sum(own for k, own in enumerate(storage) if k not in ends) if output == "potential" else 0
    assert network.macs() == sum(storage) + slopes + D * (2 * D if not network.principal else 2 * D + 2 * K)


def test_products_of_matrices_by_hand():
    # Two coordinates around the time, with bonds 2 and 3: rows of 1x2, 2x3, 3x1 matrices.
    settings = {"rank": (2, 3), "degree": 2, "time_degree": 2}
    assert built((2,), output="separate", **settings).elementwise() == 2 * (2 + 6 + 3)
    # A block: 2 from the left and 3 from the right, then 2 values with 3 functions of the time, and 2 values of 3.
    assert built((2,), output="block", **settings).elementwise() == 2 + 3 + 2 * 3 + 2 * 3
    # A potential: rows up to the last core and columns down to the first; around a slope, columns and then rows.
    assert built((2,), output="potential", **settings).elementwise() == (2 + 6) + (6 + 3) + (2 + 1) + (3 + 3)


def test_the_table_lists_the_modes():
    config = TensorTrainConfig(output="block", rank=3, degree=(2, 3, 4), time_degree=1)
    rows = config.table((3,))
    assert [row["mode"] for row in rows] == ["value 1", "time, values", "value 2", "value 3"]
    assert [row["functions"] for row in rows] == [3, 2, 4, 5]
    network = config.build((3,))
    assert [row["parameters"] for row in rows] == [core.numel() for core in network.cores]
    assert [(row["rank_left"], row["rank_right"]) for row in rows] == [(1, 3), (3, 3), (3, 3), (3, 1)]
    assert all(row["trains"] == 1 for row in rows)
    names = TensorTrainConfig(coordinates=4).build((1, 3, 3), num_classes=2).mode_names()
    assert names == ["component 1", "component 2", "class", "time", "component 3", "component 4"]


# --- evaluation ---------------------------------------------------------------------------------------------------


@every_output
def test_a_train_of_smaller_ranks_goes_through_the_state(output):
    network = built((4,), output=output, rank=4)
    x, label, _ = inputs(network)
    smaller = rounded([core.detach() for core in network.trains()], [2, 3, 1, 2])
    with network.replaced(smaller):
        want = network(x, label)
    network.set_trains(smaller)
    assert network.bonds.tolist() == [2, 3, 1, 2]
    assert torch.allclose(network(x, label), want, rtol=1e-12)
    # What is left of the cores is 0, and costs nothing.
    assert [core.shape for core in network.trains()] == [core.shape for core in smaller]
    assert sum(int((core != 0).sum()) for core in network.cores) == sum(core.numel() for core in smaller)
    assert network.macs() < built((4,), output=output, rank=4).macs()
    fresh = built((4,), output=output, rank=4, seed=5)
    fresh.load_state_dict(copy.deepcopy(network.state_dict()))
    assert [core.shape for core in fresh.trains()] == [core.shape for core in smaller]
    assert torch.equal(fresh(x, label), network(x, label))
    assert torch.equal(copy.deepcopy(network)(x, label), network(x, label))
    fresh.set_trains([torch.randn_like(core) for core in fresh.cores])  # and up again
    assert fresh.bonds.tolist() == [4, 4, 4, 4]
    assert torch.equal(fresh(x, label), fresh.requires_grad_(False)(x, label))


def test_a_network_can_be_given_its_own_trains():
    network = built((3,))
    before = [core.detach().clone() for core in network.cores]
    network.set_trains(network.trains())
    assert all(torch.equal(a, b) for a, b in zip(network.cores, before, strict=True))


@every_output
@every_form
def test_an_evaluation_in_parts_is_one(output, form, monkeypatch):
    network = of_form(form, output, domain=1.0)
    calibrate(network)
    x, label, condition = inputs(network, 11)
    whole = network(x, label, condition).detach()
    counted = network.noted()
    monkeypatch.setattr(tensor_train, "_MOST", 3 * network._widest())
    with torch.no_grad():
        parts = network(x, label, condition)
        assert network.noted() == counted
        assert torch.allclose(parts, whole, rtol=1e-12, atol=1e-13)
        monkeypatch.setattr(tensor_train, "_MOST", 1)
        assert torch.allclose(network(x, label, condition), whole, rtol=1e-12, atol=1e-13)


@every_output
def test_other_cores_inside_and_its_own_after(output):
    network = built((3,), output=output)
    x, label, _ = inputs(network)
    own, others = network(x, label), [torch.randn_like(core) for core in network.trains()]
    other = copy.deepcopy(network)
    other.set_trains(others)

    def look():
        with network.replaced(others):
            assert torch.equal(network(x, label), other(x, label))
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert torch.equal(network(x, label), own)
    # A difference of two trains, of ranks beyond its own.
    with network.replaced(add(others, [core.detach() for core in network.trains()], -1.0)):
        assert torch.allclose(network(x, label), other(x, label) - own, rtol=1e-9, atol=1e-11)


@every_output
def test_the_canonical_form_is_the_same_function_in_one_gauge(output):
    network = built((4,), output=output, rank=(2, 4, 3, 2))
    x, label, _ = inputs(network)
    want, cores = network(x, label).detach(), [core.detach().clone() for core in network.cores]
    network.canonical_()
    assert torch.allclose(network(x, label), want, rtol=1e-10, atol=1e-12)
    first = [core.detach().clone() for core in network.cores]
    assert not torch.allclose(first[0], cores[0])
    # Another gauge.
    for k, r in enumerate((2, 4, 3, 2)):
        mix = torch.eye(r).double() + 0.3 * torch.randn(r, r, dtype=torch.float64)
        cores[k] = cores[k] @ mix
        cores[k + 1] = torch.einsum("qr,crns->cqns", torch.linalg.inv(mix), cores[k + 1])
    network.set_trains(cores)
    assert torch.allclose(network(x, label), want, rtol=1e-9, atol=1e-11)
    network.canonical_()
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(network.cores, first, strict=True))


@every_output
@every_form
def test_forward_derivatives(output, form):
    network = of_form(form, output)
    calibrate(network)
    x, label, condition = inputs(network, 4)
    label = label * 0.9 + 30.3  # off the steps, where the table has kinks
    generator = torch.Generator().manual_seed(8)
    dx = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    dlabel = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    def slope(dx, dlabel):
        with forward_ad.dual_level():
            duals = forward_ad.make_dual(x, dx), forward_ad.make_dual(label, dlabel)
            return forward_ad.unpack_dual(network(*duals, condition)).tangent

    still, h = (torch.zeros_like(x), torch.zeros_like(label)), 1e-5
    with torch.no_grad():
        for by_x, by_label in ((dx, still[1]), (still[0], dlabel), (dx, dlabel)):
            ahead, back = (network(x + step * by_x, label + step * by_label, condition) for step in (h, -h))
            want = (ahead - back) / (2 * h)
            assert want.abs().max() > 1e-4
            assert (slope(by_x, by_label) - want).abs().max() < 1e-6 * want.abs().max()
    # With a graph: the weights can be trained through it.
    got = torch.func.jvp(lambda x: network(x, label, condition), (x,), (dx,))[1]
    assert torch.allclose(got, slope(dx, still[1]), rtol=1e-8, atol=1e-10)
    grads = torch.autograd.grad(got.square().sum(), list(network.cores))
    assert all(bool((grad != 0).any()) for grad in grads)
    # And it is as good as new.
    network.noted()
    assert torch.equal(copy.deepcopy(network)(x, label, condition), network(x, label, condition))


def test_a_network_can_be_copied_after_it_was_differentiated():
    network = built((2,))
    x, label, _ = inputs(network)
    torch.func.jvp(lambda x: network(x, label), (x,), (x,))
    assert torch.equal(copy.deepcopy(network)(x, label), network(x, label))
    assert network.noted() == {"outside": 0.0}


def test_counting_does_not_make_it_compile_again_and_again():
    network, counter = built((3,)), CompileCounter()
    x, label, _ = inputs(network)
    compiled = torch.compile(network, backend=counter)
    frames = []
    for _ in range(5):
        got = compiled(x, label)
        frames.append(counter.frame_count)
    assert torch.allclose(got, network(x, label), rtol=1e-12)
    assert frames[1:] == [frames[1]] * 4
    torch._dynamo.reset()


@every_output
def test_half_precision_is_left_aside(output):
    network = built((3,), output=output).float()
    calibrate(network)
    x, label, _ = (value if value is None else value.float() for value in inputs(network))
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, label)
    assert half.dtype == torch.float32
    assert torch.equal(half, network(x, label))
    assert network(x.bfloat16(), label).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(network(x, label), half)


@every_output
def test_values_outside_the_domain_are_counted(output):
    network = built((3,), domain=2.0, output=output)
    assert network.noted() == {}
    x = torch.tensor([[0.0, 2.0, -2.0], [2.01, 0.0, -9.0], [1.0, 1.0, 1.0], [0.0, 0.0, 5.0]]).double()
    label = torch.full((4,), 500.0).double()
    network(x, label)
    assert network.noted() == {"outside": 3 / 12}
    assert network.noted() == {}
    with torch.no_grad():
        network(x[:1], label[:1])
        network(x[1:2], label[1:2])
    assert network.noted() == {"outside": 2 / 3}  # of the last evaluation: what a resumed run logs as well
    # More than one in a hundred are worth a word, which does not begin the count anew.
    network(x, label)
    assert network.complaint().startswith("network.domain: 25.0% of the values lie beyond 2 deviations")
    assert network.noted() == {"outside": 0.25}
    assert network.complaint() is None
    network(x[[0] * 199 + [3]], label[:1].repeat(200))
    assert network.complaint() is None
    # And taken to the nearest end, where a potential has no slope in them.
    at_end = network(x.clamp(-2, 2), label)
    want = torch.where(x.abs() > 2, 0.0, at_end) if output == "potential" else at_end
    assert torch.equal(network(x, label), want)
    assert bool((at_end != 0).all())
    # A coordinate is a deviation of the data at that time.
    network.calibration.fit(torch.zeros(3).double(), 4 * torch.eye(3).double())
    network.noted()
    network(torch.tensor([[3.9, -3.9, 4.1]]).double(), label[:1])
    assert network.noted() == {"outside": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({}, (1,), "network: a tensor train needs at least 2 coordinates; events of shape (1,) have 1"),
        ({}, (1, 1, 1), "network: a tensor train needs at least 2 coordinates; events of shape (1, 1, 1) have 1"),
        ({"coordinates": 5}, (4,), "network.coordinates: 5 is more than the 4 values of an event"),
        ({"degree": 0}, (4,), "network.degree: 0 is not valid: must be at least 1"),
        ({"degree": (2, 0, 2, 2)}, (4,), "network.degree: 0 is not valid: must be at least 1"),
        (
            {"degree": (2, 2)},
            (4,),
            "network.degree: 2 numbers for 4; give one for each coordinate, or one for all",
        ),
        ({"rank": 0}, (4,), "network.rank: 0 is not valid: must be at least 1"),
        ({"rank": (2, 2, 2)}, (4,), "network.rank: 3 numbers for 4; give one for each bond, or one for all"),
        ({"rank": 46, "degree": 2}, (4,), "network.rank: 46 is more than any bond allows; at most 9"),
        (
            {"rank": (4, 4, 4, 4), "degree": 2},
            (4,),
            "network.rank: 4 of bond 1 is more than its modes allow; at most 3",
        ),
        (
            {"rank": (1, 4, 2, 2), "degree": 2},
            (4,),
            "network.rank: 4 of bond 2 is more than its modes allow; at most 3",
        ),
        ({}, (3, 64, 64), "network: events of 12288 values are too large for its linear prediction (at most 8192)"),
    ],
)
def test_what_no_train_can_be_is_refused(settings, shape, message):
    with pytest.raises(UserError) as refused:
        TensorTrainConfig(**settings).build(shape)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_learned_variance_is_refused():
    with pytest.raises(UserError, match="tensor-train has no second output for a learned variance"):
        TensorTrainConfig().build((4,), num_outputs=2)


# --- the linear prediction ------------------------------------------------------------------------------------------


PROCESSES = [
    (LinearSchedule(num_steps=25), EpsParametrization()),
    (LinearSchedule(num_steps=25), X0Parametrization()),
    (CosineSchedule(num_steps=15), VParametrization()),
    (CosineSchedule(num_steps=15), EDMParametrization(sigma_data=0.8)),
    (LinearSchedule(num_steps=1, beta_end=1e-4, beta_start=5e-4), EpsParametrization()),
    (VarianceExploding(), EDMParametrization(sigma_data=0.8)),
    (VarianceExploding(), EpsParametrization()),
    (VarianceExploding(), X0Parametrization()),
    (TrigSchedule(), EDMParametrization()),
    (TrigSchedule(), VParametrization()),
    (StraightSchedule(), X0Parametrization()),
    (StraightSchedule(), VParametrization()),
]


@every_output
@pytest.mark.parametrize(
    ("schedule", "parametrization"),
    PROCESSES,
    ids=[f"{s.kind}{s.native_steps or ''}-{p.kind}" for s, p in PROCESSES],
)
def test_for_gaussian_data_nothing_is_left_to_learn(output, schedule, parametrization):
    network = built((1, 2, 2), output=output, coordinates=3) if output == "block" else built((4,), output=output)
    mean, covariance = calibrate(network, schedule, parametrization)
    with torch.no_grad():
        for core in network.cores:
            core.zero_()
    denoiser, exact = NetworkDenoiser(network, schedule, parametrization), GaussianDenoiser(mean, covariance)
    steps = schedule.native_steps
    x0 = mean + torch.randn(9, 4, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    if steps:
        times = torch.arange(steps, 0, -1).double() / steps
    else:
        times = torch.tensor([1023, 700, 512, 100, 1]).double() / 1024
    for level in TimeGrid.at(schedule, times).levels[:-1]:
        x = level.alpha * x0 + level.sigma * torch.randn(9, 4, dtype=torch.float64)
        got = denoiser(x.unflatten(1, network.event_shape), level).flatten(1)
        # Labels are float32, between which the table is interpolated.
        assert (got - exact(x, level)).abs().max() < 1e-4 * x.abs().max(), level


@pytest.mark.parametrize("outputs", [1, 2])
def test_an_mlp_may_have_the_same_linear_prediction(outputs):
    network = MLPConfig(width=8, linear=True).build((2, 1, 2), num_outputs=outputs).double()
    network.dimension = 4
    schedule, parametrization = CosineSchedule(num_steps=15), VParametrization()
    mean, covariance = calibrate(network, schedule, parametrization)
    exact, level = GaussianDenoiser(mean, covariance), TimeGrid.of(schedule, 3).levels[1]
    denoiser = NetworkDenoiser(network, schedule, parametrization, learned_variance=outputs == 2)
    x = torch.randn(9, 4, dtype=torch.float64)
    got, share = denoiser.with_variance(x.unflatten(1, (2, 1, 2)), level)
    assert (got.flatten(1) - exact(x, level)).abs().max() < 1e-5
    assert share is None if outputs == 1 else bool((share == 0.5).all())  # of a variance nothing is predicted
    plain = MLPConfig(width=8).build((2, 1, 2), num_outputs=outputs)
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, _ in plain.named_parameters()]


def test_between_the_steps_the_table_is_interpolated_and_kept_at_its_ends():
    network = built((2,))
    levels = levels_of(CosineSchedule(num_steps=10), VParametrization())
    network.calibration.set_levels(levels)
    at = network.calibration.at(torch.tensor([0.0, 250.0, 900.0, -5.0, 1e6]).double())
    for column, own in zip(levels, at, strict=True):
        want = torch.stack([column[0], column[2:4].mean(), column[-1], column[0], column[-1]])
        assert torch.allclose(own[:, 0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "schedule", [LinearSchedule(), CosineSchedule(num_steps=30), VarianceExploding(), TrigSchedule()]
)
def test_the_feature_of_time_rises_with_the_log_snr(schedule):
    levels = levels_of(schedule, X0Parametrization())
    assert float(levels.time[0]) == -1
    assert float(levels.time[-1]) == 1
    assert bool((levels.time.diff() >= 0).all())
    first = 1 / schedule.native_steps if schedule.native_steps else 0.0
    noisy = -schedule.log_snr(torch.linspace(first, 1, len(levels.time), dtype=torch.float64))
    # An affine function of it, where it is in [-10, 10].
    low, high = max(float(noisy.min()), -10.0), min(float(noisy.max()), 10.0)
    assert torch.allclose(levels.time, (2 * (noisy - low) / (high - low) - 1).clamp(-1, 1), rtol=0, atol=1e-10)


def test_a_time_that_falls_is_refused():
    network, rising = built((2,)), torch.linspace(-1, 1, 5).double()
    ones = [torch.ones(5).double()] * 4
    with pytest.raises(UserError, match="schedule: labels of the time have to rise"):
        network.calibration.set_levels(Levels(torch.tensor([0.0, 1, 1, 2, 3]).double(), rising, *ones))
    for time in (rising.flip(0), 2 * rising):
        with pytest.raises(UserError, match="the network's feature of time has to rise from -1 to 1"):
            network.calibration.set_levels(Levels(torch.arange(5).double(), time, *ones))


# --- Gaussian data without the linear part: what ranks it takes -------------------------------------------------------


@pytest.mark.parametrize("dimension", [2, 4])
def test_a_sum_of_univariate_functions_has_rank_two(dimension):
    # For one t the optimal eps of x0 ~ N(0, C) is sigma C_t^{-1} x: its values are sums over the coordinates.
    _, covariance = moments(dimension)
    schedule, step = CosineSchedule(num_steps=10), 4
    level = schedule.level(step / 10)
    total = level.alpha**2 * covariance + level.sigma**2 * torch.eye(dimension)
    network = built((dimension,), output="separate", rank=2, degree=1)
    network.calibration.set_levels(levels_of(schedule, EpsParametrization()))
    # The network takes the data for white: it predicts sigma x, and z = x.
    gains = level.sigma * (torch.linalg.inv(total) - torch.eye(dimension))
    cores, half = [], dimension // 2
    for k in range(dimension):
        core = torch.zeros(dimension, 2, 2, 2, dtype=torch.float64)
        core[:, 0, 0, 0] = core[:, 1, 0, 1] = 1
        core[:, 0, 1, 1] = gains[:, k]
        cores.append(core[:, :1] if k == 0 else core[..., 1:] if k == dimension - 1 else core)
    constant = torch.zeros(dimension, 2, 3, 2, dtype=torch.float64)
    constant[:, 0, 0, 0] = constant[:, 1, 0, 1] = 1
    network.set_trains([*cores[:half], constant, *cores[half:]])
    x = torch.randn(20, dimension, dtype=torch.float64)
    label = torch.full((20,), float(schedule.label(level)), dtype=torch.float64)
    want = level.sigma * torch.linalg.solve(total, x.T).T
    assert (network(x, label) - want).abs().max() < 1e-10
    # And no less: the best of rank 1 is far off.
    network.set_trains(rounded([core.detach() for core in network.trains()], [1] * dimension))
    assert (network(x, label) - want).abs().max() > 1e-2

"""Tangents of denoisers known in closed form, for data N(0, s^2 I) in TrigFlow's own coordinates."""

import itertools
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from osmose.analysis.tangents import tangents, write_tangents
from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.errors import UserError
from osmose.gaussian.parametrization import column
from osmose.gaussian.trigflow import TrigFlow
from osmose.training.config import Parent, RunConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run

#: Standard deviation of the data and sd, events, held-out items.
S, SD, D, ITEMS = 0.5, 0.8, 64, 4000
HASH = "7" * 64


class Scaled(nn.Module):
    """A network of EDM's parametrization on the trigonometric schedule for which V = factor(angle, class) x."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.unused = factor, nn.Parameter(torch.zeros(()))

    def forward(self, y, label, condition=None):
        # The schedule's own angle is that of sd = 1.
        angle = torch.atan2(torch.sin(label.double() * math.pi / 2000) / SD, torch.cos(label.double() * math.pi / 2000))
        factor = self.factor(angle) if condition is None else self.factor(angle, condition)
        return (-column(factor, y.double()) * y.double()).float()


class Known(Run):
    """A run whose network is put in its place, and whose weights have the hash that its children know."""

    def __init__(self, folder, config, factor, change=None):
        super().__init__(folder, config)
        self.factor, self.change = factor, change

    def model(self, device="cpu"):
        model = self.config.method.build(self.config.spec).to(device).eval()
        model.denoiser.network = Scaled(self.factor)
        if self.change is not None:
            self.change(model)
        return model

    def hash(self):
        return HASH


def variance(t):
    return torch.cos(t) ** 2 * S**2 + torch.sin(t) ** 2 * SD**2


def exact(t):
    """V / x of the exact denoiser."""
    return torch.cos(t) * torch.sin(t) * (SD**2 - S**2) / variance(t)


def consistent(t, bottom=0.0):
    """V / x of the exact consistency function to an angle."""
    left = t - bottom
    ratio = (variance(torch.as_tensor(bottom, dtype=torch.float64)) / variance(t)).sqrt()
    return (left.cos() - ratio) / left.sin()


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    train, held_out = S * torch.randn(100, D, generator=generator), S * torch.randn(ITEMS, D, generator=generator)
    spec = DataSpec(kind="points", shape=(D,), num_classes=3)
    return Dataset("npz:known", spec, train, held_out, "", torch.zeros(100).long(), torch.arange(ITEMS) % 3)


@pytest.fixture
def known(dataset, tmp_path):
    """Make a run; all but a diffusion were made from `teacher`."""

    def make(method, factor, change=None, **changes):
        small = {"network.width": 8, "network.depth": 1, "schedule": "trig", "parametrization.sigma_data": SD}
        own = {name: changes.pop(name) for name in ("segments",) if name in changes}
        config = recipe(
            "sct" if method == "scd" else method, DataConfig(source="npz:known"), dataset, 0, small | changes
        )
        if method == "scd":  # which is made from a run alone, and has the fields of sct and more
            values = config.to_json()
            config = RunConfig.parse(values | {"method": values["method"] | {"kind": "scd"} | own})
        if method != "edm":
            config = config.replace(parent=Parent(folder="teacher", sha256=HASH))
        return Known(tmp_path / method, config, factor, change)

    return make


def averaged(values, edges, count=2000):
    """Mean of a function of the angle over each bin."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.stack([values(low + (high - low) * share).mean() for low, high in itertools.pairwise(edges)])


#: Root mean square of D standard normal values, on average.
CHI = 1 - 1 / (4 * D)


# --- exact functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"),
    [("scd", {}), ("scd", {"segments": 3}), ("sct", {}), ("ect", {})],
    ids=["scd", "segments", "sct", "ect"],
)
@pytest.mark.parametrize("jvp", ["forward", "finite-diff"])
def test_it_vanishes_for_the_exact_consistency_function_of_the_teacher(known, dataset, method, changes, jvp):
    run = known(method, consistent, **changes)
    length = run.model().start / changes.get("segments", 1)
    run.factor = lambda t: consistent(t, (t / length).floor() * length)
    found = tangents(run, dataset, teacher=known("edm", exact), n=50, bins=6, jvp=jvp)
    assert found.conditions["direction"] == "teacher"
    assert float(found.tangent.max()) < (2e-4 if jvp == "forward" else 2e-3)
    assert float(found.rate[:, 0].min()) > 0.01
    assert bool((found.not_finite == 0).all())
    # The data's direction has a spread.
    assert float(tangents(run, dataset, n=50, bins=6).tangent[:3].min()) > 0.05


def test_along_its_own_flow_the_exact_denoiser_has_the_closed_form(known, dataset):
    found = tangents(known("edm", exact), dataset, direction="own", n=300, bins=8)
    edges, grows = found.edges, SD**2 - S**2
    assert edges[[0, -1]].tolist() == pytest.approx([0, math.pi / 2 - 1e-4], abs=2e-5)
    assert edges.diff().tolist() == pytest.approx([float(edges[1] - edges[0])] * 8)

    def tangent(t):  # D = s^2 cos(t) / sqrt(variance) u along the flow, for a standard normal u
        c, s, v = t.cos(), t.sin(), variance(t)
        return (c * S**2 * (s / v.sqrt() + c * c * s * grows / v**1.5)).abs()

    def rate(t):  # V = exact(t) x = cos sin grows / sqrt(variance) u
        c, s, v = t.cos(), t.sin(), variance(t)
        return (grows * ((c * c - s * s) / v.sqrt() - (c * s) ** 2 * grows / v**1.5)).abs()

    assert found.tangent[:, 0].tolist() == pytest.approx((CHI * averaged(tangent, edges)).tolist(), rel=0.02)
    assert found.rate[:, 0].tolist() == pytest.approx((CHI * averaged(rate, edges) / SD).tolist(), rel=0.02)
    expected = averaged(lambda t: t.cos() * t.sin() * rate(t), edges)
    assert found.jvp[:, 0].tolist() == pytest.approx((CHI * expected).tolist(), rel=0.02)
    assert bool((found.tangent[:, 1] < found.tangent[:, 0]).all())
    assert bool((found.tangent[:, 0] < found.tangent[:, 2]).all())


def test_along_the_data_the_tangent_has_the_spread_of_the_velocity_besides(known, dataset):
    found = tangents(known("edm", exact), dataset, n=300, bins=8)
    assert found.conditions["direction"] == "data"

    def tangent(t):  # g = (what it is along the flow) + (what it has of dx/dt) (dx/dt - V)
        c, s, v = t.cos(), t.sin(), variance(t)
        flow = c * S**2 * (s / v.sqrt() + c * c * s * (SD**2 - S**2) / v**1.5)
        along = c * c - c * s * exact(t)
        return (flow**2 + along**2 * (S * SD) ** 2 / v).sqrt()  # Var(dx/dt | x) = s^2 sd^2 / variance

    assert found.tangent[:, 0].tolist() == pytest.approx((CHI * averaged(tangent, found.edges)).tolist(), rel=0.02)


def test_of_two_directions_with_one_mean_the_tangents_have_one_mean(known):
    flow = TrigFlow(known("edm", exact).model().denoiser, SD)
    count, generator = 20_000, torch.Generator().manual_seed(1)
    x = torch.randn(1, D, generator=generator).expand(count, D)
    angle = torch.full((count,), 0.7, dtype=torch.float64)
    c, s, v = math.cos(0.7), math.sin(0.7), float(variance(torch.tensor(0.7)))
    x0 = c * S**2 / v * x + S * SD * s / math.sqrt(v) * torch.randn(count, D, generator=generator)  # given x
    z = (x - c * x0) / s
    data, _ = flow.tangent(x, angle, c * z - s * x0, angle)
    own, _ = flow.tangent(x[:1], angle[:1], flow.velocity(x[:1], angle[:1]), angle[:1])
    error = data.std(0) / math.sqrt(count)
    assert float((data.mean(0) - own[0]).div(error).abs().max()) < 4.5
    assert float(own.abs().mean()) > 20 * float(error.mean())


# --- what else it says ----------------------------------------------------------------------------------------------


def test_the_learned_weight_is_told_where_there_is_one(known, dataset):
    def weigh(model):
        nn.init.constant_(model.weight.linear.bias, math.log(3))

    assert tangents(known("sct", exact, weigh), dataset, n=4, bins=3).weight.tolist() == pytest.approx([3] * 3)
    assert tangents(known("sct", exact, adaptive_weight=False), dataset, n=4, bins=3).weight is None
    assert tangents(known("ect", exact), dataset, n=4, bins=3).weight is None
    assert tangents(known("edm", exact), dataset, n=4, bins=3).weight is None


def test_the_share_of_training_times_is_that_of_the_law(known, dataset):
    changes = {"times": "log-normal", "times.mean": -0.5, "times.std": 0.9}
    found = tangents(known("sct", exact, **changes), dataset, n=2, bins=5)
    below = torch.special.ndtr((found.ratios[1:-1].log() + 0.5) / 0.9)
    expected = torch.cat([below, below.new_ones(1)]).diff(prepend=below.new_zeros(1))
    assert found.trained.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert found.ratios.tolist() == pytest.approx((SD * found.edges.tan()).tolist())


@pytest.mark.parametrize(("parametrization", "sd"), [("v", 1.0), ("x0", S)])
def test_without_a_sigma_data_of_its_own_a_diffusion_gets_that_of_its_children(known, dataset, parametrization, sd):
    run = known("edm", exact)
    method = type(run.config.method).parse(run.config.method.to_json() | {"parametrization": {"kind": parametrization}})
    run.config = run.config.replace(method=method)
    assert tangents(run, dataset, n=2, bins=2).sigma_data == pytest.approx(sd, abs=0.01)


def test_classes_are_passed_on(known, dataset):
    def by_class(t, condition):
        return torch.ones_like(t) * condition

    labelled = [
        Dataset("npz:known", dataset.spec, dataset.train, dataset.held_out, "", None, torch.full((ITEMS,), k))
        for k in (0, 2)
    ]
    run = known("edm", by_class, conditional=True)
    none, two = (tangents(run, data, direction="own", n=20, bins=4).tangent for data in labelled)
    # V = k x: dV/dt = k^2 x, g = -cos sin (1 + k^2) x.
    assert two.tolist() == [pytest.approx(row, rel=1e-3) for row in (5 * none).tolist()]


def test_the_seed_decides_and_the_batch_size_does_not(known, dataset):
    run = known("edm", exact)
    found = [
        tangents(run, dataset, n=30, bins=3, seed=seed, batch_size=size) for seed, size in ((5, 30), (5, 7), (6, 30))
    ]
    assert found[0].tangent.tolist() == [pytest.approx(row, rel=1e-5) for row in found[1].tangent.tolist()]
    assert not torch.allclose(found[0].tangent, found[2].tangent, rtol=1e-3)
    assert torch.equal(found[0].tangent, tangents(run, dataset, n=30, bins=3, seed=5, batch_size=30).tangent)


def test_the_seed_decides_items_angles_and_noise(known, dataset):
    seen = []

    def noting(t, condition):
        seen.append(condition.tolist())
        return exact(t)

    def labels(items, **options):
        data = Dataset("npz:known", dataset.spec, dataset.train, items, "", None, torch.arange(len(items)))
        seen.clear()
        found = tangents(run, data, jvp="finite-diff", batch_size=99, **options)
        return found.tangent, seen[::3]  # once, and for a difference twice more

    run = known("edm", noting, conditional=True)
    _, first = labels(dataset.held_out[:6], n=2, bins=3, seed=0)
    assert sorted(itertools.chain(*first)) == list(range(6))  # no item twice while there are others
    assert first != labels(dataset.held_out[:6], n=2, bins=3, seed=1)[1]
    sizes = [labels(dataset.held_out[:1], n=2, bins=3, seed=seed)[0] for seed in (0, 1)]
    assert not torch.allclose(*sizes, rtol=1e-3)


def test_few_items_come_again(known, dataset):
    few = Dataset("npz:known", dataset.spec, dataset.train, dataset.held_out[:3], "")
    steps = []
    found = tangents(known("edm", exact), few, n=10, bins=2, batch_size=4, on_step=lambda *now: steps.append(now))
    assert float(found.tangent[0, 2]) > float(found.tangent[0, 1])
    assert steps == [(4, 20), (8, 20), (10, 20), (14, 20), (18, 20), (20, 20)]


@pytest.mark.parametrize("edge", [1.0, 0.0], ids=["some", "all"])
def test_tangents_that_are_not_finite_are_counted_and_left_out(known, dataset, tmp_path, edge):
    def broken(t):
        return torch.where(t < edge, exact(t), math.nan)

    run = known("edm", broken)
    found = tangents(run, dataset, n=40, bins=2)
    middle = math.pi / 4
    first = 0.0 if edge else 1.0
    last = (2 * middle - edge) / middle if edge else 1.0
    assert found.not_finite.tolist() == pytest.approx([first, last], abs=0.04)
    whole = tangents(known("edm", exact), dataset, n=40, bins=2)
    if edge:
        assert found.tangent[0].tolist() == whole.tangent[0].tolist()
        assert float(found.tangent[1, 0]) > 0
    paths = write_tangents(found, tmp_path / "new")
    stored = json.loads(paths[0].read_text())
    assert [one["tangent"] is None for one in stored["bins"]] == [not edge, not edge]
    with Image.open(paths[1]) as image:
        assert image.size[0] > 1000


def test_what_is_written_is_what_was_found(known, dataset, tmp_path):
    found = tangents(known("scd", consistent), dataset, teacher=known("edm", exact), n=5, bins=3, seed=2)
    paths = write_tangents(found, tmp_path / "new")
    assert [path.name for path in paths] == ["tangents.json", "tangents.png"]
    stored = json.loads(paths[0].read_text())
    assert {name: stored[name] for name in stored if name != "bins"} == {
        "method": "scd",
        "direction": "teacher",
        "teacher": "edm",
        "jvp": "forward",
        "n": 5,
        "seed": 2,
        "sigma_data": SD,
    }
    assert [list(one["tangent"].values()) for one in stored["bins"]] == found.tangent.tolist()
    assert [one["rate"]["p90"] for one in stored["bins"]] == found.rate[:, 2].tolist()
    assert [one["t"] for one in stored["bins"]] == [found.edges[k : k + 2].tolist() for k in range(3)]
    assert [one["weight"] for one in stored["bins"]] == found.weight.tolist()
    with Image.open(paths[1]) as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50


# --- refused --------------------------------------------------------------------------------------------------------


class Untouched(nn.Module):
    """A network with an operation that has no forward-mode derivative."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):  # noqa: ARG004
            return y.sqrt()

    def forward(self, y, label, condition=None):  # noqa: ARG002
        return self.Root.apply(y.abs())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("edm", {"n": 0}, "n: 0 is not valid: must be at least 1"),
        ("edm", {"bins": 0}, "bins: 0 is not valid: must be at least 1"),
        ("edm", {"batch_size": 0}, "batch_size: 0 is not valid: must be at least 1"),
        ("edm", {"seed": -1}, "seed: -1 is not valid: must be between 0 and 2^63 - 1"),
        ("edm", {"jvp": "exact"}, "jvp: 'exact' is not valid: should be forward or finite-diff"),
        ("edm", {"direction": "up"}, "direction: 'up' is not valid: should be data, own or teacher"),
        (
            "scd",
            {"direction": "own"},
            "direction: 'own' is for ddpm, iddpm and edm; scd is no flow to follow, use data",
        ),
        ("scd", {"direction": "teacher"}, "teacher: missing; the direction 'teacher' needs the run that "),
        ("scd", {"direction": "data", "teacher": "edm"}, "teacher: given, but the direction is 'data'"),
        ("scd", {"teacher": "other"}, "is not what "),
        ("sct", {"teacher": "sct"}, "is a run of sct, which is no flow to follow; use direction data"),
        ("edm", {"teacher": "edm"}, "was made from no other run"),
    ],
)
def test_refused(known, dataset, method, options, message):
    def named(name):
        run = known("edm" if name == "other" else name, exact)
        if name == "other":
            run.hash = lambda: "8" * 64
        return run

    options = options | ({"teacher": named(options["teacher"])} if "teacher" in options else {})
    with pytest.raises(UserError) as refusal:
        tangents(known(method, exact), dataset, **{"n": 2, "bins": 2} | options)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_network_without_forward_derivative_is_named(known, dataset):
    def replace(model):
        model.denoiser.network = Untouched()

    run = known("edm", exact, replace)
    with pytest.raises(
        UserError, match=r"jvp: the network \(Untouched\) has no forward-mode derivative \(.*finite-diff"
    ):
        tangents(run, dataset, n=2, bins=2)
    assert bool(tangents(run, dataset, n=2, bins=2, jvp="finite-diff").tangent.isfinite().all())

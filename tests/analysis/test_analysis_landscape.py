"""Landscapes of losses that are known quadratic forms of the weights."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from osmose.analysis.landscape import landscapes
from osmose.analysis.landscape_pictures import write_landscapes
from osmose.analysis.planes import filter_direction
from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import seeded
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import LossTerms
from osmose.training import files
from osmose.training.recipes import recipe
from osmose.training.run import Run

#: Trained values of a bowl, and items.
SIZE, ITEMS = 4 * 3 + 4, 40


class Bowl(GenerativeModel):
    """Loss (w - 1)^T H (w - 1) / 2 of the weights w, and something of the item and of the noise besides."""

    def __init__(self, config, spec, seed=0):
        super().__init__(config, spec)
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(2, 2, generator=generator), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
        root = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        self.register_buffer("hessian", root @ root.T / SIZE, persistent=False)

    def value(self, vector):
        return 0.5 * (vector - 1) @ self.hessian @ (vector - 1)

    def loss(self, batch, draws):
        vector = torch.cat([self.weight.flatten(), self.bias])
        return LossTerms(self.value(vector) + self.more(batch, draws))

    def more(self, batch, draws):
        return 0.1 * (batch.x0.mean(1) + draws.normal(())).double() + 0.2 * draws.uniform() + float(self.frozen.sum())

    def networks(self):
        return [self]

    def probe(self, items):
        pass

    def generate(self, draws, sampling, condition, on_step):
        raise NotImplementedError


class Known(Run):
    """A run with a given model, which it gives to everyone, and checkpoints that differ from it as given."""

    def __init__(self, folder, config, model, moves=()):
        super().__init__(folder, config)
        self.one = model.eval()
        for step, move in enumerate(moves, 1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                values = weights(model) + move
                put(moved, values)
            self.save(step * 10, moved)

    def save(self, step, model):
        folder = self.folder / "checkpoints" / f"step_{step:08d}"
        files.write_tensors(folder / "weights.safetensors", model.state_dict())
        files.write_json(folder / "state.json", {"step": step})

    def model(self, device="cpu"):
        return self.one.to(device)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in trained(model)])


@torch.no_grad()
def put(model, vector):
    for parameter, piece in zip(trained(model), vector.split([one.numel() for one in trained(model)]), strict=True):
        parameter.copy_(piece.view_as(parameter))


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    spec = DataSpec(kind="points", shape=(3,), num_classes=2)
    return Dataset(
        "npz:known",
        spec,
        torch.randn(50, 3, generator=generator) + 5,
        torch.randn(ITEMS, 3, generator=generator),
        "",
        torch.arange(50) % 2,
        torch.arange(ITEMS) % 2,
    )


@pytest.fixture
def config(dataset):
    return recipe("edm", DataConfig(source="npz:known"), dataset, 0, {"network.width": 8, "network.depth": 1})


@pytest.fixture
def bowl(config, dataset, tmp_path):
    """Make a run whose model is a bowl."""

    def make(moves=(), name="bowl", seed=0):
        return Known(tmp_path / name, config, Bowl(config.method, dataset.spec, seed), moves)

    return make


def one(run, dataset, **options):
    return landscapes([run], [dataset], **{"points": 5, "n": 16} | options).runs[0]


def basis(count):
    """So many orthonormal directions, (count, SIZE)."""
    drawn = torch.randn(SIZE, count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].T.unbind(0)


def close(found, expected, tolerance=1e-9):
    found, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (found, expected))
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


# --- exact: random directions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [5, 4], ids=["odd", "even"])
def test_the_grid_of_a_quadratic_loss_is_the_quadratic(bowl, dataset, points):
    run = bowl()
    found = one(run, dataset, points=points, reach=0.7, seed=4)
    u, v = (filter_direction(run.one, seeded(4, "landscape", axis)) for axis in "uv")
    theta, rest = weights(run.one), found.centre_loss - float(run.one.value(weights(run.one)))

    def value(a, b):
        return float(run.one.value(theta + a * u + b * v)) + rest

    axis = [0.7 * (2 * k - points + 1) / (points - 1) for k in range(points)]
    assert found.axis.tolist() == pytest.approx(axis, abs=1e-15)
    assert close(found.loss, [[value(a, b) for b in axis] for a in axis])
    assert close(found.cuts, [[value(a, 0) for a in axis], [value(0, b) for b in axis]])
    assert found.curvatures == pytest.approx([float(w @ run.one.hessian @ w) for w in (u, v)], rel=1e-6)
    assert found.ratio == pytest.approx(max(found.curvatures) / min(found.curvatures))
    # Around a circle the linear part cancels, and the mean of the second-order part is r^2 trace / 4.
    trace = sum(float(w @ run.one.hessian @ w) for w in (u, v))
    assert found.rises == pytest.approx([radius**2 * trace / 4 for radius in (0.25, 0.5, 1.0)], rel=1e-9)
    assert found.lengths == pytest.approx([float(u.norm()), float(v.norm())])
    assert found.below_twice == float((found.loss < 2 * found.centre_loss).double().mean())
    assert found.shares is None
    assert found.trajectories == ()


def test_the_centre_is_the_mean_loss_over_the_same_items_and_noise(bowl, dataset):
    run = bowl()
    run.one.hessian.zero_()  # what is left is of items and noise alone
    found = one(run, dataset, n=16)
    assert close(found.loss, [[found.centre_loss] * 5] * 5, 1e-12)
    assert found.n == 16
    assert found.rises == pytest.approx([0, 0, 0], abs=1e-12)
    every = [one(run, dataset, n=n) for n in (ITEMS, 1000)]
    assert [landscape.n for landscape in every] == [ITEMS, ITEMS]
    assert every[0].centre_loss == every[1].centre_loss
    train = one(run, dataset, n=1000, part="train")
    assert train.n == 50
    assert train.centre_loss - every[0].centre_loss == pytest.approx(0.5, abs=0.2)  # 0.1 of 5


def test_filters_have_the_norms_of_the_weights_and_biases_do_not_move(config, dataset):
    model = Bowl(config.method, dataset.spec)
    weight, bias = filter_direction(model, seeded(0)).split([12, 4])
    assert close(weight.view(4, 3).norm(dim=1), model.weight.detach().norm(dim=1), 1e-12)
    assert not close(weight.view(4, 3), model.weight.detach(), 0.1)
    assert bool((bias == 0).all())


class Wholes(nn.Module):
    """Parameters that are one filter each, in a list and in the module itself."""

    filters = "whole"

    def __init__(self):
        super().__init__()
        self.cores = nn.ParameterList([torch.randn(2, 3, 2), torch.randn(2, 2)])
        self.own, self.bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))
        self.rows = nn.Linear(3, 2)


def test_a_module_may_say_that_its_parameters_are_one_filter_each():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ParameterList([torch.zeros(2, 2)]), Wholes())
    module[0].weight.data[1] = 0  # a filter of zeros stays
    pieces = filter_direction(module, seeded(1)).split([value.numel() for value in module.parameters()])
    found = {name: piece.view_as(value) for (name, value), piece in zip(module.named_parameters(), pieces, strict=True)}
    for name in ("0.weight", "2.rows.weight"):
        norms = found[name].flatten(1).norm(dim=1)
        assert close(norms.double(), module.get_parameter(name).flatten(1).norm(dim=1).detach(), 1e-6)
    for name in ("2.cores.0", "2.cores.1", "2.own"):
        value, piece = module.get_parameter(name).detach(), found[name]
        assert float(piece.norm()) == pytest.approx(float(value.norm()), rel=1e-6)
        ratios = piece.flatten(1).norm(dim=1) / value.flatten(1).norm(dim=1)
        assert float(ratios.std()) > 0.01  # not row by row
    assert not any(bool(found[name].any()) for name in ("0.bias", "1.0", "2.bias", "2.rows.bias"))


def test_the_scale_of_weights_does_not_matter_for_a_network_that_does_not_have_one(config, dataset, tmp_path):
    class Pair(Bowl):
        """Two layers without biases and with ReLUs: (c W1, W2 / c) is the same function."""

        def __init__(self, scale):
            super().__init__(config.method, dataset.spec)
            del self.bias, self.frozen
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.float64) * scale)
            self.second = nn.Parameter(torch.randn(3, 6, dtype=torch.float64) / scale)

        def loss(self, batch, draws):
            x = batch.x0.double() + draws.normal((3,))
            return LossTerms(((x @ self.weight.T).relu() @ self.second.T - batch.x0).square().mean(1))

    found = [one(Known(tmp_path / str(scale), config, Pair(scale)), dataset) for scale in (1.0, 10.0)]
    assert close(found[0].loss, found[1].loss)
    assert found[0].curvatures == pytest.approx(found[1].curvatures)


# --- exact: the trajectory ------------------------------------------------------------------------------------------


def test_the_plane_of_a_trajectory_is_that_of_its_checkpoints(bowl, dataset):
    p, q = basis(2)
    run = bowl([4 * p, 2 * p, -q])
    found = one(run, dataset, directions="trajectory")
    (path,) = found.trajectories
    assert (path.name, path.steps) == ("bowl", (10, 20, 30))
    # Farthest coordinates are on the positive side, and the farthest of all is 1.
    assert close(path.points, [[1, 0], [0.5, 0], [0, 0.25], [0, 0]], 1e-7)
    assert found.shares == pytest.approx([20 / 21, 1 / 21])
    assert path.share == pytest.approx(1)
    assert found.lengths == pytest.approx([4, 4])
    assert found.centre == pytest.approx([0, 0], abs=1e-12)
    assert found.axis.tolist() == pytest.approx([-1.2, -0.6, 0, 0.6, 1.2])
    theta, rest = weights(run.one), found.centre_loss - float(run.one.value(weights(run.one)))
    expected = [[float(run.one.value(theta + 4 * a * p - 4 * b * q)) + rest for b in found.axis] for a in found.axis]
    assert close(found.loss, expected, 1e-6)


def test_points_in_the_plane_are_reproduced_and_others_projected(bowl, dataset):
    p, q, r = basis(3)
    moves = [2 * p + q, p - q, 0.5 * p + 0.3 * q, -0.2 * p]
    found = one(bowl(moves), dataset, directions="trajectory")
    rows = torch.stack([*moves, 0 * p])
    points = found.trajectories[0].points * torch.tensor(found.lengths)
    assert close(torch.cdist(points, points), torch.cdist(rows, rows), 1e-6)
    assert found.trajectories[0].share == pytest.approx(1)
    assert float(found.trajectories[0].points.abs().max()) == pytest.approx(1)
    outside = [move + 0.1 * r * (-1) ** index for index, move in enumerate(moves)]
    found = one(bowl(outside, "out"), dataset, directions="trajectory")
    gram = torch.stack(outside) @ torch.stack(outside).T
    values = torch.linalg.eigvalsh(gram).flip(0)
    assert found.shares == pytest.approx((values[:2] / values.sum()).tolist())
    assert found.trajectories[0].share == pytest.approx(sum(found.shares))


def test_the_trajectory_is_drawn_on_a_random_plane_too(bowl, dataset):
    run = bowl()
    u, v = (filter_direction(run.one, seeded(0, "landscape", axis)) for axis in "uv")
    moves = [2 * u - v, 0.5 * v]
    (path,) = one(bowl(moves, "in"), dataset).trajectories
    assert close(path.points, [[2, -1], [0, 0.5], [0, 0]], 1e-7)
    assert path.share == pytest.approx(1)
    # What is at right angles to both directions is not seen.
    away = basis(1)[0]
    axes = torch.linalg.qr(torch.stack([u, v]).T)[0]
    away = away - axes @ (axes.T @ away)
    (path,) = one(bowl([moves[0] + 3 * away, moves[1]], "beside"), dataset).trajectories
    assert close(path.points, [[2, -1], [0, 0.5], [0, 0]], 1e-7)
    squares = sum(float(move.square().sum()) for move in moves)
    assert path.share == pytest.approx(squares / (squares + float((3 * away).square().sum())))


def test_checkpoints_that_are_the_final_weights_have_no_share(bowl, dataset):
    (path,) = one(bowl([torch.zeros(SIZE).double()]), dataset).trajectories
    assert path.share is None
    assert path.points.abs().max() == 0


def test_runs_may_share_directions(bowl, dataset):
    p, q = basis(2)
    runs = [bowl([3 * q, 2 * q, q], name) for name in ("left", "right")]
    for run, side in zip(runs, (5 * p, -5 * p), strict=True):
        put(run.one, weights(run.one) + side)
        for checkpoint in (run.folder / "checkpoints").glob("step_*"):
            moved = copy.deepcopy(run.one)
            moved.load_state_dict(files.read_tensors(checkpoint / "weights.safetensors"))
            put(moved, weights(moved) + side)
            files.write_tensors(checkpoint / "weights.safetensors", moved.state_dict())
    found = landscapes(runs, [dataset] * 2, directions="trajectory", shared=True, points=5, n=16).runs
    assert found[0].shares == found[1].shares == pytest.approx([200 / 228, 28 / 228])
    assert [[path.name for path in one.trajectories] for one in found] == [["left", "right"]] * 2
    assert found[0].trajectories[0].points.tolist() == found[1].trajectories[0].points.tolist()
    sign = math.copysign(1, found[0].centre[0])
    for run, landscape, side in zip(runs, found, (1, -1), strict=True):
        own = next(path for path in landscape.trajectories if path.name == run.folder.name)
        a, b = landscape.centre
        assert (a, b) == pytest.approx((sign * side, 0), abs=1e-9)
        assert close(own.points, [[a, 0.6], [a, 0.4], [a, 0.2], [a, 0]], 1e-7)
        assert own.share == pytest.approx(1)
        theta = weights(run.one)
        rest = landscape.centre_loss - float(run.one.value(theta))
        alone = one(run, dataset)
        assert landscape.centre_loss == pytest.approx(alone.centre_loss, rel=1e-12)
        expected = [
            [float(run.one.value(theta + (x - a) * 5 * sign * p + (y - b) * 5 * q)) + rest for y in landscape.axis]
            for x in landscape.axis
        ]
        assert close(landscape.loss, expected, 1e-6)
        cut = [float(run.one.value(theta + x * 5 * sign * p)) + rest for x in landscape.axis]
        assert close(landscape.cuts[0], cut, 1e-6)


# --- gauges ---------------------------------------------------------------------------------------------------------


class Signed(nn.Module):
    """W = second first, for which the signs of the factors' rows and columns do not matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
        self.calls = 0

    def forward(self, x):
        return x @ self.first.T @ self.second.T

    def turn(self, signs):
        self.first.mul_(signs[:, None])
        self.second.mul_(signs)

    def canonical_(self):
        self.calls += 1
        self.turn(self.first[:, 0].sign())


class Factors(Bowl):
    def __init__(self, config, spec, part=Signed):
        super().__init__(config, spec)
        del self.weight, self.bias
        self.part = part()

    def loss(self, batch, draws):
        x = batch.x0.double() + draws.normal((3,))
        return LossTerms((self.part(x) - batch.x0).square().mean(1))


class Free(Signed):
    canonical_ = None


@pytest.mark.parametrize("directions", ["random", "trajectory"])
def test_weights_that_are_one_function_have_one_picture(config, dataset, tmp_path, directions):
    torch.manual_seed(1)
    moves, found, turns = [torch.randn(12).double() * 0.1 for _ in range(3)], {}, []
    for part in (Signed, Free):
        for name, signs in (("plain", (1, 1)), ("turned", (-1, 1)), ("both", (-1, -1))):
            run = Known(tmp_path / part.__name__ / name, config, Factors(config.method, dataset.spec, part), moves)
            with torch.no_grad():
                run.one.part.turn(torch.tensor(signs).double())
            before, calls = weights(run.one), run.one.part.calls
            found[part, name] = one(run, dataset, directions=directions)
            assert torch.equal(weights(run.one), before)
            turns.append(run.one.part.calls - calls)
    assert turns == [0] * 6  # of a copy, never of the run's own model
    whole = found[Signed, "plain"]
    assert whole.canonical
    assert not found[Free, "plain"].canonical
    for name in ("turned", "both"):
        again = found[Signed, name]
        assert close(again.loss, whole.loss)
        assert close(again.trajectories[0].points, whole.trajectories[0].points, 1e-6)
        # The same function it is without a canonical form, but not the same picture.
        assert found[Free, name].centre_loss == pytest.approx(whole.centre_loss)
        assert not close(found[Free, name].loss, found[Free, "plain"].loss, 1e-3)


# --- what does not matter, and what does ----------------------------------------------------------------------------


def test_the_seed_decides_and_the_batch_size_does_not(bowl, dataset):
    run = bowl()
    first, again, small, other = (
        one(run, dataset, seed=seed, batch_size=size) for seed, size in ((1, 16), (1, 16), (1, 5), (2, 16))
    )
    assert torch.equal(first.loss, again.loss)
    assert close(first.loss, small.loss, 1e-12)
    assert first.rises == pytest.approx(small.rises, rel=1e-9)
    assert not close(first.loss, other.loss, 1e-3)
    assert first.centre_loss != other.centre_loss  # other items and noise, not only other directions


def test_each_run_has_its_own_directions_and_neither_changes_the_other(bowl, dataset):
    runs = [bowl((), name, seed) for name, seed in (("first", 0), ("second", 5))]
    both = landscapes(runs, [dataset] * 2, points=5, n=16).runs
    for run, found in zip(runs, both, strict=True):
        assert torch.equal(found.loss, one(run, dataset).loss)
    assert [found.name for found in both] == ["first", "second"]


def test_the_model_is_left_as_it_was(bowl, dataset):
    run = bowl([0.1 * direction for direction in basis(3)])
    run.one.train()
    before = copy.deepcopy(run.one.state_dict())
    one(run, dataset)
    one(run, dataset, directions="trajectory")
    assert run.one.training
    assert all(torch.equal(value, before[name]) for name, value in run.one.state_dict().items())


def test_classes_are_passed_on_and_modes_are_those_of_evaluation(config, dataset, tmp_path):
    class Classes(Bowl):
        def loss(self, batch, draws):  # noqa: ARG002
            assert not self.training
            assert not torch.is_grad_enabled()
            return LossTerms(batch.condition.double())

    conditional = config.replace(method=config.method.replace(conditional=True))
    run = Known(tmp_path / "run", conditional, Classes(conditional.method, dataset.spec))
    assert one(run, dataset, n=ITEMS).centre_loss == 0.5
    assert one(run, dataset, n=ITEMS, batch_size=7).centre_loss == 0.5


def test_progress_counts_the_passes_of_all_runs(bowl, dataset):
    steps = []
    runs = [bowl((), name) for name in ("first", "second")]
    landscapes(runs, [dataset] * 2, points=3, n=10, batch_size=4, on_step=lambda *now: steps.append(now))
    # 9 of the grid, 3 x 16 of circles and 4 beside the centre; centre, cuts and the point (1, 0) are on the grid.
    total = 2 * 3 * (9 + 48 + 4 - 1)
    assert steps == [(k, total) for k in range(1, total + 1)]


# --- not finite -----------------------------------------------------------------------------------------------------


def test_losses_that_are_not_finite_are_null_and_blank(config, dataset, tmp_path):
    class Cliff(Bowl):
        def loss(self, batch, draws):
            far = float((weights(self) - self.start).norm()) if hasattr(self, "start") else 0.0
            broken = math.inf if far > 2.5 else math.nan if far > 1.5 else 1.0
            return LossTerms(super().loss(batch, draws).per_item * broken)

    model = Cliff(config.method, dataset.spec)
    model.start = weights(model)
    found = landscapes([Known(tmp_path / "run", config, model)], [dataset], points=9, n=8)
    (run,) = found.runs
    finite = run.loss.isfinite()
    assert 0 < int(finite.sum()) < 81
    assert not math.isfinite(run.rises[2])
    assert run.below_twice == float((run.loss < 2 * run.centre_loss).double().mean())
    paths = write_landscapes(found, tmp_path / "out")
    stored = json.loads(paths[0].read_text())["runs"][0]
    assert [[value is None for value in row] for row in stored["grid"]] == (~finite).tolist()
    assert stored["rise"]["1"] is None
    assert stored["rise"]["0.25"] == run.rises[0]
    with Image.open(paths[1]) as image:
        assert image.size[0] > 1000


@pytest.mark.parametrize("constant", [math.nan, 0.0, -3.0, 2.0])
def test_a_loss_that_says_nothing_has_a_picture(config, dataset, tmp_path, constant):
    class Flat(Bowl):
        def loss(self, batch, draws):  # noqa: ARG002
            return LossTerms(torch.full((len(batch.x0),), constant))

    found = landscapes([Known(tmp_path / "run", config, Flat(config.method, dataset.spec))], [dataset], points=3)
    stored = json.loads(write_landscapes(found, tmp_path / "out")[0].read_text())["runs"][0]
    assert stored["loss"] == (None if math.isnan(constant) else constant)
    assert stored["curvature_ratio"] is None
    # Twice a loss means something for positive losses alone.
    assert stored["below_twice"] == (1.0 if constant > 0 else None)


# --- written --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("directions", ["random", "trajectory"])
def test_what_is_written_is_what_was_found(bowl, dataset, tmp_path, count, directions):
    moves = [(3 - k) * direction for k, direction in enumerate(basis(3))]
    runs = [bowl(moves, f"run{k}", k) for k in range(count)]
    found = landscapes(runs, [dataset] * count, points=5, n=16, seed=2, directions=directions)
    paths = write_landscapes(found, tmp_path / "out")
    assert [path.name for path in paths] == ["landscape.json", "landscape.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["landscape.json", "landscape.png"]
    stored = json.loads(paths[0].read_text())
    assert {name: stored[name] for name in stored if name != "runs"} == {
        "directions": directions,
        "shared": False,
        "points": 5,
        "reach": 1.0 if directions == "random" else 1.2,
        "part": "held-out",
        "seed": 2,
    }
    for said, run in zip(stored["runs"], found.runs, strict=True):
        assert said["grid"] == run.loss.tolist()
        assert (said["run"], said["method"], said["n"]) == (run.name, "edm", 16)
        assert said["loss"] == run.centre_loss == said["grid"][2][2]
        assert said["cuts"] == {"u": run.cuts[0].tolist(), "v": run.cuts[1].tolist()}
        assert list(said["rise"].items()) == list(zip(("0.25", "0.5", "1"), run.rises, strict=True))
        assert said["trajectories"][0]["points"] == run.trajectories[0].points.tolist()
        assert said["trajectories"][0]["steps"] == [10, 20, 30]
        assert said["seconds"] >= 0
    with Image.open(paths[1]) as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 22)) > 200


def test_runs_of_one_name_are_told_apart(bowl, dataset):
    runs = [bowl((), f"{folder}/run") for folder in ("here", "there")]
    assert [run.name for run in landscapes(runs, [dataset] * 2, points=3, n=2).runs] == ["here/run", "there/run"]


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 2}, "points: 2 is not valid: must be at least 3"),
        ({"n": 0}, "n: 0 is not valid: must be at least 1"),
        ({"batch_size": 0}, "batch_size: 0 is not valid: must be at least 1"),
        ({"reach": 0}, "reach: 0 is not valid: must be a number above 0"),
        ({"reach": math.nan}, "reach: nan is not valid: must be a number above 0"),
        ({"reach": math.inf}, "reach: inf is not valid: must be a number above 0"),
        ({"seed": -1}, "seed: -1 is not valid: must be between 0 and 2^63 - 1"),
        ({"directions": "up"}, "directions: 'up' is not valid: should be random or trajectory"),
        ({"part": "all"}, "part: 'all' is not valid: should be held-out or train"),
        ({"shared": True}, "shared: random directions are made for each run alone; use it with directions trajectory"),
        ({"shared": True, "directions": "trajectory"}, "shared: a plane that is shared needs two runs or more"),
        ({"directions": "trajectory"}, "bowl: has 0 checkpoints, and a trajectory needs 3 or more; train with"),
    ],
    ids=lambda value: "-".join(map(str, itertools.chain(*value.items()))) if isinstance(value, dict) else "",
)
def test_refused(bowl, dataset, options, message):
    with pytest.raises(UserError) as refusal:
        one(bowl(), dataset, **options)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_checkpoints_have_to_span_a_plane(bowl, dataset):
    p = basis(1)[0]
    with pytest.raises(UserError, match="has 2 checkpoints, and a trajectory needs 3"):
        one(bowl([p, 2 * p], "two"), dataset, directions="trajectory")
    for name, moves in (("line", [p, 2 * p, -p]), ("point", [0 * p] * 3)):
        with pytest.raises(UserError, match=f"{name}: its checkpoints lie on a line or are all the same"):
            one(bowl(moves, name), dataset, directions="trajectory")


def test_a_plane_is_shared_by_runs_with_the_same_parameters_alone(config, dataset, bowl, tmp_path):
    class Wide(Bowl):
        def __init__(self):
            super().__init__(config.method, dataset.spec)
            self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    first = bowl(basis(3))
    moves = [torch.randn(20).double() for _ in range(3)]
    wide = Known(tmp_path / "wide", config, Wide(), moves)
    with pytest.raises(UserError, match=r"shared: 'weight' is \(4, 3\) in .*bowl and is \(4, 4\) in .*wide; runs that"):
        landscapes([first, wide], [dataset] * 2, directions="trajectory", shared=True)
    factors = Known(tmp_path / "factors", config, Factors(config.method, dataset.spec), [m[:12] for m in moves])
    with pytest.raises(UserError, match=r"shared: 'weight' is \(4, 3\) in .*bowl and does not exist in .*factors"):
        landscapes([first, factors], [dataset] * 2, directions="trajectory", shared=True)


def test_what_cannot_move_is_refused(bowl, dataset):
    run = bowl()
    run.one.weight.requires_grad_(False)
    with pytest.raises(UserError, match="no weights with two axes or more that are not 0"):
        one(run, dataset)
    run.one.bias.requires_grad_(False)
    with pytest.raises(UserError, match="is fitted in closed form and has no parameters to move"):
        one(run, dataset)
    with pytest.raises(UserError, match="runs: give at least one"):
        landscapes([], [])
    other = bowl((), "other")
    with pytest.raises(UserError, match=r"RUN: .*other is given twice"):
        landscapes([other, other], [dataset] * 2)


def test_data_without_items_are_refused(bowl, dataset):
    empty = Dataset("npz:known", dataset.spec, dataset.train, dataset.held_out[:0], "")
    with pytest.raises(UserError, match="part: 'npz:known' has no held-out items"):
        one(bowl(), empty)


def test_a_damaged_checkpoint_is_named(bowl, dataset):
    run = bowl(basis(3))
    path = Path(run.folder / "checkpoints" / "step_00000020" / "weights.safetensors")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"step_00000020/weights\.safetensors: not a readable safetensors file"):
        one(run, dataset)

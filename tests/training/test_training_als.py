"""Alternating least squares: what a core is solved for, sweeps, ranks that are adapted, and training around them."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from osmose.data.assembly import Part, image_dataset
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws
from osmose.gaussian.parametrization import EpsParametrization
from osmose.gaussian.schedule import CosineSchedule
from osmose.methods.chain import levels_of
from osmose.methods.messages import Batch, Regression
from osmose.networks.tensor_train import TensorTrainConfig
from osmose.networks.trains import dense, inner
from osmose.training import als
from osmose.training.als import ALS, ALSConfig, Solver
from osmose.training.optimizers import Work
from osmose.training.recipes import checked, recipe
from osmose.training.run import Run
from osmose.training.trainer import DivergedError, Trainer
from osmose.training.trainer import built as built_model

#: So little training leaves samples anywhere.
pytestmark = pytest.mark.filterwarnings("ignore:network.domain")
OUTPUTS = ("potential", "block", "separate")
every_output = pytest.mark.parametrize("output", OUTPUTS)
FORMS = {
    "points": ((3,), None, {}),
    "classes": ((4,), 2, {"degree": (1, 3, 2, 2), "rank": (2, 3, 4, 4, 2)}),
    "components": ((1, 2, 3), None, {"coordinates": 4, "rank": 2}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def built(event_shape=(3,), num_classes=None, seed=0, size=0.5, **settings):
    """A network in float64 on a schedule, whose train is far from 0; with size=None, as it is at the start."""
    torch.manual_seed(seed)
    settings = {"rank": 3, "degree": 2, "time_degree": 2, "basis": "hermite", "domain": 4.0} | settings
    network = TensorTrainConfig(**settings).build(event_shape, num_classes=num_classes).double()
    network.calibration.set_levels(levels_of(CosineSchedule(num_steps=8), EpsParametrization()))
    if size is not None:
        network.set_trains([size * torch.randn_like(core) for core in network.trains()])
    return network


def of_form(form, output, **settings):
    shape, classes, more = FORMS[form]
    network = built(shape, classes, output=output, **more, **settings)
    generator = torch.Generator().manual_seed(9)
    root = torch.randn(network.dimension, network.dimension, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / network.dimension + 0.1 * torch.eye(network.dimension)
    network.calibration.fit(torch.randn(network.dimension, generator=generator).double(), covariance)
    return network


class Problem:
    """Least squares for a network: items of chance, and what it should say of them."""

    def __init__(self, network, count=200, seed=1, target=None, weighted=True):
        generator = torch.Generator().manual_seed(seed)
        self.network, shape = network, network.event_shape
        self.x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        self.label = 125 * torch.randint(0, 8, (count,), generator=generator).double()
        classes = network.num_classes
        self.condition = torch.randint(0, classes, (count,), generator=generator) if classes else None
        self.target = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        if target is not None:
            self.target = target(self.x, self.label, self.condition).detach()
        weight = 0.2 + torch.rand(count, generator=generator, dtype=torch.float64)
        self.weight = weight if weighted else torch.ones_like(weight)

    def regressions(self, cuts=1):
        for rows in torch.arange(len(self.x)).chunk(cuts):
            condition = None if self.condition is None else self.condition[rows]
            yield Regression(
                self.network, self.x[rows], self.label[rows], condition, self.target[rows], self.weight[rows]
            )

    def loss(self):
        with torch.no_grad():
            error = self.network(self.x, self.label, self.condition) - self.target
            return float((self.weight * error.square().flatten(1).mean(1)).mean())

    def work(self, cuts=1):
        return Work(self.loss(), self.loss, lambda: self.regressions(cuts), lambda sums: sums, 7)

    def design(self, cores, k):
        """The output's derivative by core k, (B, D, *core), and what is left for the train to say, (B, D)."""

        def output(core):
            with self.network.replaced([*cores[:k], core, *cores[k + 1 :]]):
                return self.network(self.x, self.label, self.condition).flatten(1)

        jacobian = torch.autograd.functional.jacobian(output, cores[k], vectorize=True)
        return jacobian, self.target.flatten(1) - output(torch.zeros_like(cores[k]))


def sweep(network, problem, sweeps=1, lr=1.0, cuts=1, **settings):
    """The optimizer after some sweeps, and what it said of each."""
    optimizer = ALS(ALSConfig(**settings), network)
    return optimizer, [optimizer.advance(lr, problem.work(cuts)) for _ in range(sweeps)]


def cores_of(network):
    return [core.detach().clone() for core in network.trains()]


def close(a, b, tolerance=1e-10):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# --- one core -----------------------------------------------------------------------------------------------------


@every_output
@every_form
def test_the_equations_are_those_of_the_design_matrix(output, form):
    network = of_form(form, output)
    problem, cores = Problem(network, 40), cores_of(network)
    solver = Solver(network, problem.work(3), 1e-3)
    for k, core in enumerate(cores):
        jacobian, y = problem.design(cores, k)
        flat = jacobian.flatten(2)
        want = torch.einsum("b,bdp,bdq->pq", problem.weight, flat, flat)
        right = torch.einsum("b,bdp,bd->p", problem.weight, flat, y)
        gram, moments, items = solver.equations(cores, k)
        assert items == 40 * network.dimension
        C, r, n, s = core.shape
        values = network.count if network.blocks and k == network.middle else 1
        unknowns = r * n // values * s
        assert gram.shape == (C, unknowns, unknowns)
        assert moments.shape == (C, unknowns, values)
        # One matrix for each train, or the same one for each value of a block; the design has them all.
        whole = torch.zeros(C, r, n // values, values, s, C, r, n // values, values, s, dtype=torch.float64)
        for c in range(C):
            for v in range(values):
                whole[c, :, :, v, :, c, :, :, v, :] = gram[c].reshape(r, n // values, s, r, n // values, s)
        assert close(whole.reshape(core.numel(), core.numel()), want)
        beside = moments.reshape(C, r, n // values, s, values).movedim(4, 3).reshape(-1)
        assert close(beside, right)


@every_output
@every_form
def test_one_free_core_is_the_solution_of_least_squares(output, form):
    network = of_form(form, output)
    problem, cores, ridge = Problem(network, 50), cores_of(network), 1e-3
    solver = Solver(network, problem.work(), ridge)
    for k, core in enumerate(cores):
        jacobian, y = problem.design(cores, k)
        share = (problem.weight / (50 * network.dimension)).sqrt()[:, None]
        rows = (share[..., None] * jacobian.flatten(2)).flatten(0, 1).numpy()
        rows = np.concatenate([rows, math.sqrt(ridge) * np.eye(core.numel())])
        right = np.concatenate([(share * y).flatten().numpy(), np.zeros(core.numel())])
        want = np.linalg.lstsq(rows, right, rcond=None)[0]
        assert close(solver.solved(cores, k), torch.from_numpy(want).reshape(core.shape), 1e-7)


@every_output
def test_items_that_come_in_pieces_are_one_batch(output, monkeypatch):
    network = of_form("components", output)
    problem, cores = Problem(network, 41), cores_of(network)
    whole = Solver(network, problem.work(), 1e-3)
    want = [whole.equations(cores, k) for k in range(len(cores))]
    for changes in ({}, {"_MOST": 7}, {"_KEPT": 10}):
        for name, value in changes.items():
            monkeypatch.setattr(als, name, value)
        pieces = Solver(network, problem.work(4), 1e-3)
        assert len(list(pieces.parts())) == 4
        for k, (gram, right, items) in enumerate(want):
            got = pieces.equations(cores, k)
            assert got[2] == items
            assert close(got[0], gram, 1e-12)
            assert close(got[1], right, 1e-12)


def test_processes_are_summed():
    network = of_form("points", "block")
    problem, cores = Problem(network, 40), cores_of(network)
    work = problem.work()
    doubled = Work(work.value, work.loss, work.regressions, lambda sums: 2 * sums, 7)
    one, both = Solver(network, work, 1e-3), Solver(network, doubled, 1e-3)
    for k in range(len(cores)):
        for a, b in zip(one.equations(cores, k), both.equations(cores, k), strict=True):
            assert torch.equal(torch.as_tensor(2 * a), torch.as_tensor(b))
        assert torch.equal(one.solved(cores, k), both.solved(cores, k))


def test_singular_equations_are_regularised_and_it_is_said():
    # Three items for the dozens of numbers of a core, and a lambda that rounding swallows.
    network = of_form("points", "separate")
    problem = Problem(network, 3)
    with pytest.warns(
        UserWarning, match=r"normal equations of core \d are singular at 1e-25; solved with 1e-\d\d"
    ) as said:
        _, (told,) = sweep(network, problem, ridge=1e-25, ridge_min=1e-25)
    assert all(str(w.message).startswith("training.optimizer.ridge: ") for w in said)
    assert told["ridge"] > 1e-25
    assert all(bool(core.isfinite().all()) for core in network.cores)
    assert told["loss_after"] < 1e-3
    assert max(float(core.detach().abs().max()) for core in network.cores) < 1e4


@pytest.mark.parametrize("spoilt", ["x", "target"])
def test_values_that_are_not_finite_are_no_endless_search_for_lambda(spoilt, monkeypatch):
    network = of_form("points", "separate")
    problem = Problem(network, 50)
    getattr(problem, spoilt)[0, 0] = math.nan
    tried, cholesky = [], torch.linalg.cholesky_ex

    def counted(*matrices):
        tried.append(1)
        assert len(tried) < 1000, "still searching"
        return cholesky(*matrices)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    with pytest.raises(Exception, match="finite"):
        sweep(network, problem)


# --- a sweep ------------------------------------------------------------------------------------------------------


@every_output
@every_form
def test_no_core_that_is_solved_for_raises_the_regularised_loss(output, form, monkeypatch):
    network, ridge = of_form(form, output), 0.02
    problem, seen, solved = Problem(network, 150), [], Solver.solved

    def regularised(cores):
        with network.replaced(cores):
            return problem.loss() + ridge * float(inner(cores, cores).sum())

    def watched(solver, cores, k):
        found = solved(solver, cores, k)
        # Around the core all others are orthogonal: the norm of the core is that of the train.
        assert close(cores[k].square().sum(), inner(cores, cores).sum())
        seen.append((k, regularised(cores), regularised([*cores[:k], found, *cores[k + 1 :]])))
        return found

    monkeypatch.setattr(Solver, "solved", watched)
    start = regularised(cores_of(network))
    _, told = sweep(network, problem, sweeps=2, ridge=ridge, ridge_decay=1.0)
    last = len(network.cores) - 1
    there_and_back = [*range(last), *range(last, 0, -1), 0]
    assert [k for k, _, _ in seen] == 2 * there_and_back
    assert told[0]["solves"] == len(there_and_back)
    assert seen[0][1] == pytest.approx(start, rel=1e-10)
    for (_, before, after), (_, following, _) in itertools.pairwise(seen):
        assert after <= before * (1 + 1e-12)
        assert following == pytest.approx(after, rel=1e-10)  # moving on changes nothing
    assert regularised(cores_of(network)) == pytest.approx(seen[-1][2], rel=1e-10)
    assert told[-1]["loss_after"] == pytest.approx(problem.loss())
    assert seen[-1][2] < 0.9 * start


@every_output
def test_a_sweep_does_not_depend_on_the_gauge(output):
    network = of_form("points", output)
    other = copy.deepcopy(network)
    cores = cores_of(other)
    for k in range(len(cores) - 1):
        r = cores[k].shape[3]
        mix = torch.eye(r).double() + 0.4 * torch.randn(r, r, dtype=torch.float64)
        cores[k] = cores[k] @ mix
        cores[k + 1] = torch.einsum("qr,crns->cqns", torch.linalg.inv(mix), cores[k + 1])
    other.set_trains(cores)
    assert close(dense(cores_of(other)), dense(cores_of(network)))
    for one in (network, other):
        sweep(one, Problem(one, 120))
    assert close(dense(cores_of(other)), dense(cores_of(network)), 1e-8)


@every_output
def test_accumulated_micro_batches_are_one_batch(output):
    found = []
    for cuts in (1, 4):
        network = of_form("points", output)
        _, told = sweep(network, Problem(network, 120), sweeps=2, lr=0.7, cuts=cuts)
        found.append((cores_of(network), told))
    assert all(close(a, b) for a, b in zip(found[1][0], found[0][0], strict=True))
    assert [t["loss_after"] for t in found[1][1]] == pytest.approx([t["loss_after"] for t in found[0][1]], rel=1e-10)


def test_a_learning_rate_is_a_share_of_the_way():
    network = of_form("points", "block")
    problem = Problem(network, 100)
    before = network(problem.x, problem.label).detach()
    sweep(network, problem, lr=1e-6)
    moved = float((network(problem.x, problem.label).detach() - before).norm())
    sweep(network, problem, lr=1e-6)
    assert moved == pytest.approx(float((network(problem.x, problem.label) - before).detach().norm()) / 2, rel=1e-3)
    # Nearly nothing of the way is gone, and nothing is lost on it.
    assert 0 < moved < 1e-3 * float(before.norm())


def test_lambda_falls_from_sweep_to_sweep():
    network = of_form("points", "block")
    problem = Problem(network, 50)
    optimizer, told = sweep(network, problem, sweeps=4, ridge=0.1, ridge_decay=0.1, ridge_min=2e-3)
    assert [t["ridge"] for t in told] == pytest.approx([0.1, 0.01, 2e-3, 2e-3])
    again = ALS(ALSConfig(ridge=0.1, ridge_decay=0.1, ridge_min=2e-4), network)
    again.restore(optimizer.tensors())
    assert again.advance(1.0, problem.work())["ridge"] == pytest.approx(2e-4)


def test_a_core_too_large_to_solve_for_is_refused():
    network = TensorTrainConfig(rank=40, degree=9).build((6,))
    with pytest.raises(UserError, match=r"als would solve for the 16000 numbers of core 3 at once; at most 8192"):
        ALS(ALSConfig(), network)


# --- Gaussian data --------------------------------------------------------------------------------------------------


def gaussian(output, covariance, steps, **settings):
    """A network that has not been told of the data's covariance, and least squares for the noiseless optimal eps."""
    schedule, dimension = CosineSchedule(num_steps=steps), len(covariance)
    network = built((dimension,), output=output, size=None, seed=1, domain=8.0, **settings)
    network.calibration.set_levels(levels_of(schedule, EpsParametrization()))

    def optimal(x, label, _):
        level = schedule.level((label * steps / 1000 + 1) / steps)
        eye = torch.eye(dimension, dtype=torch.float64)
        total = level.alpha[:, None, None] ** 2 * covariance + level.sigma[:, None, None] ** 2 * eye
        return level.sigma[:, None] * torch.linalg.solve(total, x[..., None])[..., 0]

    problem = Problem(network, 400, weighted=False)
    problem.label = 1000 / steps * torch.randint(0, steps, (400,), generator=torch.Generator().manual_seed(2)).double()
    problem.target = optimal(problem.x, problem.label, None)
    return network, problem


@pytest.mark.parametrize(
    ("output", "dimension", "settings"),
    [
        ("separate", 3, {"rank": 1, "degree": 1}),
        ("separate", 6, {"rank": 1, "degree": 1}),
        ("block", 2, {"rank": 2, "degree": 1}),
        ("potential", 2, {"rank": 2, "degree": 2}),
    ],
)
def test_gaussian_data_with_independent_coordinates_are_found(output, dimension, settings):
    # Value i is a function of the time times x_i: four steps, and polynomials of degree 3 to be it.
    variances = torch.linspace(0.2, 3, dimension, dtype=torch.float64)
    network, problem = gaussian(output, variances.diag(), 4, time_degree=3, **settings)
    start = problem.loss()
    sweep(network, problem, sweeps=12, ridge=1e-4, ridge_decay=0.03, ridge_min=1e-15)
    assert start > 1e-2
    with torch.no_grad():
        error = network(problem.x, problem.label) - problem.target
    assert error.abs().max() < 1e-8


@pytest.mark.parametrize(
    ("output", "dimension", "settings"),
    [
        ("separate", 4, {"rank": 2, "degree": 1}),
        ("block", 2, {"rank": 2, "degree": 1}),
        ("block", 4, {"rank": 3, "degree": 1}),  # the values that one core tells apart: a bond holds 1 and x_1, x_2
        ("potential", 4, {"rank": 4, "degree": 2}),  # and one of a quadratic form its two halves besides
    ],
)
def test_any_gaussian_data_are_found_at_one_time(output, dimension, settings):
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / dimension + 0.3 * torch.eye(dimension)
    network, problem = gaussian(output, covariance, 1000, time_degree=1, **settings)
    problem.label[:] = 400.0
    level = CosineSchedule(num_steps=1000).level(0.401)
    total = level.alpha**2 * covariance + level.sigma**2 * torch.eye(dimension)
    problem.target = level.sigma * torch.linalg.solve(total, problem.x.T).T
    sweep(network, problem, sweeps=24, ridge=1e-4, ridge_decay=0.05, ridge_min=1e-15)
    with torch.no_grad():
        error = network(problem.x, problem.label) - problem.target
    assert error.abs().max() < 1e-8


# --- ranks --------------------------------------------------------------------------------------------------------


def of_rank_2(output, rank):
    """A problem whose solution has rank 2, for a network that may have more."""
    truth = built((4,), output=output, rank=2, seed=3)
    network = built((4,), output=output, rank=rank, seed=4, size=0.3)
    return network, Problem(network, 600, target=truth, weighted=False)


@pytest.mark.parametrize("output", ["separate", "block"])
@pytest.mark.parametrize("start", [5, 1])
def test_ranks_are_found(output, start):
    network, problem = of_rank_2(output, 5)
    if start == 1:
        network.set_trains([core[:, :1, :, :1] for core in cores_of(network)])
    most = [core.shape[3] for core in network.cores[:-1]]
    optimizer, told = sweep(network, problem, sweeps=1, tolerance=0.01, ridge=1e-8, ridge_min=1e-12)
    for _ in range(12):
        told.append(optimizer.advance(1.0, problem.work()))
        assert all(bond <= largest for bond, largest in zip(network.bonds.tolist(), most, strict=True))
        assert told[-1]["rank"] == int(network.bonds.max())
    assert network.bonds.tolist() == [2, 2, 2, 2]
    assert problem.loss() < 1e-4
    assert {name: core.shape for name, core in network.named_parameters() if "cores" in name} == {
        f"cores.{k}": core.shape for k, core in enumerate(built((4,), output=output, rank=5).cores)
    }


def test_ranks_never_exceed_the_network_s():
    network, problem = of_rank_2("separate", 2)
    problem.target = torch.randn_like(problem.target)  # nothing that a train of any rank says
    _, told = sweep(network, problem, sweeps=3, tolerance=1e-9, grow=3)
    assert [t["rank"] for t in told] == [2.0] * 3
    network, problem = of_rank_2("separate", 4)
    network.set_trains([core[:, :1, :, :1] for core in cores_of(network)])
    problem.target = torch.randn_like(problem.target)
    _, told = sweep(network, problem, sweeps=4, tolerance=1e-9, ridge=1e-6)
    assert [t["rank"] for t in told] == [2.0, 3.0, 4.0, 4.0]
    assert network.bonds.tolist() == [3, 4, 4, 3]


def test_without_a_tolerance_ranks_are_kept():
    network, problem = of_rank_2("block", 4)
    network.set_trains([core[:, :3, :, :3] for core in cores_of(network)])
    before = network.bonds.tolist()
    _, (told,) = sweep(network, problem)
    assert network.bonds.tolist() == before
    assert "rank" not in told


def test_a_sweep_can_be_made_again():
    found = []
    for _ in range(2):
        network, problem = of_rank_2("block", 4)
        sweep(network, problem, sweeps=3, lr=0.9, tolerance=1e-3)
        found.append(network.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- training -----------------------------------------------------------------------------------------------------

SWEEPS = {
    "conditional": False,
    "network": "tensor-train",
    "network.coordinates": 4,
    "network.rank": 3,
    "network.degree": 2,
    "network.time_degree": 2,
    "sampling.num_steps": 2,
    "training.optimizer": "als",
    "training.optimizer.ridge": 0.02,
    "training.optimizer.ridge_decay": 0.5,
    "training.optimizer.ridge_min": 1e-4,
    "training.steps": 4,
    "training.batch_size": 64,
    "training.accumulate": 2,
    "training.flip": False,
    "training.validate_every": 2,
    "training.preview_every": 2,
    "training.preview_samples": 4,
    "training.checkpoint_every": 1,
    "training.keep_checkpoints": 1,
}


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    # Bright or dark, row by row: clusters, or what is not Gaussian could not be seen in so few.
    rows = torch.randint(0, 2, (80, 1, 3, 1), generator=generator) * 160
    values = rows + torch.randint(30, 60, (80, 1, 3, 3), generator=generator)
    bright = (rows > 0).sum((1, 2, 3)).clamp(max=2)
    return image_dataset("npz:tiny", DataConfig(source="npz:tiny"), Part(values.byte(), bright))


@pytest.fixture
def begun(pixels, tmp_path):
    def make(name="run", **changes):
        changed = SWEEPS | {name.replace("__", "."): value for name, value in changes.items()}
        if changed["network"] != "tensor-train":
            changed = {name: value for name, value in changed.items() if not name.startswith("network.")}
        config = checked(recipe("ddpm", DataConfig(source="npz:tiny"), pixels, 0, changed))
        return Run.create(tmp_path / name, config)

    return make


class KilledError(Exception):
    pass


def killed_before(monkeypatch, step):
    optimise = Trainer.optimise

    def dying(self, window):
        if self.step == step:
            raise KilledError
        return optimise(self, window)

    monkeypatch.setattr(Trainer, "optimise", dying)
    return lambda: monkeypatch.setattr(Trainer, "optimise", optimise)


def test_the_recipe_suits_sweeps(pixels):
    config = recipe(
        "ddpm", DataConfig(source="npz:tiny"), pixels, 0, {"network": "tensor-train", "training.optimizer": "als"}
    )
    training = config.training
    assert (training.lr, training.warmup, training.log_every) == (1.0, 0, 1)
    assert (training.ema, training.clip_grad, training.precision) == (0.0, None, "fp32")
    # A core has hundreds of numbers; the first sweep goes all the way, and the last ones little of it.
    assert training.batch_size > 4096
    assert training.lr_at(0) == 1.0
    assert training.lr_at(training.steps - 1) == pytest.approx(1 / training.steps)


@pytest.mark.parametrize("changes", [{}, {"conditional": True}, {"training__optimizer__tolerance": 0.05}], ids=str)
def test_training_falls_and_tells_of_every_sweep(begun, pixels, changes):
    changes = changes | {"training__batch_size": 1024}
    run = begun(**changes)
    Trainer(run, pixels).fit()
    lines = [line for line in run.metrics() if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert all(line["loss_after"] < line["loss"] for line in lines)
    assert [line["ridge"] for line in lines] == pytest.approx([0.02 * 0.5**k for k in range(4)])
    assert all(0 <= line["outside"] < 0.2 for line in lines)
    assert all(line["grad_norm"] == 0 for line in lines)
    cores = len(run.model().denoiser.network.cores)
    assert [line["solves"] for line in lines] == [2 * cores - 1] * 4
    assert all(("rank" in line) == ("training__optimizer__tolerance" in changes) for line in lines)
    losses = [line["validation_loss"] for line in run.metrics() if "validation_loss" in line]
    untrained = begun("untrained", **changes, training__lr=1e-9, training__steps=1)
    Trainer(untrained, pixels).fit()
    assert losses[-1] < untrained.metrics()[-1]["validation_loss"]
    assert run.model().sample(3, seed=0).data.shape == (3, 1, 3, 3)


@pytest.mark.parametrize("changes", [{}, {"training__optimizer__tolerance": 0.2, "network__rank": 4}], ids=str)
def test_a_run_that_was_killed_goes_on_bit_for_bit(begun, pixels, contents, monkeypatch, changes):
    whole, parts = begun("whole", **changes), begun("parts", **changes)
    Trainer(whole, pixels).fit()
    alive = killed_before(monkeypatch, 2)
    with pytest.raises(KilledError):
        Trainer(parts, pixels).fit()
    alive()
    trainer = Trainer(parts, pixels)
    assert trainer.step == int(trainer.optimizer.sweeps) == 2
    assert trainer.fit()
    assert without_outside(contents(parts.folder)) == without_outside(contents(whole.folder))
    if changes:
        bonds = load_file(whole.weights)["denoiser.network.bonds"]
        assert bonds.tolist() != [core.shape[3] for core in trainer.model.denoiser.network.cores[:-1]]


def without_outside(found):
    lines = [{name: value for name, value in line.items() if name != "outside"} for line in found["metrics"]]
    return found | {"metrics": lines}


def test_the_share_outside_the_domain_survives_too(begun, pixels, contents, monkeypatch):
    changes = {"network__domain": 1.0, "training__log_every": 2}
    whole, parts = begun("whole", **changes), begun("parts", **changes)
    Trainer(whole, pixels).fit()
    alive = killed_before(monkeypatch, 3)
    with pytest.raises(KilledError):
        Trainer(parts, pixels).fit()
    alive()
    Trainer(parts, pixels).fit()
    assert contents(parts.folder) == contents(whole.folder)


def test_micro_batches_of_a_run_are_one_batch(begun, pixels):
    one, cut = begun("one", training__accumulate=1), begun("cut", training__accumulate=4)
    for run in (one, cut):
        Trainer(run, pixels).fit()
    a, b = load_file(one.weights), load_file(cut.weights)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5)
    for name in ("loss", "loss_after", "outside"):
        assert [line[name] for line in cut.metrics() if "lr" in line] == pytest.approx(
            [line[name] for line in one.metrics() if "lr" in line], rel=1e-4
        )


@pytest.mark.parametrize("method", ["ddpm", "edm"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("times", ["uniform", "loss-aware"])
def test_a_regression_is_the_loss(pixels, method, conditional, times):
    changes = {"network": "mlp", "network.width": 16, "conditional": conditional}
    if method == "ddpm":
        changes |= {"schedule": "cosine", "schedule.num_steps": 5, "sampling.num_steps": 5, "times": times}
    model = built_model(recipe(method, DataConfig(source="npz:tiny"), pixels, 0, changes)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if times == "loss-aware" and method == "ddpm":  # its law is learned already: items have weights
            model.times.losses.uniform_()
            model.times.counts.fill_(100)
        batch = Batch(pixels.spec.encode(pixels.train[:20]), pixels.train_labels[:20] if conditional else None)
        draws = StepDraws(3, 4, 10, 30, 50)
        terms, found = model.loss(batch, draws.again()), model.regression(batch, draws.again())
        said = found.network(found.x, found.label, found.condition)
        assert torch.allclose(found.weight * (said - found.target).square().flatten(1).mean(1), terms.per_item)
        assert (found.weight.unique().numel() > 1) == (times == "loss-aware" and method == "ddpm")
        assert torch.equal(model.regression(batch, draws.again()).target, found.target)


def test_the_same_numbers_are_drawn_again():
    for draws in (StepDraws(1, 2, 3, 7, 9), StepDraws(1, 2, 3, 7, 9).branch("extra", 0)):
        first = draws.again()
        assert torch.equal(first.normal((2,)), draws.again().normal((2,)))
        draws.uniform()
        later = draws.again()
        for one in (draws, later):
            one.numbers = [one.normal((2, 2)), one.uniform(), one.stratified(), one.branch("a").normal((1,))]
        assert all(torch.equal(a, b) for a, b in zip(draws.numbers, later.numbers, strict=True))
        assert later.count == 4
        assert not torch.equal(first.normal((2,)), later.normal((2,)))


SCRIPT = """
import os, signal, sys
from osmose.cli.main import main
from osmose.training.trainer import Trainer

common = sys.argv[1:]
for name in ("als", "riemannian"):
    main([*common, "--optimizer", name, "--out", name])
optimise = Trainer.optimise
def signalled(self, window):
    if self.step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return optimise(self, window)
Trainer.optimise = signalled
try:
    main([*common, "--optimizer", "als", "--out", "parts"])
except SystemExit as stop:
    assert stop.code == 130, stop.code
Trainer.optimise = optimise
main(["train", "--resume", "--quiet", "--out", "parts"])
"""


def test_two_processes_are_one(tmp_path, contents, monkeypatch, capsys):
    from osmose.cli.main import main

    settings = "data.num_points=400 network.rank=3 network.degree=3 training.batch_size=64 training.accumulate=2"
    command = ["train", "ddpm", "--data", "toy:two-moons", "--network", "tensor-train", "--steps", "4", "--quiet"]
    command += [*settings.split(), "training.log_every=1", "training.validate_every=2", "training.checkpoint_every=1"]
    command += ["training.preview_every=1000", "sampling.num_steps=5", "training.keep_checkpoints=1"]
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "script.py", *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "parts") == contents(tmp_path / "als")
    monkeypatch.chdir(tmp_path)
    for optimizer in ("als", "riemannian"):
        main([*command, "--optimizer", optimizer, "--out", f"alone-{optimizer}"])
        alone, together = Run.open(f"alone-{optimizer}"), Run.open(optimizer)
        losses = [
            [(line["step"], name, value) for line in run.metrics() for name, value in line.items() if "loss" in name]
            for run in (alone, together)
        ]
        assert [found[:2] for found in losses[0]] == [found[:2] for found in losses[1]]
        assert [found[2] for found in losses[1]] == pytest.approx([found[2] for found in losses[0]], rel=1e-4)
        assert len(losses[0]) > 20
        a, b = load_file(alone.weights), load_file(together.weights)
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-2, atol=1e-4)
    capsys.readouterr()


def test_evaluating_again_teaches_the_law_of_times_nothing(begun, pixels):
    law = {"times": "loss-aware", "times__history": 2, "schedule": "cosine", "schedule__num_steps": 10}
    run = begun(**law)
    Trainer(run, pixels).fit()
    training = run.config.training
    # Every item of every batch is observed once, however often its loss is asked for.
    assert load_file(run.weights)["times.counts"].sum() == training.steps * training.batch_size


def test_a_loss_that_is_not_finite_stops_the_run(begun, pixels):
    run = begun()
    trainer = Trainer(run, pixels)
    with torch.no_grad():
        trainer.model.denoiser.network.cores[0].fill_(math.nan)
    with pytest.raises(DivergedError, match="the loss is no longer finite at step 1"):
        trainer.fit()
    assert json.dumps(run.metrics()) == "[]"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__lr": 1.5}, "training.lr: 1.5 is not valid with optimizer als: it is a share, at most 1"),
        ({"training__ema": 0.9}, "training.ema: 0.9 is not valid with optimizer als: averages of cores in different"),
        (
            {"training__clip_grad": 1.0},
            "training.clip_grad: 1.0 is not valid with optimizer als: steps have the length",
        ),
        (
            {"training__weight_decay": 0.1},
            "training.weight_decay: 0.1 is not valid with optimizer als: it is for adam; ",
        ),
        ({"training__compile": True}, "training.compile: True is not valid with optimizer als: ranks change while it"),
        (
            {"network": "mlp"},
            "training.optimizer: als trains one tensor train and nothing else, and this model has none; use",
        ),
        (
            {"objective": "vlb"},
            "training.optimizer: als solves least squares, and the loss of ddpm is none; ddpm and edm",
        ),
        ({"training__optimizer__ridge": 0}, "training.optimizer.ridge: 0 is not valid: should be greater than 0"),
        (
            {"training__optimizer__ridge_decay": 2},
            "training.optimizer.ridge_decay: 2 is not valid: should be less than",
        ),
        ({"training__optimizer__tolerance": 1}, "training.optimizer.tolerance: 1 is not valid: should be less than 1"),
        ({"training__optimizer__grow": 0}, "training.optimizer.grow: 0 is not valid: should be greater than or equal"),
        ({"training__optimizer__rigde": 1}, "training.optimizer.rigde: unknown field; did you mean 'ridge'?"),
        ({"training__optimizer__kind": "asl"}, "unknown optimizer 'asl'; did you mean 'als'?"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_sweeps_cannot_do_is_refused(begun, changes, message, tmp_path):
    with pytest.raises(UserError) as refused:
        begun(**changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())

"""Descent on the manifold of fixed ranks: its direction, its length, and the training around them."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from osmose.data.assembly import Part, points_dataset
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.parametrization import EpsParametrization
from osmose.gaussian.schedule import CosineSchedule
from osmose.methods.chain import levels_of
from osmose.networks.tensor_train import TensorTrainConfig
from osmose.networks.trains import Point, add, dense, inner, ranks, rounded, tangent_inner
from osmose.training.optimizers import Work
from osmose.training.recipes import checked, recipe
from osmose.training.riemannian import Riemannian, RiemannianConfig
from osmose.training.run import Run
from osmose.training.trainer import Trainer

OUTPUTS = ("potential", "block", "separate")
every_output = pytest.mark.parametrize("output", OUTPUTS)


def built(event_shape=(3,), num_classes=None, seed=0, size=0.5, **settings):
    """A network in float64 on a schedule, whose train is far from 0; with size=None, as it is at the start."""
    torch.manual_seed(seed)
    settings = {"rank": 3, "degree": 2, "time_degree": 2, "basis": "hermite", "domain": 4.0} | settings
    network = TensorTrainConfig(**settings).build(event_shape, num_classes=num_classes).double()
    network.calibration.set_levels(levels_of(CosineSchedule(num_steps=8), EpsParametrization()))
    if size is not None:
        network.set_trains([size * torch.randn_like(core) for core in network.trains()])
    return network


class Problem:
    """Least squares for a network, as a step of training sees them: the loss, and the gradient in the cores."""

    def __init__(self, network, count=300, seed=1, target=None):
        generator = torch.Generator().manual_seed(seed)
        self.network, shape = network, network.event_shape
        self.x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        self.label = 125 * torch.randint(0, 8, (count,), generator=generator).double()
        classes = network.num_classes
        self.condition = torch.randint(0, classes, (count,), generator=generator) if classes else None
        self.target = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        if target is not None:
            self.target = target(self.x, self.label, self.condition).detach()

    def value(self):
        error = self.network(self.x, self.label, self.condition) - self.target
        return error.square().flatten(1).mean(1).mean()

    def loss(self):
        with torch.no_grad():
            return float(self.value())

    def work(self):
        self.network.zero_grad()
        value = self.value()
        value.backward()
        return Work(float(value.detach()), self.loss, lambda: iter(()), lambda sums: sums, 7)

    def at(self, cores):
        with self.network.replaced(cores):
            return self.loss()


def cores_of(network):
    return [core.detach().clone() for core in network.trains()]


def close(a, b, tolerance=1e-10):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def descend(network, problem, steps, lr=1.0, **settings):
    optimizer = Riemannian(RiemannianConfig(**settings), network)
    return optimizer, [optimizer.advance(lr, problem.work()) for _ in range(steps)]


def gradient_of(network, problem):
    """The point that a network is at, and the gradient there."""
    Riemannian(RiemannianConfig(), network)  # brings it into the gauge
    problem.work()
    point = Point(cores_of(network))
    return point, point.gradient([core.grad for core in network.cores])


# --- the direction ------------------------------------------------------------------------------------------------


@every_output
@pytest.mark.parametrize("classes", [None, 2])
def test_the_gradient_is_the_slope_along_every_tangent_vector(output, classes):
    network = built(num_classes=classes, output=output)
    problem = Problem(network)
    point, gradient = gradient_of(network, problem)
    for seed in range(3):
        generator = torch.Generator().manual_seed(20 + seed)
        drawn = [torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in point.left]
        xi, h = point.gauged(drawn), 1e-5
        ahead, back = (problem.at(point.retracted(xi, step)) for step in (h, -h))
        assert tangent_inner(gradient, xi) == pytest.approx((ahead - back) / (2 * h), rel=1e-5)
        along = (problem.at(point.train(xi, 1.0)) - problem.at(point.left)) / 1.0  # a parabola, with that slope
        minus = problem.at(point.train([-v for v in xi], 1.0)) - problem.at(point.left)
        assert tangent_inner(gradient, xi) == pytest.approx((along - minus) / 2, rel=1e-8)


@every_output
def test_the_first_step_goes_along_the_steepest_descent(output):
    network = built(output=output)
    problem = Problem(network)
    point, gradient = gradient_of(network, problem)
    value = problem.loss()
    optimizer, (told,) = descend(network, problem, 1)
    assert told["beta"] == 0
    assert told["riemannian_norm"] == pytest.approx(tangent_inner(gradient, gradient) ** 0.5)
    want = point.retracted([-g for g in gradient], told["length"])
    assert close(dense(cores_of(network)), dense(want), 1e-9)
    assert told["loss_after"] == pytest.approx(problem.loss())
    assert problem.loss() < value
    assert close(dense(optimizer.gradient), dense(point.train(gradient)))
    assert all(core.grad is None for core in network.cores)


def test_further_steps_are_conjugate():
    network = built()
    problem = Problem(network)
    optimizer, _ = descend(network, problem, 1)
    betas = []
    for _ in range(6):
        before, direction = optimizer.gradient, optimizer.direction
        problem.work()
        point = Point(cores_of(network))
        gradient = point.gradient([core.grad for core in network.cores])
        old, carried = point.projected(before), point.projected(direction)
        size = float(inner(before, before).sum())
        beta = max(0.0, (tangent_inner(gradient, gradient) - tangent_inner(gradient, old)) / size)
        want = [-g + beta * d for g, d in zip(gradient, carried, strict=True)]
        if tangent_inner(want, gradient) >= 0:
            beta, want = 0.0, [-g for g in gradient]
        told = optimizer.advance(1.0, problem.work())
        assert told["beta"] == pytest.approx(beta, rel=1e-8)
        assert close(dense(optimizer.direction), dense(point.train(want)), 1e-8)
        assert close(dense(cores_of(network)), dense(point.retracted(want, told["length"])), 1e-8)
        betas.append(beta)
    assert 0 in betas
    assert len(set(betas)) > 3


@every_output
def test_the_path_does_not_depend_on_the_gauge(output):
    network = built(output=output)
    other, cores = copy.deepcopy(network), cores_of(network)
    for k in range(len(cores) - 1):
        r = cores[k].shape[3]
        mix = torch.eye(r).double() + 0.4 * torch.randn(r, r, dtype=torch.float64)
        cores[k] = cores[k] @ mix
        cores[k + 1] = torch.einsum("qr,crns->cqns", torch.linalg.inv(mix), cores[k + 1])
    other.set_trains(cores)
    told = [descend(one, Problem(one), 4)[1] for one in (network, other)]
    for one, two in zip(*told, strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-9)
    assert close(dense(cores_of(other)), dense(cores_of(network)), 1e-6)


# --- the length ---------------------------------------------------------------------------------------------------


@every_output
def test_the_exact_length_is_the_minimum_along_the_tangent(output):
    network = built(output=output)
    problem = Problem(network)
    point, gradient = gradient_of(network, problem)
    descent = [-g for g in gradient]

    def along(length):
        return problem.at(point.train([length * v for v in descent], 1.0))

    optimizer = Riemannian(RiemannianConfig(), network)
    slope = tangent_inner(gradient, descent)
    for trial in (1.0, 0.01, 300.0):  # the parabola is the same from wherever it is looked at
        optimizer.length = trial
        best = optimizer._length(point, descent, slope, 1.0, problem.work())
        h = 1e-3 * best
        # At the vertex of a parabola both sides are as high, and it is known from there.
        assert along(best + h) - along(best) == pytest.approx(along(best - h) - along(best), rel=1e-5)
        assert along(best) < min(along(0.5 * best), along(1.5 * best), along(0.0))
        assert along(best) == pytest.approx(problem.loss() + slope * best / 2, rel=1e-9)
        assert optimizer._length(point, descent, slope, 0.25, problem.work()) == pytest.approx(best / 4)


def test_where_the_train_is_free_a_step_is_that_of_linear_least_squares():
    # Ranks as large as they can be: the manifold is a whole vector space, and its only point is the full tensor.
    network = built((2,), output="separate", rank=3, degree=2, time_degree=1)
    assert network.bonds.tolist() == [3, 3]
    truth = built((2,), output="separate", rank=3, degree=2, time_degree=1, seed=5)
    problem = Problem(network, target=truth)
    point, gradient = gradient_of(network, problem)
    _, (told,) = descend(network, problem, 1)
    # The step of steepest descent: |g|^2 / <g, H g>, with <g, H g> from the loss of g alone.
    bend = problem.at(point.train([-g for g in gradient], 1.0)) - problem.at(point.left)
    bend += tangent_inner(gradient, gradient)
    assert told["length"] == pytest.approx(tangent_inner(gradient, gradient) / (2 * bend), rel=1e-8)
    # Conjugate gradients on a quadratic with so few directions end.
    _, told = descend(network, problem, 40)
    assert problem.loss() < 1e-12
    assert [t["loss_after"] for t in told] == sorted((t["loss_after"] for t in told), reverse=True)


@every_output
@pytest.mark.parametrize("direction", ["cg", "gradient"])
@pytest.mark.parametrize("line_search", ["exact", "armijo"])
@pytest.mark.parametrize("lr", [1.0, 1.9, 50.0])
def test_the_loss_never_rises(output, direction, line_search, lr):
    network = built(output=output, size=0.3)
    problem = Problem(network, 100)
    optimizer = Riemannian(RiemannianConfig(direction=direction, line_search=line_search), network)
    for _ in range(6):
        work = problem.work()
        told = optimizer.advance(lr, work)
        assert told["loss_after"] <= work.value
        assert told["loss_after"] == pytest.approx(problem.loss(), rel=1e-12)
        assert ranks(cores_of(network)) == [3, 3, 3]
    assert problem.loss() < 0.99 * problem.at([torch.zeros_like(core) for core in network.cores])


def test_where_nothing_descends_the_network_stays():
    network = built()
    problem = Problem(network)
    optimizer, _ = descend(network, problem, 1)
    before = cores_of(network)
    work = problem.work()
    # A loss that is higher everywhere but here, as rounding makes it at the bottom.
    told = optimizer.advance(1.0, Work(work.value, lambda: work.value + 1.0, work.regressions, work.summed, 0))
    assert told["length"] == 0
    assert told["loss_after"] == work.value
    assert all(torch.equal(a, b) for a, b in zip(cores_of(network), before, strict=True))
    assert optimizer.tensors().keys() == {"length"}  # starts anew from here
    told = optimizer.advance(1.0, problem.work())
    assert told["beta"] == 0
    assert told["length"] > 0


def test_at_a_minimum_there_is_nowhere_to_go():
    network = built()
    problem = Problem(network, target=copy.deepcopy(network))
    _, told = descend(network, problem, 2)
    assert problem.loss() < 1e-20
    assert all(t["riemannian_norm"] < 1e-10 for t in told)


# --- how it converges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["separate", "block"])
def test_conjugate_directions_converge_faster(output):
    truth = built((4,), output=output, rank=2, seed=3)
    losses = {}
    for direction in ("cg", "gradient"):
        network = built((4,), output=output, rank=2, seed=3)
        noise = [0.1 * torch.randn_like(core) for core in network.trains()]
        network.set_trains(rounded(add(cores_of(network), noise), [2, 2, 2, 2]))
        problem = Problem(network, 600, target=truth)
        start = problem.loss()
        descend(network, problem, 40, direction=direction)
        losses[direction] = problem.loss()
    assert losses["cg"] < 0.1 * losses["gradient"]
    assert losses["cg"] < 1e-4 * start


def test_from_the_start_a_train_of_true_rank_is_found():
    truth = built((3,), output="separate", rank=2, seed=3)
    network = built((3,), output="separate", rank=2, seed=6, size=None)
    problem = Problem(network, 600, target=truth)
    start = problem.loss()
    _, told = descend(network, problem, 120)
    assert problem.loss() < 1e-3 * start
    assert any(t["beta"] > 0 for t in told)


def test_reduced_ranks_are_kept():
    network = built((4,), rank=4)
    network.set_trains(rounded(cores_of(network), [2, 3, 2, 1]))
    problem = Problem(network)
    start = problem.loss()
    _, told = descend(network, problem, 5)
    assert network.bonds.tolist() == [2, 3, 2, 1]
    assert told[-1]["loss_after"] < start


@pytest.mark.parametrize("line_search", ["exact", "armijo"])
def test_what_it_remembers_goes_through_its_tensors(line_search):
    network = built()
    problem = Problem(network)
    optimizer, _ = descend(network, problem, 3, line_search=line_search)
    other = copy.deepcopy(network)
    again = Riemannian(RiemannianConfig(line_search=line_search), built(seed=9))
    again.network = other
    again.restore({name: value.clone() for name, value in optimizer.tensors().items()})
    beside = Problem(other)
    for _ in range(3):
        told = optimizer.advance(1.0, problem.work()), again.advance(1.0, beside.work())
        assert told[0] == told[1]
    assert all(torch.equal(a, b) for a, b in zip(cores_of(network), cores_of(other), strict=True))


# --- training -----------------------------------------------------------------------------------------------------

DESCENT = {
    "network": "tensor-train",
    "network.rank": 2,
    "network.degree": 3,
    "sampling.num_steps": 2,
    "training.optimizer": "riemannian",
    "training.steps": 6,
    "training.batch_size": 128,
    "training.accumulate": 2,
    "training.log_every": 1,
    "training.validate_every": 3,
    "training.preview_every": 1000,
    "training.checkpoint_every": 2,
    "training.keep_checkpoints": 1,
}


@pytest.fixture(scope="module")
def clusters():
    generator = torch.Generator().manual_seed(0)
    corners = 2.0 * torch.randint(0, 2, (300, 3), generator=generator) - 1
    corners[:, 1] *= corners[:, 0]
    values = corners + 0.3 * torch.randn(300, 3, generator=generator)
    return points_dataset("npz:tiny", DataConfig(source="npz:tiny"), Part(values, (corners[:, 0] > 0).long()))


@pytest.fixture
def begun(clusters, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "preview", lambda _: None)

    def make(name="run", method="ddpm", **changes):
        changed = DESCENT | {name.replace("__", "."): value for name, value in changes.items()}
        if changed["network"] != "tensor-train":
            changed = {name: value for name, value in changed.items() if not name.startswith("network.")}
        config = checked(recipe(method, DataConfig(source="npz:tiny"), clusters, 0, changed))
        return Run.create(tmp_path / name, config)

    return make


def test_the_recipe_suits_descent(clusters):
    changes = {"network": "tensor-train", "training.optimizer": "riemannian"}
    training = recipe("ddpm", DataConfig(source="npz:tiny"), clusters, 0, changes).training
    assert (training.lr, training.warmup, training.batch_size > 1024) == (1.0, 0, True)
    assert (training.ema, training.clip_grad, training.precision) == (0.0, None, "fp32")
    # What is said beats it, and other optimizers have what they always had.
    changes |= {"training.steps": 7, "training.lr": 0.5}
    training = recipe("ddpm", DataConfig(source="npz:tiny"), clusters, 0, changes).training
    assert (training.steps, training.lr) == (7, 0.5)
    adam = recipe("ddpm", DataConfig(source="npz:tiny"), clusters, 0, {"network": "tensor-train"}).training
    assert (adam.optimizer.kind, adam.ema > 0.9, adam.clip_grad, adam.lr) == ("adam", True, 1.0, 2e-3)


@pytest.mark.parametrize("method", ["ddpm", "edm"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"conditional": True, "network__output": "block"}, {"training__optimizer__line_search": "armijo"}],
    ids=str,
)
def test_training_falls_and_tells_of_every_step(begun, clusters, method, changes):
    run = begun(method=method, **changes)
    Trainer(run, clusters).fit()
    lines = [line for line in run.metrics() if "lr" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss_after"] <= line["loss"] * (1 + 1e-6) for line in lines)
    assert lines[0]["loss_after"] < lines[0]["loss"]
    assert all(line["riemannian_norm"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert all(0 <= line["outside"] < 0.2 for line in lines)
    assert lines[0]["beta"] == 0
    # In the gauge that it works in, whatever the precision of the weights.
    network = run.model().denoiser.network
    for core in network.trains()[:-1]:
        columns = core.flatten(1, 2)
        assert (columns.transpose(1, 2) @ columns - torch.eye(core.shape[3])).abs().max() < 1e-5


def test_in_training_the_losses_that_are_compared_are_of_one_batch(begun, clusters):
    run = begun()
    trainer, seen = Trainer(run, clusters), []
    advance = trainer.optimizer.advance

    def watched(lr, work):
        assert work.loss() == pytest.approx(work.value, rel=1e-6)
        pairs = [(r, s) for r, s in zip(work.regressions(), work.regressions(), strict=True)]
        assert len(pairs) == 2
        total = 0.0
        for one, again in pairs:
            assert torch.equal(one.x, again.x)
            assert torch.equal(one.target, again.target)
            error = (one.network(one.x, one.label, one.condition) - one.target).square().flatten(1).mean(1)
            total += float((one.weight * error).mean().detach()) / 2
        assert total == pytest.approx(work.value, rel=1e-5)
        seen.append(work.value)
        return advance(lr, work)

    trainer.optimizer.advance = watched
    trainer.fit()
    assert len(set(seen)) == 6


class KilledError(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"training__optimizer__direction": "gradient"}], ids=str)
def test_a_run_that_was_killed_goes_on_bit_for_bit(begun, clusters, contents, monkeypatch, changes):
    whole, parts = begun("whole", **changes), begun("parts", **changes)
    Trainer(whole, clusters).fit()
    optimise = Trainer.optimise

    def dying(self, window):
        if self.step == 5:
            raise KilledError
        return optimise(self, window)

    monkeypatch.setattr(Trainer, "optimise", dying)
    with pytest.raises(KilledError):
        Trainer(parts, clusters).fit()
    monkeypatch.setattr(Trainer, "optimise", optimise)
    trainer = Trainer(parts, clusters)
    assert trainer.step == 4
    assert len(trainer.optimizer.gradient) == 4
    trainer.fit()
    a, b = contents(parts.folder), contents(whole.folder)
    for found in (a, b):  # what is counted of the domain is another matter
        found["metrics"] = [{k: v for k, v in line.items() if k != "outside"} for line in found["metrics"]]
    assert a == b


def test_micro_batches_are_one_batch(begun, clusters):
    one, cut = begun("one", training__accumulate=1), begun("cut", training__accumulate=4)
    for run in (one, cut):
        Trainer(run, clusters).fit()
    a, b = ([line for line in run.metrics() if "lr" in line] for run in (one, cut))
    for name in ("loss", "loss_after", "length", "riemannian_norm"):
        assert [line[name] for line in b] == pytest.approx([line[name] for line in a], rel=1e-2)
    p, q = load_file(one.weights), load_file(cut.weights)
    for name in p:
        torch.testing.assert_close(q[name], p[name], rtol=1e-2, atol=1e-3)


def test_evaluating_again_teaches_the_law_of_times_nothing(begun, clusters):
    law = {"times": "loss-aware", "times__history": 2, "schedule": "cosine", "schedule__num_steps": 10}
    run = begun(**law)
    Trainer(run, clusters).fit()
    training = run.config.training
    assert load_file(run.weights)["times.counts"].sum() == training.steps * training.batch_size


def test_losses_that_are_no_least_squares_can_be_descended(begun, clusters):
    run = begun(objective="tilted")
    Trainer(run, clusters).fit()
    lines = [line for line in run.metrics() if "lr" in line]
    assert all(line["loss_after"] <= line["loss"] * (1 + 1e-6) for line in lines)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training__clip_grad": 1.0},
            "training.clip_grad: 1.0 is not valid with optimizer riemannian: steps have the",
        ),
        ({"training__ema": 0.99}, "training.ema: 0.99 is not valid with optimizer riemannian: averages of cores in"),
        ({"training__weight_decay": 0.01}, "training.weight_decay: 0.01 is not valid with optimizer riemannian: it is"),
        ({"training__compile": True}, "training.compile: True is not valid with optimizer riemannian: ranks change"),
        (
            {"network": "mlp"},
            "training.optimizer: riemannian trains one tensor train and nothing else, and this model has none; use",
        ),
        (
            {"training__optimizer__direction": "newton"},
            "training.optimizer.direction: 'newton' is not valid: should be",
        ),
        ({"training__optimizer__line_search": "wolfe"}, "training.optimizer.line_search: 'wolfe' is not valid: should"),
        ({"training__optimizer__ridge": 1.0}, "training.optimizer.ridge: unknown field"),
        (
            {"method": "iddpm"},
            "network: tensor-train has no second output for a learned variance; use method ddpm or edm",
        ),
        ({"method": "sct"}, "training.optimizer: riemannian trains one tensor train and nothing else, and 'weight."),
        ({"method": "iddpm", "conditional": True}, "network: tensor-train has no second output for a learned variance"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_descent_cannot_do_is_refused(begun, changes, message, tmp_path):
    with pytest.raises(UserError) as refused:
        begun(**changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())

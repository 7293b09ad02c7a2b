r"""The loss around trained weights, on a plane through them, with a picture (Li et al., arXiv 1712.09913).

For weights theta and two directions u and v of the weights' shape,

    L(theta + a u + b v) = mean over items of loss(item; theta + a u + b v)

on a grid of (a, b), always with the same items and the same noise, in evaluation mode. The directions are

`random`      Gaussian, and each filter of them scaled to the norm of the same filter of theta: 1 moves every filter by
              as much as it is long, so that a network and the same function with other scales of its weights give one
              picture. A filter is a slice along the first axis of a parameter, or a whole parameter where the module
              says `filters = "whole"`. Parameters with fewer than two axes (biases, norms) do not move.
`trajectory`  the two principal directions of the run's checkpoints as seen from its final weights: of all planes
              through theta the one that holds most of sum_k ||theta_k - theta||^2. 1 is the farthest coordinate of a
              checkpoint.

Weights that are one function may be written in many ways. A module that has a method `canonical_()` brings its own into
one form, and is asked to before weights are compared or moved.
"""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws, seeded
from osmose.methods import COMPOSED, DISTILLED
from osmose.methods.base import Batch, GenerativeModel, OnStep
from osmose.training import files
from osmose.training.checkpoint import Checkpoints
from osmose.training.run import Run, load_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import ContourSet

#: Where the plane comes from.
Directions = Literal["random", "trajectory"]

#: Radii, in units of the directions, and angles at which the rise of the loss is told.
RADII, _ANGLES = (0.25, 0.5, 1.0), 16
#: How far second differences reach, in units of the directions.
_STEP = 0.05
#: Checkpoints below which there is no plane of a trajectory worth the name.
_FEWEST = 3
#: How much farther than the trajectory the grid reaches.
_MARGIN = 1.2
#: Second variance, as a share of the first, below which checkpoints lie on a line.
_LINE = 1e-10
#: Contours of a picture, and how many times the lowest loss the last may be: what is above says only that it is bad.
_LEVELS, _TOP = 18, 1000.0
#: From where on a cut has a logarithmic axis.
_DECADE = 10.0
#: Of runs.
_COLOURS = ("C3", "C1", "black", "C6", "C5", "C2")
#: Values of a vector of weights that are taken to float64 together.
_CHUNK = 2**18

#: What the value of a method's loss does not say.
CAUTIONS = {
    "sct": "the loss of sct is the size of a normalised tangent: it does not say how well the model samples",
    "ect": "the target of ect moves with the weights: a low loss is agreement with itself, not with the data",
    "sngan": "the loss of sngan is the sum of two that play against each other: nothing descends on it",
}


@dataclass(frozen=True)
class Trajectory:
    """The weights of a run in training, as projected on a plane; the last are the final, averaged ones.

    Attributes:
        name: the run's.
        steps: of the K checkpoints; the final weights have none.
        points: coordinates (a, b), float64 (K + 1, 2).
        share: of sum_k ||theta_k - theta||^2 for its own final weights theta, the part that lies in the plane; None
            where that sum is 0.
    """

    name: str
    steps: tuple[int, ...]
    points: Tensor
    share: float | None


@dataclass(frozen=True)
class Landscape:
    """The loss of one run on a plane. Coordinates and radii are in units of the directions.

    Attributes:
        name: the run's.
        method: its kind.
        n: items that the loss is the mean of.
        centre: coordinates of the run's weights: (0, 0) but on a plane that several runs share.
        centre_loss: the loss there.
        axis: coordinates of the grid on both axes, float64 (P,).
        loss: at (axis[i], axis[j]), float64 (P, P).
        cuts: the loss at axis[i] from the centre, along u and along v, float64 (2, P).
        rises: mean rise of the loss over a circle around the centre, one for each of RADII.
        curvatures: second derivatives along u and v, u^T H u and v^T H v.
        lengths: ||u|| and ||v||.
        shares: of the sum of squares that the plane was made from, what u and v hold; None for random directions.
        trajectories: of the run itself, where it has checkpoints, or of all runs on a plane that they share.
        canonical: whether a part of the model was brought into a canonical form.
        seconds: that the losses took.
    """

    name: str
    method: str
    n: int
    centre: tuple[float, float]
    centre_loss: float
    axis: Tensor
    loss: Tensor
    cuts: Tensor
    rises: tuple[float, ...]
    curvatures: tuple[float, float]
    lengths: tuple[float, float]
    shares: tuple[float, float] | None
    trajectories: tuple[Trajectory, ...]
    canonical: bool
    seconds: float

    @property
    def ratio(self) -> float:
        """The larger curvature over the smaller, by size: the conditioning of the plane; below 0 at a saddle."""
        small, large = sorted(self.curvatures, key=abs)
        return large / small if small else math.nan

    @property
    def below_twice(self) -> float:
        """Share of the grid whose loss is less than twice the centre's; NaN unless that is a number above 0."""
        if not (math.isfinite(self.centre_loss) and self.centre_loss > 0):
            return math.nan
        return float((self.loss < 2 * self.centre_loss).double().mean())

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        return {
            "run": self.name,
            "method": self.method,
            "n": self.n,
            "centre": list(self.centre),
            "loss": _plain(self.centre_loss),
            "rise": {f"{radius:g}": _plain(rise) for radius, rise in zip(RADII, self.rises, strict=True)},
            "curvature": {"u": _plain(self.curvatures[0]), "v": _plain(self.curvatures[1])},
            "curvature_ratio": _plain(self.ratio),
            "below_twice": _plain(self.below_twice),
            "lengths": dict(zip("uv", self.lengths, strict=True)),
            "shares": None if self.shares is None else dict(zip("uv", self.shares, strict=True)),
            "trajectories": [
                {"run": one.name, "steps": list(one.steps), "points": one.points.tolist(), "share": one.share}
                for one in self.trajectories
            ],
            "canonical": self.canonical,
            "axis": self.axis.tolist(),
            "grid": [[_plain(value) for value in row] for row in self.loss.tolist()],
            "cuts": {
                name: [_plain(value) for value in cut.tolist()] for name, cut in zip("uv", self.cuts, strict=True)
            },
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Landscapes:
    """Landscapes of runs on grids of one size.

    Attributes:
        runs: one landscape for each run.
        conditions: directions, shared, points, reach, part, seed: what the numbers hold for.
    """

    runs: tuple[Landscape, ...]
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.conditions, "runs": [run.to_json() for run in self.runs]}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class _Subject:
    """A run's model, all its trained weights as one vector, and where they were before.

    Attributes:
        theta: the final weights, (D,) on the CPU.
        steps: of the K checkpoints.
        path: weights of the checkpoints minus theta, (K, D).
    """

    run: Run
    name: str
    model: GenerativeModel
    theta: Tensor
    steps: tuple[int, ...]
    path: Tensor
    canonical: bool


@dataclass(frozen=True)
class _Plane:
    """Origin + a u + b v, vectors of trained weights (D,)."""

    origin: Tensor
    u: Tensor
    v: Tensor
    shares: tuple[float, float] | None = None

    def coordinates(self, rows: Tensor) -> tuple[Tensor, float | None]:
        """Of differences from the origin (K, D): nearest (a, b), float64 (K, 2), and the share of squares in the plane.

        The directions need not be at right angles.
        """
        axes = torch.stack([self.u, self.v])
        gram = _products(axes, axes)
        points = _products(rows, axes) @ torch.linalg.pinv(gram, hermitian=True)
        whole = sum(float(row.double().square().sum()) for row in rows)
        return points, float(((points @ gram) * points).sum()) / whole if whole else None


def landscapes(
    runs: Sequence[Run],
    datasets: Sequence[Dataset],
    *,
    directions: str = "random",
    shared: bool = False,
    points: int = 21,
    reach: float | None = None,
    n: int = 256,
    part: str = "held-out",
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    on_step: OnStep | None = None,
) -> Landscapes:
    """The losses of runs on planes through their weights. Neither the runs nor their models are changed.

    Args:
        runs: of methods that have a loss and parameters to train.
        datasets: the data that each was trained on.
        directions: random or trajectory (see the module).
        shared: lay one pair of directions through the checkpoints of all runs, which have to have the same parameters.
            Each landscape is then on the parallel plane that goes through its own run's weights.
        points: of the grid on each axis; with an odd number the weights themselves are on it.
        reach: where the grid ends, in units of the directions; None: 1 for random ones, otherwise a fifth farther than
            the trajectory.
        n: items that the loss is the mean of, or all if there are fewer.
        part: held-out or train.
        seed: of random directions, of the choice of items and of their noise.
        device: where to compute; directions are the same on all.
        batch_size: items computed together; changes nothing but speed.
        on_step: called with the passes over a batch done and those in all.

    Raises:
        UserError: a method without a loss that a finished run can say, a run without checkpoints where they are needed,
            runs that cannot share a plane, or an option that is refused.
    """
    if not runs:
        raise UserError("runs: give at least one")
    for name, number, fewest in (("points", points, 3), ("n", n, 1), ("batch_size", batch_size, 1)):
        if number < fewest:
            raise UserError(f"{name}: {number} is not valid: must be at least {fewest}")
    if reach is not None and not 0 < reach < math.inf:
        raise UserError(f"reach: {reach} is not valid: must be a number above 0")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: {seed} is not valid: must be between 0 and 2^63 - 1")
    if directions not in get_args(Directions):
        raise UserError(f"directions: {directions!r} is not valid: should be random or trajectory")
    if part not in ("train", "held-out"):
        raise UserError(f"part: {part!r} is not valid: should be held-out or train")
    along = directions == "trajectory"
    if shared and not along:
        raise UserError("shared: random directions are made for each run alone; use it with directions trajectory")
    if shared and len(runs) < 2:
        raise UserError("shared: a plane that is shared needs two runs or more")
    subjects = [_subject(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    if along:
        for subject in subjects:
            _require_trajectory(subject)
    if shared:
        _require_same_parameters(subjects)
        planes = [_plane_of(subjects)] * len(subjects)
    else:
        planes = [_plane_of([one]) if along else _random_plane(one, seed) for one in subjects]
    end = reach if reach is not None else _MARGIN if along else 1.0
    # So written the grid is symmetric to the last bit, and 0 on it.
    axis = end * (2 * torch.arange(points, dtype=torch.float64) - (points - 1)) / (points - 1)
    sights = [
        _Sight(subject, plane, axis, subjects if shared else [subject], dataset, part, n, seed, batch_size)
        for subject, plane, dataset in zip(subjects, planes, datasets, strict=True)
    ]
    total, done = sum(sight.passes for sight in sights), 0
    found = []
    for sight in sights:

        def report(passes: int, before: int = done) -> None:
            if on_step is not None:
                on_step(before + passes, total)

        found.append(sight.measured(device, report))
        done += sight.passes
    conditions = {
        "directions": directions,
        "shared": shared,
        "points": points,
        "reach": end,
        "part": part,
        "seed": seed,
    }
    return Landscapes(tuple(found), conditions)


class _Sight:
    """One run on its plane: which weights to score, and on what."""

    def __init__(
        self,
        subject: _Subject,
        plane: _Plane,
        axis: Tensor,
        drawn: Sequence[_Subject],
        dataset: Dataset,
        part: str,
        n: int,
        seed: int,
        batch_size: int,
    ):
        self.subject, self.plane, self.axis, self.dataset = subject, plane, axis, dataset
        self.part, self.seed, self.batch_size = part, seed, batch_size
        values = dataset.part("train" if part == "train" else "held-out")[0]
        if not len(values):
            raise UserError(f"part: {dataset.source!r} has no {part} items")
        order = torch.randperm(len(values), generator=seeded(seed, "landscape", "items"))
        self.items = order[: min(n, len(values))]
        self.trajectories = tuple(_trajectory(one, plane) for one in drawn)
        a, b = next(one for one in self.trajectories if one.name == subject.name).points[-1].tolist()
        self.centre = (a, b)
        steps = axis.tolist()
        self.grid = [(p, q) for p in steps for q in steps]
        self.cuts = [(a + p, b) for p in steps] + [(a, b + p) for p in steps]
        angles = [2 * math.pi * k / _ANGLES for k in range(_ANGLES)]
        self.circles = [(a + r * math.cos(t), b + r * math.sin(t)) for r in RADII for t in angles]
        self.beside = [(a - _STEP, b), (a + _STEP, b), (a, b - _STEP), (a, b + _STEP)]
        # Each place once: the centre and its cuts may be on the grid.
        places = [self.centre, *self.grid, *self.cuts, *self.circles, *self.beside]
        self.places = list(dict.fromkeys(places))

    @property
    def passes(self) -> int:
        """Over a batch, that `measured` takes."""
        return len(self.places) * -(-len(self.items) // self.batch_size)

    @torch.no_grad()
    def measured(self, device: torch.device | str, report: Callable[[int], None]) -> Landscape:
        """Score every place; `report` is told how many passes are done."""
        subject, plane, began = self.subject, self.plane, time.perf_counter()
        model = subject.model.to(device).eval()
        theta, u, v = (vector.to(device) for vector in (subject.theta, plane.u, plane.v))
        batches, losses, done = self._batches(model, device), {}, 0
        for a, b in self.places:
            _put(model, theta + (a - self.centre[0]) * u + (b - self.centre[1]) * v)
            total = 0.0
            for first, batch in batches:
                stop = first + len(batch.x0)
                draws = StepDraws(self.seed, 0, first, stop, len(self.items), device).branch("landscape")
                total += float(model.loss(batch, draws).per_item.cpu().double().sum())
                done += 1
                report(done)
            losses[a, b] = total / len(self.items)
        seconds = time.perf_counter() - began
        _put(model, theta)

        def at(places: Iterable[tuple[float, float]], rows: int) -> Tensor:
            return torch.tensor([losses[place] for place in places], dtype=torch.float64).view(rows, -1)

        centre = losses[self.centre]
        before, after = at(self.beside, 2).unbind(1)
        along_u, along_v = ((before + after - 2 * centre) / _STEP**2).tolist()
        squares = [float(vector.double().square().sum()) for vector in (plane.u, plane.v)]
        return Landscape(
            name=subject.name,
            method=subject.run.config.method.kind,
            n=len(self.items),
            centre=self.centre,
            centre_loss=centre,
            axis=self.axis,
            loss=at(self.grid, len(self.axis)),
            cuts=at(self.cuts, 2),
            rises=tuple((at(self.circles, len(RADII)).mean(1) - centre).tolist()),
            curvatures=(along_u, along_v),
            lengths=(math.sqrt(squares[0]), math.sqrt(squares[1])),
            shares=plane.shares,
            trajectories=tuple(one for one in self.trajectories if one.steps),
            canonical=subject.canonical,
            seconds=seconds,
        )

    def _batches(self, model: GenerativeModel, device: torch.device | str) -> list[tuple[int, Batch]]:
        """The items in the model's units, and the number of the first of each batch."""
        values, labels = self.dataset.part("train" if self.part == "train" else "held-out")
        batches = []
        for first in range(0, len(self.items), self.batch_size):
            rows = self.items[first : first + self.batch_size]
            condition = labels[rows].to(device) if model.config.conditional and labels is not None else None
            batches.append((first, Batch(model.spec.encode(values[rows].to(device)), condition)))
        return batches


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of the folders, with the one above where they would not differ; no private folders."""
    paths = [run.folder.resolve() for run in runs]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise UserError(f"RUN: {runs[index].folder} is given twice")
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def _subject(run: Run, name: str) -> _Subject:
    """Read a run's weights, and those of its checkpoints.

    Raises:
        UserError: no loss that could be plotted, or no parameters; the message says why.
    """
    kind = run.config.method.kind
    if kind in COMPOSED:
        raise UserError(f"{run.folder}: a run of {kind} is put together of trained runs and has no loss of its own")
    if kind in DISTILLED:
        raise UserError(
            f"{run.folder}: the loss of {kind} is measured against its teacher, which the finished run does not hold"
        )
    # `Run.model` may give the same model to others: nobody else's is moved.
    model = copy.deepcopy(run.model())
    if not _trained(model):
        raise UserError(f"{run.folder}: a run of {kind} is fitted in closed form and has no parameters to move")
    canonical = _canonical(model)
    theta, scratch = _vector(model), copy.deepcopy(model)
    steps, path = [], []
    for checkpoint in Checkpoints(run, run.config.training.keep_checkpoints).all():
        source = checkpoint / "weights.safetensors"
        load_weights(scratch, files.read_tensors(source), source)
        _canonical(scratch)
        steps.append(int(checkpoint.name.removeprefix("step_")))
        path.append(_vector(scratch) - theta)
    rows = torch.stack(path) if path else theta.new_zeros(0, len(theta))
    return _Subject(run, name, model, theta, tuple(steps), rows, canonical)


def _canonical(model: nn.Module) -> bool:
    """Bring every part that knows how to into its canonical form; whether there was one."""
    found: list[Callable[[], object] | None] = [getattr(module, "canonical_", None) for module in model.modules()]
    forms = [form for form in found if form is not None]
    with torch.no_grad():
        for form in forms:
            form()
    return bool(forms)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _vector(model: nn.Module) -> Tensor:
    """All trained parameters, one after the other, (D,)."""
    return torch.cat([parameter.detach().flatten() for parameter in _trained(model)])


def _put(model: nn.Module, vector: Tensor) -> None:
    """The inverse of `_vector`; under `torch.no_grad`."""
    parameters = _trained(model)
    for parameter, piece in zip(parameters, vector.split([one.numel() for one in parameters]), strict=True):
        parameter.copy_(piece.view(parameter.shape))


def filter_direction(model: nn.Module, generator: torch.Generator) -> Tensor:
    """A Gaussian direction whose filters have the norms of the trained weights' filters (see the module), (D,).

    Args:
        model: on the CPU.
        generator: of the CPU; it draws for all parameters in their order.
    """
    pieces = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim < 2:
            pieces.append(torch.zeros_like(parameter).flatten())
            continue
        whole = getattr(_owner(model, name), "filters", "rows") == "whole"
        shape = (1, -1) if whole else (len(parameter), -1)
        weights, drawn = parameter.detach().double().reshape(shape), drawn.reshape(shape)
        scale = weights.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
        pieces.append((drawn * scale).to(parameter.dtype).flatten())
    return torch.cat(pieces)


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module that a parameter is of: a mere list of parameters belongs to the module above."""
    while True:
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
        if not name or not isinstance(owner, nn.ParameterList | nn.ParameterDict):
            return owner


def _random_plane(subject: _Subject, seed: int) -> _Plane:
    u, v = (filter_direction(subject.model, seeded(seed, "landscape", axis)) for axis in "uv")
    if not bool(u.any() and v.any()):
        raise UserError(
            f"{subject.run.folder}: no weights with two axes or more that are not 0, so there is no filter to move; "
            "use directions trajectory"
        )
    return _Plane(subject.theta, u, v)


def _plane_of(subjects: Sequence[_Subject]) -> _Plane:
    """The plane of most squares through the mean of the final weights: of one run, through these themselves."""
    origin = subjects[0].theta if len(subjects) == 1 else torch.stack([one.theta for one in subjects]).mean(0)
    rows = torch.cat([_from(origin, one) for one in subjects])
    values, vectors = torch.linalg.eigh(_products(rows, rows))
    values, vectors = values.flip(0), vectors.flip(1)
    if not float(values[1]) > _LINE * float(values[0]):
        raise UserError(
            f"{subjects[0].run.folder}: its checkpoints lie on a line or are all the same; they span no plane, use "
            "directions random"
        )
    points = vectors[:, :2] * values[:2].sqrt()
    # Eigenvectors have no sign of their own: the farthest point is on the positive side.
    ends = points.gather(0, points.abs().argmax(0, keepdim=True))[0]
    unit = float(ends.abs().max())
    u, v = ((vectors[:, :2] * ends.sign() / values[:2].sqrt() * unit).T.to(rows) @ rows).unbind(0)
    first, second = (values[:2] / values.clamp(min=0).sum()).tolist()
    return _Plane(origin, u, v, (first, second))


def _from(origin: Tensor, subject: _Subject) -> Tensor:
    """Weights of the checkpoints and the final ones, minus the origin, (K + 1, D)."""
    offset = subject.theta - origin
    return torch.cat([subject.path + offset, offset[None]])


def _trajectory(subject: _Subject, plane: _Plane) -> Trajectory:
    points, _ = plane.coordinates(_from(plane.origin, subject))
    return Trajectory(subject.name, subject.steps, points, plane.coordinates(subject.path)[1])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows (K, D) and (M, D), float64 (K, M), without a copy of all in float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for first in range(0, left.shape[1], _CHUNK):
        part = slice(first, first + _CHUNK)
        total += left[:, part].double() @ right[:, part].double().T
    return total


def _require_trajectory(subject: _Subject) -> None:
    if len(subject.steps) < _FEWEST:
        raise UserError(
            f"{subject.run.folder}: has {len(subject.steps)} checkpoint{'' if len(subject.steps) == 1 else 's'}, and a "
            f"trajectory needs {_FEWEST} or more; train with training.keep_checkpoints=20 (and "
            "training.checkpoint_every), or use directions random"
        )


def _require_same_parameters(subjects: Sequence[_Subject]) -> None:
    first, *others = (
        {name: tuple(value.shape) for name, value in one.model.named_parameters() if value.requires_grad}
        for one in subjects
    )
    for subject, own in zip(subjects[1:], others, strict=True):
        # In order: vectors of weights are compared value by value.
        for name in dict.fromkeys([*first, *own]):
            if first.get(name) != own.get(name):
                a, b = (f"is {found[name]}" if name in found else "does not exist" for found in (first, own))
                raise UserError(
                    f"shared: {name!r} {a} in {subjects[0].run.folder} and {b} in {subject.run.folder}; runs that "
                    "share a plane have the same parameters"
                )


# --- the picture ----------------------------------------------------------------------------------------------------


def write_landscapes(result: Landscapes, folder: Path) -> list[Path]:
    """Write landscape.json and landscape.png: contours with trajectories, and cuts through the centres."""
    from matplotlib.figure import Figure

    runs, count = result.runs, len(result.runs)
    columns = min(count, 3)
    rows, alone = -(-count // columns), count == 1
    figure = Figure(figsize=(11.5, 5.4) if alone else (4.6 * columns + 1, 4.7 * rows + 3.4), dpi=110)
    figure.set_layout_engine("constrained", h_pad=0.08)
    shape: dict[str, Any] = {"width_ratios": [1.3, 1]} if alone else {"height_ratios": [4.7 * rows, 3.4]}
    parts: Any = figure.subfigures(1, 2, **shape) if alone else figure.subfigures(2, 1, **shape)
    maps, lines = parts
    panels = maps.subplots(rows, columns, squeeze=False).ravel()
    levels, drawn = _levels(runs), None
    for axes, run in zip(panels, runs, strict=False):
        drawn = _map(axes, run, [one.name for one in runs], levels) or drawn
    for axes in panels[count:]:
        axes.set_axis_off()
    if drawn is not None:
        heights = levels.tolist()
        bar = maps.colorbar(drawn, ax=list(panels), shrink=0.9, pad=0.02, label="loss")
        bar.set_ticks(heights[::2], labels=[f"{height:.3g}" for height in heights[::2]])
    along = result.conditions["directions"] == "trajectory"
    maps.suptitle(
        "directions of the trajectory; 1 is its farthest coordinate"
        if along
        else "random directions; 1 is the length of each filter",
        fontsize="medium",
    )
    for direction, axes in enumerate(lines.subplots(2, 1) if alone else lines.subplots(1, 2)):
        _cut(axes, direction, runs, levels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    paths = [folder / "landscape.json", folder / "landscape.png"]
    files.write_json(paths[0], result.to_json())
    files.write_bytes(paths[1], buffer.getvalue())
    return paths


def _levels(runs: Sequence[Landscape]) -> Tensor:
    """Heights of contours for all runs together, float64: evenly spaced in the logarithm of the loss.

    Where losses are not all above 0 (likelihoods), in the logarithm of the loss above a base, which lies so far below
    the lowest that in no run more than 5 % of the values rise less than that.
    """
    grids = [torch.cat([run.loss.flatten(), run.cuts.flatten()]) for run in runs]
    grids = [values for grid in grids if len(values := grid[grid.isfinite()])]
    if not grids:
        return torch.linspace(0, 1, _LEVELS, dtype=torch.float64)
    low, high = (float(end) for end in torch.cat(grids).aminmax())
    step = low
    if low <= 0:
        step = max(1e-6 * max(1.0, -low), *(float((values - values.min()).quantile(0.05)) for values in grids))
    # A run that is far above the lowest has contours around its weights all the same.
    centres = [run.centre_loss - low + step for run in runs if math.isfinite(run.centre_loss)]
    top = min(high - low + step, max(_TOP * step, *(10 * centre for centre in centres), 0.0))
    top = max(top, step * (1 + 1e-6))  # a loss that is the same everywhere
    levels = low - step + torch.linspace(math.log(step), math.log(top), _LEVELS, dtype=torch.float64).exp()
    levels[0] -= 1e-9 * step  # the lowest loss is not below the first contour
    return levels


def _map(axes: Axes, run: Landscape, names: Sequence[str], levels: Tensor) -> ContourSet | None:
    """Draw the loss of one run of those with some names, and trajectories; None where no loss is finite."""
    from matplotlib.colors import BoundaryNorm
    from matplotlib.patheffects import withStroke

    end, drawn = float(run.axis[-1]), None
    if bool(run.loss.isfinite().any()):
        heights, steps = torch.where(run.loss.isfinite(), run.loss, math.nan).T.numpy(), levels.tolist()
        norm = BoundaryNorm(steps, 256, extend="max")
        drawn = axes.contourf(run.axis, run.axis, heights, steps, cmap="YlGnBu_r", norm=norm, extend="max")
        axes.contour(run.axis, run.axis, heights, steps, colors="black", linewidths=0.35, alpha=0.6)
    else:
        axes.text(0.5, 0.4, "no loss is finite", ha="center", transform=axes.transAxes)
    for one in run.trajectories:
        own = one.name == run.name
        axes.plot(
            *one.points.T,
            "o-",
            color=_colour(names.index(one.name)),
            markersize=4 if own else 3,
            linewidth=1.8 if own else 1,
            path_effects=[withStroke(linewidth=4 if own else 2.5, foreground="white")],
            zorder=4 if own else 3,
        )
    axes.plot(*run.centre, "*", color="gold", markersize=11, markeredgecolor="black", zorder=5)
    held = ["", ""] if run.shares is None else [f" ({share:.1%} of the squares)" for share in run.shares]
    axes.set(xlim=(-end, end), ylim=(-end, end), aspect="equal")
    axes.set(xlabel=f"a, along u{held[0]}", ylabel=f"b, along v{held[1]}")
    axes.locator_params(nbins=5)
    inside = [one.share for one in run.trajectories if one.name == run.name and one.share is not None]
    more = f"\n{inside[0]:.1%} of its trajectory in the plane" if inside and run.shares is not None else ""
    axes.set_title(f"{run.name}: loss {run.centre_loss:.4g}{more}", fontsize="medium")
    return drawn


def _cut(axes: Axes, direction: int, runs: Sequence[Landscape], levels: Tensor) -> None:
    """Draw the losses of all runs along u or v."""
    for index, run in enumerate(runs):
        heights = torch.where(run.cuts[direction].isfinite(), run.cuts[direction], math.nan)
        axes.plot(run.axis, heights, "o-", color=_colour(index), markersize=3, linewidth=1.4, label=run.name)
    heights = torch.cat([run.cuts.flatten() for run in runs])
    heights = heights[heights.isfinite()]
    # No higher than contours go: one run that explodes would press the others into a line.
    low, high = float(levels[0]), float(levels[-1])
    if len(heights) and float(heights.min()) < high:
        low, high = float(heights.min()), min(float(heights.max()), high)
    high = max(high, low + 1e-6 * max(1.0, abs(low)))
    if low > 0 and high > _DECADE * low:
        axes.set(yscale="log", ylim=(low / 1.2, high * 1.2))
    else:
        axes.set_ylim(low - (high - low) / 20, high + (high - low) / 20)
    axes.set(xlabel=f"distance from the weights along {'uv'[direction]}", ylabel="loss")
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.grid(alpha=0.3, which="both")
    if len(runs) > 1:
        axes.legend(fontsize="small")


def _colour(index: int) -> str:
    """Of a run, in maps and cuts: none that is in the map itself."""
    return _COLOURS[index % len(_COLOURS)]

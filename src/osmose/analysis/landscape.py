"""The loss around trained weights, on a plane through them (Li et al., arXiv 1712.09913).

For weights theta and two directions u and v of the weights' shape,

    L(theta + a u + b v) = mean over items of loss(item; theta + a u + b v)

on a grid of (a, b), always with the same items and the same noise, in evaluation mode. Which directions there are, and
what 1 means along them, is said in `analysis.planes`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from osmose.analysis.planes import (
    Plane,
    Subject,
    Trajectory,
    plane_of,
    put_vector,
    random_plane,
    require_same_parameters,
    require_trajectory,
    subject_of,
    trajectory_on,
)
from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws, seeded
from osmose.methods import COMPOSED, DISTILLED
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import Batch, OnStep
from osmose.training.run import Run

#: Where the plane comes from.
Directions = Literal["random", "trajectory"]

#: Radii, in units of the directions, and angles at which the rise of the loss is told.
RADII, _ANGLES = (0.25, 0.5, 1.0), 16
#: How far second differences reach, in units of the directions.
_STEP = 0.05
#: How much farther than the trajectory the grid reaches.
_MARGIN = 1.2

#: What the value of a method's loss does not say.
CAUTIONS = {
    "sct": "the loss of sct is the size of a normalised tangent: it does not say how well the model samples",
    "ect": "the target of ect moves with the weights: a low loss is agreement with itself, not with the data",
    "sngan": "the loss of sngan is the sum of two that play against each other: nothing descends on it",
}


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
        directions: random or trajectory (see `analysis.planes`).
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
            require_trajectory(subject)
    if shared:
        require_same_parameters(subjects)
        planes = [plane_of(subjects)] * len(subjects)
    else:
        planes = [plane_of([one]) if along else random_plane(one, seed) for one in subjects]
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
        subject: Subject,
        plane: Plane,
        axis: Tensor,
        drawn: Sequence[Subject],
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
        self.trajectories = tuple(trajectory_on(one, plane) for one in drawn)
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
            put_vector(model, theta + (a - self.centre[0]) * u + (b - self.centre[1]) * v)
            total = 0.0
            for first, batch in batches:
                stop = first + len(batch.x0)
                draws = StepDraws(self.seed, 0, first, stop, len(self.items), device).branch("landscape")
                total += float(model.loss(batch, draws).per_item.cpu().double().sum())
                done += 1
                report(done)
            losses[a, b] = total / len(self.items)
        seconds = time.perf_counter() - began
        put_vector(model, theta)

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
        batches = []
        for first in range(0, len(self.items), self.batch_size):
            rows = self.items[first : first + self.batch_size]
            batches.append((first, Batch.of(self.dataset, self.part, rows, model.config.conditional, device)))
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


def _subject(run: Run, name: str) -> Subject:
    """A run's weights, and those of its checkpoints.

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
    return subject_of(run, name)

"""Planes through the weights of trained runs, and where the trainings went on them.

All trained weights of a run are one vector theta (D,). A plane is theta + a u + b v for two directions u and v, as in
Li et al. (arXiv 1712.09913):

`random`      Gaussian, and each filter of them scaled to the norm of the same filter of theta: 1 moves every filter by
              as much as it is long, so that a network and the same function with other scales of its weights give one
              picture. A filter is a slice along the first axis of a parameter, or a whole parameter where the module
              says `filters = "whole"`. Parameters with fewer than two axes (biases, norms) do not move.
`trajectory`  the two principal directions of the run's checkpoints as seen from its final weights: of all planes
              through theta the one that holds most of sum_k ||theta_k - theta||^2. 1 is the farthest coordinate of a
              checkpoint.

Weights that are one function may be written in many ways. A module that has a method `canonical_()` brings its own into
one form, and is asked to before weights are compared or moved; one that has `align_(other)` brings those of a
checkpoint into the form that is nearest to the final ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from osmose.errors import UserError
from osmose.gaussian.draws import seeded
from osmose.methods.base import GenerativeModel
from osmose.training import files
from osmose.training.checkpoint import Checkpoints
from osmose.training.run import Run, load_weights

#: Checkpoints below which there is no plane of a trajectory worth the name.
_FEWEST = 3
#: Second variance, as a share of the first, below which checkpoints lie on a line.
_LINE = 1e-10
#: Values of a vector of weights that are taken to float64 together.
_CHUNK = 2**18


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
class Subject:
    """A run's model, all its trained weights as one vector, and where they were before.

    Attributes:
        run: the run.
        name: its own among those that are looked at together.
        model: a copy of its model that may be moved.
        theta: the final weights, (D,) on the CPU.
        steps: of the K checkpoints.
        path: weights of the checkpoints minus theta, (K, D).
        canonical: whether a part of the model was brought into a canonical form.
    """

    run: Run
    name: str
    model: GenerativeModel
    theta: Tensor
    steps: tuple[int, ...]
    path: Tensor
    canonical: bool


@dataclass(frozen=True)
class Plane:
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


def subject_of(run: Run, name: str) -> Subject:
    """Read a run's weights, and those of its checkpoints.

    Args:
        run: left as it is.
        name: what to call it.

    Raises:
        UserError: no parameters that are trained, or weights that cannot be read.
    """
    kind = run.config.method.kind
    run.require_real("has no weights that could be moved")
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
        _align(scratch, model)
        steps.append(int(checkpoint.name.removeprefix("step_")))
        path.append(_vector(scratch) - theta)
    rows = torch.stack(path) if path else theta.new_zeros(0, len(theta))
    return Subject(run, name, model, theta, tuple(steps), rows, canonical)


def _canonical(model: nn.Module) -> bool:
    """Bring every part that knows how to into its canonical form; whether there was one."""
    found: list[Callable[[], object] | None] = [getattr(module, "canonical_", None) for module in model.modules()]
    forms = [form for form in found if form is not None]
    with torch.no_grad():
        for form in forms:
            form()
    return bool(forms)


def _align(model: nn.Module, final: nn.Module) -> None:
    """Bring every part that knows how to into the form that is nearest to that of the final weights."""
    for own, known in zip(model.modules(), final.modules(), strict=True):
        if (align := getattr(own, "align_", None)) is not None:
            with torch.no_grad():
                align(known)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _vector(model: nn.Module) -> Tensor:
    """All trained parameters, one after the other, (D,)."""
    return torch.cat([parameter.detach().flatten() for parameter in _trained(model)])


def put_vector(model: nn.Module, vector: Tensor) -> None:
    """Give a model other trained parameters, all one after the other, (D,); under `torch.no_grad`."""
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


def random_plane(subject: Subject, seed: int) -> Plane:
    """The plane of two filter-normalised directions through the final weights.

    Raises:
        UserError: no filter to move.
    """
    u, v = (filter_direction(subject.model, seeded(seed, "landscape", axis)) for axis in "uv")
    if not bool(u.any() and v.any()):
        raise UserError(
            f"{subject.run.folder}: no weights with two axes or more that are not 0, so there is no filter to move; "
            "use directions trajectory"
        )
    return Plane(subject.theta, u, v)


def plane_of(subjects: Sequence[Subject]) -> Plane:
    """The plane of most squares through the mean of the final weights: of one run, through these themselves.

    Raises:
        UserError: checkpoints that span no plane.
    """
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
    return Plane(origin, u, v, (first, second))


def _from(origin: Tensor, subject: Subject) -> Tensor:
    """Weights of the checkpoints and the final ones, minus the origin, (K + 1, D)."""
    offset = subject.theta - origin
    return torch.cat([subject.path + offset, offset[None]])


def trajectory_on(subject: Subject, plane: Plane) -> Trajectory:
    """Where the checkpoints and the final weights of a run lie on a plane."""
    points, _ = plane.coordinates(_from(plane.origin, subject))
    return Trajectory(subject.name, subject.steps, points, plane.coordinates(subject.path)[1])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows (K, D) and (M, D), float64 (K, M), without a copy of all in float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for first in range(0, left.shape[1], _CHUNK):
        part = slice(first, first + _CHUNK)
        total += left[:, part].double() @ right[:, part].double().T
    return total


def require_trajectory(subject: Subject) -> None:
    """Refuse a run with too few checkpoints for a plane of its trajectory."""
    if len(subject.steps) < _FEWEST:
        raise UserError(
            f"{subject.run.folder}: has {len(subject.steps)} checkpoint{'' if len(subject.steps) == 1 else 's'}, and a "
            f"trajectory needs {_FEWEST} or more; train with training.keep_checkpoints=20 (and "
            "training.checkpoint_every), or use directions random"
        )


def require_same_parameters(subjects: Sequence[Subject]) -> None:
    """Refuse runs whose trained parameters differ in names, order or shapes."""
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

r"""A functional tensor train: a network of small cores over basis functions.

For coordinates z_1..z_K of the input, a feature s of the time and functions phi_i of each,

    f(z, s) = M_1(z_1) ... M_h(z_h) M(s) M_{h+1}(z_{h+1}) ... M_K(z_K),   M_k(z) = sum_i G_k[:, i, :] phi_i(z),

rows times matrices times a column: sum_k r_{k-1} m_k r_k parameters, and as many multiply-adds for one item. Time is a
mode of its own in the middle (next to it the class, where the network is told one), from where it is nearest to all
coordinates. What there is to say is a vector, one value for each coordinate, by one of

`potential`  one scalar train psi; the output is its gradient in x: a conservative field, as every score is one
`block`      one train whose core in the middle carries the index of the output
`separate`   a train for each value

and the train learns only what is left of the best linear prediction (`networks.calibration`). Coordinates are values of
the input, or its principal components, each divided by its deviation at the time: bases of a fixed measure fit at every
noise level then. Of more values than components, the others have the linear prediction alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from osmose.errors import UserError
from osmose.networks.base import NetworkConfig, Noting
from osmose.networks.bases import Basis, BasisName, basis
from osmose.networks.calibration import Calibration
from osmose.networks.trains import (
    Cores,
    largest_ranks,
    matrices,
    orthogonalized,
    products_left,
    products_right,
    rounded,
    times_left,
    times_right,
)

#: Rank of all bonds where nothing is said.
_RANK = 8
#: Principal components that an image has where nothing is said.
_COMPONENTS = 16
#: Numbers that an evaluation without gradient holds at a time, at most.
_MOST = 2**23
#: Size of the train at the start, as a share of what it could be: nearly 0, but on the manifold of its ranks.
_START = 0.01
#: Norm of the random part of a core at the start, beside the identity; in trains of more cores than `_SHORT` it falls
#: with the root of their number, so that the whole stays as nearly constant.
_RANDOM, _SHORT = 0.3, 9

#: Share of values outside the domain that is worth a word.
_OUTSIDE = 0.01

Output = Literal["potential", "block", "separate"]


class TensorTrainConfig(NetworkConfig):
    """Functional tensor train, added to the best linear prediction."""

    kind: Literal["tensor-train"] = "tensor-train"
    output: Output = Field(
        "potential", description="gradient of one scalar train, one train with a block core, or a train for each value"
    )
    rank: int | tuple[int, ...] | None = Field(
        None,
        description="of all bonds, less where a mode allows less; or of each bond, exactly, left to right; null: 8",
    )
    degree: int | tuple[int, ...] = Field(16, description="of the functions of all coordinates, or of each")
    basis: BasisName = Field("legendre", description="legendre, hermite, chebyshev, b-spline or fourier")
    domain: float = Field(
        4.0, gt=0, description="deviations up to which functions reach; beyond they are constant (fourier: periodic)"
    )
    time_degree: int = Field(5, ge=1, description="of the Legendre polynomials of time, a feature of the log-SNR")
    coordinates: int | None = Field(
        None, ge=2, description="principal components; null: the values as they are, or of images up to 16 components"
    )

    def build(self, event_shape: tuple[int, ...], *, num_classes: int | None = None, num_outputs: int = 1) -> nn.Module:
        return TensorTrain(self, event_shape, num_classes, num_outputs)

    def table(self, event_shape: tuple[int, ...]) -> list[dict[str, Any]]:
        return TensorTrain(self, event_shape).table()


class Prepared(NamedTuple):
    """An input, ready for the train.

    Attributes:
        features: of each mode in order, (B, m) each.
        slopes: of each mode the derivatives of its functions by the coordinate's value, None without `potential` and
            for modes that are no coordinates.
        linear: the best linear prediction, (B, D).
    """

    features: list[Tensor]
    slopes: list[Tensor | None]
    linear: Tensor


class TensorTrain(nn.Module, Noting):
    """See `TensorTrainConfig`.

    Attributes:
        cores: of the modes in order, (C, r, n, s) each: C trains side by side, n functions (times values of a block).
        dimension: D, values of an event.
        count: K, coordinates and values of what the train says.
        middle: the place of the mode of time.
        bonds: effective ranks; what lies beyond them in the cores is 0, and not computed with.
        last: values of coordinates that lay outside the domain in the last evaluation, and values in all.
        beyond: the same of all evaluations since `noted` was called.
    """

    #: How a direction in the space of the weights is scaled (`analysis.planes`): core by core.
    filters: ClassVar[str] = "whole"

    bonds: Tensor

    def __init__(
        self,
        config: TensorTrainConfig,
        event_shape: tuple[int, ...],
        num_classes: int | None = None,
        num_outputs: int = 1,
    ):
        super().__init__()
        if num_outputs != 1:
            raise UserError(
                "network: tensor-train has no second output for a learned variance; use method ddpm or edm, or "
                "variance=fixed_small"
            )
        self.config, self.event_shape = config, tuple(event_shape)
        self.dimension = dimension = math.prod(event_shape)
        self.count, self.principal = _coordinates(config, self.event_shape)
        self.blocks = config.output == "block"
        half = self.count // 2
        self.middle = half + bool(num_classes)
        self.num_classes = num_classes
        degrees = _each("degree", config.degree, self.count, "coordinate")
        self.degrees = degrees
        self.bases = nn.ModuleDict({str(d): basis(config.basis, d + 1, config.domain) for d in sorted(set(degrees))})
        self.time_basis = basis("legendre", config.time_degree + 1, 1.0)
        sizes = [degree + 1 for degree in degrees]
        time = (config.time_degree + 1) * (self.count if self.blocks else 1)
        sizes[half:half] = [*([num_classes] if num_classes else []), time]
        bonds = _ranks(config.rank, sizes)
        trains = self.count if config.output == "separate" else 1
        edges = [1, *bonds, 1]
        self.cores = nn.ParameterList(
            nn.Parameter(torch.randn(trains, edges[k], size, edges[k + 1])) for k, size in enumerate(sizes)
        )
        self.register_buffer("bonds", torch.tensor(bonds))
        self._bonds: list[int] = bonds
        self.register_load_state_dict_post_hook(lambda module, _: module._note_bonds())
        self.calibration = Calibration(dimension)
        self._replaced: Cores | None = None
        self.last: list[Any] = [0, 0]
        self.beyond: list[Any] = [0, 0]
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Small; every core nearly the identity of its ranks, whatever its coordinate, with a random part of it.

        Then each channel of the ranks carries what it has been told along the whole train, and functions of few
        coordinates are learned at once, however many modes lie between them. Were all channels but the first random,
        a long train would be a random product of functions of all coordinates, whose gradients vanish.
        """
        share = _RANDOM * min(1.0, math.sqrt(_SHORT / len(self.cores)))
        for place, core in enumerate(self.cores):
            core.mul_(share / math.sqrt(core.shape[1] * core.shape[2]))
            if place != self.middle:  # the first function is 1, but of classes it is their sum
                ones = torch.eye(core.shape[1], core.shape[3])[:, None]
                core[:, :, : core.shape[2] if self.is_class(place) else 1] += ones
        made = orthogonalized(list(self.cores), self.middle)
        made[self.middle] = made[self.middle] * (_START / made[self.middle].flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        self.set_trains(made)

    def mode_names(self) -> list[str]:
        """What each mode is a function of."""
        kind = "component" if self.principal else "value"
        names = [f"{kind} {k + 1}" for k in range(self.count)]
        half = self.count // 2
        names[half:half] = [*(["class"] if self.num_classes else []), "time" + (", values" if self.blocks else "")]
        return names

    def table(self) -> list[dict[str, Any]]:
        """The modes with their effective ranks, as `NetworkConfig.table`."""
        return [
            {
                "mode": name,
                "functions": core.shape[2] // (self.count if self.blocks and place == self.middle else 1),
                "rank_left": core.shape[1],
                "rank_right": core.shape[3],
                "trains": core.shape[0],
                "parameters": core.numel(),
            }
            for place, (name, core) in enumerate(zip(self.mode_names(), self.trains(), strict=True))
        ]

    def _note_bonds(self) -> None:
        self._bonds = [int(bond) for bond in self.bonds.tolist()]

    def trains(self) -> Cores:
        """The cores at their effective ranks."""
        if self._replaced is not None:
            return self._replaced
        edges = [1, *self._bonds, 1]
        return [core[:, : edges[k], :, : edges[k + 1]] for k, core in enumerate(self.cores)]

    @torch.no_grad()
    def set_trains(self, cores: Sequence[Tensor]) -> None:
        """Put in other cores, whose ranks may be smaller: the effective ranks are then theirs."""
        for own, new in zip(self.cores, [core.clone() for core in cores], strict=True):  # they may be our own
            own.zero_()
            own[:, : new.shape[1], :, : new.shape[3]] = new
        self.bonds.copy_(torch.tensor([core.shape[3] for core in cores[:-1]]))
        self._note_bonds()

    @contextlib.contextmanager
    def replaced(self, cores: Sequence[Tensor]) -> Iterator[None]:
        """Evaluate with other cores inside, of any ranks."""
        self._replaced = list(cores)
        try:
            yield
        finally:
            self._replaced = None

    def canonical_(self) -> None:
        """The same function in the one gauge that does not depend on how it was found: to compare weights in."""
        self.set_trains(rounded([core.detach() for core in self.trains()], self._bonds))

    def align_(self, other: TensorTrain) -> None:
        """The same function in the gauge that is nearest to the canonical one of another: bond by bond a rotation.

        Canonical forms of nearly equal trains may differ in signs and in the order of nearly equal singular values.
        """
        last = len(self.cores) - 1
        own, known = (orthogonalized([core.detach() for core in n.trains()], last) for n in (self, other))
        for k in range(last):
            if own[k].shape != known[k].shape:
                return  # other ranks: nothing to be near to
            a, b = (core.flatten(1, 2) for core in (own[k], known[k]))
            u, _, v = torch.linalg.svd(a.transpose(1, 2) @ b)  # orthogonal Procrustes
            own[k], own[k + 1] = times_right(own[k], u @ v), times_left((u @ v).transpose(1, 2), own[k + 1])
        self.set_trains(own)

    def macs(self) -> int:
        """Multiply-adds of the matrix products of one evaluation of one item: C r m s for each mode.

        A potential has the slopes of its coordinates besides. D^2 twice is the linear prediction.
        """
        twice = self.config.output == "potential"
        modes = sum(core.numel() * (1 + (twice and self.is_coordinate(k))) for k, core in enumerate(self.trains()))
        return modes + 2 * self.dimension * (self.dimension + self.principal * self.count)

    def elementwise(self) -> int:
        """Multiply-adds of one evaluation of one item beside them: the products of the matrices, C r s for each mode.

        A potential has them from both sides, and those around each slope. The functions themselves are left out.
        """
        cores = self.trains()
        chain = [core.shape[0] * core.shape[1] * core.shape[3] for core in cores]
        if self.blocks:
            _, r, n, s = cores[self.middle].shape
            return sum(chain) - chain[self.middle] + r * (n // self.count) + self.count * s
        if self.config.output == "separate":
            return sum(chain)
        around = sum(chain[k] + cores[k].shape[1] for k in range(len(cores)) if self.is_coordinate(k))
        return sum(chain[:-1]) + sum(chain[1:]) + around

    def is_class(self, place: int) -> bool:
        """Whether a mode is that of the class."""
        return self.num_classes is not None and place == self.middle - 1

    def is_coordinate(self, place: int) -> bool:
        """Whether a mode is one of the coordinates."""
        return place < self.count // 2 or place > self.middle

    def noted(self) -> dict[str, float]:
        """`outside`: the share of the last evaluation's values that lay outside the domain."""
        (outside, seen), self.last, self.beyond = self.last, [0, 0], [0, 0]
        return {"outside": float(outside) / seen} if seen else {}

    def complaint(self) -> str | None:
        outside, seen = self.beyond
        if not seen or float(outside) / seen <= _OUTSIDE:
            return None
        return (
            f"network.domain: {float(outside) / seen:.1%} of the values lie beyond {self.config.domain:g} deviations, "
            f"where functions {'repeat' if self.config.basis == 'fourier' else 'are constant'}; train with a larger "
            "network.domain to cover them"
        )

    def prepared(self, x: Tensor, label: Tensor, condition: Tensor | None) -> Prepared:
        """The functions of each mode at an input x (B, *event), label (B,), condition (B,) or None."""
        law, flat = self.calibration, x.flatten(1).to(self.cores[0].dtype)
        levels = law.at(label)
        centred = law.centred(flat, levels)
        if self.principal:
            coordinates, items = centred @ law.axes[:, : self.count], law.spread[: self.count]
        else:
            coordinates, items = centred, law.axes.square() @ law.spread
        deviation = law.variances(levels, items).clamp(min=1e-12).sqrt()
        z = coordinates / deviation
        self._count(z)
        potential = self.config.output == "potential"
        columns: list[Tensor | None] = [None] * self.count
        slopes: list[Tensor | None] = [None] * self.count
        for degree in sorted(set(self.degrees)):
            places = [k for k, own in enumerate(self.degrees) if own == degree]
            own = z if len(places) == self.count else z[:, places]
            if potential:
                values, slope = cast(Basis, self.bases[str(degree)]).with_slope(own)
                slope = slope / (deviation if len(places) == self.count else deviation[:, places])[..., None]
                for k, column in zip(places, slope.unbind(1), strict=True):
                    slopes[k] = column
            else:
                values = self.bases[str(degree)](own)
            for k, column in zip(places, values.unbind(1), strict=True):
                columns[k] = column
        features = [column for column in columns if column is not None]
        half = self.count // 2
        between = [self.time_basis(levels.time[:, 0].clamp(-1, 1))]
        if self.num_classes:
            told = torch.full((len(x), self.num_classes), 1 / self.num_classes, dtype=flat.dtype, device=x.device)
            if condition is not None:
                told = nn.functional.one_hot(condition, self.num_classes).to(flat.dtype)
            between.insert(0, told)
        features[half:half] = between
        slopes[half:half] = [None] * len(between)
        return Prepared(features, slopes, law.predicted(centred, levels))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`, but for the counting, which would be compiled anew for every count."""
        # Here and not as a decorator, which imports the compiler: seconds, for everyone who imports this file.
        self._count = torch.compiler.disable(self._count)  # type: ignore[method-assign]
        super().compile(*args, **kwargs)

    @torch.no_grad()
    def _count(self, z: Tensor) -> None:
        """Note how many values lie outside the domain."""
        outside: Any = (z.detach().abs() > self.config.domain).sum()
        if z.device.type == "cpu":  # elsewhere a number would have to be waited for
            outside = int(outside)
        self.last = [self.last[0] + outside, self.last[1] + z.numel()]
        self.beyond = [self.beyond[0] + outside, self.beyond[1] + z.numel()]

    def read(self, parts: Prepared) -> Tensor:
        """The train at prepared inputs, (B, K)."""
        cores = self.trains()
        if self.config.output == "potential":
            return _gradient(cores, parts.features, parts.slopes)
        if self.blocks:
            return _block(cores, parts.features, self.middle, self.count)
        return products_right(matrices(cores, parts.features))[-1][:, 0].T

    def placed(self, read: Tensor) -> Tensor:
        """The train's values (B, K) as values of the output, (B, D)."""
        return read @ self.calibration.axes[:, : self.count].T if self.principal else read

    def taken(self, output: Tensor) -> Tensor:
        """The transpose of `placed`, (B, D) to (B, K): what of a target the train can say."""
        return output @ self.calibration.axes[:, : self.count] if self.principal else output

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """X (B, *event), label (B,), condition (B,) or None -> (B, *event)."""
        if tuple(x.shape[1:]) != self.event_shape or label.shape != x.shape[:1]:
            raise UserError(
                f"network: built for events {self.event_shape} with one label each; "
                f"{tuple(x.shape)} with labels {tuple(label.shape)} given"
            )
        self.last = [0, 0]
        rows = max(1, _MOST // self._widest())
        # In half precision a product of many matrices loses too many digits.
        with torch.autocast(x.device.type, enabled=False):
            if len(x) <= rows:
                out = self._answer(x, label, condition)
            else:  # a part at a time, which is computed once more for the backward pass: memory does not grow
                parts = zip(
                    x.split(rows),
                    label.split(rows),
                    itertools.repeat(None) if condition is None else condition.split(rows),
                    strict=False,
                )
                out = torch.cat([checkpoint(self._answer, *part, use_reentrant=False) for part in parts])
        return out.to(x.dtype).unflatten(1, self.event_shape)

    def _answer(self, x: Tensor, label: Tensor, condition: Tensor | None) -> Tensor:
        parts = self.prepared(x, label, condition)
        return parts.linear + self.placed(self.read(parts))

    def _widest(self) -> int:
        """The numbers of one item that are held at once, about."""
        cores = self.trains()
        held = sum(core.shape[2] + core.shape[0] * core.shape[1] * core.shape[3] for core in cores)
        return 2 * held if self.config.output == "potential" else held


def _gradient(cores: Cores, features: list[Tensor], slopes: list[Tensor | None]) -> Tensor:
    """The derivatives of a scalar train by its coordinates, (B, K)."""
    B, coordinates = len(features[0]), [k for k, slope in enumerate(slopes) if slope is not None]
    both = [f if slope is None else torch.cat([f, slope]) for f, slope in zip(features, slopes, strict=True)]
    found = matrices(cores, both)
    values = [matrix[..., :B] for matrix in found]
    rows, columns = products_right(values[:-1]), products_left(values[1:])
    # The matrices at the ends are of another form than the rest: the ranks there are 1.
    forms: dict[torch.Size, list[int]] = {}
    for k in coordinates:
        forms.setdefault(found[k].shape, []).append(k)
    derivatives: dict[int, Tensor] = {}
    for places in forms.values():
        changed = torch.stack([found[k][0, ..., B:] for k in places])  # (g, r, s, B)
        after = (changed * torch.stack([columns[k][0] for k in places])[:, None]).sum(2)
        derivative = (torch.stack([rows[k][0] for k in places]) * after).sum(1)
        derivatives |= dict(zip(places, derivative.unbind(0), strict=True))
    return torch.stack([derivatives[k] for k in coordinates], 1)


def _block(cores: Cores, features: list[Tensor], middle: int, count: int) -> Tensor:
    """A train whose core in the middle has one more index, that of the output: (B, count)."""
    others = [k for k in range(len(cores)) if k != middle]
    found = matrices([cores[k] for k in others], [features[k] for k in others])
    left, right = products_right(found[:middle])[-1][0], products_left(found[middle:])[0][0]
    core = cores[middle]
    _, r, n, s = core.shape
    m = n // count
    joint = (left[:, None] * features[middle].T[None]).flatten(0, 1)
    values = core.reshape(r * m, count * s).T @ joint
    return (values.unflatten(0, (count, s)) * right).sum(1).T


def _coordinates(config: TensorTrainConfig, event_shape: tuple[int, ...]) -> tuple[int, bool]:
    """How many coordinates there are, and whether they are principal components."""
    dimension = math.prod(event_shape)
    if dimension < 2:
        raise UserError(f"network: a tensor train needs at least 2 coordinates; events of shape {event_shape} have 1")
    wanted = config.coordinates
    if wanted is None:
        return (dimension, False) if len(event_shape) == 1 else (min(dimension, _COMPONENTS), True)
    if wanted > dimension:
        raise UserError(f"network.coordinates: {wanted} is more than the {dimension} values of an event")
    return wanted, True


def _each(name: str, value: int | tuple[int, ...], count: int, of: str) -> list[int]:
    """One number for each of `count`."""
    numbers = [value] * count if isinstance(value, int) else list(value)
    if len(numbers) != count:
        raise UserError(f"network.{name}: {len(numbers)} numbers for {count}; give one for each {of}, or one for all")
    if min(numbers) < 1:
        raise UserError(f"network.{name}: {min(numbers)} is not valid: must be at least 1")
    return numbers


def _ranks(rank: int | tuple[int, ...] | None, sizes: list[int]) -> list[int]:
    """The rank of each bond.

    Raises:
        UserError: more than a mode allows.
    """
    most = largest_ranks(sizes)
    if rank is None:
        return [min(_RANK, own) for own in most]
    numbers = _each("rank", rank, len(most), "bond")
    if isinstance(rank, int):
        if rank > max(most):
            raise UserError(
                f"network.rank: {rank} is more than any bond allows; at most {max(most)} with these degrees"
            )
        return [min(rank, own) for own in most]
    for k, (own, limit) in enumerate(zip(numbers, most, strict=True)):
        before, after = ([1, *numbers][k] * sizes[k], [*numbers, 1][k + 1] * sizes[k + 1])
        if own > min(limit, before, after):
            raise UserError(
                f"network.rank: {own} of bond {k + 1} is more than its modes allow; at most {min(limit, before, after)}"
            )
    return numbers

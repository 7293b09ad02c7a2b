r"""Alternating least squares for a functional tensor train.

With all cores but one fixed, the train is linear in that core G, and the loss

    mean_n w_n / D |J_n G - y_n|^2 + lambda |G|^2,    J_n = L_n (x) phi_n (x) R_n,

L and R the products of the cores on its left and right at item n, is solved for exactly; then the next core is taken,
to the right end and back to the left. With the cores on the left left-orthogonal and those on the right
right-orthogonal, |G| is the norm of the whole train: lambda means the same for every core, and within a sweep nothing
that is solved for raises the regularised loss.

One step is such a sweep, there and back, over one batch with one draw of times and noise; the next has a fresh one.
What a core is solved for fits this batch, so a batch should have many times as many values as a core has parameters,
and the learning rate, which is the share of the way to the solution that is gone, should fall over the sweeps: the
result is then an average over their batches. `lambda` falls as well, from `ridge` by `ridge_decay` a sweep.

The normal equations are summed over the micro-batches in float64: memory for them does not grow with the batch. All
values of the output at once are J^T J = sum (L L^T) (x) (phi phi^T) (x) (R R^T) for each item, three symmetric matrices
of which only the upper triangles are multiplied: an eighth of the work.

With a `tolerance` ranks are adapted: on the way to the right each bond gets `grow` random directions, up to
network.rank, in which the next core is solved as well, and on the way back singular values are dropped as long as
together they are below that share of the norm (arXiv 1109.2956 for the idea of two bases, 1304.1222 for enrichment).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from osmose.errors import UserError
from osmose.gaussian.draws import seeded
from osmose.networks.tensor_train import Prepared, TensorTrain
from osmose.networks.trains import (
    Cores,
    orthogonalized,
    split_left,
    split_right,
    step_left,
    step_right,
    times_left,
    times_right,
)
from osmose.training.optimizers import Optimizer, TrainOptimizerConfig, Work, only_train

if TYPE_CHECKING:
    from osmose.training.config import TrainingConfig

#: Unknowns of a core beyond which their normal equations are no longer solved in passing.
_MOST_UNKNOWNS = 8192
#: Coordinates above which people should know what a sweep takes.
_MANY_COORDINATES = 32
#: Numbers that a part of a batch may take while its products are summed.
_MOST = 2**18
#: Numbers of a whole batch's functions that are kept from core to core; more are computed anew.
_KEPT = 2**26


class ALSConfig(TrainOptimizerConfig):
    """Alternating least squares; a step of training is a sweep over all cores, there and back."""

    kind: Literal["als"] = "als"
    ridge: float = Field(1e-2, gt=0, description="lambda of the first sweep")
    ridge_decay: float = Field(0.5, gt=0, le=1, description="factor of lambda from sweep to sweep")
    ridge_min: float = Field(1e-3, gt=0, description="lambda does not fall below")
    tolerance: float | None = Field(
        None, gt=0, lt=1, description="adapt ranks: the share of the norm that cutting a bond may lose; null: keep them"
    )
    grow: int = Field(1, ge=1, description="random directions that a bond gets in each sweep while ranks are adapted")

    @classmethod
    def training_recipe(cls) -> dict[str, Any]:
        often = {"log_every": 1, "validate_every": 1, "checkpoint_every": 1, "preview_every": 5}
        return super().training_recipe() | {"steps": 10, "batch_size": 16384, "accumulate": 4} | often

    def check(self, training: TrainingConfig) -> None:
        super().check(training)
        if training.lr > 1:
            raise UserError(f"training.lr: {training.lr:g} is not valid with optimizer als: it is a share, at most 1")

    def build(self, model: nn.Module, training: TrainingConfig) -> ALS:  # noqa: ARG002
        return ALS(self, only_train(self.kind, model))


class Part(NamedTuple):
    """Some items of a batch: their functions in float64, targets (B, K) and weights (B,)."""

    features: list[Tensor]
    slopes: list[Tensor | None]
    target: Tensor
    weight: Tensor

    @property
    def numbers(self) -> int:
        """How many it holds."""
        held = [*self.features, *(slope for slope in self.slopes if slope is not None), self.target]
        return sum(tensor.numel() for tensor in held)


class ALS(Optimizer):
    """See `ALSConfig`.

    Attributes:
        sweeps: how many have been made, int64.
    """

    by_gradient: ClassVar[bool] = False

    def __init__(self, config: ALSConfig, network: TensorTrain):
        self.config, self.network = config, network
        self.sweeps = torch.zeros((), dtype=torch.int64)
        self.most = [core.shape[3] for core in network.cores[:-1]]
        if network.count > _MANY_COORDINATES:
            warnings.warn(
                f"training.optimizer: a sweep of als over {network.count} coordinates takes minutes to hours (with the "
                "square of their number), and stops only at its end; riemannian is faster",
                stacklevel=2,
            )
        blocks = network.count if network.blocks else 1
        for k, core in enumerate(network.cores):
            unknowns = core[0].numel() // (blocks if k == network.middle else 1)
            if unknowns > _MOST_UNKNOWNS:
                raise UserError(
                    f"training.optimizer: als would solve for the {unknowns} numbers of core {k + 1} at once; at most "
                    f"{_MOST_UNKNOWNS}: lower network.rank or network.degree, or use riemannian"
                )

    def tensors(self) -> dict[str, Tensor]:
        return {"sweeps": self.sweeps}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.sweeps = tensors["sweeps"]

    @torch.no_grad()
    def advance(self, lr: float, work: Work) -> dict[str, float]:
        config, last = self.config, len(self.network.cores) - 1
        ridge = max(config.ridge * config.ridge_decay ** int(self.sweeps), config.ridge_min)
        solver = Solver(self.network, work, ridge)
        cores = orthogonalized([core.double() for core in self.network.trains()], 0)
        noise = seeded(work.seed, "enrichment", int(self.sweeps))
        for k in range(last):
            cores[k] = torch.lerp(cores[k], solver.solved(cores, k), lr)
            cores[k], cores[k + 1] = self._to_the_right(cores[k], cores[k + 1], self.most[k], noise)
        for k in range(last, 0, -1):
            cores[k] = torch.lerp(cores[k], solver.solved(cores, k), lr)
            cores[k - 1], cores[k] = self._to_the_left(cores[k - 1], cores[k])
        cores[0] = torch.lerp(cores[0], solver.solved(cores, 0), lr)
        self.network.set_trains(orthogonalized(cores, last))
        self.sweeps += 1
        told = {"loss_after": work.loss(), "ridge": solver.largest_ridge, "solves": float(2 * last + 1)}
        told["singular"] = float(solver.singular)
        return told | ({} if config.tolerance is None else {"rank": float(self.network.bonds.max())})

    def _to_the_right(self, core: Tensor, after: Tensor, most: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Make a core left-orthogonal, what is left over going into the next; a grown bond changes no value."""
        q, rest = split_right(core)
        after = times_left(rest, after)
        C, r, n, s = q.shape
        more = 0 if self.config.tolerance is None else min(self.config.grow, most - s, r * n - s)
        if more > 0:
            own = q.reshape(C, r * n, s)
            new = torch.randn(C, r * n, more, generator=noise, dtype=torch.float64).to(q.device)
            both, _ = torch.linalg.qr(torch.cat([own, new - own @ (own.transpose(1, 2) @ new)], 2))
            q = torch.cat([own, both[:, :, s:]], 2).reshape(C, r, n, s + more)
            after = torch.cat([after, after.new_zeros(C, more, *after.shape[2:])], 1)
        return q, after

    def _to_the_left(self, before: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        """Make a core right-orthogonal, what is left over going into the one before; cut the bond to the tolerance."""
        if self.config.tolerance is None:
            core, rest = split_left(core)
            return times_right(before, rest), core
        C, r, n, s = core.shape
        u, value, v = torch.linalg.svd(core.reshape(C, r, n * s), full_matrices=False)
        tails = value.square().flip(1).cumsum(1).flip(1)  # what is lost by keeping so many
        lost = (tails / tails[:, :1].clamp(min=torch.finfo(tails.dtype).tiny)).amax(0)
        keep = max(1, int((lost > self.config.tolerance**2).sum()))
        before = times_right(before, u[:, :, :keep] * value[:, None, :keep])
        return before, v[:, :keep].reshape(C, keep, n, s)


class Solver:
    """Solves the normal equations of one core after another on one batch.

    Attributes:
        largest_ridge: the largest lambda that was needed.
        singular: how many of the systems had no single solution but for lambda.
    """

    def __init__(self, network: TensorTrain, work: Work, ridge: float):
        self.network, self.work, self.ridge, self.largest_ridge, self.singular = network, work, ridge, ridge, 0
        self._kept: list[Part] = []
        held = 0
        for part in self._fresh():
            self._kept.append(part)
            held += part.numbers
            if held > _KEPT:
                self._kept = []
                break

    def parts(self) -> Iterator[Part]:
        """The batch of this process, a micro-batch at a time."""
        return iter(self._kept) if self._kept else self._fresh()

    def _fresh(self) -> Iterator[Part]:
        for regression in self.work.regressions():
            assert regression.network is self.network, "only_train found another"
            ready: Prepared = self.network.prepared(regression.x, regression.label, regression.condition)
            target = self.network.taken(regression.target.flatten(1) - ready.linear)
            yield Part(
                [features.double() for features in ready.features],
                [None if slope is None else slope.double() for slope in ready.slopes],
                target.double(),
                regression.weight.double(),
            )

    def solved(self, cores: Cores, k: int) -> Tensor:
        """The core k that is best with the others as they are, (C, r, n, s)."""
        gram, right, items = self.equations(cores, k)
        gram, right = gram / items, right / items
        if not bool(gram.isfinite().all() and right.isfinite().all()):  # no lambda would be large enough
            raise RuntimeError(f"the normal equations of core {k + 1} are not finite")
        self.singular += _singular(gram)
        ridge, eye = self.ridge, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        while True:
            factor, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
            if not bool(failed.any()):
                break
            ridge *= 10
        if ridge > self.largest_ridge:
            self.largest_ridge = ridge
            warnings.warn(
                f"training.optimizer.ridge: the normal equations of core {k + 1} are singular at {self.ridge:.3g}; "
                f"solved with {ridge:.3g}",
                stacklevel=2,
            )
        found = torch.cholesky_solve(right, factor)
        C, r, n, s = cores[k].shape
        if (
            k == self.network.middle and self.network.blocks
        ):  # (r m s, K): the output's index goes beside the function's
            values = found.shape[2]
            return found.reshape(C, r, n // values, s, values).transpose(3, 4).reshape(C, r, n, s)
        return found.reshape(C, r, n, s)

    def equations(self, cores: Cores, k: int) -> tuple[Tensor, Tensor, float]:
        """J^T W J (C, P, P) and J^T W y (C, P, Q) of core k, P = r m s, summed over all items; sum of items times D.

        Q is 1, or of the core of a block that carries the output the number of its values.
        """
        C, r, n, s = cores[k].shape
        block = k == self.network.middle and self.network.blocks
        values = self.network.count if block else 1
        m = n // values
        gram = cores[k].new_zeros(C, packed_size(r) * packed_size(m), packed_size(s))
        right = cores[k].new_zeros(C, r * m, s * values)
        items = cores[k].new_zeros(1)
        rows = max(1, _MOST // (packed_size(r) * packed_size(m)))
        for part in self.parts():
            items += len(part.weight) * self.network.dimension
            for start in range(0, len(part.weight), rows):
                some = slice(start, start + rows)
                cut = Part(
                    [f[some] for f in part.features],
                    [None if f is None else f[some] for f in part.slopes],
                    part.target[some],
                    part.weight[some],
                )
                self._sum(cores, k, cut, gram, right)
        whole = unpacked(self.work.summed(gram), r, m, s)
        right = self.work.summed(right).reshape(C, r * m * s, values)
        return whole, right, float(self.work.summed(items))

    def _sum(self, cores: Cores, k: int, part: Part, gram: Tensor, right: Tensor) -> None:
        """Add what some items have to say."""
        network, phi, y = self.network, part.features[k], part.weight[:, None] * part.target
        left_value, left_each, right_value, right_each = interfaces(network, cores, part, k)
        weight, functions = part.weight[:, None], packed(phi)
        if network.config.output == "separate":
            for c in range(len(gram)):
                L, R = left_value[c], right_value[c]
                gram[c] += crossed(packed(L) * weight, functions).T @ packed(R)
                right[c] += crossed(y[:, c : c + 1] * L, phi).T @ R
            return
        L, R, own = left_value[0], right_value[0], part.slopes[k]
        plain = crossed(L, phi)
        if network.blocks and k == network.middle:
            gram[0] += crossed(packed(L) * weight, functions).T @ packed(R)
            # What follows the function's index in a core is s first here, and the value of the output after it.
            right[0] += plain.T @ crossed(R, y)
        elif network.blocks and k < network.middle:
            Rs = right_each[0]
            gram[0] += crossed(packed(L) * weight, functions).T @ packed(Rs)
            right[0] += plain.T @ torch.einsum("bk,bks->bs", y, Rs)
        elif network.blocks:
            Ls = left_each[0]
            gram[0] += crossed(packed(Ls) * weight, functions).T @ packed(R)
            right[0] += crossed(torch.einsum("bk,bkr->br", y, Ls), phi).T @ R
        else:
            # A potential: value j of the output is the train with the functions of coordinate j differentiated,
            # wherever that coordinate lies: on the left, at this core, or on the right.
            Ls, Rs, before = left_each[0], right_each[0], left_each.shape[2]
            after = before + (own is not None)
            near = crossed(packed(Ls) * weight, functions)
            joint = crossed(torch.einsum("bk,bkr->br", y[:, :before], Ls), phi)
            if own is not None:
                near += crossed(packed(L) * weight, packed(own))
                joint += crossed(y[:, before : before + 1] * L, own)
            gram[0] += near.T @ packed(R)
            gram[0] += crossed(packed(L) * weight, functions).T @ packed(Rs)
            right[0] += joint.T @ R
            right[0] += plain.T @ torch.einsum("bk,bks->bs", y[:, after:], Rs)


def _singular(gram: Tensor) -> bool:
    """Whether one of some normal equations (C, P, P) has directions about which the data say nothing."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots, largest = factor.diagonal(dim1=1, dim2=2).square(), gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    return bool(failed.any()) or bool((pivots < 1e-13 * largest).any())


def packed_size(n: int) -> int:
    """Numbers of a symmetric matrix n x n that can differ."""
    return n * (n + 1) // 2


def packed(x: Tensor) -> Tensor:
    """The upper triangle of x x^T for each item, (B, n) to (B, n (n + 1) / 2); of (B, c, n) the sum over c."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    products = x[..., i] * x[..., j]
    return products if x.ndim == 2 else products.sum(1)


def crossed(a: Tensor, b: Tensor) -> Tensor:
    """All products of a number of a (B, r) and one of b (B, m) for each item, (B, r m)."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def unpacked(gram: Tensor, r: int, m: int, s: int) -> Tensor:
    """The sums of products of three packed matrices (C, r.. m.., s..) as matrices (C, r m s, r m s)."""

    def places(n: int) -> Tensor:
        where = torch.zeros(n, n, dtype=torch.int64, device=gram.device)
        i, j = torch.triu_indices(n, n, device=gram.device)
        where[i, j] = torch.arange(packed_size(n), device=gram.device)
        where[j, i] = where[i, j]
        return where.flatten()

    C = len(gram)
    whole = gram.reshape(C, packed_size(r), packed_size(m), packed_size(s))
    whole = whole[:, places(r)][:, :, places(m)][:, :, :, places(s)]
    return whole.reshape(C, r, r, m, m, s, s).permute(0, 1, 3, 5, 2, 4, 6).reshape(C, r * m * s, r * m * s)


def interfaces(network: TensorTrain, cores: Cores, part: Part, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is on the left and on the right of core k at some items.

    Returns:
        L (C, B, r); L of each value of the output that is decided on the left, (C, B, c, r): derivatives of a
        potential by the coordinates there, or the values of a block; and the same on the right. What is not decided
        there has c = 0. L of a block is not defined beyond its core with the output, and is 0; R likewise before.
    """
    B, C = len(part.weight), cores[0].shape[0]
    potential = network.config.output == "potential"

    def edge() -> tuple[Tensor, Tensor]:
        ones = cores[0].new_ones(C, B, 1)
        return ones, ones.new_zeros(C, B, 0, 1)

    left, left_each = edge()
    for j in range(k):
        if network.blocks and j == network.middle:
            left_each = _values_right(left, part.features[j], cores[j], network.count)
            left = left.new_zeros(C, B, cores[j].shape[3])
            continue
        slope = part.slopes[j]
        new = [step_right(left, slope, cores[j])[:, :, None]] if potential and slope is not None else []
        left_each = torch.cat([step_right(left_each, part.features[j], cores[j]), *new], 2)
        left = step_right(left, part.features[j], cores[j])
    right, right_each = edge()
    for j in range(len(cores) - 1, k, -1):
        if network.blocks and j == network.middle:
            right_each = _values_left(right, part.features[j], cores[j], network.count)
            right = right.new_zeros(C, B, cores[j].shape[1])
            continue
        slope = part.slopes[j]
        new = [step_left(right, slope, cores[j])[:, :, None]] if potential and slope is not None else []
        right_each = torch.cat([*new, step_left(right_each, part.features[j], cores[j])], 2)
        right = step_left(right, part.features[j], cores[j])
    return left, left_each, right, right_each


def _values_right(left: Tensor, features: Tensor, core: Tensor, count: int) -> Tensor:
    """The core with the output of a block, from the left: (C, B, K, s)."""
    _, r, n, s = core.shape
    return torch.einsum("cbr,bm,crmks->cbks", left, features, core.reshape(-1, r, n // count, count, s))


def _values_left(right: Tensor, features: Tensor, core: Tensor, count: int) -> Tensor:
    """The same from the right: (C, B, K, r)."""
    _, r, n, s = core.shape
    return torch.einsum("cbs,bm,crmks->cbkr", right, features, core.reshape(-1, r, n // count, count, s))

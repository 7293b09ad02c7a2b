r"""Descent on the manifold of tensor trains of fixed ranks.

The gradient of the loss by each core is turned into the Riemannian gradient (`networks.trains.Point.gradient`): the
direction of steepest ascent in the tangent space, with the inner product of the trains themselves, which does not
depend on the gauge of the cores. A step goes along -grad, or along the conjugate direction

    eta = -grad + beta T(eta_before),   beta = max(0, <grad, grad - T(grad_before)> / |grad_before|^2)

(Polak and Ribiere, restarted where it does not descend), where T carries a vector to the new tangent space by
projecting it there, and is brought back to the manifold by rounding (Steinlechner 2016). Its length is

`exact`    the minimum along the tangent: there the train is linear in the length a, and a loss of least squares a
           parabola, of which value, slope and one more value are known; times the learning rate
`armijo`   twice the last one, times the learning rate

and in both cases halved until the loss after the rounding has come down by 0.0001 of what the slope promises. Losses
are those of the step's batch, with its noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from osmose.networks.tensor_train import TensorTrain
from osmose.networks.trains import Cores, Point, inner, orthogonalized, tangent_inner
from osmose.training.optimizers import Optimizer, TrainOptimizerConfig, Work, only_train

if TYPE_CHECKING:
    from osmose.training.config import TrainingConfig

#: The share of the promised descent that has to come true, and how often a step is halved for it.
_ARMIJO, _HALVINGS = 1e-4, 20


class RiemannianConfig(TrainOptimizerConfig):
    """Riemannian descent."""

    kind: Literal["riemannian"] = "riemannian"
    direction: Literal["cg", "gradient"] = Field("cg", description="conjugate gradients, or steepest descent")
    line_search: Literal["exact", "armijo"] = Field(
        "exact", description="the minimum along the tangent, or halving from twice the last length"
    )

    @classmethod
    def training_recipe(cls) -> dict[str, Any]:
        steps = {"steps": 300, "batch_size": 4096, "log_every": 5, "validate_every": 25, "checkpoint_every": 50}
        return super().training_recipe() | steps | {"preview_every": 100}

    def build(self, model: nn.Module, training: TrainingConfig) -> Riemannian:  # noqa: ARG002
        return Riemannian(self, only_train(self.kind, model))


class Riemannian(Optimizer):
    """See `RiemannianConfig`.

    Attributes:
        length: of the last step that was taken.
        gradient, direction: of the last step, as trains; empty before the first.
    """

    def __init__(self, config: RiemannianConfig, network: TensorTrain):
        self.config, self.network = config, network
        # In this gauge the derivatives by the cores are those of the tangent space, up to a factor on the right.
        network.set_trains(orthogonalized([core.detach() for core in network.trains()], len(network.cores) - 1))
        self.length = 1.0
        self.gradient: Cores = []
        self.direction: Cores = []

    def tensors(self) -> dict[str, Tensor]:
        found = {"length": torch.tensor(self.length, dtype=torch.float64)}
        for name in ("gradient", "direction"):
            found |= {f"{name}.{k}": core for k, core in enumerate(getattr(self, name))}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.length = float(tensors["length"])
        device, count = self.network.cores[0].device, (len(tensors) - 1) // 2
        self.gradient = [tensors[f"gradient.{k}"].to(device) for k in range(count)]
        self.direction = [tensors[f"direction.{k}"].to(device) for k in range(count)]

    @torch.no_grad()
    def advance(self, lr: float, work: Work) -> dict[str, float]:
        network = self.network
        edges = [1, *network.bonds.tolist(), 1]
        by_core = []
        for k, core in enumerate(network.cores):
            assert core.grad is not None, "a train has a gradient by each of its cores"
            by_core.append(core.grad[:, : edges[k], :, : edges[k + 1]].double())
            core.grad = None
        point = Point([core.double() for core in network.trains()])
        gradient = point.gradient(by_core)
        descent = [-g for g in gradient]
        beta, size = 0.0, tangent_inner(gradient, gradient)
        if self.config.direction == "cg" and self.gradient:
            before = point.projected(self.gradient)
            beta = max(0.0, (size - tangent_inner(gradient, before)) / max(self._size, 1e-300))
            carried = point.projected(self.direction)
            conjugate = [-g + beta * d for g, d in zip(gradient, carried, strict=True)]
            if tangent_inner(gradient, conjugate) < 0:
                descent = conjugate
            else:
                beta = 0.0
        slope = tangent_inner(gradient, descent)
        length = self._length(point, descent, slope, lr, work) if slope < 0 else 0.0
        kept = [core.clone() for core in network.trains()]
        for _ in range(_HALVINGS):
            network.set_trains(point.retracted(descent, length))
            after = work.loss()
            if after <= work.value + _ARMIJO * length * slope:  # false for a NaN
                break
            length /= 2
        else:
            network.set_trains(kept)  # no descent to be had on this batch
            length, after = 0.0, work.value
        self.gradient, self.direction = point.train(gradient), point.train(descent)
        if length > 0:
            self.length = length
        else:
            self.gradient, self.direction = [], []
        return {"loss_after": after, "length": length, "beta": beta, "riemannian_norm": size**0.5}

    @property
    def _size(self) -> float:
        """|grad_before|^2, which does not depend on the tangent space it is seen from."""
        return float(inner(self.gradient, self.gradient).sum())

    def _length(self, point: Point, descent: Cores, slope: float, lr: float, work: Work) -> float:
        """The length to begin with."""
        if self.config.line_search == "armijo":
            return 2 * lr * self.length
        trial = self.length
        with self.network.replaced(self._cast(point.train([trial * d for d in descent], 1.0))):
            bend = (work.loss() - work.value - trial * slope) / trial**2
        if not bend > 0:  # flat to rounding, or no parabola
            return 2 * lr * self.length
        return lr * -slope / (2 * bend)

    def _cast(self, cores: Cores) -> Cores:
        return [core.to(self.network.cores[0].dtype) for core in cores]

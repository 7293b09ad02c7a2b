"""What makes a step of training out of a batch.

Adam is for every network; tensor trains have alternating least squares and descent on the manifold of their ranks too.
An optimizer is handed the batch as `Work`: the loss as often as it wants, or the least squares that the loss is. Both
are of the whole batch with the same noise every time, whatever it is cut into and however many processes share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor, nn

from osmose.configuration import Config, Registry
from osmose.errors import UserError
from osmose.methods.messages import Regression
from osmose.networks.tensor_train import TensorTrain

if TYPE_CHECKING:
    from osmose.training.config import TrainingConfig

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adam": ("osmose.training.optimizers:AdamConfig", "Adam with decoupled weight decay, for every network"),
        "als": (
            "osmose.training.als:ALSConfig",
            "alternating least squares, for tensor trains: one step is a sweep over all cores",
        ),
        "riemannian": (
            "osmose.training.riemannian:RiemannianConfig",
            "gradient or conjugate-gradient descent on the manifold of fixed ranks, for tensor trains",
        ),
    },
)


@dataclass(frozen=True)
class Work:
    """The batch of one step.

    Attributes:
        value: its mean loss at the weights that the step begins with, over all processes.
        loss: the same at the present weights, without gradient.
        regressions: the least squares that it is, micro-batch by micro-batch, those of this process; may be asked for
            again and again.
        summed: the sum of a tensor over all processes.
        seed: of whatever else is random.
    """

    value: float
    loss: Callable[[], float]
    regressions: Callable[[], Iterator[Regression]]
    summed: Callable[[Tensor], Tensor]
    seed: int


class OptimizerConfig(Config, ABC):
    """Describes an optimizer."""

    kind: str

    @classmethod
    def training_recipe(cls) -> dict[str, Any]:
        """Fields of `TrainingConfig` that suit it better than what suits Adam; none by default."""
        return {}

    def check(self, training: TrainingConfig) -> None:
        """Refuse settings of training that it can make nothing of.

        Raises:
            UserError: naming the field, its value and what would be right.
        """

    @abstractmethod
    def build(self, model: nn.Module, training: TrainingConfig) -> Optimizer:
        """The optimizer of a model's trainable parameters.

        Raises:
            UserError: a model that it cannot train.
        """


class Optimizer(ABC):
    """Changes a model's parameters, step by step.

    Attributes:
        by_gradient: whether parameters hold the gradient of the batch's loss when `advance` is called.
        evaluates: whether `advance` goes through the batch, so that its time grows with it.
    """

    by_gradient: ClassVar[bool] = True
    evaluates: ClassVar[bool] = True

    @abstractmethod
    def advance(self, lr: float, work: Work) -> dict[str, float]:
        """One step at a learning rate; named numbers to log."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that it remembers, by name."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""


#: A field that holds any registered optimizer.
OptimizerChoice = Annotated[SerializeAsAny[OptimizerConfig], BeforeValidator(OPTIMIZERS.parse)]


def suited_to(training: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TrainingConfig` that suit the optimizer that overrides of training choose.

    Raises:
        UserError: no such optimizer.
    """
    said = training.get("optimizer.kind", training.get("optimizer", "adam"))
    kind = said.get("kind") if isinstance(said, Mapping) else getattr(said, "kind", said)
    found: dict[str, Any] = OPTIMIZERS.resolve(str(kind)).training_recipe()
    return found


class AdamConfig(OptimizerConfig):
    """Adam (arXiv 1412.6980), its weight decay decoupled (1711.05101); its rates are those of training."""

    kind: Literal["adam"] = "adam"

    def build(self, model: nn.Module, training: TrainingConfig) -> Adam:
        device = next(model.parameters()).device
        return Adam(
            model.parameters(),
            lr=training.lr,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )


class Adam(torch.optim.AdamW, Optimizer):
    """See `AdamConfig`."""

    evaluates: ClassVar[bool] = False

    def advance(self, lr: float, work: Work) -> dict[str, float]:  # noqa: ARG002
        for group in self.param_groups:
            group["lr"] = lr
        self.step()
        self.zero_grad()
        return {}

    def tensors(self) -> dict[str, Tensor]:
        state = self.state_dict()["state"]
        return {f"{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        per_parameter: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            per_parameter.setdefault(int(index), {})[name] = value
        self.load_state_dict({"state": per_parameter, "param_groups": self.state_dict()["param_groups"]})


#: What optimizers of trains refuse of the settings of training: the value that they can work with, and why.
_WITHOUT: dict[str, tuple[Any, str]] = {
    "ema": (0.0, "averages of cores in different gauges mean nothing"),
    "clip_grad": (None, "steps have the length that is best along them"),
    "weight_decay": (0.0, "it is for adam"),
    "compile": (False, "ranks change while it trains"),
}


class TrainOptimizerConfig(OptimizerConfig, ABC):
    """An optimizer for one tensor train and nothing else."""

    @classmethod
    def training_recipe(cls) -> dict[str, Any]:
        said = {name: value for name, (value, _) in _WITHOUT.items()}
        return said | {"precision": "fp32", "lr": 1.0, "warmup": 0, "decay": "linear"}

    def check(self, training: TrainingConfig) -> None:
        for name, (wanted, why) in _WITHOUT.items():
            value = getattr(training, name)
            if value != wanted:
                shown = "null" if wanted is None else wanted
                raise UserError(f"training.{name}: {value} is not valid with optimizer {self.kind}: {why}; use {shown}")


def only_train(kind: str, model: nn.Module) -> TensorTrain:
    """The tensor train that is all there is to train of a model.

    Raises:
        UserError: another network, or parameters besides; the message names one.
    """
    found = [m for m in model.modules() if isinstance(m, TensorTrain) and m.cores[0].requires_grad]
    if found and found[0].cores[0].device.type == "mps":
        raise UserError(
            f"training.optimizer: {kind} computes in float64, which mps has not; train with ACCELERATE_USE_CPU=true"
        )
    own = {id(core) for train in found for core in train.cores}
    others = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in own]
    if len(found) != 1 or others:
        if found:
            what = f"{others[0]!r} is no core of it" if others else f"this model has {len(found)} of them"
        else:
            what = "this model has none"
        raise UserError(
            f"training.optimizer: {kind} trains one tensor train and nothing else, and {what}; use optimizer adam"
            + ("" if found else ", or --network tensor-train with ddpm or edm")
        )
    return found[0]

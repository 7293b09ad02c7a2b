"""What a step of training takes in bytes and operations, measured.

Whole optimisation steps are made as `Trainer` makes them, on random data of the right shape, in one process and without
compilation. Bytes are those of tensors (`analysis.memory`): at its peak a step has

    what is held between steps    parameters, buffers, the teacher, the optimiser's state, the averaged weights
    what the step adds            the batch, activations that wait for the backward pass, gradients, temporaries

Where numbers are of 4 bytes, as they are in every precision of training, P trained numbers in n tensors take

    4 P bytes of gradients, 4 P of the average, 8 P + 4 n of AdamW: two moments, and a count for each tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from osmose.analysis.memory import bytes_of, peak_bytes
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import StepDraws
from osmose.methods.base import GenerativeModel
from osmose.methods.consistency import SCD
from osmose.methods.messages import Batch, LossTerms
from osmose.methods.operator import DSNO
from osmose.methods.time_distillation import TimeDistillation
from osmose.training.config import TrainingConfig
from osmose.training.ema import EMA
from osmose.training.optimizers import Work
from osmose.training.trainer import chosen_precision

#: Steps, at most, until each parameter of a model that teaches its parts in turn has had a gradient.
_ROUND = 16
#: Bytes of a number.
FLOAT_BYTES = 4


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training takes, and its operations.

    Attributes:
        batch_size: items of a step.
        items: items of one pass; a step has batch_size / items of them.
        precision: "fp32" or "bf16".
        method: the optimiser's kind.
        trained: numbers that are trained.
        tensors: in so many tensors.
        parameters: bytes of all parameters.
        buffers: bytes of the buffers.
        teacher: bytes of networks that are needed besides: a teacher.
        gradients: bytes of the gradients.
        optimizer: bytes of the optimiser's state.
        average: bytes of the averaged weights.
        activations: bytes that are alive after the forward pass and were not before: what the backward pass waits for.
        step: bytes that a step has at once, at most, besides what is held between steps.
        macs: multiply-adds for one item in one step, forward and backward.
    """

    batch_size: int
    items: int
    precision: str
    method: str
    trained: int
    tensors: int
    parameters: int
    buffers: int
    teacher: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    step: int
    macs: float

    @property
    def held(self) -> int:
        """Bytes that are held between steps."""
        return self.parameters + self.buffers + self.teacher + self.optimizer + self.average

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step, all in all."""
        return self.held + self.step

    def formula(self) -> dict[str, int]:
        """What gradients, optimizer and average should be, in bytes; none where the optimiser is not Adam."""
        one = FLOAT_BYTES * self.trained
        if self.method != "adam":
            return {}
        return {"gradients": one, "optimizer": 2 * one + FLOAT_BYTES * self.tensors, "average": one}


def make_teachable(model: GenerativeModel) -> None:
    """Give a model what it has to be given before it can be trained: any teacher of its kind costs the same."""
    if isinstance(model, TimeDistillation):
        model.begin(model.learner)
    elif isinstance(model, SCD):
        model.begin(model.denoiser)
    elif isinstance(model, DSNO):
        own = NetworkDenoiser(model.operator.backbone, model.config.schedule, model.config.parametrization)
        model.begin(own, _Still(model))


def training_memory(model: GenerativeModel, training: TrainingConfig) -> TrainingMemory | None:
    """Measure a step of training on random data; None where nothing is trained.

    A model that teaches its parts in turn is measured through a whole round: bytes are the largest of its steps',
    operations their mean.

    Args:
        model: left as it is; a copy is trained.
        training: says the batch and how it is cut up, and the precision.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    with torch.random.fork_rng():  # dropout
        torch.manual_seed(0)
        learner = _Learner(copy.deepcopy(model).train(), training)
        passes, items = training.accumulate, training.batch_size // training.accumulate
        learner.round(1, items)  # the first one makes the optimiser's state
        steps = learner.round(passes, items)
        operations = []

        def count(step: Callable[[], object]) -> None:
            with FlopCounterMode(display=False) as counter:
                step()
            operations.append(counter.get_total_flops() / 2 / training.batch_size)

        learner.round(passes, items, count)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = [*model.parameters(), *model.buffers()]
    networks = [tensor for network in model.networks() for tensor in (*network.parameters(), *network.buffers())]
    return TrainingMemory(
        batch_size=training.batch_size,
        items=items,
        precision="bf16" if learner.half else "fp32",
        method=training.optimizer.kind,
        trained=sum(parameter.numel() for parameter in trained),
        tensors=len(trained),
        parameters=bytes_of(list(model.parameters())),
        buffers=bytes_of(list(model.buffers())),
        teacher=bytes_of([own, networks]) - bytes_of(own),
        gradients=max(step.gradients for step in steps),
        optimizer=bytes_of(learner.optimizer.tensors()),
        average=bytes_of(list(learner.ema.average.values())),
        activations=max(step.activations for step in steps),
        step=max(step.peak for step in steps),
        macs=sum(operations) / len(operations),
    )


@dataclass
class _Step:
    """Bytes of one step."""

    activations: int = 0
    gradients: int = 0
    peak: int = 0


class _Learner:
    """A model that makes steps as `Trainer.optimise` does, on random data.

    Attributes:
        model: what is trained.
        optimizer: the one that training has.
        ema: the average of the weights.
        half: whether it computes in bf16.
    """

    def __init__(self, model: GenerativeModel, training: TrainingConfig):
        self.model, self.training = model, training
        self.device = model.device
        self.half = chosen_precision(training.precision) == "bf16"
        self.optimizer = training.optimizer.build(model, training)
        self.ema = EMA(model, training.ema)
        self._taught: set[str] = set()

    def round(
        self, passes: int, items: int, around: Callable[[Callable[[], object]], None] | None = None
    ) -> list[_Step]:
        """A step, or where a model teaches its parts in turn, steps until each has been taught.

        Args:
            passes: passes of each step.
            items: items of each pass.
            around: called with each step to be made instead of measuring its bytes.
        """
        steps: list[_Step] = []
        self._taught = set()
        wanted = {name for name, value in self.model.named_parameters() if value.requires_grad}
        while not steps or (self.model.idle_parameters and len(steps) < _ROUND and self._taught < wanted):
            if around is None:
                with peak_bytes(self.device) as memory:
                    steps.append(self._step(passes, items, lambda: memory.live))
                steps[-1].peak = memory.peak
            else:
                steps.append(_Step())
                around(lambda: self._step(passes, items, lambda: 0))
        return steps

    def _step(self, passes: int, items: int, live: Callable[[], int]) -> _Step:
        model, told, value = self.model, _Step(), 0.0
        parts = [self._part(index * items, items, passes * items) for index in range(passes)]
        for index, (batch, draws) in enumerate(parts):
            terms, waiting = self._learn(batch, draws, passes, live)
            told.activations = told.activations if index else waiting
            value += float(terms.per_item.detach().cpu().double().mean()) / passes
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        self._taught |= set(gradients)
        told.gradients = bytes_of(list(gradients.values()))
        del gradients
        if self.optimizer.by_gradient:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.training.clip_grad or float("inf"))
        work = Work(
            value=value,
            loss=lambda: self._loss(parts),
            regressions=lambda: (model.regression(batch, draws.again()) for batch, draws in parts),
            summed=lambda sums: sums,
            seed=0,
        )
        self.optimizer.advance(self.training.lr, work)
        self.ema.update()
        with torch.no_grad(), self._autocast():
            model.after_step(parts)
        return told

    def _learn(self, batch: Batch, draws: StepDraws, passes: int, live: Callable[[], int]) -> tuple[LossTerms, int]:
        """The losses of a pass, with their gradient, and the bytes that were alive in between and not before."""
        before, by_gradient = live(), self.optimizer.by_gradient
        with torch.set_grad_enabled(by_gradient), self._autocast():
            terms = self.model.loss(batch, draws.again())
        waiting = live() - before
        if by_gradient:
            (terms.per_item.mean() / passes).backward()
        return terms, waiting

    def _loss(self, parts: list[tuple[Batch, StepDraws]]) -> float:
        """The mean loss at the weights as they are."""
        with torch.no_grad(), self._autocast():
            losses = [
                float(self.model.loss_again(batch, draws.again()).per_item.cpu().double().mean())
                for batch, draws in parts
            ]
        return sum(losses) / len(losses)

    def _part(self, first: int, items: int, total: int) -> tuple[Batch, StepDraws]:
        batch = Batch.made(self.model.spec, items, self.model.config.conditional, self.device, first)
        return batch, StepDraws(0, 0, first, first + items, total, self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)


class _Still:
    """Trajectories of nothing for an operator: what it costs to learn from them is the same."""

    def __init__(self, model: DSNO):
        self.levels, self._model = model.path_levels, model

    def __len__(self) -> int:
        return 2

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        states = torch.zeros(len(indices), len(self.levels), *self._model.spec.shape)
        return states, torch.zeros_like(indices) if self._model.config.conditional else None

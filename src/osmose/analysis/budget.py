"""What a trained model costs to hold, to run and to train: operations, bytes and seconds, measured and by formula.

Training is measured on whole optimisation steps as `Trainer` makes them, on random data of the right shape, in one
process and without compilation. Bytes are those of tensors (`analysis.memory`): at its peak a step has

    what is held between steps    parameters, buffers, the teacher, the optimiser's state, the averaged weights
    what the step adds            the batch, activations that wait for the backward pass, gradients, temporaries

Where numbers are of 4 bytes, as they are in every precision of training, P trained numbers in n tensors take

    4 P bytes of gradients, 4 P of the average, 8 P + 4 n of AdamW: two moments, and a count for each tensor.

Operations are the multiply-adds of matrix products and convolutions. A network may say how many it should need:
`macs()`, and `elementwise()` for other operations, both of one evaluation of one item.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from osmose.analysis.cost import Cost, cost_of, seconds_per_step
from osmose.analysis.memory import bytes_of, peak_bytes
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import StepDraws
from osmose.methods import COMPOSED
from osmose.methods.base import GenerativeModel
from osmose.methods.consistency import SCD
from osmose.methods.messages import Batch, LossTerms
from osmose.methods.operator import DSNO
from osmose.methods.time_distillation import TimeDistillation
from osmose.training.config import TrainingConfig
from osmose.training.ema import EMA
from osmose.training.optimizers import Work
from osmose.training.run import Run
from osmose.training.trainer import chosen_precision

#: Steps, at most, until each parameter of a model that teaches its parts in turn has had a gradient.
_ROUND = 16
#: Bytes of a number.
_FLOAT = 4


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
        one = _FLOAT * self.trained
        if self.method != "adam":
            return {}
        return {"gradients": one, "optimizer": 2 * one + _FLOAT * self.tensors, "average": one}


@dataclass(frozen=True)
class Budget:
    """What a model costs.

    Attributes:
        cost: parameters, and operations and seconds of an evaluation of one item.
        macs: multiply-adds of an evaluation of one item by the networks' own formulas, or None where one has none.
        elementwise: other operations of an evaluation of one item by such formulas, or None.
        weights: bytes of model.safetensors.
        numbers: how many numbers all parameters have; of several students, those of all.
        parameters: bytes of the parameters.
        buffers: bytes of the buffers.
        items: items of the evaluation that `evaluation` is of.
        evaluation: bytes that an evaluation of a batch has at once, at most, besides the model: its input included.
        training: what training takes, or None where nothing is trained.
        seconds: of a training step of the whole batch, or None.
        untrained: why there is no training to measure, or None.
        conditions: run, method, device, threads: what the numbers hold for.
    """

    cost: Cost
    macs: int | None
    elementwise: int | None
    weights: int
    numbers: int
    parameters: int
    buffers: int
    items: int
    evaluation: int
    training: TrainingMemory | None
    seconds: float | None
    untrained: str | None
    conditions: dict[str, Any]

    @property
    def ratio(self) -> float | None:
        """Multiply-adds of a training step for those of an evaluation, of one item; None where there are none."""
        return None if self.training is None or not self.cost.macs else self.training.macs / self.cost.macs

    def formula(self) -> int:
        """What the parameters should take, in bytes."""
        return _FLOAT * self.numbers

    def to_json(self) -> dict[str, Any]:
        """Plain values; where a number is measured and has a formula, both."""
        training, formula = self.training, {} if self.training is None else self.training.formula()
        values: dict[str, Any] = {
            **self.conditions,
            "parameters": self.cost.parameters,
            "evaluation": {
                "items": self.items,
                "macs": {"measured": self.cost.macs, "formula": self.macs},
                "elementwise": {"measured": None, "formula": self.elementwise},
                "seconds": self.cost.seconds,
                "peak_bytes": self.evaluation,
            },
            "bytes": {
                "weights": self.weights,
                "parameters": {"measured": self.parameters, "formula": self.formula()},
                "buffers": self.buffers,
            },
            "training": None,
            "untrained": self.untrained,
        }
        if training is not None:
            values["training"] = {
                "batch_size": training.batch_size,
                "items": training.items,
                "precision": training.precision,
                "optimizer": training.method,
                "macs": training.macs,
                "macs_per_evaluation": self.ratio,
                "seconds": self.seconds,
                "bytes": {
                    "teacher": training.teacher,
                    **{
                        name: {"measured": getattr(training, name), "formula": formula.get(name)}
                        for name in ("gradients", "optimizer", "average")
                    },
                    "activations": training.activations,
                    "step": training.step,
                    "held": training.held,
                    "peak": training.peak,
                },
            }
        return values


def budget_of(
    run: Run, *, batch_size: int | None = None, device: torch.device | str = "cpu", model: GenerativeModel | None = None
) -> Budget:
    """Measure a trained run.

    Args:
        run: the run.
        batch_size: items of a training step, the run's own if None; an evaluation is measured with those of one pass.
        device: where to compute.
        model: the run's model on that device, where it is loaded already; a teacher is made up for one that needs it.

    Raises:
        UserError: a run without weights, or weights of another network.
        ConfigError: a batch size that its passes cannot share.
    """
    training = run.config.training if batch_size is None else run.config.training.replace(batch_size=batch_size)
    model = run.model(device) if model is None else model
    make_teachable(model)
    items = training.batch_size // training.accumulate
    memory, step = training_memory(model, training), seconds_per_step(model, training)
    macs, elementwise = formula_of(model, "macs"), formula_of(model, "elementwise")
    return Budget(
        cost=cost_of(model),
        macs=macs,
        elementwise=elementwise,
        weights=run.weights.stat().st_size,
        numbers=sum(parameter.numel() for parameter in model.parameters()),
        parameters=bytes_of(list(model.parameters())),
        buffers=bytes_of(list(model.buffers())),
        items=items,
        evaluation=evaluation_peak(model, items),
        training=memory,
        seconds=None if step is None else step.seconds,
        untrained=None if memory is not None else _untrained(run.config.method.kind),
        conditions={
            "run": str(run.folder),
            "method": run.config.method.kind,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
    )


def make_teachable(model: GenerativeModel) -> None:
    """Give a model what it has to be given before it can be trained: any teacher of its kind costs the same."""
    if isinstance(model, TimeDistillation):
        model.begin(model.learner)
    elif isinstance(model, SCD):
        model.begin(model.denoiser)
    elif isinstance(model, DSNO):
        own = NetworkDenoiser(model.operator.backbone, model.config.schedule, model.config.parametrization)
        model.begin(own, _Still(model))


def evaluation_peak(model: GenerativeModel, items: int) -> int:
    """Bytes that one evaluation of each of a model's networks has at once, its input of so many items included."""
    model = copy.deepcopy(model).eval()
    with torch.inference_mode(), peak_bytes(model.device) as memory:
        model.probe(items)
    return memory.peak


def formula_of(model: GenerativeModel, name: str) -> int | None:
    """A count of one evaluation of one item, as a model's networks give it themselves.

    Args:
        model: left as it is.
        name: of the method that networks have which know: "macs" or "elementwise".

    Returns:
        The sum over the networks that an evaluation runs, or None where one of them, or all, have no such method.
    """
    model = copy.deepcopy(model).eval()
    counts: list[Callable[[], int] | None] = []
    for network in model.networks():
        network.register_forward_hook(lambda network, *_: counts.append(getattr(network, name, None)))
    with torch.inference_mode():
        model.probe(1)
    known = [count() for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


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


def _untrained(kind: str) -> str:
    if kind in COMPOSED:
        return f"{kind} is put together of trained runs, not trained"
    return f"{kind} is fitted in closed form: it has no parameter to train"


class _Still:
    """Trajectories of nothing for an operator: what it costs to learn from them is the same."""

    def __init__(self, model: DSNO):
        self.levels, self._model = model.path_levels, model

    def __len__(self) -> int:
        return 2

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        states = torch.zeros(len(indices), len(self.levels), *self._model.spec.shape)
        return states, torch.zeros_like(indices) if self._model.config.conditional else None

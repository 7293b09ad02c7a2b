"""What a model costs: parameters, operations, time."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from osmose.gaussian.draws import StepDraws
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import Batch
from osmose.methods.students import Students
from osmose.networks.integers import IntegerLayer
from osmose.training.config import TrainingConfig
from osmose.training.ema import EMA
from osmose.training.optimizers import Work
from osmose.training.trainer import chosen_precision

#: Seconds that one measured pass may take: larger batches are measured by a part of them.
_PATIENCE = 1.0


@dataclass(frozen=True)
class Cost:
    """Cost of a model's networks.

    Attributes:
        parameters: learned numbers, fitted ones included.
        macs: multiply-adds of one network evaluation of one item, as computed.
        seconds: wall time of one evaluation of one item within a batch.
    """

    parameters: int
    macs: int
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """Time of a training step.

    Attributes:
        seconds: wall time of one step: forward, backward, optimiser, average of the weights, and what the
            method does after it.
        items: items of the pass that was measured; where a pass has more, its time is in proportion.
        precision: "fp32" or "bf16".
    """

    seconds: float
    items: int
    precision: str


def num_parameters(module: nn.Module) -> int:
    """Learned numbers of a module: those that are trained, and those that were fitted or taken over.

    Of several students they are those of the one that samples.
    """
    if isinstance(module, Students):
        module = module.student(module.sampling().num_steps)
    learned = sum(parameter.numel() for parameter in module.parameters())
    for layer in module.modules():
        if isinstance(layer, IntegerLayer):
            learned += layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
    return learned


def macs_of(model: GenerativeModel) -> int:
    """Multiply-adds of one evaluation of one item by each of a model's networks: convolutions and matrix products.

    They are counted as computed. A UNet's upsampling and the convolution after it are one transposed convolution of 16
    multiply-adds for each input pixel, input channel and output channel, where papers count 36; of DDPM's model of
    CIFAR-10 there are 5.78 instead of 6.22 billion.
    """
    with _inference(model), FlopCounterMode(display=False) as counter:
        model.probe(1)
    return counter.get_total_flops() // 2


def cost_of(model: GenerativeModel, batch_size: int = 16, repeats: int = 3) -> Cost:
    """Count and time one evaluation of each of a model's networks on random input.

    Args:
        model: left as it is.
        batch_size: items in a batch, at most: fewer where it would take long.
        repeats: the best of so many counts.
    """
    with _inference(model):
        items = _affordable(model.probe, batch_size, model.device)
        seconds = min(_timed(lambda: model.probe(items), model.device) for _ in range(repeats))
    return Cost(num_parameters(model), macs_of(model), seconds / items)


def seconds_per_step(model: GenerativeModel, training: TrainingConfig, repeats: int = 3) -> StepTime | None:
    """Time steps of training on random data, in one process and without compilation; None where nothing is trained.

    Args:
        model: left as it is; a copy is trained.
        training: says the batch and how it is cut up, the precision, and the optimiser.
        repeats: the best of so many counts.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    model = copy.deepcopy(model).train()
    device, spec, micro = model.device, model.spec, training.batch_size // training.accumulate
    half = chosen_precision(training.precision) == "bf16"
    optimizer = training.optimizer.build(model, training)
    ema = EMA(model, training.ema)

    made: list[tuple[Batch, StepDraws]] = []
    first = [0.0]

    def learn(items: int) -> None:
        batch = Batch.made(spec, items, model.config.conditional, device)
        draws = StepDraws(0, 0, 0, items, items, device)
        made[:] = [(batch, draws)]
        with torch.autocast(device.type, torch.bfloat16, enabled=half), torch.set_grad_enabled(optimizer.by_gradient):
            terms = model.loss(batch, draws.again())
        first[0] = float(terms.per_item.detach().mean())
        if optimizer.by_gradient:
            terms.per_item.mean().backward()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            model.after_step([(batch, draws)])

    def value() -> float:
        with torch.no_grad():
            return float(model.loss_again(made[0][0], made[0][1].again()).per_item.mean())

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_grad or float("inf"))
        problem = [(batch, draws) for batch, draws in made]
        work = Work(
            first[0],
            value,
            lambda: (model.regression(batch, draws.again()) for batch, draws in problem),
            lambda sums: sums,
            0,
        )
        optimizer.advance(training.lr, work)
        ema.update()

    with torch.random.fork_rng():  # dropout
        items = _affordable(learn, micro, device)
        update()  # the first one makes the optimiser's state
        times = [(_timed(lambda: learn(items), device), _timed(update, device)) for _ in range(repeats)]
    passing, updating = (min(column) for column in zip(*times, strict=True))
    if optimizer.evaluates:
        updating *= training.batch_size / items
    return StepTime(passing * training.batch_size / items + updating, items, "bf16" if half else "fp32")


@contextlib.contextmanager
def _inference(model: GenerativeModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _affordable(run: Callable[[int], None], most: int, device: torch.device) -> int:
    """The number of items up to `most` that `run` takes without losing patience; it has been warmed up then."""
    run(1)
    items = 1
    while items < most and 2 * _timed(lambda: run(items), device) <= _PATIENCE:  # noqa: B023 - called at once
        items = min(2 * items, most)
    return items


def _timed(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

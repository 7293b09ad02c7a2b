"""What a trained model costs to hold, to run and to train: operations, bytes and seconds, measured and by formula.

Operations are the multiply-adds of matrix products and convolutions. A network may say how many it should need:
`macs()`, and `elementwise()` for other operations, both of one evaluation of one item. What training takes is measured
in `analysis.training_memory`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from osmose.analysis.cost import Cost, cost_of, seconds_per_step
from osmose.analysis.memory import bytes_of, peak_bytes
from osmose.analysis.training_memory import FLOAT_BYTES, TrainingMemory, make_teachable, training_memory
from osmose.methods import COMPOSED
from osmose.methods.base import GenerativeModel
from osmose.training.run import Run


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
        return FLOAT_BYTES * self.numbers

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


def _untrained(kind: str) -> str:
    if kind in COMPOSED:
        return f"{kind} is put together of trained runs, not trained"
    return f"{kind} is fitted in closed form: it has no parameter to train"

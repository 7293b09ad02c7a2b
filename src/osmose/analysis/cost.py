"""What a model costs: parameters, operations, time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from osmose.methods.base import GenerativeModel


@dataclass(frozen=True)
class Cost:
    """Cost of a model's networks.

    Attributes:
        parameters: trainable numbers.
        macs: multiply-adds of one network evaluation of one item, as torch counts them.
        seconds: wall time of one evaluation of one item within a batch.
    """

    parameters: int
    macs: int
    seconds: float


def num_parameters(module: nn.Module) -> int:
    """Trainable numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def cost_of(model: GenerativeModel, batch_size: int = 16, repeats: int = 3) -> Cost:
    """Count and time one evaluation of each of a model's networks on random input."""
    x = torch.randn(batch_size, *model.spec.shape, device=model.device)
    label = torch.full((batch_size,), 500.0, device=model.device)
    condition = torch.zeros(batch_size, dtype=torch.int64, device=model.device) if model.config.conditional else None
    macs, best = 0, float("inf")
    training = model.training
    model.eval()
    with torch.inference_mode():
        for network in model.networks():
            with FlopCounterMode(display=False) as counter:
                network(x, label, condition)
            macs += counter.get_total_flops() // 2
        for _ in range(repeats):
            start = time.perf_counter()
            for network in model.networks():
                network(x, label, condition)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    model.train(training)
    return Cost(num_parameters(model), macs // batch_size, best / batch_size)

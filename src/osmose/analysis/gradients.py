"""How noisy the gradient of a training loss is: what importance sampling, larger batches and more noises reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from osmose.data.batches import BatchOrder
from osmose.data.dataset import Dataset
from osmose.gaussian.draws import StepDraws, mix
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import Batch
from osmose.methods.times import LossAwareSampler


@dataclass(frozen=True)
class GradientNoise:
    """Moments of the gradient of one training step over all parameters.

    Attributes:
        variance: trace of its covariance, unbiased.
        squared_mean: squared length of its expectation, unbiased: may come out below 0 where the noise is large.
    """

    variance: float
    squared_mean: float


def learned(model: GenerativeModel) -> bool:
    """Whether every law of times that the model learns is learned."""
    return all(module.active for module in model.modules() if isinstance(module, LossAwareSampler))


def gradient_noise(
    model: GenerativeModel, dataset: Dataset, *, batch_size: int, batches: int, warmup: int = 0, seed: int = 0
) -> GradientNoise:
    """Gradients of a model's own training loss at fixed weights, over independent batches.

    Args:
        model: in whichever mode; its weights are left as they are, the memory of a loss-aware law of times is not.
        dataset: the training data.
        batch_size: items a step.
        batches: gradients that are compared, at least 2.
        warmup: steps before, without gradient, from which a loss-aware law of times learns.
        seed: of batches, times and noise.

    Raises:
        ValueError: fewer than 2 batches, or a law of times that was not learned in the warm-up: its noise would be a
            mixture of two.
    """
    if batches < 2:
        raise ValueError(f"batches = {batches}: at least 2 gradients are needed for a variance")
    order = BatchOrder(len(dataset.train), batch_size, mix(seed, "gradients"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    squares, training = 0.0, model.training
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed, "dropout"))
        for step in range(warmup + batches):
            rows = order.indices(step)
            batch = Batch.of(dataset, "train", rows, model.config.conditional, model.device)
            draws = StepDraws(seed, step, 0, batch_size, batch_size, model.device)
            if step == warmup and not learned(model):
                raise ValueError(f"the law of times has not been learned after {warmup} batches; give it more")
            with torch.set_grad_enabled(step >= warmup):
                loss = model.loss(batch, draws).per_item.mean()
            if step >= warmup:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                for place, gradient in zip(total, gradients, strict=True):
                    place += gradient
                    squares += float(gradient.double().square().sum())
            with torch.no_grad():
                model.after_step([(batch, draws)])
    model.train(training)
    mean_squared = sum(float((place / batches).square().sum()) for place in total)
    variance = (squares / batches - mean_squared) * batches / (batches - 1)
    return GradientNoise(variance, mean_squared - variance / batches)

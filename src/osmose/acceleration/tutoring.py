"""Training with a teacher who answers the same questions: what the trainer calls in the place of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import Draws
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import Batch, LossTerms


def denoisers(model: nn.Module) -> list[NetworkDenoiser]:
    """All denoisers of a model, in the order in which it holds them."""
    return [module for module in model.modules() if isinstance(module, NetworkDenoiser)]


class Tutored(nn.Module):
    """A model in training, whose loss has the distance to a teacher's answers besides.

    It is the mean squared difference of outputs, for the inputs that the loss evaluates.

    Args:
        model: whose networks are trained.
        teacher: a model of the same denoisers; it is not trained.
        weight: of the distance.
    """

    def __init__(self, model: GenerativeModel, teacher: GenerativeModel, weight: float):
        super().__init__()
        self.model, self.weight = model, weight
        self._teacher = (teacher,)  # in a tuple, so that it is no part of what is trained
        self._errors: list[Tensor] = []
        self._handles = [
            own.network.register_forward_hook(self._compared(other.network))
            for own, other in zip(denoisers(model), denoisers(teacher), strict=True)
        ]

    def _compared(self, teacher: nn.Module) -> Callable[..., None]:
        def hook(network: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            if not (self.training and network.training and torch.is_grad_enabled()):
                return
            with torch.no_grad():
                right = teacher.to(out.device)(*given)
            self._errors.append((out - right).square().flatten(1).mean(1))

        return hook

    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        """The model's loss, and the distance."""
        self._errors.clear()
        terms: LossTerms = self.model(batch, draws)
        if not self._errors:
            return terms
        distance = torch.stack(self._errors).mean(0)
        parts = terms.parts | {"distillation": distance.detach()}
        if terms.weight is not None:  # of times that are drawn more often than they count
            distance = distance * terms.weight.to(distance)
        return replace(terms, per_item=terms.per_item + self.weight * distance, parts=parts)

    def end(self) -> None:
        """Leave the model as it is without a teacher."""
        for handle in self._handles:
            handle.remove()

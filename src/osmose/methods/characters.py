"""What models of text have in common: characters that are missing are written, all of them or some."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.methods.base import GenerativeModel, MethodConfig, NetworkChoice, SamplingConfig
from osmose.methods.messages import Watch


class CharactersConfig(MethodConfig, ABC):
    """A method that learns text, with a network over characters."""

    suited: ClassVar[str]  # the kind of network
    network: NetworkChoice

    @property
    def use(self) -> str:
        return "osmose sample {run} -n 8 --out samples.txt"

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        require_text(cls.model_fields["kind"].default, spec)
        return {"network": {"kind": cls.suited}}

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:  # noqa: ARG003
        return {"steps": 3000, "batch_size": 64, "lr": 1e-3}


def require_text(method: str, spec: DataSpec) -> None:
    """Refuse other data.

    Raises:
        UserError: naming what they are.
    """
    if spec.alphabet is None:
        raise UserError(f"{method}: is for text (--data text:FILE, text:python), and these data are {spec.kind}")


class Characters(GenerativeModel, ABC):
    """A model of items of codes.

    Attributes:
        network: of the subclass.
        symbols: V, the characters of the alphabet.
    """

    takes_text = True
    network: nn.Module

    def __init__(self, config: CharactersConfig, spec: DataSpec):
        super().__init__(config, spec)
        require_text(config.kind, spec)
        self.symbols = len(spec.alphabet or "")

    def networks(self) -> list[nn.Module]:
        return [self.network]

    @abstractmethod
    def written(
        self, codes: Tensor, missing: Tensor, draws: Draws, sampling: SamplingConfig, on_step: Watch
    ) -> tuple[Tensor, int]:
        """Codes, int64 (count, length), with those that are missing, bool, drawn; and the evaluations that it took."""

    def generate(
        self,
        draws: Draws,
        sampling: SamplingConfig,
        condition: Tensor | None,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        nothing = torch.full((draws.count, *self.spec.shape), torch.nan, device=self.device)
        return self.complete(nothing, None, draws, sampling, condition, on_step)

    def complete(
        self,
        known: Tensor,
        times: Tensor | None,  # noqa: ARG002
        draws: Draws,
        sampling: SamplingConfig,
        condition: Tensor | None,  # noqa: ARG002
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        missing, codes = known.isnan(), self.spec.to_levels(known.nan_to_num())
        codes, nfe = self.written(codes.to(self.device), missing.to(self.device), draws, sampling, on_step)
        return self.spec.from_levels(codes), nfe

    def require_finite(self, answer: Tensor) -> None:
        """Refuse an answer of the network that is no answer.

        Raises:
            UserError: NaN or infinity.
        """
        if not bool(answer.isfinite().all()):
            raise UserError(f"{self.config.kind}: the network answers NaN or infinity; has training diverged?")

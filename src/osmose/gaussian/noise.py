"""Noise sources: the law of eps in x_t = alpha x0 + sigma eps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from osmose.configuration import Config
from osmose.gaussian.draws import Draws


class Noise(Config, ABC):
    """A centred Gaussian law over events."""

    kind: str

    @abstractmethod
    def sample(self, draws: Draws, event_shape: tuple[int, ...]) -> Tensor:
        """One noise for each item: shape (draws.count, *event_shape), float32."""


class WhiteNoise(Noise):
    """Independent standard normal values."""

    kind: Literal["white"] = "white"

    def sample(self, draws: Draws, event_shape: tuple[int, ...]) -> Tensor:
        return draws.normal(event_shape)

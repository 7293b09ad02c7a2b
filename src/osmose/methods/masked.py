r"""Masked diffusion of text: characters are hidden one by one, and a network guesses what is behind the masks.

A character is still there at time t with the probability alpha(t), which falls from 1 to 0; what is hidden stays so.
Backwards from t to s < t each mask is lifted with the probability (alpha(s) - alpha(t)) / (1 - alpha(t)), to a
character of the network's answer (arXiv 2406.07524, 2406.04329). The negative log-likelihood is at most

    integral over t of  -alpha'(t) / (1 - alpha(t))  E sum over masks of  -log p(character | what is there):

one cross-entropy, weighed by time, which is also the loss. Times are drawn evenly in alpha, where every share of the
loss weighs the same: blocks that share the work evenly have equal intervals of it, alpha_b = 1 - b / B.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor
from torch.nn import functional as F

from osmose.configuration import Config, ConfigError, Registry
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.methods.base import SamplingConfig
from osmose.methods.characters import Characters, CharactersConfig
from osmose.methods.messages import Batch, BoundTerms, LossTerms, OnStep, Watch
from osmose.methods.sharing import Partition, Shareable

#: Steps of the bound where nothing is said.
_BOUND_STEPS = 128
#: Less of a text is never masked in training: the weight 1 / (1 - alpha) has no end.
_LEAST = 1e-3


class MaskingSchedule(Config, ABC):
    """What share of the characters is still there, alpha(t), t in [0, 1], and when."""

    kind: str

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Float64, 1 at t = 0 and 0 at t = 1, falling."""

    @abstractmethod
    def time(self, alpha: Tensor) -> Tensor:
        """The inverse of `alpha`."""

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Of so many steps, the quietest first: the time at which each begins, and the chance that it lifts a mask."""
        t = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        alpha = self.alpha(t)
        chances = (alpha[:-1] - alpha[1:]) / (1 - alpha[1:])
        return list(zip(t[1:].tolist(), chances.tolist(), strict=True))


class LinearMasking(MaskingSchedule):
    """alpha = 1 - t."""

    kind: Literal["linear"] = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def time(self, alpha: Tensor) -> Tensor:
        return 1 - alpha


class CosineMasking(MaskingSchedule):
    """alpha = 1 - sin(pi t / 2): few masks at a time at the beginning of sampling, where little is known."""

    kind: Literal["cosine"] = "cosine"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.sin(t * (math.pi / 2))

    def time(self, alpha: Tensor) -> Tensor:
        return torch.asin((1 - alpha).clamp(0, 1)) * (2 / math.pi)


MASKINGS = Registry(
    "masking schedule",
    {
        "linear": ("osmose.methods.masked:LinearMasking", "alpha = 1 - t"),
        "cosine": ("osmose.methods.masked:CosineMasking", "alpha = 1 - sin(pi t / 2)"),
    },
)
MaskingChoice = Annotated[SerializeAsAny[MaskingSchedule], BeforeValidator(MASKINGS.parse)]


class MaskedSampling(SamplingConfig):
    """Steps in which masks are lifted."""

    num_steps: int = Field(64, ge=1, description="times that are visited")


class MaskedConfig(CharactersConfig, Shareable):
    """A network, and when characters are hidden."""

    suited = "text"
    kind: Literal["masked"] = "masked"
    schedule: MaskingChoice = LinearMasking()
    lowest: float | None = Field(None, ge=0, lt=1, description="earliest time of training; what blocks are given")
    highest: float | None = Field(None, gt=0, le=1, description="latest time of training")
    sampling: MaskedSampling = MaskedSampling()

    @model_validator(mode="after")
    def _ordered(self) -> MaskedConfig:
        if (self.lowest or 0.0) >= (1.0 if self.highest is None else self.highest):
            raise ConfigError("lowest", f"{self.lowest} is not valid: has to be below highest, {self.highest}")
        return self

    def build(self, spec: DataSpec) -> Masked:
        return Masked(self, spec)

    def require_whole(self) -> None:
        if self.lowest is not None or self.highest is not None:
            raise ConfigError("", "lowest and highest are what blocks are given")

    def edges(self, count: int, partition: Partition) -> list[float]:
        if partition != "equal-mass":
            raise ConfigError("partition", f"{partition!r} is of sigma; text is shared out by equal-mass")
        alphas = 1 - torch.arange(count + 1, dtype=torch.float64) / count
        return [float(t) for t in self.schedule.time(alphas)]

    def widened(self, low: float, high: float, share: float) -> tuple[float, float]:
        first, last = (1 - self.schedule.alpha(torch.tensor([low, high], dtype=torch.float64))).tolist()
        wider = torch.tensor([first - share * (last - first), last + share * (last - first)], dtype=torch.float64)
        start, stop = self.schedule.time(1 - wider.clamp(0, 1)).tolist()
        return start, stop

    def restricted(self, lowest: float | None, highest: float | None) -> dict[str, Any]:
        return {"lowest": lowest, "highest": highest}

    def label_at(self, edge: float) -> float:
        return 1000 * edge + 0.01  # a step that begins at an edge lifts masks below it: it is the lower block's


class Masked(Characters):
    """See the module's text.

    Attributes:
        network: told codes, of which V, after the last character, is the mask, and 1000 t.
    """

    config: MaskedConfig

    def __init__(self, config: MaskedConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.network = config.network.build(spec.shape, num_outputs=self.symbols)

    def probe(self, items: int) -> None:
        x = torch.zeros(items, *self.spec.shape, dtype=torch.int64, device=self.device)
        self.network(x, torch.full((items,), 500.0, device=self.device), None)

    def log_probabilities(self, codes: Tensor, t: Tensor) -> Tensor:
        """What the network makes of masked codes, int64 (B, length), at times (B,): float32 (B, V, length)."""
        logits = self.network(codes, (1000 * t).to(self.device, torch.float32), None).float()
        return F.log_softmax(logits, 1)

    def _hidden(self, alpha: Tensor, draws: Draws) -> Tensor:
        """Which characters are masked where a share alpha (B,) is left, bool (B, length)."""
        return _uniform(draws, self.spec.shape) >= alpha.to(self.device, torch.float32)[:, None]

    def _surprise(self, codes: Tensor, hidden: Tensor, t: Tensor) -> Tensor:
        """-log p of masked characters, summed, over the length of the text: (B,)."""
        log_p = self.log_probabilities(codes.masked_fill(hidden, self.symbols), t)
        return -(log_p.gather(1, codes[:, None])[:, 0] * hidden).sum(1) / codes.shape[1]

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        codes, schedule = self.spec.to_levels(batch.x0), self.config.schedule
        ends = torch.tensor([self.config.lowest or 0.0, 1.0 if self.config.highest is None else self.config.highest])
        first, last = (1 - schedule.alpha(ends.double())).clamp(min=_LEAST).tolist()
        share = first + (last - first) * draws.stratified()  # of masks, evenly: -alpha' dt is its measure
        t = schedule.time(1 - share)
        surprise = self._surprise(codes, self._hidden(1 - share, draws), t)
        return LossTerms(surprise / share.to(surprise), t)

    def bound(
        self,
        batch: Batch,
        draws: Draws,
        on_step: OnStep,
        *,
        num_steps: int | None = None,
        variance: str | None = None,
        clip: bool = True,
    ) -> BoundTerms:
        """The bound of the chain that samples: masks are lifted in steps, each with its own chance."""
        for name, given in (("variance", variance is not None), ("clip", not clip)):
            if given:
                raise UserError(f"{name}: masked has none to choose: its steps lift masks")
        codes = self.spec.to_levels(batch.x0)
        steps = self.config.schedule.steps(num_steps or _BOUND_STEPS)
        table = torch.empty(len(codes), len(steps), dtype=torch.float64)
        for index, (t, chance) in enumerate(steps):
            times = torch.full((len(codes),), t, dtype=torch.float64)
            surprise = self._surprise(codes, self._hidden(self.config.schedule.alpha(times), draws), times)
            table[:, index] = chance * surprise.cpu().double()
            on_step(index + 1, len(steps))
        at = torch.tensor([t for t, _ in steps], dtype=torch.float64)
        return BoundTerms(at, torch.zeros(len(codes), dtype=torch.float64), table)

    def written(
        self, codes: Tensor, missing: Tensor, draws: Draws, sampling: SamplingConfig, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, MaskedSampling)
        codes, steps = codes.masked_fill(missing, self.symbols), self.config.schedule.steps(sampling.num_steps)
        on_step(0, sampling.num_steps)
        for done, (t, chance) in enumerate(reversed(steps), 1):
            log_p = self.log_probabilities(codes, torch.full((len(codes),), t, dtype=torch.float64))
            self.require_finite(log_p)
            drawn = _drawn(log_p, _uniform(draws, self.spec.shape))
            lift = (codes == self.symbols) & ((_uniform(draws, self.spec.shape) < chance) | (done == len(steps)))
            codes = torch.where(lift, drawn, codes)
            on_step(done, sampling.num_steps)
        return codes, sampling.num_steps


def _uniform(draws: Draws, shape: tuple[int, ...]) -> Tensor:
    """Uniform values in (0, 1), float32 (count, *shape), of the items' own streams."""
    return torch.special.ndtr(draws.normal(shape))


def _drawn(log_p: Tensor, u: Tensor) -> Tensor:
    """Symbols of log-probabilities (B, V, length) by the inverse of their distribution at u: int64 (B, length)."""
    below = log_p.exp().cumsum(1) < u[:, None]
    return below.sum(1).clamp(max=log_p.shape[1] - 1)

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
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.configuration import Config, ConfigError, Registry
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.methods.base import GenerativeModel, MethodConfig, NetworkChoice, SamplingConfig
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


class MaskedConfig(MethodConfig, Shareable):
    """A network, and when characters are hidden."""

    kind: Literal["masked"] = "masked"
    network: NetworkChoice
    schedule: MaskingChoice = LinearMasking()
    lowest: float | None = Field(None, ge=0, lt=1, description="earliest time of training; what blocks are given")
    highest: float | None = Field(None, gt=0, le=1, description="latest time of training")
    sampling: MaskedSampling = MaskedSampling()

    @model_validator(mode="after")
    def _ordered(self) -> MaskedConfig:
        if (self.lowest or 0.0) >= (1.0 if self.highest is None else self.highest):
            raise ConfigError("lowest", f"{self.lowest} is not valid: has to be below highest, {self.highest}")
        return self

    @property
    def use(self) -> str:
        return "osmose sample {run} -n 8 --out samples.txt"

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        _require_text("masked", spec)
        return {"network": {"kind": "text"}}

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:  # noqa: ARG003
        return {"steps": 3000, "batch_size": 64, "lr": 1e-3}

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


def _require_text(method: str, spec: DataSpec) -> None:
    if spec.alphabet is None:
        raise UserError(f"{method}: is for text (--data text:FILE, text:python), and these data are {spec.kind}")


class Masked(GenerativeModel):
    """See the module's text.

    Attributes:
        network: told codes, of which V, after the last character, is the mask, and 1000 t.
        symbols: V, the characters of the alphabet.
    """

    config: MaskedConfig
    takes_text = True

    def __init__(self, config: MaskedConfig, spec: DataSpec):
        super().__init__(config, spec)
        _require_text("masked", spec)
        self.symbols = len(spec.alphabet or "")
        self.network = config.network.build(spec.shape, num_outputs=self.symbols)
        if config.conditional:
            raise UserError("method.conditional: true needs data with classes, and text has none")

    def networks(self) -> list[nn.Module]:
        return [self.network]

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
        grid = torch.linspace(0, 1, (num_steps or _BOUND_STEPS) + 1, dtype=torch.float64)
        alpha = self.config.schedule.alpha(grid)
        table = torch.empty(len(codes), len(grid) - 1, dtype=torch.float64)
        everyone = torch.ones(len(codes), dtype=torch.float64)
        for index in range(1, len(grid)):
            hidden = self._hidden(alpha[index] * everyone, draws)
            chance = float((alpha[index - 1] - alpha[index]) / (1 - alpha[index]))
            surprise = self._surprise(codes, hidden, grid[index] * everyone)
            table[:, index - 1] = chance * surprise.cpu().double()
            on_step(index, len(grid) - 1)
        return BoundTerms(grid[1:], torch.zeros(len(codes), dtype=torch.float64), table)

    def generate(
        self,
        draws: Draws,
        sampling: SamplingConfig,
        condition: Tensor | None,  # noqa: ARG002
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        masks = torch.full((draws.count, *self.spec.shape), self.symbols, device=self.device)
        return self._lifted(masks, draws, sampling, on_step)

    def complete(
        self,
        known: Tensor,
        times: Tensor | None,  # noqa: ARG002
        draws: Draws,
        sampling: SamplingConfig,
        condition: Tensor | None,  # noqa: ARG002
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        missing = known.isnan()
        codes = self.spec.to_levels(known.nan_to_num()).masked_fill(missing, self.symbols)
        return self._lifted(codes.to(self.device), draws, sampling, on_step)

    def _lifted(self, codes: Tensor, draws: Draws, sampling: SamplingConfig, on_step: Watch) -> tuple[Tensor, int]:
        """Lift all masks of codes, int64 (count, length)."""
        assert isinstance(sampling, MaskedSampling)
        grid = torch.linspace(0, 1, sampling.num_steps + 1, dtype=torch.float64)
        alpha = self.config.schedule.alpha(grid)
        on_step(0, sampling.num_steps)
        for done, index in enumerate(range(sampling.num_steps, 0, -1), 1):
            chance = float((alpha[index - 1] - alpha[index]) / (1 - alpha[index]))
            log_p = self.log_probabilities(codes, grid[index].expand(len(codes)))
            if not bool(log_p.isfinite().all()):
                raise UserError("masked: the network answers NaN or infinity; has training diverged?")
            drawn = _drawn(log_p, _uniform(draws, self.spec.shape))
            lift = (codes == self.symbols) & ((_uniform(draws, self.spec.shape) < chance) | (index == 1))
            codes = torch.where(lift, drawn, codes)
            on_step(done, sampling.num_steps)
        return self.spec.from_levels(codes), sampling.num_steps


def _uniform(draws: Draws, shape: tuple[int, ...]) -> Tensor:
    """Uniform values in (0, 1), float32 (count, *shape), of the items' own streams."""
    return torch.special.ndtr(draws.normal(shape))


def _drawn(log_p: Tensor, u: Tensor) -> Tensor:
    """Symbols of log-probabilities (B, V, length) by the inverse of their distribution at u: int64 (B, length)."""
    below = log_p.exp().cumsum(1) < u[:, None]
    return below.sum(1).clamp(max=log_p.shape[1] - 1)

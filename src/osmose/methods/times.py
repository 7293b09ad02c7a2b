r"""Timestep samplers: which t a training item gets, and the weight that keeps the objective unbiased.

They are modules, so that a sampler with a memory keeps it in its buffers, and so in every checkpoint.

Most laws are fixed. `loss-aware` is learned (improved DDPM, arXiv 2102.09672, section 3.3, eq. 18): it remembers the
last H losses of each of the T steps and, once every step has H of them, draws step t with probability

    p_t = (1 - u) sqrt(mean L_t^2) / Z + u / T,   Z = sum_t sqrt(mean L_t^2),

and weighs the loss by 1 / (T p_t). The expectation of the weighted loss is the plain mean over all t whatever p is;
what p decides is its variance, which is least where p_t is in proportion to sqrt(E L_t^2). The share u keeps every step
in play. Until the memory is full t is uniform: with few items a batch and many steps that takes long (about 180 batches
of 128 at T = 1000, 810 at T = 4000), and the part `loss_aware` of the log says whether it is over.

With `debias=false` the weight is left out. That is no longer the same objective with less noise, but another one,
sum_t p_t L_t, which follows the losses as they change and stresses the steps where they are large.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
import torch.distributed
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from osmose.configuration import Config, ConfigError
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.gaussian.grid import LAW_MEAN, LAW_STD
from osmose.gaussian.schedule import Schedule
from osmose.methods import TIME_SAMPLERS


class TimeSamplerConfig(Config, ABC):
    """Describes a law of training times."""

    kind: str
    stratified: bool = Field(
        False, description="spread the times of a batch evenly: less noise in the loss, the same expectation"
    )

    def build(self, schedule: Schedule) -> TimeSampler:
        """The sampler on a schedule.

        Raises:
            UserError: the law does not fit the schedule.
        """
        return TimeSampler(self, schedule)

    @abstractmethod
    def times(self, u: Tensor, schedule: Schedule) -> Tensor:
        """The inverse distribution function: u uniform in [0, 1), float64 (B,), to t in [0, 1].

        Of a law that is learned it is the one it starts from.
        """


class TimeSampler(nn.Module):
    """Draws training times from a fixed law; the base of those that learn theirs.

    A step of training is: `draw` and `observe` for each micro-batch, then `commit` once.

    Attributes:
        extra_updates: how many more times a step is to be observed, without training on it.
    """

    extra_updates: int = 0

    def __init__(self, config: TimeSamplerConfig, schedule: Schedule):
        super().__init__()
        self.config, self.schedule = config, schedule

    def draw(self, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Times, float64 (B,) on the CPU, and importance weights (B,), or None where all are 1.

        In evaluation mode they come from the law that is not adapted, so that losses can be compared.
        """
        return self.config.times(self._uniform(draws), self.schedule), None

    def observe(self, t: Tensor, per_item: Tensor) -> None:
        """Note the losses (B,), without any weight, that were found at t (B,); the law changes with `commit` alone."""

    def commit(self) -> None:
        """Learn from all that was noted since the last time, by all processes, in the order of the global batch."""

    def report(self, t: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Named terms (B,) to log with the losses at t (B,)."""
        return {}

    def _uniform(self, draws: Draws) -> Tensor:
        return draws.stratified() if self.config.stratified else draws.uniform()


#: A field that holds any registered law of training times.
TimesChoice = Annotated[SerializeAsAny[TimeSamplerConfig], BeforeValidator(TIME_SAMPLERS.parse)]


class UniformTimes(TimeSamplerConfig):
    """Uniform over the steps k/T, k = 1..T, of a discrete schedule, or over [0, 1) of a continuous one."""

    kind: Literal["uniform"] = "uniform"

    def times(self, u: Tensor, schedule: Schedule) -> Tensor:
        steps = schedule.native_steps
        return u if steps is None else ((u * steps).floor() + 1) / steps


class LogNormalTimes(TimeSamplerConfig):
    """log(sigma / alpha) ~ N(mean, std^2) (EDM, arXiv 2206.00364, table 1), limited to the schedule's range."""

    kind: Literal["log-normal"] = "log-normal"
    mean: float = LAW_MEAN
    std: float = Field(LAW_STD, gt=0)
    lowest: float | None = Field(None, gt=0, description="smallest sigma / alpha that is drawn; no limit if not given")
    highest: float | None = Field(None, gt=0, description="largest; the law between the two is as it is without them")

    @model_validator(mode="after")
    def _ordered(self) -> LogNormalTimes:
        if self.lowest is not None and self.highest is not None and self.lowest >= self.highest:
            raise ConfigError("lowest", f"{self.lowest:g} is not valid: has to be below highest, {self.highest:g}")
        return self

    def share_below(self, ratio: float) -> float:
        """The probability of a smaller sigma / alpha, without limits."""
        return float(torch.special.ndtr(torch.tensor((math.log(ratio) - self.mean) / self.std, dtype=torch.float64)))

    def ratio_at(self, share: float) -> float:
        """The inverse of `share_below`."""
        return math.exp(self.mean + self.std * float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64))))

    def times(self, u: Tensor, schedule: Schedule) -> Tensor:
        if self.lowest is not None or self.highest is not None:
            first = 0.0 if self.lowest is None else self.share_below(self.lowest)
            last = 1.0 if self.highest is None else self.share_below(self.highest)
            u = first + u * (last - first)
        # ndtri(0) is minus infinity; the smallest double above 0 is far beyond every schedule's range already.
        log_ratio = self.mean + self.std * torch.special.ndtri(u.clamp(min=1e-300))
        earliest = 1 / schedule.native_steps if schedule.native_steps else 0.0
        return schedule.time_of(-2 * log_ratio).clamp(min=earliest)


class LossAwareTimes(TimeSamplerConfig):
    """Steps of a discrete schedule as often as their recent losses are large (arXiv 2102.09672, section 3.3)."""

    kind: Literal["loss-aware"] = "loss-aware"
    history: int = Field(10, ge=1, description="H, the losses remembered of each step; until all have H, t is uniform")
    uniform_share: float = Field(0.001, gt=0, le=1, description="u, the share of uniform draws, so that none is lost")
    debias: bool = Field(
        True, description="weigh by 1 / (T p_t): the uniform objective; without, steps of large loss count for more"
    )
    extra_updates: int = Field(
        0,
        ge=0,
        description="further draws of t for each batch, from which only the history learns: one forward pass each",
    )

    def build(self, schedule: Schedule) -> LossAwareSampler:
        return LossAwareSampler(self, schedule)

    def times(self, u: Tensor, schedule: Schedule) -> Tensor:
        return UniformTimes().times(u, schedule)


class LossAwareSampler(TimeSampler):
    """See `LossAwareTimes`.

    Attributes:
        losses: the last H losses of each step, float32 (T, H); a ring in which the loss counted n stands at n mod H.
        counts: how many losses of each step there have been, int64 (T,).
    """

    config: LossAwareTimes
    losses: Tensor
    counts: Tensor

    def __init__(self, config: LossAwareTimes, schedule: Schedule):
        super().__init__(config, schedule)
        if schedule.native_steps is None:
            raise UserError(
                f"times: 'loss-aware' remembers losses step by step, and schedule {schedule.kind!r} is continuous; "
                "use schedule linear or cosine, or times uniform or log-normal"
            )
        self.extra_updates = config.extra_updates
        self.register_buffer("losses", torch.zeros(schedule.native_steps, config.history))
        self.register_buffer("counts", torch.zeros(schedule.native_steps, dtype=torch.int64))
        self._noted: list[Tensor] = []
        steps = torch.arange(1, schedule.native_steps + 1, dtype=torch.float64)
        self._quarter = (steps / schedule.native_steps * 4).long().clamp(max=3)  # as the log cuts its losses
        self._law = torch.full_like(steps, 1 / schedule.native_steps)

    @property
    def active(self) -> bool:
        """Whether the law is learned yet: every step has its H losses."""
        return bool((self.counts >= self.config.history).all())

    def probabilities(self) -> Tensor:
        """The law of the steps 1..T in training: p, float64 (T,) on the CPU, sums to 1."""
        size = self.losses.cpu().double().square().mean(1).sqrt()
        if not self.active or not bool(size.any()):
            return torch.full_like(size, 1 / len(size))
        share = self.config.uniform_share
        return (1 - share) * size / size.sum() + share / len(size)

    def draw(self, draws: Draws) -> tuple[Tensor, Tensor | None]:
        if not (self.training and self.active):
            return super().draw(draws)
        p = self._law = self.probabilities()
        # The sum of p may miss 1 by a rounding error, and u lie beyond it.
        index = torch.searchsorted(p.cumsum(0), self._uniform(draws), right=True).clamp(max=len(p) - 1)
        return (index + 1).double() / len(p), 1 / (len(p) * p[index]) if self.config.debias else None

    def observe(self, t: Tensor, per_item: Tensor) -> None:
        # One tensor, so that processes exchange one; float32 holds every index below 2^24, and MPS has no float64.
        index = (t * len(self.losses)).round() - 1
        self._noted.append(torch.stack([index.to(self.losses), per_item.detach().to(self.losses)]))

    @torch.no_grad()
    def commit(self) -> None:
        if not self._noted:
            return
        # Micro-batch by micro-batch, rank by rank: the order in which the trainer deals out the items of a batch.
        index, loss = torch.cat([_of_all_processes(noted) for noted in self._noted], 1)
        self._noted.clear()
        usable = loss.isfinite()  # one infinite loss would take all probability for its step, a NaN spoil the law
        index, order = index[usable].long().sort(stable=True)
        loss = loss[usable][order]
        new = index.bincount(minlength=len(self.counts))
        # Number each step's losses in the order they came, and keep the last H of them: no place is written twice.
        number = torch.arange(len(index), device=index.device) - (new.cumsum(0) - new)[index]
        kept = number >= new[index] - self.config.history
        index, number, loss = index[kept], number[kept], loss[kept]
        self.losses[index, (self.counts[index] + number) % self.config.history] = loss
        self.counts += new

    def report(self, t: Tensor) -> dict[str, Tensor]:
        if not self.training:
            return {}
        # The law itself, by quartile of t: where training goes.
        shares = torch.zeros(4, dtype=torch.float64).index_add_(0, self._quarter, self._law).tolist()
        logged = {"loss_aware": float(self.active)} | {f"p_q{i}": share for i, share in enumerate(shares, 1)}
        return {name: torch.full_like(t, value) for name, value in logged.items()}


def _of_all_processes(values: Tensor) -> Tensor:
    """The columns of (2, B) of all processes, in the order of their ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    gathered = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, values)
    return torch.cat(gathered, 1)

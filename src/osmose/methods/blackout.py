r"""Blackout diffusion: counts that lose their units one by one until all is 0, and a network that brings them back.

Every unit of a count n0 survives to a time with the probability p, n_t ~ Binomial(n0, p) (arXiv 2305.11089; the
mathematics is in `discrete.death`). Backwards counts only grow, at a rate of which everything but y = E[n0 - n_t | n_t]
is known: that is what the network predicts, for all values of an event at once. Samples begin at 0 everywhere and are
whole numbers all the way.

**What is learned.** The mean over values of W (y - d + d log(d / y)), d = n0 - n_t, whose minimiser is y = E[d | n_t]
for every weight W. With W = p |du|, u = log(p / (1 - p)), integrated over all times it is an upper limit of the
negative log-likelihood in nats, which exceeds the entropy of the data by what the model has not learned.

**How the network is read.** For values that are independent, each Binomial(M, b), Bayes' rule gives

    y = (M - n) o / (1 + o),   o = (1 - p) b / (1 - b),

whatever n and p: odds that fall with the share of lost units. The network's output F moves these odds,
y = (M - n) sigmoid(F + log(1 - p) + logit b), with b the mean of each value, fitted to the data: y is never more than
what can be missing, vanishes near the data by itself, and an untrained network is the best model of independent
Binomial values. `parametrization=softplus` is the published reading, y = softplus(F).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn
from torch.nn import functional as F

from osmose.data.dataset import DataSpec
from osmose.discrete import SURVIVALS
from osmose.discrete.death import (
    LogitSurvival,
    StepKind,
    Survival,
    end_for,
    loss_odds,
    mean_surprise,
    regained,
    steps,
    survival,
)
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.methods.base import GenerativeModel, MethodConfig, NetworkChoice, SamplingConfig
from osmose.methods.messages import Batch, BoundTerms, LossTerms, OnStep, Watch
from osmose.networks.presets import network_for

SurvivalChoice = Annotated[SerializeAsAny[Survival], BeforeValidator(SURVIVALS.parse)]

#: What every value of the network's input is divided by is at least this, where units are few.
_LEAST_DEVIATION = 0.25
#: Survivors that are expected at the end of the schedule above which people should know.
_MANY_SURVIVORS = 0.5
#: Items that the mean of a value counts for besides the data's own: it is never 0, nor the largest count.
_PRIOR_ITEMS = 1.0


class BlackoutSampling(SamplingConfig):
    """How units are given back."""

    num_steps: int = Field(200, ge=1, description="times of the grid that are visited")
    solver: StepKind = Field(
        "bridge",
        description="bridge: the mean rounded up or down at random; bridge-round: to the nearest, as published, which "
        "loses units; tau-leap: Poisson; binomial: a leap that cannot overshoot",
    )


class BlackoutConfig(MethodConfig):
    """A network, the schedule of survival, and what is learned at which times."""

    kind: Literal["blackout"] = "blackout"
    network: NetworkChoice
    schedule: SurvivalChoice = LogitSurvival()
    parametrization: Literal["odds", "softplus"] = Field(
        "odds", description="how the network is read: as odds of missing units, or as their number (published)"
    )
    objective: Literal["continuous", "instantaneous", "finite-time"] = Field(
        "continuous", description="at any time, or on the grid: its rates there, or its steps"
    )
    weighting: Literal["likelihood", "paper", "uniform"] = Field(
        "paper", description="of times: that of the likelihood, that times 1 - p as published, or none"
    )
    sampling: BlackoutSampling = BlackoutSampling()

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        if spec.levels is None:
            raise UserError(_NO_LEVELS.format(kind=spec.kind, shape=spec.shape))
        total = spec.dimension * (spec.levels - 1.0)  # units are levels
        if spec.kind == "counts" and spec.step is not None:
            total = sum(spec.shift) / spec.step
        return {
            "network": network_for(spec.shape),
            "schedule": {"kind": "logit", "t_end": round(end_for(total), 2)},
        }

    def build(self, spec: DataSpec) -> Blackout:
        return Blackout(self, spec)


_NO_LEVELS = (
    "blackout: needs counts, and these data ({kind} of shape {shape}) have no levels; it takes images of whole "
    "numbers, any images with --levels, and counts:PATH"
)


class Blackout(GenerativeModel):
    """See the module's text.

    Attributes:
        network: told n_t, standardised, and s on the scale 0..1000.
        share: mean of every value as a share of the largest count, shape (*event).
        mean, variance: of the counts of a channel (the first axis of an event), shape (channels,).
        largest: M, the largest count.
    """

    config: BlackoutConfig

    def __init__(self, config: BlackoutConfig, spec: DataSpec):
        super().__init__(config, spec)
        if spec.levels is None:
            raise UserError(_NO_LEVELS.format(kind=spec.kind, shape=spec.shape))
        self.largest = spec.levels - 1
        config.schedule.grid(config.sampling.num_steps)
        classes = spec.num_classes if config.conditional else None
        self.network = config.network.build(spec.shape, num_classes=classes)
        self.share = nn.Buffer(torch.full(spec.shape, 0.5))
        self.mean = nn.Buffer(torch.full(spec.shape[:1], self.largest / 2))
        self.variance = nn.Buffer(torch.full(spec.shape[:1], self.largest**2 / 12))

    def prepare(self, items: Iterable[Batch]) -> None:
        """Set what the network is told of the counts: means and variances."""
        number, total = 0, torch.zeros(self.spec.shape, dtype=torch.float64)
        squares = torch.zeros(self.spec.shape[0], dtype=torch.float64)
        for batch in items:
            n = self.spec.to_levels(batch.x0).cpu().double()
            number += len(n)
            total += n.sum(0)
            squares += n.square().view(len(n), self.spec.shape[0], -1).sum((0, 2))
        values = number * math.prod(self.spec.shape[1:])
        mean = total.view(self.spec.shape[0], -1).sum(1) / values
        self.share.copy_((total + _PRIOR_ITEMS * self.largest / 2) / ((number + _PRIOR_ITEMS) * self.largest))
        self.mean.copy_(mean)
        self.variance.copy_((squares / values - mean.square()).clamp(min=0.0))
        units, t_end = float(total.sum() / number), self.config.schedule.t_end
        if units * math.exp(-t_end) > _MANY_SURVIVORS:
            warnings.warn(
                f"schedule.t_end: at {t_end:g} {units * math.exp(-t_end):.2g} units of an item are left in the mean, "
                f"and samples begin with none; {end_for(units):.1f} leaves 0.1",
                stacklevel=2,
            )

    def networks(self) -> list[nn.Module]:
        return [self.network]

    def probe(self, items: int) -> None:
        condition = torch.zeros(items, dtype=torch.int64, device=self.device) if self.config.conditional else None
        n = torch.zeros(items, *self.spec.shape, dtype=torch.int64, device=self.device)
        self.missing(n, torch.ones(items, dtype=torch.float64), condition)

    def missing(self, n: Tensor, s: Tensor, condition: Tensor | None = None) -> Tensor:
        """Y, the number of units that are missing in the mean, float32 (B, *event), at least 0.

        Odds keep it below M - n; softplus does not, and steps cut it there.

        Args:
            n: counts at time s, int64 (B, *event).
            s: times in [0, 1], float64 (B,), on any device.
            condition: classes, int64 (B,), or None.
        """
        u = self.config.schedule.log_odds(s.cpu())
        p, q, log_q = (self._column(value) for value in (survival(u), loss_odds(u), F.logsigmoid(-u)))
        channel = (-1, *(1,) * (len(self.spec.shape) - 1))
        mean, variance = self.mean.view(channel), self.variance.view(channel)
        deviation = (p.square() * variance + p * q * mean + q * _LEAST_DEVIATION**2).sqrt()
        x = (n.to(torch.float32) - p * mean) / deviation
        label = (1000 * s).to(self.device, torch.float32)
        out = self.network(x, label, condition).float()
        left = self.largest - n
        if self.config.parametrization == "softplus":
            return F.softplus(out)  # not cut at M - n: what is too large would have no gradient to come back by
        return left * torch.sigmoid(out + log_q + torch.logit(self.share))

    def _column(self, values: Tensor) -> Tensor:
        """Of items, (B,), float32 beside their events on the device of the model."""
        return values.view(-1, *(1,) * len(self.spec.shape)).to(self.device, torch.float32)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        s, weight = self._times(draws.stratified())
        error = self._error(self.spec.to_levels(batch.x0), s, batch.condition, draws)[0]
        return LossTerms(error * weight.to(error), s, {"surprise": error.detach()})

    def _times(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Times for places in [0, 1), and what the surprise there is weighed by, float64 (B,) both."""
        schedule, objective = self.config.schedule, self.config.objective
        if objective == "continuous":
            s = place
            u = schedule.log_odds(s)
            weight = survival(u) * schedule.slope(s)  # of the likelihood: p |du|, per unit of s
        else:
            steps_ = schedule.num_steps
            index = (place * steps_).long()
            u = schedule.log_odds(schedule.grid())
            if objective == "instantaneous":  # p / (1 - p) per unit of -log p
                log_p = F.logsigmoid(u)
                earlier_log_p = torch.cat([torch.zeros(1, dtype=torch.float64), log_p[:-1]])
                table = survival(u) * (earlier_log_p - log_p) / loss_odds(u)
            else:
                earlier = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), u[:-1]])
                table = regained(earlier, u)
            s, u, weight = schedule.grid()[index], u[index], steps_ * table[index]
        if self.config.weighting == "uniform":
            return s, torch.ones_like(s)
        return s, weight * loss_odds(u) if self.config.weighting == "paper" else weight

    def _error(
        self, n0: Tensor, s: Tensor, condition: Tensor | None, draws: Draws, u: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean surprise over the values of each item at time s, (B,); the counts there and the units expected."""
        u = self.config.schedule.log_odds(s) if u is None else u
        p = survival(u.cpu()).view(-1, *(1,) * len(self.spec.shape))  # float64, which not every device has
        n = draws.binomial(n0, p.expand(n0.shape))
        y = self.missing(n, s, condition)
        return mean_surprise(y, (n0 - n).float()).flatten(1).mean(1), n, y

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
        """The bound in continuous time, from black to the first time of the grid, and of what is left there at once.

        The measure p du is that of -log(1 - p): a time is drawn evenly in it between neighbours of the grid. The last
        interval reaches to black itself, so that nothing is left over. From the first time on, the missing units are
        Binomial(M - n, y / (M - n)).
        """
        for name, given in (("variance", variance is not None), ("clip", not clip)):
            if given:
                raise UserError(f"{name}: blackout has none to choose: its steps are counts, inside the data's range")
        schedule = self.config.schedule
        grid = schedule.grid(num_steps)
        clock = -F.logsigmoid(-schedule.log_odds(grid))  # from the data to black, where it is 0
        n0 = self.spec.to_levels(batch.x0)
        table, x0_error = (torch.empty(len(n0), len(grid), dtype=torch.float64) for _ in range(2))
        everyone = torch.ones(len(n0), dtype=torch.float64)
        for index, s in enumerate(grid):
            if index == 0:
                _, n, y = self._error(n0, s * everyone, batch.condition, draws)
                table[:, 0] = self._decoder(n0, n, y)
                rest = clock[0] if len(grid) == 1 else None
            else:
                rest = clock[index - 1]
            if rest is not None:
                end = clock[index] if index < len(grid) - 1 else torch.zeros_like(rest)
                at = end + (rest - end) * (1 - draws.uniform())
                u = at + torch.log(-torch.expm1(-at))
                error, n, y = self._error(n0, schedule.position(u), batch.condition, draws, u)
                table[:, index] = (rest - end) * error.cpu().double() + (table[:, 0] if index == 0 else 0.0)
            x0_error[:, index] = (self.spec.from_levels(n + y) - batch.x0).square().flatten(1).mean(1)
            on_step(index + 1, len(grid))
        return BoundTerms(grid, torch.zeros(len(n0), dtype=torch.float64), table, x0_error)

    def _decoder(self, n0: Tensor, n: Tensor, y: Tensor) -> Tensor:
        """-log P(n0 | n) / D where every missing unit comes back at once, float64 (B,)."""
        left, d = (self.largest - n).cpu().double(), (n0 - n).cpu().double()
        chance = (y.cpu().double() / left.clamp(min=1)).clamp(1e-12, 1 - 1e-12)
        ways = torch.lgamma(left + 1) - torch.lgamma(d + 1) - torch.lgamma(left - d + 1)
        log_p = ways + d * chance.log() + (left - d) * torch.log1p(-chance)
        return -log_p.flatten(1).mean(1)

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, BlackoutSampling)
        grid = self.config.schedule.grid(sampling.num_steps)
        u, step = self.config.schedule.log_odds(grid), steps[sampling.solver]
        n = torch.zeros(draws.count, *self.spec.shape, dtype=torch.int64, device=self.device)
        on_step(0, len(grid), self.spec.from_levels(n))
        for index in reversed(range(len(grid))):
            y = self.missing(n, grid[index].expand(draws.count), condition)
            if not bool(y.isfinite().all()):
                raise UserError("blackout: the network answers NaN or infinity; has training diverged?")
            r = float(regained(u[index - 1], u[index])) if index else 1.0
            n = step(n.cpu(), y.cpu(), r, self.largest, draws).to(self.device)
            on_step(len(grid) - index, len(grid), self.spec.from_levels(n))
        return self.spec.from_levels(n), len(grid)

r"""Stochastic interpolants: from any law to any other, by an ODE or by an SDE chosen after training (arXiv 2303.08797).

A path x_t = alpha x0 + beta x1 + gamma z is given, and its fields are learned: the losses are in `between`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.gaussian.parametrization import column
from osmose.gaussian.score import ScoreField
from osmose.interpolants.coupling import ot_pairing
from osmose.interpolants.fields import read
from osmose.interpolants.transport import Epsilon
from osmose.methods.between import Between, Learned, PathConfig, PathSampling
from osmose.methods.messages import Batch, LossTerms
from osmose.networks.presets import network_for

#: Of the interval of times, until a time is exact.
_HALVINGS = 50


class InterpolantSampling(PathSampling):
    """How samples are carried along the path, and with how much noise."""

    epsilon: float = Field(0.0, ge=0, description="noise of the SDE; 0 is the ODE")
    follow: bool | None = Field(
        None,
        description="let epsilon fall with the noise of the path: epsilon gamma(t), or alpha; null: where it has to",
    )
    denoise: bool = Field(False, description="end with the estimate of the data instead of the last step")


class InterpolantConfig(PathConfig):
    """A path, what is learned on it, and how both ends are paired."""

    kind: Literal["interpolant"] = "interpolant"
    learn: Learned | None = Field(
        None,
        description="velocity b, drift v, denoiser eta, score s, w = alpha x1 - beta x0; null: what suits the path",
    )
    coupling: Literal["independent", "ot"] = Field(
        "independent", description="ot pairs the items of a pass with starts at the least squared distance (POT)"
    )
    sampling: InterpolantSampling = InterpolantSampling()

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        kind = "one-sided-linear" if spec.start is None else "linear"
        return {"network": network_for(spec.shape), "path": {"kind": kind}}

    @property
    def learned(self) -> Learned:
        """What is learned, when nothing is said what suits the path."""
        if self.learn is not None:
            return self.learn
        if self.path.mirror:
            return "eta"
        if self.path.kind == "one-sided-vp":  # whose b has a target that is infinite at t = 1
            return "w"
        return "b" if self.path.one_sided or not self.path.noisy else "b-eta"

    def build(self, spec: DataSpec) -> Interpolant:
        return Interpolant(self, spec)


class Interpolant(Between):
    """The fields of a path that is given."""

    config: InterpolantConfig

    def __init__(self, config: InterpolantConfig, spec: DataSpec):
        super().__init__(config, spec)
        if config.coupling == "ot" and spec.paired:
            raise UserError("coupling: ot would pair anew what data.paired has paired; take independent")

    def _start(self, batch: Batch, draws: Draws) -> Tensor:
        start = super()._start(batch, draws)
        if self.config.coupling == "ot":
            start = start[ot_pairing(start, batch.x0, batch.condition).to(start.device)]
        return start

    def score_field(self) -> ScoreField:
        path, cap = self.config.path, self.config.cap
        if not path.one_sided or self.spec.start is not None:
            raise UserError(
                f"interpolant: the noise of {path.kind} is not all that is between its ends: there is no score of data "
                "under noise; paths from noise, as one-sided-linear, have one"
            )
        if self.config.coupling == "ot":
            raise UserError(
                "interpolant: coupling=ot pairs noise with data, and what is learned then is no score of the data"
            )
        early, late = path.at(cap), path.at(1 - cap)

        def estimate(y: Tensor, ratios: Tensor, condition: Tensor | None) -> Tensor:
            t = self._time_of(ratios)
            c = path.at(t)
            x = y * column(c.beta, y)
            data = read(self.learned, path, c, x, self._outputs(x, t, condition)).eta1
            assert data is not None
            return data.to(y.dtype)

        # Samples begin with noise of deviation 1 at the first time.
        return ScoreField(
            estimate, float(late.alpha / late.beta), float(early.alpha / early.beta), 1 / float(early.beta)
        )

    def _time_of(self, ratios: Tensor) -> Tensor:
        """When alpha / beta has some values, float64 (B,): halving the interval, as it falls from noise to data."""
        path, cap = self.config.path, self.config.cap
        low, high = torch.full_like(ratios, cap), torch.full_like(ratios, 1 - cap)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            c = path.at(middle)
            above = c.alpha > ratios * c.beta
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        meeting = self._meet(batch, draws)
        parts = self._regress(meeting)
        total = torch.stack(list(parts.values())).sum(0)
        return LossTerms(total, meeting.t, {name: part.detach() for name, part in parts.items()})

    def _noise(self, sampling: PathSampling) -> tuple[Epsilon, bool]:
        assert isinstance(sampling, InterpolantSampling)
        path, follow = self.config.path, sampling.follow
        if follow and not path.noisy:
            raise ConfigError("follow", f"true is not valid: {path.kind} has no noise here to follow")
        if follow is not None and sampling.epsilon == 0:
            raise ConfigError("follow", f"{str(follow).lower()} has nothing to say where epsilon is 0; give epsilon")
        if follow is None:  # where the score is the learned noise divided by what has no finite integral
            follow = sampling.epsilon > 0 and (path.one_sided or (path.flat and "eta" in self.learned))
        return Epsilon(sampling.epsilon, path if follow else None), sampling.denoise

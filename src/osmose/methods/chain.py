"""Models on a Gaussian process: what they are made of, and the chain from noise to data that some sample by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.gaussian import NOISES, PARAMETRIZATIONS, SCHEDULES, SOLVERS
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import Draws
from osmose.gaussian.grid import Spacing
from osmose.gaussian.noise import Noise, WhiteNoise
from osmose.gaussian.parametrization import Parametrization
from osmose.gaussian.schedule import Level, Schedule
from osmose.gaussian.solvers import DDIM, Solver
from osmose.methods.base import GenerativeModel, MethodConfig, NetworkChoice, SamplingConfig
from osmose.methods.messages import Batch, Watch
from osmose.methods.moments import Moments
from osmose.networks.calibration import Levels, calibrations
from osmose.networks.presets import network_for

SolverChoice = Annotated[SerializeAsAny[Solver], BeforeValidator(SOLVERS.parse)]
ScheduleChoice = Annotated[SerializeAsAny[Schedule], BeforeValidator(SCHEDULES.parse)]
ParametrizationChoice = Annotated[SerializeAsAny[Parametrization], BeforeValidator(PARAMETRIZATIONS.parse)]
NoiseChoice = Annotated[SerializeAsAny[Noise], BeforeValidator(NOISES.parse)]

#: Times at which a continuous schedule is tabulated for networks, and the log-SNR beyond which they are alike.
_FINE, _LOG_SNR = 1025, 10.0


class ProcessConfig(MethodConfig, ABC):
    """The parts of every model on a process x_t = alpha x0 + sigma eps: a network, and what it is read through."""

    network: NetworkChoice
    schedule: ScheduleChoice
    parametrization: ParametrizationChoice
    noise: NoiseChoice = WhiteNoise()

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {"network": network_for(spec.shape)}

    def denoiser(self, spec: DataSpec, **outputs: int) -> NetworkDenoiser:
        """The network with fresh weights, read as E[x0 | x_t]; with `num_outputs=2`, and a learned variance."""
        network = self.network.build(spec.shape, num_classes=spec.num_classes if self.conditional else None, **outputs)
        for calibration in calibrations(network):
            calibration.set_levels(levels_of(self.schedule, self.parametrization))
        return NetworkDenoiser(network, self.schedule, self.parametrization, bool(outputs))


def levels_of(schedule: Schedule, parametrization: Parametrization) -> Levels:
    """What a network meets on a schedule: all steps of a discrete one, a fine grid of a continuous one.

    Its feature of time is minus the log-SNR, kept in [-10, 10] and brought to [-1, 1].
    """
    steps = schedule.native_steps
    first, count = (1 / steps, steps) if steps else (0.0, _FINE)
    level = schedule.level(torch.linspace(first, 1, count, dtype=torch.float64))
    c = parametrization.coefficients(level)
    columns = (torch.as_tensor(value, dtype=torch.float64).expand(count) for value in c)
    c_in, _, _, target_signal, target_noise = columns
    noisy = -schedule.log_snr(level.t).clamp(-_LOG_SNR, _LOG_SNR)
    low, high = float(noisy.min()), float(noisy.max())
    time = 2 * (noisy - low) / max(high - low, 1e-9) - 1
    label = torch.as_tensor(schedule.label(level), dtype=torch.float64)
    return Levels(label, time, c_in * level.alpha, c_in * level.sigma, target_signal, target_noise)


def calibrate(network: nn.Module, items: Iterable[Batch], spec: DataSpec) -> None:
    """Fit what a network wants to know of the training items; nothing for most, which leave them alone."""
    if found := calibrations(network):
        moments = Moments.of(items, spec)
        for calibration in found:
            calibration.fit(moments.means[0], moments.scatter / moments.counts.sum())


class GaussianSampling(SamplingConfig):
    """Solver, number of steps and their spacing."""

    num_steps: int = Field(50, ge=1, description="solver steps")
    solver: SolverChoice = DDIM()
    spacing: Spacing = "even"
    clip: bool = Field(True, description="keep the denoised estimate inside the data's range, where there is one")


class GuidedSampling(GaussianSampling):
    """And how strongly the class is stressed."""

    guidance: float | None = Field(
        None,
        gt=0,
        description="factor of what the class adds to the estimate, above 1 to stress it, at a second evaluation a "
        "step; of runs with label_dropout",
    )


class ChainModel(GenerativeModel):
    """A model whose samples pass through all noise levels of a schedule.

    Attributes:
        schedule: the noise schedule.
        denoiser: E[x0 | x_t], what distillation, analysis and guidance work with.
    """

    schedule: Schedule
    denoiser: NetworkDenoiser

    @abstractmethod
    def noise(self, draws: Draws) -> Tensor:
        """The standard noise of the items, (draws.count, *event); chains begin at it, times `schedule.prior_std`."""

    @abstractmethod
    def entry(self, t: float, sampling: GaussianSampling) -> Level[float]:
        """Where the chain is entered at time t: its first level at or below t.

        Args:
            t: process time in (0, 1]; of a schedule with T steps a multiple of 1 / T.
            sampling: the steps of the whole chain.

        Raises:
            UserError: t outside (0, 1], between two steps of the schedule, or below the last level of the chain.
        """

    @abstractmethod
    def level_at(self, ratio: float, sampling: GaussianSampling) -> Level[float]:
        """Where the chain is left at a noise-to-signal ratio: at that level, or the schedule's step nearest to it.

        Args:
            ratio: sigma / alpha, above 0; beyond the chain's first level, this is taken, below its last step, that.
            sampling: the steps of the whole chain.
        """

    @abstractmethod
    def recall(
        self, x0: Tensor, t: float, draws: Draws, sampling: GaussianSampling, condition: Tensor | None
    ) -> Tensor:
        """What is left of items that are noised as at time t: E[x0 | x_t], model units, shape of x0.

        Args:
            x0: items in the model's units, shape (draws.count, *event).
            t: process time in (0, 1]; the level is that of `entry`.
            draws: the noise.
            sampling: the steps of the whole chain, and whether estimates are kept inside the data's range.
            condition: class of each item, or None.

        Raises:
            UserError: as `entry`.
        """

    @abstractmethod
    def refine(
        self,
        x0: Tensor,
        t: float,
        draws: Draws,
        sampling: GaussianSampling,
        condition: Tensor | None,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        """Finish rough samples: noise them to the level where the chain is entered at time t, and go on from there.

        Args:
            x0: rough samples in the model's units, shape (draws.count, *event).
            t: process time in (0, 1]; at 1 the whole chain is run.
            draws: the noise; the first that is drawn is that of the start, as in `generate`.
            sampling: the steps of the whole chain; those at levels above t are left out.
            condition: class of each sample, or None.
            on_step: called after each step with the number done and the number to do.

        Returns:
            Samples in the model's units, and the network evaluations spent on each.

        Raises:
            UserError: as `entry`.
        """

    @abstractmethod
    def outline(
        self, ratio: float, draws: Draws, sampling: GaussianSampling, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        """Leave the chain in the middle: E[x0 | x_t] where sigma / alpha has come down to `ratio`.

        Args:
            ratio: noise-to-signal ratio sigma / alpha, above 0; the level is that of `level_at`.
            draws: the noise, as in `generate`.
            sampling: the steps of the whole chain; those below the level are left out.
            condition: class of each sample, or None.
            on_step: called after each step with the number done and the number to do.

        Returns:
            Estimates in the model's units, and the network evaluations spent on each.
        """

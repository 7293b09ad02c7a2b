r"""Functional diffusion: data are functions on a grid, and noise is a random function (FDP, arXiv 2303.00800).

The modes c of an item (sines and cosines, or cosines alone) are diffused each at its own rate and with its own noise
(`processes.modes`), whose variances r_k fall with the frequency (`processes.spectrum`): unlike white noise, such noise
is a function with values everywhere, and so is every state on the way. A model is thereby one of functions, of which a
grid is a way to look at them: a network that knows where its points are can be asked on other grids.

**What is learned.** x0_hat = E[x_0 | x_t], on the points, by the mean over modes of

    w_k |modes(x0_hat) - modes(x_0)|_k^2,

whose minimiser is the same for all w: `prior` (published), b_k / r_k, one over the variance of the noise; `posterior`,
one over the error of the best linear estimate, so that the loss is 1 where nothing more is known, at all times.

**How the network is read.** `x0`: as x0_hat (published). `filter`: with mean mu and variances s_k of the modes of the
data, fitted before training, the best linear estimate is known, and so is its error:

    x0_hat_k = mu_k + m s / (m^2 s + v q) (c - m mu)_k + sqrt(s v q / (m^2 s + v q)) F_k,     v = r / b,  q = 1 - m^2,

so that an untrained network is the best linear filter, which is all there is to know of Gaussian data. On a finer grid
nothing is known of frequencies beyond those of the data: their s is 0, and samples are smooth there. Read as `x0`, they
are what the network says.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws
from osmose.methods.base import GenerativeModel, MethodConfig, NetworkChoice, SamplingConfig
from osmose.methods.densities import level_decoder
from osmose.methods.fields import Fields
from osmose.methods.messages import Batch, BoundTerms, LossTerms, OnStep, Watch
from osmose.networks.base import Everywhere
from osmose.networks.implicit import Implicit
from osmose.networks.presets import network_for
from osmose.processes import DRIFTS, SPECTRA, SPEEDS
from osmose.processes.kriging import conditioned
from osmose.processes.modes import ConstDrift, Drift, ModeProcess, Speed, VPSpeed
from osmose.processes.spectrum import BasisKind, PowerSpectrum, Spectrum, slope

SpectrumChoice = Annotated[SerializeAsAny[Spectrum], BeforeValidator(SPECTRA.parse)]
DriftChoice = Annotated[SerializeAsAny[Drift], BeforeValidator(DRIFTS.parse)]
SpeedChoice = Annotated[SerializeAsAny[Speed], BeforeValidator(SPEEDS.parse)]

#: The quietest time: of training, and of the last estimate.
_FIRST = 1e-3
#: Data whose power of |k| is larger by so much are rougher than the noise.
_ROUGHER = 0.5
#: More of the data than this at t = 1 is a share that people should know of.
_RESIDUAL = 0.1
#: Gaps between times that differ by no more than this share are alike.
_EVEN = 1e-3
#: Steps of the chain whose bound is taken.
_BOUND_STEPS = 1000


class FunctionalSampling(SamplingConfig):
    """How samples come about, and on which grid."""

    num_steps: int = Field(50, ge=1, description="times that are visited, evenly spaced")
    solver: Literal["posterior", "em", "pf-ode", "pc"] = Field(
        "posterior",
        description="posterior: exact for a given estimate; em: Euler's of the SDE; pf-ode: of the ODE, which does not "
        "forget how it began; pc: as published, em with a corrector and churn at three evaluations a step",
    )
    resolution: int | None = Field(
        None, ge=1, description="points along the last axis, others in proportion; those of the data if not given"
    )
    at: tuple[tuple[float, ...], ...] | None = Field(
        None, description="points in [0, 1] on each axis to look at samples at, instead of the grid"
    )
    clip: bool = Field(True, description="keep the estimate inside the data's range, where there is one")
    fill: Literal["linear", "replace"] = Field(
        "linear",
        description="what values that are known do: correct the estimate of the others as the covariance of the data "
        "says, or stand in place of theirs alone (published)",
    )
    snr: float = Field(0.16, gt=0, description="of pc: step of the corrector")
    churn: float = Field(0.6, ge=0, description="of pc: how far each step is noised again and repeated, in steps")


class FunctionalConfig(MethodConfig):
    """A network, the noise and its diffusion, and what is learned."""

    kind: Literal["fdp"] = "fdp"
    network: NetworkChoice
    basis: BasisKind = Field("fourier", description="fourier for periodic functions, dct for others")
    spectrum: SpectrumChoice = PowerSpectrum()
    drift: DriftChoice = ConstDrift()
    speed: SpeedChoice = VPSpeed()
    parametrization: Literal["x0", "filter"] | None = Field(
        None, description="how the network is read, see the module; x0 if it is implicit, filter if not"
    )
    weighting: Literal["prior", "posterior", "likelihood", "uniform"] | None = Field(
        None,
        description="of the errors of modes: by the variance of the noise (published; if the network is read as x0), "
        "by that of the best linear estimate's error (if as filter), by the bound of the likelihood, or not at all",
    )
    sampling: FunctionalSampling = FunctionalSampling()

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        if spec.kind == "image":  # on two axes noise has a limit above an exponent of 1, and images are rough
            network = network_for(spec.shape)
            return {"network": network, "basis": "dct", "spectrum": {"kind": "power", "exponent": 1.25}}
        basis = "dct" if spec.kind == "series" else "fourier"  # their ends seldom meet
        return {"network": {"kind": "uvit", "patch": 1, "width": 64}, "basis": basis}

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:
        return {} if spec.kind == "image" else {"steps": 2000, "batch_size": 64, "lr": 1e-3}

    def build(self, spec: DataSpec) -> Functional:
        return Functional(self, spec)


class Functional(GenerativeModel):
    """See the module's text.

    Attributes:
        network: told x_t and t on the scale 0..1000.
        fields: the noise on any grid.
        filters: whether the network adds to the best linear estimate.
        weighting: of errors.
        mean: of the modes of the data, float32 (C, *grid).
        spread: their variances.
    """

    config: FunctionalConfig

    def __init__(self, config: FunctionalConfig, spec: DataSpec):
        super().__init__(config, spec)
        if spec.kind not in ("image", "function", "series") or len(spec.shape) not in (2, 3):
            raise UserError(
                f"fdp: needs functions on a grid, and these data are {spec.kind} of shape {spec.shape}; it takes "
                "images and regular series"
            )
        self.grid = spec.shape[1:]
        self.fields = Fields(config.basis, config.spectrum, config.drift, config.speed)
        self.fields.on(self.grid)
        self.network = config.network.build(spec.shape, num_classes=spec.num_classes if config.conditional else None)
        if isinstance(self.network, Everywhere):
            self.network.offset = self.fields.on(self.grid).harmonics.offset
        implicit = isinstance(self.network, Implicit)
        if implicit and config.parametrization == "filter":
            raise UserError(
                "parametrization: 'filter' is not for a network that is fitted to its input; take x0, or leave it out"
            )
        if isinstance(self.network, Implicit):
            self.network.whiten = self.fields.whiten
        self.filters = config.parametrization == "filter" or (config.parametrization is None and not implicit)
        self.weighting = config.weighting or ("posterior" if self.filters else "prior")
        self.mean = nn.Buffer(torch.zeros(spec.shape))
        self.spread = nn.Buffer(torch.ones(spec.shape))
        if config.sampling.at is not None:
            raise UserError("sampling.at: is said when samples are drawn; training has no use for it")
        try:
            self.sampling()
        except UserError as error:  # before training, not after
            raise UserError(f"sampling.{error}") from None

    def prepare(self, items: Iterable[Batch]) -> None:
        """Fit mean and variances of the modes, and tell what people should know of the noise beside them."""
        field, number = self.fields.on(self.grid), 0
        total, squares = (torch.zeros(self.spec.shape, dtype=torch.float64) for _ in range(2))
        for batch in items:
            if not bool(batch.x0.isfinite().all()):
                raise UserError("data: hold NaN or infinity, and fdp needs every value; cspd learns from gaps")
            self._require_even(batch.times)
            c = field.harmonics.modes(batch.x0.cpu().double())
            number, total, squares = number + len(c), total + c.sum(0), squares + c.square().sum(0)
        mean = total / number
        variances = (squares / number - mean.square()).clamp(min=0.0)
        self.mean.copy_(mean)
        self.spread.copy_(variances)
        self.config.spectrum.trace(field.harmonics)
        squared = field.harmonics.squared
        data, noise = (slope(v, squared) for v in (variances.mean(0), field.process.state))
        if data > noise + _ROUGHER:
            warnings.warn(
                f"spectrum: the data are rougher than the noise: variances of modes go as |k|^{data:.1f} and "
                f"|k|^{noise:.1f}, and errors at high frequencies outweigh all others; take a smaller exponent",
                stacklevel=2,
            )
        if field.process.residual > _RESIDUAL:
            warnings.warn(
                f"speed.beta_max: {field.process.residual:.0%} of a mode of the data are left at t = 1, and samples "
                "begin with none; take a larger one",
                stacklevel=2,
            )

    def _require_even(self, times: Tensor | None) -> None:
        """Refuse times of series that are no grid."""
        if times is None or times.shape[1] < 3:
            return
        gaps = times.diff(dim=1)
        if bool((gaps - gaps.mean()).abs().max() > _EVEN * gaps.mean()):
            raise UserError("times: are not evenly spaced, and fdp needs a grid; cspd takes any times")

    def networks(self) -> list[nn.Module]:
        return [self.network]

    def probe(self, items: int) -> None:
        condition = torch.zeros(items, dtype=torch.int64, device=self.device) if self.config.conditional else None
        x = torch.zeros(items, *self.spec.shape, device=self.device)
        self.estimate(x, torch.ones(items, dtype=torch.float64), condition)

    def estimate(self, c: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """x0_hat on the points, float32 (B, C, *grid).

        Args:
            c: modes of x_t on any grid, float32 (B, C, *grid).
            t: times in (0, 1], float64 (B,) on the CPU.
            condition: classes, int64 (B,), or None.
        """
        grid = tuple(c.shape[2:])
        field = self.fields.on(grid)
        out = self.network(field.harmonics.values(c), (1000 * t).to(c), condition).float()
        if not self.filters:
            return out
        mean, spread = self._moments(grid)
        kept, gain = field.process.kept(t)[:, None], field.process.filter(t[:, None], spread)
        error = self._error(field.process, t, spread)
        modes = mean.to(c) + gain.to(c) * (c - kept.to(c) * mean.to(c))
        return field.harmonics.values(modes + error.sqrt().to(c) * field.harmonics.modes(out))

    def _error(self, process: ModeProcess, t: Tensor, spread: Tensor) -> Tensor:
        """The variance of x_0 given x_t for Gaussian data, float64 (B, C, *grid)."""
        total = process.variance(t[:, None], spread)
        return torch.where(total > 0, spread * process.state * process.fresh(t)[:, None] / total, 0.0)

    def _moments(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mean and variances of the modes of the data on any grid, float64 (C, *grid) on the CPU."""
        mean, spread = self.mean.cpu().double(), self.spread.cpu().double()
        if grid == self.grid:
            return mean, spread
        own = self.fields.on(self.grid).harmonics
        return own.onto(mean, grid), own.onto(spread.sqrt(), grid).square()

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        t = _FIRST + (1 - _FIRST) * draws.stratified()
        field = self.fields.on(self.grid)
        c0 = field.harmonics.modes(batch.x0)
        kept, fresh = field.process.kept(t)[:, None], field.process.fresh(t)[:, None]
        eps = draws.normal(self.spec.shape).to(c0)
        c = kept.to(c0) * c0 + (field.process.state * fresh).sqrt().to(c0) * eps
        error = (field.harmonics.modes(self.estimate(c, t, batch.condition)) - c0).square()
        per_item = (error * self._weights(t).to(error)).flatten(1).mean(1)
        return LossTerms(per_item, t, {"x0_error": error.detach().flatten(1).sum(1) / self.spec.shape[0]})

    def _weights(self, t: Tensor) -> Tensor:
        """Of squared errors of modes, float64, (B, C, *grid) or what goes with it."""
        process, weighting = self.fields.on(self.grid).process, self.weighting
        if weighting == "likelihood":
            return process.bound_weights(t)[:, None]
        if weighting == "posterior":
            error = self._error(process, t, self._moments(self.grid)[1])
            return torch.where(error > 0, 1 / error, 0.0)
        return process.weights() if weighting == "prior" else torch.tensor(float(self.spec.dimension))

    def sampling(self, **options: Any) -> SamplingConfig:
        chosen = super().sampling(**options)
        assert isinstance(chosen, FunctionalSampling)
        self._grid(chosen)
        if chosen.at is not None:
            self._require_points(chosen.at)
            if chosen.resolution is not None:
                raise UserError("resolution: given with at, whose points take the place of a grid; give one of them")
        return chosen

    def _require_points(self, points: tuple[tuple[float, ...], ...]) -> None:
        """Refuse points that are not in [0, 1] on each axis."""
        if self.spec.kind == "series":
            raise UserError("at: given, and series are looked at by their times; take times")
        axes = len(self.grid)
        for index, point in enumerate(points):
            if len(point) != axes:
                raise UserError(f"at: point {index} has {len(point)} coordinates, and functions here have {axes}")
            if not all(0 <= p <= 1 for p in point):  # nor is NaN
                raise UserError(f"at: point {index} is {point}; coordinates have to be in [0, 1]")
        if not points:
            raise UserError("at: no points given")

    def _grid(self, sampling: FunctionalSampling) -> tuple[int, ...]:
        """The grid of samples.

        Raises:
            UserError: one that data or network do not allow.
        """
        points = sampling.resolution
        if points is None or points == self.grid[-1]:
            return self.grid
        if points < self.grid[-1]:
            raise UserError(
                f"resolution: {points} is below that of the data, {self.grid[-1]}; draw at theirs and leave points out"
            )
        if self.spec.kind == "series":
            raise UserError(f"resolution: {points} given, and series have times of their own; take times")
        if not isinstance(self.network, Everywhere):
            raise UserError(
                f"resolution: {points} is not that of the data, {self.grid[-1]}, and {self.config.network.kind} is "
                "bound to its grid; uvit and implicit are not"
            )
        if any(side * points % self.grid[-1] for side in self.grid):
            raise UserError(f"resolution: {points} points to {self.grid[-1]} leave no whole number of the other axis")
        grid = tuple(side * points // self.grid[-1] for side in self.grid)
        self.fields.on(grid)
        self.network.require(grid)
        return grid

    def ends(self, sampling: SamplingConfig) -> tuple[DataSpec | None, DataSpec]:
        assert isinstance(sampling, FunctionalSampling)
        grid, channels = self._grid(sampling), self.spec.shape[0]
        if sampling.at is not None:
            values = {"kind": "function", "shape": (channels, len(sampling.at)), "levels": None}
            return None, DataSpec.parse(self.spec.to_json() | values)
        return None, self.spec if grid == self.grid else self.spec.replace(shape=(channels, *grid))

    def given_for(self, draws: Draws) -> tuple[Tensor, Tensor] | None:
        times = self.spec.some_times(draws.count)
        if times is None:
            return None
        return torch.full((draws.count, *self.spec.shape), torch.nan, device=self.device), times

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, FunctionalSampling)
        points = None if sampling.at is None else torch.tensor(sampling.at, dtype=torch.float64)
        return self._run(self._grid(sampling), None, draws, sampling, condition, on_step, points)

    def complete(
        self,
        known: Tensor,
        times: Tensor | None,
        draws: Draws,
        sampling: SamplingConfig,
        condition: Tensor | None,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        """`generate` with the estimate replaced by what is known, wherever it is; series may be drawn at any times.

        With equal rates and `solver=posterior` the known points of x_t then have exactly the law of the truth diffused
        to t, with noise that goes on smoothly into that of the others.

        With `fill=linear` what is unknown is corrected by what the known points say of it: for Gaussian data whose
        modes are independent, the estimate is E[x_0 | x_t, known]. With `replace` it hears of them by x_t alone, and
        is drawn with a bias, as by any replacement, towards what is probable without them.
        """
        assert isinstance(sampling, FunctionalSampling)
        if sampling.at is not None:
            raise UserError("at: given with known; whole items are completed")
        grid = self._grid(sampling)
        if times is not None and bool(known.isnan().all()):
            points = self._points_of(times)
            return self._run(grid, None, draws, sampling, condition, on_step, points)
        self._require_even(times)
        if tuple(known.shape[2:]) != grid:
            raise UserError(
                f"times: {known.shape[2]} given, and fdp has a grid of {grid[0]}; dspd and cspd take any times"
            )
        if times is not None and self.spec.series is not None and grid[0] > 1:
            gap, own = float(times.diff(dim=1).mean()), self.spec.series.span / (grid[0] - 1)
            if abs(gap - own) > _EVEN * own:
                raise UserError(f"times: lie {gap:.4g} apart, and those of the data {own:.4g}; cspd takes any times")
        return self._run(grid, known, draws, sampling, condition, on_step)

    def _points_of(self, times: Tensor) -> Tensor | None:
        """Where times of series (n, L) lie on [0, 1], float64 (L, 1); None for those of the data themselves."""
        form, own = self.spec.series, self.spec.some_times(len(times))
        assert form is not None
        assert own is not None
        if times.shape == own.shape and bool(((times - own).abs() <= _EVEN * form.gap).all()):
            return None
        first, last = float(own[0, 0]), float(own[0, -1])
        if bool((times != times[:1]).any()):
            raise UserError("times: differ between samples, and fdp looks at all of a batch at the same")
        if float(times.min()) < first or float(times.max()) > last:
            raise UserError(
                f"times: reach from {float(times.min()):g} to {float(times.max()):g}, and functions here from "
                f"{first:g} to {last:g}; dspd and cspd go on"
            )
        harmonics, side = self.fields.on(self.grid).harmonics, self.grid[0]
        steps = (times[0] - first) / (last - first) * (side - 1)
        return ((steps + harmonics.offset) / side)[:, None]

    def _run(
        self,
        grid: tuple[int, ...],
        known: Tensor | None,
        draws: Draws,
        sampling: FunctionalSampling,
        condition: Tensor | None,
        on_step: Watch,
        points: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        field, normal = self.fields.on(grid), self._noise(draws, grid)
        process, calls = field.process, 0
        limits = self.spec.model_range if sampling.clip else None

        def estimate(c: Tensor, t: float) -> Tensor:
            nonlocal calls
            calls += 1
            x0 = self.estimate(c, torch.full((draws.count,), t, dtype=torch.float64), condition)
            if not bool(x0.isfinite().all()):
                raise UserError("fdp: the network answers NaN or infinity; has training diverged?")
            if known is not None and sampling.fill == "linear":
                error = self._error(process, torch.tensor([t], dtype=torch.float64), self._moments(grid)[1])
                x0 = conditioned(x0, known, error, field.harmonics)
            if limits is not None:
                x0 = x0.clamp(*limits)
            return x0 if known is None else torch.where(known.isnan(), x0, known)

        def modes(c: Tensor, t: float) -> Tensor:
            return field.harmonics.modes(estimate(c, t))

        def shown(c: Tensor) -> Tensor:
            return field.harmonics.values(c) if points is None else field.harmonics.at(c, points)

        times = torch.linspace(1.0, _FIRST, sampling.num_steps, dtype=torch.float64).tolist()
        c = normal() * process.state.sqrt().to(self.device, torch.float32)
        on_step(0, len(times), shown(c))
        for index, (t, s) in enumerate(itertools.pairwise(times)):
            if sampling.solver == "pc":
                c = process.corrected(c, modes(c, t), t, sampling.snr, normal())
            x0 = modes(c, t)
            if sampling.solver == "posterior":
                mean, variance = process.posterior(c, x0, t, s)
                c = mean + variance.sqrt().to(c) * normal()
            else:
                c = process.backwards(c, x0, t, s, None if sampling.solver == "pf-ode" else normal())
            if sampling.solver == "pc" and sampling.churn:
                u = min(s + sampling.churn * (t - s), 1.0)
                c = process.diffuse(c, s, u, normal())
                c = process.backwards(c, modes(c, u), u, s, normal())
            on_step(index + 1, len(times), shown(c))
        x = estimate(c, times[-1])
        if points is not None and isinstance(self.network, Implicit) and not self.network.config.y_input:
            label = torch.full((draws.count,), 1000 * times[-1]).to(c)  # it is a function of the points itself
            x, calls = self.network(field.harmonics.values(c), label, condition, points.to(c)), calls + 1
        elif points is not None:
            x = field.harmonics.at(field.harmonics.modes(x), points)
        on_step(len(times), len(times), x)
        return x, calls

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
        """Of a chain of posterior steps, as `solver=posterior` takes, but evenly spaced in log t, where they cost most.

        In many steps it is that of the continuous process, the integral of `ModeProcess.bound_weights`.

        At the end data are drawn around the last estimate, with the variance of the best linear one: their levels or,
        of data without, their modes, for a density in the data's units.
        """
        if variance is not None:
            raise UserError(f"variance: {variance!r} given, and the chain of fdp has that of its posterior alone")
        decoder = level_decoder(self.spec)
        if decoder is None and self.spec.levels is not None:
            raise UserError("likelihood: fdp needs the same levels in all channels")
        steps = _BOUND_STEPS if num_steps is None else num_steps
        if steps < 2:
            raise UserError(f"num_steps: {steps} is not valid: the bound needs 2 steps at least, and more to be near")
        field = self.fields.on(self.grid)
        process, limits = field.process, self.spec.model_range if clip else None
        times = torch.logspace(math.log10(_FIRST), 0.0, steps, dtype=torch.float64).clamp(max=1.0)
        x0, count, D = batch.x0, len(batch.x0), self.spec.dimension
        c0 = field.harmonics.modes(x0)
        table, errors = (torch.empty(count, steps, dtype=torch.float64) for _ in range(2))
        for index, t in enumerate(times.tolist()):
            c = process.diffuse(c0, 0.0, t, draws.normal(self.spec.shape).to(c0))
            x0_hat = self.estimate(c, times[index].expand(count), batch.condition)
            x0_hat = x0_hat if limits is None else x0_hat.clamp(*limits)
            squares = (c0 - field.harmonics.modes(x0_hat)).cpu().double().square()
            errors[:, index] = squares.flatten(1).sum(1) / self.spec.shape[0]
            if index:
                table[:, index] = (process.step_weights(t, float(times[index - 1])) * squares).flatten(1).sum(1) / D
            else:
                error = self._error(process, times[:1], self._moments(self.grid)[1])
                error = torch.where(error > 0, error, process.state * process.fresh(t))  # modes that never differ
                if decoder is None:
                    log_v = error.log() + 2 * self._log_units()
                    table[:, 0] = (math.log(2 * math.pi) + log_v + squares / error).flatten(1).mean(1) / 2
                else:
                    log_v = error.flatten(1).sum(1).div(self.spec.shape[0]).log()
                    table[:, 0] = decoder.nll(x0, x0_hat, log_v.expand_as(x0)).flatten(1).mean(1).cpu()
            on_step(index + 1, steps)
        prior = process.start_kl(c0.cpu()).flatten(1).sum(1) / D
        return BoundTerms(times, prior, table, errors, is_density=decoder is None)

    def _log_units(self) -> Tensor:
        """Log of the size in data units of a mode of size 1 among the values of its grid, float64 (C, 1 ...)."""
        scale = torch.tensor(self.spec.scale, dtype=torch.float64)
        return (scale.log() + math.log(math.prod(self.grid)) / 2).view(-1, *(1,) * len(self.grid))

    def _noise(self, draws: Draws, grid: tuple[int, ...]) -> Callable[[], Tensor]:
        """Draws standard normal modes on a grid, those that it shares with the grid of the data as they are there.

        A seed thereby gives one function, looked at on several grids.
        """
        channels = self.spec.shape[0]
        if grid == self.grid:
            return lambda: draws.normal(self.spec.shape)
        others = draws.branch("finer")
        return lambda: _laid_into(others.normal((channels, *grid)), draws.normal(self.spec.shape))


def _laid_into(whole: Tensor, part: Tensor) -> Tensor:
    """`whole` with the first modes of its last axes, as far as there are any, from `part`; copies."""
    some = tuple(slice(min(sides)) for sides in zip(whole.shape, part.shape, strict=True))
    result = whole.clone()
    result[some] = part[some]
    return result

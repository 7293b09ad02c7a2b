r"""What goes along a path from one law to another by learned fields: what interpolants and bridges have in common.

    x_t = alpha(t) x0 + beta(t) x1 + gamma(t) z,    z ~ N(0, I),    t from 0 to 1

goes from items of one data set (or noise) at t = 0 to those of another at t = 1; the mathematics is in
`interpolants/`. Time runs to the data here. What is learned are conditional means of known targets: the velocity b of
the ODE, the denoiser eta = E[z | x_t] that the score of an SDE needs, or the parts that they follow from. The losses
are mean squares over values. Where gamma' is infinite at the ends (gamma = sqrt(a t (1 - t))) so is the variance of the
target of b: there the noise comes in pairs +z and -z (arXiv 2303.08797, section 3), and the constant gamma'^2 z^2 is
left out:

    mean over both signs of |b - (alpha' x0 + beta' x1)|^2 - 2 gamma' (+-z) b

has the same gradient in the mean, and stays finite. So does |s|^2 + 2 (+-z) s / gamma, of which only differences mean
anything.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws, SampleDraws, mix
from osmose.gaussian.parametrization import column
from osmose.interpolants import PATHS
from osmose.interpolants.fields import LEARNED, Fields, check_learned, read, require_score
from osmose.interpolants.paths import Coefficients, Path, check_path, interpolate
from osmose.interpolants.transport import Epsilon, FieldsAt, Solver, evaluations, grid, log_density, transport
from osmose.methods.base import GenerativeModel, MethodConfig, NetworkChoice, SamplingConfig
from osmose.methods.chain import calibrate
from osmose.methods.messages import Batch, BoundTerms, OnStep, Watch
from osmose.methods.moments import level_step
from osmose.networks.calibration import Levels, calibrations

PathChoice = Annotated[SerializeAsAny[Path], BeforeValidator(PATHS.parse)]
Learned = Literal["b", "b-eta", "v-eta", "b-s", "v-s", "eta", "w"]

#: Values of held-out items to begin with that a run keeps, and how many items at most.
_KEPT_VALUES, _KEPT_ITEMS = 2**20, 4096
#: Values of an item up to which the divergence of the velocity is computed exactly: one backward pass for each.
_EXACT = 16
#: Times at which a one-sided path is tabulated for networks that want to know it.
_FINE = 1025


class PathSampling(SamplingConfig):
    """How samples are carried along a path."""

    num_steps: int = Field(50, ge=1, description="steps from one end to the other")
    solver: Solver = Field("heun", description="heun is of second order for ODE and SDE; rk4 is for the ODE")
    direction: Literal["forward", "backward"] = Field("forward", description="backward goes from data to the source")


class PathConfig(MethodConfig):
    """What interpolants and bridges have in common."""

    network: NetworkChoice
    path: PathChoice
    cap: float = Field(1e-4, gt=0, lt=0.1, description="times are kept so far from both ends")
    sampling: PathSampling = PathSampling()

    @property
    @abstractmethod
    def learned(self) -> Learned:
        """The fields that are learned."""


class Meeting(NamedTuple):
    """What a batch meets on its paths.

    Attributes:
        t: times (B,).
        c: the coefficients there.
        x0: beginnings (B, *event).
        x1: ends.
        place: where paths are without their noise.
        slope: how fast they go there.
        z: the noise.
        signs: that it is taken with.
        condition: classes (B,), or None.
    """

    t: Tensor
    c: Coefficients[Tensor]
    x0: Tensor
    x1: Tensor
    place: Tensor
    slope: Tensor
    z: Tensor
    signs: Sequence[float]
    condition: Tensor | None

    @property
    def x_t(self) -> Tensor:
        """With all signs below each other, (signs B, *event)."""
        width = column(self.c.gamma, self.z)
        return torch.cat([self.place + sign * width * self.z for sign in self.signs])


class Between(GenerativeModel):
    """What goes along a path from one law to another by learned fields.

    Attributes:
        network: told x_t and 1000 t; an output for each field that is learned.
        starts: held-out items of the data to begin with, one after the other, where samples are given none;
            (0, *event) where samples begin with noise.
    """

    config: PathConfig
    takes_start: ClassVar[bool] = True

    def __init__(self, config: PathConfig, spec: DataSpec):
        super().__init__(config, spec)
        path, self.learned = config.path, config.learned
        if spec.start is not None and path.one_sided:
            raise UserError(f"path: {path.kind} begins with noise, and --source names data to begin with; take linear")
        if spec.start is None and path.mirror:
            raise UserError("path: mirror begins with items of the data; name them as --source, too")
        start = spec.start
        if path.mirror and start is not None and (start.shift, start.scale) != (spec.shift, spec.scale):
            raise UserError("path: mirror begins with the data themselves; name one data set as --data and --source")
        check_path(path)
        check_learned(self.learned, path)
        if config.sampling.direction == "backward":
            raise UserError(
                "sampling.direction: 'backward' needs items to begin with, which previews have not; train forward, and "
                "sample with direction=backward"
            )
        try:
            self.sampling()
        except ConfigError as error:
            raise UserError(f"sampling.{error}") from None
        classes = spec.num_classes if config.conditional else None
        count = len(LEARNED[self.learned])
        self.network = config.network.build(spec.shape, num_classes=classes, num_outputs=count)
        for calibration in calibrations(self.network):
            if not path.one_sided:
                raise UserError(
                    f"network: {config.network.kind} stands on the best linear prediction, which is known on one-sided "
                    "paths alone; take mlp or unet, or path=one-sided-linear"
                )
            calibration.set_levels(self._levels())
        kept = max(1, min(_KEPT_ITEMS, _KEPT_VALUES // spec.dimension)) if spec.start is not None else 0
        self.starts = nn.Buffer(torch.zeros(kept, *spec.shape))

    def _levels(self) -> Levels:
        """What the network meets on a one-sided path, whose noise is x0."""
        t = torch.linspace(self.config.cap, 1 - self.config.cap, _FINE, dtype=torch.float64)
        c = self.config.path.at(t)
        signal, noise = (c.beta_dot, c.alpha_dot) if self.learned == "b" else (c.alpha, -c.beta)
        return Levels(1000 * t, 2 * t - 1, c.beta, c.alpha, signal, noise)

    def prepare(self, items: Iterable[Batch]) -> None:
        calibrate(self.network, items, self.spec)

    def keep_starts(self, starts: Tensor) -> None:
        order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0))
        self.starts.copy_(starts[order[torch.arange(len(self.starts)) % len(starts)]])

    def networks(self) -> list[nn.Module]:
        return [self.network]

    def probe(self, items: int) -> None:
        condition = torch.zeros(items, dtype=torch.int64, device=self.device) if self.config.conditional else None
        self._outputs(torch.zeros(items, *self.spec.shape, device=self.device), torch.zeros(items), condition)

    def _outputs(self, x: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """The fields that are learned, float32, at times (B,)."""
        out = self.network(x, (1000 * t).to(x.device, torch.float32), condition).float()
        return out.chunk(len(LEARNED[self.learned]), dim=1)

    def _start(self, batch: Batch, draws: Draws) -> Tensor:
        """What each item's path begins with."""
        if self.spec.start is None:
            return draws.normal(self.spec.shape).to(batch.x0)
        return batch.start if batch.start is not None else self._kept(draws)

    def _starts(self, draws: Draws) -> Tensor:
        """Of samples: the kept ones in their order, from a place that the seed decides, each once before the next."""
        assert isinstance(draws, SampleDraws), "training draws its starts by `_kept`"
        first = mix(draws.seed, "starts") % len(self.starts) + draws.first
        place = torch.arange(first, first + draws.count) % len(self.starts)
        return self.starts[place.to(self.device)]

    def _kept(self, draws: Draws) -> Tensor:
        return self.starts[(draws.uniform() * len(self.starts)).long().to(self.device)]

    def _course(self, c: Coefficients[Tensor], x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Where paths are without their noise, and their slopes."""
        return interpolate(c, x0, x1), column(c.alpha_dot, x0) * x0 + column(c.beta_dot, x1) * x1

    def _meet(self, batch: Batch, draws: Draws) -> Meeting:
        cap, path = self.config.cap, self.config.path
        t = cap + (1 - 2 * cap) * draws.stratified()
        c, x0, x1 = path.at(t), self._start(batch, draws), batch.x0
        if path.one_sided or not path.noisy:
            signs, z = [0.0], torch.zeros_like(x1)
        else:
            names = LEARNED[self.learned]
            signs = [1.0, -1.0] if "b" in names or "s" in names else [1.0]
            z = draws.normal(self.spec.shape).to(x1)
        place, slope = self._course(c, x0, x1)
        return Meeting(t, c, x0, x1, place, slope, z, signs, batch.condition)

    def _outputs_at(self, meeting: Meeting) -> tuple[Tensor, ...]:
        """The fields at all of x_t."""
        count, condition = len(meeting.signs), meeting.condition
        return self._outputs(
            meeting.x_t, meeting.t.repeat(count), None if condition is None else condition.repeat(count)
        )

    def _regress(self, meeting: Meeting) -> dict[str, Tensor]:
        """The loss of each field, (B,)."""
        outputs = zip(LEARNED[self.learned], self._outputs_at(meeting), strict=True)
        return {name: self._part(name, out.chunk(len(meeting.signs)), meeting) for name, out in outputs}

    def _part(self, name: str, outs: Sequence[Tensor], meeting: Meeting) -> Tensor:
        """The loss of a field, (B,), a mean over the signs of the noise."""
        losses = []
        c, z = meeting.c, meeting.z
        for out, sign in zip(outs, meeting.signs, strict=True):
            if name == "eta":
                values = (out - sign * z).square()
            elif name == "w":
                values = (out - column(c.alpha, z) * meeting.x1 + column(c.beta, z) * meeting.x0).square()
            elif name == "s":
                values = out.square() + 2 * sign * column(1 / c.gamma, z) * z * out
            else:
                values = (out - meeting.slope).square()
                if name == "b" and sign:
                    values = values - 2 * sign * column(c.gamma_gamma_dot / c.gamma, z) * z * out
            losses.append(values.flatten(1).mean(1))
        return torch.stack(losses).mean(0)

    def fields_at(self, condition: Tensor | None = None) -> FieldsAt:
        """The fields at a time and x (B, *event), of given classes, int64 (B,), or None."""

        def at(t: float, x: Tensor) -> Fields:
            outputs = self._outputs(x, torch.full((len(x),), t), condition)
            return read(self.learned, self.config.path, self.config.path.point(t), x, outputs)

        return at

    def sampling(self, **options: Any) -> SamplingConfig:
        chosen = super().sampling(**options)
        assert isinstance(chosen, PathSampling)
        if self._noise(chosen)[0].scale > 0:
            require_score(self.learned, self.config.path)
            if chosen.solver == "rk4":
                raise ConfigError("solver", "'rk4' is for the ODE; take heun where epsilon > 0")
        self.ends(chosen)
        return chosen

    def ends(self, sampling: SamplingConfig) -> tuple[DataSpec | None, DataSpec]:
        assert isinstance(sampling, PathSampling)
        if sampling.direction == "forward":
            return self.spec.start, self.spec
        if self.spec.start is None:
            raise UserError("direction: backward ends in noise here; a run with --source goes from its data to others")
        return self.spec, self.spec.start

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, PathSampling)
        if sampling.direction == "backward":
            raise UserError("direction: backward begins with items of the data: give them, with --from FILE")
        start = draws.normal(self.spec.shape) if self.spec.start is None else self._starts(draws)
        return self.translate(start, draws, sampling, condition, on_step)

    @abstractmethod
    def _noise(self, sampling: PathSampling) -> tuple[Epsilon, bool]:
        """The noise of the SDE, and whether it ends with the estimate of the data."""

    def translate(
        self, start: Tensor, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, PathSampling)
        cap, steps = self.config.cap, sampling.num_steps
        times = grid(steps, cap, 1 - cap) if sampling.direction == "forward" else grid(steps, 1 - cap, cap)
        epsilon, denoise = self._noise(sampling)

        def noise() -> Tensor:
            return draws.normal(self.spec.shape)

        x = start
        on_step(0, steps, x)
        states = transport(self.fields_at(condition), x, times, epsilon, noise, sampling.solver, denoise)
        for index, state in enumerate(states):
            x = state.x
            on_step(index + 1, steps, x)
        return x, evaluations(sampling.solver, steps, denoise)

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
        """The log-density by the ODE (section 2.5), of items that are dequantised where they have levels.

        It is a density, and no bound, of data without levels, and of others a bound through the uniform noise of their
        dequantisation (arXiv 1511.01844). The divergence is exact up to 16 values an item, and Hutchinson's estimate
        beyond. Numbers are those of the data's own units.
        """
        for name, given in (("variance", variance is not None), ("clip", not clip)):
            if given:
                raise UserError(f"{name}: the ODE of {self.config.kind} has none to choose")
        if self.spec.start is not None:
            raise UserError(
                f"{self.config.kind}: the density of the data to begin with is unknown, and so is that of samples"
            )
        count, cap = num_steps or 50, self.config.cap
        # Not in inference mode, in which the caller is: the divergence is a derivative.
        with torch.inference_mode(False):
            x, step = batch.x0.clone(), level_step(self.spec)
            condition = None if batch.condition is None else batch.condition.clone()
            if step is None:
                scale = torch.tensor(self.spec.scale, dtype=torch.float64)
                shift = scale.log().mean()
            else:
                u = torch.special.ndtr(draws.normal(self.spec.shape).cpu().double()).to(x)  # uniform in (0, 1)
                x = x + (u - 0.5) * step.to(x)
                shift = -step.log().mean()
            fields_at = self.fields_at(condition)

            def velocity(t: float, x: Tensor) -> Tensor:
                on_step(min(count, 1 + round((1 - t) * count)), count)
                b = fields_at(t, x).b
                assert b is not None
                return b

            def log_prior(x: Tensor) -> Tensor:
                return -(x.cpu().double().square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2

            log_p, integrals = log_density(
                velocity,
                x,
                grid(count, 1 - cap, cap),
                log_prior,
                "exact" if self.spec.dimension <= _EXACT else "hutchinson",
                normal=lambda: draws.normal(self.spec.shape).clone(),
            )
        D = self.spec.dimension
        t = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        return BoundTerms(
            (t[1:] + t[:-1]) / 2,
            shift - log_p.cpu() / D,
            -integrals.cpu() / D,
            is_density=step is None,
            is_exact=step is None,
        )

r"""Stochastic interpolants: from any law to any other, by an ODE or by an SDE chosen after training (arXiv 2303.08797).

    x_t = alpha(t) x0 + beta(t) x1 + gamma(t) z,    z ~ N(0, I),    t from 0 to 1

goes from items of one data set (or noise) at t = 0 to those of another at t = 1; the mathematics is in
`interpolants/`. Time runs to the data here. What is learned are conditional means of known targets: the velocity b of
the ODE, the denoiser eta = E[z | x_t] that the score of an SDE needs, or the parts that they follow from. The losses
are mean squares over values. Where gamma' is infinite at the ends (gamma = sqrt(a t (1 - t))) so is the variance of the
target of b: there the noise comes in pairs +z and -z (section 3), and the constant gamma'^2 z^2 is left out:

    mean over both signs of |b - (alpha' x0 + beta' x1)|^2 - 2 gamma' (+-z) b

has the same gradient in the mean, and stays finite. So does |s|^2 + 2 (+-z) s / gamma, of which only differences mean
anything.

A bridge looks for the path itself (section 5.2): of all processes dX = u dt + sqrt(2 epsilon) dW between the two laws
the Schroedinger bridge has the least energy int E|u|^2 dt. It is the saddle point

    max over I, min over u of  int E[ |u|^2 / 2 - (I' + (gamma' - epsilon / gamma) z) . u ] dt

with x0, x1 and z independent, where u = b + epsilon s of the path I for any I. So b and s are learned by their losses
as above, on a path that a second network bends so that their u has less energy.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from osmose.interpolants.coupling import ot_pairing
from osmose.interpolants.fields import LEARNED, Fields, check_learned, read, require_score
from osmose.interpolants.paths import Coefficients, Path, check_path, interpolate
from osmose.interpolants.transport import Epsilon, FieldsAt, Solver, evaluations, grid, log_density, transport
from osmose.methods.base import (
    Batch,
    BoundTerms,
    GenerativeModel,
    LossTerms,
    MethodConfig,
    NetworkChoice,
    OnStep,
    SamplingConfig,
    Watch,
)
from osmose.methods.chain import calibrate
from osmose.methods.moments import level_step
from osmose.networks.calibration import Levels, calibrations
from osmose.networks.presets import network_for

PathChoice = Annotated[SerializeAsAny[Path], BeforeValidator(PATHS.parse)]
Learned = Literal["b", "b-eta", "v-eta", "b-s", "v-s", "eta", "w"]

#: Values of held-out items to begin with that a run keeps, and how many items at most.
_KEPT_VALUES, _KEPT_ITEMS = 2**20, 4096
#: Values of an item up to which the divergence of the velocity is computed exactly: one backward pass for each.
_EXACT = 16
#: Times at which a one-sided path is tabulated for networks that want to know it.
_FINE = 1025
#: Functions of time that a bridge's path is bent by, an even number.
_BENDS = 4
#: The path has to follow more slowly than the fields, which have to be those of the path: at the same rate both turn
#: around the saddle point.
_PACE = 0.2


class PathSampling(SamplingConfig):
    """How samples are carried along a path."""

    num_steps: int = Field(50, ge=1, description="steps from one end to the other")
    solver: Solver = Field("heun", description="heun is of second order for ODE and SDE; rk4 is for the ODE")
    direction: Literal["forward", "backward"] = Field("forward", description="backward goes from data to the source")


class InterpolantSampling(PathSampling):
    """How samples are carried along the path, and with how much noise."""

    epsilon: float = Field(0.0, ge=0, description="noise of the SDE; 0 is the ODE")
    follow: bool | None = Field(
        None,
        description="let epsilon fall with the noise of the path: epsilon gamma(t), or alpha; null: where it has to",
    )
    denoise: bool = Field(False, description="end with the estimate of the data instead of the last step")


class BridgeSampling(PathSampling):
    """How samples are carried along a bridge."""

    epsilon: float | None = Field(None, ge=0, description="noise of the SDE; null is the bridge's own, 0 the ODE")


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


class BridgeConfig(PathConfig):
    """The process of least energy between two laws, among all with one noise."""

    kind: Literal["bridge"] = "bridge"
    epsilon: float = Field(0.5, ge=0, description="noise of the process, sqrt(2 epsilon) dW; 0 is optimal transport")
    sampling: BridgeSampling = BridgeSampling()

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        return {"network": network_for(spec.shape), "path": {"kind": "linear"}}

    @property
    def learned(self) -> Learned:
        """Both fields of which u is the sum: a denoiser would be divided by gamma."""
        return "b-s"

    def build(self, spec: DataSpec) -> Bridge:
        return Bridge(self, spec)


class _Meeting(NamedTuple):
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


class _Between(GenerativeModel):
    """What goes along a path from one law to another by learned fields.

    Attributes:
        network: told x_t and 1000 t; an output for each field that is learned.
        starts: held-out items of the data to begin with, of which samples without others begin with one at random,
            each; (0, *event) where samples begin with noise.
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
        more = {} if len(LEARNED[self.learned]) == 1 else {"num_outputs": len(LEARNED[self.learned])}
        self.network = config.network.build(spec.shape, num_classes=classes, **more)
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
        if not isinstance(draws, SampleDraws):
            return self._kept(draws)
        first = mix(draws.seed, "starts") % len(self.starts) + draws.first
        place = torch.arange(first, first + draws.count) % len(self.starts)
        return self.starts[place.to(self.device)]

    def _kept(self, draws: Draws) -> Tensor:
        return self.starts[(draws.uniform() * len(self.starts)).long().to(self.device)]

    def _course(self, c: Coefficients[Tensor], x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Where paths are without their noise, and their slopes."""
        return interpolate(c, x0, x1), column(c.alpha_dot, x0) * x0 + column(c.beta_dot, x1) * x1

    def _meet(self, batch: Batch, draws: Draws) -> _Meeting:
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
        return _Meeting(t, c, x0, x1, place, slope, z, signs, batch.condition)

    def _outputs_at(self, meeting: _Meeting) -> tuple[Tensor, ...]:
        """The fields at all of x_t."""
        count, condition = len(meeting.signs), meeting.condition
        return self._outputs(
            meeting.x_t, meeting.t.repeat(count), None if condition is None else condition.repeat(count)
        )

    def _regress(self, meeting: _Meeting) -> dict[str, Tensor]:
        """The loss of each field, (B,)."""
        outputs = zip(LEARNED[self.learned], self._outputs_at(meeting), strict=True)
        return {name: self._part(name, out.chunk(len(meeting.signs)), meeting) for name, out in outputs}

    def _part(self, name: str, outs: Sequence[Tensor], meeting: _Meeting) -> Tensor:
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
        return BoundTerms((t[1:] + t[:-1]) / 2, shift - log_p.cpu() / D, -integrals.cpu() / D, is_density=step is None)


class Interpolant(_Between):
    """See the module's text: fields are learned on a path that is given."""

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


class Bridge(_Between):
    """See the module's text: fields are learned on a path that is bent towards the Schroedinger bridge.

    The bend is t (1 - t) sum_k P_k(2 t - 1) f_k(x0, x1) with Legendre polynomials P_k, so that its slope is exact and
    both ends stay where they are.

    Attributes:
        bend: a network of the kind of `network`, told (x0, x1) below each other; its outputs are the f_k.
    """

    config: BridgeConfig

    def __init__(self, config: BridgeConfig, spec: DataSpec):
        super().__init__(config, spec)
        path = config.path
        if spec.paired:
            raise UserError("data.paired: true is not for a bridge, whose ends are drawn independently of each other")
        if path.one_sided or path.mirror or not path.noisy:
            raise UserError(
                f"path: {path.kind} cannot become a bridge, which needs two ends that do not depend on each other, and "
                "noise between them; take linear"
            )
        both, classes = (2 * spec.shape[0], *spec.shape[1:]), spec.num_classes if config.conditional else None
        self.bend = config.network.build(both, num_classes=classes, num_outputs=_BENDS // 2)

    @property
    def not_compiled(self) -> str:
        return "the path of a bridge is bent by the gradient of its field in x_t; take training.compile=false"

    def networks(self) -> list[nn.Module]:
        return [self.network, self.bend]

    def _bent(self, meeting: _Meeting) -> _Meeting:
        """The same meeting on the bent path."""
        ends = torch.cat([meeting.x0, meeting.x1], dim=1)
        outs = self.bend(ends, torch.zeros(len(ends), device=ends.device), meeting.condition).float()
        place, slope = meeting.place, meeting.slope
        shape, slopes = _bends(meeting.t)
        for k, out in enumerate(outs.chunk(_BENDS, dim=1)):
            place = place + column(_PACE * shape[k], out) * out
            slope = slope + column(_PACE * slopes[k], out) * out
        return meeting._replace(place=place, slope=slope)

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        bent = self._bent(self._meet(batch, draws))
        parts = self._regress(bent._replace(place=bent.place.detach(), slope=bent.slope.detach()))
        energy = -2 * self._objective(bent)
        total = torch.stack(list(parts.values())).sum(0) + energy / 2
        return LossTerms(total, bent.t, {name: part.detach() for name, part in (parts | {"energy": energy}).items()})

    def _objective(self, bent: _Meeting) -> Tensor:
        """|u|^2 / 2 - (I' + (gamma' - epsilon / gamma) z) . u, a mean over values and both signs of z, (B,).

        At its minimum in u it is -E|u|^2 / 2. Only the path gets its gradient.
        """
        epsilon, c = self.config.epsilon, bent.c
        with _still(self.network):
            b, s = (out.chunk(len(bent.signs)) for out in self._outputs_at(bent))
        push = column((c.gamma_gamma_dot - epsilon) / c.gamma, bent.z) * bent.z
        values = []
        for sign, one, other in zip(bent.signs, b, s, strict=True):
            u = one + epsilon * other
            values.append(u.square() / 2 - (bent.slope + sign * push) * u)
        return torch.stack(values).flatten(2).mean((0, 2))

    def fields_at(self, condition: Tensor | None = None) -> FieldsAt:
        straight = super().fields_at(condition)

        def at(t: float, x: Tensor) -> Fields:
            fields = straight(t, x)
            # Of a bent path the ends do not follow from b and s.
            return Fields(fields.b, fields.s, fields.eta)

        return at

    def _noise(self, sampling: PathSampling) -> tuple[Epsilon, bool]:
        assert isinstance(sampling, BridgeSampling)
        return Epsilon(self.config.epsilon if sampling.epsilon is None else sampling.epsilon), False


def _bends(t: Tensor) -> tuple[Tensor, Tensor]:
    """T (1 - t) P_k(2 t - 1) and its slope for k = 0, 1, ..., each (_BENDS, B), float64."""
    u, form = 2 * t - 1, (t * (1 - t), 1 - 2 * t)
    values, slopes = [torch.ones_like(u), u], [torch.zeros_like(u), 2 * torch.ones_like(u)]
    for k in range(1, _BENDS - 1):
        values.append(((2 * k + 1) * u * values[k] - k * values[k - 1]) / (k + 1))
        slopes.append(((2 * k + 1) * (2 * values[k] + u * slopes[k]) - k * slopes[k - 1]) / (k + 1))
    value, slope = torch.stack(values), torch.stack(slopes)
    return form[0] * value, form[1] * value + form[0] * slope


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """What is computed inside has no gradient in the network's parameters."""
    wanting = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)

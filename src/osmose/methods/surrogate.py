"""A surrogate before a chain: rough samples of something cheap, noised to t_mid, finished by a trained diffusion.

    x~0 from the surrogate;  x_t = alpha x~0 + sigma eps at t = t_mid;  the diffusion's own reverse steps from there.

Nothing is trained for it. The distance between the law of x_t and that of noised data falls as t_mid rises (both go
through the same noise), while the steps that are left rise: t_mid trades the one for the other. At t_mid = 0 the
samples are the surrogate's, at 1 the diffusion's. Known as ES-DDPM (arXiv 2205.12524), and, for pictures given by hand,
as SDEdit (arXiv 2108.01073).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from osmose.configuration import Config, ConfigError
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws, SampleDraws, seeded
from osmose.gaussian.schedule import CLEAN, Level
from osmose.methods.base import GenerativeModel, MethodChoice, MethodConfig, SamplingConfig
from osmose.methods.chain import ChainModel, GuidedSampling
from osmose.methods.messages import Batch, LossTerms, Watch


class Source(Config, ABC):
    """Where rough samples come from.

    Attributes:
        origin: name of the run folder or file, for people.
        sha256: of its weights or samples.
    """

    kind: str
    origin: str
    sha256: str

    @abstractmethod
    def build(self, spec: DataSpec) -> Rough:
        """The source, for a chain on data of a form; its weights come from the run folder.

        Raises:
            UserError: it makes something else than such data.
        """


class Rough(nn.Module, ABC):
    """A source of rough samples.

    Attributes:
        most: how many different samples there are, or None where there is no end.
        follows: whether they depend on the level that they will be noised to.
    """

    most: int | None = None
    follows = False

    @abstractmethod
    def draw(
        self, draws: Draws, level: Level[float], sampling: GuidedSampling, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        """Rough samples in the chain's model units, and the network evaluations spent on each.

        Args:
            draws: their randomness.
            level: the level that they will be noised to; `CLEAN` where they are the result.
            sampling: how the chain will be run.
            condition: class of each sample, or None.
            on_step: called after each step, where there are any.
        """

    def check(self, **options: Any) -> None:
        """Refuse options of the chain's sampling that it cannot follow.

        Raises:
            UserError: naming the option.
        """

    def left_at(self, level: Level[float], sampling: GuidedSampling) -> Level[float] | None:  # noqa: ARG002
        """The level at which a chain of its own is left, to be entered at `level` by the other; None without one."""
        return None

    def models(self) -> list[GenerativeModel]:
        """The models that it runs."""
        return []


class RunSource(Source):
    """The samples of another run on the same data, drawn as that run draws them."""

    kind: Literal["run"] = "run"
    method: MethodChoice

    def build(self, spec: DataSpec) -> Rough:
        return _Run(self.method.build(spec), spec.model_range)


class _Run(Rough):
    def __init__(self, model: GenerativeModel, limits: tuple[float, float] | None):
        super().__init__()
        self.model, self.limits, self.most = model, limits, model.most

    def draw(
        self,
        draws: Draws,
        level: Level[float],  # noqa: ARG002
        sampling: GuidedSampling,  # noqa: ARG002
        condition: Tensor | None,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        x0, nfe = self.model.generate(draws, self.model.sampling(), condition, on_step)
        return (x0 if self.limits is None else x0.clamp(*self.limits)), nfe

    def models(self) -> list[GenerativeModel]:
        return [self.model]


class LowResolutionSource(Source):
    """A diffusion of the same data, averaged over blocks of pixels: a chain that begins small and ends large.

    Its own chain is run, with the solver and the number of steps of the other, down to the noise level where a block of
    the large image is as uncertain as a pixel of the small one; its estimate of x0 is enlarged bilinearly. Averaging
    f^2 pixels divides the variance of the noise by f^2, so that level has 1 / f of the noise-to-signal ratio.
    """

    kind: Literal["low-resolution"] = "low-resolution"
    method: MethodChoice
    spec: DataSpec = Field(description="of the small images")
    factor: int = Field(ge=2, description="side of the blocks")

    def build(self, spec: DataSpec) -> Rough:
        small, large = self.spec.shape, spec.shape
        if (small[0], *(side * self.factor for side in small[1:])) != large:
            raise UserError(f"generator: {_form(small)} times {self.factor} is not {_form(large)}")
        model = self.method.build(self.spec)
        if not isinstance(model, ChainModel):
            raise UserError(
                f"generator: {self.method.kind} on smaller images has no chain to hand over; ddpm, iddpm and edm have"
            )
        return _LowResolution(model, self.factor)


class _LowResolution(Rough):
    follows = True

    def __init__(self, model: ChainModel, factor: int):
        super().__init__()
        self.model, self.factor = model, factor

    def draw(
        self, draws: Draws, level: Level[float], sampling: GuidedSampling, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        if level.sigma == 0:
            x0, nfe = self.model.generate(draws, sampling, condition, on_step)
        else:
            x0, nfe = self.model.outline(self.ratio(level), draws, sampling, condition, on_step)
        return nn.functional.interpolate(x0, scale_factor=self.factor, mode="bilinear", align_corners=False), nfe

    def ratio(self, level: Level[float]) -> float:
        """Noise-to-signal ratio of the small chain that matches a level of the large one."""
        return level.sigma / level.alpha / self.factor if level.alpha > 0 else float("inf")

    def left_at(self, level: Level[float], sampling: GuidedSampling) -> Level[float]:
        return self.model.level_at(self.ratio(level), sampling)

    def check(self, **options: Any) -> None:
        self.model.sampling(**options)

    def models(self) -> list[GenerativeModel]:
        return [self.model]


class StoredSource(Source):
    """Samples from a file, each used once: sample i starts from the i-th of them in an order that the seed gives."""

    kind: Literal["samples"] = "samples"
    count: int = Field(ge=1)

    def build(self, spec: DataSpec) -> Rough:
        return _Stored(self.count, spec)


class _Stored(Rough):
    def __init__(self, count: int, spec: DataSpec):
        super().__init__()
        self.spec, self.most = spec, count
        self.samples = nn.Buffer(torch.zeros(count, *spec.shape))

    def draw(
        self,
        draws: Draws,
        level: Level[float],  # noqa: ARG002
        sampling: GuidedSampling,  # noqa: ARG002
        condition: Tensor | None,  # noqa: ARG002
        on_step: Watch,  # noqa: ARG002
    ) -> tuple[Tensor, int]:
        assert isinstance(draws, SampleDraws), "a surrogate draws samples and nothing else"
        order = torch.randperm(len(self.samples), generator=seeded(draws.seed, "stored"))
        chosen = order[draws.first : draws.first + draws.count].to(self.samples.device)
        return self.spec.encode(self.samples[chosen]), 0


SOURCES: dict[str, type[Source]] = {
    source.model_fields["kind"].default: source for source in (RunSource, LowResolutionSource, StoredSource)
}


def _parse_source(value: Any) -> Any:
    if isinstance(value, Source):
        return value
    kind = value.get("kind") if isinstance(value, dict) else value
    if kind not in SOURCES:
        raise ConfigError("kind", f"{kind!r} is not valid: should be one of {', '.join(SOURCES)}")
    return SOURCES[kind].parse(value)


class SurrogateSampling(GuidedSampling):
    """Where the chain is entered, and how it is run."""

    t_mid: float = Field(1.0, ge=0, le=1, description="time at which the chain is entered; 0: not at all, 1: whole")

    def of_chain(self) -> dict[str, Any]:
        """The options of the chain alone."""
        return {name: value for name, value in self.to_json().items() if name != "t_mid"}


class SurrogateConfig(MethodConfig):
    """A chain and the source of the rough samples that it is entered with."""

    kind: Literal["surrogate"] = "surrogate"
    chain: MethodChoice
    generator: Annotated[SerializeAsAny[Source], BeforeValidator(_parse_source)]
    sampling: SurrogateSampling = SurrogateSampling()

    @model_validator(mode="after")
    def _same_condition(self) -> SurrogateConfig:
        given = getattr(self.generator, "method", None)
        if self.chain.conditional != self.conditional:
            raise ValueError(f"conditional has to be as the chain's, {self.chain.conditional}")
        if self.conditional != (given is not None and given.conditional):
            with_classes, without = ("the run", "the surrogate") if self.conditional else ("the surrogate", "the run")
            raise ValueError(f"{with_classes} is told the class of each sample and {without} is not; both or none")
        return self

    @classmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:  # noqa: ARG003
        raise UserError(
            "surrogate: is put together, not trained; use osmose surrogate RUN --with RUN2 --t-mid 0.5 --out RUN3"
        )

    def build(self, spec: DataSpec) -> Surrogate:
        return Surrogate(self, spec)


class Surrogate(GenerativeModel):
    """See the module's text.

    Attributes:
        chain: the diffusion that finishes.
        generator: the source of rough samples.
    """

    config: SurrogateConfig

    def __init__(self, config: SurrogateConfig, spec: DataSpec):
        super().__init__(config, spec)
        chain = config.chain.build(spec)
        if not isinstance(chain, ChainModel):
            raise UserError(f"{config.chain.kind}: has no chain that can be entered; ddpm, iddpm and edm have")
        self.chain = chain
        self.generator = config.generator.build(spec)
        self.most = self.generator.most
        self.requires_grad_(False)
        try:
            self.sampling()
        except UserError as error:
            raise UserError(f"sampling.{error}") from None

    def sampling(self, **options: Any) -> SurrogateSampling:
        sampling = super().sampling(**options)
        assert isinstance(sampling, SurrogateSampling)
        own = sampling.of_chain()
        self.chain.sampling(**own)  # refuses what does not fit the chain
        self.generator.check(**own)
        if sampling.t_mid > 0:
            try:
                self.chain.entry(sampling.t_mid, sampling)
            except UserError as error:
                raise UserError(f"t_mid{str(error).removeprefix('t')}") from None
        return sampling

    def networks(self) -> list[nn.Module]:
        return [network for model in self._models() for network in model.networks()]

    def probe(self, items: int) -> None:
        for model in self._models():
            model.probe(items)

    def _models(self) -> list[GenerativeModel]:
        return [*self.generator.models(), self.chain]

    def loss(self, batch: Batch, draws: Draws) -> LossTerms:  # noqa: ARG002
        raise UserError("surrogate: is put together of trained runs and has nothing to train")

    def rough(
        self, draws: Draws, sampling: SurrogateSampling, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        """The rough samples x~0 that `generate` starts from, model units, and the network evaluations of each."""
        level = self.chain.entry(sampling.t_mid, sampling) if sampling.t_mid > 0 else CLEAN
        return self.generator.draw(draws.branch("surrogate"), level, sampling, condition, on_step)

    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        assert isinstance(sampling, SurrogateSampling)
        x0, spent = self.rough(draws, sampling, condition, on_step)
        if sampling.t_mid == 0:
            return x0, spent
        x, nfe = self.chain.refine(x0, sampling.t_mid, draws, sampling, condition, on_step)
        return x, spent + nfe


def _form(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

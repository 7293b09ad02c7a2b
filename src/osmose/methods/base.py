"""The contract of every method: `loss(batch, draws)` teaches it, `sample(n)` runs it.

The trainer calls `loss`, everything downstream calls `sample`; neither knows which method it holds.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from osmose.configuration import Config
from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.draws import Draws, SampleDraws
from osmose.gaussian.score import ScoreField
from osmose.methods import CONTINUED, DISTILLED, METHODS
from osmose.methods.messages import (
    Batch,
    BoundTerms,
    LossTerms,
    OnStep,
    Regression,
    SamplePaths,
    Samples,
    Watch,
)
from osmose.networks import NETWORKS
from osmose.networks.base import Differentiating, NetworkConfig, Noting

#: A field that holds any registered network.
NetworkChoice = Annotated[SerializeAsAny[NetworkConfig], BeforeValidator(NETWORKS.parse)]


class SamplingConfig(Config):
    """How a method samples when nothing else is said; a method that has something to choose extends it."""


class MethodConfig(Config, ABC):
    """Describes a method; `build` makes the model for data of a given form."""

    kind: str
    sampling: SamplingConfig = SamplingConfig()
    conditional: bool = Field(False, description="tell the network the class of each item")

    @property
    def use(self) -> str:
        """The command that one would give a run next, with {run} for its folder."""
        return "osmose sample {run} -n 64 --out samples.png"

    @property
    def network_config(self) -> NetworkConfig | None:
        """Of the network that does its work, or that all of several are like; None where there is none."""
        network: NetworkConfig | None = getattr(self, "network", None)
        return network

    def with_network(self, network: NetworkConfig) -> MethodConfig:
        """The same with another network in the place of `network_config`."""
        return type(self).parse(self.to_json() | {"network": network.to_json()})

    @classmethod
    @abstractmethod
    def recipe(cls, spec: DataSpec, data_std: float) -> dict[str, Any]:
        """Values that suit data of a form, for the fields that the user leaves open.

        Args:
            spec: the data's form.
            data_std: root mean square of the data in the model's units.
        """

    @classmethod
    def training_recipe(cls, spec: DataSpec) -> dict[str, Any]:  # noqa: ARG003
        """Fields of `TrainingConfig` that suit the method better than what suits most; none by default.

        A method that is fitted in closed form (`GenerativeModel.prepare`) and has no parameter to train says
        `{"steps": 0}`.

        Args:
            spec: the data's form.
        """
        return {}

    @classmethod
    def length_recipe(cls, steps: int) -> dict[str, Any]:  # noqa: ARG003
        """Fields of the method that should follow the length of training; none by default.

        Args:
            steps: optimisation steps.
        """
        return {}

    @abstractmethod
    def build(self, spec: DataSpec) -> GenerativeModel:
        """The model, with fresh weights from torch's global generator.

        Raises:
            UserError: the parts do not fit each other or the data.
        """


#: A field that holds the configuration of any method.
MethodChoice = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(METHODS.parse)]


class GenerativeModel(nn.Module, ABC):
    """One trained or trainable model: a method, its parts, and the form of its data.

    Attributes:
        idle_parameters: whether some steps' losses leave some parameters without gradient, which data parallelism has
            to be told; the optimiser leaves such parameters as they are.
        takes_start: whether samples may begin with items of other data, instead of noise.
        takes_gaps: whether it learns from series with missing values, at times of their own.
        takes_text: whether it learns codes of characters.
        most: how many different samples the model has, or None where there is no end.
    """

    idle_parameters: ClassVar[bool] = False
    takes_start: ClassVar[bool] = False
    takes_gaps: ClassVar[bool] = False
    takes_text: ClassVar[bool] = False
    most: int | None = None

    @property
    def not_compiled(self) -> str | None:
        """Why its networks cannot be compiled, and what could be done; None where they can."""
        for module in (module for network in self.networks() for module in network.modules()):
            if isinstance(module, Differentiating):
                name = type(module).__name__.lower()
                return f"a network that is {name} is differentiated while it is evaluated; take training.compile=false"
        return None

    def __init__(self, config: MethodConfig, spec: DataSpec):
        super().__init__()
        if config.conditional and not spec.num_classes:
            raise UserError("method.conditional: true needs data with classes, and these have none")
        if spec.start is not None and not self.takes_start:
            raise UserError(
                f"start: samples of {config.kind} cannot begin with data; those of interpolant and bridge can"
            )
        if spec.alphabet is not None and not self.takes_text:
            raise UserError(
                f"method: {config.kind} learns numbers, and these data are text; masked and token-diffusion learn it"
            )
        if spec.series is not None and not (spec.series.regular or self.takes_gaps):
            raise UserError(
                f"method: {config.kind} needs items alike, and these series have gaps or times of their own; dspd and "
                "cspd learn from them"
            )
        self.config, self.spec = config, spec

    def prepare(self, items: Iterable[Batch]) -> None:
        """Take from the training data what can be had in closed form; most methods have nothing to do.

        Called once, before the first step of a new run; what it sets is part of the state, as parameters or buffers.

        Args:
            items: the whole training part in batches, on the device of the model; may be gone through once.
        """

    @abstractmethod
    def loss(self, batch: Batch, draws: Draws) -> LossTerms:
        """The training loss of each item of a batch; all randomness comes from `draws`."""

    def loss_again(self, batch: Batch, draws: Draws) -> LossTerms:
        """`loss` once more, for an optimizer that looks at a batch again; the law of times learns nothing from it."""
        return self.loss(batch, draws)

    @abstractmethod
    def generate(
        self, draws: Draws, sampling: SamplingConfig, condition: Tensor | None, on_step: Watch
    ) -> tuple[Tensor, int]:
        """One batch of `draws.count` samples in the model's units, and the network evaluations spent on each.

        Tells `on_step` after each step what the samples are by then, if there is something to see.
        """

    def ends(self, sampling: SamplingConfig) -> tuple[DataSpec | None, DataSpec]:  # noqa: ARG002
        """The form of what `translate` takes, None for models that begin with noise, and of what sampling gives."""
        return None, self.spec

    def translate(
        self,
        start: Tensor,  # noqa: ARG002
        draws: Draws,  # noqa: ARG002
        sampling: SamplingConfig,  # noqa: ARG002
        condition: Tensor | None,  # noqa: ARG002
        on_step: Watch,  # noqa: ARG002
    ) -> tuple[Tensor, int]:
        """`generate` from given items, in the model's units for them, (draws.count, *event).

        Raises:
            UserError: a model that begins with noise.
        """
        raise UserError(
            f"start: samples of {self.config.kind} do not begin with data here: there is nothing to translate"
        )

    def given_for(self, draws: Draws) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """What series are drawn given, unless told otherwise; None for other data.

        Returns:
            Known values in the model's units, (draws.count, C, L), NaN where nothing is known, and times, float64
            (draws.count, L), NaN at the end of shorter series.
        """
        return None

    def complete(
        self,
        known: Tensor,  # noqa: ARG002
        times: Tensor | None,  # noqa: ARG002
        draws: Draws,  # noqa: ARG002
        sampling: SamplingConfig,  # noqa: ARG002
        condition: Tensor | None,  # noqa: ARG002
        on_step: Watch,  # noqa: ARG002
    ) -> tuple[Tensor, int]:
        """`generate`, given some of the values.

        Args:
            known: model units, (draws.count, *event), NaN where nothing is known.
            times: of series, float64 (draws.count, L); None for others.
            draws: the noise.
            sampling: as in `generate`.
            condition: as in `generate`.
            on_step: as in `generate`.

        Returns:
            Whole samples, in which what stands at known values does not matter, and the evaluations spent on each.

        Raises:
            UserError: a model that cannot, or values that it cannot be told.
        """
        raise UserError(
            f"known: {self.config.kind} draws whole items; dspd, cspd, fdp, masked and token-diffusion fill in what is "
            "missing"
        )

    def keep_starts(self, starts: Tensor) -> None:
        """Keep items to begin samples with that training does not see, for a model that takes any.

        Args:
            starts: the held-out part of the data to begin with, in the units of `Batch.start`, (n, *event).
        """

    def bound(
        self,
        batch: Batch,  # noqa: ARG002
        draws: Draws,  # noqa: ARG002
        on_step: OnStep,  # noqa: ARG002
        *,
        num_steps: int | None = None,  # noqa: ARG002
        variance: str | None = None,  # noqa: ARG002
        clip: bool = True,  # noqa: ARG002
    ) -> BoundTerms:
        """The variational bound of items; one network evaluation of each for every step.

        Args:
            batch: the items, model units.
            draws: the noise, fresh for every step.
            on_step: called after each step.
            num_steps: steps of the chain; all that the schedule has if None.
            variance: of the chain, the method's own if None.
            clip: keep the denoised estimate inside the data's range, where there is one.

        Raises:
            UserError: a method or data without such a bound; the message says why.
        """
        raise UserError(
            f"{self.config.kind}: has no likelihood bound; ddpm, iddpm, edm, blackout, interpolant, bridge, dspd, "
            "cspd, fdp and masked have"
        )

    def score_field(self) -> ScoreField:
        """What the model knows of the score of its data under white Gaussian noise, in the model's units.

        Raises:
            UserError: a model that knows no such thing; the message says why.
        """
        kind = self.config.kind
        if kind in (*DISTILLED, *CONTINUED, "distilled"):
            raise UserError(
                f"{kind}: a student says where trajectories end, and not the mean of the data, from which a score "
                "follows; take the run that it was made from"
            )
        raise UserError(
            f"{kind}: has no score of data under white noise; ddpm, iddpm, edm, and interpolants from noise have"
        )

    def regression(self, batch: Batch, draws: Draws) -> Regression:  # noqa: ARG002
        """The loss of a batch, with the same draws as `loss`, as the least squares that it is.

        Raises:
            UserError: a loss that is none.
        """
        raise UserError(
            f"training.optimizer: als solves least squares, and the loss of {self.config.kind} is none; ddpm and edm "
            "with objective=simple are, others train with adam"
        )

    def report(self) -> dict[str, float]:
        """Named numbers to log besides the losses: what the networks have noted since the last call, mostly nothing."""
        return {name: value for module in self._noting() for name, value in module.noted().items()}

    def complaints(self) -> list[str]:
        """What people should know of these numbers."""
        return [complaint for module in self._noting() if (complaint := module.complaint()) is not None]

    def _noting(self) -> list[Noting]:
        return [m for network in self.networks() for m in network.modules() if isinstance(m, Noting)]

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """The networks that do the work: what is compiled."""

    @abstractmethod
    def probe(self, items: int) -> None:
        """Run every network that sampling needs once, on some input for so many items: what is counted and timed."""

    def after_step(self, parts: Sequence[tuple[Batch, Draws]]) -> None:
        """Adapt to an optimisation step, once its update is made; most methods have nothing to do.

        The trainer calls it once a step, in training mode, without gradient and in the precision of training.

        Args:
            parts: the micro-batches of this process, in order, each with the draws that its loss was given. Their
                values have been used: what is drawn here comes from `draws.branch`.
        """

    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        """`loss`: what data parallelism wraps."""
        return self.loss(batch, draws)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def sampling(self, **options: Any) -> SamplingConfig:
        """The method's sampling configuration with options changed (`num_steps=20`, `solver="heun"`).

        Raises:
            ConfigError: an option that the method does not have, or a value that it refuses.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if given and not type(self.config.sampling).model_fields:
            name, value = next(iter(given.items()))
            raise UserError(
                f"{name}: {value!r} given, but {self.config.kind} samples in one go: there is nothing to set"
            )
        changed: SamplingConfig = self.config.sampling.replace(**given)
        return changed

    def stream(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        condition: Tensor | int | None = None,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
        start: Tensor | None = None,
        known: Tensor | None = None,
        times: Tensor | None = None,
        on_state: Watch | None = None,
        **options: Any,
    ) -> Iterator[Samples]:
        """`sample`, batch by batch, for more samples than fit in memory; `on_state` watches each of them."""
        if num_samples < 1:
            raise UserError(f"num_samples: {num_samples} is not valid: must be at least 1")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed: {seed} is not valid: must be between 0 and 2^63 - 1")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is not valid: must be at least 1")
        if self.most is not None and num_samples > self.most:
            raise UserError(f"num_samples: {num_samples} is more than the {self.most} different samples that there are")
        classes = self.classes_for(num_samples, condition)
        sampling = self.sampling(**options)
        begin, form = self.ends(sampling)
        if start is not None:
            start = self._admitted(start, begin, num_samples)
            if self.config.conditional and condition is None:
                raise UserError(
                    "condition: required (--label) with given items: the class of the data at their other end"
                )
        if start is not None and (known is not None or times is not None):
            raise UserError("known: given with start; what samples begin with leaves nothing to be told")
        if known is not None or times is not None:
            known, times = self._given(known, times, form, num_samples)
        batch_size = batch_size or max(1, min(256, 2**20 // self.spec.dimension))
        total = -(-num_samples // batch_size)
        for index, first in enumerate(range(0, num_samples, batch_size)):
            count = min(batch_size, num_samples - first)
            part = None if classes is None else classes[first : first + count]

            def report(done: int, of: int, state: Tensor | None = None, /, *, index: int = index) -> None:
                if on_state is not None:
                    on_state(done, of, state)
                if on_step is not None and done:
                    on_step(index * of + done, total * of)

            began = time.perf_counter()
            with torch.inference_mode(), _evaluating(self):
                draws = SampleDraws(seed, first, count, self.device)
                told = None if part is None else part.to(self.device)
                at = None if times is None else times[first : first + count]
                values = None if known is None else known[first : first + count]
                if start is not None:
                    given = start[first : first + count].to(self.device)
                    x, nfe = self.translate(given, draws, sampling, told, report)
                elif values is not None or at is not None:
                    if values is None:
                        assert at is not None
                        values = torch.full((count, form.shape[0], at.shape[1]), math.nan)
                    x, nfe = self.complete(form.encode(values.to(self.device)), at, draws, sampling, told, report)
                elif (own := self.given_for(draws)) is not None:
                    at = own[1]
                    x, nfe = self.complete(*own, draws, sampling, told, report)
                else:
                    x, nfe = self.generate(draws, sampling, told, report)
                data = form.decode(x).cpu()
                if values is not None:  # as they were, to the last digit
                    data = torch.where(values.isnan(), data, values)
            yield Samples(data.clone(), nfe, time.perf_counter() - began, part, at)
        for complaint in self.complaints():
            warnings.warn(complaint, stacklevel=2)
        self.report()  # the next samples have complaints of their own

    def _given(
        self, known: Tensor | None, times: Tensor | None, form: DataSpec, count: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Values and times for every sample, when they fit each other and the model."""
        if times is not None:
            if form.kind != "series":
                raise UserError(f"times: given, and samples of {self.config.kind} are {form.kind}, which have none")
            times = torch.as_tensor(times, dtype=torch.float64).cpu()
            if times.ndim not in (1, 2) or (times.ndim == 2 and len(times) not in (1, count)):
                raise UserError(f"times: shape {tuple(times.shape)} given for {count} samples; (L,) or (n, L) is right")
            times = times.expand(count, -1)
        if known is None:
            return None, times
        if form.kind == "series" and times is None:
            raise UserError("known: values of series need their times")
        known = torch.as_tensor(known, dtype=torch.float32).cpu()
        length = form.shape[1:] if times is None else (times.shape[1],)
        if tuple(known.shape) != (count, form.shape[0], *length):
            right = (count, form.shape[0], *length)
            raise UserError(f"known: shape {tuple(known.shape)} given for {count} samples; {right} is right")
        if bool(known.isinf().any()):
            raise UserError("known: holds infinity; what is not known is NaN")
        return known, times

    def _admitted(self, start: Tensor, form: DataSpec | None, count: int) -> Tensor:
        """Items to begin with, in the model's units, when there is one for each sample."""
        if form is None:
            raise UserError(
                f"start: samples of {self.config.kind} do not begin with data here: there is nothing to translate"
            )
        if tuple(start.shape) != (count, *form.shape):
            raise UserError(
                f"start: shape {tuple(start.shape)} given for {count} samples; {(count, *form.shape)} is right"
            )
        if not bool(start.isfinite().all()):
            raise UserError("start: holds NaN or infinity")
        if form.range is not None and not form.range[0] <= float(start.min()) <= float(start.max()) <= form.range[1]:
            low, high = float(start.min()), float(start.max())
            raise UserError(f"start: has values from {low:g} to {high:g}; the model's data are in {form.range}")
        return form.encode(start)

    def sample(self, num_samples: int, **options: Any) -> Samples:
        """Draw samples. The same seed gives the same samples whatever the batch size (to rounding).

        Args:
            num_samples: how many.
            **options: `seed` (default 0), `condition` (int64 classes (n,), or one class for all), `batch_size`,
                `on_step` (a callback of steps done and steps in all), `start` (items to translate, data units
                (n, *event), of models between two data sets), `known` (what is known of each sample, data units
                (n, *event), NaN where nothing is), `times` (of series, (n, L) or (L,)), and anything that the method's
                sampling configuration holds: of Gaussian methods `num_steps`, `solver`, `spacing`, `clip`.

        Raises:
            UserError: an option that is refused; the message says what would be right.
        """
        parts = list(self.stream(num_samples, **options))
        conditions = [part.condition for part in parts if part.condition is not None]
        return Samples(
            _joined([part.data for part in parts]),
            parts[0].nfe,
            sum(part.seconds for part in parts),
            torch.cat(conditions) if conditions else None,
            _joined([part.times for part in parts if part.times is not None]),
        )

    def trajectories(self, num_samples: int, *, most: int | None = None, **options: Any) -> SamplePaths:
        """How the samples that `sample` gives with the same options come about, step by step.

        Args:
            num_samples: how many.
            most: keep so many states of each, evenly spread over the steps; all of them if None.
            **options: of `sample`.

        Raises:
            UserError: a model that draws samples at once; fewer than 2 states; an option that is refused.
        """
        if most is not None and most < 2:
            raise UserError(f"most: {most} is not valid: a trajectory has 2 states at least")
        found: list[dict[int, Tensor]] = []

        def keep(done: int, of: int, state: Tensor | None = None, /) -> None:
            if done == 0:
                found[-1].clear()  # a rough sample before may have had steps of its own
            wanted = most is None or done in {round(k * of / (most - 1)) for k in range(most)}
            if state is not None and wanted:
                found[-1][done] = state.float().cpu().clone()

        found.append({})
        for _ in self.stream(num_samples, on_state=keep, **options):
            found.append({})
        if len(found[0]) < 2:
            raise UserError(f"trajectory: {self.config.kind} draws its samples at once, without states in between")
        states = [torch.stack(list(batch.values()), 1) for batch in found[:-1]]
        return SamplePaths(torch.cat(states), tuple(found[0]))

    def classes_for(self, num_samples: int, condition: Tensor | int | None = None) -> Tensor | None:
        """The class of each sample, int64 (num_samples,) on the CPU: as asked for, or all classes in turn.

        None for a model that is not told classes.

        Raises:
            UserError: classes that the model does not have, or not one for each sample.
        """
        if not self.config.conditional:
            if condition is not None:
                raise UserError("condition: this model was trained without classes (method.conditional=false)")
            return None
        classes = self.spec.num_classes or 0
        if condition is None:
            return torch.arange(num_samples) % classes
        given = (
            torch.as_tensor(condition, dtype=torch.int64).expand(num_samples)
            if isinstance(condition, int)
            else torch.as_tensor(condition, dtype=torch.int64)
        )
        if given.shape != (num_samples,):
            raise UserError(f"condition: {tuple(given.shape)} classes given for {num_samples} samples")
        if bool(((given < 0) | (given >= classes)).any()):
            raise UserError(
                f"condition: class {int(given[(given < 0) | (given >= classes)][0])} is not in 0..{classes - 1}"
            )
        return given


def _joined(parts: list[Tensor]) -> Any:
    """Batches end to end, those of shorter series filled up with NaN; None for none."""
    if not parts:
        return None
    longest = max(part.shape[-1] for part in parts)
    return torch.cat([nn.functional.pad(p, (0, longest - p.shape[-1]), value=math.nan) for p in parts])


class OneShot(GenerativeModel):
    """A model that draws a sample at once, without steps.

    Attributes:
        evaluations: of its networks, for each sample.
    """

    evaluations: ClassVar[int] = 1

    @abstractmethod
    def draw(self, draws: Draws, condition: Tensor | None) -> Tensor:
        """`draws.count` samples in the model's units, of given classes or, for None, of any."""

    def generate(
        self,
        draws: Draws,
        sampling: SamplingConfig,  # noqa: ARG002
        condition: Tensor | None,
        on_step: Watch,
    ) -> tuple[Tensor, int]:
        x = self.draw(draws, condition)
        on_step(1, 1)
        return x, self.evaluations


class _evaluating:  # noqa: N801 - a context manager, named as it is used
    """Evaluation mode inside, the previous mode after."""

    def __init__(self, module: nn.Module):
        self.module, self.training = module, module.training

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.training)

"""What a network's layers meet while samples are drawn: which of them to quantise, over which ranges, with what error.

Calibration is sampling: the run's own sampler visits its own x_t at all of its steps, and every step counts alike. A
range that was measured at one time, on clean data or on noise is wrong at others (arXiv 2211.15736, 2302.04304); the
other sources are there to show it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws, mix, seeded
from osmose.gaussian.parametrization import noised
from osmose.methods.base import GenerativeModel
from osmose.methods.diffusion import Diffusion
from osmose.methods.messages import Batch, OnStep
from osmose.methods.students import Students
from osmose.networks.base import Joining
from osmose.networks.integers import Inputs, RoundedLayer, dequantize, grid_of, quantize, unsigned

#: Where calibration takes the inputs of the network from: the run's own sampler; training data at its times; these with
#: the most noise alone; with the least.
Source = Literal["sampler", "forward", "noise", "data"]
Layer = nn.Linear | nn.Conv2d
#: Values of an evaluation that are kept for a part of a layer's input.
_KEPT = 2048
#: The error that a range is chosen for is a mean of this power.
_POWER = 2.4


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """The linear layers and convolutions of a network, by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, Layer)}


def parts_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Channels of the parts that layers' inputs are joined from, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for place, module in network.named_modules():
        if isinstance(module, Joining):
            found |= {f"{place}.{name}".lstrip("."): parts for name, parts in module.joined().items()}
    return found


class Inner(NamedTuple):
    """The layers of a network that may be quantised.

    Attributes:
        between: those that see x, in the order of the computation, but for the first and the last of them.
        told: those that see time, class and place alone.
    """

    between: list[str]
    told: list[str]


@torch.no_grad()
def inner(network: nn.Module, shape: tuple[int, ...], device: torch.device) -> Inner:
    """Sort the layers of a network by what they see: two inputs x are evaluated, and the layers' inputs compared."""
    seen: list[dict[str, Tensor]] = []
    label = torch.full((2,), 500.0, device=device)
    for seed in range(2):
        x = torch.randn(2, *shape, generator=seeded("layers", seed)).to(device)
        inputs: dict[str, Tensor] = {}
        with _watching(layers_of(network), lambda name, given, _, into=inputs: into.setdefault(name, given)):
            network(x, label, None)
        seen.append(inputs)
    moved = [name for name, value in seen[0].items() if not torch.equal(value, seen[1][name])]
    return Inner(moved[1:-1], [name for name in seen[0] if name not in moved])


def chosen_layers(found: Inner, inputs: Inputs, keep: tuple[str, ...]) -> dict[str, Inputs]:
    """What becomes of each layer's inputs; layers whose names match a pattern of `keep` are left as they are.

    Raises:
        UserError: a pattern that no layer matches, or no layer is left.
    """
    names = [*found.between, *found.told]
    for pattern in keep:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"keep: {pattern!r} matches no layer; they are {', '.join(names[:6])}, ...")
    kept = {name for pattern in keep for name in fnmatch.filter(names, pattern)}
    told: Inputs = "float"
    layers = dict.fromkeys(found.between, inputs) | dict.fromkeys(found.told, told)
    layers = {name: form for name, form in layers.items() if name not in kept}
    if not layers:
        raise UserError("quantize: no layer is left to quantize; the first and the last of a network stay as they are")
    return layers


@contextlib.contextmanager
def _watching(layers: dict[str, Layer], told: Callable[..., object]) -> Iterator[None]:
    """Call told(name, input, output) whenever one of some layers is evaluated."""

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            told(name, given[0].detach(), out.detach())

        return note

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Observer:
    """What the parts of one layer's input have been: smallest and largest, and some values of every evaluation."""

    def __init__(self, parts: tuple[int, ...], axis: int):
        self.parts, self.axis = parts, axis
        self.smallest = torch.full((len(parts),), torch.inf)
        self.largest = torch.full((len(parts),), -torch.inf)
        self.values: list[list[Tensor]] = [[] for _ in parts]

    def see(self, x: Tensor) -> None:
        """Take note of an input."""
        for index, part in enumerate(x.split(self.parts, self.axis)):
            flat = part.float().flatten()
            self.smallest[index] = torch.minimum(self.smallest[index], flat.min().cpu())
            self.largest[index] = torch.maximum(self.largest[index], flat.max().cpu())
            self.values[index].append(flat[_some(len(flat)).to(flat.device)].cpu())

    def ranges(self, bits: int) -> tuple[Tensor, Tensor]:
        """The ends of the range with the least error, (parts,) each: where few values lie far out, it leaves them."""
        extremes = zip(self.values, self.smallest.tolist(), self.largest.tolist(), strict=True)
        smallest, largest = torch.tensor([_range(torch.cat(v), low, high, bits) for v, low, high in extremes]).T
        return smallest, largest


@functools.lru_cache(64)
def _some(count: int) -> Tensor:
    """Places of some of so many values: of all if they are few, else drawn once, so that no channel is passed over."""
    if count <= _KEPT:
        return torch.arange(count)
    return torch.randint(count, (_KEPT,), generator=seeded("places", count))


def _range(values: Tensor, smallest: float, largest: float, bits: int) -> tuple[float, float]:
    low, high = min(smallest, 0.0), max(largest, 0.0)
    factors = torch.linspace(0.2, 1.0, 33)
    limits = unsigned(bits)

    def best(lows: Tensor, highs: Tensor) -> int:
        scale, zero = grid_of(lows[:, None], highs[:, None], limits)
        errors = [
            (dequantize(quantize(values, s, z, limits), s, z) - values).abs().pow(_POWER).mean()
            for s, z in zip(scale, zero, strict=True)
        ]
        return int(torch.stack(errors).argmin())

    for _ in range(2):  # one end after the other, twice: they hang together by the scale alone
        high *= float(factors[best(torch.full_like(factors, low), factors * high)])
        low *= float(factors[best(factors * low, torch.full_like(factors, high))])
    return low, high


@torch.no_grad()
def run_through(
    model: GenerativeModel,
    source: Source,
    items: int,
    seed: int,
    dataset: Dataset | None,
    on_step: OnStep | None = None,
) -> None:
    """Evaluate the networks of a model on inputs of a kind, as often as its sampler would.

    Args:
        model: in evaluation mode.
        source: where the inputs come from.
        items: how many, drawn or of the training part.
        seed: of everything random.
        dataset: the data, for other sources than the sampler.
        on_step: called after each step, where the sampler runs.

    Raises:
        UserError: another source than the sampler for a model that has no chain of its own.
    """
    if source == "sampler":
        # Of students each has a network and a grid of its own.
        ways: list[dict[str, int]] = [{"num_steps": n} for n in model.grids] if isinstance(model, Students) else [{}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for way in ways:
                model.sample(items, seed=mix(seed, "calibration"), on_step=on_step, **way)
        return
    if not isinstance(model, Diffusion) or dataset is None:
        raise UserError(f"calibration: {source!r} is for runs of ddpm, iddpm and edm; use sampler")
    levels = model.grid(model.sampling()).levels[:-1]  # type: ignore[arg-type]
    if source in ("noise", "data"):
        levels = (levels[0] if source == "noise" else levels[-1],) * len(levels)
    order = torch.randperm(len(dataset.train), generator=seeded(seed, "calibration"))[:items]
    batch = Batch.of(dataset, "train", order, model.config.conditional, model.device)
    draws = SampleDraws(mix(seed, "calibration"), 0, len(order), model.device)
    for level in levels:
        model.denoiser.output(noised(batch.x0, model.noise(draws), level), level, batch.condition)


def observe(networks: list[nn.Module], forms: list[dict[str, RoundedLayer]], run: Callable[[], None]) -> None:
    """Measure the ranges of layers' inputs while `run` evaluates their networks, and give them to rounded layers.

    Args:
        networks: in real numbers.
        forms: of each network, the rounded layers by name; those whose inputs are "static" are given ranges.
        run: evaluates the networks.

    Raises:
        UserError: nothing was evaluated, or values that are not finite.
    """
    observers: list[dict[str, Observer]] = []
    with contextlib.ExitStack() as stack:
        for network, rounded in zip(networks, forms, strict=True):
            static = {name: layer for name, layer in rounded.items() if layer.form.inputs == "static"}
            own = {name: Observer(layer.parts, layer.axis) for name, layer in static.items()}
            observers.append(own)
            inside = layers_of(network)
            watched = {name: inside[name] for name in own}
            stack.enter_context(_watching(watched, lambda name, x, _, own=own: own[name].see(x)))
        run()
    for own, rounded in zip(observers, forms, strict=True):
        for name, observer in own.items():
            if not observer.values[0]:
                raise UserError(f"calibration: {name} was never evaluated, of which its ranges would be known")
            if not bool((observer.largest - observer.smallest).isfinite().all()):
                raise UserError(f"calibration: {name} was given NaN or infinity; the run has diverged")
            smallest, largest = observer.ranges(rounded[name].form.bits)
            if bool((smallest == largest).any()):
                warnings.warn(f"quantize: {name} was given nothing but zeros in calibration", stacklevel=2)
            rounded[name].measured(smallest, largest)


class LayerError(NamedTuple):
    """How far the output of a rounded layer is from that of the layer, for the same inputs.

    Attributes:
        mean: of the difference in every output channel, float64.
        relative: root mean square of the difference, in those of the output.
        left: the same without the mean.
    """

    mean: Tensor
    relative: float
    left: float


def layer_errors(
    networks: list[nn.Module], forms: list[dict[str, RoundedLayer]], run: Callable[[], None]
) -> list[dict[str, LayerError]]:
    """Measure the errors of rounded layers on what their networks meet.

    Args:
        networks: in real numbers.
        forms: of each network, the rounded layers by name.
        run: evaluates the networks.
    """
    sums: list[dict[str, list[Tensor]]] = [{} for _ in networks]

    def see(index: int, name: str, x: Tensor, out: Tensor) -> None:
        layer = forms[index][name]
        off = (out.float() - layer(x)).movedim(layer.axis, -1).flatten(0, -2).double()
        right = out.movedim(layer.axis, -1).flatten(0, -2).double()
        new = [off.sum(0), off.square().sum(0), right.square().sum(0), torch.tensor(float(len(off)))]
        before = sums[index].get(name)
        sums[index][name] = new if before is None else [a + b for a, b in zip(before, new, strict=True)]

    with torch.no_grad(), contextlib.ExitStack() as stack:
        for index, (network, rounded) in enumerate(zip(networks, forms, strict=True)):
            inside = layers_of(network)
            watched = {name: inside[name] for name in rounded}
            stack.enter_context(_watching(watched, lambda *told, index=index: see(index, *told)))
        run()
    found: list[dict[str, LayerError]] = []
    for own in sums:
        errors = {}
        for name, (total, squares, right, count) in own.items():
            size = right.sum().clamp(min=1e-30)
            mean = total / count
            left = (squares - count * mean.square()).sum().clamp(min=0)
            errors[name] = LayerError(mean, float((squares.sum() / size).sqrt()), float((left / size).sqrt()))
        found.append(errors)
    return found


@torch.no_grad()
def correct_biases(forms: list[dict[str, RoundedLayer]], errors: list[dict[str, LayerError]]) -> None:
    """Take the mean error of every output channel into the bias of layers that have one."""
    for rounded, own in zip(forms, errors, strict=True):
        for name, error in own.items():
            bias = rounded[name].bias
            if bias is not None:
                bias.add_(error.mean.to(bias))

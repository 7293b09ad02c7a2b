r"""How far a run is from consistency: the tangent along a flow, angle by angle, with a picture.

In TrigFlow's coordinates (`gaussian.trigflow`) every denoiser is f(x, t) = cos(t) x - sin(t) V(x, t). Along a flow,
x = x(t), the tangent

    g = cos(t) df/dt = -cos(t)^2 (V - dx/dt) - cos(t) sin(t) (x + dV/dt)

says how the end moves that f gives to the trajectory. It vanishes for a consistency model of that flow alone, and it is
what continuous-time consistency models are taught by (arXiv 2410.11081): before it is normalised, its size tells what
the value of their loss does not. dx/dt is one of

`data`      cos(t) z - sin(t) x0 for the noise z and the item x0 that x was made from. Its mean given x is the flow of
            the data, and its spread is in g: ||g|| does not come down to 0 even for the exact consistency model.
`own`       V of the run itself, a diffusion: how far it is from being a consistency model.
`teacher`   V of the diffusion that the run was made from.

dF/dt = (dV/dt) / sd is the rate of the network as the paper has it, which training has to keep bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.gaussian.draws import StepDraws, seeded
from osmose.gaussian.parametrization import column
from osmose.gaussian.trigflow import (
    Derivative,
    NoForwardDerivativeError,
    TrigFlow,
    angle_of,
    require_forward_derivative,
)
from osmose.methods.consistency import Consistency, Tangent
from osmose.methods.diffusion import Diffusion
from osmose.methods.messages import OnStep
from osmose.training import files
from osmose.training.recipes import spread
from osmose.training.run import Run

#: Which way x goes.
Direction = Literal["data", "own", "teacher"]

#: What of the items lies below the ends of a range.
_RANGE = (0.1, 0.9)
#: Points at which the law of training times is read.
_FINE = 20_000
#: Angles that are marked in pictures.
_MARKS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)


@dataclass(frozen=True)
class Tangents:
    """Tangents of a run in K bins of the angle t; sizes are the root mean square over the dimensions of an item.

    A row (mean, 10 %, 90 %) is over the items of a bin whose value is finite, and NaN where there are none.

    Attributes:
        edges: ends of the bins, radians, float64 (K + 1,).
        trained: share of the training times in each bin, by the run's law as it was when training began, float64 (K,).
        tangent: ||g|| / sqrt(D), float64 (K, 3).
        jvp: the size of cos(t) sin(t) dV/dt, the part of g that is differentiated, float64 (K, 3).
        rate: the size of dF/dt = (dV/dt) / sd, float64 (K, 3).
        weight: mean of the learned weight exp(w(t)), float64 (K,), or None where the run learned none.
        not_finite: share of the items whose g is not finite, float64 (K,).
        sigma_data: sd, in which angles are measured.
        conditions: method, direction, teacher, jvp, n, seed: what the numbers hold for.
    """

    edges: Tensor
    trained: Tensor
    tangent: Tensor
    jvp: Tensor
    rate: Tensor
    weight: Tensor | None
    not_finite: Tensor
    sigma_data: float
    conditions: dict[str, Any]

    @property
    def ratios(self) -> Tensor:
        """The noise-to-signal ratios sigma / alpha = sd tan(t) at the ends of the bins, float64 (K + 1,)."""
        return self.sigma_data * self.edges.tan()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        bins = []
        for k in range(len(self.trained)):
            sizes = {name: _row(getattr(self, name)[k]) for name in ("tangent", "jvp", "rate")}
            bins.append(
                {
                    "t": self.edges[k : k + 2].tolist(),
                    "sigma_over_alpha": self.ratios[k : k + 2].tolist(),
                    "trained": float(self.trained[k]),
                    **sizes,
                    "weight": None if self.weight is None else float(self.weight[k]),
                    "not_finite": float(self.not_finite[k]),
                }
            )
        return {**self.conditions, "sigma_data": self.sigma_data, "bins": bins}


def _row(values: Tensor) -> dict[str, float] | None:
    return dict(zip(("mean", "p10", "p90"), values.tolist(), strict=True)) if bool(values.isfinite().all()) else None


def tangents(
    run: Run,
    dataset: Dataset,
    *,
    direction: str | None = None,
    teacher: Run | None = None,
    n: int = 256,
    bins: int = 12,
    seed: int = 0,
    jvp: str = "forward",
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    on_step: OnStep | None = None,
) -> Tangents:
    """Tangents of a run's model on noised held-out items, at angles spread evenly from its lowest to its highest.

    Args:
        run: a diffusion or a consistency model.
        dataset: the data it was trained on.
        direction: data, own or teacher (see the module); None: teacher if one is given, otherwise data.
        teacher: the diffusion that the run was made from.
        n: items a bin, each with an angle and a noise of its own; where the held-out part has fewer, they come again.
        bins: parts of equal length that the range of angles is cut into.
        seed: of the choice of items, angles and noise.
        jvp: forward for exact derivatives, finite-diff for differences (two more evaluations).
        device: where to compute.
        batch_size: items computed together; changes nothing but speed.
        on_step: called with the items done and the items in all.

    Raises:
        UserError: a run without a denoiser, a teacher that is not what the run was made from, an option that is
            refused, or a network without a forward-mode derivative.
    """
    for name, number in (("n", n), ("bins", bins), ("batch_size", batch_size)):
        if number < 1:
            raise UserError(f"{name}: {number} is not valid: must be at least 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: {seed} is not valid: must be between 0 and 2^63 - 1")
    if jvp not in get_args(Derivative):
        raise UserError(f"jvp: {jvp!r} is not valid: should be forward or finite-diff")
    way = direction or ("data" if teacher is None else "teacher")
    if way not in get_args(Direction):
        raise UserError(f"direction: {way!r} is not valid: should be data, own or teacher")
    if teacher is not None and way != "teacher":
        raise UserError(f"teacher: given, but the direction is {way!r}; leave one of the two out")
    model, how = _denoising(run, device), cast(Derivative, jvp)
    if way == "own" and isinstance(model, Consistency):
        kind = model.config.kind
        raise UserError(
            f"direction: 'own' is for ddpm, iddpm and edm; {kind} is no flow to follow, use data or teacher"
        )
    sd = _sigma_data(model, dataset)
    flow = TrigFlow(model.denoiser, sd)
    guide = TrigFlow(_teacher(run, teacher, device).denoiser, sd) if way == "teacher" else flow
    highest = model.start if isinstance(model, Consistency) else flow.highest
    edges = torch.linspace(flow.lowest, highest, bins + 1, dtype=torch.float64)
    weigh = model.weight if isinstance(model, Tangent) else None
    items, labels = dataset.part("held-out")
    order = torch.randperm(len(items), generator=seeded(seed, "tangents"))
    columns: list[Tensor] = []

    def measure(k: int, first: int, stop: int) -> Tensor:
        """Sizes of g, of the derivative in it and of dF/dt, and the weight, of some items of bin k: (B, 4)."""
        rows = order[torch.arange(k * n + first, k * n + stop) % len(order)]
        x0 = model.spec.encode(items[rows].to(model.device))
        condition = labels[rows].to(model.device) if model.config.conditional and labels is not None else None
        draws = StepDraws(seed, k, first, stop, n, model.device).branch("tangents")
        angle = edges[k] + (edges[k + 1] - edges[k]) * draws.stratified()
        z = model.config.noise.sample(draws, model.spec.shape).to(x0.dtype) * sd
        x = column(angle.cos(), x0) * x0 + column(angle.sin(), x0) * z
        if way == "data":
            towards = column(angle.cos(), x0) * z - column(angle.sin(), x0) * x0
        else:
            towards = guide.velocity(x, angle.clamp(guide.lowest, guide.highest), condition)
        left = angle - model.bottom(angle) if isinstance(model, Tangent) else angle
        g, change = flow.tangent(x, angle, towards, left, condition=condition, how=how)
        size, part = _size(g), _size(change)
        weight = torch.ones_like(angle) if weigh is None else weigh(angle).exp().cpu().double()
        return torch.stack([size, part, part / (left.cos() * left.sin() * sd), weight], 1)

    with torch.no_grad():
        if how == "forward":
            _require_forward_derivative(model, lambda: measure(0, 0, 1))
        for k in range(bins):
            found = []
            for first in range(0, n, batch_size):
                stop = min(first + batch_size, n)
                found.append(measure(k, first, stop))
                if on_step is not None:
                    on_step(k * n + stop, bins * n)
            columns.append(torch.cat(found))
    table = torch.stack(columns)
    return Tangents(
        edges=edges,
        trained=_trained(model, sd, edges),
        tangent=_summary(table[:, :, 0]),
        jvp=_summary(table[:, :, 1]),
        rate=_summary(table[:, :, 2]),
        weight=None if weigh is None else table[:, :, 3].mean(1),
        not_finite=1 - table[:, :, 0].isfinite().double().mean(1),
        sigma_data=sd,
        conditions={
            "method": model.config.kind,
            "direction": way,
            "teacher": None if teacher is None else teacher.folder.resolve().name,
            "jvp": jvp,
            "n": n,
            "seed": seed,
        },
    )


def _denoising(run: Run, device: torch.device | str) -> Diffusion | Consistency:
    run.require_real("integers have no derivative")
    model = run.model(device)
    if not isinstance(model, Diffusion | Consistency):
        kind = run.config.method.kind
        raise UserError(f"{run.folder}: a run of {kind} has no denoiser; ddpm, iddpm, edm, scd, sct and ect have one")
    return model


def _teacher(run: Run, teacher: Run | None, device: torch.device | str) -> Diffusion:
    """The diffusion that a run was made from."""
    parent = run.config.parent
    if teacher is None:
        named = "" if parent is None else f", {parent.folder!r}"
        raise UserError(
            f"teacher: missing; the direction 'teacher' needs the run that {run.folder} was made from{named}"
        )
    if parent is None:
        raise UserError(f"teacher: {teacher.folder} given, but {run.folder} was made from no other run")
    model = _denoising(teacher, device)
    if parent.sha256 != teacher.hash():
        names = f"{teacher.folder} is not what {run.folder} was made from, {parent.folder!r}"
        raise UserError(f"teacher: {names} (their weights differ)")
    if not isinstance(model, Diffusion):
        kind = model.config.kind
        raise UserError(f"teacher: {teacher.folder} is a run of {kind}, which is no flow to follow; use direction data")
    return model


def _sigma_data(model: Diffusion | Consistency, dataset: Dataset) -> float:
    """Sd: of a diffusion, that of a consistency model which begins with it."""
    if isinstance(model, Consistency):
        return model.config.sigma_data
    parametrization = model.config.parametrization
    if parametrization.kind == "v":
        return 1.0
    return float(getattr(parametrization, "sigma_data", round(spread(dataset), 3)))


def _trained(model: Diffusion | Consistency, sd: float, edges: Tensor) -> Tensor:
    """Share of training times in each bin, float64 (K,); times beyond the ends count for the first and last bin."""
    config = model.config
    u = (torch.arange(_FINE, dtype=torch.float64) + 0.5) / _FINE
    angle = angle_of(config.schedule.level(config.times.times(u, config.schedule)), sd)
    return torch.bucketize(angle, edges[1:-1]).bincount(minlength=len(edges) - 1).double() / _FINE


def _size(values: Tensor) -> Tensor:
    """Root mean square over the dimensions of each item, float64 (B,)."""
    return values.cpu().double().flatten(1).square().mean(1).sqrt()


def _summary(values: Tensor) -> Tensor:
    """Mean and ends of the range over the finite items of each bin, (K, n) to (K, 3)."""
    rows = []
    for row in values:
        finite = row[row.isfinite()]
        ends = finite.quantile(finite.new_tensor(_RANGE)) if len(finite) else finite.new_full((2,), math.nan)
        rows.append(torch.cat([finite.mean().view(1), ends]))
    return torch.stack(rows)


def _require_forward_derivative(model: Diffusion | Consistency, run: Callable[[], object]) -> None:
    try:
        require_forward_derivative(model.denoiser.network, run)
    except NoForwardDerivativeError as error:
        raise UserError(
            f"jvp: {error.name or 'the network'} ({type(error.module).__name__}) has no forward-mode derivative "
            f"({error.reason}); use jvp finite-diff"
        ) from None


def write_tangents(result: Tangents, folder: Path) -> list[Path]:
    """Write tangents.json and tangents.png: the sizes against the angle, and where the run was trained."""
    from matplotlib.figure import Figure

    said, edges = result.conditions, result.edges
    middle = (edges[1:] + edges[:-1]) / 2
    figure = Figure(figsize=(14, 4.2), dpi=110, layout="constrained")
    tangent, derivative, training = figure.subplots(1, 3)
    lines = [
        (tangent, result.tangent, "C0", "g"),
        (derivative, result.jvp, "C1", "cos t sin t dV/dt"),
        (derivative, result.rate, "C2", "dF/dt"),
    ]
    for axes, values, colour, label in lines:
        axes.fill_between(middle, values[:, 1], values[:, 2], color=colour, alpha=0.2, linewidth=0)
        axes.plot(middle, values[:, 0], "o-", color=colour, markersize=3, linewidth=1.2, label=label)
        axes.set_yscale("log", nonpositive="mask")
    tangent.set(title=f"tangent of {said['method']}, direction: {said['direction']}")
    tangent.set_ylabel("||g|| / sqrt(D): mean, and 80 % of the items")
    derivative.set(title="derivatives along the path", ylabel="root mean square over dimensions")
    derivative.legend()
    training.stairs(result.trained, edges, fill=True, color="0.8")
    training.set(title="training", ylabel="share of training times (grey)")
    if result.weight is not None:
        weight = training.twinx()
        weight.plot(middle, result.weight, "o-", color="C3", markersize=3, linewidth=1.2)
        weight.set_yscale("log")
        weight.set_ylabel("learned weight exp(w(t))", color="C3")
    marks = [f"{result.sigma_data * math.tan(angle):.2g}" for angle in _MARKS]
    for axes in (tangent, derivative, training):
        axes.set(xlabel="t (radians; 0 = data)", xlim=(0, float(edges[-1])), xticks=_MARKS)
        axes.grid(alpha=0.3)
        ratios = axes.secondary_xaxis("top")
        ratios.set_xticks(_MARKS, marks)
        ratios.set_xlabel("sigma / alpha")
    paths = [folder / "tangents.json", folder / "tangents.png"]
    files.write_json(paths[0], result.to_json())
    files.write_figure(paths[1], figure)
    return paths

"""Where to enter a chain: how far a surrogate's noised samples are from noised data, and what each t_mid gives.

At the level where the chain is entered at t, rough samples and real items are noised and shown to the diffusion's
denoiser; E[x0 | x_t] of both are compared by the metric that scores samples. What the denoiser cannot tell apart it
finishes alike, so the distance falls to that between two sets of real items, treated alike, which is known too: the
floor. `threshold` times the floor is where the surrogate's faults no longer count. Both are means over several splits
of the real items, each with noise of its own: a single one is luck by a factor of two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osmose.acceleration.surrogate import Pair
from osmose.data.dataset import Dataset
from osmose.data.pictures import beside, has_picture
from osmose.errors import UserError, nearest
from osmose.gaussian.draws import SampleDraws, mix, seeded
from osmose.methods.messages import OnStep
from osmose.methods.surrogate import Surrogate, SurrogateSampling
from osmose.metrics.evaluate import metric_names, score_samples
from osmose.metrics.evaluation import HEADLINES
from osmose.metrics.features import default_features
from osmose.training import files

#: Times that are tried when none are given.
TIMES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: Distance, in floors, up to which a surrogate passes for data.
THRESHOLD = 2.0
#: Splits of the real items, each with noise of its own.
REPEATS = 4


@dataclass(frozen=True)
class HandOver:
    """What a time of entry gives.

    Attributes:
        t_mid: the time.
        distance: between noised rough samples and noised data, as the denoiser sees them.
        floor: the same between two sets of data.
    """

    t_mid: float
    distance: float
    floor: float


@dataclass(frozen=True)
class Point:
    """What the pair does with a time of entry.

    Attributes:
        t_mid: the time, or None of the chain alone.
        nfe: network evaluations spent on each sample, those of the surrogate included.
        seconds: wall time of sampling all, the surrogate's included.
        scores: metrics by name.
    """

    t_mid: float | None
    nfe: int
    seconds: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """Everything about where to enter.

    Attributes:
        n: samples of every point.
        metric: name of the score that distances are measured with.
        points: one for each time, and the chain alone at the end.
        hand_overs: one for each time above 0.
        floors: what real data score, by metric.
        threshold: in floors.
        chosen: the time that `choose` takes, or None where the surrogate passes nowhere.
        pictures: rough samples and what became of them at `chosen` (or the largest time), data units.
        conditions: seed, sampling and both sides, for the record.
    """

    n: int
    metric: str
    points: list[Point]
    hand_overs: list[HandOver]
    floors: dict[str, float]
    threshold: float
    chosen: float | None
    pictures: tuple[Tensor, Tensor]
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "n": self.n,
            "metric": self.metric,
            "threshold": self.threshold,
            "chosen": self.chosen,
            "floors": self.floors,
            "points": [dataclasses.asdict(point) for point in self.points],
            "hand_overs": [dataclasses.asdict(hand_over) for hand_over in self.hand_overs],
            "conditions": self.conditions,
        }


def metric_for(dataset: Dataset) -> str:
    """The score that sums up such data without weights from elsewhere."""
    return next(name for name in HEADLINES if name in _metrics(dataset))


def times_for(pair: Pair, times: Sequence[float] | None = None) -> list[float]:
    """Times of entry that a pair's chain has, increasing: those given, or `TIMES` brought to its grid.

    Raises:
        UserError: a given time that the chain does not have.
    """
    model = pair.model
    if times is not None:
        for t in times:
            model.sampling(t_mid=t)
        return sorted(set(times))
    total, sampling = model.chain.schedule.native_steps, model.sampling()
    assert isinstance(sampling, SurrogateSampling)
    found: dict[float, float] = {}  # one time for each level of a chain of few steps
    for t in sorted({max(1, round(t * total)) / total for t in TIMES} if total else TIMES):
        with contextlib.suppress(UserError):  # below the last of few steps
            found.setdefault(model.chain.entry(t, sampling).t, t)
    return list(found.values())


def hand_overs(
    pair: Pair,
    dataset: Dataset,
    times: Sequence[float],
    *,
    n: int = 500,
    seed: int = 0,
    batch_size: int = 256,
    on_step: OnStep | None = None,
) -> list[HandOver]:
    """Distance between the surrogate's and the data's noised laws at each time.

    Args:
        pair: the diffusion and the surrogate.
        dataset: the data both were trained on.
        times: above 0, at most 1.
        n: rough samples, and real items in each of the two sets that they are compared with; at least 4. The floor
            falls with it.
        seed: of the samples, of the choice of real items and of all noise.
        batch_size: items computed together.
        on_step: called after each time with the number done and the number of all.

    Raises:
        UserError: too few items, a time that the chain does not have.
    """
    model, spec, metric = pair.model, dataset.spec, metric_for(dataset)
    if n < 4:
        raise UserError(f"n: {n} is not valid: must be at least 4")
    if model.generator.most is not None and n > model.generator.most:
        raise UserError(f"n: {n} is not valid: the surrogate has only {model.generator.most} different samples")
    chosen = torch.randperm(len(dataset.train), generator=seeded(seed, "hand-over"))[: 2 * n]
    if len(chosen) < 2 * n:
        raise UserError(f"n: {n} is not valid: twice as many real items are needed, and there are {len(chosen)}")
    labels = dataset.train_labels[chosen] if model.config.conditional and dataset.train_labels is not None else None
    real, classes = spec.encode(dataset.train[chosen]), None
    if labels is not None:  # as often as in the data: real sets have such shares too
        place = torch.randint(len(dataset.train), (n,), generator=seeded(seed, "classes"))
        classes = dataset.train_labels[place] if dataset.train_labels is not None else None
    plain = spec.replace(levels=None)  # an estimate lies between the levels
    found: list[HandOver] = []
    rough: Tensor | None = None
    for index, t in enumerate(times):
        if rough is None or model.generator.follows:
            rough = _rough(model, t, n, seed, classes, batch_size)
        distances, floors = [], []
        for repeat in range(REPEATS):
            seen = [
                plain.decode(_recalled(model, x0, t, mix(seed, name, repeat), kinds, batch_size))
                for name, x0, kinds in (("rough", rough, classes), ("real", real, labels))
            ]
            known = dataclasses.replace(
                dataset, spec=plain, train=seen[1], held_out=seen[1][:1], train_labels=None, held_out_labels=None
            )
            (score,) = score_samples(seen[0], known, metrics=[metric], seed=mix(seed, repeat))
            assert score.floor is not None
            distances.append(score.value)
            floors.append(score.floor)
        found.append(HandOver(t, statistics.fmean(distances), statistics.fmean(floors)))
        if on_step is not None:
            on_step(index + 1, len(times))
    return found


def choose(found: Sequence[HandOver], threshold: float = THRESHOLD) -> float | None:
    """The smallest time from which on the distance stays within `threshold` floors; None where there is none."""
    chosen = None
    for hand_over in sorted(found, key=lambda one: one.t_mid, reverse=True):
        if hand_over.distance > threshold * hand_over.floor:
            break
        chosen = hand_over.t_mid
    return chosen


def sweep(
    pair: Pair,
    dataset: Dataset,
    times: Sequence[float] | None = None,
    *,
    n: int = 500,
    seed: int = 0,
    threshold: float = THRESHOLD,
    metrics: Sequence[str] | None = None,
    on_step: OnStep | None = None,
) -> Sweep:
    """Sample with every time of entry, with the surrogate alone and with the chain alone; score, time and compare.

    Args:
        pair: the diffusion and the surrogate.
        dataset: the data both were trained on.
        times: above 0, at most 1; `TIMES` if None.
        n: samples of every point; twice as many real items are needed.
        seed: of everything random.
        threshold: distance, in floors, up to which a surrogate passes for data.
        metrics: names of scores; the one that sums up the data if None.
        on_step: called after each part of the work with the number done and the number of all.

    Raises:
        UserError: too few items, a time that the chain does not have, an unknown metric.
    """
    entered, metric = [t for t in times_for(pair, times) if t > 0], metric_for(dataset)
    if not entered:
        raise UserError("times: none given above 0")
    names = list(metrics) if metrics is not None else [metric]
    for name in names:
        if name not in _metrics(dataset):
            raise UserError(f"metrics: unknown metric {name!r}; {nearest(name, _metrics(dataset))}")
    places: list[float | None] = [0.0, *entered, None]

    def done(count: int) -> None:
        if on_step is not None:
            on_step(count, len(places) + 1)

    found = hand_overs(pair, dataset, entered, n=n, seed=seed)
    done(1)
    chosen = choose(found, threshold)
    points: list[Point] = []
    floors: dict[str, float] = {}
    kept: dict[float, Tensor] = {}
    for index, t in enumerate(places):
        if t is None:
            samples = pair.model.chain.sample(n, seed=seed, **pair.model.config.sampling.of_chain())
        else:
            samples = pair.model.sample(n, seed=seed, t_mid=t)
        scores = score_samples(samples.data, dataset, metrics=names, seed=seed)
        floors |= {score.name: score.floor for score in scores if score.floor is not None}
        values = {score.name: score.value for score in scores}
        points.append(Point(t, samples.nfe, samples.seconds, values))
        if t is not None:
            kept[t] = samples.data[:32]
        done(index + 2)
    shown = chosen if chosen is not None else entered[-1]
    few = len(kept[shown])
    rough = pair.model.spec.decode(_rough(pair.model, shown, few, seed, pair.model.classes_for(few), few))
    conditions = {
        "seed": seed,
        "sampling": pair.config.method.sampling.to_json(),
        "run": pair.name,
        "with": pair.model.config.generator.origin,
        "device": str(pair.model.device),
        "threads": torch.get_num_threads(),
    }
    return Sweep(n, metric, points, found, floors, threshold, chosen, (rough, kept[shown]), conditions)


def write_sweep(result: Sweep, pair: Pair, folder: Path) -> list[Path]:
    """Write surrogate.json, surrogate.png (score against rate, score and distance against t_mid), and beside.png.

    beside.png shows rough samples (odd rows) and, below each, what became of it at the chosen time.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    by_rate, by_time = figure.subplots(1, 2)
    metric = next(iter(result.points[0].scores))
    entered = [point for point in result.points if point.t_mid is not None]
    alone = result.points[-1]
    rates = [result.n / point.seconds for point in entered]
    by_rate.plot(rates, [point.scores[metric] for point in entered], "o-", markersize=4, linewidth=1.2, label="pair")
    for point, rate in zip(entered, rates, strict=True):
        by_rate.annotate(
            f"{point.t_mid:g}", (rate, point.scores[metric]), fontsize=7, xytext=(3, 4), textcoords="offset points"
        )
    by_rate.plot(result.n / alone.seconds, alone.scores[metric], "s", color="black", label="chain alone")
    by_rate.set(xscale="log", xlabel="samples per second", ylabel=metric, title="numbers at the points: t_mid")
    by_time.plot([p.t_mid for p in entered], [p.scores[metric] for p in entered], "o-", markersize=4, label=metric)
    times = [hand_over.t_mid for hand_over in result.hand_overs]
    by_time.plot(times, [h.distance for h in result.hand_overs], "^-", markersize=4, label=f"{result.metric} at t_mid")
    allowed = [result.threshold * h.floor for h in result.hand_overs]
    by_time.plot(times, allowed, ":", color="0.4", label=f"{result.threshold:g} x real data at t_mid")
    by_time.axhline(alone.scores[metric], color="black", linewidth=0.8, linestyle="--", label="chain alone")
    if result.chosen is not None:
        by_time.axvline(result.chosen, color="tab:red", linewidth=0.8, label=f"auto: {result.chosen:g}")
    by_time.set(yscale="log", xlabel="t_mid", title="what is left of the surrogate's faults")
    for axis in (by_rate.xaxis, by_time.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    for axes in (by_rate, by_time):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    paths = [folder / "surrogate.json", folder / "surrogate.png"]
    files.write_json(paths[0], result.to_json())
    files.write_figure(paths[1], figure)
    spec = pair.model.spec
    if spec.kind == "image" and has_picture(spec):
        paths.append(folder / "beside.png")
        with files.replacing(paths[-1]) as temporary:
            beside(*result.pictures, spec).save(temporary, format="png")
    return paths


def _metrics(dataset: Dataset) -> set[str]:
    """Names of the scores that can be computed for such data without weights from elsewhere."""
    return set(metric_names(dataset.spec, default_features(dataset.source, dataset.spec)).values())


def _batches(n: int, size: int) -> Iterator[tuple[int, slice]]:
    for first in range(0, n, size):
        yield first, slice(first, min(first + size, n))


def _rough(model: Surrogate, t: float, n: int, seed: int, classes: Tensor | None, batch_size: int) -> Tensor:
    """The rough samples that the first `n` samples of a seed start from, model units, on the CPU."""
    sampling, parts = model.sampling(t_mid=t), []
    assert isinstance(sampling, SurrogateSampling)
    with torch.inference_mode():
        for first, part in _batches(n, batch_size):
            draws = SampleDraws(seed, first, part.stop - part.start, model.device)
            kinds = None if classes is None else classes[part].to(model.device)
            parts.append(model.rough(draws, sampling, kinds, lambda *_: None)[0].cpu())
    return torch.cat(parts).clone()


def _recalled(model: Surrogate, x0: Tensor, t: float, seed: int, classes: Tensor | None, batch_size: int) -> Tensor:
    """What the chain's denoiser makes of noised items, model units, on the CPU."""
    sampling, parts = model.sampling(t_mid=t), []
    assert isinstance(sampling, SurrogateSampling)
    with torch.inference_mode():
        for first, part in _batches(len(x0), batch_size):
            draws = SampleDraws(seed, first, part.stop - part.start, model.device)
            kinds = None if classes is None else classes[part].to(model.device)
            parts.append(model.chain.recall(x0[part].to(model.device), t, draws, sampling, kinds).cpu())
    return torch.cat(parts).clone()

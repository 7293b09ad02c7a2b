"""Scores of generated samples against real data: which metrics, on which sets, under which names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from osmose.data.dataset import Dataset, DataSpec
from osmose.errors import UserError, nearest
from osmose.metrics.admission import admit, refuse_identical
from osmose.metrics.features import NO_FEATURES, FeatureNetwork, default_features
from osmose.metrics.matrices import seeded, subset
from osmose.metrics.measures import ON_FEATURES, ON_PROBABILITIES, ON_VALUES, Measure, Measured, neighbour_ratio, share
from osmose.metrics.real import Part, RealSets, draw_real, embed_real
from osmose.metrics.score import Score, table
from osmose.metrics.scorecard import Scorecard, Sides
from osmose.metrics.series import evened, on_grid, roughness
from osmose.metrics.text import known_words, ngram_distance

__all__ = ["Score", "metric_names", "score_samples", "table"]

#: Metrics of all pairs use at most this many items of each side, chosen at random; `Score.n` says how many.
VALUE_ITEMS = 3_000
BALL_ITEMS = 10_000
#: Items of each side that are looked up in the whole training part; a median needs no more.
NEIGHBOUR_QUERIES = 500

#: Of text: the distance of frequencies of two and of three characters in a row.
ON_TEXT = {f"{name}_tv": Measure(partial(ngram_distance, n=n), "lower") for n, name in ((2, "bigram"), (3, "trigram"))}
_BALLS = {key: measure for key, measure in ON_FEATURES.items() if key in ("precision", "recall")}
_WHOLE = {key: measure for key, measure in ON_FEATURES.items() if key not in _BALLS}
_PUBLISHED = {"fd": "fid", "kid": "kid", "precision": "precision", "recall": "recall", "score": "is"}
_OWN = {"fd": "fd", "kid": "kid", "precision": "prec", "recall": "rec", "score": "score"}


def metric_names(spec: DataSpec, features: FeatureNetwork | None) -> dict[str, str]:
    """The metrics for such data and such a network: the measure behind each, to the name it may go by.

    `fid`, `kid`, `is`, `precision` and `recall` exist only with the verified Inception network of 2015.
    """
    if spec.kind == "text":
        return {key: key for key in (*ON_TEXT, "known_words")}
    names: dict[str, str] = {}
    if features is not None:
        published = not features.suffix
        names = dict(_PUBLISHED) if published else {key: f"{own}_{features.suffix}" for key, own in _OWN.items()}
    if features is not None and features.suffix == "clf":
        names |= {"score": "clf_score", "conf": "conf", "class_tv": "class_tv", "label_clf": "label_clf"}
    names |= {key: key for key in ("sw2", "energy", "nn_ratio")}
    if spec.kind == "series":
        names |= {"roughness": "roughness"}
    if spec.kind != "image":
        names |= {key: key for key in ("mmd", "prec_raw", "rec_raw")}
    return names


def score_samples(
    samples: Tensor,
    dataset: Dataset,
    *,
    reference: Part = "train",
    features: FeatureNetwork | Literal["default"] | None = "default",
    num_real: int | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    times: Tensor | None = None,
) -> list[Score]:
    """Compare n samples with as many real items.

    The reference is a random subset of `reference`, the same for every model with the same n and seed; the floor of
    every metric is its value between that subset and as many other real items (`real.draw_real`). Metrics of the
    values are in model units and use at most 3,000 items of each side, precision and recall at most 10,000,
    `nn_ratio` 500 of each side against the whole training part; its best value is that of unseen real data, about 1.

    Args:
        samples: data units (`spec.decode` of what a model draws), shape (n, *spec.shape).
        dataset: the real data.
        reference: the part that is compared with; papers use the training part.
        features: a network, None for metrics without features, or the default of the data set.
        num_real: real items in the reference, n if None; other numbers bias the two sides differently.
        labels: class of each sample where the model was told one, int64 (n,); adds `label_clf`, the share that the
            classifier agrees with.
        seed: of all random choices.
        times: of samples of series, float64 (n, L); those with times of their own are brought to one grid first, and
            samples with missing values are.
        metrics: names to compute (`metric_names`); None computes all that can be, and says in the notes what cannot.

    Raises:
        UserError: samples of the wrong shape, units or with NaN; samples that are the reference itself; a metric asked
            for by name that does not exist or cannot be computed (n <= d, no Inception weights).
    """
    as_drawn = (samples, times, dataset)
    if dataset.spec.series is not None and not dataset.spec.series.regular:
        if times is None:
            raise UserError(f"times: samples of {dataset.source} are series with times of their own; give them")
        dataset, grid = evened(dataset)
        samples = on_grid(samples, times, grid, torch.tensor(dataset.spec.shift))
    spec = dataset.spec
    samples = admit(samples, spec)
    n, m = len(samples), num_real if num_real is not None else len(samples)
    if m < 4:
        raise UserError(f"num_real: {m} real items are too few, at least 4 needed")
    network = _network(features, dataset)
    names = _wanted(metric_names(spec, network), metrics, labels, n)
    real = draw_real(dataset, reference, n, m, seed)
    refuse_identical(samples, dataset.part(reference)[0], reference)
    refuse_identical(samples, real.items[real.reference], reference)

    card = Scorecard(names, reference, strict=metrics is not None)
    if network is not None and not names.keys().isdisjoint({*ON_FEATURES, *ON_PROBABILITIES, "label_clf"}):
        _add_features(card, samples, labels, dataset, real, network, m, seed)
    sides = Sides.of(samples, real.items, real).at_most(VALUE_ITEMS, seed)
    if spec.kind == "text":
        card.add(ON_TEXT, sides)
        card.put("known_words", lambda: known_words(samples, dataset.held_out, dataset), "higher", n, m)
    else:
        card.add(ON_VALUES, sides.map(lambda x: spec.encode(x).flatten(1)))
        _add_neighbours(card, samples, dataset, seed)
    _add_roughness(card, *as_drawn, reference)

    found = real.reference.stop
    notes = [real.note] if real.note else []
    if found != n:
        notes.append(f"n = {n} samples against m = {found} real items: scores with other n and m are not comparable")
    if network is None and features == "default" and spec.kind == "image":
        notes.append(NO_FEATURES.format(source=dataset.source, shape=spec.shape))
    return card.finished(notes)


def _network(features: FeatureNetwork | Literal["default"] | None, dataset: Dataset) -> FeatureNetwork | None:
    if features is None:
        return None
    if isinstance(features, str):
        return default_features(dataset.source, dataset.spec)
    if not features.takes(dataset.spec):
        spec = dataset.spec
        raise UserError(
            f"features: {features.name} takes images of shape {features.shape or '(1 or 3, height, width)'}; "
            f"{dataset.source} has {spec.kind} data of shape {spec.shape}"
        )
    return features


def _wanted(names: dict[str, str], metrics: Sequence[str] | None, labels: Tensor | None, n: int) -> dict[str, str]:
    """The part of `names` that is to be computed."""
    if labels is None:
        names.pop("label_clf", None)
    elif labels.shape != (n,):
        raise UserError(f"labels: shape {tuple(labels.shape)} given for {n} samples")
    if metrics is None:
        return names
    known = set(names.values())
    for metric in metrics:
        if metric in known:
            continue
        if metric in _PUBLISHED.values():
            raise UserError(
                f"metrics: {metric} is not available: it is defined by the Inception network of 2015, whose weights "
                f"(SHA-256 6726825d...) are given with --inception-weights PATH; available: {', '.join(sorted(known))}"
            )
        if metric == "label_clf":
            raise UserError("metrics: label_clf needs a classifier and the labels that the samples were drawn for")
        raise UserError(f"metrics: unknown metric {metric!r}; {nearest(metric, known)}")
    return {key: name for key, name in names.items() if name in metrics}


def _add_features(
    card: Scorecard,
    samples: Tensor,
    labels: Tensor | None,
    dataset: Dataset,
    real: RealSets,
    network: FeatureNetwork,
    m: int,
    seed: int,
) -> None:
    n, d = len(samples), network.dim
    made = network.embed(samples, dataset.spec.range)
    known = embed_real(real, network, dataset, card.reference, n, m, seed)
    sides = Sides.of(made.features, known.features, real)
    few = (
        f"n = {n} is below 10 d = {10 * d}: the Frechet distance is mostly its bias; compare it with that of real data"
    )
    card.add({"fd": _WHOLE["fd"]}, sides, network, few if n < 10 * d else None)
    card.add({"kid": _WHOLE["kid"]}, sides, network)
    card.add(_BALLS, sides.at_most(BALL_ITEMS, seed), network)
    if made.probabilities is None or known.probabilities is None:
        return
    sides = Sides.of(made.probabilities, known.probabilities, real)
    card.add(ON_PROBABILITIES, sides, network)
    if labels is None:
        return
    told = labels.cpu()

    def agreement() -> tuple[Measured, float | None]:
        right = float((sides.x.argmax(dim=1) == told).double().mean())
        if real.labels is None:
            return share(right, n), None
        return share(right, n), float((sides.y.argmax(dim=1) == real.labels[real.reference]).double().mean())

    card.put("label_clf", agreement, "higher", n, len(sides.y), network)


def _add_roughness(card: Scorecard, samples: Tensor, times: Tensor | None, dataset: Dataset, reference: Part) -> None:
    """How rough series are beside real ones, each at its own times; the floor is that of the other part."""
    form = dataset.spec.series
    if form is None:
        return
    other: Part = "held-out" if reference == "train" else "train"
    at = dataset.times("train")[:1].expand(len(samples), -1) if times is None else times  # type: ignore[index]
    real, floor = ((dataset.part(part)[0], dataset.times(part)) for part in (reference, other))

    def compute() -> tuple[Measured, float | None]:
        value = roughness(samples, at, *real, form.gap)  # type: ignore[arg-type]
        return Measured(value), roughness(*floor, *real, form.gap)  # type: ignore[arg-type]

    card.put("roughness", compute, "one", len(samples), len(real[0]))


def _add_neighbours(card: Scorecard, samples: Tensor, dataset: Dataset, seed: int) -> None:
    spec, generator = dataset.spec, seeded(seed)
    made = samples[subset(len(samples), NEIGHBOUR_QUERIES, generator)]
    unseen = dataset.held_out[subset(len(dataset.held_out), NEIGHBOUR_QUERIES, generator)]
    # One scale for all channels does not change the ratio, and the training part need not be copied.
    same_scale = len(set(spec.scale)) == 1

    def flat(x: Tensor) -> Tensor:
        return x.flatten(1) if same_scale else spec.encode(x).flatten(1)

    def compute() -> tuple[Measured, float | None]:
        return neighbour_ratio(flat(made), flat(dataset.train), flat(unseen))

    card.put("nn_ratio", compute, "one", len(made), len(unseen))

"""Scores of generated samples against real data: which metrics, on which sets, under which names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from osmose.data.dataset import Dataset, DataSpec
from osmose.errors import UserError, nearest
from osmose.metrics.admission import admit, refuse_identical
from osmose.metrics.features import NO_FEATURES, FeatureNetwork, default_features
from osmose.metrics.matrices import seeded, subset
from osmose.metrics.measures import (
    ON_FEATURES,
    ON_PROBABILITIES,
    ON_VALUES,
    Measure,
    Measured,
    neighbour_ratio,
)
from osmose.metrics.real import Part, RealSets, draw_real, embed_real
from osmose.metrics.score import Score, table

__all__ = ["Score", "metric_names", "score_samples", "table"]

#: Metrics of all pairs use at most this many items of each side, chosen at random; `Score.n` says how many.
VALUE_ITEMS = 3_000
BALL_ITEMS = 10_000
#: Items of each side that are looked up in the whole training part; a median needs no more.
NEIGHBOUR_QUERIES = 500

_INCEPTION = {"fd": "fid", "kid": "kid", "precision": "precision", "recall": "recall", "score": "is"}
_SHORT = {"fd": "fd", "kid": "kid", "precision": "prec", "recall": "rec", "score": "score"}


def metric_names(spec: DataSpec, features: FeatureNetwork | None) -> dict[str, str]:
    """Names of the metrics for such data and such a network, each with the measure behind it.

    `fid`, `kid`, `is`, `precision` and `recall` exist only with the verified Inception network of 2015.
    """
    names: dict[str, str] = {}
    if features is not None and features.suffix == "":
        names |= {name: measure for measure, name in _INCEPTION.items()}
    elif features is not None:
        names |= {f"{name}_{features.suffix}": measure for measure, name in _SHORT.items()}
    if features is not None and features.suffix == "clf":
        names["clf_score"] = names.pop("score_clf")
        names |= {"conf": "conf", "class_tv": "class_tv", "label_clf": "label_clf"}
    names |= {"sw2": "sw2", "energy": "energy", "nn_ratio": "nn_ratio"}
    if spec.kind != "image":
        names |= {"mmd": "mmd", "prec_raw": "prec_raw", "rec_raw": "rec_raw"}
    return names


def score_samples(
    samples: Tensor,
    dataset: Dataset,
    *,
    reference: Part = "train",
    features: FeatureNetwork | None | Literal["default"] = "default",
    num_real: int | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
) -> list[Score]:
    """Compare n samples with as many real items.

    The reference is a random subset of `reference`, the same for every model with the same n and seed; the floor of
    every metric is its value between that subset and other real items of the same number (`real.draw_real`).
    Metrics of the values are in model units and use at most 3,000 items of each side, precision and recall at most
    10,000, `nn_ratio` 500 against the whole training part. Its best value is the one of real data, near 1.

    Args:
        samples: data units (`spec.decode` of what a model draws), shape (n, *spec.shape).
        dataset: the real data.
        reference: the part that is compared with; papers use the training part.
        features: a network, None for metrics without features, or the default of the data set.
        num_real: real items in the reference, n if None; other numbers bias the two sides differently.
        labels: class of each sample where the model was told one, int64 (n,); adds `label_clf`, the share that the
            classifier agrees with.
        seed: of all random choices.
        metrics: names to compute (`metric_names`); None computes all that can be, and says in the notes what cannot.

    Raises:
        UserError: samples of the wrong shape, units or with NaN; samples that are the reference itself; a metric asked
            for by name that does not exist or cannot be computed (n <= d, no Inception weights).
    """
    spec = dataset.spec
    samples = admit(samples, spec)
    network = _network(features, dataset)
    names = _wanted(metric_names(spec, network), metrics, labels is not None)
    n = len(samples)
    m = num_real or n
    real = draw_real(dataset, reference, n, m, seed)
    refuse_identical(samples, dataset.part(reference)[0], reference)
    refuse_identical(samples, real.items[real.reference], reference)

    scores = _Collector(reference, names, strict=metrics is not None, common=_common_notes(real, n, dataset, features, network))
    if network is not None and scores.any_of(ON_FEATURES | ON_PROBABILITIES, "label_clf"):
        made = network.embed(samples, spec.range)
        known = embed_real(real, network, dataset, reference, n, m, seed)
        sides = _Sides.of(made.features, known.features, real)
        scores.network, scores.notes["fd"] = network, _small(n, network)
        for measure in ON_FEATURES:
            limited = sides.at_most(BALL_ITEMS, seed) if measure in ("precision", "recall") else sides
            scores.add(measure, ON_FEATURES[measure], limited)
        if made.probabilities is not None and known.probabilities is not None:
            sides = _Sides.of(made.probabilities, known.probabilities, real)
            for measure in ON_PROBABILITIES:
                scores.add(measure, ON_PROBABILITIES[measure], sides)
            if labels is not None:
                scores.add("label_clf", _agreement(labels, real), sides)
        scores.network = None
    limited = _Sides.of(samples, real.items, real).at_most(VALUE_ITEMS, seed)
    values = limited.map(lambda x: spec.encode(x).flatten(1))
    for measure in ON_VALUES:
        scores.add(measure, ON_VALUES[measure], values)
    _add_neighbours(scores, samples, dataset, seed)
    return scores.finished()

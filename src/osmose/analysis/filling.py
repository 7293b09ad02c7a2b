"""Forecasts and imputations of given series by a run: from a history to paths, from gaps to samples of what fills them.

A model of series learned from items of a certain length, with their times counted in a certain way; a series of any
length is cut and shifted as the items of training were.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osmose.data.timetables import Series
from osmose.errors import UserError
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import OnStep


@dataclass(frozen=True)
class Filled:
    """Samples of the values of one series that are not known.

    Attributes:
        times: float64 (L,), as in the file.
        values: what is known, float32 (C, L), NaN elsewhere.
        samples: float32 (S, C, L): the known values as they are, the others drawn.
        nfe: network evaluations spent on each sample.
    """

    times: Tensor
    values: Tensor
    samples: Tensor
    nfe: int


def _form(model: GenerativeModel) -> Any:
    if model.spec.series is None:
        raise UserError(f"run: learned from {model.spec.kind}, and forecasts and imputations are of series")
    return model.spec.series


def forecast(
    model: GenerativeModel,
    history: Series,
    times: Tensor,
    *,
    num_samples: int = 100,
    seed: int = 0,
    batch_size: int | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Filled:
    """Draw what comes after a history.

    The model sees as many of the last times as its items have room for beside the horizon.

    Args:
        model: a model of series.
        history: what is known, in data units.
        times: of the forecast, float64 (H,), ascending, after the history's last.
        num_samples: paths.
        seed: of the paths.
        batch_size: paths computed together.
        on_step: called with the steps done and the steps in all.
        **options: of sampling.

    Returns:
        The part of the history that was seen, and the horizon behind it.

    Raises:
        UserError: times that do not ascend or lie before the end of the history; a horizon that leaves no room or that
            the model has not learned; a history without a known value.
    """
    form, longest = _form(model), model.spec.shape[1]
    if getattr(model.config, "task", None) == "impute":
        raise UserError("run: learned with task=impute; forecasts are made by one that learned with forecast or any")
    ahead = torch.as_tensor(times, dtype=torch.float64)
    _require_columns(model, history)
    if not len(ahead):
        raise UserError("horizon: 0 times asked for; at least 1 is needed")
    seen = longest - len(ahead)
    if seen < 1:
        raise UserError(
            f"horizon: {len(ahead)} times asked for, and items of this run have {longest}: some must be history"
        )
    rows = np.isfinite(history.values).any(1).nonzero()[0]
    if len(rows):  # what is empty at the end is neither known nor asked for
        history = Series(history.name, history.times[: rows[-1] + 1], history.values[: rows[-1] + 1])
    before = torch.from_numpy(history.times[-seen:])
    if not float(ahead[0]) > float(before[-1]) or bool((ahead.diff() <= 0).any()):
        raise UserError(
            f"times: of a forecast have to ascend from after {float(before[-1]):.10g}, the history's last; "
            f"{float(ahead[0]):.10g} is the first"
        )
    known = torch.from_numpy(history.values[-seen:].T).float()
    if not bool(known.isfinite().any()):
        raise UserError(f"history: its last {seen} times, which the model sees, have no known value")
    values = torch.cat([known, torch.full((len(known), len(ahead)), torch.nan)], 1)
    whole = torch.cat([before, ahead])
    samples, nfe = _drawn(model, form, values, whole, num_samples, seed, batch_size, on_step, options)
    return Filled(whole, values, samples, nfe)


def impute(
    model: GenerativeModel,
    series: Series,
    *,
    num_samples: int = 100,
    seed: int = 0,
    batch_size: int | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Filled:
    """Draw the missing values of a series.

    One that is longer than the model's items is filled window by window, each overlapping the last by half; a value is
    taken from the window in whose middle it is, so that samples of values far apart are independent of each other.

    Raises:
        UserError: a series without a known value or without a missing one, a model that learned to forecast alone.
    """
    form, longest = _form(model), model.spec.shape[1]
    _require_columns(model, series)
    if getattr(model.config, "task", None) == "forecast":
        raise UserError("run: learned with task=forecast; gaps are filled by one that learned with task=impute or any")
    times, values = torch.from_numpy(series.times), torch.from_numpy(series.values.T).float()
    if not bool(values.isfinite().any()):
        name = f" {series.name!r}" if series.name else ""
        raise UserError(f"series{name}: has no known value")
    if bool(values.isfinite().all()):
        raise UserError("series: nothing is missing")
    for label, some in zip(form.columns, values.isfinite().any(1).tolist(), strict=True):
        if not some:
            warnings.warn(f"column {label!r}: has no known value at all; what fills it is a guess", stacklevel=2)
    length = values.shape[1]
    samples = values.repeat(num_samples, 1, 1)
    starts = [0] if length <= longest else [*range(0, length - longest, max(1, longest // 2)), length - longest]
    distance = torch.full((length,), torch.inf)
    nfe = 0
    gaps = [start for start in starts if bool(values[:, start : start + longest].isnan().any())]
    for index, start in enumerate(gaps):
        rows = slice(start, min(start + longest, length))

        def report(done: int, of: int, index: int = index) -> None:
            if on_step is not None:
                on_step(index * of + done, len(gaps) * of)

        part, nfe = _drawn(
            model, form, values[:, rows], times[rows], num_samples, seed + index, batch_size, report, options
        )
        middle = (torch.arange(rows.start, rows.stop) - (rows.start + rows.stop - 1) / 2).abs()
        nearer = middle < distance[rows]
        distance[rows] = torch.where(nearer, middle, distance[rows])
        samples[..., rows] = torch.where(nearer, part, samples[..., rows])
    return Filled(times, values, samples, nfe)


def _require_columns(model: GenerativeModel, series: Series) -> None:
    if series.values.shape[1] != model.spec.shape[0]:
        raise UserError(
            f"columns: {series.values.shape[1]} given, and this run has {model.spec.shape[0]}: "
            f"{', '.join(_form(model).columns)}"
        )


def _drawn(
    model: GenerativeModel,
    form: Any,
    values: Tensor,
    times: Tensor,
    count: int,
    seed: int,
    batch_size: int | None,
    on_step: OnStep | None,
    options: dict[str, Any],
) -> tuple[Tensor, int]:
    shifted = times - times[0] if form.from_first else times
    drawn = model.sample(
        count,
        known=values.expand(count, -1, -1),
        times=shifted,
        seed=seed,
        batch_size=batch_size,
        on_step=on_step,
        **options,
    )
    return drawn.data, drawn.nfe

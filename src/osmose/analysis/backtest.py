"""Forecasts of what is known already: rolling windows at the end of series that training did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osmose.analysis import baselines
from osmose.analysis.filling import Filled, forecast
from osmose.data.dataset import DataConfig, Dataset, SeriesForm
from osmose.data.series_sources import table_of
from osmose.data.timetables import Series
from osmose.errors import UserError
from osmose.gaussian.draws import seeded
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import OnStep


@dataclass(frozen=True)
class Case:
    """One forecast: all that is known before it, and what came.

    Attributes:
        history: every row before the horizon, (n, C).
        future: the rows of the horizon, (H, C).
    """

    history: Series
    future: Series


def cases_of(config: DataConfig, dataset: Dataset, windows: int, horizon: int) -> list[Case]:
    """The forecasts to make, the earliest first.

    Of a table that was cut into windows the last `windows` stretches of `horizon` rows of each series; of whole series
    the last `horizon` times of each held-out one, at most `windows` of them.

    Raises:
        UserError: stretches that reach into the rows that training saw, or series that are too short.
    """
    form = dataset.spec.series
    if form is None:
        raise UserError(f"data: {dataset.source} has {dataset.spec.kind}, and forecasts are of series")
    if windows < 1 or horizon < 1:
        raise UserError(f"windows: {windows} of horizon {horizon} is not valid: both must be at least 1")
    if config.window is None:
        return _of_items(dataset, windows, horizon)
    table = table_of(config)
    found: list[Case] = []
    for series in table.series:
        rows = len(series.times)
        unseen = round(config.held_out * rows)
        if windows * horizon > unseen:
            raise UserError(
                f"windows: {windows} of {horizon} rows reach into training: {unseen} rows were held out; use at most "
                f"{unseen // horizon} windows, or train with a larger data.held_out"
            )
        for start in range(rows - windows * horizon, rows, horizon):
            found.append(_cut(series, start, horizon))
    return found


def _cut(series: Series, start: int, horizon: int) -> Case:
    before, after = slice(0, start), slice(start, start + horizon)
    return Case(
        Series(series.name, series.times[before], series.values[before]),
        Series(series.name, series.times[after], series.values[after]),
    )


def _of_items(dataset: Dataset, windows: int, horizon: int) -> list[Case]:
    assert dataset.held_out_times is not None
    found: list[Case] = []
    for values, times in zip(dataset.held_out, dataset.held_out_times, strict=True):
        length = int(times.isfinite().sum())
        if length > horizon and len(found) < windows:
            series = Series(str(len(found)), times[:length].numpy(), values[:, :length].T.double().numpy())
            found.append(_cut(series, length - horizon, horizon))
    if not found:
        raise UserError(f"horizon: {horizon} is not valid: no held-out series of {dataset.source} is longer")
    return found


@dataclass(frozen=True)
class Contest:
    """Forecasts of several kinds for the same windows.

    Attributes:
        paths: by name, (W, S, C, H).
        truth: (W, C, H), NaN where there is none.
        last: the last known value of each column before each window, (W, C).
        first: what the model saw and drew in the first window.
    """

    paths: dict[str, Tensor]
    truth: Tensor
    last: Tensor
    first: Filled


def contest(
    model: GenerativeModel,
    cases: Sequence[Case],
    name: str,
    *,
    num_samples: int = 100,
    period: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Contest:
    """Forecasts of a model, and of everything in `analysis.baselines` that suits the data.

    Args:
        model: a model of series.
        cases: the windows.
        name: of the model.
        num_samples: paths of each window.
        period: of the season, in rows; without, there are no seasonal forecasts.
        seed: of all paths.
        batch_size: paths computed together.
        on_step: called with the steps done and the steps in all.
        **options: of sampling.
    """
    form = model.spec.series
    assert form is not None
    drawn: list[Filled] = []
    for index, case in enumerate(cases):

        def report(done: int, of: int, index: int = index) -> None:
            if on_step is not None:
                on_step(index * of + done, len(cases) * of)

        times = torch.from_numpy(case.future.times)
        drawn.append(
            forecast(
                model,
                case.history,
                times,
                num_samples=num_samples,
                seed=seed + index,
                batch_size=batch_size,
                on_step=report,
                **options,
            )
        )
    horizon = len(cases[0].future.times)
    simple = [
        simple_forecasts(case, form, model.spec.shape[1], num_samples, period, seed + i) for i, case in enumerate(cases)
    ]
    paths = {name: torch.stack([filled.samples[..., -horizon:] for filled in drawn])}
    shared = [kind for kind in simple[0] if all(kind in made for made in simple)]
    paths |= {kind: torch.stack([made[kind] for made in simple]).float() for kind in shared}
    truth = torch.stack([torch.from_numpy(case.future.values.T).float() for case in cases])
    last = torch.stack([baselines.last_known(_columns(case.history)).float() for case in cases])
    return Contest(paths, truth, last, drawn[0])


def _columns(series: Series) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(series.values.T))


def simple_forecasts(
    case: Case, form: SeriesForm, longest: int, count: int, period: int | None, seed: int
) -> dict[str, Tensor]:
    """Forecasts that need no training, by name, float64 (count, C, H); walks and seasons pass over gaps in a line."""
    generator = seeded(seed, "baselines")
    history, horizon = _columns(case.history), len(case.future.times)
    whole = baselines.linear(history, torch.from_numpy(case.history.times))
    found = {"last": baselines.last_value(history, horizon, count).double()}
    times = torch.from_numpy(np.concatenate([case.history.times[-longest + horizon :], case.future.times]))
    gaps = times.diff()
    if float(gaps.max()) < 1.5 * float(gaps.min()) or form.unit == "days":  # a walk by rows: weekends are one step
        found["walk"] = baselines.walk(whole, horizon, count, generator)
    if period is not None:
        found["seasonal"] = baselines.seasonal(whole, horizon, period, count).double()
        found["seasonal-walk"] = baselines.seasonal_walk(whole, horizon, period, count, generator)
    recent = history[:, -longest + horizon :].double()
    known = recent.isfinite()
    mean = torch.where(known, recent, 0).sum(1) / known.sum(1).clamp(min=1)
    spread = torch.where(known, recent - mean[:, None], 0).square().sum(1) / known.sum(1).clamp(min=1)
    scale = spread.sqrt().clamp(min=1e-9)
    asked = torch.cat([recent, torch.full((len(recent), horizon), torch.nan)], 1)
    found["kriging"] = baselines.kriging(asked, times, mean, scale, form.memory, count, generator)[..., -horizon:]
    return found

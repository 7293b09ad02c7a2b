"""GluonTS: train on its data sets, forecast as one of its predictors.

A GluonTS data set is a list of dicts with `start`, a pandas Period, and `target`, (T,) of one column or (C, T) of
several, NaN where missing; `item_id` names it. All times are counted in steps of its frequency, which is that of
`start`: a run knows the one that it learned from, and forecasts no other.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osmose.analysis.filling import forecast
from osmose.data.dataset import DataConfig
from osmose.data.timetables import Series
from osmose.errors import UserError
from osmose.training import files
from osmose.training.recipes import train as train_run
from osmose.training.run import Run

try:
    from gluonts.model.forecast import SampleForecast
    from gluonts.model.predictor import Predictor
except ImportError as error:
    raise UserError(f"gluonts: {error.name} is missing; install it with: pip install 'osmose[series]'") from None

#: What the column of times is called, before the frequency.
_STEPS = "steps of "
#: Windows hold so many horizons of history beside the one that is forecast, unless told otherwise.
_CONTEXT = 3


def write_table(entries: Iterable[dict[str, Any]], path: Path | str) -> tuple[int, int]:
    """Write a data set as a table with the columns `item`, `steps of` its frequency (from its start), `x0`, `x1`, ...

    Returns:
        The number of columns of values, and of rows of the shortest series.

    Raises:
        UserError: no series, series of different numbers of columns or frequencies.
    """
    text = io.StringIO()
    writer, columns, shortest, frequency = csv.writer(text, lineterminator="\n"), 0, 0, ""
    for index, entry in enumerate(entries):
        target = np.atleast_2d(np.asarray(entry["target"], dtype=float))
        if not index:
            (columns, shortest), frequency = target.shape, _frequency(entry)
            writer.writerow(["item", f"{_STEPS}{frequency}", *(f"x{i}" for i in range(columns))])
        if target.shape[0] != columns:
            raise UserError(f"target: series {index} has {target.shape[0]} columns, and the first {columns}")
        if _frequency(entry) != frequency:
            raise UserError(f"start: series {index} has the frequency {_frequency(entry)}, and the first {frequency}")
        shortest = min(shortest, target.shape[1])
        name = f"{index}:{entry.get('item_id', '')}"
        for step, values in enumerate(target.T):
            writer.writerow([name, step, *("" if np.isnan(value) else repr(float(value)) for value in values)])
    if not columns:
        raise UserError("dataset: has no series")
    files.write_bytes(Path(path), text.getvalue().encode())
    return columns, shortest


def _frequency(entry: dict[str, Any]) -> str:
    """Of the start of an entry."""
    return str(getattr(entry["start"], "freqstr", "step"))


def train(
    entries: Iterable[dict[str, Any]],
    out: Path | str,
    *,
    prediction_length: int,
    context_length: int | None = None,
    method: str = "dspd",
    seed: int = 0,
    progress: bool = True,
    **changes: Any,
) -> Run:
    """Train on a data set, for forecasts of `prediction_length`; its table is kept beside the run, as OUT.csv.

    Args:
        entries: the data set.
        out: the run folder to make.
        prediction_length: times to forecast.
        context_length: times that the model sees; three horizons if None. Windows take half of the shortest series at
            most.
        method: dspd or cspd.
        seed: of everything random.
        progress: show a progress bar.
        **changes: overrides, as of `osmose.train`.

    Raises:
        UserError: series that are too short, what `osmose.train` refuses.
    """
    table = Path(f"{out}.csv")
    if table.exists():
        raise UserError(f"out: {table} exists already; choose another folder")
    _, shortest = write_table(entries, table)
    # The last rows of each series are held out, and have to hold a window as well.
    context = _CONTEXT * prediction_length if context_length is None else context_length
    window = min(prediction_length + context, shortest // 2)
    if window <= prediction_length:
        raise UserError(
            f"prediction_length: {prediction_length} leaves no history: windows take half of the shortest series, "
            f"which has {shortest} times"
        )
    share = min(0.5, max(0.1, window / shortest))
    data = DataConfig.parse(
        {
            "source": f"series:{table}",
            "id_column": "item",
            "window": window,
            "held_out": share,
        }
    )
    settings = {"task": "forecast", "horizon": prediction_length, "local": True} | changes
    return train_run(method, data, out, seed=seed, progress=progress, **settings)


class OsmosePredictor(Predictor):
    """A trained run as a GluonTS predictor.

    Args:
        run: a run that forecasts, or its folder.
        num_samples: paths of each forecast.
        seed: of the paths.
        device: where to sample.
        **options: of sampling (`num_steps`, `solver`).

    Raises:
        UserError: a run that did not learn from series.
    """

    def __init__(
        self,
        run: Run | Path | str,
        *,
        num_samples: int = 100,
        seed: int = 0,
        device: torch.device | str = "cpu",
        **options: Any,
    ):
        run = run if isinstance(run, Run) else Run.open(run)
        self.model = run.model(device)
        if self.model.spec.series is None:
            raise UserError(f"run: {run.folder} learned from {self.model.spec.kind}, and GluonTS forecasts series")
        self.num_samples, self.seed, self.options = num_samples, seed, options
        super().__init__(prediction_length=getattr(run.config.method, "horizon", 1))

    def predict(self, dataset: Any, num_samples: int | None = None, **_: Any) -> Iterator[SampleForecast]:
        """A forecast of what comes after each entry, in order.

        Raises:
            UserError: entries with other columns or another frequency than those of the run, or without a known value.
        """
        form = self.model.spec.series
        assert form is not None
        for index, entry in enumerate(dataset):
            target = np.atleast_2d(np.asarray(entry["target"], dtype=float))
            frequency = form.time_column.removeprefix(_STEPS)
            if frequency != form.time_column and _frequency(entry) != frequency:
                raise UserError(
                    f"start: entry {index} has the frequency {_frequency(entry)}, and this run learned from {frequency}"
                )
            if not target.size:
                raise UserError(f"target: entry {index} has no times")
            # A step of a GluonTS data set is the gap that the run knows.
            history = Series("", form.gap * np.arange(target.shape[1]), np.ascontiguousarray(target.T))
            ahead = form.gap * (target.shape[1] + torch.arange(self.prediction_length, dtype=torch.float64))
            made = forecast(
                self.model,
                history,
                ahead,
                num_samples=num_samples or self.num_samples,
                seed=self.seed + index,
                **self.options,
            )
            paths = made.samples[..., -self.prediction_length :].numpy()
            samples = paths[:, 0] if target.shape[0] == 1 else paths.transpose(0, 2, 1)
            start = entry["start"] + target.shape[1]
            yield SampleForecast(samples=samples, start_date=start, item_id=entry.get("item_id"))

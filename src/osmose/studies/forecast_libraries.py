"""Forecasts of other libraries, for studies: statsforecast's automatic models and GluonTS's DeepAR."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osmose.analysis.backtest import Case
from osmose.errors import UserError

#: Rows of the past that the statistical models are fitted to.
_ROWS = 500
#: Half the width of the interval that holds 80 % of a normal law, in deviations.
_HALF_80 = 1.2815515655446004


def _require(name: str) -> None:
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise UserError(f"series-forecast: needs {name}; install it with: pip install 'osmose[baselines]'")


def statistical(cases: Sequence[Case], season: int, count: int, seed: int) -> dict[str, Tensor]:
    """AutoETS and AutoARIMA of each column by itself: (W, S, C, H) by name.

    Their laws at each time are normal; a path stands at one quantile of them all along.

    Raises:
        UserError: statsforecast is not installed.
    """
    _require("statsforecast")
    from statsforecast.models import AutoARIMA, AutoETS

    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {"ets": [], "arima": []}
    for case in cases:
        horizon, columns = case.future.values.shape
        normal = torch.randn(count, columns, 1, generator=generator, dtype=torch.float64)
        for name in found:
            mean, deviation = np.empty((columns, horizon)), np.empty((columns, horizon))
            for column in range(columns):
                y = case.history.values[-_ROWS:, column]
                # A seasonal ARIMA of 24 hours takes minutes a column: it is left to find none.
                model = AutoETS(season_length=season) if name == "ets" else AutoARIMA(season_length=1)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made = model.forecast(y=y, h=horizon, level=[80])
                mean[column] = made["mean"]
                deviation[column] = (np.asarray(made["hi-80"]) - np.asarray(made["mean"])) / _HALF_80
            found[name].append(torch.from_numpy(mean) + torch.from_numpy(deviation) * normal)
    return {name: torch.stack(paths).float() for name, paths in found.items()}


def deepar(cases: Sequence[Case], horizon: int, context: int, count: int, seed: int) -> Tensor:
    """GluonTS's DeepAR, one model of all columns, trained on what comes before the first window: (W, S, C, H).

    Raises:
        UserError: GluonTS with its models in torch is not installed.
    """
    _require("lightning")
    _require("gluonts")
    import lightning
    import pandas
    from gluonts.dataset.common import ListDataset
    from gluonts.torch.model.deepar import DeepAREstimator

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lightning.seed_everything(seed)

    def entries(values: np.ndarray) -> list[dict[str, Any]]:
        start = pandas.Period("2000-01-01 00:00", freq="h")
        return [{"start": start, "target": column, "item_id": str(i)} for i, column in enumerate(values.T)]

    folder = tempfile.TemporaryDirectory()  # it keeps its best weights on disk
    estimator = DeepAREstimator(
        freq="h",
        prediction_length=horizon,
        context_length=context,
        num_layers=2,
        hidden_size=40,
        batch_size=32,
        num_batches_per_epoch=50,
        num_parallel_samples=count,
        trainer_kwargs={
            "max_epochs": 10,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "default_root_dir": folder.name,
        },
    )
    with warnings.catch_warnings(), folder:
        warnings.simplefilter("ignore")
        predictor = estimator.train(ListDataset(entries(cases[0].history.values), freq="h"))
        paths = []
        for case in cases:
            data = ListDataset(entries(case.history.values), freq="h")
            made = [forecast.samples for forecast in predictor.predict(data, num_samples=count)]
            paths.append(torch.from_numpy(np.stack(made, axis=1)).float())
    return torch.stack(paths)

"""Series in other libraries, for studies: statsforecast's automatic models, GluonTS's DeepAR, and PyPOTS's CSDI."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
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


def _require(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"study: needs {name}; install it with: pip install 'osmose[baselines]'")


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


def deepar(cases: Sequence[Case], horizon: int, context: int, frequency: str, count: int, seed: int) -> Tensor:
    """GluonTS's DeepAR, one model of all columns, trained on what comes before the first window: (W, S, C, H).

    The frequency of the rows decides what it is told of the time of day or the day of the week, and its lags.

    Raises:
        UserError: GluonTS with its models in torch is not installed.
    """
    _require("lightning", "gluonts")
    import lightning
    import pandas
    from gluonts.dataset.common import ListDataset
    from gluonts.torch.model.deepar import DeepAREstimator

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lightning.seed_everything(seed)

    def entries(values: np.ndarray) -> list[dict[str, Any]]:
        start = pandas.Period("2000-01-03 00:00", freq=frequency)
        return [{"start": start, "target": column, "item_id": str(i)} for i, column in enumerate(values.T)]

    folder = tempfile.TemporaryDirectory()  # it keeps its best weights on disk
    estimator = DeepAREstimator(
        freq=frequency,
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
        predictor = estimator.train(ListDataset(entries(cases[0].history.values), freq=frequency))
        paths = []
        for case in cases:
            data = ListDataset(entries(case.history.values), freq=frequency)
            made = [forecast.samples for forecast in predictor.predict(data, num_samples=count)]
            paths.append(torch.from_numpy(np.stack(made, axis=1)).float())
    return torch.stack(paths)


def csdi(train: Tensor, known: Tensor, *, updates: int, channels: int, count: int, seed: int) -> Tensor:
    """PyPOTS's CSDI, 2 layers and 50 steps of diffusion, trained on windows with a random share hidden: (W, S, C, L).

    Args:
        train: windows (N, C, L) in deviations of each column.
        known: what is to be filled, of W windows in the same units, (W, C, L), NaN where unknown.
        updates: of 32 windows; rounded to whole passes.
        channels: of the network.
        count: samples S of each.
        seed: of weights, order and noise.

    Raises:
        UserError: PyPOTS is not installed.
    """
    _require("pypots")
    with Path(os.devnull).open("w") as nowhere, ExitStack() as quiet:  # it greets people on standard output
        quiet.enter_context(warnings.catch_warnings())
        quiet.enter_context(redirect_stdout(nowhere))
        quiet.enter_context(torch.random.fork_rng())
        warnings.simplefilter("ignore")
        from pypots.imputation import CSDI
        from pypots.utils.logging import logger

        logger.disabled = True
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - it draws from the global state
        model = CSDI(
            n_steps=train.shape[2],
            n_features=train.shape[1],
            n_layers=2,
            n_heads=4,
            n_channels=channels,
            d_time_embedding=channels,
            d_feature_embedding=16,
            d_diffusion_embedding=channels,
            batch_size=32,
            epochs=max(1, round(32 * updates / len(train))),
            device="cpu",
            model_saving_strategy=None,
            verbose=False,
        )
        model.fit({"X": train.transpose(1, 2).float().numpy()})
        made = model.predict({"X": known.transpose(1, 2).float().numpy()}, n_sampling_times=count)["imputation"]
    return torch.from_numpy(np.asarray(made)).transpose(2, 3).float()

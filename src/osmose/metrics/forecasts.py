r"""Scores of probabilistic forecasts, by the definitions of GluonTS where it has them.

Forecasts are paths, (W, S, C, H): S samples of C columns at H times in W windows; truth is (W, C, H), NaN where there
is none. With q_tau the tau-quantile of the samples and rho_tau(y, q) = 2 (y - q)(tau - [y < q]),

=========== =========================================================================================================
crps        mean over tau = 0.05, 0.10, ..., 0.95 of sum rho_tau / sum |y|: GluonTS's mean weighted quantile loss
crps_sum    the same of the sum over columns
nd          sum |y - median| / sum |y|
nrmse       sqrt(mean (y - mean)^2) / mean |y|
energy      E|X - y| - E|X - X'| / 2, of the values of all columns at a time, the mean over times
path_energy the same of whole paths: it sees correlations in time, which all others are blind to
steps       squared differences of neighbouring times, the first from the last known value on: paths over truth
=========== =========================================================================================================

The energy scores are in deviations of the columns, as given by `scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osmose.errors import UserError

LEVELS = tuple(k / 20 for k in range(1, 20))


def weighted_quantile_loss(paths: Tensor, truth: Tensor) -> float:
    """The `crps` of paths (W, S, C, H) and truth (W, C, H)."""
    known = truth.isfinite()
    y = truth.double()[known]
    quantiles = _quantiles(paths, LEVELS)
    losses = []
    for tau, q in zip(LEVELS, quantiles, strict=True):
        below = q[known]
        losses.append(2 * ((y - below) * (tau - (y < below).double())).sum() / y.abs().sum())
    return float(torch.stack(losses).mean())


def _quantiles(paths: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Quantiles of the samples as GluonTS takes them, the nearest sample in order: float64 (levels, W, C, H)."""
    places = [round((paths.shape[1] - 1) * level) for level in levels]
    return paths.double().sort(dim=1).values[:, places].transpose(0, 1)


def energy_score(paths: Tensor, truth: Tensor) -> float:
    """E|X - y| - E|X - X'| / 2 of paths (W, S, D) and truth (W, D), unbiased in the samples, the mean over W."""
    paths, truth = paths.double(), truth.double()
    count = paths.shape[1]
    error = (paths - truth[:, None]).norm(dim=2).mean(1)
    spread = torch.cdist(paths, paths).sum((1, 2)) / (count * (count - 1))
    return float((error - spread / 2).mean())


def forecast_scores(paths: Tensor, truth: Tensor, last: Tensor, scale: Tensor) -> dict[str, float]:
    """All scores by name.

    Args:
        paths: (W, S, C, H), S at least 2.
        truth: (W, C, H), NaN where there is none.
        last: the last known value of each column, (W, C).
        scale: of the columns, (C,), for the energy scores.

    Raises:
        UserError: shapes that do not fit each other, fewer than 2 samples, paths that are not finite.
    """
    windows, samples, columns, horizon = paths.shape
    if samples < 2 or truth.shape != (windows, columns, horizon) or last.shape != (windows, columns):
        raise UserError(
            f"paths: shape {tuple(paths.shape)} with truth {tuple(truth.shape)} and last values {tuple(last.shape)}; "
            "(W, S, C, H) with S at least 2, (W, C, H) and (W, C) are right"
        )
    if not bool(paths.isfinite().all()):
        raise UserError("paths: hold NaN or infinity")
    known = truth.isfinite()
    y, size = truth[known].double(), truth[known].double().abs()
    median, mean = _quantiles(paths, (0.5,))[0][known], paths.double().mean(1)[known]
    whole = known.all(1)  # times at which all columns are known
    total = torch.where(whole, truth.nan_to_num().sum(1), torch.nan)
    scores = {
        "crps": weighted_quantile_loss(paths, truth),
        "crps_sum": weighted_quantile_loss(paths.sum(2, keepdim=True), total[:, None]),
        "nd": float((y - median).abs().sum() / size.sum()),
        "nrmse": float((y - mean).square().mean().sqrt() / size.mean()),
    }
    unit = scale.view(1, 1, -1, 1).to(paths)
    filled = torch.where(known, truth, 0.0)
    # Where truth is missing both sides are 0, so that it counts for nothing.
    seen = torch.where(known[:, None], paths, 0.0) / unit
    real = filled / unit[:, 0]
    some = known.any(1)  # times at which something is known
    scores["energy"] = energy_score(seen.permute(0, 3, 1, 2)[some], real.permute(0, 2, 1)[some])
    scores["path_energy"] = energy_score(seen.flatten(2), real.flatten(1))
    before = (last / scale.to(last))[..., None]
    made_steps = torch.cat([before[:, None].expand(-1, samples, -1, -1), paths / unit], 3).diff(dim=3)
    real_steps = torch.cat([before, truth / unit[:, 0]], 2).diff(dim=2)
    there = real_steps.isfinite()
    wide = there[:, None].expand_as(made_steps)
    scores["steps"] = float(made_steps[wide].double().square().mean() / real_steps[there].double().square().mean())
    return scores

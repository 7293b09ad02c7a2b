"""Study `series-imputation`: gaps of real series filled by diffusion, straight lines and Gaussian processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from osmose.analysis import baselines
from osmose.data.dataset import DataConfig, Dataset
from osmose.gaussian.draws import seeded
from osmose.metrics.forecasts import weighted_quantile_loss
from osmose.studies.libraries import csdi
from osmose.studies.plots import draw, panels
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import lower, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NETWORK = {"network": "transformer", "network.width": 48, "network.depth": 2, "task": "impute"}
#: Variants of dspd: what is changed of the recipe, and what it is.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "ou": ({"kernel": {"kind": "ou", "length_scale": 10.0}}, "noise of a process that is pinned to the known values"),
    "loose": (
        {"kernel": {"kind": "ou", "length_scale": 10.0}, "pinned": False},
        "as ou, but noise ignores what is known",
    ),
    "white": ({"kernel": "white"}, "independent noise: the form that CSDI gives the problem, with the same network"),
}
SHARES = (0.1, 0.5, 0.9)
#: Of the networks: dspd's width is 48.
_UPDATES, _CSDI_CHANNELS = 800, 40
#: Hours in which the Gaussian processes forget.
_MEMORY = 10.0
_METRICS = ("mae", "rmse", "crps")


class SeriesImputation(Study):
    """Values of ETTh1 hidden at random (10, 50, 90 %) in windows of 48 hours, each value by itself.

    7 columns, the first 14,400 hours, the last tenth held out; one network (attention, 2 layers of 48) for every share,
    which is drawn uniformly in training, 800 updates of 32. Of each held-out window 20 samples of 50 steps (DDIM,
    eta = 1) are drawn; the estimate is their median.

    `csdi`: CSDI as PyPOTS has it, 2 layers of 40 (attention along times and along columns; about as many weights), two
    passes over the windows of training (as many updates of 32; published are 200 passes), 20 samples of its 50 steps.
    Its library trains at a constant rate of 0.001 and samples with the last weights; dspd has osmose's warm-up, decay,
    clipping and average of weights.

    `linear`: straight lines between known values of the same column. `kriging`: an Ornstein-Uhlenbeck process of rate
    0.1 an hour for each column by itself. `columns`: Gaussian process regression with the same law in time and the
    covariance of the columns in training: the best linear estimate under a separable law, with 1 % of noise.

    `mae` and `rmse` are of the estimate, in deviations of each column in training; `crps` is GluonTS's, of all hidden
    values, in the same units. 40 windows, the same hidden values for all of them.
    """

    title = "Gaps of real series: diffusion with noise that is pinned, or not, against straight lines and kriging"
    source = (
        "Modeling Temporal Data as Continuous Functions with Stochastic Process Diffusion (arXiv 2211.02590), and CSDI "
        "(arXiv 2107.03502): imputation at 10, 50 and 90 % of missing values"
    )

    @property
    def shares(self) -> tuple[float, ...]:
        """Of values that are hidden."""
        return SHARES[1:2] if self.quick else SHARES

    def cells(self) -> list[Cell]:
        if self.quick:
            data = DataConfig.parse({"source": "process:lorenz:24", "num_points": 200})
            training = {"training.steps": 20, "training.batch_size": 16, "network.width": 16, "network.depth": 1}
            settings: dict[str, Any] = {"windows": 4, "samples": 6, "steps": 4}
        else:
            data = DataConfig.parse({"source": "etth1", "window": 48})
            training = {"training.steps": _UPDATES, "training.batch_size": 32}
            settings = {"windows": 40, "samples": 20, "steps": 50}
        settings |= {"shares": self.shares}
        names = ("ou", "white") if self.quick else tuple(VARIANTS)
        cells = [
            Cell(name, "dspd", data, _NETWORK | training | VARIANTS[name][0], settings, VARIANTS[name][1])
            for name in names
        ]
        cells.append(Cell("simple", None, data, {}, settings, "estimates that need no training"))
        if not self.quick:
            settings = settings | {"updates": _UPDATES, "channels": _CSDI_CHANNELS}
            cells.append(Cell("csdi", None, data, {}, settings, "CSDI of another library (PyPOTS)"))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings, dataset = trained.cell.settings, trained.dataset
        shares, scale = settings["shares"], torch.tensor(dataset.spec.scale)[:, None]
        asked = [held_out(dataset, settings["windows"], share, trained.seed) for share in shares]
        known = [torch.where(hidden, torch.nan, truth) for truth, _, hidden in asked]
        rows = []
        made = self._estimates(trained, known, asked[0][1])
        for share, (truth, _, hidden), estimates in zip(shares, asked, made, strict=True):
            for name, samples in estimates.items():
                rows.append(Row({"estimate": name, "share": share}, scores(samples / scale, truth / scale, hidden)))
        return rows

    def _estimates(self, trained: Trained, known: list[Tensor], times: Tensor) -> list[dict[str, Tensor]]:
        """Samples (W, S, C, L) by name, of the windows (W, C, L) with each share hidden."""
        cell, dataset, seed = trained.cell, trained.dataset, trained.seed
        count = cell.settings["samples"]
        if cell.method is not None:
            return [{cell.name: _sampled(trained, part, times)} for part in known]
        if cell.name != "csdi":
            return [self._simple(dataset, part, times, count, seed) for part in known]
        mean, scale = (torch.tensor(part)[:, None] for part in (dataset.spec.shift, dataset.spec.scale))
        wanted = (torch.cat(known) - mean) / scale
        updates, channels = cell.settings["updates"], cell.settings["channels"]
        made = csdi((dataset.train - mean) / scale, wanted, updates=updates, channels=channels, count=count, seed=seed)
        return [{"csdi": part} for part in (made * scale + mean).split(len(times))]

    def _simple(self, dataset: Dataset, known: Tensor, times: Tensor, count: int, seed: int) -> dict[str, Tensor]:
        """Estimates (W, S, C, L) by name."""
        generator = seeded(seed, "imputations")
        mean, scale = torch.tensor(dataset.spec.shift).double(), torch.tensor(dataset.spec.scale).double()
        train = dataset.spec.encode(dataset.train[:: max(1, len(dataset.train) // 2000)]).double()
        flat = train.transpose(0, 1).flatten(1)
        covariance = torch.corrcoef(flat[:, flat.isfinite().all(0)]).reshape(len(mean), len(mean))
        found: dict[str, list[Tensor]] = {"linear": [], "kriging": [], "columns": []}
        for x, t in zip(known, times, strict=True):
            straight = baselines.linear(x, t)
            straight = torch.where(straight.isnan(), mean[:, None], straight)  # a column without any known value
            found["linear"].append(straight.expand(count, -1, -1))
            found["kriging"].append(baselines.kriging(x, t, mean, scale, _MEMORY, count, generator))
            unit = ((x - mean[:, None]) / scale[:, None]).double()
            paths = separable(unit, t, covariance, _MEMORY, count, generator)
            found["columns"].append(paths * scale[:, None] + mean[:, None])
        return {name: torch.stack(parts).float() for name, parts in found.items()}

    def claims(self) -> list[Claim]:
        claims = []

        def less(text: str, a: str, b: str, metric: str, share: float) -> None:
            cells = [name if name in (*VARIANTS, "csdi") else "simple" for name in (a, b)]

            def check(r: Results) -> Any:
                values = [
                    r.values(cell, metric, estimate=n, share=share) for cell, n in zip(cells, (a, b), strict=True)
                ]
                return lower(values[0], values[1])

            claims.append(Claim(f"{text} ({metric}, {share:.0%} hidden)", cells, check))

        for share in self.shares:
            for rival in ("linear", "kriging", "columns"):
                less(f"diffusion (ou) is better than {rival}", "ou", rival, "mae", share)
            text = "samples of diffusion (ou) are better than those of the best linear law"
            less(text, "ou", "columns", "crps", share)
            less("pinned noise is better than white noise", "ou", "white", "crps", share)
            if not self.quick:
                less("noise that is pinned is better than noise that is not", "ou", "loose", "crps", share)
                for metric in ("mae", "crps"):
                    less(
                        "diffusion (ou) is better than CSDI, each after 2 passes by its own library",
                        "ou",
                        "csdi",
                        metric,
                        share,
                    )
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables = {}
        for share in self.shares:
            rows = []
            for cell in results.rows:
                for labels, values in results.groups(cell):
                    if labels["share"] == share:
                        shown = {metric: mean_and_spread(values[metric]) for metric in _METRICS}
                        kind = "dspd " if cell in VARIANTS else ""
                        rows.append({"estimate": f"{kind}{labels['estimate']}"} | shown)
            tables[f"{share:.0%} hidden"] = rows
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(2)
        for panel, metric in zip(axes, ("mae", "crps"), strict=True):
            for cell in results.rows:
                names = {str(labels["estimate"]) for labels, _ in results.groups(cell)}
                for name in sorted(names):
                    values = [results.values(cell, metric, estimate=name, share=share) for share in self.shares]
                    draw(panel, self.shares, values, name, "o" if cell in VARIANTS else "x")
            panel.set(title=metric, xlabel="share of hidden values", xticks=self.shares)
        axes[0].legend(fontsize=7)
        return {"imputation": figure}


def held_out(dataset: Dataset, windows: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Evenly spread held-out windows (W, C, L), their times (W, L), and what is hidden of them."""
    assert dataset.held_out_times is not None
    rows = torch.linspace(0, len(dataset.held_out) - 1, windows).round().long()
    truth = dataset.held_out[rows]
    drawn = torch.rand(truth.shape, generator=seeded(seed, "hidden", str(share)))
    return truth, dataset.held_out_times[rows], (drawn < share) & truth.isfinite()


def _sampled(trained: Trained, known: Tensor, times: Tensor) -> Tensor:
    settings = trained.cell.settings
    count, solver = settings["samples"], {"kind": "ddim", "eta": 1.0}
    made = trained.model.sample(
        len(known) * count,
        known=known.repeat_interleave(count, 0),
        times=times.repeat_interleave(count, 0),
        seed=trained.seed,
        num_steps=settings["steps"],
        solver=solver,
    )
    return made.data.unflatten(0, (len(known), count))


def separable(
    x: Tensor, times: Tensor, columns: Tensor, memory: float, count: int, generator: torch.Generator
) -> Tensor:
    """Samples (count, C, L) of a Gaussian law columns x exp(-|t - t'| / memory), given the values that are not NaN.

    Known values have a noise of 1 % of their variance, without which the law of columns that are nearly one is lost.
    """
    shape, flat = x.shape, x.flatten().double()
    in_time = (-(times[:, None] - times[None]).abs() / memory).exp()
    whole = torch.kron(columns, in_time)
    known = flat.isfinite()
    own = whole[known][:, known] + 0.01 * torch.eye(int(known.sum()), dtype=torch.float64)
    cross = whole[~known][:, known]
    gain = torch.linalg.solve(own, cross.T).T
    rest = whole[~known][:, ~known] - gain @ cross.T
    values, vectors = torch.linalg.eigh(rest)
    root = vectors * values.clamp(min=0).sqrt()
    drawn = torch.randn(count, len(rest), generator=generator, dtype=torch.float64) @ root.T
    found = flat.nan_to_num().expand(count, -1).clone()
    found[:, ~known] = gain @ flat[known] + drawn
    return found.unflatten(1, shape)


def scores(samples: Tensor, truth: Tensor, hidden: Tensor) -> dict[str, float]:
    """The measures of the study, of samples (W, S, C, L) and truth (W, C, L), in deviations of each column."""
    estimate = samples.double().quantile(0.5, dim=1)
    error = (estimate - truth)[hidden]
    crps = weighted_quantile_loss(samples, torch.where(hidden, truth, torch.nan))
    return {"mae": float(error.abs().mean()), "rmse": float(error.square().mean().sqrt()), "crps": crps}

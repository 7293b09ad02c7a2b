"""Study `series-synthetic`: correlated against white noise on simulated series at irregular times."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from osmose.data.dataset import DataConfig
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import LinearSchedule
from osmose.metrics.distances import energy_distance
from osmose.metrics.series import common_grid, on_grid, squared_steps
from osmose.processes.kernels import GPKernel, OUKernel
from osmose.processes.oracles import divergence, sampled_covariance
from osmose.studies.plots import draw, log_scale, panels
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import all_of, lower, mean_and_spread, same, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LENGTH = 40
_NETWORK = {"network": "transformer", "network.width": 48, "network.depth": 2, "task": "generate"}
_GP = {"kernel": {"kind": "gp", "length_scale": 0.1}}
_WHITE = {"kernel": "white"}
#: Variants: the method, what is changed of the recipe, and what it is.
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ou": ("dspd", {}, "noise of an Ornstein-Uhlenbeck process, of the memory that the recipe finds in the data"),
    "gp": ("dspd", _GP, "smooth noise: a Gaussian process of length scale 0.1"),
    "white": ("dspd", _WHITE, "independent noise: ordinary diffusion"),
    "ou-cspd": ("cspd", {}, "as ou, in continuous time, sampled by its flow"),
    "white-cspd": ("cspd", _WHITE, "as white, in continuous time, sampled by its flow"),
    "ou-raw": ("dspd", {"output": "raw"}, "as ou, the network answers in units of the series"),
    "ou-blind": ("dspd", {"whitened_input": False}, "as ou, the network does not see the whitened series"),
}
#: Data sets, and the variants that are trained on them.
DATA = {
    "sine": tuple(VARIANTS),
    "ou": ("ou", "gp", "white", "ou-cspd"),
    "cir": ("ou", "gp", "white", "ou-cspd"),
    "lorenz": ("ou", "gp", "white", "ou-cspd"),
    "predator-prey": ("ou", "gp", "white", "ou-cspd"),
}
#: Laws of the closed forms: data, and noises with the length scales of the card, times in [0, 1].
EXACT_DATA = {"ou 0.2": OUKernel(length_scale=0.2), "gp 0.2": GPKernel(length_scale=0.2)}
EXACT_NOISE: dict[str, Any] = {
    "white": None,
    "ou 2": OUKernel(length_scale=2.0),
    "ou 0.2": OUKernel(length_scale=0.2),
    "ou 0.02": OUKernel(length_scale=0.02),
    "gp 0.1": GPKernel(length_scale=0.1),
}
COUNTS = (25, 50, 100, 200)
_METRICS = ("roughness", "discriminator", "covariance", "crps", "energy")


class SeriesSynthetic(Study):
    """Diffusion of series under noises of several kinds, with one network and as many updates.

    Five processes at irregular times: 40 times of each series, uniform in [0, 1]; 10,000 series, a tenth held out. One
    network (attention, 2 layers of 48), v-prediction, 600 updates of 64: a short training. Samples are drawn at the
    times of held-out series and compared with these.

    `roughness`: squared differences of neighbours at most a fifth of the median gap apart, samples over data, the mean
    over columns; its size is judged by |log|. `discriminator`: accuracy of a classifier (boosted trees, 5-fold) that
    tells samples from data by their values at 24 even times and the logarithms of squared differences at three ranges
    of gaps; 1/2 is best. `covariance`: relative Frobenius error of the covariance at 12 even times. `crps`: of the
    marginal laws at those times, as a mean energy score in deviations of each column, with that of data beside it.
    `energy`: energy distance of the values at 24 even times, in deviations of each column.

    `exact` has no network: the divergence KL(samples || data) of a Gaussian process at 50 random times, sampled with
    the exact denoiser in N ancestral steps of the published betas, in closed form.
    """

    title = "Noise that is correlated in time against white noise, on simulated series at irregular times"
    source = "Modeling Temporal Data as Continuous Functions with Stochastic Process Diffusion (arXiv 2211.02590)"

    @property
    def data(self) -> dict[str, tuple[str, ...]]:
        """The data sets, with their variants."""
        return {"sine": ("ou", "white", "ou-cspd")} if self.quick else DATA

    def cells(self) -> list[Cell]:
        cells = [Cell("exact", None, "digits", {}, {"counts": COUNTS[:2] if self.quick else COUNTS}, "closed forms")]
        training = {"training.steps": 600, "training.batch_size": 64}
        settings = {"n": 500}
        if self.quick:
            training = {"training.steps": 20, "training.batch_size": 16, "network.width": 16, "network.depth": 1}
            settings = {"n": 60}
        count = 400 if self.quick else 10_000
        for data, variants in self.data.items():
            config = DataConfig.parse({"source": f"process:{data}:{_LENGTH}", "num_points": count})
            for name in variants:
                method, changes, note = VARIANTS[name]
                cells.append(Cell(f"{data}-{name}", method, config, _NETWORK | training | changes, settings, note))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        if trained.cell.method is None:
            return exact_rows(trained.seed, trained.cell.settings["counts"])
        count, dataset = trained.cell.settings["n"], trained.dataset
        assert dataset.held_out_times is not None
        rows = torch.randperm(len(dataset.held_out), generator=torch.Generator().manual_seed(trained.seed))[: 2 * count]
        if len(rows) < 2 * count:  # of few held-out series, halves
            count = len(rows) // 2
        real, times = dataset.held_out[rows], dataset.held_out_times[rows]
        made = trained.model.sample(count, times=times[:count], seed=trained.seed)
        scale = torch.tensor(dataset.spec.scale)
        values = compared(made.data, times[:count], real[:count], times[:count], scale, trained.seed)
        floor = compared(real[count:], times[count : 2 * count], real[:count], times[:count], scale, trained.seed)
        found = {name: values[name] for name in values} | {f"{name}_real": floor[name] for name in floor}
        found["log_roughness"] = abs(math.log(values["roughness"]))
        found["told_apart"] = abs(values["discriminator"] - 0.5)
        return [Row({"what": "samples"}, found | {"nfe": float(made.nfe), "seconds": made.seconds})]

    def claims(self) -> list[Claim]:
        claims = []

        def exact(data: str, noise: str, steps: int) -> Any:
            return lambda r: within(
                float((r.values("exact", "kl", data=data, noise=noise, steps=steps)
                       / r.values("exact", "kl", data=data, noise="white", steps=steps)).mean()), 0, 1,
            )  # fmt: skip

        steps = COUNTS[1] if self.quick else 100
        for data in EXACT_DATA:
            for noise in list(EXACT_NOISE)[1:]:
                text = f"exact: noise {noise} is nearer to data {data} than white noise, {steps} steps (ratio below 1)"
                claims.append(Claim(text, ["exact"], exact(data, noise, steps)))
        for data, variants in self.data.items():
            ours, white = f"{data}-ou", f"{data}-white"
            for metric, words in (
                ("log_roughness", "short steps nearer to those of data"),
                ("told_apart", "harder to tell from data"),
                ("covariance", "a smaller error of the covariance"),
                ("energy", "a smaller energy distance"),
            ):
                claims.append(Claim.lower(f"{data}: OU noise gives {words} than white noise", ours, white, metric))
            if "gp" in variants:
                text = f"{data}: smooth noise gives short steps nearer to those of data than white noise"
                claims.append(Claim.lower(text, f"{data}-gp", white, "log_roughness"))
            text = f"{data}: discrete and continuous (OU) differ in energy distance by at most 0.02"
            claims.append(Claim(text, [ours, f"{data}-ou-cspd"], _alike(ours, f"{data}-ou-cspd")))
        if not self.quick:
            for name, words in (("raw", "answers in units of U"), ("blind", "sees U")):
                text = f"sine: short steps are nearer to those of data where the network {words}"
                claims.append(Claim.lower(text, "sine-ou", f"sine-ou-{name}", "log_roughness"))
            text = "sine: white noise makes steps more than 10 times too large, OU noise less than 3 times"
            claims.append(Claim(text, ["sine-white", "sine-ou"], _tenfold))
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables = {}
        for data, variants in self.data.items():
            rows = []
            for name in variants:
                cell = f"{data}-{name}"
                values = {metric: mean_and_spread(results.values(cell, metric)) for metric in _METRICS}
                rows.append({"noise": name} | values | {"nfe": f"{results.values(cell, 'nfe').mean():g}"})
            first = f"{data}-{variants[0]}"
            floor = {metric: mean_and_spread(results.values(first, f"{metric}_real")) for metric in _METRICS}
            tables[f"process:{data}"] = [*rows, {"noise": "real data"} | floor | {"nfe": ""}]
        counts = COUNTS[:2] if self.quick else COUNTS
        tables["Exact denoisers: KL(samples || data), nats"] = [
            {"data": data, "noise": noise}
            | {
                f"N = {n}": mean_and_spread(results.values("exact", "kl", data=data, noise=noise, steps=n))
                for n in counts
            }
            for data in EXACT_DATA
            for noise in EXACT_NOISE
        ]
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(len(EXACT_DATA))
        counts = COUNTS[:2] if self.quick else COUNTS
        for panel, data in zip(axes, EXACT_DATA, strict=True):
            for noise in EXACT_NOISE:
                values = [results.values("exact", "kl", data=data, noise=noise, steps=n) for n in counts]
                draw(panel, counts, values, noise)
            panel.set(title=f"exact denoiser, data {data}", xlabel="steps", xscale="log", yscale="log")
            panel.set(xticks=counts, xticklabels=map(str, counts))
            panel.minorticks_off()
        axes[0].set_ylabel("KL(samples || data)")
        axes[0].legend(fontsize=7)
        rough, (first, second) = panels(2)
        names = sorted({name for variants in self.data.values() for name in variants}, key=list(VARIANTS).index)
        places = list(range(len(self.data)))
        for panel, metric, title, right in (
            (first, "roughness", "size of short steps, 1 is right", 1.0),
            (second, "discriminator", "accuracy of telling apart, 1/2 is best", 0.5),
        ):
            for index, name in enumerate(names):
                held = [(place, data) for place, data in zip(places, self.data, strict=True) if name in self.data[data]]
                x = [place + 0.1 * (index - len(names) / 2) for place, _ in held]
                values = [results.values(f"{data}-{name}", metric) for _, data in held]
                panel.plot(x, [v.mean() for v in values], "o", markersize=5, label=name)
                for place, seeds in zip(x, values, strict=True):
                    panel.plot([place] * len(seeds), seeds, ".", color=panel.lines[-1].get_color(), alpha=0.4)
            panel.set(title=title, xticks=places, xticklabels=list(self.data))
            panel.axhline(right, color="0.3", linestyle=":", linewidth=1.2)
        log_scale(first)
        first.legend(fontsize=7)
        return {"exact": figure, "samples": rough}


def _alike(a: str, b: str) -> Any:
    return lambda r: same(r.values(a, "energy"), r.values(b, "energy"), 0.02)


def _tenfold(results: Results) -> Any:
    white, ou = results.values("sine-white", "roughness"), results.values("sine-ou", "roughness")
    return all_of(lower(10.0 - white, 0.0), lower(ou, 3.0), lower(1 / 3 - ou, 0.0))


def exact_rows(seed: int, counts: tuple[int, ...]) -> list[Row]:
    """Closed forms at 50 random times of a seed."""
    drawn = torch.rand(1, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times, unit = drawn.sort(dim=1).values, torch.eye(50, dtype=torch.float64)

    def covariance(kernel: Any) -> Tensor:
        if kernel is None:
            return unit
        jitter = 1e-4 if kernel.kind == "ou" else 0.0  # smooth kernels have theirs
        found: Tensor = kernel.covariance(times)[0] + jitter * unit
        return found

    rows = []
    for data, law in EXACT_DATA.items():
        for noise, kernel in EXACT_NOISE.items():
            for n in counts:
                # From 1e-4 to 20 / N, whatever N is.
                schedule = LinearSchedule(num_steps=n, beta_start=1e-7 * n, beta_end=0.02)
                made = sampled_covariance(covariance(law), covariance(kernel), TimeGrid.of(schedule, n))
                kl = divergence(made, covariance(law))
                rows.append(Row({"data": data, "noise": noise, "steps": n}, {"kl": kl}))
    return rows


def compared(
    made: Tensor, made_times: Tensor, real: Tensor, real_times: Tensor, scale: Tensor, seed: int
) -> dict[str, float]:
    """The measures of the study, of series (n, C, L) at times (n, L)."""
    gap = float(real_times.diff(dim=1).median()) / 5
    ratio = squared_steps(made, made_times, gap) / squared_steps(real, real_times, gap)
    grid = common_grid(real_times)
    coarse, fine = (torch.linspace(float(grid[0]), float(grid[-1]), k, dtype=torch.float64) for k in (12, 24))
    unit, nothing = scale[:, None], torch.zeros_like(scale)  # nothing is missing here
    a, b = (on_grid(x, t, coarse, nothing) / unit for x, t in ((made, made_times), (real, real_times)))
    wide_a, wide_b = (on_grid(x, t, fine, nothing) / unit for x, t in ((made, made_times), (real, real_times)))
    cov_a, cov_b = (torch.cov(x.flatten(1).T.double()) for x in (a, b))
    x, y = a.flatten(1).double(), b.flatten(1).double()
    spread = (x[:, None] - x[None]).abs().sum((0, 1)) / (len(x) * (len(x) - 1))
    crps = (x[:, None] - y[None]).abs().mean((0, 1)) - spread / 2
    return {
        "roughness": float(ratio.mean()),
        "discriminator": told_apart(wide_a, made, made_times, wide_b, real, real_times, scale, seed),
        "covariance": float((cov_a - cov_b).norm() / cov_b.norm()),
        "crps": float(crps.mean()),
        "energy": energy_distance(wide_a.flatten(1), wide_b.flatten(1))[0],
    }


def told_apart(
    even_made: Tensor, made: Tensor, made_times: Tensor, even_real: Tensor, real: Tensor, times: Tensor, scale: Tensor,
    seed: int,
) -> float:  # fmt: skip
    """Accuracy of boosted trees that tell samples from data, by 5-fold cross-validation."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    median = float(times.diff(dim=1).median())

    def features(even: Tensor, x: Tensor, t: Tensor) -> np.ndarray:
        steps, gaps = (x / scale[:, None]).double().diff(dim=2).square(), t.diff(dim=1)
        sizes = []
        for low, high in ((0.0, median / 2), (median / 2, 2 * median), (2 * median, math.inf)):
            near = ((gaps > low) & (gaps <= high))[:, None]
            mean = (steps * near).sum(2) / near.sum(2).clamp(min=1)
            sizes.append((mean + 1e-8).log())
        return torch.cat([even.flatten(1).double(), *sizes], 1).numpy()

    x = np.concatenate([features(even_made, made, made_times), features(even_real, real, times)])
    y = np.concatenate([np.zeros(len(made)), np.ones(len(real))])
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    model = HistGradientBoostingClassifier(max_iter=100, random_state=seed)
    return float(cross_val_score(model, x, y, cv=folds, scoring="accuracy").mean())

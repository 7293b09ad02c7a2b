"""`osmose study blackout`: counts that stay counts, against Gaussian diffusion that is rounded in the end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from osmose.analysis.likelihood import likelihood
from osmose.data.dataset import DataConfig, DataSpec
from osmose.data.embedded import load_digits
from osmose.discrete.death import LogitSurvival, binomial_matrix, regained, step_matrix, survival
from osmose.discrete.markov import Absorbing, BirthDeath, Death, Process, Uniform
from osmose.gaussian.draws import SampleDraws
from osmose.methods.base import GenerativeModel
from osmose.metrics.evaluate import score_samples
from osmose.metrics.matrices import seeded, subset
from osmose.studies.measures import csv_table
from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import all_of, lower, mean_and_spread, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How units come back.
SOLVERS = ("bridge", "bridge-round", "tau-leap", "binomial")
#: What is changed of blackout diffusion, and what is said of it.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "blackout": ({}, "the default: odds, any time, the published weights"),
    "softplus": ({"parametrization": "softplus"}, "the network is the number of missing units, as published"),
    "likelihood": ({"weighting": "likelihood"}, "the weights of the likelihood"),
    "finite-time": ({"objective": "finite-time"}, "the published grid of times, and its steps"),
}
#: Laws of a single count, by name: the probabilities of 0, 1, ... and t_end.
LAWS: dict[str, tuple[tuple[float, ...], float]] = {
    "Bernoulli(0.3)": ((0.7, 0.3), 10.0),
    "Bernoulli(0.6)": ((0.4, 0.6), 10.0),
    "0, 14, 15, 16": ((0.4, *(0.0,) * 13, 0.2, 0.2, 0.2), 8.0),
    "uniform 0..16": ((1 / 17,) * 17, 8.0),
}
#: The law that chains of every kind are run on, and the chains, with the clock at their end.
_CHAINED = "0, 14, 15, 16"
CHAINS: dict[str, tuple[Process, float]] = {
    "death": (Death(), 10.0),
    "uniform": (Uniform(), 10.0),
    "absorbing": (Absorbing(), 10.0),
    "birth-death": (BirthDeath(births=(1.0,) * 16, deaths=(1.0,) * 16), 400.0),
}
#: Numbers of steps at which the exact error of the steps is computed.
COUNTS = (1000, 100, 20, 5)

_MLP = {"network": "mlp", "network.width": 256, "network.depth": 2, "training.batch_size": 128}
_SMALL = {"network.channels": 8, "training.batch_size": 32, "training.lr": 2e-3}
#: A value that is this far from a level, in steps, is not on it.
_OFF = 1e-3


class BlackoutStudy(Study):
    """Blackout diffusion and DDPM with one network, as many updates of as many items, and as many evaluations a sample.

    DDPM (eps, linear schedule, T = 200) is sampled by its own chain and by DPM-Solver++ (2M), and its samples are
    rounded to the levels and cut at the range in the end. `off lattice` is the share of values that are not on a level
    before that. `ink` is the mean sum of a sample's counts relative to the data's; `marginal` the mean over values of
    the Wasserstein distance between the counts of samples and of data, in counts, with that between two sets of data
    beside it. Bits are the bounds of both models on the same held-out items, in bits per dimension: of blackout that in
    continuous time, of DDPM that of its chain with the larger variance.

    Digits (8x8, counts 0 to 16) and digits in black and white: an MLP (2 blocks of 256), 2,000 updates of 128.
    Fashion-MNIST (28x28) with 256 and with 2 levels: the default UNet at 8 channels, 800 updates of 32, far from
    converged. Ink: a table of counts, the sums over each of the 8 rows of a digit, 0 to 128; the same MLP.

    The tables of exact errors have no network and no samples, but transition matrices: the total variation between the
    law of a count and what a step that is told the exact mean E[n0 - n | n] makes of it; and, for chains of any kind on
    17 levels, what small steps of the exact rates backwards make of a law, from the law at the end of the chain.

    Beyond its network, blackout's reading has the log-odds of each value, which are fitted to the data; `softplus` has
    not, and DDPM has nothing of the kind.
    """

    title = "Blackout diffusion of counts: how units are given back, and against Gaussian diffusion that is rounded"
    source = (
        "Blackout Diffusion (Santos et al. 2023): FID 4.58 on CIFAR-10 by binomial bridge; CountsDiff "
        "(2604.03779) rounds at random"
    )

    @property
    def data(self) -> tuple[str, ...]:
        """The data sets."""
        if self.quick:
            return ("digits", "ink")
        return ("digits", "digits-binary", "fashion-mnist", "fashion-binary", "ink")

    def variants(self, data: str) -> tuple[str, ...]:
        """Of blackout diffusion."""
        if self.quick or data.startswith("fashion"):
            return ("blackout",)
        return ("blackout", "softplus") if data == "ink" else tuple(VARIANTS)

    def counts(self, data: str) -> tuple[int, ...]:
        """Steps of the samplers; the last is that of the claims."""
        if self.quick:
            return (4,)
        return (50,) if data.startswith("fashion") else (20, 200)

    def cells(self) -> list[Cell]:
        cells = [Cell("exact", None, "digits", {}, {"counts": (20, 5) if self.quick else COUNTS}, "exact errors")]
        for data in self.data:
            settings = self._settings(data)
            for name in self.variants(data):
                changes, note = VARIANTS[name]
                cells.append(
                    Cell(f"{data}-{name}", "blackout", _config(data), self._training(data) | changes, settings, note)
                )
            chain = {"schedule.num_steps": 200, "variance": "fixed_large"}
            note = "Gaussian noise, rounded in the end"
            cells.append(Cell(f"{data}-ddpm", "ddpm", _config(data), self._training(data) | chain, settings, note))
        return cells

    def _training(self, data: str) -> dict[str, Any]:
        if self.quick:
            return _MLP | {"network.width": 16, "training.steps": 20, "training.batch_size": 16}
        if data.startswith("fashion"):
            return _SMALL | {"training.steps": 800}
        return _MLP | {"training.steps": 2000}

    def _settings(self, data: str) -> dict[str, Any]:
        if self.quick:
            return {"n": 80, "items": 20, "counts": self.counts(data)}
        n, items = (320, 64) if data.startswith("fashion") else (700, 180)
        return {"n": n, "items": items, "counts": self.counts(data)}

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        if trained.cell.method is None:
            return exact_errors(settings["counts"]) + chain_errors(settings["counts"])
        solvers = SOLVERS if trained.cell.method == "blackout" else ("ancestral", "dpmpp-2m")
        rows = []
        for solver in solvers:
            for steps in settings["counts"]:
                made = trained.model.sample(settings["n"], seed=trained.seed, num_steps=steps, solver=solver)
                (score,) = score_samples(made.data, trained.dataset, metrics=[_metric(trained)], seed=trained.seed)
                assert score.floor is not None
                values = {"score": score.value, "score_real": score.floor, "nfe": float(made.nfe)}
                rows.append(Row({"solver": solver, "steps": steps}, values | self._counts(trained, made.data)))
        values = {"off": off_lattice(trained.model, 32, trained.seed)}
        if _bounded(trained.cell.name):
            values["bits"] = likelihood(trained.model, trained.dataset, n=settings["items"], seed=trained.seed).bits
        return [*rows, Row({"solver": "bound"}, values)]

    def _counts(self, trained: Trained, samples: Tensor) -> dict[str, float]:
        """Ink, and the distance of the marginals, with that of two sets of data."""
        spec, n = trained.dataset.spec, len(samples)
        made = spec.to_levels(spec.encode(samples))
        train = trained.dataset.train
        chosen = subset(len(train), min(2 * n, len(train)), seeded(trained.seed))
        data = spec.to_levels(spec.encode(train[chosen]))
        one, other = data[: len(data) // 2], data[len(data) // 2 :]
        ink = float(made.double().sum() / n / (data.double().sum() / len(data)) - 1)
        return {"ink": ink, "marginal": marginal(made, one, spec), "marginal_real": marginal(other, one, spec)}

    def claims(self) -> list[Claim]:
        claims = [
            Claim(
                "exact means: rounding to the nearest leaves an error of more than 0.03 on every law with the most "
                "steps, rounding at random one below 0.003",
                ["exact"],
                lambda r: all_of(
                    *(within(_error(r, law, "bridge-round", max(self._counted)), 0.03, 1) for law in LAWS),
                    *(within(_error(r, law, "bridge", max(self._counted)), 0, 0.003) for law in LAWS),
                ),
            )
        ]
        for data in self.data:
            claims += self._claims(data)
        return claims

    @property
    def _counted(self) -> tuple[int, ...]:
        return (20, 5) if self.quick else COUNTS

    def _claims(self, data: str) -> list[Claim]:
        own, ddpm, steps = f"{data}-blackout", f"{data}-ddpm", self.counts(data)[-1]

        def rows(results: Results, cell: str, metric: str, solver: str, steps: int = steps) -> np.ndarray:
            return results.values(cell, metric, solver=solver, steps=steps)

        def less(text: str, metric: str, solver: str, other: str, cell: str = own, than: str = own) -> Claim:
            def check(r: Results) -> Any:
                return lower(np.abs(rows(r, cell, metric, solver)), np.abs(rows(r, than, metric, other)))

            return Claim(f"{data}: {text}", sorted({cell, than}), check)

        claims = [
            less("rounding at random scores better than to the nearest", "score", "bridge", "bridge-round"),
            less("rounding at random keeps the ink better than to the nearest", "ink", "bridge", "bridge-round"),
            less("blackout scores better than DDPM's chain, rounded", "score", "bridge", "ancestral", own, ddpm),
            less("blackout scores better than DDPM by DPM-Solver++, rounded", "score", "bridge", "dpmpp-2m", own, ddpm),
            less(
                "blackout's marginals are nearer than those of DDPM's chain",
                "marginal",
                "bridge",
                "ancestral",
                own,
                ddpm,
            ),
            Claim(
                f"{data}: all that blackout makes is on the lattice, more than a tenth of what DDPM makes is not",
                [own, ddpm],
                lambda r: all_of(
                    within(float(r.values(own, "off", solver="bound").max()), 0, 0),
                    within(float(r.values(ddpm, "off", solver="bound").min()), 0.1, 1),
                ),
            ),
        ]
        if _bounded(ddpm):
            text = f"{data}: blackout's bound is lower than DDPM's"
            claims.append(Claim.lower(text, own, ddpm, "bits", solver="bound"))
        for name, text in (
            ("softplus", "odds score better than the published reading"),
            ("likelihood", "the published weights score better than those of the likelihood"),
            ("finite-time", "times anywhere score better than the published grid"),
        ):
            if name in self.variants(data):
                claims.append(less(text, "score", "bridge", "bridge", own, f"{data}-{name}"))
        if len(self.counts(data)) > 1:
            few = self.counts(data)[0]
            claims.append(
                Claim(
                    f"{data}: {few} steps score worse than {steps} (bridge)",
                    [own],
                    lambda r: lower(rows(r, own, "score", "bridge"), rows(r, own, "score", "bridge", few)),
                )
            )
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables = {}
        for data in self.data:
            lines, real_score = [], None
            for cell in [f"{data}-{name}" for name in (*self.variants(data), "ddpm")]:
                for labels, values in results.groups(cell):
                    if labels["solver"] == "bound":
                        continue
                    line = {"model": cell.removeprefix(f"{data}-"), "solver": str(labels["solver"])}
                    line |= {"steps": str(labels["steps"])}
                    line |= {name: mean_and_spread(values[name]) for name in ("score", "marginal")}
                    line["ink, %"] = mean_and_spread(100 * values["ink"])
                    lines.append(line)
                    real_score = values
            assert real_score is not None
            known = {"score": "score_real", "marginal": "marginal_real"}
            lines.append({"model": "real data"} | {k: mean_and_spread(real_score[v]) for k, v in known.items()})
            tables[f"{data}: {'sw2' if data == 'ink' else 'fd_clf'}"] = lines
        tables["Bits per dimension, at most, and values off the lattice before rounding"] = [
            {
                "data": data,
                "model": name,
                "bits": mean_and_spread(results.values(f"{data}-{name}", "bits", solver="bound"))
                if _bounded(f"{data}-{name}")
                else "-",
                "off": f"{results.values(f'{data}-{name}', 'off', solver='bound').mean():.1%}",
            }
            for data in self.data
            for name in (*self.variants(data), "ddpm")
        ]
        tables["Exact errors: total variation to the law of a count, of steps that are told the exact mean"] = [
            {"law": law, "step": solver}
            | {f"{count} steps": f"{_error(results, law, solver, count):.4f}" for count in self._counted}
            for law in LAWS
            for solver in SOLVERS
        ]
        tables[f"Exact errors of other chains: total variation to the law {_CHAINED}, of steps of exact rates"] = [
            {"chain": name}
            | {f"{count} steps": f"{_error(results, name, 'rates', count):.4f}" for count in self._counted}
            for name in CHAINS
        ]
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(len(self.data))
        for panel, data in zip(axes, self.data, strict=True):
            cell, counts = f"{data}-blackout", self.counts(data)
            for solver in SOLVERS:
                draw(panel, counts, [results.values(cell, "score", solver=solver, steps=k) for k in counts], solver)
            for solver in ("ancestral", "dpmpp-2m"):
                scores = [results.values(f"{data}-ddpm", "score", solver=solver, steps=k) for k in counts]
                draw(panel, counts, scores, f"DDPM, {solver}", marker="s")
            real(panel, float(results.values(cell, "score_real", solver="bridge", steps=counts[-1]).mean()))
            panel.set(title=data, xlabel="steps", xscale="log", xticks=counts, xticklabels=map(str, counts))
            panel.minorticks_off()
            log_scale(panel)
        axes[0].set(ylabel="score (lower is better)")
        axes[0].legend(fontsize=7)
        return {"score-against-steps": figure}


def exact_errors(counts: tuple[int, ...]) -> list[Row]:
    """The total variation between a law and what each kind of step makes of it, at each number of steps."""
    rows = []
    for law, (probabilities, t_end) in LAWS.items():
        p0, most = torch.tensor(probabilities, dtype=torch.float64), len(probabilities) - 1
        for count in counts:
            grid = LogitSurvival(t_end=t_end, num_steps=count)
            u = grid.log_odds(grid.grid())
            forward = binomial_matrix(most, survival(u))  # [k, m, n0]
            left = torch.arange(most + 1.0, dtype=torch.float64)[None] - torch.arange(most + 1.0)[:, None]
            for solver in SOLVERS:
                made = torch.zeros(most + 1, dtype=torch.float64)
                made[0] = 1.0
                for k in reversed(range(count)):
                    joint = forward[k] * p0
                    y = (joint * left.clamp(min=0)).sum(1) / joint.sum(1).clamp(min=1e-300)
                    r = float(regained(u[k - 1], u[k])) if k else 1.0
                    made = step_matrix(solver, y, r, most) @ made
                rows.append(
                    Row({"law": law, "solver": solver, "steps": count}, {"tv": float((made - p0).abs().sum() / 2)})
                )
    return rows


def chain_errors(counts: tuple[int, ...]) -> list[Row]:
    """What steps of reverse rates make of laws, by every kind of chain, at each number of steps.

    Steps are even in the square root of the clock, since rates backwards grow at its beginning.
    """
    law, rows = torch.tensor(LAWS[_CHAINED][0], dtype=torch.float64), []
    for name, (process, end) in CHAINS.items():
        kept = process.states(len(law))
        chain, p0 = process.chain(len(law)), torch.nn.functional.pad(law, (0, kept - len(law)))
        for count in counts:
            clock = (end * (torch.arange(count + 1, dtype=torch.float64) / count).square()).tolist()
            made = process.end(len(law))
            for s, t in reversed(list(itertools.pairwise(clock))):
                # Rates frozen at the end of the step; as a matrix exponential nothing becomes negative.
                made = torch.linalg.matrix_exp(chain.reverse_rates(p0, t) * (t - s)) @ made
            error = {"tv": float((made - p0).abs().sum() / 2)}
            rows.append(Row({"law": name, "solver": "rates", "steps": count}, error))
    return rows


def marginal(a: Tensor, b: Tensor, spec: DataSpec) -> float:
    """The mean over values of the Wasserstein-1 distance of two sets of counts (n, *event), in counts."""
    assert spec.levels is not None
    one, other = (torch.nn.functional.one_hot(x.flatten(1), spec.levels).double().mean(0).cumsum(1) for x in (a, b))
    return float((one - other).abs().sum(1).mean())


@torch.inference_mode()
def off_lattice(model: GenerativeModel, count: int, seed: int) -> float:
    """The share of values that a model makes between the levels or outside the range, before they are rounded."""
    draws = SampleDraws(seed, 0, count, model.device)
    classes = model.classes_for(count)
    x, _ = model.generate(draws, model.sampling(), classes, lambda *_: None)
    return float(((x - model.spec.encode(model.spec.decode(x))).abs() > _OFF * _step(model.spec)).double().mean())


def _step(spec: DataSpec) -> float:
    assert spec.step is not None
    return spec.step / max(spec.scale)


def _bounded(cell: str) -> bool:
    """Whether there is a bound: DDPM has none where every column has a scale of its own."""
    return cell != "ink-ddpm"


def _metric(trained: Trained) -> str:
    return "fd_clf" if trained.dataset.spec.kind == "image" else "sw2"


def _error(results: Results, law: str, solver: str, steps: int) -> float:
    return float(results.values("exact", "tv", law=law, solver=solver, steps=steps).mean())


def _config(data: str) -> DataConfig:
    if data == "ink":
        return DataConfig(source=f"counts:{ink_table()}")
    name, _, kind = data.partition("-")
    source = "fashion-mnist" if name == "fashion" else name
    return DataConfig(source=source, levels=2 if kind == "binary" else None)


def ink_table() -> Path:
    """A table of counts in the temporary folder: the ink in each row of pixels of the handwritten digits."""
    whole = load_digits("", DataConfig(source="digits"))
    rows = torch.cat([whole.train, whole.held_out]).long().sum((1, 3))
    return csv_table("ink", [f"row{k}" for k in range(8)], rows.tolist())

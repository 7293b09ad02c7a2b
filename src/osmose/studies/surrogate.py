"""`osmose study surrogate`: does it pay to start the chain in the middle, and with what?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.acceleration.hand_over import REPEATS, HandOver, choose, hand_overs
from osmose.acceleration.surrogate import Pair
from osmose.data.dataset import DataConfig
from osmose.methods.base import GenerativeModel
from osmose.metrics.evaluate import score_samples
from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, all_of, lower, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Surrogates by name, and what they are; `ddpm-small` is trained on images of half the side.
SURROGATES = {
    "gaussian": "one Gaussian, full covariance: fitted, not trained",
    "class-means": "one Gaussian a class, one covariance: fitted, not trained",
    "vae": "variational autoencoder",
    "flow": "normalizing flow",
    "sngan": "SNGAN",
    "ddpm-small": "DDPM at half the side, handed over at the matching noise",
}
TIMES = (0.0, 0.1, 0.25, 0.5, 0.75)
#: Short chains of DPM-Solver++ alone.
FEW = (2, 5, 10, 15)
INNER = (0.25, 0.5, 0.75)


#: Published speeds are 4.00 and 1.96 after a one-shot surrogate, 1.84 and 1.38 after a small DDPM.
LEAST = {"one shot": {0.25: 3.0, 0.5: 1.7}, "ddpm-small": {0.25: 1.5, 0.5: 1.2}}
#: What is changed on Fashion-MNIST, where the recipes would take too long.
SHORTER: dict[str, dict[str, Any]] = {
    "vae": {"channels": 8, "training.steps": 800},
    "flow": {"training.steps": 1200},
    "sngan": {"channels": 8, "training.steps": 1200},
}


class SurrogateStudy(Study):
    """Rough samples of something cheap, noised to t_mid, finished by a DDPM of T = 1000 steps.

    Every pair is finished by the ancestral chain (fixed_small, K evenly spaced steps of the 1000, of which those at or
    below t_mid are taken) and by DPM-Solver++(2M) with 20 steps in the same way. t_mid = 0 is the surrogate alone,
    "none" the chain alone; "none" is also run with 2, 5, 10 and 15 steps of DPM-Solver++, about what the pairs take.
    Evaluations are those of all networks, the surrogate's one, or ddpm-small's many, included.
    `speed` is samples per CPU second relative to the chain alone with the same solver and K, measured in turns in one
    process, the surrogate's time included. `clf_score` is the inception score of a small classifier of the same data.
    `distance` is fd_clf between noised rough samples and noised data as the DDPM's denoiser sees them at t_mid,
    `floor` the same between two sets of data, both means of four splits; "auto" takes the smallest t_mid of the table
    from which on the distance is at most twice the floor.

    The published claims are that samples come 2 to 4 times as fast at no loss, that for some t_mid the pair beats both
    of its parts, and that the best t_mid is inside. Where a claim says "some t_mid", each seed uses the one of 0.25,
    0.5 and 0.75 that is best on the other seeds. The rest of the claims ask what else a user would: do learned
    surrogates beat a fitted Gaussian, does it still pay with a 20-step solver, does auto choose well.

    Digits: an MLP (3 blocks of 256), K = 200. Fashion-MNIST: the default UNet at 8 channels, K = 100, and a short
    training; 300 samples are few for `fd_clf`. Surrogates are trained with their own recipes, on Fashion-MNIST with
    fewer steps and channels (the flow only steps), which hurts the SNGAN most. All models of a seed start from
    different networks: nothing is paired but the DDPM and its noise.
    """

    title = "Start the chain in the middle: speed and quality of surrogates before a DDPM"
    source = (
        "surrogate diffusion on CIFAR-10 (single runs), FID and samples/s relative to DDPM (4.93, 1.00) at t_mid = 0, "
        "250, 500, 750: with SNGAN 13.70, 6.36, 4.84, 4.90 at 188, 4.00, 1.96, 1.30; with a 16x16 DDPM 145, 9.75, "
        "6.50, 5.08 at 2.53, 1.84, 1.38, 1.17"
    )

    def cells(self) -> list[Cell]:
        cells = []
        for data, plan in self._plans().items():
            solvers, settings = plan["solvers"], plan["settings"]
            counts = {solver: [*(FEW if solver == "dpmpp-2m" else ()), steps] for solver, steps in solvers.items()}
            cells.append(Cell(f"{data}-ddpm", "ddpm", data, plan["ddpm"], settings | {"counts": counts}, "the chain"))
            for name, note in SURROGATES.items():
                small = name == "ddpm-small"
                source = DataConfig(source=data, downsample=2) if small else data
                changes = plan["small"] if small else plan.get(name, {})
                cells.append(Cell(f"{data}-{name}", "ddpm" if small else name, source, changes, {}, note))
            for name in SURROGATES:
                uses = (f"{data}-ddpm", f"{data}-{name}")
                note = f"{name} before ddpm"
                more = settings | {"solvers": solvers, "times": list(TIMES), "repeats": REPEATS}
                cells.append(Cell(f"{data}-with-{name}", None, data, {}, more, note, uses))
        return cells

    def _plans(self) -> dict[str, dict[str, Any]]:
        """Data; configurations of the chain, of its small sibling and of surrogates; solvers; what is measured."""
        mlp = {"network": "mlp", "training.batch_size": 64, "training.lr": 2e-3}
        quick = {name: {"training.steps": 20} for name in ("vae", "flow", "sngan")}
        if self.quick:
            tiny = mlp | {"network.width": 32, "training.steps": 40}
            solvers = {"ancestral": 20, "dpmpp-2m": 20}
            return {
                "digits": {
                    "ddpm": tiny, "small": tiny, **quick, "solvers": solvers, "settings": {"n": 100, "timed": 8}
                }
            }  # fmt: skip
        wide = mlp | {"network.width": 256, "network.depth": 3, "training.steps": 9000}
        unet = {"network.channels": 8, "training.batch_size": 32, "training.lr": 2e-3, "training.steps": 1000}
        return {
            "digits": {
                "ddpm": wide,
                "small": wide,
                "solvers": {"ancestral": 200, "dpmpp-2m": 20},
                "settings": {"n": 800, "timed": 50},
            },
            "fashion-mnist": {
                "ddpm": unet,
                "small": unet,
                **SHORTER,
                "solvers": {"ancestral": 100, "dpmpp-2m": 20},
                "settings": {"n": 300, "timed": 10},
            },
        }

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        if not settings:
            return []
        if trained.cell.method is not None:
            return [
                Row(
                    {"solver": solver, "steps": count, "t_mid": "none"},
                    _scored(trained, trained.model, num_steps=count, solver=solver),
                )
                for solver, counts in settings["counts"].items()
                for count in counts
            ]
        chain, other = (trained.of(name) for name in trained.cell.uses)
        rows = []
        for solver, steps in settings["solvers"].items():
            pair = Pair(chain, other.folder, num_steps=steps, solver=solver)
            pair.model.to(trained.device)
            for t in settings["times"]:
                values = _scored(trained, pair.model, t_mid=t) | {"speed": _speed(pair, t, settings["timed"])}
                if solver == "ancestral" and t > 0:  # the levels of the other are the same but for a step
                    (found,) = hand_overs(pair, trained.dataset, [t], n=settings["n"], seed=trained.seed)
                    values |= {"distance": found.distance, "floor": found.floor}
                rows.append(Row({"solver": solver, "steps": steps, "t_mid": f"{t:g}"}, values))
        return rows

    def claims(self) -> list[Claim]:
        return [claim for data, plan in self._plans().items() for claim in self._claims(data, plan["solvers"])]

    def _claims(self, data: str, solvers: dict[str, int]) -> list[Claim]:
        alone, few = f"{data}-ddpm", solvers["dpmpp-2m"]

        def fd(results: Results, name: str, t: float, solver: str = "ancestral") -> np.ndarray:
            return results.values(f"{data}-with-{name}", "fd_clf", solver=solver, t_mid=f"{t:g}")

        def chain(results: Results, solver: str = "ancestral", steps: int | None = None) -> np.ndarray:
            return results.values(alone, "fd_clf", solver=solver, steps=steps or solvers[solver])

        def cells(*names: str) -> list[str]:
            return [alone, *(f"{data}-with-{name}" for name in names)]

        def faster(name: str, t: float) -> Claim:
            least = LEAST["ddpm-small" if name == "ddpm-small" else "one shot"][t]

            def check(results: Results) -> Finding:
                speed = results.values(f"{data}-with-{name}", "speed", solver="ancestral", t_mid=f"{t:g}")
                return all_of(lower(least, speed), lower(fd(results, name, t), 1.1 * chain(results)))

            text = f"samples (1) come more than {least:g} times as fast (2) at a loss below 10 %"
            return Claim(f"{data}: {name} at t_mid = {t:g}: {text}", cells(name), check)

        def beats_both(name: str) -> Claim:
            def check(results: Results) -> Finding:
                inner = np.stack([fd(results, name, t) for t in INNER])
                best = _best_on_others(inner)
                found = inner[best, np.arange(inner.shape[1])]
                both = all_of(lower(found, chain(results)), lower(found, fd(results, name, 0)))
                return Finding(both.verdict, f"t_mid {', '.join(f'{INNER[i]:g}' for i in best)}: {both.evidence}")

            return Claim(f"{data}: {name}, some t_mid: the pair beats (1) the chain and (2) {name}", cells(name), check)

        def interior(results: Results) -> Finding:
            middle = fd(results, "sngan", 0.5)
            return all_of(lower(middle, fd(results, "sngan", 0.25)), lower(middle, chain(results)))

        def pays(name: str) -> Claim:
            """At equal evaluations: half of 20 steps after a surrogate, against 10 steps of the chain alone."""

            def check(results: Results) -> Finding:
                return lower(fd(results, name, 0.5, "dpmpp-2m"), chain(results, "dpmpp-2m", few // 2))

            text = (
                f"{few // 2} evaluations: {name} and the lower half of {few} steps beat {few // 2} steps of the chain"
            )
            return Claim(f"{data}: DPM-Solver++, {text}", cells(name), check)

        def fast_solver(results: Results) -> Finding:
            return lower(chain(results, "dpmpp-2m"), 1.1 * fd(results, "sngan", 0.5))

        def below_gaussian(name: str) -> Claim:
            return Claim(
                f"{data}: at t_mid = 0.25 {name} is a better surrogate than the fitted Gaussian",
                cells(name, "gaussian")[1:],
                lambda results: lower(fd(results, name, 0.25), fd(results, "gaussian", 0.25)),
            )

        def auto(name: str) -> Claim:
            def check(results: Results) -> Finding:
                times = [_chosen(results, f"{data}-with-{name}", seed) for seed in range(len(results.seeds))]
                shown = ", ".join("none" if t is None else f"{t:g}" for t in times)
                if None in times:
                    return Finding("inconclusive", f"auto takes {shown}")
                found = [fd(results, name, t)[seed] for seed, t in enumerate(times) if t is not None]
                finding = lower(found, 1.1 * chain(results))
                return Finding(finding.verdict, f"auto takes {shown}: {finding.evidence}")

            return Claim(f"{data}: {name} at the t_mid that auto takes is less than 10 % worse", cells(name), check)

        return [
            *(faster(name, t) for name in SURROGATES for t in (0.25, 0.5)),
            *(beats_both(name) for name in SURROGATES),
            Claim(
                f"{data}: sngan: the best t_mid is inside: 0.5 beats (1) 0.25 and (2) the whole chain (published)",
                cells("sngan"),
                interior,
            ),
            Claim(
                f"{data}: the Gaussian at t_mid = 0.1 is worse than the Gaussian itself",
                cells("gaussian")[1:],
                lambda results: lower(fd(results, "gaussian", 0), fd(results, "gaussian", 0.1)),
            ),
            *(below_gaussian(name) for name in ("vae", "flow", "sngan", "ddpm-small")),
            Claim(
                f"{data}: {few} steps of DPM-Solver++ alone are less than 10 % worse than sngan before half of "
                f"{solvers['ancestral']} ancestral steps",
                cells("sngan"),
                fast_solver,
            ),
            *(pays(name) for name in SURROGATES if name != "ddpm-small"),
            *(auto(name) for name in SURROGATES),
        ]

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables = {}
        for data, plan in self._plans().items():
            for solver, steps in plan["solvers"].items():
                lines = []
                for name in SURROGATES:
                    for labels, values in results.groups(f"{data}-with-{name}"):
                        if labels["solver"] == solver:
                            lines.append({"surrogate": name, "t_mid": str(labels["t_mid"])} | _cells(values))
                for labels, values in results.groups(f"{data}-ddpm"):
                    if labels["solver"] == solver:
                        text = f"none, K = {labels['steps']}"
                        lines.append({"surrogate": "-", "t_mid": text} | _cells(values))
                floor = mean_and_spread(results.groups(f"{data}-ddpm")[0][1]["fd_clf_real"])
                lines.append({"surrogate": "real data", "fd_clf": floor})
                tables[f"{data}, {solver}, K = {steps}"] = lines
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figures = {}
        for data, plan in self._plans().items():
            figure, axes = panels(len(plan["solvers"]))
            for panel, (solver, steps) in zip(axes, plan["solvers"].items(), strict=True):
                known = results.values(f"{data}-ddpm", "fd_clf", solver=solver, steps=steps)
                for name, marker in zip(SURROGATES, "osD^vP", strict=True):
                    groups = [v for k, v in results.groups(f"{data}-with-{name}") if k["solver"] == solver]
                    draw(panel, [*TIMES, 1.0], [*(values["fd_clf"] for values in groups), known], name, marker)
                real(panel, results.groups(f"{data}-ddpm")[0][1]["fd_clf_real"].mean())
                panel.set(title=f"{data}, {solver}, K = {steps}", xlabel="t_mid (1: chain alone)", ylabel="fd_clf")
                log_scale(panel)
            axes[0].legend(fontsize=7)
            figures[f"{data}-score-against-t-mid"] = figure
        return figures


def _best_on_others(values: np.ndarray) -> np.ndarray:
    """For each seed the row that is lowest on the mean of the other seeds (of its own where it is alone).

    Args:
        values: shape (rows, seeds).
    """
    total, seeds = values.sum(1, keepdims=True), values.shape[1]
    others = total - values if seeds > 1 else values
    return np.asarray(others.argmin(0))


def _chosen(results: Results, cell: str, seed: int) -> float | None:
    """The t_mid of the table that `choose` takes for one seed, or None."""
    known = {
        metric: [results.values(cell, metric, solver="ancestral", t_mid=f"{t:g}")[seed] for t in TIMES[1:]]
        for metric in ("distance", "floor")
    }
    return choose([HandOver(*map(float, one)) for one in zip(TIMES[1:], *known.values(), strict=True)])


def _scored(trained: Trained, model: GenerativeModel, **sampling: Any) -> dict[str, float]:
    n = trained.cell.settings["n"]
    samples = model.sample(n, seed=trained.seed, **sampling)
    scores = score_samples(samples.data, trained.dataset, metrics=["fd_clf", "clf_score"], seed=trained.seed)
    values = {"nfe": float(samples.nfe)} | {score.name: score.value for score in scores}
    floor = next(score.floor for score in scores if score.name == "fd_clf")
    assert floor is not None
    return values | {"fd_clf_real": floor}


def _speed(pair: Pair, t: float, n: int) -> float:
    """Time of the chain alone relative to the pair's, in turns, of the CPU where it computes; the best of two each."""
    clock = time.process_time if pair.model.device.type == "cpu" else time.perf_counter

    def seconds(model: GenerativeModel, **sampling: Any) -> float:
        began = clock()
        model.sample(n, **sampling)
        return clock() - began

    chain = pair.model.config.sampling.of_chain()
    turns = [(seconds(pair.model.chain, **chain), seconds(pair.model, t_mid=t)) for _ in range(2)]
    alone, both = (min(column) for column in zip(*turns, strict=True))
    return alone / max(both, 1e-6)


def _cells(values: dict[str, np.ndarray]) -> dict[str, str]:
    names = {"nfe": "evaluations", "speed": "speed", "fd_clf": "fd_clf", "clf_score": "clf_score"}
    line = {title: mean_and_spread(values[name]) for name, title in names.items() if name in values}
    if "distance" in values:
        line |= {"distance at t_mid": mean_and_spread(values["distance"]), "floor": mean_and_spread(values["floor"])}
    return line

"""`osmose study surrogate`: does it pay to start the chain in the middle, and with what?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.acceleration.hand_over import HandOver, choose, hand_overs
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
INNER = (0.25, 0.5, 0.75)


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
    "none" the chain alone; "none" is also run with 2, 5, 10 and 15 steps of DPM-Solver++, which cost what the pairs do.
    `speed` is samples per CPU second relative to the chain alone with the same solver and K, measured in turns in one
    process, the surrogate's time included. `clf_score` is the inception score of a small classifier of the same data.
    `distance` is fd_clf between noised rough samples and noised data as the DDPM's denoiser sees them at t_mid,
    `floor` the same between two sets of data; "auto" takes the smallest t_mid from which on the distance is at most
    twice the floor.

    Digits: an MLP (3 blocks of 256), K = 200. Fashion-MNIST: the default UNet at 8 channels, K = 100, and a short
    training; 300 samples are few for `fd_clf`. Surrogates are trained with their own recipes, on Fashion-MNIST with
    fewer channels and steps, which hurts the SNGAN most. All models of a seed start from different networks: nothing
    is paired but the DDPM and its noise.
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
            cells.append(Cell(f"{data}-ddpm", "ddpm", data, plan["ddpm"], settings | {"solvers": solvers}, "the chain"))
            for name, note in SURROGATES.items():
                small = name == "ddpm-small"
                source = DataConfig(source=data, downsample=2) if small else data
                changes = plan["small"] if small else plan.get(name, {})
                cells.append(Cell(f"{data}-{name}", "ddpm" if small else name, source, changes, {}, note))
            for name in SURROGATES:
                uses = (f"{data}-ddpm", f"{data}-{name}")
                note = f"{name} before ddpm"
                more = settings | {"solvers": solvers, "times": list(TIMES)}
                cells.append(Cell(f"{data}-with-{name}", None, data, {}, more, note, uses))
        return cells

    def _plans(self) -> dict[str, dict[str, Any]]:
        """Data; configurations of the chain, of its small sibling and of surrogates; solvers; what is measured."""
        mlp = {"network": "mlp", "training.batch_size": 64, "training.lr": 2e-3}
        quick = {name: {"training.steps": 20} for name in ("vae", "flow", "sngan")}
        if self.quick:
            tiny = mlp | {"network.width": 32, "training.steps": 40}
            solvers = {"ancestral": 20, "dpmpp-2m": 10}
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
                "settings": {"n": 300, "timed": 20},
            },
        }

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        if not settings:
            return []
        if trained.cell.method is not None:
            rows = []
            for solver, steps in settings["solvers"].items():
                counts = (steps,) if solver == "ancestral" else (2, 5, 10, 15, steps) if not self.quick else (5, steps)
                for count in counts:
                    labels = {"solver": solver, "steps": count, "t_mid": "none"}
                    values = _scored(trained, trained.model, num_steps=count, solver=solver)
                    rows.append(Row(labels, values))
            return rows
        chain, other = (trained.of(name) for name in trained.cell.uses)
        rows = []
        for solver, steps in settings["solvers"].items():
            pair = Pair(chain, other.folder, num_steps=steps, solver=solver)
            pair.model.to(trained.device)
            entered = [t for t in settings["times"] if t > 0]
            found = {0.0: None, **dict(zip(entered, self._hand_overs(trained, pair, entered), strict=True))}
            for t, hand_over in found.items():
                values = _scored(trained, pair.model, t_mid=t)
                values["speed"] = _speed(pair, t, settings["timed"])
                values["distance"] = hand_over.distance if hand_over else values["fd_clf"]
                values["floor"] = hand_over.floor if hand_over else values["fd_clf_real"]
                rows.append(Row({"solver": solver, "steps": steps, "t_mid": f"{t:g}"}, values))
        return rows

    def _hand_overs(self, trained: Trained, pair: Pair, times: list[float]) -> list[HandOver]:
        return hand_overs(pair, trained.dataset, times, n=trained.cell.settings["n"], seed=trained.seed)

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

        def twice_as_fast(name: str) -> Claim:
            def check(results: Results) -> Finding:
                speed = results.values(f"{data}-with-{name}", "speed", solver="ancestral", t_mid="0.5")
                return all_of(lower(1.7, speed), lower(fd(results, name, 0.5), 1.1 * chain(results)))

            text = (
                f"{name} at t_mid = 0.5 (1) makes chains of {solvers['ancestral']} steps 1.7 times as fast at least, "
            )
            return Claim(f"{data}: {text}(2) and is less than 10 % worse", cells(name), check)

        def beats_both(name: str) -> Claim:
            def check(results: Results) -> Finding:
                best = min(INNER, key=lambda t: fd(results, name, t).mean())
                found = fd(results, name, best)
                both = all_of(lower(found, chain(results)), lower(found, fd(results, name, 0)))
                return Finding(both.verdict, f"at t_mid = {best:g}, the best of three: {both.evidence}")

            return Claim(f"{data}: {name}, some t_mid: the pair beats (1) the chain and (2) {name}", cells(name), check)

        def interior(name: str) -> Claim:
            def check(results: Results) -> Finding:
                middle = fd(results, name, 0.5)
                return all_of(lower(middle, fd(results, name, 0.25)), lower(middle, chain(results)))

            text = f"{name}: the best t_mid is inside: 0.5 is better than (1) 0.25 and (2) the whole chain (published)"
            return Claim(f"{data}: {text}", cells(name), check)

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
                cells(name, "gaussian"),
                lambda results: lower(fd(results, name, 0.25), fd(results, "gaussian", 0.25)),
            )

        def auto(name: str) -> Claim:
            def check(results: Results) -> Finding:
                pairs = [(self._at_auto(results, data, name, seed), whole) for seed, whole in enumerate(chain(results))]
                return lower([found for found, _ in pairs], 1.1 * np.array([whole for _, whole in pairs]))

            return Claim(f"{data}: {name} at the t_mid that auto takes is less than 10 % worse", cells(name), check)

        return [
            *(twice_as_fast(name) for name in SURROGATES),
            *(beats_both(name) for name in SURROGATES),
            *(interior(name) for name in ("sngan", "ddpm-small")),
            Claim(
                f"{data}: the Gaussian at t_mid = 0.1 is worse than the Gaussian itself",
                cells("gaussian"),
                lambda results: lower(fd(results, "gaussian", 0), fd(results, "gaussian", 0.1)),
            ),
            *(below_gaussian(name) for name in ("vae", "flow", "sngan", "ddpm-small")),
            Claim(
                f"{data}: {few} steps of DPM-Solver++ alone are less than 10 % worse than sngan before half of "
                f"{solvers['ancestral']} ancestral steps",
                cells("sngan"),
                fast_solver,
            ),
            *(pays(name) for name in SURROGATES),
            *(auto(name) for name in SURROGATES),
        ]

    def _at_auto(self, results: Results, data: str, name: str, seed: int) -> float:
        """fd_clf at the t_mid that `choose` takes for one seed; the chain's where it takes none."""
        found = []
        for t in TIMES[1:]:
            values = [
                results.values(f"{data}-with-{name}", metric, solver="ancestral", t_mid=f"{t:g}")[seed]
                for metric in ("distance", "floor")
            ]
            found.append(HandOver(t, *map(float, values)))
        chosen = choose(found)
        if chosen is None:
            return float(results.values(f"{data}-ddpm", "fd_clf", solver="ancestral")[seed])
        return float(results.values(f"{data}-with-{name}", "fd_clf", solver="ancestral", t_mid=f"{chosen:g}")[seed])

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


def _scored(trained: Trained, model: GenerativeModel, **sampling: Any) -> dict[str, float]:
    n = trained.cell.settings["n"]
    samples = model.sample(n, seed=trained.seed, **sampling)
    scores = score_samples(samples.data, trained.dataset, metrics=["fd_clf", "clf_score"], seed=trained.seed)
    values = {"nfe": float(samples.nfe)} | {score.name: score.value for score in scores}
    floor = next(score.floor for score in scores if score.name == "fd_clf")
    assert floor is not None
    return values | {"fd_clf_real": floor}


def _speed(pair: Pair, t: float, n: int) -> float:
    """CPU time of the chain alone relative to the pair's, in turns; the best of two each."""
    own = {name: value for name, value in pair.model.sampling().to_json().items() if name != "t_mid"}

    def seconds(model: GenerativeModel, **sampling: Any) -> float:
        began = time.process_time()
        model.sample(n, **sampling)
        return time.process_time() - began

    turns = [(seconds(pair.model.chain, **own), seconds(pair.model, t_mid=t)) for _ in range(2)]
    alone, both = (min(column) for column in zip(*turns, strict=True))
    return alone / max(both, 1e-6)


def _cells(values: dict[str, np.ndarray]) -> dict[str, str]:
    names = {"nfe": "evaluations", "speed": "speed", "fd_clf": "fd_clf", "clf_score": "clf_score"}
    line = {title: mean_and_spread(values[name]) for name, title in names.items() if name in values}
    if "distance" in values:
        line |= {"distance at t_mid": mean_and_spread(values["distance"]), "floor": mean_and_spread(values["floor"])}
    return line

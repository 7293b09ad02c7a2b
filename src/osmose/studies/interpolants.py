"""`osmose study interpolants`: from any law to any other, by ODE and by SDEs of any noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from osmose.data.dataset import DataConfig
from osmose.interpolants.oracles import GaussianMixture
from osmose.studies import interpolant_measures as measures
from osmose.studies.interpolant_measures import (
    BRIDGE_EPSILON,
    CORRELATION,
    ERROR_EPSILONS,
    ERRORS,
    EXACT,
    ROUGH,
    SMOOTH,
    two_modes,
)
from osmose.studies.measures import csv_table
from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, all_of, lower, mean_and_spread, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Losses of one sign of the noise have half as many inputs of the network in an item: twice the items make up for it.
_ONE_SIGN = {"training.batch_size": 512}
#: What is learned between the two modes and the eight: overrides, and what is said of them.
LEARNED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"path.gamma": "none", **_ONE_SIGN}, "linear, gamma = 0, b"),
    "brownian": ({}, "linear, gamma = sqrt(t (1 - t)), b and eta: the default"),
    "v-eta": ({"learn": "v-eta", **_ONE_SIGN}, "the same, v and eta"),
    "b-s": ({"learn": "b-s"}, "the same, b and s"),
    "trig": ({"path": "trig"}, "trigonometric, brownian gamma, b and eta"),
    "encdec": ({"path": "encdec"}, "encoding and decoding, gamma = sin^2, b and eta"),
    "ot": (
        {"path.gamma": "none", "coupling": "ot", **_ONE_SIGN},
        "linear, gamma = 0, paired by optimal transport",
    ),
}
#: From noise to digits.
FROM_NOISE: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({"path": "one-sided-linear"}, "one-sided linear: flow matching"),
    "trig": ({"path": "one-sided-trig"}, "one-sided trigonometric"),
    "vp": ({"path": "one-sided-vp"}, "one-sided, of a variance-preserving diffusion, w"),
    "ot": ({"path": "one-sided-linear", "coupling": "ot"}, "one-sided linear, paired by optimal transport"),
}
#: Noise levels of the SDEs; 0 is the ODE.
EPSILONS = (0.0, 0.1, 0.5, 1.0, 2.5)
#: Between none and much.
_INNER = 0.5


class Interpolants(Study):
    """What the paper claims, where fields are known exactly, and where they are learned.

    `exact`: paths between two modes and eight in the plane, with fields in closed form. ED is 1,000 times the energy
    distance to the law that is meant, at t = 1/2 and at t = 1, by the ODE and two SDEs (unbiased: it can be negative;
    a unit is the deviation of the eight modes); |grad b| the root mean square over x_t of the velocity's Jacobian
    (Frobenius), and its largest value; `steps` ED after few steps of Euler with the exact velocity.

    `errors`: the exact velocity of the linear path (brownian gamma) plus a field of known size, sin waves, with the
    exact score: divergence of samples from the law, by counting in 32 x 32 cells over [-2, 2]^2, less that of samples
    by the same sampler without the error, and the bound KL <= dL_b / epsilon + epsilon dL_s (dL_s = 0).

    `eight-*`: learned, from the two modes to toy:8-gaussians, an MLP (2 blocks of 128), 2,000 updates at the rate
    0.002, on 256 items with both signs of the noise or, where a loss has one, on 512: 512 inputs of the network each.
    `off` is the share of samples farther than 4 deviations from every mode, `log_rho` the mean log-density of samples
    (in the data's units), ED as above. Samples begin with fresh draws of the two modes and take 100 steps of heun, ODE
    and SDE alike without a denoising step; the ODE also few steps of Euler. `exact` in this table is what the same
    samplers make of the exact fields: what they differ from data by is the solver's.

    `high-*`: noise to toy:mixture:16, the same network and training, for SDEs of several noises.

    `digits-*`: noise to digits, an MLP (2 blocks of 256), 2,000 updates of 128, fd_clf after few steps of Euler.

    `bridge-*`: a Gaussian to one with correlation 0.8, at epsilon = 0.5: the method `bridge`, and the linear path that
    it begins with, the same networks for the fields, 3,000 updates of 512 each. The energy is E|u|^2 a value, along
    simulated paths of 100 steps of heun; cov is the covariance at t = 1/2.
    """

    title = "Stochastic interpolants: any noise after training, few steps, and the Schroedinger bridge"
    source = (
        "Stochastic Interpolants (arXiv 2303.08797): SDE better than ODE for every gamma, an interior best epsilon, b "
        "better than v, eta better than s; figures without numbers"
    )

    def cells(self) -> list[Cell]:
        eight, training = self._eight(), self._training()
        cells = [
            Cell(
                "exact",
                None,
                eight,
                {},
                {"n": 300 if self.quick else 2000, "paths": self.paths},
                "fields in closed form",
            ),
            Cell("errors", None, eight, {}, {"n": 500 if self.quick else 5000}, "a velocity with a known error"),
            Cell("eight-exact", None, eight, {}, self._settings(), "the exact fields of the default"),
        ]
        learned = ("none", "brownian") if self.quick else tuple(LEARNED)
        for name in learned:
            changes, note = LEARNED[name]
            cells.append(Cell(f"eight-{name}", "interpolant", eight, training | changes, self._settings(), note))
        if not self.quick:
            for name in ("brownian", "v-eta", "b-s"):
                changes, note = LEARNED[name]
                data = DataConfig(source="toy:mixture:16")
                changes = training | {"path": "linear"} | {"learn": "b-eta"} | changes
                cells.append(Cell(f"high-{name}", "interpolant", data, changes, self._settings(), note))
        for name in ("linear", "ot") if self.quick else tuple(FROM_NOISE):
            changes, note = FROM_NOISE[name]
            wide = {"network": "mlp", "network.width": 256, "network.depth": 2, "training.batch_size": 128}
            wide |= {"training.steps": 2000}
            if self.quick:
                wide |= {"network.width": 16, "training.steps": 20, "training.batch_size": 16}
            settings = {"n": 80 if self.quick else 700, "counts": self.counts}
            cells.append(Cell(f"digits-{name}", "interpolant", "digits", wide | changes, settings, note))
        gauss = DataConfig(source=f"csv:{self._gauss()}")
        for name, method, changes in (
            ("bridge", "bridge", {"epsilon": BRIDGE_EPSILON}),
            ("straight", "interpolant", {"path": "linear", "learn": "b-s"}),
        ):
            note = "the Schroedinger bridge" if name == "bridge" else "the path that it begins with"
            settings = {"n": 500 if self.quick else 20000, "steps": 10 if self.quick else 100}
            longer = {} if self.quick else {"training.steps": 3000, "training.batch_size": 512}
            cells.append(Cell(f"bridge-{name}", method, gauss, training | longer | changes, settings, note))
        return cells

    @property
    def paths(self) -> tuple[str, ...]:
        """Of `EXACT`."""
        return (ROUGH, SMOOTH) if self.quick else tuple(EXACT)

    @property
    def counts(self) -> tuple[int, ...]:
        """Few steps."""
        return (1, 4) if self.quick else (1, 2, 4, 8, 16)

    @property
    def steps(self) -> int:
        """Steps of everything else."""
        return 10 if self.quick else 100

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Of the SDEs, and 0."""
        return (0.0, 1.0) if self.quick else EPSILONS

    def _training(self) -> dict[str, Any]:
        network = {"network": "mlp", "network.width": 128, "network.depth": 2}
        if self.quick:
            return network | {"network.width": 16, "training.steps": 20, "training.batch_size": 64}
        return network | {"training.steps": 2000, "training.batch_size": 256, "training.lr": 2e-3}

    def _settings(self) -> dict[str, Any]:
        return {"n": 400 if self.quick else 2000, "counts": self.counts, "epsilons": self.epsilons, "steps": self.steps}

    def _eight(self) -> DataConfig:
        """Eight modes, and a table of two to begin with, both of 20,000 points."""
        points = two_modes().sample(20000, torch.Generator().manual_seed(0))
        start = f"csv:{csv_table('two', ['x', 'y'], points.tolist())}"
        return DataConfig(source="toy:8-gaussians", num_points=20000, start=start)

    def _gauss(self) -> str:
        covariance = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
        law = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), covariance[None])
        points = law.sample(20000, torch.Generator().manual_seed(0))
        # Without its own mean and deviations: its covariance in the model's units is the one that is said.
        points = (points - points.mean(0)) / points.std(0)
        return str(csv_table("gauss", ["x", "y"], points.tolist()))

    def measure(self, trained: Trained) -> list[Row]:
        family = trained.cell.name.partition("-")[0]
        by_family: dict[str, Callable[[Trained], list[Row]]] = {
            "exact": measures.exact_fields,
            "errors": measures.wrong_velocity,
            "eight": measures.eight_exact if trained.cell.method is None else measures.eight,
            "high": measures.high,
            "digits": measures.digits,
            "bridge": measures.bridge,
        }
        return by_family[family](trained)

    def claims(self) -> list[Claim]:
        return [*self._exact_claims(), *self._learned_claims(), *self._few_step_claims(), *self._bridge_claims()]

    def _exact_claims(self) -> list[Claim]:
        def same_law(r: Results) -> Finding:
            values = [np.abs(v["ed"]).mean() for labels, v in r.groups("exact") if labels["what"] == "law"]
            return within(float(max(values)), 0, 60 if self.quick else 5)

        def smoother(place: str, metric: str = "gradient") -> Callable[[Results], Finding]:
            def check(r: Results) -> Finding:
                smooth, rough = (r.values("exact", metric, path=path, what=place) for path in (SMOOTH, ROUGH))
                return lower(smooth, rough)

            return check

        def cost(r: Results, error: float, epsilon: float) -> np.ndarray:
            return r.values("errors", "kl", error=error, epsilon=epsilon) - r.values(
                "errors", "kl", error=0.0, epsilon=epsilon
            )

        def suffers(error: float, epsilon: float) -> Callable[[Results], Finding]:
            return lambda r: lower(cost(r, error, epsilon), cost(r, error, 0.0))

        return [
            Claim(
                "exact fields: every epsilon gives the law at t = 1/2 and at t = 1, on every path (largest mean |ED|)",
                ["exact"],
                same_law,
            ),
            Claim("gamma smooths b in the middle half of time (|grad b|)", ["exact"], smoother("middle")),
            Claim("gamma smooths b over all of time (|grad b|)", ["exact"], smoother("all")),
            Claim("gamma lowers the largest |grad b| of the middle half", ["exact"], smoother("middle", "largest")),
            *(
                Claim(
                    f"an error of {error:g} in b costs the SDE (epsilon = {epsilon:g}) less than the ODE",
                    ["errors"],
                    suffers(error, epsilon),
                )
                for error in ERRORS
                for epsilon in ERROR_EPSILONS
            ),
            Claim(
                "the corrected bound holds: KL <= dL_b / epsilon",
                ["errors"],
                lambda r: all_of(
                    *(
                        lower(cost(r, error, epsilon), r.values("errors", "bound", error=error, epsilon=epsilon))
                        for error in ERRORS
                        for epsilon in ERROR_EPSILONS
                    )
                ),
            ),
        ]

    def _learned_claims(self) -> list[Claim]:
        def against(text: str, metric: str, one: tuple[str, float], other: tuple[str, float], sign: int = 1) -> Claim:
            def check(r: Results) -> Finding:
                a, b = (
                    sign * r.values(cell, metric, what="sampler", epsilon=epsilon) for cell, epsilon in (one, other)
                )
                return lower(a, b)

            return Claim(text, sorted({one[0], other[0]}), check)

        default, most = "eight-brownian", self.epsilons[-1]
        claims = [
            against("gamma > 0 leaves fewer samples off the modes than gamma = 0 (ODE)", "off", (default, 0.0),
                    ("eight-none", 0.0)),
            against(f"the SDE (epsilon = {most:g}) leaves fewer off the modes than the ODE", "off", (default, most),
                    (default, 0.0)),
        ]  # fmt: skip

        def density(r: Results) -> Finding:
            known = r.values(default, "log_rho_real", what="sampler", epsilon=0.0)
            gaps = [np.abs(r.values(default, "log_rho", what="sampler", epsilon=e) - known) for e in (most, 0.0)]
            return lower(gaps[0], gaps[1])

        text = (
            f"the mean log-density of samples of the SDE (epsilon = {most:g}) is nearer to that of data than the ODE's"
        )
        claims.append(Claim(text, [default], density))
        if self.quick:
            return claims
        claims += [
            against("b and eta leave fewer off the modes than v and eta (ODE)", "off", (default, 0.0),
                    ("eight-v-eta", 0.0)),
            against("b and eta leave fewer off the modes than b and s (SDE, epsilon = 1)", "off", (default, 1.0),
                    ("eight-b-s", 1.0)),
            against("16 dimensions: learning b is better than learning v (ODE, sw2)", "sw2", ("high-brownian", 0.0),
                    ("high-v-eta", 0.0)),
            against("16 dimensions: learning eta is better than learning s (SDE, epsilon = 1, sw2)", "sw2",
                    ("high-brownian", 1.0), ("high-b-s", 1.0)),
        ]  # fmt: skip

        def interior(r: Results) -> Finding:
            scores = {e: r.values("high-brownian", "sw2", what="sampler", epsilon=e) for e in EPSILONS}
            return all_of(lower(scores[_INNER], scores[EPSILONS[0]]), lower(scores[_INNER], scores[EPSILONS[-1]]))

        text = f"16 dimensions: epsilon = {_INNER:g} is better than {EPSILONS[0]:g} and than {EPSILONS[-1]:g} (sw2)"
        return [*claims, Claim(text, ["high-brownian"], interior)]

    def _few_step_claims(self) -> list[Claim]:
        few = self.counts[1]

        def better(one: str, other: str, metric: str, steps: int, text: str) -> Claim:
            def check(r: Results) -> Finding:
                a, b = (r.values(cell, metric, what="steps", steps=steps) for cell in (one, other))
                return lower(a, b)

            return Claim(text, sorted({one, other}), check)

        claims = [
            better("digits-ot", "digits-linear", "fd_clf", k, f"digits: OT pairs score better at {k} steps")
            for k in (1, few)
        ]
        if self.quick:
            return claims
        return [
            *claims,
            *(
                better(
                    "digits-linear", "digits-trig", "fd_clf", k, f"digits: linear scores better than trig, {k} steps"
                )
                for k in (1, few)
            ),
            *(
                better("eight-ot", "eight-none", "ed", k, f"eight modes: OT pairs are nearer at {k} steps (ED)")
                for k in (1, few)
            ),
        ]

    def _bridge_claims(self) -> list[Claim]:
        def gap(r: Results, cell: str, metric: str) -> np.ndarray:
            return np.abs(r.values(cell, metric, what="bridge") - r.values(cell, f"{metric}_exact", what="bridge"))

        both = ["bridge-bridge", "bridge-straight"]
        claims = [
            Claim(
                f"the bridge's {name} is nearer to the closed form than that of the path that it begins with",
                both,
                lambda r, metric=metric: lower(gap(r, both[0], metric), gap(r, both[1], metric)),  # type: ignore[misc]
            )
            for metric, name in (("energy", "energy"), ("cov", "covariance at t = 1/2"))
        ]
        if not self.quick:
            claims.append(
                Claim(
                    "the bridge's energy is within 5 % of the least there is",
                    both[:1],
                    lambda r: lower(gap(r, both[0], "energy"), 0.05 * r.values(both[0], "energy_exact", what="bridge")),
                )
            )
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables: dict[str, list[dict[str, str]]] = {}

        def rows(cell: str, what: str) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
            return [(labels, values) for labels, values in results.groups(cell) if labels["what"] == what]

        def lines(cells: Sequence[str], what: str, keys: Sequence[str]) -> list[dict[str, str]]:
            return [
                {"model": cell}
                | {key: f"{labels[key]:g}" for key in keys}
                | {name: mean_and_spread(v) for name, v in values.items()}
                for cell in cells
                for labels, values in rows(cell, what)
            ]

        tables["Exact fields: ED at t = 1/2 and t = 1, by ODE and SDE"] = [
            {"path": str(labels["path"]), "epsilon": f"{labels['epsilon']:g}", "t": f"{labels['t']:g}"}
            | {"ED": mean_and_spread(values["ed"]), "ED of data": mean_and_spread(values["ed_real"])}
            for labels, values in rows("exact", "law")
        ]
        tables["Exact fields: |grad b|, root mean square and largest, and ED after few steps of Euler"] = [
            {"path": path}
            | {
                f"{name} ({place})": mean_and_spread(results.values("exact", metric, path=path, what=place))
                for place in ("middle", "all")
                for metric, name in (("gradient", "rms"), ("largest", "largest"))
            }
            | {
                f"{count} steps": mean_and_spread(results.values("exact", "ed", path=path, what="few", steps=count))
                for count in self._exact_counts
            }
            for path in self.paths
        ]
        tables["An error in b, and what it costs"] = [
            {"error": f"{labels['error']:g}", "epsilon": f"{labels['epsilon']:g}"}
            | {name: mean_and_spread(values[name]) for name in ("kl", "bound") if name in values}
            for labels, values in results.groups("errors")
        ]
        names = [cell.name for cell in self.cells()]
        for family, title in (("eight", "Two modes to eight"), ("high", "Noise to 8 modes in 16 dimensions")):
            cells = [name for name in names if name.startswith(f"{family}-")]
            if cells:
                tables[f"{title}, {self.steps} steps"] = lines(cells, "sampler", ["epsilon"])
                tables[f"{title}: the ODE in few steps of Euler"] = lines(cells, "steps", ["steps"])
        digits = [name for name in names if name.startswith("digits-")]
        tables["Noise to digits: fd_clf in few steps of Euler"] = lines(digits, "steps", ["steps"])
        bridges = [name for name in names if name.startswith("bridge-")]
        tables["Schroedinger bridge between Gaussians"] = lines(bridges, "bridge", [])
        return tables

    @property
    def _exact_counts(self) -> tuple[int, ...]:
        return tuple(count for count in self.counts if count > 1)

    def figures(self, results: Results) -> dict[str, Figure]:
        epsilons, counts = self.epsilons, self.counts
        names = [cell.name for cell in self.cells()]
        noisy = [n for n in names if n.startswith("eight-") and n not in ("eight-none", "eight-ot")]
        figure, axes = panels(2 if self.quick else 3)
        for panel, metric, title in zip(axes, ("off", "log_rho"), ("off the modes", "mean log rho"), strict=False):
            for cell in noisy:
                values = [results.values(cell, metric, what="sampler", epsilon=e) for e in epsilons]
                draw(panel, epsilons, values, cell.removeprefix("eight-"))
            real(panel, float(results.values(noisy[0], f"{metric}_real", what="sampler", epsilon=0.0).mean()))
            panel.set(title=f"two modes to eight: {title}", xlabel="epsilon")
        if not self.quick:
            for cell in [n for n in names if n.startswith("high-")]:
                values = [results.values(cell, "sw2", what="sampler", epsilon=e) for e in epsilons]
                draw(axes[2], epsilons, values, cell.removeprefix("high-"))
            real(axes[2], float(results.values("high-brownian", "sw2_real", what="sampler", epsilon=0.0).mean()))
            axes[2].set(title="noise to 8 modes in 16 dimensions: sw2", xlabel="epsilon")
        for panel in axes:
            panel.legend(fontsize=7)
        few, panes = panels(2)
        for family, metric, panel in (("eight", "ed", panes[0]), ("digits", "fd_clf", panes[1])):
            for cell in [n for n in names if n.startswith(f"{family}-")]:
                values = [results.values(cell, metric, what="steps", steps=k) for k in counts]
                draw(panel, counts, values, cell.removeprefix(f"{family}-"))
            panel.set(title=f"{family}: {metric}, ODE", xlabel="steps of Euler", xscale="log")
            panel.set(xticks=counts, xticklabels=map(str, counts))
            panel.minorticks_off()
            if metric == "fd_clf":
                log_scale(panel)
            else:  # unbiased, so that it may lie a little below 0
                panel.set_yscale("symlog", linthresh=5)
                panel.set_ylim(-4, 3e4)
            panel.legend(fontsize=7, ncols=2)
        return {"epsilon": figure, "few-steps": few}

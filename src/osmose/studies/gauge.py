"""`osmose study gauge`: does it matter whether a score is a gradient?"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from osmose.analysis.conservativity import conservativity, gauge_residual
from osmose.analysis.dimension_report import dimension
from osmose.analysis.flow_likelihood import flow_likelihood
from osmose.analysis.noise_error import oracle_of
from osmose.analysis.training_memory import training_memory
from osmose.data.dataset import DataConfig
from osmose.gaussian.derivatives import jacobian
from osmose.gaussian.oracles import RotatedDenoiser
from osmose.gaussian.schedule import VarianceExploding
from osmose.gaussian.score import ScoreField, score_field
from osmose.metrics.distances import sliced_wasserstein
from osmose.studies.measures import exact_bits, step_seconds
from osmose.studies.plots import draw, panels
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, lower, mean_and_spread, same
from osmose.training.recipes import recipe
from osmose.training.trainer import built

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = {"gaussians": (400, 1600, 4000), "sphere": (400, 1600, 4000), "digits": (1000,)}
DATA = {"gaussians": "toy:8-gaussians", "sphere": "toy:sphere:2:10", "digits": "digits"}
_MLP = {"kind": "mlp", "width": 128, "depth": 3}
_UNET = {"kind": "unet", "channels": 16, "mult": [1, 2], "blocks": 1, "attention": [4]}
#: Of the dimension of the sphere.
ESTIMATORS = ("flow", "flipd", "normal-bundle", "rank")
#: Strengths of the planted field.
STRENGTHS = (0, 1, 2)
_WALKS = {"ode": "ODE, Heun", "euler": "ODE, Euler, few steps", "sde": "reverse SDE"}


class Gauge(Study):
    """Is it better for a score to be a gradient: for samples, for densities, for estimates of dimension?

    The same networks, free and conservative (the output is the gradient of an energy), with as many updates; EDM.
    `gaussians`: 8 Gaussians in the plane, whose score is known; `sphere`: a 2-sphere in R^10, whose dimension is known;
    both a residual MLP of 3 blocks of 128 and 400, 1,600 and 4,000 updates of 256. `digits`: a UNet of 16 channels,
    1,000 updates of 64.

    `bits` by the probability-flow ODE, held-out items; `excess` over the exact density of the same items, bits per
    dimension; `sw2` (points) and `fd_clf` (digits) of samples in 18 steps of Heun's rule; `asymmetry` the largest
    antisymmetric share of the score's Jacobian over sigma = 0.1, 0.3, 1; `off` the largest squared error of the score
    as a share of its square; `flow`, `flipd` and others the errors of these estimates of dimension at sigma = 0.1, of
    digits the estimate itself at 0.2. `seconds` and `bytes` are those of a training step. As many updates take the
    conservative network 2.5 times as long: `1,600` against `4,000` is about equal time.

    `planted` trains nothing: to the exact score of the 8 Gaussians a rotation w A s is added, and samples are drawn by
    the ODE in 200 steps of Heun's rule, in 20 of Euler's, and by the reverse SDE in 2,000. `sw2` to fresh points,
    `length` of the paths of the ODE in units of the straight line, `residual` of the gauge condition div r + r . s = 0.
    """

    title = "Conservative and free scores: samples, densities, dimension, and what a rotation changes"
    source = (
        "gauge freedom (arXiv 2402.03845): conservativity is neither necessary nor sufficient for exact samples and "
        "densities; estimates of local dimension need it"
    )

    def _lengths(self) -> dict[str, tuple[int, ...]]:
        return {"gaussians": (10,), "sphere": (10, 20)} if self.quick else LENGTHS

    def cells(self) -> list[Cell]:
        settings: dict[str, Any] = {"n": 1000, "scored": 2000, "points": 64}
        inner, batch = _MLP, 256
        if self.quick:
            settings, inner, batch = {"n": 4, "scored": 60, "points": 2}, {**_MLP, "width": 16, "depth": 1}, 32
        planted = {"n": 60 if self.quick else 4000, "steps": 10 if self.quick else 200}
        cells = [Cell("planted", None, DATA["gaussians"], {}, planted, "closed forms")]
        for data, lengths in self._lengths().items():
            network = _UNET if data == "digits" else inner
            source: Any = DATA[data] if not self.quick else DataConfig(source=DATA[data], num_points=600)
            own = settings if data != "digits" else {"n": 100, "scored": 800, "points": 16}
            for steps in lengths:
                training = {"training.steps": steps, "training.batch_size": 64 if data == "digits" else batch}
                for kind in ("free", "conservative"):
                    chosen = network if kind == "free" else {"kind": "conservative", "network": network}
                    cells.append(Cell(f"{data}-{kind}-{steps}", "edm", source, {"network": chosen} | training, own))
        cost = {"steps": 2 if self.quick else 40}
        cells.append(Cell("cost", None, "digits", {}, cost, "a training step, in turns on one machine"))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        if trained.cell.name == "planted":
            return planted_rows(trained, settings["n"], settings["steps"])
        if trained.cell.name == "cost":
            return _cost(trained, settings["steps"])
        model, dataset, seed = trained.model, trained.dataset, trained.seed
        images = dataset.spec.kind == "image"
        found = flow_likelihood(model, dataset, n=settings["n"], probes=2 if images else None, seed=seed)
        assert found.error is not None
        values = {"bits": found.bits, "computed_to": found.error}
        score = "fd_clf" if images else "sw2"
        values["score"] = trained.scores(settings["scored"], [score], num_steps=18)[score]
        ratios = [0.1, 0.3, 1.0]
        seen = conservativity(
            model, dataset, n=settings["points"], ratios=ratios, probes=4 if images else None, steps=0, seed=seed
        )
        values["asymmetry"] = max(seen.asymmetry)
        if seen.error is not None and seen.condition is not None:
            values |= {"off": max(seen.error), "condition": max(seen.condition)}
            values["excess"] = found.bits - exact_bits(dataset, settings["n"], seed)
        if images:
            about = dimension(model, dataset, n=48, ratios=[0.05, 0.2, 0.5], estimators=["flipd"], probes=8, seed=seed)
            values["flipd"] = float(about.estimates["flipd"].values[:, 1].mean())
        if trained.cell.name.startswith("sphere"):
            about = dimension(
                model,
                dataset,
                n=settings["points"] // 2,
                ratios=[0.05, 0.1, 0.2],
                estimators=list(ESTIMATORS),
                seed=seed,
            )
            assert about.truth is not None
            for name, estimates in about.estimates.items():
                values[name] = float((estimates.values[:, 1] - about.truth).abs().mean())
        return [Row({}, values)]

    def claims(self) -> list[Claim]:
        def planted(r: Results, metric: str, strength: int, walk: str = "ode") -> Any:
            return r.values("planted", metric, strength=strength, walk=walk)

        def kept(walk: str) -> Claim:
            text = f"a planted rotation of strength 2 leaves the samples as they are ({_WALKS[walk]}): sw2 within 0.05"
            return Claim(
                text, ["planted"], lambda r: same(planted(r, "sw2", 2, walk), planted(r, "sw2", 0, walk), 0.05)
            )

        claims = [
            Claim(
                "the planted field satisfies the gauge condition to 1e-6 of its terms",
                ["planted"],
                lambda r: lower(planted(r, "residual", 2), 1e-6),
            ),
            kept("ode"),
            kept("sde"),
            Claim(
                "and makes the paths of the ODE more than 1.5 times as long",
                ["planted"],
                lambda r: lower(1.5 * planted(r, "length", 0), planted(r, "length", 2)),
            ),
            Claim(
                "Euler's rule in few steps pays for the rotation: sw2 rises",
                ["planted"],
                lambda r: lower(planted(r, "sw2", 0, "euler"), planted(r, "sw2", 2, "euler")),
            ),
        ]

        def cost(r: Results) -> Finding:
            return lower(
                1.4 * r.values("cost", "seconds", kind="free"), r.values("cost", "seconds", kind="conservative")
            )

        claims.append(Claim("a conservative network costs more than 1.4 times as much to train", ["cost"], cost))
        for data, lengths in self._lengths().items():
            last = lengths[-1]
            free, whole = f"{data}-free-{last}", f"{data}-conservative-{last}"
            claims += [
                Claim(
                    f"{data}: free and conservative have the same density, bits within 0.05",
                    [free, whole],
                    lambda r, a=whole, b=free: same(r.values(a, "bits"), r.values(b, "bits"), 0.05),  # type: ignore[misc]
                ),
                Claim.alike(f"{data}: and sample alike, scores within 25 %", whole, free, "score", 0.25),
                *(
                    [Claim.alike("digits: flipd at sigma = 0.2 is alike, within 10 %", whole, free, "flipd", 0.1)]
                    if data == "digits"
                    else []
                ),
                Claim(
                    f"{data}: training alone makes the free network's Jacobian symmetric to 1 %",
                    [free],
                    lambda r, a=free: lower(r.values(a, "asymmetry"), 0.01),  # type: ignore[misc]
                ),
            ]
        if not self.quick:
            claims += self._at_equal_time()
        short, *middle, long = self._lengths()["sphere"]
        claims += [
            Claim.lower(
                f"sphere, {steps} updates: flipd is nearer to the dimension for the conservative network",
                f"sphere-conservative-{steps}",
                f"sphere-free-{steps}",
                "flipd",
            )
            for steps in (short, *middle)
        ]
        for name in ESTIMATORS:
            claims += [
                Claim.lower(
                    f"sphere: {name} is nearer to the dimension for the conservative network",
                    f"sphere-conservative-{long}",
                    f"sphere-free-{long}",
                    name,
                ),
                Claim.lower(
                    f"sphere, free: {name} is nearer after {long} updates than after {short}",
                    f"sphere-free-{long}",
                    f"sphere-free-{short}",
                    name,
                ),
            ]
        return claims

    def _at_equal_time(self) -> list[Claim]:
        """A conservative network after a third of the updates, which take as long."""
        of = {data: (f"{data}-conservative-1600", f"{data}-free-4000") for data in ("gaussians", "sphere")}
        claims = [
            Claim.lower(
                f"{data}: in as much time (1,600 updates against 4,000) the free network has fewer bits",
                free,
                conservative,
                "bits",
            )
            for data, (conservative, free) in of.items()
        ]
        for name in ("flow", "flipd"):
            text = f"sphere: in as much time {name} is nearer to the dimension for the conservative network"
            claims.append(Claim.lower(text, *of["sphere"], name))
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables: dict[str, list[dict[str, str]]] = {}
        for cell in results.rows:
            heading = cell if cell in ("planted", "cost") else cell.split("-")[0]
            for labels, values in results.groups(cell):
                line = {"configuration": cell} if heading != cell else {k: str(v) for k, v in labels.items()}
                tables.setdefault(heading, []).append(
                    line | {name: mean_and_spread(value) for name, value in values.items()}
                )
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, (density, symmetric, about, turned) = panels(2, 2)
        lengths = self._lengths()
        for data, kind in itertools.product(("gaussians", "sphere"), ("free", "conservative")):
            names = [f"{data}-{kind}-{steps}" for steps in lengths[data]]
            if data == "gaussians":
                draw(density, lengths[data], [results.values(name, "excess") for name in names], kind)
            draw(symmetric, lengths[data], [results.values(name, "asymmetry") for name in names], f"{data}, {kind}")
            if data == "sphere":
                for estimator in ("flow", "flipd"):
                    values = [results.values(name, estimator) for name in names]
                    draw(about, lengths[data], values, f"{estimator}, {kind}")
        for walk, text in _WALKS.items():
            values = [results.values("planted", "sw2", strength=w, walk=walk) for w in STRENGTHS]
            draw(turned, STRENGTHS, values, text)
        density.set(title="8 Gaussians: bits over the exact density", xlabel="updates", xscale="log", yscale="log")
        symmetric.set(title="antisymmetric share of the Jacobian", xlabel="updates", xscale="log", yscale="log")
        about.set(title="sphere: error of the dimension", xlabel="updates", xscale="log")
        about.set_yscale("symlog", linthresh=0.01)
        about.set_ylim(bottom=-0.002)
        for panel, data in ((density, "gaussians"), (symmetric, "gaussians"), (about, "sphere")):
            panel.set_xticks(lengths[data], [str(steps) for steps in lengths[data]])
            panel.set_xticks([], minor=True)
        turned.set(title="a planted rotation", xlabel="strength", ylabel="sw2", yscale="log")
        for panel in (density, symmetric, about, turned):
            panel.legend(fontsize=6)
        return {"gauge": figure}


def _cost(trained: Trained, steps: int) -> list[Row]:
    kinds: dict[str, dict[str, Any]] = {
        "free": {"network": _UNET},
        "conservative": {"network": {"kind": "conservative", "network": _UNET}},
    }
    seconds = step_seconds("edm", "digits", trained.dataset, kinds, steps=steps)
    rows = []
    for kind, changes in kinds.items():
        config = recipe("edm", DataConfig(source="digits"), trained.dataset, 0, changes)
        memory = training_memory(built(config), config.training)
        assert memory is not None
        rows.append(Row({"kind": kind}, {"seconds": seconds[kind], "bytes": memory.peak}))
    return rows


def planted_rows(trained: Trained, n: int, steps: int) -> list[Row]:
    """Samples of the exact score of 8 Gaussians with a rotation added, by three walks."""
    dataset, generator = trained.dataset, torch.Generator().manual_seed(trained.seed)
    spec, exact = dataset.spec, oracle_of(dataset)
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    fresh = spec.encode(dataset.train[:n]).double()
    schedule = VarianceExploding()
    true = score_field(exact, schedule)
    rows = []
    for strength in STRENGTHS:
        field = score_field(RotatedDenoiser(exact, strength * skew), schedule)
        start = schedule.sigma_max * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        residual = max(_residual(field, true, fresh[:64], ratio) for ratio in (0.1, 0.5, 2.0)) if strength else 0.0
        for walk in _WALKS:
            count = {"ode": steps, "euler": max(4, steps // 10), "sde": 10 * steps}[walk]
            end, length = _walk(field, start, count, walk, generator)
            values = {"sw2": sliced_wasserstein(end, fresh), "residual": residual}
            if walk != "sde":  # whose paths have no length in the limit
                values["length"] = length
            rows.append(Row({"strength": strength, "walk": walk}, values))
    return rows


def _residual(field: ScoreField, exact: ScoreField, points: Tensor, ratio: float) -> float:
    """Of the gauge condition, of r = field - s at noisy points (`analysis.conservativity`)."""
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(0), dtype=points.dtype)
    y = points + ratio * noise
    own, slope = jacobian(lambda y: field.score(y, ratio), y)
    true, known = jacobian(lambda y: exact.score(y, ratio), y)
    return gauge_residual(own - true, slope - known, true)


def _walk(field: ScoreField, y: Tensor, steps: int, walk: str, generator: torch.Generator) -> tuple[Tensor, float]:
    """From the largest noise to the smallest, evenly in log sigma.

    Returns:
        Samples, and the length of their paths in units of the straight line between the ends, the mean over samples.
    """
    grid = field.ratios(steps + 1).flip(0).tolist()
    first, travelled = y, torch.zeros(len(y), dtype=torch.float64)
    for here, there in itertools.pairwise(grid):
        slope = field.noise(y, here)  # dy / d sigma of the ODE
        if walk == "sde":  # the drift twice, and as much noise as the variance falls by
            moved = y + 2 * (there - here) * slope
            fresh = torch.randn(y.shape, generator=generator, dtype=y.dtype)
            moved = moved + math.sqrt(here**2 - there**2) * fresh
        else:
            moved = y + (there - here) * slope
            if walk == "ode":
                moved = y + (there - here) * (slope + field.noise(moved, there)) / 2
        travelled += (moved - y).norm(dim=1)
        y = moved
    return y, float((travelled / (y - first).norm(dim=1)).mean())

"""`osmose study likelihood`: densities by the ODE against known ones, against the bound, and of other data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from osmose.analysis.flow_likelihood import FlowLikelihood, flow_likelihood
from osmose.analysis.likelihood import likelihood
from osmose.analysis.outliers import Outliers, in_units_of
from osmose.data.dataset import DataConfig, Dataset
from osmose.data.laws import FAMILIES
from osmose.gaussian.density import log_density
from osmose.gaussian.derivatives import signs_like
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.gaussian.schedule import LinearSchedule, VarianceExploding
from osmose.gaussian.score import score_field
from osmose.studies.measures import exact_bits
from osmose.studies.plots import panels
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, lower, mean_and_spread, same

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = {"gaussian": "toy:gaussian:8", "mixture": "toy:8-gaussians"}
#: Images of 14 x 14 with 256 levels.
_SMALL: dict[str, Any] = {"downsample": 2, "levels": 256}
#: Trained on the first, asked about the second.
PAIRS = (("fashion-mnist", "mnist"), ("mnist", "fashion-mnist"))
TOLERANCES = (1e-2, 1e-3, 1e-4)


class LikelihoodStudy(Study):
    """Is the density by the ODE right, is its error estimate, how far is the bound, and does it tell data apart?

    `exact` trains nothing: 256 points of a Gaussian in R^8 and its exact score, on EDM's schedule and on DDPM's linear
    one. `off` is the mean distance from the ODE solved to 1e-8, `told` the mean of the error that the solver tells, in
    bits per dimension, with the evaluations it took; `probes` the error of 4 of Hutchinson's probes and what they tell
    of it.

    `gaussian` (R^8) and `mixture` (8 Gaussians in the plane): EDM, a residual MLP of 3 blocks of 128, 4,000 updates of
    256; `excess` is the mean of -log2 p over that of the exact density of the same held-out points, bits per dimension.

    `digits`: DDPM's UNet of 16 channels, 1,200 updates; the variational bound of 1,000 steps, and the ODE, on the same
    held-out images. `fashion-mnist` and `mnist` (14 x 14, 256 levels): the same with EDM, 800 updates; `auroc` the
    probability that an image of the other data has more bits than one of the run's own, by the ODE.
    """

    title = "Likelihood: the ODE against known densities and the bound, and whether it tells other data apart"
    source = (
        "score SDE (arXiv 2011.13456): densities by the probability-flow ODE; DDPM (arXiv 2006.11239): the bound; "
        "Nalisnick et al. 2018 (arXiv 1810.09136): models of Fashion-MNIST find MNIST more likely than their own data"
    )

    def cells(self) -> list[Cell]:
        mlp: dict[str, Any] = {"network.width": 128, "network.depth": 3, "training.batch_size": 256}
        length, n = {"training.steps": 4000}, 1000
        if self.quick:
            mlp, length, n = mlp | {"network.width": 16, "training.batch_size": 32}, {"training.steps": 20}, 12
        cells = [Cell("exact", None, "toy:gaussian:8", {}, {"n": 16 if self.quick else 256}, "closed forms")]
        for name, data in _POINTS.items():
            source = DataConfig(source=data, num_points=600) if self.quick else data
            cells.append(Cell(name, "edm", source, mlp | length, {"n": n}))
        unet: dict[str, Any] = {"network.channels": 16, "training.batch_size": 64, "training.steps": 1200}
        settings: dict[str, Any] = {"n": 60, "probes": 2, "steps": None}
        if self.quick:
            unet = unet | {"network.channels": 8, "training.steps": 4}
            settings = {"n": 2, "probes": 1, "steps": 20}
        cells.append(Cell("digits", "ddpm", "digits", unet, settings, "the bound and the ODE"))
        if not self.quick:
            for own, other in PAIRS:
                asked = {"n": 100, "probes": 2, "against": other}
                shorter = unet | {"training.steps": 800}
                cells.append(Cell(own, "edm", DataConfig(source=own, **_SMALL), shorter, asked, f"against {other}"))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        name, settings = trained.cell.name, trained.cell.settings
        if name == "exact":
            return exact_rows(settings["n"], trained.seed)
        own = self._flow(trained, trained.dataset)
        values = {"bits": own.bits, "spread": own.standard_error, "evaluations": float(own.evaluations.double().mean())}
        if own.error is not None:
            values["told"] = own.error
        if name in _POINTS:
            values["excess"] = own.bits - exact_bits(trained.dataset, settings["n"], trained.seed)
        if name == "digits":
            bound = likelihood(
                trained.model, trained.dataset, n=settings["n"], num_steps=settings["steps"], seed=trained.seed
            )
            values["bound"] = bound.bits
        if "against" in settings:
            assert trained.data is not None
            read = trained.data.replace(source=settings["against"], root=trained.data.root and str(trained.data.root))
            other = self._flow(trained, in_units_of(read.load(), trained.dataset.spec))
            values |= {
                "other_bits": other.bits,
                "auroc": Outliers(own.per_item, other.per_item, settings["against"], "held-out").auroc,
            }
        return [Row({}, values)]

    def _flow(self, trained: Trained, dataset: Dataset) -> FlowLikelihood:
        settings = trained.cell.settings
        return flow_likelihood(
            trained.model,
            dataset,
            n=settings["n"],
            probes=settings.get("probes"),
            seed=trained.seed,
        )

    def claims(self) -> list[Claim]:
        def told(r: Results, schedule: str, tolerance: float) -> Finding:
            off, said = (
                r.values("exact", name, schedule=schedule, tolerance=f"{tolerance:g}") for name in ("off", "told")
            )
            return lower(off, said)

        claims = [
            Claim(
                f"the exact score on {schedule}, tolerance {tolerance:g}: the error is below what the solver tells",
                ["exact"],
                lambda r, s=schedule, t=tolerance: told(r, s, t),  # type: ignore[misc]
            )
            for schedule in ("ve", "linear")
            for tolerance in TOLERANCES
        ]
        claims += [
            Claim(
                f"{name}: the density of a trained model is within 0.05 bits per dimension of the exact one",
                [name],
                lambda r, name=name: same(r.values(name, "excess"), 0.0, 0.05),  # type: ignore[misc]
            )
            for name in _POINTS
        ]
        claims.append(
            Claim(
                "digits: the ODE's bits are below the bound's",
                ["digits"],
                lambda r: lower(r.values("digits", "bits"), r.values("digits", "bound")),
            )
        )
        if self.quick:
            return claims
        claims += [
            Claim(
                "a model of Fashion-MNIST finds MNIST more likely than its own data: AUROC below 0.5",
                ["fashion-mnist"],
                lambda r: lower(r.values("fashion-mnist", "auroc"), 0.5),
            ),
            Claim(
                "a model of MNIST tells Fashion-MNIST apart: AUROC above 0.9",
                ["mnist"],
                lambda r: lower(0.9, r.values("mnist", "auroc")),
            ),
        ]
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        exact = [
            {name: str(label) for name, label in labels.items()}
            | {name: mean_and_spread(values) for name, values in metrics.items()}
            for labels, metrics in results.groups("exact")
        ]
        names = [cell for cell in results.rows if cell != "exact"]
        found = {cell: results.groups(cell)[0][1] for cell in names}
        columns = list(dict.fromkeys(name for values in found.values() for name in values))
        rows = [
            {"data": cell}
            | {
                name.replace("_", " "): mean_and_spread(found[cell][name]) if name in found[cell] else ""
                for name in columns
            }
            for cell in names
        ]
        return {"The exact score of a Gaussian": exact, "Trained models, bits per dimension": rows}

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, (exact, data) = panels(2)
        for schedule, colour in (("ve", "C0"), ("linear", "C1")):
            off, said = (
                [results.values("exact", name, schedule=schedule, tolerance=f"{t:g}").mean() for t in TOLERANCES]
                for name in ("off", "told")
            )
            exact.loglog(TOLERANCES, off, "o-", color=colour, label=f"{schedule}: error")
            exact.loglog(TOLERANCES, said, "o--", color=colour, label=f"{schedule}: told")
        exact.set(title="the exact score of a Gaussian", xlabel="tolerance", ylabel="bits per dimension")
        exact.legend(fontsize=7)
        names = [cell for cell in results.rows if cell != "exact"]
        for place, name in enumerate(names):
            values = results.groups(name)[0][1]
            for key, colour, text in (
                ("bits", "C0", "ODE"),
                ("bound", "C1", "bound"),
                ("other_bits", "C3", "ODE, the other data"),
            ):
                if key in values:
                    data.plot([place] * len(values[key]), values[key], "o", color=colour, label=text)
        handles = {str(line.get_label()): line for line in data.lines}
        data.legend(list(handles.values()), list(handles), fontsize=7)
        data.set(title="bits per dimension", xticks=range(len(names)), ylabel="lower is better")
        data.set_xticklabels(names, fontsize=7)
        return {"likelihood": figure}


def exact_rows(n: int, seed: int) -> list[Row]:
    """Errors of the solver and of Hutchinson's traces on the exact score of a Gaussian in R^8."""
    generator = torch.Generator().manual_seed(seed)
    law = FAMILIES["gaussian"].law(8)
    covariance, unit = torch.from_numpy(law.covariance), 1 / (8 * math.log(2))
    y = torch.randn(n, 8, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    rows = []
    for schedule in (VarianceExploding(), LinearSchedule()):
        field = score_field(GaussianDenoiser(torch.zeros(8, dtype=torch.float64), covariance), schedule)
        fine = log_density(field, y, tolerance=1e-8)
        for tolerance in TOLERANCES:
            found = log_density(field, y, tolerance=tolerance)
            values = {
                "off": float((found.log_p - fine.log_p).abs().mean()) * unit,
                "told": float(found.solver_error.mean()) * unit,
                "evaluations": float(found.evaluations.double().mean()),
            }
            rows.append(Row({"schedule": schedule.kind, "tolerance": f"{tolerance:g}"}, values))
        probed = log_density(field, y, signs=signs_like(y, 4, generator), tolerance=1e-4)
        values = {
            "off": float((probed.log_p - fine.log_p).square().mean().sqrt()) * unit,
            "told": float(probed.probe_error.square().mean().sqrt()) * unit,
            "evaluations": float(probed.evaluations.double().mean()),
        }
        rows.append(Row({"schedule": schedule.kind, "tolerance": "4 probes"}, values))
    return rows

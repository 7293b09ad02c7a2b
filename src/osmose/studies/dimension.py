"""`osmose study dimension`: what estimates of local dimension say where the dimension is known, and of images."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from osmose.analysis.dimension import Estimates, Problem, estimate
from osmose.analysis.dimension_report import Dimension as Found
from osmose.analysis.dimension_report import dimension
from osmose.data.dataset import DataConfig
from osmose.gaussian.oracles import GaussianDenoiser, RotatedDenoiser, SphereDenoiser
from osmose.gaussian.schedule import VarianceExploding
from osmose.gaussian.score import score_field
from osmose.studies.plots import panels
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, all_of, lower, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Laws of known dimension, by the name of their cells.
LAWS = {
    "plane3": "toy:plane:3:10",
    "sphere2": "toy:sphere:2:10",
    "torus2": "toy:torus:2:10",
    "sphere5": "toy:sphere:5:20",
    "strata": "toy:strata:10",
}
#: Training lengths of sphere2; the others have the last.
LENGTHS = (250, 1000, 4000)
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.5)
ON_POINTS = ("flipd", "normal-bundle", "rank", "flow", "lidl", "kde", "lpca", "mle")
#: Ratio at which estimators are compared: the noise is small beside the data, and nets are trained there.
_AT = 0.1
_EXACT_RATIOS = (0.01, 0.1, 0.3)


class DimensionStudy(Study):
    """How near are estimates of local dimension to the truth, and what do they depend on?

    Points of `plane3`, `sphere2`, `torus2` lie in R^10, `sphere5` in R^20, `strata` are cubes of 1, 2 and 4 dimensions
    in R^10. EDM, a residual MLP of 3 blocks of 128, 4,000 updates of 256 points; `sphere2` also after 250 and 1,000.
    Estimates are made at held-out points, at five noise-to-signal ratios; `error` is the mean of their distance from
    the dimension at the point. `kde`, `lpca` and `mle` see the training points and no model.

    Images: the digits (64 values) and Fashion-MNIST averaged to 14 x 14 (196 values, 8 Hutchinson probes), a UNet of 16
    channels. Their dimension is not known; `spearman` is the rank correlation of flipd with the length of the image
    compressed by zlib. The flow is left out: it takes 8 CPU seconds for each of the digits.

    `exact` trains nothing: estimators on the exact score of a sphere in R^10, and of a 3-dimensional Gaussian in R^10
    to which a gauge field of strength w is added, which changes no sample.
    """

    title = "Local dimension: estimates against the truth, over noise and training time"
    source = (
        "normal bundle (arXiv 2212.12611), FLIPD (arXiv 2406.03537), flow singular values (arXiv 2402.03845), LIDL "
        "(arXiv 2206.14882); published: model-based estimates beat those of neighbours; FLIPD of UNets tells relative "
        "complexity, no dimension"
    )

    def _laws(self) -> dict[str, str]:
        return {"sphere2": LAWS["sphere2"]} if self.quick else LAWS

    def _images(self) -> dict[str, str | DataConfig]:
        if self.quick:
            return {}
        return {"digits": "digits", "fashion": DataConfig(source="fashion-mnist", downsample=2)}

    def cells(self) -> list[Cell]:
        points: dict[str, Any] = {"network.width": 128, "network.depth": 3, "training.batch_size": 256}
        settings: dict[str, Any] = {"n": 32, "ratios": list(RATIOS), "estimators": list(ON_POINTS)}
        lengths: tuple[int, ...] = LENGTHS
        if self.quick:
            points = {"network.width": 32, "network.depth": 1, "training.batch_size": 64}
            settings = {"n": 4, "ratios": [0.1, 0.5], "estimators": ["flipd", "rank", "flow", "kde"]}
            lengths = (20, 60)
        cells = [Cell("exact", None, "digits", {}, {"n": 4 if self.quick else 64}, "closed forms")]
        for name, data in self._laws().items():
            for steps in lengths if name == "sphere2" else lengths[-1:]:
                source = DataConfig(source=data, num_points=600) if self.quick else data
                cells.append(Cell(f"{name}-{steps}", "edm", source, points | {"training.steps": steps}, settings))
        images = {"n": 96, "ratios": list(RATIOS), "estimators": ["flipd"]}
        for name, source in self._images().items():
            changes = {"network.channels": 16, "training.batch_size": 64, "training.steps": 1000}
            own = images | ({"estimators": ["flipd", "rank", "normal-bundle"]} if name == "digits" else {"probes": 8})
            cells.append(Cell(name, "edm", source, changes, own, "images"))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        if trained.cell.method is None:
            return exact_rows(settings["n"], trained.seed)
        found = dimension(
            trained.model,
            trained.dataset,
            n=settings["n"],
            ratios=settings["ratios"],
            estimators=settings["estimators"],
            probes=settings.get("probes"),
            seed=trained.seed,
        )
        rows = rows_of(found)
        if trained.dataset.spec.kind == "image":
            sizes = torch.tensor([float(len(zlib.compress(bytes_of(image), 9))) for image in found.points])
            for place, ratio in enumerate(settings["ratios"]):
                value = spearman(found.estimates["flipd"].values[:, place], sizes)
                rows.append(Row({"estimator": "against zlib", "ratio": f"{ratio:g}"}, {"spearman": value}))
        return rows

    def claims(self) -> list[Claim]:
        first, last = (20, 60) if self.quick else (LENGTHS[0], LENGTHS[-1])

        def error(r: Results, cell: str, name: str, ratio: float = _AT) -> Any:
            label = "" if name in ("lpca", "mle") else f"{ratio:g}"
            return r.values(cell, "error", estimator=name, ratio=label)

        def sphere(r: Results) -> Finding:
            names = ("flipd", "normal-bundle", "rank", "flow")
            errors = (r.values("exact", "error", field="sphere", estimator=name, ratio="0.1") for name in names)
            return all_of(*(lower(values, 0.05) for values in errors))

        def moved(r: Results, name: str) -> Any:
            clean, turned = (
                r.values("exact", "mean", field=f"gauge {weight}", estimator=name, ratio="0.3") for weight in (0, 5)
            )
            return abs(turned - clean)

        claims = [
            Claim(
                "exact score of a sphere: flipd, normal-bundle, rank, flow are right to 0.05 at sigma / alpha = 0.1",
                ["exact"],
                sphere,
            ),
            Claim(
                "a gauge field of strength 5 moves flipd by more than 1 at sigma / alpha = 0.3",
                ["exact"],
                lambda r: lower(1.0, moved(r, "flipd")),
            ),
            Claim("and the estimate of the flow by less than 0.05", ["exact"], lambda r: lower(moved(r, "flow"), 0.05)),
            Claim(
                f"sphere2: flipd is nearer to the truth after {last} updates than after {first}",
                [f"sphere2-{last}", f"sphere2-{first}"],
                lambda r: lower(error(r, f"sphere2-{last}", "flipd"), error(r, f"sphere2-{first}", "flipd")),
            ),
        ]
        if self.quick:
            return claims
        for law in LAWS:
            cell = f"{law}-{last}"
            for name in ("flow", "normal-bundle", "rank", "flipd"):
                claims.append(
                    Claim(
                        f"{law}: {name} is within 0.25 of the truth at sigma / alpha = {_AT}",
                        [cell],
                        lambda r, cell=cell, name=name: lower(error(r, cell, name), 0.25),  # type: ignore[misc]
                    )
                )
            for name, other in (("flow", "flipd"), ("flow", "mle"), ("flow", "lpca"), ("flipd", "mle")):
                claims.append(
                    Claim(
                        f"{law}: {name} is nearer to the truth than {other}",
                        [cell],
                        lambda r, cell=cell, a=name, b=other: lower(error(r, cell, a), error(r, cell, b)),  # type: ignore[misc]
                    )
                )
        for name in self._images():
            claims += [
                Claim(
                    f"{name}: flipd is no number: at sigma / alpha = 0.05 it is more than 1.5 times what it is at 0.2",
                    [name],
                    lambda r, name=name: lower(  # type: ignore[misc]
                        1.5 * r.values(name, "mean", estimator="flipd", ratio="0.2"),
                        r.values(name, "mean", estimator="flipd", ratio="0.05"),
                    ),
                ),
                Claim(
                    f"{name}: flipd ranks images by complexity: Spearman's correlation with their compressed size is "
                    "above 0.3 at 0.2",
                    [name],
                    lambda r, name=name: lower(  # type: ignore[misc]
                        0.3, r.values(name, "spearman", estimator="against zlib", ratio="0.2")
                    ),
                ),
            ]
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables = {}
        for cell in results.rows:
            lines: dict[str, dict[str, str]] = {}
            for labels, values in results.groups(cell):
                name = f"{labels['field']}, {labels['estimator']}" if cell == "exact" else str(labels["estimator"])
                line = lines.setdefault(name, {"estimator": name})
                shown = mean_and_spread(values["spearman" if "spearman" in values else "mean"])
                if "error" in values:
                    shown += f" (off {values['error'].mean():.2f})"
                line[str(labels["ratio"]) or "neighbours"] = shown
            columns = list(dict.fromkeys(name for line in lines.values() for name in line))
            tables[cell] = [{name: line.get(name, "") for name in columns} for line in lines.values()]
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        cells = [cell for cell in results.rows if cell != "exact"]
        columns = min(3, len(cells))
        rows = -(-len(cells) // columns)
        figure, axes = panels(columns, rows)
        for panel in axes[len(cells) :]:
            panel.set_visible(False)
        for panel, cell in zip(axes, cells, strict=False):
            _panel(panel, cell, results)
        return {"dimension": figure}


def _panel(panel: Any, cell: str, results: Results) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for labels, values in results.groups(cell):
        if "mean" not in values:
            continue
        name, mean = str(labels["estimator"]), float(values["mean"].mean())
        if labels["ratio"] == "":
            panel.axhline(mean, linestyle="-." if name == "mle" else ":", linewidth=1.2, color="0.5", label=name)
            continue
        curves.setdefault(name, []).append((float(labels["ratio"]), mean))
    for name, curve in curves.items():
        x, y = zip(*curve, strict=True)
        panel.plot(x, y, "o-", markersize=3, linewidth=1.2, label=name)
    known = [values["truth"].mean() for _, values in results.groups(cell) if "truth" in values]
    if known:
        panel.axhline(known[0], color="k", linestyle="--", linewidth=1, label="truth")
        panel.set_ylim(0, 2.5 * known[0])
    panel.set(title=cell, xscale="log", xlabel="sigma / alpha", ylabel="mean over points")
    panel.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    panel.set_xticks([], minor=True)
    panel.legend(fontsize=6)


def rows_of(found: Found) -> list[Row]:
    """A row for each estimator and ratio: mean, and where the truth is known it and the mean error."""
    rows = []
    for name, estimates in found.estimates.items():
        labels = [f"{ratio:g}" for ratio in found.ratios.tolist()] if estimates.by_ratio else [""]
        for label, column in zip(labels, estimates.values.T, strict=True):
            values = {"mean": float(column.mean())}
            if found.truth is not None:
                values |= {"error": float((column - found.truth).abs().mean()), "truth": float(found.truth.mean())}
            rows.append(Row({"estimator": name, "ratio": label}, values))
    return rows


def bytes_of(image: Tensor) -> bytes:
    """An image as 8-bit values."""
    low, high = float(image.min()), float(image.max())
    return ((image.float() - low) * (255 / max(high - low, 1e-9))).byte().contiguous().numpy().tobytes()


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; of equal values each has the mean of their ranks. 0 where all are equal."""

    def ranks(values: Tensor) -> Tensor:
        below, equal = values[:, None] > values, values[:, None] == values
        return below.sum(1).double() + equal.sum(1).double() / 2

    both = torch.stack([ranks(a), ranks(b)])
    return float(torch.corrcoef(both)[0, 1]) if float(both.std(1).min()) else 0.0


def exact_rows(n: int, seed: int) -> list[Row]:
    """What estimators say of fields in closed form in R^10: a sphere, a Gaussian of 3 dimensions with a gauge field."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    axes = torch.linalg.qr(draw(10, 10))[0]
    u = draw(n, 3)
    sphere = u / u.norm(dim=1, keepdim=True) @ axes[:, :3].T
    variances = torch.tensor([1.0, 0.5, 2.0] + [0.0] * 7, dtype=torch.float64)
    plane = draw(n, 10) * variances.sqrt() @ axes.T
    skew = draw(10, 10)
    skew = (skew - skew.T) / math.sqrt(20)  # as strong as w s in the mean
    gaussian = GaussianDenoiser(torch.zeros(10, dtype=torch.float64), axes @ torch.diag(variances) @ axes.T)
    fields: dict[str, tuple[Any, Tensor, int]] = {"sphere": (SphereDenoiser(axes[:, :3]), sphere, 2)}
    fields |= {f"gauge {weight}": (RotatedDenoiser(gaussian, weight * skew), plane, 3) for weight in (0, 1, 5)}
    ratios = torch.tensor(_EXACT_RATIOS, dtype=torch.float64)
    rows = []
    for name, (denoiser, points, truth) in fields.items():
        problem = Problem(score_field(denoiser, VarianceExploding()), points, points, ratios, None, seed)
        for kind in ("flipd", "normal-bundle", "rank", "flow"):
            few = Problem(problem.field, points[:4], points, ratios, None, seed) if kind == "flow" else problem
            found: Estimates = estimate(kind, few, lambda *_: None)
            for ratio, column in zip(_EXACT_RATIOS, found.values.T, strict=True):
                values = {"mean": float(column.mean()), "error": float((column - truth).abs().mean())}
                rows.append(Row({"field": name, "estimator": kind, "ratio": f"{ratio:g}"}, values))
    return rows

"""Study `functional`: parameters against score, other resolutions from the same weights, and noise that has a limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from osmose.data.dataset import DataConfig, Dataset
from osmose.methods.functional import Functional
from osmose.metrics.evaluate import score_samples
from osmose.processes.modes import ConstDrift, ModeProcess, VPSpeed
from osmose.processes.spectrum import Harmonics, PowerSpectrum, PublishedSpectrum, WhiteSpectrum
from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import lower, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IMPLICIT = {"network": "implicit", "training.batch_size": 24, "training.lr": 1e-3}
#: Networks on the digits: what is changed of the recipe, and what it is.
NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "unet-16": ({"network.channels": 16}, "UNet of 16 channels"),
    "unet-8": ({"network.channels": 8}, "UNet of 8 channels"),
    "uvit": ({"network": "uvit", "network.width": 48, "training.lr": 1e-3}, "transformer of width 48"),
    "implicit-64": (_IMPLICIT | {"network.width": 64, "network.depth": 4}, "coordinate MLP, 4 layers of 64"),
    "implicit-32": (_IMPLICIT | {"network.width": 32, "network.depth": 3}, "coordinate MLP, 3 layers of 32"),
}
TIMES = (0.1, 0.3, 0.5)
#: Spectra whose noise is compared as the grid becomes finer; all with a rate of 1.
SPECTRA = {
    "white": WhiteSpectrum(),
    "published": PublishedSpectrum(),
    "power 1.25": PowerSpectrum(exponent=1.25),
    "power 2": PowerSpectrum(exponent=2.0),
}
SIDES = (8, 16, 32, 64, 128)


class FunctionalStudy(Study):
    """Functional diffusion: what a small network is worth, what a finer grid shows, what noise does as it is refined.

    `digits-*`: fdp on the digits, every network for as many updates: 1,000 of 64 items, coordinate MLPs (3 inner steps
    each, all weights adapted, rates learned) of 24. `score` is fd_clf of 500 samples in 50 steps; `error` the mean
    squared error of E[x_0 | x_t] on held-out digits at three times, in units of the model, beside that of the best
    linear filter. The coordinate MLPs never see their input: all they know of it comes through their inner steps.

    `fashion-*`: trained on Fashion-MNIST at 14x14 (averages of 2x2 pixels), 600 updates of 32: a transformer (uvit),
    the same read as x0, a UNet. Their scores are fd_clf at 28x28 against the real images: drawn on that grid, where the
    network can, and samples at 14x14 enlarged by straight lines or by cosines; `real` are real images brought to 14x14
    and enlarged by straight lines. Read as `filter`, a network adds nothing beyond the frequencies of its data, and
    what is drawn at 28x28 is as smooth as what cosines make of it; read as `x0` it is what the network says.

    `noise` trains nothing: noise on grids of 8 to 128 points a side (cosines on two axes, rate 1, beta of VP from 0.1
    to 20). `low` is the variance that it has in the modes of the grid of 8x8, `trace` the sum of all variances, and
    `kl` the divergence in nats of what is left of data at t = 1 from what samples begin with, for Gaussian data with
    variances (1 + |k|^2)^-2 of their modes.
    """

    title = "Diffusion of functions: parameters against score, other resolutions, and noise that has a limit"
    source = (
        "Continuous-Time Functional Diffusion Processes (arXiv 2303.00800): an MLP of 0.1 million parameters against "
        "networks of tens of millions; super-resolution from the same weights; trace-class noise"
    )

    @property
    def networks(self) -> tuple[str, ...]:
        """On the digits."""
        return ("unet-8", "implicit-32") if self.quick else tuple(NETWORKS)

    @property
    def sides(self) -> tuple[int, ...]:
        """Points a side of the grids that noise is looked at on."""
        return SIDES[:3] if self.quick else SIDES

    def cells(self) -> list[Cell]:
        steps = {"training.steps": 6, "training.batch_size": 8} if self.quick else {"training.steps": 1000}
        settings: dict[str, Any] = {"n": 500, "items": 180, "steps": 50}
        if self.quick:
            settings = {"n": 80, "items": 40, "steps": 4}
        cells = [Cell("noise", None, "digits", {}, {"sides": self.sides}, "closed forms")]
        for name in self.networks:
            changes, note = NETWORKS[name]
            cells.append(Cell(f"digits-{name}", "fdp", "digits", changes | steps, settings, note))
        if not self.quick:
            small = DataConfig.parse({"source": "fashion-mnist", "downsample": 2})
            settings = {"n": 400, "steps": 50}
            training = {"training.steps": 600, "training.batch_size": 32}
            uvit = {"network": "uvit", "network.width": 64, "training.lr": 1e-3}
            cells.append(Cell("fashion-uvit", "fdp", small, uvit | training, settings, "transformer of width 64"))
            raw = uvit | {"parametrization": "x0", "weighting": "posterior"}
            cells.append(Cell("fashion-uvit-x0", "fdp", small, raw | training, settings, "the same, read as x0"))
            unet = {"network.channels": 16}
            cells.append(Cell("fashion-unet", "fdp", small, unet | training, settings, "UNet of 16 channels"))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        if trained.cell.method is None:
            return noise_rows(settings["sides"])
        model = trained.model
        assert isinstance(model, Functional)
        parameters = float(sum(p.numel() for p in model.networks()[0].parameters()))
        if trained.cell.name.startswith("fashion"):
            fine = fine_scores(trained)
            return [Row({"what": kind}, {"score": score, "parameters": parameters}) for kind, score in fine.items()]
        made = model.sample(settings["n"], seed=trained.seed, num_steps=settings["steps"])
        (found,) = score_samples(made.data, trained.dataset, metrics=["fd_clf"], seed=trained.seed)
        assert found.floor is not None
        values = {"score": found.value, "score_real": found.floor, "parameters": parameters, "seconds": made.seconds}
        return [Row({"what": "samples"}, values), *error_rows(model, trained.dataset, settings["items"], trained.seed)]

    def claims(self) -> list[Claim]:
        claims = []
        side, first = self.sides[-1], self.sides[0]

        def growth(name: str, metric: str) -> Any:
            def ratio(r: Results) -> Any:
                at = [r.values("noise", metric, spectrum=name, side=n) for n in (side, first)]
                return at[0] / at[1]

            return ratio

        text = (
            f"white noise has no limit: it leaves coarse modes from {first} to {side} points a side (ratio below 0.1)"
        )
        claims.append(Claim(text, ["noise"], lambda r: lower(growth("white", "low")(r), 0.1)))
        text = f"noise of a power law has one: coarse modes keep their variance to 10 % from {first} to {side} points"
        claims.append(Claim(text, ["noise"], lambda r: lower(abs(growth("power 2", "low")(r) - 1), 0.1)))
        if self.quick:
            return claims
        for small, large in (("implicit-64", "unet-16"), ("implicit-32", "unet-8"), ("uvit", "unet-16")):
            text = f"digits: {small} scores better than {large}"
            claims.append(Claim.lower(text, f"digits-{small}", f"digits-{large}", "score", what="samples"))
        for small in ("implicit-64", "implicit-32"):
            for t in TIMES:
                cell = f"digits-{small}"

                def check(r: Results, cell: str = cell, t: float = t) -> Any:
                    return lower(r.values(cell, "error", t=t), r.values(cell, "linear", t=t))

                text = f"digits: {small} denoises better than the best linear filter, t = {t}"
                claims.append(Claim(text, [cell], check))
        for cell, how in (("fashion-uvit", "filter"), ("fashion-uvit-x0", "x0")):
            for way in ("by straight lines", "by cosines"):
                text = f"Fashion-MNIST ({how}): samples drawn at 28x28 score better than at 14x14 and enlarged {way}"

                def finer(r: Results, cell: str = cell, way: str = way) -> Any:
                    drawn = r.values(cell, "score", what="drawn at 28")
                    return lower(drawn, r.values(cell, "score", what=f"enlarged {way}"))

                claims.append(Claim(text, [cell], finer))
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        rows = []
        for name in self.networks:
            cell = f"digits-{name}"
            row = {
                "network": name,
                "parameters": f"{results.values(cell, 'parameters', what='samples').mean():,.0f}",
                "fd_clf": mean_and_spread(results.values(cell, "score", what="samples")),
                "real data": mean_and_spread(results.values(cell, "score_real", what="samples")),
            }
            for t in TIMES:
                row[f"error, t = {t}"] = mean_and_spread(results.values(cell, "error", t=t))
            rows.append(row)
        linear = {f"error, t = {t}": mean_and_spread(results.values(cell, "linear", t=t)) for t in TIMES}
        rows.append({"network": "linear filter", "parameters": "", "fd_clf": "", "real data": ""} | linear)
        tables = {"Digits": rows}
        fine = [name for name in results.rows if name.startswith("fashion")]
        if fine:
            tables["Fashion-MNIST, trained at 14x14: fd_clf at 28x28"] = [
                {"network": cell.removeprefix("fashion-"), "samples": str(labels["what"])}
                | {"fd_clf": mean_and_spread(values["score"]), "parameters": f"{values['parameters'].mean():,.0f}"}
                for cell in fine
                for labels, values in results.groups(cell)
            ]
        shown = {"low": "variance in the modes of 8x8", "kl": "divergence at t = 1, nats", "trace": "sum of variances"}
        for metric, what in shown.items():
            rows = []
            for name in SPECTRA:
                values = {n: results.values("noise", metric, spectrum=name, side=n).mean() for n in self.sides}
                rows.append({"spectrum": name} | {f"{n}x{n}": f"{value:.4g}" for n, value in values.items()})
            tables[f"Noise on finer grids: {what}"] = rows
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        noise, (low, kl) = panels(2)
        titles = {"low": "variance in the coarse modes", "kl": "divergence at t = 1, nats"}
        for panel, (metric, title) in zip((low, kl), titles.items(), strict=True):
            for name in SPECTRA:
                values = [results.values("noise", metric, spectrum=name, side=n) for n in self.sides]
                draw(panel, self.sides, values, name)
            panel.set(title=title, xlabel="points a side", xscale="log", yscale="log")
            panel.set(xticks=self.sides, xticklabels=map(str, self.sides))
            panel.minorticks_off()
        low.legend(fontsize=7)
        scores, (panel,) = panels(1)
        for name in self.networks:
            cell = f"digits-{name}"
            parameters = results.values(cell, "parameters", what="samples").mean()
            draw(panel, [parameters], [results.values(cell, "score", what="samples")], name)
        real(panel, float(results.values(cell, "score_real", what="samples").mean()))
        panel.set(title="digits", xlabel="parameters", ylabel="fd_clf", xscale="log")
        log_scale(panel)
        panel.legend(fontsize=7)
        return {"noise": noise, "parameters": scores}


def noise_rows(sides: tuple[int, ...]) -> list[Row]:
    """What noise of every spectrum is on grids of so many points a side."""
    rows = []
    for name, spectrum in SPECTRA.items():
        for side in sides:
            harmonics = Harmonics("dct", (side, side))
            process = ModeProcess.of(spectrum, ConstDrift(), VPSpeed(), harmonics)
            data = (1 + harmonics.squared) ** -2.0
            first = sides[0]
            values = {
                "low": float(process.state[:first, :first].sum()),
                "trace": float(process.state.sum()),
                "kl": process.prior_kl(data),
            }
            rows.append(Row({"spectrum": name, "side": side}, values))
    return rows


def error_rows(model: Functional, dataset: Dataset, items: int, seed: int) -> list[Row]:
    """The error of E[x_0 | x_t] on held-out items, mean over points, beside that of the best linear filter."""
    field = model.fields.on(model.grid)
    x0 = dataset.spec.encode(dataset.held_out[:items]).to(model.device)
    c0 = field.harmonics.modes(x0)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for t in TIMES:
        eps = torch.randn(c0.shape, generator=generator).to(c0)
        c = field.process.diffuse(c0, 0.0, t, eps)
        with torch.no_grad():
            found = model.estimate(c, torch.full((items,), t, dtype=torch.float64))
        error = (found - x0).square().mean()
        mean, spread = model.mean.cpu().double(), model.spread.cpu().double()
        gain = field.process.filter(t, spread)
        linear = mean + gain * (c.cpu().double() - field.process.kept(t) * mean)
        best = (linear - c0.cpu().double()).square().sum((1, 2, 3)).mean() / dataset.spec.shape[0]
        rows.append(Row({"t": t}, {"error": float(error), "linear": float(best)}))
    return rows


def fine_scores(trained: Trained) -> dict[str, float]:
    """fd_clf at twice the resolution of training: drawn there, where the network can, and enlarged."""
    assert trained.data is not None
    root = None if trained.data.root is None else str(trained.data.root)
    whole: Dataset = trained.data.replace(downsample=None, root=root).load()
    settings, model = trained.cell.settings, trained.model
    count, side = settings["n"], whole.spec.shape[1]

    def score(x: Tensor) -> float:
        (found,) = score_samples(whole.spec.decode(whole.spec.encode(x)), whole, metrics=["fd_clf"], seed=trained.seed)
        return found.value

    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(x.float(), size=(side, side), mode="bilinear", align_corners=False)

    def by_cosines(x: Tensor) -> Tensor:
        own, finer = Harmonics("dct", tuple(x.shape[2:])), Harmonics("dct", (side, side))
        return finer.values(own.onto(own.modes(x.float()), finer.grid))

    coarse = model.sample(count, seed=trained.seed, num_steps=settings["steps"]).data
    found = {
        "enlarged by straight lines": score(enlarged(coarse)),
        "enlarged by cosines": score(by_cosines(coarse)),
        "real, enlarged by straight lines": score(enlarged(trained.dataset.held_out[:count])),
    }
    if "uvit" in trained.cell.name:
        fine = model.sample(count, seed=trained.seed, num_steps=settings["steps"], resolution=side).data
        found["drawn at 28"] = score(fine)
    return found

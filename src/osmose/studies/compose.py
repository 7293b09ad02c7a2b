"""Study `compose`: two accelerations at once: do speeds multiply, and what does quality lose?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.acceleration.quantization import quantize
from osmose.acceleration.surrogate import Pair
from osmose.methods.base import GenerativeModel
from osmose.metrics.evaluate import score_samples
from osmose.studies.measures import by_openvino, sample_milliseconds
from osmose.studies.plots import log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import lower, mean_and_spread, same
from osmose.training.run import Run
from osmose.training.runtime import Runtime

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is put together: the first, the second, and what they accelerate.
COMPOSED = {
    "tract": ("one step (TRACT)", "int8 in OpenVINO", "EDM, DPM-Solver++, 20 steps, torch"),
    "surrogate": ("VAE before the chain, t_mid = 0.5", "int8 in OpenVINO", "EDM, DPM-Solver++, 20 steps, torch"),
    "blocks": ("three blocks of four layers", "DPM-Solver++, 10 steps", "DiT of 12 layers, DDIM, 50 steps"),
}
WHICH = ("neither", "first", "second", "both")


class Compose(Study):
    """Digits. Each pair of accelerations is measured without, with either, and with both, in turns in one process.

    `ms` is the time of a sample where 64 are drawn at once, the median of 7; networks of 8-bit integers (7-bit weights
    where the processor has no VNNI) are computed by OpenVINO, all others by torch: a part of the factor of int8 is that
    of OpenVINO, which is measured alone besides. `score` is fd_clf of 800 samples.
    `factor` is how many times as fast, `lost` what the score is higher by, against neither.

    The run is EDM with the default UNet, 1,500 updates; its student has one phase from 32 steps to one, 1,000 updates;
    the VAE has its own recipe. The DiT has 12 layers of 48, whole and in three blocks of four, 800 updates each.
    """

    title = "Accelerations put together: speeds multiply, and what becomes of quality?"
    source = "no paper: what a user would do"

    def cells(self) -> list[Cell]:
        training: dict[str, Any] = {"training.steps": 1500}
        sampling = {"sampling.num_steps": self._chain, "sampling.solver": "dpmpp-2m"}
        dit: dict[str, Any] = {"network": "dit", "network.width": 48, "network.depth": 12}
        dit |= {"training.steps": 800, "training.batch_size": 64}
        vae: dict[str, Any] = {}
        student: dict[str, Any] = {"schedule": [32, 1], "steps": 1000}
        settings = {"n": 800, "items": 64, "rounds": 7}
        if self.quick:
            training = {"training.steps": 4, "training.batch_size": 8, "network.channels": 8}
            dit |= {"network.width": 16, "network.depth": 3, "training.steps": 4, "training.batch_size": 8}
            vae, settings = {"training.steps": 10}, {"n": 80, "items": 4, "rounds": 1}
            student = {"schedule": [4, 1], "steps": 4, "training.batch_size": 8}
        return [
            Cell("real", "edm", "digits", training | sampling, note="the run"),
            Cell("student", "tract", "digits", student, note="one step", uses=("real",)),
            Cell("vae", "vae", "digits", vae, note="rough samples"),
            Cell("whole", "blocks", "digits", dit | {"blocks.count": 1}, note="a DiT, trained from end to end"),
            Cell("parts", "blocks", "digits", dit | {"blocks.count": 3}, note="in three blocks"),
            Cell("tract", None, "digits", {}, settings, "one step, and int8", ("real", "student")),
            Cell("surrogate", None, "digits", {}, settings, "a surrogate, and int8", ("real", "vae")),
            Cell("blocks", None, "digits", {}, settings, "blocks, and a fast solver", ("whole", "parts")),
        ]

    def measure(self, trained: Trained) -> list[Row]:
        if trained.cell.method is not None:
            return []
        one, other = (trained.of(name) for name in trained.cell.uses)
        with tempfile.TemporaryDirectory() as name:
            folder, models = Path(name), {}
            options: dict[str, Mapping[str, Any]] = {}
            if trained.cell.name == "blocks":
                many, few = (8, 4) if self.quick else (50, 10)
                slow, fast = {"num_steps": many, "solver": "ddim"}, {"num_steps": few, "solver": "dpmpp-2m"}
                options = dict(zip(WHICH, (slow, slow, fast, fast), strict=True))
                models = dict(zip(WHICH, (one.model(), other.model()) * 2, strict=True))
            else:
                pairs = trained.cell.name == "surrogate"
                whole = {"neither": one, "first": self._paired(one, other, folder / "pair") if pairs else other}
                models = {which: run.model(runtime="torch") for which, run in whole.items()}
                items = trained.cell.settings["items"]
                said: dict[str, Any] = {"progress": False, "items": items, "seed": trained.seed}
                said["with_graphs"] = not self.quick  # they take most of a minute to write
                small = quantize(one, folder / "small", **said)
                both = (
                    self._paired(small, other, folder / "both") if pairs else quantize(other, folder / "both", **said)
                )
                runtime: Runtime = "torch" if self.quick else "openvino"
                models |= {"second": small.model(runtime=runtime), "both": both.model(runtime=runtime)}
                models["runtime"] = one.model() if self.quick else by_openvino(one, folder / "graphs")
            return _rows(trained, models, options)

    @property
    def _chain(self) -> int:
        """Steps of the run, whose chain a surrogate begins in the middle."""
        return 6 if self.quick else 20

    def _paired(self, run: Run, partner: Run, out: Path) -> Run:
        return Pair(run, partner.folder, t_mid=0.5, num_steps=self._chain, solver="dpmpp-2m").write(out)

    def claims(self) -> list[Claim]:
        claims = []
        for name in COMPOSED:
            first, second, _ = COMPOSED[name]
            claims += [
                Claim(
                    f"{first} and {second}: speeds multiply, to a quarter",
                    [name],
                    lambda r, name=name: same(  # type: ignore[misc]
                        factor(r, name, "both") / (factor(r, name, "first") * factor(r, name, "second")), 1.0, 0.25
                    ),
                ),
                Claim(
                    f"{first} and {second}: both are faster than either",
                    [name],
                    lambda r, name=name: lower(  # type: ignore[misc]
                        np.maximum(factor(r, name, "first"), factor(r, name, "second")), factor(r, name, "both")
                    ),
                ),
                Claim(
                    f"{first} and {second}: no more quality is lost than by both apart, to 10 % of the score",
                    [name],
                    lambda r, name=name: lower(  # type: ignore[misc]
                        lost(r, name, "both"),
                        lost(r, name, "first") + lost(r, name, "second") + 0.1 * r.values(name, "score", with_="both"),
                    ),
                ),
            ]
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables: dict[str, list[dict[str, str]]] = {}
        for name, (first, second, neither) in COMPOSED.items():
            texts = {"neither": neither, "first": first, "second": second, "both": "both"}
            if name != "blocks":
                texts |= {"runtime": "OpenVINO alone, fp32"}
            rows = []
            for which, text in texts.items():
                score = results.values(name, "score", with_=which)
                ms = results.values(name, "ms", with_=which)
                row = {"": text, "fd_clf": mean_and_spread(score), "ms a sample": mean_and_spread(ms)}
                row["factor"] = mean_and_spread(factor(results, name, which))
                row["lost"] = mean_and_spread(lost(results, name, which))
                rows.append(row)
            product = factor(results, name, "first") * factor(results, name, "second")
            added = lost(results, name, "first") + lost(results, name, "second")
            rows.append({"": "product, and sum", "factor": mean_and_spread(product), "lost": mean_and_spread(added)})
            tables[f"{first}, and {second}"] = rows
        floor = results.values("tract", "score_real", with_="neither")
        tables["Real data"] = [{"fd_clf": mean_and_spread(floor)}]
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(3)
        for panel, (name, (first, second, _)) in zip(axes, COMPOSED.items(), strict=True):
            for which, text in zip(WHICH, ("neither", first, second, "both"), strict=True):
                x, y = factor(results, name, which), results.values(name, "score", with_=which)
                panel.plot(x, y, ".", markersize=9, label=text)
            real(panel, float(results.values(name, "score_real", with_="neither").mean()))
            log_scale(panel)
            panel.set(xscale="log", xlabel="times as fast", ylabel="fd_clf", title=name)
            panel.legend(fontsize=6)
        return {"compose": figure}


def factor(results: Results, name: str, which: str) -> np.ndarray:
    """How many times as fast as neither."""
    return results.values(name, "ms", with_="neither") / results.values(name, "ms", with_=which)


def lost(results: Results, name: str, which: str) -> np.ndarray:
    """What the score is higher by than that of neither."""
    return results.values(name, "score", with_=which) - results.values(name, "score", with_="neither")


def _rows(
    trained: Trained, models: Mapping[str, GenerativeModel], options: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    settings = trained.cell.settings
    ms = sample_milliseconds(models, settings["items"], trained.seed, options, settings["rounds"])
    rows = []
    for which in models:
        samples = models[which].sample(settings["n"], seed=trained.seed, **options.get(which, {}))
        (score,) = score_samples(samples.data, trained.dataset, metrics=["fd_clf"], seed=trained.seed)
        assert score.floor is not None
        values = {"score": score.value, "score_real": score.floor, "ms": ms[which]}
        rows.append(Row({"with_": which}, values | {"nfe": samples.nfe}))
    return rows

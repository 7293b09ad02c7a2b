"""Study `quantize`: networks in fewer bits on a CPU: score, deviation, size and speed."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from osmose.acceleration.precision import deviation, drawn, labels_of, search, switched
from osmose.acceleration.quantization import quantize
from osmose.gaussian.draws import mix
from osmose.methods.base import GenerativeModel
from osmose.metrics.evaluate import score_samples
from osmose.studies.measures import by_openvino, sample_milliseconds
from osmose.studies.plots import log_scale, panels, real
from osmose.studies.runtimes import BATCHES, NETWORKS, speed_table, speeds
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import lower, mean_and_spread, within
from osmose.training.run import Run
from osmose.training.runtime import bare_networks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIX = {"bits": 6, "weight_bits": 6}
_TUNED = {"steps": 300, "lr": 1e-4}
#: Of the digits' run, what it becomes, and what that is.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "bf16": ({"to": "bf16"}, "bf16"),
    "int8": ({"weight_bits": 8}, "8-bit weights and inputs"),
    "int8-w7": ({"weight_bits": 7}, "7-bit weights: what processors without VNNI compute"),
    "int8-dynamic": ({"weight_bits": 8, "inputs": "dynamic"}, "ranges of each item as it comes"),
    "int8-qat": ({"weight_bits": 8, "tuning": _TUNED}, "300 steps of training, taught by the run"),
    "int8-ends": ({"weight_bits": 8, "ends": 2}, "2 steps in fp32 at each end"),
    "six": (_SIX, "6-bit weights and inputs"),
    "six-qat": ({**_SIX, "tuning": _TUNED}, "300 steps of training, taught by the run"),
    "six-untaught": ({**_SIX, "tuning": _TUNED | {"distillation": 0.0}}, "300 steps of training on data alone"),
    "six-forward": ({**_SIX, "calibration": "forward"}, "ranges on noised data"),
    "six-noise": ({**_SIX, "calibration": "noise"}, "ranges at the first step alone"),
    "six-data": ({**_SIX, "calibration": "data"}, "ranges at the last step alone"),
    "six-whole": ({**_SIX, "split": False}, "one range for joined inputs"),
}
#: What whole samples are drawn by.
SAMPLED = ("torch fp32", "openvino fp32", "openvino int8", "openvino int8, 2 fp32 steps at each end")
_FASHION = ("int8", "six")
#: Steps in high precision where four of them are chosen.
PLACES = ("none", "first 4", "last 4", "2 and 2", "worst 4", "budget")


#: Claims: what scores alike, what is better in score and deviation, and in which place, what is how much faster.
_ALIKE = (
    ("bf16 scores", "bf16", "real"),
    ("8 bits score", "int8", "real"),
    ("7-bit weights score", "int8-w7", "real"),
    ("Fashion-MNIST: 8 bits score", "fashion-int8", "fashion-real"),
)
_BETTER = (
    ("the run as teacher is better than data alone, at 6 bits", "six-qat", "six-untaught"),
    ("two fp32 steps at each end are better than none, at 8 bits", "int8-ends", "int8"),
    ("ranges of each item are better than measured ones, at 8 bits", "int8-dynamic", "int8"),
    ("the sampler's own inputs are better for calibration than noised data", "six", "six-forward"),
    ("the sampler's own inputs are better for calibration than those of its first step", "six", "six-noise"),
    ("the sampler's own inputs are better for calibration than those of its last step", "six", "six-data"),
    ("joined inputs want ranges of their own", "six", "six-whole"),
)
#: In score, against a run that was trained for as many updates and then rounded; in deviation, of the same run.
_TRAINED = (
    (
        "training with rounded weights is better than rounding after as many updates, at 8 bits",
        "int8-qat",
        "int8-longer",
    ),
    ("training with rounded weights is better than rounding after as many updates, at 6 bits", "six-qat", "six-longer"),
)
_NEARER = (
    ("training with rounded weights brings samples nearer to the run's, at 8 bits", "int8-qat", "int8"),
    ("training with rounded weights brings samples nearer to the run's, at 6 bits", "six-qat", "six"),
)
_PLACED = (
    ("four fp32 steps at the end are better than four at the beginning", "last 4", "first 4"),
    ("the four that err most alone are better than two at each end", "worst 4", "2 and 2"),
)
_FASTER = (
    ("int8 in OpenVINO is twice as fast as fp32 in torch", "openvino int8", "torch fp32", 0.5),
    ("int8 in OpenVINO is faster than fp32 there", "openvino int8", "openvino fp32", 1.0),
    ("fp32 in OpenVINO is faster than torch.compile", "openvino fp32", "torch.compile", 1.0),
    ("OpenVINO is faster than onnxruntime, both int8", "openvino int8", "onnxruntime int8", 1.0),
)


class QuantizeStudy(Study):
    """Digits: EDM with the default UNet, 1,500 updates. Fashion-MNIST: a UNet of 8 channels, 800 updates, short.

    Samples are drawn by DPM-Solver++(2M) in 20 steps: 800 of the digits, 300 of Fashion-MNIST. `score` is fd_clf;
    `deviation` is how far samples are from those of the run in fp32 from the same noise, in deviations of these from
    their mean. Both are computed by torch, which rounds as the integers do; `openvino` is the same in integers, where
    whole samples are drawn. Scales are chosen on 64 samples. First and last layers, and those of time, keep real
    inputs.

    Training with rounded weights takes 300 updates more: its score is held against that of a run of 1,800 updates that
    was rounded (`longer`), its deviation against the run that it began with.

    Where steps keep their precision (`steps`, 6 bits), four of twenty are first, last, at both ends, or those whose
    error alone moves samples of other noise most; `budget` is what is found for half of the deviation of all steps.

    `speed` is milliseconds per image of one evaluation, the median of 5 in turns, in one thread, weights of chance,
    7-bit weights where the processor has no VNNI. `torch.compile` is inductor with its default settings.
    """

    title = "Quantization on a CPU: what do 8 and 6 bits cost in quality, what do they give in size and speed?"
    source = (
        "Effective Quantization for Diffusion Models on CPUs (arXiv 2311.16133), SD 1.5: FID fp32 30.48, bf16 30.58, "
        "int8 35.46, int8 with 5 bf16 steps at each end of 50 30.63; PTQ4DM (2211.15736), ImageNet-64, calibration: "
        "images 128.6, noise 33.2, training inputs 34.6, sampler at all t 26.2, fp32 21.63"
    )

    def cells(self) -> list[Cell]:
        training: dict[str, Any] = {"training.steps": 1500}
        settings: dict[str, Any] = {"n": 800}
        sampling = {"sampling.num_steps": 20, "sampling.solver": "dpmpp-2m"}
        if self.quick:
            training = {"training.steps": 6, "training.batch_size": 8, "network.channels": 8}
            sampling["sampling.num_steps"] = 6
            settings = {"n": 80, "items": 4}
        cells = [Cell("real", "edm", "digits", training | sampling, settings, "the run, in fp32")]
        names = ("bf16", "six") if self.quick else tuple(VARIANTS)
        for name in names:
            options, note = VARIANTS[name]
            cells.append(Cell(name, None, "digits", {}, settings | {"options": options}, note, ("real",)))
        note = "6 bits, some steps in fp32"
        cells.append(Cell("steps", None, "digits", {}, settings | {"options": _SIX}, note, ("real",)))
        if self.quick:
            return cells
        note = "8 bits, 7 of weights where there is no VNNI"
        cells.append(Cell("openvino", None, "digits", {}, settings | {"options": {}}, note, ("real",)))
        longer = training | {"training.steps": 1800} | sampling
        note = "as many updates as the run and 300 of rounded weights: what these are held against"
        cells.append(Cell("longer", "edm", "digits", longer, settings, note))
        for name in ("int8", "six"):
            more = settings | {"options": VARIANTS[name][0]}
            cells.append(Cell(f"{name}-longer", None, "digits", {}, more, f"{VARIANTS[name][1]}, of it", ("longer",)))
        short = {"network.channels": 8, "training.steps": 800, "training.batch_size": 32, "training.lr": 2e-3}
        few = {"n": 300}
        cells.append(Cell("fashion-real", "edm", "fashion-mnist", short | sampling, few, "the run, in fp32"))
        for name in _FASHION:
            options, note = VARIANTS[name]
            more = few | {"options": options}
            cells.append(Cell(f"fashion-{name}", None, "fashion-mnist", {}, more, note, ("fashion-real",)))
        cells += [
            Cell(f"speed-{name}", None, "digits", {}, {"network": values}, f"speed of a {name}")
            for name, values in NETWORKS.items()
        ]
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings, name = trained.cell.settings, trained.cell.name
        if "network" in settings:
            return speeds(settings["network"], trained.seed)
        if trained.cell.method is not None:
            run = trained.run
            values = scored(trained, trained.model, run)
            return [Row({}, values | {"bytes": run.weights.stat().st_size})]
        source = trained.of(trained.cell.uses[0])
        root = None if trained.data is None or trained.data.root is None else Path(trained.data.root)
        with tempfile.TemporaryDirectory() as folder:
            options = dict(settings["options"])
            if options.get("to") != "bf16":
                options.setdefault("items", settings.get("items", 64))
            if name == "openvino":
                return self._openvino(trained, source, Path(folder))
            made = quantize(
                source, Path(folder) / "run", root=root, progress=False, with_graphs=False, seed=trained.seed, **options
            )
            if name == "steps":
                return self._steps(trained, source, made)
            values = scored(trained, made.model(), source)
            return [Row({}, values | {"bytes": made.weights.stat().st_size})]

    def _steps(self, trained: Trained, source: Run, made: Run) -> list[Row]:
        exact, low = source.model(), bare_networks(made.model())
        labels = labels_of(exact)
        # Other noise than that which is scored.
        told: dict[str, Any] = {"items": trained.cell.settings.get("items", 32), "seed": mix(trained.seed, "search")}
        found = search(exact, low, 1e9, most_groups=len(labels), **told)
        half = search(exact, low, found.low / 2, most_groups=len(labels), **told)
        worst = sorted(found.groups, key=lambda group: -group.deviation)
        four = [label for group in worst[:4] for label in group.labels]
        sets = dict(zip(PLACES, ([], labels[:4], labels[-4:], labels[:2] + labels[-2:], four, half.high), strict=True))
        rows = []
        with switched(exact, low) as (switch,):
            for place, high in sets.items():
                switch.high_labels = frozenset(high)
                rows.append(Row({"fp32": place}, scored(trained, exact, source) | {"steps": len(high)}))
        alone = [group.deviation for group in found.groups]
        quarter = max(1, len(alone) // 4)
        rows.append(
            Row(
                {"fp32": "all but"},
                {
                    "first quarter": sum(d**2 for d in alone[:quarter]) ** 0.5,
                    "last quarter": sum(d**2 for d in alone[-quarter:]) ** 0.5,
                    "added up": sum(d**2 for d in alone) ** 0.5,
                    "together": found.low,
                },
            )
        )
        return rows

    def _openvino(self, trained: Trained, source: Run, folder: Path) -> list[Row]:
        """Whole samples in each runtime, in turns."""
        said: dict[str, Any] = {"seed": trained.seed, "progress": False}
        models = {
            "torch fp32": source.model(),
            "openvino fp32": by_openvino(source, folder / "graphs"),
            "openvino int8": quantize(source, folder / "int8", **said).model(runtime="openvino"),
            "openvino int8, 2 fp32 steps at each end": quantize(source, folder / "ends", ends=2, **said).model(
                runtime="openvino"
            ),
        }
        ms = sample_milliseconds(models, 64, trained.seed)
        return [Row({"runtime": name}, scored(trained, models[name], source) | {"ms": ms[name]}) for name in SAMPLED]

    def claims(self) -> list[Claim]:
        def sized(text: str, name: str, low: float, high: float) -> Claim:
            def share(r: Results) -> float:
                return float((r.values(name, "bytes") / r.values("real", "bytes")).mean())

            return Claim(text, [name, "real"], lambda r: within(share(r), low, high))

        def timed(text: str, name: str, items: int, a: str, b: str, factor: float) -> Claim:
            cell = f"speed-{name}"

            def ms(r: Results, runtime: str) -> np.ndarray:
                return r.values(cell, "ms", runtime=runtime, items=items)

            text = f"{name}, {items} at a time: {text}"
            return Claim(text, [cell], lambda r: lower(ms(r, a), factor * ms(r, b)))

        def placed(text: str, metric: str, a: str, b: str) -> Claim:
            text = f"{text} ({metric})"

            def of(r: Results, place: str) -> np.ndarray:
                return r.values("steps", metric, fp32=place)

            return Claim(text, ["steps"], lambda r: lower(of(r, a), of(r, b)))

        claims = [
            sized("bf16 halves the run's size", "bf16", 0.45, 0.55),
            Claim.lower("fp32 scores better than six bits", "real", "six", "score"),
        ]
        if self.quick:
            return claims
        claims.append(sized("8 bits take at most 0.35 of the size", "int8", 0, 0.35))
        for text, a, b in _ALIKE:
            claims.append(Claim.alike(f"{text} as fp32 does, to 10 %", a, b, "score", 0.1))
        for text, a, b in _BETTER:
            claims += [Claim.lower(f"{text} ({metric})", a, b, metric) for metric in ("score", "deviation")]
        claims += [Claim.lower(text, a, b, "score") for text, a, b in _TRAINED]
        claims += [Claim.lower(text, a, b, "deviation") for text, a, b in _NEARER]
        for metric in ("score", "deviation"):
            claims += [placed(text, metric, a, b) for text, a, b in _PLACED]
        for slow, fast in pairwise(SAMPLED[:3]):
            claims.append(
                Claim(
                    f"digits: whole samples are drawn faster by {fast} than by {slow}",
                    ["openvino"],
                    lambda r, fast=fast, slow=slow: lower(  # type: ignore[misc]
                        r.values("openvino", "ms", runtime=fast), r.values("openvino", "ms", runtime=slow)
                    ),
                )
            )
        for name in NETWORKS:
            for items in BATCHES:
                claims += [timed(text, name, items, a, b, factor) for text, a, b, factor in _FASTER]
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables: dict[str, list[dict[str, str]]] = {}
        for heading, prefix in (("Digits", ""), ("Fashion-MNIST", "fashion-")):
            if f"{prefix}real" not in results.rows:
                continue
            rows = []
            for name in ("real", *VARIANTS, "longer", "int8-longer", "six-longer"):
                if f"{prefix}{name}" not in results.rows:
                    continue
                ((_, values),) = results.groups(f"{prefix}{name}")
                row = {"network": "fp32" if name == "real" else name}
                row |= {"fd_clf": mean_and_spread(values["score"]), "deviation": mean_and_spread(values["deviation"])}
                row["MB"] = f"{values['bytes'].mean() / 1e6:.2f}" if "bytes" in values else ""
                rows.append(row)
            rows.append(
                {"network": "real data", "fd_clf": mean_and_spread(results.values(f"{prefix}real", "score_real"))}
            )
            tables[heading] = rows
        rows, alone = [], {}
        for labels, values in results.groups("steps"):
            if labels["fp32"] == "all but":
                alone = {name: mean_and_spread(value) for name, value in values.items()}
                continue
            rows.append(
                {"steps in fp32": str(labels["fp32"]), "how many": mean_and_spread(values["steps"])}
                | {"fd_clf": mean_and_spread(values["score"]), "deviation": mean_and_spread(values["deviation"])}
            )
        tables["Digits, 6 bits: where steps keep fp32"] = rows
        tables["Digits, 6 bits: deviation by the errors of some steps alone"] = [alone]
        if "openvino" in results.rows:
            tables["Digits: whole samples, 64 at once"] = [
                {"computed by": name, "ms a sample": mean_and_spread(results.values("openvino", "ms", runtime=name))}
                | {
                    what: mean_and_spread(results.values("openvino", metric, runtime=name))
                    for what, metric in (("fd_clf", "score"), ("deviation", "deviation"))
                }
                for name in SAMPLED
            ]
        for name in NETWORKS:
            if f"speed-{name}" in results.rows:
                tables[f"{name}: ms an image"] = speed_table(results, f"speed-{name}")
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, (quality, places) = panels(2)
        for index, name in enumerate(name for name in VARIANTS if name in results.rows):
            ((_, values),) = results.groups(name)
            marker, label = "os^"[index // 5], f"{name}, {values['bytes'].mean() / 1e6:.2f} MB"
            quality.plot(
                values["deviation"].mean(),
                values["score"].mean(),
                marker,
                markersize=6,
                fillstyle="none",
                label=label,
            )
        quality.axhline(float(results.values("real", "score").mean()), color="0.3", linewidth=1, label="fp32")
        real(quality, float(results.values("real", "score_real").mean()))
        log_scale(quality)
        quality.set(title="digits, means of the seeds", xlabel="deviation", ylabel="fd_clf", xscale="log")
        quality.legend(fontsize=6)
        for labels, values in results.groups("steps"):
            if labels["fp32"] != "all but":
                places.plot(values["deviation"], values["score"], "o", markersize=4, label=str(labels["fp32"]))
        places.set(title="6 bits: steps in fp32, every seed", xlabel="deviation", ylabel="fd_clf")
        places.legend(fontsize=7)
        return {"quantize": figure}


@lru_cache(maxsize=2)
def samples_of(folder: Path, n: int, seed: int) -> Tensor:
    """What a run draws: many cells are held against it."""
    return drawn(Run.open(folder).model(), n, seed)


def scored(trained: Trained, model: GenerativeModel, source: Run) -> dict[str, float]:
    """Score of a model's samples, that of real data, and how far they are from those of a run, from the same noise."""
    n = trained.cell.settings["n"]
    samples = drawn(model, n, trained.seed)
    data = trained.dataset.spec.decode(samples)
    (score,) = score_samples(data, trained.dataset, metrics=["fd_clf"], seed=trained.seed)
    assert score.floor is not None
    away = deviation(samples, samples_of(source.folder, n, trained.seed))
    return {"score": score.value, "score_real": score.floor, "deviation": away}

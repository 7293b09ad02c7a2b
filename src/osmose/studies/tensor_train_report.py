"""Tables and pictures of the study `tensor-train`: its nine points, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.studies.plots import draw, log_scale, panels
from osmose.studies.verdicts import mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from osmose.studies.study import Results
    from osmose.studies.tensor_train import TensorTrainStudy

#: Models of the family of networks, and of trains, that are drawn everywhere.
_DRAWN = {
    "tt": "tensor train, rank 4",
    "mlp-64-linear": "MLP 2 x 64 on the linear prediction",
}
#: By the three optimizers.
_OPTIMIZERS = {
    "tt": "train, Adam",
    "als": "train, ALS",
    "riemannian": "train, Riemannian CG",
    "mlp-64-linear": "MLP 2 x 64 on the linear prediction, Adam",
}


def tables(study: TensorTrainStudy, results: Results) -> dict[str, list[dict[str, str]]]:
    """The nine tables by heading, after that of the verdict."""
    main = study.main
    notes = {cell.name: cell.note for cell in study.cells()}

    def row(cell: str, *names: str) -> dict[str, str]:
        law, D, name = _split(cell)
        shown = {"data": law, "D": D, "model": name, "what": notes[cell]}
        return shown | {column: _value(results, cell, column) for column in names}

    def cells(laws: Sequence[str], names: Sequence[str]) -> list[str]:
        """Those that there are."""
        return [cell for law in laws for name in names if (cell := f"{law}-{name}") in results.rows]

    two = ("tt", "mlp-64-linear")
    here = [f"{law}-{main}" for law in study.laws]
    at_main = cells(here, study.models(main))
    coupled = [f"gaussian-{main}", f"product-{main}", f"chain-{main}-0.5", f"chain-{main}", f"chain-{main}-0.05"]
    each = [f"{law}-{D}" for law in ("gaussian", *study.laws) for D in study.dimensions()]
    settings = cells([here[0]], ["tt", *study.settings(), "als", "riemannian"])
    sizes = [
        *cells([f"{study.laws[0]}-{D}" for D in study.dimensions() if main != D], two),
        *at_main[: len(study.models(main))],
    ]
    verdict = []
    for law in study.laws:
        trains, networks = study.at_equal_error(results, law)
        shown = {"data": law, "D": str(main), "at excess": mean_and_spread(trains[3])}
        shown["of the linear"] = f"{(trains[3] / results.values(f'{law}-{main}-tt', 'linear', at='end')).mean():.0%}"
        for what, train, network in zip(("numbers", "CPU s", "peak MB"), trains, networks, strict=False):
            unit = 1e6 if what == "peak MB" else 1.0
            shown |= {
                f"{what}: train": mean_and_spread(train / unit),
                f"{what}: network": mean_and_spread(network / unit),
                f"{what}: ratio": f"{np.exp(np.log(train / network).mean()):.3g}",
            }
        verdict.append(shown)
    digits = [cell for cell in results.rows if cell.startswith("digits-")]
    return {
        "Verdict: what it takes to reach an error, the larger of both families' best": verdict,
        "1. The noise model in isolation": [
            row(c, "parameters", "fitted", "excess", "explained", "sw2", "sw2_real") for c in at_main
        ],
        "2. Networks on images: digits": [
            row(c, "parameters", "fitted", "loss", "fd_clf", "fd_clf_real", "macs") for c in digits
        ],
        "3. The distribution, from no coupling to the strongest": [
            row(c, "linear", "excess", "explained", "sw2") for c in cells([*coupled, f"mixture-{main}"], two)
        ],
        "4. Rank": [
            row(c, "parameters", "excess", "explained") for c in cells(here, ("tt-r1", "tt-r2", "tt", "tt-r8"))
        ],
        "4. Number of coordinates of the data, and with it of cores, D + 1": [
            row(c, "parameters", "linear", "excess", "explained") for c in cells(each, two)
        ],
        "4. Number of cores alone: K principal components of data of one dimension, K + 1 cores": [
            row(c, "parameters", "linear", "excess", "explained") for c in study.cores() if c in results.rows
        ],
        "5. Settings of the optimizers, basis and degree": [
            row(c, "items_seen", "excess", "explained") for c in settings
        ],
        "6. Landscapes: losses around the weights, filter-normalised": _landscapes(results),
        "7. Convergence: CPU seconds, multiply-adds and items": [
            _convergence(results, cell, main) for cell in cells(here, list(_OPTIMIZERS))
        ],
        "8. Operations: measured and by formula, of an evaluation of an item; measured, of training on an item": [
            row(c, "macs", "macs_formula", "elementwise", "training_macs") for c in sizes
        ],
        "9. Memory in bytes": [
            row(c, "parameters", "weights_bytes", "activation_bytes", "training_bytes") for c in sizes
        ],
    }


def _split(cell: str) -> tuple[str, str, str]:
    """Law, D and model in the name of a cell."""
    law, *rest = cell.split("-")
    if law == "digits":
        return law, "64", "-".join(rest)
    if law == "chain" and rest[1].replace(".", "").isdigit():
        return f"chain, P = {rest[1]}", rest[0], "-".join(rest[2:])
    return law, rest[0], "-".join(rest[1:])


def _value(results: Results, cell: str, name: str) -> str:
    """A number at the end of training as text; a dash where the cell has none."""
    for labels, values in results.groups(cell):
        if labels.get("at") == "end" and name in values:
            return mean_and_spread(values[name])
    return "-"


def _landscapes(results: Results) -> list[dict[str, str]]:
    rows = []
    for labels, values in results.groups("landscape"):
        shown = {name: mean_and_spread(own) for name, own in values.items() if not name.startswith("cut")}
        rows.append({"run": str(labels["run"])} | shown)
    return rows


def _convergence(results: Results, cell: str, main: int) -> dict[str, str]:
    law, D, name = _split(cell)
    seconds = results.values(f"times-{main}", "seconds", model=name)
    steps = max(int(labels["at"]) for labels, _ in results.groups(cell) if labels["at"] != "end")
    macs, items = (results.values(cell, column, at="end") for column in ("training_macs", "items_seen"))
    return {
        "data": law,
        "D": D,
        "optimizer": _OPTIMIZERS[name],
        "steps": str(steps),
        "CPU s a step": mean_and_spread(seconds),
        "CPU s": mean_and_spread(seconds * steps),
        "multiply-adds": mean_and_spread(macs * items),
        "items seen": mean_and_spread(items),
        "excess": mean_and_spread(results.values(cell, "excess", at="end")),
    }


def figures(study: TensorTrainStudy, results: Results) -> dict[str, Figure]:
    """Error against number of cores, against parameters, along the training by steps, time and operations; a cut."""
    return {
        "error-against-dimension": _by_dimension(study, results),
        "error-against-parameters": _by_parameters(study, results),
        "convergence": _by_time(study, results),
        "landscape-cuts": _cuts(results),
    }


def _by_dimension(study: TensorTrainStudy, results: Results) -> Figure:
    figure, axes = panels(len(study.laws))
    for panel, law in zip(axes, study.laws, strict=True):
        for name, label in _DRAWN.items():
            at = [D for D in study.dimensions() if f"{law}-{D}-{name}" in results.rows]
            draw(panel, at, [results.values(f"{law}-{D}-{name}", "excess", at="end") for D in at], label)
        at = list(study.dimensions())
        linear = [results.values(f"{law}-{D}-tt", "linear", at="end").mean() for D in at]
        panel.plot(at, linear, ":", color="0.3", label="best linear prediction")
        panel.set_xscale("log", base=2)
        panel.set_xticks(at, [str(D) for D in at])
        panel.set(title=law, xlabel="D", ylabel="excess (lower is better)")
        log_scale(panel)
    axes[0].legend(fontsize=8)
    return figure


def _by_parameters(study: TensorTrainStudy, results: Results) -> Figure:
    figure, axes = panels(len(study.laws))
    families = {
        "potential, ranks 1 to 8": ("tt-r1", "tt-r2", "tt", "tt-r8"),
        "block, rank 8": ("block",),
        "separate, rank 4": ("separate",),
        "MLP": ("mlp-64", "mlp-128"),
        "MLP on the linear prediction": (
            "mlp-8-linear",
            "mlp-16-linear",
            "mlp-32-linear",
            "mlp-64-linear",
            "mlp-128-linear",
        ),
    }
    for panel, law in zip(axes, study.laws, strict=True):
        for label, names in families.items():
            cells = [cell for name in names if (cell := f"{law}-{study.main}-{name}") in results.rows]
            if not cells:
                continue
            at = [results.values(cell, "parameters", at="end")[0] for cell in cells]
            draw(panel, at, [results.values(cell, "excess", at="end") for cell in cells], label)
        panel.set(title=f"{law}, D = {study.main}", xlabel="trained numbers", ylabel="excess (lower is better)")
        panel.set_xscale("log")
        log_scale(panel)
    axes[0].legend(fontsize=7)
    return figure


def _by_time(study: TensorTrainStudy, results: Results) -> Figure:
    """Held-out loss above the exact model's, in the middle of the seeds, against steps, seconds and multiply-adds."""
    from osmose.studies.tensor_train import curve_of

    figure, axes = panels(3, len(study.laws))
    for row, law in enumerate(study.laws):
        for name, label in _OPTIMIZERS.items():
            cell = f"{law}-{study.main}-{name}"
            curves = [curve_of(results, cell, index) for index in range(len(results.seeds))]
            steps = np.array(curves[0][0], dtype=float)
            errors = np.median([curve[1] for curve in curves], 0)
            seconds = steps * results.values(f"times-{study.main}", "seconds", model=name).mean()
            of = {what: results.values(cell, what, at="end").mean() for what in ("training_macs", "items_seen")}
            macs = of["training_macs"] * of["items_seen"] * steps / steps[-1]
            for column, (x, unit) in enumerate(((steps, "steps"), (seconds, "CPU seconds"), (macs, "multiply-adds"))):
                panel: Any = axes[3 * row + column]
                panel.plot(x, np.where(errors > 0, errors, np.nan), "o-", markersize=3, label=label)
                panel.set(title=f"{law}, D = {study.main}", xlabel=unit, xscale="log")
                log_scale(panel)
        axes[3 * row].set_ylabel("held-out loss above the exact model's")
    axes[0].legend(fontsize=7)
    return figure


def _cuts(results: Results) -> Figure:
    figure, axes = panels()
    for labels, values in results.groups("landscape"):
        cut = [values[f"cut {k}"] for k in range(sum(name.startswith("cut") for name in values))]
        at = np.linspace(-1, 1, len(cut))
        draw(axes[0], list(at), cut, str(labels["run"]))
    axes[0].set(xlabel="distance along a filter-normalised direction", ylabel="held-out loss")
    log_scale(axes[0])
    axes[0].legend(fontsize=8)
    return figure

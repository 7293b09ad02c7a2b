"""`osmose study tensor-train`: are tensor trains smaller and faster noise models than networks, and on which data?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.analysis.budget import formula_of
from osmose.analysis.cost import macs_of
from osmose.analysis.landscape import RADII, landscapes
from osmose.analysis.noise_error import exact_loss, noise_error
from osmose.analysis.training_memory import training_memory
from osmose.data.dataset import DataConfig
from osmose.methods.diffusion import Diffusion
from osmose.studies.measures import step_seconds
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.tensor_train_report import figures, tables
from osmose.studies.verdicts import Finding, lower
from osmose.training.trainer import validation_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The laws whose number of coordinates is varied, from no coupling of coordinates to the strongest.
LAWS = ("product", "chain", "mixture")
#: The law on which settings are varied, at the main dimension.
SET_ON = "product"
#: Points of a training at which its held-out loss is looked at.
LOOKS = 10

#: Updates of a network that is trained for longer than everything else.
LONG = 4000

_TRAIN = {"network": "tensor-train", "network.rank": 4}
_ALS, _RIEMANNIAN = _TRAIN | {"training.optimizer": "als"}, _TRAIN | {"training.optimizer": "riemannian"}


def _mlp(width: int, depth: int, **more: Any) -> dict[str, Any]:
    return {"network": "mlp", "network.width": width, "network.depth": depth, **more}


#: What is compared: name, changes, what it is.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "tt": (_TRAIN, "a potential of rank 4, by Adam"),
    "mlp-64": (_mlp(64, 2), "a residual MLP, 2 x 64"),
    "mlp-64-linear": (_mlp(64, 2) | {"network.linear": True}, "the same on the linear prediction"),
    "mlp-128": (_mlp(128, 3), "a residual MLP, 3 x 128"),
    "mlp-128-linear": (_mlp(128, 3) | {"network.linear": True}, "the same on the linear prediction"),
    "mlp-128-long": (_mlp(128, 3) | {"training.steps": LONG}, "3 x 128, five times the updates"),
    "mlp-32-linear": (_mlp(32, 2) | {"network.linear": True}, "2 x 32 on the linear prediction"),
    "mlp-16-linear": (_mlp(16, 2) | {"network.linear": True}, "2 x 16 on the linear prediction"),
    "mlp-8-linear": (_mlp(8, 1) | {"network.linear": True}, "1 x 8 on the linear prediction"),
    "tt-r1": (_TRAIN | {"network.rank": 1}, "a potential of rank 1"),
    "tt-r2": (_TRAIN | {"network.rank": 2}, "a potential of rank 2"),
    "tt-r8": (_TRAIN | {"network.rank": 8}, "a potential of rank 8"),
    "block": (_TRAIN | {"network.output": "block", "network.rank": 8}, "one train with a block core, rank 8"),
    "separate": (_TRAIN | {"network.output": "separate"}, "a train of rank 4 for each value"),
    "als": (_ALS, "a potential of rank 4, by ALS"),
    "riemannian": (_RIEMANNIAN, "a potential of rank 4, by Riemannian conjugate gradients"),
}
#: Those of them that are networks; the others are trains.
NETWORKS = tuple(name for name in MODELS if name.startswith("mlp"))
#: Laws on which the number of cores is varied on data of `WIDE` dimensions, and those numbers.
CORES_ON, WIDE, COORDINATES = ("chain", "mixture"), 16, (4, 8, 16)
#: Settings of the optimizers, one changed at a time, and bases.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "adam-lr-0.25": (_TRAIN | {"training.lr": 5e-4}, "Adam at a quarter of the rate"),
    "adam-lr-4": (_TRAIN | {"training.lr": 8e-3}, "Adam at four times the rate"),
    "als-ridge-1e-5": (_ALS | {"training.optimizer.ridge_min": 1e-5}, "ALS, lambda down to 1e-5"),
    "als-adaptive": (
        _ALS | {"network.rank": 8, "training.optimizer.tolerance": 0.1},
        "ALS, ranks up to 8 cut to a tenth of the norm",
    ),
    "gradient": (_RIEMANNIAN | {"training.optimizer.direction": "gradient"}, "Riemannian steepest descent"),
    "hermite": (_TRAIN | {"network.basis": "hermite"}, "Hermite instead of Legendre polynomials"),
    "degree-8": (_TRAIN | {"network.degree": 8}, "half of the degree"),
}


class TensorTrainStudy(Study):
    """Noise models in isolation: regressions of eps on x_t, on data whose exact eps* is known in closed form.

    The nine points of the plan of "Tensor-Train Diffusion Models" (Baddar and Eigel, 2024), which has no results: (1)
    the noise model alone, (2) networks on the same data, (3) the distribution, (4) rank and number of cores, (5)
    settings of the optimizers, (6) landscapes, (7) convergence, (8) operations, (9) memory.

    Data: 10,000 training points in D dimensions of `product` (independent coordinates, each a mixture), `chain` (signs
    that flip with probability P from neighbour to neighbour, 2^D modes; P = 0.2 if not said), `mixture` (8 round
    Gaussians) and `gaussian`. The excess is E|eps_hat - eps*|^2 / D over uniform times of DDPM's linear schedule,
    `explained` the share that a model has taken off the excess of the best linear prediction. What is trained by Adam
    takes 800 updates of 512 items with fresh times and noise at the rate 0.002, warmed up and decayed to 0, and
    averages its weights, but for one network that takes 4,000 updates; ALS makes 6 sweeps over 8,192 items each,
    Riemannian descent 120 steps of 4,096. Items seen and CPU seconds stand in the tables. Networks are residual MLPs,
    alone or as trains on the best linear prediction.

    The time to an error is the number of steps to it, on the held-out loss less that of the exact noise model on the
    same items and noise, times the CPU seconds of a step, which are measured in turns in one process for all
    configurations of a dimension. The verdict on the claim, smaller and faster at equal error, is given at D = 8, where
    both families come in several sizes: of the best errors of trains and of networks the larger one is taken, and of
    each family the member that reaches it with the fewest numbers (trained, and fitted to the data before), the one
    that is there first, and the one that takes the least memory in training. It holds for these budgets: nothing here
    is trained to its end, and bases and degree of the trains were chosen on such data, nothing of the MLPs was.
    """

    title = "Tensor trains as noise models: smaller and faster to train than networks, at equal error?"
    source = "Tensor-Train Diffusion Models (Baddar and Eigel 2024), section 4.1: a plan of nine points without results"

    @property
    def laws(self) -> tuple[str, ...]:
        """The laws whose number of coordinates is varied."""
        return ("product",) if self.quick else LAWS

    @property
    def main(self) -> int:
        """D at which everything is compared."""
        return 2 if self.quick else 8

    def dimensions(self) -> tuple[int, ...]:
        """D of the laws that are varied."""
        return (2,) if self.quick else (2, 4, 8, 16, 64)

    def models(self, D: int) -> tuple[str, ...]:
        """What is trained on data of D dimensions."""
        if self.quick:
            return ("tt", "mlp-64-linear", "mlp-64", "mlp-128", "als", "riemannian")
        if self.main == D:
            return tuple(MODELS)
        return ("tt", "mlp-64-linear")

    def settings(self) -> dict[str, tuple[dict[str, Any], str]]:
        """Settings of the optimizers."""
        return {} if self.quick else SETTINGS

    def cores(self) -> dict[str, tuple[str, str, dict[str, Any], str]]:
        """Cells of trains in some of the principal components of data: by name law, model, changes, what it is."""
        if self.quick:
            return {}
        return {
            f"{law}-{WIDE}-tt-{k}": (
                f"{law}:{WIDE}",
                f"tt-{k}",
                _TRAIN | {"network.coordinates": k},
                f"a potential of rank 4 in {k} principal components",
            )
            for law in CORES_ON
            for k in COORDINATES
        }

    def cells(self) -> list[Cell]:
        main, some = self.main, [(name, *MODELS[name]) for name in ("tt", "mlp-64-linear")]
        cells = [
            self._cell(f"{law}:{D}", name, *MODELS[name])
            for law in self.laws
            for D in self.dimensions()
            for name in self.models(D)
        ]
        gaussian = [f"gaussian:{D}" for D in self.dimensions()]
        for law in (*gaussian, *(() if self.quick else (f"chain:{main}:0.5", f"chain:{main}:0.05"))):
            cells += [self._cell(law, *of) for of in some]
        cells += [self._cell(f"{SET_ON}:{main}", name, *of, setting=True) for name, of in self.settings().items()]
        cells += [self._cell(*of) for of in self.cores().values()]
        cells += self._digits()
        both = tuple(f"{self.laws[0]}-{main}-{name}" for name in ("tt", "mlp-64-linear"))
        looks = {"points": 5 if self.quick else 11}
        data = self._data(f"{self.laws[0]}:{main}")
        cells.append(Cell("landscape", None, data, {}, looks, "losses around weights", both))
        for D in self.dimensions():
            changes = {"times": {name: MODELS[name][0] for name in self.models(D)}}
            cells.append(Cell(f"times-{D}", None, self._data(f"product:{D}"), {}, changes, "CPU seconds a step"))
        return cells

    def _data(self, law: str) -> DataConfig:
        points = 500 if self.quick else 12_500
        config: DataConfig = DataConfig.parse({"source": f"toy:{law}", "num_points": points, "held_out": 0.2})
        return config

    def _cell(self, law: str, name: str, changes: dict[str, Any], note: str, **more: Any) -> Cell:
        settings = {"n": 256 if self.quick else 4096, "samples": 100 if self.quick else 2000, **more}
        return Cell(f"{law.replace(':', '-')}-{name}", "ddpm", self._data(law), self._training(changes), settings, note)

    def _training(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Length and batch, and looks at the held-out loss."""
        kind = changes.get("training.optimizer", "adam")
        lengths = {"adam": (800, 512), "als": (6, 8192), "riemannian": (120, 4096)}
        if self.quick:
            lengths = {"adam": (20, 32), "als": (2, 256), "riemannian": (4, 64)}
        steps, batch = lengths[kind]
        steps = changes.get("training.steps", steps)
        said = {"training.steps": steps, "training.batch_size": batch, "training.validation_items": 2500}
        said |= {"training.validate_every": max(1, steps // LOOKS), "training.accumulate": 4 if kind == "als" else 1}
        return said | changes

    def _digits(self) -> list[Cell]:
        steps, batch = (20, 16) if self.quick else (1000, 64)
        said = {
            "training.steps": steps,
            "training.batch_size": batch,
            "training.validate_every": max(1, steps // LOOKS),
        }
        train = _TRAIN | {"network.rank": 8, "network.degree": 8}
        cells = {
            "unet": ({"network.channels": 8} if self.quick else {}, "the default UNet"),
            "mlp-128": MODELS["mlp-128"],
            "mlp-128-linear": MODELS["mlp-128-linear"],
            "tt-16": (train | {"network.coordinates": 16}, "rank 8, degree 8, in 16 principal components"),
            "tt-32": (train | {"network.coordinates": 32}, "the same in 32"),
        }
        settings = {"samples": 100 if self.quick else 800}
        return [
            Cell(f"digits-{name}", "ddpm", "digits", said | changes, settings, note)
            for name, (changes, note) in cells.items()
            if not self.quick or name in ("unet", "tt-16")
        ]

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        if "times" in settings:
            return self._times(trained)
        if "points" in settings:
            runs = [trained.of(name) for name in trained.cell.uses]
            found = landscapes(runs, [trained.dataset] * 2, points=settings["points"], n=512, seed=trained.seed)
            return [self._landscape(name, one) for name, one in zip(trained.cell.uses, found.runs, strict=True)]
        model, run = trained.model, trained.run
        assert isinstance(model, Diffusion)
        training = run.config.training
        sizes = {True: 0, False: 0}
        for value in run.model().parameters():
            sizes[value.requires_grad] += value.numel()
        values = {
            "parameters": float(sizes[True]),
            "fitted": float(sizes[False]),
            "macs": float(macs_of(model)),
            "weights_bytes": float(run.weights.stat().st_size),
            "items_seen": float(training.steps * training.batch_size),
        }
        if not settings.get("setting"):
            memory = training_memory(run.model(), training)
            assert memory is not None
            values |= {"training_bytes": float(memory.peak), "activation_bytes": float(memory.activations)}
            values["training_macs"] = float(memory.macs)
        for name, column in (("macs", "macs_formula"), ("elementwise", "elementwise")):
            if (formula := formula_of(model, name)) is not None:
                values[column] = float(formula)
        if trained.cell.name.startswith("digits"):
            scores = trained.scores(settings["samples"], ["fd_clf"], num_steps=50)
            last = [line["validation_loss"] for line in run.metrics() if "validation_loss" in line][-1]
            return [Row({"at": "end"}, values | scores | {"loss": last}), *self._curve(trained, 0.0)]
        error = noise_error(model, trained.dataset, n=settings["n"], seed=trained.seed)
        values |= {"excess": error.excess, "irreducible": error.irreducible, "linear": error.linear}
        if error.explained is not None:
            values["explained"] = error.explained
        values |= trained.scores(settings["samples"], ["sw2"], num_steps=50)
        floor = exact_loss(model, trained.dataset, validation_batches(run.config, trained.dataset))
        return [Row({"at": "end"}, values), *self._curve(trained, floor)]

    def _curve(self, trained: Trained, floor: float) -> list[Row]:
        """The held-out loss less that of the exact noise model, look by look."""
        lines = [line for line in trained.run.metrics() if "validation_loss" in line]
        return [Row({"at": line["step"]}, {"curve": line["validation_loss"] - floor}) for line in lines]

    def _landscape(self, name: str, one: Any) -> Row:
        values = {f"rise at {radius:g}": rise for radius, rise in zip(RADII, one.rises, strict=True)}
        values |= {"loss": one.centre_loss, "curvature u": one.curvatures[0], "curvature v": one.curvatures[1]}
        return Row({"run": name}, values | {f"cut {k}": float(loss) for k, loss in enumerate(one.cuts[0])})

    def _times(self, trained: Trained) -> list[Row]:
        """CPU seconds of a step of every configuration, in turns: those of many steps, then those of long ones."""
        given, rows = trained.cell.settings["times"], []
        long = [name for name in given if given[name].get("training.optimizer", "adam") != "adam"]
        for names, steps in (([name for name in given if name not in long], 4 if self.quick else 25), (long, 1)):
            if names:
                changes = {name: self._training(dict(given[name])) for name in names}
                found = step_seconds("ddpm", trained.dataset.source, trained.dataset, changes, steps=steps)
                rows += [Row({"model": name}, {"seconds": seconds}) for name, seconds in found.items()]
        return rows

    def claims(self) -> list[Claim]:
        claims, main = [], self.main
        for law in self.laws:
            for k, what in enumerate(("fewer numbers", "fewer CPU seconds of training", "less memory in training")):

                def check(results: Results, law: str = law, k: int = k) -> Finding:
                    trains, networks = self.at_equal_error(results, law)
                    return lower(np.log10(trains[k]), np.log10(networks[k]))

                text = f"{law}, D = {main}: at equal error a tensor train takes {what} than a network (log10 of both)"
                claims.append(Claim(text, self.family(law), check))
        for law in self.laws:
            for D in self.dimensions():
                text = f"{law}, D = {D}: a potential of rank 4 errs less than an MLP 2 x 64 on the linear prediction"
                claims.append(Claim.lower(text, f"{law}-{D}-tt", f"{law}-{D}-mlp-64-linear", "excess", at="end"))
            for name, words in (("als", "ALS"), ("riemannian", "Riemannian descent")):
                text = f"{law}, D = {main}: {words} errs less than Adam on the same train"
                claims.append(Claim.lower(text, f"{law}-{main}-{name}", f"{law}-{main}-tt", "excess", at="end"))
        return claims

    def family(self, law: str) -> list[str]:
        """Cells of all models on a law at the main dimension, and that of their times."""
        return [*(f"{law}-{self.main}-{name}" for name in self.models(self.main)), f"times-{self.main}"]

    def at_equal_error(self, results: Results, law: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of trains and of networks what it takes to reach an error: arrays over seeds.

        They are the fewest numbers, trained and fitted, the fewest CPU seconds, the smallest peak of bytes in training,
        and the error itself, each of the member of the family that is best at it. The error is the larger of the best
        of both families, so that both reach it.
        """
        main, per_seed = self.main, tuple[list[list[float]], list[list[float]]](([], []))
        families = [[n for n in self.models(main) if (n in NETWORKS) == networks] for networks in (False, True)]
        for index in range(len(results.seeds)):

            def end(name: str, column: str, index: int = index) -> float:
                return float(results.values(f"{law}-{main}-{name}", column, at="end")[index])

            level = max(min(end(name, "excess") for name in family) for family in families)
            for found, family in zip(per_seed, families, strict=True):
                able = [name for name in family if end(name, "excess") <= level]
                numbers = [end(name, "parameters") + end(name, "fitted") for name in able]
                peaks = [end(name, "training_bytes") for name in able]
                seconds = [
                    steps_to(curve_of(results, f"{law}-{main}-{name}", index), level)
                    * float(results.values(f"times-{main}", "seconds", model=name).mean())
                    for name in able
                ]
                found.append([min(numbers), min(seconds), min(peaks), level])
        trains, networks = (list(np.array(rows).T) for rows in per_seed)
        return trains, networks

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        return tables(self, results)

    def figures(self, results: Results) -> dict[str, Figure]:
        return figures(self, results)


def curve_of(results: Results, cell: str, index: int) -> tuple[list[int], list[float]]:
    """Steps and errors of the looks at a training, of one seed."""
    looks = [
        (int(labels["at"]), values["curve"][index]) for labels, values in results.groups(cell) if labels["at"] != "end"
    ]
    steps, errors = zip(*looks, strict=True)
    return list(steps), [float(error) for error in errors]


def steps_to(curve: tuple[list[int], list[float]], level: float) -> float:
    """Steps at which an error comes down to a level, between looks by the logarithms; the last step if it never does.

    A look's error may be below 0: it is the difference of two losses of a sample.
    """
    steps, errors = curve
    for k, error in enumerate(errors):
        if error <= level:
            if k == 0 or error <= 0:
                return float(steps[k])
            share = math.log(errors[k - 1] / level) / math.log(errors[k - 1] / error)
            return math.exp(math.log(steps[k - 1]) + share * math.log(steps[k] / steps[k - 1]))
    return float(steps[-1])

"""What the studies of distillation share: teachers, and students scored against data and against their teacher."""

from __future__ import annotations

from typing import Any, ClassVar

from osmose.acceleration.trajectories import Trajectories
from osmose.methods.students import num_groups
from osmose.metrics.evaluate import score_samples
from osmose.metrics.pairing import paired_rmse
from osmose.studies.study import Cell, Results, Row, Study, Trained
from osmose.studies.verdicts import mean_and_spread
from osmose.training import files
from osmose.training.run import Run

#: Names of the data sets in cells.
DATA = {"checkerboard": "toy:checkerboard", "digits": "digits", "fashion-mnist": "fashion-mnist"}
#: Scores; energy distances are given times 1,000.
METRIC = {"checkerboard": "energy", "digits": "fd_clf", "fashion-mnist": "fd_clf"}
#: How many samples are scored, and how many compared with the teacher's, which takes its full steps for each.
_SAMPLES = {"checkerboard": (2000, 2000), "digits": (800, 800), "fashion-mnist": (640, 100)}
_SCALE = {"energy": 1000.0}
#: Where a teacher's run keeps its samples in full.
_FULL = "full.safetensors"


class FewSteps(Study):
    """A study of students: `teacher` cells are trained, `student` cells distil them, and all are measured alike.

    Rows have the labels `steps` and, of a teacher that is run with several, `solver`; `score` is that of `METRIC`,
    `rmse` the root mean square distance, in the model's units, to the samples of the teacher in full from the same
    noise. `training_seconds` includes what a student was distilled from before, and the trajectories it learned from.

    Attributes:
        full: steps of the teacher in full.
        shown: further values that tables have a column for.
    """

    full: ClassVar[int] = 1024
    shown: ClassVar[tuple[str, ...]] = ()

    def teacher(self, data: str, counts: tuple[int, ...], **settings: Any) -> Cell:
        """A diffusion on the schedule of arXiv 2202.00512, whose angle is linear in t, with v-prediction."""
        changes = {"schedule": "trig", "parametrization": "v", "sampling.spacing": "even"} | self.network(data)
        sampling = {"num_steps": self.full, "solver": "ddim"}
        return self._cell(data, "teacher", "ddpm", changes, counts, "the teacher", sampling=sampling, **settings)

    def network(self, data: str) -> dict[str, Any]:
        """Network and training of a teacher."""
        mlp = {"network": "mlp", "training.lr": 2e-3}
        if self.quick:
            return mlp | {"network.width": 32, "training.batch_size": 64, "training.steps": 60}
        networks: dict[str, dict[str, Any]] = {
            "checkerboard": mlp | {"network.width": 128, "training.batch_size": 128, "training.steps": 5000},
            "digits": mlp | {"network.width": 128, "training.batch_size": 64, "training.steps": 5000},
            "fashion-mnist": {
                "network.channels": 8, "training.batch_size": 32, "training.lr": 2e-3, "training.steps": 1000
            },
        }  # fmt: skip
        return networks[data]

    def student(
        self,
        data: str,
        name: str,
        method: str,
        said: dict[str, Any],
        counts: tuple[int, ...],
        note: str,
        *uses: str,
        **settings: Any,
    ) -> Cell:
        """What is made of the first of the cells of `uses` ("teacher" if none), which ends with the teacher."""
        batch = {"training.batch_size": self.network(data)["training.batch_size"]}
        if self.quick:  # pictures would take longer than the few updates
            batch["training.preview_samples"] = 0
        return self._cell(data, name, method, batch | said, counts, note, *(uses or ("teacher",)), **settings)

    def _cell(
        self, data: str, name: str, method: str, said: dict[str, Any], counts: tuple[int, ...], note: str, *uses: str,
        **more: Any,
    ) -> Cell:  # fmt: skip
        n, paired = (100, 100) if self.quick else _SAMPLES[data]
        settings = {"n": n, "paired": paired, "metric": METRIC[data], "counts": list(counts), **more}
        return Cell(f"{data}-{name}", method, DATA[data], said, settings, note, tuple(f"{data}-{use}" for use in uses))

    def measure(self, trained: Trained) -> list[Row]:
        settings, model, spec = trained.cell.settings, trained.model, trained.dataset.spec
        own, known = settings.get("sampling", {}), None
        if own:  # a teacher
            known = model.sample(settings["paired"], seed=trained.seed, **own).data
            files.write_tensors(trained.run.folder / _FULL, {"samples": known})
        elif trained.cell.uses:
            known = files.read_tensors(trained.of(trained.cell.uses[-1]).folder / _FULL)["samples"]
        seconds = _seconds(trained.run)
        for name in trained.cell.uses[:-1]:  # of a student that is distilled further, the phases that made it
            seconds += _seconds(trained.of(name), trained.cell.changes["schedule"][0])
        ways = [own | {"num_steps": count} for count in settings["counts"]]
        ways += [
            {"solver": name, "num_steps": n} for name, counts in settings.get("solvers", {}).items() for n in counts
        ]
        metrics = [settings["metric"], *settings.get("more", ())]
        rows = []
        for way in ways:
            samples = model.sample(settings["n"], seed=trained.seed, **way)
            score, *more = score_samples(samples.data, trained.dataset, seed=trained.seed, metrics=metrics)
            scale = _SCALE.get(metrics[0], 1.0)
            values = {
                "score": scale * score.value,
                "score_real": scale * (score.floor or 0.0),
                "nfe": float(samples.nfe),
                "seconds_per_sample": samples.seconds / len(samples.data),
                "training_seconds": seconds,
            }
            if known is not None:
                values["rmse"] = paired_rmse(samples.data[: len(known)], known, spec)
            labels = {"steps": way["num_steps"]}
            if settings.get("solvers"):
                labels["solver"] = way["solver"]
            rows.append(Row(labels, values | {name: own.value for name, own in zip(metrics[1:], more, strict=True)}))
        return rows

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables: dict[str, list[dict[str, str]]] = {}
        for data, metric in METRIC.items():
            lines = []
            for cell in results.rows:
                if not cell.startswith(data):
                    continue
                groups = results.groups(cell)
                last = min(int(labels["steps"]) for labels, _ in groups)
                for labels, values in groups:
                    shown = {
                        "configuration": ", ".join(
                            [cell.removeprefix(f"{data}-"), *([str(labels["solver"])] if "solver" in labels else [])]
                        ),
                        "steps": str(labels["steps"]),
                        metric + (" x 1000" if metric == "energy" else ""): mean_and_spread(values["score"]),
                        "RMSE to the teacher": mean_and_spread(values["rmse"]) if "rmse" in values else "",
                        "nfe": f"{values['nfe'].mean():g}",
                        "ms a sample": f"{1000 * values['seconds_per_sample'].mean():.3g}",
                        "training, s": f"{values['training_seconds'].mean():.0f}" if labels["steps"] == last else "",
                    }
                    shown |= {name: mean_and_spread(values[name]) for name in self.shown if name in values}
                    lines.append(shown)
            if lines:
                floor = mean_and_spread(results.groups(f"{data}-teacher")[0][1]["score_real"])
                tables[f"{data} (real data: {floor})"] = lines
        return tables


def _seconds(run: Run, steps: int | None = None) -> float:
    """What a run took to train, trajectories included; of a distilled one with `steps`, up to that student."""
    lines, own = run.metrics(), run.folder / "trajectories"
    if steps is not None:
        method: Any = run.config.method  # of students: only they are distilled further
        last = 1 + [num_groups(groups) for groups in method.grids].index(steps)
        lines = [line for line in lines if line["phase"] <= last]
    made = Trajectories.open(own).seconds if own.is_dir() else 0.0
    return made + float(sum(line.get("seconds", 0.0) for line in lines))

"""`osmose evaluate`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, angles, at_least, quiet_warnings, sampling_options, whole_numbers
from osmose.errors import UserError
from osmose.training.progress import sampling_bar

if TYPE_CHECKING:
    from osmose.data.dataset import Dataset
    from osmose.methods.base import GenerativeModel
    from osmose.metrics.pairing import Pair


@dataclass
class Evaluate:
    """Score a run's samples against real data, and add the scores to the run's evaluation.json.

    Beside every score stands what real data reach: the same metric between two disjoint sets of real items of the same
    size. A score at that floor cannot be told from real data by this metric with this many samples.

    `fid` is computed only with the Inception weights of 2015 (--inception-weights); otherwise images are compared by
    the features of a small classifier of the same data (`fd_clf`), which is comparable only with itself.

    With --against RUN2, a teacher for example, RUN2 samples in full from the same noise, and one table says what RUN
    gives up and saves in each number of steps: the score, the root mean square distance from RUN2's samples, network
    calls, time. RUN/samples/ gets the samples side by side, and the score against the number of steps.
    """

    model: Annotated[Positional[Path | None], arg(metavar="RUN", help="a run folder; or none with --samples")] = None
    steps: Annotated[
        str | None, arg(metavar="N,N,...", help="numbers of solver steps to score, for example 4,20,100")
    ] = None
    against: Annotated[
        Path | None, arg(metavar="RUN2", help="compare with this run's samples from the same noise; RUN itself will do")
    ] = None
    num: Annotated[int | None, arg(aliases=["-n"], help="samples; 2000 if not given, or half the training data")] = None
    solver: Annotated[str | None, arg(help="of the method: ddim, dpmpp-2m, bridge, euler ..., see the README")] = None
    t_mid: Annotated[
        str | None, arg(metavar="X[,X,...]", help="angles of a consistency model's steps but the first; 1.1 for two")
    ] = None
    metrics: Annotated[str | None, arg(metavar="NAME,...", help="only these")] = None
    reference: Annotated[str, arg(help="real data to compare with: train (as papers do) or held-out")] = "train"
    inception_weights: Annotated[Path | None, arg(help="pt_inception-2015-12-05-6726825d.pth, for fid, kid and is")] = (
        None
    )
    samples: Annotated[Path | None, arg(help="score the array `samples` of an .npz instead of a run")] = None
    data: Annotated[str | None, arg(help="the real data of --samples; or where the data of the run are now")] = None
    source: Annotated[str | None, arg(help="where the data that the run begins with are now")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    seed: Annotated[int, arg(help="of the samples and of the metrics")] = 0
    batch_size: Annotated[int | None, arg(help="samples computed together")] = None
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    runtime: Annotated[
        str, arg(help="torch or openvino (faster on CPUs); auto is openvino for quantized runs, else torch")
    ] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Sample, score, record."""
        if self.reference not in ("train", "held-out"):
            raise UserError(f"--reference: {self.reference!r} is not valid: should be train or held-out")
        if (self.model is None) == (self.samples is None):
            raise UserError("RUN: give a run folder, or --samples FILE.npz with --data")
        if self.against is not None and self.samples is not None:
            raise UserError("--against: has no meaning with --samples, whose noise is not known")
        if self.source is not None and self.samples is not None:
            raise UserError("--source: has no meaning with --samples, which are scored by their end alone")
        at_least(self, 1, "threads", "num")
        import torch

        from osmose.metrics.features import FeatureNetwork
        from osmose.metrics.inception import load_inception

        if self.threads:
            torch.set_num_threads(self.threads)
        features: FeatureNetwork | str = "default"
        if self.inception_weights is not None:
            features = load_inception(self.inception_weights)
        names = self.metrics.split(",") if self.metrics else None
        with quiet_warnings():
            return self._file(features, names) if self.model is None else self._run(self.model, features, names)

    def _run(self, folder: Path, features: Any, names: list[str] | None) -> Result:
        from osmose.cli.devices import where
        from osmose.metrics.evaluate import table
        from osmose.metrics.evaluation import evaluate_run, record
        from osmose.metrics.pairing import Pair
        from osmose.training.run import Run

        run = Run.open(folder)
        with quiet_warnings():
            model = run.model(*where(self.device, self.runtime))
        steps = _numbers(self.steps) if self.steps else self._all_steps(model)
        mids = None if self.t_mid is None else angles(self.t_mid)
        ways = [sampling_options(self.overrides, num_steps=n, solver=self.solver, t_mid=mids) for n in steps]
        for options in ways:
            model.sampling(**options)
        pair = None if self.against is None else Pair(run, model, ways, Run.open(self.against))
        moved = {"source": self.data, "start": self.source, "root": str(self.data_root) if self.data_root else None}
        data = run.config.data.replace(**{name: value for name, value in moved.items() if value is not None})
        dataset = data.load()
        if dataset.identity.sha256 != run.config.identity.sha256:
            raise UserError(f"data: {data.source!r} is not the data this run was trained on (its hash differs)")
        settings = {
            "n": self.num,
            "seed": self.seed,
            "metrics": names,
            "features": features,
            "reference": self.reference,
            "batch_size": self.batch_size,
        }
        if pair is not None:
            return self._pair(pair, dataset, settings)
        lines: list[Any] = []
        values = []
        for options in ways:
            with self._bar(f"sampling {folder}") as on_step:
                evaluation, _ = evaluate_run(run, dataset, on_step=on_step, model=model, **settings, **options)
            record(run, evaluation)
            values.append(evaluation.to_json())
            chain = [f"{evaluation.sampling['num_steps']} steps"] if "num_steps" in evaluation.sampling else []
            cost = [*chain, f"{evaluation.nfe} network evaluations", f"{evaluation.items_per_second:.1f} samples/s"]
            lines.append(
                table(
                    evaluation.scores,
                    f"{folder}: {', '.join(cost)}, {evaluation.peak_memory_mib:.0f} MiB",
                )
            )
        lines.append(f"wrote {run.folder / 'evaluation.json'}")
        return Result(
            {"run": str(folder), "evaluations": values}, lines, f"osmose compare {folder} OTHER --out comparison"
        )

    def _pair(self, pair: Pair, dataset: Dataset, settings: dict[str, Any]) -> Result:
        from osmose.metrics.pairing import evaluate_pair
        from osmose.metrics.pairing_pictures import write_pictures

        result = evaluate_pair(pair, dataset, self._bar, **settings)
        pictures = write_pictures(result, dataset.spec)
        folders = dict.fromkeys((pair.run.folder, pair.against.folder))
        paths = [*(folder / "evaluation.json" for folder in folders), *pictures]
        values = {
            "run": str(pair.run.folder),
            "against": str(pair.against.folder),
            "rows": result.to_json(),
            "full": result.full.evaluation.to_json(),
            "evaluations": [row.evaluation.to_json() for row in result.rows],
            "wrote": [str(path) for path in paths],
        }
        wrote = "wrote " + ", ".join(map(str, paths))
        again = f"osmose compare {' '.join(map(str, folders))} --out comparison"
        return Result(values, [result.table(), wrote], again)

    def _all_steps(self, model: GenerativeModel) -> list[int] | list[None]:
        """What is scored where --steps says nothing: what the configuration says, or all that a student has learned."""
        from osmose.methods.students import Students

        said = {name.removeprefix("sampling.") for name in self.overrides}
        if self.against is None or "num_steps" in said or not isinstance(model, Students):
            return [None]
        return sorted(model.grids)

    def _bar(self, label: str) -> AbstractContextManager[Any]:
        return sampling_bar(label, not (self.quiet or self.json))

    def _file(self, features: Any, names: list[str] | None) -> Result:
        import torch

        from osmose.data.dataset import DataConfig
        from osmose.metrics.admission import read_samples
        from osmose.metrics.evaluate import score_samples, table

        if self.data is None or self.samples is None:
            raise UserError("--data: required with --samples: the real data to compare with")
        unused = {"--steps": self.steps, "-n": self.num, "--solver": self.solver, "--batch-size": self.batch_size}
        for name, value in {**unused, **self.overrides}.items():
            if value is not None:
                raise UserError(f"{name}: has no meaning with --samples, which are drawn already")
        root = {"root": str(self.data_root)} if self.data_root else {}
        dataset = DataConfig.parse({"source": self.data, **root}).load()
        samples = torch.from_numpy(read_samples(self.samples)).float()
        scores = score_samples(
            samples,
            dataset,
            reference="train" if self.reference == "train" else "held-out",
            features=features,
            seed=self.seed,
            metrics=names,
        )
        values = {"samples": str(self.samples), "scores": [score.to_json() for score in scores]}
        return Result(values, [table(scores, f"{self.samples} against {self.data}")])


def _numbers(text: str) -> list[int]:
    numbers = whole_numbers("--steps", text, "4,20,100")
    if min(numbers) < 1:
        raise UserError(f"--steps: {min(numbers)} is not valid: must be at least 1")
    return numbers

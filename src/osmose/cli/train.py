"""`osmose train`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, at_least, quiet_warnings
from osmose.configuration import ConfigError, override, value_at
from osmose.data import SOURCES
from osmose.errors import UserError
from osmose.methods import COMPOSED, CONTINUED, DISTILLED, METHODS
from osmose.networks import NETWORKS

_TRAINED = ", ".join(kind for kind in METHODS.entries if kind not in (*COMPOSED, *DISTILLED))
#: Flags that are another way to write an override.
_SAID = {
    "data": "data.source",
    "source": "data.start",
    "paired": "data.paired",
    "data_root": "data.root",
    "size": "data.size",
    "channels": "data.channels",
    "downsample": "data.downsample",
    "levels": "data.levels",
    "max_count": "data.max_count",
    "skip_bad": "data.skip_bad",
    "time_column": "data.time_column",
    "id_column": "data.id_column",
    "columns": "data.columns",
    "window": "data.window",
    "seed": "seed",
    "steps": "training.steps",
    "batch_size": "training.batch_size",
    "lr": "training.lr",
    "optimizer": "training.optimizer.kind",
    "precision": "training.precision",
    "compile": "training.compile",
    "tensorboard": "training.tensorboard",
    "network": "network.kind",
    "schedule": "schedule.kind",
    "conditional": "conditional",
}


@dataclass
class Train:
    """Train a model on data and leave it in a run folder.

    Everything has a default that suits the data. What has no flag of its own is set by its dotted name anywhere on the
    line: network.channels=64 schedule.num_steps=500 training.ema=0.9995 sampling.solver=heun. A wrong name is answered
    with the nearest right one; `osmose info RUN` prints them all.
    """

    method: Annotated[Positional[str | None], arg(metavar="METHOD", help=f"one of: {_TRAINED}")] = None
    data: Annotated[
        str | None,
        arg(
            metavar="DATA",
            help=f"one of: {', '.join(SOURCES.entries)}; some take an argument: folder:photos, toy:swiss-roll",
        ),
    ] = None
    source: Annotated[
        str | None, arg(metavar="DATA", help="data that samples begin with, as --data (interpolant, bridge)")
    ] = None
    paired: Annotated[bool, arg(help="item i of --data belongs to item i of --source")] = False
    data_root: Annotated[
        Path | None, arg(help="folder that holds mnist/, fashion-mnist/ or cifar10/ ($OSMOSE_DATA_ROOT)")
    ] = None
    size: Annotated[int | None, arg(help="side that images of other sizes are brought to")] = None
    channels: Annotated[int | None, arg(help="1 for grey, 3 for colour (folder: and hub:)")] = None
    downsample: Annotated[int | None, arg(help="average blocks of so many pixels a side; a power of two")] = None
    levels: Annotated[int | None, arg(help="bring values to so many levels of their range; 2: black-white")] = None
    max_count: Annotated[int | None, arg(help="largest count that can occur (counts:); found in the data")] = None
    skip_bad: Annotated[bool, arg(help="leave out images that cannot be read")] = False
    time_column: Annotated[str | None, arg(help="of series: the column of times; the first")] = None
    id_column: Annotated[str | None, arg(help="of series: the column that tells them apart")] = None
    columns: Annotated[str | None, arg(metavar="NAME,...", help="of series: columns of values; all")] = None
    window: Annotated[int | None, arg(help="of series and text: windows of so many rows, or characters")] = None
    init: Annotated[
        Path | None,
        arg(metavar="RUN0", help="a trained diffusion to begin with (sct, ect), and its data"),
    ] = None
    out: Annotated[Path | None, arg(metavar="RUN", help="the run folder to make; required")] = None
    resume: Annotated[bool, arg(help="continue the run in --out with its own settings")] = False
    steps: Annotated[int | None, arg(help="optimisation steps")] = None
    batch_size: Annotated[int | None, arg(help="items per step")] = None
    lr: Annotated[float | None, arg(help="learning rate after warm-up")] = None
    optimizer: Annotated[
        str | None, arg(help="adam, or for tensor trains als (a step is a sweep over all cores) or riemannian")
    ] = None
    network: Annotated[str | None, arg(help=f"one of: {', '.join(NETWORKS.choices)}")] = None
    schedule: Annotated[str | None, arg(help="linear, cosine, ve, trig, straight; of blackout logit, cosine")] = None
    precision: Annotated[str | None, arg(help="auto, fp32 or bf16")] = None
    conditional: Annotated[bool, arg(help="tell the network the class of each item")] = False
    compile: Annotated[bool, arg(help="torch.compile the network")] = False
    tensorboard: Annotated[bool, arg(help="also write TensorBoard events")] = False
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    seed: Annotated[int | None, arg(help="of everything random; 0 if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Check everything, then train."""
        if self.out is None:
            raise UserError("--out: required: the run folder to make")
        at_least(self, 1, "threads")
        with quiet_warnings():
            return self._resume(self.out) if self.resume else self._start(self.out)

    def _changes(self) -> dict[str, Any]:
        """What was said, by the names that config.json uses (`network.` there stands under `method.`)."""
        said = {path: getattr(self, name) for name, path in _SAID.items()}
        if self.columns is not None:
            said["data.columns"] = [name.strip() for name in self.columns.split(",")]
        overrides = {name.removeprefix("method."): value for name, value in self.overrides.items()}
        return {k: v for k, v in said.items() if v is not None and v is not False} | overrides

    def _start(self, out: Path) -> Result:
        if self.method is None:
            raise UserError(f"METHOD: required: one of {_TRAINED}")
        METHODS.resolve(self.method)
        changes = self._changes()
        if self.init is not None:
            return self._continue(self.init, out, changes)
        self._require_data(changes)
        from osmose.training.run import Run, require_free

        require_free(out)
        data, dataset = self._data(changes)
        return self._train(Run.create(out, self._config(data, dataset, changes)), dataset)

    def _require_data(self, changes: dict[str, Any]) -> None:
        if "data.source" not in changes:
            raise UserError(f"--data: required: one of {', '.join(SOURCES.entries)}")

    def _data(self, changes: dict[str, Any]) -> tuple[Any, Any]:
        """What `changes` say of the data, which are taken out of them, and the data themselves."""
        from osmose.data.dataset import DataConfig

        given = {k.removeprefix("data."): changes.pop(k) for k in list(changes) if k.startswith("data.")}
        try:
            data = DataConfig.parse(given)
        except ConfigError as error:
            raise UserError(f"data.{error}") from None
        return data, data.load()

    def _config(self, data: Any, dataset: Any, changes: dict[str, Any]) -> Any:
        """The configuration of the run, whose parts fit each other."""
        from osmose.training.recipes import checked, recipe

        assert self.method is not None
        try:
            return checked(recipe(self.method, data, dataset, changes.pop("seed", 0), changes))
        except UserError as error:  # what the file calls method.network is network on the command line
            raise UserError(str(error).removeprefix("method.")) from None

    def _continue(self, init: Path, out: Path, changes: dict[str, Any]) -> Result:
        """Begin with the weights of a run, on its data."""
        from osmose.acceleration.teaching import prepared
        from osmose.training.run import Run

        assert self.method is not None
        if self.method not in CONTINUED:
            raise UserError(f"--init: {self.method} does not begin with another run; {' and '.join(CONTINUED)} do")
        for name in changes:
            if name.startswith("data.") and name != "data.root":
                flag = "data" if name == "data.source" else name.removeprefix("data.").replace("_", "-")
                raise UserError(f"--{flag}: given, but the data are those of --init {init}")
        root = changes.pop("data.root", None)
        teaching, dataset = prepared(Run.open(init), out, self.method, changes, root)
        teaching.trainer(dataset, progress=False)  # from here on it is a run like any other
        return self._train(teaching.run, dataset)

    def _resume(self, out: Path) -> Result:
        from osmose.training.run import Run

        run = Run.open(out)
        kind, parent = run.config.method.kind, run.config.parent
        if kind in CONTINUED and parent is not None and not any((out / "checkpoints").glob("step_*")):
            raise UserError(f"{out}: stopped before it had the weights of {parent.folder!r}; delete it and start again")
        if self.method not in (None, kind):
            raise UserError(f"METHOD: {self.method!r} given, but {out} was started with {kind!r}; resume without it")
        changes = {
            k if k.startswith(("training.", "data.")) or k == "seed" else f"method.{k}": v
            for k, v in self._changes().items()
        }
        stored = run.config.to_json()
        try:
            config = type(run.config).parse(override(stored, changes))
        except ConfigError as error:
            raise UserError(str(error).removeprefix("method.")) from None
        wanted = config.to_json()
        for path in sorted(changes):
            # A kind, or the name of a preset, stands for all fields of its part.
            whole = path.removesuffix(".kind")
            for name, before, after in _differences(value_at(stored, whole), value_at(wanted, whole), whole):
                if name not in ("data.root", "data.source", "data.start"):  # where they lie: the hash decides
                    name = name.removeprefix("method.")
                    raise UserError(
                        f"{name}: {after!r} given, but {out} was started with {before!r}; resume without it"
                    )
        dataset = config.data.load()
        return self._train(run, dataset)

    def _train(self, run: Any, dataset: Any) -> Result:
        import torch

        from osmose.training.progress import Progress
        from osmose.training.trainer import DivergedError, Trainer

        if self.threads:
            torch.set_num_threads(self.threads)
        trainer = Trainer(run, dataset, progress=Progress(show=not (self.quiet or self.json)))
        began = trainer.step if trainer.checkpoints.all() else None
        again = f"osmose train --out {run.folder} --resume"
        try:
            finished = trainer.fit()
        except DivergedError as error:
            print(f"osmose: {error}", file=sys.stderr)
            return Result({"run": str(run.folder), "error": str(error)}, status=1)
        last: dict[str, Any] = next((line for line in reversed(run.metrics()) if "validation_loss" in line), {})
        values = {"run": str(run.folder), "step": trainer.step, "finished": finished, **last}
        if not finished:
            return Result(values, [f"stopped at step {trainer.step}; everything is saved"], again, status=130)
        loss = f"held-out loss {last['validation_loss']:.4f}" if last else ""
        if trainer.step == began:
            note = f"{run.folder} was at its last step, {began}, already; a longer run has to be trained anew"
            if not run.config.training.steps:
                note = f"{run.folder} is fitted already"
            return Result(values, [note], run.config.method.use.format(run=run.folder))
        wrote = [f"wrote {run.folder}: {len(dataset.train)} items, {trainer.step} steps, {loss}"]
        return Result(values, wrote, run.config.method.use.format(run=run.folder))


def _differences(before: Any, after: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names at which two nested values differ, with both values; kinds before what depends on them."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield path, before, after
        return
    for name in sorted(before | after, key=lambda name: (name != "kind", name)):
        yield from _differences(before.get(name), after.get(name), f"{path}.{name}")

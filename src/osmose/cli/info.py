"""`osmose info`."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from osmose.cli.command import Result, quiet_warnings
from osmose.errors import UserError


@dataclass
class Info:
    """Describe a run (parameters, operations, settings, data, lineage, scores) or a data set (form, size, identity)."""

    what: Annotated[
        Positional[str | None], arg(metavar="RUN|DATA", help="a run folder, or data as for train --data")
    ] = None
    data_root: Annotated[Path | None, arg(help="folder that holds mnist/, fashion-mnist/ or cifar10/")] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Look and tell."""
        if self.what is None:
            raise UserError("RUN|DATA: required: a run folder, or data as for train --data")
        from osmose.data import SOURCES

        if Path(self.what).is_dir():
            return self._run(Path(self.what))
        if self.what.partition(":")[0] in SOURCES.entries:
            return self._data(self.what)
        raise UserError(f"{self.what}: neither a run folder nor a data set; data sets are {', '.join(SOURCES.entries)}")

    def _run(self, folder: Path) -> Result:
        from osmose.analysis.cost import cost_of
        from osmose.metrics.evaluation import headline, read_evaluations
        from osmose.training.checkpoint import Checkpoints
        from osmose.training.run import Run

        run = Run.open(folder)
        config = run.config
        model = run.model() if run.weights.is_file() else config.method.build(config.spec)
        cost = cost_of(model)
        evaluations = read_evaluations(run)
        checkpoints = Checkpoints(run, config.training.keep_checkpoints).all()
        values: dict[str, Any] = {
            "run": str(folder),
            "step": int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0,
            "parameters": cost.parameters,
            "macs": cost.macs,
            "seconds_per_evaluation": cost.seconds,
            "config": config.to_json(),
            "evaluations": [e.to_json() for e in evaluations],
        }
        step_seconds = 3 * cost.seconds * config.training.batch_size
        rows = {
            "method": config.method.kind,
            "trained": f"{values['step']} of {config.training.steps} steps, seed {config.seed}",
            "parameters": f"{cost.parameters / 1e6:.3f} million",
            "operations": f"{cost.macs / 1e6:.1f} million multiply-adds per network evaluation of one item",
            "time here": f"{cost.seconds * 1e3:.2f} ms per evaluation, about {step_seconds:.2g} s per training step",
            "data": f"{config.identity.source}, {config.identity.num_train} items to train on, "
            f"{config.identity.num_held_out} held out ({config.identity.split}), sha256 {config.identity.sha256[:12]}",
            "form": _form(config.spec),
            "parent": f"{config.parent.folder} ({config.parent.sha256[:12]})"
            if config.parent
            else "none: trained from data",
            "made with": ", ".join(f"{name} {version}" for name, version in config.versions.items()),
        }
        lines = [f"{name:<11} {text}" for name, text in rows.items()]
        lines.append("settings:")
        lines += [f"  {name} = {value}" for name, value in _flat(config.to_json()["method"])]
        lines += [f"  training.{name} = {value}" for name, value in _flat(config.to_json()["training"])]
        if evaluations:
            metric = headline(evaluations)
            for e in evaluations:
                score = e.score(metric)
                if score is not None:
                    lines.append(
                        f"score       {metric} {score.value:.4g} at {e.nfe} evaluations (real data: {score.floor})"
                    )
        return Result(values, lines, None if evaluations else f"osmose evaluate {folder}")

    def _data(self, source: str) -> Result:
        from osmose.data.dataset import DataConfig

        with quiet_warnings():
            root = {"root": str(self.data_root)} if self.data_root else {}
            dataset = DataConfig.parse({"source": source, **root}).load()
        identity, spec = dataset.identity, dataset.spec
        lines = [
            f"data       {identity.source}",
            f"form       {_form(spec)}",
            f"train      {identity.num_train} items",
            f"held out   {identity.num_held_out} items ({identity.split})",
            f"classes    {', '.join(dataset.class_names) if dataset.class_names else spec.num_classes or 'none'}",
            f"sha256     {identity.sha256}",
        ]
        return Result(
            {"spec": spec.to_json(), "identity": identity.to_json()},
            lines,
            f"osmose train ddpm --data {source} --out RUN",
        )


def _form(spec: Any) -> str:
    shape = "x".join(map(str, spec.shape))
    levels = f", {spec.levels} levels" if spec.levels else ""
    return f"{spec.kind} {shape}" + (
        f", values {spec.range[0]:g} to {spec.range[1]:g}{levels}" if spec.range else ", unbounded"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, json_module.dumps(value)))
    return flat

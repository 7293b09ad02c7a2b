"""`osmose info`."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, quiet_warnings
from osmose.configuration import ConfigError, override
from osmose.errors import UserError
from osmose.networks import NETWORKS
from osmose.networks.presets import EVENTS

if TYPE_CHECKING:
    from osmose.training.config import RunConfig


@dataclass
class Info:
    """Describe a run, a data set, or a network by its name.

    A run: parameters, operations, time, settings, data, lineage, scores. A data set: form, size, identity. A network,
    for example mbconv96 or unet network.channels=64: parameters, operations, time, and its parts.
    """

    what: Annotated[
        Positional[str | None],
        arg(
            metavar="NETWORK|RUN|DATA",
            help=f"a run folder, data as for train --data, or one of: {', '.join(NETWORKS.choices)}",
        ),
    ] = None
    data_root: Annotated[Path | None, arg(help="folder that holds mnist/, fashion-mnist/ or cifar10/")] = None
    window: Annotated[int | None, arg(help="of series: windows of so many rows")] = None
    id_column: Annotated[str | None, arg(help="of series: the column that tells them apart")] = None
    time_column: Annotated[str | None, arg(help="of series: the column of times; the first")] = None
    shape: Annotated[str | None, arg(help="what a NETWORK is to be for: channels,height,width")] = None
    batch_size: Annotated[int | None, arg(help="items per training step of a NETWORK; 16 if not given")] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Look and tell."""
        if self.what is None:
            raise UserError("NETWORK|RUN|DATA: required: a run folder, data as for train --data, or a network")
        from osmose.data import SOURCES

        is_run, is_data = Path(self.what).is_dir(), self.what.partition(":")[0] in SOURCES.entries
        if not is_run and not is_data and self.what in NETWORKS.choices:
            return self._network(self.what)
        of_series = {"--window": self.window, "--id-column": self.id_column, "--time-column": self.time_column}
        for name, value in of_series.items():
            if value is not None and not is_data:
                raise UserError(f"{name}: {value!r} is for data of series, and {self.what} is none")
        told = {"--shape": self.shape, "--batch-size": self.batch_size, **({} if is_data else self.overrides)}
        if not is_run and not is_data:
            raise UserError(
                f"{self.what}: neither a run folder nor a data set nor a network; data sets are "
                f"{', '.join(SOURCES.entries)}; networks are {', '.join(NETWORKS.choices)}"
            )
        for name, value in told.items():
            if value is not None:
                raise UserError(
                    f"{name}: {value!r} is for networks, and {self.what} is a {'run' if is_run else 'data set'}"
                )
        return self._run(Path(self.what)) if is_run else self._data(self.what)

    def _network(self, name: str) -> Result:
        from osmose.data.dataset import DataSpec
        from osmose.methods import METHODS
        from osmose.training.config import TrainingConfig

        shape = _read_shape(self.shape) if self.shape is not None else EVENTS.get(name, (3, 32, 32))
        try:
            training = TrainingConfig.parse({"batch_size": 16 if self.batch_size is None else self.batch_size})
        except ConfigError as error:
            raise UserError(f"--batch-size: {error.reason}") from None
        # A network is measured at the work that it is for.
        config = METHODS.resolve("ddpm").parse(override({"network": {"kind": name}}, self.overrides))
        model = config.build(DataSpec(kind="image" if len(shape) == 3 else "points", shape=shape))
        table = config.network.table(shape)
        cost, rows = _cost(model, training)
        values = {"network": name, "shape": list(shape), "config": config.network.to_json(), **cost, "table": table}
        lines: list[Any] = [f"{'network':<11} {name}: {NETWORKS.choices[name]}"]
        lines.append(f"{'for':<11} events of shape {'x'.join(map(str, shape))}")
        lines += [f"{name:<11} {text}" for name, text in rows.items()]
        if table:
            lines.append(_table(table))
        lines.append("settings:")
        lines += [f"  network.{name} = {value}" for name, value in _flat(config.network.to_json())]
        words = "".join(f" {path}={_word(value)}" for path, value in self.overrides.items())
        return Result(values, lines, f"osmose train ddpm --data DATA --out RUN --network {name}{words}")

    def _run(self, folder: Path) -> Result:
        from osmose.analysis.training_memory import make_teachable
        from osmose.metrics.evaluation import headline, read_evaluations
        from osmose.networks.quantized import in_fewer_bits
        from osmose.networks.tensor_train import TensorTrain
        from osmose.training.checkpoint import Checkpoints
        from osmose.training.run import Run

        run = Run.open(folder)
        config = run.config
        model = run.model() if run.weights.is_file() else config.method.build(config.spec)
        make_teachable(model)
        own = config.method.network_config
        cost, costs = _cost(model, config.training, trains=own is None or not in_fewer_bits(own))
        evaluations = read_evaluations(run)
        checkpoints = Checkpoints(run, config.training.keep_checkpoints).all()
        values: dict[str, Any] = {
            "run": str(folder),
            "step": int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0,
            **cost,
            "config": config.to_json(),
            "evaluations": [e.to_json() for e in evaluations],
        }
        rows = {
            "method": config.method.kind,
            "trained": _trained(config, values["step"]),
            **_quantized(folder),
            **costs,
            "data": f"{config.identity.source}, {config.identity.num_train} items to train on, "
            f"{config.identity.num_held_out} held out ({config.identity.split}), sha256 {config.identity.sha256[:12]}",
            "form": _form(config.spec),
            **_beginning(config),
            "parent": f"{config.parent.folder} ({config.parent.sha256[:12]})"
            if config.parent
            else "none: trained from data",
            "made with": ", ".join(f"{name} {version}" for name, version in config.versions.items()),
        }
        lines: list[Any] = [f"{name:<11} {text}" for name, text in rows.items()]
        for network in model.networks():
            if isinstance(network, TensorTrain):  # of which training may have changed the ranks
                values["table"] = network.table()
                lines.append(_table(values["table"]))
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
            flags = {"window": self.window, "id_column": self.id_column, "time_column": self.time_column}
            said = {name: value for name, value in flags.items() if value is not None}
            root = {"root": str(self.data_root)} if self.data_root else {}
            try:
                config = DataConfig.parse({"source": source, **root, **said, **self.overrides})
            except ConfigError as error:
                raise UserError(f"data.{error}") from None
            dataset = config.load()
        identity, spec = dataset.identity, dataset.spec
        words = "".join(f" --{name.replace('_', '-')} {value}" for name, value in said.items())
        words += "".join(f" data.{name}={_word(value)}" for name, value in self.overrides.items())
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
            f"osmose train {_method_for(dataset.spec, source)} --data {source}{words} --out RUN",
        )


def _trained(config: RunConfig, step: int) -> str:
    from osmose.methods import COMPOSED
    from osmose.methods.students import DistilledConfig
    from osmose.networks.quantized import in_fewer_bits

    if isinstance(config.method, DistilledConfig):
        return f"by {config.method.history()}, {config.training.steps} updates in all, seed {config.seed}"
    if config.method.kind in COMPOSED:
        return "not at all: put together"
    if config.method.network_config is not None and in_fewer_bits(config.method.network_config):
        return "as the run that it was made from, and quantized"
    network = config.method.to_json().get("network")
    if isinstance(network, dict) and network["kind"] == "experts":
        return f"in {len(network['parts'])} blocks of {config.training.steps} steps each, seed {config.seed}"
    return f"{step} of {config.training.steps} steps, seed {config.seed}"


def _quantized(folder: Path) -> dict[str, str]:
    """Of a run that was quantised, how, and how far its samples are from those of the run it was made from."""
    from osmose.training import files

    path = folder / "quantization.json"
    if not path.is_file():
        return {}
    found = files.read_json(path)
    config, size = found["config"], found["bytes"]
    bits = "bf16" if config["to"] == "bf16" else f"{config['weight_bits']}-bit weights, {config['bits']}-bit inputs"
    steps = found.get("steps")
    mixed = f", {steps['high']} of {steps['of']} steps in {steps['precision']}" if steps else ""
    away = f"{size['before'] / 1e6:.2f} to {size['after'] / 1e6:.2f} MB, samples deviate by {found['deviation']:.3g}"
    return {"quantized": f"{bits}{mixed}; {away}"}


def _cost(model: Any, training: Any, trains: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """What a model costs in `--json`, and for people."""
    import torch

    from osmose.analysis.cost import cost_of, seconds_per_step

    cost, step = cost_of(model), seconds_per_step(model, training) if trains else None
    threads = torch.get_num_threads()
    values = {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "seconds_per_evaluation": cost.seconds,
        "seconds_per_step": None if step is None else step.seconds,
        "batch_size": training.batch_size,
        "items_measured": None if step is None else step.items,
        "precision": None if step is None else step.precision,
        "threads": threads,
    }
    rows = {"parameters": f"{cost.parameters / 1e6:.3f} million ({cost.parameters:,})"}
    times = []
    if model.networks():
        count = f"{cost.macs / 1e6:.1f} million" if cost.macs >= 1e5 else f"{cost.macs:,}"
        rows["operations"] = f"{count} multiply-adds per network evaluation of one item"
        times.append(f"{cost.seconds * 1e3:.2f} ms per evaluation of one item")
    if step is not None:
        whole = step.items == training.batch_size // training.accumulate
        measured = f"{step.precision}, measured with {'all' if whole else step.items} of them"
        times.append(f"{step.seconds:.2g} s per training step of {training.batch_size} items ({measured})")
    if times:
        rows["time here"] = "; ".join([*times, f"{threads} thread{'s' if threads != 1 else ''}"])
    return values, rows


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*("yes" if value is True else "" if value is False else str(value) for value in row.values()))
    return table


def _word(value: Any) -> str:
    """A value as it stands after the = of an override."""
    return value if isinstance(value, str) else json_module.dumps(value, separators=(",", ":")).strip("[]")


def _read_shape(text: str) -> tuple[int, ...]:
    sides = text.split(",")
    if len(sides) not in (1, 3) or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(
            f"--shape: {text!r} is not valid: write channels,height,width (3,32,32), or a number for points"
        )
    return tuple(map(int, sides))


def _method_for(spec: Any, source: str) -> str:
    """A method to begin with."""
    if spec.series is not None:
        return "dspd"
    if spec.alphabet is not None:
        return "masked"
    return "blackout" if source.startswith("counts:") else "ddpm"


def _form(spec: Any) -> str:
    if spec.series is not None:
        form, unit = spec.series, f" {spec.series.unit}" if spec.series.unit else ""
        alike = "all alike, nothing missing" if form.regular else "times of their own, or values missing"
        return (
            f"series of {', '.join(form.columns)} at up to {spec.shape[1]} times, {form.gap:g}{unit} apart (median), "
            f"{alike}; correlated over {form.memory:.3g}{unit}"
        )
    if spec.alphabet is not None:
        return f"text, {spec.shape[0]} characters an item, of an alphabet of {len(spec.alphabet)}: {spec.alphabet!r}"
    shape = "x".join(map(str, spec.shape))
    levels = f", {spec.levels} levels" if spec.levels else ""
    return f"{spec.kind} {shape}" + (
        f", values {spec.range[0]:g} to {spec.range[1]:g}{levels}" if spec.range else ", unbounded"
    )


def _beginning(config: RunConfig) -> dict[str, str]:
    """What samples begin with, where it is data."""
    if config.spec.start is None:
        return {}
    pairs = ", each with its own item" if config.data.paired else ""
    return {"begins with": f"{config.data.start}{pairs}: {_form(config.spec.start)}"}


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, json_module.dumps(value)))
    return flat

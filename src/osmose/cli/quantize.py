"""`osmose quantize`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from osmose.cli.command import Result, at_least, quiet_warnings, whole_numbers
from osmose.configuration import ConfigError
from osmose.errors import UserError


@dataclass
class Quantize:
    """Make a run compute in 8-bit integers, or in bf16: smaller, and faster where OpenVINO computes it.

    Ranges of layers' inputs are measured while the run draws samples by its own sampler (static), or taken of each item
    as it comes (--inputs dynamic: smaller, not faster). --train goes on training with rounded weights, taught by the
    run itself besides the data. The first and the last layer, and what sees time and class alone, keep real inputs.

    Some steps of the chain may keep their precision: those --at 1,2,20, --ends K of both ends, or as few as it takes
    for samples to deviate no more than --budget from the run's own of the same noise, in deviations of these from
    their mean.

    The result is a run: sample, evaluate --against RUN and all else work. `osmose[export]` has OpenVINO.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run with a network that is told its time")]
    out: Annotated[Path | None, arg(metavar="RUN2", help="the run folder to make; required")] = None
    to: Annotated[str, arg(help="int8 or bf16")] = "int8"
    inputs: Annotated[str | None, arg(help="static or dynamic; static if not given")] = None
    bits: Annotated[int | None, arg(help="of layers' inputs, 2 to 8; 8 if not given")] = None
    weight_bits: Annotated[
        int | None, arg(help="of weights, 2 to 8; if not given 8, or 7 where the processor has no VNNI")
    ] = None
    calibration: Annotated[
        str | None, arg(help="inputs that ranges are measured on: sampler, forward, noise or data; sampler")
    ] = None
    items: Annotated[int | None, arg(help="samples that ranges are measured on; 64 if not given")] = None
    keep: Annotated[str | None, arg(metavar="NAME,...", help="layers left as they are; * stands for any part")] = None
    whole: Annotated[bool, arg(help="one scale for an input that is joined from several parts")] = False
    train: Annotated[int | None, arg(metavar="STEPS", help="steps of training with rounded weights; none")] = None
    lr: Annotated[float | None, arg(help="of that training; 0.0001 if not given")] = None
    batch_size: Annotated[int | None, arg(help="of that training; as the run's if not given")] = None
    distillation: Annotated[float | None, arg(help="weight of the run's own answers in that training; 1")] = None
    high: Annotated[str | None, arg(help="what steps that need precision are computed in: fp32 or bf16; fp32")] = None
    at: Annotated[str | None, arg(metavar="N,N,...", help="steps in high precision, counted from 1")] = None
    ends: Annotated[int | None, arg(metavar="K", help="steps in high precision at each end of the chain")] = None
    budget: Annotated[float | None, arg(help="deviation of samples, as 0.05, by which such steps are found")] = None
    seed: Annotated[int | None, arg(help="of everything random; 0 if not given")] = None
    resume: Annotated[bool, arg(help="continue the training in --out by its own settings")] = False
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Check everything, then quantise."""
        if self.out is None:
            raise UserError("--out: required: the run folder to make")
        at_least(self, 1, "threads")
        import torch

        from osmose.acceleration.quantization import Quantization
        from osmose.acceleration.quantization_plan import QuantizationConfig
        from osmose.training.run import Run, data_of
        from osmose.training.trainer import DivergedError

        if self.threads:
            torch.set_num_threads(self.threads)
        source, said = Run.open(self.model), self._said()
        if self.resume:
            for name in said:
                raise UserError(
                    f"{_flag(name)}: given, but {self.out} is continued by its own settings; resume without it"
                )
            made = Quantization.open(self.out, source)
            config = made.config
        else:
            try:
                config = QuantizationConfig.parse(said)
            except ConfigError as error:
                raise UserError(f"{_flag(error.path)}: {error.reason}") from None
        try:
            with quiet_warnings():
                dataset = data_of(source, self.data_root) if config.needs_data else None
                made = made if self.resume else Quantization.begin(self.out, source, config)
                before = made.finished
                finished = made.carry_out(dataset, progress=not (self.quiet or self.json))
        except DivergedError as error:
            print(f"osmose: {error}", file=sys.stderr)
            return Result({"run": str(self.out), "error": str(error)}, status=1)
        except KeyboardInterrupt:
            finished = False
            if not (self.out / "quantization.json").is_file():  # before anything was begun
                raise
        if not finished:
            again = f"osmose quantize {self.model} --out {self.out} --resume"
            return Result(
                {"run": str(self.out), "finished": False},
                ["stopped; what training has done is saved"],
                again,
                status=130,
            )
        return self._made(made.found(), before)

    def _said(self) -> dict[str, Any]:
        names = ("inputs", "bits", "weight_bits", "calibration", "items", "high", "ends", "budget", "seed")
        said: dict[str, Any] = {name: getattr(self, name) for name in names}
        said["to"] = None if self.to == "int8" else self.to
        said["at"] = None if self.at is None else whole_numbers("--at", self.at, "1,2,20")
        said["keep"] = None if self.keep is None else self.keep.split(",")
        said["split"] = False if self.whole else None
        training = {name: getattr(self, name) for name in ("lr", "batch_size", "distillation")}
        training = {name: value for name, value in training.items() if value is not None}
        if self.train is not None:
            said["tuning"] = {"steps": self.train, **training}
        elif training:
            name = next(iter(training)).replace("_", "-")
            raise UserError(
                f"--{name}: given, and is of training with rounded weights; say how long with --train STEPS"
            )
        return {name: value for name, value in said.items() if value is not None}

    def _made(self, found: dict[str, Any], before: bool) -> Result:
        size = " to ".join(f"{found['bytes'][name] / 1e6:.2f} MB" for name in ("before", "after"))
        lines = [f"{self.out} is finished already" if before else f"wrote {self.out}: {size}"]
        from osmose.networks.processor import instructions

        config = found["config"]
        steps = found.get("steps")
        if steps and steps["high"] == steps["of"]:
            lines.append(f"all {steps['of']} steps are in {steps['precision']}: nothing is left to integers")
        elif layers := found.get("layers"):
            rounded = [layer for layer in layers if layer["inputs"] != "float"]
            worst = max(rounded or layers, key=lambda layer: layer["error"])
            lines.append(
                f"{len(layers)} layers with {config['weight_bits']}-bit weights, {len(rounded)} of them with "
                f"{config['bits']}-bit inputs ({config['inputs']}); most off by itself: {worst['name']}, "
                f"{worst['error']:.2%} of its output"
            )
            if config["weight_bits"] == 7 and self.weight_bits is None:
                lines.append("7-bit weights: this processor has no VNNI, without which sums of 8-bit weights overflow")
        if steps and 0 < steps["high"] < steps["of"]:
            lines.append(f"{steps['high']} of {steps['of']} steps in {steps['precision']}")
        precision = found.get("precision")
        if precision and precision["deviation"] > precision["budget"]:
            lines.append(
                f"no choice of steps keeps the budget: {precision['deviation']:.3g} is the least that was found"
            )
        if "bf16" in (config["to"], config["high"]) and "bf16" not in instructions():
            lines.append(
                "this processor has neither AVX512-BF16 nor AMX: torch takes several times as long in bf16 as in fp32 "
                "here, and --runtime openvino does not; bytes are what is saved"
            )
        lines.append(
            f"samples deviate from those of {self.model} by {found['deviation']:.3g} of these' deviations "
            f"({found['samples']} samples of the same noise)"
        )
        if config["tuning"] is not None:
            lines.append("it was trained further: it deviates by what it has learned, too; scores say which is better")
        if found["computed_by"] == "torch":
            lines.append("computed by torch, no faster than before: " + found["why_torch"])
        values = {"run": str(self.out), "finished": True, **found}
        return Result(values, lines, f"osmose evaluate {self.out} --against {self.model}")


def _flag(path: str) -> str:
    """The flag of a field of the configuration."""
    first, _, rest = path.partition(".")
    name = {"tuning": "train", "split": "whole"}.get(first, first)
    return f"--{(rest if rest and rest != 'steps' else name).replace('_', '-')}"

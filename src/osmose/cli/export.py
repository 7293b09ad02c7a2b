"""`osmose export`, `osmose import diffusers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from osmose.cli.command import Result, quiet_warnings
from osmose.data import SOURCES
from osmose.errors import UserError

_TARGETS = ("diffusers", "onnx", "openvino")


@dataclass
class Export:
    """Write a run for another library or runtime.

    diffusers: a folder that opens as a DDPMPipeline, for runs of ddpm and iddpm with a UNet. onnx, openvino: the
    network as a graph, and sampler.json with the numbers of a sampling loop of --steps steps; for runs of ddpm, iddpm
    and edm with any network.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder")]
    to: Annotated[str | None, arg(metavar="TARGET", help=f"one of: {', '.join(_TARGETS)}; required")] = None
    out: Annotated[Path | None, arg(metavar="FOLDER", help="the folder to make; required")] = None
    steps: Annotated[int | None, arg(help="of the loop in sampler.json; the run's own number if not given")] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Write, answer."""
        from osmose.training.run import Run

        if self.to not in _TARGETS:
            given = "required" if self.to is None else f"{self.to!r} is not valid"
            raise UserError(f"--to: {given}: one of {', '.join(_TARGETS)}")
        if self.out is None:
            raise UserError("--out: required: the folder to make")
        run = Run.open(self.model)
        if self.to == "diffusers":
            from osmose.interop import diffusers

            if self.steps is not None:
                raise UserError("--steps: given, and a pipeline of diffusers is told its steps when it is called")
            diffusers.export(run, self.out)
            line = f"wrote {self.out}: open it with diffusers.DDPMPipeline.from_pretrained({str(self.out)!r})"
            return Result({"out": str(self.out), "to": self.to}, [line])
        from osmose.interop import graphs

        target: Any = self.to
        graph = graphs.export(run, self.out, target, self.steps)
        line = f"wrote {graph} and {self.out / 'sampler.json'}"
        return Result({"out": str(self.out), "to": self.to, "graph": str(graph)}, [line])


@dataclass
class ImportDiffusers:
    """Make a run of a folder of diffusers: a UNet2DModel and a scheduler, weights in safetensors.

    --data names what it was trained on, or data like it: their form, what samples are scored against, and what a
    student would learn from. The result is a run of ddpm, or of iddpm where the variance is learned.
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help="with unet/ and scheduler/ in it")]
    data: Annotated[str | None, arg(metavar="DATA", help=f"one of: {', '.join(SOURCES.entries)}; required")] = None
    data_root: Annotated[Path | None, arg(help="folder that holds named data ($OSMOSE_DATA_ROOT)")] = None
    size: Annotated[int | None, arg(help="side that images of other sizes are brought to")] = None
    channels: Annotated[int | None, arg(help="1 for grey, 3 for colour (folder: and hub:)")] = None
    out: Annotated[Path | None, arg(metavar="RUN", help="the run folder to make; required")] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Read, write, answer."""
        from osmose.configuration import ConfigError
        from osmose.data.dataset import DataConfig
        from osmose.interop import diffusers

        if self.data is None:
            raise UserError(f"--data: required: one of {', '.join(SOURCES.entries)}")
        if self.out is None:
            raise UserError("--out: required: the run folder to make")
        given = {"source": self.data, "size": self.size, "channels": self.channels}
        given["root"] = None if self.data_root is None else str(self.data_root)
        try:
            data = DataConfig.parse({name: value for name, value in given.items() if value is not None})
        except ConfigError as error:
            raise UserError(f"data.{error}") from None
        with quiet_warnings():
            run = diffusers.load(self.folder, data, self.out)
        line = f"wrote {self.out}: a run of {run.config.method.kind}"
        return Result(
            {"run": str(self.out), "method": run.config.method.kind}, [line], f"osmose sample {self.out} -n 64"
        )

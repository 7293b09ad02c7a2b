"""`osmose analyze tangents`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from osmose.cli.command import Result, at_least, output_folder, quiet_warnings
from osmose.training.progress import sampling_bar

if TYPE_CHECKING:
    from osmose.training.run import Run


@dataclass
class Tangents:
    """How far a run is from a consistency model: the size of its tangent g = cos(t) df/dt, angle by angle.

    f(x, t) is where a denoiser says that the trajectory through x ends; along a flow it stays where it is if the run is
    a consistency model of that flow, and g is 0. Says in a table and a picture, for bins of the angle t of TrigFlow,
    tan(t) = sigma / (alpha sd), how large g is before it is normalised, how large the derivatives in it are, the
    learned weight of scd and sct, and what was not finite. Writes tangents.json and tangents.png.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder of ddpm, iddpm, edm, scd, sct or ect")]
    direction: Annotated[
        str | None,
        arg(
            help="data (as sct is taught), own (the flow of a diffusion itself) or teacher; teacher if one is given, "
            "otherwise data"
        ),
    ] = None
    teacher: Annotated[Path | None, arg(metavar="RUN0", help="the diffusion that RUN was made from")] = None
    num: Annotated[int, arg(aliases=["-n"], help="held-out items a bin")] = 256
    bins: Annotated[int, arg(help="bins of equal length between the lowest and the highest angle")] = 12
    jvp: Annotated[str, arg(help="forward for exact derivatives, or finite-diff")] = "forward"
    out: Annotated[Path | None, arg(help="folder to write to; RUN/tangents if not given")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    seed: Annotated[int, arg(help="of the choice of items, of angles and of noise")] = 0
    batch_size: Annotated[int, arg(help="items computed together")] = 256
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Measure, write, answer."""
        at_least(self, 1, "num", "bins", "batch_size", "threads")
        import torch
        from rich.table import Table

        from osmose.analysis.tangents import tangents, write_tangents
        from osmose.cli.devices import device
        from osmose.training.run import Run, data_of

        if self.threads:
            torch.set_num_threads(self.threads)
        run = Run.open(self.model)
        teacher = None if self.teacher is None else Run.open(self.teacher)
        out = output_folder(self.out, run.folder / "tangents")
        where = device(self.device)
        with quiet_warnings():
            dataset = data_of(run, self.data_root)
        with sampling_bar(f"tangents of {self.model}", not (self.quiet or self.json)) as on_step:
            result = tangents(
                run,
                dataset,
                direction=self.direction,
                teacher=teacher,
                n=self.num,
                bins=self.bins,
                seed=self.seed,
                jvp=self.jvp,
                device=where,
                batch_size=self.batch_size,
                on_step=on_step,
            )
        paths = write_tangents(result, out)
        way, weighed = result.conditions["direction"], result.weight is not None
        table = Table(title=f"tangents of {self.model}, {self.num} items a bin, direction: {way}")
        names = ["t", "sigma / alpha", "trained", "||g||/sqrt(D)", "80 % of items", "cos sin dV/dt", "dF/dt"]
        for name in [*names, *(["exp(w)"] if weighed else []), "not finite"]:
            table.add_column(name, justify="right")
        for k in range(self.bins):
            (low, high), (quiet, loud) = result.edges[k : k + 2].tolist(), result.ratios[k : k + 2].tolist()
            mean, p10, p90 = result.tangent[k].tolist()
            table.add_row(
                f"{low:.3f}..{high:.3f}",
                f"{quiet:.3g}..{loud:.3g}",
                f"{float(result.trained[k]):.1%}",
                f"{mean:.4g}",
                f"{p10:.3g}..{p90:.3g}",
                f"{float(result.jvp[k, 0]):.4g}",
                f"{float(result.rate[k, 0]):.4g}",
                *([f"{float(result.weight[k]):.4g}"] if result.weight is not None else []),
                f"{float(result.not_finite[k]):.1%}",
            )
        told = {
            "data": "the data's, cos(t) z - sin(t) x0: its spread keeps ||g|| above 0, whatever the model",
            "own": "V of the run itself: g is 0 where the diffusion is a consistency model of its own flow",
            "teacher": f"the flow of {self.teacher}: g is 0 for its consistency model",
        }
        lines = [table, f"direction dx/dt: {told[way]}", "wrote " + ", ".join(map(str, paths))]
        if bool((result.not_finite > 0).any()):
            lines.insert(1, "some tangents are not finite; the means leave them out")
        return Result(
            {"run": str(self.model), **result.to_json(), "wrote": [str(path) for path in paths]},
            lines,
            self._next(run, way),
        )

    def _next(self, run: Run, direction: str) -> str:
        parent = run.config.parent
        if run.config.method.kind in ("ddpm", "iddpm", "edm"):
            return f"osmose distill scd {self.model} --out RUN2"
        if direction == "data" and parent is not None:
            beside = self.model.parent / parent.folder
            return f"osmose analyze tangents {self.model} --teacher {beside if beside.is_dir() else 'RUN0'}"
        return f"osmose evaluate {self.model}"

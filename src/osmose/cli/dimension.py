"""`osmose analyze dimension`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from osmose.cli.command import Result, at_least, output_folder, quiet_warnings
from osmose.cli.fields import numbers, probes_of
from osmose.errors import UserError
from osmose.training.progress import sampling_bar

if TYPE_CHECKING:
    from rich.table import Table

    from osmose.analysis.dimension_report import Dimension as Found


@dataclass
class Dimension:
    """How many degrees of freedom the data have around a point: local intrinsic dimension, read off a run's field.

    At real items, or those of --at, several estimators say of how many dimensions the data are there, for a range of
    noise-to-signal ratios: a number that holds for a scale, so a curve, with a word on whether it settles and whether
    the estimators agree. Of images, a map says which pixels vary, from simple images to complex ones. Writes
    dimension.json, dimension.csv (a row for each point), dimension.png and dimension-map.png.
    """

    model: Annotated[
        Positional[Path], arg(metavar="RUN", help="a run folder of ddpm, iddpm, edm, or an interpolant from noise")
    ]
    at: Annotated[
        Path | None,
        arg(metavar="FILE", help="points to ask about: an .npz, a .csv or an image; real items if not given"),
    ] = None
    num: Annotated[int | None, arg(aliases=["-n"], help="real items, chosen at random; 64 if not given")] = None
    part: Annotated[str | None, arg(help="where they come from: held-out or train; held-out if not given")] = None
    label: Annotated[int | None, arg(help="class of the points of --at, of a conditional run")] = None
    ratios: Annotated[
        str | None,
        arg(help="noise-to-signal ratios sigma / alpha, with commas; nine from 0.01 to 1 if not given"),
    ] = None
    estimators: Annotated[
        str | None,
        arg(
            help="with commas: flipd, normal-bundle, rank, flow, lidl, kde, lpca, mle; all but lidl, lpca and mle if "
            "not given, and flipd and kde alone beyond 64 values an item"
        ),
    ] = None
    probes: Annotated[
        str | None, arg(help="of Hutchinson's traces, or exact; exact up to 64 values, 32 beyond, if not given")
    ] = None
    out: Annotated[Path | None, arg(help="folder to write to; RUN/dimension if not given")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    seed: Annotated[int, arg(help="of the choice of items, of probes and of noise")] = 0
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Estimate, write, answer."""
        at_least(self, 1, "num", "threads")
        import torch

        from osmose.analysis.dimension_pictures import write_dimension
        from osmose.analysis.dimension_report import dimension
        from osmose.cli.devices import device
        from osmose.training.run import Run, data_of

        if self.threads:
            torch.set_num_threads(self.threads)
        run = Run.open(self.model)
        run.require_real("its network has no derivative")
        model = run.model(device(self.device))
        out = output_folder(self.out, run.folder / "dimension")
        ratios = None if self.ratios is None else numbers(self.ratios)
        points, labels = None, None
        if self.at is not None:
            from osmose.data.arrays import load_items

            for name in ("num", "part"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name}: is for real items; with --at all points of the file are taken")
            points = load_items(self.at, model.spec)
            labels = None if self.label is None else model.classes_for(len(points), self.label)
        elif self.label is not None:
            raise UserError("--label: is the class of the points of --at; real items have their own")
        with quiet_warnings():
            dataset = data_of(run, self.data_root)
        with sampling_bar(f"dimension of {self.model}", not (self.quiet or self.json)) as on_step:
            result = dimension(
                model,
                dataset,
                points=points,
                labels=labels,
                part=self.part or "held-out",
                n=self.num,
                ratios=ratios,
                estimators=None if self.estimators is None else self.estimators.split(","),
                probes=probes_of(self.probes),
                seed=self.seed,
                on_step=on_step,
            )
        paths = write_dimension(result, out, model.spec)
        lines = [self._table(result), *_reading(result), "wrote " + ", ".join(map(str, paths))]
        about = {} if self.at is None else {"at": str(self.at)}
        return Result(
            {"run": str(self.model), **about, **result.to_json(), "wrote": [str(path) for path in paths]},
            lines,
            f"osmose analyze conservativity {self.model}",
        )

    def _table(self, result: Found) -> Table:
        from rich.table import Table

        table = Table(title=f"local dimension, of {result.ambient} values, mean over {result.conditions['n']} points")
        table.add_column("sigma / alpha")
        for ratio in result.ratios.tolist():
            table.add_column(f"{ratio:.2g}", justify="right")
        for name, found in result.estimates.items():
            means = found.values.mean(0).tolist()
            means = means if found.by_ratio else means + [math.nan] * (len(result.ratios) - 1)
            name = name if found.by_ratio else f"{name} (at no scale)"
            table.add_row(name, *("" if math.isnan(mean) else f"{mean:.2f}" for mean in means))
        return table


def _reading(result: Found) -> list[str]:
    """What it says, in sentences."""
    lines = [result.verdict()]
    for name, plateau in result.plateaus.items():
        if plateau is not None:
            where = f"sigma / alpha from {plateau.low:.2g} to {plateau.high:.2g}"
            full = ", next to all there are" if result.fills(plateau) else ""
            lines.append(f"  {name}: settles at {plateau.value:.2f}{full}, for {where}")
    if result.truth is not None:
        low, high = int(result.truth.min()), int(result.truth.max())
        known = f"{low}" if low == high else f"{low} to {high}, {float(result.truth.mean()):.2f} in the mean"
        lines.append(f"  these data are known: {known}")
    return lines

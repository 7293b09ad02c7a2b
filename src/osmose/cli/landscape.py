"""`osmose analyze landscape`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from osmose.cli.command import Result, output_folder, quiet_warnings
from osmose.errors import UserError
from osmose.training.progress import sampling_bar

if TYPE_CHECKING:
    from osmose.analysis.landscape import Landscapes
    from osmose.data.dataset import Dataset
    from osmose.training.run import Run


@dataclass
class Landscape:
    """The loss around the weights of runs, on a plane through them: how wide, how round, how rugged the valley is.

    Adds a u + b v to the weights and scores the same items with the same noise at every (a, b) of a grid. Directions
    are random, with each filter as long as the weights' own, or the two in which the checkpoints of the training lie.
    Several runs are drawn side by side, on one scale of colours. Writes landscape.json and landscape.png.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN RUN ...", help="run folders")] = ()
    directions: Annotated[str, arg(help="random, or trajectory (principal directions of 3 checkpoints or more)")] = (
        "random"
    )
    shared: Annotated[
        bool, arg(help="lay the directions of the trajectory through all runs, which have the same parameters")
    ] = False
    points: Annotated[int, arg(help="of the grid on each axis")] = 21
    reach: Annotated[
        float | None,
        arg(
            help="where the grid ends; 1 is the length of each filter, or the farthest coordinate of a trajectory; if "
            "not given 1, or 1.2 for a trajectory"
        ),
    ] = None
    num: Annotated[int, arg(aliases=["-n"], help="items that the loss is the mean of")] = 256
    part: Annotated[str, arg(help="real data to score: held-out or train")] = "held-out"
    out: Annotated[Path | None, arg(help="folder to write to; landscape in the first RUN if not given")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the runs found them")] = None
    seed: Annotated[int, arg(help="of random directions, of the choice of items and of their noise")] = 0
    batch_size: Annotated[int, arg(help="items computed together")] = 256
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Score, write, answer."""
        if not self.runs:
            raise UserError("RUN: give at least one run folder")
        for name, fewest in (("points", 3), ("num", 1), ("batch_size", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < fewest:
                raise UserError(f"--{name.replace('_', '-')}: {value} is not valid: must be at least {fewest}")
        import torch

        from osmose.analysis.landscape import CAUTIONS, landscapes
        from osmose.analysis.landscape_pictures import write_landscapes
        from osmose.cli.devices import device
        from osmose.training.run import Run, data_of

        if self.threads:
            torch.set_num_threads(self.threads)
        runs = [Run.open(folder) for folder in self.runs]
        out = output_folder(self.out, runs[0].folder / "landscape")
        where = device(self.device)
        data: dict[str, Dataset] = {}
        with quiet_warnings():
            for run in runs:  # which may have the same, and they may be large
                identity = run.config.identity.sha256
                data[identity] = data.get(identity) or data_of(run, self.data_root)
        names = ", ".join(map(str, self.runs))
        with sampling_bar(f"landscape of {names}", not (self.quiet or self.json)) as on_step:
            result = landscapes(
                runs,
                [data[run.config.identity.sha256] for run in runs],
                directions=self.directions,
                shared=self.shared,
                points=self.points,
                reach=self.reach,
                n=self.num,
                part=self.part,
                seed=self.seed,
                device=where,
                batch_size=self.batch_size,
                on_step=on_step,
            )
        paths = write_landscapes(result, out)
        lines = [self._table(result), *self._said(result)]
        lines += [CAUTIONS[kind] for kind in dict.fromkeys(run.method for run in result.runs) if kind in CAUTIONS]
        lines.append("wrote " + ", ".join(map(str, paths)))
        return Result(
            {**result.to_json(), "wrote": [str(path) for path in paths]},
            lines,
            self._next(runs, result),
        )

    def _table(self, result: Landscapes) -> object:
        from rich.table import Table

        from osmose.analysis.landscape import RADII

        along = result.conditions["directions"]
        table = Table(title=f"loss on {self.points} x {self.points} points, directions: {along}")
        columns = ["run", "loss", *(f"rise at {radius:g}" for radius in RADII), "curvature u", "v", "ratio"]
        for name in [*columns, "below twice", "seconds"]:
            table.add_column(name, justify="left" if name == "run" else "right")
        for run in result.runs:
            table.add_row(
                run.name,
                f"{run.centre_loss:.4g}",
                *(f"{rise:.3g}" for rise in run.rises),
                *(f"{curvature:.3g}" for curvature in run.curvatures),
                f"{run.ratio:.3g}",
                "" if math.isnan(run.below_twice) else f"{run.below_twice:.1%}",
                f"{run.seconds:.1f}",
            )
        return table

    def _said(self, result: Landscapes) -> list[str]:
        """What is not in the table: shares of trajectories, and losses that are not numbers."""
        lines = []
        for run in result.runs:
            own = [one for one in run.trajectories if one.name == run.name and one.share is not None]
            for one in own:
                each = "" if run.shares is None or self.shared else f": u {run.shares[0]:.1%}, v {run.shares[1]:.1%}"
                lines.append(
                    f"{run.name}: the plane holds {100 * (one.share or 0):.3g}% of the squares of its trajectory "
                    f"({len(one.steps)} checkpoints){each}"
                )
            missing = int((~run.loss.isfinite()).sum())
            if missing:
                lines.append(f"{run.name}: {missing} of {run.loss.numel()} losses are not finite and left blank")
        shares = result.runs[0].shares
        if self.shared and shares is not None:
            lines.append(f"all runs: u holds {shares[0]:.1%} and v {shares[1]:.1%} of the squares around their mean")
        return lines

    def _next(self, runs: list[Run], result: Landscapes) -> str:
        evaluated = [(run.folder / "evaluation.json").is_file() for run in runs]
        steps = [len(one.steps) for run in result.runs for one in run.trajectories if one.name == run.name]
        names = " ".join(map(str, self.runs))
        if self.directions == "random" and len(steps) == len(runs) and min(steps) >= 3:
            return f"osmose analyze landscape {names} --directions trajectory"
        if len(runs) > 1 and all(evaluated):
            return f"osmose compare {names}"
        return f"osmose evaluate {self.runs[0 if all(evaluated) else evaluated.index(False)]}"

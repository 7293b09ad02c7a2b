"""`osmose analyze conservativity`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from osmose.cli.command import Result, at_least, output_folder, quiet_warnings
from osmose.cli.fields import numbers, probes_of
from osmose.training.progress import sampling_bar

if TYPE_CHECKING:
    from rich.table import Table

    from osmose.analysis.conservativity import Conservativity as Found


@dataclass
class Conservativity:
    """Whether a run's field is the gradient of anything: how asymmetric its Jacobian is, and what a gradient leaves.

    At noisy items, for a range of noise-to-signal ratios, it measures the antisymmetric share of the Jacobian, and
    teaches a network that is a gradient, and a free one, what the run says: what the first leaves over the second is
    the part that no sample depends on. Where the data's law is known, the run's error is told apart into both. Writes
    conservativity.json and conservativity.png.
    """

    model: Annotated[
        Positional[Path], arg(metavar="RUN", help="a run folder of ddpm, iddpm, edm, or an interpolant from noise")
    ]
    num: Annotated[int | None, arg(aliases=["-n"], help="held-out items that Jacobians are taken at; 64")] = None
    ratios: Annotated[
        str | None, arg(help="noise-to-signal ratios sigma / alpha, with commas; seven from 0.05 to 10 if not given")
    ] = None
    probes: Annotated[
        str | None, arg(help="of Hutchinson's estimate, or exact; exact up to 64 values, 16 beyond, if not given")
    ] = None
    steps: Annotated[int, arg(help="of teaching each of the two networks; 0 leaves them out")] = 1000
    out: Annotated[Path | None, arg(help="folder to write to; RUN/conservativity if not given")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    seed: Annotated[int, arg(help="of items, noise, probes and the two networks")] = 0
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Measure, write, answer."""
        at_least(self, 1, "num", "threads")
        at_least(self, 0, "steps")
        import torch

        from osmose.analysis.conservativity import conservativity, write_conservativity
        from osmose.cli.devices import device
        from osmose.training.run import Run, data_of

        if self.threads:
            torch.set_num_threads(self.threads)
        run = Run.open(self.model)
        run.require_real("its network has no derivative")
        model = run.model(device(self.device))
        out = output_folder(self.out, run.folder / "conservativity")
        ratios = None if self.ratios is None else numbers(self.ratios)
        with quiet_warnings():
            dataset = data_of(run, self.data_root)
        with sampling_bar(f"conservativity of {self.model}", not (self.quiet or self.json)) as on_step:
            result = conservativity(
                model,
                dataset,
                n=self.num,
                ratios=ratios,
                probes=probes_of(self.probes),
                steps=self.steps,
                seed=self.seed,
                on_step=on_step,
            )
        paths = write_conservativity(result, out)
        return Result(
            {"run": str(self.model), **result.to_json(), "wrote": [str(path) for path in paths]},
            [self._table(result), *result.reading(), "wrote " + ", ".join(map(str, paths))],
            f"osmose analyze dimension {self.model}",
        )

    def _table(self, result: Found) -> Table:
        from rich.table import Table

        how = "exact" if result.conditions["probes"] is None else f"{result.conditions['probes']} probes"
        table = Table(title=f"conservativity of {self.model}, {result.conditions['n']} points, {how}")
        shown = {
            "sigma / alpha": result.ratios,
            "A": result.asymmetry,
            "A of denoiser": result.denoiser,
            "gradient leaves": result.remainder,
            "free net leaves": result.floor,
            "residual": result.residual,
            "off exact": result.error,
            "gradient off": result.harmful,
            "gauge": result.condition,
        }
        columns = {name: values for name, values in shown.items() if values is not None}
        for name in columns:
            table.add_column(name, justify="right")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*(f"{value:.2g}" for value in row))
        return table

"""`osmose analyze surrogate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, at_least, output_folder, quiet_warnings
from osmose.cli.surrogate import opened, positive, real_data, time_of
from osmose.training.progress import sampling_bar


@dataclass
class HandOver:
    """What a surrogate before a diffusion costs and gives, for every time t_mid at which the chain is entered.

    Samples with every t_mid, with the surrogate alone (t_mid = 0) and with the chain alone; scores them, and measures
    how far the surrogate's noised samples are from noised data, as the diffusion's denoiser sees them. Writes
    surrogate.json, surrogate.png and, of images, beside.png: rough samples above what became of them.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder of ddpm, iddpm or edm")]
    partner: Annotated[Path | None, arg(name="with", metavar="RUN2|FILE.npz", help="the surrogate; required")] = None
    t_mid: Annotated[
        str | None, arg(metavar="T,T,...", help="times or step numbers to try; twelve from 0.05 to 1 if not given")
    ] = None
    steps: Annotated[int | None, arg(help="solver steps of the whole chain; as in RUN if not given")] = None
    solver: Annotated[str | None, arg(help="ancestral, ddim, heun or dpmpp-2m; as in RUN if not given")] = None
    num: Annotated[int | None, arg(aliases=["-n"], help="samples of every t_mid; 500 if not given")] = None
    metrics: Annotated[str | None, arg(metavar="NAME,...", help="scores; what sums up the data if not given")] = None
    threshold: Annotated[float, arg(help="distance that passes for data, in distances between real data")] = 2.0
    out: Annotated[Path | None, arg(help="folder to write to; RUN/surrogate/RUN2 if not given")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    seed: Annotated[int, arg(help="of everything random")] = 0
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Sample, compare, write, answer."""
        positive("threshold", self.threshold)
        at_least(self, 1, "num", "threads")
        import torch
        from rich.table import Table

        from osmose.acceleration.hand_over import sweep, write_sweep
        from osmose.cli.devices import device

        if self.threads:
            torch.set_num_threads(self.threads)
        pair = opened(self.model, self.partner, self.overrides, self.steps, self.solver)
        times = [time_of(text, pair) for text in self.t_mid.split(",") if text] if self.t_mid else None
        usual = self.model / "surrogate" / Path(pair.model.config.generator.origin).stem
        out = output_folder(self.out, usual)
        n = min(500, pair.model.most or 500) if self.num is None else self.num
        pair.model.to(device(self.device))
        data, names = real_data(pair, self.data_root), self.metrics.split(",") if self.metrics else None
        with quiet_warnings(), sampling_bar(f"entering {self.model}", not (self.quiet or self.json)) as on_step:
            result = sweep(
                pair, data, times, n=n, seed=self.seed, threshold=self.threshold, metrics=names, on_step=on_step
            )
        paths = write_sweep(result, pair, out)
        scores = list(result.points[0].scores)
        table = Table(title=f"{pair.name} with {pair.model.config.generator.origin}, n = {result.n}")
        for name in ("t_mid", "evaluations", "samples/s", "faster", *scores, "at t_mid", "real data there"):
            table.add_column(name, justify="right")
        alone, there = result.points[-1], {one.t_mid: one for one in result.hand_overs}
        for point in result.points:
            hand_over = there.get(point.t_mid) if point.t_mid is not None else None
            mark = " (auto)" if point.t_mid is not None and point.t_mid == result.chosen else ""
            table.add_row(
                "chain alone" if point.t_mid is None else f"{point.t_mid:g}{mark}",
                str(point.nfe),
                f"{result.n / point.seconds:.4g}",
                f"{alone.seconds / point.seconds:.3g}x",
                *(f"{point.scores[name]:.4g}" for name in scores),
                f"{hand_over.distance:.4g}" if hand_over else "",
                f"{hand_over.floor:.4g}" if hand_over else "",
            )
        floors = ", ".join(f"{name} {value:.4g}" for name, value in result.floors.items())
        lines = [table, f"real data: {floors}", "wrote " + ", ".join(map(str, paths))]
        if result.chosen is None:
            lines.insert(1, "auto: no t_mid that was tried passes for data; try larger ones")
        if result.metric in scores:
            best = min(result.points, key=lambda point: point.scores[result.metric])
            places = {0.0: "the surrogate alone", None: "the chain alone"}
            which = places.get(best.t_mid, f"t_mid = {best.t_mid}")
            lines.insert(1, f"best {result.metric}: {best.scores[result.metric]:.4g}, {which}")
        make = f"osmose surrogate {self.model} --with {self.partner} --t-mid {result.chosen or 1:g} --out RUN3"
        return Result(
            {**result.to_json(), "wrote": [str(path) for path in paths]}, lines, make if result.chosen else None
        )

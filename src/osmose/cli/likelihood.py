"""`osmose analyze likelihood`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from osmose.cli.command import Result, at_least, output_folder, quiet_warnings
from osmose.cli.fields import probes_of
from osmose.errors import UserError
from osmose.training.progress import sampling_bar


@dataclass
class Likelihood:
    """Bits per dimension of real data under a run's model: the variational bound, split into its terms, or a density.

    Of interpolants and bridges that begin with noise it follows the ODE from the data to the noise: a density, or a
    bound through uniform noise where data have levels. Of others every step of the chain is scored once for every item,
    so it costs as many network evaluations as the schedule has steps. The number is an upper limit of the negative
    log-likelihood of the averaged weights, and holds for one number of levels: digits have 17, 8-bit images 256.

    --by ode follows the probability-flow ODE of ddpm, iddpm, edm and interpolants from noise, in steps that suit each
    item, and says how exact it is. --against scores other data as well: does the density tell them apart? Writes
    likelihood.json and likelihood.png, outliers.json and outliers.png.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="a run folder")]
    by: Annotated[str, arg(help="method (its own bound, or density) or ode")] = "method"
    against: Annotated[
        str | None, arg(metavar="DATA", help="other data, as --data of train, to be scored beside the run's own")
    ] = None
    num: Annotated[int | None, arg(aliases=["-n"], help="real items, chosen at random; all if not given")] = None
    steps: Annotated[int | None, arg(help="steps of the chain; all that the schedule has if not given")] = None
    part: Annotated[str, arg(help="real data to score: held-out or train")] = "held-out"
    variance: Annotated[
        str | None, arg(help="fixed_small, fixed_large or learned_range; the model's own if not given")
    ] = None
    no_clip: Annotated[bool, arg(help="leave the denoised estimate as it is, outside the data's range too")] = False
    probes: Annotated[
        str | None, arg(help="of the ODE's traces, or exact; exact up to 64 values an item, 4 beyond, if not given")
    ] = None
    tolerance: Annotated[
        float | None,
        arg(help="of the ODE's steps, in nats per dimension and relative to the noise; 0.001 if not given"),
    ] = None
    out: Annotated[Path | None, arg(help="folder to write to; RUN/likelihood if not given")] = None
    data_root: Annotated[Path | None, arg(help="where the data lie, if not where the run found them")] = None
    seed: Annotated[int, arg(help="of the choice of items and of the noise")] = 0
    batch_size: Annotated[int, arg(help="items computed together")] = 256
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False

    def run(self) -> Result:
        """Score, write, answer."""
        at_least(self, 1, "steps", "batch_size", "threads")
        if self.by not in ("method", "ode"):
            raise UserError(f"--by: {self.by!r} is not valid: should be method or ode")
        for name in ("steps", "variance") if self.by == "ode" else ("probes", "tolerance"):
            if getattr(self, name) is not None:
                only = "a chain's" if self.by == "ode" else "for --by ode"
                raise UserError(f"--{name}: {getattr(self, name)} given, but it is {only}; leave it out")
        if self.by == "ode" and self.no_clip:
            raise UserError("--no-clip: the ODE has no estimate to clip; leave it out")
        import torch

        from osmose.analysis.outliers import Outliers, in_units_of, write_outliers
        from osmose.cli.devices import device
        from osmose.training.run import Run, data_of

        if self.threads:
            torch.set_num_threads(self.threads)
        run = Run.open(self.model)
        if self.by == "ode":
            run.require_real("its network has no derivative")
        model = run.model(device(self.device))
        out = output_folder(self.out, run.folder / "likelihood")
        other = None
        with quiet_warnings():
            dataset = data_of(run, self.data_root)
            if self.against is not None:
                if model.config.conditional:
                    raise UserError("--against: the run is told classes, and those of other data mean something else")
                root = None if self.data_root is None else str(self.data_root)
                read = run.config.data.replace(source=self.against, **({} if root is None else {"root": root}))
                other = in_units_of(read.load(), model.spec)
                items = len(other.part(self.part)[0]) if self.part in ("train", "held-out") else 0
                if self.num is not None and items and self.num > items:
                    raise UserError(f"--num: {self.num} is more than the {items} {self.part} items of {self.against}")
        scored = self._by_ode if self.by == "ode" else self._by_method
        result, paths, lines = scored(model, dataset, out)
        values = result.to_json()
        if other is not None:
            assert self.against is not None
            beside, _, _ = scored(model, other, None)
            outliers = Outliers(result.per_item, beside.per_item, self.against, self.part)
            paths += write_outliers(outliers, out)
            values["outliers"] = outliers.to_json()
            lines.append(outliers.reading())
        return Result(
            {"run": str(self.model), **values, "wrote": [str(path) for path in paths]},
            [*lines, "wrote " + ", ".join(map(str, paths))],
            f"osmose evaluate {self.model}",
        )

    def _by_ode(self, model: Any, dataset: Any, out: Path | None) -> tuple[Any, list[Path], list[str]]:
        """Score by the ODE, and write where there is a folder to write to."""
        from osmose.analysis.flow_likelihood import TOLERANCE, flow_likelihood, write_flow_likelihood

        with sampling_bar(f"scoring {dataset.source}", not (self.quiet or self.json)) as on_step:
            result = flow_likelihood(
                model,
                dataset,
                part=self.part,
                n=self.num,
                probes=probes_of(self.probes),
                tolerance=TOLERANCE if self.tolerance is None else self.tolerance,
                seed=self.seed,
                batch_size=self.batch_size,
                on_step=on_step,
            )
        c = result.conditions
        bits = f"{result.bits:.4f} ± {result.standard_error:.4f} bits per dimension (standard error)"
        what = "-log2 of the density" if result.is_density else "at most"
        unit = "in the data's units" if result.is_density else f"{c['levels']} levels, dequantised"
        traces = "exact traces" if c["probes"] is None else f"{c['probes']} probe{'s' * (c['probes'] > 1)} a trace"
        error = "not known, of one probe" if result.error is None else f"{result.error:.2g} bits per dimension"
        spent = float(result.evaluations.double().mean())
        lines = [
            f"{what} {bits}, {c['n']} {c['part']} items, {unit}",
            f"  ODE from sigma / alpha = {c['lowest']:.3g}, {spent:.0f} evaluations an item, {traces}",
            f"  error of the computation: {error}",
        ]
        return result, [] if out is None else write_flow_likelihood(result, out), lines

    def _by_method(self, model: Any, dataset: Any, out: Path | None) -> tuple[Any, list[Path], list[str]]:
        """Score by the method's own bound, and write where there is a folder to write to."""
        from osmose.analysis.likelihood import likelihood, write_likelihood

        with sampling_bar(f"scoring {dataset.source}", not (self.quiet or self.json)) as on_step:
            result = likelihood(
                model,
                dataset,
                part=self.part,
                n=self.num,
                num_steps=self.steps,
                variance=self.variance,
                clip=not self.no_clip,
                seed=self.seed,
                batch_size=self.batch_size,
                on_step=on_step,
            )
        c = result.conditions
        along_ode = result.distortion is None and model.spec.alphabet is None  # masks have a chain, and no distance
        kind = "ODE" if along_ode else "chain"
        chain, noise = f"  {kind} of {c['num_steps']} steps", []
        if result.eps_error is not None:
            chain += f", variance {c['variance']}, {'' if c['clip'] else 'not '}clipped"
            noise = [f"mean squared error of the noise, all t alike: {float(result.eps_error.mean()):.4f}"]
        bits = f"{result.bits:.4f} ± {result.standard_error:.4f} bits per dimension (standard error)"
        if result.is_density:
            sign = "" if result.is_exact else "at most "
            first = f"-log2 of the density {sign}{bits}, {c['n']} {c['part']} items, in the data's units"
            guess = []
        else:
            first = f"at most {bits}, {c['n']} {c['part']} items, {c['levels']} levels"
            guess = [f"  guessing, all levels alike, would take {math.log2(c['levels']):.4f}"]
        parts = [
            f"  prior L_T       {result.prior:.5f}",
            f"  transitions     {float(result.terms[1:].sum()):.4f}  ({c['num_steps'] - 1} terms)",
            f"  decoder L_0     {float(result.terms[0]):.4f}",
        ]
        if along_ode:  # there is no estimate of the data, nor a chain
            parts = [
                f"  at the noise    {result.prior:.5f}",
                f"  change of volume {float(result.terms.sum()):.4f}  ({c['num_steps']} steps)",
            ]
        lines = [first, *parts, chain, *guess, *noise]
        return result, [] if out is None else write_likelihood(result, out), lines

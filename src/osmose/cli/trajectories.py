"""`osmose trajectories`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, Suppress, arg

from osmose.cli.command import Result, at_least, quiet_warnings, sampling_options
from osmose.errors import UserError
from osmose.training.progress import sampling_bar


@dataclass
class Trajectories:
    """Store trajectories of a run from noise to data: what osmose distill dsno learns from.

    Each is one solution of the probability-flow ODE at a few of the solver's times. The folder holds memory-mapped
    .npy files with checksums; an interrupted one goes on with --resume, and torchrun shares the work among processes
    (write -n there: torchrun takes --num for an option of its own). clip=false lets the denoised estimates leave the
    data's range, clip=true keeps them inside.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN", help="the teacher: a run of ddpm, iddpm, edm, or distilled")]
    out: Annotated[Path | None, arg(metavar="T", help="the folder to make; required")] = None
    num: Annotated[int | None, arg(aliases=["-n"], help="how many trajectories; 4000 if not given")] = None
    steps: Annotated[
        int | None,
        arg(help="solver steps; 64 if not given, of a distilled run the most that it has"),
    ] = None
    points: Annotated[int | None, arg(help="states to store of each, besides the noise; 8 if not given")] = None
    grid: Annotated[
        str | None, arg(help="times of the states: quadratic, (k / points)^2, or even; quadratic if not given")
    ] = None
    solver: Annotated[str | None, arg(help="ddim or heun; ddim if not given")] = None
    seed: Annotated[int | None, arg(help="of the noise, which no sample of the same seed has; 0 if not given")] = None
    shard_size: Annotated[int | None, arg(help="trajectories in one file; 1024 if not given")] = None
    resume: Annotated[bool, arg(help="complete the trajectories in --out, by their own settings")] = False
    device: Annotated[str, arg(help="cpu, cuda or mps; auto takes the fastest there is")] = "auto"
    threads: Annotated[int | None, arg(help="CPU threads; all cores if not given")] = None
    quiet: Annotated[bool, arg(help="no progress")] = False
    json: Annotated[bool, arg(help="print the result as JSON")] = False
    overrides: Suppress[dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Result:
        """Check everything, then make what is missing."""
        if self.out is None:
            raise UserError("--out: required: the folder to make")
        at_least(self, 1, "threads")
        import torch

        from osmose.acceleration.trajectories import TrajectoriesConfig, recorded
        from osmose.acceleration.trajectory_making import make
        from osmose.acceleration.trajectory_pictures import write_picture
        from osmose.cli.devices import device
        from osmose.data.pictures import has_picture
        from osmose.training.run import Run, is_first_process

        if self.threads:
            torch.set_num_threads(self.threads)
        run, said = Run.open(self.model), self._said()
        if self.resume:
            config = recorded(self.out).replace(**said)
        else:
            config = TrajectoriesConfig.suited(run.config, **{"num": 4000, **said})
        chosen, shown = device(self.device), is_first_process() and not (self.quiet or self.json)
        try:
            with quiet_warnings(), sampling_bar("trajectories", shown) as on_step:
                made = make(run, self.out, config, resume=self.resume, device=chosen, on_step=on_step)
        except KeyboardInterrupt:
            again = f"osmose trajectories {self.model} --out {self.out} --resume"
            return Result(
                {"out": str(self.out), "finished": False}, ["stopped; complete shards are kept"], again, status=130
            )
        picture = None
        if is_first_process() and has_picture(run.config.spec):
            picture = write_picture(made, run.config.spec)
        size = sum(path.stat().st_size for path in self.out.glob("shard-*.npy"))
        each = 1000 * made.seconds / len(made)
        values = {
            "out": str(self.out),
            "finished": True,
            **config.to_json(),
            "bytes": size,
            "seconds": round(made.seconds, 3),
            "ms_per_trajectory": each,
            "sha256": made.sha256,
            "picture": None if picture is None else str(picture),
        }
        line = (
            f"wrote {self.out}: {len(made)} trajectories of {config.num_steps} steps, {config.points + 1} states each, "
            f"{size / 1e6:.1f} MB, {made.seconds:.1f} s ({each:.3g} ms a trajectory)"
        )
        return Result(
            values,
            [line, *([] if picture is None else [f"picture: {picture}"])],
            f"osmose distill dsno {self.model} --trajectories {self.out} --out RUN2",
        )

    def _said(self) -> dict[str, Any]:
        """The settings that were given."""
        return sampling_options(
            self.overrides,
            num=self.num,
            num_steps=self.steps,
            points=self.points,
            grid=self.grid,
            solver=self.solver,
            seed=self.seed,
            shard_size=self.shard_size,
        )

"""Making trajectories: following a teacher's flow from each noise, shard by shard, by one process or several."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from osmose.acceleration.trajectories import (
    Header,
    Shard,
    Trajectories,
    TrajectoriesConfig,
    no_teacher,
    require_same,
    shard_path,
)
from osmose.errors import UserError
from osmose.gaussian import SOLVERS
from osmose.gaussian.denoiser import Conditioned, NetworkDenoiser
from osmose.gaussian.draws import SampleDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import Level, Schedule
from osmose.gaussian.solvers import Denoise, Solver
from osmose.methods.base import GenerativeModel
from osmose.methods.chain import ChainModel
from osmose.methods.diffusion import DiffusionConfig
from osmose.methods.messages import OnStep
from osmose.methods.students import Students
from osmose.training import files
from osmose.training.run import Run, is_first_process, require_free, versions
from osmose.training.signals import stopping_on_signal


def make(
    run: Run | Path | str,
    folder: Path | str,
    config: TrajectoriesConfig,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Trajectories:
    """Compute and store trajectories.

    Args:
        run: the teacher: a run of ddpm, iddpm or edm, or a distilled one.
        folder: to make, or with `resume` to complete.
        config: what to make (`TrajectoriesConfig.suited`).
        resume: keep the shards that are there.
        device: where the teacher runs; under torchrun the process's own GPU where it is "cuda".
        on_step: called after each solver step with the share of this process that is done, and with the whole share.

    Raises:
        UserError: anything in the input that is refused, and nothing has been written then; a state that is not finite,
            or a full disk, and the shards before are kept then.
        KeyboardInterrupt: a signal asked to stop; the shards that were complete are kept.
    """
    run, folder = run if isinstance(run, Run) else Run.open(run), Path(folder)
    model = run.model()
    way = _Way.of(model, config)
    header = Header(
        config=config,
        teacher=run.as_parent(),
        shape=model.spec.shape,
        levels=tuple(tuple(level) for level in way.levels),
        versions=versions(),
    )
    if resume:
        require_same(folder, header, run)
    else:
        require_free(folder)
    model.to(_own_device(torch.device(device)))
    with stopping_on_signal() as stopped:
        if not resume and is_first_process():
            files.write_json(folder / "trajectories.json", header.to_json())
        elif not resume:  # whether the folder is free is for the first process to say
            _wait_until((folder / "trajectories.json").is_file, stopped)
            require_same(folder, header, run)
        rank, world = (int(os.environ.get(name, one)) for name, one in (("RANK", "0"), ("WORLD_SIZE", "1")))
        own = range(rank, config.num_shards, world)
        _Making(folder, config, model, way, stopped, on_step).make(
            [shard for shard in own if not shard_path(folder, shard, "json").is_file()]
        )
        others = [shard_path(folder, shard, "json") for shard in range(config.num_shards)]
        _wait_until(lambda: all(path.is_file() for path in others), stopped)
    return Trajectories.open(folder)


def levels_of(run: Run, config: TrajectoriesConfig) -> tuple[Level[float], ...]:
    """Where the states of trajectories are going to be, the noise first and clean data last.

    Raises:
        UserError: a run or settings that `make` would refuse.
    """
    return _Way.of(run.model(), config).levels


def states(
    denoise: Denoise,
    x: Tensor,
    grid: TimeGrid,
    kept: Sequence[int],
    solver: Solver,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow the probability-flow ODE and keep some of the states.

    Args:
        denoise: E[x0 | x_t] at a level.
        x: states at `grid.levels[0]`, shape (B, *event).
        grid: the levels to visit.
        kept: which of `grid.levels` to keep, rising from 0.
        solver: a deterministic one.
        on_step: called after each step with the number done and the number in all.

    Returns:
        The states, shape (B, len(kept), *event).
    """
    found, wanted = [x], set(kept)
    for step, state in enumerate(solver.run(denoise, x, grid, _no_noise), 1):
        if step in wanted:
            found.append(state.x)
        if on_step is not None:
            on_step(step, grid.num_steps)
    return torch.stack(found, dim=1)


def _no_noise() -> Tensor:
    raise AssertionError("a trajectory is a function of its first noise")


@dataclass(frozen=True)
class _Way:
    """How a teacher goes from noise to data.

    Attributes:
        diffusion: the noise and the schedule, the teacher's own or those that it was distilled on.
        denoiser: the teacher's.
        grid: the levels that the solver visits.
        levels: those of the states that are kept.
    """

    diffusion: DiffusionConfig
    denoiser: NetworkDenoiser
    grid: TimeGrid
    levels: tuple[Level[float], ...]

    @classmethod
    def of(cls, model: GenerativeModel, config: TrajectoriesConfig) -> _Way:
        """The way that settings ask of a teacher.

        Raises:
            UserError: a model without one, or settings that it does not have.
        """
        if isinstance(model, Students):
            if config.solver != "ddim":
                raise UserError(
                    f"solver: {config.solver!r} is for a diffusion's steps; the jumps of a student are ddim's"
                )
            num_steps = model.sampling(num_steps=config.num_steps).num_steps
            diffusion, denoiser, grid = model.config.model, model.student(num_steps), model.grids[num_steps]
        elif isinstance(model, ChainModel):
            diffusion, denoiser = model.config, model.denoiser
            grid = _grid(model.schedule, config.num_steps)
        else:
            raise no_teacher(model.config.kind)
        if config.clip and model.spec.model_range is None:
            raise UserError("clip: true needs data with a range, and these have none")
        assert isinstance(diffusion, DiffusionConfig), "nothing else has a chain"
        clean = Level(*(float(value) for value in diffusion.schedule.level(0.0)))
        return cls(diffusion, denoiser, grid, (*(grid.levels[step] for step in config.kept[:-1]), clean))


def _grid(schedule: Schedule, num_steps: int) -> TimeGrid:
    """Steps that are even in t, to the nearest of a discrete schedule's own: t = 1 first, 1 / num_steps last."""
    t, total = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps, schedule.native_steps
    if total is not None:
        if num_steps > total:
            raise UserError(f"num_steps: {num_steps} is more than the {total} steps that the schedule has")
        t = (t * total).round() / total
    return TimeGrid.at(schedule, t)


@dataclass(frozen=True)
class _Making:
    """The work of one process."""

    folder: Path
    config: TrajectoriesConfig
    model: GenerativeModel
    way: _Way
    stopped: list[int]
    on_step: OnStep | None

    def make(self, shards: Sequence[int]) -> None:
        """Compute and write some shards.

        Raises:
            KeyboardInterrupt: a signal asked to stop before the last was complete.
        """
        total = sum(len(self.config.rows_of(shard)) for shard in shards)
        done = 0
        for shard in shards:
            for leftover in self.folder.glob(
                f".{shard_path(self.folder, shard, '*').name}.*.tmp"
            ):  # of a killed process
                leftover.unlink()
            self._write(shard, done, total)
            done += len(self.config.rows_of(shard))

    def _write(self, shard: int, done: int, total: int) -> None:
        began, rows = time.perf_counter(), self.config.rows_of(shard)
        kept = self.config.kept
        content = np.empty((len(rows), len(kept), *self.model.spec.shape), np.float32)
        classes = self.model.classes_for(self.config.num)
        batch = max(1, min(256, 2**20 // self.model.spec.dimension))
        for first in range(0, len(rows), batch):
            if self.stopped:
                raise KeyboardInterrupt
            part = rows[first : first + batch]
            before = done + first

            def report(step: int, of: int, before: int = before, count: int = len(part)) -> None:
                if self.on_step is not None:
                    self.on_step(before * of + count * step, total * of)

            found = self._states(part, None if classes is None else classes[part.start : part.stop], report)
            bad = (~found.isfinite()).flatten(2).any(2).any(0).tolist()
            if any(bad):
                place = bad.index(True)
                raise UserError(
                    f"{shard_path(self.folder, shard, 'npy')}: not written, for a state is not finite after step "
                    f"{kept[place]} of {self.config.num_steps} (t = {self.way.levels[place].t:.4g}), in trajectories "
                    f"{part.start} to {part.stop - 1}; the teacher's samples are no numbers"
                )
            content[first : first + len(part)] = found.cpu().numpy()
        sha256 = _write_array(shard_path(self.folder, shard, "npy"), content)
        condition = None if classes is None else tuple(classes[rows.start : rows.stop].tolist())
        described = Shard(
            num=len(rows), sha256=sha256, seconds=round(time.perf_counter() - began, 4), condition=condition
        )
        files.write_json(shard_path(self.folder, shard, "json"), described.to_json())

    @torch.inference_mode()
    def _states(self, rows: range, condition: Tensor | None, on_step: OnStep) -> Tensor:
        device, spec = self.model.device, self.model.spec
        draws = SampleDraws(self.config.seed, rows.start, len(rows), device).branch("trajectories")
        x = self.way.diffusion.noise.sample(draws, spec.shape) * self.way.diffusion.schedule.prior_std
        denoise = Conditioned(
            self.way.denoiser,
            None if condition is None else condition.to(device),
            spec.model_range if self.config.clip else None,
        )
        return states(denoise, x, self.way.grid, self.config.kept, SOLVERS.parse(self.config.solver), on_step)


def _write_array(path: Path, array: np.ndarray) -> str:
    """Write an .npy file; its SHA-256."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    digest = hashlib.sha256()
    # Not by numpy, whose error does not say that the disk is full.
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        for part in (head.getvalue(), array.reshape(-1).data.cast("B")):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _wait_until(ready: Callable[[], bool], stopped: list[int]) -> None:
    """Wait for other processes.

    Raises:
        KeyboardInterrupt: a signal asked to stop.
    """
    while not ready():
        if stopped:
            raise KeyboardInterrupt
        time.sleep(0.05)


def _own_device(device: torch.device) -> torch.device:
    """Of several GPUs, that of this process."""
    several = device.type == "cuda" and device.index is None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if several else device

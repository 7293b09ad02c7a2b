"""Trajectories of a teacher from noise to data, computed once and stored: what a one-step student is regressed onto.

    T/trajectories.json     settings, teacher and levels; written first
    T/shard-00000.npy       float32 (n, points + 1, *event), model units: the noise first, clean data last
    T/shard-00000.json      its classes, checksum and cost; written last: with it the shard is complete

A trajectory is the solution of the probability-flow ODE from one noise, at a few of the times that the solver visits
(Zheng et al. 2023, arXiv 2211.13449). Trajectory i follows from (seed, i) alone, however many there are in a shard, and
its noise is that of no sample: `sample` draws others from the same seed. An interrupted artifact goes on with the
shards that are missing. Under torchrun each process makes every so manieth shard, and all wait for the last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from osmose.configuration import Config, ConfigError
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
from osmose.methods.students import StudentConfig, Students
from osmose.training import files
from osmose.training.config import Parent, RunConfig
from osmose.training.run import Run, is_first_process, require_free, versions
from osmose.training.signals import stopping_on_signal


class TrajectoriesConfig(Config):
    """What trajectories are made.

    Errors fall as 1 / num_steps with `ddim`, and as its square with `heun`, whose last step, to clean data, is Euler's:
    on `linear` and `cosine`, where sigma falls as sqrt(t), the end of a trajectory gains less.
    """

    num: int = Field(ge=1, description="how many")
    num_steps: int = Field(64, ge=1, description="solver steps from t = 1 to clean data")
    points: int = Field(8, ge=1, description="states that are stored of each, besides the noise")
    grid: Literal["quadratic", "even"] = Field(
        "quadratic", description="the k-th state above clean data is at t = (k / points)^2, or at k / points"
    )
    solver: Literal["ddim", "heun"] = "ddim"
    clip: bool = Field(description="keep the denoised estimate inside the data's range; states may leave it")
    seed: int = Field(0, ge=0, lt=2**63, description="of the noise")
    shard_size: int = Field(1024, ge=1, description="trajectories in one file")

    @model_validator(mode="after")
    def _points_are_steps(self) -> TrajectoriesConfig:
        power = 2 if self.grid == "quadratic" else 1
        unit = self.points**power
        if self.num_steps % unit:
            near = unit * max(1, round(self.num_steps / unit))
            fewer = max(n for n in range(1, self.num_steps + 1) if self.num_steps % n**power == 0 and n <= self.points)
            raise ConfigError(
                "num_steps",
                f"{self.num_steps} is not valid: the {self.grid} grid of points={self.points} lies on the solver's "
                f"steps if they are a multiple of {unit}; take num_steps={near} or points={fewer}",
            )
        return self

    @classmethod
    def suited(cls, teacher: RunConfig, **said: Any) -> TrajectoriesConfig:
        """What is said, and of the rest what suits a teacher: its own clipping, and a student's own steps.

        Raises:
            ConfigError: a value that is refused.
            UserError: a run that has no trajectories.
        """
        method = teacher.method
        if isinstance(method, StudentConfig):
            own = {"num_steps": max(method.counts()[1:]), "clip": method.clip}
        elif isinstance(method, DiffusionConfig):
            own = {"clip": method.sampling.clip and teacher.spec.model_range is not None}
        else:
            raise _no_teacher(method.kind)
        config: TrajectoriesConfig = cls.parse(own | said)
        return config

    @property
    def kept(self) -> tuple[int, ...]:
        """Which levels of a grid of `num_steps` steps are stored, noisiest first: 0 to num_steps."""
        power = 2 if self.grid == "quadratic" else 1
        unit = self.num_steps // self.points**power
        return tuple(self.num_steps - unit * k**power for k in range(self.points, -1, -1))

    @property
    def num_shards(self) -> int:
        """Files that the trajectories are stored in."""
        return -(-self.num // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """The trajectories of a shard."""
        return range(shard * self.shard_size, min(self.num, (shard + 1) * self.shard_size))


class _Header(Config):
    """trajectories.json."""

    format: Literal["osmose-trajectories-1"] = "osmose-trajectories-1"
    config: TrajectoriesConfig
    teacher: Parent = Field(description="the run whose trajectories they are")
    shape: tuple[int, ...] = Field(description="of an event")
    levels: tuple[tuple[float, float, float], ...] = Field(description="t, alpha, sigma of each state")
    versions: dict[str, str]


class _Shard(Config):
    """shard-00000.json."""

    num: int = Field(description="trajectories in it")
    sha256: str = Field(description="of the .npy")
    seconds: float = Field(description="that it took")
    condition: tuple[int, ...] | None = Field(description="the class of each trajectory")


class Trajectories:
    """Stored trajectories, read from their files as they are asked for.

    Attributes:
        folder: where they are.
        config: what was made.
        teacher: the run that they are of.
        levels: of each state, noisiest first. The last is the schedule's at t = 0, whose label a network can be told;
            its state is clean data, also where the schedule keeps some noise at t = 0.
        seconds: what all shards took, summed over processes.
        sha256: of settings, teacher, levels, states and classes; the same whether or not the making was interrupted.
    """

    def __init__(self, folder: Path, header: _Header, shards: Sequence[_Shard]):
        self.folder, self.config, self.teacher = folder, header.config, header.teacher
        self.levels: tuple[Level[float], ...] = tuple(Level(*level) for level in header.levels)
        self.seconds = sum(shard.seconds for shard in shards)
        self.sha256 = _digest(header, shards)
        self._condition = None
        if shards[0].condition is not None:
            self._condition = torch.tensor([label for shard in shards for label in shard.condition or ()])
        self._event = (len(header.levels), *header.shape)
        self._arrays = [
            np.asarray(np.load(_path(folder, shard, "npy"), mmap_mode="r", allow_pickle=False))
            for shard in range(len(shards))
        ]

    @classmethod
    def open(cls, folder: Path | str, teacher: Run | None = None) -> Trajectories:
        """Check every byte, then open.

        Args:
            folder: what `make` made.
            teacher: the run that they have to be of.

        Raises:
            UserError: no trajectories, not all of them, a file that has changed, or another teacher.
        """
        folder = Path(folder)
        header = _read_header(folder)
        if teacher is not None and teacher.hash() != header.teacher.sha256:
            raise UserError(
                f"{folder}: made from another teacher, {header.teacher.folder!r}, not from {teacher.folder} (their "
                "weights differ)"
            )
        total = header.config.num_shards
        there = sum(_path(folder, shard, "json").is_file() for shard in range(total))
        if there < total:
            raise UserError(
                f"{folder}: has {there} of {total} shards; make the others with osmose trajectories RUN --out "
                f"{folder} --resume"
            )
        return cls(folder, header, [_checked(folder, header, shard) for shard in range(total)])

    def __len__(self) -> int:
        return self.config.num

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some trajectories; only these are read from the disk.

        Args:
            indices: int64 (n,), from 0 to len - 1, in any order.

        Returns:
            States in the model's units, float32 (n, points + 1, *event), in the order of `levels`, and the class of
            each trajectory, int64 (n,), or None for a teacher that is not told classes.

        Raises:
            IndexError: an index outside.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"indices from {int(indices.min())} to {int(indices.max())} of {len(self)} trajectories")
        wanted = indices.numpy()
        shards, places = np.divmod(wanted, self.config.shard_size)
        states = np.empty((len(wanted), *self._event), np.float32)
        for shard in np.unique(shards):
            own = shards == shard
            states[own] = self._arrays[shard][places[own]]
        return torch.from_numpy(states), None if self._condition is None else self._condition[indices]


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
    header = _Header(
        config=config,
        teacher=run.as_parent(),
        shape=model.spec.shape,
        levels=tuple(tuple(level) for level in way.levels),
        versions=versions(),
    )
    if resume:
        _require_same(folder, header, run)
    else:
        require_free(folder)
    model.to(_own_device(torch.device(device)))
    with stopping_on_signal() as stopped:
        if not resume and is_first_process():
            files.write_json(folder / "trajectories.json", header.to_json())
        elif not resume:  # whether the folder is free is for the first process to say
            _wait_until((folder / "trajectories.json").is_file, stopped)
            _require_same(folder, header, run)
        rank, world = (int(os.environ.get(name, one)) for name, one in (("RANK", "0"), ("WORLD_SIZE", "1")))
        own = range(rank, config.num_shards, world)
        _Making(folder, config, model, way, stopped, on_step).make(
            [shard for shard in own if not _path(folder, shard, "json").is_file()]
        )
        others = [_path(folder, shard, "json") for shard in range(config.num_shards)]
        _wait_until(lambda: all(path.is_file() for path in others), stopped)
    return Trajectories.open(folder)


def levels_of(run: Run, config: TrajectoriesConfig) -> tuple[Level[float], ...]:
    """Where the states of trajectories are going to be, the noise first and clean data last.

    Raises:
        UserError: a run or settings that `make` would refuse.
    """
    return _Way.of(run.model(), config).levels


def recorded(folder: Path | str) -> TrajectoriesConfig:
    """The settings that a folder was begun with: what it is resumed with.

    Raises:
        UserError: no trajectories were begun there.
    """
    return _read_header(Path(folder)).config


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
            raise _no_teacher(model.config.kind)
        if config.clip and model.spec.model_range is None:
            raise UserError("clip: true needs data with a range, and these have none")
        assert isinstance(diffusion, DiffusionConfig), "nothing else has a chain"
        clean = Level(*(float(value) for value in diffusion.schedule.level(0.0)))
        return cls(diffusion, denoiser, grid, (*(grid.levels[step] for step in config.kept[:-1]), clean))


def _no_teacher(kind: str) -> UserError:
    return UserError(
        f"{kind}: has no trajectories from noise to data; ddpm, iddpm, edm and what is distilled from them have"
    )


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
            for leftover in self.folder.glob(f".{_path(self.folder, shard, '*').name}.*.tmp"):  # of a killed process
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
                    f"{_path(self.folder, shard, 'npy')}: not written, for a state is not finite after step "
                    f"{kept[place]} of {self.config.num_steps} (t = {self.way.levels[place].t:.4g}), in trajectories "
                    f"{part.start} to {part.stop - 1}; the teacher's samples are no numbers"
                )
            content[first : first + len(part)] = found.cpu().numpy()
        sha256 = _write_array(_path(self.folder, shard, "npy"), content)
        condition = None if classes is None else tuple(classes[rows.start : rows.stop].tolist())
        described = _Shard(
            num=len(rows), sha256=sha256, seconds=round(time.perf_counter() - began, 4), condition=condition
        )
        files.write_json(_path(self.folder, shard, "json"), described.to_json())

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


def _path(folder: Path, shard: int, kind: str) -> Path:
    return folder / f"shard-{shard:05d}.{kind}"


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


def _read_header(folder: Path) -> _Header:
    path = folder / "trajectories.json"
    if not path.is_file():
        raise UserError(f"{folder}: no trajectories were begun here (it has no trajectories.json)")
    values = files.read_json(path)
    if not isinstance(values, dict) or values.get("format") != "osmose-trajectories-1":
        raise UserError(f"{path}: not written by osmose (its format is not 'osmose-trajectories-1')")
    try:
        header: _Header = _Header.parse(values)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None
    return header


def _require_same(folder: Path, wanted: _Header, run: Run) -> None:
    """Refuse to go on with other settings, or with another teacher, than a folder was begun with.

    Raises:
        UserError: naming the field.
    """
    begun = _read_header(folder)
    for name, value in wanted.config.to_json().items():
        before = getattr(begun.config, name)
        if value != before:
            raise UserError(f"{name}: {value!r} given, but {folder} was begun with {before!r}; resume without it")
    if wanted.teacher.sha256 != begun.teacher.sha256:
        raise UserError(
            f"RUN: {run.folder} is not the teacher of {folder}, {begun.teacher.folder!r} (their weights differ)"
        )


def _checked(folder: Path, header: _Header, shard: int) -> _Shard:
    """What is said of a shard, once its file has been found to be as it was written.

    Raises:
        UserError: naming the file.
    """
    path, described = _path(folder, shard, "npy"), _path(folder, shard, "json")
    again = f"delete {described.name} and make it again with --resume"
    try:
        said: _Shard = _Shard.parse(files.read_json(described))
    except ConfigError as error:
        raise UserError(f"{described}: {error}") from None
    expected = len(header.config.rows_of(shard))
    if said.num != expected or (said.condition is not None and len(said.condition) != expected):
        raise UserError(f"{described}: does not describe {expected} trajectories; {again}")
    if not path.is_file():
        raise UserError(f"{path}: missing; {again}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != said.sha256:
        raise UserError(f"{path}: truncated or changed since it was written (its SHA-256 differs); {again}")
    return said


def _digest(header: _Header, shards: Sequence[_Shard]) -> str:
    values = {
        "settings": header.config.to_json(),
        "teacher": header.teacher.sha256,
        "shape": header.shape,
        "levels": header.levels,
        "shards": [(shard.sha256, shard.condition) for shard in shards],
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

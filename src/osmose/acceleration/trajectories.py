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
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from osmose.configuration import Config, ConfigError
from osmose.errors import UserError
from osmose.gaussian.schedule import Level
from osmose.methods.diffusion import DiffusionConfig
from osmose.methods.students import StudentConfig
from osmose.training import files
from osmose.training.config import Parent, RunConfig
from osmose.training.run import Run


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
            raise no_teacher(method.kind)
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


class Header(Config):
    """trajectories.json."""

    format: Literal["osmose-trajectories-1"] = "osmose-trajectories-1"
    config: TrajectoriesConfig
    teacher: Parent = Field(description="the run whose trajectories they are")
    shape: tuple[int, ...] = Field(description="of an event")
    levels: tuple[tuple[float, float, float], ...] = Field(description="t, alpha, sigma of each state")
    versions: dict[str, str]


class Shard(Config):
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

    def __init__(self, folder: Path, header: Header, shards: Sequence[Shard]):
        self.folder, self.config, self.teacher = folder, header.config, header.teacher
        self.levels: tuple[Level[float], ...] = tuple(Level(*level) for level in header.levels)
        self.seconds = sum(shard.seconds for shard in shards)
        self.sha256 = _digest(header, shards)
        self._condition = None
        if shards[0].condition is not None:
            self._condition = torch.tensor([label for shard in shards for label in shard.condition or ()])
        self._event = (len(header.levels), *header.shape)
        self._arrays = [
            np.asarray(np.load(shard_path(folder, shard, "npy"), mmap_mode="r", allow_pickle=False))
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
        there = sum(shard_path(folder, shard, "json").is_file() for shard in range(total))
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


def recorded(folder: Path | str) -> TrajectoriesConfig:
    """The settings that a folder was begun with: what it is resumed with.

    Raises:
        UserError: no trajectories were begun there.
    """
    return _read_header(Path(folder)).config


def no_teacher(kind: str) -> UserError:
    """What to say of a run whose samples come about in another way."""
    return UserError(
        f"{kind}: has no trajectories from noise to data; ddpm, iddpm, edm and what is distilled from them have"
    )


def shard_path(folder: Path, shard: int, kind: str) -> Path:
    """Where a shard's states (npy) or their description (json) are."""
    return folder / f"shard-{shard:05d}.{kind}"


def _read_header(folder: Path) -> Header:
    path = folder / "trajectories.json"
    if not path.is_file():
        raise UserError(f"{folder}: no trajectories were begun here (it has no trajectories.json)")
    values = files.read_json(path)
    if not isinstance(values, dict) or values.get("format") != "osmose-trajectories-1":
        raise UserError(f"{path}: not written by osmose (its format is not 'osmose-trajectories-1')")
    try:
        header: Header = Header.parse(values)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None
    return header


def require_same(folder: Path, wanted: Header, run: Run) -> None:
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


def _checked(folder: Path, header: Header, shard: int) -> Shard:
    """What is said of a shard, once its file has been found to be as it was written.

    Raises:
        UserError: naming the file.
    """
    path, described = shard_path(folder, shard, "npy"), shard_path(folder, shard, "json")
    again = f"delete {described.name} and make it again with --resume"
    try:
        said: Shard = Shard.parse(files.read_json(described))
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


def _digest(header: Header, shards: Sequence[Shard]) -> str:
    values = {
        "settings": header.config.to_json(),
        "teacher": header.teacher.sha256,
        "shape": header.shape,
        "levels": header.levels,
        "shards": [(shard.sha256, shard.condition) for shard in shards],
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

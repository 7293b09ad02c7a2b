"""What a data set is: a specification, a training part, a held-out part, an identity."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional

from osmose.configuration import Config
from osmose.data import SOURCES
from osmose.errors import UserError


class DataSpec(Config):
    """The form of one data set: what an event looks like and how its units map to the model's.

    Models work on `(x - shift) / scale`; images are thereby in [-1, 1], points have mean 0 and deviation 1.
    """

    kind: Literal["image", "points", "series", "counts", "function"]
    shape: tuple[int, ...] = Field(min_length=1, description="event shape: (channels, height, width) or (dimension,)")
    range: tuple[float, float] | None = Field(None, description="smallest and largest value, in data units")
    levels: int | None = Field(None, ge=2, description="number of equally spaced values in `range` that occur")
    shift: tuple[float, ...] = Field((0.0,), description="per channel (first axis of the event), or one for all")
    scale: tuple[float, ...] = Field((1.0,), description="per channel (first axis of the event), or one for all")
    num_classes: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _coherent(self) -> DataSpec:
        if any(side < 1 for side in self.shape):
            raise ValueError(f"shape {self.shape} has a side below 1")
        for name in ("shift", "scale"):
            if len(getattr(self, name)) not in (1, self.shape[0]):
                raise ValueError(f"{name} needs 1 or {self.shape[0]} numbers, one per channel")
        if any(scale <= 0 for scale in self.scale):
            raise ValueError("scale must be positive")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range {self.range} is empty")
        if self.levels is not None and self.range is None:
            raise ValueError("levels need a range")
        return self

    @property
    def dimension(self) -> int:
        """Number of values in one event."""
        return math.prod(self.shape)

    @property
    def model_range(self) -> tuple[float, float] | None:
        """The interval that holds `range` in the model's units, over all channels, or None for unbounded data."""
        if self.range is None:
            return None
        channels = max(len(self.shift), len(self.scale))
        affine = [(self.shift[i % len(self.shift)], self.scale[i % len(self.scale)]) for i in range(channels)]
        low, high = self.range
        return min((low - a) / b for a, b in affine), max((high - a) / b for a, b in affine)

    def encode(self, x: Tensor) -> Tensor:
        """Data units (B, *shape), any dtype, to model units, float32."""
        shift, scale = self._affine(x)
        return (x.to(torch.float32) - shift) / scale

    def decode(self, x: Tensor) -> Tensor:
        """Model units (B, *shape) to data units, float32: inside `range`, and on its `levels` where there are any."""
        shift, scale = self._affine(x)
        x = x.to(torch.float32) * scale + shift
        if self.range is not None:
            low, high = self.range
            x = x.clamp(low, high)
            if self.levels is not None:
                step = (high - low) / (self.levels - 1)
                x = ((x - low) / step).round() * step + low
        return x

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"data of shape {tuple(x.shape[1:])} given where the specification says {self.shape}")
        form = (-1,) + (1,) * (len(self.shape) - 1)
        return (
            torch.tensor(self.shift, device=x.device).view(form),
            torch.tensor(self.scale, device=x.device).view(form),
        )


class DataIdentity(Config):
    """What makes two data sets the same: recorded in every run and beside every score."""

    source: str = Field(description="as given, without private folders: `digits`, `folder:cats`")
    sha256: str = Field(description="of the spec, the values and the order of both parts")
    num_train: int
    num_held_out: int
    split: str = Field(description="how the held-out part was chosen, in words")
    full_sha256: str | None = Field(None, description="of downsampled images: the hash of the images as they were read")


@dataclass(frozen=True)
class Dataset:
    """Real data in data units: uint8 where the values are 8-bit, float32 otherwise, all in memory.

    Attributes:
        train, held_out: shape (N, *spec.shape).
        train_labels, held_out_labels: int64, shape (N,), or None.
        split: how the held-out part was chosen, in words.
        source: the `--data` argument, without private folders.
        class_names: one per class, or None.
        full_sha256: of downsampled images, the hash of the images as they were read.
    """

    source: str
    spec: DataSpec
    train: Tensor
    held_out: Tensor
    split: str
    train_labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    full_sha256: str | None = None

    @property
    def identity(self) -> DataIdentity:
        """Name, sizes, split and a hash over every value."""
        digest = hashlib.sha256(self.spec.model_dump_json().encode())
        for part in (self.train, self.held_out, self.train_labels, self.held_out_labels):
            if part is not None:
                digest.update(str((tuple(part.shape), part.dtype)).encode())
                digest.update(part.contiguous().numpy().data)
        return DataIdentity(
            source=self.source,
            sha256=digest.hexdigest(),
            num_train=len(self.train),
            num_held_out=len(self.held_out),
            split=self.split,
            full_sha256=self.full_sha256,
        )

    def downsampled(self, factor: int) -> Dataset:
        """The same images (N, C, H, W), averaged over blocks of `factor` x `factor` pixels: float32, in data units.

        Range, shift and scale stay, so that both resolutions share the model's units; `levels` go, since averages lie
        between them.

        Raises:
            UserError: not images, or a side that `factor` does not divide.
        """
        if self.spec.kind != "image":
            form = f"{self.spec.kind} of shape {self.spec.shape}"
            raise UserError(f"downsample: {factor} is for images; {self.source} has {form}")
        channels, height, width = self.spec.shape
        if height % factor or width % factor:
            most = min(height & -height, width & -width)
            raise UserError(
                f"downsample: {factor} does not divide the sides of {self.source}, images of shape {self.spec.shape}; "
                + (f"use at most {most}" if most > 1 else "they do not halve")
            )

        def averaged(images: Tensor) -> Tensor:
            # In chunks: as float32 the whole of 8-bit images would take four times its memory.
            return torch.cat([functional.avg_pool2d(chunk.to(torch.float32), factor) for chunk in images.split(4096)])

        return replace(
            self,
            spec=self.spec.replace(shape=(channels, height // factor, width // factor), levels=None),
            train=averaged(self.train),
            held_out=averaged(self.held_out),
            full_sha256=self.full_sha256 or self.identity.sha256,
        )

    def part(self, name: Literal["train", "held-out"]) -> tuple[Tensor, Tensor | None]:
        """Values and labels of one part."""
        return (self.train, self.train_labels) if name == "train" else (self.held_out, self.held_out_labels)


#: Sources of images in files of their own, which can be resized, converted, or left out when they are broken.
_IMAGE_FILES = ("folder", "hub")


class DataConfig(Config):
    """Which data to use and how to read it."""

    source: str = Field(description="NAME or NAME:ARGUMENT, for example digits or folder:photos")
    #: Not part of a run's record: where the data lie on a machine is nobody else's business.
    root: Path | None = Field(None, exclude=True, description="folder that holds mnist/, fashion-mnist/ or cifar10/")
    size: int | None = Field(None, ge=1, description="side to which images of other sizes are brought (folder, hub)")
    channels: Literal[1, 3] | None = Field(None, description="1 converts images to grey, 3 to colour (folder, hub)")
    downsample: int | None = Field(None, description="average blocks of so many pixels a side; a power of two")
    held_out: float = Field(0.1, gt=0, lt=1, description="share held out where the data brings no test part")
    split_seed: int = Field(0, ge=0, lt=2**63, description="seed of the random split")
    skip_bad: bool = Field(False, description="leave out files that cannot be read instead of stopping")
    num_points: int = Field(50_000, ge=10, description="how many points a toy law draws, held-out part included")

    @field_validator("downsample")
    @classmethod
    def _power_of_two(cls, factor: int | None) -> int | None:
        if factor is not None and (factor < 2 or factor.bit_count() != 1):
            raise ValueError("should be a power of two, at least 2")
        return factor

    def load(self) -> Dataset:
        """Read the data.

        Raises:
            UserError: unknown source, missing or unreadable files, values that no model can be trained on, images that
                cannot be downsampled as asked.
        """
        name, _, argument = self.source.partition(":")
        loader = SOURCES.resolve(name)
        if name not in _IMAGE_FILES:
            for option, value in (
                ("size", self.size),
                ("channels", self.channels),
                ("skip_bad", self.skip_bad or None),
            ):
                if value is not None:
                    raise UserError(f"{option}: {value!r} is for folder: and hub: data; {name!r} has none to change")
        dataset: Dataset = loader(argument, self)
        return dataset if self.downsample is None else dataset.downsampled(self.downsample)

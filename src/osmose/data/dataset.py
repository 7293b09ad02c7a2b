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


class SeriesForm(Config):
    """What is known of series besides the shape of an item, (columns, longest length).

    Times are float64, in the unit of the file; a missing value is NaN, and so is a time that an item does not have.
    """

    columns: tuple[str, ...] = Field(min_length=1)
    time_column: str = "time"
    id_column: str | None = None
    unit: Literal["", "days", "hours", "minutes", "seconds"] = Field("", description="of dates; empty for numbers")
    gap: float = Field(gt=0, description="median time between neighbours")
    span: float = Field(gt=0, description="longest time that an item covers")
    memory: float = Field(gt=0, description="time in which correlations within an item fall to 1/e, in training")
    first: float = Field(0.0, description="earliest time of an item")
    regular: bool = Field(description="whether nothing is missing, and all items have the same times")
    times: tuple[float, ...] | None = Field(None, description="of regular series")
    from_first: bool = Field(False, description="times of an item count from its first")


class DataSpec(Config):
    """The form of one data set: what an event looks like and how its units map to the model's.

    Models work on `(x - shift) / scale`; images are thereby in [-1, 1], points have mean 0 and deviation 1.
    """

    kind: Literal["image", "points", "series", "counts", "function", "text"]
    shape: tuple[int, ...] = Field(min_length=1, description="event shape: (channels, height, width) or (dimension,)")
    range: tuple[float, float] | None = Field(None, description="smallest and largest value, in data units")
    levels: int | None = Field(None, ge=2, description="number of equally spaced values in `range` that occur")
    shift: tuple[float, ...] = Field((0.0,), description="per channel (first axis of the event), or one for all")
    scale: tuple[float, ...] = Field((1.0,), description="per channel (first axis of the event), or one for all")
    num_classes: int | None = Field(None, ge=1)
    start: DataSpec | None = Field(None, description="form of the data that samples begin with, if not noise")
    series: SeriesForm | None = Field(None, description="of series: their columns and times")
    paired: bool = Field(False, description="each item belongs to one of the data that samples begin with")
    alphabet: str | None = Field(None, description="of text: the character that each level stands for")

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
        if self.start is not None and self.start.shape != self.shape:
            raise ValueError(f"shape {self.shape} is not that of the data to begin with, {self.start.shape}")
        if self.paired and self.start is None:
            raise ValueError("pairs need data to begin with")
        if (self.kind == "series") != (self.series is not None):
            raise ValueError("series, and they alone, have times")
        if (self.kind == "text") != (self.alphabet is not None) or len(self.alphabet or "") != (
            self.levels if self.kind == "text" else 0
        ):
            raise ValueError("text, and it alone, has an alphabet, of a character for each level")
        return self

    @property
    def dimension(self) -> int:
        """Number of values in one event."""
        return math.prod(self.shape)

    @property
    def step(self) -> float | None:
        """The distance of neighbouring levels, data units, or None where there are no levels."""
        if self.levels is None or self.range is None:
            return None
        return (self.range[1] - self.range[0]) / (self.levels - 1)

    @property
    def whole(self) -> bool:
        """Whether every value that occurs is a whole number."""
        return (
            self.step is not None and self.range is not None and self.step.is_integer() and self.range[0].is_integer()
        )

    @property
    def model_range(self) -> tuple[float, float] | None:
        """The interval that holds `range` in the model's units, over all channels, or None for unbounded data."""
        if self.range is None:
            return None
        channels = max(len(self.shift), len(self.scale))
        affine = [(self.shift[i % len(self.shift)], self.scale[i % len(self.scale)]) for i in range(channels)]
        low, high = self.range
        return min((low - a) / b for a, b in affine), max((high - a) / b for a, b in affine)

    def some_times(self, count: int) -> Tensor | None:
        """Times of so many series, float64 (count, L): those of all items, or evenly spread; None for other data."""
        form = self.series
        if form is None:
            return None
        own = torch.tensor(form.times, dtype=torch.float64) if form.times is not None else None
        even = torch.linspace(form.first, form.first + form.span, self.shape[1], dtype=torch.float64)
        return (even if own is None else own).repeat(count, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Data units (B, *shape), any dtype, to model units, float32."""
        shift, scale = self._affine(x)
        return (x.to(torch.float32) - shift) / scale

    def decode(self, x: Tensor) -> Tensor:
        """Model units (B, *shape) to data units, float32: inside `range`, and on its `levels` where there are any."""
        shift, scale = self._affine(x)
        if self.step is not None:
            low, step = self._lattice()
            return (self.to_levels(x).to(_fine(x)) * step + low).to(torch.float32)
        x = x.to(torch.float32) * scale + shift
        return x if self.range is None else x.clamp(*self.range)

    def to_levels(self, x: Tensor) -> Tensor:
        """Model units (B, *shape) to the numbers 0..levels-1 of the levels, int64; data with levels alone."""
        shift, scale = self._affine(x)
        low, step = self._lattice()
        values = x.to(_fine(x)) * scale + shift
        return ((values - low) / step).clamp(0, (self.levels or 1) - 1).round().long()

    def from_levels(self, n: Tensor) -> Tensor:
        """Numbers of levels (B, *shape) to model units, float32; data with levels alone."""
        shift, scale = self._affine(n)
        low, step = self._lattice()
        return ((n.to(_fine(n)) * step + low - shift) / scale).to(torch.float32)

    def _lattice(self) -> tuple[float, float]:
        if self.range is None or self.step is None:
            raise UserError(f"data: {self.kind} of shape {self.shape} have no levels, and counts are needed")
        return self.range[0], self.step

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Series may be of any length: of an item, only the number of columns is fixed.
        given = tuple(x.shape[1:])
        if given != self.shape and not (self.kind == "series" and x.ndim == 3 and given[0] == self.shape[0]):
            raise UserError(f"data of shape {given} given where the specification says {self.shape}")
        form = (-1,) + (1,) * (len(self.shape) - 1)
        return (
            torch.tensor(self.shift, device=x.device).view(form),
            torch.tensor(self.scale, device=x.device).view(form),
        )


def _fine(x: Tensor) -> torch.dtype:
    """The type in which large counts keep their last digit, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


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
        start: the data that samples begin with, or None for noise.
        train_times, held_out_times: of series, float64 (N, L); of others None.
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
    start: Dataset | None = None
    train_times: Tensor | None = None
    held_out_times: Tensor | None = None

    @property
    def identity(self) -> DataIdentity:
        """Name, sizes, split and a hash over every value."""
        # Without `start`, whose own hash is taken in below: what a data set is does not depend on what it is for.
        digest = hashlib.sha256(self.spec.model_dump_json(exclude={"start", "paired", "series", "alphabet"}).encode())
        if self.spec.series is not None:
            digest.update(self.spec.series.model_dump_json().encode())
        if self.spec.alphabet is not None:
            digest.update(self.spec.alphabet.encode())
        if self.start is not None:
            digest.update(f"{self.start.identity.sha256} {self.paired}".encode())
        parts = (self.train, self.held_out, self.train_labels, self.held_out_labels)
        for part in (*parts, self.train_times, self.held_out_times):
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

    def resized(self, size: int) -> Dataset:
        """The same square images brought to `size` x `size` pixels, with averaging where they shrink; float32.

        Range, shift and scale stay; `levels` go, since resized values lie between them.

        Raises:
            UserError: not square images.
        """
        if self.spec.kind != "image" or self.spec.shape[1] != self.spec.shape[2]:
            raise UserError(f"size: {size} is for square images; {self.source} has {self.spec.kind} {self.spec.shape}")

        def brought(images: Tensor) -> Tensor:
            parts = (
                functional.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
                for part in images.split(4096)
            )
            return torch.cat([part.clamp(*(self.spec.range or (None, None))) for part in parts])

        if self.spec.shape[1] == size:
            return self
        spec = self.spec.replace(shape=(self.spec.shape[0], size, size), levels=None)
        return replace(self, spec=spec, train=brought(self.train), held_out=brought(self.held_out))

    @property
    def paired(self) -> bool:
        """Whether item i of each part belongs to item i of the same part of `start`."""
        return self.spec.paired

    def beginning_with(self, start: Dataset, *, paired: bool = False) -> Dataset:
        """The same data, whose samples begin with items of other data.

        Args:
            start: the other data.
            paired: whether item i belongs to item i of `start`, in both parts.

        Raises:
            UserError: events of another shape; of pairs, parts of other lengths or split in another way.
        """
        if start.spec.shape != self.spec.shape:
            raise UserError(
                f"start: {start.source} has events of shape {start.spec.shape}, and {self.source} of "
                f"{self.spec.shape}; both ends need one shape (--size resizes images)"
            )
        sizes = [(len(data.train), len(data.held_out), data.split) for data in (self, start)]
        if paired and sizes[0] != sizes[1]:
            (a, b, how), (c, d, other) = sizes
            raise UserError(
                f"paired: {self.source} has {a} + {b} items ({how}), {start.source} {c} + {d} ({other}); pairs need as "
                "many of both, split alike"
            )
        spec = self.spec.replace(start=start.spec.to_json(), paired=paired)
        return replace(self, spec=spec, start=start)

    def quantised(self, levels: int) -> Dataset:
        """The same data, every value brought to the nearest of so many equally spaced levels in their range.

        Raises:
            UserError: data without a range.
        """
        if self.spec.range is None:
            raise UserError(f"levels: {levels} needs data with a range, and {self.source} has none ({self.spec.kind})")
        low, high = self.spec.range
        step = (high - low) / (levels - 1)
        kept = self.train.dtype if step.is_integer() and float(low).is_integer() else torch.float32

        def nearest(x: Tensor) -> Tensor:
            parts = (((part.float() - low) / step).round() * step + low for part in x.split(4096))
            return torch.cat([part.to(kept) for part in parts])

        spec = self.spec.replace(levels=levels)
        return replace(self, spec=spec, train=nearest(self.train), held_out=nearest(self.held_out))

    def part(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Values and labels of one part, train or held-out."""
        return (self.train, self.train_labels) if name == "train" else (self.held_out, self.held_out_labels)

    def times(self, name: str) -> Tensor | None:
        """Times of the series of one part, float64 (N, L); None for other data."""
        return self.train_times if name == "train" else self.held_out_times


#: Sources of images in files of their own, which can be resized, converted, or left out when they are broken.
_IMAGE_FILES = ("folder", "hub")
#: Options that some sources take: which, and in words.
_OPTIONS = {
    "channels": (_IMAGE_FILES, "folder: and hub: data"),
    "skip_bad": (_IMAGE_FILES, "folder: and hub: data"),
    "max_count": (("counts",), "counts: data"),
    "time_column": (("series",), "series: data"),
    "id_column": (("series",), "series: data"),
    "columns": (("series",), "series: data"),
    "window": (("series", "etth1", "fx-8", "text"), "series: and text: data, etth1 and fx-8"),
    "stride": (("series", "etth1", "fx-8", "text"), "series: and text: data, etth1 and fx-8"),
    "letters": (("text",), "text: data"),
}


class DataConfig(Config):
    """Which data to use and how to read it."""

    source: str = Field(description="NAME or NAME:ARGUMENT, for example digits or folder:photos")
    #: Not part of a run's record: where the data lie on a machine is nobody else's business.
    root: Path | None = Field(None, exclude=True, description="folder that holds mnist/, fashion-mnist/ or cifar10/")
    size: int | None = Field(None, ge=1, description="side to which images of other sizes are brought")
    channels: Literal[1, 3] | None = Field(None, description="1 converts images to grey, 3 to colour (folder, hub)")
    downsample: int | None = Field(None, description="average blocks of so many pixels a side; a power of two")
    levels: int | None = Field(
        None, ge=2, description="bring values to so many levels in their range; 2 is black-white"
    )
    start: str | None = Field(None, description="data that samples begin with, as `source`, read alike; noise if none")
    paired: bool = Field(False, description="item i of the data belongs to item i of `start`")
    max_count: int | None = Field(None, ge=1, description="largest count that can occur (counts); found in the data")
    time_column: str | None = Field(None, description="of series; the first if not given")
    id_column: str | None = Field(None, description="tells the series of one table apart")
    columns: tuple[str, ...] | None = Field(None, description="of values, in this order; all that are left")
    window: int | None = Field(None, ge=2, description="learn from windows of so many rows (text: characters)")
    stride: int | None = Field(
        None, ge=1, description="rows between two windows; 1 unless memory would run out (text: window)"
    )
    letters: bool = Field(False, description="of text, keep 26 letters in lower case and spaces")
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
        if self.paired and self.start is None:
            raise UserError("paired: true needs data to begin with (start)")
        names = [text.partition(":")[0] for text in (self.source, self.start) if text is not None]
        for option, (users, words) in _OPTIONS.items():
            value = getattr(self, option) or None
            if value is not None and not any(name in users for name in names):
                raise UserError(f"{option}: {value!r} is for {words}; {names[0]!r} has none to change")
        dataset = self._read()
        if self.start is None:
            return dataset
        # What shapes values is for both ends; what makes a file readable may be needed by one of them alone.
        start = self.replace(source=self.start, start=None, paired=False, root=self.root and str(self.root))
        return dataset.beginning_with(start._read(), paired=self.paired)

    def _read(self) -> Dataset:
        """The data of `source` alone."""
        name, _, argument = self.source.partition(":")
        loader = SOURCES.resolve(name)
        dataset: Dataset = loader(argument, self)
        if self.size is not None and name not in _IMAGE_FILES:
            dataset = dataset.resized(self.size)
        dataset = dataset if self.downsample is None else dataset.downsampled(self.downsample)
        return dataset if self.levels is None else dataset.quantised(self.levels)

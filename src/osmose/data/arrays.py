"""Arrays that a user brings: NumPy archives with images or points, CSV tables with points, and either with counts.

Nothing pickled is ever read.
"""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from osmose.data.assembly import (
    LARGEST_COUNT,
    Part,
    counts_dataset,
    image_dataset,
    named_path,
    points_dataset,
    require_finite,
)
from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.errors import UserError

TRAIN_KEYS = ("x", "train", "x_train")
TRAIN_LABEL_KEYS = ("y", "labels", "train_labels", "y_train")
HELD_OUT_KEYS = ("test", "held_out", "x_test")
HELD_OUT_LABEL_KEYS = ("test_labels", "held_out_labels", "y_test")

#: Float images must lie in one of these; the smallest that holds all values is taken as their range.
FLOAT_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
FORMS = "images (N, H, W), (N, H, W, C) or (N, C, H, W), or points (N, D)"
MINIMUM_ROWS = 10


class Archive:
    """The arrays of an npz file, read one at a time in a `with` block; what is wrong with it is said in one line."""

    def __init__(self, path: Path):
        self.path = path
        try:
            archive = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            damage = f" ({error})" if zipfile.is_zipfile(path) else ""
            raise UserError(
                f"{path}: not a readable npz file{damage}; write one with numpy.savez(path, x=...)"
            ) from None
        if isinstance(archive, np.ndarray):
            raise UserError(f"{path}: a single array (npy); write it with numpy.savez(path, x=...)")
        self._archive = archive
        self.keys = tuple(archive.files)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.keys:
            raise UserError(f"{self.path}: no array {key!r}; it holds {', '.join(self.keys) or 'nothing'}")
        try:
            values: np.ndarray = self._archive[key]
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path}: array {key!r} is damaged ({error})") from None
        except ValueError as error:
            if "Object arrays" not in str(error):
                raise UserError(f"{self.path}: array {key!r} is damaged ({error})") from None
            raise UserError(
                f"{self.path}: array {key!r} has dtype object (pickled Python objects), which is never read; save "
                "numbers of one dtype"
            ) from None
        return values

    def first(self, keys: Sequence[str]) -> str | None:
        """The first of `keys` that the archive holds."""
        return next((key for key in keys if key in self.keys), None)


def load_npz(argument: str, config: DataConfig) -> Dataset:
    """Images or points from the npz file `argument`.

    The values are the array `x`, `train` or `x_train`, or the only one there is; `y`, `labels`, `train_labels` or
    `y_train` are their labels. A held-out part may be given as `test`, `held_out` or `x_test`, with labels under
    `test_labels`, `held_out_labels` or `y_test`; otherwise one is split off.

    (N, D) are points. Of 4 axes, the channels are the one that differs when two of the last three sides are equal,
    otherwise the shorter of axis 1 and axis 3. Integers are images with values 0..255; floats are images in the
    smallest of [0, 1], [-1, 1] and [0, 255] that holds every value.

    Raises:
        UserError: an unreadable file, an array missing, of another dtype or shape, with values outside those ranges
            or not finite; labels that do not fit.
    """
    path, source = named_path("npz", argument)
    with Archive(path) as archive:
        return _load_archive(source, archive, config)


def load_counts(argument: str, config: DataConfig) -> Dataset:
    """Counts from the table or archive `argument`: a .csv with a header line, or an .npz with arrays as `load_npz` has.

    Arrays are rows (N, D), or images (N, H, W), (N, H, W, C) or (N, C, H, W), of integers or of floats that are whole.

    Raises:
        UserError: another ending; what `load_csv` and `load_npz` refuse; values that are no counts.
    """
    path, source = named_path("counts", argument)
    if path.suffix.lower() == ".csv":
        header, table = _table(path, source)
        if float(table.max()) > LARGEST_COUNT:
            raise UserError(f"{source}: {float(table.max()):.0f} is not valid: counts end at {LARGEST_COUNT}")
        return counts_dataset(source, config, Part(table.float()), columns=header)
    if path.suffix.lower() != ".npz":
        raise UserError(f"{source}: should end in .csv or .npz")
    with Archive(path) as archive:
        parts, split = _parts(source, archive, _count_values)
    return counts_dataset(source, config, *parts, split=split)


def _count_values(source: str, key: str, values: np.ndarray) -> Tensor:
    """Rows (N, D) or images (N, C, H, W), float32."""
    if values.dtype.kind in "uif" and values.size:
        if LARGEST_COUNT < float(values.max()) < math.inf:  # before they become float32, which would round the number
            raise UserError(f"{source}: array {key!r} holds {values.max():.0f}; counts end at {LARGEST_COUNT}")
        values = values.astype(np.float32)
    return _values(source, key, values)


def _load_archive(source: str, archive: Archive, config: DataConfig) -> Dataset:
    parts, split = _parts(source, archive, _values)
    values = [part.values for part in parts]
    if values[0].ndim == 2:
        return points_dataset(source, config, *parts, split=split)
    if values[0].dtype == torch.uint8:
        return image_dataset(source, config, *parts, split=split)
    return image_dataset(source, config, *parts, split=split, value_range=_float_range(source, values), levels=None)


def _parts(source: str, archive: Archive, read: Callable[[str, str, np.ndarray], Tensor]) -> tuple[list[Part], str]:
    """The training part of an archive and, where there is one, the held-out part; and what it is called, in words."""
    key = archive.first(TRAIN_KEYS)
    if key is None:
        known = (*TRAIN_LABEL_KEYS, *HELD_OUT_KEYS, *HELD_OUT_LABEL_KEYS)
        rest = [name for name in archive.keys if name not in known]
        if len(rest) != 1:
            raise UserError(f"{source}: no array x or train; it holds {', '.join(archive.keys) or 'nothing'}")
        key = rest[0]
    held_out_key = archive.first(HELD_OUT_KEYS)
    keys = [key] if held_out_key is None else [key, held_out_key]
    values = [read(source, name, archive[name]) for name in keys]
    parts = [
        Part(value, _labels(source, archive, label_keys))
        for value, label_keys in zip(values, (TRAIN_LABEL_KEYS, HELD_OUT_LABEL_KEYS), strict=False)
    ]
    dtypes = {value.dtype for value in values}
    if len({value.ndim for value in values}) > 1 or len(dtypes) > 1:
        forms = " and ".join(f"{name} {archive[name].dtype} {archive[name].shape}" for name in keys)
        raise UserError(f"{source}: {forms}; both parts need one dtype and shape")
    return parts, f"the array {held_out_key!r}"


def _values(source: str, key: str, values: np.ndarray) -> Tensor:
    """Points (N, D) float32, or images (N, C, H, W), uint8 or float32."""
    if values.dtype.kind not in "uif":
        raise UserError(f"{source}: array {key!r} has dtype {values.dtype}; integers or floats are needed")
    if values.ndim not in (2, 3, 4) or values.size == 0:
        raise UserError(f"{source}: array {key!r} has shape {values.shape}; needed are {FORMS}, none of them empty")
    if values.ndim == 2 or values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows float32 is refused as infinite, with its index
            result = torch.from_numpy(values.astype(np.float32))
        require_finite(source, key, result)
    else:
        low, high = int(values.min()), int(values.max())
        if low < 0 or not 1 < high <= 255:
            raise UserError(
                f"{source}: the integer images {key!r} have values {low}..{high}; 0..255 are needed (save images with "
                "another range as floats in [0, 1])"
            )
        result = torch.from_numpy(values.astype(np.uint8))
    if result.ndim == 3:
        return result[:, None]
    if result.ndim == 4 and _channels_last(tuple(result.shape[1:])):
        return result.permute(0, 3, 1, 2).contiguous()
    return result


def _channels_last(shape: tuple[int, ...]) -> bool:
    first, middle, last = shape
    if first == middle != last:
        return True
    if middle == last != first:
        return False
    return last < first


def _labels(source: str, archive: Archive, keys: Sequence[str]) -> Tensor | None:
    key = archive.first(keys)
    if key is None:
        return None
    labels = archive[key]
    if labels.dtype.kind not in "ui" or labels.ndim != 1:
        form = f"dtype {labels.dtype} and shape {labels.shape}"
        raise UserError(f"{source}: the labels {key!r} have {form}; integers of shape (N,) are needed")
    return torch.from_numpy(labels.astype(np.int64))


def _float_range(source: str, parts: Sequence[Tensor]) -> tuple[float, float]:
    low, high = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    for bounds in FLOAT_RANGES:
        if bounds[0] <= low and high <= bounds[1]:
            return bounds
    ranges = ", ".join(f"[{a:g}, {b:g}]" for a, b in FLOAT_RANGES)
    raise UserError(f"{source}: float images with values {low:g}..{high:g}; bring them into one of {ranges}")


def load_items(path: Path, spec: DataSpec) -> Tensor:
    """Items of a known form, float32 (n, *spec.shape) in data units, from an .npz, a .csv, or the file of one image.

    Of an archive the array `samples` (as `osmose sample` writes it), `x`, `train` or `x_train`, or the only one.

    Raises:
        UserError: another ending, a file that cannot be read, items of another shape, values that are not finite.
    """
    items = _items(path, spec, ("samples", *TRAIN_KEYS))
    require_finite(str(path), "item", items)
    return items


def load_known(path: Path, spec: DataSpec) -> Tensor:
    """As `load_items`, of values that may be missing: NaN where nothing is known; of an archive `known` comes first.

    Raises:
        UserError: as `load_items`; infinity, or a value outside the range of the data.
    """
    items = _items(path, spec, ("known", "samples", *TRAIN_KEYS))
    if bool(items.isinf().any()):
        raise UserError(f"{path}: holds infinity; what is not known is NaN")
    if spec.range is not None and bool(((items < spec.range[0]) | (items > spec.range[1])).any()):
        low, high = float(items.nan_to_num(spec.range[0]).min()), float(items.nan_to_num(spec.range[0]).max())
        raise UserError(f"{path}: has values from {low:g} to {high:g}; the data are in {spec.range}")
    return items


def load_times(path: Path, count: int) -> Tensor | None:
    """The array `times` of an .npz, float64 (count, L); None where there is none.

    Raises:
        UserError: times of another shape.
    """
    if path.suffix.lower() != ".npz":
        return None
    with Archive(path) as archive:
        if "times" not in archive.keys:
            return None
        times = torch.from_numpy(archive["times"].astype(np.float64))
    if times.ndim == 1:
        times = times.expand(count, -1)
    if times.ndim != 2 or len(times) < count:
        raise UserError(f"{path}: times of shape {tuple(times.shape)} for {count} items; (n, L) or (L,) are needed")
    return times[:count]


def _items(path: Path, spec: DataSpec, keys: Sequence[str]) -> Tensor:
    """Items of a known form; of an archive the first of some keys, or the only array."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if suffix == ".npz":
        with Archive(path) as archive:
            key = archive.first(keys) or (archive.keys[0] if len(archive.keys) == 1 else None)
            if key is None:
                raise UserError(
                    f"{path}: no array {' or '.join(keys[:2])}; it holds {', '.join(archive.keys) or 'nothing'}"
                )
            values = archive[key]
        if values.dtype.kind not in "uif" or not values.size:
            raise UserError(f"{path}: array {key!r} has dtype {values.dtype}, shape {values.shape}; numbers are needed")
        items = torch.from_numpy(values.astype(np.float32))
        if items.ndim == 3 and len(spec.shape) == 3:
            items = items[:, None]
        elif items.ndim == 4 and tuple(items.shape[1:]) == (*spec.shape[1:], spec.shape[0]):
            items = items if spec.shape == tuple(items.shape[1:]) else items.permute(0, 3, 1, 2).contiguous()
    elif suffix == ".csv":
        items = _table(path, path.name, least=1)[1].float()
    elif suffix in (".png", ".jpg", ".jpeg", ".webp"):
        if spec.kind != "image" or spec.range is None:
            raise UserError(f"{path}: an image, and the items are {spec.kind} of shape {spec.shape}; write a .npz")
        items = _image(path, spec)
    else:
        raise UserError(f"{path}: should end in .npz, .csv, .png, .jpg, .jpeg or .webp")
    if tuple(items.shape[1:]) != spec.shape:
        raise UserError(f"{path}: items of shape {tuple(items.shape[1:])}; {spec.shape} are needed")
    return items


def _image(path: Path, spec: DataSpec) -> Tensor:
    """One image, (1, C, H, W) in the range of a specification."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L" if spec.shape[0] == 1 else "RGB"), dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    low, high = spec.range or (0.0, 1.0)
    image = torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)[None]
    return image * (high - low) + low


def load_csv(argument: str, config: DataConfig) -> Dataset:
    """Points (D,) from the comma-separated table `argument`: a header line, then numbers, one point a row.

    Raises:
        UserError: no header, a cell that is no finite number (named by line and column), a row of another length,
            a constant column, fewer than 10 rows.
    """
    path, source = named_path("csv", argument)
    header, table = _table(path, source)
    return points_dataset(source, config, Part(table.float()), columns=header)


def load_coordinates(path: Path) -> list[list[float]]:
    """Points from a table, a row each.

    Raises:
        UserError: not a readable table of numbers below a header line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows: list[list[float]] = _table(path, str(path), least=1)[1].tolist()
    return rows


def _table(path: Path, source: str, least: int = MINIMUM_ROWS) -> tuple[list[str], Tensor]:
    """Names of the columns and rows of numbers, float64 (N, D), at least so many."""
    cells = array("d")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            _require_header(source, header)
            for row in reader:
                if row:
                    cells.extend(_row(source, header, row, reader.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: not a readable table of text ({error})") from None
    table = torch.from_numpy(np.array(cells)).reshape(-1, len(header))
    if len(table) < least:
        raise UserError(f"{source}: {len(table)} rows of numbers; at least {least} are needed")
    return header, table


def _require_header(source: str, header: Sequence[str]) -> None:
    if not header:
        raise UserError(f"{source}: empty; a header line and {MINIMUM_ROWS} or more rows of numbers are needed")
    if all(number(name) is not None for name in header):
        raise UserError(f"{source}: the first line holds numbers ({', '.join(header[:3])}); a header line is needed")


def _row(source: str, header: Sequence[str], row: Sequence[str], line: int) -> list[float]:
    if len(row) != len(header):
        raise UserError(f"{source}: line {line} has {len(row)} cells where the header has {len(header)}")
    numbers = []
    for name, cell in zip(header, row, strict=True):
        value = number(cell)
        if value is None or not math.isfinite(value):
            raise UserError(f"{source}: line {line}, column {name!r}: {cell!r} is not a finite number")
        numbers.append(value)
    return numbers


def number(cell: str) -> float | None:
    """The number that a cell of a table holds, None for anything else."""
    try:
        return float(cell)
    except ValueError:
        return None

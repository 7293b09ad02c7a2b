"""MNIST's file format: MNIST, Fashion-MNIST, and anything else stored as the same four files.

An idx file is big-endian: two zero bytes, a type (8 = uint8), the number of axes, one uint32 per axis, then the values
in C order. Files may be gzip-compressed.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from osmose.data.assembly import Part, image_dataset, named_path
from osmose.data.dataset import DataConfig, Dataset
from osmose.data.locating import under_root
from osmose.errors import UserError

EXPECTED = "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, plain or .gz"

DIGIT_NAMES = tuple(str(digit) for digit in range(10))
FASHION_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load_mnist(argument: str, config: DataConfig) -> Dataset:
    """MNIST under ROOT/mnist: 60,000 + 10,000 grey images (1, 28, 28), uint8, 10 classes.

    Raises:
        UserError: missing, truncated or foreign files, named.
    """
    return _load_named("mnist", argument, config, ["mnist"], DIGIT_NAMES)


def load_fashion_mnist(argument: str, config: DataConfig) -> Dataset:
    """Fashion-MNIST under ROOT/fashion-mnist or ROOT/fashion_mnist, in the form of MNIST.

    Raises:
        UserError: missing, truncated or foreign files, named.
    """
    return _load_named("fashion-mnist", argument, config, ["fashion-mnist", "fashion_mnist"], FASHION_NAMES)


def load_idx(argument: str, config: DataConfig) -> Dataset:
    """Any four files in the form of MNIST's in the folder `argument`: uint8 images (1, H, W) with labels 0..K-1.

    Raises:
        UserError: missing, truncated or foreign files, named.
    """
    folder, source = named_path("idx", argument)
    return _load(source, folder, config, None)


def _load_named(
    source: str, argument: str, config: DataConfig, folders: list[str], class_names: tuple[str, ...]
) -> Dataset:
    if argument:
        raise UserError(f"{source} takes no argument, but {argument!r} was given; for a folder write idx:{argument}")
    return _load(source, under_root(source, config, folders, EXPECTED), config, class_names)


def _load(source: str, folder: Path, config: DataConfig, class_names: tuple[str, ...] | None) -> Dataset:
    parts = []
    for name in ("train", "t10k"):
        images = read_idx(_find(source, folder, f"{name}-images", 3), num_axes=3)
        labels = read_idx(_find(source, folder, f"{name}-labels", 1), num_axes=1)
        parts.append(Part(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    return image_dataset(source, config, *parts, class_names=class_names)


def _find(source: str, folder: Path, stem: str, num_axes: int) -> Path:
    # Some copies of MNIST spell the name with a dot, train-images.idx3-ubyte.
    names = [f"{stem}{mark}idx{num_axes}-ubyte{end}" for end in ("", ".gz") for mark in ("-", ".")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{source}: {folder} has no file {names[0]} or {names[2]}; expected there: {EXPECTED}")
    return found


def read_idx(path: Path, num_axes: int) -> np.ndarray:
    """The uint8 array in an idx file, gzip-compressed or plain.

    Raises:
        UserError: not an idx file of uint8 with `num_axes` axes, or more or fewer values than its header says.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    magic, wanted = data[:4].hex(), f"000008{num_axes:02x}"
    if magic != wanted:
        raise UserError(f"{path}: starts with {magic or 'nothing'} where an idx file of this kind has {wanted}")
    start = 4 + 4 * num_axes
    if len(data) < start:
        raise UserError(f"{path}: truncated inside its header ({len(data)} of {start} bytes)")
    shape = struct.unpack(f">{num_axes}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise UserError(f"{path}: {len(data) - start} bytes of values where its header says {math.prod(shape)}")
    # A copy: torch wants writable memory, and the header should not be kept alive.
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()

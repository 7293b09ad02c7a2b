"""Image files of any size and mode to one uint8 array: the part that folders and hub data sets share.

Stated rules. Pictures are turned as their EXIF orientation says; transparent ones are laid over white; 16-bit grey is
rounded to 8 bits; of an animation the first frame is taken. With a size, the short side is brought to it by an
antialiased Lanczos filter and the centre square is kept; without, all pictures must have one size. Without a channel
count, pictures are grey if every file is stored as grey, and colour otherwise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
from PIL import Image, ImageOps

from osmose.data.dataset import DataConfig
from osmose.errors import UserError

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_CHUNK = 1024
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class ImageFile:
    """One encoded picture: its name for messages, and how to get at its bytes."""

    name: str
    open: Callable[[], Path | BytesIO]


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]
    grey: bool


def read_images(source: str, files: Sequence[ImageFile], config: DataConfig) -> tuple[np.ndarray, list[int]]:
    """Decode `files` by the rules above, with `config.size`, `config.channels` and `config.skip_bad`.

    Returns:
        uint8 pictures (N, C, H, W), and the positions in `files` that they come from: all of them unless bad ones
        were skipped.

    Raises:
        UserError: a file that cannot be read (unless skipped, which warns), different sizes without `config.size`, no
            picture left, or more pictures than memory holds.
    """
    bad: list[str] = []
    headers = dict(_keep_good(source, files, range(len(files)), _header, config, bad))
    kept, found = list(headers), list(headers.values())
    if not found:
        raise _nothing_left(source, bad)
    if config.size is None:
        _require_one_size(source, [files[position].name for position in kept], [header.size for header in found])
    channels = config.channels or (1 if all(header.grey for header in found) else 3)
    width, height = (config.size, config.size) if config.size else found[0].size
    _require_memory(source, len(kept), (channels, height, width))

    pictures: np.ndarray | None = None
    positions: list[int] = []
    decoded = _keep_good(source, files, kept, lambda file: _decode(file, config.size, channels), config, bad)
    for position, picture in decoded:
        if pictures is None:
            pictures = np.empty((len(kept), *picture.shape), np.uint8)
        elif picture.shape != pictures.shape[1:]:  # the same sides, but one turned by its EXIF orientation
            names = [files[positions[0]].name, files[position].name]
            _require_one_size(source, names, [pictures.shape[:1:-1], picture.shape[:0:-1]])
        pictures[len(positions)] = picture
        positions.append(position)
    if pictures is None:
        raise _nothing_left(source, bad)
    if bad:
        some = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        warnings.warn(f"{source}: left out {len(bad)} of {len(files)} files that cannot be read: {some}", stacklevel=2)
    return pictures[: len(positions)], positions


def _keep_good(
    source: str,
    files: Sequence[ImageFile],
    positions: Sequence[int],
    read: Callable[[ImageFile], _Read],
    config: DataConfig,
    bad: list[str],
) -> Iterator[tuple[int, _Read]]:
    """Yield (position, read(file)) where that works; elsewhere note the file in `bad`, or refuse it."""

    def attempt(position: int) -> _Read | str:
        try:
            return read(files[position])
        except MemoryError:
            raise
        except Exception as error:  # on damaged bytes, Pillow's decoders raise nearly anything
            return f"{files[position].name} ({' '.join(str(error).split()) or type(error).__name__})"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # In chunks: an error then waits for one chunk, not for every file.
        for start in range(0, len(positions), _CHUNK):
            chunk = positions[start : start + _CHUNK]
            for position, result in zip(chunk, pool.map(attempt, chunk), strict=True):
                if not isinstance(result, str):
                    yield position, result
                elif config.skip_bad:
                    bad.append(result)
                else:
                    raise UserError(f"{source}: cannot read {result}; --skip-bad leaves such files out")


def _nothing_left(source: str, bad: Sequence[str]) -> UserError:
    return UserError(f"{source}: none of its {len(bad)} image files can be read, for example {bad[0]}")


def _header(file: ImageFile) -> _Header:
    with Image.open(file.open()) as image:
        return _Header(image.size, image.mode in _GREY_MODES)


def _decode(file: ImageFile, size: int | None, channels: int) -> np.ndarray:
    """One picture, uint8 (C, H, W)."""
    with Image.open(file.open()) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        if size is not None:
            short = min(image.size)
            width, height = (max(size, round(side * size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            left, top = (width - size) // 2, (height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image)
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _require_one_size(source: str, names: Sequence[str], sizes: Sequence[tuple[int, ...]]) -> None:
    first = sizes[0]
    for name, size in zip(names, sizes, strict=True):
        if size != first:
            two = f"{first[0]}x{first[1]} ({names[0]}) and {size[0]}x{size[1]} ({name})"
            raise UserError(f"{source}: images of different sizes, {two}; bring them to one with --size")


def _require_memory(source: str, num_images: int, shape: tuple[int, ...]) -> None:
    # Twice: splitting copies the pictures into the two parts.
    needed = 2 * num_images * int(np.prod(shape))
    available = psutil.virtual_memory().available
    if needed > available:
        form = "x".join(str(side) for side in shape)
        raise UserError(
            f"{source}: {num_images} images of {form} need {needed / 2**30:.1f} GiB of memory (two copies, for the "
            f"split) and {available / 2**30:.1f} GiB are free; choose a smaller --size"
        )

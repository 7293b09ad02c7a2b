"""CIFAR-10 without pickle: from its official binary version, or from an npz of the same images.

Looked for in ROOT/cifar10 or ROOT/cifar-10-batches-bin: either `cifar10.npz` (uint8 `train` and `test` of shape
(N, 32, 32, 3), integer `train_labels` and `test_labels`), or `data_batch_1.bin` .. `data_batch_5.bin` and
`test_batch.bin` with records of 3073 bytes: the label, then 1024 red, 1024 green and 1024 blue values.

The images are also passed round as six lossless sheets (`train_1.webp` .. `train_5.webp`, `test.webp`, each a grid of
32 x 32 tiles row by row, with `labels.npz` holding `train` and `test`). This makes the npz from a folder of them:

    python -c "from osmose.data.cifar import pack_sheets; pack_sheets('SHEETS', 'ROOT/cifar10/cifar10.npz')"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from osmose.data.arrays import Archive
from osmose.data.assembly import Part, image_dataset
from osmose.data.dataset import DataConfig, Dataset
from osmose.data.locating import under_root
from osmose.errors import UserError

SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
EXPECTED = (
    f"cifar10.npz, or {TRAIN_FILES[0]} .. {TRAIN_FILES[-1]} and {TEST_FILE} (the binary version, not the pickles)"
)


def load_cifar10(argument: str, config: DataConfig) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images (3, 32, 32), uint8, 10 classes.

    Raises:
        UserError: missing, truncated or foreign files, named.
    """
    if argument:
        raise UserError(f"cifar10 takes no argument, but {argument!r} was given; its place is --data-root")
    folder = under_root("cifar10", config, ["cifar10", "cifar-10-batches-bin"], EXPECTED)
    if (folder / "cifar10.npz").is_file():
        with Archive(folder / "cifar10.npz") as archive:
            train, test = _read_npz(archive, "train"), _read_npz(archive, "test")
    else:
        missing = next((name for name in (*TRAIN_FILES, TEST_FILE) if not (folder / name).is_file()), None)
        if missing:
            raise UserError(f"cifar10: {folder} has no {missing}; expected there: {EXPECTED}")
        train = read_binary([folder / name for name in TRAIN_FILES])
        test = read_binary([folder / TEST_FILE])
    return image_dataset("cifar10", config, train, test, class_names=CLASS_NAMES)


def read_binary(paths: list[Path]) -> Part:
    """Images (N, 3, 32, 32) uint8 and labels from files of 3073-byte records, one file after the other.

    Raises:
        UserError: a file whose length is no multiple of 3073, or with a label above 9.
    """
    parts = []
    for path in paths:
        data = np.fromfile(path, np.uint8)
        if len(data) == 0 or len(data) % RECORD:
            raise UserError(
                f"{path}: {len(data)} bytes are not a whole number of records of {RECORD} bytes; truncated?"
            )
        parts.append(data.reshape(-1, RECORD))
        wrong = np.flatnonzero(parts[-1][:, 0] >= len(CLASS_NAMES))
        if len(wrong):
            label = parts[-1][wrong[0], 0]
            raise UserError(f"{path}: record {wrong[0]} has label {label}; 0..9 are possible")
    records = np.concatenate(parts)
    images = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, SIDE, SIDE)
    return Part(torch.from_numpy(images), torch.from_numpy(records[:, 0].astype(np.int64)))


def _read_npz(archive: Archive, key: str) -> Part:
    images, labels = archive[key], archive[f"{key}_labels"]
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        form = f"{images.dtype} {images.shape}"
        raise UserError(f"{archive.path}: array {key!r} is {form}; uint8 (N, {SIDE}, {SIDE}, 3) is needed")
    if labels.dtype.kind not in "ui" or labels.ndim != 1:
        raise UserError(
            f"{archive.path}: array '{key}_labels' is {labels.dtype} {labels.shape}; integers (N,) are needed"
        )
    return Part(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64)))


def pack_sheets(sheets: str | Path, target: str | Path) -> None:
    """Write the npz that `load_cifar10` reads from a folder of sheets (see the module's description).

    Raises:
        UserError: no sheets there, a sheet that is no grid of tiles, or not as many labels as tiles.
    """
    sheets, target = Path(sheets), Path(target)
    train_files = sorted(sheets.glob("train_*.webp"))
    if not train_files:
        raise UserError(f"{sheets}: no train_1.webp .. train_5.webp")
    images = {
        "train": np.concatenate([read_sheet(path) for path in train_files]),
        "test": read_sheet(sheets / "test.webp"),
    }
    with Archive(sheets / "labels.npz") as archive:
        labels = {key: archive[key] for key in images}
    arrays: dict[str, Any] = {}
    for key, values in images.items():
        if len(labels[key]) != len(values):
            raise UserError(f"{sheets}: {len(values)} {key} tiles but {len(labels[key])} labels; one each is needed")
        arrays[key], arrays[f"{key}_labels"] = values, labels[key]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(target)


def read_sheet(path: Path) -> np.ndarray:
    """The tiles of one sheet, row by row: uint8 (N, 32, 32, 3).

    Raises:
        UserError: no readable image, or one whose sides are no multiples of 32.
    """
    try:
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
    if sheet.shape[:2] != (rows * SIDE, columns * SIDE):
        raise UserError(f"{path}: {sheet.shape[1]}x{sheet.shape[0]} is not a grid of {SIDE}x{SIDE} tiles")
    return sheet.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)

"""Arrays of samples that never have to fit in memory: an .npz written batch by batch."""

from __future__ import annotations

import itertools
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.methods.messages import Samples
from osmose.training import files


def write_stream(path: Path, parts: Iterator[Samples], count: int, spec: DataSpec) -> tuple[int, float]:
    """Write samples as the array `samples` (their classes as `labels`, their times as `times`) of an .npz.

    Returns:
        Network evaluations per sample, and seconds of sampling.

    Raises:
        UserError: not enough space on the disk; nothing is left behind.
    """
    dtype: np.dtype[Any] = np.dtype(np.float32)
    if spec.range is not None and spec.whole:
        dtype = np.dtype(np.uint8 if spec.range[0] >= 0 and spec.range[1] <= 255 else np.int64)
    needed = count * spec.dimension * dtype.itemsize
    where = path.parent
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if needed > free:
        raise UserError(
            f"--out: {count} samples need {needed / 2**30:.1f} GiB, but {where} has {free / 2**30:.1f} GiB left"
        )
    nfe, seconds, labels, times = 0, 0.0, [], []
    first = next(parts)  # refuses what is wrong with the request before anything is created
    with files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("samples.npy", "w", force_zip64=True) as member:
            header = {"descr": dtype.str, "fortran_order": False, "shape": (count, *first.data.shape[1:])}
            np.lib.format.write_array_header_2_0(member, header)
            for part in itertools.chain([first], parts):
                member.write(part.data.numpy().astype(dtype).tobytes())
                nfe, seconds = part.nfe, seconds + part.seconds
                if part.condition is not None:
                    labels.append(part.condition.numpy())
                if part.times is not None:
                    times.append(part.times.numpy())
        if labels:
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, np.concatenate(labels))
        if times:
            with archive.open("times.npy", "w") as member:
                np.lib.format.write_array(member, np.concatenate(times))
    return nfe, seconds

"""Writing files so that no reader ever sees half of one: a temporary name first, then a rename."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor

from osmose.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what keeps the block from writing `path`.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise UserError(f"{path}: no space left on the disk; what was there before is unchanged") from None
        if error.errno in (
            errno.EACCES,
            errno.ENOENT,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EPERM,
            errno.EEXIST,
            errno.EISDIR,
        ):
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it takes `path`'s place, on failure it is removed.

    Raises:
        UserError: the disk is full or the place cannot be written; nothing has been changed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def sweep(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing or deleting below `folder`."""
    for pattern in (".*.tmp", ".*.old"):
        for leftover in folder.rglob(pattern):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write and flush a file in one step."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON."""
    write_bytes(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure of matplotlib as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: missing, or not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in the safetensors format; equal tensors make equal files.

    One metadata field only: safetensors writes several in random order, and a run's hash is that of its weights' file.
    """
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: missing, truncated, or of another format; the message names the file.
    """
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None

"""What samples must be before they are measured: a metric returns a number for any array, these checks say no."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from osmose.data.dataset import DataSpec
from osmose.errors import UserError


def read_samples(path: Path) -> np.ndarray:
    """The array `samples` of an .npz, or its only array.

    Raises:
        UserError: missing, not an .npz, with several arrays of which none is called `samples`, or not of numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            if "samples" not in names and len(names) != 1:
                raise UserError(f"{path}: holds {', '.join(names)}; the samples should be called 'samples'")
            samples = np.asarray(archive["samples" if "samples" in names else names[0]])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, TypeError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npz ({error})") from None
    if samples.dtype.kind not in "uif":
        raise UserError(f"{path}: the samples have dtype {samples.dtype}; integers or floats are needed")
    return samples


def admit(samples: Tensor, spec: DataSpec) -> Tensor:
    """The samples on the CPU, without gradient, in data units.

    Args:
        samples: shape (n, *spec.shape), data units, any dtype.
        spec: of the real data they are compared with.

    Raises:
        UserError: wrong shape, NaN or infinity, values outside the range or in other units, with the numbers.
    """
    samples = torch.as_tensor(samples).detach().cpu()
    if tuple(samples.shape[1:]) != spec.shape or len(samples) < 4:
        shape = ", ".join(str(side) for side in spec.shape)
        raise UserError(f"samples: shape {tuple(samples.shape)} given, (n, {shape}) with n of at least 4 needed")
    if samples.is_floating_point():
        bad = int((~torch.isfinite(samples)).flatten(1).any(dim=1).sum())
        if bad:
            raise UserError(f"samples: {bad} of {len(samples)} hold NaN or infinity")
    _in_range(samples, spec)
    return samples


def _in_range(samples: Tensor, spec: DataSpec) -> None:
    if spec.range is None:
        return
    (low, high), least, most = spec.range, float(samples.min()), float(samples.max())
    span = f"samples: values span {least:g} to {most:g} where the data have {low:g} to {high:g}"
    slack = 1e-4 * (high - low)
    if least < low - slack or most > high + slack:
        model = spec.model_range or (-1.0, 1.0)
        if model[0] - 0.5 <= least and most <= model[1] + 0.5:
            raise UserError(
                f"{span}; these look like the model's units [{model[0]:g}, {model[1]:g}]: decode them first"
            )
        raise UserError(f"{span}; pass data units, inside the range")
    # [0, 1] lies inside 0..255 and would be measured as almost black images.
    one_level = (high - low) / (spec.levels - 1) if spec.levels else 0.0
    if one_level and most - low <= one_level and bool((samples != samples.round()).any()):
        raise UserError(f"{span}; these look scaled to [0, 1]: multiply by {high - low:g} first")


def refuse_identical(samples: Tensor, real: Tensor, name: str) -> None:
    """Refuse real data compared with themselves, which score perfectly and mean nothing.

    Raises:
        UserError: `samples` are `real`, item by item.
    """
    if samples.shape == real.shape and torch.equal(samples.to(torch.float64), real.to(torch.float64)):
        raise UserError(f"samples: they are the {len(samples)} real items of {name} that they would be compared with")

"""From arrays to a checked `Dataset`: the one place where parts are checked, split and described.

Images of every source go through `image_dataset`, points through `points_dataset`, counts through `counts_dataset`; a
loader only reads its format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.data.splitting import split_indices
from osmose.errors import UserError

OFFICIAL = "the official test part"
#: Counts up to here keep their last digit in the model's units, which are float32.
LARGEST_COUNT = 2**20


class Part(NamedTuple):
    """Values (N, *event) in data units, and int64 labels (N,) where there are any."""

    values: Tensor
    labels: Tensor | None = None


def image_dataset(
    source: str,
    config: DataConfig,
    train: Part,
    held_out: Part | None = None,
    *,
    split: str = OFFICIAL,
    value_range: tuple[float, float] = (0.0, 255.0),
    levels: int | None = 256,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """A data set of images (N, C, H, W), mapped linearly from `value_range` to [-1, 1] for the model.

    Args:
        source: what the identity shall call it, without private folders.
        held_out: the test part that the source brings; None splits `train` by `config.held_out` and
            `config.split_seed`.
        split: how a given `held_out` was chosen, in words.

    Raises:
        UserError: see `points_dataset`.
    """
    low, high = value_range
    form = {
        "kind": "image",
        "range": value_range,
        "levels": levels,
        "shift": ((low + high) / 2,),
        "scale": ((high - low) / 2,),
    }
    return _dataset(source, config, train, held_out, split, class_names, form)


def points_dataset(
    source: str,
    config: DataConfig,
    train: Part,
    held_out: Part | None = None,
    *,
    split: str = OFFICIAL,
    columns: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """A data set of points (N, D); the model sees them with the training part's mean 0 and deviation 1.

    Args:
        columns: their names, for messages.

    Raises:
        UserError: fewer than 2 training items, an empty held-out part, parts of different shapes, values that are not
            finite, labels that do not fit, a column that is constant in the training part.
    """
    return _dataset(source, config, train, held_out, split, class_names, {"kind": "points"}, columns)


def counts_dataset(
    source: str,
    config: DataConfig,
    train: Part,
    held_out: Part | None = None,
    *,
    split: str = OFFICIAL,
    columns: Sequence[str] | None = None,
) -> Dataset:
    """A data set of counts: rows (N, D) or images (N, C, H, W) of whole numbers from 0 to `config.max_count`.

    The largest count is that of the data where `max_count` is None. Rows are standardised for the model as points are,
    images mapped from 0..max_count to [-1, 1].

    Raises:
        UserError: a value that is negative or no whole number, or above `max_count`; nothing but zeros; see
            `points_dataset`.
    """
    most = 0
    for name, part in (("train", train), ("held-out", held_out)):
        if part is None:
            continue
        require_finite(source, name, part.values)
        most = max(most, _require_counts(source, name, part.values, config.max_count, columns))
    if not most:
        raise UserError(f"{source}: every count is 0; there is nothing to learn")
    most = config.max_count or most
    if train.values.ndim > 2:
        bounds = (0.0, float(most))
        return image_dataset(source, config, train, held_out, split=split, value_range=bounds, levels=most + 1)
    form = {"kind": "counts", "range": (0.0, float(most)), "levels": most + 1}
    return _dataset(source, config, train, held_out, split, None, form, columns)


def _require_counts(source: str, name: str, values: Tensor, most: int | None, columns: Sequence[str] | None) -> int:
    """The largest of some counts, when all of them are counts."""
    bad = (values < 0) | (values != values.round())
    reason = "counts are whole numbers, at least 0"
    if most is not None and not bool(bad.any()):
        bad, reason = values > most, f"more than max_count={most}"
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        where = f"data row {index[0] + 1}, column {columns[index[1]]!r}" if columns else f"{name} item {index}"
        raise UserError(f"{source}: {where}: {float(values[tuple(index)]):.10g} is not valid: {reason}")
    largest = int(values.max())
    if largest > LARGEST_COUNT:
        raise UserError(f"{source}: {largest} is not valid: counts end at {LARGEST_COUNT}; divide them")
    return largest


def _dataset(
    source: str,
    config: DataConfig,
    train: Part,
    held_out: Part | None,
    split: str,
    class_names: Sequence[str] | None,
    form: dict[str, Any],
    columns: Sequence[str] | None = None,
) -> Dataset:
    # Checked before the split: an index in a message is then an index in the user's own file.
    _check_part(source, "train", train)
    if held_out is None:
        if len(train.values) < 3:
            raise UserError(f"{source}: {len(train.values)} item(s); at least 3 are needed (2 to train on, 1 held out)")
        train, held_out = _split(train, config)
        split = f"{len(held_out.values)} items chosen at random with split seed {config.split_seed}"
    else:
        _check_part(source, "held-out", held_out)
    if len(train.values) < 2 or len(held_out.values) < 1:
        counts = f"{len(train.values)} training and {len(held_out.values)} held-out items"
        raise UserError(f"{source}: {counts}; at least 2 and 1 are needed")
    if train.values.shape[1:] != held_out.values.shape[1:]:
        shapes = f"{tuple(train.values.shape[1:])} in training, {tuple(held_out.values.shape[1:])} held out"
        raise UserError(f"{source}: items of shape {shapes}; both parts need one shape")
    if form["kind"] in ("points", "counts"):
        form = form | _standardisation(source, train.values, columns)
    return Dataset(
        source=source,
        spec=DataSpec(
            shape=tuple(train.values.shape[1:]), num_classes=_num_classes(source, train, held_out, class_names), **form
        ),
        train=train.values.contiguous(),
        held_out=held_out.values.contiguous(),
        split=split,
        train_labels=train.labels,
        held_out_labels=held_out.labels,
        class_names=tuple(class_names) if class_names is not None and train.labels is not None else None,
    )


def _split(whole: Part, config: DataConfig) -> tuple[Part, Part]:
    first, second = split_indices(len(whole.values), config.held_out, config.split_seed)
    labels = whole.labels
    return (
        Part(whole.values[first], None if labels is None else labels[first]),
        Part(whole.values[second], None if labels is None else labels[second]),
    )


def _check_part(source: str, name: str, part: Part) -> None:
    values, labels = part
    require_finite(source, name, values)
    if labels is None:
        return
    if len(labels) != len(values):
        raise UserError(f"{source}: {len(values)} {name} items but {len(labels)} labels; one each is needed")
    if len(labels) and int(labels.min()) < 0:
        first = int((labels < 0).nonzero()[0])
        raise UserError(f"{source}: {name} label {first} is {int(labels[first])}; labels count from 0")


def require_finite(source: str, name: str, values: Tensor) -> None:
    """Refuse NaN and infinity in `values`, naming the index of the first one.

    Raises:
        UserError: a value is not finite (in float32, the type that models see).
    """
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        index = (~torch.isfinite(values)).nonzero()[0].tolist()
        shown = float(values[tuple(index)])
        raise UserError(f"{source}: {name}{index} is {shown}; every value must be finite (in float32)")


def _num_classes(source: str, train: Part, held_out: Part, class_names: Sequence[str] | None) -> int | None:
    if train.labels is None and held_out.labels is None:
        return None
    if train.labels is None or held_out.labels is None:
        with_labels, without = ("held-out", "training") if train.labels is None else ("training", "held-out")
        raise UserError(
            f"{source}: the {with_labels} part has labels but the {without} part has none; give both or none"
        )
    largest = int(torch.cat([train.labels, held_out.labels]).max())
    if class_names is None:
        if largest >= max(1000, len(train.values)):
            raise UserError(f"{source}: label {largest} among {len(train.values)} items; number the classes from 0")
        return largest + 1
    if largest >= len(class_names):
        raise UserError(f"{source}: label {largest} where there are {len(class_names)} classes, counted from 0")
    return len(class_names)


def _standardisation(source: str, values: Tensor, columns: Sequence[str] | None) -> dict[str, Any]:
    constant = (values.amin(0) == values.amax(0)).nonzero()
    if len(constant):
        index = int(constant[0])
        name = repr(columns[index]) if columns else str(index)
        raise UserError(
            f"{source}: column {name} is constant ({float(values[0, index]):g}) in the training part; leave it out"
        )
    mean, deviation = values.double().mean(0), values.double().std(0, correction=0)
    return {"shift": tuple(mean.tolist()), "scale": tuple(deviation.tolist())}


def named_path(source: str, argument: str) -> tuple[Path, str]:
    """The path in `SOURCE:PATH`, and the name that the identity may keep of it: `SOURCE:LAST_COMPONENT`.

    Raises:
        UserError: no path given, or nothing there.
    """
    if not argument:
        raise UserError(f"{source} needs a path: write it as {source}:PATH")
    path = Path(argument).expanduser().resolve()
    if not path.exists():
        raise UserError(f"{source}:{argument}: no such file or folder")
    return path, f"{source}:{path.name}"

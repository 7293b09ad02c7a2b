"""Image data sets of the Hugging Face hub, or saved on disk by their `datasets` library (extra `osmose[hub]`)."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osmose.data.assembly import OFFICIAL, Part, image_dataset
from osmose.data.dataset import DataConfig, Dataset
from osmose.data.images import ImageFile, read_images
from osmose.errors import UserError


def load_hub(argument: str, config: DataConfig) -> Dataset:
    """Images (C, H, W), uint8: `hub:NAME`, `hub:NAME@CONFIG`, or `hub:PATH` for a folder written by `save_to_disk`.

    The training part is the split `train` or the only one; the held-out part is the split `test`, else `validation`,
    else a random one. The image column is the one of that type (`image` or `img` where there are several); labels are
    a `ClassLabel` column or integers called `label`. Labels that are withheld (-1) do not count as labels. How
    pictures become one array is said in `osmose.data.images`.

    Raises:
        UserError: the extra is not installed, the data set cannot be had, it has no image column, or its images are
            refused.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("hub needs the package datasets: pip install 'osmose[hub]'") from None
    if not argument:
        raise UserError("hub needs a name: write it as hub:NAME, hub:NAME@CONFIG or hub:PATH")
    splits, source = _open(datasets, argument)
    train_name = "train" if "train" in splits else next(iter(splits))
    if "train" not in splits and len(splits) > 1:
        raise UserError(f"{source}: no split called train; it has {', '.join(splits)}")
    image_column, label_column, class_names = _columns(datasets, source, splits[train_name].features)

    names = [train_name]
    for name in ("test", "validation"):
        hidden = label_column is not None and name in splits and _labels(splits[name], label_column) is None
        if name in splits and name != train_name and not hidden:
            names.append(name)
            break
    files = [file for name in names for file in _files(datasets, splits[name], name, image_column)]
    pictures, kept = read_images(source, files, config)
    values, positions = torch.from_numpy(pictures), torch.tensor(kept)

    parts, start = [], 0
    for name in names:
        stop = start + len(splits[name])
        inside = (positions >= start) & (positions < stop)
        labels = None if label_column is None else _labels(splits[name], label_column)
        parts.append(Part(values[inside], None if labels is None else labels[positions[inside] - start]))
        start = stop
    split = OFFICIAL if names[-1] == "test" else f"the split {names[-1]!r}"
    return image_dataset(source, config, *parts, split=split, class_names=class_names)


def _open(datasets: Any, argument: str) -> tuple[dict[str, Any], str]:
    path = Path(argument).expanduser()
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    name, _, subset = argument.partition("@")
    if not saved and (path.is_absolute() or argument.startswith(("~", "."))):
        raise UserError(f"hub:{argument}: no data set saved by save_to_disk there; for plain images write folder:PATH")
    try:
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name, subset or None)
    except Exception as error:  # network, name, configuration and format errors come in many classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"hub:{argument}: cannot be loaded, check its name and the network ({reason})") from None
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return splits, f"hub:{path.resolve().name}" if saved else f"hub:{argument}"


def _columns(datasets: Any, source: str, features: dict[str, Any]) -> tuple[str, str | None, list[str] | None]:
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise UserError(f"{source}: no image column among {', '.join(features)}")
    image = next((name for name in ("image", "img") if name in images), images[0])
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if classes:
        label = "label" if "label" in classes else classes[0]
        return image, label, features[label].names
    plain = [name for name in ("label", "labels") if "int" in str(getattr(features.get(name), "dtype", ""))]
    return image, plain[0] if plain else None, None


def _labels(rows: Any, column: str) -> Tensor | None:
    """Labels of all rows, or None where every one is withheld."""
    labels = torch.tensor([-1 if label is None else label for label in rows[column]], dtype=torch.int64)
    return None if bool((labels == -1).all()) else labels


def _files(datasets: Any, rows: Any, split: str, column: str) -> list[ImageFile]:
    encoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def opener(index: int) -> Callable[[], Path | BytesIO]:
        def read() -> Path | BytesIO:
            record = encoded[index][column]
            if record is None:
                raise ValueError("no image in this row")
            return BytesIO(record["bytes"]) if record["bytes"] is not None else Path(record["path"])

        return read

    return [ImageFile(f"{split} row {index}", opener(index)) for index in range(len(rows))]

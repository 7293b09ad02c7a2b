"""A folder of pictures, with sub-folders as classes where it has them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from osmose.data.assembly import Part, image_dataset, named_path
from osmose.data.dataset import DataConfig, Dataset
from osmose.data.images import ImageFile, read_images
from osmose.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PART_NAMES = {"train", "training", "test", "val", "valid", "validation", "held_out"}


def load_folder(argument: str, config: DataConfig) -> Dataset:
    """All PNG, JPEG, WebP and BMP files below the folder `argument`, as uint8 images (C, H, W).

    Files are taken in the order of their names; other endings and hidden files are not looked at. Where every picture
    lies in one of two or more sub-folders, the immediate sub-folders are the classes. How pictures of different sizes
    and modes become one array is said in `osmose.data.images`.

    Raises:
        UserError: no folder, no pictures in it, a file that cannot be read, different sizes without `config.size`,
            sub-folders that are parts and not classes, too little memory.
    """
    folder, source = named_path("folder", argument)
    if not folder.is_dir():
        raise UserError(f"{source}: {folder.name} is a file; a folder of images is needed")
    others: list[Path] = []
    paths: list[Path] = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).parts):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            (paths if path.suffix.lower() in ENDINGS else others).append(relative)
    if not paths:
        instead = f"; it holds {len(others)} other file(s), for example {others[0]}" if others else ""
        raise UserError(f"{source}: no images ({', '.join(ENDINGS)}) in this folder{instead}")
    class_names = _class_names(source, paths)
    files = [ImageFile(str(path), partial(folder.joinpath, path)) for path in paths]
    pictures, kept = read_images(source, files, config)
    labels = None
    if class_names is not None:
        labels = torch.tensor([class_names.index(paths[position].parts[0]) for position in kept])
    return image_dataset(source, config, Part(torch.from_numpy(pictures), labels), class_names=class_names)


def _class_names(source: str, paths: list[Path]) -> list[str] | None:
    names = sorted({path.parts[0] for path in paths})
    if any(len(path.parts) == 1 for path in paths) or len(names) < 2:
        return None
    if {name.lower() for name in names} <= _PART_NAMES:
        # Taken as classes, test pictures would be trained on without a word.
        raise UserError(
            f"{source}: its sub-folders {', '.join(names)} look like parts, not classes; give the one to train on, "
            f"{source}/{next((name for name in names if name.lower().startswith('train')), names[0])}"
        )
    return names

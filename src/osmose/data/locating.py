"""Where data sets with a fixed name are looked for: in one folder under the data root."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from osmose.data.dataset import DataConfig
from osmose.errors import UserError

ROOT_VARIABLE = "OSMOSE_DATA_ROOT"


def under_root(source: str, config: DataConfig, folders: Sequence[str], expected: str) -> Path:
    """The first of `folders` that exists under `config.root`, or under `$OSMOSE_DATA_ROOT` where that is not given.

    Args:
        expected: the files that must be there, in words.

    Raises:
        UserError: no root given, or none of the folders there; the message says which flag and which files.
    """
    root = config.root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)
    wanted = " or ".join(f"{folder}/" for folder in folders)
    if root is None:
        raise UserError(
            f"{source}: give --data-root FOLDER (or set {ROOT_VARIABLE}), a folder with {wanted} in it, {expected}"
        )
    found = next((root.expanduser() / folder for folder in folders if (root.expanduser() / folder).is_dir()), None)
    if found is None:
        raise UserError(f"{source}: --data-root {root} has no folder {wanted}; expected there: {expected}")
    return found

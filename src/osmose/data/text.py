"""Text as sequences of characters: windows of a file, or of the reference of Python that comes with Python."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from osmose.data.assembly import Part, named_path
from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.errors import UserError

#: Characters of an item where nothing is said.
WINDOW = 128
#: Characters that a text may have, so that codes are bytes.
_MOST = 256


def load_text(argument: str, config: DataConfig) -> Dataset:
    """text:python or text:FILE (UTF-8): windows of `window` characters, one after the other; the end is held out.

    An item is the codes of its characters, uint8 (window,): their places in the alphabet, which is that of the whole
    text in order of Unicode. With `letters` the text is 26 letters in lower case and spaces, as text8 is.

    Raises:
        UserError: no path, a file that is not text, more than 256 different characters, too few of them.
    """
    if argument == "python":
        source, text = "text:python", python_reference()
    else:
        path, source = named_path("text", argument)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except IsADirectoryError:
            raise UserError(f"text:{argument}: a folder; name a file of text") from None
        except UnicodeDecodeError as error:
            raise UserError(f"text:{argument}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    if config.letters:
        text = re.sub("[^a-z]+", " ", text.lower()).strip()
    alphabet = "".join(sorted(set(text)))
    if len(alphabet) > _MOST:
        raise UserError(
            f"{source}: {len(alphabet)} different characters; at most {_MOST} can be told apart (letters=true keeps 27)"
        )
    length, stride = config.window or WINDOW, config.stride or config.window or WINDOW
    codes = torch.from_numpy(np.searchsorted(_points(alphabet), _points(text)).astype(np.uint8))
    cut = len(codes) - round(len(codes) * config.held_out)
    parts = [part.unfold(0, length, stride) if len(part) >= length else part[:0] for part in (codes[:cut], codes[cut:])]
    if len(alphabet) < 2 or len(parts[0]) < 2 or len(parts[1]) < 1:
        raise UserError(
            f"{source}: {len(text)} characters, {len(alphabet)} of them different, make {len(parts[0])} training and "
            f"{len(parts[1])} held-out windows of {length}; at least 2 and 1 are needed: a longer text, or window"
        )
    train, held_out = (Part(part.contiguous()) for part in parts)
    spec = DataSpec(
        kind="text",
        shape=(length,),
        range=(0.0, len(alphabet) - 1.0),
        levels=len(alphabet),
        alphabet=alphabet,
    )
    share = f"the last {config.held_out:.0%} of the text"
    return Dataset(source, spec, train.values, held_out.values, share)


def python_reference() -> str:
    """The topics of the Python language reference that `help()` knows, in alphabetical order: some 465,000 characters.

    It is of the Python that runs; another version has another text.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def texts(data: Tensor, spec: DataSpec) -> list[str]:
    """Items of codes (n, length), data units, as strings."""
    assert spec.alphabet is not None, "of text"
    codes = data.round().long().clamp(0, len(spec.alphabet) - 1).tolist()
    return ["".join(spec.alphabet[code] for code in row) for row in codes]


def _points(text: str) -> np.ndarray:
    """The code points of a text, uint32 (length,)."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)

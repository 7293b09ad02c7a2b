"""What every command shares: reading its arguments, answering."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro

from osmose.configuration import read_override
from osmose.errors import UserError


@dataclass
class Result:
    """The answer of a command.

    Attributes:
        values: plain JSON values: all that `--json` prints.
        lines: text, or rich tables, for people.
        next: a command worth trying next.
        status: exit status, 0 when all went well.
    """

    values: dict[str, Any]
    lines: list[Any] = field(default_factory=list)
    next: str | None = None
    status: int = 0

    def show(self) -> None:
        """Print for people."""
        from rich.console import Console

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        for line in [*self.lines, *([f"next: {self.next}"] if self.next else [])]:
            if isinstance(line, str):
                console.print(line, markup=False, soft_wrap=True)
            else:
                console.print(line)


class Command(Protocol):
    """A dataclass whose fields are the command's arguments."""

    json: bool

    def run(self) -> Result:
        """Do it."""


C = TypeVar("C")
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


def parse(cls: type[C], verb: str, arguments: list[str]) -> C:
    """Read a command's arguments.

    Words of the form `path.to.field=value` may stand anywhere; they become the command's `overrides`.

    Raises:
        UserError: one line about the first thing that is wrong.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    overrides: dict[str, Any] = {}
    if "overrides" in fields:
        arguments, overrides = _split(
            arguments, {f"--{n.replace('_', '-')}" for n, f in fields.items() if f.default is False}
        )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = (tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed)
            command = tyro.cli(cls, prog=f"osmose {verb}", args=arguments, config=config)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(said.getvalue(), verb)) from None
    sys.stderr.write(said.getvalue())
    if "overrides" in fields:
        command.overrides = overrides  # type: ignore[attr-defined]
    return command


def _split(words: list[str], flags: set[str]) -> tuple[list[str], dict[str, Any]]:
    kept: list[str] = []
    overrides: dict[str, Any] = {}
    for word in words:
        is_value = bool(kept) and kept[-1].startswith("-") and kept[-1] not in flags and "=" not in kept[-1]
        if not is_value and _OVERRIDE.match(word):
            path, value = read_override(word)
            overrides[path] = value
        else:
            kept.append(word)
    return kept, overrides


def _one_line(text: str, verb: str) -> str:
    # tyro draws a box, of lines or (where the terminal knows no others) of hyphens; its title repeats what it says.
    plain = [re.sub(r"[│╭╮╰╯─]+|-{3,}", " ", line).strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    words = " ".join([line for line in plain if line][1:])
    value = re.search(r"Error parsing (\S+):.*?instantiated from \[(.*?)\]", words)
    if value:
        kind = re.search(r"no type matching (\S+)", words)
        wanted = (kind.group(1) if kind else "another type").replace("{None}|", "")
        wanted = {"INT": "a whole number", "FLOAT": "a number"}.get(wanted, wanted)
        return f"{value.group(1)}: {value.group(2)} is not valid: should be {wanted}"
    value = re.search(r"Error parsing (\S+): (.*?)(?: Argument helptext|\. For full helptext|$)", words)
    if value and "invalid literal for int()" in value.group(2):
        return f"{value.group(1)}: {value.group(2).split(': ')[-1]} is not valid: should be a whole number"
    if value:
        return f"{value.group(1)}: {value.group(2)}"
    unknown = re.search(
        r"Unrecognized options: (.*?)(?: Perhaps you meant:? *(?:\(.*?\) *)?(--[\w-]+)| For full| Similar|$)", words
    )
    if unknown:
        guess = f"did you mean {unknown.group(2)}?" if unknown.group(2) else f"see osmose {verb} --help"
        name = unknown.group(1).split(",")[0].strip()
        if not unknown.group(2) and re.fullmatch(r"--[a-z][\w.-]*", name):
            guess += f", and write {name[2:].replace('-', '_')}=VALUE if the method has it"
        return f"unknown argument {name}; {guess}"
    return f"{words.split(' For full helptext')[0]}; see osmose {verb} --help"


def sampling_options(overrides: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """What flags and overrides say about sampling, each thing once.

    Raises:
        UserError: an option given both ways.
    """
    said = {name: value for name, value in flags.items() if value is not None}
    options = {name.removeprefix("sampling."): value for name, value in overrides.items()}
    for name in said:
        if name in options:
            raise UserError(f"{name}: given twice, as a flag and as {name}={options[name]}")
    return said | options


def keep_inputs(written: Sequence[Path | None], *read: Path | None) -> None:
    """Refuse to write over what is read; what is None is neither.

    Raises:
        UserError: naming the first file that would be lost.
    """
    given = {path.resolve() for path in read if path is not None}
    for path in written:
        if path is not None and path.resolve() in given:
            raise UserError(f"--out: {path} is read here, and would be lost; write elsewhere")


def angles(text: str) -> list[float]:
    """What --t-mid says: 1.1 or 1.1,0.5.

    Raises:
        UserError: not numbers.
    """
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--t-mid: {text!r} is not valid: should be angles in radians, as in 1.1 or 1.1,0.5") from None


@contextlib.contextmanager
def quiet_warnings() -> Iterator[None]:
    """Print warnings as one line each, without the place in the source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"osmose: note: {message}", file=sys.stderr)
        yield


def whole_numbers(flag: str, text: str, example: str) -> list[int]:
    """Read N,N,...

    Raises:
        UserError: something else; it names the flag.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}: {text!r} is not valid: should be whole numbers, as {example}") from None


def output_folder(out: Path | None, usual: Path) -> Path:
    """Where a command writes several files: what --out says, or what is usual.

    Raises:
        UserError: there is a file of that name, or a place where nothing can be written: said before any work.
    """
    folder = out or usual
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a folder")
    from osmose.training.files import writing

    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        with contextlib.suppress(OSError):  # somebody else may have begun to write there
            for path in missing:
                path.rmdir()
    return folder


def at_least(command: object, least: int, *names: str) -> None:
    """Refuse options of a command that are given and below a number.

    Raises:
        UserError: naming the first of them.
    """
    for name in names:
        value = getattr(command, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: {value} is not valid: must be at least {least}")

"""Dispatch: find the command, run it, print what it wrote and what to try next."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from osmose.cli import COMMANDS
from osmose.errors import UserError, nearest

_USAGE = """usage: osmose COMMAND ...

Diffusion models on the hardware you have: train, sample, score, compare.

{commands}

Start with:
  osmose train edm --data digits --out runs/digits
  osmose sample runs/digits -n 64 --out digits.png
  osmose COMMAND --help
"""


def usage(first: str = "") -> str:
    """The page that `osmose --help` prints, or `osmose FIRST --help` where FIRST has commands below it."""
    shown = {verb: text for verb, (_, text) in COMMANDS.items() if first in ("", verb.split()[0])}
    width = max(map(len, shown))
    return _USAGE.format(commands="\n".join(f"  {verb:<{width}}  {text}" for verb, text in shown.items()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Exits with status 2 and one line for input that is refused, 1 when training diverged, 130 when interrupted.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if words[0] in ("-V", "--version"):
        from osmose import __version__

        print(f"osmose {__version__}")
        return
    try:
        verb = _verb(words)
        if verb is None:
            print(usage(words[0]), end="")
            return
        from osmose.cli.command import parse

        module, _, name = COMMANDS[verb][0].partition(":")
        command = parse(getattr(importlib.import_module(module), name), verb, words[len(verb.split()) :])
        _show(command.run(), command.json)
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _verb(words: list[str]) -> str | None:
    """The command that the first word names, or the first two (`analyze likelihood`); None where help is wanted."""
    pairs = [verb for verb in COMMANDS if verb.split()[0] == words[0]]
    given = " ".join(words[:2])
    if words[0] in COMMANDS and " " not in words[0]:  # `train`, unless it is `train blocks`
        return given if given in COMMANDS else words[0]
    if not pairs:
        raise UserError(f"unknown command {words[0]!r}; {nearest(words[0], COMMANDS)}")
    if words[1:2] in (["-h"], ["--help"]):
        return None
    if given not in pairs:
        raise UserError(f"unknown command {given!r}; choose one of: {', '.join(pairs)}")
    return given


def _show(result: Any, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        pass  # under torchrun, one process answers for all
    elif as_json:
        print(json.dumps(result.values, allow_nan=False))
    else:
        result.show()
    if result.status:
        sys.exit(result.status)


def _fail(message: str, status: int) -> None:
    print(f"osmose: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)

"""One number about samples, with everything needed to know what it means; and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from rich.table import Table

from osmose.configuration import Config

_ARROWS = {"lower": "↓", "higher": "↑", "one": "→1"}


class Score(Config):
    """The value of one metric and its conditions."""

    name: str = Field(description="`fid` and `is` only with the verified Inception network of 2015")
    value: float
    standard_error: float | None = Field(None, description="over repetitions with new samples")
    floor: float | None = Field(None, description="what real data reach: the same metric between disjoint real sets")
    better: Literal["lower", "higher", "one"]
    features: str | None = Field(None, description="network whose features are compared; None where there is none")
    features_sha256: str | None = None
    n: int = Field(description="generated samples used")
    m: int = Field(description="real samples used")
    reference: str = Field(description="part of the real data that was compared with: train or held-out")
    note: str | None = Field(None, description="what to beware of when reading the value, one line each")


def table(scores: Sequence[Score], title: str | None = None) -> Table:
    """The scores as a table for the terminal; notes stand once each below it."""
    result = Table(title=title)
    result.add_column("metric")
    for heading in ("value", "±", "real data", "n", "m"):
        result.add_column(heading, justify="right")
    result.add_column("features")
    notes: list[str] = []
    for score in scores:
        marks = []
        for note in (score.note or "").splitlines():
            if note not in notes:
                notes.append(note)
            # A backslash keeps rich from reading the mark as a style.
            marks.append(f" \\[{notes.index(note) + 1}]")
        result.add_row(
            f"{score.name} {_ARROWS[score.better]}{''.join(marks)}",
            _short(score.value),
            _short(score.standard_error),
            _short(score.floor),
            str(score.n),
            str(score.m),
            f"{score.features} {(score.features_sha256 or '')[:8]}" if score.features else "-",
        )
    if notes:
        result.caption = "\n".join(f"\\[{number}] {note}" for number, note in enumerate(notes, 1))
        result.caption_justify = "left"
    return result


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

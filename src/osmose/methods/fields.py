"""The noise of functions on any grid, as a configuration has it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from osmose.processes.modes import Drift, ModeProcess, Speed
from osmose.processes.spectrum import BasisKind, Harmonics, Spectrum


@dataclass(frozen=True)
class FieldOn:
    """The modes of a grid and their process."""

    harmonics: Harmonics
    process: ModeProcess


class Fields:
    """Modes and process on any grid, each made once."""

    def __init__(self, basis: BasisKind, spectrum: Spectrum, drift: Drift, speed: Speed):
        self._basis, self._parts = basis, (spectrum, drift, speed)
        self._known: dict[tuple[int, ...], FieldOn] = {}

    def on(self, grid: tuple[int, ...]) -> FieldOn:
        """On a grid."""
        if grid not in self._known:
            harmonics = Harmonics(self._basis, grid)
            self._known[grid] = FieldOn(harmonics, ModeProcess.of(*self._parts, harmonics))
        return self._known[grid]

    def whiten(self, x: Tensor) -> Tensor:
        """Modes of values (C, *grid) in units of the deviation of their noise."""
        field = self.on(tuple(x.shape[1:]))
        return field.harmonics.modes(x) * field.process.weights().sqrt().to(x.dtype).to(x.device)

"""Score against training steps, with a chain of 1000 steps and with one of 100."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, all_of, lower, same

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The network of the digits.
_MLP = {"network": "mlp", "network.width": 256, "network.depth": 3, "training.batch_size": 64}
_DDIM = {"DDIM": {"num_steps": 50, "solver": "ddim"}}
#: The whole chain of T = 100 with either variance, and half as many steps of DDIM.
_CHAIN = {
    variance: {"num_steps": 100, "solver": {"kind": "ancestral", "variance": variance}}
    for variance in ("fixed_large", "fixed_small")
} | _DDIM


class TrainSteps(Study):
    """Does a model that is trained longer sample better, with a chain of 1000 steps and with one of 100?

    On CIFAR-10, FID was reported as 11.52, 6.05 and 4.93 after 50, 100 and 150 thousand steps for T = 1000, but as
    49.58, 40.77 and 40.40 for T = 100 with the `fixed_large` variance: the short chain soon stops improving.

    Here small networks are trained for a third, two thirds and all of a small budget, each with a learning-rate
    schedule of its own: an MLP on 8x8 digits with either chain, the default UNet on Fashion-MNIST with T = 1000. All
    are far from converged, the UNet most of all. T = 1000 is sampled in 50 (digits) or 10 (Fashion-MNIST) steps of
    DDIM, T = 100 with its whole chain. The same weights of T = 100 are also sampled with `fixed_small` and with DDIM,
    which tells the chain from the sampler (`short-chain` compares the two chains under one sampler). 800 digits and 300
    images of Fashion-MNIST are scored, which are few for `fd_clf`. It compares the features of a small classifier and
    is not FID.
    """

    title = "Longer training gives better scores, with a long chain and with a short one"
    source = "a table of DDPM (arXiv 2006.11239) on CIFAR-10: IS and FID by length of training, T = 1000 and T = 100"

    def lengths(self, family: str) -> tuple[int, ...]:
        """Training steps: a third, two thirds, all."""
        if self.quick:
            return 20, 40, 60
        return (100, 200, 300) if family == "fashion" else (1000, 2000, 3000)

    def names(self, family: str) -> list[str]:
        """The cells of a line of the plot, shortest training first."""
        return [f"{family}-{steps}" for steps in self.lengths(family)]

    def cells(self) -> list[Cell]:
        digits = {"num_samples": 100 if self.quick else 800}
        cells = [
            *self._family("digits", "digits", _MLP, {**digits, "samplers": _DDIM}),
            *self._family("digits-t100", "digits", {**_MLP, "schedule.num_steps": 100}, {**digits, "samplers": _CHAIN}),
        ]
        if not self.quick:
            settings = {"num_samples": 300, "samplers": {"DDIM": {"num_steps": 10, "solver": "ddim"}}}
            cells += self._family("fashion", "fashion-mnist", {"training.batch_size": 16}, settings)
        return cells

    def _family(self, family: str, data: str, changes: dict[str, Any], settings: dict[str, Any]) -> list[Cell]:
        lengths = zip(self.names(family), self.lengths(family), strict=True)
        return [Cell(name, "ddpm", data, {**changes, "training.steps": steps}, settings) for name, steps in lengths]

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        return [
            Row({"sampler": name}, trained.scores(settings["num_samples"], ["fd_clf", "sw2"], **options))
            for name, options in settings["samplers"].items()
        ]

    def claims(self) -> list[Claim]:
        digits, t100, fashion = self.names("digits"), self.names("digits-t100"), self.names("fashion")
        return [
            Claim("Digits, T = 1000: the score falls from each length to the next",
                  digits, lambda r: _falls(r, digits)),
            Claim("Fashion-MNIST, T = 1000: the score falls from each length to the next",
                  fashion, lambda r: _falls(r, fashion)),
            Claim("Digits, T = 100 with `fixed_large`: the last third of training changes the score by less than 5 % "
                  "(published)",
                  t100[1:], lambda r: _settles(r, t100[1], t100[2])),
            Claim("Digits, T = 100, the same weights: `fixed_small` scores lower than `fixed_large`",
                  t100[2:], lambda r: lower(_fd(r, t100[2], "fixed_small"), _fd(r, t100[2], "fixed_large"))),
            Claim("Digits, all of the training, not in the table: with 50 steps of DDIM both chains score the same to "
                  "within 1",
                  [digits[2], t100[2]], lambda r: same(_fd(r, digits[2]), _fd(r, t100[2]), within=1)),
        ]  # fmt: skip

    def figures(self, results: Results) -> dict[str, Figure]:
        from osmose.studies.plots import draw, log_scale, panels, real

        lines = {"digits": [("digits", "DDIM"), *(("digits-t100", sampler) for sampler in _CHAIN)]}
        if not self.quick:
            lines["fashion-mnist"] = [("fashion", "DDIM")]
        figure, axes = panels(len(lines))
        for panel, (data, families) in zip(axes, lines.items(), strict=True):
            for (family, sampler), marker in zip(families, "osDx", strict=False):
                scores = [_fd(results, name, sampler) for name in self.names(family)]
                label = f"T = {'100' if '100' in family else '1000'}, {sampler}"
                draw(panel, self.lengths(family), scores, label, marker)
            real(panel, results.values(self.names(families[0][0])[0], "fd_clf_real").mean())
            panel.set(title=data, xlabel="training steps", ylabel="fd_clf (lower is better)")
            log_scale(panel)
            panel.set_xticks(self.lengths(families[0][0]))
            panel.set_ylim(top=2 * panel.get_ylim()[1])  # room for the legend
            panel.legend(loc="upper right", fontsize=8)
        return {"score-against-steps": figure}


def _fd(results: Results, cell: str, sampler: str = "DDIM") -> np.ndarray:
    return results.values(cell, "fd_clf", sampler=sampler)


def _settles(results: Results, earlier: str, later: str) -> Finding:
    known = _fd(results, earlier, "fixed_large")
    return same(_fd(results, later, "fixed_large"), known, within=0.05 * float(known.mean()))


def _falls(results: Results, cells: list[str]) -> Finding:
    return all_of(*(lower(_fd(results, later), _fd(results, earlier)) for earlier, later in pairwise(cells)))

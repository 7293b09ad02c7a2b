"""`osmose study short-chain`: is a chain of 100 steps bad, or only its variance?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, all_of, lower, same

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Ways to take the steps. `learned_range` needs a model that has learned it.
WAYS: dict[str, dict[str, Any]] = {
    "fixed_large": {"kind": "ancestral", "variance": "fixed_large"},
    "fixed_small": {"kind": "ancestral", "variance": "fixed_small"},
    "learned_range": {"kind": "ancestral", "variance": "learned_range"},
    "ddim": {"kind": "ddim"},
}
LOSSES: dict[str, dict[str, Any]] = {"simple": {}, "hybrid": {"objective": "hybrid", "variance": "learned_range"}}


class ShortChain(Study):
    """A chain trained with T = 100 steps was reported far worse than one with T = 1000 (FID 40.4 against 4.9).

    Both are trained here with L_simple, and T = 100 with L_hybrid too (learned variance), on the linear schedule whose
    betas are scaled by 1000 / T. Every model is sampled with K of its steps, evenly spaced and with rescaled betas, and
    with each reverse variance. If the schedule were at fault, T = 100 would be worse than T = 1000 strided to 100 steps
    with every variance; if the variance is, both are bad with fixed_large and good with another. The reported chain
    used fixed_large and did not clip the denoised estimate to the data's range: chains of all T steps are sampled both
    ways (`clip`), others with clipping.

    Chains of more than 100 steps are sampled with fixed_large alone. Digits: an MLP (3 blocks of 256). Fashion-MNIST:
    the default UNet at 8 channels and a short training; 200 samples are few for `fd_clf`.
    """

    title = "Short chains: the schedule or the variance?"
    source = (
        "a table of DDPM with T = 100 against T = 1000 on CIFAR-10: FID 49.58, 40.77, 40.40 after 50k, 100k and 150k "
        "steps of training, against 11.52, 6.05, 4.93"
    )

    def cells(self) -> list[Cell]:
        cells = []
        for data, base, chains, counts, n in self._plans():
            for steps in chains:
                for name in LOSSES if steps == min(chains) else ("simple",):
                    own = {**base, "schedule.num_steps": steps, **LOSSES[name]}
                    most = {way: min(steps, 100) for way in WAYS} | {"fixed_large": steps}  # as published
                    if name == "simple":
                        del most["learned_range"]
                    taken = {way: [count for count in counts if count <= limit] for way, limit in most.items()}
                    settings = {"n": n, "counts": taken, "unclipped": steps}
                    cells.append(Cell(f"{data}-t{steps}-{name}", "ddpm", data, own, settings, f"T = {steps}, L_{name}"))
        return cells

    def _plans(self) -> list[tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...], int]]:
        """Data, configuration, numbers of steps T, numbers of steps K, samples."""
        mlp = {"network": "mlp", "training.batch_size": 64, "training.lr": 2e-3, "training.steps": 3000}
        if self.quick:
            tiny = mlp | {"network.width": 32, "training.steps": 60}
            return [("digits", tiny, (60,), (5, 60), 100)]
        unet = {"network.channels": 8, "training.batch_size": 32, "training.lr": 2e-3, "training.steps": 300}
        return [
            ("digits", mlp, (100, 1000), (10, 20, 50, 100, 1000), 800),
            ("fashion-mnist", unet, (100, 1000), (10, 20, 50, 100, 1000), 200),
        ]

    def measure(self, trained: Trained) -> list[Row]:
        settings, rows = trained.cell.settings, []
        for way, counts in settings["counts"].items():
            for count in counts:
                for clip in (True, False) if count == settings["unclipped"] and way.startswith("fixed") else (True,):
                    options = {"num_steps": count, "solver": WAYS[way], "clip": clip}
                    found = trained.scores(settings["n"], ["fd_clf", "sw2"], **options)
                    values = {name: found[name] for name in ("fd_clf", "fd_clf_real", "sw2")}
                    rows.append(Row({"variance": way, "steps": count, "clip": "yes" if clip else "no"}, values))
        return rows

    def claims(self) -> list[Claim]:
        return [claim for data, _, chains, counts, _ in self._plans() for claim in self._claims(data, chains, counts)]

    def _claims(self, data: str, chains: tuple[int, ...], counts: tuple[int, ...]) -> list[Claim]:
        short, few = min(chains), min(counts)
        cell, long = (f"{data}-t{steps}-simple" for steps in (short, max(chains)))
        learned = f"{data}-t{short}-hybrid"

        def fd(results: Results, at: str, way: str, steps: int, clip: str = "yes") -> np.ndarray:
            return results.values(at, "fd_clf", variance=way, steps=steps, clip=clip)

        def rising(results: Results) -> Finding:
            found = [fd(results, cell, way, few) for way in ("ddim", "fixed_small", "fixed_large")]
            return all_of(*(lower(a, b) for a, b in pairwise(found)))

        def below(a: str, b: str, clip: str = "yes") -> Callable[[Results], Finding]:
            return lambda results: lower(fd(results, cell, a, short, clip), fd(results, cell, b, short))

        def unclipped(results: Results) -> Finding:
            small, large = (fd(results, cell, way, short, "no") for way in ("fixed_small", "fixed_large"))
            return lower(small, large)

        def learns(results: Results) -> Finding:
            return lower(fd(results, learned, "learned_range", few), fd(results, learned, "fixed_large", few))

        everything = f"{data}: T = {short}, all steps"
        claims = [
            Claim(
                f"{everything}, clipped: fixed_small is better than fixed_large",
                [cell],
                below("fixed_small", "fixed_large"),
            ),
            Claim(f"{everything}, not clipped: fixed_small is better than fixed_large", [cell], unclipped),
            Claim(f"{everything}: DDIM is better than fixed_large", [cell], below("ddim", "fixed_large")),
            Claim(
                f"{everything}: fixed_large is better without clipping than with",
                [cell],
                below("fixed_large", "fixed_large", "no"),
            ),
            Claim(
                f"{data}: T = {short}, {few} steps: (1) DDIM beats fixed_small, (2) which beats fixed_large",
                [cell],
                rising,
            ),
            Claim(f"{data}: T = {short}, {few} steps: learned_range is better than fixed_large", [learned], learns),
        ]
        if long == cell:
            return claims

        def worse(results: Results) -> Finding:
            return lower(
                fd(results, long, "fixed_large", max(chains), "no"), fd(results, cell, "fixed_large", short, "no")
            )

        def alike(way: str) -> Callable[[Results], Finding]:
            def check(results: Results) -> Finding:
                known = fd(results, long, way, short)
                return same(fd(results, cell, way, short), known, 0.25 * float(known.mean()))

            return check

        text = f"{data}: T = {short} scores within 25 % of T = {max(chains)} strided to {short} steps, with"
        return [
            *claims,
            Claim(
                f"{data}: fixed_large, all steps, not clipped: T = {short} is worse (published)", [cell, long], worse
            ),
            *(Claim(f"{text} {way}", [cell, long], alike(way)) for way in ("fixed_large", "fixed_small", "ddim")),
        ]

    def figures(self, results: Results) -> dict[str, Figure]:
        figures = {}
        for data, *_ in self._plans():
            cells = [cell for cell in results.rows if cell.startswith(data)]
            figure, axes = panels(len(cells))
            for panel, cell in zip(axes, cells, strict=True):
                groups = results.groups(cell)
                for way in WAYS:
                    found = [(r["steps"], v["fd_clf"]) for r, v in groups if (r["variance"], r["clip"]) == (way, "yes")]
                    if found:
                        draw(panel, [float(steps) for steps, _ in found], [fd for _, fd in found], way)
                real(panel, groups[0][1]["fd_clf_real"].mean())
                panel.set(title=cell, xscale="log", xlabel="sampling steps K", ylabel="fd_clf (lower is better)")
                log_scale(panel)
                panel.legend(fontsize=8)
            figures[f"{data}-score-against-steps"] = figure
        return figures

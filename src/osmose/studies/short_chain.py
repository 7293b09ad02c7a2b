"""`osmose study short-chain`: is a chain of 100 steps bad, or only its variance?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from osmose.studies.plots import draw, log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, all_of, lower

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

    Both are trained here, with L_simple and with L_hybrid (learned variance), on the linear schedule whose betas are
    scaled by 1000 / T. Every model is sampled with K of its steps, evenly spaced and with rescaled betas, and with
    each reverse variance. If the schedule were at fault, all ways would be bad at T = 100; if the variance is, only
    fixed_large is. Samples are clipped to the data's range at every step.

    Digits: an MLP (3 blocks of 256). Fashion-MNIST: the default UNet at 8 channels and a short training, T = 100 and
    L_hybrid only, whose mean is taught by L_simple alone.
    """

    title = "Short chains: the schedule or the variance?"
    source = (
        "a table of DDPM with T = 100 against T = 1000 on CIFAR-10: FID 49.58, 40.77, 40.40 after 50k, 100k and 150k "
        "steps of training, against 11.52, 6.05, 4.93"
    )

    def cells(self) -> list[Cell]:
        cells = []
        for data, base, losses, chains, counts, n in self._plans():
            for steps in chains:
                for name in losses:
                    own = {**base, "schedule.num_steps": steps, **LOSSES[name]}
                    settings = {"n": n, "counts": [count for count in counts if count <= steps]}
                    cells.append(Cell(f"{data}-t{steps}-{name}", "ddpm", data, own, settings, f"T = {steps}, L_{name}"))
        return cells

    def _plans(self) -> list[tuple[str, dict[str, Any], tuple[str, ...], tuple[int, ...], tuple[int, ...], int]]:
        """Data, configuration, losses, numbers of steps T, numbers of steps K, samples."""
        mlp = {"network": "mlp", "training.batch_size": 64, "training.lr": 2e-3, "training.steps": 4000}
        if self.quick:
            tiny = mlp | {"network.width": 32, "training.steps": 60}
            return [("digits", tiny, ("simple", "hybrid"), (60,), (5, 60), 100)]
        unet = {"network.channels": 8, "training.batch_size": 32, "training.lr": 2e-3, "training.steps": 300}
        return [
            ("digits", mlp, ("simple", "hybrid"), (100, 1000), (10, 20, 50, 100, 1000), 800),
            ("fashion-mnist", unet, ("hybrid",), (100,), (10, 100), 300),
        ]

    def measure(self, trained: Trained) -> list[Row]:
        settings, rows = trained.cell.settings, []
        for way, solver in WAYS.items():
            if way == "learned_range" and not trained.cell.name.endswith("hybrid"):
                continue
            for count in settings["counts"]:
                found = trained.scores(settings["n"], ["fd_clf", "sw2"], num_steps=count, solver=solver)
                values = {name: found[name] for name in ("fd_clf", "fd_clf_real", "sw2")}
                rows.append(Row({"variance": way, "steps": count}, values))
        return rows

    def claims(self) -> list[Claim]:
        return [
            claim
            for data, _, losses, chains, counts, _ in self._plans()
            for claim in self._claims(data, losses, chains, counts)
        ]

    def _claims(
        self, data: str, losses: tuple[str, ...], chains: tuple[int, ...], counts: tuple[int, ...]
    ) -> list[Claim]:
        short, few = min(chains), min(counts)
        cell, long = (f"{data}-t{steps}-{losses[0]}" for steps in (short, max(chains)))
        learned = f"{data}-t{short}-hybrid"

        def rising(ways: Sequence[str], steps: int) -> Callable[[Results], Finding]:
            """Each way scores lower than the next."""

            def check(results: Results) -> Finding:
                fd = [results.values(cell, "fd_clf", variance=way, steps=steps) for way in ways]
                return all_of(*(lower(a, b) for a, b in pairwise(fd)))

            return check

        def below(a: tuple[str, str, int], b: tuple[str, str, int], share: float = 0.0) -> Callable[[Results], Finding]:
            """`a` scores lower than `b`, or at most a share of it higher."""

            def check(results: Results) -> Finding:
                left, right = (results.values(c, "fd_clf", variance=way, steps=steps) for c, way, steps in (a, b))
                return lower(left, (1 + share) * right)

            return check

        claims = [
            Claim(
                f"{data}: T = {short}, all steps: fixed_small is better than fixed_large",
                [cell],
                rising(["fixed_small", "fixed_large"], short),
            ),
            Claim(
                f"{data}: T = {short}, all steps: DDIM is better than fixed_large",
                [cell],
                rising(["ddim", "fixed_large"], short),
            ),
            Claim(
                f"{data}: T = {short}, {few} steps: (1) DDIM beats fixed_small, (2) which beats fixed_large",
                [cell],
                rising(["ddim", "fixed_small", "fixed_large"], few),
            ),
            Claim(
                f"{data}: T = {short}, {few} steps: learned_range is better than fixed_large",
                [learned],
                below((learned, "learned_range", few), (learned, "fixed_large", few)),
            ),
        ]
        if long != cell:
            claims += [
                Claim(
                    f"{data}: fixed_large, all steps: T = {short} is worse than T = {max(chains)} (published)",
                    [cell, long],
                    below((long, "fixed_large", max(chains)), (cell, "fixed_large", short)),
                ),
                Claim(
                    f"{data}: DDIM, {short} steps: T = {short} is at most 25 % worse than T = {max(chains)}",
                    [cell, long],
                    below((cell, "ddim", short), (long, "ddim", short), 0.25),
                ),
            ]
        return claims

    def figures(self, results: Results) -> dict[str, Figure]:
        figures = {}
        for data, _, losses, chains, *_ in self._plans():
            cells = [f"{data}-t{steps}-{name}" for steps in chains for name in losses]
            figure, axes = panels(len(cells))
            for panel, cell in zip(axes, cells, strict=True):
                groups = results.groups(cell)
                for way in WAYS:
                    found = [(labels["steps"], own["fd_clf"]) for labels, own in groups if labels["variance"] == way]
                    if found:
                        draw(panel, [float(steps) for steps, _ in found], [fd for _, fd in found], way)
                real(panel, groups[0][1]["fd_clf_real"].mean())
                panel.set(title=cell, xscale="log", xlabel="sampling steps K", ylabel="fd_clf (lower is better)")
                log_scale(panel)
                panel.legend(fontsize=8)
            figures[f"{data}-score-against-steps"] = figure
        return figures

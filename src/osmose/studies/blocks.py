"""Study `blocks`: a denoiser in blocks that are trained apart, against training from end to end."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from osmose.acceleration.blocks import Blocks
from osmose.analysis.training_memory import training_memory
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import VarianceExploding
from osmose.studies.plots import draw, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import lower, mean_and_spread
from osmose.training.trainer import built

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = 12
_DIT = {"network": "dit", "network.width": 48, "network.depth": _LAYERS}
#: Numbers of blocks, at an overlap of 0.05 and intervals of equal mass.
COUNTS = (1, 2, 3, 4, 6)
#: Of three blocks, what is changed, and what it is.
CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "b3-apart": ({"blocks.overlap": 0.0}, "no overlap"),
    "b3-wide": ({"blocks.overlap": 0.1}, "overlap 0.1"),
    "b3-wider": ({"blocks.overlap": 0.2}, "overlap 0.2"),
    "b3-log": ({"blocks.partition": "equal-log"}, "intervals of equal length in log sigma"),
    "b3-sigma": ({"blocks.partition": "equal-sigma"}, "intervals of equal length in sigma"),
}
GRIDS = ("karras", "equal-mass")


class BlocksStudy(Study):
    """Digits; a DiT of 12 layers of 48 in B blocks, 800 updates of 64 items for each block.

    EDM's preconditioning and law of noise. That is as many layer passes in training as 800 updates of the whole network
    take, which is b1. `b3-third` has 267 updates for each of three blocks: as many updates in all as b1, and a third of
    its layer passes. `unet` is a UNet of 8 channels, 900 updates; `unet-b3` three of them, each with 300 updates for a
    third of the noise: as much computation, three times the weights.

    `score` is fd_clf of 800 samples by Euler's rule in 50 steps, on EDM's grid (karras) and on quantiles of the law of
    noise (equal-mass). `bytes` are those of a training step: weights, gradients, Adam's state and average, and the most
    that is alive besides, counted tensor by tensor. `passes` are layers that a sample goes through.

    `exact` trains nothing: where Euler's rule ends in 50 steps with the perfect denoiser D = y, begun at sigma = 80, as
    it is and with the sign that is printed in the paper.
    """

    title = "DiffusionBlocks: does a denoiser in blocks that are trained apart score as one that is trained whole?"
    source = (
        "DiffusionBlocks (arXiv 2506.14202), v4: CIFAR-10 test FID 39.83, 35.47, 38.03, 45.43, 53.32 at B = 1, 2, 3, "
        "4, 6; equal mass 38.03 against 43.53 (equal intervals); v1: overlap 0, .1, .2 gives 45.50, 41.39, 56.69"
    )

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of blocks."""
        return (1, 2) if self.quick else COUNTS

    def cells(self) -> list[Cell]:
        training: dict[str, Any] = {"training.steps": 800, "training.batch_size": 64}
        settings: dict[str, Any] = {"n": 800, "steps": 50}
        network = _DIT
        if self.quick:
            training = {"training.steps": 6, "training.batch_size": 8}
            settings = {"n": 80, "steps": 4}
            network = _DIT | {"network.width": 16, "network.depth": 4}

        def cell(name: str, changes: dict[str, Any], note: str) -> Cell:
            return Cell(name, "blocks", "digits", network | training | changes, settings, note)

        cells = [Cell("exact", None, "digits", {}, {"steps": 50}, "closed forms")]
        cells += [cell(f"b{count}", {"blocks.count": count}, f"{count} blocks") for count in self.counts]
        if self.quick:
            return cells
        cells += [cell(name, {"blocks.count": 3, **changes}, note) for name, (changes, note) in CHANGED.items()]
        cells.append(cell("b3-third", {"blocks.count": 3, "training.steps": 267}, "as many updates in all as b1"))
        unet = {"network.channels": 8, "training.batch_size": 64}
        cells.append(Cell("unet", "edm", "digits", unet | {"training.steps": 900}, settings, "a UNet"))
        experts = unet | {"training.steps": 300, "blocks.count": 3}
        cells.append(Cell("unet-b3", "blocks", "digits", experts, settings, "three UNets, as much computation"))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings = trained.cell.settings
        if trained.cell.method is None:
            return exact_rows(settings["steps"])
        rows = []
        for spacing in GRIDS:
            options = {"num_steps": settings["steps"], "spacing": spacing, "solver": "ddim"}
            scores = trained.scores(settings["n"], ["fd_clf"], **options)
            rows.append(Row({"grid": spacing}, {"score": scores["fd_clf"], "score_real": scores["fd_clf_real"]}))
        config, count = trained.run.config, 1
        if trained.cell.method == "blocks":
            plan = Blocks.open(trained.run.folder).plan
            config, count = plan.member(0), plan.count
        memory = training_memory(built(config), config.training)
        assert memory is not None
        state = memory.parameters + memory.gradients + memory.optimizer + memory.average
        layers = config.method.to_json()["network"].get("depth", 0)
        values = {"bytes": state + memory.step, "state": state, "activations": memory.activations}
        return [*rows, Row({"grid": "training"}, values | {"blocks": count, "passes": layers * settings["steps"]})]

    def claims(self) -> list[Claim]:
        def share(r: Results, count: int) -> Any:
            return r.values(f"b{count}", "bytes", grid="training") / r.values("b1", "bytes", grid="training")

        claims = [
            Claim(
                f"training {count} blocks takes at most {1 / count + 0.15:.2f} of the memory of the whole",
                [f"b{count}", "b1"],
                lambda r, count=count: lower(share(r, count), 1 / count + 0.15),  # type: ignore[misc]
            )
            for count in self.counts[1:]
        ]
        claims.append(
            Claim(
                "with the printed sign noise grows: the chain ends farther from the data than it began",
                ["exact"],
                lambda r: lower(
                    r.values("exact", "left", sign="as it begins"), r.values("exact", "left", sign="printed")
                ),
            )
        )
        if self.quick:
            return claims

        def better(text: str, a: str, b: str, grid: str = "karras") -> None:
            claims.append(Claim.lower(f"{text} ({grid})", a, b, "score", grid=grid))

        for grid in GRIDS:
            for count in COUNTS[1:]:
                better(f"{count} blocks score better than training from end to end", f"b{count}", "b1", grid)
            better("three blocks are better than six", "b3", "b6", grid)
            better("intervals of equal mass are better than equal ones in log sigma", "b3", "b3-log", grid)
            better("intervals of equal mass are better than equal ones in sigma", "b3", "b3-sigma", grid)
            better("an overlap of 0.1 is better than none", "b3-wide", "b3-apart", grid)
            better("an overlap of 0.1 is better than 0.2", "b3-wide", "b3-wider", grid)
            better("with as many updates in all, three blocks are worse than the whole", "b1", "b3-third", grid)
            better(
                "at equal computation one UNet is better than three for a third of the noise", "unet", "unet-b3", grid
            )
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        rows = []
        for name in results.rows:
            if name == "exact":
                continue
            row = {"configuration": name}
            for grid in GRIDS:
                row[f"fd_clf, {grid}"] = mean_and_spread(results.values(name, "score", grid=grid))
            training = {key: results.values(name, key, grid="training") for key in ("bytes", "state", "activations")}
            row |= {f"{key}, MB": f"{values.mean() / 1e6:.2f}" for key, values in training.items()}
            row["layer passes a sample"] = f"{results.values(name, 'passes', grid='training').mean():.0f}"
            rows.append(row)
        real_score = mean_and_spread(results.values("b1", "score_real", grid="karras"))
        rows.append({"configuration": "real data", "fd_clf, karras": real_score})
        signs = [
            {"sign": str(labels["sign"]), "distance from the data at the end": f"{values['left'].mean():.4g}"}
            for labels, values in results.groups("exact")
        ]
        return {"Digits": rows, "Euler's rule with the perfect denoiser, from sigma = 80": signs}

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, (score, memory) = panels(2)
        for grid in GRIDS:
            values = [results.values(f"b{count}", "score", grid=grid) for count in self.counts]
            draw(score, self.counts, values, grid)
        real(score, float(results.values("b1", "score_real", grid="karras").mean()))
        score.set(title="digits, as many updates of each block", xlabel="blocks", ylabel="fd_clf", xticks=self.counts)
        score.legend(fontsize=7)
        whole = results.values("b1", "bytes", grid="training")
        shares = [results.values(f"b{count}", "bytes", grid="training") / whole for count in self.counts]
        draw(memory, self.counts, shares, "measured")
        memory.plot(self.counts, [1 / count for count in self.counts], "--", c="0.5", label="1 / B")
        memory.set(title="memory of a training step", xlabel="blocks", ylabel="share of the whole", xticks=self.counts)
        memory.legend(fontsize=7)
        return {"blocks": figure}


def exact_rows(steps: int) -> list[Row]:
    """How far from the data y a chain ends that begins at y + 80 eps, in units of eps, with D = y."""
    levels = [level.sigma for level in TimeGrid.of(VarianceExploding(), steps, "karras").levels]
    right = printed = levels[0]
    for sigma, following in pairwise(levels):
        change = (sigma - following) / sigma
        right, printed = right * (1 - change), printed * (1 + change)
    ends = {"as it begins": levels[0], "as it is": right, "printed": printed}
    return [Row({"sign": sign}, {"left": left}) for sign, left in ends.items()]

"""`osmose study vlb`: training on the likelihood bound itself, with and without importance sampling of t."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from osmose.studies.measures import bound, noise_under
from osmose.studies.plots import log_scale, panels, real
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, all_of, lower, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEARNED = {"variance": "learned_range"}
#: What is changed with respect to DDPM on the cosine schedule.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "simple": ({}, "L_simple; the bound is that of fixed_small"),
    "hybrid": (_LEARNED | {"objective": "hybrid"}, "L_hybrid, learned variance"),
    "hybrid-loss-aware": (_LEARNED | {"objective": "hybrid", "times": "loss-aware"}, "and importance sampling"),
    "vlb": (_LEARNED | {"objective": "vlb"}, "L_vlb, learned variance, uniform t"),
    "vlb-loss-aware": (_LEARNED | {"objective": "vlb", "times": "loss-aware"}, "L_vlb with importance sampling"),
}
_BASE = {"schedule": "cosine", "training.lr": 1e-3}


class VLB(Study):
    """How much does importance sampling of t help where the loss is the likelihood bound, and what does the bound cost?

    `bits_per_dim` is the bound on held-out data at their real number of levels (17 for the digits, 256 for
    Fashion-MNIST), all terms of the chain, with the model's own variance. Samples are drawn with the ancestral chain
    strided to `fd_ancestral`'s number of steps and the model's own variance, and with DDIM of as many steps. The
    gradient noise is the trace of the covariance of L_vlb's gradient (variance fixed_small, uniform t) divided by that
    with importance sampling, at the weights of `simple` after a short and after the whole training.

    Digits: an MLP (3 blocks of 256), T = 1000. Fashion-MNIST: the default UNet at 8 channels, T = 200, short training.
    """

    title = "The likelihood bound as the loss: gradient noise, bits per dimension, samples"
    source = (
        "Nichol and Dhariwal 2021 (arXiv 2102.09672): importance sampling makes L_vlb trainable; after 500k steps on "
        "CIFAR-10 3.17 bits/dim and FID 3.19 with L_hybrid, 2.94 and 11.47 with L_vlb"
    )

    def _plans(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        if self.quick:
            tiny = {**_BASE, "schedule.num_steps": 60, "network": "mlp", "network.width": 32, "training.steps": 60}
            return {
                "digits": (tiny, {"n": 100, "sampling_steps": 5, "items": 40, "batches": 20, "warmup": 20, "short": 20})
            }
        digits = {**_BASE, "network": "mlp", "training.batch_size": 64, "training.steps": 4000}
        fashion = {
            **_BASE,
            "network.channels": 8,
            "schedule.num_steps": 200,
            "training.batch_size": 32,
            "training.steps": 300,
        }
        return {
            "digits": (
                digits,
                {"n": 800, "sampling_steps": 100, "items": None, "batches": 300, "warmup": 500, "short": 300},
            ),
            "fashion-mnist": (
                fashion,
                {"n": 400, "sampling_steps": 20, "items": 48, "batches": 60, "warmup": 180, "short": 100},
            ),
        }

    def cells(self) -> list[Cell]:
        cells = []
        for data, (base, settings) in self._plans().items():
            for name, (changes, note) in VARIANTS.items():
                cells.append(Cell(f"{data}-{name}", "ddpm", data, {**base, **changes}, settings, note))
            short = {**base, "training.steps": settings["short"]}
            cells.append(Cell(f"{data}-simple-short", "ddpm", data, short, settings, "for the gradient noise early on"))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings, values = trained.cell.settings, {}
        if "-simple" in trained.cell.name:
            uniform, aware = (
                noise_under(trained, {"objective": "vlb", "times": times}, batches=settings["batches"], warmup=warmup)
                for times, warmup in (("uniform", 0), ("loss-aware", settings["warmup"]))
            )
            values["noise_ratio"] = uniform.variance / aware.variance
        if not trained.cell.name.endswith("-short"):
            own = str(getattr(trained.run.config.method, "variance", ""))
            solver = {"kind": "ancestral", "variance": own}
            steps = settings["sampling_steps"]
            values |= bound(trained, n=settings["items"])
            values["fd_ancestral"] = trained.scores(settings["n"], ["fd_clf"], num_steps=steps, solver=solver)["fd_clf"]
            ddim = trained.scores(settings["n"], ["fd_clf"], num_steps=steps, solver="ddim")
            values |= {"fd_ddim": ddim["fd_clf"], "fd_real": ddim["fd_clf_real"]}
        return [Row({}, values)]

    def claims(self) -> list[Claim]:
        return [claim for data in self._plans() for claim in self._claims(data)]

    def _claims(self, data: str) -> list[Claim]:
        def less(text: str, a: str, b: str, metric: str) -> Claim:
            return Claim.lower(f"{data}: {text}", f"{data}-{a}", f"{data}-{b}", metric)

        early, late = f"{data}-simple-short", f"{data}-simple"

        def quieter(results: Results) -> Finding:
            return all_of(*(lower(1 / results.values(cell, "noise_ratio"), 0.25) for cell in (early, late)))

        return [
            Claim(
                f"{data}: importance sampling leaves under a quarter of L_vlb's gradient variance, (1) early, (2) late",
                [early, late],
                quieter,
            ),
            less(
                "importance sampling lowers the bits per dimension of L_vlb at equal steps",
                "vlb-loss-aware",
                "vlb",
                "bits_per_dim",
            ),
            less("L_hybrid reaches fewer bits per dimension than L_simple", "hybrid", "simple", "bits_per_dim"),
            less(
                "L_vlb with importance sampling reaches fewer than L_hybrid", "vlb-loss-aware", "hybrid", "bits_per_dim"
            ),
            less("L_hybrid samples better than L_vlb", "hybrid", "vlb-loss-aware", "fd_ancestral"),
            Claim.alike(
                f"{data}: L_hybrid samples like L_simple: fd_clf with DDIM within 10 %",
                f"{data}-hybrid",
                late,
                "fd_ddim",
                0.1,
            ),
            less(
                "importance sampling lowers the bits per dimension of L_hybrid (published: no benefit there)",
                "hybrid-loss-aware",
                "hybrid",
                "bits_per_dim",
            ),
        ]

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        tables = {}
        for data in self._plans():
            lines = []
            for name in [*VARIANTS, "simple-short"]:
                (_, found), *_ = results.groups(f"{data}-{name}")
                what = VARIANTS[name][1] if name in VARIANTS else "a short training, for the gradient noise"
                line = {"variant": name, "what": what}
                for metric in ("bits_per_dim", "eps_error", "fd_ancestral", "fd_ddim", "noise_ratio"):
                    line[metric] = mean_and_spread(found[metric]) if metric in found else ""
                lines.append(line)
            tables[data] = lines
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(len(self._plans()))
        for panel, data in zip(axes, self._plans(), strict=True):
            for name in VARIANTS:
                bits, fd = (results.values(f"{data}-{name}", metric) for metric in ("bits_per_dim", "fd_ancestral"))
                panel.errorbar(bits.mean(), fd.mean(), xerr=bits.std(), yerr=fd.std(), fmt="o", capsize=2, label=name)
            real(panel, results.values(f"{data}-simple", "fd_real").mean())
            panel.set(title=data, xlabel="bits per dimension, held out", ylabel="fd_clf, ancestral (lower is better)")
            log_scale(panel)
            panel.legend(fontsize=8)
        return {"bits-against-score": figure}

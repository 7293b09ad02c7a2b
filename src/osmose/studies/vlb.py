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
    "vlb-clipped": (_LEARNED | {"objective": "vlb", "training.clip_grad": 1.0}, "L_vlb, gradients clipped to norm 1"),
}
_BASE = {"schedule": "cosine", "training.lr": 1e-3, "training.clip_grad": None}
#: Left out on Fashion-MNIST, where a run takes minutes.
_DIGITS_ONLY = ("hybrid-loss-aware", "vlb-clipped", "simple-short")


class VLB(Study):
    """How much does importance sampling of t help where the loss is the likelihood bound, and what does the bound cost?

    Bits per dimension are the bound on held-out data at their real number of levels (17 for the digits, 256 for
    Fashion-MNIST): all terms of the chain, the averaged weights, the denoised estimate clipped to the data's range, the
    model's own variance; of `simple`, which has none of its own, with fixed_small and with fixed_large. Samples are
    drawn with the ancestral chain strided to fewer steps and the model's own variance (fixed_small for `simple`), and
    with DDIM of as many steps. `noise left` is the trace of the covariance of L_vlb's gradient with importance sampling
    as a share of that with uniform t (variance fixed_small), at the weights of `simple`.

    Gradients are not clipped, as in the paper; `vlb-clipped` shows what clipping would do: with it, hardly a step of
    L_vlb keeps its length, and the objective is another one.

    Digits: an MLP (3 blocks of 256), T = 1000. Fashion-MNIST: the default UNet at 8 channels, T = 200, and a training
    so short that loss-aware times are still uniform for its first half; 400 samples are few for `fd_clf`.
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
                "digits": (tiny, {"n": 100, "sampling_steps": 5, "items": 40, "batches": 20, "warmup": 40, "short": 20})
            }
        digits = {**_BASE, "network": "mlp", "training.batch_size": 64, "training.steps": 3000}
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

    def _variants(self, data: str) -> list[str]:
        names = [*VARIANTS, "simple-short"]
        return names if data == "digits" else [name for name in names if name not in _DIGITS_ONLY]

    def cells(self) -> list[Cell]:
        cells = []
        for data, (base, settings) in self._plans().items():
            short = ({"training.steps": settings["short"]}, "a short training, for the gradient noise early on")
            for name in self._variants(data):
                changes, note = VARIANTS.get(name, short)
                cells.append(Cell(f"{data}-{name}", "ddpm", data, {**base, **changes}, settings, note))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        settings, values = trained.cell.settings, {}
        if "-simple" in trained.cell.name:
            uniform, aware = (
                noise_under(trained, {"objective": "vlb", "times": times}, batches=settings["batches"], warmup=warmup)
                for times, warmup in (("uniform", 0), ("loss-aware", settings["warmup"]))
            )
            values["noise_left"] = aware.variance / uniform.variance
        if not trained.cell.name.endswith("-short"):
            own = str(getattr(trained.run.config.method, "variance", ""))
            steps = settings["sampling_steps"]
            values |= bound(trained, n=settings["items"])
            if own != "learned_range":
                values["bits_fixed_large"] = bound(trained, "fixed_large", settings["items"])["bits_per_dim"]
            solver = {"kind": "ancestral", "variance": own}
            values["fd_ancestral"] = trained.scores(settings["n"], ["fd_clf"], num_steps=steps, solver=solver)["fd_clf"]
            ddim = trained.scores(settings["n"], ["fd_clf"], num_steps=steps, solver="ddim")
            values |= {"fd_ddim": ddim["fd_clf"], "fd_real": ddim["fd_clf_real"]}
        return [Row({}, values)]

    def claims(self) -> list[Claim]:
        return [claim for data in self._plans() for claim in self._claims(data)]

    def _claims(self, data: str) -> list[Claim]:
        def less(text: str, a: str, b: str, metric: str) -> Claim:
            return Claim.lower(f"{data}: {text}", f"{data}-{a}", f"{data}-{b}", metric)

        simple, hybrid, limit = f"{data}-simple", f"{data}-hybrid", 0.06 if data == "digits" else 0.25

        def noise(when: str, cell: str) -> Claim:
            text = f"{data}: importance sampling leaves less than {limit:.0%} of L_vlb's gradient variance, {when}"
            return Claim(text, [cell], lambda results: lower(results.values(cell, "noise_left"), limit))

        def either(results: Results) -> Finding:
            names = ("bits_per_dim", "bits_fixed_large")
            return all_of(*(lower(results.values(hybrid, names[0]), results.values(simple, name)) for name in names))

        bits = "bits_per_dim"
        claims = [
            noise("late in training", simple),
            less("importance sampling lowers the bits per dimension of L_vlb", "vlb-loss-aware", "vlb", bits),
            Claim(
                f"{data}: L_hybrid has fewer bits per dimension than L_simple with (1) fixed_small, (2) fixed_large",
                [hybrid, simple],
                either,
            ),
            less("L_vlb with importance sampling has fewer bits than L_hybrid", "vlb-loss-aware", "hybrid", bits),
            less(
                "L_hybrid samples better than L_vlb with importance sampling",
                "hybrid",
                "vlb-loss-aware",
                "fd_ancestral",
            ),
            Claim.alike(
                f"{data}: L_hybrid samples like L_simple: fd_clf with DDIM within 10 %", hybrid, simple, "fd_ddim", 0.1
            ),
        ]
        if data == "digits":
            claims += [
                noise("early in training", f"{data}-simple-short"),
                Claim.alike(
                    f"{data}: importance sampling does nothing for L_hybrid (published): bits within 1 %",
                    f"{data}-hybrid-loss-aware",
                    hybrid,
                    bits,
                    0.01,
                ),
                less("clipping gradients lowers the bits of L_vlb with uniform t", "vlb-clipped", "vlb", bits),
            ]
        return claims

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        columns = ("bits_per_dim", "bits_fixed_large", "eps_error", "fd_ancestral", "fd_ddim", "noise_left")
        tables = {}
        for data in self._plans():
            lines = []
            for name in self._variants(data):
                (_, found), *_ = results.groups(f"{data}-{name}")
                line = {"variant": name, "what": VARIANTS[name][1] if name in VARIANTS else "a short training"}
                for metric in columns:
                    line[metric.replace("_", " ")] = mean_and_spread(found[metric]) if metric in found else ""
                lines.append(line)
            real = mean_and_spread(results.values(f"{data}-simple", "fd_real"))
            tables[data] = [*lines, {"variant": "real data", "fd ancestral": real, "fd ddim": real}]
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figure, axes = panels(len(self._plans()))
        for panel, data in zip(axes, self._plans(), strict=True):
            for name in (name for name in self._variants(data) if name in VARIANTS):
                bits, fd = (results.values(f"{data}-{name}", metric) for metric in ("bits_per_dim", "fd_ancestral"))
                panel.plot(bits.mean(), fd.mean(), "o", label=name)
                panel.plot(bits, fd, ".", alpha=0.5, color=panel.lines[-1].get_color())
            real(panel, results.values(f"{data}-simple", "fd_real").mean())
            panel.set(title=data, xlabel="bits per dimension, held out", ylabel="fd_clf, ancestral (lower is better)")
            log_scale(panel)
            panel.legend(fontsize=8)
        return {"bits-against-score": figure}

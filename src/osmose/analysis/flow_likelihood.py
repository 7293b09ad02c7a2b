"""Bits per dimension by the probability-flow ODE: a density instead of a bound, with what is known of its error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from osmose.analysis.likelihood import Bits, chosen_rows
from osmose.data.dataset import Dataset
from osmose.gaussian.density import log_density
from osmose.gaussian.derivatives import probes_for
from osmose.gaussian.draws import SampleDraws
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import Batch, OnStep
from osmose.methods.moments import level_step
from osmose.training import files

#: Hutchinson's probes of large items when nothing is said.
PROBES = 4
TOLERANCE = 1e-3


@dataclass(frozen=True)
class FlowLikelihood(Bits):
    """-log2 p per dimension of n items, in the data's units.

    Attributes:
        per_item: float64 (n,).
        solver_error: what the steps are told to err in it, (n,), see `gaussian.density`.
        probe_error: standard error of the estimated traces in it, (n,); 0 of exact ones, NaN of one probe.
        evaluations: of the network, of each item, (n,).
        is_density: of the data as they are; otherwise, a bound for their levels through uniform noise (arXiv
            1511.01844).
        conditions: part, n, tolerance, probes, lowest, seed: what the numbers hold for.
    """

    solver_error: Tensor
    probe_error: Tensor
    evaluations: Tensor
    is_density: bool
    conditions: dict[str, Any]

    @property
    def error(self) -> float | None:
        """Of `bits` by the computation: steps, which err alike, and traces, which do not; None of one probe."""
        if bool(self.probe_error.isnan().any()):
            return None
        by_traces = float(self.probe_error.square().sum().sqrt()) / len(self.probe_error)
        return math.hypot(float(self.solver_error.mean()), by_traces)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "bits_per_dim": self.bits,
            "standard_error": self.standard_error,
            "error": self.error,
            "is_density": self.is_density,
            **self.conditions,
            "evaluations": float(self.evaluations.double().mean()),
            "per_item": self.per_item.tolist(),
            "solver_error_by_item": self.solver_error.tolist(),
            "probe_error_by_item": [None if math.isnan(value) else value for value in self.probe_error.tolist()],
        }


def flow_likelihood(
    model: GenerativeModel,
    dataset: Dataset,
    *,
    part: str = "held-out",
    n: int | None = None,
    probes: int | Literal["exact"] | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    batch_size: int = 256,
    on_step: OnStep | None = None,
) -> FlowLikelihood:
    """The density of real items under a model, along the flow of its score (`gaussian.density`).

    Items with levels are dequantised. An item is taken to carry the least noise that the run was trained at, which of
    8-bit images is about a level at most: the density is that of items with so much noise.

    Args:
        model: a model with a score field.
        dataset: items in the units of the data it was trained on.
        part: "held-out" or "train".
        n: a random subset of so many items; all if None.
        probes: Hutchinson's, or "exact"; None is exact traces up to 64 values an item, and 4 probes beyond.
        tolerance: of a step, see `gaussian.density.log_density`.
        seed: of subset, dequantisation and probes.
        batch_size: items computed together; changes nothing but speed.
        on_step: called with the items done and all of them.

    Raises:
        UserError: a model without a field, an option that is refused.
    """
    field, spec = model.score_field(), model.spec
    chosen = chosen_rows(dataset, part, n, seed, batch_size)
    counted = probes_for(probes, spec.dimension, PROBES)
    step = level_step(spec)
    # -log |dx / dx_data| of a value: of data with levels, in units of the distance between two.
    shift = -step.log().mean() if step is not None else torch.tensor(spec.scale, dtype=torch.float64).log().mean()
    columns: list[tuple[Tensor, ...]] = []
    training = model.training
    model.eval()
    try:
        for first in range(0, len(chosen), batch_size):
            rows = chosen[first : first + batch_size]
            batch = Batch.of(dataset, part, rows, model.config.conditional, model.device)
            x, draws = batch.x0, SampleDraws(seed, first, len(rows), model.device)
            if step is not None:
                u = torch.special.ndtr(draws.normal(spec.shape).cpu().double()).to(x)  # uniform in (0, 1)
                x = x + (u - 0.5) * step.to(x)
            signs = None
            if counted is not None:
                drawn = [draws.branch("signs", probe).normal(spec.shape) for probe in range(counted)]
                signs = torch.where(torch.stack(drawn) < 0, -1.0, 1.0).to(x)
            found = log_density(field.given(batch.condition), x, signs=signs, tolerance=tolerance)
            columns.append((found.log_p, found.solver_error, found.probe_error, found.evaluations))
            if on_step is not None:
                on_step(first + len(rows), len(chosen))
    finally:
        model.train(training)
    log_p, solver, probe, evaluations = (torch.cat(parts) for parts in zip(*columns, strict=True))
    scale = 1 / (spec.dimension * math.log(2))
    return FlowLikelihood(
        per_item=float(shift) / math.log(2) - log_p * scale,
        solver_error=solver * scale,
        probe_error=probe * scale,
        evaluations=evaluations,
        is_density=step is None,
        conditions={
            "by": "ode",
            "part": part,
            "n": len(chosen),
            "tolerance": tolerance,
            "probes": counted,
            "lowest": field.lowest,
            "levels": spec.levels,
            "seed": seed,
        },
    )


def write_flow_likelihood(result: FlowLikelihood, folder: Path) -> list[Path]:
    """Write likelihood.json and likelihood.png: bits of the items, and their evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(result.per_item.numpy(), bins=40, color="C0")
    error = "" if result.error is None else f", computed to {result.error:.2g}"
    left.set(xlabel="bits per dimension", ylabel="items")
    left.set_title(f"{result.bits:.3f} ± {result.standard_error:.3f} bits/dim{error}", fontsize=10)
    right.scatter(result.evaluations, result.per_item, s=6)
    right.set(xlabel="network evaluations of an item", ylabel="bits per dimension")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    paths = [folder / "likelihood.json", folder / "likelihood.png"]
    files.write_json(paths[0], result.to_json())
    files.write_figure(paths[1], figure)
    return paths

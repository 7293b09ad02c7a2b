"""Bits per dimension: the variational bound of a model on real data, split into its terms, with pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osmose.data.dataset import Dataset
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws, seeded
from osmose.methods.base import GenerativeModel
from osmose.methods.messages import Batch, BoundTerms, OnStep
from osmose.training import files


@dataclass(frozen=True)
class Bits:
    """Bits per dimension of n items.

    Attributes:
        per_item: float64 (n,).
    """

    per_item: Tensor

    @property
    def bits(self) -> float:
        """Their mean."""
        return float(self.per_item.mean())

    @property
    def standard_error(self) -> float:
        """Of `bits` over the choice of items."""
        return float(self.per_item.std() / math.sqrt(len(self.per_item)))


@dataclass(frozen=True)
class Likelihood(Bits):
    """The bound of n items in bits per dimension: an upper limit of the negative log-likelihood, or a density's -log.

    Attributes:
        per_item: L of each item, float64 (n,).
        prior: mean of L_T.
        terms: mean of L_0, L_1, ..., L_{K-1}, float64 (K,).
        t: the times of these terms, float64 (K,).
        distortion: root mean square of x0 - x0_hat at each step, model units, float64 (K,); None where there is none.
        eps_error: mean square of eps - eps_hat at each step, float64 (K,), whose mean over t is L_simple; None where
            there is no Gaussian noise.
        is_density: whether the numbers are of a density in the data's units.
        is_exact: whether they are -log2 of it, and no bound.
        conditions: part, n, num_steps, variance, clip, seed: what the numbers hold for.
    """

    prior: float
    terms: Tensor
    t: Tensor
    distortion: Tensor | None
    eps_error: Tensor | None
    is_density: bool
    is_exact: bool
    conditions: dict[str, Any]

    @property
    def rate(self) -> Tensor:
        """Bits per dimension that bring x_t to each step k = 1..K: L_T + L_{K-1} + ... + L_k, (K,).

        With them the step makes its estimate, whose error is `distortion` (arXiv 2006.11239, section 4.3).
        """
        later = torch.cat([self.terms[1:], self.terms.new_zeros(1)])
        return self.prior + later.flip(0).cumsum(0).flip(0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "bits_per_dim": self.bits,
            "standard_error": self.standard_error,
            "prior": self.prior,
            "decoder": float(self.terms[0]),
            "transitions": float(self.terms[1:].sum()),
            "eps_error": None if self.eps_error is None else float(self.eps_error.mean()),
            "is_density": self.is_density,
            "is_exact": self.is_exact,
            **self.conditions,
            "t": self.t.tolist(),
            "terms": self.terms.tolist(),
            "distortion": None if self.distortion is None else self.distortion.tolist(),
            "eps_error_by_t": None if self.eps_error is None else self.eps_error.tolist(),
            "per_item": self.per_item.tolist(),
        }


def likelihood(
    model: GenerativeModel,
    dataset: Dataset,
    *,
    part: str = "held-out",
    n: int | None = None,
    num_steps: int | None = None,
    variance: str | None = None,
    clip: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    on_step: OnStep | None = None,
) -> Likelihood:
    """The bound of a model on real items; every term of every item is estimated with one fresh noise.

    Args:
        model: a model whose method has a bound.
        dataset: the data it was trained on.
        part: "held-out" or "train".
        n: a random subset of so many items; all if None.
        num_steps: steps of the chain, all that the schedule has if None.
        variance: fixed_small, fixed_large or learned_range; the model's own if None.
        clip: keep the denoised estimate inside the data's range.
        seed: of subset and noise.
        batch_size: items computed together; changes nothing but speed.
        on_step: called with the steps done and the steps in all.

    Raises:
        UserError: a model or data without a bound, an option that is refused.
    """
    chosen = chosen_rows(dataset, part, n, seed, batch_size)
    found: list[BoundTerms] = []
    total = -(-len(chosen) // batch_size)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for index, first in enumerate(range(0, len(chosen), batch_size)):
                rows = chosen[first : first + batch_size]
                batch = Batch.of(dataset, part, rows, model.config.conditional, model.device)

                def report(done: int, of: int, index: int = index) -> None:
                    if on_step is not None:
                        on_step(index * of + done, total * of)

                draws = SampleDraws(seed, first, len(rows), model.device)
                found.append(model.bound(batch, draws, report, num_steps=num_steps, variance=variance, clip=clip))
    finally:
        model.train(training)
    bits = 1 / math.log(2)
    steps, prior = (
        torch.cat([terms.steps for terms in found]) * bits,
        torch.cat([terms.prior for terms in found]) * bits,
    )
    distances = [terms.x0_error for terms in found if terms.x0_error is not None]
    errors = [terms.eps_error for terms in found if terms.eps_error is not None]
    return Likelihood(
        per_item=prior + steps.sum(1),
        prior=float(prior.mean()),
        terms=steps.mean(0),
        t=found[0].t,
        distortion=torch.cat(distances).mean(0).sqrt() if distances else None,
        eps_error=torch.cat(errors).mean(0) if errors else None,
        is_density=found[0].is_density,
        is_exact=found[0].is_exact,
        conditions={
            "part": part,
            "n": len(chosen),
            "num_steps": steps.shape[1],
            "variance": variance or getattr(model.config, "variance", None),
            "clip": clip,
            "seed": seed,
            "levels": model.spec.levels,
        },
    )


def chosen_rows(dataset: Dataset, part: str, n: int | None, seed: int, batch_size: int) -> Tensor:
    """The items to score, int64 (n,).

    Raises:
        UserError: an unknown part, too few or too many items, a seed or a size of batches that is not valid.
    """
    if part not in ("train", "held-out"):
        raise UserError(f"part: {part!r} is not valid: should be train or held-out")
    items, _ = dataset.part(part)
    if len(items) < 2:
        raise UserError(f"part: {part!r} has {len(items)} item, and a standard error needs at least 2")
    if n is not None and not 2 <= n <= len(items):
        raise UserError(f"n: {n} is not valid: must be between 2 and the {len(items)} {part} items")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: {seed} is not valid: must be between 0 and 2^63 - 1")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not valid: must be at least 1")
    return torch.randperm(len(items), generator=seeded(seed, "likelihood"))[: n or len(items)]


def write_likelihood(result: Likelihood, folder: Path) -> list[Path]:
    """Write likelihood.json and likelihood.png: the terms against t, and rate against distortion."""
    from matplotlib.figure import Figure

    count = 1 if result.distortion is None else 2
    figure = Figure(figsize=(5 * count, 4), dpi=110, layout="constrained")
    left, *others = figure.subplots(1, count, squeeze=False)[0]
    # Without L_0: of few levels it is next to nothing, and would leave the others no room on the scale.
    left.plot(result.t[1:], result.terms[1:], linewidth=1.2)
    left.set(xlabel="t (0 = data, 1 = noise)", ylabel="terms L_1, L_2, ... (bits per dimension)")
    if bool((result.terms[1:] > 0).all()):
        left.set_yscale("log")
    left.set_title(f"{result.bits:.3f} ± {result.standard_error:.3f} bits/dim, of which L_0 {result.terms[0]:.3f}")
    for right in others:
        right.plot(result.rate, result.distortion, linewidth=1.2)
        right.set(xlabel="rate (bits per dimension)", ylabel="distortion (root mean square, model units)")
        right.set_title("progressive decoding")
    for axes in (left, *others):
        axes.grid(alpha=0.3)
    paths = [folder / "likelihood.json", folder / "likelihood.png"]
    files.write_json(paths[0], result.to_json())
    files.write_figure(paths[1], figure)
    return paths

r"""How far a diffusion's noise model is from the exact one, on data whose exact one is known in closed form.

At x_t = alpha x0 + sigma eps three estimates of eps are compared, each (x_t - alpha x0_hat) / sigma of a denoiser:

`eps_hat`   the model's.
`eps*`      E[eps | x_t], of the law that the data were drawn from: no model can do better.
`eps_lin`   the best that is linear in x_t, of a normal law with the same mean and covariance.

The loss of a noise model splits into E|eps - eps_hat|^2 = E|eps - eps*|^2 + E|eps_hat - eps*|^2: the first part is
irreducible, the second is the model's own, its excess. What of it eps_lin would have says how much there is to learn
beyond lines, and excess / linear how much of that is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from osmose.data.dataset import Dataset, DataSpec
from osmose.data.laws import FAMILIES, Chain, Gaussian, LawWithMoments, Mixture, Product
from osmose.data.toy import law_of
from osmose.errors import UserError
from osmose.gaussian.denoiser import Denoiser
from osmose.gaussian.draws import Draws, StepDraws, seeded
from osmose.gaussian.oracles import ChainDenoiser, GaussianDenoiser, MixtureDenoiser, ProductDenoiser
from osmose.gaussian.parametrization import noised
from osmose.gaussian.schedule import Level, Schedule
from osmose.methods.diffusion import Diffusion
from osmose.methods.messages import Batch
from osmose.methods.times import UniformTimes

#: The earliest time of a continuous schedule: at t = 0 most have no noise, and eps is not determined by x0.
_EARLIEST = 1e-3
#: A mean square that is no more than rounding in float64.
_ROUNDING = 1e-16


@dataclass(frozen=True)
class NoiseError:
    """Mean squares of differences of noise estimates, over the dimensions of n items at times spread evenly.

    Attributes:
        excess: E|eps_hat - eps*|^2 / D, the model's own error.
        standard_error: of `excess`, over the choice of items, times and noise.
        irreducible: E|eps - eps*|^2 / D, the loss of the exact noise model.
        linear: E|eps_lin - eps*|^2 / D, the error of the best noise model that is linear in x_t.
        explained: 1 - excess / linear, the share of the nonlinear part of eps* that the model has; 0 for eps_lin,
            negative for a model that is worse, None where the exact noise model is linear.
        by_quartile: `excess` in the four quarters of the range of t, quietest first; None where the schedule has no
            step.
        conditions: data, method, n, seed: what the numbers hold for.
    """

    excess: float
    standard_error: float
    irreducible: float
    linear: float
    explained: float | None
    by_quartile: tuple[float | None, ...]
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self)
        return {**values.pop("conditions"), **values, "by_quartile": list(self.by_quartile)}


def oracle_of(dataset: Dataset) -> Denoiser:
    """E[x0 | x_t] in the model's units, float64, of the law that a toy data set was drawn from.

    Raises:
        UserError: data whose denoiser is not known in closed form.
    """
    return _denoiser(_law(dataset), *_units(dataset.spec))


def linear_of(dataset: Dataset) -> GaussianDenoiser:
    """The best denoiser that is linear in x_t, in the model's units, float64: of the law's own mean and covariance.

    Raises:
        UserError: see `oracle_of`.
    """
    return _linear(_law(dataset), *_units(dataset.spec))


def noise_error(
    model: Diffusion,
    dataset: Dataset,
    *,
    n: int = 4096,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 1024,
) -> NoiseError:
    """The error of a model's noise estimate on noised held-out items, at times spread evenly over the schedule.

    The model computes in its own precision; what it is compared to is computed in float64 on the CPU.

    Args:
        model: a diffusion; it is left where it was, in the mode it was in.
        dataset: the toy data that it was trained on.
        n: items, each with a time and a noise of its own; where the held-out part has fewer, they come again.
        seed: of the choice of items, times and noise.
        device: where the model computes.
        batch_size: items computed together; changes nothing but speed.

    Raises:
        UserError: data whose denoiser is not known, a model that was trained on other data or is told classes, an
            option that is refused.
    """
    _check(model, dataset, n, seed, batch_size)
    oracle, linear = oracle_of(dataset), linear_of(dataset)
    items, _ = dataset.part("held-out")
    order = torch.randperm(len(items), generator=seeded(seed, "noise-error"))
    rows = order[torch.arange(n) % len(order)]
    draws = StepDraws(seed, 0, 0, n, n).branch("noise-error")  # on the CPU: the same on every device
    times = _times(draws.stratified(), model.schedule)
    noise = draws.normal(model.spec.shape)
    found: list[Tensor] = []
    home, training, dtype = model.device, model.training, next(model.parameters()).dtype
    model.to(device).eval()
    try:
        with torch.inference_mode():
            for part in torch.arange(n).split(batch_size):
                level, eps = model.schedule.level(times[part]), noise[part].double()
                # Rounded to the model's precision once, for all: otherwise they would not see the same x_t.
                x_t = noised(model.spec.encode(items[rows[part]]).double(), eps, level).to(dtype)
                x0_hat = model.denoiser(x_t.to(device), level, None).cpu()
                x_t = x_t.double()
                exact = _eps(x_t, oracle(x_t, level), level)
                others = (_eps(x_t, x0_hat.double(), level), eps, _eps(x_t, linear(x_t, level), level))
                found.append(torch.stack([(other - exact).square().mean(1) for other in others]))
    finally:
        model.to(home).train(training)
    own, irreducible, straight = torch.cat(found, 1)
    quarter = (times * 4).long().clamp(max=3)  # as the log of training cuts its losses
    mean, nonlinear = float(own.mean()), float(straight.mean())
    return NoiseError(
        excess=mean,
        standard_error=float(own.std()) / math.sqrt(n),
        irreducible=float(irreducible.mean()),
        linear=nonlinear,
        explained=1 - mean / nonlinear if nonlinear > _ROUNDING else None,
        by_quartile=tuple(float(own[quarter == q].mean()) if bool((quarter == q).any()) else None for q in range(4)),
        conditions={"data": dataset.source, "method": model.config.kind, "n": n, "seed": seed},
    )


def exact_loss(model: Diffusion, dataset: Dataset, batches: Iterable[tuple[Batch, Draws]]) -> float:
    """What a model that predicts the noise would lose on batches if its noise model were exact, in float64.

    Args:
        model: a diffusion with parametrization `eps` and the simple objective: its loss is then the noise's error.
        dataset: the toy data that it was trained on.
        batches: items in the model's units, and the draws that the model's own loss would be given.

    Raises:
        UserError: data whose denoiser is not known, or another parametrization or objective.
    """
    kinds = model.config.parametrization.kind, model.config.objective.kind
    if kinds != ("eps", "simple"):
        raise UserError(f"noise error: parametrization and objective are {kinds}; they have to be eps and simple")
    oracle, losses = oracle_of(dataset), []
    for batch, draws in batches:
        t, _ = model.times.draw(draws)
        level, eps = model.schedule.level(t), model.noise(draws).cpu().double()
        x_t = noised(batch.x0.cpu().double(), eps, level)
        losses.append((eps - _eps(x_t, oracle(x_t, level), level)).square().flatten(1).mean(1))
    return float(torch.cat(losses).mean())


def _check(model: Diffusion, dataset: Dataset, n: int, seed: int, batch_size: int) -> None:
    for name, number, least in (("n", n, 2), ("batch_size", batch_size, 1)):
        if number < least:
            raise UserError(f"{name}: {number} is not valid: must be at least {least}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: {seed} is not valid: must be between 0 and 2^63 - 1")
    if model.config.conditional:
        raise UserError(
            "method.conditional: true is not valid here: the exact noise model is that of all classes together; take a "
            "model that is not told them"
        )
    units = [(spec.shape, spec.shift, spec.scale) for spec in (model.spec, dataset.spec)]
    if units[0] != units[1]:
        raise UserError(
            f"data: {dataset.source} differs in dimension, mean or deviation from what the model was trained on; load "
            "the data as the run has them (num_points, held_out and split_seed too)"
        )


def _times(u: Tensor, schedule: Schedule) -> Tensor:
    """Uniform values, float64 (n,), as times of the schedule, evenly spread over its steps or its range."""
    t = UniformTimes().times(u, schedule)
    return t if schedule.native_steps else t.clamp(min=_EARLIEST)


def _eps(x_t: Tensor, x0: Tensor, level: Level[Tensor]) -> Tensor:
    """The noise in points x_t (B, D) that x0 leaves."""
    return (x_t - level.alpha[:, None] * x0) / level.sigma[:, None]


def _law(dataset: Dataset) -> LawWithMoments:
    source, _, argument = dataset.source.partition(":")
    law = law_of(argument) if source == "toy" else None
    if not isinstance(law, Chain | Gaussian | Mixture | Product):
        known = ", ".join(f"toy:{form}" for form in ("8-gaussians", *(family.form for family in FAMILIES.values())))
        raise UserError(f"data: {dataset.source} has no denoiser in closed form; these have: {known}")
    return law


def _units(spec: DataSpec) -> tuple[Tensor, Tensor]:
    """Shift and scale of each coordinate, float64 (D,)."""
    shift, scale = (torch.tensor(values, dtype=torch.float64) for values in (spec.shift, spec.scale))
    return shift.expand(spec.dimension), scale.expand(spec.dimension)


def _linear(law: LawWithMoments, shift: Tensor, scale: Tensor) -> GaussianDenoiser:
    mean, covariance = torch.from_numpy(law.mean), torch.from_numpy(law.covariance)
    return GaussianDenoiser((mean - shift) / scale, covariance / (scale[:, None] * scale))


@singledispatch
def _denoiser(law: LawWithMoments, shift: Tensor, scale: Tensor) -> Denoiser:  # noqa: ARG001
    """The denoiser of a law after its coordinates were mapped to (x - shift) / scale."""
    raise TypeError(f"no denoiser for {type(law).__name__}")


@_denoiser.register
def _(law: Gaussian, shift: Tensor, scale: Tensor) -> Denoiser:
    return _linear(law, shift, scale)


@_denoiser.register
def _(law: Product, shift: Tensor, scale: Tensor) -> Denoiser:
    centres = (torch.from_numpy(law.centres) - shift[:, None]) / scale[:, None]
    return ProductDenoiser(centres, law.deviation / scale, torch.from_numpy(law.weights))


@_denoiser.register
def _(law: Chain, shift: Tensor, scale: Tensor) -> Denoiser:
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    step = torch.tensor([[1 - law.flip, law.flip], [law.flip, 1 - law.flip]], dtype=torch.float64)
    centres = (signs - shift[:, None]) / scale[:, None]
    return ChainDenoiser(centres, law.deviation / scale, step.expand(law.dimension - 1, 2, 2))


@_denoiser.register
def _(law: Mixture, shift: Tensor, scale: Tensor) -> Denoiser:
    return MixtureDenoiser((torch.from_numpy(law.centres) - shift) / scale, law.deviation / scale)

"""What `osmose study interpolants` measures: exact fields, wrong ones, learned ones, and bridges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from osmose.data.toy import EIGHT_CENTRES, EIGHT_DEVIATION
from osmose.interpolants import PATHS
from osmose.interpolants.bounds import divergence_bound
from osmose.interpolants.bridge import GaussianBridge
from osmose.interpolants.fields import Fields
from osmose.interpolants.oracles import GaussianMixture, MixturePath
from osmose.interpolants.paths import interpolate
from osmose.interpolants.transport import Epsilon, grid, transport
from osmose.methods.bridge import Bridge
from osmose.methods.interpolant import Interpolant
from osmose.metrics.evaluate import score_samples
from osmose.metrics.kernels import energy_distance
from osmose.studies.study import Row, Trained

if TYPE_CHECKING:
    from osmose.data.dataset import Dataset

#: The unit: the deviation of the eight modes as a whole, the same along both axes.
_SIZE = math.sqrt(float(np.square(EIGHT_CENTRES).sum(1).mean()) / 2 + EIGHT_DEVIATION**2)
#: Two modes to begin with, narrow along the axis on which they lie apart: both axes have the deviation 1 in all.
_ACROSS = 0.3
_TWO_CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64) * math.sqrt(1 - _ACROSS**2)
_TWO_COVARIANCE = torch.tensor([[_ACROSS**2, 0.0], [0.0, 1.0]], dtype=torch.float64)
#: Paths between two modes and eight whose fields are known.
EXACT: dict[str, dict[str, Any]] = {
    "linear, gamma 0": {"kind": "linear", "gamma": "none"},
    "linear, brownian 0.25": {"kind": "linear", "gamma": {"kind": "brownian", "a": 0.25}},
    "linear, brownian 1": {"kind": "linear", "gamma": {"kind": "brownian", "a": 1.0}},
    "linear, sine": {"kind": "linear", "gamma": "sine"},
    "trig, gamma 0": {"kind": "trig", "gamma": "none"},
    "trig, brownian 1": {"kind": "trig", "gamma": {"kind": "brownian", "a": 1.0}},
    "encdec, sine": {"kind": "encdec"},
}
SMOOTH, ROUGH = "linear, brownian 1", "linear, gamma 0"
#: Sizes of errors of an exact velocity, and noises.
ERRORS, ERROR_EPSILONS = (0.25, 0.5), (0.5, 1.0)
CORRELATION, BRIDGE_EPSILON = 0.8, 0.5
_CAP = 1e-4


def _laws(path: dict[str, Any]) -> MixturePath:
    """From the two modes to the eight, in units of the eight's deviation."""
    eight = GaussianMixture.isotropic(torch.from_numpy(EIGHT_CENTRES) / _SIZE, EIGHT_DEVIATION / _SIZE)
    return MixturePath(PATHS.parse(path), eight, two_modes())


def two_modes() -> GaussianMixture:
    """The law that paths to the eight modes begin with."""
    return GaussianMixture(_TWO_CENTRES, _TWO_COVARIANCE.expand(2, -1, -1))


def _carried(
    law: MixturePath, fields: Callable[[float, Tensor], Fields], n: int, generator: torch.Generator,
    epsilon: float, steps: int, end: float, solver: Any = "heun",
) -> Tensor:  # fmt: skip
    """Samples of the law at t = 0, carried to `end`."""
    x = law.sample(n, generator)[0]

    def noise() -> Tensor:
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    for state in transport(fields, x, grid(steps, _CAP, end), Epsilon(epsilon), noise, solver):
        x = state.x
    return x


def _met(law: MixturePath, t: float, n: int, generator: torch.Generator) -> Tensor:
    """Samples of the law at t, by its definition."""
    x0, x1 = law.sample(n, generator)
    z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return interpolate(law.path.at(t), x0, x1, z)


def exact_fields(trained: Trained) -> list[Row]:
    """Laws by ODE and SDE, gradients of b, and few steps, of every path of `EXACT` that the cell names."""
    n, generator, rows = trained.cell.settings["n"], torch.Generator().manual_seed(trained.seed), []
    quick = n < 1000
    steps, counts = (20, (4,)) if quick else (100, (2, 4, 8, 16))

    def distance(a: Tensor, b: Tensor) -> float:
        return 1000 * float(energy_distance(a, b).value)

    for name in trained.cell.settings["paths"]:
        law = _laws(EXACT[name])
        for epsilon in (0.0, 0.5, 2.0) if law.path.noisy else (0.0,):
            for end in (0.5, 1 - _CAP):
                made = _carried(law, law.fields, n, generator, epsilon, steps, end)
                one, other = (_met(law, end, n, generator) for _ in range(2))
                values = {"ed": distance(made, one), "ed_real": distance(other, one)}
                rows.append(Row({"what": "law", "path": name, "epsilon": epsilon, "t": round(end, 2)}, values))
        times = torch.linspace(0.02, 0.98, 25).tolist()
        squares = np.stack([_squared_gradient(law, t, max(200, n // 4), generator) for t in times])
        middle = [0.25 <= t <= 0.75 for t in times]
        rows += [
            Row(
                {"what": place, "path": name},
                {"gradient": math.sqrt(squares[chosen].mean()), "largest": math.sqrt(squares[chosen].max())},
            )
            for place, chosen in (("middle", middle), ("all", [True] * len(times)))
        ]
        for count in counts:
            made = _carried(law, law.fields, n, generator, 0.0, count, 1 - _CAP, "euler")
            values = {"ed": distance(made, law.rho1.sample(n, generator))}
            rows.append(Row({"what": "few", "path": name, "steps": count}, values))
    return rows


def _squared_gradient(law: MixturePath, t: float, n: int, generator: torch.Generator) -> np.ndarray:
    """The squared Jacobian of b at n draws of x_t."""
    x = _met(law, t, n, generator).requires_grad_()
    b = law.fields(t, x).b
    assert b is not None
    parts = [torch.autograd.grad(b[:, i].sum(), x, retain_graph=True)[0] for i in range(2)]
    return torch.stack(parts).square().sum((0, 2)).numpy()


def wrong_velocity(trained: Trained) -> list[Row]:
    """What an error of b costs the ODE and SDEs, and the bound of it."""
    n, generator, rows = trained.cell.settings["n"], torch.Generator().manual_seed(trained.seed), []
    steps = 20 if n < 1000 else 200
    law = _laws(EXACT[SMOOTH])
    real_counts = _counted(law.rho1.sample(n, generator))
    for error in (0.0, *ERRORS):

        def wrong(t: float, x: Tensor, error: float = error) -> Fields:
            fields = law.fields(t, x)
            assert fields.b is not None
            # sin^2 has the mean 1/2, whatever the phase: |error|^2 in all where x is spread over some periods.
            return Fields(fields.b + error * (4 * x.flip(1) + 1).sin(), fields.s, fields.eta)

        for epsilon in (0.0, *ERROR_EPSILONS):
            made = _carried(law, wrong, n, generator, epsilon, steps, 1 - _CAP)
            values = {"kl": _divergence(real_counts, _counted(made))}
            if epsilon > 0:
                values["bound"] = divergence_bound(_excess(law, error, generator), 0.0, epsilon)
            rows.append(Row({"error": error, "epsilon": epsilon}, values))
    return rows


def _excess(law: MixturePath, error: float, generator: torch.Generator) -> float:
    """Half the mean squared error of the velocity, over x_t and t."""
    times = torch.linspace(0.02, 0.98, 25).tolist()
    parts = [error**2 * (4 * _met(law, t, 2000, generator) + 1).sin().square().sum(1).mean() for t in times]
    return float(torch.stack(parts).mean()) / 2


def _counted(x: Tensor) -> np.ndarray:
    first, second = x.clamp(-2 + 1e-9, 2 - 1e-9).T.numpy()
    cells, _, _ = np.histogram2d(first, second, bins=32, range=[[-2.0, 2.0], [-2.0, 2.0]])
    return (cells + 0.1) / (cells + 0.1).sum()


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def _samplers(
    trained: Trained, values_of: Callable[[Tensor], dict[str, float]], start: Tensor | None = None
) -> list[Row]:
    """By every noise that the model allows, and by the ODE in few steps."""
    model, settings, rows = trained.model, trained.cell.settings, []
    assert isinstance(model, Interpolant)
    told: dict[str, Any] = {"seed": trained.seed, "start": start}
    for epsilon in settings["epsilons"] if model.config.path.noisy else (0.0,):
        made = model.sample(settings["n"], epsilon=epsilon, num_steps=settings["steps"], **told)
        rows.append(Row({"what": "sampler", "epsilon": epsilon}, values_of(made.data)))
    for count in settings["counts"]:
        made = model.sample(settings["n"], num_steps=count, solver="euler", **told)
        rows.append(Row({"what": "steps", "steps": count}, values_of(made.data)))
    return rows


def _eight_values(n: int, seed: int) -> tuple[Callable[[Tensor], dict[str, float]], dict[str, float]]:
    """What is measured of n samples near the eight modes, in the data's units, and what data have."""
    law = GaussianMixture.isotropic(torch.from_numpy(EIGHT_CENTRES), EIGHT_DEVIATION)
    generator = torch.Generator().manual_seed(seed)
    one, other = (law.sample(n, generator) for _ in range(2))

    def values(x: Tensor) -> dict[str, float]:
        x = x.double()
        off = (torch.cdist(x, law.means).amin(1) > 4 * EIGHT_DEVIATION).double().mean()
        distance = 1000 * energy_distance(x / _SIZE, one / _SIZE).value
        return {"off": float(off), "log_rho": float(law.log_prob(x).mean()), "ed": distance}

    return values, {f"{name}_real": value for name, value in values(other).items()}


def eight(trained: Trained) -> list[Row]:
    """Samples of a model from fresh draws of the two modes."""
    n = trained.cell.settings["n"]
    values, known = _eight_values(n, trained.seed)
    start = two_modes().sample(n, torch.Generator().manual_seed(1000 + trained.seed)).float()
    return [Row(row.labels, {**row.values, **known}) for row in _samplers(trained, values, start)]


def eight_exact(trained: Trained) -> list[Row]:
    """What the samplers of `eight` make of the exact fields."""
    settings, law = trained.cell.settings, _laws(EXACT[SMOOTH])
    n, generator = settings["n"], torch.Generator().manual_seed(trained.seed)
    values, known = _eight_values(n, trained.seed)
    rows = []
    for epsilon in settings["epsilons"]:
        made = _carried(law, law.fields, n, generator, epsilon, settings["steps"], 1 - _CAP)
        rows.append(Row({"what": "sampler", "epsilon": epsilon}, values(_SIZE * made) | known))
    for count in settings["counts"]:
        made = _carried(law, law.fields, n, generator, 0.0, count, 1 - _CAP, "euler")
        rows.append(Row({"what": "steps", "steps": count}, values(_SIZE * made) | known))
    return rows


def _score(x: Tensor, dataset: Dataset, metric: str, seed: int) -> dict[str, float]:
    (score,) = score_samples(x, dataset, metrics=[metric], seed=seed)
    assert score.floor is not None
    return {metric: score.value, f"{metric}_real": score.floor}


def high(trained: Trained) -> list[Row]:
    """Samples in many dimensions."""
    return _samplers(trained, lambda x: _score(x, trained.dataset, "sw2", trained.seed))


def digits(trained: Trained) -> list[Row]:
    """Digits in few steps of Euler."""
    model, settings, rows = trained.model, trained.cell.settings, []
    for count in settings["counts"]:
        made = model.sample(settings["n"], seed=trained.seed, num_steps=count, solver="euler")
        rows.append(Row({"what": "steps", "steps": count}, _score(made.data, trained.dataset, "fd_clf", trained.seed)))
    return rows


@torch.inference_mode()
def bridge(trained: Trained) -> list[Row]:
    """Energy, drift and covariance of simulated paths, beside those of the closed form."""
    model, settings = trained.model, trained.cell.settings
    assert isinstance(model, Interpolant | Bridge)
    n, steps, epsilon = settings["n"], settings["steps"], BRIDGE_EPSILON
    generator = torch.Generator().manual_seed(trained.seed)

    def noise() -> Tensor:
        return torch.randn(n, 2, generator=generator).to(trained.device)

    correlated = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
    exact = GaussianBridge(torch.zeros(2), torch.eye(2), torch.zeros(2), correlated, epsilon)
    fields, times, x = model.fields_at(), grid(steps, _CAP, 1 - _CAP), noise()
    energy, error, cov = 0.0, 0.0, 0.0
    states = transport(fields, x, times, Epsilon(epsilon), noise)
    for (t, s), state in zip(itertools.pairwise(times), states, strict=True):
        here = fields(t, x)
        assert here.b is not None
        assert here.s is not None
        u = here.b + epsilon * here.s
        energy += float(u.square().mean()) * (s - t)
        error += float((u.cpu() - exact.drift(t, x.cpu())).square().mean()) * (s - t)
        x = state.x
        if abs(s - 0.5) < 0.5 / steps:
            cov = float(torch.cov(x.T)[0, 1])
    values = {"energy": energy, "energy_exact": exact.energy() / 2, "drift_error": error}
    values |= {"cov": cov, "cov_exact": float(exact.covariance(0.5)[0, 1])}
    values |= {"end_cov": float(torch.cov(x.T)[0, 1]), "end_cov_exact": CORRELATION}
    return [Row({"what": "bridge"}, values)]

r"""Simulated series at irregular times, as in the study of stochastic-process diffusion (arXiv 2211.02590).

Each of the series has its own times, uniform in [0, 1] and sorted; a process runs over [0, T] of its own time t, which
is divided by T. Stochastic ones are drawn from their exact transitions, differential equations solved by Runge and
Kutta's rule with `SUBSTEPS` steps between neighbours.

============= ====== ==== =========================================================================================
ou            1      64   dx = (0.02 t - 0.1 x) dt + 0.4 dW from 0, T = 64
cir           1      10   dx = (1.2 - x) dt + 0.2 sqrt(x) dW from its stationary law
sine          1      10   sum of 5 c sin(a t + b), a in [3, 4], b in [0, 1/2], c in [0, 1], all uniform
lorenz        3      2    x' = 10 (y - x), y' = x (28 - z) - y, z' = x y - 8 z / 3 from N(0, I) 10 + (0, 0, 25)
predator-prey 2      10   x' = 2/3 x (1 - y), y' = y (x - 1), from uniform in [1/2, 2]^2
sink          2      3    x' = -4 x + 10 y, y' = -3 x + 2 y, from N(0, I)
============= ====== ==== =========================================================================================

The columns are the name, the number of values at a time, and T. `process:NAME:L` sets the number of times, 64 if not
given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from osmose.data.dataset import DataConfig, Dataset
from osmose.data.series import Arrays, assembled
from osmose.data.splitting import split_indices
from osmose.errors import UserError, nearest

#: Steps of the solver between two neighbouring times.
SUBSTEPS = 8
_LENGTH = 64

#: times (N, L), generator -> values (N, L, C).
Simulation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Process:
    """A law of series: the time T that [0, 1] stands for, and how values at times in [0, T] are drawn."""

    horizon: float
    draw: Simulation


def ornstein_uhlenbeck(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exactly dx = (0.02 t - 0.1 x) dt + 0.4 dW from 0: x - 0.2 t + 2 falls back to 0 at the rate 0.1."""
    gaps = np.diff(times, axis=1, prepend=0.0)
    kept = np.exp(-0.1 * gaps)
    fresh = np.sqrt(0.8 * -np.expm1(-0.2 * gaps)) * rng.standard_normal(times.shape)
    found, rest = np.empty((*times.shape, 1)), np.full(len(times), 2.0)
    for i in range(times.shape[1]):
        rest = kept[:, i] * rest + fresh[:, i]
        found[:, i, 0] = 0.2 * times[:, i] - 2 + rest
    return found


def cox_ingersoll_ross(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exactly dx = (1.2 - x) dt + 0.2 sqrt(x) dW: transitions are scaled noncentral chi-square laws."""
    level, spread = 1.2, 0.2
    state = rng.gamma(2 * level / spread**2, spread**2 / 2, size=len(times))
    found = np.empty((*times.shape, 1))
    for i, gap in enumerate(np.diff(times, axis=1, prepend=0.0).T):
        scale = spread**2 * -np.expm1(-gap) / 4
        moved = scale * rng.noncentral_chisquare(
            4 * level / spread**2, state * np.exp(-gap) / np.maximum(scale, 1e-300)
        )
        state = np.where(gap > 0, moved, state)
        found[:, i, 0] = state
    return found


def sines(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sum of five sines with random frequencies, phases and sizes."""
    a, b, c = (rng.uniform(low, high, size=(len(times), 5, 1)) for low, high in ((3, 4), (0, 0.5), (0, 1)))
    return (c * np.sin(a * times[:, None] + b)).sum(axis=1)[..., None]


def _flow(
    slope: Callable[[np.ndarray], np.ndarray], start: Callable[[int, np.random.Generator], np.ndarray]
) -> Simulation:
    """The solution of x' = slope(x) from a random start at t = 0."""

    def draw(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        x, found = start(len(times), rng), []
        for gap in np.diff(times, axis=1, prepend=0.0).T:
            h = gap[:, None] / SUBSTEPS
            for _ in range(SUBSTEPS):
                k1 = slope(x)
                k2 = slope(x + h / 2 * k1)
                k3 = slope(x + h / 2 * k2)
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3))
            found.append(x)
        return np.stack(found, axis=1)

    return draw


def _lorenz(s: np.ndarray) -> np.ndarray:
    x, y, z = s.T
    return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=1)


def _predator_prey(s: np.ndarray) -> np.ndarray:
    x, y = s.T
    return np.stack([2 / 3 * x * (1 - y), y * (x - 1)], axis=1)


def _sink(s: np.ndarray) -> np.ndarray:
    return s @ np.array([[-4.0, -3.0], [10.0, 2.0]])


#: The names in `process:NAME`.
PROCESSES: dict[str, Process] = {
    "ou": Process(64.0, ornstein_uhlenbeck),
    "sine": Process(10.0, sines),
    "cir": Process(10.0, cox_ingersoll_ross),
    "lorenz": Process(2.0, _flow(_lorenz, lambda n, rng: 10 * rng.standard_normal((n, 3)) + np.array([0, 0, 25.0]))),
    "predator-prey": Process(10.0, _flow(_predator_prey, lambda n, rng: rng.uniform(0.5, 2, size=(n, 2)))),
    "sink": Process(3.0, _flow(_sink, lambda n, rng: rng.standard_normal((n, 2)))),
}


def load_process(argument: str, config: DataConfig) -> Dataset:
    """`config.num_points` series of the process `NAME` or `NAME:L`, drawn and split with `config.split_seed`.

    Raises:
        UserError: no such process, or fewer than 2 times.
    """
    name, _, length = argument.partition(":")
    if name not in PROCESSES:
        raise UserError(f"process:{argument}: no such process; {nearest(name, PROCESSES)}")
    count = int(length) if length.isdecimal() else 0 if length else _LENGTH
    if count < 2:
        raise UserError(
            f"process:{argument}: {length!r} is not a number of times; use at least 2, as process:{name}:64"
        )
    process, rng = PROCESSES[name], np.random.default_rng(config.split_seed)
    times = np.sort(rng.random((config.num_points, count)), axis=1)
    values = process.draw(times * process.horizon, rng)
    first, second = split_indices(config.num_points, config.held_out, config.split_seed)
    x, t = torch.from_numpy(values.transpose(0, 2, 1)).float().contiguous(), torch.from_numpy(times)
    names = tuple("xyz"[: values.shape[2]])
    split = f"{len(second)} series chosen at random with split seed {config.split_seed}"
    parts = Arrays(x[first], t[first]), Arrays(x[second], t[second])
    return assembled(f"process:{argument}", names, *parts, split)

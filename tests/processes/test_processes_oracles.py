"""Samplers of Gaussian processes with exact denoisers: closed forms against the numbers that were computed before."""

import math

import pytest
import torch

from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import LinearSchedule
from osmose.processes import KERNELS
from osmose.processes.oracles import denoiser_matrix, divergence, sampled_covariance

TIMES = torch.rand(1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(dim=1).values


def covariance(kind, scale=1.0):
    unit = torch.eye(50, dtype=torch.float64)
    if kind == "white":
        return unit
    found = KERNELS.parse({"kind": kind, "length_scale": scale}).covariance(TIMES)[0]
    return found + 1e-4 * unit if kind == "ou" else found


def chain(steps):
    """Betas from 1e-4 to 20 / N, as published."""
    return TimeGrid.of(LinearSchedule(num_steps=steps, beta_start=1e-7 * steps, beta_end=0.02), steps)


# Divergences of the sampled law from the data's, for 25, 50, 100 and 200 steps; other times, so within a fifth.
TABLE = [
    ("ou", 0.2, "white", 1.0, (21.8, 3.55, 0.505, 0.077)),
    ("ou", 0.2, "ou", 2.0, (0.29, 0.065, 0.015, 0.004)),
    ("ou", 0.2, "ou", 0.02, (0.74, 0.16, 0.036, 0.009)),
    ("ou", 0.2, "gp", 0.1, (0.80, 0.17, 0.039, 0.010)),
    ("gp", 0.2, "white", 1.0, (1470, 312, 50.7, 3.7)),
    ("gp", 0.2, "ou", 2.0, (27, 3.6, 0.56, 0.11)),
    ("gp", 0.2, "ou", 0.2, (342, 62, 8.3, 0.93)),
    ("gp", 0.2, "gp", 0.1, (53, 9.1, 1.2, 0.15)),
]


@pytest.mark.parametrize(("data", "scale", "noise", "other", "expected"), TABLE)
def test_errors_of_the_sampler_are_those_that_were_computed_before(data, scale, noise, other, expected):
    k, sigma = covariance(data, scale), covariance(noise, other)
    found = [divergence(sampled_covariance(k, sigma, chain(n)), k) for n in (25, 50, 100, 200)]
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("steps", [1, 25, 100])
def test_noise_like_the_data_is_exact_in_any_number_of_steps(steps):
    k = covariance("ou", 0.2)
    grid = TimeGrid.of(LinearSchedule(num_steps=100, beta_start=1e-5), steps)
    made = sampled_covariance(k, k, grid)
    # The last step adds no noise: what is missing is its beta.
    last = 1 - grid.levels[-2].alpha ** 2
    assert torch.allclose(made, (1 - last) * k, atol=1e-12)
    assert divergence(made, k) == pytest.approx(25 * (-last - math.log1p(-last)), rel=1e-5)


def test_the_denoiser_is_the_conditional_mean():
    k, sigma = covariance("gp", 0.2), covariance("ou", 0.5)
    joint = 0.8 * k, 0.64 * k + 0.36 * sigma
    assert torch.allclose(denoiser_matrix(k, sigma, 0.8, 0.6) @ joint[1], joint[0], atol=1e-9)
    assert denoiser_matrix(k, k, 0.8, 0.6) == pytest.approx(0.8 * torch.eye(50, dtype=torch.float64), abs=1e-9)

"""Gaussian processes as noise of functions: kernels at any times, and spectra on the torus; pure tensor mathematics."""

from __future__ import annotations

from osmose.configuration import Registry

KERNELS = Registry(
    "kernel",
    {
        "white": ("osmose.processes.kernels:WhiteKernel", "independent at all times, as in ordinary diffusion"),
        "ou": ("osmose.processes.kernels:OUKernel", "exp(-|t - t'| / length_scale): rough paths, exact in O(N)"),
        "brownian": ("osmose.processes.kernels:BrownianKernel", "min(t, t') from an origin, where it is 0; O(N)"),
        "gp": ("osmose.processes.kernels:GPKernel", "exp(-((t - t') / length_scale)^2): very smooth paths"),
        "matern32": ("osmose.processes.kernels:Matern32Kernel", "paths with one derivative"),
        "matern52": ("osmose.processes.kernels:Matern52Kernel", "paths with two derivatives"),
    },
)

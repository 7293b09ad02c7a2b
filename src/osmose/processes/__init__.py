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
SPECTRA = Registry(
    "spectrum",
    {
        "power": ("osmose.processes.spectrum:PowerSpectrum", "(1 + |k|^2)^-exponent: functions on every grid"),
        "published": ("osmose.processes.spectrum:PublishedSpectrum", "1 / (|k|^2 + 2), without a limit on two axes"),
        "white": ("osmose.processes.spectrum:WhiteSpectrum", "all modes alike: ordinary noise, no function"),
    },
)
DRIFTS = Registry(
    "drift",
    {
        "const": ("osmose.processes.modes:ConstDrift", "all modes decay alike"),
        "published": ("osmose.processes.modes:PublishedDrift", "slowest at middle frequencies"),
    },
)
SPEEDS = Registry(
    "speed",
    {
        "vp": ("osmose.processes.modes:VPSpeed", "that of the variance preserving process"),
        "published": ("osmose.processes.modes:PublishedSpeed", "grows exponentially"),
    },
)

"""Methods: a generative model is `loss` and `sample`. One file per method; none imports another."""

from __future__ import annotations

from osmose.configuration import Registry

METHODS = Registry(
    "method",
    {
        "ddpm": ("osmose.methods.diffusion:DDPMConfig", "denoising diffusion on T discrete steps (Ho et al. 2020)"),
        "edm": (
            "osmose.methods.diffusion:EDMConfig",
            "preconditioned diffusion in continuous noise (Karras et al. 2022)",
        ),
    },
)
TIME_SAMPLERS = Registry(
    "time sampler",
    {
        "uniform": ("osmose.methods.times:UniformTimes", "every t alike"),
        "log-normal": ("osmose.methods.times:LogNormalTimes", "EDM: log(sigma / alpha) is normal"),
    },
)

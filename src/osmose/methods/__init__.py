"""Methods: a generative model is `loss` and `sample`. One file per method; none imports another."""

from __future__ import annotations

from osmose.configuration import Registry

METHODS = Registry(
    "method",
    {
        "ddpm": ("osmose.methods.diffusion:DDPMConfig", "denoising diffusion on T discrete steps (Ho et al. 2020)"),
        "iddpm": (
            "osmose.methods.diffusion:IDDPMConfig",
            "DDPM with a learned variance and the cosine schedule (Nichol and Dhariwal 2021)",
        ),
        "edm": (
            "osmose.methods.diffusion:EDMConfig",
            "preconditioned diffusion in continuous noise (Karras et al. 2022)",
        ),
        "surrogate": ("osmose.methods.surrogate:SurrogateConfig", "a chain that is entered with rough samples"),
    },
)
#: Methods that are put together from other runs instead of being trained.
COMPOSED = ("surrogate",)
TIME_SAMPLERS = Registry(
    "time sampler",
    {
        "uniform": ("osmose.methods.times:UniformTimes", "every t alike"),
        "log-normal": ("osmose.methods.times:LogNormalTimes", "EDM: log(sigma / alpha) is normal"),
        "loss-aware": (
            "osmose.methods.times:LossAwareTimes",
            "improved DDPM: steps as often as their recent losses are large",
        ),
    },
)
OBJECTIVES = Registry(
    "objective",
    {
        "simple": ("osmose.methods.objectives:SimpleObjective", "squared error of the network's output"),
        "vlb": ("osmose.methods.objectives:VLBObjective", "the variational bound, in bits per dimension"),
        "hybrid": ("osmose.methods.objectives:HybridObjective", "squared error, and the bound for the variance alone"),
        "tilted": (
            "osmose.methods.objectives:TiltedObjective",
            "several noises for each item, weighted by their losses (importance-weighted diffusion)",
        ),
    },
)

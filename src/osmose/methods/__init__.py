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
        "blackout": (
            "osmose.methods.blackout:BlackoutConfig",
            "counts that lose their units one by one, and get them back (Santos et al. 2023)",
        ),
        "fdp": (
            "osmose.methods.functional:FunctionalConfig",
            "functions on a grid, under noise that is a function too (Franzese et al. 2023)",
        ),
        "interpolant": (
            "osmose.methods.interpolant:InterpolantConfig",
            "from noise or other data to the data, by ODE or SDE (Albergo et al. 2023)",
        ),
        "bridge": (
            "osmose.methods.bridge:BridgeConfig",
            "the process of least energy from noise or other data to the data (Schroedinger bridge)",
        ),
        "dspd": (
            "osmose.methods.stochastic_process:DSPDConfig",
            "series at any times, by noise that is correlated in time, in steps (Bilos et al. 2023)",
        ),
        "cspd": (
            "osmose.methods.stochastic_process:CSPDConfig",
            "the same in continuous time, sampled by its flow",
        ),
        "masked": (
            "osmose.methods.masked:MaskedConfig",
            "text whose characters are hidden one by one, and found again (masked diffusion)",
        ),
        "token-diffusion": (
            "osmose.methods.token_diffusion:TokenDiffusionConfig",
            "text from left to right, each character by a short diffusion of its embedding",
        ),
        "gaussian": ("osmose.methods.gaussian_fit:GaussianConfig", "one Gaussian with the covariance of the data"),
        "class-means": (
            "osmose.methods.gaussian_fit:ClassMeansConfig",
            "a Gaussian for each class, fitted in closed form as well",
        ),
        "flow": ("osmose.methods.flow:FlowConfig", "a normalizing flow of coupling splines (Durkan et al. 2019)"),
        "sngan": (
            "osmose.methods.sngan:SNGANConfig",
            "a generator against a critic with spectral norms (Miyato et al. 2018)",
        ),
        "vae": (
            "osmose.methods.vae:VAEConfig",
            "variational autoencoder with a learned variance (Kingma and Welling 2013)",
        ),
        "surrogate": ("osmose.methods.surrogate:SurrogateConfig", "a chain that is entered with rough samples"),
        "tract": (
            "osmose.methods.time_distillation:TractConfig",
            "a student that jumps as far as its teacher goes in any number of steps (Berthelot et al. 2023)",
        ),
        "btd": (
            "osmose.methods.time_distillation:BTDConfig",
            "a student that does two steps of its teacher in one (Salimans and Ho 2022)",
        ),
        "scd": (
            "osmose.methods.consistency:SCDConfig",
            "a consistency model of a teacher's flow, in continuous time (Lu and Song 2024)",
        ),
        "sct": (
            "osmose.methods.consistency:SCTConfig",
            "a consistency model of the data, in continuous time (Lu and Song 2024)",
        ),
        "ect": (
            "osmose.methods.consistency:ECTConfig",
            "a consistency model by stages of ever nearer times (Geng et al. 2024)",
        ),
        "dsno": (
            "osmose.methods.operator:DSNOConfig",
            "the whole trajectory of a teacher in one call (Zheng et al. 2022)",
        ),
        "distilled": ("osmose.methods.students:DistilledConfig", "the students of all phases of a distillation"),
    },
)
#: Methods that are put together from other runs instead of being trained.
COMPOSED = ("surrogate", "distilled")
#: Methods that are trained on another run: `osmose distill`. The first cut a grid of steps, the others do not.
STEPWISE, TAUGHT = ("tract", "btd"), ("scd", "dsno")
DISTILLED = (*STEPWISE, *TAUGHT)
#: Methods that may begin with the weights of another run: `osmose train METHOD --init RUN`.
CONTINUED = ("sct", "ect")
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

"""Gaussian diffusion as pure tensor mathematics: schedules, noise, parametrizations, solvers."""

from __future__ import annotations

from osmose.configuration import Registry

SCHEDULES = Registry(
    "schedule",
    {
        "linear": ("osmose.gaussian.schedule:LinearSchedule", "DDPM: beta from 1e-4 to 0.02 over T steps"),
        "scaled-linear": (
            "osmose.gaussian.schedule:ScaledLinearSchedule",
            "latent diffusion: the root of beta rises, T steps",
        ),
        "cosine": ("osmose.gaussian.schedule:CosineSchedule", "improved DDPM: squared cosine, T steps"),
        "vp": ("osmose.gaussian.schedule:VPSchedule", "score SDE: a rate from 0.1 to 20, in continuous time"),
        "ve": ("osmose.gaussian.schedule:VarianceExploding", "EDM: x0 plus noise of deviation 0.002 to 80"),
        "trig": ("osmose.gaussian.schedule:TrigSchedule", "TrigFlow: alpha = cos, sigma = sin"),
        "straight": ("osmose.gaussian.schedule:StraightSchedule", "flow matching: alpha = 1 - t, sigma = t"),
    },
)
NOISES = Registry("noise", {"white": ("osmose.gaussian.noise:WhiteNoise", "independent standard normal values")})
PARAMETRIZATIONS = Registry(
    "parametrization",
    {
        "eps": ("osmose.gaussian.parametrization:EpsParametrization", "the network predicts the noise"),
        "x0": ("osmose.gaussian.parametrization:X0Parametrization", "the network predicts the clean data"),
        "v": ("osmose.gaussian.parametrization:VParametrization", "the network predicts alpha eps - sigma x0"),
        "edm": ("osmose.gaussian.parametrization:EDMParametrization", "unit-variance input and target at every t"),
    },
)
SOLVERS = Registry(
    "solver",
    {
        "ancestral": ("osmose.gaussian.solvers:Ancestral", "DDPM's reverse chain; fresh noise at every step"),
        "ddim": ("osmose.gaussian.solvers:DDIM", "first order; deterministic at eta = 0"),
        "heun": ("osmose.gaussian.solvers:Heun", "second order, two evaluations a step"),
        "dpmpp-2m": ("osmose.gaussian.solvers:DPMSolverPP2M", "second order, one evaluation a step"),
    },
)

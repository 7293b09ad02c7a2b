"""Stochastic interpolants as pure tensor mathematics: paths between two laws, fields, samplers, closed forms."""

from __future__ import annotations

from osmose.configuration import Registry

GAMMAS = Registry(
    "gamma",
    {
        "none": ("osmose.interpolants.paths:NoGamma", "no noise between the ends"),
        "brownian": ("osmose.interpolants.paths:BrownianGamma", "sqrt(a t (1 - t)), as a Brownian bridge"),
        "quadratic": ("osmose.interpolants.paths:QuadraticGamma", "t (1 - t)"),
        "sine": ("osmose.interpolants.paths:SineGamma", "sin^2(pi t): 1 in the middle"),
    },
)
PATHS = Registry(
    "path",
    {
        "linear": ("osmose.interpolants.paths:LinearPath", "(1 - t) x0 + t x1 + gamma z"),
        "trig": ("osmose.interpolants.paths:TrigPath", "cos(pi t / 2) x0 + sin(pi t / 2) x1 + gamma z"),
        "trig-vp": ("osmose.interpolants.paths:TrigVPPath", "trig, scaled to keep a variance of 1; gamma below 1"),
        "encdec": ("osmose.interpolants.paths:EncDecPath", "x0 into pure noise, then the noise into x1"),
        "one-sided-linear": ("osmose.interpolants.paths:OneSidedLinearPath", "(1 - t) z + t x1: flow matching"),
        "one-sided-trig": ("osmose.interpolants.paths:OneSidedTrigPath", "cos(pi t / 2) z + sin(pi t / 2) x1"),
        "one-sided-vp": ("osmose.interpolants.paths:OneSidedVPPath", "sqrt(1 - t^2) z + t x1: score-based diffusion"),
        "mirror": ("osmose.interpolants.paths:MirrorPath", "x1 + gamma z: from an item to others around it"),
    },
)

"""Diffusion among finitely many states as pure mathematics: Markov chains forward and backward, and the pure death."""

from __future__ import annotations

from osmose.configuration import Registry

PROCESSES = Registry(
    "process",
    {
        "death": ("osmose.discrete.markov:Death", "blackout: units are lost one by one, until all is 0"),
        "uniform": ("osmose.discrete.markov:Uniform", "every state jumps to any other alike"),
        "absorbing": ("osmose.discrete.markov:Absorbing", "every state jumps to one more state, and stays there"),
        "birth-death": ("osmose.discrete.markov:BirthDeath", "jumps to the neighbours, at rates of one's own"),
    },
)
SURVIVALS = Registry(
    "survival schedule",
    {
        "logit": ("osmose.discrete.death:LogitSurvival", "log-odds of survival fall evenly: even in log-SNR"),
        "cosine": ("osmose.discrete.death:CosineSurvival", "a squared cosine, slower at both ends"),
    },
)

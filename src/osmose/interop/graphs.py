r"""Networks as graphs of other runtimes (ONNX, OpenVINO), with all that a sampling loop needs beside them.

    FOLDER/network.onnx (or network.xml and network.bin)   F(x, label), or F(x, label, condition), any number of items
    FOLDER/sampler.json                                    numbers for a loop without osmose or torch

`sampler.json` has the deviation of the first noise, and for each step from x_t to x_s what the network is told and what
follows from its answer: with F = network(c_in x, label),

    x0 = clip(c_skip x + c_out F),     eps = (x - alpha x0) / sigma,     x <- next_alpha x0 + next_sigma eps:

DDIM's rule, which every run of a Gaussian diffusion can be sampled by. Data units are x scale + shift.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from osmose.errors import UserError
from osmose.methods.chain import GaussianSampling
from osmose.methods.diffusion import Diffusion
from osmose.networks import graphs
from osmose.training import files
from osmose.training.run import Run, require_free


def export(run: Run, folder: Path | str, target: graphs.Target, num_steps: int | None = None) -> Path:
    """Write a run as a graph, and the constants of its sampling loop.

    Args:
        run: a run of ddpm, iddpm or edm.
        folder: the folder to make.
        target: the runtime.
        num_steps: steps of the loop; the run's own number if None.

    Returns:
        The file of the graph.

    Raises:
        UserError: another method, a network that has no graph, a missing package.
    """
    folder = Path(folder)
    require_free(folder)
    if name := graphs.missing(target):
        raise UserError(f"--to {target}: needs {name}; install it with: pip install 'osmose[export]'")
    model = run.model()
    if not isinstance(model, Diffusion):
        raise UserError(
            f"RUN: {run.folder} is a run of {run.config.method.kind}; those of ddpm, iddpm and edm are graphs"
        )
    if why := graphs.without(model.denoiser.network):
        raise UserError(why)
    network, sampler = model.denoiser.network, sampler_of(model, num_steps)
    with files.replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        name = graphs.write(network, model.spec.shape, model.config.conditional, temporary, target).name
        files.write_json(temporary / "sampler.json", sampler)
    return folder / name


def sampler_of(model: Diffusion, num_steps: int | None = None) -> dict[str, Any]:
    """All that a sampling loop needs besides the network, as plain values; see the module."""
    sampling = model.sampling(**({} if num_steps is None else {"num_steps": num_steps}))
    assert isinstance(sampling, GaussianSampling)
    spec, denoiser = model.spec, model.denoiser
    levels = model.grid(sampling).levels
    steps = []
    for t, s in pairwise(levels):
        c = denoiser.parametrization.coefficients(t)
        steps.append(
            {
                "label": float(model.schedule.label(t)),
                "c_in": float(c.c_in),
                "c_skip": float(c.c_skip),
                "c_out": float(c.c_out),
                "alpha": t.alpha,
                "sigma": t.sigma,
                "next_alpha": s.alpha,
                "next_sigma": s.sigma,
            }
        )
    limits = spec.model_range if sampling.clip else None
    return {
        "format": "osmose-sampler-1",
        "shape": list(spec.shape),
        "prior_std": model.schedule.prior_std,
        "clip": None if limits is None else list(limits),
        "shift": list(spec.shift),
        "scale": list(spec.scale),
        "num_classes": spec.num_classes if model.config.conditional else None,
        "learned_variance": denoiser.learned_variance,
        "steps": steps,
    }

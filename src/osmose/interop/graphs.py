r"""Networks as graphs of other runtimes (ONNX, OpenVINO), with all that a sampling loop needs beside them.

    FOLDER/network.onnx (or network.xml and network.bin)   F(x, label), or F(x, label, condition), any number of items
    FOLDER/sampler.json                                    numbers for a loop without osmose or torch

`sampler.json` has the deviation of the first noise, and for each step from x_t to x_s what the network is told and what
follows from its answer: with F = network(c_in x, label),

    x0 = clip(c_skip x + c_out F),     eps = (x - alpha x0) / sigma,     x <- next_alpha x0 + next_sigma eps:

DDIM's rule, which every run of a Gaussian diffusion can be sampled by. Data units are x scale + shift.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osmose.errors import UserError
from osmose.methods.chain import GaussianSampling
from osmose.methods.diffusion import Diffusion
from osmose.networks.calibration import calibrations
from osmose.training import files
from osmose.training.run import Run, require_free

Target = Literal["onnx", "openvino"]
_NEEDED = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}


#: Networks whose computation does not depend on the values they are given, as that of others does.
_GRAPHS = ("unet", "dit", "uvit", "mlp")


class _Called(nn.Module):
    """A network as it is called from outside."""

    def __init__(self, network: nn.Module, conditional: bool):
        super().__init__()
        self.network, self.conditional = network, conditional

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        """X (n, *event), label (n,), and of conditional models condition int64 (n,)."""
        out: Tensor = self.network(x, label, condition if self.conditional else None)
        return out


def export(run: Run, folder: Path | str, target: Target, num_steps: int | None = None) -> Path:
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
    for name in _NEEDED[target]:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--to {target}: needs {name}; install it with: pip install 'osmose[export]'")
    model = run.model()
    if not isinstance(model, Diffusion):
        raise UserError(
            f"RUN: {run.folder} is a run of {run.config.method.kind}; those of ddpm, iddpm and edm are graphs"
        )
    if model.config.network.kind not in _GRAPHS:
        raise UserError(f"network: {model.config.network.kind} has no graph here; {', '.join(_GRAPHS)} have")
    if calibrations(model.denoiser.network):  # found by looking up the label of each item
        raise UserError("network.linear: true has no graph here; train with network.linear=false")
    sampler = sampler_of(model, num_steps)
    conditional = model.config.conditional
    network = _Called(model.denoiser.network, conditional).eval()
    items = 2
    example = [torch.randn(items, *model.spec.shape), torch.full((items,), 500.0)]
    if conditional:
        example.append(torch.zeros(items, dtype=torch.int64))
    names = ["x", "label", "condition"][: len(example)]
    with files.replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            name = _write(network, tuple(example), names, temporary, target)
        files.write_json(temporary / "sampler.json", sampler)
    return folder / name


def _write(network: nn.Module, example: tuple[Tensor, ...], names: list[str], folder: Path, target: Target) -> str:
    """Write the graph; the name of its file."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # it tells of libraries that are not there, and at length of what it cannot do
    batch = torch.export.Dim("n", min=1)
    try:
        torch.onnx.export(
            network,
            example,
            str(folder / "network.onnx"),
            input_names=names,
            output_names=["out"],
            dynamic_shapes=tuple({0: batch} for _ in example),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    finally:
        logging.disable(before)
    if target == "onnx":
        return "network.onnx"
    import openvino

    # By way of ONNX, in which all operations of the networks here have a form.
    openvino.save_model(openvino.convert_model(folder / "network.onnx"), folder / "network.xml", compress_to_fp16=False)
    (folder / "network.onnx").unlink()
    return "network.xml"


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

"""Networks as graphs that other runtimes run: ONNX's, and on this machine OpenVINO's, which computes in integers.

A graph has the inputs x (n, *event), label (n,) and, of conditional networks, condition (n,) int64, and the output out.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from osmose.errors import UserError
from osmose.networks.calibration import calibrations
from osmose.networks.dit import DiT
from osmose.networks.experts import Experts
from osmose.networks.integers import IntegerLayer
from osmose.networks.mlp import MLP
from osmose.networks.processor import instructions
from osmose.networks.quantized import BF16
from osmose.networks.unet import UNet
from osmose.networks.uvit import UViT

Target = Literal["onnx", "openvino"]
#: The file of a graph.
FILES = {"onnx": "network.onnx", "openvino": "network.xml"}
_NEEDED = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}
#: Two pairs of products of an unsigned byte and such an integer fit in 16 bits.
SAFE_WEIGHT_BITS = 7


#: Networks whose computation does not depend on the values they are given, as that of others does.
_GRAPHS = (UNet, DiT, UViT, MLP)


def without(network: nn.Module) -> str | None:
    """Why a network has no graph, in one line; None where it has."""
    if isinstance(network, Experts):
        return "network: experts answer in turns and have no graph together; a run of one of them has"
    inner = network.network if isinstance(network, BF16) else network
    if not isinstance(inner, _GRAPHS):
        return f"network: a {type(inner).__name__} has no graph here; {', '.join(c.__name__ for c in _GRAPHS)} have"
    if calibrations(network):  # found by looking up the label of each item
        return "network.linear: true has no graph here; train with network.linear=false"
    return None


def missing(target: Target) -> str | None:
    """A package that writing such a graph needs and that is not installed; None where all are."""
    return next((name for name in _NEEDED[target] if importlib.util.find_spec(name) is None), None)


class _Called(nn.Module):
    """A network as it is called from outside."""

    def __init__(self, network: nn.Module, conditional: bool):
        super().__init__()
        self.network, self.conditional = network, conditional

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        out: Tensor = self.network(x, label, condition if self.conditional else None)
        return out


def write(network: nn.Module, event_shape: tuple[int, ...], conditional: bool, folder: Path, target: Target) -> Path:
    """Write the graph of a network into a folder.

    Args:
        network: whose computation does not depend on the values that it is given.
        event_shape: of its events.
        conditional: whether it is told classes.
        folder: an existing one.
        target: the runtime.

    Returns:
        The file of the graph.
    """
    items = 2
    example = [torch.randn(items, *event_shape), torch.full((items,), 500.0)]
    if conditional:
        example.append(torch.zeros(items, dtype=torch.int64))
    batch, before = torch.export.Dim("n", min=1), logging.root.manager.disable
    path = folder / FILES["onnx"]
    logging.disable(logging.ERROR)  # it tells of libraries that are not there, and at length of what it cannot do
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Called(network, conditional).eval(),
                tuple(example),
                str(path),
                input_names=["x", "label", "condition"][: len(example)],
                output_names=["out"],
                dynamic_shapes=tuple({0: batch} for _ in example),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        logging.disable(before)
    if target == "onnx":
        return path
    import openvino

    # By way of ONNX, in which all operations of the networks here have a form.
    openvino.save_model(openvino.convert_model(path), folder / FILES["openvino"], compress_to_fp16=False)
    path.unlink()
    return folder / FILES["openvino"]


class Graph(nn.Module):
    """The graph of a network in OpenVINO, called as the network is; on the CPU, and without derivatives.

    Args:
        path: of the graph.
        threads: to compute with; torch's number if None.

    Attributes:
        source: the network that it is the graph of, for those who want its parameters.
    """

    def __init__(self, path: Path, source: nn.Module, threads: int | None = None):
        super().__init__()
        import openvino

        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            # Of a network in bf16 it is in the graph; the others are not to be computed in less than they ask for.
            "INFERENCE_PRECISION_HINT": "f32",
            # Bound to cores, the threads of two processes share the same ones, and each takes twice as long.
            "ENABLE_CPU_PINNING": False,
        }
        self.source = source
        self.compiled = openvino.Core().compile_model(path, "CPU", settings)
        self.names = [port.get_any_name() for port in self.compiled.inputs]

    def forward(self, x: Tensor, label: Tensor, condition: Tensor | None = None) -> Tensor:
        if (torch.is_grad_enabled() and x.requires_grad) or forward_ad.unpack_dual(x).tangent is not None:
            raise UserError("runtime: openvino has no derivatives; open the run with runtime=torch")
        if condition is None and "condition" in self.names:
            condition = torch.full((len(x),), -1)  # not told
        given = [x, label.float(), condition][: len(self.names)]
        arrays = [value.detach().cpu().contiguous().numpy() for value in given if value is not None]
        return torch.from_numpy(self.compiled(arrays)[0].copy()).to(x.dtype)


def overflows(network: nn.Module) -> bool:
    """Whether sums of a network's integers overflow on this processor: it has no VNNI, and weights are too large."""
    layers = [m for m in network.modules() if isinstance(m, IntegerLayer) and m.form.inputs == "static"]
    return "vnni" not in instructions() and any(m.form.weight_bits > SAFE_WEIGHT_BITS for m in layers)

"""What computes the networks of a run: torch, or OpenVINO from graphs that are kept with the run.

RUN/graphs/graphs.json     the weights that they are of
RUN/graphs/0/network.xml   of each network in the order in which the model holds them
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from osmose.errors import UserError
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.methods.base import GenerativeModel
from osmose.networks import graphs
from osmose.networks.experts import Experts
from osmose.networks.integers import IntegerLayer
from osmose.training import files
from osmose.training.signals import stopping_on_signal

Runtime = Literal["auto", "torch", "openvino"]


def networks_of(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The networks of all denoisers of a model, of experts each part: who holds it, by which name, and it."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for module in model.modules():
        if isinstance(module, NetworkDenoiser) and not isinstance(module.network, Experts):
            found.append((module, "network", module.network))
        if isinstance(module, Experts):
            found += [(module.parts, str(index), part) for index, part in enumerate(module.parts)]
    return found


def bare_networks(model: nn.Module) -> list[nn.Module]:
    """The networks alone."""
    return [network for _, _, network in networks_of(model)]


def computed_by_graphs(model: nn.Module) -> bool:
    """Whether OpenVINO computes its networks."""
    return any(isinstance(module, graphs.Graph) for module in model.modules())


def has_integers(model: nn.Module) -> bool:
    """Whether some of its layers have integer weights."""
    return any(isinstance(module, IntegerLayer) for module in model.modules())


def why_not(model: GenerativeModel, device: torch.device | str) -> str | None:
    """Why OpenVINO cannot compute a model here, in one line; None where it can."""
    networks = bare_networks(model)
    if torch.device(device).type != "cpu":
        return f"runtime: openvino computes on the CPU, and the device is {device}"
    if importlib.util.find_spec("openvino") is None:
        return "runtime: openvino is not installed; pip install 'osmose[export]'"
    if not networks:
        return f"runtime: {model.config.kind} has no network that openvino could compute"
    for network in networks:
        if why := graphs.without(network):
            return why
        if graphs.overflows(network):
            return (
                "runtime: this processor has no VNNI, without which sums of 8-bit weights overflow; quantize with "
                "--weight-bits 7"
            )
    return None


def write_graphs(model: GenerativeModel, folder: Path, sha256: str) -> None:
    """Write the graphs of a model's networks, of weights with a hash, in place of any that are there.

    Raises:
        UserError: a package is missing.
    """
    if name := graphs.missing("openvino"):
        raise UserError(f"runtime: openvino needs {name} to write graphs; pip install 'osmose[export]'")
    shutil.rmtree(folder, ignore_errors=True)
    with files.replacing(folder) as temporary:
        for index, network in enumerate(bare_networks(model)):
            place = temporary / str(index)
            place.mkdir(parents=True)
            with stopping_on_signal() as stopped:  # torch's exporter takes an interrupt for an error of the network
                graphs.write(network, model.spec.shape, model.config.conditional, place, "openvino")
            if stopped:
                raise KeyboardInterrupt
        files.write_json(temporary / "graphs.json", {"format": "osmose-graphs-1", "sha256": sha256})


def use_graphs(model: GenerativeModel, folder: Path) -> None:
    """Let OpenVINO compute the networks of a model from their graphs."""
    for index, (holder, name, network) in enumerate(networks_of(model)):
        setattr(holder, name, graphs.Graph(folder / str(index) / graphs.FILES["openvino"], network))


def graphs_are_of(folder: Path, sha256: str) -> bool:
    """Whether a folder has the graphs of weights with a hash."""
    path = folder / "graphs.json"
    return path.is_file() and files.read_json(path).get("sha256") == sha256


def chosen(
    model: GenerativeModel, folder: Path, sha256: Callable[[], str], device: torch.device | str, runtime: Runtime
) -> None:
    """Let a model be computed by a runtime.

    "auto" is torch, and OpenVINO for runs with integer layers whose graphs are there; where these cannot be computed
    here, torch computes what they would, in float32, and it is said why.

    Args:
        model: of a run, changed in place.
        folder: of graphs.
        sha256: of the run's weights.
        device: where it computes.
        runtime: what is asked for.

    Raises:
        UserError: OpenVINO is asked for, and cannot compute it here; the message says why.
    """
    if runtime == "torch" or (runtime == "auto" and not has_integers(model)):
        return
    why = why_not(model, device)
    if why is None and not graphs_are_of(folder, sha256()):
        if runtime == "auto":
            why = "runtime: the run has no graphs of its weights; runtime=openvino (--runtime openvino) writes them"
        else:
            write_graphs(model, folder, sha256())
    if why is None:
        use_graphs(model, folder)
    elif runtime == "openvino":
        raise UserError(why)
    else:
        warnings.warn(f"{why}; its integers are computed as float32 numbers, no faster", stacklevel=3)

"""How long an evaluation of a network takes in every runtime, beside each other in one process."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osmose.acceleration.quantization import quantize
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.networks import graphs
from osmose.networks.quantized import BF16
from osmose.studies.study import Results, Row
from osmose.studies.verdicts import mean_and_spread
from osmose.training.recipes import recipe
from osmose.training.run import Run
from osmose.training.runtime import bare_networks
from osmose.training.trainer import built

#: Networks whose speed is measured, on images of 32x32, with weights of chance.
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"network.channels": 64, "network.mult": [1, 2, 2], "network.blocks": 1, "network.attention": [8]},
    "dit": {"network": "dit", "network.width": 192, "network.depth": 8, "network.patch": 2},
}
RUNTIMES = ("torch fp32", "torch bf16", "torch.compile", "onnxruntime fp32", "onnxruntime int8", "openvino fp32",
            "openvino bf16", "openvino int8")  # fmt: skip
BATCHES = (1, 8)


def speeds(network: dict[str, Any], seed: int) -> list[Row]:
    """Milliseconds an image of one evaluation in every runtime, in turns, and how far each is from torch in fp32.

    Raises:
        UserError: a runtime is not installed.
    """
    for name in ("openvino", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"study quantize: needs {name}; install it with: pip install 'osmose[export]'")
    torch.manual_seed(seed)
    digits = DataConfig(source="digits", size=32)
    # Ranges are measured on noised data: what a network of chance draws is like nothing, however few the steps.
    config = recipe("edm", digits, digits.load(), seed, network | {"sampling.num_steps": 2})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run.create(folder / "run", config)
        model = built(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        run.write_weights(model.state_dict())
        made = quantize(run, folder / "int8", progress=False, items=8, with_graphs=False, calibration="forward")
        fp32, int8 = (bare_networks(other.model())[0] for other in (run, made))
        bf16 = BF16(copy.deepcopy(fp32)).eval()
        return _timed(fp32, int8, bf16, config.spec.shape, folder)


def _timed(fp32: nn.Module, int8: nn.Module, bf16: nn.Module, shape: tuple[int, ...], folder: Path) -> list[Row]:
    import onnxruntime

    def graph(network: nn.Module, target: graphs.Target) -> Path:
        place = folder / f"{target}-{len(list(folder.iterdir()))}"
        place.mkdir()
        return graphs.write(network, shape, False, place, target)

    def session(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        opened = onnxruntime.InferenceSession(graph(network, "onnx"), options)
        return lambda x, label: torch.from_numpy(opened.run(None, {"x": x.numpy(), "label": label.numpy()})[0])

    compiled = torch.compile(fp32, dynamic=False)  # for each number of items by itself
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch fp32": fp32,
        "torch bf16": bf16,
        "torch.compile": lambda x, label: compiled(x, label),
        "onnxruntime fp32": session(fp32),
        "onnxruntime int8": session(int8),
        **{
            f"openvino {kind}": graphs.Graph(graph(network, "openvino"), network)
            for kind, network in (("fp32", fp32), ("bf16", bf16), ("int8", int8))
        },
    }
    rows = []
    with torch.inference_mode():
        for items in BATCHES:
            x = torch.randn(items, *shape, generator=torch.Generator().manual_seed(0))
            label = torch.zeros(items)  # of sigma = 1
            outs = {name: call(x, label) for name, call in calls.items()}  # the first is not timed
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(5):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call(x, label)
                    times[name].append(time.perf_counter() - start)
            right = outs["torch fp32"]
            for name in RUNTIMES:
                error = float((outs[name] - right).norm() / right.norm())
                ms = 1e3 * statistics.median(times[name]) / items
                rows.append(Row({"runtime": name, "items": items}, {"ms": ms, "error": error}))
    return rows


def speed_table(results: Results, cell: str) -> list[dict[str, str]]:
    """A row for each runtime, from the rows of a cell that `speeds` measured."""
    rows = []
    for runtime in RUNTIMES:
        row = {"runtime": runtime}
        for batch in BATCHES:
            ms = results.values(cell, "ms", runtime=runtime, items=batch)
            slow = results.values(cell, "ms", runtime=RUNTIMES[0], items=batch)
            row[f"{batch} at a time"] = f"{mean_and_spread(ms)} ({(slow / ms).mean():.2f}x)"
        row["relative error"] = f"{results.values(cell, 'error', runtime=runtime, items=BATCHES[-1]).mean():.1e}"
        rows.append(row)
    return rows

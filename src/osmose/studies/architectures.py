"""`osmose study architectures`: six UNets of one family, counted at full size and trained small."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from osmose.analysis.cost import macs_of, num_parameters
from osmose.data.dataset import DataSpec
from osmose.gaussian.draws import StepDraws
from osmose.methods.base import GenerativeModel
from osmose.methods.diffusion import DDPMConfig
from osmose.methods.messages import Batch
from osmose.studies.measures import at_equal_time, step_seconds
from osmose.studies.plots import draw, log_scale, panels
from osmose.studies.study import Cell, Claim, Results, Row, Study, Trained
from osmose.studies.verdicts import Finding, all_of, lower, mean_and_spread, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Trainable parameters, the published "M" (2^20, frozen table of 1000 sinusoids included) and speed, and what a small
#: sibling has instead of ddpm-cifar10's blocks and width; `level` is whether it keeps the lowest level.
NETWORKS: dict[str, tuple[int, float, float, dict[str, Any], bool]] = {
    "ddpm-cifar10": (35_746_307, 34.21, 1.00, {}, True),
    "deepres1": (24_275_587, 23.27, 1.50, {"network.blocks": 1}, True),
    "shallowres2": (25_838_595, 24.76, 1.15, {}, False),
    "shallowres1": (17_714_563, 17.02, 1.74, {"network.blocks": 1}, False),
    "mbconv64": (12_001_859, 11.51, 1.23, {"network.block": "mbconv", "network.channels": 8}, True),
    "mbconv96": (26_831_715, 25.68, 0.77, {"network.block": "mbconv", "network.channels": 12}, True),
}
_CIFAR10 = DataSpec(kind="image", shape=(3, 32, 32), range=(0, 255), levels=256, shift=(127.5,), scale=(127.5,))


class Architectures(Study):
    """Six UNets for images of 32x32: fewer blocks, fewer levels, MBConv blocks with squeeze and excitation.

    *Full size*: parameters, multiply-adds of one evaluation of one image (as computed here; the transposed convolution
    of the upsampling needs fewer than papers count), training steps of two images on one core, and the memory that one
    more image keeps for the backward pass. *Small siblings*, with an eighth of the channels, are trained at a
    constant learning rate; `loss` is the held-out L_simple of the averaged weights. "At equal time" is the loss when
    the quickest sibling has finished, by the CPU time of a step measured in turns, interpolated between validations.

    Fashion-MNIST has levels of 28, 14 and 7 pixels and digits of 8, 4 and 2; the siblings of the two shallow nets lack
    the last. Attention is at 14 and at 4 pixels. The published FIDs (4.1 to 6.4 on CIFAR-10) are beyond such a budget.
    """

    title = "Architectures: parameters, multiply-adds, speed, and the loss at equal steps and at equal time"
    source = "six variants of DDPM's UNet on CIFAR-10: 34.21, 23.27, 24.76, 17.02, 11.51 and 25.68 M parameters"

    def _plans(self) -> dict[str, dict[str, Any]]:
        base: dict[str, Any] = {
            "network": "unet",
            "network.channels": 16,
            "network.blocks": 2,
            "training.decay": "none",
        }
        if self.quick:
            tiny = {"network.channels": 8, "training.steps": 6, "training.batch_size": 8, "training.validate_every": 2}
            return {"digits": base | tiny | {"network.attention": [4], "training.validation_items": 16}}
        digits: dict[str, Any] = {"network.attention": [4], "training.batch_size": 64, "training.steps": 240}
        fashion: dict[str, Any] = {"network.attention": [14], "training.batch_size": 32, "training.steps": 90}
        plans = {"digits": base | digits, "fashion-mnist": base | fashion}
        return {name: plan | {"training.validate_every": plan["training.steps"] // 15} for name, plan in plans.items()}

    def _changes(self, data: str, name: str) -> dict[str, Any]:
        *_, own, level = NETWORKS[name]
        changes: dict[str, Any] = self._plans()[data] | {"network.mult": [1, 2, 2] if level else [1, 2]} | own
        return changes

    def cells(self) -> list[Cell]:
        rounds = 1 if self.quick else 2
        settings = {"rounds": rounds, "items": 1 if self.quick else 2}
        cells = [Cell("full-size", None, "digits", {}, settings, "the six networks by name, for 3x32x32")]
        for data in self._plans():
            cells += [Cell(f"{data}-{name}", "ddpm", data, self._changes(data, name)) for name in NETWORKS]
            note = "CPU time of a step under the configurations of this data set"
            cells.append(Cell(f"{data}-time", None, data, {}, {"steps": 1 if self.quick else 4}, note))
        return cells

    def measure(self, trained: Trained) -> list[Row]:
        cell = trained.cell
        if cell.name == "full-size":
            return _full_size(**cell.settings)
        if cell.method is None:
            data = str(cell.data)
            changes = {name: self._changes(data, name) for name in NETWORKS}
            seconds = step_seconds("ddpm", data, trained.dataset, changes, steps=cell.settings["steps"])
            return [Row({"network": name}, {"milliseconds": 1e3 * value}) for name, value in seconds.items()]
        lines = [line for line in trained.run.metrics() if "validation_loss" in line]
        return [Row({"steps": line["step"]}, {"loss": line["validation_loss"]}) for line in lines]

    def claims(self) -> list[Claim]:
        def full(results: Results, name: str, metric: str) -> np.ndarray:
            return results.values("full-size", metric, network=name)

        def counts(results: Results) -> Finding:
            return all_of(*(within(full(results, name, "parameters")[0], n, n) for name, (n, *_) in NETWORKS.items()))

        def printed(results: Results) -> Finding:
            claimed = {name: million for name, (_, million, *_) in NETWORKS.items()}
            found = {name: full(results, name, "published_unit")[0] for name in NETWORKS}
            return all_of(*(within(found[name], claimed[name] - 0.005, claimed[name] + 0.005) for name in NETWORKS))

        def speeds(results: Results, a: str, b: str) -> Finding:
            return lower(full(results, a, "images_per_second"), full(results, b, "images_per_second"))

        def half(results: Results) -> Finding:
            macs = [full(results, name, "macs")[0] for name in ("mbconv96", "ddpm-cifar10")]
            return within(macs[0] / macs[1], 0.4, 0.6)

        at = ["full-size"]
        claims = [
            Claim("the six have the published numbers of parameters, one by one", at, counts),
            Claim("the published M is 2^20 with the frozen table of sinusoids counted", at, printed),
            Claim("mbconv96 has about half the multiply-adds of ddpm-cifar10 (0.4 to 0.6)", at, half),
            Claim(
                "mbconv96 is slower than ddpm-cifar10 (published: 0.77 times the speed)",
                at,
                lambda r: speeds(r, "mbconv96", "ddpm-cifar10"),
            ),
            Claim(
                "mbconv64 is faster than ddpm-cifar10 (published: 1.23 times)",
                at,
                lambda r: speeds(r, "ddpm-cifar10", "mbconv64"),
            ),
        ]
        return claims + [claim for data in self._plans() for claim in self._quality(data)]

    def _quality(self, data: str) -> list[Claim]:
        def less(text: str, a: str, b: str) -> list[Claim]:
            cells = [f"{data}-{a}", f"{data}-{b}"]

            def at_equal_steps(results: Results) -> Finding:
                return lower(self._losses(results, data, a)[1][-1], self._losses(results, data, b)[1][-1])

            def at_equal_time(results: Results) -> Finding:
                return lower(self._at_equal_time(results, data, a), self._at_equal_time(results, data, b))

            return [
                Claim(f"{data}: {text}, at equal steps", cells, at_equal_steps),
                Claim(f"{data}: {text}, at equal time", [*cells, f"{data}-time"], at_equal_time),
            ]

        return [
            *less("two blocks a level reach a lower loss than one (FID 4.93, 5.90)", "ddpm-cifar10", "deepres1"),
            *less(
                "the net without the lowest level reaches a lower loss (FID 4.56, 4.93)", "shallowres2", "ddpm-cifar10"
            ),
            *less("mbconv96 reaches a lower loss than ddpm-cifar10 (FID 4.10, 4.93)", "mbconv96", "ddpm-cifar10"),
        ]

    def _losses(self, results: Results, data: str, name: str) -> tuple[list[float], list[np.ndarray]]:
        """Steps of the validations, and the losses of all seeds at each."""
        groups = results.groups(f"{data}-{name}")
        return [float(labels["steps"]) for labels, _ in groups], [values["loss"] for _, values in groups]

    def _milliseconds(self, results: Results, data: str, name: str) -> float:
        return float(results.values(f"{data}-time", "milliseconds", network=name).mean())

    def _at_equal_time(self, results: Results, data: str, name: str) -> np.ndarray:
        steps, losses = self._losses(results, data, name)
        quickest = min(self._milliseconds(results, data, other) for other in NETWORKS)
        reached = steps[-1] * quickest / self._milliseconds(results, data, name)
        return at_equal_time(steps, losses, reached)

    def tables(self, results: Results) -> dict[str, list[dict[str, str]]]:
        full = []
        for labels, values in results.groups("full-size"):
            *_, speed, _, _ = NETWORKS[str(labels["network"])]
            relative = values["images_per_second"] / results.groups("full-size")[0][1]["images_per_second"]
            full.append(
                {
                    "network": str(labels["network"]),
                    "parameters": f"{values['parameters'][0]:,.0f}",
                    "in 10^6": f"{values['parameters'][0] / 1e6:.2f}",
                    "as published (2^20, with table)": f"{values['published_unit'][0]:.2f}",
                    "multiply-adds, 10^9": f"{values['macs'][0] / 1e9:.2f}",
                    "images/s, training": mean_and_spread(values["images_per_second"]),
                    "relative speed": mean_and_spread(relative),
                    "published": f"{speed:.2f}",
                    "activations, MiB per image": f"{values['activation_mib'][0]:.1f}",
                }
            )
        tables = {"Full size, 3x32x32": full}
        for data in self._plans():
            tables[f"Small siblings on {data}"] = [
                {
                    "sibling of": name,
                    "ms per step": mean_and_spread(results.values(f"{data}-time", "milliseconds", network=name)),
                    "loss at equal steps": mean_and_spread(self._losses(results, data, name)[1][-1]),
                    "loss at equal time": mean_and_spread(self._at_equal_time(results, data, name)),
                }
                for name in NETWORKS
            ]
        return tables

    def figures(self, results: Results) -> dict[str, Figure]:
        figures = {}
        for data in self._plans():
            figure, (by_step, by_time) = panels(2)
            for name in NETWORKS:
                steps, losses = self._losses(results, data, name)
                draw(by_step, steps, losses, name, marker=".")
                seconds = self._milliseconds(results, data, name) / 1e3
                draw(by_time, [step * seconds for step in steps], losses, name, marker=".")
            by_step.set(title=f"{data}: equal steps", xlabel="training steps", ylabel="held-out L_simple")
            by_time.set(title=f"{data}: equal time", xlabel="CPU seconds, one core", ylabel="held-out L_simple")
            for axes in (by_step, by_time):
                log_scale(axes)
            by_step.legend(fontsize=7)
            figures[f"{data}-loss"] = figure
        return figures


def _full_size(rounds: int, items: int) -> list[Row]:
    """Counts, and training steps taken in turns so that all networks see the same machine."""
    models = {name: DDPMConfig(network=name).build(_CIFAR10) for name in NETWORKS}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    kept = {name: _kept(model, 2) - _kept(model, 1) for name, model in models.items()}  # of one more image
    for _ in range(rounds):
        for name, model in models.items():
            start = time.process_time()
            _learn(model, items)
            seconds[name].append(time.process_time() - start)
    rows = []
    for name, model in models.items():
        parameters = num_parameters(model)
        table = 1000 * getattr(model.config.network, "channels", 0)
        values = {
            "parameters": float(parameters),
            "published_unit": (parameters + table) / 2**20,
            "macs": float(macs_of(model)),
            "images_per_second": items / min(seconds[name]),
            "activation_mib": kept[name] / 2**20,
        }
        rows.append(Row({"network": name}, values))
    return rows


def _loss(model: GenerativeModel, items: int) -> Tensor:
    """The loss of some images of chance."""
    x0 = torch.rand(items, *model.spec.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return model.train().loss(Batch(x0), StepDraws(0, 0, 0, items, items)).per_item.mean()


def _learn(model: GenerativeModel, items: int) -> None:
    """A training step without the optimiser's."""
    _loss(model, items).backward()
    model.zero_grad()


def _kept(model: GenerativeModel, items: int) -> int:
    """Bytes that the forward pass of some images keeps for the backward pass, weights not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(model, items)
    return sum(kept.values())

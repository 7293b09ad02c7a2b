"""From a run to one that computes in fewer bits: after training, with further training, and with precision by step.

    RUN2/quantization.json     what was asked for, and what was found: layers, their errors, steps in high precision
    RUN2/training/             of quantisation-aware training: the run whose rounded weights are trained
    RUN2/samples/beside.png    samples of the run above those of RUN2, from the same noise
    RUN2/graphs/               what OpenVINO computes, where it is installed (`training.runtime`)
    RUN2/config.json           last: a run like any other, whose network is "quantized" or "bf16", or experts of both
    RUN2/model.safetensors     with int8 weights, or bf16

Layers with integer weights are chosen by what they see (`acceleration.ranges`): inputs of those that see x are rounded
on ranges that calibration has measured, those of time and class are left as they are, and so are the first and the last
layer. In training, rounding is straight through, and the run itself teaches besides the data (arXiv 2311.16133):

    loss = || f_q(x_t) - target ||^2 + distillation || f_q(x_t) - f(x_t) ||^2,   of the run's own objective and times.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osmose.acceleration.precision import deviation, drawn, intervals, labels_of, search
from osmose.acceleration.quantization_plan import KINDS, QuantizationConfig, leaves, rewritten
from osmose.acceleration.ranges import (
    LayerError,
    chosen_layers,
    correct_biases,
    inner,
    layer_errors,
    observe,
    parts_of,
    run_through,
)
from osmose.acceleration.tutoring import Tutored, denoisers
from osmose.configuration import ConfigError
from osmose.data.dataset import Dataset
from osmose.data.pictures import beside, has_picture
from osmose.errors import UserError
from osmose.gaussian.draws import mix
from osmose.methods.base import GenerativeModel, MethodConfig
from osmose.methods.diffusion import Diffusion
from osmose.networks import graphs
from osmose.networks.base import NetworkConfig
from osmose.networks.experts import ExpertsConfig
from osmose.networks.integers import Inputs, RoundedLayer
from osmose.networks.processor import instructions
from osmose.networks.quantized import BF16Config, QuantizedConfig, fill, in_fewer_bits, to_integers
from osmose.training import files
from osmose.training.config import RunConfig
from osmose.training.progress import Progress, sampling_bar
from osmose.training.run import Run, data_of, require_free, versions
from osmose.training.runtime import bare_networks, why_not, write_graphs
from osmose.training.trainer import Trainer

#: Samples that are compared with the run's own.
_COMPARED = 64


class Quantization:
    """The quantisation of a run, in its folder.

    Attributes:
        folder: of the run that is made.
        source: the run.
        config: what is asked for.
    """

    def __init__(self, folder: Path, source: Run, config: QuantizationConfig):
        self.folder, self.source, self.config = folder, source, config

    @classmethod
    def begin(cls, folder: Path | str, source: Run, config: QuantizationConfig) -> Quantization:
        """Make a new folder, with what is asked for.

        Raises:
            UserError: something is there already; a run that cannot be quantised, or not so.
        """
        folder = Path(folder)
        require_free(folder)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("quantize: several processes were launched; one does it")
        if config.weight_bits is None and config.to == "int8":
            config = config.replace(weight_bits=8 if "vnni" in instructions() else graphs.SAFE_WEIGHT_BITS)
        made = cls(folder, source, config)
        made._check()
        files.write_json(folder / "quantization.json", made._told())
        return made

    @classmethod
    def open(cls, folder: Path | str, source: Run) -> Quantization:
        """Take up what is in a folder.

        Raises:
            UserError: nothing was begun there, or another run was.
        """
        path = Path(folder) / "quantization.json"
        if not path.is_file():
            raise UserError(f"{folder}: no quantization was begun here (it has no quantization.json)")
        try:
            values = files.read_json(path)
            made, parent = cls(Path(folder), source, QuantizationConfig.parse(values["config"])), values["parent"]
        except (ConfigError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not written by osmose ({error})") from None
        if parent["sha256"] != source.hash():
            raise UserError(f"{folder}: is made from another run, {parent['folder']!r}, than {source.folder}")
        files.sweep(made.folder)
        return made

    def _told(self, **more: Any) -> dict[str, Any]:
        """What quantization.json says."""
        return {"config": self.config.to_json(), "parent": self.source.as_parent().to_json(), **more}

    @property
    def finished(self) -> bool:
        """Whether the run that is made is whole."""
        return (self.folder / "config.json").is_file()

    def found(self) -> dict[str, Any]:
        """quantization.json."""
        values: dict[str, Any] = files.read_json(self.folder / "quantization.json")
        return values

    def _check(self) -> None:
        """Refuse what cannot be done, before anything is written."""
        method, config = self.source.config.method, self.config
        if method.kind not in KINDS or method.network_config is None:
            raise UserError(f"RUN: a run of {method.kind} cannot be quantized; those of {', '.join(KINDS)} can")
        if in_fewer_bits(method.network_config):
            raise UserError(f"RUN: {self.source.folder} is quantized already")
        model = self.source.model()
        for network in bare_networks(model):
            if (why := graphs.without(network)) is not None:
                raise UserError(why)
        if config.mixed and isinstance(method.network_config, ExpertsConfig):
            raise UserError("ends: experts share the steps among themselves already; quantize them all alike")
        if config.tuning is not None and not isinstance(model, Diffusion):
            raise UserError(f"tuning: {method.kind} has no training to go on with; runs of ddpm, iddpm and edm have")
        if config.calibration != "sampler" and not isinstance(model, Diffusion):
            raise UserError(f"calibration: {config.calibration!r} is for runs of ddpm, iddpm and edm; use sampler")
        if config.to == "int8":
            for wrapped in self._layers(model):  # refuses names of layers that there are not
                wrapped.build(model.spec.shape)
        if config.ends is not None or config.at:
            self._named(labels_of(model))

    def _named(self, labels: list[float]) -> list[float]:
        """The labels of the steps that are said to be in high precision.

        Raises:
            UserError: steps that the chain does not have.
        """
        config, steps = self.config, len(labels)
        if config.ends is not None:
            if 2 * config.ends > steps:
                raise UserError(f"ends: {config.ends} steps at each end are more than the {steps} steps of the chain")
            return [*labels[: config.ends], *labels[steps - config.ends :]]
        for step in config.at:
            if not 1 <= step <= steps:
                raise UserError(f"at: there is no step {step}; they are 1 to {steps}")
        return [labels[step - 1] for step in sorted(set(config.at))]

    def carry_out(self, dataset: Dataset | None = None, progress: bool = True, with_graphs: bool = True) -> bool:
        """Do what is asked for.

        Args:
            dataset: the data, where training or calibration needs them.
            progress: show progress bars.
            with_graphs: write what OpenVINO computes; it may be written later (`Run.model(runtime="openvino")`).

        Returns:
            False when a signal asked training to stop before the end (the state is then saved).

        Raises:
            DivergedError: the loss of training is not finite.
            UserError: what is refused; a full disk.
        """
        if self.finished:
            return True
        real, method = self.source.model(), self.source.config.method
        if self.config.to == "bf16":
            half = rewritten(method, lambda _, network: BF16Config(network=network))
            self._write(half, real, real, {}, with_graphs)
            return True
        wrapped = self._layers(real)
        rounded = self._with(wrapped, "rounded")
        self._calibrate(real, rounded, dataset, progress)
        if self.config.tuning is not None:
            assert dataset is not None
            if not self._tuned(rounded, real, wrapped, dataset, progress):
                return False
        errors = self._errors(real, rounded, dataset, progress)
        whole = self._with(wrapped, "integers")
        for one, other in zip(bare_networks(rounded), bare_networks(whole), strict=True):
            to_integers(one, other)
        more: dict[str, Any] = {"layers": self._of_layers(rounded, errors)}
        config = rewritten(method, lambda index, _: wrapped[index])
        if self.config.mixed:
            edges, owners = self._high(real, whole, more, progress)

            def both(index: int, network: NetworkConfig) -> NetworkConfig:
                better = network if self.config.high == "fp32" else BF16Config(network=network)
                if set(owners) != {0, 1}:
                    return better if owners[0] == 0 else wrapped[index]
                return ExpertsConfig(parts=(better, wrapped[index]), edges=edges, owners=owners)

            config = rewritten(method, both)
        self._write(config, real, whole, more, with_graphs)
        return True

    def _layers(self, model: GenerativeModel) -> list[QuantizedConfig]:
        """Each network as a quantised one."""
        config, found = self.config, []
        inner_configs = leaves(self.source.config.method)
        for index, network in enumerate(bare_networks(model)):
            sees = inner(network, model.spec.shape, model.device)
            inputs: Inputs = config.inputs
            layers = chosen_layers(sees, inputs, config.keep)
            joined = parts_of(network) if config.split else {}
            parts = {name: own for name, own in joined.items() if name in layers}
            values = {"layers": layers, "parts": parts, "bits": config.bits, "weight_bits": config.weight_bits}
            # All students of a distillation have one network: their layers are alike.
            own = inner_configs[min(index, len(inner_configs) - 1)]
            found.append(QuantizedConfig.parse({"network": own.to_json(), **values}))
        return found

    def _with(self, wrapped: list[QuantizedConfig], form: str) -> GenerativeModel:
        """The run's model with quantised networks, and its weights where they have the same place."""
        method = rewritten(self.source.config.method, lambda index, _: wrapped[index].replace(form=form))
        with torch.random.fork_rng(devices=[]):
            model = method.build(self.source.config.spec)
        if form == "rounded":
            model.load_state_dict(files.read_tensors(self.source.weights), strict=False)
        return model.eval()

    def _run(self, real: GenerativeModel, dataset: Dataset | None, items: int, label: str, show: bool) -> None:
        """Let a model's networks meet what calibration is to see."""
        with sampling_bar(label, show) as on_step:
            run_through(real, self.config.calibration, items, self.config.seed, dataset, on_step)

    def _calibrate(self, real: GenerativeModel, rounded: GenerativeModel, dataset: Dataset | None, show: bool) -> None:
        """Measure ranges, round weights and correct biases."""
        networks, forms = bare_networks(real), [_rounded_layers(network) for network in bare_networks(rounded)]
        for form in forms:
            for layer in form.values():
                layer.shrink_weights()
        if self.config.inputs == "static":
            observe(networks, forms, lambda: self._run(real, dataset, self.config.items, "measuring ranges", show))
        correct_biases(forms, self._errors(real, rounded, dataset, show))

    def _errors(
        self, real: GenerativeModel, rounded: GenerativeModel, dataset: Dataset | None, show: bool
    ) -> list[dict[str, LayerError]]:
        """The errors of each network's rounded layers."""
        networks, forms = bare_networks(real), [_rounded_layers(network) for network in bare_networks(rounded)]
        few = max(1, self.config.items // 4)
        return layer_errors(networks, forms, lambda: self._run(real, dataset, few, "measuring errors", show))

    @staticmethod
    def _of_layers(rounded: GenerativeModel, found: list[dict[str, LayerError]]) -> list[dict[str, Any]]:
        """What quantization.json says of each layer."""
        lines = []
        for index, (network, errors) in enumerate(zip(bare_networks(rounded), found, strict=True)):
            layers = _rounded_layers(network)
            for name, error in errors.items():
                layer = layers[name]
                line = {"network": index, "name": name, "inputs": layer.form.inputs, "error": error.relative}
                if layer.form.inputs == "static":
                    line |= {"scale": layer.scale.tolist(), "zero": layer.zero.tolist()}
                lines.append(line)
        return lines

    def _tuned(
        self,
        rounded: GenerativeModel,
        real: GenerativeModel,
        wrapped: list[QuantizedConfig],
        dataset: Dataset,
        progress: bool,
    ) -> bool:
        """Train rounded weights, and leave the averaged ones in the model; False when a signal asked to stop."""
        tuning = self.config.tuning
        assert tuning is not None
        method = rewritten(self.source.config.method, lambda index, _: wrapped[index].replace(form="rounded"))
        changes: dict[str, Any] = {"steps": tuning.steps, "lr": tuning.lr, "warmup": tuning.steps // 20}
        changes |= {"ema": round(max(0.9, 1 - 10 / tuning.steps), 6), "decay": "linear", "accumulate": 1}
        # In float32: rounding of what bf16 has rounded before is not what the integers do.
        changes |= {
            "compile": False,
            "precision": "fp32",
            "validate_every": max(10, tuning.steps // 6),
            "preview_samples": 0,
        }
        changes |= {"checkpoint_every": max(25, tuning.steps // 6), "optimizer": {"kind": "adam"}}
        if tuning.batch_size is not None:
            changes["batch_size"] = tuning.batch_size
        origin = self.source.config
        made = {"method": method.to_json(), "parent": self.source.as_parent().to_json(), "seed": self.config.seed}
        made["training"] = origin.training.to_json() | changes
        folder = self.folder / "training"
        if (folder / "config.json").is_file():
            run = Run.open(folder)
        else:
            run = Run.create(folder, RunConfig.parse(origin.to_json() | made))
        lesson = Tutored(rounded, real, tuning.distillation)
        trainer = Trainer(run, dataset, model=rounded, lesson=lesson, progress=Progress(progress, "rounded weights"))
        if trainer.step == 0:
            trainer.save()  # ranges were measured: they are not in the configuration
        if not trainer.fit():
            return False
        lesson.end()
        rounded.load_state_dict(files.read_tensors(run.weights))
        rounded.cpu().eval()
        real.cpu()  # it may have followed the trainer to another device
        return True

    def _high(
        self, real: GenerativeModel, whole: GenerativeModel, more: dict[str, Any], progress: bool
    ) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Intervals of labels and who answers there: the network in high precision, or that of integers."""
        config, labels = self.config, labels_of(real)
        if config.budget is None:
            high = self._named(labels)
        else:
            items, seed = max(32, config.items // 2), mix(config.seed, "precision")
            better, right = real, drawn(real, items, seed)
            if config.high == "bf16":
                better = rewritten(
                    self.source.config.method, lambda _, network: BF16Config(network=network)
                ).build(self.source.config.spec)  # fmt: skip
                _put_together(better.eval(), real, real)
            low = bare_networks(whole)
            with sampling_bar("steps that need precision", progress) as on_step:
                found = search(better, low, config.budget, right=right, items=items, seed=seed, on_step=on_step)
            more["precision"] = found.to_json()
            high = list(found.high)
        more["steps"] = {"of": len(labels), "high": len(high), "precision": config.high}
        return intervals(labels, high)

    def _write(
        self,
        method: MethodConfig,
        real: GenerativeModel,
        whole: GenerativeModel,
        more: dict[str, Any],
        with_graphs: bool,
    ) -> None:
        """Put the run together; config.json, which makes it one, comes last."""
        with torch.random.fork_rng(devices=[]):
            model = method.build(self.source.config.spec).eval()
        _put_together(model, real, whole)
        more |= self._compared(real, model)
        config: RunConfig = RunConfig.parse(
            self.source.config.to_json()
            | {"method": method.to_json(), "parent": self.source.as_parent().to_json(), "versions": versions()}
        )
        run = Run(self.folder, config)
        run.write_weights({name: value.contiguous() for name, value in model.state_dict().items()})
        kept = self.folder / "training"
        log = Run(kept, config).metrics() if kept.is_dir() else []
        lines = "".join(json.dumps(line) + "\n" for line in log)
        files.write_bytes(self.folder / "metrics.jsonl", lines.encode())
        package = graphs.missing("openvino")
        why = why_not(model, "cpu") if package is None else f"{package} is not installed; pip install 'osmose[export]'"
        if why is None and not with_graphs:
            why = "graphs were not asked for"
        if why is None:
            write_graphs(model, self.folder / "graphs", run.hash())
        more |= {"computed_by": "openvino"} if why is None else {"computed_by": "torch", "why_torch": why}
        more["bytes"] = {"before": self.source.weights.stat().st_size, "after": run.weights.stat().st_size}
        files.write_json(self.folder / "quantization.json", self._told(**more))
        files.write_json(self.folder / "config.json", config.to_json())

    def _compared(self, real: GenerativeModel, model: GenerativeModel) -> dict[str, Any]:
        """Samples of both from the same noise: how far they are apart, and a picture.

        Raises:
            UserError: samples that are not finite.
        """
        right, samples = (drawn(own, _COMPARED, self.config.seed) for own in (real, model))
        if not bool(samples.isfinite().all()):
            raise UserError(f"RUN: {self.source.folder}: its samples in fewer bits are not finite; take more bits")
        spec = real.spec
        if spec.kind == "image" and has_picture(spec):
            with files.replacing(self.folder / "samples" / "beside.png") as temporary:
                beside(spec.decode(right[:32]), spec.decode(samples[:32]), spec).save(temporary, format="png")
        return {"deviation": deviation(samples, right), "samples": _COMPARED}


def quantize(
    run: Run | Path | str,
    out: Path | str,
    *,
    root: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    with_graphs: bool = True,
    **options: Any,
) -> Run:
    """Quantise a run.

    Args:
        run: the run, of ddpm, iddpm, edm, a consistency model or a distilled one.
        out: the folder to make, or with `resume` the one to go on with.
        root: where the data lie, if not where the run found them.
        resume: go on with an interrupted one, by its own settings.
        progress: show progress bars.
        with_graphs: write what OpenVINO computes, where it is installed.
        **options: fields of `QuantizationConfig`.

    Raises:
        UserError: what is refused; nothing has been written then.
        DivergedError: training diverged.
    """
    source = run if isinstance(run, Run) else Run.open(run)
    if resume:
        made = Quantization.open(out, source)
        dataset = data_of(source, root) if made.config.needs_data else None
    else:
        config = QuantizationConfig.parse(options)
        dataset = data_of(source, root) if config.needs_data else None
        made = Quantization.begin(out, source, config)
    if not made.carry_out(dataset, progress, with_graphs):
        raise KeyboardInterrupt
    return Run.open(out)


def _rounded_layers(network: nn.Module) -> dict[str, RoundedLayer]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, RoundedLayer)}


@torch.no_grad()
def _put_together(model: GenerativeModel, real: GenerativeModel, whole: GenerativeModel) -> None:
    """Give a model the weights of the networks that it is made of, and all else that a run's model has."""
    own = model.state_dict()
    for name, value in real.state_dict().items():  # all that is no network's
        if name in own and own[name].shape == value.shape and own[name].dtype == value.dtype:
            own[name].copy_(value)
    for target, one, other in zip(denoisers(model), denoisers(real), denoisers(whole), strict=True):
        fill(target.network, one.network, other.network)

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
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from osmose.acceleration.precision import Precision, deviation, intervals, labels_of, search
from osmose.acceleration.ranges import (
    LayerError,
    Source,
    chosen_layers,
    correct_bias,
    inner,
    observe,
    parts_of,
    run_through,
)
from osmose.configuration import Config, ConfigError
from osmose.data.dataset import Dataset
from osmose.data.pictures import has_picture, image_grid
from osmose.errors import UserError
from osmose.gaussian.denoiser import NetworkDenoiser
from osmose.gaussian.draws import Draws, mix
from osmose.methods.base import GenerativeModel, MethodConfig
from osmose.methods.diffusion import Diffusion
from osmose.methods.messages import Batch, LossTerms
from osmose.networks import graphs
from osmose.networks.base import NetworkConfig
from osmose.networks.experts import Experts, ExpertsConfig
from osmose.networks.integers import Inputs, IntegerLayer, RoundedLayer
from osmose.networks.quantized import BF16, BF16Config, QuantizedConfig, in_fewer_bits
from osmose.training import files
from osmose.training.config import RunConfig
from osmose.training.progress import Progress, sampling_bar
from osmose.training.run import Run, data_of, require_free, versions
from osmose.training.runtime import networks_of, why_not, write_graphs
from osmose.training.trainer import Trainer

#: Samples that are compared with the run's own.
_COMPARED = 64


class Tuning(Config):
    """Training of rounded weights."""

    steps: int = Field(300, ge=1, description="optimisation steps")
    lr: float = Field(1e-4, gt=0, description="learning rate after warm-up")
    batch_size: int | None = Field(None, ge=1, description="items per step; as the run's if null")
    distillation: float = Field(1.0, ge=0, description="weight of the distance to the run's own answers")


class QuantizationConfig(Config):
    """What is asked for."""

    format: Literal["osmose-quantization-1"] = "osmose-quantization-1"
    to: Literal["int8", "bf16"] = Field("int8", description="what weights and activations become")
    inputs: Literal["static", "dynamic"] = Field(
        "static", description="ranges of layers' inputs: measured by calibration, or of each item as it comes"
    )
    bits: int = Field(8, ge=2, le=8, description="of inputs")
    weight_bits: int | None = Field(
        None, ge=2, le=8, description="of weights; null: 8, or 7 where the processor has no VNNI"
    )
    calibration: Source = Field(
        "sampler", description="inputs that ranges are measured on: the sampler's own, or forward, noise, data"
    )
    items: int = Field(64, ge=1, description="samples that ranges are measured on")
    keep: tuple[str, ...] = Field((), description="patterns of layers that are left as they are")
    split: bool = Field(True, description="scales of their own for parts that a layer's input is joined from")
    tuning: Tuning | None = Field(None, description="quantisation-aware training; null: none")
    high: Literal["fp32", "bf16"] = Field("fp32", description="precision of the steps that need more")
    ends: int | None = Field(None, ge=0, description="steps in high precision at each end of the chain; null: none")
    budget: float | None = Field(
        None, gt=0, description="largest deviation of samples, by which steps in high precision are found; null: none"
    )
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _coherent(self) -> QuantizationConfig:
        if self.ends is not None and self.budget is not None:
            raise ConfigError("budget", "given, and ends too: steps in high precision are named or found, not both")
        if self.to == "bf16":
            defaults = type(self)()
            for name in ("inputs", "bits", "weight_bits", "calibration", "keep", "split", "tuning", "ends", "budget"):
                if getattr(self, name) != getattr(defaults, name):
                    raise ConfigError(name, "given, and is of int8: in bf16 a network is computed as it is")
        return self


class Tutored(nn.Module):
    """A model in training, with the answers of its own networks in real numbers: what the trainer calls.

    Args:
        model: whose networks are trained.
        networks: the same in real numbers, in the same order; they are not trained.
        weight: of the distance to their answers.
    """

    def __init__(self, model: GenerativeModel, networks: list[nn.Module], weight: float):
        super().__init__()
        self.model, self.weight = model, weight
        self._teachers = (networks,)  # in a tuple, so that they are no part of what is trained
        self._errors: list[Tensor] = []
        for (_, _, network), teacher in zip(networks_of(model), networks, strict=True):
            network.register_forward_hook(self._compared(teacher))

    def _compared(self, teacher: nn.Module) -> Callable[..., None]:
        def hook(network: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            if not (self.training and network.training and torch.is_grad_enabled()):
                return
            with torch.no_grad():
                right = teacher.to(out.device)(*given)
            self._errors.append((out - right).square().flatten(1).mean(1))

        return hook

    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        """The model's loss, and the distance to the answers in real numbers."""
        self._errors.clear()
        terms: LossTerms = self.model(batch, draws)
        if not self._errors:
            return terms
        distance = torch.stack(self._errors).mean(0)
        parts = terms.parts | {"distillation": distance.detach()}
        return replace(terms, per_item=terms.per_item + self.weight * distance, parts=parts)


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
        if config.weight_bits is None and config.to == "int8":
            config = config.replace(weight_bits=8 if "vnni" in graphs.instructions() else graphs.SAFE_WEIGHT_BITS)
        made = cls(folder, source, config)
        made._check()
        files.write_json(folder / "quantization.json", {"config": config.to_json()})
        return made

    @classmethod
    def open(cls, folder: Path | str, source: Run) -> Quantization:
        """Take up what is in a folder.

        Raises:
            UserError: nothing was begun there.
        """
        path = Path(folder) / "quantization.json"
        if not path.is_file():
            raise UserError(f"{folder}: no quantization was begun here (it has no quantization.json)")
        try:
            return cls(Path(folder), source, QuantizationConfig.parse(files.read_json(path)["config"]))
        except (ConfigError, KeyError) as error:
            raise UserError(f"{path}: not written by osmose ({error})") from None

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
        model = self.source.model(runtime="torch")
        network = method.network_config
        if not networks_of(model) or network is None:
            raise UserError(
                f"RUN: {method.kind} has no network that is told its time by a label; runs of ddpm, iddpm, edm, of "
                "consistency models and distilled ones can be quantized"
            )
        if in_fewer_bits(network):
            raise UserError(f"RUN: {self.source.folder} is quantized already")
        if (config.ends is not None or config.budget is not None) and isinstance(network, ExpertsConfig):
            raise UserError("ends: experts share the steps among themselves already; quantize them all alike")
        if config.tuning is not None and not isinstance(model, Diffusion):
            raise UserError(f"tuning: {method.kind} has no training to go on with; runs of ddpm, iddpm and edm have")
        if config.calibration != "sampler" and not isinstance(model, Diffusion):
            raise UserError(f"calibration: {config.calibration!r} is for runs of ddpm, iddpm and edm; use sampler")
        if config.to == "int8":
            layers = self._layers(model)
            for wrapped in layers:  # refuses names of layers that there are not
                wrapped.build(model.spec.shape)
        if config.ends is not None and 2 * config.ends > len(labels_of(model)):
            steps = len(labels_of(model))
            raise UserError(f"ends: {config.ends} steps at each end are more than the {steps} steps of the chain")

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
        real = self.source.model(runtime="torch")
        method = self.source.config.method
        if self.config.to == "bf16":
            half = _rewritten(method, lambda _, network: BF16Config(network=network))
            self._write(half, real, real, {}, with_graphs)
            return True
        wrapped = self._layers(real)
        rounded = self._with(wrapped, "rounded")
        found = self._calibrated(real, rounded, dataset, progress)
        if self.config.tuning is not None:
            assert dataset is not None
            if not self._tuned(rounded, real, wrapped, dataset, progress):
                return False
        whole = self._with(wrapped, "integers")
        _copy(rounded, whole)
        more: dict[str, Any] = {"layers": found}
        config = _rewritten(method, lambda index, _: wrapped[index])
        high = self._high(real, whole, more, progress)
        if high is not None:
            edges, owners = high
            better = (lambda network: network) if self.config.high == "fp32" else (lambda n: BF16Config(network=n))

            def both(index: int, network: NetworkConfig) -> NetworkConfig:
                if set(owners) != {0, 1}:
                    return better(network) if owners[0] == 0 else wrapped[index]
                return ExpertsConfig(parts=(better(network), wrapped[index]), edges=edges, owners=owners)

            config = _rewritten(method, both)
        self._write(config, real, whole, more, with_graphs)
        return True

    def _layers(self, model: GenerativeModel) -> list[QuantizedConfig]:
        """Each network as a quantised one."""
        config, found = self.config, []
        inner_configs = _leaves(self.source.config.method)
        for index, (_, _, network) in enumerate(networks_of(model)):
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
        method = _rewritten(self.source.config.method, lambda index, _: wrapped[index].replace(form=form))
        with torch.random.fork_rng(devices=[]):
            model = method.build(self.source.config.spec)
        if form == "rounded":
            model.load_state_dict(files.read_tensors(self.source.weights), strict=False)
        return model.eval()

    def _calibrated(
        self, real: GenerativeModel, rounded: GenerativeModel, dataset: Dataset | None, progress: bool
    ) -> list[dict[str, Any]]:
        """Measure ranges, round weights and correct biases; what is known of each layer then."""
        networks = [network for _, _, network in networks_of(real)]
        forms = [_rounded_layers(network) for _, _, network in networks_of(rounded)]
        seed, config = self.config.seed, self.config

        def run(items: int, label: str) -> Callable[[], None]:
            def evaluate() -> None:
                with sampling_bar(label, progress) as on_step:
                    run_through(real, config.calibration, items, seed, dataset, on_step)

            return evaluate

        for form in forms:
            for layer in form.values():
                layer.shrink_weights()
        observe(networks, forms, run(config.items, "measuring ranges"))
        errors = correct_bias(networks, forms, run(max(1, config.items // 4), "measuring errors"))
        return [self._told(error, forms) for error in errors]

    @staticmethod
    def _told(error: LayerError, forms: list[dict[str, RoundedLayer]]) -> dict[str, Any]:
        layer = forms[error.network][error.name]
        told = {"network": error.network, "name": error.name, "inputs": layer.form.inputs, "error": error.relative}
        if layer.form.inputs == "static":
            told |= {"scale": layer.scale.tolist(), "zero": layer.zero.tolist()}
        return told

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
        method = _rewritten(self.source.config.method, lambda index, _: wrapped[index].replace(form="rounded"))
        changes: dict[str, Any] = {"steps": tuning.steps, "lr": tuning.lr, "warmup": tuning.steps // 20}
        changes |= {"ema": round(max(0.9, 1 - 10 / tuning.steps), 6), "decay": "linear", "accumulate": 1}
        changes |= {"compile": False, "validate_every": max(10, tuning.steps // 6), "preview_samples": 0}
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
        networks = [network for _, _, network in networks_of(real)]
        lesson = Tutored(rounded, networks, tuning.distillation)
        trainer = Trainer(run, dataset, model=rounded, lesson=lesson, progress=Progress(progress, "rounded weights"))
        if trainer.step == 0:
            trainer.save()  # ranges were measured: they are not in the configuration
        if not trainer.fit():
            return False
        rounded.load_state_dict(files.read_tensors(run.weights))
        rounded.cpu().eval()
        real.cpu()  # it may have followed the trainer to another device
        return True

    def _high(
        self, real: GenerativeModel, whole: GenerativeModel, more: dict[str, Any], progress: bool
    ) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
        """Intervals of labels and who answers there, where some steps are to be in high precision."""
        config = self.config
        if config.ends is None and config.budget is None:
            return None
        labels = labels_of(real)
        if config.ends is not None:
            high = [*labels[: config.ends], *labels[len(labels) - config.ends :]]
        else:
            assert config.budget is not None
            with sampling_bar("steps that need precision", progress) as on_step:
                found = self._searched(real, whole, config.budget, on_step)
            more["precision"] = found.to_json()
            high = list(found.high)
        more["steps"] = {"of": len(labels), "high": len(high), "precision": config.high}
        return intervals(labels, high)

    def _searched(self, real: GenerativeModel, whole: GenerativeModel, budget: float, on_step: Any) -> Precision:
        low = [network for _, _, network in networks_of(whole)]
        return search(real, low, budget, min(32, self.config.items), mix(self.config.seed, "precision"), on_step)

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
        own = model.state_dict()
        for name, value in real.state_dict().items():  # all that is no network's
            if name in own and own[name].shape == value.shape and own[name].dtype == value.dtype:
                own[name].copy_(value)
        for target, one, other in zip(_denoisers(model), _denoisers(real), _denoisers(whole), strict=True):
            _fill(target.network, one.network, other.network)
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
        files.write_json(self.folder / "config.json", config.to_json())
        more |= self._compared(real, run)
        more["bytes"] = {"before": self.source.weights.stat().st_size, "after": run.weights.stat().st_size}
        more |= {"computed_by": "openvino"} if why is None else {"computed_by": "torch", "why_torch": why}
        files.write_json(self.folder / "quantization.json", {"config": self.config.to_json(), **more})

    def _compared(self, real: GenerativeModel, run: Run) -> dict[str, Any]:
        """Samples of both from the same noise: how far they are apart, and a picture."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = real.sample(_COMPARED, seed=self.config.seed).data
            samples = run.model().sample(_COMPARED, seed=self.config.seed).data
        if real.spec.kind == "image" and has_picture(real.spec):
            rows = zip(right[:32].split(8), samples[:32].split(8), strict=True)
            with files.replacing(self.folder / "samples" / "beside.png") as temporary:
                grid = image_grid(torch.cat([part for pair in rows for part in pair]), real.spec, columns=8)
                grid.save(temporary, format="png")
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
    made = Quantization.open(out, source) if resume else Quantization.begin(out, source, QuantizationConfig(**options))
    needs = made.config.tuning is not None or made.config.calibration != "sampler"
    if not made.carry_out(data_of(source, root) if needs else None, progress, with_graphs):
        raise KeyboardInterrupt
    return Run.open(out)


def _leaves(method: MethodConfig) -> list[NetworkConfig]:
    """The networks themselves: of experts, the parts."""
    network = method.network_config
    assert network is not None, "refused before"
    return list(network.parts) if isinstance(network, ExpertsConfig) else [network]


def _rewritten(method: MethodConfig, change: Callable[[int, NetworkConfig], NetworkConfig]) -> MethodConfig:
    """A method with other networks, each made from its place and what it is."""
    inner_method = getattr(method, "model", None)
    if inner_method is not None:
        made: MethodConfig = method.replace(model=_rewritten(inner_method, change).to_json())
        return made
    network = method.network  # type: ignore[attr-defined]
    if isinstance(network, ExpertsConfig):
        parts = [change(index, part).to_json() for index, part in enumerate(network.parts)]
        other = network.to_json() | {"parts": parts}
    else:
        other = change(0, network).to_json()
    return type(method).parse(method.to_json() | {"network": other})


def _denoisers(model: nn.Module) -> list[NetworkDenoiser]:
    return [module for module in model.modules() if isinstance(module, NetworkDenoiser)]


def _rounded_layers(network: nn.Module) -> dict[str, RoundedLayer]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, RoundedLayer)}


@torch.no_grad()
def _copy(rounded: nn.Module, whole: nn.Module) -> None:
    """Give a model with integer layers what one with rounded layers rounds to, and all else that it has."""
    layers = dict(whole.named_modules())
    taken: set[str] = set()
    for name, layer in rounded.named_modules():
        if isinstance(layer, RoundedLayer):
            target = layers[name]
            assert isinstance(target, IntegerLayer)
            layer.integers(target)
            taken.add(f"{name}.")
    own = whole.state_dict()
    for name, value in rounded.state_dict().items():
        if not any(name.startswith(prefix) for prefix in taken):
            own[name].copy_(value)


@torch.no_grad()
def _fill(target: nn.Module, real: nn.Module, whole: nn.Module) -> None:
    """Give a network the weights of the networks that it is made of: in real numbers, and in integers."""
    if isinstance(target, BF16):
        target.network.load_state_dict(real.state_dict())
    elif isinstance(target, Experts) and isinstance(whole, Experts):
        for part, one, other in zip(target.parts, real.parts, whole.parts, strict=True):  # type: ignore[arg-type]
            _fill(part, one, other)
    elif isinstance(target, Experts):
        for part in target.parts:
            _fill(part, real, whole)
    else:
        integers = any(isinstance(module, IntegerLayer) for module in target.modules())
        target.load_state_dict((whole if integers else real).state_dict())

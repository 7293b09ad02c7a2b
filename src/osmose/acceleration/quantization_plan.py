"""What a quantisation is asked for, and what becomes of a method's networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from osmose.acceleration.ranges import Source
from osmose.configuration import Config, ConfigError
from osmose.methods.base import MethodConfig
from osmose.networks.base import NetworkConfig
from osmose.networks.experts import ExpertsConfig

#: Methods whose networks can be quantised: those whose samplers call a denoiser.
KINDS = ("ddpm", "iddpm", "edm", "scd", "sct", "ect", "distilled")


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
    at: tuple[int, ...] = Field((), description="numbers of the steps in high precision, from 1, the first")
    ends: int | None = Field(None, ge=0, description="steps in high precision at each end of the chain; null: none")
    budget: float | None = Field(
        None, gt=0, description="largest deviation of samples, by which steps in high precision are found; null: none"
    )
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _coherent(self) -> QuantizationConfig:
        ways = [name for name in ("at", "ends", "budget") if getattr(self, name) not in (None, ())]
        if len(ways) > 1:
            raise ConfigError(ways[1], f"given, and {ways[0]} too: steps in high precision are said in one way")
        if self.high != "fp32" and not ways:
            raise ConfigError("high", f"{self.high} given, and no step is in high precision; say at, ends or budget")
        if self.inputs == "dynamic" and self.calibration != "sampler":
            raise ConfigError("calibration", "given, and dynamic ranges are not measured")
        if self.to == "bf16":
            fields = type(self).model_fields
            for name in fields:
                if name not in ("format", "to", "seed") and getattr(self, name) != fields[name].default:
                    raise ConfigError(name, "given, and is of int8: in bf16 a network is computed as it is")
        return self

    @property
    def mixed(self) -> bool:
        """Whether some steps are in high precision."""
        return bool(self.at) or self.ends is not None or self.budget is not None

    @property
    def needs_data(self) -> bool:
        """Whether the data of the run are looked at."""
        return self.tuning is not None or self.calibration != "sampler"


def leaves(method: MethodConfig) -> list[NetworkConfig]:
    """The networks of a method: of experts, the parts."""
    network = method.network_config
    assert network is not None, "refused before"
    return list(network.parts) if isinstance(network, ExpertsConfig) else [network]


def rewritten(method: MethodConfig, change: Callable[[int, NetworkConfig], NetworkConfig]) -> MethodConfig:
    """A method with other networks, each made from its place among `leaves` and what it is."""
    made = [change(index, network) for index, network in enumerate(leaves(method))]
    whole = method.network_config
    if isinstance(whole, ExpertsConfig):
        return method.with_network(whole.replace(parts=[part.to_json() for part in made]))
    return method.with_network(made[0])

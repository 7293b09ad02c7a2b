"""How a model is trained, and the whole description of a run."""

from __future__ import annotations

import importlib.util
import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from osmose.configuration import Config
from osmose.data.dataset import DataConfig, DataIdentity, DataSpec
from osmose.errors import UserError
from osmose.methods.base import MethodChoice
from osmose.training.optimizers import AdamConfig, OptimizerChoice

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Config):
    """Optimiser, schedule, precision and what is written when."""

    steps: int = Field(3000, ge=0, description="optimisation steps; 0 for what is fitted in closed form")
    batch_size: int = Field(64, ge=1, description="items per step, over all processes and micro-batches")
    accumulate: int = Field(1, ge=1, description="micro-batches per step; saves memory, changes nothing else")
    optimizer: OptimizerChoice = AdamConfig()
    lr: float = Field(1e-3, gt=0, description="learning rate after warm-up")
    warmup: int = Field(100, ge=0, description="steps over which the learning rate rises from 0")
    decay: Literal["none", "linear", "cosine"] = Field("linear", description="of the learning rate, to 0 at the end")
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float | None = Field(1.0, gt=0, description="largest gradient norm; null for none")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, bias-corrected; 0 for none")
    flip: bool = Field(False, description="mirror images left to right at random; never for digits or letters")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto is bf16 where the device computes in it"
    )
    compile: bool = Field(False, description="torch.compile the network")
    channels_last: bool | None = Field(None, description="memory layout of images; null chooses by device")
    validate_every: int = Field(250, ge=1, description="steps between losses on held-out data")
    validation_items: int = Field(512, ge=1)
    preview_every: int = Field(1000, ge=1, description="steps between sample grids")
    preview_samples: int = Field(36, ge=0, description="samples in a grid; 0 for no grids")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="also write TensorBoard events (needs osmose[tensorboard])")

    @model_validator(mode="after")
    def _divisible(self) -> TrainingConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        return self

    def require(self, processes: int) -> None:
        """Refuse what cannot be done here.

        Raises:
            UserError: a batch that `processes` processes cannot share, TensorBoard where it is not installed.
        """
        items = self.batch_size // self.accumulate
        if items % processes:
            raise UserError(f"training.batch_size: {items} items per pass cannot be shared by {processes} processes")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "training.tensorboard: needs TensorBoard; install it with: pip install 'osmose[tensorboard]'"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay == "none":
            return self.lr * warm
        left = 1 - max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * warm * (left if self.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


class Parent(Config):
    """The run that another was made from."""

    folder: str = Field(description="its name, without private folders")
    sha256: str = Field(description="of the parent's model.safetensors")


class RunConfig(Config):
    """Everything that makes a run what it is: config.json of a run folder."""

    format: Literal["osmose-run-1"] = "osmose-run-1"
    method: MethodChoice
    data: DataConfig
    spec: DataSpec
    identity: DataIdentity
    training: TrainingConfig
    seed: int = Field(0, ge=0, lt=2**63)
    versions: dict[str, str] = Field(default_factory=dict)
    parent: Parent | None = None

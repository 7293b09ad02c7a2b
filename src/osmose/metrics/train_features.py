"""The recipe of the shipped classifiers: `python -m osmose.metrics.train_features digits|fashion-mnist --out FILE`.

Fixed seed, one thread, the training part only. The tensors are reproducible bit by bit on one machine and one version
of torch (the file is not: its metadata come in any order); elsewhere the order of float32 sums differs. So the shipped
files, not the recipe, are what scores refer to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from osmose.data.dataset import DataConfig, Dataset
from osmose.errors import UserError
from osmose.metrics.classifiers import DigitsMLP, FashionCNN


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the data."""

    name: str
    network: Callable[[], nn.Module]
    epochs: int
    batch: int
    peak_rate: float
    weight_decay: float
    #: Largest shift of an image in pixels, and whether it may be mirrored.
    shift: int
    mirror: bool
    seed: int = 20151205


RECIPES = {
    "digits": Recipe("digits-mlp-v1", DigitsMLP, 60, 64, 4e-3, 1e-2, shift=0, mirror=False),
    "fashion-mnist": Recipe("fashion-cnn-v1", FashionCNN, 18, 128, 8e-3, 1e-2, shift=1, mirror=True),
}


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """One shift for the whole batch, and each image mirrored or not; (B, C, H, W) in and out."""
    if recipe.mirror:
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if recipe.shift:
        down, right = torch.randint(-recipe.shift, recipe.shift + 1, (2,), generator=generator).tolist()
        height, width = images.shape[-2:]
        border = recipe.shift
        padded = F.pad(images, (border,) * 4)
        images = padded[..., border + down : border + down + height, border + right : border + right + width]
    return images


def train(recipe: Recipe, dataset: Dataset, report: Callable[[str], None] = print) -> nn.Module:
    """Train one classifier on the training part; a one-cycle rate with AdamW.

    Raises:
        UserError: the data have no labels.
    """
    if dataset.train_labels is None:
        raise UserError(f"{dataset.source} has no labels; a classifier cannot be trained on it")
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    # On one core, convolutions run twice as fast with the channels last.
    network = recipe.network()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = recipe.epochs * (len(dataset.train) // recipe.batch)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.peak_rate, total_steps=steps, pct_start=0.2)
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(dataset.train), generator=generator)
        # The last, smaller batch is left out: batch norm would weigh its few images like a full batch.
        for rows in order[: len(order) // recipe.batch * recipe.batch].split(recipe.batch):
            images = augment(dataset.train[rows].to(torch.float32), recipe, generator)
            images = images.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(images)[1], dataset.train_labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        report(f"epoch {epoch + 1}/{recipe.epochs}: last loss {loss.item():.4f}")
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor | None) -> float:
    """Share of right answers, in [0, 1]."""
    if labels is None:
        raise UserError("accuracy needs labels")
    right = 0
    for batch, wanted in zip(images.split(500), labels.split(500), strict=True):
        right += int((network(batch.to(torch.float32))[1].argmax(dim=1) == wanted).sum())
    return right / len(images)


def write(path: Path, network: nn.Module, metadata: dict[str, str]) -> None:
    """Weights and metadata as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Train, report, write; 2 for input that is refused."""
    parser = argparse.ArgumentParser(prog="python -m osmose.metrics.train_features", description=__doc__)
    parser.add_argument("data", choices=sorted(RECIPES))
    parser.add_argument("--data-root", type=Path, help="folder that holds fashion-mnist/")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = RECIPES[given.data]
    try:
        dataset = DataConfig(source=given.data, root=given.data_root).load()
        start = time.process_time()
        network = train(recipe, dataset)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    seconds = time.process_time() - start
    seen = accuracy(network, dataset.train, dataset.train_labels)
    unseen = accuracy(network, dataset.held_out, dataset.held_out_labels)
    print(f"{recipe.name}: accuracy {seen:.4f} train, {unseen:.4f} held-out; {seconds:.0f} CPU seconds")
    settings = {key: value for key, value in vars(recipe).items() if key != "network"}
    metadata = {
        "name": recipe.name,
        "recipe": json.dumps(settings),
        "accuracy_train": f"{seen:.4f}",
        "accuracy_held_out": f"{unseen:.4f}",
        "data": dataset.source,
        "data_sha256": dataset.identity.sha256,
        "torch": torch.__version__,
    }
    write(given.out, network, metadata)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

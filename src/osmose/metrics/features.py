"""Feature networks: images in data units to feature vectors and class probabilities, with the hash of the weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor, nn

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.metrics import FEATURES
from osmose.metrics.classifiers import DigitsMLP, FashionCNN, LeNet5, ResNet20

#: The network of each data set that has one; other images get metrics that need no features.
DEFAULTS = {
    "digits": "digits-mlp-v1",
    "mnist": "lenet5-mnist",
    "fashion-mnist": "fashion-cnn-v1",
    "cifar10": "resnet20-cifar10",
}

NO_FEATURES = (
    "no feature network fits {source} {shape}, so only metrics without features are computed; for the real FID give "
    "the weights of the 2015 Inception network, --inception-weights PATH (pt_inception-2015-12-05-6726825d.pth)"
)


class Embedding(NamedTuple):
    """What a network says of n images: features (n, d) and class probabilities (n, classes), float32 on the CPU."""

    features: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network with fixed weights whose features are compared.

    Attributes:
        name: for example `digits-mlp-v1`; printed beside every score.
        dim: number of features d.
        num_classes: number of class probabilities, or None if it gives none.
        sha256: of the file the weights came from.
        shape: the event shape it takes, or None for any image.
        value_range: the data units it takes; images in another range are mapped to it by `features`.
        module: (B, C, H, W) float32 in `value_range` to features (B, d) and logits (B, classes) or None.
        batch: images per call, bounded by memory.
        suffix: what metrics that use it are called, `clf` in `fd_clf`; empty for the real FID network.
    """

    name: str
    dim: int
    num_classes: int | None
    sha256: str
    shape: tuple[int, ...] | None
    value_range: tuple[float, float]
    module: nn.Module
    batch: int = 250
    suffix: str = "clf"

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)

    def embed(self, images: Tensor, value_range: tuple[float, float] | None = None) -> Embedding:
        """Features and probabilities in one pass.

        Args:
            images: data units, any dtype, shape (n, C, H, W); grey images are repeated to 3 channels for a network
                that takes any image.
            value_range: smallest and largest value the data can have; None if it is the network's own.

        Raises:
            UserError: no images, or a shape the network does not take.
        """
        self._check(images)
        device = next(self.module.parameters()).device
        parts = []
        with torch.inference_mode():
            for rows in images.split(self.batch):
                batch = self._in_own_units(rows.to(device, torch.float32), value_range or self.value_range)
                features, logits = self.module(batch)
                parts.append((features.cpu(), None if logits is None else logits.softmax(dim=1).cpu()))
        probabilities = None
        if parts[0][1] is not None:
            probabilities = torch.cat([part[1] for part in parts if part[1] is not None])
        return Embedding(torch.cat([part[0] for part in parts]), probabilities)

    def features(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) in the network's data units to features (n, d), float32 on the CPU."""
        return self.embed(images).features

    def probabilities(self, images: Tensor) -> Tensor | None:
        """Images (n, C, H, W) in the network's data units to class probabilities (n, classes), or None."""
        return self.embed(images).probabilities

    def takes(self, spec: DataSpec) -> bool:
        """Whether events of this form can be given to the network."""
        if spec.kind != "image" or spec.range is None:
            return False
        return spec.shape == self.shape if self.shape else len(spec.shape) == 3 and spec.shape[0] in (1, 3)

    def _check(self, images: Tensor) -> None:
        event = tuple(images.shape[1:])
        fits = event == self.shape if self.shape else len(event) == 3 and event[0] in (1, 3)
        if len(images) == 0 or not fits:
            wanted = self.shape or "(1 or 3, height, width)"
            raise UserError(f"{self.name} takes images of shape (n, *{wanted}); {tuple(images.shape)} given")

    def _in_own_units(self, images: Tensor, value_range: tuple[float, float]) -> Tensor:
        if self.shape is None and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if value_range == self.value_range:
            return images
        (low, high), (own_low, own_high) = value_range, self.value_range
        return (images - low) * ((own_high - own_low) / (high - low)) + own_low


def load_features(name: str) -> FeatureNetwork:
    """The shipped network of this name (see `osmose.metrics.FEATURES`).

    Raises:
        UserError: unknown name, or `inception-2015`, whose weights are not shipped.
    """
    loader = FEATURES.resolve(name)
    if name == "inception-2015":
        raise UserError("inception-2015: its weights are not shipped; give them with --inception-weights PATH")
    network: FeatureNetwork = loader()
    return network


def default_features(source: str, spec: DataSpec) -> FeatureNetwork | None:
    """The network for a data set (its `source` and `spec`), or None; `NO_FEATURES` says then what to do."""
    name = DEFAULTS.get(source)
    if name is None:
        return None
    network = load_features(name)
    # The same source brought to another size or range (or a part with other levels) is no longer what it was made for.
    return network if network.takes(spec) and spec.range == network.value_range else None


def digits_mlp() -> FeatureNetwork:
    """Features of the 8x8 digits, values 0..16."""
    return _shipped("digits-mlp-v1", DigitsMLP(), (1, 8, 8), (0.0, 16.0))


def fashion_cnn() -> FeatureNetwork:
    """Features of Fashion-MNIST, values 0..255."""
    return _shipped("fashion-cnn-v1", FashionCNN(), (1, 28, 28), (0.0, 255.0))


def lenet5() -> FeatureNetwork:
    """Features of MNIST, values 0..255."""
    return _shipped("lenet5-mnist", LeNet5(), (1, 28, 28), (0.0, 255.0))


def resnet20() -> FeatureNetwork:
    """Features of CIFAR-10, values 0..255."""
    return _shipped("resnet20-cifar10", ResNet20(), (3, 32, 32), (0.0, 255.0))


def _shipped(
    name: str,
    module: DigitsMLP | FashionCNN | LeNet5 | ResNet20,
    shape: tuple[int, ...],
    value_range: tuple[float, float],
) -> FeatureNetwork:
    content = (files("osmose.metrics") / "weights" / f"{name}.safetensors").read_bytes()
    module.load_state_dict(load(content))
    return FeatureNetwork(
        name=name,
        dim=module.dim,
        num_classes=10,
        sha256=hashlib.sha256(content).hexdigest(),
        shape=shape,
        value_range=value_range,
        module=module,
    )

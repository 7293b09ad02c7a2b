"""The classifiers whose features are compared: (B, C, H, W) in data units to features (B, d) and logits (B, classes).

Each brings its own preprocessing, because features change when it does: a network that was trained on [0, 1] and is fed
[-1, 1] still returns numbers, and wrong ones.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitsMLP(nn.Module):
    """64-128-64-10 on 8x8 images with values 0..16; the features are the 64 values of the second hidden layer."""

    dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, 8, 8) in 0..16 to features (B, 64) and logits (B, 10)."""
        x = images.flatten(1) / 16
        features = F.relu(self.fc2(F.relu(self.fc1(x))))
        return features, self.fc3(features)


class FashionCNN(nn.Module):
    """Three convolutions with batch norm on 28x28 grey images 0..255; the features are 64 values before the logits."""

    dim = 64
    #: Mean and deviation of the Fashion-MNIST training part, values over 255.
    mean, std = 0.2860, 0.3530

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.fc1 = nn.Linear(64 * 3 * 3, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, 28, 28) in 0..255 to features (B, 64) and logits (B, 10)."""
        x = (images / 255 - self.mean) / self.std
        for conv, norm in zip(self.convs, self.norms, strict=True):
            # Pooling before the norm gives the same maxima up to its sign and a quarter of the work.
            x = F.relu(norm(F.max_pool2d(conv(x), 2)))
        features = F.relu(self.fc1(x.flatten(1)))
        return features, self.fc2(features)


class LeNet5(nn.Module):
    """LeNet-5 with tanh for MNIST, as giulio98/functional-diffusion-processes uses it; 84 features."""

    dim = 84

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(576, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, 28, 28) in 0..255 to features (B, 84) and logits (B, 10)."""
        x = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False, antialias=False) / 255
        x = F.avg_pool2d(self.conv1(x).tanh(), 2)
        x = F.avg_pool2d(self.conv2(x).tanh(), 2)
        features = self.fc2(self.fc1(x.flatten(1)).tanh()).tanh()
        return features, self.fc3(features)


class _BasicBlock(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.stride = 1 if before == width else 2
        self.padding = (width - before) // 2
        self.conv1 = nn.Conv2d(before, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut at a stage change has no weights: every second pixel, channels padded with zeros on both sides.
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 (He et al. 2015, section 4.2) with parameter-free shortcuts; 64 averages over space.

    Key names are those of akamaster/pytorch_resnet_cifar10.
    """

    dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(_BasicBlock(16, 16), _BasicBlock(16, 16), _BasicBlock(16, 16))
        self.layer2 = nn.Sequential(_BasicBlock(16, 32), _BasicBlock(32, 32), _BasicBlock(32, 32))
        self.layer3 = nn.Sequential(_BasicBlock(32, 64), _BasicBlock(64, 64), _BasicBlock(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 32, 32) in 0..255 to features (B, 64) and logits (B, 10)."""
        mean = torch.tensor((0.485, 0.456, 0.406), device=images.device).view(3, 1, 1)
        std = torch.tensor((0.229, 0.224, 0.225), device=images.device).view(3, 1, 1)
        x = F.relu(self.bn1(self.conv1((images / 255 - mean) / std)))
        features = self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))
        return features, self.linear(features)

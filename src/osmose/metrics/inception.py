"""The network that FID is defined by: TensorFlow's Inception-v3 of 2015-12-05, with weights that you bring.

Structure and key names are those of its published port to torch (pt_inception-2015-12-05-6726825d.pth), so that file
loads as it is. It is not torchvision's Inception: average pools leave the padding out of the mean, the last block
pools by maximum, and there are 1,008 classes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from osmose.errors import UserError
from osmose.metrics.features import FeatureNetwork

#: Start of the SHA-256 of the published weights; with any other file the distance is not called FID.
PUBLISHED_SHA256 = "6726825d"

SIDE = 299


def resize_like_tensorflow1(images: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear resize (B, C, H, W) to (B, C, side, side) as TensorFlow 1 did it by default.

    Output pixel i looks at input position i * in / out: no half-pixel offset, no aligned corners. Torch has no such
    mode, and with its own the FID of 32x32 images changes (arXiv 2104.11222, section 3).
    """
    rows, columns = (_weights(length, side).to(images) for length in images.shape[-2:])
    return rows @ images @ columns.T


def _weights(length: int, side: int) -> Tensor:
    """Interpolation matrix, shape (side, length)."""
    position = torch.arange(side, dtype=torch.float64) * (length / side)
    below = position.floor().long().clamp(max=length - 1)
    above = (below + 1).clamp(max=length - 1)
    share = position - below
    matrix = torch.zeros(side, length, dtype=torch.float64)
    index = torch.arange(side)
    matrix[index, below] += 1 - share
    matrix[index, above] += share
    return matrix


class _Conv(nn.Module):
    """Convolution, batch norm, relu."""

    def __init__(self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(before, after, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    # TensorFlow's average pool does not count the padding.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, before: int, pooled: int):
        super().__init__()
        self.branch1x1 = _Conv(before, 64, 1)
        self.branch5x5_1 = _Conv(before, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5)
        self.branch3x3dbl_1 = _Conv(before, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(before, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        wide = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_average(x))], dim=1)


class _BlockB(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = _Conv(288, 384, 3, stride=2, same=False)
        self.branch3x3dbl_1 = _Conv(288, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class _BlockC(nn.Module):
    def __init__(self, inner: int):
        super().__init__()
        across, down = (1, 7), (7, 1)
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, across)
        self.branch7x7_3 = _Conv(inner, 192, down)
        self.branch7x7dbl_1 = _Conv(768, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, down)
        self.branch7x7dbl_3 = _Conv(inner, inner, across)
        self.branch7x7dbl_4 = _Conv(inner, inner, down)
        self.branch7x7dbl_5 = _Conv(inner, 192, across)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], dim=1)


class _BlockD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2, same=False)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_2(self.branch3x3_1(x))
        wide = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([single, self.branch7x7x3_4(wide), F.max_pool2d(x, 3, stride=2)], dim=1)


class _BlockE(nn.Module):
    def __init__(self, before: int, maximum: bool):
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = _Conv(before, 320, 1)
        self.branch3x3_1 = _Conv(before, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3))
        self.branch3x3_2b = _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Conv(before, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        # The graph of 2015 has a maximum in its last block where the paper has an average.
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, dim=1)


class Inception2015(nn.Module):
    """(B, 3, H, W) in 0..255 to 2,048 pooled features and 1,008 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, same=False)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB()
        self.Mixed_6b = _BlockC(128)
        self.Mixed_6c = _BlockC(160)
        self.Mixed_6d = _BlockC(160)
        self.Mixed_6e = _BlockC(192)
        self.Mixed_7a = _BlockD()
        self.Mixed_7b = _BlockE(1280, maximum=False)
        self.Mixed_7c = _BlockE(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2048) and the logits (B, 1008) of the published Inception Score, which leave the bias out."""
        x = (resize_like_tensorflow1(images) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def load_inception(path: Path | str, device: str = "cpu") -> FeatureNetwork:
    """The FID network with the weights in `path`, a .pth of torch or a .safetensors file.

    Named `inception-2015` only if the hash of the file is the published one; otherwise `inception-unverified`, and
    every metric with it says so in its name.

    Raises:
        UserError: no such file, not a file of weights, or weights of another network, with what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--inception-weights {path}: no such file")
    network = Inception2015()
    _fill(network, path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    verified = sha256.startswith(PUBLISHED_SHA256)
    return FeatureNetwork(
        name="inception-2015" if verified else "inception-unverified",
        dim=2048,
        num_classes=1008,
        sha256=sha256,
        shape=None,
        value_range=(0.0, 255.0),
        module=network.to(device),
        batch=32,
        suffix="" if verified else "inception-unverified",
    )


def _fill(network: Inception2015, path: Path) -> None:
    try:
        given = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # each of the two readers has its own kinds of them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--inception-weights {path}: cannot be read as weights ({reason})") from None
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {}
    if isinstance(given, dict):
        found = {key: tuple(value.shape) for key, value in given.items() if isinstance(value, Tensor)}
    # Some copies leave out the batch counters, which are not used.
    wrong = [key for key in wanted if found.get(key) != wanted[key] and not key.endswith("num_batches_tracked")]
    wrong += sorted(found.keys() - wanted.keys())
    if wrong:
        key = wrong[0]
        raise UserError(
            f"--inception-weights {path}: not the FID network of 2015; {len(wrong)} tensors differ, the first is {key} "
            f"with shape {found.get(key, 'missing')} where {wanted.get(key, 'nothing')} is due"
        )
    network.load_state_dict({key: given[key] for key in found}, strict=False)

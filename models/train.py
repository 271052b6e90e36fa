"""Train the shipped models and write them with their calibration and test data.

pip install torch mlxtend onnx onnxruntime pillow
python models/train.py [MODEL ...] [--out DIR]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image
from torch import Tensor, nn
from torch_to_onnx import save
from vit import TinyViT, export

SEED = 0
TEST_ROWS = 1000
CALIBRATION_ROWS = 100
BATCH = 64


class ConvBN(nn.Sequential):
    """Conv, BatchNorm and, unless it feeds an addition, ReLU."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int = 1, *, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        if relu:
            self.relu = nn.ReLU()


class Residual(nn.Module):
    """The basic block of He et al. 2015 (arXiv 1512.03385); a 1x1 projection where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBN(cin, cout, 3, stride), ConvBN(cout, cout, 3, relu=False))
        same = cin == cout and stride == 1
        self.shortcut = nn.Sequential() if same else ConvBN(cin, cout, 1, stride, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class Head(nn.Sequential):
    """Global average pooling and a linear classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, 10)


class DigitsResNet(nn.Sequential):
    """Three residual stages of 16, 32 and 64 channels at 28, 14 and 7 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 16, 3)
        self.stage1 = Residual(16, 16)
        self.stage2 = Residual(16, 32, stride=2)
        self.stage3 = Residual(32, 64, stride=2)
        self.head = Head(64)


class AttentionCondenser(nn.Module):
    """Self-attention at half resolution (Wong et al. 2020, arXiv 2008.04245): x * S * scale."""

    def __init__(self, channels: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.condense = nn.MaxPool2d(2)
        self.grouped = ConvBN(channels, embedding, 3, groups=groups)
        self.pointwise = ConvBN(embedding, embedding, 1)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.expand = nn.Conv2d(embedding, channels, 1)
        self.sigmoid = nn.Sigmoid()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.pointwise(self.grouped(self.condense(x)))
        attention = self.sigmoid(self.expand(self.upsample(embedding)))
        return x * attention * self.scale


class Condenser(nn.Sequential):
    """Conv-BN-ReLU layers with an attention condenser after each resolution's first one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 16, 3)
        self.attention1 = AttentionCondenser(16, 16, groups=4)
        self.conv2 = ConvBN(16, 32, 3, stride=2)
        self.attention2 = AttentionCondenser(32, 16, groups=4)
        self.conv3 = ConvBN(32, 64, 3, stride=2)
        self.conv4 = ConvBN(64, 64, 3)
        self.head = Head(64)


def load_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Shuffle mlxtend's 5000 MNIST rows; return x uint8 [N, 28, 28] and y int64 for training, then for test."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(SEED).permutation(len(labels))
    x = pixels.reshape(-1, 28, 28).astype(np.uint8)[order]
    y = labels.astype(np.int64)[order]
    return x[TEST_ROWS:], y[TEST_ROWS:], x[:TEST_ROWS], y[:TEST_ROWS]


def as_input(x: np.ndarray) -> Tensor:
    """uint8 [N, 28, 28] to the models' input: float32 [N, 1, 28, 28], pixel / 255."""
    return torch.from_numpy(x[:, None].astype(np.float32) / np.float32(255))


def augment(x: Tensor) -> Tensor:
    """Turn by up to 10 degrees, scale by up to 10 %, shift by up to 2 pixels."""
    n = len(x)
    angle = (torch.rand(n) * 2 - 1) * math.radians(10)
    size = 1 + (torch.rand(n) * 2 - 1) * 0.1
    shift = (torch.rand(n, 2) * 2 - 1) * (2 / 14)
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """AdamW under a one-cycle learning rate that peaks at `rate`."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs=epochs, steps_per_epoch=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(augment(x[rows])), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"{type(model).__name__} epoch {epoch + 1}/{epochs} loss {total / steps:.4f}", flush=True)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def write_data(out: Path, calibration: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> None:
    """Write the calibration rows as grey PNG files and the test rows as one .npz file."""
    folder = out / "mnist_calib"
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(calibration):
        Image.fromarray(image).save(folder / f"{i:03d}.png", optimize=True)
    np.savez_compressed(out / "mnist_test.npz", x=x_test, y=y_test)


@dataclass(frozen=True)
class Recipe:
    """A network, how long and how fast it learns, and what writes it."""

    network: Callable[[], nn.Module]
    epochs: int
    rate: float
    write: Callable[[nn.Module, Path], None]


write_layers = partial(save, image=(1, 28, 28), classes=10)
RECIPES = {
    "digits_resnet": Recipe(DigitsResNet, 25, 5e-3, lambda model, path: write_layers(model, path=path)),
    "condenser": Recipe(Condenser, 25, 5e-3, lambda model, path: write_layers(model, path=path)),
    "tiny_vit": Recipe(TinyViT, 100, 2e-3, export),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    if unknown := set(options.models) - set(RECIPES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    torch.set_num_threads(1)
    x_train, y_train, x_test, y_test = load_rows()
    write_data(options.out, x_train[:CALIBRATION_ROWS], x_test, y_test)
    for name in options.models or RECIPES:
        recipe = RECIPES[name]
        torch.manual_seed(SEED)
        model = recipe.network()
        train(model, as_input(x_train), torch.from_numpy(y_train), recipe.epochs, recipe.rate)
        recipe.write(model, options.out / f"{name}.onnx")
        print(f"{name}: test accuracy {accuracy(model, as_input(x_test), torch.from_numpy(y_test)):.4f}")


if __name__ == "__main__":
    main()

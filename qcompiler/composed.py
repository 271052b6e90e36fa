"""Networks that are timed for a cost table beside chains: the blocks of well-known architectures, two or three in a row.

What ONNX Runtime does between operators, conversions of layouts and fusions, shows only in such company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qcompiler.microbench import Net

ACTIVATIONS = ("Relu", "HardSwish", "SiLU")
TWICE: dict[str, Any] = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def composed() -> Iterator[Net]:
    """All networks, always in the same order, and each again with float layers between the quantized ones."""
    for number, net in enumerate(net for family in FAMILIES for net in family()):
        yield net
        yield net.mixed(2 * number)
        yield net.mixed(2 * number + 1)


def _map(channels: int, size: int) -> Net:
    return Net(1, channels, size, size)


def _activate(net: Net, name: str) -> Net:
    if name == "SiLU":
        source = net.last
        return net.op("Sigmoid").op("Mul", source, net.last)
    return net.op(name)


def _join(net: Net, *tensors: str) -> Net:
    return net.op("Concat", *tensors, width=sum(net.width(t) for t in tensors), axis=1)


def _resnets() -> Iterator[Net]:
    """Two convolutions, or a narrow one between two pointwise ones, around a residual connection (He et al. 2015)."""
    for channels, size in ((16, 32), (32, 32), (64, 56), (64, 16), (128, 28), (256, 14), (512, 7)):
        net = _map(channels, size)
        for _ in range(2):
            source = net.last
            net.conv(kernel=3).conv(kernel=3, relu=False).op("Add", net.last, source).op("Relu")
        yield net
    for channels, size in ((64, 56), (256, 28), (512, 14), (1024, 7)):
        net = _map(channels, size)
        for _ in range(2):
            source = net.last
            net.conv(channels // 4).conv(kernel=3).conv(channels, relu=False)
            net.op("Add", net.last, source).op("Relu")
        yield net
        yield _with_shortcut(channels // 2, size)


def _with_shortcut(channels: int, size: int) -> Net:
    """A residual block whose shortcut is a convolution with stride 2."""
    net = _map(channels, size)
    other = net.conv(2 * channels, stride=2, relu=False).last
    net.last = "x"
    net.conv(channels // 2).conv(kernel=3, stride=2).conv(2 * channels, relu=False)
    return net.op("Add", net.last, other).op("Relu").conv(channels)


def _fire() -> Iterator[Net]:
    """Convolutions side by side whose results are put together (SqueezeNet, Iandola et al. 2016)."""
    for channels, narrow, size in (
        (64, 16, 56),
        (128, 32, 28),
        (256, 48, 14),
        (96, 12, 28),
        (384, 64, 13),
        (32, 8, 40),
    ):
        net = _map(channels, size)
        for _ in range(2):
            source = net.conv(narrow).last
            left = net.conv(channels // 2).last
            net.last = source
            _join(net.conv(channels // 2, 3), left, net.last)
        yield net
        yield net.op("MaxPool", kernel_shape=[3, 3], strides=[2, 2]).conv(narrow)


def _inverted_residuals() -> Iterator[Net]:
    """Wide depthwise convolutions between narrow pointwise ones (MobileNetV2 and V3, EfficientNet)."""
    for channels, expand, kernel, size in (
        (16, 4, 3, 112), (24, 6, 3, 56), (40, 3, 5, 28), (80, 6, 3, 14), (112, 6, 5, 14),
        (192, 6, 5, 7), (32, 2, 3, 24), (64, 4, 3, 20), (32, 4, 3, 112),
    ):  # fmt: skip
        for activation, squeezes in (("Relu", False), ("HardSwish", False), ("HardSwish", True), ("SiLU", True)):
            net = _map(channels, size)
            for _ in range(2):
                source = net.last
                _activate(net.conv(channels * expand, relu=False), activation)
                _activate(net.conv(0, kernel, 1, channels * expand, relu=False), activation)
                if squeezes:
                    _squeeze_excite(net, "Sigmoid" if activation == "SiLU" else "HardSigmoid")
                net.conv(channels, relu=False).op("Add", net.last, source)
            yield net


def _squeeze_excite(net: Net, gate: str) -> Net:
    source, width = net.last, net.width()
    net.op("GlobalAveragePool").conv(max(8, width // 32 * 8)).conv(width, relu=False)
    return net.op(gate).op("Mul", source, net.last)


def _cross_stage() -> Iterator[Net]:
    """Half of the channels through residual blocks, all that arises put together (YOLOv8's C2f), with SiLU or Relu."""
    for channels, size in ((32, 80), (64, 40), (128, 20), (256, 10)):
        for activation in ("SiLU", "Relu"):
            net = _activate(_map(channels, size).conv(relu=False), activation)
            halves = net.split(2)
            parts = list(halves)
            for _ in range(2):
                source = net.last
                _activate(net.conv(kernel=3, relu=False), activation)
                _activate(net.conv(kernel=3, relu=False), activation).op("Add", net.last, source)
                parts.append(net.last)
            yield _activate(_join(net, *parts).conv(channels, relu=False), activation)
    for channels, size, activation in ((64, 20, "Relu"), (128, 10, "Relu"), (64, 20, "SiLU"), (128, 10, "SiLU")):
        net = _activate(_map(channels, size).conv(relu=False), activation)
        parts = [net.last]
        for _ in range(3):
            parts.append(net.op("MaxPool", kernel_shape=[5, 5], pads=[2] * 4).last)
        yield _join(net, *parts).conv(channels)


def _shuffled() -> Iterator[Net]:
    """Half of the channels through convolutions, then a shuffle (ShuffleNetV2, Ma et al. 2018)."""
    for channels, size in ((48, 44), (96, 22), (116, 28), (192, 11), (232, 14), (464, 7)):
        net = _map(channels, size).conv()
        for _ in range(2):
            first, _ = net.split(2)
            net.conv().conv(0, 3, 1, channels // 2, relu=False).conv()
            _join(net, first, net.last)
            net.op("Reshape", net.last, np.array([1, 2, channels // 2, size, size]))
            net.op("Transpose", perm=[0, 2, 1, 3, 4])
            net.op("Reshape", net.last, np.array([1, channels, size, size]), width=channels)
        yield net.conv()


def _detectors() -> Iterator[Net]:
    """Feature maps of two sizes that meet, and heads whose results are lists of boxes."""
    for channels, size, activation in (
        (32, 40, "Relu"),
        (64, 40, "SiLU"),
        (64, 20, "Relu"),
        (96, 22, "HardSwish"),
        (128, 20, "SiLU"),
    ):
        net = _map(channels, size)
        fine = _activate(net.conv(kernel=3, relu=False), activation).last
        _activate(net.conv(2 * channels, 3, 2, relu=False), activation).conv(channels)
        net.op("Resize", net.last, "", np.array([1, 1, 2, 2], np.float32), **TWICE)
        yield _join(net, net.last, fine).conv(channels, 3)
        yield _head(_map(channels, size), channels, size, flat_first=True)
        yield _head(_map(channels, size), channels, size, flat_first=False)


def _head(net: Net, channels: int, size: int, flat_first: bool) -> Net:
    lists = []
    for stride in (1, 2):
        net.conv(channels, 3, stride)
        source = net.last
        net.conv(24, relu=False)
        if flat_first:
            net.op("Reshape", net.last, np.array([1, 24, -1]))
        else:
            net.op("Transpose", perm=[0, 2, 3, 1]).op("Reshape", net.last, np.array([1, -1, 4]))
        lists.append(net.last)
        net.last = source
    if flat_first:
        return net.op("Concat", *lists, axis=2).op("Sigmoid")
    return net.op("Concat", *lists, axis=1).op("Softmax", axis=-1)


def _dense_blocks() -> Iterator[Net]:
    """Each convolution reads all that came before (DenseNet, U-Net)."""
    for channels, growth, size in ((32, 16, 28), (64, 32, 14), (48, 32, 28)):
        net = _map(channels, size).conv()
        for _ in range(3):
            source = net.last
            _join(net.conv(2 * growth).conv(growth, 3), source, net.last)
        yield net.conv(channels).op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv()
    for channels, size in ((16, 80), (32, 40), (16, 160)):
        net = _map(channels, size)
        fine = net.conv(kernel=3).last
        net.op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv(2 * channels, 3)
        net.op("Resize", net.last, "", np.array([1, 1, 2, 2], np.float32), **TWICE)
        yield _join(net, net.last, fine).conv(channels, 3)


def _classifiers() -> Iterator[Net]:
    """From an image to classes."""
    for width, size, kernel in ((16, 96, 3), (32, 160, 3), (32, 224, 3), (64, 128, 7), (64, 224, 7)):
        net = _map(3, size).conv(width, kernel, 2)
        if kernel == 7:
            net.op("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        net.depthwise().conv(2 * width).depthwise(3, 2).conv(4 * width).conv(4 * width, 3, 2)
        yield net.op("GlobalAveragePool").op("Flatten").linear(1000)
    for width, size in ((16, 32), (32, 64), (16, 120)):
        net = _map(3, size).conv(width, 3).op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv(2 * width, 3)
        net.op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv(2 * width, 3, 2)
        yield net.op("GlobalAveragePool").op("Flatten").linear(100)


def _transformers() -> Iterator[Net]:
    """LayerNormalization, attention and two products (Vaswani et al. 2017), before or behind the residual connection."""
    for tokens, width, heads in ((197, 192, 3), (50, 384, 6), (197, 384, 6), (64, 256, 4), (40, 120, 8)):
        for gelu in ("Gelu", "SiLU"):
            net = Net(1, tokens, width)
            source = net.last
            _attention(_norm(net), tokens, width, heads).op("Add", net.last, source)
            source = net.last
            _activate(_norm(net).linear(4 * width), gelu).linear(width)
            yield net.op("Add", net.last, source)


def _norm(net: Net) -> Net:
    return net.op("LayerNormalization", net.last, np.ones(net.width(), np.float32), axis=-1)


def _attention(net: Net, tokens: int, width: int, heads: int) -> Net:
    source, shape = net.last, np.array([1, tokens, heads, width // heads])
    rows = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        net.last = source
        net.linear(width).op("Reshape", net.last, shape).op("Transpose", perm=perm)
        rows.append(net.last)
    net.op("MatMul", rows[0], rows[1]).op("Softmax", axis=-1).op("MatMul", net.last, rows[2])
    net.op("Transpose", perm=[0, 2, 1, 3]).op("Reshape", net.last, np.array([1, tokens, width]), width=width)
    return net.linear(width)


FAMILIES: tuple[Callable[[], Iterator[Net]], ...] = (
    _resnets,
    _fire,
    _inverted_residuals,
    _cross_stage,
    _shuffled,
    _detectors,
    _dense_blocks,
    _classifiers,
    _transformers,
)

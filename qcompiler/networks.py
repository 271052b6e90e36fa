"""Small networks that are timed for a cost table: chains of the operators that models are made of, in many sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from qcompiler.composed import composed
from qcompiler.microbench import Net


def networks() -> Iterator[Net]:
    """All networks, always in the same order."""
    yield from _dense()
    yield from _depthwise()
    yield from _first_layers()
    yield from _odd()
    yield from _between_convolutions()
    yield from _matrices()
    yield from _islands()
    yield from composed()


MAPS = (
    (8, 28),
    (16, 112),
    (16, 28),
    (24, 56),
    (32, 56),
    (32, 28),
    (48, 28),
    (64, 56),
    (64, 28),
    (96, 14),
    (32, 112),
    (64, 112),
    (128, 28),
    (128, 14),
)
"""(channels, size) of feature maps."""

SMALL_MAPS = ((16, 12), (32, 8), (64, 7), (256, 14), (320, 7), (512, 7))
FEW_MAPS = ((16, 56), (64, 28), (64, 56), (128, 14), (256, 7))


def _map(channels: int, size: int) -> Net:
    return Net(1, channels, size, size)


def _repeat(net: Net, times: int, step: str, *args: Any, **options: Any) -> Net:
    for _ in range(times):
        getattr(net, step)(*args, **options)
    return net


def _dense() -> Iterator[Net]:
    for channels, size in MAPS + SMALL_MAPS:
        yield _repeat(_map(channels, size), 4, "conv")
        yield _repeat(_map(channels, size), 3, "conv", kernel=3)
    for channels, size, kernel in ((16, 14, 5), (64, 14, 5), (32, 28, 7)):
        yield _repeat(_map(channels, size), 3, "conv", kernel=kernel)
    for channels, wide, size in (
        (16, 96, 56),
        (24, 144, 56),
        (32, 192, 28),
        (80, 480, 14),
        (192, 1152, 7),
        (16, 64, 12),
    ):
        yield _map(channels, size).conv(wide).conv(channels).conv(wide).conv(channels)
    for channels, size in ((32, 56), (64, 56), (128, 28)):
        yield _map(channels, size).conv(2 * channels, 3, 2).conv(4 * channels, 3, 2)


def _depthwise() -> Iterator[Net]:
    for channels, size, kernel in (
        (16, 112, 3), (32, 56, 3), (48, 28, 3), (64, 28, 3), (96, 28, 5), (144, 28, 3), (192, 14, 3),
        (240, 14, 5), (480, 14, 5), (1152, 7, 5), (672, 7, 3), (64, 7, 3), (24, 56, 3), (40, 28, 3), (8, 56, 3), (120, 14, 3),
        (120, 28, 5), (72, 28, 5), (40, 14, 5),
    ):  # fmt: skip
        yield _repeat(_map(channels, size), 4, "depthwise", kernel)
        yield _map(channels, size).depthwise(kernel).conv().depthwise(kernel).conv().depthwise(kernel).conv()
    for channels, size in ((32, 56), (64, 56), (128, 28)):
        yield _map(channels, size).depthwise(3, 2).conv(2 * channels).depthwise(3, 2).conv(4 * channels)


def _first_layers() -> Iterator[Net]:
    for outs, size, kernel, stride in (
        (16, 224, 3, 2), (32, 224, 3, 2), (64, 224, 7, 2), (16, 64, 3, 1), (32, 32, 3, 1), (8, 28, 5, 1), (8, 320, 3, 2),
    ):  # fmt: skip
        for ins in (1, 3):
            yield _map(ins, size).conv(outs, kernel, stride)
            yield _map(ins, size).conv(outs, kernel, stride).conv()


def _odd() -> Iterator[Net]:
    """Numbers of channels that the kernels do not like, and groups."""
    for channels, size, kernel in (
        (6, 28, 3), (12, 28, 3), (18, 56, 3), (30, 14, 3), (10, 28, 1), (22, 28, 1), (50, 28, 1), (86, 14, 1),
    ):  # fmt: skip
        yield _repeat(_map(channels, size), 3, "conv", kernel=kernel)
    for channels, size, group in (
        (32, 28, 4), (64, 28, 8), (128, 28, 32), (64, 14, 2), (128, 14, 4), (96, 28, 6), (160, 14, 10),
        (400, 7, 25), (256, 7, 32), (64, 7, 8), (256, 14, 16),
    ):  # fmt: skip
        yield _repeat(_map(channels, size), 2, "conv", kernel=3, group=group)


def _between_convolutions() -> Iterator[Net]:
    for op in ("HardSwish", "Sigmoid", "HardSigmoid", "Tanh", "LeakyRelu", "Gelu", "Add", "Mul"):
        for channels, size in FEW_MAPS:
            net = _map(channels, size).conv(relu=False)
            for _ in range(2):
                others = [net.last, net.conv(relu=False).last] if op in ("Add", "Mul") else []
                net.op(op, *others).conv(relu=False)
            yield net
    for channels, size in FEW_MAPS:
        yield _repeat(_map(channels, size).conv(), 3, "residual")
        yield _repeat(_map(channels, size).conv(), 2, "residual", 3)
        yield _map(channels, size).conv().squeeze_excite().conv().squeeze_excite().conv()
        yield _repeat(_map(channels, size).conv(), 2, "concat")
        pool: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4}
        yield _map(channels, size).conv().op("MaxPool", **pool).conv().op("MaxPool", **pool).conv()
        yield _map(channels, size).conv().op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv()
        yield _map(channels, size).conv().op("GlobalAveragePool").op("Flatten").linear(10)
    for channels, size in FEW_MAPS[:4]:
        yield from _movers(channels, size)
        yield from _in_float(channels, size)


def _movers(channels: int, size: int) -> Iterator[Net]:
    net = _map(channels, size).conv(relu=False)
    source = net.last
    yield net.op("Sigmoid").op("Mul", net.last, source).conv()
    twice = np.array([1, 1, 2, 2], np.float32)
    for mode in ("nearest", "linear"):
        net = _map(channels, size // 2).conv()
        where: dict[str, Any] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        yield net.op("Resize", net.last, "", twice, mode=mode, **where).conv()
    for perm in ([0, 2, 3, 1], [0, 2, 1, 3]):
        net = _map(channels, size).conv().op("Transpose", perm=perm)
        net.op("Reshape", net.last, np.array([size * size, channels]), width=channels)
        yield net.linear(channels)
    net = _map(channels, size).conv()
    half = (np.array([0]), np.array([channels // 2]), np.array([1]))
    yield net.op("Slice", net.last, *half, width=channels // 2).conv()
    net = _map(channels, size).conv()
    yield net.op("Pad", net.last, np.array([0, 0, 1, 1, 0, 0, 1, 1])).conv()


def _in_float(channels: int, size: int) -> Iterator[Net]:
    """Operators that stay float, between convolutions."""
    net = _map(channels, size).conv(relu=False)
    net.op("Sub", np.full((1, channels, 1, 1), 2.5, np.float32), net.last, width=channels)
    net.op("Div", np.ones((), np.float32), net.last, width=channels)
    yield net.op("Sub", net.last, np.ones((), np.float32)).conv()
    yield _map(channels, size).conv().op("Softmax", axis=1).conv().op("Softmax", axis=1)
    yield _map(channels, size).conv().op("AveragePool", kernel_shape=[2, 2], strides=[2, 2]).conv()
    yield _map(channels, size).op("ReduceMean", "x", np.array([1])).op("Mul", "x", "t0").conv()
    net = _map(channels, size).conv()
    weight = np.full((channels, channels, 2, 2), 0.1, np.float32)
    yield net.op("ConvTranspose", net.last, weight, kernel_shape=[2, 2], strides=[2, 2]).conv()
    half, zero = np.full(channels, 0.5, np.float32), np.zeros(channels, np.float32)
    net = _map(channels, size).conv(relu=False)
    yield net.op("InstanceNormalization", net.last, half, zero).op("Relu").conv()


def _matrices() -> Iterator[Net]:
    for rows, *widths in (
        (128, 384, 384), (16, 64, 64), (64, 120, 120), (128, 384, 1536), (64, 192, 768), (40, 120, 480), (197, 384, 384),
        (197, 384, 1152), (8, 256, 256), (1, 64, 10), (1, 256, 128), (1, 512, 1000), (1, 1280, 1000), (1, 768, 3072),
        (1, 2048, 128), (1, 128, 64),
    ):  # fmt: skip
        net = Net(rows, widths[0])
        for _, width in pairwise((*widths, *widths, widths[0])):
            net.linear(width).op("Relu")
        yield net
    for rows, width in ((50, 384), (197, 192), (197, 384), (40, 120), (128, 384)):
        net = Net(1, rows, width)
        for _ in range(3):
            net.op("LayerNormalization", net.last, np.ones(width, np.float32), axis=-1).linear(width)
        yield net
        net = Net(1, rows, width)
        for _ in range(2):
            net.op("LayerNormalization", net.last, np.ones(width, np.float32), axis=-1)
            net.linear(4 * width).op("Gelu").linear(width)
        yield net
        net = Net(1, rows, width).linear(width).op("Reshape", "t1", np.array([1, rows * width // 4, 4]))
        yield net.op("Softmax", axis=-1).op("Reshape", net.last, np.array([1, rows, width]), width=width).linear(width)
        yield Net(1, rows, width).linear(width).op("Softmax", axis=-1).linear(width).op("Softmax", axis=-1)
        net = Net(1, rows, width).linear(width)
        values = net.last
        net.op("Transpose", perm=[0, 2, 1]).op("MatMul", values, net.last).op("Softmax", axis=-1)
        yield net.op("MatMul", net.last, values, width=width).linear(width)


def _islands() -> Iterator[Net]:
    """Float layers between quantized ones."""
    for channels, size in ((16, 56), (32, 28), (64, 28), (64, 56), (128, 14), (256, 7)):
        for step in ("conv", "depthwise"):
            net = _repeat(_map(channels, size), 5, step)
            net.keep = ("node_t2", "node_t6")
            yield net
    for rows, width in ((1, 256), (64, 256), (128, 384)):
        net = _repeat(Net(rows, width), 4, "linear", width)
        net.keep = ("node_t2", "node_t6")
        yield net

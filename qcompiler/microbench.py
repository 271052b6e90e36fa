"""Small networks that are timed for a cost table: chains of the operators that models are made of, in many sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qcompiler import ir

OPSET = 20


class Net:
    """Builds a float model, operator by operator, with random weights. `keep`: names of nodes that are to stay float.

    Each method appends to the last result and returns the net.
    """

    def __init__(self, *shape: int) -> None:
        self._rng = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._width = {"x": shape[1] if len(shape) == 4 else shape[-1]}
        self.shape = shape
        self.last = "x"
        self.keep: tuple[str, ...] = ()

    def op(self, op: str, *inputs: str | NDArray[Any], width: int = 0, **attrs: Any) -> Net:
        """An operator on tensors and constants, or on the last result. `width`: its channels, if it changes their number."""
        names = [i if isinstance(i, str) else self._constant(i) for i in inputs] or [self.last]
        self.last, source = f"t{len(self._nodes)}", names[0]
        self._nodes.append(helper.make_node(op, names, [self.last], name=f"node_{self.last}", **attrs))
        self._width[self.last] = width or self._width[source]
        return self

    def _constant(self, values: NDArray[Any]) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, outs: int = 0, kernel: int = 1, stride: int = 1, group: int = 1, relu: bool = True) -> Net:
        """A convolution that keeps the number of channels unless `outs` is given and the size at stride 1, then Relu."""
        ins = self._width[self.last]
        outs = outs or ins
        weight = self._rng.normal(size=(outs, ins // group, kernel, kernel)) / (ins // group * kernel**2) ** 0.5
        inputs = (self.last, weight.astype(np.float32), np.zeros(outs, np.float32))
        shape: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        self.op("Conv", *inputs, width=outs, group=group, **shape)
        return self.op("Relu") if relu else self

    def depthwise(self, kernel: int = 3, stride: int = 1) -> Net:
        """A depthwise convolution and Relu."""
        return self.conv(0, kernel, stride, self._width[self.last])

    def linear(self, columns: int) -> Net:
        """A product with a constant matrix, and a bias."""
        rows = self._width[self.last]
        weight = self._rng.normal(size=(rows, columns)) / rows**0.5
        self.op("MatMul", self.last, weight.astype(np.float32), width=columns)
        return self.op("Add", self.last, np.zeros(columns, np.float32))

    def residual(self, expand: int = 1) -> Net:
        """Pointwise convolutions whose result is added to what they read."""
        source, width = self.last, self._width[self.last]
        if expand > 1:
            self.conv(width * expand)
        return self.conv(width, relu=False).op("Add", self.last, source)

    def squeeze_excite(self) -> Net:
        """Scales per channel that depend on the means."""
        source, width = self.last, self._width[self.last]
        self.op("GlobalAveragePool").conv(max(8, width // 32 * 8)).conv(width, relu=False)
        return self.op("HardSigmoid").op("Mul", source, self.last)

    def concat(self) -> Net:
        """Two convolutions in a row, each to half of the channels, put together."""
        half = self._width[self.last] // 2
        first = self.conv(half).last
        return self.conv(half).op("Concat", first, self.last, width=2 * half, axis=1)

    def sample(self) -> NDArray[np.float32]:
        """A random input."""
        return self._rng.normal(size=self.shape).astype(np.float32)

    def model(self) -> onnx.ModelProto:
        """The model, whose output is the last result."""
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        y = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "net", [x], [y], self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=ir.IR_VERSION)


def networks() -> Iterator[Net]:
    """All networks, always in the same order."""
    yield from _dense()
    yield from _depthwise()
    yield from _first_layers()
    yield from _odd()
    yield from _between_convolutions()
    yield from _matrices()
    yield from _islands()


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
    for channels, size, group in ((32, 28, 4), (64, 28, 8), (128, 28, 32), (64, 14, 2), (128, 14, 4)):
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


def _movers(channels: int, size: int) -> Iterator[Net]:
    net = _map(channels, size).conv(relu=False)
    source = net.last
    yield net.op("Sigmoid").op("Mul", net.last, source).conv()
    twice = np.array([1, 1, 2, 2], np.float32)
    for mode in ("nearest", "linear"):
        net = _map(channels, size // 2).conv()
        where: dict[str, Any] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        yield net.op("Resize", net.last, "", twice, mode=mode, **where).conv()
    yield _map(channels, size).conv().op("Transpose", perm=[0, 2, 3, 1]).op("Transpose", perm=[0, 3, 1, 2]).conv()
    net = _map(channels, size).conv()
    half = (np.array([0]), np.array([channels // 2]), np.array([1]))
    yield net.op("Slice", net.last, *half, width=channels // 2).conv()
    net = _map(channels, size).conv()
    yield net.op("Pad", net.last, np.array([0, 0, 1, 1, 0, 0, 1, 1])).conv()


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
        for _ in range(2):
            net.op("LayerNormalization", net.last, np.ones(width, np.float32), axis=-1)
            net.linear(4 * width).op("Gelu").linear(width)
        yield net
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

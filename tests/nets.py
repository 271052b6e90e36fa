"""Random convolutional nets from a seed: every operator that can be integer, in the company that it keeps in real nets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx


class Map(NamedTuple):
    """A feature map of the net under construction: float32 [1, channels, size, size]."""

    name: str
    channels: int
    size: int


@dataclass
class Net:
    """A net under construction; every choice comes from one seeded generator."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    shapes: list[onnx.ValueInfoProto] = field(default_factory=list)

    def pick(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: Any) -> str:
        """Append a node; its outputs are called like it, with .1, .2 behind the first."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        made = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(onnx.helper.make_node(kind, inputs, made, name, domain=domain, **attrs))
        return name

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"const_{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        values = self.rng.standard_normal(shape) * self.rng.uniform(0.3, 2, (shape[0], *[1] * (len(shape) - 1)))
        if self.chance(0.2):
            values[self.rng.integers(shape[0])] = 0
        return self.constant(values / np.sqrt(np.prod(shape[1:])))

    def conv(self, x: Map, channels: int, kernel: int = 1, stride: int = 1, group: int = 1, dilation: int = 1) -> Map:
        reach = dilation * (kernel - 1)
        before = int(self.pick(0, reach // 2, reach)) if self.chance(0.3) else reach // 2
        inputs = [x.name, self.weight(channels, x.channels // group, kernel, kernel)]
        if self.chance(0.8):
            inputs.append(self.constant(self.rng.standard_normal(channels) * self.pick(0.1, 1, 5)))
        pads = [before, before, reach - before, reach - before]
        shape = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "dilations": [dilation] * 2}
        name = self.op("Conv", *inputs, group=group, pads=pads, **shape)
        return Map(name, channels, (x.size - 1) // stride + 1)

    def unary(self, kind: str, x: Map, *more: str, domain: str = "", **attrs: Any) -> Map:
        name = self.op(kind, x.name, *more, domain=domain, **attrs)
        if domain:  # ONNX cannot infer its shape
            shape = [1, x.channels, x.size, x.size]
            self.shapes.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        return x._replace(name=name)

    def binary(self, kind: str, x: Map, other: str) -> Map:
        operands = (x.name, other) if self.chance(0.7) else (other, x.name)
        return x._replace(name=self.op(kind, *operands))

    def model(self, size: int, outputs: list[str]) -> onnx.ModelProto:
        """The finished model on input x: float32 [1, 3, size, size]."""
        declare = onnx.helper.make_tensor_value_info
        values = [declare(name, onnx.TensorProto.FLOAT, None) for name in outputs]
        inputs = [declare("x", onnx.TensorProto.FLOAT, [1, 3, size, size])]
        graph = onnx.helper.make_graph(self.nodes, "net", inputs, values, self.initializers, value_info=self.shapes)
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        return onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))


Part = Callable[[Net, Map], Map]


def relu(net: Net, x: Map) -> Map:
    return net.unary("Relu", x)


def clip(net: Net, x: Map) -> Map:
    low, high = net.pick((0, 6), (0, 1), (-1, 1))
    return net.unary("Clip", x, net.constant(low), net.constant(high))


def table(net: Net, x: Map) -> Map:
    """An element-wise function."""
    kind, domain, attrs = net.pick(
        ("HardSwish", "", {}),
        ("Sigmoid", "", {}),
        ("HardSigmoid", "", {"alpha": 1 / 6, "beta": 0.5}),
        ("Tanh", "", {}),
        ("LeakyRelu", "", {"alpha": 0.1}),
        ("Elu", "", {"alpha": 0.7}),
        ("Erf", "", {}),
        ("Abs", "", {}),
        ("Neg", "", {}),
        ("Gelu", "com.microsoft", {}),
        ("QuickGelu", "com.microsoft", {"alpha": 1.0}),
    )
    return net.unary(kind, x, domain=domain, **attrs)


def silu(net: Net, x: Map) -> Map:
    return net.binary("Mul", x, net.op("Sigmoid", x.name))


def activate(net: Net, x: Map) -> Map:
    return net.pick(relu, relu, clip, table, silu, lambda net, x: x)(net, x)


def plain(net: Net, x: Map) -> Map:
    """Conv of any kind, then an activation."""
    kernel = int(net.pick(1, 3, 3, 5))
    stride = int(net.pick(1, 1, 2)) if x.size >= 8 else 1
    return activate(net, net.conv(x, int(net.pick(8, 12, 16)), kernel, stride, 1, int(net.pick(1, 1, 2))))


def depthwise(net: Net, x: Map) -> Map:
    y = activate(net, net.conv(x, x.channels, 3, group=x.channels))
    return net.conv(y, 8)


def residual(net: Net, x: Map) -> Map:
    """A chain of additions, as in a ResNet stage."""
    for _ in range(int(net.pick(1, 2, 3))):
        inner = net.conv(relu(net, net.conv(x, 8, 3)), x.channels, 3)
        x = net.binary("Add", inner, x.name)
        x = relu(net, x) if net.chance(0.7) else x
    return x


def squeeze_excite(net: Net, x: Map) -> Map:
    pooled = Map(net.op("GlobalAveragePool", x.name), x.channels, 1)
    gate = net.conv(relu(net, net.conv(pooled, 4)), x.channels)
    gate = net.unary("HardSigmoid", gate, alpha=1 / 6, beta=0.5) if net.chance(0.5) else net.unary("Sigmoid", gate)
    return net.conv(net.binary("Mul", x, gate.name), 8)


def inception(net: Net, x: Map) -> Map:
    """Concat of branches, one of them used elsewhere too."""
    left, right = relu(net, net.conv(x, 8)), activate(net, net.conv(x, 4, 3))
    y = Map(net.op("Concat", left.name, right.name, x.name, axis=1), 12 + x.channels, x.size)
    return net.binary("Add", net.conv(y, 8), left.name)


def condenser(net: Net, x: Map) -> Map:
    """Attention condenser (Wong et al. 2020, arXiv 2008.04245): residual * S * scale."""
    if x.size % 2:
        return plain(net, x)
    small = net.op("MaxPool", x.name, kernel_shape=[2, 2], strides=[2, 2])
    inner = net.conv(Map(small, x.channels, x.size // 2), 8, 3, group=2 if x.channels % 2 == 0 else 1)
    inner = net.conv(relu(net, inner), 4)
    scales = net.constant([1, 1, 2, 2])
    up = net.op("Resize", inner.name, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric")
    attention = net.unary("Sigmoid", net.conv(Map(up, 4, x.size), x.channels))
    scaled = net.binary("Mul", net.binary("Mul", x, attention.name), net.constant([1.3]))
    return net.conv(scaled, 8) if net.chance(0.5) else net.binary("Add", net.conv(scaled, x.channels), x.name)


def affine(net: Net, x: Map) -> Map:
    """Constants as operands: per channel and scalar, on either side."""
    channels = net.constant(net.rng.standard_normal((x.channels, 1, 1)))
    y = net.binary("Mul", net.conv(x, x.channels), channels)
    return net.conv(net.binary("Add", y, net.constant(net.pick(0.5, -3))), 8)


def squares(net: Net, x: Map) -> Map:
    y = net.conv(x, 8)
    twice = net.pick("Mul", "Add")
    return net.conv(net.binary(twice, y, y.name), 8)


def shuffle(net: Net, x: Map) -> Map:
    """Split, transform a part, Concat, permute the channels."""
    y = net.conv(x, 8, 3)
    first = net.op("Split", y.name, outputs=2, axis=1)
    left = net.conv(Map(first, 4, y.size), 4, 3)
    joined = net.op("Concat", left.name, f"{first}.1", axis=1)
    order = net.constant([0, 4, 1, 5, 2, 6, 3, 7], np.int64)
    return net.conv(Map(net.op("Gather", joined, order, axis=1), 8, y.size), 8)


def movers(net: Net, x: Map) -> Map:
    y = net.conv(x, 8)
    if y.size % 2 == 0:
        deep = Map(net.op("SpaceToDepth", y.name, blocksize=2), 32, y.size // 2)
        y = Map(net.op("DepthToSpace", relu(net, net.conv(deep, 32)).name, blocksize=2), 8, y.size)
    padded = net.op("Pad", y.name, net.constant([0, 0, 1, 0, 0, 0, 1, 2], np.int64))
    cut = net.op("Slice", padded, *(net.constant([v], np.int64) for v in (1, y.size + 1, 2)))
    pooled = net.op("MaxPool", cut, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    turned = net.op("Transpose", net.op("Slice", pooled, *(net.constant([v], np.int64) for v in (0, y.size, 3))))
    back = net.op("Transpose", turned)
    return net.conv(Map(back, 8, y.size), 8)


def twins(net: Net, x: Map) -> Map:
    """Two convolutions on different inputs share their weights."""
    first = relu(net, net.conv(x, 8))
    weight = net.weight(8, 8, 1, 1)
    left = net.op("Conv", first.name, weight)
    right = net.op("Conv", left, weight)
    return Map(net.op("Add", left, right), 8, first.size)


PARTS: tuple[Part, ...] = (
    plain,
    depthwise,
    residual,
    squeeze_excite,
    inception,
    condenser,
    affine,
    squares,
    shuffle,
    movers,
    twins,
)


def classify(net: Net, x: Map) -> list[str]:
    flat = net.op("Flatten", net.op("GlobalAveragePool", x.name))
    hidden = net.op("Relu", net.op("Gemm", flat, net.weight(x.channels, 12), net.constant(net.rng.standard_normal(12))))
    return [net.op("Softmax", net.op("Gemm", hidden, net.weight(12, 5))) if net.chance(0.5) else hidden]


def detect(net: Net, x: Map) -> list[str]:
    """Two heads on one map, one straight from a Conv; the map itself is an output too."""
    return [net.conv(x, 6, 3).name, net.unary("Sigmoid", net.conv(x, 4)).name, x.name]


def attend(net: Net, x: Map) -> list[str]:
    """A token matrix: Reshape, Transpose, MatMul of rank 3 with a bias added."""
    tokens = net.op("Reshape", x.name, net.constant([1, x.channels, -1], np.int64))
    rows = net.op("Transpose", tokens, perm=[0, 2, 1])
    return [net.op("MatMul", net.op("MatMul", rows, net.weight(x.channels, 12)), net.weight(12, 7))]


def random_net(seed: int, parts: int = 4) -> onnx.ModelProto:
    """The net of a seed: a stem, a few parts, a head."""
    net = Net(np.random.default_rng(seed))
    size = int(net.pick(8, 12, 14))
    x = activate(net, net.conv(Map("x", 3, size), 8, 3))
    for _ in range(parts):
        x = net.pick(*PARTS)(net, x)
    return net.model(size, net.pick(classify, detect, attend)(net, x))

"""Random valid CNNs from choices that hypothesis draws, so that one that fails shrinks to a small one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Identity", "Neg", "Abs")
STEPS = ("conv", "conv", "conv", "batchnorm", "activation", "binary", "scale", "concat", "pool", "pad", "transposed")
SIZE = 8


@dataclass
class Graph:
    """A model that grows: its nodes, constants, and the channels and height of each tensor."""

    draw: st.DrawFn
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.draw(st.integers(0, 99)))

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def add(self, op: str, inputs: list[str], shape: tuple[int, int], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"n{len(self.nodes)}", **attributes))
        self.shapes[name] = shape
        return name

    def pick(self) -> str:
        """Mostly the last tensor: smaller numbers are simpler, and later."""
        names = list(self.shapes)
        return names[-1 - self.draw(st.sampled_from([0, 0, 0, 0, 1, 2, 3])) % len(names)]

    def like(self, test: Any) -> str:
        return self.draw(st.sampled_from([name for name, shape in self.shapes.items() if test(shape)][::-1]))

    def step(self) -> None:
        getattr(self, self.draw(st.sampled_from(STEPS)))()

    def conv(self) -> None:
        x = self.pick()
        c, h = self.shapes[x]
        groups = self.draw(st.sampled_from([1, 1, c, 2 if c % 2 == 0 else 1]))
        out = groups * self.draw(st.integers(1, 2)) if groups > 1 else self.draw(st.sampled_from([4, 6, 8]))
        kernel, stride = self.draw(st.sampled_from([1, 3])), self.draw(st.integers(1, 2)) if h >= 4 else 1
        scale = self.draw(st.sampled_from([1.0, 0.1, 3.0])) / (kernel * np.sqrt(c // groups))
        inputs = [x, self.normal(out, c // groups, kernel, kernel, scale=scale)]
        if self.draw(st.booleans()):
            inputs.append(self.normal(out, scale=self.draw(st.sampled_from([0.1, 1.0]))))
        pad = kernel // 2
        size = (h + 2 * pad - kernel) // stride + 1
        self.add("Conv", inputs, (out, size), group=groups, pads=[pad] * 4, strides=[stride] * 2)

    def transposed(self) -> None:
        x = self.pick()
        c, h = self.shapes[x]
        if h <= SIZE // 2:
            self.add("ConvTranspose", [x, self.normal(c, 4, 2, 2, scale=0.5)], (4, 2 * h), strides=[2, 2])

    def batchnorm(self) -> None:
        x = self.pick()
        c = self.shapes[x][0]
        variance = self.constant((self.rng.random(c) + 0.3).astype(np.float32))
        inputs = [x, self.normal(c), self.normal(c), self.normal(c), variance]
        self.add("BatchNormalization", inputs, self.shapes[x], epsilon=self.draw(st.sampled_from([1e-5, 1e-3])))

    def activation(self) -> None:
        x, op = self.pick(), self.draw(st.sampled_from(ACTIVATIONS))
        op = "Relu" if op == "HardSwish" and self.opset < 14 else op
        if op == "Clip" and self.opset < 11:
            self.add(op, [x], self.shapes[x], min=0.0, max=6.0)
        else:
            bounds = [self.constant(np.float32(0)), self.constant(np.float32(6))] if op == "Clip" else []
            self.add(op, [x, *bounds], self.shapes[x])

    def binary(self) -> None:
        x = self.pick()
        other = self.like(lambda shape: shape == self.shapes[x])
        self.add(self.draw(st.sampled_from(["Add", "Mul", "Sub"])), [x, other], self.shapes[x])

    def pool(self) -> None:
        x = self.pick()
        c, h = self.shapes[x]
        if h >= 4:
            op = self.draw(st.sampled_from(["MaxPool", "AveragePool"]))
            self.add(op, [x], (c, h // 2), kernel_shape=[2, 2], strides=[2, 2])

    def pad(self) -> None:
        """Never behind another Pad: ONNX Runtime joins both with a pool into one that it refuses to load."""
        x = self.pick()
        if any(x in node.output and node.op_type == "Pad" for node in self.nodes):
            return
        c, h = self.shapes[x]
        pads = [0, 0, 1, 1, 0, 0, 1, 1]
        if self.opset < 11:
            self.add("Pad", [x], (c, h + 2), pads=pads)
        else:
            self.add("Pad", [x, self.constant(np.array(pads))], (c, h + 2))

    def scale(self) -> None:
        x = self.pick()
        shape = self.draw(st.sampled_from([(1, self.shapes[x][0], 1, 1), ()]))
        self.add(self.draw(st.sampled_from(["Add", "Mul"])), [x, self.normal(*shape)], self.shapes[x])

    def concat(self) -> None:
        x = self.pick()
        other = self.like(lambda shape: shape[1] == self.shapes[x][1])
        channels = self.shapes[x][0] + self.shapes[other][0]
        if channels <= 24:
            self.add("Concat", [x, other], (channels, self.shapes[x][1]), axis=1)

    def head(self) -> None:
        x = list(self.shapes)[-1]
        c = self.shapes[x][0]
        self.add("GlobalAveragePool", [x], (c, 1))
        flat = self.add("Flatten", [list(self.shapes)[-1]], (c, 1))
        alpha, beta = self.draw(st.sampled_from([(1.0, 1.0), (0.5, 1.0), (1.0, 2.0)]))
        y = self.add("Gemm", [flat, self.normal(c, 5), self.normal(5)], (5, 1), alpha=alpha, beta=beta)
        if self.draw(st.booleans()):
            self.add("Softmax", [y], (5, 1), axis=1)

    def model(self) -> onnx.ModelProto:
        """The model; its outputs are the last tensor, those that nobody reads, and perhaps one from inside."""
        made = [name for node in self.nodes for name in node.output]
        read = {name for node in self.nodes for name in node.input}
        outputs = [name for name in made if name not in read]
        if self.draw(st.booleans()):
            outputs += [name for name in [self.draw(st.sampled_from(made))] if name not in outputs]
        source = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, self.shapes["x"][0], SIZE, SIZE])
        targets = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "random", [source], targets, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


@st.composite
def cnns(draw: st.DrawFn) -> onnx.ModelProto:
    """A model with an input `x` of float32[1, C, 8, 8]."""
    graph = Graph(draw, draw(st.sampled_from([17, 9, 12, 13, 21])))
    graph.shapes["x"] = (draw(st.sampled_from([3, 1, 4, 8])), SIZE)
    graph.conv()
    for _ in range(draw(st.integers(0, 8))):
        graph.step()
    if draw(st.booleans()):
        graph.head()
    return graph.model()

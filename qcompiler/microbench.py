"""A builder of small float models with random weights, and the blocks that networks are made of."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qcompiler import ir

OPSET = 20

KEPT = 0.4
"""The share of the layers of a mixed network that are kept float."""


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

    def width(self, tensor: str = "") -> int:
        """The channels of a tensor, or of the last result."""
        return self._width[tensor or self.last]

    def split(self, parts: int) -> tuple[str, ...]:
        """The channels of the last result in equal parts, the last of which is the last result from then on."""
        source, node = self.last, len(self._nodes)
        names = tuple(f"t{node}_{part}" for part in range(parts))
        split = helper.make_node("Split", [source], names, name=f"node_t{node}", axis=1, num_outputs=parts)
        self._nodes.append(split)
        self._width |= dict.fromkeys(names, self._width[source] // parts)
        self.last = names[-1]
        return names

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

    def mixed(self, seed: int) -> Net:
        """The same with some of the convolutions and products kept float."""
        layers = [n.name for n in self._nodes if n.op_type in ("Conv", "MatMul")]
        other = copy(self)
        other.keep = tuple(np.array(layers)[np.random.default_rng(seed).random(len(layers)) < KEPT].tolist())
        return other

    def sample(self) -> NDArray[np.float32]:
        """A random input."""
        return self._rng.normal(size=self.shape).astype(np.float32)

    def model(self) -> onnx.ModelProto:
        """The model, whose output is the last result."""
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        y = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "net", [x], [y], self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=ir.IR_VERSION)

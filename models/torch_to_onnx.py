"""Write a PyTorch module as ONNX with one node per layer.

`torch.onnx.export` folds BatchNormalization into Conv; a model for a compiler should arrive as it was trained.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

OPSET = 17
IR_VERSION = 8


class GraphWriter:
    """The nodes and initializers of a graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: torch.Tensor | np.ndarray) -> str:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, op_type: str, inputs: list[str], name: str, **attributes: object) -> None:
        """Append a node whose only output has the node's own name."""
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))


def _conv(w: GraphWriter, layer: nn.Conv2d, path: str, x: str, name: str) -> None:
    inputs = [x, w.constant(f"{path}.weight", layer.weight)]
    if layer.bias is not None:
        inputs.append(w.constant(f"{path}.bias", layer.bias))
    pads = [*layer.padding, *layer.padding]
    shape = {"kernel_shape": layer.kernel_size, "strides": layer.stride, "dilations": layer.dilation}
    w.node("Conv", inputs, name, pads=pads, group=layer.groups, **shape)


def _batch_norm(w: GraphWriter, layer: nn.BatchNorm2d, path: str, x: str, name: str) -> None:
    parts = ("weight", "bias", "running_mean", "running_var")
    constants = [w.constant(f"{path}.{part}", getattr(layer, part)) for part in parts]
    w.node("BatchNormalization", [x, *constants], name, epsilon=layer.eps)


def _linear(w: GraphWriter, layer: nn.Linear, path: str, x: str, name: str) -> None:
    inputs = [x, w.constant(f"{path}.weight", layer.weight), w.constant(f"{path}.bias", layer.bias)]
    w.node("Gemm", inputs, name, transB=1)


def _relu6(w: GraphWriter, _layer: nn.ReLU6, _path: str, x: str, name: str) -> None:
    bounds = [w.constant("relu6.min", np.float32(0)), w.constant("relu6.max", np.float32(6))]
    w.node("Clip", [x, *bounds], name)


def _zero_pad(w: GraphWriter, layer: nn.ZeroPad2d, path: str, x: str, name: str) -> None:
    left, right, top, bottom = layer.padding
    pads = np.array([0, 0, top, left, 0, 0, bottom, right], np.int64)
    w.node("Pad", [x, w.constant(f"{path}.pads", pads)], name)


def _max_pool(w: GraphWriter, layer: nn.MaxPool2d, _path: str, x: str, name: str) -> None:
    w.node("MaxPool", [x], name, kernel_shape=[layer.kernel_size] * 2, strides=[layer.stride] * 2)


def _upsample(w: GraphWriter, layer: nn.Upsample, path: str, x: str, name: str) -> None:
    factor = layer.scale_factor
    scales = w.constant(f"{path}.scales", np.array([1, 1, factor, factor], np.float32))
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    w.node("Resize", [x, "", scales], name, **how)


def _same(op_type: str) -> Callable[..., None]:
    """A layer that is one ONNX node with neither constants nor attributes."""
    return lambda w, _layer, _path, x, name: w.node(op_type, [x], name)


LAYERS: dict[type[nn.Module], Callable[..., None]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    nn.ReLU: _same("Relu"),
    nn.ReLU6: _relu6,
    nn.Sigmoid: _same("Sigmoid"),
    nn.ZeroPad2d: _zero_pad,
    nn.MaxPool2d: _max_pool,
    nn.Upsample: _upsample,
    nn.AdaptiveAvgPool2d: _same("GlobalAveragePool"),
    nn.Flatten: _same("Flatten"),
}
FUNCTIONS = {operator.add: "Add", operator.mul: "Mul"}


def to_onnx(module: nn.Module, image: tuple[int, int, int], classes: int) -> onnx.ModelProto:
    """Convert an eval-mode classifier of float32 `image` [N, C, H, W] to `logits` [N, classes]."""
    writer = GraphWriter()
    traced = fx.symbolic_trace(module)
    names: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        names[node] = node.name
        if node.op == "placeholder":
            names[node] = "image"
        elif node.op == "get_attr":
            names[node] = writer.constant(node.target, operator.attrgetter(node.target)(module))
        elif node.op == "call_module":
            layer = module.get_submodule(node.target)
            LAYERS[type(layer)](writer, layer, node.target, names[node.args[0]], node.name)
        elif node.op == "call_function":
            writer.node(FUNCTIONS[node.target], [names[arg] for arg in node.args], node.name)
        elif node.op == "output":
            writer.nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        writer.nodes,
        type(module).__name__,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *image])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        list(writer.initializers.values()),
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def save(module: nn.Module, image: tuple[int, int, int], classes: int, path: Path) -> None:
    """Write `module` to `path` once ONNX Runtime agrees with PyTorch on random input."""
    module.eval()
    model = to_onnx(module, image, classes)
    x = torch.rand(3, *image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x).numpy()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"image": x.numpy()})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    onnx.save(model, path)

"""quantize-dynamic: int8 weights, and activations that are quantized at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node, Tensor, Variable
from qcompiler.op_checks import sums_fit
from qcompiler.quant import F32, QuantSpec
from qcompiler.rewrite import Refusal, Rewriter, Rule
from qcompiler.state import CompileState, Phase
from qcompiler_passes.blockwise import gather
from qcompiler_passes.linear import read
from qcompiler_passes.runtime_layers import missing_kernel, product, replace_nodes, rewrite_layers, take_bias

_PRODUCT = "com.microsoft.DynamicQuantizeMatMul"
_SHARED = "com.microsoft.MatMulIntegerToFloat"
_LSTM = "com.microsoft.DynamicQuantizeLSTM"
_SLOW = Refusal("a Conv is not faster if its input is quantized at run time; quantize-dynamic{conv=true} does it")
_LSTM_ATTRIBUTES = {"activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size"}


@dataclass(frozen=True)
class QuantizeDynamic:
    """Gemm, MatMul and LSTM with constant weights -> kernels that quantize what they read; large tables of rows in int8.

    A tensor that several products read is quantized once for all. Weights are symmetric, with a scale per output channel; what
    has fewer than `least` weights stays float, as do tables of fewer than `table` values. `conv`: Conv as well, as ConvInteger,
    which makes the model smaller but seldom faster.
    """

    least: int = 4096
    table: int = 65536
    conv: bool = False

    name: ClassVar[str] = "quantize-dynamic"
    requires: ClassVar[Phase] = Phase.FUSED
    establishes: ClassVar[Phase | None] = Phase.KERNELS

    def run(self, state: CompileState) -> int:
        """Return the number of operators replaced."""
        rules: dict[str, Rule] = {
            "Gemm": partial(_product, self.least),
            "MatMul": partial(_product, self.least),
            "LSTM": _lstm,
            "Gather": partial(gather, bits=8, least=self.table),
            "Conv": partial(_conv, self.least) if self.conv else lambda rewriter, node: _SLOW,
            "GRU": lambda rewriter, node: Refusal("ONNX Runtime has no GRU that quantizes what it reads"),
        }
        return rewrite_layers(state, rules, "dynamic")


def _product(least: int, rewriter: Rewriter, node: Node) -> Refusal | None:
    linear = product(node, least)
    refusal = linear if isinstance(linear, Refusal) else missing_kernel(rewriter.state, _PRODUCT)
    if refusal is not None or isinstance(linear, Refusal):
        return refusal
    if overflow := sums_fit(linear.raw.T if node.attrs.get("transB") else linear.raw, 1):
        return Refusal(overflow, node.inputs[1].name)
    spec, per_channel = rewriter.state.target.weight, rewriter.state.target.per_channel
    integers, scales = _quantized(linear.weight[0, :, :, 0].astype(np.float32), spec, 1 if per_channel else (0, 1))
    bias, result, nodes = take_bias(rewriter, linear)
    source, name = node.inputs[0], node.inputs[1].name
    weight = rewriter.constant(f"{name}_q", np.ascontiguousarray(integers.T))
    scale = rewriter.constant(f"{name}_scale", scales)
    none = Variable.empty()
    last = [none] if bias is None else [none, rewriter.constant(f"{node.name}_bias", bias)]
    if _is_shared(rewriter, node, least):
        q, step, zero = _integers(rewriter, node)
        inputs, key = [q, weight, step, scale, zero, *last], _SHARED
    else:
        inputs, key = [source, weight, scale, *last], _PRODUCT
    inputs = inputs if bias is not None else inputs[:-1]
    domain, op = key.rsplit(".", maxsplit=1)
    new = rewriter.node(op, inputs, origin=nodes, hint=node.name, domain=domain)
    replace_nodes(rewriter, nodes, new, result)
    return None


def _conv(least: int, rewriter: Rewriter, node: Node) -> Refusal | None:
    """Conv -> ConvInteger, Cast, Mul by both scales, Add of the bias; weights are uint8 around 128, the faster type."""
    linear = read(node)
    if isinstance(linear, Refusal):
        return linear
    raw, target = linear.raw, rewriter.state.target
    if raw.dtype != np.float32 or raw.size < least or not np.isfinite(raw).all():
        return Refusal(f"it has fewer than {least} weights, or such that are not finite float32", node.inputs[1].name)
    integers, scales = _quantized(raw, target.weight, tuple(range(1 if target.per_channel else 0, raw.ndim)))
    name, channels = node.inputs[1].name, (-1, *[1] * (raw.ndim - 2))
    weight = rewriter.constant(f"{name}_q", (integers.astype(np.int16) + 128).astype(np.uint8))
    scale = rewriter.constant(f"{name}_scale", scales.reshape(channels if target.per_channel else ()))
    q, step, zero = _integers(rewriter, node)
    inputs = [q, weight, zero, rewriter.constant(f"{name}_zero", np.uint8(128))]
    product = rewriter.node("ConvInteger", inputs, origin=node, hint=node.name, **node.attrs)
    real = rewriter.node("Cast", product.outputs, origin=node, to=onnx.TensorProto.FLOAT)
    factor = rewriter.node("Mul", [step, scale], origin=node)
    last = rewriter.node("Mul", [real.outputs[0], factor.outputs[0]], origin=node)
    if linear.bias is not None:
        bias = rewriter.constant(f"{node.name}_bias", linear.bias.reshape(channels).astype(np.float32))
        last = rewriter.node("Add", [last.outputs[0], bias], origin=node)
    replace_nodes(rewriter, [node], last, node.outputs[0])
    return None


def _quantized(rows: F32, spec: QuantSpec, axis: int | tuple[int, ...]) -> tuple[NDArray[np.int8], F32]:
    """Integers of the shape of `rows`, and scales, shared over `axis`: the largest magnitude is the end of the range."""
    largest = np.abs(rows).max(axis=axis, keepdims=True)
    scale = np.maximum(largest / np.float32(spec.qmax), np.finfo(np.float32).tiny).astype(np.float32)
    integers = np.clip(np.rint(rows / scale), spec.qmin, spec.qmax).astype(np.int8)
    return integers, scale.squeeze(axis)


def _integers(rewriter: Rewriter, node: Node) -> list[Tensor]:
    """The integers, scale and zero point of what `node` reads, found at run time, once for all that read it."""
    source = node.inputs[0]
    made = next((r for r in rewriter.users(source) if r.op == "DynamicQuantizeLinear"), None)
    made = made or rewriter.node("DynamicQuantizeLinear", [source], 3, origin=node, hint=f"{node.name}_quantize")
    return list(made.outputs)


def _is_shared(rewriter: Rewriter, node: Node, least: int) -> bool:
    """Whether other products read what `node` reads, and the target has a kernel for that."""
    source, readers = node.inputs[0], rewriter.users(node.inputs[0])
    others = [r for r in readers if r.op in ("Gemm", "MatMul") and r is not node and r.inputs[0] is source]
    shared = any(not isinstance(product(other, least), Refusal) for other in others)
    shared = shared or any(r.op == "DynamicQuantizeLinear" for r in readers)
    return shared and missing_kernel(rewriter.state, _SHARED) is None


def _lstm(rewriter: Rewriter, node: Node) -> Refusal | None:
    """W, R [directions, 4 * hidden, inputs] become int8 [directions, inputs, 4 * hidden]; scales per channel or direction."""
    unknown = [a for a in node.attrs if a not in _LSTM_ATTRIBUTES and node.attrs[a] != 0]
    if unknown:
        return Refusal(f"the kernel has no attribute {unknown[0]}", node.name)
    weights = [ir.value(t) for t in node.inputs[1:3]]
    if any(w is None or w.dtype != np.float32 or not np.isfinite(w).all() for w in weights):
        return Refusal("the weights are not constants of float32", node.name)
    refusal = missing_kernel(rewriter.state, _LSTM)
    if refusal is not None:
        return refusal
    constants, params = [], []
    for tensor in node.inputs[1:3]:
        target = rewriter.state.target
        integers, scale = _quantized(ir.array(tensor), target.weight, 2 if target.per_channel else (1, 2))
        constants.append(rewriter.constant(f"{tensor.name}_q", np.ascontiguousarray(integers.transpose(0, 2, 1))))
        params.append(rewriter.constant(f"{tensor.name}_scale", scale))
        params.append(rewriter.constant(f"{tensor.name}_zero", np.zeros(scale.shape, np.int8)))
    rest = [*node.inputs[3:8], *(Variable.empty() for _ in range(8 - len(node.inputs)))]
    domain, op = _LSTM.rsplit(".", maxsplit=1)
    attrs = {name: value for name, value in node.attrs.items() if name in _LSTM_ATTRIBUTES}
    results = list(node.outputs)
    inputs = [node.inputs[0], *constants, *rest, *params]
    new = rewriter.node(op, inputs, len(results), origin=node, hint=node.name, domain=domain, **attrs)
    for index, tensor in enumerate(results):
        rewriter.take_output(new, tensor, index)
    rewriter.remove(node)
    return None

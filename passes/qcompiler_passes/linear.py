"""Operators with constant weights in one layout, and folding affine maps into them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler_passes.affine import Affine, Array, per_channel

_CONV = frozenset({"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"})
_ACCEPTED: dict[str, frozenset[str]] = {
    "Conv": _CONV,
    "ConvTranspose": _CONV | {"output_padding", "output_shape"},
    "Gemm": frozenset({"alpha", "beta", "transA", "transB"}),
    "MatMul": frozenset(),
}


@dataclass(frozen=True)
class Linear:
    """A Conv, ConvTranspose, Gemm or MatMul with constant weight and bias.

    raw: the weight as it is in the model.
    bias: float64, broadcasts to the result along its last axis (Conv: [channels]), with Gemm's beta multiplied in; or None.
    folded: the weight after folding, as `weight` has it; None while it is that of the model.
    """

    node: Node
    raw: NDArray[Any]
    bias: Array | None
    folded: Array | None = None

    @property
    def weight(self) -> Array:
        """float64 [groups, outputs, inputs, taps], with outputs and inputs per group, and Gemm's alpha multiplied in.

        Made anew each time: a model may have weights of gigabytes.
        """
        if self.folded is not None:
            return self.folded
        alpha = self.node.attrs.get("alpha", 1.0) if self.node.op == "Gemm" else 1.0
        weight: Array = _unify(self.node, self.raw).astype(np.float64)
        return weight if alpha == 1 else weight * np.float64(alpha)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Groups, outputs, inputs and taps: the shape of `weight`."""
        groups, outputs, inputs, taps = _unify(self.node, self.raw).shape
        return groups, outputs, inputs, taps

    @property
    def axis(self) -> int:
        """The channel axis of input and result, counted from the end."""
        return 1 - self.raw.ndim if self.node.op.startswith("Conv") else -1

    @property
    def rank(self) -> int:
        """The rank of input and result, or 1 where it is not known."""
        if self.node.op == "MatMul":
            known = ir.shape(self.node.inputs[0]) or ir.shape(self.node.outputs[0])
            return 1 if known is None else len(known)
        return self.raw.ndim

    @property
    def pads(self) -> bool:
        """Whether it may read zeros beyond the border."""
        attrs = self.node.attrs
        return attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(attrs.get("pads", []))

    def then(self, scale: Array, shift: Array) -> Linear:
        """With its result multiplied by `scale` and increased by `shift`, both [channels]."""
        groups, outputs = self.shape[:2]
        bias = None if self.bias is None else self.bias * scale
        return replace(self, folded=self.weight * scale.reshape(groups, outputs, 1, 1), bias=_sum(bias, shift))

    def of(self, scale: Array, shift: Array) -> Linear:
        """With its input multiplied by `scale` and increased by `shift`, both [channels]; the shift needs `not pads`."""
        (groups, _, inputs, _), weight, bias = self.shape, self.weight, self.bias
        if shift.any():
            bias = _sum(bias, (weight * shift.reshape(groups, 1, inputs, 1)).sum(axis=(2, 3)).reshape(-1))
        return replace(self, folded=weight * scale.reshape(groups, 1, inputs, 1), bias=bias)


def _sum(bias: Array | None, added: Array) -> Array | None:
    if not added.any():
        return bias
    return added if bias is None else bias + added


def read(node: Node) -> Linear | Refusal:
    """Read a node with constant weight and bias. Accepts every attribute of the four operators."""
    key = op_key(node.op, node.domain)
    if key not in _ACCEPTED:
        return Refusal(f"{node.op} has no weights to fold into", node.name)
    unknown = [a for a in node.attrs if a not in _ACCEPTED[key]]
    if unknown:
        return Refusal(f"{node.op}'s attribute {unknown[0]} is not supported", node.name)
    raw = ir.value(node.inputs[1])
    if raw is None or not np.issubdtype(raw.dtype, np.floating):
        return Refusal(f"{node.op}'s weight is not a float constant", node.name)
    tensor = ir.optional_input(node, 2)
    bias = None if tensor is None else ir.value(tensor)
    if tensor is not None and bias is None:
        return Refusal(f"{node.op}'s bias is not a constant", node.name)
    if key == "MatMul" and raw.ndim != 2:
        return Refusal(f"MatMul's weight has {raw.ndim} dimensions, not 2", node.name)
    factor = node.attrs.get("beta", 1.0) if key == "Gemm" else 1.0
    return Linear(node, raw, None if bias is None else bias.astype(np.float64) * factor)


def _unify(node: Node, raw: NDArray[Any]) -> NDArray[Any]:
    """The weight as [groups, outputs, inputs, taps], where possible a view."""
    if node.op in ("Gemm", "MatMul"):
        return (raw if node.attrs.get("transB", 0) else raw.T)[None, :, :, None]
    groups = node.attrs.get("group", 1)
    weight = raw.reshape(groups, raw.shape[0] // groups, raw.shape[1], -1)
    return weight if node.op == "Conv" else weight.transpose(0, 2, 1, 3)


def _restore(linear: Linear) -> NDArray[Any]:
    """The weight in the operator's own layout and type; alpha is 1."""
    node, weight = linear.node, linear.weight
    if node.op in ("Gemm", "MatMul"):
        weight = weight[0, :, :, 0] if node.attrs.get("transB", 0) else weight[0, :, :, 0].T
    elif node.op == "ConvTranspose":
        weight = weight.transpose(0, 2, 1, 3)
    return np.ascontiguousarray(weight.reshape(linear.raw.shape), dtype=linear.raw.dtype)


def write(rewriter: Rewriter, linears: Iterable[Linear]) -> Refusal | None:
    """Give nodes new constants (old ones may be shared, so they stay), or change none if a value overflows.

    The bias of a MatMul becomes an Add after it.
    """
    new = []
    for linear in linears:
        with np.errstate(over="ignore"):
            arrays = _restore(linear), None if linear.bias is None else linear.bias.astype(linear.raw.dtype)
        if not all(a is None or np.isfinite(a).all() for a in arrays):
            return Refusal("the folded weights overflow", linear.node.name)
        new.append((linear.node, arrays))
    for node, (weight, bias) in new:
        _write(rewriter, node, weight, bias)
    return None


def _write(rewriter: Rewriter, node: Node, weight: NDArray[Any], bias: NDArray[Any] | None) -> None:
    node.attrs.pop("alpha", None)
    node.attrs.pop("beta", None)
    rewriter.set_input(node, 1, rewriter.constant(f"{node.name}_weight", weight))
    if bias is None:
        return
    constant = rewriter.constant(f"{node.name}_bias", bias)
    if node.op == "MatMul":
        result = node.outputs[0]
        product = rewriter.variable(f"{node.name}_product", result.dtype, ir.shape(result))
        add = rewriter.node("Add", [product, constant], origin=node)
        rewriter.take_output(add, result)
        rewriter.take_output(node, product)
    elif len(node.inputs) > 2:
        rewriter.set_input(node, 2, constant)
    else:
        ir.add_input(node, constant)


def fold(rewriter: Rewriter, found: Sequence[Affine]) -> Refusal | None:
    """Fold the longest chain into the operator before it, or else the longest possible one into all those after it."""
    before = fold_into_producer(rewriter, found[0])
    if before is None:
        return None
    after = before
    for chain in found:
        refusal = fold_into_consumers(rewriter, chain)
        if refusal is None:
            return None
        after = refusal
    return Refusal(f"before it: {before.reason}; after it: {after.reason}", before.culprit or after.culprit)


def fold_into_producer(rewriter: Rewriter, chain: Affine) -> Refusal | None:
    """Fold a chain into the operator that writes its source, if nothing else reads the source."""
    producer = ir.producer(chain.source)
    if producer is None:
        return Refusal("the input comes from no operator", chain.source.name)
    if producer.op in _ACCEPTED and rewriter.only_user(chain.source) is None:
        return Refusal(f"the result of {producer.op} is also read elsewhere", chain.source.name)
    linear = read(producer)
    if isinstance(linear, Refusal):
        return linear
    channels = linear.shape[0] * linear.shape[1]
    scale = per_channel(chain.scale, linear.axis, linear.rank, channels)
    shift = per_channel(chain.shift, linear.axis, linear.rank, channels)
    if scale is None or shift is None:
        return Refusal(f"the constant is not one value per channel of {producer.op}", chain.nodes[0].name)
    result = chain.result
    refusal = write(rewriter, [linear.then(scale, shift)])
    if refusal is None:
        writer = ir.producer(chain.source)
        assert writer is not None
        rewriter.take_output(writer, result)
        _drop(rewriter, chain, [producer])
    return refusal


def fold_into_consumers(rewriter: Rewriter, chain: Affine) -> Refusal | None:
    """Fold a chain into the operators that read its result, if all of them can take it."""
    if not chain.keeps_shape:
        return Refusal("the constant may change the shape", chain.nodes[-1].name)
    if any(ir.is_output(g, chain.result) for g in ir.all_graphs(rewriter.state.graph)):
        return Refusal("the result is a graph output", chain.result.name)
    own = {id(n) for n in rewriter.graph.nodes}
    folded: list[Linear] = []
    for reader in rewriter.users(chain.result):
        if id(reader) not in own:
            return Refusal("the result is read in a subgraph", reader.name)
        linear = _over(chain, reader)
        if isinstance(linear, Refusal):
            return linear
        folded.append(linear)
    refusal = write(rewriter, folded)
    if refusal is None:
        for linear in folded:
            rewriter.set_input(linear.node, 0, chain.source)
        _drop(rewriter, chain, [linear.node for linear in folded])
    return refusal


def _over(chain: Affine, reader: Node) -> Linear | Refusal:
    """The reader with the chain folded into its input."""
    linear = read(reader)
    if isinstance(linear, Refusal):
        return linear
    if reader.op == "ConvTranspose" or reader.attrs.get("transA", 0):
        return Refusal(f"{reader.op} has no fold of its input", reader.name)
    channels = linear.shape[0] * linear.shape[2]
    scale = per_channel(chain.scale, linear.axis, linear.rank, channels)
    shift = per_channel(chain.shift, linear.axis, linear.rank, channels)
    if scale is None or shift is None:
        return Refusal(f"the constant is not one value per input channel of {reader.op}", reader.name)
    if chain.shifts and linear.pads:
        return Refusal("Conv pads with zeros that a shift would change", reader.name)
    return linear.of(scale, shift)


def _drop(rewriter: Rewriter, chain: Affine, heirs: Sequence[Node]) -> None:
    for heir in heirs:
        rewriter.adopt(heir, *chain.nodes)
    for node in chain.nodes:
        rewriter.remove(node)

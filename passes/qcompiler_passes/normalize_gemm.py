"""normalize-gemm: every matrix product with a constant is `Gemm(x [M, K], weight [K, N], bias [N])` or `MatMul(x, weight)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase
from qcompiler_passes.affine import per_channel


@dataclass(frozen=True)
class NormalizeGemm:
    """Fold Gemm's alpha, beta, transA and transB away, make its bias one row, and make Gemm of MatMul and Add.

    A MatMul of rank 3 or more gets a Reshape before and after. Biases that are no row become an Add.
    """

    name: ClassVar[str] = "normalize-gemm"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    in_bodies: ClassVar[bool] = True

    def run(self, state: CompileState) -> int:
        """Return the number of nodes changed."""
        rules: dict[str, list[Rule]] = {
            "Gemm": [_transpose_input, _plain_weight, _row_bias],
            "MatMul": [_matmul_to_gemm],
        }
        return apply_rules(Rewriter(state), rules)


def _transpose_input(rewriter: Rewriter, node: Node) -> Refusal | None:
    """transA=1 becomes a Transpose."""
    if not node.attrs.get("transA", 0):
        return Refusal("transA is 0", node.name)
    transpose = rewriter.node("Transpose", [node.inputs[0]], origin=node, hint=f"{node.name}_transpose", perm=[1, 0])
    rewriter.set_input(node, 0, transpose.outputs[0])
    del node.attrs["transA"]
    return None


def _plain_weight(rewriter: Rewriter, node: Node) -> Refusal | None:
    """alpha and transB go into a constant weight."""
    alpha, transposed = node.attrs.get("alpha", 1.0), node.attrs.get("transB", 0)
    if alpha == 1.0 and not transposed:
        return Refusal("alpha is 1 and transB is 0", node.name)
    weight = _floats(node.inputs[1])
    if weight is None:
        return Refusal("the weight is not a float constant", node.inputs[1].name)
    plain = np.ascontiguousarray(weight.T if transposed else weight, dtype=np.float64) * alpha
    rewriter.set_input(node, 1, rewriter.constant(f"{node.name}_weight", plain.astype(weight.dtype)))
    node.attrs.pop("alpha", None)
    node.attrs.pop("transB", None)
    return None


def _row_bias(rewriter: Rewriter, node: Node) -> Refusal | None:
    """beta goes into a constant bias, and the bias becomes [N]; where it is a matrix or no constant, it becomes an Add."""
    tensor, weight = ir.optional_input(node, 2), ir.value(node.inputs[1])
    if tensor is None:
        return Refusal("it has no bias", node.name) if node.attrs.pop("beta", 1.0) == 1.0 else None
    if weight is None:
        return Refusal("the weight is not a constant", node.inputs[1].name)
    width = weight.shape[0 if node.attrs.get("transB", 0) else 1]
    beta, bias = node.attrs.get("beta", 1.0), _floats(tensor)
    if bias is None:
        if beta != 1.0:
            return Refusal("the bias is not a constant", tensor.name)
        _split_bias(rewriter, node, tensor)
        return None
    scaled = bias.astype(np.float64) * beta
    row = per_channel(scaled, -1, 2, width)
    if row is None:
        _split_bias(rewriter, node, rewriter.constant(f"{node.name}_bias", scaled.astype(bias.dtype)))
        return None
    if beta == 1.0 and bias.shape == (width,):
        return Refusal("the bias is a row", node.name)
    rewriter.set_input(node, 2, rewriter.constant(f"{node.name}_bias", row.astype(bias.dtype)))
    node.attrs.pop("beta", None)
    return None


def _split_bias(rewriter: Rewriter, node: Node, bias: Tensor) -> None:
    result = node.outputs[0]
    attrs = {k: v for k, v in node.attrs.items() if k != "beta"}
    gemm = rewriter.node("Gemm", node.inputs[:2], origin=node, hint=node.name, **attrs)
    add = rewriter.node("Add", [gemm.outputs[0], bias], origin=node, hint=f"{node.name}_add")
    rewriter.take_output(add, result)
    rewriter.remove(node)


def _matmul_to_gemm(rewriter: Rewriter, node: Node) -> Refusal | None:
    source, (weight_tensor, result) = node.inputs[0], (node.inputs[1], node.outputs[0])
    weight, dims = _floats(weight_tensor), ir.shape(source)
    if weight is None or weight.ndim != 2:
        return Refusal("the right operand is not a constant matrix of floats", weight_tensor.name)
    add = rewriter.only_user(result)
    if add is None or add.op != "Add" or add.domain:
        return Refusal("no Add alone reads the result", result.name)
    other = add.inputs[1] if add.inputs[0] is result else add.inputs[0]
    bias = _floats(other)
    if bias is None:
        return Refusal("what is added is not a float constant", other.name)
    if dims is None or len(dims) < 2:
        return Refusal("the rank of the left operand is not known to be 2 or more", source.name)
    row = per_channel(bias.astype(np.float64), -1, len(dims), weight.shape[1])
    if row is None:
        return Refusal("what is added is not one row", other.name)
    if any(d == 0 for d in dims):
        return Refusal("the left operand is empty", source.name)
    constant = rewriter.constant(f"{node.name}_bias", row.astype(bias.dtype))
    flat = source if len(dims) == 2 else _flatten(rewriter, node, source, weight.shape[0])
    gemm = rewriter.node("Gemm", [flat, weight_tensor, constant], origin=(node, add), hint=node.name)
    last = gemm if len(dims) == 2 else _unflatten(rewriter, gemm, source, weight.shape[1], dims)
    rewriter.take_output(last, add.outputs[0])
    rewriter.remove(add)
    rewriter.remove(node)
    return None


def _flatten(rewriter: Rewriter, node: Node, source: Tensor, width: int) -> Tensor:
    """`source` as a matrix; a Reshape that is there already serves again."""
    for reader in rewriter.users(source):
        target = ir.value(reader.inputs[1]) if reader.op == "Reshape" else None
        if target is not None and target.tolist() == [-1, width]:
            return reader.outputs[0]
    target_tensor = rewriter.constant(f"{node.name}_rows", np.array([-1, width], dtype=np.int64))
    rows = rewriter.variable(f"{node.name}_flat", source.dtype, (None, width))
    rewriter.relate(rows, source.name, reshaped=True)
    reshape = rewriter.node("Reshape", [source, target_tensor], [rows], origin=node, hint=f"{node.name}_flatten")
    return reshape.outputs[0]


def _unflatten(rewriter: Rewriter, gemm: Node, source: Tensor, width: int, dims: tuple[int | str | None, ...]) -> Node:
    """Give the rows the leading axes of `source` again: by a constant if at most one of them is dynamic."""
    leading = [d if isinstance(d, int) else -1 for d in dims[:-1]]
    target: Tensor
    if leading.count(-1) <= 1:
        target = rewriter.constant(f"{gemm.name}_shape", np.array([*leading, width], dtype=np.int64))
    else:
        index = rewriter.constant(f"{gemm.name}_axes", np.arange(len(leading), dtype=np.int64))
        last = rewriter.constant(f"{gemm.name}_width", np.array([width], dtype=np.int64))
        shape = rewriter.node("Shape", [source], origin=gemm, hint=f"{gemm.name}_shape_of")
        kept = rewriter.node("Gather", [shape.outputs[0], index], origin=gemm, hint=f"{gemm.name}_leading", axis=0)
        joined = rewriter.node("Concat", [kept.outputs[0], last], origin=gemm, hint=f"{gemm.name}_shape", axis=0)
        target = joined.outputs[0]
    return rewriter.node("Reshape", [gemm.outputs[0], target], origin=gemm, hint=f"{gemm.name}_unflatten")


def _floats(tensor: Tensor) -> NDArray[Any] | None:
    """The value of a constant of floats, or None."""
    array = ir.value(tensor)
    return array if array is not None and np.issubdtype(array.dtype, np.floating) else None

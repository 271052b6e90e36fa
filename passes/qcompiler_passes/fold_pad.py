"""fold-pad: paddings become explicit and part of the operator that needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qcompiler import ir
from qcompiler.ir import Node
from qcompiler.rewrite import Refusal, Rewriter, Rule, apply_rules
from qcompiler.state import CompileState, Phase


@dataclass(frozen=True)
class FoldPad:
    """Fold zero Pad into every Conv after it, and give Conv, MaxPool and AveragePool `pads` in place of `auto_pad`."""

    name: ClassVar[str] = "fold-pad"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None
    in_bodies: ClassVar[bool] = True

    def run(self, state: CompileState) -> int:
        """Return the number of nodes changed."""
        rules: dict[str, Rule] = {"Pad": _fold_pad, **dict.fromkeys(("Conv", "MaxPool", "AveragePool"), _explicit_pads)}
        return apply_rules(Rewriter(state), rules)


def _explicit_pads(rewriter: Rewriter, node: Node) -> Refusal | None:
    """SAME: output = ceil(input / stride), the odd pixel at the end (UPPER) or the start (LOWER). VALID: no padding."""
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return Refusal("its padding is explicit", node.name)
    if mode == "VALID":
        del node.attrs["auto_pad"]
        return None
    if mode not in ("SAME_UPPER", "SAME_LOWER") or node.attrs.get("ceil_mode", 0):
        return Refusal(f"auto_pad {mode} is not supported here", node.name)
    kernel = node.attrs.get("kernel_shape") or (ir.shape(node.inputs[1]) or ())[2:]
    known = ir.shape(node.inputs[0])
    sizes = [None] * len(kernel) if known is None else list(known[2:])
    if not kernel or len(sizes) != len(kernel):
        return Refusal("the kernel's shape is not known", node.name)
    begins, ends = [], []
    for axis, (size, length) in enumerate(zip(sizes, kernel, strict=True)):
        total = _same_padding(
            size, length, *(node.attrs.get(a, [1] * len(kernel))[axis] for a in ("strides", "dilations"))
        )
        if total is None:
            return Refusal("the spatial size is not known and the stride is not 1", node.inputs[0].name)
        begins.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    del node.attrs["auto_pad"]
    node.attrs["pads"] = begins + ends
    return None


def _same_padding(size: int | str | None, kernel: int, stride: int, dilation: int) -> int | None:
    reach = dilation * (kernel - 1) + 1
    if stride == 1:
        return reach - 1
    if not isinstance(size, int):
        return None
    return max(0, (-(-size // stride) - 1) * stride + reach - size)


def _fold_pad(rewriter: Rewriter, node: Node) -> Refusal | None:
    pads = _spatial_pads(node)
    if isinstance(pads, Refusal):
        return pads
    result = node.outputs[0]
    if any(ir.is_output(g, result) for g in ir.all_graphs(rewriter.state.graph)):
        return Refusal("the result is a graph output", result.name)
    readers = rewriter.users(result)
    own = {id(n) for n in rewriter.graph.nodes}
    for reader in readers:
        if reader.op != "Conv" or reader.domain or id(reader) not in own or any(t is result for t in reader.inputs[1:]):
            return Refusal(f"{reader.op} reads the result", reader.name)
        if reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return Refusal("a Conv chooses its own padding", reader.name)
    for reader in readers:
        inner = (
            reader.attrs.get("pads", [0] * len(pads)) if reader.attrs.get("auto_pad") != "VALID" else [0] * len(pads)
        )
        reader.attrs.pop("auto_pad", None)
        reader.attrs["pads"] = [int(a + b) for a, b in zip(inner, pads, strict=True)]
        rewriter.set_input(reader, 0, node.inputs[0])
        rewriter.adopt(reader, node)
    rewriter.remove(node)
    return None


def _spatial_pads(node: Node) -> list[int] | Refusal:
    """The begins and ends of the spatial axes, if the node pads these alone, with zeros."""
    mode = node.attrs.get("mode", "constant")
    if mode not in ("constant", b"constant"):
        return Refusal(f"mode {mode} is not a constant padding", node.name)
    unknown = [a for a in node.attrs if a not in ("mode", "pads", "value")]
    if unknown:
        return Refusal(f"attribute {unknown[0]} is not supported", node.name)
    value = ir.optional_input(node, 2)
    if (node.attrs.get("value", 0.0) if value is None else ir.scalar(value)) != 0:
        return Refusal("the padding value is not zero", node.name)
    pads = _pads(node)
    if isinstance(pads, Refusal):
        return pads
    rank = len(pads) // 2
    if rank < 3 or any(pads[i] for i in (0, 1, rank, rank + 1)) or min(pads) < 0:
        return Refusal("it crops, or pads more than the spatial axes", node.name)
    return [*pads[2:rank], *pads[rank + 2 :]]


def _pads(node: Node) -> Sequence[int] | Refusal:
    """Begins and ends of all axes, from the attribute (before opset 11) or from the inputs."""
    if "pads" in node.attrs:
        return list(node.attrs["pads"])
    pads = ir.value(node.inputs[1]) if len(node.inputs) > 1 else None
    if pads is None:
        return Refusal("the pads are not constants", node.name)
    given = ir.optional_input(node, 3)
    if given is None:
        return [int(p) for p in pads]
    axes, shape = ir.value(given), ir.shape(node.inputs[0]) or ir.shape(node.outputs[0])
    if axes is None or shape is None:
        return Refusal("the axes are not constants, or the rank is not known", node.name)
    full = [0] * (2 * len(shape))
    for i, axis in enumerate(axes.reshape(-1)):
        full[axis % len(shape)] = int(pads[i])
        full[axis % len(shape) + len(shape)] = int(pads[i + axes.size])
    return full

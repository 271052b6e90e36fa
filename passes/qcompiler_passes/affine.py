"""Operators that compute `x * scale + shift` with constants, and chains of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler import ir
from qcompiler.ir import Node, Tensor
from qcompiler.ops import op_key
from qcompiler.rewrite import Refusal, Rewriter

Array = NDArray[np.float64]
_ZERO, _ONE = np.zeros(()), np.ones(())


@dataclass(frozen=True)
class Affine:
    """What consecutive nodes do to `source`: source * scale + shift.

    scale, shift: shapes that broadcast against the source. `dtype`: that of the model's constants. `keeps_shape`: whether the
    result is known to have the source's shape. `nodes`: in order of execution; only the last one's result is read elsewhere.
    """

    source: Tensor
    scale: Array
    shift: Array
    dtype: np.dtype[Any]
    keeps_shape: bool
    nodes: tuple[Node, ...]

    @property
    def result(self) -> Tensor:
        """What the last node writes."""
        return self.nodes[-1].outputs[0]

    @property
    def scales(self) -> bool:
        """Whether any scale differs from 1."""
        return bool((self.scale != 1).any())

    @property
    def shifts(self) -> bool:
        """Whether any shift differs from 0."""
        return bool((self.shift != 0).any())

    @property
    def is_uniform(self) -> bool:
        """Whether all elements get the same scale and shift."""
        return self.scale.size == self.shift.size == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The common shape of scale and shift."""
        return np.broadcast_shapes(self.scale.shape, self.shift.shape)

    def after(self, first: Affine) -> Affine:
        """This map applied to the result of `first`."""
        return Affine(
            first.source,
            self.scale * first.scale,
            self.scale * first.shift + self.shift,
            self.dtype,
            self.keeps_shape and first.keeps_shape,
            first.nodes + self.nodes,
        )


def chains(rewriter: Rewriter, node: Node) -> list[Affine] | Refusal:
    """The chains of affine nodes that end with `node`, the longest first; a Refusal if the node itself is not affine."""
    last = affine_of(node)
    if isinstance(last, Refusal):
        return last
    found = [last]
    while rewriter.only_user(found[0].source) is not None:
        before = ir.producer(found[0].source)
        step = None if before is None else affine_of(before)
        if step is None or isinstance(step, Refusal):
            break
        if _size(found[0].shape, step.shape) > max(_size(found[0].shape), _size(step.shape)):
            break
        found.insert(0, found[0].after(step))
    return found


def _size(*shapes: tuple[int, ...]) -> int:
    return math.prod(np.broadcast_shapes(*shapes))


def affine_of(node: Node) -> Affine | Refusal:
    """Read a node as an affine map; accepts BatchNormalization at inference, Add, Sub, Mul, Div, and Pow with exponent 1."""
    if op_key(node.op, node.domain) == "BatchNormalization":
        return _batchnorm(node)
    if op_key(node.op, node.domain) not in ("Add", "Sub", "Mul", "Div", "Pow"):
        return Refusal(f"{node.op} is not a map with constants", node.name)
    if node.attrs:
        return Refusal(f"attribute {next(iter(node.attrs))} is not supported", node.name)
    known = [ir.value(t) for t in node.inputs]
    if (known[0] is None) == (known[1] is None):
        return Refusal("exactly one operand must be a constant", node.name)
    index = 0 if known[1] is not None else 1
    return _elementwise(node, node.inputs[index], known[1 - index], index == 0)


def _elementwise(node: Node, source: Tensor, raw: NDArray[Any] | None, on_the_left: bool) -> Affine | Refusal:
    assert raw is not None
    if not np.issubdtype(raw.dtype, np.floating) or not np.isfinite(raw).all():
        return Refusal("the constant is not a finite float", node.name)
    constant = raw.astype(np.float64)
    if not on_the_left and node.op in ("Div", "Pow"):
        return Refusal("the constant is on the left", node.name)
    if node.op == "Div" and (constant == 0).any():
        return Refusal("divides by zero", node.name)
    if node.op == "Pow" and (constant != 1).any():
        return Refusal("the exponent is not 1", node.name)
    scale, shift = _ONE, _ZERO
    if node.op in ("Add", "Sub"):
        scale = -_ONE if node.op == "Sub" and not on_the_left else _ONE
        shift = -constant if node.op == "Sub" and on_the_left else constant
    else:
        scale = 1.0 / constant if node.op == "Div" else constant
    return Affine(source, scale, shift, raw.dtype, _keeps_shape(constant, source), (node,))


def _keeps_shape(constant: Array, source: Tensor) -> bool:
    known = ir.shape(source)
    if constant.ndim == 0:
        return True
    if known is None or constant.ndim > len(known):
        return False
    return all(c in (1, d) for c, d in zip(constant.shape[::-1], known[::-1], strict=False))


def _batchnorm(node: Node) -> Affine | Refusal:
    """`scale * (x - mean) / sqrt(variance + epsilon) + bias` per channel of axis 1."""
    for name, value in node.attrs.items():
        accepted: dict[str, tuple[Any, ...]] = {"training_mode": (0,), "spatial": (1,)}
        if name not in ("epsilon", "momentum") and value not in accepted.get(name, ()):
            return Refusal(f"{name}={value} is not supported", node.name)
    if any(not t.is_empty() for t in node.outputs[1:]):
        return Refusal("it has training outputs", node.name)
    raw = [ir.value(t) for t in node.inputs[1:5]]
    if any(r is None for r in raw):
        return Refusal("its parameters are not constants", node.name)
    axes = _rank(node)
    if axes is None or axes < 2:
        return Refusal("the rank of its input is unknown or below 2", node.name)
    gamma, beta, mean, variance = (np.asarray(r, dtype=np.float64).reshape(-1, *[1] * (axes - 2)) for r in raw)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return Refusal("its parameters give no finite map", node.name)
    return Affine(node.inputs[0], scale, shift, np.asarray(raw[0]).dtype, True, (node,))


def _rank(node: Node) -> int | None:
    """The rank of a node's input and output, from shapes or from the weights next to it."""
    for tensor in (node.inputs[0], node.outputs[0]):
        known = ir.shape(tensor)
        if known is not None:
            return len(known)
    for near in (*node.inputs[0].inputs, *node.outputs[0].outputs):
        weight = ir.value(near.inputs[1]) if near.op in ("Conv", "ConvTranspose") else None
        if weight is not None:
            return weight.ndim
        if near.op == "Gemm":
            return 2
    return None


def per_channel(array: Array, axis: int, rank: int, channels: int) -> Array | None:
    """The array as `[channels]`, if it broadcasts against a tensor of that rank along `axis` (negative) alone; else None."""
    if array.ndim > rank:
        return None
    if array.size == 1:
        return np.full(channels, array.reshape(()))
    if array.ndim < -axis or array.shape[axis] != channels or array.size != channels:
        return None
    return array.reshape(-1)

"""A small Swin transformer (Liu et al. 2021, arXiv 2103.14030) with random weights: as exporters write it, and in NumPy.

A 16x16 image, patches of 2x2, two blocks of width 16 on 8x8 tokens, the second with shifted windows, patch merging to 4x4
tokens of width 32, one more block, the mean over tokens, five classes.
"""

from __future__ import annotations

from math import erf

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.nets import Net

IMAGE, WINDOW, SHIFT, CLASSES = 16, 4, 2, 5
BLOCKS = {"plain": (8, 16, 2, 0), "shifted": (8, 16, 2, SHIFT), "merged": (4, 32, 4, 0)}
"""Side of the map of tokens, width, heads and shift, in the order in which the blocks run."""

Weights = dict[str, NDArray[np.float32]]


def swin_weights(seed: int = 0) -> Weights:
    """Random weights; those of products are [inputs, outputs]."""
    rng = np.random.default_rng(seed)
    made: Weights = {}

    def product(name: str, inputs: int, outputs: int) -> None:
        made[f"{name}.w"] = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        made[f"{name}.b"] = rng.normal(0, 0.1, outputs).astype(np.float32)

    def norm(name: str, width: int) -> None:
        made[f"{name}.w"] = rng.uniform(0.5, 1.5, width).astype(np.float32)
        made[f"{name}.b"] = rng.normal(0, 0.1, width).astype(np.float32)

    product("embed", 12, 16)
    norm("embed.norm", 16)
    for name, (_, width, heads, _) in BLOCKS.items():
        norm(f"{name}.norm1", width)
        product(f"{name}.qkv", width, 3 * width)
        made[f"{name}.table"] = rng.normal(0, 0.5, ((2 * WINDOW - 1) ** 2, heads)).astype(np.float32)
        product(f"{name}.proj", width, width)
        norm(f"{name}.norm2", width)
        product(f"{name}.fc1", width, 4 * width)
        product(f"{name}.fc2", 4 * width, width)
    norm("merge.norm", 64)
    product("merge", 64, 32)
    norm("norm", 32)
    product("head", 32, CLASSES)
    return made


def _position_bias(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """The bias [heads, tokens, tokens] of each pair of tokens in a window, by their distance along both axes."""
    y, x = np.divmod(np.arange(WINDOW**2), WINDOW)
    rows, columns = y[:, None] - y + WINDOW - 1, x[:, None] - x + WINDOW - 1
    return np.moveaxis(table[rows * (2 * WINDOW - 1) + columns], -1, 0)


class _Export:
    """The nodes of the model, as `torch.onnx.export` writes them before opset 17."""

    def __init__(self, weights: Weights) -> None:
        self.net = Net(np.random.default_rng(0))
        self.weights = weights

    def ints(self, *numbers: int) -> str:
        return self.net.constant(numbers, np.int64)

    def reshape(self, x: str, *shape: int) -> str:
        return self.net.op("Reshape", x, self.ints(*shape))

    def transpose(self, x: str, *perm: int) -> str:
        return self.net.op("Transpose", x, perm=perm)

    def part(self, x: str, axis: int, start: int, end: int, step: int = 1) -> str:
        return self.net.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis), self.ints(step))

    def linear(self, x: str, name: str) -> str:
        product = self.net.op("MatMul", x, self.net.constant(self.weights[f"{name}.w"]))
        return self.net.op("Add", self.net.constant(self.weights[f"{name}.b"]), product)

    def norm(self, x: str, name: str) -> str:
        op, constant = self.net.op, self.net.constant
        centred = op("Sub", x, op("ReduceMean", x, axes=[-1]))
        variance = op("ReduceMean", op("Pow", centred, constant(2)), axes=[-1])
        unit = op("Div", centred, op("Sqrt", op("Add", variance, constant(1e-5))))
        scaled = op("Mul", unit, constant(self.weights[f"{name}.w"]))
        return op("Add", scaled, constant(self.weights[f"{name}.b"]))

    def gelu(self, x: str) -> str:
        op, constant = self.net.op, self.net.constant
        curve = op("Add", op("Erf", op("Div", x, constant(np.sqrt(2)))), constant(1))
        return op("Mul", op("Mul", x, curve), constant(0.5))

    def roll(self, x: str, shift: int) -> str:
        """Move rows and columns of [1, side, side, width] forwards, those at the end to the start."""
        for axis in (1, 2):
            x = self.net.op("Concat", self.part(x, axis, -shift, 2**62), self.part(x, axis, 0, -shift), axis=axis)
        return x

    def attention(self, x: str, name: str) -> str:
        """From and to windows [windows, tokens, width]."""
        op, constant = self.net.op, self.net.constant
        side, width, heads, shift = BLOCKS[name]
        tokens, depth = WINDOW**2, width // heads
        qkv = self.transpose(self.reshape(self.linear(x, f"{name}.qkv"), -1, tokens, 3, heads, depth), 2, 0, 3, 1, 4)
        q, k, v = (op("Gather", qkv, self.net.constant(i, np.int64), axis=0) for i in range(3))
        scores = op("MatMul", op("Mul", q, constant(depth**-0.5)), self.transpose(k, 0, 1, 3, 2))
        scores = op("Add", scores, constant(_position_bias(self.weights[f"{name}.table"])[None]))
        if shift:
            windows = (side // WINDOW) ** 2
            scores = self.reshape(scores, -1, windows, heads, tokens, tokens)
            scores = op("Add", scores, constant(_region_mask(side)[None, :, None]))
            scores = self.reshape(scores, -1, heads, tokens, tokens)
        mixed = op("MatMul", op("Softmax", scores, axis=-1), v)
        return self.linear(self.reshape(self.transpose(mixed, 0, 2, 1, 3), -1, tokens, width), f"{name}.proj")

    def block(self, x: str, name: str) -> str:
        side, width, _, shift = BLOCKS[name]
        across = side // WINDOW
        y = self.reshape(self.norm(x, f"{name}.norm1"), -1, side, side, width)
        y = self.roll(y, -shift) if shift else y
        y = self.transpose(self.reshape(y, -1, across, WINDOW, across, WINDOW, width), 0, 1, 3, 2, 4, 5)
        y = self.attention(self.reshape(y, -1, WINDOW**2, width), name)
        y = self.transpose(self.reshape(y, -1, across, across, WINDOW, WINDOW, width), 0, 1, 3, 2, 4, 5)
        y = self.reshape(y, -1, side, side, width)
        y = self.roll(y, shift) if shift else y
        x = self.net.op("Add", x, self.reshape(y, -1, side * side, width))
        y = self.linear(self.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.fc1")), f"{name}.fc2")
        return self.net.op("Add", x, y)

    def merge(self, x: str) -> str:
        """Each 2x2 tokens side by side, then a product."""
        x = self.reshape(x, -1, 8, 8, 16)
        corners = [self.part(self.part(x, 1, i, 2**62, 2), 2, j, 2**62, 2) for j in (0, 1) for i in (0, 1)]
        x = self.reshape(self.net.op("Concat", *corners, axis=-1), -1, 16, 64)
        return self.linear(self.norm(x, "merge.norm"), "merge")

    def model(self) -> onnx.ModelProto:
        kernels = self.weights["embed.w"].reshape(3, 2, 2, 16).transpose(3, 0, 1, 2)
        inputs = ["x", self.net.constant(kernels), self.net.constant(self.weights["embed.b"])]
        x = self.net.op("Conv", *inputs, kernel_shape=[2, 2], strides=[2, 2])
        x = self.norm(self.transpose(self.reshape(x, 1, 16, -1), 0, 2, 1), "embed.norm")
        x = self.block(self.block(x, "plain"), "shifted")
        x = self.norm(self.block(self.merge(x), "merged"), "norm")
        pooled = self.net.op("Flatten", self.net.op("GlobalAveragePool", self.transpose(x, 0, 2, 1)))
        return self.net.model(IMAGE, [self.linear(pooled, "head")])


def _region_mask(side: int) -> NDArray[np.float32]:
    """-100 between tokens of a shifted window that come from different regions: [windows, tokens, tokens]."""
    edges = np.searchsorted([side - WINDOW, side - SHIFT], np.arange(side), side="right")
    regions = (3 * edges[:, None] + edges)[None, :, :, None]
    flat = windows_of(regions)[..., 0]
    return np.where(flat[:, :, None] == flat[:, None], 0, -100).astype(np.float32)


def swin_model(weights: Weights) -> onnx.ModelProto:
    """The float model: x float32 [1, 3, 16, 16] -> [1, 5]."""
    return _Export(weights).model()


def windows_of(x: NDArray[np.generic]) -> NDArray[np.generic]:
    """[1, side, side, width] -> [windows, tokens, width]."""
    side = x.shape[1]
    corners = [(i, j) for i in range(0, side, WINDOW) for j in range(0, side, WINDOW)]
    return np.stack([x[0, i : i + WINDOW, j : j + WINDOW].reshape(WINDOW**2, -1) for i, j in corners])


def _from_windows(windows: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    x = np.empty((1, side, side, windows.shape[-1]))
    corners = [(i, j) for i in range(0, side, WINDOW) for j in range(0, side, WINDOW)]
    for (i, j), window in zip(corners, windows, strict=True):
        x[0, i : i + WINDOW, j : j + WINDOW] = window.reshape(WINDOW, WINDOW, -1)
    return x


def _norm(x: NDArray[np.float64], w: Weights, name: str) -> NDArray[np.float64]:
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return unit * w[f"{name}.w"] + w[f"{name}.b"]


def _linear(x: NDArray[np.float64], w: Weights, name: str) -> NDArray[np.float64]:
    return x @ w[f"{name}.w"].astype(np.float64) + w[f"{name}.b"]


def _attend(x: NDArray[np.float64], apart: NDArray[np.bool_], w: Weights, name: str) -> NDArray[np.float64]:
    """Attention in one window [tokens, width]; tokens that are `apart` do not see each other."""
    heads = BLOCKS[name][2]
    q, k, v = np.split(_linear(x, w, f"{name}.qkv"), 3, axis=-1)
    bias, results = _position_bias(w[f"{name}.table"]), []
    for head, parts in enumerate(zip(*(np.split(t, heads, axis=-1) for t in (q, k, v)), strict=True)):
        scores = parts[0] @ parts[1].T / np.sqrt(parts[0].shape[-1]) + bias[head]
        weights = np.exp(np.where(apart, -np.inf, scores))
        results.append(weights / weights.sum(-1, keepdims=True) @ parts[2])
    return _linear(np.concatenate(results, -1), w, f"{name}.proj")


def _block(x: NDArray[np.float64], w: Weights, name: str) -> NDArray[np.float64]:
    """A block on [1, side, side, width]. Tokens are apart where the roll brought just one of them around the edge."""
    side, _, _, shift = BLOCKS[name]
    rolled = np.roll(_norm(x, w, f"{name}.norm1"), -shift, (1, 2))
    around = np.arange(side) + shift >= side
    marks = windows_of((2 * around[:, None] + around)[None, :, :, None])[..., 0]
    mixed = [_attend(t, m[:, None] != m, w, name) for t, m in zip(windows_of(rolled), marks, strict=True)]
    x = x + np.roll(_from_windows(np.stack(mixed), side), shift, (1, 2))
    hidden = _linear(_norm(x, w, f"{name}.norm2"), w, f"{name}.fc1")
    return x + _linear(hidden * (1 + np.vectorize(erf)(hidden / np.sqrt(2))) / 2, w, f"{name}.fc2")


def swin_reference(image: NDArray[np.float32], w: Weights) -> NDArray[np.float64]:
    """What the network computes by its description, in float64, one window after the other: [1, 3, 16, 16] -> [1, 5]."""
    patches = image.reshape(1, 3, 8, 2, 8, 2).transpose(0, 2, 4, 1, 3, 5).reshape(1, 8, 8, 12)
    x = _norm(_linear(patches.astype(np.float64), w, "embed"), w, "embed.norm")
    x = _block(_block(x, w, "plain"), w, "shifted")
    x = np.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    x = _block(_linear(_norm(x, w, "merge.norm"), w, "merge"), w, "merged")
    return _linear(_norm(x, w, "norm").mean((1, 2)), w, "head")

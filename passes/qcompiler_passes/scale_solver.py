"""Scales that make factors dyadic: one rule for each kind of arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from qcompiler import integer_functions, ir, quant
from qcompiler.ir import Node
from qcompiler.ops import Lowering, quantized_rule
from qcompiler.quant import F32, QuantParams
from qcompiler.shift import activation, addend, zero_point_behind
from qcompiler.state import CompileState

LARGEST_FACTOR = 16.0
"""The largest rescale factor from accumulator to output: an int32 multiplier of 2**20, far above what measured ranges give."""

COARSER, COARSEST = 1.02, 1.4
"""What scales may be multiplied by so that a number becomes a multiple: 1 / COARSER at least, lest large values be clipped, and
COARSEST at most: the noise of one rounding in steps of 1.4 is that of two in steps of 1."""


def spatial_size(node: Node) -> int:
    """The number of elements that a GlobalAveragePool sums."""
    shape = ir.static_shape(node.inputs[0]) or tuple(
        d if isinstance(d, int) else 1 for d in ir.shape(node.inputs[0]) or ()
    )
    return int(np.prod(shape[2:]))


def mean_factor(s_x: F32 | np.float32, s_y: F32 | np.float32, size: int) -> F32:
    """The factor of an average over `size` elements as QLinearGlobalAveragePool computes it: `fl(s_x / fl(s_y * size))`."""
    return np.asarray(np.asarray(s_x, np.float32) / (np.asarray(s_y, np.float32) * np.float32(size)), np.float32)


class ScaleSolver:
    """Scales by leader tensor; a pinned one takes part in a factor and must not move any more."""

    def __init__(self, state: CompileState) -> None:
        self.state = state
        self.members: dict[str, list[str]] = {}
        for name in state.params:
            self.members.setdefault(state.leader(name), []).append(name)
        self.limits = self._limits()
        self.lows = {name: block.low for block in state.blocks.values() for name in block.outputs}
        self.tensors = {t.name: t for t in ir.tensors(state.graph)}
        self.addends = self._addends()
        self.pinned: set[str] = set()
        self.moved = 0

    def _limits(self) -> dict[str, float]:
        """Where an activation bound is the end of the range, a larger scale would cost a clip of its own."""
        limits: dict[str, float] = {}
        for block in self.state.blocks.values():
            for name in block.outputs:
                params = self.state.params.get(name)
                if params is not None and np.isfinite(block.high) and params.zero_point == params.spec.qmin:
                    leader = self.state.leader(name)
                    limits[leader] = min(limits.get(leader, np.inf), block.high / params.spec.steps * (1 + 1e-6))
        return limits

    def _addends(self) -> dict[str, Node]:
        """The sums of an activation and a constant, by result."""
        blocks = self.state.blocks
        sums = [n for n in self.state.graph.nodes if n.name in blocks and n.op == "Add" and not n.domain]
        return {
            blocks[n.name].outputs[0]: n
            for n in sums
            if blocks[n.name].quantized and sum(not ir.is_constant(t) for t in n.inputs) == 1
        }

    def params(self, name: str) -> QuantParams:
        """The params of the class of a tensor."""
        return self.state.params[self.state.leader(name)]

    def scale(self, name: str) -> np.float32:
        """Their scale."""
        return np.float32(self.params(name).scale)

    def free(self, name: str) -> bool:
        """Whether the scale may still move."""
        return self.state.leader(name) not in self.pinned

    def pin(self, *names: str) -> None:
        """Let scales be final."""
        self.pinned.update(self.state.leader(n) for n in names)

    def move(self, name: str, scale: np.float32 | None) -> bool:
        """Give a class of tensors another scale; return whether there is one."""
        if scale is None:
            return False
        leader = self.state.leader(name)
        if scale != self.scale(name):
            self.moved += 1
            for member in self.members[leader]:
                self.state.params[member] = self.state.params[member].with_scale(scale)
        return True

    def bound_factors(self, nodes: list[Node]) -> None:
        """Widen outputs whose steps are finer than their accumulators can use, as those of a layer that is always zero."""
        for node in nodes:
            output = self.state.blocks[node.name].outputs[0]
            is_mac = quantized_rule(self.state.ops, node).lowering is Lowering.MAC
            if not is_mac or output not in self.state.params:
                continue
            largest = float(np.abs(ir.array(node.inputs[1])).max(initial=0))
            finest = float(self.scale(node.inputs[0].name)) * largest / self.state.target.weight.qmax
            if finest > LARGEST_FACTOR * float(self.scale(output)):
                self.move(output, np.float32(finest / LARGEST_FACTOR))

    def join(self, name: str, to: str) -> None:
        """Let two classes of tensors share their params from now on."""
        joined = self.members.pop(self.state.leader(name))
        self.state.tie(name, to)
        self.members[self.state.leader(to)] += joined

    def add(self, a: str, b: str, c: str) -> bool:
        """c = a + b: both ratios to c multiples of 2**-12, for each channel where c has Power-of-Two Factors."""
        shift = quant.RATIO_SHIFT - max(self.params(c).exponents, default=0)
        if self.free(c):
            held = next((x for x in (a, b) if not self.free(x)), None)
            if held is not None and self.state.leader(held) != self.state.leader(c):
                s_x = self.scale(held)
                self.move(c, quant.snap_scale(lambda s: s_x / s, float(self.scale(c)), True, shift))
        self.pin(c)
        for x in (a, b):
            if self.free(x):
                limit = self.limit(x, c, shift)
                self.move(x, quant.snap_ratio(float(self.scale(x)), float(self.scale(c)), shift, limit))
        fits = all(quant.is_dyadic(self.scale(x) / self.scale(c), shift) for x in (a, b))
        self.pin(a, b)
        reach = sum(np.ptp(self.params(x).range) for x in (a, b)) / float(self.scale(c))
        return fits and bool(reach * 2.0**quant.RATIO_SHIFT < 2**31)

    def shift(self, node: Node, output: str) -> bool:
        """y = x + number: a scale for both of which the number is a multiple, so that the integers of x are those of y.

        Nothing is rounded then, not even the number, which all zeros of x become.
        """
        number = addend(node)
        if number is None:
            return False
        name = activation(node).name
        params = self.params(name)
        room = params.zero_point - params.spec.qmin if number > 0 else params.spec.qmax - params.zero_point
        multiple = min(int(COARSER * abs(number) / float(params.scale)), room)
        if len(self.state.blocks[node.name].nodes) > 1:
            multiple -= multiple % 2  # the zero point behind a Clip is even, as all are that a Q has
        apart = self.state.leader(name) != self.state.leader(output)
        if not (multiple and apart and self.free(name) and self.free(output) and self._only_moved(output)):
            return False
        scale = np.float32(abs(number) / multiple)
        if np.isclose(self.lows.get(name, np.nan), -number):  # so that the least integer is the bound
            params = replace(params, zero_point=params.spec.qmin + multiple)
        behind = zero_point_behind(params.with_scale(scale), number)
        limit = self.limits.get(self.state.leader(name), np.inf)
        plain = params.axis is None and self.params(output).axis is None
        if behind is None or not plain or float(scale) > min(COARSEST * float(params.scale), limit):
            return False
        self.move(name, scale)
        for tensor, zero_point in ((name, params.zero_point), (output, behind)):
            for member in self.members[self.state.leader(tensor)]:
                self.state.params[member] = replace(self.params(name), zero_point=zero_point)
        self.pin(name, output)
        return True

    def _only_moved(self, name: str) -> bool:
        """Whether the others that share the params of a tensor merely pass its values on."""
        makers = [ir.producer(self.tensors[m]) for m in self.members[self.state.leader(name)] if m != name]
        rules = [None if m is None else quantized_rule(self.state.ops, m) for m in makers]
        return all(rule is not None and rule.lowering is Lowering.MOVE for rule in rules)

    def limit(self, x: str, c: str, shift: int) -> float:
        """The limit of an addend's scale, unless even the smallest ratio to the sum's scale is above it."""
        limit = self.limits.get(self.state.leader(x), np.inf)
        return limit if limit > float(self.scale(c)) * 2.0**-shift * (1 + 1e-5) else np.inf

    def gate(self, a: str, b: str, c: str) -> None:
        """c = a * b where b = a + constant, or the other way round: settle the ratio of a and b, which the product would pin.

        It is 1 if the sum can only move the zero point.
        """
        x, h = (a, b) if self._sums(a, b) else (b, a)
        if not (self._sums(x, h) and self.free(x) and self.free(h)):
            return
        if self.free(c) and self.shift(self.addends[h], h):
            return
        s_x, s_h = float(self.scale(x)), float(self.scale(h))
        if self.free(c):
            self.move(x, quant.snap_ratio(s_x, s_h))
            self.pin(x, h)
        elif (pair := quant.snap_pair(s_x, s_h, float(self.scale(c)))) is not None:
            self.move(x, pair[0])
            self.move(h, pair[1])

    def _sums(self, x: str, h: str) -> bool:
        return h in self.addends and activation(self.addends[h]).name == x

    def mul(self, a: str, b: str, c: str) -> bool:
        """c = a * b: the factor a multiple of 2**-16; the result moves if it can, else an operand."""
        s_a, s_b, s_c = self.scale(a), self.scale(b), self.scale(c)
        if not quant.is_dyadic(quant.rescale(s_a, s_b, s_c)):
            leaders = [self.state.leader(x) for x in (a, b, c)]
            factors: dict[str, Callable[[F32], F32]] = {
                c: lambda s: quant.rescale(s_a, s_b, s),
                a: lambda s: quant.rescale(s, s_b, s_c),
                b: lambda s: quant.rescale(s_a, s, s_c),
            }
            if leaders[0] == leaders[1] != leaders[2]:  # as queries and keys that one product makes
                factors, leaders = {c: factors[c], a: lambda s: quant.rescale(s, s, s_c)}, leaders[1:]
            movable = [x for x in factors if self.free(x) and leaders.count(self.state.leader(x)) == 1]
            if movable:
                self.move(movable[0], quant.snap_scale(factors[movable[0]], float(self.scale(movable[0])), True))
        self.pin(a, b, c)
        return bool(quant.is_dyadic(quant.rescale(self.scale(a), self.scale(b), self.scale(c))))

    def mean(self, x: str, y: str, size: int) -> bool:
        """y = mean of x over `size` elements: the factor a multiple of 2**-16."""
        s_x, s_y = self.scale(x), self.scale(y)
        if not quant.is_dyadic(mean_factor(s_x, s_y, size)):
            if self.free(y) and self.state.leader(x) != self.state.leader(y):
                self.move(y, quant.snap_scale(lambda s: mean_factor(s_x, s, size), float(s_y), True))
            elif self.free(x) and self.state.leader(x) != self.state.leader(y):
                self.move(x, quant.snap_scale(lambda s: mean_factor(s, s_y, size), float(s_x), True))
        self.pin(x, y)
        return bool(quant.is_dyadic(mean_factor(self.scale(x), self.scale(y), size)))

    def settle_mean(self, product: Node) -> None:
        """x * mean of x: settle the ratio of the two, which the product would pin."""
        for x, mean in (product.inputs, product.inputs[::-1]):
            maker = ir.producer(mean)
            block = None if maker is None else self.state.blocks.get(maker.name)
            if maker is None or block is None or not block.quantized or maker.inputs[0] is not x:
                continue
            is_mean = quantized_rule(self.state.ops, maker).lowering is Lowering.MEAN
            if is_mean and self.free(x.name) and self.free(mean.name):
                self.mean_of_any_size(x.name, mean.name)

    def mean_of_any_size(self, x: str, y: str) -> bool:
        """y = mean of x: its scale 2**-n of that of x."""
        s_x, s_y = float(self.scale(x)), float(self.scale(y))
        apart = self.state.leader(x) != self.state.leader(y)
        if self.free(y) and apart:
            self.move(y, integer_functions.halved(s_x, s_y))
        elif self.free(x) and apart:
            self.move(x, integer_functions.doubled(s_y, s_x))
        self.pin(x, y)
        return integer_functions.halvings(float(self.scale(x)), float(self.scale(y))) is not None

    def prelu(self, x: str, y: str) -> bool:
        """y = PRelu of x: the ratio of their scales a multiple of 2**-12 without ties."""
        s_x, s_y = float(self.scale(x)), float(self.scale(y))
        ratio = integer_functions.snap_slope(s_x, s_y)
        apart = self.state.leader(x) != self.state.leader(y)
        if self.free(x) and apart:
            self.move(x, np.float32(ratio * s_y))
        elif self.free(y) and apart:
            self.move(y, np.float32(s_x / ratio))
        self.pin(x, y)
        return integer_functions.upper_slope(float(self.scale(x)), float(self.scale(y))) is not None

    def multipliers_fit(self, node: Node, output: str) -> bool:
        """Whether the multipliers of a Conv, Gemm or MatMul are still int32 numbers after an Add moved its input's scale."""
        rule = quantized_rule(self.state.ops, node)
        if rule.lowering is not Lowering.MAC or output not in self.state.params:
            return True
        largest = float(np.abs(ir.array(node.inputs[1])).max(initial=0.0)) / self.state.target.weight.qmax
        return float(self.scale(node.inputs[0].name)) * largest / float(self.scale(output)) < 64 * LARGEST_FACTOR

    def concat(self, node: Node, output: str, tie: float) -> None:
        """Let inputs take the output's params, if nothing else reads them or their scales are near: no rescale is left then.

        What only the Concat reads is rounded to the steps of its output anyway, so that finer steps of its own help nobody.
        """
        zero_point = self.params(output).zero_point
        inputs = {t.name: t for t in node.inputs if self.params(t.name).zero_point == zero_point}
        if self.free(output) and inputs:
            self.move(output, max(self.scale(name) for name in inputs))
        target = self.scale(output)
        for name in inputs:
            apart = self.state.leader(name) != self.state.leader(output)
            fits = target <= self.limits.get(self.state.leader(name), np.inf)
            near = tie <= self.scale(name) / target <= 1.02
            if (
                apart
                and self.free(name)
                and (near or (fits and self.scale(name) <= target and self._only_for(name, node)))
            ):
                self.move(name, target)
                self.join(name, output)

    def _only_for(self, name: str, reader: Node) -> bool:
        """Whether nothing but `reader` reads the values of a tensor, or of those that share its params."""
        members = set(self.members[self.state.leader(name)])
        outputs = {t.name for t in self.state.graph.outputs}
        for tensor in (self.tensors[member] for member in members if member in self.tensors):
            passed_on = [n for n in tensor.outputs if n is not reader and n.outputs[0].name not in members]
            if passed_on or tensor.name in outputs:
                return False
        return True

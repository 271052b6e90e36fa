"""Choose channel factors from what the channels hold, so that one scale per tensor serves all of its channels well.

Shared by equalize and migrate-scales. The channels of all tensors that share factors form a group; its factors change in steps,
each of which must lower an estimate of the noise that quantization will cause. The estimate of a group depends on no factors
but its own, so that a second run starts where the first one stopped and finds nothing left to do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from qcompiler.detached import exceeds
from qcompiler.quant import F32
from qcompiler.rewrite import Refusal, Rewriter
from qcompiler.state import CompileState
from qcompiler_passes.channel_rules import RULES
from qcompiler_passes.channels import Channels, Factors, Ids, follow, multiply
from qcompiler_passes.linear import Linear
from qcompiler_passes.observed_channels import Observed, observed_channels

_LIMIT = 16.0
"""How much smaller than the largest of its group a channel counts at least: what seldom active ones hold is poorly known."""

_LEAST_GAIN = 1.41
"""By how much a step must lower the noise of its group: 1.5 decibels. What promises less is a gamble on how weights round."""

_BALANCED = Refusal("no factors would lower the estimated noise by 1.5 decibels")

_STEPS = 255


@dataclass(frozen=True)
class Reader:
    """An operator with weights: the variables of its input channels, [groups, inputs].

    `weight`: gives the greatest magnitude of its weights, float32 [groups, outputs, inputs]. `power`: the power of each input,
    summed over the positions that a kernel reads, [groups, inputs]. `importance`: what noise of power 1 in an output channel
    does in the end, [groups, outputs].
    """

    inputs: Ids
    weight: Callable[[], F32]
    power: Factors
    importance: Factors


@dataclass(frozen=True)
class Group:
    """The variables whose channels are quantized together, the tensors that they occur in, and what reads these.

    The group counts its variables from 1; 0 stands for all others, whose factor is 1. `members`: their numbers in the model.
    `gain`: what noise of power 1 in a channel does in the end. `columns`: the greatest weight that reads a channel, times the
    square root of the importance of its output. Both of the group's variables, shape (variables,).
    """

    members: Ids
    tensors: list[Observed]
    readers: list[Reader]
    gain: Factors
    columns: Factors

    def noise(self, factors: Factors) -> float:
        """An estimate of what quantization does in the end under factors of the variables, shape (variables,).

        Activations: a step squared over 12, but no more than the channel holds. Weights: a step of each output channel squared
        over 12, times the power that they multiply.
        """
        noise = 0.0
        for reader in self.readers:
            scale = factors[reader.inputs]
            steps = (reader.weight() * (1 / scale).astype(np.float32)[:, None, :]).max(axis=2) * (2 / _STEPS)
            power = (reader.power * np.square(scale)).sum(axis=1, keepdims=True)
            noise += float((np.square(steps) / 12 * power * reader.importance).sum())
        for tensor in self.tensors:
            scale = factors[tensor.roots]
            step = ((tensor.high * scale).max() - (tensor.low * scale).min()) / _STEPS
            rounding = np.minimum(step**2 / 12 / np.square(scale), tensor.power)
            noise += float((rounding * self.gain[tensor.roots]).sum()) / len(self.tensors)
        return noise

    def step(self, factors: Factors, alpha: float, beta: float) -> Factors:
        """Factors in proportion to columns**beta / reach**alpha, shape (variables,): 1 for those of others.

        reach: the greatest magnitude of a channel. The largest channel keeps its reach, and channels that hold only zeros keep
        theirs.
        """
        reach = np.zeros_like(factors)
        for tensor in self.tensors:
            np.maximum.at(reach, tensor.roots, np.maximum(tensor.high, -tensor.low) * factors[tensor.roots])
        result = np.ones_like(factors)
        live = 1 + np.flatnonzero((reach[1:] > 0) & (self.columns[1:] > 0))
        if live.size:
            columns = self.columns[live] / factors[live]
            reach, columns = reach[live] / reach[live].max(), columns / columns.max()
            wanted = np.maximum(columns, 1 / _LIMIT) ** beta / np.maximum(reach, 1 / _LIMIT) ** alpha
            result[live] = wanted / (wanted * reach).max()
        return result


@np.errstate(over="ignore", invalid="ignore")  # what overflows promises no gain
def balance(state: CompileState, sources: frozenset[str], samples: int, alpha: float, beta: float) -> int:
    """Multiply the channels of groups by factors of `Group.step` as long as that lowers their noise.

    sources: the operators whose results may carry factors. Returns the number of groups that changed.
    """
    channels = follow(state.graph, sources, RULES)
    state.refusals |= channels.refusals()
    if channels.is_fixed(np.arange(len(channels.parents))):
        return 0
    rewriter = Rewriter(state)
    found = _groups(state, channels, samples)
    makers = {t.name: n.name for n in state.graph.nodes for t in n.outputs}
    factors = np.ones(len(channels.parents))
    for group in found:
        if rewriter.exhausted:
            break
        own = _settle(group, alpha, beta)
        if own is None:
            state.refusals[makers[group.tensors[0].name]] = _BALANCED
        else:
            factors[group.members] = own[1:]
            rewriter.count += 1
    refusal = multiply(rewriter, channels, factors)
    if refusal is not None:
        state.refusals[refusal.culprit] = refusal
        return 0
    return rewriter.finish()


def _settle(group: Group, alpha: float, beta: float) -> Factors | None:
    """The factors after which no step lowers the noise of the group; None if they are all 1."""
    factors, steps = np.ones_like(group.gain), 0
    noise = group.noise(factors)
    while True:
        wanted = factors * group.step(factors, alpha, beta)
        least = group.noise(wanted)
        if not least * _LEAST_GAIN < noise:  # also if they are no numbers
            return factors if steps else None
        factors, noise, steps = wanted, least, steps + 1


def _groups(state: CompileState, channels: Channels, samples: int) -> list[Group]:
    """What so many samples show, in the order of the graph."""
    observed = observed_channels(state, channels, islice(state.calibration or (), samples))
    count = len(channels.parents)
    power, gain, columns = np.zeros(count), np.zeros(count), np.zeros(count)
    for tensor in observed:
        np.maximum.at(power, tensor.roots, tensor.power)
    readers = []
    hold = not exceeds(layer.raw for layer, _, _ in channels.layers)
    for layer, before, after in reversed(channels.layers):
        if channels.is_fixed(before):
            continue
        inputs, outputs = (channels.roots(ids).reshape(layer.shape[0], -1) for ids in (before, after))
        weight = layer.weight.astype(np.float32)
        squares = np.einsum("goit,goit->goi", weight, weight)
        importance = _importance(squares, power[inputs], gain[outputs])
        readers.append(
            Reader(inputs, _magnitude(layer, weight if hold else None), power[inputs] * weight.shape[3], importance)
        )
        squares *= importance[:, :, None].astype(np.float32)
        np.add.at(gain, inputs, squares.sum(axis=1))
        gain[0] = 0  # not a channel, but all that are fixed
        np.maximum.at(columns, inputs, np.sqrt(squares.max(axis=1)))
    return list(_partition(observed, readers, gain, columns))


def _magnitude(layer: Linear, weight: F32 | None) -> Callable[[], F32]:
    """What gives the greatest magnitude of its weights over taps; without `weight` it is made anew each time."""
    if weight is None:
        return lambda: np.abs(layer.weight.astype(np.float32)).max(axis=3)
    held = np.abs(weight).max(axis=3)
    return lambda: held


def _importance(squares: F32, power: Factors, gain: Factors) -> Factors:
    """That of output channels, [groups, outputs]: what their readers make of noise, or its share where nothing known reads them.

    A share is of the power of the result, as if inputs were uncorrelated.
    """
    result = float((squares * power[:, None, :]).sum())
    return np.where(gain > 0, gain, 1 / result if result > 0 else 0.0)


def _partition(observed: list[Observed], readers: list[Reader], gain: Factors, columns: Factors) -> Iterator[Group]:
    """The free variables that occur together in tensors, with these tensors, if something reads them."""
    leader = _leaders(observed, len(gain))
    tensors, own = defaultdict[int, list[Observed]](list), defaultdict[int, list[Reader]](list)
    for tensor in observed:
        tensors[int(leader[tensor.roots.max()])].append(tensor)
    for reader in readers:
        for first in np.unique(leader[reader.inputs]):
            own[int(first)].append(reader)
    order = np.argsort(leader, kind="stable")
    local = np.zeros_like(leader)
    for first, together in tensors.items():
        if first in own:
            start, end = (np.searchsorted(leader, first, side, sorter=order) for side in ("left", "right"))
            members = order[start:end]
            local[members] = 1 + np.arange(len(members))
            yield Group(
                members,
                [replace(tensor, roots=local[tensor.roots]) for tensor in together],
                [replace(reader, inputs=local[reader.inputs]) for reader in own[first]],
                np.append(0.0, gain[members]),
                np.append(0.0, columns[members]),
            )
            local[members] = 0


def _leaders(observed: list[Observed], count: int) -> Ids:
    """For each variable one of those that it occurs together with, the same for all of them."""
    parents = list(range(count))

    def leader(variable: int) -> int:
        while parents[variable] != variable:
            parents[variable] = parents[parents[variable]]
            variable = parents[variable]
        return variable

    for tensor in observed:
        first, *others = np.unique(tensor.roots[tensor.roots > 0]).tolist()
        for other in others:
            parents[leader(other)] = leader(first)
    return np.array([leader(variable) for variable in range(count)])

"""The one object that a compilation pushes through its passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, NamedTuple

from numpy.typing import NDArray

from qcompiler.collectors import COLLECTORS, Collector
from qcompiler.cost import Work
from qcompiler.ir import Graph
from qcompiler.ops import OpRule
from qcompiler.quant import QuantParams, QuantSpec
from qcompiler.target import Target

Feeds = Mapping[str, NDArray[Any]]


class Phase(IntEnum):
    """How far a compilation has come; each phase is a set of invariants in `verify`."""

    FLOAT = 0
    FUSED = 1
    ANNOTATED = 2
    CALIBRATED = 3
    QDQ = 4
    INTEGER = 5
    KERNELS = 6


@dataclass(frozen=True)
class Block:
    """Nodes that become one integer instruction: a root and the activations that it absorbs.

    `root`: name of the root node. `nodes`: names of all its nodes, root first. `outputs`: names of the tensors that leave it.
    `low`, `high`: bounds of the absorbed activation, or those beyond which all readers saturate. `quantized`: whether annotate
    chose it; `reason`: why not, else "" or how else it is smaller than float.
    """

    root: str
    nodes: tuple[str, ...]
    outputs: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf
    quantized: bool = False
    reason: str = ""


class Counterpart(NamedTuple):
    """What a tensor is to one of the float model: `factor` * `source` + `offset`.

    factor, offset: float64, of shapes that broadcast against the source. reshaped: whether the shape is another one.
    """

    source: str
    factor: NDArray[Any]
    offset: NDArray[Any]
    reshaped: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a pass left a node as it is; `culprit` names the node or tensor in the way."""

    reason: str
    culprit: str = ""


@dataclass
class CompileState:
    """The graph and its side tables. Tables are keyed by node or tensor name; names never carry meaning.

    `blocks`: by root node. `specs`: the activations and constants to quantize. `ties`: tensor -> the tensor whose params it
    shares; after insert-qdq also integer tensor -> the float tensor that it stands for. `params`: tensor -> what it got
    (float tensors and, after insert-qdq, their integer counterparts). `tables`: Table node -> the float model that filled
    it. `origin`: node -> the float layers that it came from. `counterparts`: tensor -> what it is to one of the float model;
    one that is not there is the tensor of that name. `integers`: weight -> what it is rounded to, if not to the
    nearest. `imported`: tensor -> the params that a quantized model came with. `means`: tensor -> of each channel in float, for
    each calibration sample, float32 (samples, channels), until biases are corrected. `corrected`: layers whose bias holds a
    correction. `refusals`: node -> why the pass that runs, or ran last, left it as it is. `keep_float`: patterns of node and
    output names -> why they stay float. `calibration`: the samples; `collectors`: the known ways to measure ranges, by name;
    `progress`: called with the number of samples done and in all. `skip`: passes for the target that would not pay on this
    model. `float_work`: what the float model costs; `predicted`: seconds of an inference in float and as placed.
    `attention`: what Softmax gives where only products read it. `model`: the whole model, where `graph` is a body in it.
    """

    graph: Graph
    target: Target
    ops: Mapping[str, OpRule]
    phase: Phase = Phase.FLOAT
    blocks: dict[str, Block] = field(default_factory=dict)
    specs: dict[str, QuantSpec] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    params: dict[str, QuantParams] = field(default_factory=dict)
    tables: dict[str, bytes] = field(default_factory=dict)
    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)
    counterparts: dict[str, Counterpart] = field(default_factory=dict)
    integers: dict[str, NDArray[Any]] = field(default_factory=dict)
    imported: dict[str, QuantParams] = field(default_factory=dict)
    means: dict[str, NDArray[Any]] = field(default_factory=dict)
    corrected: set[str] = field(default_factory=set)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    keep_float: Mapping[str, str] = field(default_factory=dict)
    calibration: Iterable[Feeds] | None = None
    collectors: Mapping[str, type[Collector]] = field(default_factory=lambda: COLLECTORS)
    progress: Any = None
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    float_work: tuple[Work, ...] = ()
    skip: tuple[str, ...] = ()
    predicted: tuple[float, float] | None = None
    rewrite_limit: int | None = None
    attention: QuantSpec = field(default_factory=lambda: QuantSpec("uint8", 0, 255, log2=True))
    model: Graph | None = None

    def clone(self) -> CompileState:
        """A copy that passes can edit without a change to this one. Arrays are shared; nothing edits them in place."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tables: dict[str, Any] = {
            name: copy(value) for name, value in values.items() if isinstance(value, (dict, list, set))
        }
        return replace(self, graph=self.graph.copy(), **tables)

    def leader(self, tensor: str) -> str:
        """The tensor whose params `tensor` shares; itself if it has its own."""
        while tensor in self.ties:
            tensor = self.ties[tensor]
        return tensor

    def tie(self, tensor: str, to: str) -> None:
        """Make `tensor` share the params of `to`."""
        a, b = self.leader(tensor), self.leader(to)
        if a != b:
            self.ties[a] = b

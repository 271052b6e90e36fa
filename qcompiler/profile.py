"""Latency by node, from ONNX Runtime's profiler.

ONNX Runtime renames what it fuses and lays out anew. So a copy of the model is profiled in which every node and every result
carries a tag; names that are derived from tagged ones still hold the tag, and say which node the time belongs to.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from qcompiler import runtime, supervise
from qcompiler.external import graphs
from qcompiler.runtime import Feeds

MIN_RUNS, MAX_RUNS = 3, 50
"""Traces take a kilobyte per node and run."""

_TAG = re.compile(r"@(\d+)@")
_INNER = "@inner@"
_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one inference. `nodes`: by position in the model's main graph; what was fused into another node is not
    there. `layout`: conversions between memory layouts, which ONNX Runtime adds and which belong to no node.
    """

    nodes: dict[int, float]
    layout: float

    @property
    def total(self) -> float:
        """Milliseconds in all operators."""
        return sum(self.nodes.values()) + self.layout


def profile(models: Sequence[onnx.ModelProto], feeds: Feeds, seconds: float = 2.0) -> list[Profile]:
    """Run the models in turns, on one thread, for about `seconds` or MAX_RUNS times, and return the profile of each.

    The time of a node is the least over all runs but the first: other programs can only make it longer. Raises OSError if the
    temporary folder cannot be written.
    """
    with supervise.scratch() as folder:
        runners = [runtime.session(_tagged(model), profile=folder / str(i)) for i, model in enumerate(models)]
        runs, end = 0, time.perf_counter() + seconds
        while runs < MIN_RUNS or (runs < MAX_RUNS and time.perf_counter() < end):
            for runner in runners:
                runtime.run(runner, feeds)
            runs += 1
        traces = [Path(runner.end_profiling()).read_text() for runner in runners]
    return [_profile(json.loads(trace), runs) for trace in traces]


def _profile(events: list[dict[str, Any]], runs: int) -> Profile:
    """The profile in a trace. A node in a loop has several events in each run, in equal number for lack of better knowledge."""
    durations: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            durations[event["name"]].append(event["dur"] / 1e3)
    nodes: dict[int, float] = defaultdict(float)
    layout = 0.0
    for name, times in durations.items():
        per_run = max(1, len(times) // runs)
        later = times[per_run:] or times
        milliseconds = min(sum(later[i : i + per_run]) for i in range(0, len(later) - per_run + 1, per_run))
        tag = _TAG.search(name)
        if tag is not None:
            nodes[int(tag[1])] += milliseconds
        elif _INNER not in name:
            layout += milliseconds
    return Profile({i: round(ms, 5) for i, ms in sorted(nodes.items())}, round(layout, 5))


def _tagged(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which node i is called @i@, and its results @i@0, @i@1 …; graph inputs keep their names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    renamed = {
        name: f"@{i}@{k}" for i, node in enumerate(graph.node) for k, name in enumerate(node.output) if name != ""
    }
    for depth, level in enumerate(graphs(graph)):
        for i, node in enumerate(level.node):
            node.name = f"{_INNER}{depth}.{i}" if depth else f"@{i}@"
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        for value in level.output:
            value.name = renamed.get(value.name, value.name)
    del graph.value_info[:]
    _tag_functions(copy)
    return copy


def _tag_functions(model: onnx.ModelProto) -> None:
    """Give every call a function of its own, whose nodes carry the tag of the call."""
    known = {(f.domain, f.name): f for f in model.functions}
    own: list[onnx.FunctionProto] = []
    for node in model.graph.node:
        function = known.get((node.domain, node.op_type))
        if function is not None:
            copy = onnx.FunctionProto()
            copy.CopyFrom(function)
            copy.name = node.op_type = f"{function.name}_{len(own)}"
            for k, inner in enumerate(copy.node):
                inner.name = f"{node.name}{k}"
            own.append(copy)
    model.functions.extend(own)

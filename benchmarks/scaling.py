"""Compile time against the number of nodes: chains of Conv and Relu.

python benchmarks/scaling.py [NODES...]          default: 200 1000 5000 20000

The passes must be linear in the graph: the time per node should stay about the same. ONNX Runtime is not: `loading` is what it
takes to load the compiled model once, which checks it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from qcompiler import compile_model, runtime
from qcompiler.instrument import Watcher
from qcompiler.pipeline import Pass
from qcompiler.state import CompileState

NODES = (200, 1000, 5000, 20000)
CHANNELS = 4
SHAPE = (1, CHANNELS, 4, 4)
SAMPLES = 4
SLOWEST = 4


def chain(length: int) -> onnx.ModelProto:
    """A float model of `length` times Conv and Relu, with weights that keep the values' size."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(length):
        weight = rng.standard_normal((CHANNELS, CHANNELS, 1, 1)) * (2 / CHANNELS) ** 0.5
        bias = rng.standard_normal(CHANNELS) * 0.1
        weights += [numpy_helper.from_array(a.astype(np.float32), f"{k}{i}") for k, a in (("w", weight), ("b", bias))]
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"c{i}"], f"conv{i}"))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"], f"relu{i}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("x0", f"x{length}")]
    graph = helper.make_graph(nodes, f"chain{length}", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class CpuTimes(Watcher):
    """CPU seconds of each pass: other work on the machine counts little then."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._start = 0.0

    def before(self, stage: Pass, state: CompileState) -> None:
        self._start = time.process_time()

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        self.seconds[stage.name] += time.process_time() - self._start


def main() -> None:
    table = Table("nodes", "CPU seconds", "ms per node", "loading", "slowest passes")
    rng = np.random.default_rng(1)
    samples = [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(SAMPLES)]
    for nodes in [int(text) for text in sys.argv[1:]] or NODES:
        model = chain(nodes // 2)
        start = time.process_time()
        times = CpuTimes()
        result = compile_model(model, samples, compare=False, instruments=[times])
        end = time.process_time()
        runtime.session(result.model)
        loading = time.process_time() - end
        names = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.seconds.most_common(SLOWEST))
        table.add_row(str(nodes), f"{end - start:.1f}", f"{1e3 * (end - start) / nodes:.1f}", f"{loading:.1f}", names)
    Console().print(table)


if __name__ == "__main__":
    main()

"""The one door to onnxruntime: sessions, runs, which kernels really run, and how fast.

All sessions are silent, on the CPU provider, and deterministic; one thread unless asked for more.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qcompiler import detached, supervise
from qcompiler.errors import UserError
from qcompiler.threads import each

Feeds = Mapping[str, NDArray[Any]]
Session: TypeAlias = ort.InferenceSession


class Runner(Protocol):
    """What runs a model: a session, or several in turn."""

    def run(self, names: None, feeds: dict[str, NDArray[Any]], /) -> list[Any]:
        """All outputs, in order."""
        ...


_FATAL_ONLY = 4

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BLOCK = 8 << 20


def session(
    model: onnx.ModelProto | bytes | Path,
    *,
    optimize: bool = True,
    threads: int = 1,
    idle: bool = False,
    low_memory: bool = False,
    consume: bool = False,
    keep_float: bool = False,
    optimized: Path | None = None,
    profile: Path | None = None,
) -> Session:
    """Make a session.

    `optimize`: all graph optimizations, or none. `threads`: of one operator; 0 means all cores. `idle`: let other threads
    sleep between runs, not wait busily. `low_memory`: run each node as soon as it can, so that reductions free their inputs
    early. `consume`: empty the ModelProto, so that no large model is held twice. `keep_float`: leave the weights of float
    operators between DQ and Q as they are, even if nothing guards them against ONNX Runtime, which rounds them per tensor.
    `optimized`: where to write the graph that really runs, its constants beside it. `profile`: prefix of a trace file.
    Raises RuntimeError, with ONNX Runtime's message, for a model that it does not load.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.use_deterministic_compute = True
    options.intra_op_num_threads = threads
    if idle:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if low_memory:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False  # the plan of the first run would come on top of what that run took
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    disabled = ["WeightBiasQuantization"] if keep_float else []
    if low_memory or consume or keep_float:  # not what the user runs: it joins a Pad into pools that it then refuses
        disabled.append("Pad_Fusion")
    if isinstance(model, onnx.ModelProto):
        data, weights = _lend_weights(model, options)
        if consume:
            model.Clear()
        opened = _open(data, options, disabled)
        opened._weights = weights  # which it reads where they are
        return opened
    return _open(model, options, disabled)


@cache
def _return_large_blocks() -> None:
    """Let glibc give large blocks back to the system as they are freed.

    Of itself it keeps ever larger ones, up to 32 MiB, of which ONNX Runtime's sessions leave many behind.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BLOCK)


def _open(model: bytes | Path, options: Any, disabled: Sequence[str]) -> Session:
    _return_large_blocks()
    try:
        source = str(model) if isinstance(model, Path) else model
        opened = ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled or None
        )
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime does not load the model: {_message(error)}") from error
    opened._model_bytes = None  # it keeps them for a change of providers
    return opened


def _lend_weights(model: onnx.ModelProto, options: Any) -> tuple[bytes, list[Any]]:
    """The bytes of a model, and the weights beside it, which the session gets without a copy, also not one for its kernels.

    While it loads the model, it reads those in files from there, as paths from a root, and copies the others.
    """
    detached.let_go()
    if not detached.of(model):
        return model.SerializeToString(), []
    draft = onnx.ModelProto()
    draft.CopyFrom(model)
    lent, copied = {}, []
    for tensor in detached.of(draft):
        lent[tensor.name] = ort.OrtValue.ortvalue_from_numpy(detached.array_of(tensor))
        options.add_initializer(tensor.name, lent[tensor.name])
        if os.name != "posix" or not detached.make_relative(tensor):
            copied.append(tensor.name)
    options.add_session_config_entry("session.disable_prepacking", "1")
    if len(copied) < len(lent):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/")
    if copied:
        options.add_external_initializers(copied, [lent[name] for name in copied])
    return draft.SerializeToString(), list(lent.values())


def run(runner: Runner, feeds: Feeds) -> list[Any]:
    """Run a session and return all outputs, in order.

    Raises UserError if the feeds have the wrong names, types or shapes, RuntimeError if an operator fails.
    """
    try:
        return list(runner.run(None, dict(feeds)))
    except (ort.capi.onnxruntime_pybind11_state.InvalidArgument, ValueError) as error:
        raise UserError(f"the model does not take these inputs: {_message(error)}") from error
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime does not run the model: {_message(error)}") from error


def run_all(runner: Runner, samples: Iterable[Feeds]) -> list[list[Any]]:
    """Run a session on every sample, on several threads, and return all outputs of each, in order. Raises as `run` does."""
    return each(lambda feeds: run(runner, feeds), samples)


def _message(error: Exception) -> str:
    """The readable part of `[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : …`, on one line."""
    return " ".join(str(error).split(" : ", 3)[-1].split())


def session_and_graph(model: onnx.ModelProto | bytes | Path) -> tuple[Session, onnx.ModelProto]:
    """A session, and the graph that ONNX Runtime makes of the model on this machine, without its large constants.

    That goes through a temporary file. Raises OSError or RuntimeError if it cannot be written.
    """
    with supervise.scratch() as folder:
        path = folder / "optimized.onnx"
        return session(model, optimized=path), onnx.load(path, load_external_data=False)


def optimized(model: onnx.ModelProto | bytes | Path) -> onnx.ModelProto:
    """The graph of `session_and_graph`."""
    return session_and_graph(model)[1]


def optimized_ops(model: onnx.ModelProto | bytes | Path) -> Counter[str]:
    """How often each kernel (`Op`, or `domain.Op`) occurs in what really runs, subgraphs included."""
    return count_ops(optimized(model))


def count_ops(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator (`Op`, or `domain.Op`) occurs, subgraphs included."""
    nodes = _nodes(model.graph)
    return Counter(f"{n.domain}.{n.op_type}" if n.domain not in {"", "ai.onnx"} else n.op_type for n in nodes)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def race(a: Session, b: Session, feeds: Feeds, seconds: float = 2.0) -> tuple[float, float]:
    """Median CPU seconds of one run of `a` and of `b`, taken in turns for about `seconds` of wall time.

    CPU time of the calling thread, hence for sessions with one thread: other load on the machine then hardly counts.
    """
    times: tuple[list[float], list[float]] = ([], [])
    runners = (a, b)
    for runner in runners:
        _cpu_seconds(runner, feeds)
    end = time.perf_counter() + seconds
    while not times[0] or time.perf_counter() < end:
        for which in (0, 1, 1, 0):  # so that neither is always the one whose data is still in the cache
            times[which].append(_cpu_seconds(runners[which], feeds))
    return statistics.median(times[0]), statistics.median(times[1])


def _cpu_seconds(runner: Session, feeds: Feeds) -> float:
    start = time.thread_time()
    runner.run(None, feeds)
    return time.thread_time() - start

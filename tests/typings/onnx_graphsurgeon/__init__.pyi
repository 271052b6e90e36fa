"""The part of onnx-graphsurgeon that qcompiler uses (the package ships no types)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

class Tensor:
    name: str
    inputs: list[Node]
    outputs: list[Node]
    shape: Any
    dtype: Any
    def is_empty(self) -> bool: ...

class Variable(Tensor):
    def __init__(self, name: str, dtype: Any = ..., shape: Any = ..., type: str = ...) -> None: ...
    @staticmethod
    def empty() -> Variable: ...
    type: str

class Constant(Tensor):
    values: Any
    data_location: int | None
    _values: Any
    def __init__(self, name: str, values: np.ndarray[Any, np.dtype[Any]]) -> None: ...

class Node:
    op: str
    name: str
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    domain: str | None
    def __init__(
        self,
        op: str,
        name: str | None = ...,
        attrs: dict[str, Any] | None = ...,
        inputs: list[Tensor] | None = ...,
        outputs: list[Tensor] | None = ...,
        domain: str | None = ...,
    ) -> None: ...
    def subgraphs(self, recursive: bool = ...) -> Iterator[Graph]: ...

class Function(Graph):
    domain: str

class Graph:
    nodes: list[Node]
    inputs: list[Tensor]
    outputs: list[Tensor]
    name: str
    doc_string: str
    opset: int
    import_domains: Any
    producer_name: str
    producer_version: str
    ir_version: int | None
    functions: list[Function]
    def __init__(
        self,
        nodes: list[Node] | None = ...,
        inputs: list[Tensor] | None = ...,
        outputs: list[Tensor] | None = ...,
        name: str | None = ...,
        opset: int | None = ...,
        ir_version: int | None = ...,
    ) -> None: ...
    def subgraphs(self, recursive: bool = ...) -> Iterator[Graph]: ...
    def copy(self) -> Graph: ...

def import_onnx(onnx_model: onnx.ModelProto) -> Graph: ...
def export_onnx(graph: Graph, do_type_check: bool = ..., **kwargs: Any) -> onnx.ModelProto: ...

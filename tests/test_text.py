"""The text form of graphs, and fingerprints of arrays."""

from __future__ import annotations

import numpy as np

from qcompiler import ir
from qcompiler.text import digest, format_graph
from tests.support import model_from_text
from tests.test_ir import IF_MODEL


def test_a_line_per_node() -> None:
    model = model_from_text(
        "g (float[N,4] x) => (float[N,2] y) { t = Clip(x, , high) y = Gemm<alpha = 0.5>(t, w) }",
        {"high": np.float32(6), "w": np.zeros((4, 2), np.float32)},
    )
    fingerprint = digest(np.zeros((4, 2), np.float32))[:6]
    assert format_graph(ir.from_proto(model)) == (
        "inputs: x:float32[N,4]\n"
        "t = Clip(x, _, 6)\n"
        f"y = Gemm{{alpha=0.5}}(t, float32[4,2]#{fingerprint})\n"
        "outputs: y:float32[N,2]\n"
    )


def test_digest_depends_on_type_shape_and_content() -> None:
    base = np.arange(6, dtype=np.float32)
    others = [base.astype(np.int32), base.reshape(2, 3), base[::-1]]
    assert len({digest(a) for a in (base, *others)}) == 4
    assert digest(base.reshape(2, 3)[:, ::-1]) == digest(np.ascontiguousarray(base.reshape(2, 3)[:, ::-1]))


def test_a_line_names_what_it_cannot_show() -> None:
    model = model_from_text(IF_MODEL)
    branches = next(line for line in format_graph(ir.from_proto(model)).splitlines() if " = If" in line)
    assert branches == "y = If{else_branch=graph<1 nodes>, then_branch=graph<1 nodes>}(c)"

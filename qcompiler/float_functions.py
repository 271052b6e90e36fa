"""The model-local functions of the float form: operators that ONNX, or the model's opset, lacks, so that a layer is one node.

Targets ask for them by name (`Target.rewrites`). `insert-qdq` puts integer functions in their places.
"""

from __future__ import annotations

BODIES = {
    "MaskedSoftmax": """
MaskedSoftmax (scores, mask) => (y) {
    sum = Add (scores, mask)
    y = Softmax <axis = -1> (sum)
}""",
    "RMSNormalization": """
RMSNormalization <epsilon> (x, scale) => (y) {
    last = Constant <value = int64[1] {-1}> ()
    square = Mul (x, x)
    total = ReduceSum <keepdims = 1> (square, last)
    n = Shape <start = -1> (x)
    width = CastLike (n, x)
    mean = Div (total, width)
    least = Constant <value_float : float = @epsilon> ()
    positive = Add (mean, least)
    root = Sqrt (positive)
    normalized = Div (x, root)
    y = Mul (normalized, scale)
}""",
}

DOCS = {
    "MaskedSoftmax": "Softmax of scores + mask over the last axis",
    "RMSNormalization": "RMSNormalization over the last axis, which ONNX has from opset 23 on",
}

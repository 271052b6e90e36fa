"""The shipped models are what models/README.md says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

MODELS = Path(__file__).parent.parent / "models"
SHIPPED = {"digits_resnet": 17, "condenser": 17, "tiny_vit": 16}
"""The models and their opsets."""


def labelled_rows() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [1000, 28, 28] and labels int64 [1000]."""
    with np.load(MODELS / "mnist_test.npz") as rows:
        return rows["x"], rows["y"]


@pytest.mark.parametrize(("name", "correct"), [("digits_resnet", 987), ("condenser", 988), ("tiny_vit", 986)])
def test_float_accuracy_is_the_published_one(name: str, correct: int) -> None:
    x, y = labelled_rows()
    session = ort.InferenceSession(MODELS / f"{name}.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": x[:, None].astype(np.float32) / np.float32(255)})
    # One image of slack: another CPU may sum in another order.
    assert abs(int((logits.argmax(1) == y).sum()) - correct) <= 1


@pytest.mark.parametrize("name", SHIPPED)
def test_model_is_float_with_a_dynamic_batch(name: str) -> None:
    model = onnx.load(MODELS / f"{name}.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", SHIPPED[name])]
    assert 8 <= model.ir_version <= 10
    (image,) = model.graph.input
    assert image.name == "image"
    assert [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim] == ["N", 1, 28, 28]
    weights = [init for init in model.graph.initializer if len(init.dims) > 1]
    assert {init.data_type for init in weights} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(("name", "normalizations"), [("digits_resnet", 9), ("condenser", 8)])
def test_batch_normalization_is_unfolded(name: str, normalizations: int) -> None:
    graph = onnx.load(MODELS / f"{name}.onnx").graph
    producer = {output: node for node in graph.node for output in node.output}
    before = [producer[node.input[0]] for node in graph.node if node.op_type == "BatchNormalization"]
    assert len(before) == normalizations
    assert all(conv.op_type == "Conv" and len(conv.input) == 2 for conv in before)


def test_residual_model_has_strided_projections() -> None:
    graph = onnx.load(MODELS / "digits_resnet.onnx").graph
    attributes = [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in graph.node
        if node.op_type == "Conv"
    ]
    assert sum(a["kernel_shape"] == [1, 1] and a["strides"] == [2, 2] for a in attributes) == 2
    assert sum(node.op_type == "Add" for node in graph.node) == 3


def test_condenser_multiplies_by_attention_and_by_a_learned_scale() -> None:
    graph = onnx.load(MODELS / "condenser.onnx").graph
    producer = {output: node.op_type for node in graph.node for output in node.output}
    products = [
        tuple(producer.get(name, "constant") for name in node.input) for node in graph.node if node.op_type == "Mul"
    ]
    assert products == [("Relu", "Sigmoid"), ("Mul", "constant")] * 2
    assert sum(node.op_type == "Resize" for node in graph.node) == 2


def test_transformer_is_as_exporters_write_it() -> None:
    graph = onnx.load(MODELS / "tiny_vit.onnx").graph
    counts = Counter(node.op_type for node in graph.node)
    assert (counts["Erf"], counts["Softmax"], counts["Sqrt"], counts["LayerNormalization"]) == (4, 4, 9, 0)
    assert all(counts[op] for op in ("Shape", "Gather", "Expand", "Reshape", "Transpose"))
    sizes = {init.name: list(init.dims) for init in graph.initializer}
    assert sizes["class_token"] == [1, 1, 64]
    assert sizes["positions"] == [1, 50, 64]


def test_calibration_images_are_no_test_images() -> None:
    held_out = {image.tobytes() for image in labelled_rows()[0]}
    files = sorted((MODELS / "mnist_calib").iterdir())
    assert len(files) == 100
    for file in files:
        with Image.open(file) as image:
            assert (image.mode, image.size) == ("L", (28, 28))
            assert image.tobytes() not in held_out


def test_models_folder_is_small() -> None:
    files = (file for file in MODELS.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert sum(file.stat().st_size for file in files) < 3_000_000

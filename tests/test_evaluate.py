"""Labelled data of every kind, functions as judges, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from qcompiler import UserError, compile_model, runtime
from qcompiler.evaluate import Judge, Predictor, judge
from qcompiler.images import Preprocess
from qcompiler.load import input_specs, load_model
from tests.support import model_from_text

MODELS = Path(__file__).parent.parent / "models"


def brightest(batch: str = "N") -> onnx.ModelProto:
    """Class: the brighter half of a 2x2 grey image, 0 left and 1 right."""
    text = f"g (float[{batch},1,2,2] x) => (float[{batch},2] y) {{ f = Flatten(x) y = MatMul(f, w) }}"
    return model_from_text(text, {"w": np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)})


LEFT, RIGHT = np.array([[9, 1], [9, 1]], np.uint8), np.array([[1, 9], [1, 9]], np.uint8)


def images(*pixels: np.ndarray) -> np.ndarray:
    return np.stack(pixels)


def save(folder: Path, **files: np.ndarray) -> None:
    for name, pixels in files.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def judged(given: Any, model: onnx.ModelProto | None = None, preprocess: Preprocess | None = None) -> Judge:
    return judge(given, input_specs(model or brightest()), preprocess)


def score(given: Any, model: onnx.ModelProto | None = None) -> float:
    return judged(given, model).score(runtime.session(model or brightest()))


@pytest.mark.parametrize("keys", [("x", "y"), ("x", "labels"), ("image", "y")])
def test_arrays_and_labels(tmp_path: Path, keys: tuple[str, str]) -> None:
    x = images(LEFT, RIGHT, RIGHT, LEFT)[:, None].astype(np.float32)
    model = brightest()
    if keys[0] != "x":
        model = onnx.compose.add_prefix(model, "")
        model.graph.input[0].name = model.graph.node[0].input[0] = keys[0]
    np.savez(tmp_path / "d.npz", **{keys[0]: x, keys[1]: np.array([0, 1, 0, 0])})
    made = judged(tmp_path / "d.npz", model)
    assert (made.name, made.unit, made.samples) == ("top-1", "%", 4)
    assert made.score(runtime.session(model)) == 75


@pytest.mark.parametrize("shape", [(4, 2, 2), (4, 2, 2, 1), (4, 1, 2, 2)])
def test_uint8_arrays_are_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = images(LEFT, RIGHT, RIGHT, LEFT).reshape(shape)
    np.savez(tmp_path / "d.npz", x=x, y=np.array([0, 1, 1, 1]))
    assert score(tmp_path / "d.npz") == 75
    dark = judged(tmp_path / "d.npz", preprocess=Preprocess(scale=-1 / 255))  # the darker half is the other one
    assert dark.score(runtime.session(brightest())) == 25


def test_the_shipped_labelled_set() -> None:
    model = load_model(MODELS / "digits_resnet.onnx")
    made = judge(MODELS / "mnist_test.npz", input_specs(model))
    assert made.samples == 1000
    assert made.score(runtime.session(model)) == 98.7


def test_folders_are_classes(tmp_path: Path) -> None:
    save(tmp_path, cat__a=LEFT, cat__b=RIGHT, dog__a=RIGHT, dog__deep__b=RIGHT)
    assert score(tmp_path) == 75


def test_folders_called_by_numbers_are_these_classes(tmp_path: Path) -> None:
    save(tmp_path, **{"1__a": RIGHT, "1__b": RIGHT})
    assert score(tmp_path) == 100
    save(tmp_path, **{"10__a": RIGHT})
    with pytest.raises(UserError, match="a label is 10, but the model has 2 classes"):
        score(tmp_path)


def test_as_many_folders_as_classes(tmp_path: Path) -> None:
    save(tmp_path, a__a=LEFT, b__a=LEFT, c__a=LEFT)
    with pytest.raises(UserError, match="3 folders, but the model has 2 classes"):
        score(tmp_path)


@pytest.mark.parametrize("heading", ["", "file,class\n"])
def test_a_table_of_labels(tmp_path: Path, heading: str) -> None:
    save(tmp_path, a=LEFT, deep__b=RIGHT)
    (tmp_path / "labels.csv").write_text(f"{heading}a.png,0\ndeep/b.png, 0\n")
    assert score(tmp_path) == 50
    (tmp_path / "labels.csv").write_text("a.png,0\nb.png,cat\n")
    with pytest.raises(UserError, match=r"line 2 is not FILE,CLASS .*labels.csv"):
        score(tmp_path)


def test_a_fixed_batch(tmp_path: Path) -> None:
    model = brightest("2")
    x = images(LEFT, RIGHT, RIGHT, LEFT, LEFT)[:, None].astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.array([0, 1, 0, 0, 1]))
    made = judged(tmp_path / "d.npz", model)
    assert made.samples == 4  # the last one does not fill a batch
    assert made.score(runtime.session(model)) == 75


def test_a_model_that_gives_classes(tmp_path: Path) -> None:
    text = "g (float[N,2] x) => (int64[N] y) { y = ArgMax<axis = 1, keepdims = 0>(x) }"
    model = model_from_text(text)
    np.savez(tmp_path / "d.npz", x=np.eye(2, dtype=np.float32), y=np.array([0, 0]))
    assert score(tmp_path / "d.npz", model) == 50


def agreement(predict: Predictor) -> float:
    x = np.ones((1, 1, 2, 2), np.float32)
    [by_array], [by_name] = predict(x), predict({"x": x})
    assert predict.session.get_outputs()[0].name == "y"
    return float((by_array == by_name).mean())


def test_a_function() -> None:
    made = judged(agreement)
    assert (made.name, made.unit) == ("agreement", "")
    assert made.score(runtime.session(brightest())) == 1


def test_a_function_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def f(predict):\n    return len(predict.session.get_outputs()) / 4\n")
    assert score(f"{tmp_path / 'my.py'}:f") == 0.25
    with pytest.raises(UserError, match="the file has no function 'g'"):
        judged(f"{tmp_path / 'my.py'}:g")
    (tmp_path / "my.py").write_text("1 / 0")
    with pytest.raises(UserError, match="does not load: ZeroDivisionError"):
        judged(f"{tmp_path / 'my.py'}:f")


def raises(predict: Predictor) -> float:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("function", "message"), [(raises, "raised KeyError: 'no such thing'"), (lambda p: np.nan, "returned nan")]
)
def test_functions_that_fail(function: Callable[[Predictor], float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(function)


def test_what_is_refused(tmp_path: Path) -> None:
    x = np.ones((2, 1, 2, 2), np.float32)
    np.savez(tmp_path / "bare.npz", x=x)
    np.savez(tmp_path / "short.npz", x=x, y=np.array([0]))
    (tmp_path / "empty").mkdir()
    for given, message in (
        (tmp_path / "bare.npz", "there are no labels"),
        (tmp_path / "short.npz", "2 samples, but 1 labels"),
        (tmp_path / "empty", "there are no images"),
        (tmp_path / "nothing", "no such file or folder"),
        (MODELS / "condenser.onnx", "labelled data is a folder or a .npz"),
        (3, "a int judges no model"),
    ):
        with pytest.raises(UserError, match=message):
            judged(given)


def test_an_output_that_is_no_class(tmp_path: Path) -> None:
    model = model_from_text("g (float[N,1,2,2] x) => (float[N,1,2,2] y) { y = Relu(x) }")
    np.savez(tmp_path / "d.npz", x=np.ones((2, 1, 2, 2), np.float32), y=np.array([0, 1]))
    with pytest.raises(UserError, match=r"the first output is \[1, 1, 2, 2\]: give a function"):
        score(tmp_path / "d.npz", model)


def test_drops() -> None:
    percent, number = Judge("top-1", "%", 0, len), Judge("f", "", 0, len)  # type: ignore[arg-type]
    assert percent.drop(60, 59.5) == 0.5
    assert number.drop(0.5, 0.4) == pytest.approx(20)
    assert number.drop(-2, -2.5) == pytest.approx(25)
    assert number.drop(0, 0) == 0


def test_the_report_has_both_scores() -> None:
    data = [{"x": np.random.default_rng(i).standard_normal((1, 1, 2, 2)).astype(np.float32)} for i in range(4)]
    report = compile_model(brightest(), data, eval=agreement).report
    assert report.score is not None
    assert (report.score.name, report.score.before, report.score.after) == ("agreement", 1, 1)
    assert ("agreement", "1 -> 1") in list(report.rows())

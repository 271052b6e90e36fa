"""The HTML report: that the page is whole, safe and alone, and that the facts on it are those of the compilation."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompiler import UserError, compile_model, facts, figures, html_report
from qcompiler.compile import CompileResult
from qcompiler.facts import Facts, LayerRow, gather
from qcompiler.html_report import recorder_for, render
from qcompiler.quant import QuantParams, QuantSpec, dequantize
from qcompiler.recorder import BINS, Histogram, Recorder
from tests.support import model_from_text, random_feeds
from tests.test_cli import Run, folder, qcompile  # noqa: F401  (fixtures)
from tests.test_compile import net, samples

EVIL = "<script>alert(1)</script>\"' & co"
VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """A parsed page. Fails on tags that do not match; `rows`: the text of the cells of a section's table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.text = ""
        self._section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = dict(attrs).get("id") or ""
        elif tag == "tr":
            self.rows.setdefault(self._section, []).append([])
        elif tag == "td":
            self.rows[self._section][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data
        if "td" in self.open:
            self.rows[self._section][-1][-1] += data


@pytest.fixture(autouse=True)
def without_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "PROFILE_SECONDS", 0)


def compiled(model: onnx.ModelProto, calib: Any, **options: Any) -> tuple[CompileResult, Recorder]:
    recorder = Recorder()
    return compile_model(model, calib, compare=False, instruments=[recorder], **options), recorder


def page_of(model: onnx.ModelProto, calib: Any, **options: Any) -> tuple[CompileResult, Facts, str]:
    result, recorder = compiled(model, calib, **options)
    found = gather(result, recorder)
    return result, found, render(result.report, found, "qcompile net.onnx")


def evil_net() -> onnx.ModelProto:
    model = net()
    for node in model.graph.node:
        node.name = f"{EVIL} {node.name}"
    model.graph.name = EVIL
    return model


def assert_alone(text: str) -> None:
    """Nothing on the page is loaded from elsewhere, and the page itself forbids it."""
    assert "://" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    page = Page(text)
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert all((attributes.get(key) or "#").startswith(("#", "data:,")) for key in ("href", "xlink:href"))
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert [policy for policy in policies if policy and policy.startswith("default-src 'none'")]


@pytest.mark.parametrize("emit", ["kernels", "integer", "qdq"])
def test_the_page_has_every_quantized_layer(emit: str) -> None:
    result, found, text = page_of(net(), samples(10), emit=emit)
    page = Page(text)
    quantized = [layer.name for layer in result.report.layers if layer.quantized]
    assert len(quantized) >= 3
    names = [row[1] for row in page.rows["layers"] if row]
    assert len(names) == len(quantized)
    assert all(any(shown.startswith(name) for shown in names) for name in quantized)
    assert [row[0] for row in page.rows["pipeline"] if row] == [p.name for p in result.report.passes]
    assert text.count("<figure>") == 2  # no latency was measured
    assert "qcompile net.onnx" in page.text
    assert all(row.error is not None for row in found.layers)


def test_the_page_stands_alone() -> None:
    assert_alone(page_of(net(), samples(10))[2])


def test_names_are_escaped() -> None:
    for options in ({}, {"keep_float": ["*"]}):
        _, _, text = page_of(evil_net(), samples(4), **options)
        assert_alone(text)
        page = Page(text)
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert "<script>alert" not in text
        assert EVIL in page.text


def test_the_score_and_the_goal() -> None:
    _, _, text = page_of(net(), samples(10), eval=lambda predict: 0.25, min_sqnr=1)
    shown = Page(text).text
    assert "0.25 -> 0.25" in shown
    assert "reach 1 dB: " in shown


def test_nothing_quantized() -> None:
    result, found, text = page_of(net(), samples(4), keep_float=["*"])
    page = Page(text)
    assert_alone(text)
    assert not found.layers and not found.weights
    assert "No layer is quantized" in page.text
    assert sum(int(row[0]) for row in page.rows["float"] if row) == len(result.report.layers) > 0


@pytest.mark.parametrize("until", ["fold-bias", "annotate", "calibrated"])
def test_a_pipeline_that_stops_early(until: str) -> None:
    calib = samples(4) if until == "calibrated" else None
    _, found, text = page_of(net(), calib, until=until)
    assert_alone(text)
    assert found.comparison is None
    assert all(row.error is None for row in found.layers)


def test_layers_that_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("no tensor is alike", "model")

    monkeypatch.setattr(facts, "compare", refuse)
    result, found, text = page_of(net(), samples(4))
    assert found.comparison is None
    assert result.report.notes[-1] == "the layers are not compared: no tensor is alike"
    assert "no tensor is alike" in Page(text).text
    assert all(row.kernels and row.histogram and row.params for row in found.layers if row.op == "Conv")


def test_no_passes_at_all() -> None:
    with pytest.raises(UserError, match="no passes"):
        gather(*compiled(net(), None, passes=" "))


def test_the_same_compilation_gives_the_same_page() -> None:
    pages = []
    for _ in range(2):
        result, found, _ = page_of(net(), samples(6))
        result.report.passes = []
        pages.append(render(result.report, found))
    assert pages[0] == pages[1]


def test_worst_layers_come_first() -> None:
    _, found, text = page_of(net(), samples(6))
    exact = float("inf")
    errors = {row.position: row.error for row in found.layers}
    order = [int(row[0]) for row in Page(text).rows["layers"] if row]
    values = [exact if (e := errors[i]) is None or e.local.sqnr is None else e.local.sqnr for i in order]
    assert values == sorted(values) and len(values) > 1


def test_weights_are_those_of_the_model() -> None:
    result, found, _ = page_of(net(), samples(4))
    stored = {tuple(t.dims): onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    (row,) = [row for row in found.weights if row.shape.count("×") == 3]
    q = stored[tuple(int(d) for d in row.shape.split(" × "))]
    params = QuantParams(QuantSpec("int8", -128, 127, symmetric=True, axis=0), row.scales)
    real = dequantize(q, params)
    np.testing.assert_array_equal(row.low, real.min(axis=(1, 2, 3)))
    np.testing.assert_array_equal(row.high, real.max(axis=(1, 2, 3)))
    assert row.spread == row.scales.max() / row.scales.min()


def test_sizes_add_up_to_the_constants() -> None:
    result, found, _ = page_of(net(), samples(4))
    assert sum(row.before for row in found.sizes) == sum(t.ByteSize() for t in net().graph.initializer)
    assert sum(row.after for row in found.sizes) == sum(t.ByteSize() for t in result.model.graph.initializer)
    quantized = {layer.name for layer in result.report.layers if layer.quantized}
    assert {row.layer for row in found.sizes if row.before} <= quantized


def test_histograms_hold_the_values() -> None:
    _, found, _ = page_of(net(), samples(20))
    for row in found.layers:
        assert row.histogram is not None and row.histogram.low <= row.histogram.high
        assert len(row.histogram.counts) == BINS and sum(row.histogram.counts) > 0
    relu = next(row for row in found.layers if "Relu" in row.op or row.op.startswith("Conv"))
    assert relu.histogram is not None and relu.histogram.low == 0


UINT8 = QuantSpec("uint8", 0, 255)


@pytest.mark.parametrize(
    ("bounds", "seen", "clips"),
    [
        ((-np.inf, np.inf), (-1.0, 1.0), ("", "")),
        ((-np.inf, np.inf), (-2.0, 2.0), ("cut", "cut")),
        ((-1.28, np.inf), (-2.0, 2.0), ("free", "cut")),
        ((-1.5, 1.27), (-2.0, 2.0), ("cut", "free")),
    ],
)
def test_clipping_beyond_the_bounds_is_free(
    bounds: tuple[float, float], seen: tuple[float, float], clips: tuple[str, str]
) -> None:
    params = QuantParams(UINT8, np.asarray(0.01, np.float32), 128)
    row = LayerRow(1, "a", "Conv", ("a",), "", params, bounds, Histogram(*seen, (1,)), None, ())
    assert row.clips == clips


def test_shared_layers_belong_to_the_heavy_block() -> None:
    rng = np.random.default_rng(0)
    model = model_from_text(
        "g (float[N,4,6] x) => (float[N,4,5] y) { r = Relu(x) y = MatMul(r, w) }",
        {"w": rng.normal(size=(6, 5)).astype(np.float32)},
    )
    calib = [{"x": rng.normal(size=(1, 4, 6)).astype(np.float32)} for _ in range(4)]
    result, found, _ = page_of(model, calib)
    heavy = [layer.name for layer in result.report.layers if layer.op in {"Gemm", "MatMul"}]
    assert [row.layer for row in found.weights] == heavy


def test_sparkline_and_band() -> None:
    assert figures.sparkline([0, 4, 1]) == "M0 26V26h40V0h40V13h40V26z"
    path, reach = figures.band([-1.0, -0.5], [0.5, 1.0])
    assert (path, reach) == ("M0 13V6.5h60V0h60V19.5h-60V26h-60z", 1.0)
    assert figures.band([0.0], [0.0])[1] == 1.0
    assert figures.band(-np.arange(1000), np.arange(1000))[0].count("h") == 2 * figures.MAX_POINTS


def test_figures_take_the_colours_of_the_page() -> None:
    for svg in (
        figures.accuracy([10.0, None, 30.0], [None, 20.0, 10.0]),
        figures.latency({"Conv": (2.0, 1.0)}),
        figures.scales([(0.001, 0.01, 0.1)]),
    ):
        assert svg.startswith("<svg viewBox=") and "var(--" in svg
        assert not re.search(r"#0[1-4]0[1-4]0[1-4]|#000000|<metadata|xlink|\$", svg)
        Page(svg)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(html_report.importlib.util, "find_spec", lambda name: None if name == "jinja2" else real(name))
    with pytest.raises(UserError, match=r"jinja2: pip install 'qcompiler\[report\]'"):
        recorder_for(tmp_path / "out.html", tmp_path / "net.onnx")


def test_the_commands(qcompile: Run, folder: Path) -> None:  # noqa: F811
    code, out, err = qcompile("report", "net.onnx", "--calib", "calib")
    assert (code, out, err) == (0, "net.report.html\n", "")
    assert not (folder / "net.int8.onnx").exists()
    code, out, err = qcompile("net.onnx", "--calib", "calib", "-q", "--report", "a/b.html")
    assert (code, out, err) == (0, "", "")
    assert (folder / "net.int8.onnx").exists()
    for path in ("net.report.html", "a/b.html"):
        text = (folder / path).read_text(encoding="utf-8")
        assert_alone(text)
        assert "not measured" not in text


def test_the_model_is_not_overwritten(qcompile: Run) -> None:  # noqa: F811
    code, _, err = qcompile("net.onnx", "--calib", "calib", "--report", "net.onnx")
    assert code == 2 and "overwrite" in err


def test_a_compilation_without_report_loads_none_of_it(folder: Path) -> None:  # noqa: F811
    code = (
        "import sys\nfrom qcompiler import cli\n"
        "try: cli.main(['net.onnx', '--calib', 'calib', '-q'])\nexcept SystemExit as e: assert not e.code\n"
        "print([m for m in ('qcompiler.html_report', 'qcompiler.compare', 'jinja2', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_rows_of_matrix_products_have_errors() -> None:
    text = "g (float[2,4,6] x) => (float[2,4,6] y) { n = Tanh(x) p = MatMul(n, w) s = Add(p, b) y = Tanh(s) }"
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((6, 6)), "b": rng.standard_normal(6)}
    model = model_from_text(text, {k: v.astype(np.float32) for k, v in arrays.items()})
    _, found, _ = page_of(model, [random_feeds(model, seed) for seed in range(4)])
    [gemm] = [row for row in found.layers if row.op == "Gemm"]
    assert gemm.error is not None
    assert gemm.error.op == "MatMul"


def test_no_error_is_shown_twice() -> None:
    text = "g (float[1,4,8,8] x) => (float[1,4,8,8] y) { a = Conv(x, w) b = HardSwish(a) y = Conv(b, w) }"
    model = model_from_text(text, {"w": np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype(np.float32)})
    for target in ("ort-cpu", "integer"):
        _, found, _ = page_of(model, [random_feeds(model, seed) for seed in range(4)], target=target)
        tensors = [row.error.tensor for row in found.layers if row.error is not None]
        assert len(tensors) == len(set(tensors)) > 1
        assert all(row.error is not None for row in found.layers if row.op.startswith("Conv"))

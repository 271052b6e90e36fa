"""The command: defaults, output, exit codes, messages."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompiler import __version__, cli
from qcompiler.commands import COMMANDS
from tests.support import ops_of, run
from tests.test_compile import net, samples
from tests.test_plugin import my_pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with net.onnx and calib/."""
    (tmp_path / "net.onnx").write_bytes(net().SerializeToString())
    (tmp_path / "calib").mkdir()
    for i, feeds in enumerate(samples(10)):
        np.save(tmp_path / "calib" / f"{i}.npy", feeds["x"])
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def qcompile(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command inside the folder, in this process; return exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    previous = signal.getsignal(signal.SIGTERM)
    yield call  # type: ignore[misc]
    signal.signal(signal.SIGTERM, previous)


def test_the_short_form(qcompile: Run, folder: Path) -> None:
    code, out, err = qcompile("net.onnx", "--calib", "calib")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "net.int8.onnx  kernels for ort-cpu"
    assert len(lines) <= 25
    assert {"quantized", "accuracy", "size", "speed"} <= {line.split()[0] for line in lines[1:]}
    model = onnx.load(folder / "net.int8.onnx")
    assert "QLinearConv" in ops_of(model)
    assert run(model, samples(1)[0])[0].shape == (1, 5)
    assert sorted(p.name for p in folder.iterdir()) == ["calib", "net.int8.onnx", "net.onnx"]


def test_the_default_output_is_beside_the_model(qcompile: Run, folder: Path) -> None:
    sub = folder / "a.b"
    sub.mkdir()
    (folder / "net.onnx").rename(sub / "my.net.onnx")
    assert qcompile("compile", sub / "my.net.onnx", "--calib", "calib", "-q") == (0, "", "")
    assert (sub / "my.net.int8.onnx").is_file()


def test_json(qcompile: Run) -> None:
    code, out, err = qcompile("net.onnx", "--calib", "calib", "--json", "-o", "deep/out.onnx", "--emit", "qdq")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["path"] == "deep/out.onnx"
    assert report["emit"] == "qdq"
    assert report["quantized"] >= 2
    assert report["held_back"] == 1
    assert {"name", "op", "quantized", "reason"} == set(report["layers"][0])


def test_time_and_verbose(qcompile: Run) -> None:
    code, out, _ = qcompile("net.onnx", "--calib", "calib", "--time", "-v", "--keep-float", "/gemm")
    assert code == 0
    assert "Gemm /gemm: kept in float as '/gemm' asks" in out
    assert any(line.split()[:1] == ["calibrate"] for line in out.splitlines())
    assert "kernels" in out


def test_dump(qcompile: Run, folder: Path) -> None:
    assert qcompile("net.onnx", "--passes", "normalize,cleanup", "--dump", "d", "-q")[0] == 0
    files = [f"{stem}.{kind}" for stem in ("01-normalize", "02-cleanup") for kind in ("json", "onnx", "txt")]
    assert sorted(p.name for p in (folder / "d").iterdir()) == files


def test_dump_changed_keeps_the_numbers(qcompile: Run, folder: Path) -> None:
    code, out, _ = qcompile("net.onnx", "--calib", "calib", "--dump", "d", "--dump-changed", "--json")
    passes = json.loads(out)["passes"]
    changed = [f"{i:02d}-{p['name']}" for i, p in enumerate(passes, 1) if p["rewrites"]]
    assert sorted(p.stem for p in (folder / "d").glob("*.onnx")) == changed
    assert 3 < len(changed) < len(passes)
    code, _, err = qcompile("net.onnx", "--calib", "calib", "--dump-changed")
    assert (code, err) == (2, "error: say where to write (--dump-changed needs --dump DIR)\n")


def test_images_with_preprocessing(qcompile: Run, folder: Path) -> None:
    from PIL import Image  # noqa: PLC0415

    (folder / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((10, 12, 3), 40 * i + 50, np.uint8)).save(folder / "photos" / f"{i}.png")
    options = ["--preset", "imagenet", "--resize", "9", "--crop", "8", "--mean", "0.5,0.4,0.3", "--std", "0.2", "--bgr"]
    code, out, err = qcompile("net.onnx", "--calib", "photos", *options, "--until", "normalize", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["samples"] == 2


def test_a_plug_in_file(qcompile: Run, folder: Path) -> None:
    my_pass(folder)
    code, out, _ = qcompile("net.onnx", "--load", "my pass.py", "--passes", "normalize,shout{volume=2}", "--json")
    assert code == 0
    assert json.loads(out)["pipeline"] == "normalize,shout{volume=2}"
    [line] = [line for line in qcompile("passes", "--load", "my pass.py")[1].splitlines() if line.startswith("shout ")]
    assert re.split("  +", line) == ["shout", "float", "volume=11", "my pass.py", "Does nothing, loudly"]


def test_lists(qcompile: Run) -> None:
    code, out, _ = qcompile("passes")
    assert code == 0
    assert "default:\n  normalize," in out
    assert "ort-cpu-avx2" in qcompile("targets")[1]


def test_one_pass_target_or_table(qcompile: Run) -> None:
    told = qcompile("passes", "fold-bias")[1]
    assert told.startswith("fold-bias: Fold Add, Sub, Mul, Div")
    assert " of " in told and ": after fold-pad, before fold-batchnorm" in told
    facts = json.loads(qcompile("passes", "calibrate", "--json")[1])
    assert (facts["requires"], facts["establishes"], facts["options"]["collector"]) == (
        "annotated",
        "calibrated",
        "omse",
    )
    assert facts["package"] == f"qcompiler {__version__}"
    assert Path(facts["file"]).name == "calibrate.py"
    target = json.loads(qcompile("targets", "ort-cpu-avx2", "--json")[1])
    assert target["weight"] == "int8 -64..63 symmetric per channel"
    assert target["float"]["LSTM"] == "LSTM has no integer kernel on ort-cpu-avx2"
    assert re.search(r"Softmax +its uint8 kernel is slower", qcompile("targets", "ort-cpu")[1])
    table = qcompile("ops", "--target", "integer")[1]
    assert re.search(
        r"Conv +activation weight bias +own +multiply-accumulate +qcompiler .* integer, if the node", table
    )
    assert re.search(r"Relu .* integer between integer neighbours\n", table)


@pytest.mark.parametrize(
    "arguments",
    [
        ["passes", "fold-bais"],
        ["targets", "ort-cpv"],
        ["ops", "--target", "ort-cpv"],
        ["net.onnx", "--why", "fold-bais"],
    ],
)
def test_misspelt_names(qcompile: Run, arguments: list[str]) -> None:
    code, out, err = qcompile(*arguments)
    assert (code, out) == (2, "")
    assert "did you mean '" in err


def test_why_and_trace(qcompile: Run, folder: Path) -> None:
    options = ["--until", "annotate", "--why", "annotate", "--keep-float", "/relu", "--trace", "t.json"]
    code, out, _ = qcompile("net.onnx", "--calib", "calib", *options, "-q")
    assert code == 0
    assert out.splitlines()[0].startswith("annotate: left ")
    assert "  /conv  Conv: kept in float as '/relu' asks" in out.splitlines()
    [why] = json.loads(qcompile("net.onnx", "--calib", "calib", *options, "--json")[1])["why"]
    assert {"node", "op", "output", "reason", "culprit"} == set(why["refused"][0])
    events = json.loads((folder / "t.json").read_text())["traceEvents"]
    assert [events[0]["name"], events[-1]["name"]] == ["normalize", "annotate"]


def test_help_and_version(qcompile: Run) -> None:
    for arguments in (["--help"], ["compile", "--help"]):
        code, out, _ = qcompile(*arguments)
        assert code == 0
        assert "qcompile model.onnx --calib" in out
    assert qcompile("--version") == (0, f"qcompile, version {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--frobnicate"],
        ["net.onnx", "--frobnicate"],
        ["net.onnx", "other.onnx"],
        ["net.onnx", "--emit", "int4"],
        ["net.onnx", "--samples", "0"],
        ["net.onnx", "--mean", "a,b"],
        ["net.onnx", "--crop", "1x2x3"],
        ["net.onnx", "--time-limit", "nan"],
    ],
)
def test_usage_errors(qcompile: Run, arguments: list[str]) -> None:
    code, out, err = qcompile(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage: qcompile" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx", "--calib", "calib"], "error: no such model file (none.onnx)"),
        (["net.onnx"], "error: calibration data is missing; give some samples of what the model is fed (--calib)"),
        (["net.onnx", "--calib", "none"], "error: there is no such file or folder (none)"),
        (
            ["net.onnx", "--calib", "calib", "-o", "net.onnx"],
            "error: the output would overwrite the input model (net.onnx)",
        ),
        (
            ["net.onnx", "--calib", "calib", "-o", "calib/0.npy"],
            "error: the output would overwrite calibration data (calib/0.npy)",
        ),
        (
            ["net.onnx", "--calib", "calib", "--trace", "net.onnx"],
            "error: the output would overwrite the input model (net.onnx)",
        ),
        (
            ["net.onnx", "--calib", "calib", "--trace", "net.int8.onnx"],
            "error: two results would be written to one file (net.int8.onnx)",
        ),
        (["net.onnx", "--calib", "calib", "--min-sqnr", "inf"], "error: inf is no goal; give a number (--min-sqnr)"),
        (["net.onnx", "--calib", "calib", "-o", "calib"], "error: the output is a folder; give a file name (calib)"),
        (["net.onnx", "--calib", "calib", "--preset", "x"], "error: no preset is called 'x'; known: "),
        (["net.onnx", "--calib", "calib", "--until", "x"], "error: no pass or phase 'x' in the pipeline; passes: "),
    ],
)
def test_user_errors_are_one_line(qcompile: Run, folder: Path, arguments: list[str], message: str) -> None:
    before = (folder / "net.onnx").read_bytes()
    code, out, err = qcompile(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert (folder / "net.onnx").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["calib", "net.onnx"]


BROKEN = """
from dataclasses import dataclass
from typing import ClassVar
from qcompiler.plugin import Plugin
from qcompiler.state import Phase

@dataclass(frozen=True)
class Broken:
    name: ClassVar[str] = "broken"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = None

    def run(self, state):
        {body}

PLUGIN = Plugin("broken", passes=(Broken,))
"""


def broken(folder: Path, body: str) -> list[object]:
    (folder / "broken.py").write_text(BROKEN.format(body=body))
    return ["net.onnx", "--load", "broken.py", "--passes", "broken"]


def test_internal_errors_name_the_pass(qcompile: Run, folder: Path) -> None:
    code, out, err = qcompile(*broken(folder, "return 1 // 0"))
    assert (code, out) == (70, "")
    assert err == (
        f"internal error: pass broken of {folder / 'broken.py'}: ZeroDivisionError: integer division or modulo by zero "
        "(to see it again: qcompile resume qcompiler-repro-01/before-broken.onnx "
        f"--load {folder / 'broken.py'} --until broken --debug)\n"
    )
    assert not (folder / "net.int8.onnx").exists()


@pytest.mark.parametrize("body", ["return 1 // 0", "state.graph.nodes.reverse()"])
def test_a_crash_writes_what_reproduces_it(qcompile: Run, folder: Path, body: str) -> None:
    arguments = [*broken(folder, body), "--passes", "normalize,form-blocks,broken,cleanup"]
    _, _, err = qcompile(*arguments)
    rerun = err.partition("to see it again: ")[2].strip().removesuffix(")")
    written = sorted(p.name for p in (folder / "qcompiler-repro-01").iterdir())
    assert written == ["before-broken.json", "before-broken.onnx", "before-broken.txt", "crash.txt"]
    crash = (folder / "qcompiler-repro-01" / "crash.txt").read_text()
    assert (
        f"to rerun:  {rerun}\n" in crash and f"qcompiler {__version__}, Python 3." in crash and "onnxruntime" in crash
    )
    assert "Traceback (most recent call last)" in crash
    code, out, second = qcompile(*shlex.split(rerun)[1:])
    assert (code, out) == (70, "")
    cause = err.partition(" (to see")[0]
    assert "Traceback" in second and second.splitlines()[-1].startswith(cause)
    assert qcompile(*arguments, "--repro", "mine")[0] == 70
    assert (folder / "mine" / "crash.txt").exists() and not (folder / "qcompiler-repro-02").exists()
    assert qcompile(*arguments)[0] == 70
    assert (folder / "qcompiler-repro-02" / "crash.txt").exists()


INVALID = """for node in state.graph.nodes:
            if node.op == "Relu" and node.name.startswith("/"):
                node.attrs["no_such_attribute"] = 1
        return 0"""


def test_a_result_that_is_no_model_writes_what_reproduces_it(qcompile: Run, folder: Path) -> None:
    arguments = [*broken(folder, INVALID), "--passes", "normalize,broken,form-blocks,cleanup"]
    code, _, err = qcompile(*arguments)
    assert (code, "the compiled model is not valid: " in err) == (70, True)
    written = {p.name for p in (folder / "qcompiler-repro-01").iterdir()}
    assert written == {"before-broken.json", "before-broken.onnx", "before-broken.txt", "crash.txt"}
    rerun = err.partition("to see it again: ")[2].strip().removesuffix(")")
    code, _, second = qcompile(*shlex.split(rerun)[1:])
    assert code == 70
    assert second.splitlines()[-1].startswith(err.partition(" (to see")[0])


def test_no_reproducer_of_the_users_errors(qcompile: Run, folder: Path) -> None:
    code, _, err = qcompile(*broken(folder, "from qcompiler import UserError; raise UserError('no good')"))
    assert (code, err) == (2, "error: no good\n")
    assert not (folder / "qcompiler-repro-01").exists()


@pytest.mark.parametrize(
    ("command", "more"),
    [("compile", []), ("compile", ["--min-sqnr", "20"]), ("sensitivity", []), ("explain", ["/conv"])],
)
def test_a_model_that_does_not_run_is_the_users_error(
    qcompile: Run, folder: Path, command: str, more: list[str]
) -> None:
    model = net()
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones(16, np.float32), "w"))
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("kernel_shape", [3, 3]))
    onnx.save(model, folder / "wrong.onnx")
    code, _, err = qcompile(command, "wrong.onnx", *more, "--calib", "calib")
    assert code == 2
    assert "X num_dims does not match W num_dims" in err
    assert not list(folder.glob("qcompiler-repro*"))


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_crash(qcompile: Run, folder: Path) -> None:
    code, _, err = qcompile(*broken(folder, "return 1 // 0"), "--repro", folder / "net.onnx" / "x")
    assert code == 70
    assert "ZeroDivisionError" in err and "(no reproducer: cannot write the dump: Not a directory" in err


def test_no_verify_skips_the_checks_between_passes(qcompile: Run, folder: Path) -> None:
    arguments = broken(folder, "state.graph.nodes.reverse()")
    assert f"pass broken of {folder / 'broken.py'}: VerifyError" in qcompile(*arguments)[2]
    code, _, err = qcompile(*arguments, "--no-verify")
    assert (code, "VerifyError" in err) == (70, False)
    assert "the compiled model is not valid" in err


def test_debug_shows_the_traceback(folder: Path) -> None:
    arguments = [sys.executable, "-m", "qcompiler", *map(str, broken(folder, "return 1 // 0")), "--debug"]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 70
    assert "Traceback (most recent call last)" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c(folder: Path) -> None:
    arguments = [sys.executable, "-m", "qcompiler", *map(str, broken(folder, "raise KeyboardInterrupt"))]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "interrupted")
    assert not (folder / "net.int8.onnx").exists()


@pytest.mark.parametrize("debug", [False, True])
def test_warnings_of_libraries_are_for_debugging(folder: Path, debug: bool) -> None:
    body = "import warnings; warnings.warn('overflow'); return 0"
    arguments = [sys.executable, "-m", "qcompiler", *map(str, broken(folder, body)), *["--debug"][:debug]]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, "overflow" in done.stderr) == (0, debug)


def test_a_reader_that_goes_away_does_no_harm(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    arguments = [sys.executable, "-m", "qcompiler", "net.onnx", "--passes", "normalize"]
    done = subprocess.run(arguments, cwd=folder, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "net.int8.onnx").is_file()


def test_every_command_can_show_tracebacks(qcompile: Run) -> None:
    for name in COMMANDS:
        assert "--debug" in qcompile(name, "--help")[1], name
    for arguments in (("diff", "none.onnx", "none.onnx"), ("passes", "none")):
        code, _, err = qcompile(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        code, _, err = qcompile(*arguments, "--debug")
        assert (code, err.count("Traceback")) == (2, 1)

"""Goals: the layers that stay float to reach them, the reasons, and goals out of reach."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompiler import UserError, compile_model
from qcompiler.cli import main
from qcompiler.compile import CompileResult
from qcompiler.evaluate import Predictor
from qcompiler.mixed import choose
from qcompiler.sensitivity import Layer, Rounding, Sensitivity
from tests.test_sensitivity import net, samples

HARMFUL = net(outlier=300)


def compiled(model: onnx.ModelProto = HARMFUL, **options: object) -> CompileResult:
    return compile_model(model, samples(), optimize="size", **options)  # type: ignore[arg-type]


def worst(result: CompileResult) -> float:
    return min(o.sqnr for o in result.report.outputs if o.sqnr is not None)


def in_float(result: CompileResult) -> dict[str, str]:
    return {layer.name: layer.reason for layer in result.report.layers if not layer.quantized}


def test_a_goal_that_is_reached_anyway_keeps_nothing() -> None:
    result = compiled(min_sqnr=10)
    assert not in_float(result)
    assert result.report.reached is not None
    assert (result.report.reached.kept, result.report.reached.trials) == ((), 1)
    assert result.model.graph == compiled().model.graph


def test_the_harmful_layers_stay_float() -> None:
    without = worst(compiled())
    goal = without + 4
    result = compiled(min_sqnr=goal)
    assert worst(result) >= goal
    reached = result.report.reached
    assert reached is not None
    assert 0 < len(reached.kept) <= reached.layers == 6
    assert {in_float(result)[name] for name in reached.kept} == {f"kept in float to reach {goal:g} dB"}
    assert reached.without.sqnr == pytest.approx(without, abs=0.01)
    assert reached.figures.sqnr == pytest.approx(worst(result), abs=0.01)


def test_more_is_asked_more_is_kept() -> None:
    without = worst(compiled())
    kept = [compiled(min_sqnr=without + more).report.reached for more in (1, 4)]
    assert kept[0] is not None
    assert kept[1] is not None
    assert len(kept[0].kept) < len(kept[1].kept)


def test_it_is_deterministic() -> None:
    goal = worst(compiled()) + 3
    assert compiled(min_sqnr=goal).model == compiled(min_sqnr=goal).model


def test_a_goal_out_of_reach_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no choice of layers in float does that; .* dB \(--min-sqnr 200\)"):
        compiled(min_sqnr=200)


def test_what_the_user_keeps_stays_and_says_so() -> None:
    result = compiled(min_sqnr=worst(compiled()) + 4, keep_float=["/c"])
    assert in_float(result)["/c"] == "kept in float as '/c' asks"


def nearness(predict: Predictor) -> float:
    """How near the outputs are to those of the float model, from 0 to 1."""
    x = samples(1)[0]["x"]
    gap = np.abs(predict(x)[1] - WANTED).mean() / np.abs(WANTED).mean()
    return float(1 - gap)


WANTED: np.ndarray


def test_a_metric_may_lose_only_so_much() -> None:
    global WANTED  # noqa: PLW0603
    import onnxruntime  # noqa: PLC0415

    WANTED = onnxruntime.InferenceSession(HARMFUL.SerializeToString()).run(None, samples(1)[0])[1]
    free = compiled(eval=nearness).report.score
    assert free is not None
    lost = 100 * (1 - free.after)
    assert lost > 0
    result = compiled(eval=nearness, max_drop=lost / 2)
    assert result.report.score is not None
    assert 100 * (1 - result.report.score.after) <= lost / 2
    assert in_float(result)
    assert {r for r in in_float(result).values() if "kept" in r} == {f"kept in float to lose at most {lost / 2:g} %"}


def test_a_drop_needs_a_judge() -> None:
    with pytest.raises(UserError, match="it needs --eval"):
        compiled(max_drop=1)


def made_up() -> Sensitivity:
    """Two outputs; `dear` and `cheap` make the same noise at one of them, `other` at the other; `pair` is one rounding of two."""
    layers = {
        name: Layer(name, "Conv", cost) for name, cost in (("dear", 0.8), ("cheap", 0.1), ("other", 0.1), ("idle", 0))
    }
    roundings = [
        Rounding("dear", True, ("dear",), np.array([1e-2, 0])),
        Rounding("cheap", True, ("cheap",), np.array([1e-2, 0])),
        Rounding("other", False, ("other", "idle"), np.array([0, 1e-1])),
        Rounding("idle", True, ("idle",), np.array([1e-9, 1e-9])),
    ]
    return Sensitivity(("a", "b"), layers, roundings)


@pytest.mark.parametrize(
    ("sqnr", "kept"),
    [
        (5, set()),
        (16, {"other", "idle"}),  # what two layers round stays until both are float
        (19, {"cheap", "other", "idle"}),
        (30, {"cheap", "dear", "other", "idle"}),
    ],
)
def test_the_cheapest_choice_for_a_predicted_figure(sqnr: float, kept: set[str]) -> None:
    assert choose(made_up(), sqnr) == kept


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(HARMFUL, "net.onnx")
    np.savez("calib.npz", x=np.concatenate([s["x"] for s in samples()]))
    Path("my.py").write_text("def size(predict):\n    return len(predict.session.get_outputs())\n")
    arguments = ["net.onnx", "--calib", "calib.npz", "--optimize", "size", "--min-sqnr", str(worst(compiled()) + 4)]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--eval", "my.py:size", "--json"])
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reached"]["kept"]
    assert (told["score"]["name"], told["score"]["before"], told["score"]["after"]) == ("size", 2, 2)
    with pytest.raises(SystemExit):
        main(arguments)
    out = capsys.readouterr().out
    assert " kept in float to reach " in out
    assert "  goal       reach " in out
    with pytest.raises(SystemExit) as done:
        main([*arguments[:-1], "200"])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: no choice of layers in float does that")

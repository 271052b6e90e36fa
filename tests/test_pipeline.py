"""Pipelines: text form, order, phases, errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.errors import UserError
from qcompiler.instrument import Watcher
from qcompiler.pipeline import Pass, PassError, Pipeline, closest, format_pass, parse_pipeline
from qcompiler.state import CompileState, Phase
from tests.support import model_from_text, state_of


@dataclass(frozen=True)
class Plain:
    """Does nothing."""

    name: ClassVar[str] = "plain"
    requires: ClassVar[Phase] = Phase.FLOAT
    establishes: ClassVar[Phase | None] = Phase.FUSED

    def run(self, state: CompileState) -> int:
        return 3


@dataclass(frozen=True)
class Optioned:
    """Has an option of every kind."""

    name: ClassVar[str] = "opt-2.x"
    requires: ClassVar[Phase] = Phase.FUSED
    establishes: ClassVar[Phase | None] = None

    flag: bool = True
    count: int = 4
    ratio: float = 0.5
    word: str = "omse"

    def run(self, state: CompileState) -> int:
        if self.word == "fail":
            raise ZeroDivisionError("by design")
        if self.word == "refuse":
            raise UserError("bad data", "x.npy")
        return self.count


PASSES: dict[str, type[Pass]] = {"plain": Plain, "opt-2.x": Optioned}

stages = st.one_of(
    st.just(Plain()),
    st.builds(
        Optioned,
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text("abcXYZ019-_./*", min_size=1),
    ),
)


@given(st.lists(stages, max_size=5))
def test_text_round_trip(passes: list[Pass]) -> None:
    pipeline = Pipeline(tuple(passes))
    assert parse_pipeline(str(pipeline), PASSES) == pipeline


def test_text_form() -> None:
    assert format_pass(Optioned()) == "opt-2.x"
    assert format_pass(Optioned(flag=False, ratio=0.25)) == "opt-2.x{flag=false ratio=0.25}"
    assert parse_pipeline(" plain ,\n opt-2.x{ count=7 , flag=False },", PASSES) == Pipeline(
        (Plain(), Optioned(flag=False, count=7))
    )
    assert parse_pipeline("", PASSES) == Pipeline(())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plane", "no pass is called 'plane'; did you mean 'plain'? (--passes)"),
        ("zzz", "no pass is called 'zzz'; known: opt-2.x, plain (--passes)"),
        ("plain plain", "expected ',' before 'plain' (--passes)"),
        ("plain,,plain", "cannot read ',plain' in the pipeline text (--passes)"),
        ("plain{x=1}", "plain has no option 'x=1'; options: none (--passes)"),
        ("opt-2.x{size=1}", "opt-2.x has no option 'size=1'; options: flag, count, ratio, word (--passes)"),
        ("opt-2.x{count}", "opt-2.x has no option 'count'; options: flag, count, ratio, word (--passes)"),
        ("opt-2.x{count=a}", "opt-2.x: count=a is not a int (--passes)"),
        ("opt-2.x{flag=1}", "opt-2.x: flag=1 is not a bool (--passes)"),
        ("opt-2.x{count=1", "expected ',' before '{count=1' (--passes)"),
        ("Plain", "cannot read 'Plain' in the pipeline text (--passes)"),
    ],
)
def test_text_errors(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_pipeline(text, PASSES)
    assert str(caught.value) == message


def test_closest() -> None:
    assert closest("ort-cpi", ["ort-cpu", "integer"]) == "; did you mean 'ort-cpu'?"
    assert closest("?", ["b", "a"]) == "; known: a, b"


def state() -> CompileState:
    return state_of(model_from_text("g (float[2] x) => (float[2] y) { y = Relu(x) }"))


@dataclass
class Log(Watcher):
    events: list[str] = field(default_factory=list)

    def before(self, stage: Pass, state: CompileState) -> None:
        self.events.append(f"before {stage.name} {state.phase.name}")

    def after(self, stage: Pass, state: CompileState, count: int) -> None:
        self.events.append(f"after {stage.name} {state.phase.name} {count}")

    def failed(self, stage: Pass, state: CompileState, error: Exception) -> None:
        self.events.append(f"failed {stage.name} {type(error).__name__}")


def test_run_calls_instruments_and_sets_the_phase() -> None:
    log = Log()
    Pipeline((Plain(), Optioned())).run(state(), [log])
    assert log.events == ["before plain FLOAT", "after plain FUSED 3", "before opt-2.x FUSED", "after opt-2.x FUSED 4"]


def test_a_phase_never_goes_back() -> None:
    late = state()
    late.phase = Phase.QDQ
    Pipeline((Plain(),)).run(late)
    assert late.phase is Phase.QDQ


def test_a_pass_that_comes_too_early_is_refused() -> None:
    with pytest.raises(UserError, match=r"pass opt-2\.x needs phase fused, but the model is in phase float"):
        Pipeline((Optioned(),)).run(state())


def test_a_broken_pass_is_named() -> None:
    log = Log()
    with pytest.raises(PassError, match=r"^pass opt-2.x of tests: ZeroDivisionError: by design$") as caught:
        Pipeline((Plain(), Optioned(word="fail"))).run(state(), [log])
    assert caught.value.stage == Optioned(word="fail")
    assert log.events[-1] == "failed opt-2.x ZeroDivisionError"


def test_user_errors_pass_through() -> None:
    with pytest.raises(UserError, match=r"^bad data \(x.npy\)$"):
        Pipeline((Plain(), Optioned(word="refuse"))).run(state())


def test_until() -> None:
    pipeline = Pipeline((Plain(), Optioned(), Plain(), Optioned(count=1)))
    assert pipeline.until("opt-2.x").passes == pipeline.passes[:2]
    assert pipeline.until("FUSED").passes == pipeline.passes[:3]
    with pytest.raises(UserError, match="no pass or phase 'qdq' in the pipeline"):
        pipeline.until("qdq")

"""Work on several threads gives what one gives."""

import threading

import pytest

from qcompiler import threads
from qcompiler.threads import each


@pytest.fixture(params=[1, 2, 3])
def workers(request, monkeypatch):
    monkeypatch.setattr(threads, "WORKERS", request.param)
    return request.param


@pytest.mark.usefixtures("workers")
def test_results_have_the_order_of_the_items():
    assert each(lambda x: x * x, range(100)) == [x * x for x in range(100)]
    assert each(str, iter("abc")) == ["a", "b", "c"]
    assert each(str, []) == []


def test_two_threads_work_at_the_same_time(monkeypatch):
    monkeypatch.setattr(threads, "WORKERS", 2)
    meeting = threading.Barrier(2, timeout=30)
    names = each(lambda _: (meeting.wait(), threading.current_thread().name)[1], range(2))
    assert len(set(names)) == 2


@pytest.mark.usefixtures("workers")
def test_the_error_of_the_first_item_is_raised_and_no_more_items_are_begun():
    begun = []

    def fail(x):
        begun.append(x)
        if x >= 3:
            raise ValueError(x)

    with pytest.raises(ValueError, match=r"^3$"):
        each(fail, range(1000))
    assert len(begun) < 10


@pytest.mark.usefixtures("workers")
def test_work_may_hand_out_work():
    assert each(lambda x: sum(each(lambda y: x * y, range(10))), range(20)) == [45 * x for x in range(20)]


@pytest.mark.usefixtures("workers")
def test_an_error_of_the_items_comes_behind_those_before():
    def items():
        yield from (1, 2)
        raise KeyError("items")

    with pytest.raises(KeyError, match="items"):
        each(str, items())
    with pytest.raises(ZeroDivisionError):
        each(lambda x: 1 / (x - 1), items())

"""Work on several threads: NumPy and ONNX Runtime let others run while they compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

WORKERS = min(2, os.cpu_count() or 1)
"""Threads that work side by side; each needs memory of its own."""

T = TypeVar("T")
R = TypeVar("R")


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What the function makes of each item, in their order, on this thread and others that wait for work.

    After an exception no more items are begun; of several exceptions that of the first item is raised.
    """
    todo = list(enumerate(items))
    made: dict[int, R] = {}
    errors: dict[int, BaseException] = {}
    rest = iter(todo)

    def work() -> None:
        for i, item in rest:
            if errors:
                return
            try:
                made[i] = function(item)
            except BaseException as error:  # for the caller, who may be another thread
                errors[i] = error

    others = [_pool().submit(work) for _ in range(min(WORKERS, len(todo)) - 1)]
    work()
    for other in others:
        if not other.cancel():  # it may wait for the thread that this one is
            other.result()
    if errors:
        raise errors[min(errors)]
    return [made[i] for i in range(len(todo))]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS)

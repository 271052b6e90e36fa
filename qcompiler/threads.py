"""Work on several threads: NumPy and ONNX Runtime let others run while they compute."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from operator import length_hint
from threading import Lock
from typing import TypeVar

WORKERS = min(2, os.cpu_count() or 1)
"""Threads that work side by side; each needs memory of its own."""

T = TypeVar("T")
R = TypeVar("R")


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What the function makes of each item, in their order, on this thread and others that wait for work.

    Items are taken one at a time, as they are needed; none is after an exception. Of several exceptions that of the first item
    is raised.
    """
    rest, lock = enumerate(items), Lock()
    made: dict[int, R] = {}
    errors: dict[float, BaseException] = {}

    def take() -> tuple[int, T] | None:
        with lock:
            return next(rest, None)

    def work() -> None:
        position: float = math.inf  # an exception of the items themselves comes behind all that were taken
        try:
            while not errors and (taken := take()) is not None:
                position = taken[0]
                made[taken[0]] = function(taken[1])
                position = math.inf
        except BaseException as error:  # for the caller, who may be another thread
            errors[position] = error

    others = [_pool().submit(work) for _ in range(min(WORKERS, length_hint(items, WORKERS)) - 1)]
    work()
    for other in others:
        if not other.cancel():  # it may wait for the thread that this one is
            other.result()
    if errors:
        raise errors[min(errors)]
    return [made[i] for i in range(len(made))]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS)

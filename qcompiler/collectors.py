"""Collectors: how the range of one tensor is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

from qcompiler.quant import F32, QuantParams, QuantSpec


class Collector(Protocol):
    """Statistics of one tensor. `merge` is associative, commutative and exact, so order and sharding cannot matter.

    `needs_values`: whether `observe` wants values besides the exact bounds.
    """

    needs_values: ClassVar[bool]

    def observe(self, low: float, high: float, values: F32) -> None:
        """Take in one tensor: its exact least and greatest value, and a sample of its values (1-D)."""

    def merge(self, other: Self) -> None:
        """Take in all that another collector of the same tensor has seen."""

    def finish(self, spec: QuantSpec) -> QuantParams:
        """Choose the params. Raises ValueError if nothing was observed or a value was not finite."""


COLLECTORS: Mapping[str, type[Any]] = {}

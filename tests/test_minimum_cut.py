"""Cuts against all possible ones."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from qcompiler_passes.minimum_cut import Edge, source_side

INNER = range(5)


def networks(count: int) -> Iterator[list[Edge]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        nodes = [*INNER, "s", "t"]
        ends = [rng.choice(len(nodes), 2, replace=False) for _ in range(rng.integers(4, 16))]
        yield [(nodes[a], nodes[b], int(rng.integers(0, 6)) if rng.random() < 0.8 else None) for a, b in ends]


def cost(edges: list[Edge], side: set[object]) -> float:
    crossing = [capacity for a, b, capacity in edges if a in side and b not in side]
    return sum(float("inf") if capacity is None else capacity for capacity in crossing)


def test_no_cut_is_cheaper_and_none_as_cheap_has_more_nodes() -> None:
    bounded = 0
    for edges in networks(300):
        known = {node for edge in edges for node in edge[:2]}
        sides = [{"s", *chosen} for size in range(len(INNER) + 1) for chosen in combinations(INNER, size)]
        least = min(cost(edges, side) for side in sides)
        if least == float("inf"):
            with pytest.raises(ValueError, match="cannot be cut"):
                source_side(edges, "s", "t")
            continue
        bounded += 1
        cheapest = [side & (known | {"s"}) for side in sides if cost(edges, side) == least]
        assert source_side(edges, "s", "t") == max(cheapest, key=len)
    assert bounded > 100


def test_edges_add_up() -> None:
    edges: list[Edge] = [("s", "a", 2), ("s", "a", 2), ("a", "t", 3)]
    assert source_side(edges, "s", "t") == {"s", "a"}


def test_a_long_chain_needs_no_recursion() -> None:
    chain: list[Edge] = [(i, i + 1, 10 + i) for i in range(5000)]
    assert source_side(chain, 0, 5000) == {0}

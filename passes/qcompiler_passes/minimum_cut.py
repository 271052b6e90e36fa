"""Minimum cuts of flow networks, by blocking flows (Dinic 1970, "Algorithm for solution of a problem of maximum flow")."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from itertools import pairwise

Edge = tuple[Hashable, Hashable, int | None]
_Residual = dict[Hashable, dict[Hashable, int]]


def source_side(edges: Iterable[Edge], source: Hashable, sink: Hashable) -> frozenset[Hashable]:
    """The nodes on the side of the source of a minimum cut; of several such cuts, the one with most nodes on that side.

    edges: (from, to, capacity), not negative; None: never cut. Edges between the same nodes add up. Raises ValueError if edges
    that are never cut lead from the source to the sink.
    """
    listed = list(edges)
    bound = 1 + sum(capacity for _, _, capacity in listed if capacity is not None)
    residual: _Residual = {source: {}, sink: {}}
    for a, b, capacity in listed:
        ahead, back = residual.setdefault(a, {}), residual.setdefault(b, {})
        ahead[b] = ahead.get(b, 0) + (bound if capacity is None else capacity)
        back.setdefault(a, 0)
    flow = 0
    while source in (levels := _levels(residual, sink)):
        flow += _blocking_flow(residual, levels, source, sink)
        if flow >= bound:
            raise ValueError("the source cannot be cut from the sink")
    return frozenset(residual) - levels.keys()


def _levels(residual: _Residual, sink: Hashable) -> dict[Hashable, int]:
    """How many edges that are not full lead from a node to the sink, for the nodes from which it can be reached."""
    levels, reached = {sink: 0}, [sink]
    for node in reached:
        for before in residual[node]:
            if before not in levels and residual[before][node]:
                levels[before] = levels[node] + 1
                reached.append(before)
    return levels


def _blocking_flow(residual: _Residual, levels: Mapping[Hashable, int], source: Hashable, sink: Hashable) -> int:
    """Fill shortest paths until each has a full edge; return by how much the flow grew."""
    untried = {node: list(residual[node]) for node in levels}
    path, total = [source], 0
    while path:
        node = path[-1]
        if node == sink:
            steps = list(pairwise(path))
            room = min(residual[a][b] for a, b in steps)
            for a, b in steps:
                residual[a][b] -= room
                residual[b][a] += room
            total += room
            kept = next(i for i, (a, b) in enumerate(steps) if not residual[a][b])
            for a, b in steps:
                if residual[a][b]:
                    untried[a].append(b)
            path = path[: kept + 1]
            continue
        while untried[node]:
            after = untried[node].pop()
            if residual[node][after] and levels.get(after) == levels[node] - 1:
                path.append(after)
                break
        else:
            path.pop()
    return total

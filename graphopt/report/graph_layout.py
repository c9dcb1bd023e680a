"""Rows of a graph's boxes, module by module, so that folding moves nothing but sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from graphopt.report.graph_view import GraphView

__all__ = ["rows_of"]

_LONGEST = 40  # rows that an edge is led around boxes; longer ones are drawn straight
_SWEEPS = 4


def rows_of(view: GraphView) -> dict[int, list[list[int]]]:
    """Rows of each module from top to bottom.

    An entry is the place of a node, or `len(view.nodes)` plus that of a module, or `-1 - entry` where a
    line from `entry` to a later row passes by. A module is one entry of the module around it, whatever is in
    it, so that rows hold for all states of folding.
    """
    count = len(view.nodes)
    first: dict[int, int] = {}
    members: dict[int, dict[int, None]] = defaultdict(dict)
    ways: list[list[int]] = []
    for place, node in enumerate(view.nodes):
        way, group = [place], node.group
        while group > 0:
            way.append(count + group)
            group = view.groups[group][2]
        ways.append(way[::-1])
        inside = 0
        for entry in way[::-1]:
            first.setdefault(entry, place)
            members[inside][entry] = None
            inside = entry - count
    edges: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for giver, reader in view.edges:
        one, other = ways[giver], ways[reader]
        depth = next(
            d for d, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]
        )
        inside = 0 if depth == 0 else one[depth - 1] - count
        # a module that is called again may be read before; such lines do not count for rows
        if first[one[depth]] < first[other[depth]]:
            edges[inside].add((one[depth], other[depth]))
    return {
        group: _rows(sorted(own, key=first.__getitem__), sorted(edges[group]))
        for group, own in members.items()
    }


def _rows(entries: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[list[int]]:
    readers: dict[int, list[int]] = defaultdict(list)
    givers: dict[int, list[int]] = defaultdict(list)
    for giver, reader in edges:
        readers[giver].append(reader)
        givers[reader].append(giver)
    row: dict[int, int] = {}
    for entry in entries:
        row[entry] = max((row[giver] + 1 for giver in givers[entry]), default=0)
    for entry in reversed(entries):
        if not givers[entry] and readers[entry]:
            # what comes from outside stands right above its first reader
            row[entry] = max(0, min(row[reader] for reader in readers[entry]) - 1)
    rows: list[list[int]] = [[] for _ in range(max(row.values(), default=-1) + 1)]
    for entry in entries:
        rows[row[entry]].append(entry)
        last = max((row[reader] for reader in readers[entry]), default=0)
        if 1 < last - row[entry] <= _LONGEST:
            for between in range(row[entry] + 1, last):
                rows[between].append(-1 - entry)
    return _ordered(rows, givers, readers)


def _ordered(
    rows: list[list[int]], givers: Mapping[int, list[int]], readers: Mapping[int, list[int]]
) -> list[list[int]]:
    """Few crossings: each row by the mean place of what it is joined with, up and down in turn."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        order = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
        for number in order:
            beside = {
                entry: place for place, entry in enumerate(rows[number - 1 if down else number + 1])
            }
            joined = givers if down else readers
            means = {}
            for place, entry in enumerate(rows[number]):
                source = -1 - entry if entry < 0 else entry
                near = [source] if entry < 0 and down else joined[source]
                spots = [beside[x] for x in (*near, *(-1 - x for x in near), entry) if x in beside]
                means[entry] = sum(spots) / len(spots) if spots else float(place)
            rows[number].sort(key=means.__getitem__)
    return rows

"""Reads drawings of state machines in docstrings: which state follows which.

Understands names in capitals, wires of ``-``, ``|`` and ``+``, heads ``<``, ``>``, ``^`` and ``v``, labels in
small letters within or beside a wire. A wire connects everything that it touches without a head to everything
that it touches with one.
"""

from __future__ import annotations

import itertools
import re

Place = tuple[int, int]

_NAME = re.compile(r"[A-Z][A-Z_]{2,}")
_HORIZONTAL = {(0, -1), (0, 1)}
_VERTICAL = {(-1, 0), (1, 0)}
_EXITS = {
    **dict.fromkeys("-<>", _HORIZONTAL),
    **dict.fromkeys("|^v", _VERTICAL),
    "+": _HORIZONTAL | _VERTICAL,
}
_HEADS = {"<": (0, -1), ">": (0, 1), "^": (-1, 0), "v": (1, 0)}


def edges_of(drawing: str) -> set[tuple[str, str]]:
    """(from, to) for everything drawn; ``<->`` is both."""
    names: dict[Place, str] = {}
    wires: dict[Place, str] = {}
    for row, line in enumerate(drawing.splitlines()):
        line = re.sub(r"(?<=-) [a-z ]+ (?=-)", lambda label: "-" * len(label[0]), line)
        line = re.sub(r"[a-z]{2,}", lambda label: " " * len(label[0]), line)
        for match in _NAME.finditer(line):
            # One blank on each side belongs to the name.
            names |= {(row, column): match[0] for column in range(match.start() - 1, match.end() + 1)}
        wires |= {(row, column): mark for column, mark in enumerate(line) if mark in _EXITS}
    edges: set[tuple[str, str]] = set()
    while wires:
        edges |= _take_wire(wires, names)
    return edges


def _take_wire(wires: dict[Place, str], names: dict[Place, str]) -> set[tuple[str, str]]:
    """Remove one connected wire; the edges it stands for."""
    place = next(iter(wires))
    reached, todo = {place: wires.pop(place)}, [place]
    ends: list[tuple[str, bool]] = []
    while todo:
        row, column = todo.pop()
        mark = reached[row, column]
        for step in _EXITS[mark]:
            beside = (row + step[0], column + step[1])
            if beside in names:
                ends.append((names[beside], _HEADS.get(mark) == step))
            elif beside in wires and (-step[0], -step[1]) in _EXITS[wires[beside]]:
                reached[beside] = wires.pop(beside)
                todo.append(beside)
    heads = [name for name, is_head in ends if is_head]
    tails = [name for name, is_head in ends if not is_head]
    if not tails:  # a head at every end: both ways
        return {(one, other) for one, other in itertools.permutations(heads, 2) if one != other}
    return set(itertools.product(tails, heads))

"""Which graphs are cells of NAS-Bench-101, and which of them are one and the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nasq import Choice, Subnet
from nasq.errors import InputError, choose_from
from nasq.space import Option, SpaceRules

__all__ = ["OPERATORS", "Rules", "exact_size", "unlabelled"]

Rows = NDArray[np.int16]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

OPERATORS = ("none", "conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3")
"""Operators of an inner vertex; a vertex on no path from input to output has none."""


def _pairs(vertices: int) -> list[tuple[int, int]]:
    """The places of the upper triangle, row by row."""
    return list(itertools.combinations(range(vertices), 2))


class Rules(SpaceRules):
    """A cell is valid if a path leads from its input to its output, and if what lies on such paths has few enough edges.

    Two cells are the same if the parts on such paths are, up to the order of their vertices. Of all orders the canonical
    one has the largest operators, then edges, read from the first vertex on; vertices on no path come last, without
    operator and edges.

    Args:
        vertices: Most vertices, input and output included, 2 to 7.
        most: Most edges.

    Raises:
        InputError: A number is outside its range.
    """

    def __init__(self, vertices: int = 7, most: int = 9) -> None:
        if not 2 <= vertices <= 7 or most < 1:
            raise InputError(f"a cell with {vertices} vertices and {most} edges: allowed are 2 to 7, and at least 1.")
        self.vertices, self.most = vertices, most
        self.name = f"nas_bench_101(vertices={vertices}, edges={most})"
        full = {(0, vertices - 1), *((i, i + 1) for i in range(vertices - 1))}
        self.edges = tuple(
            Choice(f"edge{i}{j}", (0, 1), default=int((i, j) in full), ordered=False) for i, j in _pairs(vertices)
        )
        self.operators = tuple(
            Choice(f"vertex{v}", OPERATORS, default=OPERATORS[1], ordered=False) for v in range(1, vertices - 1)
        )
        self.choices = (*self.edges, *self.operators)

    @property
    def size(self) -> int:  # type: ignore[override]
        """How many different cells there are."""
        return exact_size(self.vertices, self.most)

    def _parts(self, rows: Rows) -> tuple[NDArray[np.int64], Ints, Bools]:
        """Pruned adjacency ``[n, V, V]``, operators ``[n, V]`` (0 where dead) and whether a path exists ``[n]``."""
        last = self.vertices - 1
        matrix = np.zeros((len(rows), self.vertices, self.vertices), dtype=np.int64)
        matrix[:, *np.triu_indices(self.vertices, 1)] = rows[:, : len(self.edges)]
        ahead, behind = (np.zeros((len(rows), self.vertices), dtype=np.bool_) for _ in range(2))
        ahead[:, 0], behind[:, last] = True, True
        for vertex in range(1, self.vertices):
            ahead[:, vertex] = (matrix[:, :, vertex] * ahead).any(1)
            other = last - vertex
            behind[:, other] = (matrix[:, other, :] * behind).any(1)
        alive = ahead & behind
        matrix *= alive[:, :, None] & alive[:, None, :]
        operators = np.zeros((len(rows), self.vertices), dtype=np.int64)
        operators[:, 1:last] = rows[:, len(self.edges) :] * alive[:, 1:last]
        return matrix, operators, alive

    def valid(self, rows: Rows) -> Bools:
        """Which rows ``[n, choices]`` are cells, ``[n]``."""
        matrix, operators, alive = self._parts(rows)
        inner = slice(1, self.vertices - 1)
        named = ((operators[:, inner] > 0) == alive[:, inner]).all(1)
        return np.asarray(alive[:, 0] & named & (matrix.sum((1, 2)) <= self.most))

    def canonical(self, rows: Rows) -> Rows:
        """The canonical form of valid rows ``[n, choices]``."""
        matrix, operators, _ = self._parts(rows)
        return self._decode(_largest(matrix, operators))

    def _decode(self, keys: Ints) -> Rows:
        places = len(self.edges)
        rows = np.empty((len(keys), len(self.choices)), dtype=np.int16)
        for place in range(places):
            rows[:, place] = keys >> (places - 1 - place) & 1
        for place in range(self.vertices - 2):
            rows[:, places + place] = keys >> (places + 2 * (self.vertices - 3 - place)) & 3
        return rows

    def members(self) -> Rows:
        """Every canonical row once. Takes some seconds for seven vertices."""
        keys: list[Ints] = []
        for inner in range(self.vertices - 1):
            graphs = _matrices(unlabelled(inner + 2, self.most), inner + 2)
            labels = np.array(list(itertools.product((1, 2, 3), repeat=inner)), dtype=np.int64).reshape(3**inner, inner)
            whole = np.zeros((len(graphs), self.vertices, self.vertices), dtype=np.int64)
            kept = [*range(inner + 1), self.vertices - 1]
            whole[:, np.array(kept)[:, None], kept] = graphs
            operators = np.zeros((len(labels), self.vertices), dtype=np.int64)
            operators[:, 1 : inner + 1] = labels
            pairs = np.repeat(whole, len(labels), axis=0), np.tile(operators, (len(graphs), 1))
            keys.append(np.unique(_largest(*pairs)))
        return self._decode(np.concatenate(keys))

    def to_text(self, subnet: Mapping[str, Option]) -> str:
        """``ADJACENCY:OPERATORS`` of the canonical, pruned cell, such as ``0100:input,output`` for a bare projection.

        Raises:
            InputError: A choice is missing, or the cell is not valid.
        """
        lacking = [choice.name for choice in self.choices if choice.name not in subnet]
        if lacking:
            raise InputError(f"the subnet has no option for {lacking[0]!r}. A cell has {len(self.choices)} choices.")
        row = np.array([[choice.index(subnet[choice.name]) for choice in self.choices]], dtype=np.int16)
        if not self.valid(row)[0]:
            raise InputError(
                f"the subnet is no cell of {self.name}: a path has to lead from input to output, every vertex on such a path "
                f"has an operator, and at most {self.most} edges lie on them."
            )
        matrix, operators, _ = self._parts(self.canonical(row))
        kept = [0, *np.flatnonzero(operators[0]).tolist(), self.vertices - 1]
        bits = "".join(map(str, matrix[0][np.ix_(kept, kept)].ravel().tolist()))
        return f"{bits}:{','.join(['input', *(OPERATORS[operators[0, v]] for v in kept[1:-1]), 'output'])}"

    def from_text(self, text: str) -> Subnet:
        """The canonical subnet of ``ADJACENCY:OPERATORS``, pruned or not.

        Raises:
            InputError: The text has another form, an operator is unknown, or the cell is not valid.
        """
        bits, _, listed = text.partition(":")
        names = listed.split(",")
        count = len(names)
        upper = len(bits) == count**2 and set(bits) <= {"0", "1"} and count >= 2
        matrix = np.array([int(bit) for bit in bits]).reshape(count, count) if upper else np.ones((2, 2), dtype=int)
        if np.tril(matrix).any() or (names[0], names[-1]) != ("input", "output") or count > self.vertices:
            raise InputError(
                f"{text[:120]!r} is no cell of {self.name}. Give the rows of an upper triangular matrix of 0 and 1, a colon, "
                "and an operator per vertex: '0100:input,output'."
            )
        for name in names[1:-1]:
            if name not in OPERATORS[1:]:
                raise choose_from("NAS-Bench-101 operator", name, OPERATORS[1:])
        places = [*range(count - 1), self.vertices - 1]
        whole = np.zeros((self.vertices, self.vertices), dtype=np.int16)
        whole[np.ix_(places, places)] = matrix
        inner = [OPERATORS.index(name) for name in names[1:-1]] + [0] * (self.vertices - count)
        row = np.array([[*whole[np.triu_indices(self.vertices, 1)], *inner]], dtype=np.int16)
        if not self.valid(row)[0]:
            raise InputError(
                f"{text[:120]!r} is no cell of {self.name}: a path has to lead from input to output, and at most {self.most} "
                "edges lie on such paths."
            )
        options = zip(self.choices, self.canonical(row)[0].tolist(), strict=True)
        return Subnet({choice.name: choice.options[index] for choice, index in options})


def _orders(vertices: int) -> Iterator[tuple[int, ...]]:
    """Every order of the vertices that keeps input and output in their places."""
    for inner in itertools.permutations(range(1, vertices - 1)):
        yield (0, *inner, vertices - 1)


def _largest(matrix: Ints, operators: Ints) -> Ints:
    """The largest key ``[n]`` of each graph over all orders of its vertices that keep edges pointing forwards.

    The key holds the operators of the inner vertices (two bits each), then the upper triangle row by row.
    """
    vertices = matrix.shape[1]
    pairs = _pairs(vertices)
    columns = {pair: np.ascontiguousarray(matrix[:, pair[0], pair[1]]) for pair in pairs}
    best = np.full(len(matrix), -1, dtype=np.int64)
    for order in _orders(vertices):
        key = np.zeros(len(matrix), dtype=np.int64)
        for vertex in order[1:-1]:
            key = key << 2 | operators[:, vertex]
        forwards = np.ones(len(matrix), dtype=np.bool_)
        for i, j in pairs:
            a, b = order[i], order[j]
            if a < b:
                key = key << 1 | columns[a, b]
            else:
                key = key << 1
                forwards &= columns[b, a] == 0
        best = np.where(forwards & (key > best), key, best)
    return best


def _matrices(bits: Ints, vertices: int) -> Ints:
    matrix = np.zeros((len(bits), vertices, vertices), dtype=np.int64)
    for place, (i, j) in enumerate(reversed(_pairs(vertices))):
        matrix[:, i, j] = bits >> place & 1
    return matrix


@lru_cache(maxsize=16)
def unlabelled(vertices: int, most: int) -> Ints:
    """One graph of each kind, operators aside: all ``vertices`` on paths from the first to the last, at most ``most`` edges.

    Returns:
        The bits of the upper triangle, row by row, the first place highest.
    """
    places = _pairs(vertices)
    every = np.arange(1 << len(places), dtype=np.int64)
    count = sum((every >> place & 1 for place in range(len(places))), np.zeros_like(every))
    kept = count <= most
    for vertex in range(vertices):
        for side in (0, 1):
            mask = sum(1 << place for place, pair in enumerate(reversed(places)) if pair[side] == vertex)
            if mask:
                kept &= (every & mask) != 0
    graphs = _matrices(every[kept], vertices)
    return np.unique(_largest(graphs, np.zeros(graphs.shape[:2], dtype=np.int64)))


@lru_cache(maxsize=16)
def exact_size(vertices: int, most: int) -> int:
    """How many different cells there are: for each graph, the ways to label it up to its symmetries (Burnside's lemma)."""
    total = 0
    for count in range(2, vertices + 1):
        graphs = _matrices(unlabelled(count, most), count)
        symmetries, labelled = (np.zeros(len(graphs), dtype=np.int64) for _ in range(2))
        for order in _orders(count):
            same = (graphs[:, order, :][:, :, order] == graphs).all((1, 2))
            symmetries += same
            labelled += same * 3 ** _cycles(order)
        total += int((labelled // symmetries).sum())
    return total


def _cycles(order: tuple[int, ...]) -> int:
    """Cycles of a permutation, those of input and output aside."""
    seen: set[int] = set()
    cycles = 0
    for start in range(1, len(order) - 1):
        cycles += start not in seen
        while start not in seen:
            seen.add(start)
            start = order[start]
    return cycles

"""Sizes of every tensor of a network for many subnets at once.

A :class:`Flow` walks a traced graph with arrays instead of numbers: the channels, height and width that each tensor has
in subnet 0, 1, 2, ... It is how sizes are checked when a space is built, and what the cost model counts on. What each
kind of operation does to sizes stands in :mod:`nasq.elastic.rules`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import nasq.elastic.shape_rules  # noqa: F401 - registers its rules
from nasq.elastic.base import Condition, Container, Size
from nasq.elastic.graph import Graph, Node, disagreement
from nasq.elastic.rules import Bools, Ints, Sized, makes_its_output, size_rule
from nasq.errors import InputError
from nasq.space import SearchSpace, values_of

__all__ = ["Flow", "check_sizes", "example_inputs"]


class Flow:
    """Walks a graph for the subnets of ``rows`` (``[n, choices]`` option indices).

    Subclasses override :meth:`visit` to count and :meth:`bits` to say how wide a node's value is.
    """

    def __init__(self, space: SearchSpace, rows: NDArray[np.int16]) -> None:
        self.space, self.rows = space, rows
        self.count = len(rows)
        self._column = {name: index for index, name in enumerate(space.names)}
        self._sizes: dict[int, tuple[Size, Ints]] = {}

    def lookup(self, size: Size) -> Ints:
        """A size in every subnet."""
        if isinstance(size, int):
            return np.full(self.count, size, dtype=np.int64)
        if id(size) not in self._sizes:  # the size is kept as well: its id must stay its own
            self._sizes[id(size)] = size, values_of(size, self.space, self.rows)
        return self._sizes[id(size)][1]

    def holds(self, condition: Condition) -> Bools:
        """In which subnets a condition holds."""
        result = np.ones(self.count, dtype=bool)
        for name, allowed in condition:
            column = self._column[name]
            table = np.array([option in allowed for option in self.space.choices[column].options])
            result &= table[self.rows[:, column]]
        return result

    def visit(self, node: Node, inputs: list[Sized], output: Sized, running: Bools) -> None:
        """Called for every node in execution order; ``running`` says in which subnets it runs."""

    def bits(self, node: Node, inputs: list[Sized]) -> Ints:
        """Bit-width of the node's value; the input's unless a quantizer says otherwise."""
        return inputs[0].bits

    def run(self, graph: Graph, inputs: list[Sized], running: Bools) -> Sized:
        """The output of ``graph`` on ``inputs``."""
        values: dict[Node, Sized] = dict(zip(graph.inputs, inputs, strict=True))
        for node in graph.nodes:
            if node.kind == "input":
                continue
            found = [values[source] for source in node.inputs]
            output = (
                self._container(node, found, running) if node.kind == "container" else self._sized(node, found, running)
            )
            values[node] = output
            self.visit(node, found, output, running)
        return values[graph.output]

    def _container(self, node: Node, inputs: list[Sized], running: Bools) -> Sized:
        container = node.module
        assert isinstance(container, Container)
        result: Sized | None = inputs[0] if container.layout == "chain" else None
        for index, part in enumerate(node.parts):
            active = self.holds(container.condition(index))
            chained = container.layout == "chain" and result is not None
            seen = [result] if chained and result is not None else list(container.inputs_of(index, inputs))
            output = self.run(part, seen, running & active)
            result = output if result is None else _choose(active, output, result)
        assert result is not None
        return result

    def _sized(self, node: Node, inputs: list[Sized], running: Bools) -> Sized:
        dims = size_rule(node.kind)(self, node, inputs, running)
        source = inputs[0].source if inputs and not makes_its_output(node.kind) else node.path
        return Sized(dims, self.bits(node, inputs) if inputs else self.lookup(32), source)

    def agree(
        self, node: Node, what: str, wanted: Any, given: Sized, have: Ints, running: Bools, beside: str = ""
    ) -> None:
        """Raises where a layer's size and its input's differ in a subnet in which the layer runs."""
        wrong = running & (wanted != have)
        if wrong.any():
            index, example = self._first(wrong)
            size = int(np.broadcast_to(wanted, have.shape)[index])
            raise disagreement(node.path, what, size, given.source, int(have[index]), example, beside)

    def divide(self, node: Node, sizes: dict[str, Any], running: Bools) -> None:
        """Raises where the groups of a convolution do not divide its channels in a subnet in which it runs."""
        wrong = running & ((sizes["in"] % sizes["groups"] != 0) | (sizes["out"] % sizes["groups"] != 0))
        if wrong.any():
            index, example = self._first(wrong)
            inner, outer, groups = (int(np.broadcast_to(sizes[key], wrong.shape)[index]) for key in _DIVIDED)
            raise InputError(
                f"{node.path!r} has {inner} input and {outer} output channels, which {groups} groups do not divide, for "
                f"example in the subnet {example}. Change the options of its width or of its groups."
            )

    def _first(self, wrong: Bools) -> tuple[int, str]:
        index = int(np.flatnonzero(wrong)[0])
        return index, self.space.to_subnet(self.rows[index]).to_json()[:200]


_DIVIDED = ("in", "out", "groups")


def _choose(mask: Bools, one: Sized, other: Sized) -> Sized:
    if len(one.dims) != len(other.dims):
        return one if mask.all() else other
    dims = tuple(np.where(mask, a, b) for a, b in zip(one.dims, other.dims, strict=True))
    return Sized(dims, np.where(mask, one.bits, other.bits), one.source)


def example_inputs(flow: Flow, graph: Graph) -> list[Sized]:
    """The graph's inputs at the sizes of the traced example."""
    return [Sized(tuple(flow.lookup(size) for size in node.shape), flow.lookup(32), node.path) for node in graph.inputs]


def check_sizes(graph: Graph, space: SearchSpace, samples: int = 256) -> None:
    """Checks that sizes agree in the smallest, the largest and ``samples`` random subnets.

    Raises:
        InputError: They do not; names both layers and a subnet.
    """
    corners = space.to_rows([space.smallest(), space.largest(), space.default()])
    drawn = space.sample_batch(samples, torch.Generator().manual_seed(0))
    flow = Flow(space, np.concatenate([corners, drawn]))
    flow.run(graph, example_inputs(flow, graph), np.ones(flow.count, dtype=bool))

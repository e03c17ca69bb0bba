"""Where a network's values come from: its first and last layers, whose bits are pinned, and the ways out of a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from nasq.elastic.base import Container
from nasq.elastic.graph import Graph, Node

__all__ = ["Nodes", "Pinned", "exits", "first_and_last", "keeps_grid", "origins"]

Nodes = frozenset[Node]

_LAYERS = frozenset({"conv", "linear"})
_KEEPS_GRID = frozenset({
    "reshape", "identity", "max_pool", "relu", "relu6", "norm", "slice", "pad", "permute", "view", "select", "upsample",
    "resize", "scale", "expand", "split_heads", "mask", "zero",
})  # fmt: skip


def keeps_grid(node: Node) -> bool:
    """Whether what a node makes is on its input's grid, or part of the producer before it."""
    return node.kind in _KEEPS_GRID


@dataclass(frozen=True)
class Pinned:
    """What keeps its bits.

    Attributes:
        layers: The modules whose weights do.
        tensors: The nodes whose quantized tensors do.
    """

    layers: frozenset[nn.Module] = frozenset()
    tensors: Nodes = frozenset()


def exits(container: Container) -> frozenset[int]:
    """After how many parts a chain may be left."""
    conditions = [container.condition(index) for index in range(len(container.parts()))]
    # A chain is left where its next part asks for more than the part before it.
    changes = {index for index, (before, now) in enumerate(pairwise([(), *conditions])) if before != now}
    return frozenset({*changes, len(conditions)})


def origins(graph: Graph, passes: Callable[[Node], bool]) -> dict[Node, Nodes]:
    """For every node, those in containers included: the nodes that its value may come from, itself among them.

    Args:
        graph: A traced network.
        passes: Whether what comes into a node counts as coming out of it. Containers always pass on what their parts do,
            for every option of their choices.
    """
    found: dict[Node, Nodes] = {}
    _walk(graph, [frozenset({node}) for node in graph.inputs], passes, found)
    return found


def _walk(graph: Graph, given: Sequence[Nodes], passes: Callable[[Node], bool], found: dict[Node, Nodes]) -> Nodes:
    found.update(zip(graph.inputs, given, strict=True))
    for node in graph.nodes:
        if node.kind == "input":
            continue
        read = [found[source] for source in node.inputs]
        if node.kind == "container":
            found[node] = _through(node, read, passes, found)
        else:
            found[node] = frozenset({node}).union(*(read if passes(node) else ()))
    return found[graph.output]


def _through(node: Node, read: list[Nodes], passes: Callable[[Node], bool], found: dict[Node, Nodes]) -> Nodes:
    container = node.module
    assert isinstance(container, Container)
    if container.layout == "parallel":
        parts = enumerate(node.parts)
        return frozenset().union(*(_walk(part, container.inputs_of(i, read), passes, found) for i, part in parts))
    values = [read[0]]
    for part in node.parts:
        values.append(_walk(part, [values[-1]], passes, found))
    return frozenset().union(*(values[count] for count in exits(container)))


def first_and_last(graph: Graph) -> Pinned:
    """The layers that read the network's input and those whose tensor, pooled or reshaped, is its output.

    Their weights are pinned, and so are the tensors that the last ones read and the network's output. A layer belongs to
    them if it does in some subnet.
    """
    inputs = frozenset(graph.inputs)
    layers = [node for node in graph.walk() if node.kind in _LAYERS]
    reading = origins(graph, lambda node: node.kind not in _LAYERS)
    making = origins(graph, keeps_grid)
    ending = origins(graph, lambda node: keeps_grid(node) or node.kind in {"avg_pool", "mean"})[graph.output]
    first = [node for node in layers if any(inputs & reading[source] for source in node.inputs)]
    last = [node for node in layers if node in ending]
    read = (making[source] for node in last for source in node.inputs)
    modules = frozenset(node.module for node in [*first, *last] if node.module is not None)
    return Pinned(modules, making[graph.output].union(*read))

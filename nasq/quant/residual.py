"""The residual stream: sums at bits of their own, and what convolutions read of them requantized.

Published low-bit networks quantize what a convolution reads and leave the sums beside it in float (EQ-Net, LSQ). No
device has a float tensor there, but it does have an 8-bit one: the tensors that sums read and make keep many bits, and a
requantization in front of each convolution gives it few. The requantization is an average over windows of one pixel,
an operation that every target has, with a learned step size of its own.
"""

from __future__ import annotations

from nasq.elastic.graph import Graph, Node
from nasq.quant.pinning import Nodes, Pinned, keeps_grid, origins

__all__ = ["separate_sums"]


def separate_sums(graph: Graph, pinned: Pinned) -> Nodes:
    """Puts a requantization in front of every convolution that reads the residual stream.

    A convolution whose weights are pinned reads the stream as it is, and so do linear layers and pools.

    Args:
        graph: A traced network; changed in place.
        pinned: Its first and last layers.

    Returns:
        The nodes whose tensors are the stream: the sums, and what they read.
    """
    making = origins(graph, keeps_grid)
    sums = [node for node in graph.walk() if node.kind == "add"]
    stream: Nodes = frozenset(sums).union(*(making[source] for node in sums for source in node.inputs))
    for part in _graphs(graph):
        for node in [node for node in part.nodes if node.kind == "conv" and node.module not in pinned.layers]:
            if making[node.inputs[0]] & stream:
                _requantize(part, node)
    return stream


def _graphs(graph: Graph) -> list[Graph]:
    return [graph, *(inner for node in graph.nodes for part in node.parts for inner in _graphs(part))]


def _requantize(graph: Graph, node: Node) -> None:
    source, rest = node.inputs[0], node.inputs[1:]
    window = {"kernel": (1, 1), "stride": (1, 1)}
    between = Node("avg_pool", f"{node.name}_input", f"{node.path}.input", (source,), source.shape, None, window)
    graph.nodes.insert(graph.nodes.index(node), between)
    node.inputs = (between, *rest)

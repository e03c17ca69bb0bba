"""The traced form of a network: a small graph whose nodes are the operations nasq knows by name.

One form serves everyone who has to look inside a network: the check of sizes, the cost model and quantization. A
container is one node that holds the graphs of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

__all__ = ["Graph", "Kind", "Node"]

Kind = Literal[
    "input",
    "conv",
    "linear",
    "norm",
    "relu",
    "relu6",
    "add",
    "concat",
    "avg_pool",
    "max_pool",
    "reshape",
    "identity",
    "container",
    "other",
]


@dataclass(eq=False)
class Node:
    """One operation of a traced network.

    Attributes:
        kind: What it computes.
        name: Unique in its graph.
        path: Where it is in the whole network: the module's path, or the name of the calling module's operation.
        inputs: The nodes whose values it reads.
        shape: Shape of its value in the traced example, without the batch dimension.
        module: The module behind it, if it is one.
        attributes: Fixed numbers of the operation, such as a pooling window.
        parts: The graphs of a container's parts, in the container's order.
    """

    kind: Kind
    name: str
    path: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    module: nn.Module | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Graph, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}: {self.kind}({', '.join(node.name for node in self.inputs)}) {list(self.shape)}"


@dataclass(eq=False)
class Graph:
    """The operations of one network, in execution order.

    Attributes:
        nodes: All nodes; the inputs come first.
        output: The node whose value the network returns.
    """

    nodes: list[Node]
    output: Node

    @property
    def inputs(self) -> list[Node]:
        """The input nodes."""
        return [node for node in self.nodes if node.kind == "input"]

    def users(self, node: Node) -> list[Node]:
        """The nodes that read ``node``'s value."""
        return [other for other in self.nodes if node in other.inputs]

    def walk(self) -> list[Node]:
        """All nodes, those of container parts included."""
        found: list[Node] = []
        for node in self.nodes:
            found.append(node)
            for part in node.parts:
                found.extend(part.walk())
        return found

"""The traced form of a network: a small graph whose nodes are the operations nasq knows by name.

One form serves everyone who has to look inside a network: the check of sizes, the cost model and quantization. A
container is one node that holds the graphs of its parts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from nasq.errors import InputError

__all__ = ["Graph", "Kind", "Node", "disagreement"]

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
    "slice",
    "pad",
    "upsample",
    "resize",
    "unary",
    "mul",
    "sub",
    "group_norm",
    "identity",
    "layer_norm",
    "softmax",
    "matmul",
    "permute",
    "view",
    "scale",
    "parameter",
    "expand",
    "select",
    "mean",
    "mask",
    "split_heads",
    "zero",
    "relative_position",
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
        attributes: Fixed numbers of the operation, such as a pooling window; the ``parameter`` that it reads directly.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        # Node by node: through their inputs, the recursion would be as deep as the network.
        for node in self.nodes:
            inputs = tuple(memo[id(source)] for source in node.inputs)
            rest = copy.deepcopy((node.module, node.attributes, node.parts), memo)
            memo[id(node)] = Node(node.kind, node.name, node.path, inputs, node.shape, *rest)
        # The graph of an extracted network has no nodes, only an output that stands for nothing.
        return Graph([memo[id(node)] for node in self.nodes], memo.get(id(self.output), self.output))

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


def disagreement(
    path: str, what: str, wanted: int, maker: str, given: int, example: str = "", beside: str = ""
) -> InputError:
    """The error for a layer whose size is not that of its input.

    Args:
        path: The layer.
        what: The size, as a noun: ``"input channels"``.
        wanted: The layer's size.
        maker: The layer that made the input.
        given: The input's size.
        example: A subnet in which they differ, as text.
        beside: For a sum or concatenation: the layer that made the other side.
    """
    other = f" (added to {beside!r})" if beside else ""
    where = f", for example in the subnet {example}" if example else ""
    return InputError(
        f"sizes disagree: {path!r} takes {wanted} {what}, and {maker!r}{other} gives it {given}{where}. "
        "Give both the same choice or expression."
    )

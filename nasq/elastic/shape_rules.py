"""Size rules of operations that move, cut or pad elements, and of those that work on every element alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nasq.elastic.graph import Node
from nasq.elastic.rules import Bools, Ints, Sized, size
from nasq.elastic.slicing import taken

if TYPE_CHECKING:
    from nasq.elastic.flow import Flow

__all__: list[str] = []


@size("slice")
def _slice(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    return tuple(np.asarray(count, np.int64) for _, count, _ in taken(node.attributes, inputs[0].dims))


@size("pad")
def _pad(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    if "pads" not in node.attributes:  # an elastic layer, whose channels are choices
        layer: Any = node.module
        flow.agree(node, "input channels", flow.lookup(layer.in_channels), inputs[0], inputs[0].dims[0], running)
        return (flow.lookup(layer.out_channels), *inputs[0].dims[1:])
    return tuple(np.asarray(dim + sum(pair)) for dim, pair in zip(inputs[0].dims, node.attributes["pads"], strict=True))


@size("upsample")
def _upsample(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    """By whole factors."""
    channels, height, width = inputs[0].dims
    rows, columns = node.attributes["factor"]
    return channels, height * rows, width * columns


@size("resize")
def _resize(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    if "factor" in node.attributes:
        return _upsample(flow, node, inputs, running)
    if "size" in node.attributes:
        return (inputs[0].dims[0], *(flow.lookup(side) for side in node.attributes["size"]))
    layer: Any = node.module
    return inputs[0].dims[0], flow.lookup(layer.size), flow.lookup(layer.size)


@size("unary")
def _same(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    return inputs[0].dims


@size("group_norm")
def _group_norm(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    norm: Any = node.module
    flow.agree(node, "channels", flow.lookup(norm.num_channels), inputs[0], inputs[0].dims[0], running)
    return inputs[0].dims

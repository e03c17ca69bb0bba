"""Sizes and costs of the operations on tokens (:mod:`nasq.elastic.token_kinds`); see :mod:`nasq.elastic.rules`."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from nasq.elastic.attention import RelativePosition, SplitHeads
from nasq.elastic.graph import Node
from nasq.elastic.layer_norm import LayerNorm
from nasq.elastic.parameter import Parameter
from nasq.elastic.rules import Bools, Ints, Sized, Work, size, work

if TYPE_CHECKING:
    from nasq.elastic.flow import Flow

__all__: list[str] = []

Dims = tuple[Ints, ...]


@size("layer_norm")
def _layer_norm(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    norm = node.module
    assert isinstance(norm, (LayerNorm, nn.LayerNorm))
    wanted = norm.normalized_shape if isinstance(norm, LayerNorm) else norm.normalized_shape[0]
    flow.agree(node, "features", flow.lookup(wanted), inputs[0], inputs[0].dims[-1], running)
    return inputs[0].dims


@size("softmax", "scale", "expand", "mask")
def _same(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    return inputs[0].dims


@size("parameter", makes=True)
def _parameter(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    if isinstance(node.module, Parameter):
        return tuple(flow.lookup(size) for size in node.module.sizes[1:])
    return tuple(flow.lookup(size) for size in node.shape)


@size("permute")
def _permute(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    return tuple(inputs[0].dims[dim - 1] for dim in node.attributes["dims"][1:])


@size("view")
def _view(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    given = node.attributes["sizes"]
    dims = [inputs[0].dims[place] if one == 0 else flow.lookup(abs(one)) for place, one in enumerate(given)]
    known = prod(dims, start=flow.lookup(1))
    if -1 in given:
        left = inputs[0].numel // np.maximum(known, 1)
        dims[given.index(-1)] = left
        known = known * left
    flow.agree(node, "numbers", known, inputs[0], inputs[0].numel, running)
    return tuple(dims)


@size("split_heads")
def _split_heads(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    assert isinstance(node.module, SplitHeads)
    *before, last = inputs[0].dims
    heads = flow.lookup(node.module.heads)
    flow.agree(node, "features", last // heads * heads, inputs[0], last, running)
    return (*before, heads, last // heads)


@size("select")
def _select(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    dropped = node.attributes["dim"] - 1
    return tuple(one for place, one in enumerate(inputs[0].dims) if place != dropped)


@size("mean")
def _mean(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    gone, keep = {dim - 1 for dim in node.attributes["dims"]}, node.attributes["keepdim"]
    dims = [flow.lookup(1) if place in gone else one for place, one in enumerate(inputs[0].dims)]
    return tuple(one for place, one in enumerate(dims) if keep or place not in gone)


@size("matmul", makes=True)
def _matmul(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    left, right = inputs
    flow.agree(node, "rows of its second factor", left.dims[-1], right, right.dims[-2], running, left.source)
    for one, other in zip(left.dims[:-2], right.dims[:-2], strict=True):
        flow.agree(node, "products", one, right, other, running, left.source)
    return (*left.dims[:-1], right.dims[-1])


@work("matmul")
def _matmul_work(flow: Flow, node: Node, inputs: list[Sized], output: Sized) -> Work:
    return Work(output.numel * inputs[0].dims[-1])


@size("relative_position", makes=True)
def _relative(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> Dims:
    module = node.module
    assert isinstance(module, RelativePosition)
    inner = flow.lookup(module.tokens if module.role == "value" else module.head_dim)
    flow.agree(node, "features", inner, inputs[0], inputs[0].dims[-1], running)
    return (*inputs[0].dims[:-1], flow.lookup(module.head_dim if module.role == "value" else module.tokens))


@work("relative_position")
def _relative_work(flow: Flow, node: Node, inputs: list[Sized], output: Sized) -> Work:
    return Work(output.numel * inputs[0].dims[-1])

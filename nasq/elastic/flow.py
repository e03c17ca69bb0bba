"""Sizes of every tensor of a network for many subnets at once.

A :class:`Flow` walks a traced graph with arrays instead of numbers: the channels, height and width that each tensor has
in subnet 0, 1, 2, ... It is how sizes are checked when a space is built, and what the cost model counts on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nasq.elastic.base import Condition, Container, Size
from nasq.elastic.conv import Conv2d
from nasq.elastic.graph import Graph, Node, disagreement
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d
from nasq.errors import InputError
from nasq.space import SearchSpace, values_of

__all__ = ["Flow", "Ints", "Sized", "check_sizes", "conv_geometry"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Sized:
    """A tensor in ``n`` subnets.

    Attributes:
        dims: One int64 array ``[n]`` per dimension behind the batch: ``(C, H, W)`` or ``(features,)``.
        bits: Bit-width of its values, ``[n]`` (32: float).
        source: Path of the layer that made it, for messages.
    """

    dims: tuple[Ints, ...]
    bits: Ints
    source: str

    @property
    def numel(self) -> Ints:
        """Number of elements per image."""
        return np.asarray(np.prod(np.stack(self.dims), axis=0))


def conv_geometry(module: nn.Module, flow: Flow) -> dict[str, Any]:
    """Sizes of an elastic or plain convolution: in, out, kernel (h, w), stride, padding (both sides), dilation, groups."""
    if isinstance(module, Conv2d):
        kernel = flow.lookup(module.kernel_size)
        padding = module.dilation * (kernel - 1) if module.padding == "same" else 2 * module.padding
        stride = flow.lookup(module.stride)
        return {
            "in": flow.lookup(module.in_channels), "out": flow.lookup(module.out_channels), "kernel": (kernel, kernel),
            "stride": (stride, stride), "padding": (padding, padding), "dilation": (module.dilation, module.dilation),
            "groups": flow.lookup(module.groups),
        }  # fmt: skip
    assert isinstance(module, nn.Conv2d)
    if isinstance(module.padding, str):
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        both = reach if module.padding == "same" else [0, 0]
    else:
        both = [2 * pixels for pixels in module.padding]
    return {
        "in": module.in_channels, "out": module.out_channels, "kernel": module.kernel_size, "stride": module.stride,
        "padding": both, "dilation": module.dilation, "groups": module.groups,
    }  # fmt: skip


class Flow:
    """Walks a graph for the subnets of ``rows`` (``[n, choices]`` option indices).

    Subclasses override :meth:`visit` to count and :meth:`bits` to say how wide a node's value is.
    """

    def __init__(self, space: SearchSpace, rows: NDArray[np.int16]) -> None:
        self.space, self.rows = space, rows
        self.count = len(rows)
        self._column = {name: index for index, name in enumerate(space.names)}
        self._sizes: dict[int, Ints] = {}

    def lookup(self, size: Size) -> Ints:
        """A size in every subnet."""
        if isinstance(size, int):
            return np.full(self.count, size, dtype=np.int64)
        if id(size) not in self._sizes:
            self._sizes[id(size)] = values_of(size, self.space, self.rows)
        return self._sizes[id(size)]

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
            chained = [result] if container.layout == "chain" and result is not None else inputs
            output = self.run(part, chained, running & active)
            result = output if result is None else _choose(active, output, result)
        assert result is not None
        return result

    def _sized(self, node: Node, inputs: list[Sized], running: Bools) -> Sized:
        dims = _RULES.get(node.kind, _unknown)(self, node, inputs, running)
        source = inputs[0].source if inputs and node.kind not in {"conv", "linear", "add", "concat"} else node.path
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


def _window(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Ints:
    return np.asarray((size + padding - dilation * (kernel - 1) - 1) // stride + 1)


def _conv(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    assert node.module is not None
    sizes = conv_geometry(node.module, flow)
    channels, *spatial = inputs[0].dims
    flow.agree(node, "input channels", sizes["in"], inputs[0], channels, running)
    flow.divide(node, sizes, running)
    height, width = (
        _window(spatial[i], sizes["kernel"][i], sizes["stride"][i], sizes["padding"][i], sizes["dilation"][i])
        for i in (0, 1)
    )
    return np.broadcast_to(sizes["out"], (flow.count,)), height, width


def _linear(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    module = node.module
    assert isinstance(module, (Linear, nn.Linear))
    flow.agree(node, "input features", flow.lookup(module.in_features), inputs[0], inputs[0].dims[-1], running)
    return (*inputs[0].dims[:-1], flow.lookup(module.out_features))


def _norm(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    assert isinstance(node.module, (BatchNorm2d, nn.BatchNorm2d))
    flow.agree(node, "channels", flow.lookup(node.module.num_features), inputs[0], inputs[0].dims[0], running)
    return inputs[0].dims


def _add(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    for what, one, other in zip(_names(inputs[0]), inputs[0].dims, inputs[1].dims, strict=True):
        flow.agree(node, what, one, inputs[1], other, running, inputs[0].source)
    return inputs[0].dims


def _names(x: Sized) -> tuple[str, ...]:
    return ("channels", "rows", "columns") if len(x.dims) == 3 else ("features",) * len(x.dims)


def _pool(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    channels, height, width = inputs[0].dims
    kernel = node.attributes["kernel"]
    if kernel is None:
        one = np.ones_like(channels)
        return (channels,) if node.attributes.get("squeeze") else (channels, one, one)
    stride, padding = node.attributes["stride"], node.attributes.get("padding", (0, 0))
    return (
        channels,
        _window(height, kernel[0], stride[0], 2 * padding[0]),
        _window(width, kernel[1], stride[1], 2 * padding[1]),
    )


def _reshape(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    return (inputs[0].numel,)


def _concat(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    for other in inputs[1:]:
        for what, wanted, have in zip(_names(other)[1:], inputs[0].dims[1:], other.dims[1:], strict=True):
            flow.agree(node, what, wanted, other, have, running, inputs[0].source)
    return (np.sum(np.stack([x.dims[0] for x in inputs]), axis=0), *inputs[0].dims[1:])


def _same(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    return inputs[0].dims


def _unknown(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    """An operation without a rule: it has the shape of an input where it has in the example, else the example's."""
    for source, found in zip(node.inputs, inputs, strict=True):
        if source.shape == node.shape and (source.inputs or source.kind == "input"):
            return found.dims
    return tuple(flow.lookup(size) for size in node.shape)


_RULES = {
    "conv": _conv, "linear": _linear, "norm": _norm, "add": _add, "avg_pool": _pool, "max_pool": _pool,
    "reshape": _reshape, "concat": _concat, "relu": _same, "relu6": _same, "identity": _same,
}  # fmt: skip


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

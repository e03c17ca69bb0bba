"""What each kind of operation does to sizes and costs: one size rule and, where it multiplies, one work rule per kind.

A new operation is added here, in one place: its kind in :data:`nasq.elastic.graph.Kind`, its recognition in
:mod:`nasq.elastic.kinds`, and its rules with :func:`size` and :func:`work`. Everything is on arrays ``[n]``: the value in
subnet 0, 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nasq.elastic.conv import Conv2d
from nasq.elastic.graph import Node
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d

if TYPE_CHECKING:
    from nasq.elastic.flow import Flow

__all__ = [
    "Bools", "Ints", "Sized", "Work", "conv_geometry", "makes_its_output", "names_of", "size", "size_rule", "window",
    "work", "work_rule",
]  # fmt: skip

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


@dataclass(frozen=True)
class Work:
    """What one call of an operation computes and stores in ``n`` subnets.

    Attributes:
        macs: Multiply-adds per image, ``[n]``.
        rows: Output channels of its weights, ``[n]``; ``None`` where it has none (a product of two tensors).
        row: Weights of one output channel, ``[n]``.
        averaged: Whether its bits enter the averages.
    """

    macs: Ints
    rows: Ints | None = None
    row: Ints | None = None
    averaged: bool = True


SizeRule = Callable[["Flow", Node, list[Sized], Bools], tuple[Ints, ...]]
WorkRule = Callable[["Flow", Node, list[Sized], Sized], Work | None]
_Rule = TypeVar("_Rule", bound=Callable[..., Any])

_SIZES: dict[str, SizeRule] = {}
_MAKERS: set[str] = set()
_WORK: dict[str, WorkRule] = {}


def size(*kinds: str, makes: bool = False) -> Callable[[_Rule], _Rule]:
    """Registers the size rule of some kinds: ``(flow, node, inputs, running) -> dims of the output``.

    The rule raises (:meth:`Flow.agree`) where the operation cannot take its inputs in a subnet in which it runs.

    Args:
        kinds: Kinds of :class:`~nasq.elastic.graph.Node`.
        makes: Whether messages name this operation as the maker of its output, and not the one before it.
    """

    def register(function: _Rule) -> _Rule:
        assert not set(kinds) & _SIZES.keys(), f"{kinds} have a size rule"
        _SIZES.update(dict.fromkeys(kinds, function))
        _MAKERS.update(kinds if makes else ())
        return function

    return register


def work(*kinds: str) -> Callable[[_Rule], _Rule]:
    """Registers the work rule of some kinds: ``(flow, node, inputs, output) -> Work``, or ``None`` where nothing counts."""

    def register(function: _Rule) -> _Rule:
        assert not set(kinds) & _WORK.keys(), f"{kinds} have a work rule"
        _WORK.update(dict.fromkeys(kinds, function))
        return function

    return register


def size_rule(kind: str) -> SizeRule:
    """The size rule of a kind; that of an unknown operation where it has none."""
    return _SIZES.get(kind, _unknown)


def work_rule(kind: str) -> WorkRule | None:
    """The work rule of a kind, or ``None`` where its costs are not counted."""
    return _WORK.get(kind)


def makes_its_output(kind: str) -> bool:
    """Whether messages name an operation of this kind as the maker of its output."""
    return kind in _MAKERS


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


def window(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Ints:
    """Positions of a window along one side; ``padding`` is that of both ends together."""
    return np.asarray((size + padding - dilation * (kernel - 1) - 1) // stride + 1)


@size("conv", makes=True)
def _conv(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    assert node.module is not None
    sizes = conv_geometry(node.module, flow)
    channels, *spatial = inputs[0].dims
    flow.agree(node, "input channels", sizes["in"], inputs[0], channels, running)
    flow.divide(node, sizes, running)
    height, width = (
        window(spatial[i], sizes["kernel"][i], sizes["stride"][i], sizes["padding"][i], sizes["dilation"][i])
        for i in (0, 1)
    )
    return np.broadcast_to(sizes["out"], (flow.count,)), height, width


@size("linear", makes=True)
def _linear(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    module = node.module
    assert isinstance(module, (Linear, nn.Linear))
    flow.agree(node, "input features", flow.lookup(module.in_features), inputs[0], inputs[0].dims[-1], running)
    return (*inputs[0].dims[:-1], flow.lookup(module.out_features))


@size("norm")
def _norm(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    assert isinstance(node.module, (BatchNorm2d, nn.BatchNorm2d))
    flow.agree(node, "channels", flow.lookup(node.module.num_features), inputs[0], inputs[0].dims[0], running)
    return inputs[0].dims


@size("add", "mul", "sub", makes=True)
def _add(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    """Equal sizes, or 1 on one side, which is repeated."""
    made = []
    for what, one, other in zip(names_of(inputs[0]), inputs[0].dims, inputs[1].dims, strict=True):
        wanted = np.where((one == 1) | (other == 1), one, other)
        flow.agree(node, what, one, inputs[1], wanted, running, inputs[0].source)
        made.append(np.maximum(one, other))
    return tuple(made)


def names_of(x: Sized) -> tuple[str, ...]:
    """What the dimensions are called in messages."""
    return ("channels", "rows", "columns") if len(x.dims) == 3 else ("features",) * len(x.dims)


@size("avg_pool", "max_pool")
def _pool(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    channels, height, width = inputs[0].dims
    kernel = node.attributes["kernel"]
    if kernel is None:
        one = np.ones_like(channels)
        return (channels,) if node.attributes.get("squeeze") else (channels, one, one)
    stride, padding = node.attributes["stride"], node.attributes.get("padding", (0, 0))
    return (
        channels,
        window(height, kernel[0], stride[0], 2 * padding[0]),
        window(width, kernel[1], stride[1], 2 * padding[1]),
    )


@size("reshape")
def _reshape(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    return (inputs[0].numel,)


@size("concat", makes=True)
def _concat(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    dim = node.attributes.get("dim", 0)
    for other in inputs[1:]:
        sides = zip(names_of(other), inputs[0].dims, other.dims, strict=True)
        for what, wanted, have in [side for place, side in enumerate(sides) if place != dim]:
            flow.agree(node, what, wanted, other, have, running, inputs[0].source)
    joined = np.sum(np.stack([x.dims[dim] for x in inputs]), axis=0)
    return (*inputs[0].dims[:dim], joined, *inputs[0].dims[dim + 1 :])


@size("relu", "relu6", "identity", "zero")
def _same(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    return inputs[0].dims


def _unknown(flow: Flow, node: Node, inputs: list[Sized], running: Bools) -> tuple[Ints, ...]:
    """An operation without a rule: it has the shape of an input where it has in the example, else the example's."""
    for source, found in zip(node.inputs, inputs, strict=True):
        if source.shape == node.shape and (source.inputs or source.kind == "input"):
            return found.dims
    return tuple(flow.lookup(size) for size in node.shape)


# Work


@work("conv")
def _conv_work(flow: Flow, node: Node, inputs: list[Sized], output: Sized) -> Work:
    assert node.module is not None
    sizes = conv_geometry(node.module, flow)
    row = sizes["in"] // sizes["groups"] * sizes["kernel"][0] * sizes["kernel"][1]
    row = np.asarray(np.broadcast_to(row, (flow.count,)))
    return Work(output.numel * row, output.dims[0], row)


@work("linear")
def _linear_work(flow: Flow, node: Node, inputs: list[Sized], output: Sized) -> Work:
    row = inputs[0].dims[-1]
    return Work(output.numel * row, output.dims[-1], row)


@work("norm")
def _norm_work(flow: Flow, node: Node, inputs: list[Sized], output: Sized) -> Work | None:
    # Alone in a quantized network it is a depthwise convolution by one: it is stored, and it runs.
    if node.attributes.get("producer") is None:
        return None
    return Work(output.numel, output.dims[0], flow.lookup(1), averaged=False)


@work("other")
def _own_work(flow: Flow, node: Node, inputs: list[Sized], output: Sized) -> Work | None:
    """An elastic module that is one leaf may count its own multiply-adds: ``cost_macs(lookup, dims of its input)``."""
    counts = getattr(node.module, "cost_macs", None)
    return Work(np.asarray(counts(flow.lookup, inputs[0].dims))) if counts is not None else None

"""Which layers of a network share a width: the channels of every tensor, followed through the traced graph.

A tensor's channels are a row of segments, one per tensor that was concatenated into it. Every segment belongs to a group:
all layers whose widths have to change together, because a sum, a product or a depthwise convolution joins them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from nasq.elastic.graph import Graph, Node

__all__ = ["Channels", "Group", "Layer", "Segment", "Widths", "follow_channels", "obstacle"]


@dataclass
class Group:
    """A width that layers share.

    Attributes:
        path: The first layer that makes it.
        size: Number of channels of the original.
        unit: The width has to stay a multiple of it.
        reason: Why it cannot change; empty where it can.
    """

    path: str
    size: int
    unit: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Segment:
    """Some channels of a tensor.

    Attributes:
        group: Number of their group.
        repeat: Features per channel (the pixels of a map that was flattened).
    """

    group: int
    repeat: int = 1


Channels = tuple[Segment, ...]


@dataclass
class Layer:
    """A layer with the channels it reads and makes."""

    node: Node
    inputs: Channels
    outputs: Channels


@dataclass
class Widths:
    """The groups, joined as the graph is followed, and what is found on the way.

    Attributes:
        groups, parent: The groups, and the number of the group that each was joined to.
        layers: The layers whose channels are followed.
        passed_over: Layers with weights whose channels are not, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    layers: dict[nn.Module, Layer] = field(default_factory=dict)
    passed_over: list[tuple[Node, str]] = field(default_factory=list)

    def new(self, path: str, size: int, reason: str = "") -> Channels:
        """Channels of a group of their own."""
        self.groups.append(Group(path, size, 1, reason))
        self.parent.append(len(self.parent))
        return (Segment(len(self.parent) - 1),)

    def root(self, group: int) -> int:
        """The number that stands for a group and all it was joined with."""
        while self.parent[group] != group:
            group = self.parent[group]
        return group

    def group(self, segment: Segment) -> Group:
        """The group of a segment."""
        return self.groups[self.root(segment.group)]

    def freeze(self, channels: Channels, reason: str) -> None:
        """Says why widths cannot change; the first reason counts."""
        for segment in channels:
            group = self.group(segment)
            group.reason = group.reason or reason

    def join(self, one: Channels, other: Channels, path: str) -> None:
        """Makes two tensors' channels change together; where their segments do not match, they stay as they are."""
        pairs = list(zip(one, other, strict=False))
        same = len(one) == len(other) and all(
            self.group(a).size == self.group(b).size and a.repeat == b.repeat for a, b in pairs
        )
        if not same:
            self.freeze((*one, *other), f"{path!r} joins tensors that are concatenated from different parts")
            return
        for a, b in pairs:
            first, second = sorted((self.root(a.group), self.root(b.group)))
            if first != second:
                kept, gone = self.groups[first], self.groups[second]
                kept.unit = math.lcm(kept.unit, gone.unit)
                kept.reason = kept.reason or gone.reason
                self.parent[second] = first


def obstacle(module: nn.Module) -> str:
    """Why a layer has no elastic form; empty where it has one."""
    if isinstance(module, nn.Conv2d):
        for name in ("kernel_size", "stride", "padding", "dilation"):
            value = getattr(module, name)
            if isinstance(value, str) or value[0] != value[1]:
                return f"its {name} {value!r} is not one number for rows and columns"
        return "" if module.padding_mode == "zeros" else f"its padding_mode is {module.padding_mode!r}, not 'zeros'"
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
        return "it keeps no running statistics"
    return ""


def _conv(widths: Widths, node: Node, x: Channels) -> Channels:
    conv = node.module
    assert isinstance(conv, nn.Conv2d)
    if conv.groups == conv.in_channels == conv.out_channels > 1:
        return x
    made = widths.new(node.path, conv.out_channels)
    if conv.groups > 1:
        if conv.in_channels == conv.out_channels and len(x) == 1:
            widths.join(x, made, node.path)
            group = widths.group(made[0])
            group.unit = math.lcm(group.unit, conv.in_channels // conv.groups)
        else:
            widths.freeze((*x, *made), f"{node.path!r} has {conv.groups} groups of unequal input and output")
    return made


def _layer(widths: Widths, node: Node, x: Channels) -> Channels:
    module = node.module
    assert module is not None
    known = widths.layers.get(module)
    if known is not None:  # called before: what it reads there and here changes together
        widths.join(known.inputs, x, node.path)
        return known.outputs
    if isinstance(module, nn.Conv2d):
        made = _conv(widths, node, x)
    elif isinstance(module, nn.Linear):
        made = widths.new(node.path, module.out_features)
    else:
        made = x
    if reason := obstacle(module):
        widths.freeze((*x, *made), f"{node.path!r} has no elastic form: {reason}")
    widths.layers[module] = Layer(node, x, made)
    return made


def _flatten(widths: Widths, node: Node, x: Channels) -> Channels:
    pixels = math.prod(node.inputs[0].shape[1:])
    return tuple(Segment(one.group, one.repeat * pixels) for one in x)


def _combine(widths: Widths, node: Node, *inputs: Channels) -> Channels:
    first, *others = inputs
    for source, other in zip(node.inputs[1:], others, strict=True):
        if source.shape[:1] == node.inputs[0].shape[:1] and source.inputs:
            widths.join(first, other, node.path)
        else:
            widths.freeze((*first, *other), f"{node.path!r} combines tensors of unequal channels")
    return first


def _concat(widths: Widths, node: Node, *inputs: Channels) -> Channels:
    return tuple(segment for channels in inputs for segment in channels)


def _same(widths: Widths, node: Node, *inputs: Channels) -> Channels:
    return inputs[0]


def _barrier(widths: Widths, node: Node, *inputs: Channels) -> Channels:
    """An operation through which channels are not followed."""
    what = type(node.module).__name__ if node.module is not None else node.attributes.get("call", node.kind)
    reason = f"{what} at {node.path!r} reads it, through which widths are not followed"
    for channels in inputs:
        widths.freeze(channels, reason)
    if isinstance(node.module, (nn.Conv2d, nn.Linear)):
        widths.passed_over.append((node, obstacle(node.module) or "its features are those of tokens, not channels"))
    return widths.new(node.path, node.shape[0] if node.shape else 1, reason)


_KEEP = (
    "relu", "relu6", "unary", "scale", "identity", "avg_pool", "max_pool", "upsample", "slice", "pad",
)  # fmt: skip

_RULES: dict[str, Callable[..., Channels]] = {
    "conv": _layer, "linear": _layer, "norm": _layer, "reshape": _flatten, "concat": _concat,
    **dict.fromkeys(("add", "sub", "mul"), _combine), **dict.fromkeys(_KEEP, _same),
}  # fmt: skip


def _keeps_channels(node: Node) -> bool:
    """Whether a slice or a padding leaves the channels as they are."""
    slices, pads = node.attributes.get("slices"), node.attributes.get("pads")
    return bool(slices[0] == (None, None, 1) if slices else pads and pads[0] == (0, 0))


def _rule(node: Node) -> Callable[..., Channels]:
    # Features of tokens lie in the last dimension; followed are channels, in the first.
    tokens = node.kind in {"linear", "concat"} and len(node.shape) not in ((1,) if node.kind == "linear" else (1, 3))
    if tokens or (node.kind == "concat" and node.attributes.get("dim", 0)):
        return _barrier
    if node.kind in {"slice", "pad"} and not _keeps_channels(node):
        return _barrier
    return _RULES.get(node.kind, _barrier)


def follow_channels(graph: Graph) -> Widths:
    """The groups of widths of a plain traced network."""
    widths = Widths()
    found: dict[Node, Channels] = {}
    for node in graph.nodes:
        if node.kind == "input":
            found[node] = widths.new(node.path, node.shape[0] if node.shape else 1, "it is the network's input")
        elif not node.inputs:
            found[node] = widths.new(node.path, node.shape[0] if node.shape else 1, "it is a parameter or a constant")
        else:
            found[node] = _rule(node)(widths, node, *(found[source] for source in node.inputs))
    widths.freeze(found[graph.output], "it is the network's output")
    return widths

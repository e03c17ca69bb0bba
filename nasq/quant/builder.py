"""From a network to its quantized form: finding producers and giving them their quantizers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from nasq.elastic.base import Container, share_active
from nasq.elastic.flow import check_sizes
from nasq.elastic.graph import Graph, Node
from nasq.elastic.read import read_space
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.quant.calibration import guess_weight
from nasq.quant.forms import WeightForm
from nasq.quant.layers import AnyLayer, AnyNorm, Unit, full_weight
from nasq.quant.network import QuantGraph, QuantizedNetwork, Step
from nasq.quant.passing import Clip, Flatten, MaxPool, Same
from nasq.quant.producers import (
    Activation,
    AddProducer,
    AvgPoolProducer,
    ConcatProducer,
    InputProducer,
    LayerProducer,
)
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from nasq.space import Choice
from nasq.targets import Removal, Target, load

__all__ = ["quantize"]

Bits = Sequence[int] | Choice
_SINGLE: tuple[int, ...] = (8,)


@dataclass
class _Plan:
    """The decisions of one call, shared by all parts of the network."""

    weight_bits: Bits
    activation_bits: Bits
    granularity: Sequence[str]
    weight_symmetry: Sequence[str]
    activation_symmetry: Sequence[str]
    pinned_weights: set[Node] = field(default_factory=set)
    pinned_outputs: set[Node] = field(default_factory=set)
    pinned_bits: tuple[int, ...] = _SINGLE
    weights: dict[int, WeightQuantizer] = field(default_factory=dict)


def _first_layers(graph: Graph) -> set[Node]:
    """The layers that read the network's input, also those at the beginning of containers."""
    reached = set(graph.inputs)
    found: set[Node] = set()
    for node in graph.nodes:
        if not reached.intersection(node.inputs):
            continue
        if node.kind in {"conv", "linear"}:
            found.add(node)
        elif node.kind == "container":
            for part in node.parts:
                found |= _first_layers(part)
        else:
            reached.add(node)
    return found


def _makers(node: Node) -> set[Node]:
    """The nodes whose quantized tensor ``node``'s value is, through whatever keeps the grid, into containers."""
    if node.kind == "container":
        made = {maker for part in node.parts for maker in _makers(part.output)}
        return made | _makers(node.inputs[0])
    if node.kind in {"reshape", "identity", "max_pool", "relu", "relu6", "norm"} and node.inputs:
        return {node} | _makers(node.inputs[0])
    return {node}


def _pin(graph: Graph, plan: _Plan) -> None:
    """First and last layer keep their bits: their weights, the last one's input and the network's output."""
    plan.pinned_weights |= _first_layers(graph)
    last = _makers(graph.output)
    plan.pinned_outputs |= last
    for node in [node for node in last if node.kind in {"conv", "linear"}]:
        plan.pinned_weights.add(node)
        for source in node.inputs:
            plan.pinned_outputs |= _makers(source)


class _Builder:
    """Builds the quantized form of one traced module."""

    def __init__(self, module: nn.Module, graph: Graph, plan: _Plan, root: bool) -> None:
        self.plan, self.graph, self.module = plan, graph, module
        self.made: QuantGraph = (QuantizedNetwork if root else QuantGraph)(module, graph)
        self.place: dict[Node, int] = {node: index for index, node in enumerate(graph.inputs)}
        self.nonnegative: set[Node] = set()
        self.absorbed: set[Node] = set()

    def step(self, target: str, inputs: Iterable[int]) -> int:
        self.made.steps.append(Step(target, tuple(inputs)))
        return len(self.graph.inputs) + len(self.made.steps) - 1

    def add(self, node: Node, producer: nn.Module, inputs: Iterable[Node]) -> int:
        name = node.name
        assert name not in self.made.quantization
        self.made.quantization[name] = producer
        node.attributes["producer"] = producer
        return self.step(f"quantization.{name}", [self.place[source] for source in inputs])

    def only_user(self, node: Node) -> Node | None:
        users = self.graph.users(node)
        return users[0] if len(users) == 1 and node is not self.graph.output else None

    def follow(self, node: Node, kinds: set[str]) -> Node | None:
        """The only consumer of ``node`` if it is of one of ``kinds``; it becomes part of ``node``'s producer."""
        user = self.only_user(node)
        if user is None or user.kind not in kinds:
            return None
        self.absorbed.add(user)
        return user

    def activation_behind(self, node: Node) -> tuple[Activation, Node]:
        user = self.follow(node, {"relu", "relu6"})
        return (cast(Activation, user.kind), user) if user is not None else ("none", node)

    def quantizer(self, node: Node, end: Node, activation: Activation, nonnegative: bool) -> ActivationQuantizer:
        signed = activation == "none" and not nonnegative
        if not signed:
            self.nonnegative.add(end)
        pinned = node in self.plan.pinned_outputs or end in self.plan.pinned_outputs
        bits: Bits = self.plan.pinned_bits if pinned else self.plan.activation_bits
        return ActivationQuantizer(node.path, signed, bits, self.plan.activation_symmetry)

    def weight_quantizer(self, node: Node, layer: AnyLayer) -> WeightQuantizer:
        # A weight quantizer belongs to the module: a layer that is called twice has one.
        pinned = node in self.plan.pinned_weights
        node.attributes["pinned"] = pinned
        if id(layer) not in self.plan.weights:
            weight = full_weight(layer)
            quantizer = WeightQuantizer(
                node.path,
                weight.shape[0],
                self.plan.pinned_bits if pinned else self.plan.weight_bits,
                self.plan.granularity,
                self.plan.weight_symmetry,
            )
            guess_weight(quantizer, weight)
            self.plan.weights[id(layer)] = quantizer
        return self.plan.weights[id(layer)]

    def layer(self, node: Node) -> Node:
        """A convolution or linear layer with the BatchNorm and activation behind it; returns the last node absorbed."""
        layer = cast(AnyLayer, node.module)
        norm_node = self.follow(node, {"norm"})
        activation, end = self.activation_behind(norm_node or node)
        norm = None if norm_node is None else cast(AnyNorm, norm_node.module)
        quantizer = self.quantizer(node, end, activation, False)
        producer = LayerProducer(node.path, layer, norm, activation, self.weight_quantizer(node, layer), quantizer)
        self.place[end] = self.add(node, producer, node.inputs)
        return end

    def norm(self, node: Node) -> Node:
        """A BatchNorm with no layer before it: a depthwise convolution by one."""
        activation, end = self.activation_behind(node)
        unit = WeightForm(None, 2, True)
        unit.log_step.requires_grad_(False)
        quantizer = self.quantizer(node, end, activation, False)
        producer = LayerProducer(node.path, Unit(), cast(AnyNorm, node.module), activation, unit, quantizer)
        self.place[end] = self.add(node, producer, node.inputs)
        return end

    def combine(self, node: Node) -> Node:
        """A sum, average pool or concatenation."""
        activation, end = self.activation_behind(node)
        nonnegative = all(source in self.nonnegative for source in node.inputs)
        quantizer = self.quantizer(node, end, activation, nonnegative)
        producer: nn.Module
        if node.kind == "add":
            producer = AddProducer(node.path, quantizer, activation)
        elif node.kind == "concat":
            producer = ConcatProducer(node.path, quantizer, activation)
        else:
            kernel = node.attributes["kernel"]
            window = None if kernel is None else (kernel, node.attributes["stride"])
            squeeze = bool(node.attributes.get("squeeze"))
            producer = AvgPoolProducer(node.path, quantizer, activation, window, squeeze)
        self.place[end] = self.add(node, producer, node.inputs)
        return end

    def passing(self, node: Node) -> Node:
        """What keeps its input's grid."""
        source = node.inputs[0]
        kept: nn.Module
        if node.kind == "max_pool":
            window = {key: node.attributes[key] for key in ("kernel", "stride", "padding")}
            kept = MaxPool(node.path, **window)
        elif node.kind == "reshape":
            kept = Flatten(node.path)
        elif node.kind == "identity":
            kept = Same(node.module)
        else:
            kept = Clip(node.path, cast(Activation, node.kind))
            self.nonnegative.add(node)
        if source in self.nonnegative:
            self.nonnegative.add(node)
        self.place[node] = self.add(node, kept, node.inputs)
        return node

    def container(self, node: Node) -> Node:
        """A container around the quantized forms of its parts, in the container's own place."""
        container = cast(Container, node.module)
        quantized, positive = _quantize_parts(container, node, self.plan, node.inputs[0] in self.nonnegative)
        if positive:
            self.nonnegative.add(node)
        target = node.attributes["call"] if container is not self.module else "layer"
        self.made.set_submodule(target, quantized)
        self.place[node] = self.step(target, [self.place[source] for source in node.inputs])
        return node

    def build(self, nonnegative_input: bool) -> tuple[QuantGraph, bool]:
        """The quantized form, and whether its output is never negative."""
        if nonnegative_input:
            self.nonnegative.update(self.graph.inputs)
        for node in self.graph.nodes:
            if node in self.place or node in self.absorbed:
                continue
            if node.module is self.module:
                self.made = _leaf_graph(self.made, self.module)
            if node.kind in {"conv", "linear"}:
                self.layer(node)
            elif node.kind == "norm":
                self.norm(node)
            elif node.kind in {"add", "avg_pool", "concat"}:
                self.combine(node)
            elif node.kind == "container":
                self.container(node)
            elif node.kind == "other":
                raise _unsupported(node)
            else:
                self.passing(node)
        self.made.output = self.place[self.graph.output]
        return self.made, self.graph.output in self.nonnegative


def _leaf_graph(made: QuantGraph, leaf: nn.Module) -> QuantGraph:
    """A part that is a single layer has no children to take over: the layer itself becomes the child ``layer``."""
    fresh = type(made)(nn.Module(), made.graph)
    fresh.add_module("layer", leaf)
    return fresh


def _unsupported(node: Node) -> InputError:
    what = type(node.module).__name__ if node.module is not None else node.attributes["call"]
    return InputError(
        f"{what} at {node.path!r} has no integer form yet. Supported: Conv2d, Linear, BatchNorm2d, ReLU, ReLU6, sums and "
        "concatenations (dim 1) of two tensors, MaxPool2d, AvgPool2d and global average pooling without padding, "
        "flatten, Dropout, OneOf, Repeat. Replace it, or leave the part out of quantization."
    )


def _quantize_parts(container: Container, node: Node, plan: _Plan, nonnegative: bool) -> tuple[Container, bool]:
    parts: list[nn.Module] = []
    signs: list[bool] = []
    for (_, part), graph in zip(container.parts(), node.parts, strict=True):
        if isinstance(part, Container):
            inner: tuple[nn.Module, bool] = _quantize_parts(part, graph.output, plan, nonnegative)
        else:
            inner = _Builder(part, graph, plan, root=False).build(nonnegative)
        parts.append(inner[0])
        signs.append(inner[1])
        if container.layout == "chain":
            nonnegative = inner[1]
    # A chain may be left after any block.
    return container.with_parts(parts), all(signs)


def _allowed(
    target: Target, feature: str, options: Bits | Sequence[str], removed: list[Removal]
) -> Bits | Sequence[str]:
    if isinstance(options, Choice):
        kept, gone = target.allow(feature, options.options)
        if gone:
            raise InputError(
                f"the choice {options.name!r} has an option that target {target.name!r} refuses: {gone[0]}"
            )
        return options
    kept, gone = target.allow(feature, tuple(options))
    removed.extend(gone)
    return cast("Sequence[int] | Sequence[str]", kept)


def _with_input(graph: Graph, network: QuantizedNetwork) -> None:
    """Puts the quantizer of the network's input in front."""
    quantizer = ActivationQuantizer("input", True, _SINGLE, ("asymmetric",))
    network.quantization["input"] = InputProducer("input", quantizer, "none")
    shifted = [Step(step.target, tuple(index + 1 for index in step.inputs)) for step in network.steps]
    network.steps = [Step("quantization.input", (0,)), *shifted]
    network.output += 1


def _check_same(original: nn.Module, network: QuantizedNetwork, example: Tensor) -> None:
    """The traced form computes what the module computes, for other subnets and another batch size."""
    space = read_space(original)
    real, traced = share_active(original), share_active(network)
    noise = torch.randn(3, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
    original.eval()
    network.eval()
    rows = space.sample_batch(2, torch.Generator().manual_seed(0))
    for subnet in [space.smallest(), space.largest(), *space.to_subnets(rows)]:
        for active in (real, traced):
            active.clear()
            active.update(subnet)
        with torch.no_grad():
            wanted, found = original(noise), network(noise, mode="float")
        if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise InputError(
                f"the traced form of {type(original).__name__} does not compute what the module computes for the subnet "
                f"{subnet.to_json()[:200]}: its forward depends on a size that holds a choice, or on values. Use flatten "
                "instead of view with fixed sizes, and OneOf or Repeat instead of Python conditions."
            )
    network.train(True)


def quantize(
    module: nn.Module,
    example: Tensor,
    target: str | Target = "onnxruntime-cpu",
    *,
    weight_bits: Bits = tuple(range(2, 9)),
    activation_bits: Bits = tuple(range(2, 9)),
    weight_granularity: Sequence[str] = ("channel",),
    weight_symmetry: Sequence[str] = ("symmetric",),
    activation_symmetry: Sequence[str] = ("symmetric",),
    first_last_bits: int | None = 8,
) -> QuantizedNetwork:
    """The quantized form of a network: a copy in which every tensor has a quantizer, and bits are choices.

    Weight quantizers belong to layers, activation quantizers to the tensors that operations make. Convolution (or
    linear), BatchNorm and activation are one operation. Choices are named after the layer: ``<path>.weight_bits``,
    ``<path>.activation_bits``, and so on; pass a :class:`nasq.Choice` instead of options to tie all layers to it. An
    option that the target does not run is removed, with its reason in ``removed``.

    Args:
        module: Any network of supported operations, with or without choices of its own; left as it is.
        example: An input ``[N, ...]``; its shape matters, and that the network runs on it.
        target: Name of a target, or a target.
        weight_bits, activation_bits: Options in 2..8, ascending.
        weight_granularity: Options among ``"tensor"`` and ``"channel"`` step sizes.
        weight_symmetry, activation_symmetry: Options among ``"symmetric"`` and ``"asymmetric"``.
        first_last_bits: Bits of the first and last layer's weights, of the last one's input and of the network's
            output; ``None`` makes them choices as well. The network's input has 8 bits.

    Returns:
        A network whose step sizes fit its weights; run :func:`nasq.quant.calibrate` on real inputs before training
        or evaluating it.

    Raises:
        InputError: An operation has no integer form (named with its path), sizes disagree (both layers named), bits are
            outside 2..8, or the forward cannot be traced.
        TargetError: The target allows none of the options.
    """
    chosen = load(target) if isinstance(target, str) else target
    removed: list[Removal] = []
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        options = bits.options if isinstance(bits, Choice) else bits
        if not options or any(not isinstance(b, int) or isinstance(b, bool) or not 2 <= b <= 8 for b in options):
            raise InputError(f"{name} are {list(options)}; allowed are whole numbers from 2 to 8.")
    plan = _Plan(
        cast(Bits, _allowed(chosen, "weight_bits", weight_bits, removed)),
        cast(Bits, _allowed(chosen, "activation_bits", activation_bits, removed)),
        cast("Sequence[str]", _allowed(chosen, "weight_granularity", weight_granularity, removed)),
        cast("Sequence[str]", _allowed(chosen, "weight_symmetry", weight_symmetry, removed)),
        cast("Sequence[str]", _allowed(chosen, "activation_symmetry", activation_symmetry, removed)),
    )
    original = copy.deepcopy(module)
    copied = copy.deepcopy(module)
    graph = trace(copied, example)
    check_sizes(graph, read_space(copied))
    if first_last_bits is not None:
        plan.pinned_bits = (first_last_bits,)
        _pin(graph, plan)
    network, _ = _Builder(copied, graph, plan, root=True).build(nonnegative_input=False)
    assert isinstance(network, QuantizedNetwork)
    _with_input(graph, network)
    network.target, network.removed, network.example_shape = chosen, tuple(removed), tuple(example.shape[1:])
    _check_same(original, network, example)
    share_active(network)
    return network

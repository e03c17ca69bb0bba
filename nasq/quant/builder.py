"""From a network to its quantized form: finding producers and giving them their quantizers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from nasq.elastic.base import Container, share_active
from nasq.elastic.flow import check_sizes
from nasq.elastic.graph import Graph, Node
from nasq.elastic.read import read_space
from nasq.elastic.trace import trace
from nasq.quant.calibration import guess_weight
from nasq.quant.checks import check_same, check_supported
from nasq.quant.forms import WeightForm
from nasq.quant.layers import AnyLayer, AnyNorm, Unit, full_weight
from nasq.quant.network import QuantGraph, QuantizedNetwork, Step, Wiring
from nasq.quant.options import Bits, Kinds, Plan
from nasq.quant.pinning import exits, first_and_last
from nasq.quant.powers import use_powers_of_two
from nasq.quant.producers import Activation, InputProducer, LayerProducer
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from nasq.quant.recipes import RECIPES, unsupported
from nasq.quant.residual import separate_sums
from nasq.space import Choice
from nasq.targets import Target, load

__all__ = ["quantize"]


class Builder:
    """Builds the quantized form of one traced module."""

    def __init__(self, module: nn.Module, graph: Graph, plan: Plan, root: bool) -> None:
        self.plan, self.graph, self.module = plan, graph, module
        self.made: QuantGraph = (QuantizedNetwork if root else QuantGraph)(module, graph)
        self.place: dict[Node, int] = {node: index for index, node in enumerate(graph.inputs)}
        self.nonnegative: set[Node] = set()
        self.absorbed: set[Node] = set()
        # By the rule add="one": a sum, and the layer, its BatchNorm and the value that the sum adds before rounding.
        self.open: dict[Node, tuple[Node, Node | None, Node]] = {}

    def step(self, target: str, inputs: Iterable[Node]) -> int:
        steps = self.made.wiring.steps
        steps.append(Step(target, tuple(self.place[source] for source in inputs)))
        return len(self.graph.inputs) + len(steps) - 1

    def keep(self, node: Node, module: nn.Module) -> str:
        """Keeps what quantization adds for ``node``; returns where."""
        name = node.name
        while hasattr(self.made.quantization, name):
            name += "_"
        self.made.quantization[name] = module
        return f"quantization.{name}"

    def add(self, node: Node, producer: nn.Module, inputs: Iterable[Node]) -> int:
        node.attributes["producer"] = producer
        return self.step(self.keep(node, producer), inputs)

    def put(self, node: Node, module: nn.Module, end: Node | None = None, inputs: Sequence[Node] | None = None) -> Node:
        """Puts the module that stands for ``node``, and what follows it up to ``end``, into the network."""
        end = node if end is None else end
        self.place[end] = self.add(node, module, node.inputs if inputs is None else inputs)
        return end

    def only_user(self, node: Node) -> Node | None:
        users = self.graph.users(node)
        return users[0] if len(users) == 1 and node is not self.graph.output else None

    def follow(self, node: Node, kinds: set[str]) -> Node | None:
        """The only consumer of ``node`` if it is of one of ``kinds``; it becomes part of ``node``'s producer."""
        passed: list[Node] = []
        user = self.only_user(node)
        while user is not None and isinstance(user.module, nn.Identity):
            passed.append(user)
            user = self.only_user(user)
        if user is None or user.kind not in kinds:
            return None
        self.absorbed.update(passed, [user])
        return user

    def activation_behind(self, node: Node) -> tuple[Activation, Node]:
        user = self.follow(node, {"relu", "relu6"})
        return (cast(Activation, user.kind), user) if user is not None else ("none", node)

    def quantizer(
        self, node: Node, end: Node, activation: Activation, nonnegative: bool, symmetry: Kinds | None = None
    ) -> ActivationQuantizer:
        """The quantizer of the tensor that ``node`` makes and ``end`` hands on."""
        signed = activation == "none" and not nonnegative
        if not signed:
            self.nonnegative.add(end)
        bits = self.plan.bits(self.plan.activation_bits, node in self.plan.pinned.tensors, node.path)
        if node in self.plan.stream and self.plan.sum_bits is not None and node not in self.plan.pinned.tensors:
            bits = (self.plan.sum_bits,)
        if self.plan.target.container == "int8" and not signed:  # with zero-point 0 it holds 0..127
            options = bits.options if isinstance(bits, Choice) else bits
            bits = tuple(sorted({min(int(option), 7) for option in options}))
        return ActivationQuantizer(
            node.path, signed, bits, symmetry or self.plan.kinds(self.plan.activation_symmetry, node.path)
        )

    def weight_quantizer(self, node: Node, layer: AnyLayer) -> WeightQuantizer:
        # A weight quantizer belongs to the module: a layer that is called twice has one.
        plan = self.plan
        pinned = layer in plan.pinned.layers
        node.attributes["pinned"] = pinned
        if layer not in plan.weights:
            weight, bits = full_weight(layer), plan.bits(plan.weight_bits, pinned, node.path)
            linear, kinds = node.kind == "linear", plan.kinds(plan.weight_symmetry, node.path)
            quantizer = WeightQuantizer(
                node.path,
                weight.shape[0],
                bits,
                plan.grains(node.path, linear),
                kinds,
                plan.released_gradient,
                weight.shape[1] if linear else None,
            )
            quantizer.belongs_to(layer)
            guess_weight(quantizer, weight)
            plan.weights[layer] = quantizer
        return plan.weights[layer]

    def layer(self, node: Node) -> Node:
        """A convolution or linear layer with the BatchNorm and activation behind it; returns the last node absorbed."""
        layer = cast(AnyLayer, node.module)
        norm_node = self.follow(node, {"norm"})
        if node.kind == "conv" and self.opens(node, norm_node):
            return norm_node or node
        activation, end = self.activation_behind(norm_node or node)
        norm = None if norm_node is None else cast(AnyNorm, norm_node.module)
        quantizer = self.quantizer(node, end, activation, False)
        producer = LayerProducer(node.path, layer, norm, activation, self.weight_quantizer(node, layer), quantizer)
        self.place[end] = self.add(node, producer, node.inputs)
        return end

    def opens(self, node: Node, norm: Node | None) -> bool:
        """Whether the target adds the layer's own numbers in the sum behind it, so that this sum makes the first tensor.

        Of two layers in front of a sum it is the one that is computed first; the other is the shortcut.
        """
        value, passed = norm or node, list[Node]()
        user = self.only_user(value)
        while user is not None and isinstance(user.module, nn.Identity):
            passed.append(user)
            value, user = user, self.only_user(user)
        if self.plan.target.add != "one" or user is None or user.kind != "add" or user in self.open:
            return False
        if user.inputs.count(value) != 1:
            return False
        self.absorbed.update(passed)
        self.open[user] = (node, norm, value)
        return True

    def layer_and_sum(self, node: Node) -> Node:
        """A sum with the layer in front of it, one producer; returns the last node absorbed."""
        layer_node, norm_node, value = self.open[node]
        layer = cast(AnyLayer, layer_node.module)
        activation, end = self.activation_behind(node)
        norm = None if norm_node is None else cast(AnyNorm, norm_node.module)
        weights, quantizer = self.weight_quantizer(layer_node, layer), self.quantizer(node, end, activation, False)
        producer = LayerProducer(layer_node.path, layer, norm, activation, weights, quantizer)
        layer_node.attributes["producer"] = producer
        shortcut = next(source for source in node.inputs if source is not value)
        return self.put(node, producer, end, (*layer_node.inputs, shortcut))

    def norm(self, node: Node) -> Node:
        """A BatchNorm with no layer before it: a depthwise convolution by one."""
        if len(node.shape) != 3:
            raise unsupported(node, "what it normalises is no map, and not a layer's output that it alone reads")
        activation, end = self.activation_behind(node)
        unit = WeightForm(None, 2, True)
        unit.log_step.requires_grad_(False)
        quantizer = self.quantizer(node, end, activation, False)
        producer = LayerProducer(node.path, Unit(), cast(AnyNorm, node.module), activation, unit, quantizer)
        self.place[end] = self.add(node, producer, node.inputs)
        return end

    def container(self, node: Node) -> Node:
        """A container around the quantized forms of its parts, in the container's own place."""
        container = cast(Container, node.module)
        signs = [source in self.nonnegative for source in node.inputs]
        quantized, positive = _quantize_parts(container, node, self.plan, signs)
        if positive:
            self.nonnegative.add(node)
        target = node.attributes["call"] if container is not self.module else "layer"
        if self.made.get_submodule(target) is container:
            self.made.set_submodule(target, quantized)
        else:
            # Its place is taken by another call, whose tensors have quantizers of their own.
            target = self.keep(node, quantized)
        self.place[node] = self.step(target, node.inputs)
        return node

    def build(self, nonnegative_inputs: Sequence[bool]) -> tuple[QuantGraph, bool]:
        """The quantized form, and whether its output is never negative."""
        flags = zip(self.graph.inputs, nonnegative_inputs, strict=True)
        self.nonnegative.update(node for node, nonnegative in flags if nonnegative)
        for node in self.graph.nodes:
            if node in self.place or node in self.absorbed or node.kind == "other":
                continue
            if node.module is self.module:
                self.made = _leaf_graph(self.made, self.module)
            self.plan.check_operator(node)
            self.one(node)
        self.made.wiring.output = self.place[self.graph.output]
        return self.made, self.graph.output in self.nonnegative

    def one(self, node: Node) -> Node:
        """Gives a node its quantized form; returns the last node that this stands for."""
        if node.kind in {"conv", "linear"}:
            return self.layer(node)
        if node.kind == "norm":
            return self.norm(node)
        return self.container(node) if node.kind == "container" else RECIPES[node.kind](self, node)


def _leaf_graph(made: QuantGraph, leaf: nn.Module) -> QuantGraph:
    """A part that is a single layer has no children to take over: the layer itself becomes the child ``layer``."""
    fresh = type(made)(nn.Module(), made.graph)
    fresh.hold_leaf(leaf)
    return fresh


def _quantize_parts(container: Container, node: Node, plan: Plan, signs: Sequence[bool]) -> tuple[Container, bool]:
    """The container around its quantized parts, and whether its output is never negative, whatever is active.

    Args:
        signs: Whether each of its inputs is never negative.
    """
    parts: list[nn.Module] = []
    found: list[bool] = [signs[0]]
    for index, ((_, part), graph) in enumerate(zip(container.parts(), node.parts, strict=True)):
        given = found[-1:] if container.layout == "chain" else container.inputs_of(index, signs)
        if isinstance(part, Container):
            made: tuple[nn.Module, bool] = _quantize_parts(part, graph.output, plan, given)
        else:
            made = Builder(part, graph, plan, root=False).build(given)
        parts.append(made[0])
        found.append(made[1])
    quantized = container.with_parts(parts)
    left = found[1:] if container.layout == "parallel" else [found[count] for count in exits(container)]
    # The traced form then refers to what runs, and to nothing that is not part of the network.
    node.module = quantized
    return quantized, all(left)


def _with_input(network: QuantizedNetwork, target: Target) -> None:
    """Puts the quantizer of the network's input in front."""
    symmetry = "symmetric" if target.container == "int8" else "asymmetric"
    quantizer = ActivationQuantizer("input", True, (8,), (symmetry,))
    assert "input" not in network.quantization
    network.quantization["input"] = InputProducer("input", quantizer, "none")
    shifted = [Step(step.target, tuple(index + 1 for index in step.inputs)) for step in network.wiring.steps]
    network.wiring = Wiring([Step("quantization.input", (0,)), *shifted], network.wiring.output + 1)


def _build(module: nn.Module, example: Tensor, plan: Plan) -> QuantizedNetwork:
    """The quantized form around the layers of ``module``, not yet compared with it."""
    graph = trace(module, example)
    check_supported(graph)
    check_sizes(graph, read_space(module))
    plan.pinned = first_and_last(graph)
    if plan.sum_bits is not None:
        plan.stream = separate_sums(graph, plan.pinned)
    network, _ = Builder(module, graph, plan, root=True).build([False])
    assert isinstance(network, QuantizedNetwork)
    plan.check_patterns()
    _with_input(network, plan.target)
    network.target, network.removed = plan.target, tuple(plan.removed)
    network.example_shape = tuple(example.shape[1:])
    return network


def quantize(
    module: nn.Module,
    example: Tensor,
    target: str | Target = "onnxruntime-cpu",
    *,
    weight_bits: Bits = tuple(range(2, 9)),
    activation_bits: Bits = tuple(range(2, 9)),
    weight_granularity: Kinds = ("channel",),
    weight_symmetry: Kinds = ("symmetric",),
    activation_symmetry: Kinds = ("symmetric",),
    first_last_bits: int | None = 8,
    sum_bits: int | None = None,
    where: Sequence[str] | None = None,
    released_gradient: bool = False,
    power_of_two_steps: bool = False,
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
        weight_bits, activation_bits: Options in 1..16; the target says which of them it runs (2..8).
        weight_granularity: Options among ``"tensor"``, ``"channel"`` and ``"group<g>"``: one step size for the tensor, for
            each output channel, or for each ``g`` neighbouring inputs of an output (``"group32"``; linear layers only:
            convolutions keep the other options).
        weight_symmetry, activation_symmetry: Options among ``"symmetric"`` and ``"asymmetric"``.
        first_last_bits: Bits of the first and last layers' weights, of the last ones' input and of the network's
            output; ``None`` makes them choices as well. The network's input has 8 bits.
        sum_bits: Bits of the residual stream, the tensors that sums read and make; what a convolution reads of it is
            requantized, with bits that are the choice ``<path>.input.activation_bits``. ``None``: the stream's bits are
            choices as all others, and convolutions read it as it is.
        where: Patterns (as of file names: ``"layer3.*"``) of the paths of layers and tensors that have choices; all others
            have the largest of the bits and the first of each other option. ``None``: all have.
        released_gradient: Whether gradients of per-channel steps are scaled as in EQ-Net's released code instead of by
            LSQ's rule (:func:`nasq.quant.fake.released_scale`).
        power_of_two_steps: Whether the scales that the file holds, those of tensors and of weights (BatchNorm included), are
            powers of two (:mod:`nasq.quant.powers`): then no two runtimes round a sum differently, at some accuracy.

    Returns:
        A network whose step sizes fit its weights; run :func:`nasq.quant.calibrate` on real inputs before training
        or evaluating it.

    Raises:
        InputError: An operation has no integer form (named with its path), sizes disagree (both layers named), bits are
            outside 1..16, a pattern fits nothing, or the forward cannot be traced.
        TargetError: The target allows none of the options, or lacks an operation (named with its path).
    """
    plan = Plan(
        load(target) if isinstance(target, str) else target, weight_bits, activation_bits, weight_granularity,
        weight_symmetry, activation_symmetry, first_last_bits, sum_bits, where, released_gradient,
    )  # fmt: skip
    original = copy.deepcopy(module)
    network = _build(copy.deepcopy(module), example, plan)
    if power_of_two_steps:
        use_powers_of_two(network)
    check_same(original, network, example)
    share_active(network)
    return network

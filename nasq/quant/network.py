"""Quantized networks: the steps of a traced graph, run on values that carry their grid and mode."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nasq.elastic.base import Condition, Container, ElasticModule, elastic_modules, evaluating, share_active
from nasq.elastic.graph import Graph, Node
from nasq.elastic.read import read_space
from nasq.errors import InputError
from nasq.quant.producers import start
from nasq.quant.program import Op, Program
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from nasq.quant.value import Mode, Recorder, Value
from nasq.space import Option, SpaceRules
from nasq.targets import Removal, Target

__all__ = ["QuantGraph", "QuantizedNetwork", "Step", "Wiring", "calibrate", "freeze"]


@dataclass(frozen=True)
class Step:
    """One step: which submodule runs on which earlier values (0.. are the inputs, then one value per step)."""

    target: str
    inputs: tuple[int, ...]


@dataclass
class Wiring:
    """The steps of a network in order, and the place of the value it returns."""

    steps: list[Step] = field(default_factory=list)
    output: int = 0


class QuantGraph(nn.Module):
    """A traced module in quantized form.

    It takes over the children of the module it stands for, under their names, so that the names of their parameters
    survive; what quantization adds lies in ``quantization``.

    Attributes:
        wiring: What runs, in order.
        graph: The traced form, for the cost model; empty after extraction.
    """

    own: ClassVar[tuple[str, ...]] = ("quantization", "wiring", "graph")
    """Names that no attribute of the original may have."""

    def __init__(self, original: nn.Module, graph: Graph) -> None:
        super().__init__()
        parameters = dict(original.named_parameters(recurse=False))
        buffers, children = dict(original.named_buffers(recurse=False)), dict(original.named_children())
        for name in (*parameters, *buffers, *children):
            if name in self.own or hasattr(type(self), name):
                raise InputError(
                    f"{type(original).__name__} has an attribute {name!r}, a name that its quantized form needs for "
                    "itself. Rename it."
                )
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        for name, child in children.items():
            self.add_module(name, child)
        self.quantization = nn.ModuleDict()
        self.wiring = Wiring()
        self.graph = graph
        rules = getattr(original, "space_rules", None)
        self._rules: SpaceRules | None = rules() if callable(rules) else None

    def space_rules(self) -> SpaceRules | None:
        """The rules of the module it stands for."""
        return self._rules

    def hold_leaf(self, layer: nn.Module) -> None:
        """Stands for a single layer, which becomes the child ``layer``; its state keeps the names it has alone."""
        self.add_module("layer", layer)
        self.register_state_dict_post_hook(_without_layer)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_layer)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantGraph:
        # Extraction is a copy for which plain modules stand in for elastic ones. The traced form refers to the layers of
        # all subnets: there it stays behind.
        elastic = [module for module in self.modules() if isinstance(module, ElasticModule)]
        if any(not isinstance(memo.get(id(module), module), ElasticModule) for module in elastic):
            memo[id(self.graph)] = Graph([], Node("other", "extracted", "", (), ()))
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        for key, value in self.__dict__.items():
            made.__dict__[key] = copy.deepcopy(value, memo)
        return made

    def forward(self, *inputs: Value) -> Value:
        """Runs the steps."""
        values = list(inputs)
        for step in self.wiring.steps:
            values.append(self.get_submodule(step.target)(*(values[index] for index in step.inputs)))
        return values[self.wiring.output]


def _without_layer(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    inner = f"{prefix}layer."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _with_layer(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in module.get_submodule("layer").state_dict():
        if prefix + name in state:
            state[f"{prefix}layer.{name}"] = state.pop(prefix + name)


class QuantizedNetwork(QuantGraph):
    """A whole quantized network: real tensors in, real tensors out.

    ``forward`` computes in the fake form in training and in the integer form in evaluation; another mode can be passed.

    Attributes:
        target: Whose arithmetic this is.
        removed: The options the target does not allow, with the reasons.
        example_shape: Shape of one input, without the batch.
        calibrated: Whether step sizes were set by :func:`calibrate`, or loaded.
    """

    own = (*QuantGraph.own, "target", "removed", "example_shape", "calibrated")
    target: Target
    removed: tuple[Removal, ...]
    example_shape: tuple[int, ...]

    def __init__(self, original: nn.Module, graph: Graph) -> None:
        super().__init__(original, graph)
        self.calibrated = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.calibrated = self.calibrated or any(name.startswith(f"{prefix}quantization.") for name in state_dict)

    def run(self, x: Tensor, mode: Mode | None = None, recorder: Recorder | None = None) -> Value:
        """The output as a :class:`Value`: its integers and their grid in mode ``"integer"``.

        Raises:
            InputError: The network computes on grids that were never set.
        """
        mode = mode or ("fake" if self.training else "integer")
        if mode in {"fake", "integer"} and not self.calibrated:
            raise InputError(
                "the quantized network was never calibrated, so its step sizes mean nothing. Call "
                "nasq.quant.calibrate(network, images) with real inputs first, or load trained weights."
            )
        if mode == "integer":
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                return super().forward(start(x.float(), mode, recorder))
        return super().forward(start(x, mode, recorder))

    def forward(self, x: Tensor, mode: Mode | None = None) -> Tensor:  # type: ignore[override]
        """``[N, ...]`` to the network's real output.

        Args:
            x: Normalised inputs.
            mode: ``"float"``, ``"fake"``, ``"integer"``, ``"calibrate"``; by default what training or evaluation use.
        """
        return self.run(x, mode).real()

    def integers(self, x: Tensor) -> Tensor:
        """The final container integers, as uint8: what the exported file computes."""
        return self.run(x, "integer").data.to(torch.uint8)


def freeze(network: nn.Module, example: Tensor | None = None, meta: Mapping[str, object] | None = None) -> Program:
    """The active (or extracted) subnet as a flat integer program.

    Args:
        network: A quantized network, its active subnet being the one to freeze.
        example: One input ``[1, ...]``; only its shape matters.
        meta: Facts to keep with the program.

    Raises:
        InputError: The network is not quantized, or was never calibrated.
    """
    if not isinstance(network, QuantizedNetwork):
        raise InputError(
            f"{type(network).__name__} is not a quantized network. Pass it through nasq.quant.quantize first."
        )
    recorder = Recorder()
    device = next(network.parameters()).device
    x = torch.zeros(1, *network.example_shape, device=device) if example is None else example[:1]
    with evaluating(network):
        output = network.run(x, "integer", recorder)
    return Program(_needed(recorder.ops, output.name), network.target.name, network.target.add, dict(meta or {}))


def _needed(ops: list[Op], output: str) -> tuple[Op, ...]:
    """The operations that the output depends on: an active branch may ignore one of its inputs."""
    names, kept = {output}, list[Op]()
    for op in reversed(ops):
        if op.output.name in names:
            names.update(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))


def _parts_of(network: nn.Module) -> dict[str, Condition]:
    """The condition under which each quantizer runs, by its path."""
    found: dict[str, Condition] = {}

    def walk(module: nn.Module, path: str, condition: Condition) -> None:
        if isinstance(module, (WeightQuantizer, ActivationQuantizer)):
            found[path] = condition
        parts = module.parts() if isinstance(module, Container) else list(module.named_children())
        for index, (name, part) in enumerate(parts):
            inner = condition + module.condition(index) if isinstance(module, Container) else condition
            walk(part, f"{path}.{name}" if path else name, inner)

    walk(network, "", ())
    return found


def _reaching(condition: Condition) -> dict[str, Option] | None:
    """The options of the largest subnet that meets a condition; ``None`` where none does."""
    allowed: dict[str, frozenset[Option]] = {}
    for name, options in condition:
        allowed[name] = allowed.get(name, options) & options
    if not all(allowed.values()):
        return None
    # The last option allowed is the largest that reaches the part.
    return {name: max(options, key=_order) for name, options in allowed.items()}


@torch.no_grad()
def calibrate(network: QuantizedNetwork, x: Tensor) -> None:
    """Sets every step size, of every form of every tensor, from one batch ``[N, ...]`` of normalised inputs.

    The network runs in float: once as its largest subnet, then once for each part that no run before has reached, as
    the largest subnet that reaches it. Each tensor keeps the steps of the first run that makes it. A BatchNorm whose
    running statistics were never updated (they are 0 and 1, and nothing of the network's own) takes those of the batch,
    as training and :meth:`nasq.Supernet.recalibrate` will; it is left as it was.

    A tensor has one step per form for all subnets, those of other resolutions, widths and depths included, and what is
    found here is where training begins: the largest subnet alone says where. Other resolutions differ little: in a small
    MobileNetV3 the steps found at 24 pixels are 0.86 to 1.07 times those at 32, in the median 1.00.

    Raises:
        InputError: A tensor holds NaN or infinite values; names the layer that makes it.
    """
    conditions = _parts_of(network)
    quantizers = {path: network.get_submodule(path) for path in conditions}
    for quantizer in quantizers.values():
        quantizer.calibrated = False  # type: ignore[assignment]
    before = {id(module): (module, module.active) for _, module in elastic_modules(network)}
    active = share_active(network)
    largest = dict(read_space(network).largest())
    try:
        active.update(largest)
        with evaluating(network):
            network.run(x, "calibrate")
            for path, condition in conditions.items():
                options = _reaching(condition)
                if quantizers[path].calibrated or options is None:
                    continue
                active.clear()
                active.update({**largest, **options})
                network.run(x, "calibrate")
                assert quantizers[path].calibrated, path
        network.calibrated = True
    finally:
        for module, mapping in before.values():
            module.active = mapping


def _order(option: Option) -> tuple[bool, float, str]:
    return isinstance(option, str), 0.0 if isinstance(option, str) else float(option), str(option)

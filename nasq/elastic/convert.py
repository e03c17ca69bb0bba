"""``convert``: an existing network becomes elastic in width, kernel and depth, with the weights it has.

The network is traced and its channels are followed (:mod:`nasq.elastic.convert_channels`): layers that have to share a
width get one choice. The idea of such groups is that of structured pruning (Fang et al., DepGraph, 2023); here they become
choices, and nothing is removed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from nasq.elastic.base import Size, elastic_modules, evaluating
from nasq.elastic.convert_channels import Channels, Group, Layer, Widths, follow_channels
from nasq.elastic.convert_depth import Droppable, residual_runs
from nasq.elastic.convert_layers import elastic_conv, elastic_linear, elastic_norm
from nasq.elastic.flow import check_sizes
from nasq.elastic.read import read_space
from nasq.elastic.segments import Segments
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.space import Choice

__all__ = ["ConversionReport", "Skipped", "convert"]


@dataclass(frozen=True)
class Skipped:
    """A layer or block that stays as it is.

    Attributes:
        path: Where it is.
        what: ``"width"``, ``"kernel"`` or ``"depth"``.
        reason: Why.
    """

    path: str
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} keeps its {self.what}: {self.reason}"


@dataclass
class ConversionReport:
    """What :func:`convert` did.

    Attributes:
        widths, kernels, depths: The choices made, with the paths of the layers or blocks that follow each.
        skipped: The layers and blocks that could not be made elastic, with the reasons.
    """

    widths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kernels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    depths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


class _Converter:
    """One call of :func:`convert`."""

    def __init__(self, network: nn.Module, example: Tensor, round_to: int) -> None:
        self.network, self.example, self.round_to = network, example, round_to
        self.report = ConversionReport()
        self.widths: Widths = follow_channels(trace(network, example))
        self.choices: dict[int, Choice] = {}
        self.kernels: dict[nn.Module, Choice] = {}

    def skip(self, path: str, what: str, reason: str) -> None:
        self.report.skipped.append(Skipped(path, what, reason))

    # Widths

    def choose_widths(self, fractions: Sequence[float]) -> None:
        widths = self.widths
        for number, group in enumerate(widths.groups):
            if widths.root(number) != number:
                continue
            options = self._options(group, fractions)
            if not group.reason and len(options) < 2:
                group.reason = f"its {group.size} channels in multiples of {self._unit(group)} leave one width"
            if not group.reason:
                self.choices[number] = Choice(f"{group.path}.width", options)
        for layer in widths.layers.values():
            self._tell(layer)
        for node, reason in widths.passed_over:
            self.skip(node.path, "width", reason)

    def _unit(self, group: Group) -> int:
        """What the widths are multiples of: of ``round_to`` as far as the group's own unit allows."""
        return group.unit * max(1, self.round_to // group.unit)

    def _options(self, group: Group, fractions: Sequence[float]) -> tuple[int, ...]:
        unit = self._unit(group)
        rounded = {max(unit, round(group.size * fraction / unit) * unit) for fraction in fractions}
        return tuple(sorted({size for size in rounded if size < group.size} | {group.size}))

    def _tell(self, layer: Layer) -> None:
        if layer.node.kind == "norm":
            return
        for segment in layer.outputs:
            root = self.widths.root(segment.group)
            group, choice = self.widths.groups[root], self.choices.get(root)
            if choice is None:
                self.skip(layer.node.path, "width", group.reason)
            else:
                self.report.widths[choice.name] = (*self.report.widths.get(choice.name, ()), layer.node.path)

    def size(self, channels: Channels) -> Size:
        """A tensor's channels as an int or an expression of choices."""
        parts: list[Size] = []
        for segment in channels:
            root = self.widths.root(segment.group)
            one: Size = self.choices.get(root, self.widths.groups[root].size)
            parts.append(one * segment.repeat if segment.repeat > 1 else one)
        if all(isinstance(part, int) for part in parts):
            return sum(cast("list[int]", parts))
        return parts[0] if len(parts) == 1 else Segments(*parts)

    # Kernels

    def choose_kernels(self, allowed: Sequence[int] | None) -> None:
        for module, layer in self.widths.layers.items():
            if not isinstance(module, nn.Conv2d) or max(module.kernel_size) == 1:
                continue
            path, kernel = layer.node.path, module.kernel_size[0]
            smaller = (
                tuple(range(1, kernel, 2)) if allowed is None else tuple(sorted({k for k in allowed if k < kernel}))
            )
            reason = _uncroppable(module)
            if allowed is None and kernel > 3:
                smaller = tuple(option for option in smaller if option >= 3)
            if not reason and not smaller:
                reason = f"none of the sizes {list(allowed or ())} is smaller than its {kernel}"
            if reason:
                self.skip(path, "kernel", reason)
                continue
            choice = Choice(f"{path}.kernel", (*smaller, kernel))
            self.kernels[module] = choice
            self.report.kernels[choice.name] = (path,)
        for node, reason in self.widths.passed_over:
            if isinstance(node.module, nn.Conv2d) and max(node.module.kernel_size) > 1:
                self.skip(node.path, "kernel", reason)

    # Building

    def replace_layers(self) -> None:
        paths = [(path, module) for path, module in self.network.named_modules(remove_duplicate=False)]
        made: dict[nn.Module, nn.Module] = {}
        for path, module in paths:
            layer = self.widths.layers.get(module)
            if layer is None:
                continue
            if module not in made:
                made[module] = self._elastic(module, layer)
            if made[module] is not module:
                self.network.set_submodule(path, made[module])

    def _elastic(self, module: nn.Module, layer: Layer) -> nn.Module:
        inputs, outputs, kernel = self.size(layer.inputs), self.size(layer.outputs), self.kernels.get(module)
        if isinstance(inputs, int) and isinstance(outputs, int) and kernel is None:
            return module
        if isinstance(module, nn.Conv2d):
            groups: Size = module.groups
            if module.groups > 1:
                depthwise = module.groups == module.in_channels
                groups = outputs if depthwise else inputs // (module.in_channels // module.groups)
            return elastic_conv(module, inputs, outputs, groups, kernel)
        if isinstance(module, nn.Linear):
            return elastic_linear(module, inputs, outputs)
        return elastic_norm(cast(nn.BatchNorm2d, module), outputs)

    def droppable(self) -> None:
        """Finds the blocks that may be left out; called on the plain network."""
        self.runs, stays = residual_runs(self.network, self.example)
        for path, reason in stays:
            self.skip(path, "depth", reason)

    def wrap_blocks(self) -> None:
        for run in self.runs:
            depth = run.depth()
            if depth is None:
                self.skip(run.paths[0], "depth", "it is the only block of its stage")
                continue
            first = max(cast("tuple[int, ...]", depth.options)) - len(run.paths)
            for index, path in enumerate(run.paths):
                if first + index < min(cast("tuple[int, ...]", depth.options)):
                    continue  # a depth below it is no option
                self.network.set_submodule(path, Droppable(self.network.get_submodule(path), depth, first + index))
            self.report.depths[depth.name] = run.paths


def _uncroppable(conv: nn.Conv2d) -> str:
    rows, columns = conv.kernel_size
    if rows != columns:
        return f"its kernel {conv.kernel_size} is not square"
    if rows % 2 == 0:
        return f"its kernel {rows} is even, so it has no centre"
    wanted = tuple(dilation * (rows - 1) // 2 for dilation in conv.dilation)
    if isinstance(conv.padding, str) or tuple(conv.padding) != wanted:
        return f"its padding {conv.padding!r} is not half the kernel, {wanted}: a smaller one would give another size"
    if conv.padding_mode != "zeros" or conv.stride[0] != conv.stride[1] or conv.dilation[0] != conv.dilation[1]:
        return "its stride, dilation or padding has no elastic form"
    return ""


def _check_arguments(model: nn.Module, width: Sequence[float], round_to: int) -> None:
    for path, module in elastic_modules(model):
        raise InputError(
            f"the network is elastic already, at {path!r} ({type(module).__name__}). convert() takes a plain network."
        )
    for fraction in width:
        if not 0 < fraction <= 1:
            raise InputError(
                f"the width {fraction!r} is no fraction of the original's: allowed is more than 0 up to 1."
            )
    if round_to < 1:
        raise InputError(f"round_to is {round_to!r}; widths are multiples of a whole number from 1.")


def _check_kernels(kernel: bool | Sequence[int]) -> Sequence[int] | None:
    if isinstance(kernel, bool):
        return None
    for size in kernel:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0:
            raise InputError(f"the kernel {size!r} is no odd whole number. Give sizes such as (3, 5, 7).")
    return kernel


def convert(
    model: nn.Module,
    example: Tensor,
    *,
    width: Sequence[float] = (),
    kernel: bool | Sequence[int] = False,
    depth: bool = False,
    round_to: int = 8,
) -> nn.Module:
    """An elastic copy of a plain network, with its weights; its largest subnet equals the original bit for bit.

    Args:
        model: A convolutional network of torchvision, of timm, or your own, that nasq can trace; left as it is.
        example: An input ``[N, C, H, W]``.
        width: Fractions of the original widths that are to be options beside it, such as ``(0.5, 0.75)``. Layers that
            have to agree (residual sums, depthwise convolutions, products) share one choice, ``<first layer>.width``.
        kernel: Sizes that are to be options of larger square kernels, as their centre crops; ``True``: all odd sizes
            from 3 (1 below a 3). Choices are ``<layer>.kernel``.
        depth: Whether residual blocks whose input and output agree may be left out, the last ones of a stage first.
            Choices are ``<stage>.depth``: the number of blocks of that class that run.
        round_to: Widths are multiples of it, so that kernels of the runtime stay fast; groups of a grouped
            convolution stay whole.

    Returns:
        The elastic network. Its attribute ``report`` is a :class:`ConversionReport`: the choices, and every layer that
        keeps its width or kernel and every block that stays, by path and with the reason.

    Raises:
        InputError: The network cannot be traced, holds choices already, or an argument is outside its range.
    """
    _check_arguments(model, width, round_to)
    allowed = _check_kernels(kernel)
    with torch.random.fork_rng(devices=[]):  # new layers draw weights, which are replaced
        converter = _Converter(copy.deepcopy(model), example, round_to)
        if width:
            converter.choose_widths(width)
        if kernel:
            converter.choose_kernels(allowed)
        if depth:
            converter.droppable()
        converter.replace_layers()
        if depth:
            converter.wrap_blocks()
    made = converter.network
    _check(model, made, example)
    made.report = converter.report  # type: ignore[assignment]
    return made


def _check(model: nn.Module, made: nn.Module, example: Tensor) -> None:
    """The sizes agree in every subnet tried, and the largest subnet computes what the original does."""
    space = read_space(made)
    check_sizes(trace(made, example), space, samples=64)
    noise = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
    with evaluating(model), evaluating(made), torch.no_grad():
        same = torch.equal(model(noise), made(noise))
    assert same, "the largest subnet is not the original"

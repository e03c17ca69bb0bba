"""``nas_bench_201``: one cell of four nodes and six edges, each edge one of five operators.

Source: NAS-Bench-201 (Dong and Yang, ICLR 2020). Size: 15,625 subnets, all of them trained in the published table (6,466
of them differ as graphs). Published for C = 16, N = 5 and 10 classes: 0.073306 + 0.24304 n(3x3) + 0.028 n(1x1)
million parameters; best test accuracy on CIFAR-10 94.37 %, cell 6111. Default data: ``cifar10``.

Parameters are counted as in the table: an operator counts where no path from input to output goes through it, too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from nasq import Choice, Subnet, elastic
from nasq.errors import InputError, choose_from
from nasq.plugins import search_space
from nasq.space import Option

__all__ = [
    "EDGES",
    "OPERATORS",
    "NasBench201",
    "arch_str",
    "from_arch_str",
    "from_index",
    "index_of",
    "nas_bench_201",
]

OPERATORS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""The operators of an edge, in the official order."""

EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
"""``(target node, source node)`` of every edge, in the official order."""

_SIZE = len(OPERATORS) ** len(EDGES)


def _name(target: int, source: int) -> str:
    return f"node{target}.input{source}"


class Zero(nn.Module):
    """The operator ``none``: zeros of the input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]``, all zero."""
        return torch.zeros_like(x)


def _relu_conv_bn(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(out))


def _edge(target: int, source: int, channels: int) -> elastic.OneOf:
    branches = {
        "none": Zero(),
        "skip_connect": nn.Identity(),
        "nor_conv_1x1": _relu_conv_bn(channels, channels, 1),
        "nor_conv_3x3": _relu_conv_bn(channels, channels, 3),
        "avg_pool_3x3": nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
    }
    choice = Choice(_name(target, source), OPERATORS, default="nor_conv_3x3", ordered=False)
    return elastic.OneOf(choice, branches)


class Cell(nn.Module):
    """Node 0 is the input; node ``j`` is the sum of its edges from the nodes before it; node 3 is the output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(_edge(target, source, channels) for target, source in EDGES)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]``, unchanged."""
        nodes = [x]
        for (target, source), edge in zip(EDGES, self.edges, strict=True):
            y = edge(nodes[source])
            if target == len(nodes):
                nodes.append(y)
            else:
                nodes[target] = nodes[target] + y
        return nodes[-1]


class Reduction(nn.Module):
    """The fixed residual block between two stages: half the side, twice the channels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv_a = _relu_conv_bn(channels, out, 3, stride=2)
        self.conv_b = _relu_conv_bn(out, out, 3)
        self.downsample = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(channels, out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, H/2, W/2]``."""
        return self.conv_b(self.conv_a(x)) + self.downsample(x)  # type: ignore[no-any-return]


class NasBench201(nn.Module):
    """Stem, three stages of ``N`` equal cells with a reduction between them, head.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        C: Channels of the first stage.
        N: Cells of a stage; the published table has 5.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, C: int = 16, N: int = 5) -> None:
        super().__init__()
        if C < 1 or N < 1:
            raise InputError(f"nas_bench_201 was given C={C} and N={N}. Both are at least 1.")
        self.stem = nn.Sequential(nn.Conv2d(in_channels, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        layers: list[nn.Module] = []
        for stage, channels in enumerate((C, 2 * C, 4 * C)):
            layers += [Reduction(channels // 2, channels)] if stage else []
            layers += [Cell(channels) for _ in range(N)]
        self.cells = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.BatchNorm2d(4 * C), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * C, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = self.last(self.cells(self.stem(x_NCHW)))
        return self.classifier(self.pool(x).flatten(1))  # type: ignore[no-any-return]

    def official_name(self, subnet: Mapping[str, Option]) -> str:
        """See :func:`arch_str`."""
        return arch_str(subnet)

    def from_official_name(self, text: str) -> Subnet:
        """See :func:`from_arch_str`."""
        return from_arch_str(text)


def _operators(subnet: Mapping[str, Option]) -> list[str]:
    """The operator of every edge; options of other choices (bits) are ignored."""
    found = []
    for name in (_name(*edge) for edge in EDGES):
        if name not in subnet:
            raise InputError(f"the subnet has no operator for the edge {name!r}. Give one of {', '.join(OPERATORS)}.")
        if subnet[name] not in OPERATORS:
            raise choose_from(f"operator of the edge {name!r}:", str(subnet[name]), OPERATORS)
        found.append(str(subnet[name]))
    return found


def _subnet(operators: list[str]) -> Subnet:
    return Subnet({_name(*edge): operator for edge, operator in zip(EDGES, operators, strict=True)})


def arch_str(subnet: Mapping[str, Option]) -> str:
    """The official string of a subnet, such as ``|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...|``.

    Raises:
        InputError: An edge has no operator, or an unknown one.
    """
    nodes: list[str] = ["", "", ""]
    for (target, source), operator in zip(EDGES, _operators(subnet), strict=True):
        nodes[target - 1] += f"{operator}~{source}|"
    return "+".join("|" + node for node in nodes)


def from_arch_str(text: str) -> Subnet:
    """The subnet of an official string.

    Raises:
        InputError: The text is no such string (an example is shown), or it names an unknown operator.
    """
    nodes = text.split("+")
    parts = [part for node in nodes for part in node.strip("|").split("|")]
    pairs = [part.partition("~") for part in parts]
    if (
        [source for _, _, source in pairs] != [str(source) for _, source in EDGES]
        or [node.count("|") for node in nodes] != [2, 3, 4]
        or not all(node.startswith("|") and node.endswith("|") for node in nodes)
    ):
        example = arch_str(_subnet(["nor_conv_3x3"] * len(EDGES)))
        raise InputError(f"{text!r} is no NAS-Bench-201 cell. Give one operator for each of the six edges: {example!r}")
    for operator, _, _ in pairs:
        if operator not in OPERATORS:
            raise choose_from("NAS-Bench-201 operator", operator, OPERATORS)
    return _subnet([operator for operator, _, _ in pairs])


@cache
def _order() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which cell (counted like digits, the first edge first) has each official index, and the inverse.

    The benchmark lists all cells and shuffles them with Python's generator and the seed 88; the same does it here.
    """
    cells = list(range(_SIZE))
    random.Random(88).shuffle(cells)
    inverse = [0] * _SIZE
    for index, cell in enumerate(cells):
        inverse[cell] = index
    return tuple(cells), tuple(inverse)


def from_index(index: int) -> Subnet:
    """The subnet of an official index, 0 to 15,624.

    Raises:
        InputError: The index is outside.
    """
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < _SIZE:
        raise InputError(f"the NAS-Bench-201 index is {index!r}. Allowed: 0 to {_SIZE - 1}.")
    cell = _order()[0][index]
    digits = [cell // len(OPERATORS) ** place % len(OPERATORS) for place in reversed(range(len(EDGES)))]
    return _subnet([OPERATORS[digit] for digit in digits])


def index_of(subnet: Mapping[str, Option]) -> int:
    """The official index of a subnet.

    Raises:
        InputError: An edge has no operator, or an unknown one.
    """
    cell = 0
    for operator in _operators(subnet):
        cell = cell * len(OPERATORS) + OPERATORS.index(operator)
    return _order()[1][cell]


@search_space(
    source="NAS-Bench-201 (Dong and Yang 2020)",
    data="cifar10",
    input_shape=(3, 32, 32),
    tiny={"C": 4, "N": 1},
    tiny_input_shape=(3, 8, 8),
    published="15,625 cells, best test accuracy 94.37 %",
)
def nas_bench_201(num_classes: int = 10, in_channels: int = 3, C: int = 16, N: int = 5) -> NasBench201:
    """The space's network; see the module's docstring."""
    return NasBench201(num_classes, in_channels, C, N)

"""``darts``: two cells of four nodes, each node the sum of two earlier outputs behind operators of their own.

Source: DARTS (Liu, Simonyan and Yang, ICLR 2019). Size: 1.08e18 subnets: for each of the normal and the reduction cell, two
of 2, 3, 4 and 5 inputs and one of 7 operators on each of the two. Published for C = 36, 20 layers, CIFAR-10: 3.349 million
parameters for the genotype DARTS-V2, without the auxiliary head, and a test error of 2.76 %. Default data: ``cifar10``.

The network is the one that the paper evaluates (learned affine BatchNorm, pooling without BatchNorm, 20 layers), as a
supernet. It has no auxiliary head and no drop-path, which belong to the training recipe of a single network.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasq import Choice, Subnet, elastic
from nasq.errors import InputError, choose_from
from nasq.plugins import search_space
from nasq.space import Option

__all__ = ["DARTS_V2", "OPERATORS", "Darts", "darts", "from_genotype", "genotype"]

OPERATORS = (
    "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
)  # fmt: skip
"""The operators of a discrete cell."""

DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=range(2, 6), "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))"
)
"""The genotype found by second-order DARTS on CIFAR-10."""

_NODES = (2, 3, 4, 5)  # the intermediate nodes; 0 and 1 are the outputs of the two cells before
_CELLS = ("normal", "reduce")


def _inputs(cell: str, node: int) -> Choice:
    return Choice(f"{cell}.node{node}.inputs", elastic.input_options(node, 2), default="0+1", ordered=False)


def _operator(cell: str, node: int, source: int, operators: tuple[str, ...]) -> Choice:
    default = "sep_conv_3x3" if "sep_conv_3x3" in operators else None
    return Choice(f"{cell}.node{node}.input{source}", operators, default=default, ordered=False)


class Zero(nn.Module):
    """The operator ``none``, which only the search of the paper has."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H / stride, W / stride]``, all zero."""
        return torch.zeros_like(x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride])


class FactorizedReduce(nn.Module):
    """Half the side without losing pixels: two 1x1 convolutions of stride 2, one of them shifted by a pixel."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(channels, out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels, out - out // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, H/2, W/2]``; H and W even."""
        x = self.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))  # type: ignore[no-any-return]


def _relu_conv_bn(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))


def _depthwise(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    ]


def _branch(operator: str, channels: int, stride: int) -> nn.Module:
    if operator == "none":
        return Zero(stride)
    if operator == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)
    if operator == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if operator == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    kernel = int(operator[-1])
    if operator.startswith("dil"):
        return nn.Sequential(*_depthwise(channels, kernel, stride, 2))
    return nn.Sequential(*_depthwise(channels, kernel, stride, 1), *_depthwise(channels, kernel, 1, 1))


class Cell(nn.Module):
    """Two inputs, four nodes, whose outputs are concatenated.

    Args:
        name: ``"normal"`` or ``"reduce"``: cells of one name share their choices.
        before: Channels of the two inputs.
        channels: Of every node.
        after_reduction: Whether the cell before halved the side, so that the older input has twice that of the newer.
        operators: Of the edges.
    """

    def __init__(
        self, name: str, before: tuple[int, int], channels: int, after_reduction: bool, operators: tuple[str, ...]
    ) -> None:
        super().__init__()
        shrink = FactorizedReduce if after_reduction else _relu_conv_bn
        self.older, self.newer = shrink(before[0], channels), _relu_conv_bn(before[1], channels)
        self.nodes = nn.ModuleList()
        for node in _NODES:
            edges = [self._edge(name, node, source, channels, operators) for source in range(node)]
            self.nodes.append(elastic.InputChoice(_inputs(name, node), edges))

    @staticmethod
    def _edge(name: str, node: int, source: int, channels: int, operators: tuple[str, ...]) -> elastic.OneOf:
        stride = 2 if name == "reduce" and source < 2 else 1
        branches = {operator: _branch(operator, channels, stride) for operator in operators}
        return elastic.OneOf(_operator(name, node, source, operators), branches)

    def forward(self, older: Tensor, newer: Tensor) -> Tensor:
        """Outputs of the two cells before to ``[N, 4 channels, H, W]``."""
        states = [self.older(older), self.newer(newer)]
        for node in self.nodes:
            states.append(node(*states))
        return torch.cat(states[2:], 1)


class Darts(nn.Module):
    """Stem, ``layers`` cells, of which those at one and two thirds are reduction cells, head.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        C: Channels of a node in the first cells.
        layers: Number of cells, at least 3.
        operators: Of the edges: some of :data:`OPERATORS`, and ``"none"``, which the paper has while it searches.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        C: int = 36,
        layers: int = 20,
        operators: Sequence[str] = OPERATORS,
    ) -> None:
        super().__init__()
        for operator in operators:
            if operator not in ("none", *OPERATORS):
                raise choose_from("DARTS operator", str(operator), ("none", *OPERATORS))
        if C < 2 or layers < 3:
            raise InputError(f"darts was given C={C} and layers={layers}. C is at least 2, and layers at least 3.")
        self.operators = tuple(operators)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        self.cells = nn.ModuleList()
        before, channels, reduced = (3 * C, 3 * C), C, False
        for layer in range(layers):
            reduces = layer in (layers // 3, 2 * layers // 3)
            channels *= 2 if reduces else 1
            self.cells.append(Cell(_CELLS[reduces], before, channels, reduced, self.operators))
            before, reduced = (before[1], len(_NODES) * channels), reduces
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before[1], num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``; H and W divisible by 4."""
        older = newer = self.stem(x_NCHW)
        for cell in self.cells:
            older, newer = newer, cell(older, newer)
        return self.classifier(self.pool(newer).flatten(1))  # type: ignore[no-any-return]

    def official_name(self, subnet: Mapping[str, Option]) -> str:
        """See :func:`genotype`."""
        return genotype(subnet)

    def from_official_name(self, text: str) -> Subnet:
        """See :func:`from_genotype`."""
        return from_genotype(text, self.operators)


def _pairs(subnet: Mapping[str, Option], cell: str) -> list[tuple[str, int]]:
    pairs = []
    for node in _NODES:
        chosen = str(subnet[f"{cell}.node{node}.inputs"])
        pairs += [(str(subnet[f"{cell}.node{node}.input{source}"]), int(source)) for source in chosen.split("+")]
    return pairs


def genotype(subnet: Mapping[str, Option]) -> str:
    """The genotype as the released code prints it; the two edges of a node are in the order of their inputs.

    Raises:
        InputError: A choice of the two cells is missing.
    """
    try:
        normal, reduce = (_pairs(subnet, cell) for cell in _CELLS)
    except KeyError as error:
        raise InputError(
            f"the subnet has no option for {error}. Give the inputs and operators of both cells."
        ) from error
    ends = f"range({_NODES[0]}, {_NODES[-1] + 1})"
    return f"Genotype(normal={normal}, normal_concat={ends}, reduce={reduce}, reduce_concat={ends})"


def from_genotype(text: str, operators: tuple[str, ...] = OPERATORS) -> Subnet:
    """The subnet of a genotype as the released code prints it. The text is parsed, never run.

    Args:
        text: ``Genotype(normal=[(operator, input), ...], normal_concat=range(2, 6), reduce=[...], ...)``.
        operators: Which are allowed.

    Raises:
        InputError: The text has another form, an operator is unknown, or a node does not read two different inputs.
    """
    fields = _fields(text)
    options: dict[str, Option] = {}
    for cell in _CELLS:
        pairs = fields.get(cell)
        if (
            not isinstance(pairs, list)
            or len(pairs) != 2 * len(_NODES)
            or list(fields.get(f"{cell}_concat", ())) != [*_NODES]
        ):
            raise _no_genotype(text, f"{cell} needs eight edges, and {cell}_concat the nodes 2 to 5")
        for node, both in zip(_NODES, zip(pairs[::2], pairs[1::2], strict=True), strict=True):
            options |= _node(text, cell, node, both, operators)
    return Subnet(options)


def _node(text: str, cell: str, node: int, both: Any, operators: tuple[str, ...]) -> dict[str, Option]:
    try:
        found = {int(source): str(operator) for operator, source in both}
    except (TypeError, ValueError) as error:
        raise _no_genotype(text, "an edge is a pair of an operator and an input") from error
    if len(found) != 2 or not all(0 <= source < node for source in found):
        raise _no_genotype(text, f"node {node} of the {cell} cell needs two different inputs from 0 to {node - 1}")
    for operator in found.values():
        if operator not in operators:
            raise choose_from("DARTS operator", operator, operators)
    inputs = sorted(found)
    return {
        f"{cell}.node{node}.inputs": "+".join(map(str, inputs)),
        **{f"{cell}.node{node}.input{source}": found[source] for source in inputs},
    }


def _no_genotype(text: str, why: str) -> InputError:
    return InputError(
        f"{text[:80]!r}... is no DARTS genotype: {why}. See nasq.search_spaces.darts.DARTS_V2 for an example."
    )


def _fields(text: str) -> dict[str, Any]:
    try:
        call = ast.parse(text.strip(), mode="eval").body
        named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Genotype"
        if not isinstance(call, ast.Call) or not named or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError("it is not Genotype(normal=..., normal_concat=..., reduce=..., reduce_concat=...)")
        return {str(word.arg): _value(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _no_genotype(text, str(error).splitlines()[0]) from error


def _value(node: ast.expr) -> Any:
    """A literal, or ``range(a, b)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        bounds = [ast.literal_eval(argument) for argument in node.args]
        if len(bounds) != 2 or not all(type(bound) is int and 0 <= bound < 100 for bound in bounds):
            raise ValueError("a range is range(2, 6)")
        return list(range(*bounds))
    return ast.literal_eval(node)


@search_space(
    source="DARTS (Liu, Simonyan and Yang 2019)",
    data="cifar10",
    input_shape=(3, 32, 32),
    tiny={"C": 2, "layers": 3, "operators": ("avg_pool_3x3", "skip_connect", "dil_conv_3x3")},
    tiny_input_shape=(3, 8, 8),
    published="DARTS-V2: 3.349 million parameters, 2.76 % test error",
)
def darts(
    num_classes: int = 10,
    in_channels: int = 3,
    C: int = 36,
    layers: int = 20,
    operators: Sequence[str] = OPERATORS,
) -> Darts:
    """The space's network; see the module's docstring."""
    return Darts(num_classes, in_channels, C, layers, operators)

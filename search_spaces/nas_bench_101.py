"""``nas_bench_101``: a cell that is a graph of at most seven vertices and nine edges, repeated nine times.

Source: NAS-Bench-101 (Ying et al., ICML 2019). Size: 423,624 subnets: graphs are the same up to the order of their
vertices, and vertices that lie on no path from the input to the output do not count. Published: a test accuracy of
94.32 % on CIFAR-10 at best, 108 epochs. Default data: ``cifar10``.

The rules of validity and isomorphism are in :mod:`nasq.search_spaces._nas_bench_101_rules`. A cell is one elastic layer:
its graph *is* its choices. It shares weights between subnets by taking the first channels of each vertex's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq import Subnet, elastic
from nasq.elastic import ElasticModule
from nasq.errors import InputError
from nasq.plugins import search_space
from nasq.space import Function, Lookup, Option, SpaceRules

from ._nas_bench_101_rules import Rules

__all__ = ["NasBench101", "nas_bench_101", "vertex_channels"]

Ints = NDArray[np.int64]


def vertex_channels(matrix: NDArray[Any], channels: int) -> Ints:
    """Output channels of the vertices of pruned cells: those of the output are shared among what is concatenated there.

    A vertex behind which channels are fewer has as many as the widest of them; where the division leaves a rest, the
    first vertices have one more.

    Args:
        matrix: Adjacency ``[n, V, V]``, without dead vertices' edges.
        channels: Of the cell.

    Returns:
        ``[n, V]``; 0 for dead vertices; ``channels`` for the output. What the input gives is projected, so its entry is
        ``channels`` as well.
    """
    graphs = np.asarray(matrix, dtype=np.int64)
    last = graphs.shape[1] - 1
    into = graphs[:, 1:last, last]
    count = np.maximum(into.sum(1, keepdims=True), 1)
    share = channels // count + (np.cumsum(into, axis=1) <= channels % count)
    found = np.zeros(graphs.shape[:2], dtype=np.int64)
    found[:, [0, last]] = channels
    found[:, 1:last] = share * into
    for vertex in range(last - 2, 0, -1):
        behind = (found[:, vertex + 1 : last] * graphs[:, vertex, vertex + 1 : last]).max(1, initial=0)
        found[:, vertex] = np.where(graphs[:, vertex, last] > 0, found[:, vertex], behind)
    return found


@lru_cache(maxsize=4096)
def _channels(channels: int, vertices: int, *edges: int) -> tuple[int, ...]:
    matrix = np.zeros((1, vertices, vertices), dtype=np.int64)
    matrix[0][np.triu_indices(vertices, 1)] = edges
    return tuple(int(count) for count in vertex_channels(matrix, channels)[0])


def _size(channels: int, vertices: int, vertex: int, *edges: int) -> int:
    """Channels of one vertex; at least 1, so that a dead vertex's layers have a size, too."""
    return max(1, _channels(channels, vertices, *edges)[vertex])


class _ConvBN(nn.Module):
    def __init__(self, channels: elastic.base.Size, out: elastic.base.Size, kernel: int) -> None:
        super().__init__()
        self.conv = elastic.Conv2d(channels, out, kernel, bias=False)
        self.norm = elastic.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class PlainCell(nn.Module):
    """An extracted cell.

    Args:
        matrix: The pruned adjacency.
        sizes: Channels of every vertex.
        projections: Of the cell's input, by the vertex that takes it.
        operators: By vertex.
    """

    def __init__(
        self,
        matrix: list[list[int]],
        sizes: tuple[int, ...],
        projections: Mapping[int, nn.Module],
        operators: Mapping[int, nn.Module],
    ) -> None:
        super().__init__()
        self.matrix, self.sizes = matrix, sizes
        self.projections = nn.ModuleDict({str(vertex): module for vertex, module in projections.items()})
        self.operators = nn.ModuleDict({str(vertex): module for vertex, module in operators.items()})

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, H, W]`` to ``[N, channels, H, W]``."""
        return _run(x, self.matrix, self.sizes, self.projections.__getitem__, self.operators.__getitem__)


def _run(
    x: Tensor,
    matrix: list[list[int]],
    sizes: tuple[int, ...],
    projection: Callable[[str], nn.Module],
    operator: Callable[[str], nn.Module],
) -> Tensor:
    """The graph: sums at the inner vertices, concatenation at the output; the input is projected wherever it goes."""
    last = len(matrix) - 1
    values: dict[int, Tensor] = {}
    for vertex in range(1, last):
        if not sizes[vertex]:
            continue
        wide = [source for source in range(1, vertex) if matrix[source][vertex]]
        parts = [
            values[source] if sizes[source] == sizes[vertex] else values[source][:, : sizes[vertex]] for source in wide
        ]
        parts += [projection(str(vertex))(x)] if matrix[0][vertex] else []
        values[vertex] = operator(str(vertex))(_sum(parts))
    ends = [values[vertex] for vertex in range(1, last) if matrix[vertex][last]]
    found = [torch.cat(ends, 1) if len(ends) > 1 else ends[0]] if ends else []
    return _sum(found + ([projection(str(last))(x)] if matrix[0][last] else []))


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class Cell(ElasticModule):
    """A cell whose graph is made of choices.

    Args:
        rules: Of the space.
        in_channels: Channels of the input.
        channels: Channels of the output.
    """

    def __init__(self, rules: Rules, in_channels: int, channels: int) -> None:
        super().__init__()
        self.rules, self.in_channels, self.channels = rules, in_channels, channels
        self.holds(*rules.edges)
        vertices = rules.vertices

        def size(vertex: int) -> Function:
            return Function(_size, channels, vertices, vertex, *rules.edges, minimum=1, maximum=channels)

        ends = {vertex: size(vertex) for vertex in range(1, vertices - 1)}
        self.projections = nn.ModuleDict(
            {str(vertex): _ConvBN(in_channels, ends.get(vertex, channels), 1) for vertex in range(1, vertices)}
        )
        self.operators = nn.ModuleDict({str(vertex): self._operators(vertex, wide) for vertex, wide in ends.items()})

    def _operators(self, vertex: int, size: Function) -> elastic.OneOf:
        branches = {
            "none": nn.Identity(),
            "conv3x3-bn-relu": _ConvBN(size, size, 3),
            "conv1x1-bn-relu": _ConvBN(size, size, 1),
            "maxpool3x3": nn.MaxPool2d(3, 1, 1),
        }
        return elastic.OneOf(self.rules.operators[vertex - 1], branches)

    def _edges(self) -> tuple[int, ...]:
        return tuple(int(self.option(edge)) for edge in self.rules.edges)

    def _matrix(self, edges: tuple[int, ...]) -> list[list[int]]:
        matrix = np.zeros((self.rules.vertices,) * 2, dtype=int)
        matrix[np.triu_indices(self.rules.vertices, 1)] = edges
        return matrix.tolist()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, channels, H, W]``."""
        edges = self._edges()
        sizes = _channels(self.channels, self.rules.vertices, *edges)
        return _run(x, self._matrix(edges), sizes, self.projections.__getitem__, self.operators.__getitem__)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active graph with the layers that it uses."""
        edges = self._edges()
        matrix, sizes = self._matrix(edges), _channels(self.channels, self.rules.vertices, *edges)
        projections = {v: recurse(self.projections[str(v)]) for v in range(1, len(matrix)) if matrix[0][v]}
        operators = {v: recurse(self.operators[str(v)]) for v in range(1, len(matrix) - 1) if sizes[v]}
        return PlainCell(matrix, sizes, projections, operators).train(self.training)

    def _counted(self, lookup: Callable[[Any], Any]) -> tuple[Ints, Ints]:
        """Weights of the convolutions, and channels of the BatchNorms behind them, ``[n]`` each."""
        edges = np.stack(np.broadcast_arrays(*(np.atleast_1d(lookup(edge)) for edge in self.rules.edges)), axis=1)
        matrix = np.zeros((len(edges), *(self.rules.vertices,) * 2), dtype=np.int64)
        matrix[:, *np.triu_indices(self.rules.vertices, 1)] = edges
        sizes = vertex_channels(matrix, self.channels)
        into = matrix[:, 0, :] * sizes
        weights, norms = self.in_channels * into.sum(1), into.sum(1)
        kernels: dict[Option, int | float] = {"none": 0, "conv3x3-bn-relu": 9, "conv1x1-bn-relu": 1, "maxpool3x3": 0}
        for vertex, operator in enumerate(self.rules.operators, 1):
            kernel = np.atleast_1d(lookup(Lookup(operator, kernels)))
            weights = weights + kernel * sizes[:, vertex] ** 2
            norms = norms + (kernel > 0) * sizes[:, vertex]
        return weights, norms

    def cost_parameters(self, lookup: Callable[[Any], Any]) -> Any:
        """Parameters of the active graph."""
        weights, norms = self._counted(lookup)
        return weights + 2 * norms

    def cost_macs(self, lookup: Callable[[Any], Any], dims: tuple[Ints, ...]) -> Any:
        """Multiply-adds for an input ``(C, H, W)``: every convolution keeps its size."""
        return self._counted(lookup)[0] * dims[1] * dims[2]


class NasBench101(nn.Module):
    """Stem, three stacks of three equal cells, a max pooling and twice the channels between stacks, head.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        channels: Channels of the stem and the first stack; the published table has 128.
        cells: Cells of a stack; the published table has 3.
        vertices: Most vertices of a cell, input and output included, 2 to 7.
        edges: Most edges of a cell.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        channels: int = 128,
        cells: int = 3,
        vertices: int = 7,
        edges: int = 9,
    ) -> None:
        super().__init__()
        self.rules = Rules(vertices, edges)
        if channels < vertices or cells < 1:
            raise InputError(
                f"nas_bench_101 was given channels={channels} and cells={cells}. There are at least as many channels as "
                f"vertices ({vertices}), among which they are divided, and at least one cell."
            )
        conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
        layers: list[nn.Module] = []
        wide = channels
        for stack in range(3):
            layers += [nn.MaxPool2d(2, 2)] if stack else []
            for cell in range(cells):
                out = 2 * wide if stack and not cell else wide
                layers.append(Cell(self.rules, wide, out))
                wide = out
        self.cells = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(wide, num_classes)

    def space_rules(self) -> SpaceRules:
        """Validity and isomorphism."""
        return self.rules

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        return self.classifier(self.pool(self.cells(self.stem(x_NCHW))).flatten(1))  # type: ignore[no-any-return]

    def official_name(self, subnet: Mapping[str, Option]) -> str:
        """``ADJACENCY:OPERATORS``: the pruned matrix, row by row, and the vertices' operators, as the benchmark has them."""
        return self.rules.to_text(subnet)

    def from_official_name(self, text: str) -> Subnet:
        """The canonical subnet of a cell in the benchmark's form, pruned or not."""
        return self.rules.from_text(text)


@search_space(
    source="NAS-Bench-101 (Ying et al. 2019)",
    data="cifar10",
    input_shape=(3, 32, 32),
    tiny={"channels": 8, "cells": 1, "vertices": 5},
    tiny_input_shape=(3, 8, 8),
    published="423,624 cells, best test accuracy 94.32 %",
    float_only="a cell is one layer whose graph is made of choices; an extracted subnet can be quantized",
)
def nas_bench_101(
    num_classes: int = 10,
    in_channels: int = 3,
    channels: int = 128,
    cells: int = 3,
    vertices: int = 7,
    edges: int = 9,
) -> NasBench101:
    """The space's network; see the module's docstring."""
    return NasBench101(num_classes, in_channels, channels, cells, vertices, edges)

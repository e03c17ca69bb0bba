from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from nasq.search_spaces._nas_bench_101_rules import OPERATORS, Rules, exact_size
from nasq.search_spaces.nas_bench_101 import NasBench101, nas_bench_101, vertex_channels
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Subnet, Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError

INCEPTION = (
    "0111010" + "0000001" * 2 + "0000100" + "0000001" * 2 + "0000000"
    ":input,conv1x1-bn-relu,conv3x3-bn-relu,conv3x3-bn-relu,conv3x3-bn-relu,maxpool3x3,output"
)  # fmt: skip


def every_row(rules: Rules) -> Any:
    """All combinations of options."""
    sizes = [len(choice.options) for choice in rules.choices]
    return np.indices(sizes, dtype=np.int16).reshape(len(sizes), -1).T


def parts(rules: Rules, row: Any) -> tuple[list[list[int]], list[int]]:
    """Adjacency and labels of one row."""
    count, options = rules.vertices, iter(row.tolist())
    matrix = [[0] * count for _ in range(count)]
    for i, j in itertools.combinations(range(count), 2):
        matrix[i][j] = next(options)
    return matrix, [-1, *options, -2]


def pruned(matrix: list[list[int]], labels: list[int]) -> tuple[list[list[int]], list[int]]:
    """What lies on paths from the first to the last vertex, found path by path."""
    last, alive = len(matrix) - 1, set()

    def walk(path: tuple[int, ...]) -> None:
        if path[-1] == last:
            alive.update(path)
        for after in range(path[-1] + 1, last + 1):
            if matrix[path[-1]][after]:
                walk((*path, after))

    walk((0,))
    kept = sorted(alive)
    return [[matrix[i][j] for j in kept] for i in kept], [labels[v] for v in kept]


def fingerprint(matrix: list[list[int]], labels: list[int]) -> str:
    """The benchmark's own idea of sameness: hashes that spread along edges, in and out (Ying et al., section 2)."""
    count = range(len(labels))
    hashes = [f"{sum(matrix[v])},{sum(matrix[w][v] for w in count)},{labels[v]}" for v in count]
    for _ in count:
        words = [
            "".join(sorted(hashes[w] for w in count if matrix[w][v]))
            + "|" + "".join(sorted(hashes[w] for w in count if matrix[v][w])) + "|" + hashes[v]
            for v in count
        ]  # fmt: skip
        hashes = [hashlib.md5(word.encode()).hexdigest() for word in words]
    return str(sorted(hashes))


@pytest.mark.parametrize(("vertices", "most"), [(2, 9), (3, 9), (4, 9), (4, 4), (5, 5), (5, 9)])
def test_small_spaces_exhaustively(vertices: int, most: int) -> None:
    """Every row: validity by walking paths, sameness by the benchmark's fingerprint, the count by both."""
    rules = Rules(vertices, most)
    rows = every_row(rules)
    if len(rows) > 5000:
        rows = rows[np.random.default_rng(0).choice(len(rows), 5000, replace=False)]
    valid, seen = rules.valid(rows), dict[str, tuple[int, ...]]()
    canonical = rules.canonical(rows[valid])
    assert rules.valid(canonical).all() and np.array_equal(rules.canonical(canonical), canonical)
    places = iter(canonical.tolist())
    for row, ok in zip(rows, valid.tolist(), strict=True):
        matrix, labels = pruned(*parts(rules, row))
        wanted = len(matrix) > 1 and sum(map(sum, matrix)) <= most and 0 not in labels
        assert ok == wanted
        if ok:
            form = tuple(next(places))
            assert seen.setdefault(fingerprint(matrix, labels), form) == form
    assert len(set(seen.values())) == len(seen), "two different cells have one canonical form"
    if len(rows) == 4 ** (vertices - 2) * 2 ** len(rules.edges):
        assert len(seen) == rules.size


@pytest.mark.parametrize(("vertices", "most"), [(2, 9), (3, 9), (4, 4), (5, 9), (6, 7)])
def test_members_are_counted_by_symmetry_and_listed_by_trying(vertices: int, most: int) -> None:
    rules = Rules(vertices, most)
    members = rules.members()
    assert len(np.unique(members, axis=0)) == len(members) == rules.size
    assert rules.valid(members).all() and np.array_equal(rules.canonical(members), members)


def test_the_published_number_of_cells() -> None:
    assert exact_size(7, 9) == 423_624
    assert Supernet(nas_bench_101(channels=7, cells=1)).space.size == 423_624


@pytest.mark.long
def test_the_published_cells_one_by_one() -> None:
    members = Rules().members()
    assert len(np.unique(members, axis=0)) == len(members) == 423_624


def test_the_published_example() -> None:
    """The Inception-like cell of the benchmark's documentation has 2,694,282 trainable parameters."""
    with torch.device("meta"):
        network, x = nas_bench_101(), torch.zeros(1, 3, 32, 32)
    supernet = Supernet(network)
    subnet = network.from_official_name(INCEPTION)
    assert supernet.space.contains(subnet)
    assert CostModel(supernet, x).of(subnet)["params"] == 2_694_282


def test_channels_of_vertices() -> None:
    """Shares of the output with the rest to the first, and the widest behind what is not concatenated (by hand)."""
    matrix = np.zeros((2, 6, 6), dtype=int)
    for i, j in ((0, 1), (0, 2), (1, 3), (2, 4), (1, 4), (3, 5), (4, 5), (0, 5)):
        matrix[0][i, j] = 1
    matrix[1][0, 5] = 1
    assert vertex_channels(matrix, 129).tolist() == [[129, 65, 64, 65, 64, 129], [129, 0, 0, 0, 0, 129]]


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    network = NasBench101(channels=8, cells=1, vertices=5)
    for norm in (module for module in network.modules() if hasattr(module, "running_var")):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
    return Supernet(network).eval()


def conv(x: Tensor, block: Any, out: int) -> Tensor:
    """Convolution, BatchNorm, ReLU on the first channels, in float64."""
    weight, norm = block.conv.weight[:out, : x.shape[1]].double(), block.norm
    y = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean, var, scale, shift = (
        value[:out].double().reshape(1, -1, 1, 1)
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return ((y - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)


def slow_cell(cell: Any, x: Tensor, matrix: list[list[int]], labels: list[int]) -> Tensor:
    """The published description, for a pruned cell whose vertices come first."""
    last = len(matrix) - 1
    sizes = vertex_channels(np.array([matrix]), cell.channels)[0].tolist()
    values = [x]
    for vertex in range(1, last):
        total: Any = 0
        for source in range(1, vertex):
            if matrix[source][vertex]:
                total = total + values[source][:, : sizes[vertex]]
        if matrix[0][vertex]:
            total = total + conv(x, cell.projections[str(vertex)], sizes[vertex])
        name = OPERATORS[labels[vertex]]
        if name == "maxpool3x3":
            values.append(F.max_pool2d(total, 3, 1, 1))
        else:
            values.append(conv(total, cell.operators[str(vertex)].branches[name], sizes[vertex]))
    ends = [values[vertex] for vertex in range(1, last) if matrix[vertex][last]]
    result: Any = torch.cat(ends, 1) if ends else 0
    if matrix[0][last]:
        result = result + conv(x, cell.projections[str(len(cell.rules.operators) + 1)], cell.channels)
    return result  # type: ignore[no-any-return]


def test_a_cell_computes_its_graph(supernet: Supernet) -> None:
    cell, rules = supernet.module.cells[0], supernet.module.rules
    x = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(0))
    rows = supernet.space.sample_batch(40, torch.Generator().manual_seed(1))
    columns = [supernet.space.positions[choice.name] for choice in rules.choices]
    for row, subnet in zip(rows, supernet.space.to_subnets(rows), strict=True):
        matrix, labels = pruned(*parts(rules, row[columns]))
        with supernet.activate(subnet), torch.no_grad():
            assert torch.allclose(cell(x).double(), slow_cell(cell, x.double(), matrix, labels), atol=1e-5)


def test_extraction_equals_activation_and_costs_equal_counters(supernet: Supernet) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = CostModel(supernet, x)
    for seed in range(12):
        subnet = supernet.space.sample(torch.Generator().manual_seed(seed))
        plain, costs = supernet.extract(subnet), model.of(subnet)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))
        assert costs["params"] == sum(p.numel() for p in plain.parameters())
        assert costs["macs"] == counted_macs(plain.eval(), x[:1])


def test_official_names_go_both_ways() -> None:
    network = NasBench101(channels=8, cells=1, vertices=5)
    space = Supernet(network).space
    rng = np.random.default_rng(0)
    for subnet in space.to_subnets(space.sample_batch(100, rng)):
        assert network.from_official_name(network.official_name(subnet)) == subnet
    # The order of the vertices and what lies on no path do not matter.
    one = network.from_official_name("0110000100010000:input,conv3x3-bn-relu,maxpool3x3,output")
    two = network.from_official_name("0110000100010000:input,maxpool3x3,conv3x3-bn-relu,output")
    more = network.from_official_name(
        "0110100010000100000000000:input,maxpool3x3,conv3x3-bn-relu,conv1x1-bn-relu,output"
    )
    assert one == two != more
    assert network.official_name(network.from_official_name("0100:input,output")) == "0100:input,output"
    dead = network.from_official_name(
        "0010000000000000:input,conv3x3-bn-relu,maxpool3x3,output".replace("0010", "0101", 1)
    )
    assert network.official_name(dead) == "0100:input,output"


def test_refusals() -> None:
    network = NasBench101(channels=8, cells=1, vertices=4, edges=4)
    for text in (
        "",
        "0100",
        "0100:input,x",
        "1100:input,output",
        "010:input,output",
        "0110:input,output",
        "0200:input,output",
    ):
        with pytest.raises(InputError, match="is no cell of nas_bench_101"):
            network.from_official_name(text)
    with pytest.raises(InputError, match="unknown NAS-Bench-101 operator 'conv5x5'"):
        network.from_official_name("010001000:input,conv5x5,output")
    for text in ("0000:input,output", "0111001100010000:input,maxpool3x3,maxpool3x3,output"):
        with pytest.raises(InputError, match="a path has to lead from input to output, and at most 4 edges"):
            network.from_official_name(text)
    subnet = network.from_official_name("0100:input,output")
    with pytest.raises(InputError, match=r"is no cell of nas_bench_101.*a path has to lead"):
        network.official_name(subnet.updated({"edge03": 0}))
    with pytest.raises(InputError, match=r"no option for 'edge01'\. A cell has 8 choices"):
        network.official_name(Subnet({}))
    with pytest.raises(InputError, match="a cell with 8 vertices and 9 edges: allowed are 2 to 7"):
        Rules(8)
    with pytest.raises(
        InputError, match=r"channels=4 and cells=3\. There are at least as many channels as vertices \(7\)"
    ):
        nas_bench_101(channels=4)

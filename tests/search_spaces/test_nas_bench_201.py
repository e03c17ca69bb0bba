from __future__ import annotations

import csv
import gzip
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nasq.search_spaces.nas_bench_201 import (
    EDGES,
    OPERATORS,
    NasBench201,
    arch_str,
    from_arch_str,
    from_index,
    index_of,
    nas_bench_201,
)
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Subnet, Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError

BEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
FIRST = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"


def subnet_of(operators: tuple[str, ...]) -> Subnet:
    return Subnet({f"node{j}.input{i}": operator for (j, i), operator in zip(EDGES, operators, strict=True)})


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(NasBench201(C=4, N=1)).eval()


def test_names_go_both_ways_for_every_cell() -> None:
    seen = set()
    for operators in itertools.product(OPERATORS, repeat=6):
        subnet = subnet_of(operators)
        text = arch_str(subnet)
        assert from_arch_str(text) == subnet
        seen.add(text)
    assert len(seen) == 15_625


def test_the_index_goes_both_ways_and_is_the_published_one() -> None:
    assert arch_str(from_index(0)) == FIRST and arch_str(from_index(6111)) == BEST
    assert [index_of(from_index(index)) for index in range(15_625)] == list(range(15_625))


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("NASQ_DATA"), reason="set NASQ_DATA to the directory of the public data sets")
def test_every_row_of_the_published_table() -> None:
    with gzip.open(Path(os.environ["NASQ_DATA"]) / "tables" / "nas_bench_201_cifar10.csv.gz", "rt") as file:
        table = list(csv.DictReader(file))
    subnets = [from_arch_str(row["arch_str"]) for row in table]
    assert [index_of(subnet) for subnet in subnets] == [int(row["arch_index"]) for row in table]
    assert len(table) == 15_625
    supernet = Supernet(nas_bench_201())
    found = CostModel(supernet, torch.zeros(1, 3, 32, 32)).evaluate(supernet.space.to_rows(subnets))["params"]
    assert found.tolist() == [round(float(row["params_m"]) * 1e6) for row in table]


def test_parameters_of_every_cell_follow_the_published_formula() -> None:
    supernet = Supernet(nas_bench_201())
    assert supernet.space.size == 15_625
    grid = np.indices((5,) * 6, dtype=np.int16).reshape(6, -1).T
    columns = [supernet.space.positions[f"node{j}.input{i}"] for j, i in EDGES]
    rows = np.empty_like(grid)
    rows[:, columns] = grid
    found = CostModel(supernet, torch.zeros(1, 3, 32, 32)).evaluate(rows)["params"]
    wide, narrow = ((grid == OPERATORS.index(name)).sum(1) for name in ("nor_conv_3x3", "nor_conv_1x1"))
    assert np.array_equal(found, 73_306 + 243_040 * wide + 28_000 * narrow)


def test_costs_equal_counters_on_extracted_cells(supernet: Supernet) -> None:
    x = torch.zeros(1, 3, 32, 32)
    model = CostModel(supernet, x)
    for seed in range(8):
        subnet = supernet.space.sample(torch.Generator().manual_seed(seed))
        plain, costs = supernet.extract(subnet).eval(), model.of(subnet)
        assert costs["params"] == sum(p.numel() for p in plain.parameters())
        assert costs["macs"] == counted_macs(plain, x)


def slow_cell(x: Tensor, operators: tuple[str, ...], edges: nn.ModuleList) -> Tensor:
    """The definition, edge by edge in float64, average pooling by hand."""
    nodes = [x]
    for j in (1, 2, 3):
        total = torch.zeros_like(x)
        for i in range(j):
            number = EDGES.index((j, i))
            operator, edge = operators[number], edges[number]
            if operator == "skip_connect":
                total = total + nodes[i]
            elif operator.startswith("nor_conv"):
                _, conv, norm = edge.branches[operator]
                y = F.conv2d(nodes[i].clamp(min=0), conv.weight.double(), padding=conv.weight.shape[-1] // 2)
                shape = (1, -1, 1, 1)
                y = (y - norm.running_mean.double().view(shape)) / (norm.running_var.double() + 1e-5).sqrt().view(shape)
                total = total + y * norm.weight.double().view(shape) + norm.bias.double().view(shape)
            elif operator == "avg_pool_3x3":
                height, width = x.shape[2:]
                for r, c in itertools.product(range(height), range(width)):
                    window = nodes[i][:, :, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
                    total[:, :, r, c] += window.mean((2, 3))
        nodes.append(total)
    return nodes[3]


def test_a_cell_computes_its_definition(supernet: Supernet) -> None:
    cell = supernet.module.cells[0]
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    for norm in (m for m in cell.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    for index in (0, 6111, 17, 4242, 9999):
        subnet = from_index(index)
        operators = tuple(str(subnet[f"node{j}.input{i}"]) for j, i in EDGES)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.allclose(cell(x).double(), slow_cell(x.double(), operators, cell.edges), atol=1e-5)


def test_a_cell_without_operators_gives_a_constant(supernet: Supernet) -> None:
    with supernet.activate(subnet_of(("none",) * 6)), torch.no_grad():
        assert supernet.module.cells[0](torch.full((1, 4, 3, 3), torch.inf)).eq(0).all()
        outputs = supernet(torch.randn(3, 3, 32, 32))
    assert torch.equal(outputs[0], outputs[1])


def test_extraction_equals_activation(supernet: Supernet) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for seed in range(6):
        subnet = supernet.space.sample(torch.Generator().manual_seed(seed))
        plain = supernet.extract(subnet)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))


def test_the_network_knows_official_names() -> None:
    network = nas_bench_201(C=2, N=1)
    assert network.official_name(from_index(6111)) == BEST and network.from_official_name(BEST) == from_index(6111)


@pytest.mark.parametrize(
    "text",
    ["", "|none~0|", BEST[:-1], BEST.replace("~2", "~1"), BEST.replace("+|", "|"), BEST + "|", "|" + BEST],
)
def test_what_is_no_arch_string_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is no NAS-Bench-201 cell\. Give one operator for each of the six edges"):
        from_arch_str(text)


def test_other_refusals() -> None:
    with pytest.raises(InputError, match=r"unknown NAS-Bench-201 operator 'nor_conv_5x5'\. Did you mean 'nor_conv"):
        from_arch_str(BEST.replace("nor_conv_3x3~0", "nor_conv_5x5~0", 1))
    for index in (-1, 15_625, True, 1.0):
        with pytest.raises(InputError, match="Allowed: 0 to 15624"):
            from_index(index)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no operator for the edge 'node1\.input0'"):
        arch_str({})
    with pytest.raises(InputError, match=r"unknown operator of the edge 'node2\.input1': 'dil_conv'"):
        index_of(from_index(0).updated({"node2.input1": "dil_conv"}))
    with pytest.raises(InputError, match=r"C=0 and N=1\. Both are at least 1"):
        nas_bench_201(C=0, N=1)

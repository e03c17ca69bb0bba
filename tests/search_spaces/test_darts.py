from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from nasq.search_spaces.darts import DARTS_V2, OPERATORS, Darts, darts, from_genotype, genotype
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Subnet, Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    network = darts(C=4, layers=3)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
    return Supernet(network).eval()


def edges(text: str, cell: str) -> list[tuple[str, int]]:
    """The pairs of one cell, cut out of the text."""
    found: list[tuple[str, int]] = ast.literal_eval(text.partition(f"{cell}=")[2].partition(f", {cell}_concat")[0])
    return found


def parameters(text: str, C: int, layers: int, classes: int = 10) -> int:
    """Parameters by hand, from the published description."""
    total = 3 * 3 * C * 9 + 2 * 3 * C
    older, newer, channels = 3 * C, 3 * C, C
    for layer in range(layers):
        reduces = layer in (layers // 3, 2 * layers // 3)
        channels *= 2 if reduces else 1
        total += (older + newer) * channels + 4 * channels
        for name, source in edges(text, "reduce" if reduces else "normal"):
            total += operator_parameters(name, channels, 2 if reduces and source < 2 else 1)
        older, newer = newer, 4 * channels
    return total + newer * classes + classes


def operator_parameters(name: str, channels: int, stride: int) -> int:
    if name == "skip_connect":
        return 0 if stride == 1 else channels**2 + 2 * channels
    if name.endswith("pool_3x3"):
        return 0
    once = channels * int(name[-1]) ** 2 + channels**2 + 2 * channels
    return 2 * once if name.startswith("sep") else once


def test_the_size_is_the_papers() -> None:
    with torch.device("meta"):
        small = darts(C=2, layers=3)
    assert Supernet(small).space.size == ((1 * 3 * 6 * 10) * 7**8) ** 2


def test_the_published_genotype_has_the_published_parameters() -> None:
    with torch.device("meta"):
        network = Supernet(darts())
    plain = network.extract(from_genotype(DARTS_V2))
    count = sum(p.numel() for p in plain.parameters())
    assert count == parameters(DARTS_V2, 36, 20) and round(count / 1e6, 3) == 3.349


def test_genotypes_go_both_ways(supernet: Supernet) -> None:
    for seed in range(60):
        subnet = supernet.space.sample(torch.Generator().manual_seed(seed))
        text = genotype(subnet)
        assert from_genotype(text) == subnet and genotype(from_genotype(text)) == text
        assert from_genotype(text.replace("range(2, 6)", "[2, 3, 4, 5]")) == subnet
    both = from_genotype(DARTS_V2)
    assert supernet.space.contains(both) and from_genotype(genotype(both)) == both
    assert sorted(edges(genotype(both), "normal")) == sorted(edges(DARTS_V2, "normal"))
    assert supernet.module.official_name(both) == genotype(both)
    assert supernet.module.from_official_name(DARTS_V2) == both


def slow_operator(name: str, x: Tensor, branch: Any, stride: int) -> Tensor:
    """The published operators in float64."""

    def norm(y: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        assert bn.running_mean is not None and bn.running_var is not None
        mean, var, scale, shift = (
            value.double().reshape(1, -1, 1, 1) for value in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        return (y - mean) / (var + 1e-5).sqrt() * scale + shift

    if name == "max_pool_3x3":
        return F.max_pool2d(x, 3, stride, 1)
    if name == "avg_pool_3x3":
        # Padding does not count: the sum of what is there, over how much is there.
        ones = torch.ones_like(x)
        return F.avg_pool2d(x, 3, stride, 1) / F.avg_pool2d(ones, 3, stride, 1)
    if name == "skip_connect":
        if stride == 1:
            return x
        y = x.clamp(min=0)
        parts = [branch.even.weight, branch.odd.weight]
        shifted = [y[:, :, ::2, ::2], y[:, :, 1::2, 1::2]]
        mixed = [torch.einsum("oi,nihw->nohw", w.double()[:, :, 0, 0], z) for w, z in zip(parts, shifted, strict=True)]
        return norm(torch.cat(mixed, 1), branch.norm)
    layers, y = list(branch), x
    for at in range(0, len(layers), 4):
        deep, point, bn = layers[at + 1 : at + 4]
        kernel, dilation = deep.kernel_size[0], 2 if name.startswith("dil") else 1
        y = F.pad(y.clamp(min=0), [dilation * (kernel // 2)] * 4)
        y = F.conv2d(y, deep.weight.double(), stride=stride if at == 0 else 1, dilation=dilation, groups=y.shape[1])
        y = norm(torch.einsum("oi,nihw->nohw", point.weight.double()[:, :, 0, 0], y), bn)
    return y


def test_a_cell_computes_its_genotype(supernet: Supernet) -> None:
    generator = torch.Generator().manual_seed(0)
    for cell, name in ((supernet.module.cells[0], "normal"), (supernet.module.cells[1], "reduce")):
        channels = [module[1].in_channels for module in (cell.older, cell.newer)]
        inputs = [torch.randn(2, count, 8, 8, generator=generator) for count in channels]
        for seed in range(6):
            subnet = supernet.space.sample(torch.Generator().manual_seed(seed))
            with supernet.activate(subnet), torch.no_grad():
                states = [cell.older(inputs[0]).double(), cell.newer(inputs[1]).double()]
                pairs = edges(genotype(subnet), name)
                for node in range(4):
                    total: Any = 0
                    for place, (operator, source) in enumerate(pairs[2 * node : 2 * node + 2]):
                        stride = 2 if name == "reduce" and source < 2 else 1
                        branch = cell.nodes[node].picks[place].edges[str(source)].branches[operator]
                        total = total + slow_operator(operator, states[source], branch, stride)
                    states.append(total)
                assert torch.allclose(cell(*inputs).double(), torch.cat(states[2:], 1), atol=1e-4)


def test_extraction_equals_activation_and_costs_equal_counters(supernet: Supernet) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = CostModel(supernet, x)
    for seed in range(6):
        subnet = supernet.space.sample(torch.Generator().manual_seed(seed))
        plain, costs = supernet.extract(subnet), model.of(subnet)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))
        assert costs["params"] == sum(p.numel() for p in plain.parameters()) == parameters(genotype(subnet), 4, 3)
        assert costs["macs"] == counted_macs(plain.eval(), x[:1])


def test_the_operator_none_is_an_option_of_the_search() -> None:
    network = Darts(C=2, layers=3, operators=("none", *OPERATORS))
    space = Supernet(network).space
    assert space.size == ((1 * 3 * 6 * 10) * 8**8) ** 2
    text = DARTS_V2.replace("sep_conv_3x3", "none").replace("max_pool_3x3", "none")
    assert space.contains(network.from_official_name(text))
    with pytest.raises(InputError, match=r"unknown DARTS operator 'none'\. .*Allowed: avg_pool_3x3"):
        from_genotype(text)
    with Supernet(network).activate(network.from_official_name(text)), torch.no_grad():
        assert torch.isfinite(network.eval()(torch.randn(2, 3, 8, 8))).all()


BAD = {
    "": "is no DARTS genotype",
    "__import__('os').getcwd()": "it is not Genotype(normal=...",
    "Genotype(normal=print(1))": "is no DARTS genotype",
    "Genotype(normal=range(0, 10**9))": "is no DARTS genotype",
    "Genotype(normal=range(0, 500))": "a range is range(2, 6)",
    DARTS_V2.replace("range(2, 6)", "range(2, 5)", 1): "normal_concat the nodes 2 to 5",
    DARTS_V2.replace("('skip_connect', 0), ", "", 1): "normal needs eight edges",
    DARTS_V2.replace(
        "[('sep_conv_3x3', 0)", "[('sep_conv_3x3', 1)", 1
    ): "node 2 of the normal cell needs two different",
    DARTS_V2.replace("[('sep_conv_3x3', 0)", "[('sep_conv_3x3', 2)", 1): "inputs from 0 to 1",
    DARTS_V2.replace("[('sep_conv_3x3', 0)", "[3", 1): "an edge is a pair",
    DARTS_V2.replace(
        "sep_conv_3x3", "sep_conv_7x7", 1
    ): "unknown DARTS operator 'sep_conv_7x7'. Did you mean 'sep_conv_",
    "Genotype(" + "(" * 5000: "is no DARTS genotype",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_no_genotype_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        from_genotype(text)
    assert BAD[text] in str(caught.value)


def test_other_refusals() -> None:
    with pytest.raises(InputError, match=r"no option for 'normal\.node2\.inputs'\. Give the inputs and operators"):
        genotype(Subnet({}))
    for arguments in ({"C": 1}, {"layers": 2}):
        with pytest.raises(InputError, match="C is at least 2, and layers at least 3"):
            darts(**arguments)
    with pytest.raises(InputError, match=r"unknown DARTS operator 'sep_conv'\. Did you mean 'sep_conv_"):
        darts(operators=("sep_conv",))
    assert len(OPERATORS) == 7

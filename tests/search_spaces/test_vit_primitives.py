"""The primitives of ShiftAddViT against their formulas, and the cost model against sums by hand."""

from __future__ import annotations

import math
import re

import nasq.search_spaces.vit_primitives as family
import pytest
import torch
from nasq.search_spaces.vit_primitives import COSTS, PRIMITIVES, PrimitiveCost, PrimitiveLinear, vit_primitives
from networks import generator
from torch import Tensor, nn

from nasq import Choice, Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError
from nasq.plugins import space_info

TINY = space_info(vit_primitives).tiny
CHOICE = Choice("p", PRIMITIVES, ordered=False)


def multiplied(x: list[float], weights: list[float]) -> float:
    return sum(one * weight for one, weight in zip(x, weights, strict=True))


def shifted(x: list[float], weights: list[float]) -> float:
    """Sums of inputs whose exponents were moved: no multiplication."""
    total = 0.0
    for one, weight in zip(x, weights, strict=True):
        places = -15 if weight == 0 else max(-15, min(0, round(math.log2(abs(weight)))))
        moved = math.ldexp(one, places)
        total = total - moved if weight < 0 else total + moved
    return total


def added(x: list[float], weights: list[float]) -> float:
    """Sums and differences, scaled once."""
    total = 0.0
    for one, weight in zip(x, weights, strict=True):
        total = total - one if weight < 0 else total + one
    return total * sum(map(abs, weights)) / len(weights)


@pytest.mark.parametrize(("primitive", "formula"), [("mult", multiplied), ("shift", shifted), ("add", added)])
@torch.no_grad()
def test_each_primitive_equals_its_formula(primitive: str, formula) -> None:
    layer = PrimitiveLinear(Choice("i", (5, 9)), Choice("o", (3, 4)), CHOICE).double()
    layer.weight.copy_(torch.randn(4, 9, generator=generator(0), dtype=torch.float64))
    layer.weight.mul_(torch.exp2(torch.arange(9.0) * -2.5))  # from above 1 down to below 2^-15
    layer.weight[1, 1] = 0
    supernet = Supernet(nn.Sequential(layer))
    x = torch.randn(6, 5, generator=generator(1), dtype=torch.float64)
    with supernet.activate({"p": primitive, "i": 5, "o": 3}):
        found = supernet(x)
    for row, result in zip(x.tolist(), found.tolist(), strict=True):
        for out in range(3):
            wanted = formula(row, layer.weight[out, :5].tolist()) + float(layer.bias[out])
            assert result[out] == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_the_ends_of_the_shifts() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.7, 2.0**-15, -(2.0**-20), 0.0]], dtype=torch.float64)
    wanted = [[1.0, -1.0, 0.5, 2.0**-15, -(2.0**-15), 2.0**-15]]
    assert family.shifts(weight).tolist() == wanted  # log2 0.7 = -0.51 rounds to -1
    assert family.shifts(torch.tensor([[0.71]])).tolist() == [[1.0]]  # log2 0.71 = -0.49 rounds to 0


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_gradients_pass_to_the_weight_as_if_it_multiplied(primitive: str) -> None:
    layer = PrimitiveLinear(4, 3, CHOICE).double()
    supernet = Supernet(nn.Sequential(layer))
    x = torch.randn(5, 4, generator=generator(0), dtype=torch.float64)
    outside = torch.randn(5, 3, generator=generator(1), dtype=torch.float64)
    with supernet.activate({"p": primitive}):
        (supernet(x) * outside).sum().backward()
    torch.testing.assert_close(layer.weight.grad, outside.T @ x)


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    network = vit_primitives(**TINY)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(index)))
    return Supernet(network).eval()


def test_extract_is_plain_and_bit_exact(supernet: Supernet) -> None:
    x = torch.randn(2, 3, 16, 16, generator=generator(0))
    model = CostModel(supernet, x)
    for row in supernet.space.to_subnets(supernet.space.sample_batch(10, generator(1))):
        plain = supernet.extract(row)
        assert not any(isinstance(module, PrimitiveLinear) for module in plain.modules())
        with supernet.activate(row):
            assert torch.equal(supernet(x), plain(x))
        assert model.of(row)["params"] == sum(parameter.numel() for parameter in plain.parameters())
        assert 2 * model.of(row)["macs"] == counted_macs(plain, x)


def by_hand(options: dict[str, str], units: dict[str, int]) -> int:
    """Multiply-adds of the tiny network, layer by layer: 5 tokens, 16 features, 2 blocks; times their unit costs."""
    total = 4 * (3 * 8 * 8) * 16 * units["mult"] + 16 * 10 * units["mult"]  # patches and head
    for block in range(2):
        total += 2 * 5 * 5 * 16 * units["mult"]  # q k and weights v
        for name, macs in (("q", 256), ("k", 256), ("v", 256), ("proj", 256), ("fc1", 512), ("fc2", 512)):
            total += 5 * macs * units[options[f"block{block}.{name}.primitive"]]
    return total


@pytest.mark.parametrize("operands", COSTS)
def test_energy_and_latency_are_the_weighted_sums(supernet: Supernet, operands) -> None:
    cost = PrimitiveCost(supernet, torch.zeros(1, 3, 16, 16), operands, chip=2.0, clock=250.0)
    rows = supernet.space.sample_batch(20, generator(2))
    energy, latency = cost.energy(rows), cost.latency(rows)
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        femtojoules = by_hand(dict(subnet), dict(COSTS[operands].energy))
        area = by_hand(dict(subnet), dict(COSTS[operands].area))
        assert energy[index] == pytest.approx(femtojoules * 1e-15 * 1e6, rel=1e-12)
        assert latency[index] == pytest.approx(area / 2e6 / 250e6 * 1e6, rel=1e-12)


def test_shifts_and_additions_cost_less() -> None:
    for unit in COSTS.values():
        for by in (unit.energy, unit.area):
            assert by["add"] < by["shift"] < by["mult"]


def test_the_published_size_is_deit_ti() -> None:
    with torch.device("meta"):
        network = vit_primitives()
    space = Supernet(network).space
    assert sum(parameter.numel() for parameter in network.parameters()) == 5_717_416
    said = re.search(r"3\^(\d+) = ([\d.]+e\d+)", family.__doc__ or "")
    assert said is not None and space.size == 3 ** int(said[1]) and f"{space.size:.2e}" == said[2].replace("e", "e+")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vit_primitives(heads=5), "192 features cannot be shared among 5 heads"),
        (
            lambda: PrimitiveLinear(2, 2, Choice("c", ("mult", "shft"))),
            "unknown primitive in 'c' 'shft'. Did you mean 'shift'",
        ),
        (
            lambda: PrimitiveCost(Supernet(nn.Linear(2, 2)), torch.zeros(1, 2), "int16"),
            "unknown width of the operands 'int16'",
        ),
        (
            lambda: PrimitiveCost(Supernet(nn.Linear(2, 2)), torch.zeros(1, 2), clock=0.0),
            "a clock of 0.0 MHz. Give positive numbers",
        ),
    ],
)
def test_what_cannot_be_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_training_step_learns_with_every_primitive(supernet: Supernet) -> None:
    x: Tensor = torch.randn(4, 3, 16, 16, generator=generator(3))
    for primitive in PRIMITIVES:
        network = vit_primitives(**TINY)
        own = Supernet(network)
        subnet = {name: primitive for name in own.space.names}
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        losses = []
        with own.activate(subnet):
            for _ in range(20):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(own(x), torch.arange(4))
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert losses[-1] < losses[0]

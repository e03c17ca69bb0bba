"""Nodes that choose their inputs (DARTS), and weighted mixtures of alternatives."""

from __future__ import annotations

import copy
from math import comb, prod
from typing import Any

import numpy as np
import pytest
import torch
from networks import generator, images, randomise, tiny_supernet
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel, counted_macs
from nasq.elastic import input_options
from nasq.errors import InputError
from nasq.quant import calibrate, freeze, quantize

CHANNELS = 4


def operators(name: str) -> nn.Module:
    conv = elastic.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS, bias=False)
    return elastic.OneOf(
        Choice(name, ("sep", "pool", "skip")),
        sep=nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(CHANNELS)),
        pool=nn.MaxPool2d(3, 1, 1),
        skip=nn.Identity(),
    )


class Cell(nn.Module):
    """A DARTS cell with two inputs and two nodes."""

    def __init__(self, nodes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 1)
        self.nodes = nn.ModuleList()
        for node in range(nodes):
            count = 2 + node
            edges = [operators(f"n{node}.e{index}") for index in range(count)]
            self.nodes.append(elastic.InputChoice(Choice(f"n{node}.inputs", input_options(count)), edges))
        self.head = nn.Linear(CHANNELS * nodes, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        states = [first, torch.relu(first)]
        for node in self.nodes:
            states.append(node(*states))
        return self.head(torch.cat(states[2:], 1).mean((2, 3)))


def by_hand(net: Cell, subnet: dict[str, Any], x: Tensor) -> Tensor:
    """The cell, written down."""
    first = net.stem(x)
    states = [first, torch.relu(first)]
    for number, node in enumerate(net.nodes):
        total = 0
        for index in map(int, str(subnet[f"n{number}.inputs"]).split("+")):
            pick = next(pick for pick in node.picks if str(index) in pick.edges)
            branch = pick.edges[str(index)].branches[subnet[f"n{number}.e{index}"]]
            total = total + branch(states[index])
        states.append(total)
    return net.head(torch.cat(states[2:], 1).mean((2, 3)))


def test_options_are_combinations() -> None:
    assert input_options(3) == ("0+1", "0+2", "1+2") and input_options(3, 1) == ("0", "1", "2")
    assert all(len(input_options(n, k)) == comb(n, k) for n in range(1, 7) for k in range(1, n + 1))
    with pytest.raises(InputError, match="3 of 2 inputs cannot be chosen"):
        input_options(2, 3)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_the_space_has_the_papers_size(nodes: int) -> None:
    """Liu et al. 2019, section 3.3: over nodes, C(n, 2) pairs of inputs and an operator on both edges."""
    space = Supernet(Cell(nodes)).space
    assert space.size == prod(comb(2 + node, 2) * 3**2 for node in range(nodes))


def test_operators_of_unread_inputs_are_inactive() -> None:
    space = Supernet(Cell()).space
    for subnet in space.to_subnets(space.sample_batch(40, np.random.default_rng(0))):
        for node in range(2):
            read = set(str(subnet[f"n{node}.inputs"]).split("+"))
            assert {name[-1] for name in subnet if name.startswith(f"n{node}.e")} == read


def test_it_computes_the_cell_is_extracted_bit_for_bit_and_costed() -> None:
    net = randomise(Cell()).eval()
    supernet = Supernet(net)
    model, x = CostModel(supernet, images(1)), images(3)
    for subnet in supernet.space.to_subnets(supernet.space.sample_batch(12, generator(0))):
        with supernet.activate(subnet), torch.no_grad():
            wanted = supernet(x)
            assert torch.equal(wanted, by_hand(net, dict(subnet), x))
        plain = supernet.extract(subnet)
        assert torch.equal(plain(x), wanted)
        found = model.of(subnet)
        assert found["params"] == sum(p.numel() for p in plain.parameters()), subnet
        assert found["macs"] == counted_macs(plain, images(1)), subnet


def test_an_edge_shares_its_weights_between_positions() -> None:
    net = Cell()
    first, second = net.nodes[1].picks
    assert list(first.edges) == ["0", "1"] and list(second.edges) == ["1", "2"]
    assert first.edges["1"] is second.edges["1"]
    assert len(list(net.parameters())) == len({id(p) for p in net.parameters()})


def test_quantized_subnets_are_extracted_bit_for_bit() -> None:
    network = quantize(randomise(Cell()).eval(), images(1), weight_bits=(4, 8), activation_bits=(4, 8))
    calibrate(network, images(8))
    supernet = Supernet(network).eval()
    for subnet in supernet.space.to_subnets(supernet.space.sample_batch(6, generator(2))):
        with supernet.activate(subnet), torch.no_grad():
            wanted = network.integers(images(3))
            names = [op.path for op in freeze(network).ops]
        assert torch.equal(supernet.extract(subnet).integers(images(3)), wanted)
        assert not any(f"nodes.{n}.picks.0.edges.{e}" in name for name in names for n in range(2) for e in range(3)
                       if f"n{n}.e{e}" not in subnet)  # fmt: skip


def test_inputs_without_edges_and_other_numbers_of_them() -> None:
    for k in (1, 2, 3):
        node = elastic.InputChoice(Choice("in", input_options(4, k)), k=k)
        supernet = Supernet(node)
        xs = [torch.full((1, 2), 10.0**index) for index in range(4)]
        for option in input_options(4, k):
            with supernet.activate({"in": option}):
                assert node(*xs)[0, 0] == sum(10.0 ** int(index) for index in option.split("+"))


@pytest.mark.parametrize("option", ["0", "0+0", "2+1", "0+3", "first"])
def test_what_names_no_inputs_is_refused(option: str) -> None:
    with pytest.raises(
        InputError, match=r"does not name 2 of 3 inputs. Take the options of input_options\(3, 2\): 0\+1"
    ):
        elastic.InputChoice(Choice("in", ("0+1", option)), [nn.Identity() for _ in range(3)])


# Mixtures


def test_a_mixture_is_the_weighted_sum_of_the_branches() -> None:
    net = randomise(Cell(1)).eval().double()
    supernet, x = Supernet(net), images(2).double()
    first, second = net.nodes[0].picks
    alpha = {f"n0.e{index}": torch.randn(3, dtype=torch.float64, generator=generator(index)) for index in range(2)}
    states = [net.stem(x), torch.relu(net.stem(x))]
    total: Any = 0
    for index, pick in enumerate((first, second)):
        branches = pick.edges[str(index)].branches.values()
        total = total + sum(
            w * branch(states[index]) for w, branch in zip(alpha[f"n0.e{index}"], branches, strict=True)
        )
    with supernet.mix(alpha) as inside:
        assert inside is supernet
        assert torch.allclose(supernet(x), net.head(total.mean((2, 3))), rtol=1e-12)


def test_a_mixture_of_one_is_that_branch() -> None:
    supernet = Supernet(randomise(Cell()).eval())
    subnet, x = supernet.space.sample(generator(4)), images(3)
    with supernet.activate(subnet), torch.no_grad():
        wanted = supernet(x)
    ones = {
        name: torch.eye(len(supernet.space[name].options))[supernet.space[name].index(o)] for name, o in subnet.items()
    }
    with supernet.mix(ones), torch.no_grad():
        assert torch.allclose(supernet(x), wanted, rtol=1e-6)


def test_gradients_reach_the_weights_and_match_differences() -> None:
    supernet, x = Supernet(randomise(Cell()).eval().double()), images(2).double()
    alpha = {name: torch.zeros(len(supernet.space[name].options), dtype=torch.float64, requires_grad=True)
             for name in supernet.space.names if len(supernet.space[name].options) > 1}  # fmt: skip

    def loss() -> Tensor:
        with supernet.mix({name: weights.softmax(0) for name, weights in alpha.items()}):
            return supernet(x).square().sum()

    loss().backward()
    for name, weights in alpha.items():
        grad = weights.grad.clone()
        assert grad.abs().max() > 0, name
        with torch.no_grad():
            weights[0] += 1e-6
            up = loss()
            weights[0] -= 2e-6
            down = loss()
            weights[0] += 1e-6
        assert torch.isclose(grad[0], (up - down) / 2e-6, rtol=1e-4, atol=1e-7), name


def test_an_edge_weighs_the_options_that_use_it() -> None:
    node = elastic.InputChoice(Choice("in", input_options(3)))
    supernet = Supernet(node)
    xs = [torch.full((1, 1), 10.0**index) for index in range(3)]
    with supernet.mix({"in": torch.tensor([0.5, 0.3, 0.2])}):
        found = supernet(*xs)
    assert found.item() == pytest.approx(0.8 * 1 + 0.7 * 10 + 0.5 * 100)


def test_a_mixture_ends_with_its_block_and_survives_copies() -> None:
    supernet = Supernet(Cell(1)).eval()
    x = images(2)
    with torch.no_grad():
        before = supernet(x)
        with pytest.raises(ZeroDivisionError), supernet.mix({"n0.e0": torch.ones(3)}):
            assert not torch.equal(supernet(x), before)
            assert torch.equal(copy.deepcopy(supernet)(x), supernet(x))
            raise ZeroDivisionError
        assert torch.equal(supernet(x), before) and not supernet.mixture


def test_branches_of_weight_zero_are_not_computed() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    supernet = Supernet(elastic.OneOf(Choice("m", ("a", "b")), a=nn.Identity(), b=Broken()))
    with supernet.mix({"m": torch.tensor([2.0, 0.0])}):
        assert supernet(torch.ones(1)).item() == 2
    with pytest.raises(InputError, match="mixture of 'm' has only zeros"), supernet.mix({"m": torch.zeros(2)}):
        supernet(torch.ones(1))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"mix": torch.ones(2)}, r"the mixture of 'mix' is \[2\]\. Give a tensor \[3\]: one per option"),
        ({"mix": [1, 2, 3]}, r"the mixture of 'mix' is list"),
        ({"mx": torch.ones(3)}, r"unknown choice 'mx'\. Did you mean 'mix'"),
        ({"width": torch.ones(3)}, r"'width' cannot be mixed: 'stem' takes it as a size"),
        ({"depth": torch.ones(3)}, r"'depth' cannot be mixed: 'rest' takes it"),
    ],
)
def test_what_cannot_be_mixed_is_named(weights: dict[str, Any], message: str) -> None:
    supernet = tiny_supernet()
    with pytest.raises(InputError, match=message), supernet.mix(weights):
        pass


def test_quantized_networks_are_not_mixed() -> None:
    network = quantize(Cell(1), images(1))
    with pytest.raises(InputError, match="Mix the float one"), Supernet(network).mix({}):
        pass

from __future__ import annotations

import itertools
import re

import nasq.search_spaces.digits_mobile as family
import pytest
import torch
from nasq.search_spaces.digits_mobile import DigitsMobile, digits_mobile
from networks import generator, images, randomise
from torch import nn

from nasq import Supernet
from nasq.cost import CostModel
from nasq.quant import calibrate, freeze, quantize
from nasq.quant import program as p

SHAPE = (1, 8, 8)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(digits_mobile(), seed).eval()


@pytest.fixture(scope="module")
def quantized() -> Supernet:
    net = quantize(network(), images(1, shape=SHAPE))
    calibrate(net, images(16, shape=SHAPE))
    return Supernet(net).eval()


def count_architectures() -> int:
    """By the structure: each block that is there has options of kernel (two, one) and of expansion (three)."""
    stages = [block * sum(block**depth for depth in (1, 2)) * 2 for block in (2 * 3, 1 * 3)]
    return 3**3 * stages[0] * stages[1]


def test_the_number_of_architectures_is_what_the_docstring_says() -> None:
    space = Supernet(DigitsMobile()).space
    assert space.size == count_architectures()
    said = re.search(r"Size: ([\d,]+) architectures", family.__doc__ or "")
    assert said is not None and int(said[1].replace(",", "")) == space.size


def test_with_bits_there_are_more_than_a_billion_subnets(quantized: Supernet) -> None:
    said = re.search(r"([\d.]+e\d+)\s+subnets", family.__doc__ or "")
    assert quantized.space.size >= 10**9
    assert said is not None and f"{quantized.space.size:.1e}" == said[1].replace("e", "e+")


def test_every_dimension_of_the_space_is_there() -> None:
    names = Supernet(DigitsMobile()).space.names
    ends = {name.rpartition(".")[2] for name in names}
    assert ends == {"width", "kernel", "expand", "depth", "mix"}
    assert len([name for name in names if name.endswith(".depth")]) == 2


def test_shapes_and_extraction_of_random_subnets() -> None:
    supernet = Supernet(network())
    x = images(3, shape=SHAPE)
    model = CostModel(supernet, x)
    for seed in range(12):
        subnet = supernet.space.sample(generator(seed))
        plain = supernet.extract(subnet)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x)) and plain(x).shape == (3, 10)
        assert model.of(subnet)["params"] == sum(t.numel() for t in plain.parameters())


def test_all_extreme_subnets_are_valid() -> None:
    supernet = Supernet(network())
    space, x = supernet.space, images(1, shape=SHAPE)
    for pick, mix in itertools.product((space.smallest(), space.largest()), ("skip", "conv")):
        subnet = pick.updated({"stage1.mix": mix, "stage2.mix": mix})
        with supernet.activate(subnet), torch.no_grad():
            assert torch.isfinite(supernet(x)).all()


def test_other_classes_channels_and_sizes() -> None:
    net = digits_mobile(num_classes=3, in_channels=2).eval()
    assert net(images(2, shape=(2, 16, 12))).shape == (2, 3)
    assert quantize(net, images(1, shape=(2, 16, 12))).example_shape == (2, 16, 12)


def test_quantized_subnets_are_integer_programs(quantized: Supernet) -> None:
    x = images(4, shape=SHAPE)
    for seed in range(4):
        subnet = quantized.space.sample(generator(seed))
        plain = quantized.extract(subnet)
        with quantized.activate(subnet):
            assert torch.equal(quantized.module.integers(x), plain.integers(x))
            frozen = freeze(quantized.module)
        layers = [op for op in frozen.ops if isinstance(op, p.Linear)]
        blocks = 2 + subnet["stage1.depth"] + subnet["stage2.depth"]
        mixes = [subnet["stage1.mix"], subnet["stage2.mix"]].count("conv")
        assert len(layers) == 1 + 3 * blocks + mixes + 1
        assert sum(isinstance(op, p.Add) for op in frozen.ops) == blocks - 2
        assert layers[0].weight_bits == layers[-1].weight_bits == 8 and frozen.output.shape == (10,)


def test_bytes_of_quantized_subnets(quantized: Supernet) -> None:
    model = CostModel(quantized)
    for seed in range(6):
        subnet = quantized.space.sample(generator(seed))
        with quantized.activate(subnet):
            layers = [op for op in freeze(quantized.module).ops if isinstance(op, p.Linear)]
        stored = sum(len(op.weight) * (-(-op.weight_bits * op.weight[0].size // 8) + 8) for op in layers)
        assert model.of(subnet)["bytes"] == stored

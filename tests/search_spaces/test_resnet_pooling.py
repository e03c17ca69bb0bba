from __future__ import annotations

import itertools

import pytest
import torch
from nasq.search_spaces.resnet_pooling import PoolingResNet, resnet_pooling
from networks import generator, images, quantized, randomise
from torch import nn

from nasq import Supernet
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError
from nasq.plugins import space_info

INFO = space_info(resnet_pooling)


@pytest.fixture(scope="module")
def full() -> Supernet:
    return Supernet(resnet_pooling().eval())


def named(supernet: Supernet) -> PoolingResNet:
    assert isinstance(supernet.module, PoolingResNet)
    return supernet.module


def test_there_are_36_architectures_each_with_two_pools(full: Supernet) -> None:
    space = full.space
    assert space.size == 36
    names = {named(full).official_name(space.sample(generator(seed))) for seed in range(600)}
    wanted = {f"[{a},{b},{10 - a - b}]" for a in range(1, 9) for b in range(1, 10 - a)}
    assert names == wanted and len(wanted) == 36
    rows = space.sample_batch(500, generator(0))
    subnets = space.to_subnets(rows)
    assert all(list(subnet.values()).count(1) == 2 for subnet in subnets)


def test_the_default_is_the_usual_network(full: Supernet) -> None:
    default = full.space.default()
    assert named(full).official_name(default) == "[4,3,3]"
    assert [name for name, option in default.items() if option == 1] == ["block4.pool", "block7.pool"]


def test_channels_belong_to_blocks(full: Supernet) -> None:
    assert [full.module.stem.out_channels, *(block.conv2.out_channels for block in full.module.blocks)] == [
        16, 16, 16, 16, 32, 32, 32, 64, 64, 64,
    ]  # fmt: skip
    counts = set()
    for seed in range(5):
        counts.add(sum(value.numel() for value in full.extract(full.space.sample(generator(seed))).parameters()))
    assert len(counts) == 1


def macs(counts: tuple[int, int, int]) -> int:
    """Layer by layer: a stem, then two convolutions per block and one where the channels change."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    sides = [side for side, count in zip((32, 16, 8), counts, strict=True) for _ in range(count)]
    total = 3 * 16 * 9 * sides[0] ** 2
    for (channels, out), side in zip(itertools.pairwise(widths), sides[1:], strict=True):
        total += (channels * out * 9 + out * out * 9 + (channels * out if channels != out else 0)) * side**2
    return total + 64 * 10


def test_costs_of_all_architectures(full: Supernet) -> None:
    net = named(full)
    model = CostModel(full, torch.zeros(1, 3, 32, 32))
    for a in range(1, 9):
        for b in range(1, 10 - a):
            subnet = net.from_official_name(f"[{a},{b},{10 - a - b}]")
            assert model.of(subnet)["macs"] == macs((a, b, 10 - a - b))
    plain = full.extract(net.from_official_name("[7, 1, 2]"))
    assert counted_macs(plain, torch.zeros(1, 3, 32, 32)) == macs((7, 1, 2))


def test_an_extracted_subnet_is_a_network_with_two_pools() -> None:
    supernet, x = Supernet(randomise(resnet_pooling(**INFO.tiny)).eval()), images(2, shape=INFO.tiny_input_shape)
    assert supernet.space.size == 6
    for subnet in {supernet.space.sample(generator(seed)) for seed in range(60)}:
        plain = supernet.extract(subnet)
        assert sum(isinstance(part, nn.MaxPool2d) for part in plain.modules()) == 2
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x))


def test_quantized_subnets_keep_the_rules() -> None:
    shape = INFO.tiny_input_shape
    supernet = Supernet(quantized(randomise(resnet_pooling(**INFO.tiny)).eval(), shape=shape)).eval()
    x = images(2, shape=shape)
    for seed in range(4):
        subnet = supernet.space.sample(generator(seed))
        assert sum(option == 1 for name, option in subnet.items() if name.endswith(".pool")) == 2
        plain = supernet.extract(subnet)
        with supernet.activate(subnet):
            assert torch.equal(supernet.module.integers(x), plain.integers(x))


def test_names_both_ways_and_those_that_are_none(full: Supernet) -> None:
    net = named(full)
    for seed in range(20):
        subnet = full.space.sample(generator(seed))
        assert net.from_official_name(net.official_name(subnet)) == subnet
    for text in ("[4,3]", "[4,3,4]", "[10,0,0]", "[a,3,3]", "", "[4,3,2,1]"):
        with pytest.raises(
            InputError, match=r"is no architecture .* 3 numbers of at least 1 with the sum 10, such as \[4,3,3\]"
        ):
            net.from_official_name(text)


def test_other_numbers_of_blocks() -> None:
    assert Supernet(resnet_pooling(blocks=(3, 4, 6, 3), base=4)).space.size == 455
    assert not list(resnet_pooling(affine=False).blocks[0].bn1.parameters())
    with pytest.raises(InputError, match=r"was given the blocks \[4, 0\]. Give how many blocks each resolution has"):
        resnet_pooling(blocks=(4, 0))

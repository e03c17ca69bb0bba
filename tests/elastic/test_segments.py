"""Concatenated sizes: each segment meets its own weights, whatever the width of the others."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from networks import generator, images, randomise
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel, counted_macs
from nasq.elastic import Segments
from nasq.elastic.segments import active_part, write_part
from nasq.errors import InputError
from nasq.quant import calibrate, quantize
from nasq.space import maximum_of_size, value_of

A, B = Choice("a", (1, 2, 3)), Choice("b", (2, 4))


def naive(tensor: Tensor, dim: int, maxima: list[int], sizes: list[int]) -> Tensor:
    """The first entries inside each block, one index at a time."""
    wanted, offset = [], 0
    for most, size in zip(maxima, sizes, strict=True):
        wanted += [offset + index for index in range(size)]
        offset += most
    return tensor.index_select(dim, torch.tensor(wanted, dtype=torch.long))


@pytest.mark.parametrize("dim", [0, 1])
def test_the_active_part_is_the_first_of_each_segment(dim: int) -> None:
    size = Segments(A, 2, Segments(B, A * 2))
    maxima = [3, 2, 4, 6]
    assert maximum_of_size(size) == 15 and size.parts == (A, 2, B, A * 2)
    weight = torch.randn(15, 15, generator=generator(0))
    for a in A.options:
        for b in B.options:
            active = {"a": a, "b": b}
            part = active_part(weight, dim, size, lambda s: value_of(s, active))  # noqa: B023
            assert torch.equal(part, naive(weight, dim, maxima, [a, 2, b, 2 * a]))
            assert value_of(size, active) == part.shape[dim]


def test_writing_is_the_inverse_of_reading() -> None:
    size, active = Segments(A, B), {"a": 2, "b": 2}
    stored, fresh = torch.zeros(7), torch.tensor([1.0, 2, 3, 4])
    write_part(stored, fresh, size, lambda s: value_of(s, active))
    assert stored.tolist() == [1, 2, 0, 3, 4, 0, 0]
    assert torch.equal(active_part(stored, 0, size, lambda s: value_of(s, active)), fresh)


def test_neighbouring_segments_are_a_view() -> None:
    weight = torch.zeros(9)
    full = active_part(weight, 0, Segments(A, 2, B), lambda s: maximum_of_size(s))
    assert full.data_ptr() == weight.data_ptr() and len(full) == 9


def test_segments_are_expressions() -> None:
    size = Segments(A, B, 3)
    assert size.choices == (A, B) and size == Segments(A, Segments(B, 3)) != Segments(B, A, 3)
    assert pickle.loads(pickle.dumps(size)) == size and str(size) == "segments(a, b, 3)"
    assert Segments(A, A).maximum == 6 and value_of(Segments(A, A), {"a": 2}) == 4
    with pytest.raises(InputError, match="was given no sizes"):
        Segments()


class Dense(nn.Module):
    """Two branches of choosable width and the input itself, concatenated; then everything that may read them."""

    def __init__(self) -> None:
        super().__init__()
        one, two, both = Choice("one", (2, 4)), Choice("two", (1, 3, 5)), Choice("q", (2, 3))
        joined = Segments(one, two, 3)
        self.one, self.two = elastic.Conv2d(3, one, 3), elastic.Conv2d(3, two, 1)
        self.norm = elastic.BatchNorm2d(joined)
        self.depthwise = elastic.Conv2d(joined, joined, 3, groups=joined)
        self.mixed = elastic.Conv2d(joined, 6, 1)
        self.split = elastic.Linear(6, Segments(both, both))
        self.head = elastic.Linear(Segments(both, both), 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.relu(self.one(x)), torch.relu(self.two(x)), torch.relu(x)], 1)
        y = torch.relu(self.mixed(self.depthwise(torch.relu(self.norm(y)))))
        return self.head(torch.relu(self.split(y.mean((2, 3)))))


def every(supernet: Supernet) -> list[Any]:
    space = supernet.space
    return [space.smallest(), space.largest(), *space.to_subnets(space.sample_batch(6, generator(1)))]


def test_extract_equals_activate_and_costs_equal_counters() -> None:
    supernet = Supernet(randomise(Dense())).eval()
    model, x = CostModel(supernet, images(1)), images(5)
    for subnet in every(supernet):
        with supernet.activate(subnet), torch.no_grad():
            wanted = supernet(x)
        plain = supernet.extract(subnet)
        assert torch.equal(plain(x), wanted)
        found = model.of(subnet)
        assert found["params"] == sum(p.numel() for p in plain.parameters())
        assert found["macs"] == counted_macs(plain, images(1))


def test_a_segment_meets_its_own_weights() -> None:
    """Outputs of the second branch go through the same columns whatever the first branch's width."""
    net = randomise(Dense()).eval()
    supernet = Supernet(net)
    columns = []
    for one in (2, 4):
        with supernet.activate({"one": one, "two": 3, "q": 2}):
            columns.append(net.mixed.active_weight()[:, one : one + 3])
    assert torch.equal(*columns) and torch.equal(columns[0], net.mixed.weight[:, 4:7])


def test_training_moves_the_statistics_of_the_active_channels_only() -> None:
    net = Dense().train()
    supernet = Supernet(net)
    with supernet.activate({"one": 2, "two": 1, "q": 2}):
        supernet(images(8))
    moved = (net.norm.running_mean != 0).tolist()
    assert moved == [True, True, False, False, True, False, False, False, False, True, True, True]


def test_recalibrated_statistics_reach_the_right_channels() -> None:
    supernet = Supernet(randomise(Dense())).eval()
    subnet = {"one": 2, "two": 3, "q": 3}
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    bn = supernet.recalibrate(subnet, [images(16)])
    x = images(4, 3)
    with supernet.activate(subnet, bn), torch.no_grad():
        wanted = supernet(x)
        seen = torch.cat([torch.relu(supernet.module.one(images(16))), torch.relu(supernet.module.two(images(16)))], 1)
    assert torch.equal(supernet.extract(subnet, bn)(x), wanted)
    assert torch.allclose(bn.statistics["norm"][0][:5], seen.mean((0, 2, 3)), atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())


def test_quantized_subnets_are_extracted_bit_for_bit() -> None:
    network = quantize(randomise(Dense()).eval(), images(1), weight_bits=(4, 8), activation_bits=(4, 8))
    calibrate(network, images(16))
    supernet = Supernet(network).eval()
    for subnet in every(supernet)[:5]:
        with supernet.activate(subnet), torch.no_grad():
            wanted = supernet(images(3))
        assert torch.equal(supernet.extract(subnet)(images(3)), wanted)


def test_groups_that_cut_across_segments_are_refused() -> None:
    with pytest.raises(InputError, match=r"concatenation segments\(a, b\) in 2 groups, which would cut across"):
        elastic.Conv2d(Segments(A, B), 4, 3, groups=2)

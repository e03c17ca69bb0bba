"""Sums beyond 2^24 in parts of the input's channels, against int64; requantization in pieces, against a slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nasq.quant import arithmetic, wide
from tests.networks import generator


def integers(*shape: int, low: int, high: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=generator(seed)).float()


@pytest.mark.parametrize(("channels", "wanted"), [(4, 1), (64, 2), (160, 3)])
def test_the_number_of_parts_and_their_sum(channels: int, wanted: int) -> None:
    # The largest values everywhere: 255 * 127 * 9 channels, so that any partial sum is as large as it can be.
    weight = torch.full((2, channels, 3, 3), 127.0)
    weight[1] = integers(channels, 3, 3, low=-128, high=127)
    parts = wide.count_parts(weight, 255)
    assert parts == wanted
    x = torch.full((2, channels, 4, 4), 255.0)
    x[1] = integers(channels, 4, 4, low=-128, high=255, seed=1)
    geometry = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    found = wide.sum_in_parts(x, weight, parts, geometry)
    exact = F.conv2d(x.long(), weight.long(), None, **geometry)  # type: ignore[arg-type]
    assert torch.equal(found.long(), exact) and found.dtype == (torch.float32 if wanted == 1 else torch.float64)
    assert (int(exact.max()) >= 1 << 24) == (wanted > 1)


def test_a_linear_layer_in_parts() -> None:
    weight, x = integers(3, 1200, low=100, high=127), integers(2, 5, 1200, low=200, high=255)
    parts = wide.count_parts(weight, 255)
    assert parts == 3
    assert torch.equal(wide.sum_in_parts(x, weight, parts, None).long(), x.long() @ weight.long().T)


def test_what_parts_do_not_serve() -> None:
    assert wide.count_parts(torch.full((1, 2000, 5, 5), 127.0), 255) is None  # more than eight
    assert wide.count_parts(torch.full((4, 300, 3, 3), 127.0), 255, groups=2) is None
    assert wide.count_parts(torch.full((4, 3, 3, 3), 127.0), 255, groups=2) == 1


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("zero", [0.0, 128.0])
def test_requantization_in_pieces(kind: torch.dtype, last: bool, zero: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_PIECE", 100)  # several pieces, the last one smaller
    acc = integers(7, 5, 3, 4, low=-90_000, high=90_000).to(kind)
    acc = acc.to(memory_format=torch.channels_last) if last else acc
    scale, bias = torch.rand(5, generator=generator(2)) * 1e-3, integers(5, low=-9000, high=9000, seed=3)
    layer = arithmetic.IntegerLayer(torch.zeros(5, 1), torch.zeros(5), scale, bias)
    beside = integers(7, 5, 3, 4, low=-100, high=100, seed=4)
    steps = [torch.tensor(value) for value in (0.3, 0.07, 0.011)]
    for shortcut in (None, (beside, steps[2])):
        found = arithmetic.requantize(acc.clone(), layer, steps[0], steps[1], zero, 0, 255, None, shortcut)
        f32 = np.float32
        multiplier = (f32(steps[0]) * scale.numpy() / f32(steps[1])).astype(f32)[:, None, None]
        real = (acc.long().numpy() + bias.long().numpy()[:, None, None]).astype(f32) * multiplier
        if shortcut is not None:
            real = real + beside.numpy() * (f32(steps[2]) / f32(steps[1]))
        assert np.array_equal(found.numpy(), np.clip(np.rint(real.astype(f32)) + f32(zero), 0, 255))
        assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_requantization_of_a_linear_layer() -> None:
    acc, bias = integers(3, 2, 4, low=-9000, high=9000), integers(4, low=-90, high=90, seed=1)
    layer = arithmetic.IntegerLayer(torch.zeros(4, 1), torch.zeros(4), torch.full((4,), 0.01), bias)
    one = torch.tensor(1.0)
    wanted = torch.round((acc + bias) * torch.tensor(0.01)).clamp(0, 255)
    assert torch.equal(arithmetic.requantize(acc.clone(), layer, one, one, 0.0, 0, 255, (1, 1, -1)), wanted)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (2, 3, 4, 5), (1, 1, 1, 1)])
def test_look_up(shape: tuple[int, ...]) -> None:
    table, x = torch.rand(256, generator=generator(0)), integers(*shape, low=0, high=255)
    assert torch.equal(arithmetic.look_up(table, x), table[x.long()])
    if len(shape) == 4:
        last = x.to(memory_format=torch.channels_last)
        found = arithmetic.look_up(table, last)
        assert torch.equal(found, table[x.long()]) and found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(arithmetic.look_up(table, x.transpose(1, 2)), table[x.transpose(1, 2).long()])

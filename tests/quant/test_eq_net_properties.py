"""Properties of EQ-Net's method that no other file tests, by their number in the list of testable properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import generator, images, quantized_supernet, tiny_supernet
from torch import Tensor

from nasq import Supernet
from nasq.quant.calibration import search_range
from nasq.quant.fake import fake_quantize


def quantized(x: Tensor, step: float, bits: int) -> Tensor:
    return fake_quantize(x, torch.tensor(step, dtype=x.dtype), -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(1e-3, 10), st.integers(0, 1000))
def test_2_symmetric_quantization_is_odd_and_keeps_zero(bits: int, step: float, seed: int) -> None:
    x = torch.randn(200, generator=generator(seed), dtype=torch.float64) * step * 2.0 ** (bits - 1)
    once = quantized(x, step, bits)
    torch.testing.assert_close(quantized(once, step, bits), once, rtol=1e-12, atol=0)
    inner = x.abs() <= step * (2.0 ** (bits - 1) - 1)  # away from the extra negative level
    assert torch.equal(quantized(-x, step, bits)[inner], -once[inner])
    assert not quantized(torch.zeros(3, dtype=torch.float64), step, bits).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_3_the_search_loses_no_more_than_the_whole_range(bits: int, symmetric: bool) -> None:
    x = torch.randn(3, 400, generator=generator(bits)).exp() - 1
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = search_range(x, low, high, symmetric)
    for row, error in zip(x, found.error, strict=True):
        if symmetric:
            step, zero = 2 * row.abs().max() / (high - low), torch.tensor(0.0)
        else:
            step = (row.max().clamp_min(0) - row.min().clamp_max(0)) / (high - low)
            zero = (low - row.min().clamp_max(0) / step).round()
        plain = (((row / step + zero).round().clamp(low, high) - zero) * step - row).abs().pow(2.4).mean()
        assert float(error) <= float(plain) * (1 + 1e-4)


def statistics(supernet: Supernet, subnet: dict[str, object], batches: list[Tensor]) -> list[Tensor]:
    bn = supernet.recalibrate(subnet, batches)
    return [value for pair in bn.statistics.values() for value in pair]


def test_14_recalibration_is_idempotent_and_leaves_no_trace() -> None:
    supernet, batches = quantized_supernet(), [images(16, 3), images(16, 4)]
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    subnet = supernet.space.sample(generator(0))
    once = statistics(supernet, subnet, batches)
    other = statistics(supernet, supernet.space.sample(generator(1)), batches)
    again = statistics(supernet, subnet, batches)
    assert len(other) and all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_14_in_float_it_reproduces_the_network_up_to_sampling() -> None:
    """Statistics of the training images themselves: what the network computes with them hardly changes."""
    supernet = tiny_supernet().eval()
    largest, x = supernet.space.largest(), images(256, 5)
    first = supernet.recalibrate(largest, list(x.split(64)))
    second = supernet.recalibrate(largest, list(images(256, 6).split(64)))
    with torch.no_grad():
        with supernet.activate(largest, first):
            one = supernet(x)
        with supernet.activate(largest, second):
            other = supernet(x)
    assert float((one.argmax(1) == other.argmax(1)).float().mean()) > 0.9

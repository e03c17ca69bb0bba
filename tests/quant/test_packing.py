"""Packing: bytes written out by hand, the round trip, the size law, and what is refused."""

from __future__ import annotations

from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nasq.errors import ArtifactError, InputError
from nasq.quant import packing
from nasq.quant.packing import pack, packed_size, unpack, value_range

# Lowest bit first, the stream of a row is the values' bits one behind the other; every eight bits are one byte.
GOLDEN = [
    # 1 -> 10, -2 -> 01, 0 -> 00, -1 -> 11 | 1 -> 10: bits 10010011 | 10000000
    pytest.param([[1, -2, 0, -1, 1]], 2, True, [0b11001001, 0b00000001], id="2"),
    # 3 -> 110, -4 -> 001, -1 -> 111: bits 11000111 | 1
    pytest.param([[3, -4, -1]], 3, True, [0b11100011, 0b00000001], id="3"),
    # 15 -> 11110, -16 -> 00001: bits 11110000 | 01; the second channel starts at a byte: 1 -> 10000, -2 -> 01111
    pytest.param([[15, -16], [1, -2]], 5, True, [0b00001111, 0b00000010, 0b11000001, 0b00000011], id="5"),
    # 63 -> 1111110, -64 -> 0000001, 5 -> 1010000: bits 11111100 | 00000110 | 10000
    pytest.param([[63, -64, 5]], 7, True, [0b00111111, 0b01100000, 0b00000001], id="7"),
    pytest.param([[0, -1, -1, 0, -1]], 1, True, [0b00010110], id="1"),
    pytest.param([[6, 1, 7]], 3, False, [0b11001110, 0b00000001], id="3 unsigned"),
    pytest.param([[-128, 127]], 8, True, [0x80, 0x7F], id="8"),
    pytest.param([[200, 255]], 8, False, [200, 255], id="8 unsigned"),
]


@pytest.mark.parametrize(("values", "bits", "signed", "expected"), GOLDEN)
def test_golden_bytes(values: list[list[int]], bits: int, signed: bool, expected: list[int]) -> None:
    array = np.array(values)
    stream = pack(array, bits, signed)
    assert stream.dtype == np.uint8
    assert stream.tolist() == expected
    assert unpack(stream, array.shape, bits, signed).tolist() == values


def slow_pack(values: NDArray[np.integer], bits: int) -> bytes:
    """Every channel as one large integer, its little-endian bytes."""
    data = b""
    for row in values.reshape(values.shape[0], -1):
        number = sum((int(value) % (1 << bits)) << (i * bits) for i, value in enumerate(row))
        data += number.to_bytes(ceil(bits * row.size / 8), "little")
    return data


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_size_and_bytes(shape: list[int], bits: int, signed: bool, seed: int) -> None:
    low, high = value_range(bits, signed)
    values = np.random.default_rng(seed).integers(low, high + 1, size=shape).astype(np.int8 if signed else np.uint8)
    stream = pack(values, bits, signed)
    assert stream.size == packed_size(shape, bits) == sum(ceil(bits * prod(shape[1:]) / 8) for _ in range(shape[0]))
    assert stream.tobytes() == slow_pack(values, bits)
    back = unpack(stream, shape, bits, signed)
    assert back.dtype == values.dtype
    assert np.array_equal(back, values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_value_of_every_width(bits: int) -> None:
    for signed in (True, False):
        low, high = value_range(bits, signed)
        assert high - low == 2**bits - 1
        values = np.arange(low, high + 1)[None]
        assert np.array_equal(unpack(pack(values, bits, signed), values.shape, bits, signed), values)


def test_blocks_of_channels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(-4, 4, size=(7, 3, 5)).astype(np.int8)
    whole = pack(values, 3)
    monkeypatch.setattr(packing, "_BLOCK", 20)
    assert np.array_equal(pack(values, 3), whole)
    assert np.array_equal(unpack(whole, values.shape, 3), values)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_packs_to_nothing(shape: tuple[int, int]) -> None:
    stream = pack(np.zeros(shape, np.int8), 4)
    assert stream.size == packed_size(shape, 4) == 0
    assert unpack(stream, shape, 4).shape == shape


def test_a_value_out_of_range_is_named() -> None:
    values = np.zeros((4, 3), np.int8)
    values[2, 1] = 4
    with pytest.raises(InputError, match=r"the value 4 in channel 2 does not fit 3 signed bits\. Allowed: -4 to 3"):
        pack(values, 3)
    with pytest.raises(InputError, match=r"the value -1 in channel 0 does not fit 8 unsigned bits\. Allowed: 0 to 255"):
        pack(np.array([[-1]]), 8, signed=False)
    with pytest.raises(InputError, match=r"the value 256 in channel 0"):
        pack(np.array([[256]]), 8, signed=False)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_outside_1_to_8_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=rf"{bits} bits cannot be packed\. Allowed: 1 to 8"):
        pack(np.zeros((1, 1), np.int8), bits)


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.array(3)])
def test_only_integer_arrays_pack(values: NDArray[np.integer]) -> None:
    with pytest.raises(InputError, match="only integer arrays"):
        pack(values, 4)


def test_a_stream_of_another_size_is_refused() -> None:
    with pytest.raises(
        ArtifactError, match=r"3-bit values of shape \(2, 3\) take 4 bytes \(uint8\), not uint8 of shape"
    ):
        unpack(np.zeros(5, np.uint8), (2, 3), 3)
    with pytest.raises(ArtifactError, match="take 4 bytes"):
        unpack(np.zeros(4, np.int8), (2, 3), 3)


def test_bits_in_the_padding_are_refused() -> None:
    stream = pack(np.array([[1, 2, 3]]), 3)
    stream[-1] |= 0x80
    with pytest.raises(ArtifactError, match="a bit behind the last of a channel's 3 3-bit values is not zero"):
        unpack(stream, (1, 3), 3)

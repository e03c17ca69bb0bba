"""Packs n-bit integers into a byte stream, ``ceil(bits * n / 8)`` bytes per output channel.

The format: value ``i`` of a channel takes the bits ``i * bits ... (i + 1) * bits - 1`` of that channel's bytes, bit 0
being the lowest bit of the first byte (little-endian bit order), the value's lowest bit first, in two's complement
where signed. There is no gap between values; each channel starts at a byte, and what is left of its last byte is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import ArtifactError, InputError

__all__ = ["pack", "packed_size", "unpack", "value_range"]

_BLOCK = 1 << 20  # values packed or unpacked at a time: eight bytes each


def value_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """The smallest and the largest value that ``bits`` bits hold.

    Args:
        bits: 1..8.
        signed: Two's complement (``[-2^(bits-1), 2^(bits-1) - 1]``) or ``[0, 2^bits - 1]``.

    Raises:
        InputError: ``bits`` is not 1..8.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"{bits} bits cannot be packed. Allowed: 1 to 8 bits per value.")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def packed_size(shape: Sequence[int], bits: int) -> int:
    """How many bytes :func:`pack` makes of values of ``shape``: ``shape[0] * ceil(bits * prod(shape[1:]) / 8)``."""
    value_range(bits)
    return shape[0] * -(-bits * prod(shape[1:]) // 8)


def pack(values: NDArray[np.integer], bits: int, signed: bool = True) -> NDArray[np.uint8]:
    """Packs integers, channel by channel.

    Args:
        values: ``[C, ...]``, any integer type; each within :func:`value_range`.
        bits: Bits per value, 1..8.
        signed: Whether the values are stored in two's complement.

    Returns:
        uint8 ``[packed_size(values.shape, bits)]``.

    Raises:
        InputError: A value does not fit; the message names it, the bits and the channel.
    """
    if values.ndim == 0 or not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"only integer arrays [C, ...] can be packed, not {values.dtype} of shape {values.shape}.")
    _check_range(values, bits, signed)
    rows = values.reshape(values.shape[0], prod(values.shape[1:]))
    parts = []
    for block in _blocks(*rows.shape):
        containers = rows[block].astype(np.int16).astype(np.uint8)[..., None]  # two's complement, modulo 256
        stream = np.unpackbits(containers, axis=2, bitorder="little")[:, :, :bits]
        parts.append(np.packbits(stream.reshape(len(stream), -1), axis=1, bitorder="little").ravel())
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack(
    data: NDArray[np.uint8], shape: Sequence[int], bits: int, signed: bool = True
) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Undoes :func:`pack`.

    Args:
        data: uint8 ``[packed_size(shape, bits)]``.
        shape: Of the values, ``[C, ...]``.
        bits: Bits per value, 1..8.
        signed: Whether the values were stored in two's complement.

    Returns:
        int8 (signed) or uint8 (unsigned) of ``shape``.

    Raises:
        ArtifactError: ``data`` has another size, or a bit behind a channel's last value is not zero.
    """
    size, count = packed_size(shape, bits), prod(shape[1:])
    if data.dtype != np.uint8 or data.shape != (size,):
        raise ArtifactError(
            f"{bits}-bit values of shape {tuple(shape)} take {size} bytes (uint8), "
            f"not {data.dtype} of shape {data.shape}."
        )
    values = np.zeros((shape[0], count), np.uint8)
    rows = data.reshape(shape[0], size // shape[0] if shape[0] else 0)
    if rows.size and count * bits % 8 and (rows[:, -1] >> (count * bits % 8)).any():
        raise ArtifactError(f"a bit behind the last of a channel's {count} {bits}-bit values is not zero.")
    spread = _from_bytes if 8 % bits == 0 else _from_words
    for block in _blocks(*values.shape):
        values[block] = spread(rows[block], bits, signed)[:, :count]
    return values.reshape(shape) if not signed else values.view(np.int8).reshape(shape)


def _from_bytes(rows: NDArray[np.uint8], bits: int, signed: bool) -> NDArray[np.uint8]:
    """The values in rows of bytes, those of the padding behind the last one included; whole ones in every byte.

    Each byte becomes a word with a byte per value: its halves move apart, then the halves of these.
    """
    kind, moves = _SPREAD[bits]
    words = rows.astype(kind)
    for distance, mask in moves:
        words |= words << kind(distance)
        words &= kind(mask)
    found = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(len(rows), -1)
    return _extended(found, bits) if signed else found


_SPREAD: Mapping[int, tuple[Any, tuple[tuple[int, int], ...]]] = {
    1: (np.uint64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
    2: (np.uint32, ((12, 0x000F000F), (6, 0x03030303))),
    4: (np.uint16, ((4, 0x0F0F),)),
    8: (np.uint8, ()),
}


def _from_words(rows: NDArray[np.uint8], bits: int, signed: bool) -> NDArray[np.uint8]:
    """As :func:`_from_bytes`. Eight values take as many bytes as one has bits: together they fit one 64-bit word."""
    groups = -(-rows.shape[1] // bits)
    words = np.zeros((len(rows), groups, 8), np.uint8)
    whole = np.zeros((len(rows), groups * bits), np.uint8)
    whole[:, : rows.shape[1]] = rows
    words[:, :, :bits] = whole.reshape(len(rows), groups, bits)
    word, values = words.view("<u8")[:, :, 0], np.empty((len(rows), groups, 8), np.uint8)
    for place in range(8):
        values[:, :, place] = (word >> np.uint64(place * bits)) & np.uint64((1 << bits) - 1)
    return (_extended(values, bits) if signed else values).reshape(len(rows), groups * 8)


def _extended(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two's complements of ``bits`` bits as those of eight: the sign bit is copied upwards (modulo 256)."""
    if bits == 8:
        return values
    half = np.uint8(1 << (bits - 1))
    values ^= half
    values -= half
    return values


def _check_range(values: NDArray[np.integer], bits: int, signed: bool) -> None:
    low, high = value_range(bits, signed)
    if values.size == 0 or (low <= int(values.min()) and int(values.max()) <= high):
        return
    first = np.argwhere((values < low) | (values > high))[0]
    raise InputError(
        f"the value {int(values[tuple(first)])} in channel {int(first[0])} does not fit {bits} "
        f"{'signed' if signed else 'unsigned'} bits. Allowed: {low} to {high}; use more bits or clip before packing."
    )


def _blocks(channels: int, count: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, count))
    return (slice(start, start + step) for start in range(0, channels, step))

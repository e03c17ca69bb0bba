"""How 4-bit weights are packed for the kernel of few rows, and in how many parts it cuts its sums; no triton needed.

Byte ``j`` of an output channel holds weight ``j`` in its low four bits and weight ``half + j`` in its high ones, in two's
complement; ``half`` is a multiple of 16, and what is missing is 0. The packing of bundles (:mod:`nasq.quant.packing`) puts
neighbours into one byte, which a kernel would have to shuffle apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["halves", "pack_w4", "split_of", "unpack_w4"]

_ALIGN = 16
_FULL = 2  # programs per multiprocessor that keep a device busy
_SHORTEST = 512  # fewest inputs of a part, below which splitting costs more than it gives


def halves(depth: int) -> int:
    """Bytes that ``depth`` packed 4-bit weights take: half of them, rounded up to a multiple of 16."""
    return -(-depth // (2 * _ALIGN)) * _ALIGN


def pack_w4(weight: Tensor) -> Tensor:
    """Packs int8 ``[N, K]`` of -8..7 into int8 ``[N, halves(K)]`` (the format: see above)."""
    assert weight.dtype == torch.int8 and weight.ndim == 2, weight.dtype
    half = halves(weight.shape[1])
    padded = F.pad(weight, (0, 2 * half - weight.shape[1]))
    low, high = padded[:, :half], padded[:, half:]
    return ((low & 15) | (high << 4)).contiguous()


def unpack_w4(packed: Tensor, depth: int) -> Tensor:
    """Undoes :func:`pack_w4`: int8 ``[N, depth]``."""
    low = ((packed & 15) ^ 8) - 8
    return torch.cat([low, packed >> 4], 1)[:, :depth].contiguous()


def split_of(rows: int, columns: int, depth: int, processors: int) -> int:
    """In how many parts the sum over ``depth`` is cut, a power of two: enough to fill ``processors`` multiprocessors."""
    tiles = -(-columns // 64) * -(-rows // 64)
    split = 1
    while split * tiles < _FULL * processors and split < 16 and depth >= 2 * split * _SHORTEST:
        split *= 2
    return split

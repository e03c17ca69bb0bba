"""Matrix products with few rows (batches up to about 64), bound by reading the weights: int8 or packed 4 bits.

The weights stand on the left of the product, where a tensor core takes at least 64 rows, and the few inputs on the
right, where 16 are enough; the sum over K is cut in parts where the tiles alone would not fill the device. The parts are
integers: their sum is the same in any order, so the result is exact and the same in every run.

Four-bit weights: byte ``j`` of an output channel holds weight ``j`` in its low four bits and weight ``half + j`` in its
high ones (two's complement), ``half`` being a multiple of 16 (:func:`nasq.cuda.nibbles.pack_w4`). A tile of bytes is then two
tiles of weights, each beside a contiguous piece of the inputs: nothing is shuffled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nasq.cuda.kernels import place
from nasq.cuda.support import interpreting

__all__ = ["reduce_kernel", "thin_kernel"]


def thin_configs() -> list[triton.Config]:
    """Output channels by inputs; the rows of inputs are a power of two that the caller chooses."""
    shapes = [(16, 32, 4, 1)] if interpreting() else [
        (64, 128, 4, 4), (64, 256, 4, 4), (128, 128, 4, 4), (128, 128, 8, 4), (64, 64, 4, 6),
        (64, 256, 8, 3), (128, 256, 8, 3),
    ]  # fmt: skip
    return [
        triton.Config({"BN": columns, "BK": depth}, num_warps=warps, num_stages=stages)
        for columns, depth, warps, stages in shapes
    ]


@triton.autotune(configs=thin_configs(), key=["BM", "N", "K", "SPLIT", "PACKED"])
@triton.jit
def thin_kernel(  # type: ignore[no-untyped-def]
    x, w, parts, M, N, K, HALF,
    SPLIT: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Partial sums int32 ``parts [SPLIT, M, N]`` of ``x`` int8 ``[M, K]`` with ``w``.

    ``w`` is int8 ``[N, HALF]``: with ``PACKED`` two weights per byte, otherwise ``HALF = K``.
    """
    n, m, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BK)
    part = tl.program_id(2)
    place_w = w + tl.where(n < N, n, 0)[:, None].to(tl.int64) * HALF + k[None, :]
    place_x = x + tl.where(m < M, m, 0)[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.int32)
    each = tl.cdiv(tl.cdiv(HALF, BK), SPLIT) * BK
    for start in range(part * each, min((part + 1) * each, HALF), BK):
        known = k + start < HALF
        weight = tl.load(place_w + start, mask=known[None, :], other=0)
        if PACKED:
            low = (weight << 4).to(tl.int8) >> 4
            high = weight >> 4
            near = tl.load(place_x + start, mask=(known & (k + start < K))[:, None], other=0)
            far = tl.load(place_x + start + HALF, mask=(known & (k + start + HALF < K))[:, None], other=0)
            acc = tl.dot(low.to(tl.int8), near, acc, out_dtype=tl.int32)
            acc = tl.dot(high.to(tl.int8), far, acc, out_dtype=tl.int32)
        else:
            near = tl.load(place_x + start, mask=known[:, None], other=0)
            acc = tl.dot(weight, near, acc, out_dtype=tl.int32)
    place_y = parts + (part * M + m[None, :]) * N + n[:, None]
    tl.store(place_y, acc, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def reduce_kernel(  # type: ignore[no-untyped-def]
    parts, shift, bias, scale, y, count, N, low, high, zero,
    SPLIT: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts, shifts them left by ``shift [N]``, adds the bias and requantizes: ``y [M, N]``, ``count = M * N``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < count
    channel = at % N
    acc = tl.zeros((BLOCK,), dtype=tl.int32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts + part * count + at, mask=known, other=0)
    acc = (acc << tl.load(shift + channel, mask=known, other=0)) + tl.load(bias + channel, mask=known, other=0)
    if FUSED:
        factor = tl.load(scale + channel, mask=known, other=0.0)
        tl.store(y + at, place(acc, factor, low, high, zero), mask=known)
    else:
        tl.store(y + at, acc, mask=known)

"""int8 matrix products and convolutions in Triton, the requantization in their epilogue.

Storage: a quantized tensor is held as int8, ``stored = q - offset`` with its container integers ``q``. The accumulator of
a layer is ``sum (q_x - z_x) w = sum stored w + (offset - z_x) sum w``: the last term depends on the output channel alone
and is added to the bias beforehand, and what is padded is ``z_x - offset``. So int8 products give the accumulator of
`docs/integer_arithmetic.md` exactly, in int32: no layer needs float64.

The epilogue is ``clip(rne(fp32(acc + bias) * M) + z_y)``. It clips before rounding, which gives the same because the
bounds are integers, and leaves numbers so small that adding and subtracting ``1.5 * 2^23`` rounds them half to even. The
clip also stands between the product and that sum, so that no compiler can join them to one fused multiply-add.

Shapes: M rows (pixels or tokens), N output channels, K inputs, B matrices; images are NHWC.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from nasq.cuda.support import interpreting

__all__ = ["conv_kernel", "depthwise_kernel", "gemm_kernel", "place"]

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: fp32 numbers around it are the integers


@triton.jit
def place(total, scale, low, high, zero):  # type: ignore[no-untyped-def]
    """``clip(rne(fp32(total) * scale), low, high) + zero`` as int8; the bounds are relative to the zero-point."""
    steps = total.to(tl.float32) * scale
    steps = tl.minimum(tl.maximum(steps, low), high)
    steps = (steps + MAGIC) - MAGIC
    return (steps + zero).to(tl.int8)


@triton.jit
def tile(index, rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile that a program works on: ``GROUP`` rows of tiles go through all columns, so that weights stay in L2."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    band = index // (GROUP * across)
    height = min(down - band * GROUP, GROUP)
    inside = index % (GROUP * across)
    return band * GROUP + inside % height, inside // height


def _config(rows: int, columns: int, depth: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BM": rows, "BN": columns, "BK": depth}, num_warps=warps, num_stages=stages)


def gemm_configs() -> list[triton.Config]:
    """Tiles that are tried; interpreted kernels are not timed, so they get one."""
    if interpreting():
        return [_config(16, 16, 32, 4, 1)]
    shapes = (
        (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (128, 128, 128, 8, 3), (128, 128, 128, 4, 3), (128, 128, 64, 4, 4),
        (64, 256, 128, 4, 3), (128, 64, 128, 4, 4), (64, 128, 128, 4, 4), (64, 64, 128, 4, 4), (64, 64, 256, 4, 3),
    )  # fmt: skip
    return [_config(*shape) for shape in shapes]


def conv_configs() -> list[triton.Config]:
    """As :func:`gemm_configs`; channels of a block are those of one tap, so blocks are shallower."""
    if interpreting():
        return [_config(16, 16, 32, 4, 1)]
    shapes = (
        (128, 256, 64, 8, 4), (128, 256, 128, 8, 3), (256, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 128, 64, 4, 4),
        (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 5), (64, 32, 64, 4, 5), (64, 64, 32, 4, 4),
    )  # fmt: skip
    return [_config(*shape) for shape in shapes]


def _whole(size: str) -> Any:
    return lambda args: args[size] % args["BK"] == 0


@triton.autotune(configs=gemm_configs(), key=["BUCKET", "N", "K"])
@triton.heuristics({"EVEN": _whole("K")})
@triton.jit
def gemm_kernel(  # type: ignore[no-untyped-def]
    a, b, bias, scale, y, M, N, K, BUCKET, a_batch, b_batch, low, high, zero,
    EXTRA_A: tl.constexpr, EXTRA_B: tl.constexpr, FUSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[i] = (a[i] + EXTRA_A) (b[i] + EXTRA_B)^T``: ``a`` int8 ``[B, M, K]``, ``b`` int8 ``[B, N, K]``.

    With ``FUSED`` ``y`` is int8, requantized; otherwise the int32 accumulators, bias included. ``a_batch`` and ``b_batch``
    are elements from one matrix to the next; 0: all use the same one. ``BUCKET`` stands for ``M`` where configurations
    are chosen.
    """
    row, column = tile(tl.program_id(0), M, N, BM, BN, 8)
    batch = tl.program_id(1).to(tl.int64)
    m, n, k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows beyond the end read the first row: nothing is masked, and they are not stored.
    left = a + batch * a_batch + tl.where(m < M, m, 0)[:, None].to(tl.int64) * K + k[None, :]
    right = b + batch * b_batch + tl.where(n < N, n, 0)[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    sums_a, sums_b = tl.zeros((BM,), dtype=tl.int32), tl.zeros((BN,), dtype=tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            part_a, part_b = tl.load(left), tl.load(right)
        else:
            part_a = tl.load(left, mask=k[None, :] < K - start, other=0)
            part_b = tl.load(right, mask=k[:, None] < K - start, other=0)
        acc = tl.dot(part_a, part_b, acc, out_dtype=tl.int32)
        if EXTRA_A != 0:
            sums_b += tl.sum(part_b.to(tl.int32), axis=0)
        if EXTRA_B != 0:
            sums_a += tl.sum(part_a.to(tl.int32), axis=1)
        left += BK
        right += BK
    if EXTRA_A != 0:
        acc += (EXTRA_A * sums_b)[None, :]
    if EXTRA_B != 0:
        acc += (EXTRA_B * sums_a)[:, None]
    if EXTRA_A * EXTRA_B != 0:
        acc += EXTRA_A * EXTRA_B * K
    inside = (m < M)[:, None] & (n < N)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0)[None, :]
    place_y = y + batch * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    if FUSED:
        factor = tl.load(scale + n, mask=n < N, other=0.0)
        tl.store(place_y, place(acc, factor[None, :], low, high, zero), mask=inside)
    else:
        tl.store(place_y, acc, mask=inside)


@triton.autotune(configs=conv_configs(), key=["BUCKET", "OUT", "C", "KH", "KW"])
@triton.heuristics({"EVEN": _whole("C"), "FLAT": lambda args: args["C"] < args["BK"]})
@triton.jit
def conv_kernel(  # type: ignore[no-untyped-def]
    x, w, bias, scale, y, M, H, W, OH, OW, BUCKET, low, high, zero,
    OUT: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PAD: tl.constexpr, FUSED: tl.constexpr, EVEN: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A convolution as a matrix product whose left side is never written (implicit GEMM).

    ``x`` int8 ``[images, H, W, GROUPS * C]``, ``w`` int8 ``[GROUPS * OUT, KH, KW, C]``,
    ``y`` ``[images, OH, OW, GROUPS * OUT]``; ``C`` and ``OUT`` are those of one group. One program makes a tile of pixels
    by output channels of one group; it walks through the taps and, inside a tap, through blocks of channels; where a tap
    has fewer channels than a block (``FLAT``), through blocks of all taps' channels.
    """
    row, column = tile(tl.program_id(0), M, OUT, BM, BN, 8)
    group = tl.program_id(1)
    m, n, k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    pixel = tl.where(m < M, m, 0)
    top, left = (pixel // OW) % OH * SH - PH, pixel % OW * SW - PW
    image = (pixel // (OH * OW)).to(tl.int64)
    corner = x + ((image * H + top) * W + left) * (GROUPS * C) + group * C
    kernel = w + (group * OUT + tl.where(n < OUT, n, 0)).to(tl.int64) * (KH * KW * C)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    if FLAT:
        for start in range(0, KH * KW * C, BK):
            at = start + k
            tap, c, known = at // C, at % C, at < KH * KW * C
            down, across = tap // KW * DH, tap % KW * DW
            h, v = top[:, None] + down[None, :], left[:, None] + across[None, :]
            inside = (h >= 0) & (h < H) & (v >= 0) & (v < W) & known[None, :]
            part_x = tl.load(
                corner[:, None] + ((down * W + across) * (GROUPS * C) + c)[None, :], mask=inside, other=PAD
            )
            part_w = tl.load(kernel[None, :] + at[:, None], mask=known[:, None], other=0)
            acc = tl.dot(part_x, part_w, acc, out_dtype=tl.int32)
    else:
        blocks: tl.constexpr = (C + BK - 1) // BK
        for step in range(0, KH * KW * blocks):
            tap, c = step // blocks, step % blocks * BK + k
            down, across = tap // KW * DH, tap % KW * DW
            inside = (top + down >= 0) & (top + down < H) & (left + across >= 0) & (left + across < W)
            place_x = corner[:, None] + (down * W + across) * (GROUPS * C) + c[None, :]
            place_w = kernel[None, :] + tap * C + c[:, None]
            if EVEN:
                part_x = tl.load(place_x, mask=inside[:, None], other=PAD)
                part_w = tl.load(place_w)
            else:
                part_x = tl.load(place_x, mask=inside[:, None] & (c < C)[None, :], other=PAD)
                part_w = tl.load(place_w, mask=(c < C)[:, None], other=0)
            acc = tl.dot(part_x, part_w, acc, out_dtype=tl.int32)
    channel = group * OUT + n
    acc += tl.load(bias + channel, mask=n < OUT, other=0)[None, :]
    place_y = y + m[:, None].to(tl.int64) * (GROUPS * OUT) + channel[None, :]
    keep = (m < M)[:, None] & (n < OUT)[None, :]
    if FUSED:
        factor = tl.load(scale + channel, mask=n < OUT, other=0.0)
        tl.store(place_y, place(acc, factor[None, :], low, high, zero), mask=keep)
    else:
        tl.store(place_y, acc, mask=keep)


def depthwise_configs() -> list[triton.Config]:
    """Pixels by channels of one program; depthwise layers are bound by memory, so tiles are small."""
    shapes = [(16, 16, 4)] if interpreting() else [(16, 64, 4), (32, 64, 4), (64, 64, 8), (32, 128, 8), (128, 32, 4)]
    return [triton.Config({"BM": rows, "BN": columns}, num_warps=warps) for rows, columns, warps in shapes]


@triton.autotune(configs=depthwise_configs(), key=["BUCKET", "C", "KH", "KW"])
@triton.jit
def depthwise_kernel(  # type: ignore[no-untyped-def]
    x, w, bias, scale, y, M, H, W, OH, OW, BUCKET, low, high, zero, C: tl.constexpr, MULTIPLE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, PAD: tl.constexpr, FUSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A depthwise convolution: ``x [images, H, W, C / MULTIPLE]``, ``w [KH, KW, C]``, ``y [images, OH, OW, C]``.

    ``MULTIPLE`` output channels read each input channel. Sums of a few taps: plain integer arithmetic, no matrix product.
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    pixel = tl.where(m < M, m, 0)
    top, left = (pixel // OW) % OH * SH - PH, pixel % OW * SW - PW
    image = (pixel // (OH * OW)).to(tl.int64)
    corner = x + ((image * H + top) * W + left)[:, None] * (C // MULTIPLE) + (n // MULTIPLE)[None, :]
    known = (n < C)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            down, across = top + i * DH, left + j * DW
            inside = (down >= 0) & (down < H) & (across >= 0) & (across < W)
            part = tl.load(corner + (i * DH * W + j * DW) * (C // MULTIPLE), mask=inside[:, None] & known, other=PAD)
            weight = tl.load(w + (i * KW + j) * C + n, mask=n < C, other=0)
            acc += part.to(tl.int32) * weight.to(tl.int32)[None, :]
    acc += tl.load(bias + n, mask=n < C, other=0)[None, :]
    place_y = y + m[:, None].to(tl.int64) * C + n[None, :]
    keep = (m < M)[:, None] & known
    if FUSED:
        factor = tl.load(scale + n, mask=n < C, other=0.0)
        tl.store(place_y, place(acc, factor[None, :], low, high, zero), mask=keep)
    else:
        tl.store(place_y, acc, mask=keep)

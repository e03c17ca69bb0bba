"""Softmax, layer normalisation and tables of int8 tensors, each in one pass over memory.

They compute what :mod:`nasq.quant.program` says, number by number: divisions and roots are rounded as IEEE 754 asks
(Triton's plain fp32 division is not), and nothing is joined to fused multiply-adds (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nasq.cuda.kernels import MAGIC

__all__ = ["layer_norm_kernel", "softmax_kernel", "table_kernel"]


@triton.jit
def table_kernel(x, values, y, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``y = values[x + 128]``: ``values`` int8 ``[256]``, ordered by the stored integer."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = at < count
    index = tl.load(x + at, mask=known, other=0).to(tl.int32) + 128
    tl.store(y + at, tl.load(values + index, mask=known, other=0), mask=known)


@triton.jit
def softmax_kernel(  # type: ignore[no-untyped-def]
    x, table, y, columns, rows, step, low, high, zero, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of ``columns`` numbers: ``e = table[max(q) - q]``, ``clip(rne(fp32(e / sum(e)) / step), low, high) + zero``.

    The bounds are relative to the zero-point. ``rows`` is how many rows a matrix has: with ``CAUSAL`` row ``i`` of one sees
    the columns up to ``i``.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    seen = column < columns
    if CAUSAL:
        seen = seen & (column <= row % rows)
    q = tl.load(x + row * columns + column, mask=seen, other=-128).to(tl.int32)
    away = tl.max(q, axis=0) - q
    weights = tl.load(table + away, mask=seen, other=0)
    total = tl.sum(weights, axis=0).to(tl.float32)
    share = tl.div_rn(weights.to(tl.float32), total + tl.zeros((BLOCK,), dtype=tl.float32))
    steps = tl.div_rn(share, step + tl.zeros((BLOCK,), dtype=tl.float32))
    steps = tl.minimum(tl.maximum(steps, low), high)
    steps = (steps + MAGIC) - MAGIC
    tl.store(y + row * columns + column, (steps + zero).to(tl.int8), mask=column < columns)


@triton.jit
def layer_norm_kernel(  # type: ignore[no-untyped-def]
    x, gain, shift, y, width, offset, epsilon, step, low, high, zero, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of ``width`` numbers; ``epsilon`` is a float64 tensor of one element, ``eps * width^2 / s_x^2``.

    Sums are integers: int32 holds ``sum(q^2)`` up to 33,000 numbers, int64 what they are multiplied to.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    known = at < width
    q = tl.where(known, tl.load(x + row * width + at, mask=known, other=0).to(tl.int32) + offset, 0)
    total = tl.sum(q, axis=0).to(tl.int64)
    spread = tl.sum(q * q, axis=0).to(tl.int64) * width - total * total
    root = tl.sqrt(spread.to(tl.float64) + tl.load(epsilon))
    away = (q.to(tl.int64) * width - total).to(tl.float64)
    normal = (away / root).to(tl.float32)
    real = normal * tl.load(gain + at, mask=known, other=0.0)
    real = real + tl.load(shift + at, mask=known, other=0.0)
    steps = tl.div_rn(real, step + tl.zeros((BLOCK,), dtype=tl.float32))
    steps = tl.minimum(tl.maximum(steps, low), high)
    steps = (steps + MAGIC) - MAGIC
    tl.store(y + row * width + at, (steps + zero).to(tl.int8), mask=known)

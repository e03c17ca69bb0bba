"""The sum of two quantized tensors in one pass over memory, as onnxruntime's QLinearAdd computes it."""

from __future__ import annotations

import triton
import triton.language as tl

from nasq.cuda.kernels import MAGIC

__all__ = ["add_kernel"]


@triton.jit
def add_kernel(  # type: ignore[no-untyped-def]
    a, b, y, factors, count, offset_a, offset_b, offset_y, low, high, BLOCK: tl.constexpr,
):  # fmt: skip
    """``clip(rne(fma(q_a, r_a, fma(q_b, r_b, f))), low, high)``; ``factors`` holds ``r_a``, ``r_b`` and ``f``, fp32.

    Tensors are int8, each ``q - offset``; the offsets and bounds are fp32. The zero-point is inside ``f``.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = at < count
    q_a = tl.load(a + at, mask=known, other=0).to(tl.float32) + offset_a
    q_b = tl.load(b + at, mask=known, other=0).to(tl.float32) + offset_b
    r_a, r_b, fixed = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    total = tl.fma(q_a, r_a, tl.fma(q_b, r_b, fixed))
    total = tl.minimum(tl.maximum(total, low), high)
    total = (total + MAGIC) - MAGIC
    tl.store(y + at, (total - offset_y).to(tl.int8), mask=known)

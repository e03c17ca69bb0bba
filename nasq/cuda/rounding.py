"""Fake quantization on CUDA: one pass over memory forward and one backward, no temporary of the tensor's size.

What is computed is :mod:`nasq.quant.fake`'s, which remains the reference: for fp32 tensors outputs and the gradient of
the input are equal bit for bit; the step's and the zero-point's gradients are sums in another order. Narrower tensors
are computed with in fp32 and rounded once, where the plain form rounds after each operation.

The gradients' sums are made of one partial sum per program, added by torch: no atomics, so two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasq.cuda.kernels import MAGIC
from nasq.cuda.ops import operator, placed

__all__ = ["backward", "forward"]

Bound = Tensor | float
_BLOCK = 2048
_KEEP_NAN = tl.PropagateNan.ALL  # a NaN stays one: clipping must not hide it


@triton.jit
def _steps(x, step, low, high, NAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """``rne(clip(x / step))``, rounded as IEEE 754 divides; below 2^22 because it is clipped."""
    steps = tl.div_rn(x, step + tl.zeros_like(x))
    steps = tl.minimum(tl.maximum(steps, low, propagate_nan=NAN), high, propagate_nan=NAN)
    return (steps + MAGIC) - MAGIC


@triton.jit
def _bound(bound, row, BOUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A bound: a number (``BOUNDS`` is -1), one element for all rows (0), or one for each (1)."""
    # One return, behind both: what stands behind a return inside a condition is compiled all the same.
    if BOUNDS == -1:
        found = bound
    else:
        found = tl.load(bound + row * BOUNDS)
    return found


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, step, low, high, y, width, STEPS: tl.constexpr, BOUNDS: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr
):
    """``y = step * rne(clip(x / step, low, high))`` of ``[rows, width]``.

    ``STEPS`` is 1 where there is one step per row, and 0 where there is one for all.
    """
    row, at = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known, place = at < width, row.to(tl.int64) * width + at
    size = tl.load(step + row * STEPS)
    value = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
    bottom, top = _bound(low, row, BOUNDS), _bound(high, row, BOUNDS)
    made = _steps(value, size, bottom, top, NAN) * size
    tl.store(y + place, made.to(y.dtype.element_ty), mask=known)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    g, x, step, low, high, inside, sums, width,
    STEPS: tl.constexpr, BOUNDS: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The input's gradient, and ``sums [rows, programs, 2]``: the step's gradient times the step, and what was clipped."""
    row, at = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known, place = at < width, row.to(tl.int64) * width + at
    size = tl.load(step + row * STEPS)
    bottom, top = _bound(low, row, BOUNDS), _bound(high, row, BOUNDS)
    value = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
    grad = tl.load(g + place, mask=known, other=0.0).to(tl.float32)
    made = _steps(value, size, bottom, top, NAN) * size
    within = (value > bottom * size) & (value < top * size)
    tl.store(inside + place, tl.where(within, grad, 0.0).to(inside.dtype.element_ty), mask=known)
    scaled = tl.sum(grad * tl.where(within, made - value, made), axis=0)
    clipped = tl.sum(tl.where(within, 0.0, grad), axis=0)
    out = sums + (row * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(out, scaled)
    tl.store(out + 1, clipped)


def _launch(x: Tensor, step: Tensor, low: Tensor | None) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Grid, width of a row and the constants of a launch."""
    bounds = 1 if low is None else low.numel()
    rows = max(step.numel(), bounds)
    width = x.numel() // rows
    flags = {"STEPS": int(step.numel() > 1), "BOUNDS": -1 if low is None else int(bounds > 1), "NAN": _KEEP_NAN}
    return (triton.cdiv(width, _BLOCK), rows), width, {**flags, "BLOCK": _BLOCK, "enable_fp_fusion": False}


@operator("fake_quantize")
def _forward(x: Tensor, step: Tensor, low: Tensor | None, high: Tensor | None, bottom: float, top: float) -> Tensor:
    y = torch.empty_like(x)
    grid, width, constants = _launch(x, step, low)
    if x.numel():
        with placed(x):
            forward_kernel[grid](
                x, step, bottom if low is None else low, top if high is None else high, y, width, **constants
            )
    return y


@_forward.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


@operator("fake_quantize_backward")
def _backward(
    g: Tensor, x: Tensor, step: Tensor, low: Tensor | None, high: Tensor | None, bottom: float, top: float
) -> tuple[Tensor, Tensor]:
    inside = torch.empty_like(x, dtype=g.dtype)
    grid, width, constants = _launch(x, step, low)
    sums = torch.zeros(grid[1], grid[0], 2, dtype=torch.float32, device=x.device)
    if x.numel():
        bounds = (bottom if low is None else low, top if high is None else high)
        with placed(x):
            backward_kernel[grid](g, x, step, *bounds, inside, sums, width, **constants)
    return inside, sums.sum(1)


@_backward.register_fake
def _(g: Tensor, x: Tensor, step: Tensor, low: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = max(step.numel(), 1 if low is None else low.numel())
    return torch.empty_like(x, dtype=g.dtype), x.new_empty((rows, 2), dtype=torch.float32)


def _split(low: Bound, high: Bound) -> tuple[Tensor | None, Tensor | None, float, float]:
    """Bounds as tensors, or as numbers."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return low.detach().float().contiguous(), high.detach().float().contiguous(), 0.0, 0.0
    return None, None, float(low), float(high)


def forward(x: Tensor, step: Tensor, low: Bound, high: Bound) -> Tensor:
    """``step * clip(rne(x / step), low, high)``.

    Args:
        x: Dense in memory; its first dimension is outermost where steps or bounds are per row.
        step: fp32: one element, or one per ``x[i]``.
        low, high: Both numbers, or both tensors like ``step``.
    """
    result: Tensor = _forward(x, step.detach().contiguous(), *_split(low, high))
    return result


def backward(g: Tensor, x: Tensor, step: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`forward`, before LSQ's factor.

    Args:
        g: Gradient of the output, laid out as ``x``.
        x, step, low, high: As given to :func:`forward`.

    Returns:
        The input's gradient; the sums of the step's gradient times the step, ``[1]`` or ``[rows]``; the sums of what was
        clipped away, likewise.
    """
    inside, sums = _backward(g, x, step.detach().contiguous(), *_split(low, high))
    return inside, sums[:, 0], sums[:, 1]

"""Fake quantization: real values rounded to a grid, with the gradients of learned step sizes (LSQ).

A large tensor is worked on in pieces that stay in a core's cache: rounding it and finding its step's gradient then cost
about one pass over memory each, and no temporary of its size is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nasq.cuda.support import usable
from nasq.quant.recompute import WORTH, Again, active

__all__ = ["fake_quantize", "gradient_scale", "released_scale"]

_PIECE = 1 << 19
"""Elements worked on at once: larger ones leave the cache, smaller ones cost two threads more in meeting than in work."""
_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)

Bound = Tensor | float


def _flat(like: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors as one dimension in the memory order of ``like``; views where they are laid out as it is."""
    if like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        return [tensor.permute(0, 2, 3, 1).reshape(-1) for tensor in (like, *tensors)]
    return [tensor.reshape(-1) for tensor in (like, *tensors)]


def _pieces(count: int) -> Iterator[slice]:
    return (slice(at, at + _PIECE) for at in range(0, count, _PIECE))


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _in_pieces(x: Tensor, step: Tensor) -> bool:
    """One step for all on a CPU: plain numbers cost no synchronisation there, and the tensor can go in pieces."""
    return step.numel() == 1 and x.device.type == "cpu" and _dense(x)


def _round_pieces(x: Tensor, step: float, low: float, high: float) -> Tensor:
    y = torch.empty_like(x)
    x_flat, y_flat = _flat(x, y)
    for piece in _pieces(x.numel()):
        part = y_flat[piece]
        # A division, not a product with the reciprocal: at ties it decides as the integer form does.
        torch.div(x_flat[piece], step, out=part)
        part.clamp_(low, high).round_().mul_(step)
    return y


def _backward_pieces(
    g: Tensor, x: Tensor, y: Tensor | None, step: float, low: float, high: float, moving: bool
) -> tuple[Tensor, float, float]:
    """The input's gradient, the step's times the step, and (if ``moving``) the sum of the gradients clipped away.

    The step's gradient is ``sum g * (y - x)`` inside the range and ``sum g * y`` outside: ``sum g * (y - x inside)``, one
    product for both. Without ``y`` its pieces are computed again.
    """
    inside = torch.empty_like(x, dtype=g.dtype)
    x_flat, g_flat, out, *kept = _flat(x, g, inside, *([] if y is None else [y]))
    keep_inside, bounds = torch.ops.aten.hardtanh_backward.grad_input, (low * step, high * step)
    scaled = clipped = 0.0
    for piece in _pieces(x.numel()):
        part, grad, before = out[piece], g_flat[piece], x_flat[piece]
        after = kept[0][piece] if kept else before.div(step).clamp_(low, high).round_().mul_(step)
        keep_inside(before, before, *bounds, grad_input=part)
        scaled += float(torch.dot(grad, torch.sub(after, part, out=part)))
        keep_inside(grad, before, *bounds, grad_input=part)
        if moving:
            clipped += float((grad - part).sum())
    return inside, scaled, clipped


def _served(x: Tensor, step: Tensor, low: Bound, high: Bound) -> bool:
    """Whether the CUDA kernels take it: one step (and bound) for all, or one per ``x[i]``, and a dense tensor."""
    if not usable(x.device) or x.dtype not in _KERNEL_TYPES or x.ndim == 0 or not _dense(x):
        return False
    bounds = [bound for bound in (low, high) if isinstance(bound, Tensor)]
    rows = (len(x), *[1] * (x.ndim - 1))
    fit = all(part.numel() == 1 or tuple(part.shape) == rows for part in (step, *bounds))
    return fit and len(bounds) in (0, 2) and step.dtype == torch.float32


def _backward_kernels(g: Tensor, x: Tensor, step: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor, Tensor]:
    """As the plain form: the input's gradient, the step's times the step, and that of the bounds, not yet summed."""
    from nasq.cuda import rounding

    g = g.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    inside, scaled, clipped = rounding.backward(g, x, step, low, high)
    if len(scaled) == 1:
        return inside, scaled.reshape(step.shape), clipped.reshape(step.shape) * step
    rows = (len(x), *[1] * (x.ndim - 1))
    return inside, scaled.reshape(rows).sum_to_size(step.shape), clipped.reshape(rows) * step


class _FakeQuantize(torch.autograd.Function):
    """``step * clip(rne(x / step), low, high)`` with the gradients of LSQ (Esser et al. 2020, eq. 3 and 5).

    The gradient of the step is ``sum g * (rne(v) - v)`` inside the range and ``sum g * bound`` outside, ``v = x / step``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound, scale: float, again: Again | None
    ) -> Tensor:
        ctx.pieces = _in_pieces(x, step)
        ctx.bounds, ctx.scale, ctx.again = (low, high), scale, again
        ctx.kernels = _served(x, step, low, high)
        if ctx.kernels:
            from nasq.cuda import rounding

            y = rounding.forward(x, step, low, high)
        elif ctx.pieces:
            y = _round_pieces(x, float(step), float(low), float(high))
        else:
            y = x / step.to(x.dtype)
            y.clamp_(low, high).round_().mul_(step.to(x.dtype))  # type: ignore[arg-type]
        # In fp32 memory is what a quantized step lacks; in bf16, which halves it, time counts more.
        forgotten = ctx.kernels or (ctx.pieces and x.dtype == torch.float32)
        ctx.save_for_backward(x, None if forgotten else y, step)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        x, y, step = ctx.saved_tensors
        low, high = ctx.bounds
        made = None if ctx.again is None else ctx.again.take()  # the layer behind has just used it
        if made is not None and not torch.is_grad_enabled():  # it has no gradients of its own
            y = made
        # Second derivatives need operations that autograd follows; they are not done in pieces.
        if ctx.kernels and not torch.is_grad_enabled():
            inside, grad_step, grad_zero = _backward_kernels(g, x, step, low, high)
        elif ctx.pieces and not torch.is_grad_enabled():
            numbers = (float(step), float(low), float(high))
            inside, scaled, clipped = _backward_pieces(g, x, y, *numbers, isinstance(low, Tensor))
            grad_step = step.new_full(step.shape, scaled)
            grad_zero = step.new_full((), clipped) * step
        else:
            inside = torch.where((x > low * step) & (x < high * step), g, 0)
            outside = (g - inside).to(step.dtype)
            if y is None:  # it was not kept
                y = x.div(step).clamp(low, high).round() * step
            grad_step = (inside.to(step.dtype) * (y - x) + outside * y).sum_to_size(step.shape)
            grad_zero = outside * step
        # Both bounds are (integer - zero_point): moving the zero-point moves what is clipped, by one step.
        grad_low = grad_zero.sum_to_size(low.shape) * ctx.scale if isinstance(low, Tensor) else None
        return inside, grad_step / step * ctx.scale, grad_low, None, None, None


def fake_quantize(x: Tensor, step: Tensor, low: Bound, high: Bound, scale: float = 1.0) -> Tensor:
    """Rounds ``x`` to the grid ``step * {low..high}``.

    Args:
        x: Real values.
        step: Positive step size(s), broadcastable to ``x``.
        low, high: Bounds in steps, relative to real 0; tensors where they depend on a learned zero-point (the gradient
            with respect to both is returned through ``low``, so pass ``high`` as ``low + const``, detached).
        scale: Factor on the gradients of the step and the zero-point (LSQ's ``1 / sqrt(N * high)``).

    Returns:
        Values on the grid, in the dtype of ``x``. The gradient of ``x`` is 1 inside the range and 0 outside.
    """
    again = _again(x, step, low, high) if active() and x.numel() >= WORTH else None
    result: Tensor = _FakeQuantize.apply(x, step, low, high, scale, again)
    if again is not None:
        again.mark(result)
    return result


def _again(x: Tensor, step: Tensor, low: Bound, high: Bound) -> Again | None:
    """How the result can be made again: in fp32 on a CPU, where it goes in pieces."""
    if x.dtype != torch.float32 or not torch.is_grad_enabled() or not _in_pieces(x, step):
        return None
    source = x.detach()
    numbers = [float(value.detach()) if isinstance(value, Tensor) else value for value in (step, low, high)]
    return Again(lambda: _round_pieces(source, *numbers))


def gradient_scale(numel: int, high: int) -> float:
    """LSQ's factor on the gradient of a step size: ``1 / sqrt(numel per step * largest integer)``."""
    return 1.0 / math.sqrt(numel * max(high, 1))


def released_scale(weight: Tensor, high: int) -> float:
    """The factor for per-channel steps in EQ-Net's released code: ``2 / sqrt(high * numel / size(1))``.

    It divides by the weights of one *input* channel where LSQ's rule has those of one output channel, which share the
    step. For comparisons with published numbers only.

    Args:
        weight: ``[out, in, ...]``.
        high: The largest integer.
    """
    return 2.0 / math.sqrt(max(high, 1) * weight.numel() / weight.shape[1])

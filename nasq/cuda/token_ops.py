"""The kernels of :mod:`nasq.cuda.tokens` as operators of torch, as in :mod:`nasq.cuda.ops`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nasq.cuda.ops import BLOCK, dense, operator, placed
from nasq.cuda.tokens import layer_norm_kernel, softmax_kernel, table_kernel

__all__ = ["LONGEST", "layer_norm", "softmax", "table"]

LONGEST = 1 << 14
"""Longest row that softmax and layer normalisation take: a row is held in registers."""


@operator("table")
def _table(x: Tensor, values: Tensor) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    with placed(x):
        table_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, values, y, x.numel(), BLOCK=BLOCK)
    return y


@_table.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def table(x: Tensor, values: Tensor) -> Tensor:
    """``values[x + 128]`` of every element.

    Args:
        x: int8, any shape.
        values: int8 ``[256]``.
    """
    assert x.dtype == values.dtype == torch.int8 and values.shape == (256,), values.shape
    result: Tensor = _table(x, values)
    return result


@operator("softmax")
def _softmax(x: Tensor, weights: Tensor, step: float, low: float, high: float, zero: float, causal: bool) -> Tensor:
    x = x.contiguous()
    y, columns = torch.empty_like(x), x.shape[-1]
    rows, warps = x.shape[-2] if x.ndim > 2 else 1, _warps(columns)
    with placed(x):
        softmax_kernel[(x.numel() // columns,)](
            x, weights, y, columns, rows, step, low, high, zero, CAUSAL=causal, BLOCK=triton.next_power_of_2(columns),
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@_softmax.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def softmax(x: Tensor, weights: Tensor, step: float, bounds: tuple[int, int, int], causal: bool = False) -> Tensor:
    """Softmax over the last dimension of int8 ``[..., rows, columns]``.

    Args:
        x: int8.
        weights: int32 ``[256]``: the numerator by distance to the largest integer.
        step: Of the output; a value that fp32 holds.
        bounds: The output's low and high minus its zero-point, and its zero-point minus its offset.
        causal: Whether row ``i`` sees only the columns up to ``i``.
    """
    assert x.dtype == torch.int8 and weights.dtype == torch.int32 and x.shape[-1] <= LONGEST, x.shape
    result: Tensor = _softmax(x, weights, step, *map(float, bounds), causal)
    return result


@operator("layer_norm")
def _layer_norm(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: Tensor,
    offset: int,
    step: float,
    low: float,
    high: float,
    zero: float,
) -> Tensor:
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    with placed(x):
        layer_norm_kernel[(x.numel() // width,)](
            x, gain, shift, y, width, offset, epsilon, step, low, high, zero, BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width), enable_fp_fusion=False,
        )  # fmt: skip
    return y


@_layer_norm.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def layer_norm(
    x: Tensor, gain: Tensor, shift: Tensor, epsilon: Tensor, offset: int, step: float, bounds: tuple[int, int, int]
) -> Tensor:
    """Normalisation over the last dimension of int8 ``[..., width]``.

    Args:
        x: int8, ``q - offset``.
        gain, shift: fp32 ``[width]``.
        epsilon: float64 ``[1]``: ``eps * width^2 / s_x^2``.
        offset: Of ``x``.
        step: Of the output; a value that fp32 holds.
        bounds: As in :func:`softmax`.
    """
    assert x.dtype == torch.int8 and x.shape[-1:] == gain.shape == shift.shape and len(gain) <= LONGEST, x.shape
    result: Tensor = _layer_norm(x, gain, shift, epsilon, offset, step, *map(float, bounds))
    return result


def _warps(width: int) -> int:
    """A warp for each 512 numbers of a row, up to 16."""
    return min(max(1 << (width - 1).bit_length() >> 9, 1), 16)

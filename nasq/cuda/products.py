"""Products of integers that are exact on a CUDA device too.

Integers held in fp32 are summed exactly while they stay below 2^24: on a CPU torch's own operators do. On CUDA they need
not: cuDNN may choose Winograd or FFT convolutions, which compute with fractions, and TF32. So there

* with the kernels of this package (:func:`accumulate`) layers run on int8 tensor cores and sum in int32;
* without them convolutions run in float64, and their results, integers but for a rounding error of at most
  ``1e-7``, are rounded; matrix products run in fp32 where torch's matrix precision is ``"highest"`` (the
  default: no TF32), else in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasq.cuda.support import usable

__all__ = ["accumulate", "conv2d", "fits", "linear", "matmul", "row_sums"]

_MIDDLE = 128  # int8 holds container integers 0..255 minus this
_LARGEST = 1 << 31


def conv2d(x: Tensor, weight: Tensor, **geometry: Any) -> Tensor:
    """``F.conv2d`` of integers held in fp32 or float64; exact on every device.

    Args:
        x, weight: Integers, of one dtype; in fp32 no sum may pass 2^24.
        geometry: ``stride``, ``padding``, ``dilation``, ``groups``.
    """
    if x.device.type != "cuda":
        return F.conv2d(x, weight, None, **geometry)
    return F.conv2d(x.double(), weight.double(), None, **geometry).round_()


def _plain(x: Tensor) -> bool:
    """Whether fp32 matrix products on the device of ``x`` are products of fp32 numbers."""
    return x.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` of integers, as :func:`conv2d`."""
    return F.linear(x, weight) if _plain(x) else F.linear(x.double(), weight.double())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of integers, as :func:`conv2d`."""
    return a @ b if _plain(a) else a.double() @ b.double()


def fits(depth: int, largest: int = 255) -> bool:
    """Whether int32 holds every sum of ``depth`` products of an 8-bit integer and one of at most ``largest``, twice."""
    return 2 * depth * _MIDDLE * largest < _LARGEST


def row_sums(weight: Tensor) -> Tensor:
    """The sum of each output channel's weights, int32 ``[out]``."""
    return weight.flatten(1).sum(1, dtype=torch.int64).int()


def accumulate(q: Tensor, zero: Tensor | float, weight: Tensor, geometry: Mapping[str, Any] | None) -> Tensor | None:
    """The accumulators of a layer in int32, by the kernels, or ``None`` where they cannot run.

    Args:
        q: Container integers 0..255 held in fp32: ``[N, C, H, W]``, or ``[..., in]`` for a linear layer.
        zero: Their zero-point.
        weight: Integers of -128..127 held in fp32: ``[out, in / groups, kh, kw]`` or ``[out, in]``.
        geometry: Of a convolution: ``stride``, ``padding``, ``dilation``, ``groups``; ``None``: a linear layer.

    Returns:
        ``sum (q - zero) * weight``, int32, shaped as the layer's output.
    """
    if not usable(q.device) or not fits(weight[0].numel(), 128) or not _simple(geometry):
        return None
    from nasq.cuda import ops

    stored = (q - _MIDDLE).to(torch.int8)
    small = weight.to(torch.int8)
    bias = ((_MIDDLE - torch.as_tensor(zero, device=q.device)).to(torch.int32) * row_sums(weight)).int()
    if geometry is None:
        made = ops.gemm(stored.reshape(1, -1, q.shape[-1]), small[None], bias)
        return made.reshape(*q.shape[:-1], len(weight))
    pairs: dict[str, Any] = {name: _pair(geometry[name]) for name in ("stride", "padding", "dilation")}
    groups, pad = int(geometry["groups"]), int(zero) - _MIDDLE
    if groups == q.shape[1] and groups > 1:
        return ops.depthwise(stored, small[:, 0].permute(1, 2, 0), bias, pad=pad, **pairs)
    return ops.conv2d(stored, small.permute(0, 2, 3, 1), bias, groups=groups, pad=pad, **pairs)


def _simple(geometry: Mapping[str, Any] | None) -> bool:
    return geometry is None or not isinstance(geometry["padding"], str)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))

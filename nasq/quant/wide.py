"""Sums that may pass 2^24, on fp32: the input's channels in parts, each of which stays below.

What fp32 adds is exact below 2^24. Beyond, float64 holds the sums, but its convolutions are several times slower: torch has
no fast kernel for them. So a layer whose sums could pass 2^24 adds up parts of its input's channels, each exact in fp32, and
the parts in float64: the same integers, at about the price of one fp32 layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nasq.quant.arithmetic import EXACT

__all__ = ["count_parts", "sum_in_parts"]

MOST = 8
"""Parts beyond which float64 is taken instead."""


def count_parts(weight: Tensor, largest: int, groups: int = 1) -> int | None:
    """The smallest number of equal parts of the input's channels whose sums all stay below 2^24.

    Args:
        weight: Integers as used: ``[out, in, ...]``.
        largest: Of the input's centred integers, in size.
        groups: Of the convolution.

    Returns:
        1 where the sums need no parts; ``None`` where so many as :data:`MOST` do not do it, or the layer has groups.
    """
    sums = weight.abs()
    sums = (sums.flatten(2).sum(2) if weight.ndim > 2 else sums).double()  # [out, in]; a kernel's sum is exact in fp32
    for parts in range(1, min(MOST, weight.shape[1]) + 1):
        if max(float(part.sum(1).max()) for part in sums.chunk(parts, 1)) * largest < EXACT:
            return parts
        if groups > 1:
            break
    return None


def sum_in_parts(x: Tensor, weight: Tensor, parts: int, geometry: Mapping[str, Any] | None) -> Tensor:
    """A layer's exact sums: fp32 where there is one part, else float64.

    Args:
        x: Centred integers, fp32: ``[N, in, H, W]``, or ``[..., in]`` for a linear layer.
        weight: Integers, fp32: ``[out, in, ...]``.
        parts: As :func:`count_parts` found.
        geometry: Of a convolution: ``stride``, ``padding``, ``dilation``, ``groups``; ``None``: a linear layer.
    """
    if parts == 1:
        return _layer(x, weight, geometry)
    pieces = zip(x.chunk(parts, -1 if geometry is None else 1), weight.chunk(parts, 1), strict=True)
    total: Tensor | None = None
    for inputs, weights in pieces:
        found = _layer(inputs, weights, geometry)
        total = found.double() if total is None else total.add_(found)
    assert total is not None
    return total


def _layer(x: Tensor, weight: Tensor, geometry: Mapping[str, Any] | None) -> Tensor:
    return F.linear(x, weight) if geometry is None else F.conv2d(x, weight, None, **geometry)

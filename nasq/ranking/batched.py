"""Kernels for per-sample gradients: the weight gradient of every sample from one batched backward pass.

With the inputs ``a`` of a layer and the gradients ``g`` of its outputs, sample ``n`` has the weight gradient

    dW_n[o, c, i, j] = sum over positions of g_n[o, p] * a_n[c, s p + d (i, j)]

which is one small matrix product per sample and kernel offset; nothing of size samples x weights is kept by the callers,
who take samples in pieces. Shapes: ``N`` samples, ``C`` input and ``O`` output channels, ``G`` groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FASTER", "Geometry", "convolve", "sample_gradients"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Of a convolution: ``(vertical, horizontal)`` pairs, and the number of groups."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


def sample_gradients(a: Tensor, g: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    """The gradient of every sample with respect to ``weight``: ``[N, *weight.shape]``.

    Args:
        a: Inputs of the layer, ``[N, C, H, W]``, or ``[N, ..., C]`` of a linear layer.
        g: Gradients of its outputs.
        weight: As the layer used it; only its shape counts.
        geometry: Of a convolution; ``None`` for a linear layer.
    """
    if geometry is None:
        return _linear(a, g)
    if weight[0, 0].numel() == 1 and geometry == Geometry((1, 1), (0, 0), geometry.dilation, 1):
        return torch.bmm(g.flatten(2), a.flatten(2).transpose(1, 2))[..., None, None]
    if a.device.type == "cpu" and a.dtype == torch.float32:
        return _grouped(a, g, weight, geometry)
    if geometry.groups == 1 and geometry.stride == (1, 1) and geometry.dilation == (1, 1):
        return _shifted(a, g, weight, geometry)
    return _unfolded(a, g, weight, geometry)


def _grouped(a: Tensor, g: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Samples as groups of one convolution of a single image, whose weight gradient is theirs side by side.

    On a CPU that is twice as fast as matrix products in float32 (and far slower in float64, which has no such kernel).
    """
    count = len(a)
    # Of the weight only the shape is read.
    shape = weight.new_empty(count * len(weight), *weight.shape[1:])
    found = torch.ops.aten.convolution_backward(
        g.reshape(1, -1, *g.shape[2:]), a.reshape(1, -1, *a.shape[2:]), shape, None,
        geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), count * geometry.groups, (False, True, False),
    )  # fmt: skip
    return found[1].reshape(count, *weight.shape)  # type: ignore[no-any-return]


def _linear(a: Tensor, g: Tensor) -> Tensor:
    """Positions of one sample (tokens) add up."""
    count = len(a)
    return torch.bmm(g.reshape(count, -1, g.shape[-1]).transpose(1, 2), a.reshape(count, -1, a.shape[-1]))


def _shifted(a: Tensor, g: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Stride 1: every kernel offset is the same product on a shifted view of the padded input; no copy per offset.

    With rows padded to one width, moving by an offset is moving by a number in the flat map. What a row of ``g`` is padded
    with is zero, so the columns that a shift wraps into the next row add nothing.
    """
    (vertical, horizontal), (high, wide) = geometry.padding, weight.shape[2:]
    padded = F.pad(a, (horizontal, horizontal, vertical, vertical))
    width = padded.shape[3]
    rows = F.pad(g, (0, width - g.shape[3])).flatten(2)
    length = rows.shape[2] - (width - g.shape[3])
    rows, flat = rows[:, :, :length], padded.flatten(2)
    made = g.new_empty(len(a), high, wide, *weight.shape[:2])
    for i in range(high):
        for j in range(wide):
            start = i * width + j
            torch.bmm(rows, flat[:, :, start : start + length].transpose(1, 2), out=made[:, i, j])
    return made.permute(0, 3, 4, 1, 2)


def _unfolded(a: Tensor, g: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Any geometry: patches as columns, groups as further batches."""
    count, groups = len(a), geometry.groups
    patches = F.unfold(a, tuple(weight.shape[2:]), geometry.dilation, geometry.padding, geometry.stride)
    columns = patches.reshape(count * groups, -1, patches.shape[2])
    rows = g.flatten(2).reshape(count * groups, -1, columns.shape[2])
    return torch.bmm(rows, columns.transpose(1, 2)).reshape(count, *weight.shape)


def convolve(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    """``func(x, weight, bias, *geometry)``; on a CPU a 1x1 convolution is a plain matrix product, which is faster."""
    plain = x.device.type == "cpu" and geometry and weight.ndim == 4 and weight.shape[2:] == (1, 1)
    if not plain or bias is not None or x.ndim != 4 or not x.is_contiguous():
        return func(x, weight, bias, *geometry)  # type: ignore[no-any-return]
    stride, padding, _, groups = geometry
    if groups != 1 or padding not in {0, (0, 0), "valid", "same"} or stride not in {1, (1, 1)}:
        return func(x, weight, bias, *geometry)  # type: ignore[no-any-return]
    return torch.matmul(weight.flatten(1), x.flatten(2)).reshape(len(x), -1, *x.shape[2:])


class _BoxSum(torch.autograd.Function):
    """Sums of 3x3 windows, zeros around: symmetric, so its gradient is itself, as often as one differentiates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _box(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _BoxSum.apply(grads[0])


def _box(x: Tensor) -> Tensor:
    """Sums of 3x3 windows, zeros around."""
    if x.dtype == torch.float32:  # as a convolution of single channels: one call, which float64 has no fast form of
        return F.conv2d(x, _ones(x.shape[1]), None, 1, 1, 1, x.shape[1])
    rows = x.clone()
    rows[..., 1:] += x[..., :-1]
    rows[..., :-1] += x[..., 1:]
    made = rows.clone()
    made[..., 1:, :] += rows[..., :-1, :]
    made[..., :-1, :] += rows[..., 1:, :]
    return made


@functools.lru_cache(maxsize=16)
def _ones(channels: int) -> Tensor:
    """The weights of that convolution; never changed."""
    with torch.inference_mode(False):  # what is kept may serve a pass with gradients later
        return torch.ones(channels, 1, 3, 3)


@functools.lru_cache(maxsize=16)
def _shares(height: int, width: int, dtype: torch.dtype) -> Tensor:
    """One over the number of pixels of each 3x3 window; never changed."""
    with torch.inference_mode(False):
        return _box(torch.ones(1, 1, height, width, dtype=dtype)).reciprocal_()


def _avg_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Tensor:  # fmt: skip
    """torch's pooling does not vectorise on the usual layout on a CPU; the window of most cell spaces gets its own form."""
    same = {3: {3, (3, 3)}, 1: {1, (1, 1)}}
    usual = kernel_size in same[3] and stride in same[1] and padding in same[1] and not count_include_pad
    if usual and divisor_override is None and input.device.type == "cpu" and input.ndim == 4:
        return _BoxSum.apply(input) * _shares(input.shape[2], input.shape[3], input.dtype)  # type: ignore[no-any-return]
    return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


FASTER: dict[Any, Callable[..., Tensor]] = {F.avg_pool2d: _avg_pool2d}
"""Operations with a faster form, twice differentiable too: equal up to rounding."""

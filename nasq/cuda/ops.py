"""The kernels as operators of torch (``torch.ops.nasq``): shapes checked, launched on the tensors' device.

A tensor is int8, ``q - offset`` (:mod:`nasq.cuda.kernels`). What comes behind the accumulator is an :class:`Epilogue`;
without one an operator returns its int32 accumulators. They have meta forms, so ``torch.compile`` and
``FakeTensorMode`` know what they make; there are no gradients.

Images are ``[N, C, H, W]`` in channels_last memory order (others are copied into it).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nasq.cuda.kernels import conv_kernel, depthwise_kernel, gemm_kernel
from nasq.cuda.nibbles import halves, split_of
from nasq.cuda.pointwise import add_kernel
from nasq.cuda.thin import reduce_kernel, thin_kernel

__all__ = [
    "Epilogue", "add", "conv2d", "dense", "depthwise", "gemm", "operator", "placed", "thin_gemm",
]  # fmt: skip

BLOCK = 1024  # elements of one program of a pointwise kernel


@dataclass(frozen=True)
class Epilogue:
    """What turns an accumulator into integers: ``clip(rne(fp32(acc) * scale), low, high) + zero``.

    Attributes:
        scale: fp32 ``[N]``: ``fp32(fp32(s_x * s_w) / s_y)``.
        low, high: The output's bounds minus its zero-point.
        zero: The output's zero-point minus its offset.
    """

    scale: Tensor
    low: int
    high: int
    zero: int


def operator(name: str) -> Callable[[Any], Any]:
    """Registers a function as ``torch.ops.nasq.<name>``."""
    return torch.library.custom_op(f"nasq::{name}", mutates_args=())


def placed(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device: inside, that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _bucket(rows: int) -> int:
    """Rows up to the next power of two share a configuration."""
    return min(1 << max(rows - 1, 1).bit_length(), 1 << 16)


def _kind(scale: Tensor | None) -> torch.dtype:
    return torch.int32 if scale is None else torch.int8


@operator("gemm")
def _gemm(
    a: Tensor, b: Tensor, bias: Tensor | None, scale: Tensor | None,
    low: float, high: float, zero: float, extra_a: int, extra_b: int,
) -> Tensor:  # fmt: skip
    a, b = a.contiguous(), b.contiguous()
    count, rows, depth = a.shape
    columns = b.shape[1]
    y = torch.empty((count, rows, columns), dtype=_kind(scale), device=a.device)
    with placed(a):
        gemm_kernel[lambda meta: (triton.cdiv(rows, meta["BM"]) * triton.cdiv(columns, meta["BN"]), count)](
            a, b, b if bias is None else bias, b if scale is None else scale, y, rows, columns, depth, _bucket(rows),
            rows * depth, columns * depth if len(b) > 1 else 0, low, high, zero, EXTRA_A=extra_a, EXTRA_B=extra_b,
            FUSED=scale is not None, HAS_BIAS=bias is not None, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@_gemm.register_fake
def _(a: Tensor, b: Tensor, bias: Any, scale: Tensor | None, *rest: Any) -> Tensor:
    return a.new_empty((len(a), a.shape[1], b.shape[1]), dtype=_kind(scale))


def gemm(
    a: Tensor, b: Tensor, bias: Tensor | None = None, epilogue: Epilogue | None = None, extra: tuple[int, int] = (0, 0)
) -> Tensor:
    """``(a + extra[0]) (b + extra[1])^T + bias``, batched.

    Args:
        a: int8 ``[B, M, K]``.
        b: int8 ``[B, N, K]``, or ``[1, N, K]``: one for all.
        bias: int32 ``[N]``.
        epilogue: Without one the int32 accumulators are returned.
        extra: Added to every element of ``a`` and ``b``: where offsets are not the zero-points and neither is constant.

    Returns:
        ``[B, M, N]``.
    """
    assert a.dtype == b.dtype == torch.int8 and a.shape[2] == b.shape[2] and len(b) in (1, len(a)), (a.shape, b.shape)
    scale, *bounds = _parts(epilogue)
    result: Tensor = _gemm(a, b, bias, scale, *bounds, *extra)
    return result


def _parts(epilogue: Epilogue | None) -> tuple[Any, ...]:
    if epilogue is None:
        return None, 0.0, 0.0, 0.0
    return epilogue.scale, float(epilogue.low), float(epilogue.high), float(epilogue.zero)


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Places of a window along one side."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _image(x: Tensor, weight_hw: tuple[int, int], out: int, geometry: list[int], dtype: torch.dtype) -> Tensor:
    """The output of a convolution, uninitialised, in channels_last order."""
    (height, width), (sh, sw, ph, pw, dh, dw) = weight_hw, geometry
    size = (out_size(x.shape[2], height, sh, ph, dh), out_size(x.shape[3], width, sw, pw, dw))
    return torch.empty((len(x), out, *size), dtype=dtype, device=x.device, memory_format=torch.channels_last)


@operator("conv2d")
def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    low: float, high: float, zero: float, geometry: list[int], groups: int, pad: int,
) -> Tensor:  # fmt: skip
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
    out, height, width, narrow = weight.shape
    y = _image(x, (height, width), out, geometry, _kind(scale))
    rows, (sh, sw, ph, pw, dh, dw) = len(y) * y.shape[2] * y.shape[3], geometry
    with placed(x):
        conv_kernel[lambda meta: (triton.cdiv(rows, meta["BM"]) * triton.cdiv(out // groups, meta["BN"]), groups)](
            x, weight, bias, bias if scale is None else scale, y, rows, *x.shape[2:], *y.shape[2:], _bucket(rows),
            low, high, zero, OUT=out // groups, C=narrow, GROUPS=groups, KH=height, KW=width, SH=sh, SW=sw, PH=ph, PW=pw,
            DH=dh, DW=dw, PAD=pad, FUSED=scale is not None, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@_conv2d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Any, low: Any, high: Any, zero: Any, geometry: list[int], *rest: Any
) -> Tensor:
    return _image(x, (weight.shape[1], weight.shape[2]), len(weight), geometry, _kind(scale))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epilogue: Epilogue | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    pad: int = 0,
) -> Tensor:
    """A 2-d convolution of int8 ``[N, C, H, W]``.

    Args:
        x: int8.
        weight: int8 ``[O, kh, kw, C / groups]`` (channels last).
        bias: int32 ``[O]``.
        epilogue: Without one the int32 accumulators are returned.
        stride, padding, dilation, groups: As in torch.
        pad: What stands for real 0 in ``x``: its zero-point minus its offset.

    Returns:
        ``[N, O, OH, OW]``, channels_last.
    """
    assert x.dtype == weight.dtype == torch.int8 and x.shape[1] == weight.shape[3] * groups, (x.shape, weight.shape)
    scale, *bounds = _parts(epilogue)
    result: Tensor = _conv2d(x, weight, bias, scale, *bounds, [*stride, *padding, *dilation], groups, pad)
    return result


@operator("depthwise")
def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    low: float, high: float, zero: float, geometry: list[int], pad: int,
) -> Tensor:  # fmt: skip
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
    height, width, out = weight.shape
    y = _image(x, (height, width), out, geometry, _kind(scale))
    rows, (sh, sw, ph, pw, dh, dw) = len(y) * y.shape[2] * y.shape[3], geometry
    with placed(x):
        depthwise_kernel[lambda meta: (triton.cdiv(rows, meta["BM"]), triton.cdiv(out, meta["BN"]))](
            x, weight, bias, bias if scale is None else scale, y, rows, *x.shape[2:], *y.shape[2:], _bucket(rows),
            low, high, zero, C=out, MULTIPLE=out // x.shape[1], KH=height, KW=width, SH=sh, SW=sw, PH=ph, PW=pw,
            DH=dh, DW=dw, PAD=pad, FUSED=scale is not None, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@_depthwise.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Any, low: Any, high: Any, zero: Any, geometry: list[int], pad: int
) -> Tensor:
    return _image(x, (weight.shape[0], weight.shape[1]), weight.shape[2], geometry, _kind(scale))


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    epilogue: Epilogue | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    pad: int = 0,
) -> Tensor:
    """As :func:`conv2d` with as many groups as ``x`` has channels; ``weight`` is int8 ``[kh, kw, O]``."""
    assert x.dtype == weight.dtype == torch.int8 and weight.shape[2] % x.shape[1] == 0, (x.shape, weight.shape)
    scale, *bounds = _parts(epilogue)
    result: Tensor = _depthwise(x, weight, bias, scale, *bounds, [*stride, *padding, *dilation], pad)
    return result


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@operator("thin_gemm")
def _thin(
    x: Tensor, weight: Tensor, shift: Tensor, bias: Tensor, scale: Tensor | None,
    low: float, high: float, zero: float, packed: bool, split: int,
) -> Tensor:  # fmt: skip
    x, weight = x.contiguous(), weight.contiguous()
    (rows, depth), (columns, half) = x.shape, weight.shape
    split = split or split_of(rows, columns, half, _processors(x.device))
    parts = torch.empty((split, rows, columns), dtype=torch.int32, device=x.device)
    y = torch.empty((rows, columns), dtype=_kind(scale), device=x.device)
    width = min(max(16, triton.next_power_of_2(rows)), 64)
    with placed(x):
        thin_kernel[lambda meta: (triton.cdiv(columns, meta["BN"]), triton.cdiv(rows, width), split)](
            x, weight, parts, rows, columns, depth, half, SPLIT=split, PACKED=packed, BM=width
        )
        reduce_kernel[(triton.cdiv(rows * columns, BLOCK),)](
            parts, shift, bias, bias if scale is None else scale, y, rows * columns, columns, low, high, zero,
            SPLIT=split, FUSED=scale is not None, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@_thin.register_fake
def _(x: Tensor, weight: Tensor, shift: Tensor, bias: Tensor, scale: Tensor | None, *rest: Any) -> Tensor:
    return x.new_empty((len(x), len(weight)), dtype=_kind(scale))


def thin_gemm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    bias: Tensor,
    epilogue: Epilogue | None = None,
    *,
    packed: bool,
    split: int = 0,
) -> Tensor:
    """``((x w^T) << shift) + bias`` for few rows.

    Args:
        x: int8 ``[M, K]``, ``M`` up to a few hundred.
        weight: int8 ``[N, K]``, or with ``packed`` what :func:`nasq.cuda.nibbles.pack_w4` made of it.
        shift: int32 ``[N]``.
        bias: int32 ``[N]``.
        epilogue: Without one the int32 accumulators are returned.
        packed: Whether weights are two to a byte.
        split: In how many parts the sum is cut; 0: :func:`nasq.cuda.nibbles.split_of` decides. It changes no integer.

    Returns:
        ``[M, N]``.
    """
    wanted = halves(x.shape[1]) if packed else x.shape[1]
    assert x.dtype == weight.dtype == torch.int8 and weight.shape[1] == wanted, (x.shape, weight.shape)
    scale, *bounds = _parts(epilogue)
    result: Tensor = _thin(x, weight, shift, bias, scale, *bounds, packed, split)
    return result


@operator("add")
def _add(a: Tensor, b: Tensor, factors: Tensor, offsets: list[int], low: float, high: float) -> Tensor:
    y = torch.empty_like(a)
    with placed(a):
        add_kernel[(triton.cdiv(a.numel(), BLOCK),)](
            a, b, y, factors, a.numel(), *map(float, offsets), low, high, BLOCK=BLOCK, enable_fp_fusion=False
        )
    return y


@_add.register_fake
def _(a: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(a)


def add(a: Tensor, b: Tensor, factors: Tensor, offsets: tuple[int, int, int], low: int, high: int) -> Tensor:
    """The sum of two tensors of equal shape, by onnxruntime's rule.

    Args:
        a, b: int8; ``b`` is copied where it is laid out in another order than ``a``.
        factors: fp32 ``[3]``: ``r_a``, ``r_b``, ``f`` (:func:`nasq.quant.arithmetic.add_integers`).
        offsets: Of ``a``, ``b`` and the output.
        low, high: Bounds of the output's container integers.
    """
    assert a.dtype == b.dtype == torch.int8 and a.shape == b.shape, (a.shape, b.shape)
    if a.stride() != b.stride() or not _dense(a):
        order = torch.channels_last if a.ndim == 4 else torch.contiguous_format
        a, b = a.contiguous(memory_format=order), b.contiguous(memory_format=order)
    result: Tensor = _add(a, b, factors, list(offsets), float(low), float(high))
    return result


def dense(x: Tensor) -> Tensor:
    """The tensor without gaps in memory; itself where there are none."""
    return x if _dense(x) else x.contiguous()


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in one of the two orders."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))

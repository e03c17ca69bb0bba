"""The integer arithmetic of quantized networks, as pure functions on tensors.

It computes what the exported file computes, on integers held in fp32 (`docs/integer_arithmetic.md`); the form that training
uses is in :mod:`nasq.quant.fake`. ``rne`` below rounds half to even, as ``torch.round`` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nasq.quant.operations import GROUP_UNIT

__all__ = [
    "EXACT",
    "STEP_FLOOR",
    "IntegerLayer",
    "add_integers",
    "integer_layer",
    "is_wide",
    "look_up",
    "pool_multiplier",
    "requantize",
    "round_ste",
    "snapped_step",
    "spread_groups",
    "to_integers",
]

STEP_FLOOR = 2.0**-24
"""Smallest step size."""
EXACT = 2.0**24
"""Integers below this are exact in fp32."""
_PIECE = 1 << 16
"""Elements worked on at once."""
_FINE = 16.0
"""A bias grid is fine enough at 1/16 of an output step."""


def round_ste(x: Tensor) -> Tensor:
    """Rounds half to even; the gradient passes straight through."""
    return x + (x.round() - x).detach()


def snapped_step(log_step: Tensor, slope: Tensor | None = None) -> Tensor:
    """The learned step rounded, as a logarithm and straight-through, to a power of two, fp32.

    Args:
        log_step: Natural logarithm of the learned step(s).
        slope: What follows the step (BatchNorm's scale, any sign), broadcastable to it: then step times its size is the
            power of two. Where it is next to 0 the channel is constant, and the step alone is rounded.
    """
    exponent = (log_step.double() / math.log(2)).clamp_min(math.log2(STEP_FLOOR))
    if slope is None:
        return torch.exp2(round_ste(exponent)).float()
    size = slope.detach().double().abs()
    size = torch.where(size > 2.0**-60, size, 1.0)
    return (torch.exp2(round_ste(exponent + size.log2())) / size).float()


def to_integers(x: Tensor, step: Tensor, zero_point: float | Tensor, low: int, high: int) -> Tensor:
    """``clip(rne(x / step) + zero_point, low, high)`` in fp32: what QuantizeLinear and a Clip compute."""
    return (torch.round(x / step) + zero_point).clamp_(low, high)


@dataclass(frozen=True)
class IntegerLayer:
    """The integers of a convolution or linear layer (see :class:`nasq.quant.program.Linear`).

    Attributes:
        weight: ``[out, ...]`` integers minus their zero-point, before ``shift``, as fp32.
        shift: ``[out]`` integers: the weights used are ``weight * 2^shift``.
        scale: fp32 ``[out]``, positive: real value of one unit of the shifted weight.
        bias: ``[out]`` integers in units of ``input step * scale``, as fp32 (all below 2^24).
        zero: ``[out]`` (with groups ``[out, groups]``) zero-points of asymmetric weights, as fp32; ``None``: all are 0.
        multipliers: float64 ``[out, groups]``: a unit of a group is ``multiplier * 2^-22`` of ``scale``; ``None``: no groups.
        sizes: Inputs of every group.
    """

    weight: Tensor
    shift: Tensor
    scale: Tensor
    bias: Tensor
    zero: Tensor | None = None
    multipliers: Tensor | None = None
    sizes: tuple[int, ...] = ()

    @property
    def shifted(self) -> Tensor:
        """The weights as the runtime holds them."""
        return self.weight * torch.exp2(self.shift).reshape(-1, *[1] * (self.weight.ndim - 1))

    @property
    def summed(self) -> Tensor:
        """The weights in units of ``scale``: with groups float64, and multiples of ``2^-22``, whose sums are exact."""
        if self.multipliers is None:
            return self.shifted
        return self.shifted.double() * spread_groups(self.multipliers / GROUP_UNIT, self.sizes)


def spread_groups(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``[out, groups]`` as ``[out, inputs]``, every group's value repeated for its inputs."""
    return values.repeat_interleave(torch.tensor(sizes, device=values.device), dim=1)


def integer_layer(
    weight: Tensor, step: Tensor, bits: int, slope: Tensor, offset: Tensor, step_in: Tensor, step_out: Tensor,
    power_of_two: bool = False,
) -> IntegerLayer:  # fmt: skip
    """Puts the affine behind a convolution (BatchNorm, bias) into scales and an integer bias.

    The layer computes ``slope * step * sum(q_w q_x step_in) + offset``; the weight's sign already holds the sign of
    ``slope``. Three things keep it exact and representable:

    * where the bias grid is coarser than 1/16 of an output step and the weights have fewer than 8 bits, the layer's
      weights are used shifted left, so that the grid is finer;
    * where the bias would need 2^24 or more (a slope near 0), the channel is constant: its weights become 0 and its
      scale is raised until the bias fits;
    * no scale is 0.

    Args:
        weight: ``[out, ...]`` integers, as fp32.
        step: Weight step(s): 0-d or ``[out]``.
        bits: Of the weights.
        slope, offset: float64 ``[out]``, in real units; slopes may be negative (only their size is used) or 0.
        step_in, step_out: 0-d steps of input and output.
        power_of_two: Whether every scale is to be one: ``step`` times ``slope`` is, but for rounding.
    """
    s_in, s_out = step_in.double(), step_out.double()
    raw = step.double() * slope.abs()
    raw = (torch.exp2(torch.log2(raw).round()) if power_of_two else raw).float()
    # A channel whose weights move the output by less than 2^-24 steps, or whose bias does not fit, is constant.
    constant = (raw.double() * s_in < s_out * 2.0**-40) | (offset.abs() >= raw.double() * s_in * (EXACT - 1))
    fitting = torch.maximum(offset.abs() / (s_in * 2.0**15), s_out / s_in * 2.0**-15)
    fitting = torch.exp2(torch.log2(fitting).ceil()) if power_of_two else fitting
    scale = torch.where(constant, fitting.float(), raw)
    weight = torch.where(constant.reshape(-1, *[1] * (weight.ndim - 1)), torch.zeros_like(weight), weight)
    grid = scale.double() * s_in
    wanted = torch.ceil(torch.log2(grid * _FINE / s_out)).max()
    room = torch.floor(torch.log2((EXACT - 1) / (offset.abs() / grid + 1))).min()
    shift = torch.minimum(wanted, room).clamp(0, max(8 - bits, 0))
    scale = (scale.double() * torch.exp2(-shift)).float()
    unit = (step_in.float() * scale).double()
    shifts = shift.float().expand(len(scale))
    return IntegerLayer(weight, shifts, scale, torch.round(offset / unit).float())


def is_wide(weight: Tensor, low: int, high: int, zero_point: int) -> bool:
    """Whether an accumulator may pass 2^24, so that fp32 cannot hold it.

    Args:
        weight: ``[out, ...]`` integers as used (shifted).
        low, high, zero_point: Of the input.
    """
    largest = max(abs(low - zero_point), abs(high - zero_point))
    return float(weight.abs().flatten(1).sum(1, dtype=torch.float64).max()) * largest >= EXACT


def requantize(
    accumulator: Tensor,
    layer: IntegerLayer,
    step_in: Tensor,
    step_out: Tensor,
    zero_point: float | Tensor,
    low: int,
    high: int,
    shape: tuple[int, ...] | None = None,
    shortcut: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``clip(rne(fp32(acc + bias) * M) + zero_point)`` with ``M = fp32(fp32(step_in * scale) / step_out)``.

    With a shortcut (a sum by the rule ``"one"``): ``clip(rne(fp32(fp32(fp32(acc + bias) * M) + fp32(q R))) + zero_point)``,
    ``R = fp32(s / step_out)``, ``q`` its centred integers and ``s`` its step.

    Args:
        accumulator: ``[N, out, ...]`` exact integers, fp32, float64 or int32; its memory is used for the result.
        layer: Its scales and biases.
        step_in, step_out, zero_point, low, high: Of input and output.
        shape: What makes ``[out]`` run along the accumulator's channels, where these are not its second dimension.
        shortcut: Integers minus their zero-point, and their step.
    """
    shape = shape or (1, -1, *[1] * (accumulator.ndim - 2))
    multiplier = ((step_in.float() * layer.scale) / step_out.float()).reshape(shape)
    bias, beside = layer.bias.to(accumulator.dtype).reshape(shape), None
    if shortcut is not None:
        beside = (shortcut[0], shortcut[1].float() / step_out.float())
    if accumulator.device.type != "cpu":
        return _placed(accumulator + bias, multiplier, beside, zero_point, low, high)
    # As large as one image, so that what is broadcast runs along memory as the accumulator does.
    one = accumulator.shape[1:]
    bias, multiplier = (_laid_out(part, one, accumulator) for part in (bias, multiplier))
    made = accumulator if accumulator.dtype == torch.float32 else torch.empty_like(accumulator, dtype=torch.float32)
    at_once = max(1, _PIECE // max(1, one.numel()))
    for start in range(0, len(accumulator), at_once):
        rows = slice(start, start + at_once)
        near = None if beside is None else (beside[0] if len(beside[0]) == 1 else beside[0][rows], beside[1])
        total = accumulator[rows].add_(bias)
        out = total if made is accumulator else made[rows].copy_(total)
        _placed(out, multiplier, near, zero_point, low, high)
    return made


def _laid_out(part: Tensor, one: tuple[int, ...], like: Tensor) -> Tensor:
    """``[1, *one]``: what is the same for every image, in the memory order of ``like``."""
    last = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    return part.expand(1, *one).contiguous(memory_format=order)


def _placed(
    total: Tensor,
    multiplier: Tensor,
    beside: tuple[Tensor, Tensor] | None,
    zero_point: float | Tensor,
    low: int,
    high: int,
) -> Tensor:
    """Accumulators with their bias to container integers, in place where they are fp32."""
    steps = total.float().mul_(multiplier)
    if beside is not None:
        steps = steps.add_(beside[0] * beside[1])
    steps = steps.round_()
    if not (isinstance(zero_point, float) and zero_point == 0):
        steps = steps.add_(zero_point)
    return steps.clamp_(low, high)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` rounded once to fp32. The product of an 8-bit integer and an fp32 number is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def add_integers(
    a: Tensor,
    b: Tensor,
    steps: tuple[Tensor, Tensor, Tensor],
    zeros: tuple[float | Tensor, float | Tensor, float | Tensor],
    low: int,
    high: int,
) -> Tensor:
    """The sum as onnxruntime's QLinearAdd computes it, container integers in and out.

    ``clip(rne(fma(a, r_a, fma(b, r_b, f))))`` with ``r = fp32(s / s_y)`` and ``f = z_y - fma(r_a, z_a, fp32(r_b z_b))``.

    Args:
        a, b: Container integers, as fp32.
        steps, zeros: Of a, b and the output, in this order.
    """
    ratio_a, ratio_b = steps[0] / steps[2], steps[1] / steps[2]
    zero_a, zero_b, zero_y = (
        z.to(a.device, torch.float32) if isinstance(z, Tensor) else _number(z, a.device) for z in zeros
    )
    fixed = zero_y - _fma(ratio_a, zero_a, ratio_b * zero_b)
    # In memory order and in pieces that stay in a core's cache: the float64 in between is most of the work.
    a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    last = a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    made = torch.empty_like(a, memory_format=order)
    flat = [_flat(x.contiguous(memory_format=order), last) for x in (a, b)]
    pieces = (torch.split(part, _PIECE) for part in (*flat, _flat(made, last)))
    if a.device.type == "cpu":
        plain = [float(part) for part in (ratio_a, ratio_b, fixed)]  # on another device that would wait for it
        for x, y, out in zip(*pieces, strict=True):
            _add_piece(x, y, out, *plain).round_().clamp_(low, high)
        return made
    for x, y, out in zip(*pieces, strict=True):
        out.copy_(_fma(x, ratio_a, _fma(y, ratio_b, fixed)).round_().clamp_(low, high))
    return made


def _add_piece(a: Tensor, b: Tensor, out: Tensor, ratio_a: float, ratio_b: float, fixed: float) -> Tensor:
    """``fma(a, ratio_a, fma(b, ratio_b, fixed))`` into ``out``, each rounded once to fp32 from float64."""
    inner = torch.add(b.new_full((), fixed, dtype=torch.float64), b.double(), alpha=ratio_b)
    return out.copy_(torch.add(out.copy_(inner).double(), a.double(), alpha=ratio_a))


def look_up(table: Tensor, integers: Tensor) -> Tensor:
    """``table[integers]`` of integers held in fp32, in their memory order.

    Indices of 32 bits along one dimension: six times as fast on a CPU as indexing with a tensor of 64.
    """
    last = integers.ndim == 4 and not integers.is_contiguous()
    last = last and integers.is_contiguous(memory_format=torch.channels_last)
    found = table.index_select(0, _flat(integers, last).int())
    if not last:
        return found.reshape(integers.shape)
    count, channels, rows, columns = integers.shape
    return found.reshape(count, rows, columns, channels).permute(0, 3, 1, 2)


def _flat(x: Tensor, last: bool) -> Tensor:
    return (x.permute(0, 2, 3, 1) if last else x).reshape(-1)


def pool_multiplier(step_in: Tensor, step_out: Tensor, count: int, whole: bool) -> Tensor:
    """What turns the sum over a window of ``count`` integers into output steps, fp32.

    Args:
        whole: Whether the window is the whole map: the runtime has a kernel of its own for that, while windows run as
            a depthwise convolution of ones, which multiplies in another order.
    """
    if whole:
        return step_in / (step_out * float(count))
    return (step_in * _number(1.0 / count, step_in.device)) / step_out


def _number(value: float, device: torch.device) -> Tensor:
    """An fp32 number made on the device: one that is copied there waits for it, which no CUDA graph can hold."""
    return torch.full((), value, dtype=torch.float32, device=device)

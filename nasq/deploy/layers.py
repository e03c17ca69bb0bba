"""Checks of the layers that hold weights: arrays, weight ranges, scales, and how far their accumulators reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nasq.errors import ArtifactError
from nasq.quant.operations import GROUP_UNIT
from nasq.quant.packing import value_range
from nasq.quant.program import Conv, Linear, Tensor

__all__ = ["accumulator_bound", "check_layer"]

INT32_LIMIT = 1 << 31
FP32_LIMIT = 1 << 24  # fp32 holds every integer up to here


def accumulator_bound(op: Linear, source: Tensor) -> NDArray[np.int64]:
    """The largest magnitude that each output channel's accumulator, or any partial sum of it, can reach.

    Exact for inputs within ``[source.low, source.high]`` (and the zero-point, which padding inserts). The bias is not
    part of it.

    Args:
        op: The layer; its weights count as used, without zero-points and shifted (multipliers of groups only lessen them).
        source: The tensor it reads.

    Returns:
        int64 ``[out]``.
    """
    least, most = min(source.low - source.zero_point, 0), max(source.high - source.zero_point, 0)
    above, below = _sums(op)
    return np.asarray(np.maximum(above * most - below * least, below * most - above * least), np.int64)


def _sums(op: Linear) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per output channel the sum of the positive weights as used, and that of the negative ones' magnitudes."""
    if op.weight_zero is None:  # without copies of eight times their size
        weight, factor = op.weight.reshape(len(op.weight), -1), 1 << op.shift.astype(np.int64)
        above = np.maximum(weight, 0).sum(1, dtype=np.int64)
        return above * factor, (above - weight.sum(1, dtype=np.int64)) * factor
    used = op.used.reshape(len(op.weight), -1)
    above = np.maximum(used, 0).sum(1)
    return above, above - used.sum(1)


def check_layer(op: Linear, source: Tensor) -> None:
    """Checks a layer's arrays against each other and against the tensors around it.

    Raises:
        ArtifactError: An array has another shape or type, a value is out of range, or an accumulator may overflow.
    """
    _check_arrays(op)
    _check_groups(op)
    _check_weights(op)
    _check_scales(op, source)
    _check_accumulators(op, source)


def _check_arrays(op: Linear) -> None:
    rank = 4 if isinstance(op, Conv) else 2
    if op.weight.dtype != np.int8 or op.weight.ndim != rank or min(op.weight.shape) < 1:
        raise ArtifactError(
            f"its weights are {op.weight.dtype} of shape {op.weight.shape}; allowed: int8 of rank {rank}."
        )
    out = op.weight.shape[0]
    for name, dtype in (
        ("shift", np.uint8), ("weight_scale", np.float32), ("bias", np.int32), ("weight_zero", np.int8),
    ):  # fmt: skip
        array = getattr(op, name)
        if array is None and name == "weight_zero":
            continue
        shape = (out, len(op.sizes)) if name == "weight_zero" and op.multipliers is not None else (out,)
        if array.dtype != dtype or array.shape != shape:
            raise ArtifactError(
                f"its {name} is {array.dtype} of shape {array.shape}; allowed: {np.dtype(dtype)} of shape {shape}."
            )
    if isinstance(op, Conv) and (op.groups < 1 or out % op.groups):
        raise ArtifactError(f"its {out} output channels cannot be divided into {op.groups} groups.")


def _check_groups(op: Linear) -> None:
    if op.multipliers is None:
        if op.sizes:
            raise ArtifactError(f"it has {len(op.sizes)} groups of inputs and no multipliers for them.")
        return
    if isinstance(op, Conv) or not op.wide:
        raise ArtifactError(
            "groups of inputs have scales of their own: allowed in linear layers that are marked as wide, since their sums "
            "are of float64."
        )
    out, inputs = op.weight.shape
    if min(op.sizes, default=0) < 1 or sum(op.sizes) != inputs:
        raise ArtifactError(f"its groups have {sum(op.sizes)} inputs, and it reads {inputs}; none may be empty.")
    found = op.multipliers
    if found.dtype != np.int32 or found.shape != (out, len(op.sizes)):
        raise ArtifactError(
            f"its multipliers are {found.dtype} of shape {found.shape}; allowed: int32 of shape ({out}, {len(op.sizes)})."
        )
    if found.min() < 1 or found.max() > GROUP_UNIT:
        raise ArtifactError(f"its multipliers reach from {found.min()} to {found.max()}. Allowed: 1 to 2^22.")


def _check_weights(op: Linear) -> None:
    if not 1 <= op.weight_bits <= 8:
        raise ArtifactError(f"weights of {op.weight_bits} bits are not allowed: 1 to 8.")
    low, high = value_range(op.weight_bits)
    if op.weight.min() < low or op.weight.max() > high:
        outside = np.argwhere((op.weight < low) | (op.weight > high))
        value = int(op.weight[tuple(outside[0])])
        raise ArtifactError(
            f"the weight {value} in channel {outside[0][0]} does not fit {op.weight_bits} bits: {low} to {high}."
        )
    if op.weight_zero is not None and (op.weight_zero.min() < low or op.weight_zero.max() > high):
        raise ArtifactError(
            f"its weight zero-points reach from {op.weight_zero.min()} to {op.weight_zero.max()}, and {op.weight_bits} "
            f"bits hold {low} to {high}."
        )
    if int(op.shift.max()) + op.weight_bits > 8:
        raise ArtifactError(
            f"a shift of {int(op.shift.max())} takes weights of {op.weight_bits} bits out of int8. "
            f"Allowed: at most {8 - op.weight_bits}."
        )


def _check_scales(op: Linear, source: Tensor) -> None:
    wrong = np.flatnonzero(~(np.isfinite(op.weight_scale) & (op.weight_scale > 0)))
    if wrong.size:
        raise ArtifactError(
            f"the weight scale {op.weight_scale[wrong[0]]} of channel {wrong[0]} is not allowed: "
            "it has to be finite and above 0."
        )
    with np.errstate(over="ignore"):
        multiplier = np.float32(source.scale) * op.weight_scale / np.float32(op.output.scale)
    wrong = np.flatnonzero(~np.isfinite(multiplier))
    if wrong.size:
        raise ArtifactError(f"the multiplier of channel {wrong[0]} overflows fp32; its scales are too far apart.")


def _surely_small(op: Linear, source: Tensor) -> bool:
    """Whether even the largest weights of these bits could not pass a limit: then no weight needs to be looked at."""
    least, most = min(source.low - source.zero_point, 0), max(source.high - source.zero_point, 0)
    weight = (1 << op.weight_bits) - 1 if op.weight_zero is not None else 1 << (op.weight_bits - 1)
    reach = op.weight[0].size * (weight << int(op.shift.max())) * max(most, -least)
    bias = max(abs(int(op.bias.min())), abs(int(op.bias.max())))
    return reach + bias < INT32_LIMIT and (op.wide or max(reach, bias) <= FP32_LIMIT)


def _check_accumulators(op: Linear, source: Tensor) -> None:
    if _surely_small(op, source):
        return
    bound, bias = accumulator_bound(op, source), np.abs(op.bias.astype(np.int64))
    worst = int((bound + bias).argmax())
    if int(bound[worst] + bias[worst]) >= INT32_LIMIT:
        raise ArtifactError(
            f"accumulator and bias of channel {worst} may reach {int(bound[worst] + bias[worst])}, beyond int32. "
            "Fewer bits, fewer input channels or a smaller bias are needed."
        )
    # An fp32 simulation adds the bias to the accumulator with one rounding only where fp32 holds both exactly.
    reach = np.maximum(bound, bias)
    if not op.wide and int(reach.max()) > FP32_LIMIT:
        raise ArtifactError(
            f"accumulator or bias of channel {int(reach.argmax())} may reach {int(reach.max())}, beyond 2^24, "
            "but the layer is not marked as wide."
        )

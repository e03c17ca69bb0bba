"""Which kernel of :mod:`nasq.cuda` each operation of a program runs on, or why it has none."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from nasq.quant import program as p
from nasq.quant.operations import STAYS
from nasq.quant.program import Program

__all__ = ["Plan", "plans_of"]


@dataclass(frozen=True)
class Plan:
    """How one operation runs.

    Attributes:
        path: Of the layer.
        kind: Of the operation.
        kernel: ``"conv"``, ``"depthwise"``, ``"linear"``, ``"linear w4"``, ``"_int_mm"``, ``"add"``, ...; ``"int8"``: moved
            or clipped by torch as it is; ``"float"``: as integers held in fp32 or float64.
        reason: Why it runs in float; empty elsewhere.
    """

    path: str
    kind: str
    kernel: str
    reason: str = ""


def plans_of(program: Program, kinds: Collection[str], without: str = "") -> tuple[Plan, ...]:
    """How each operation of a program runs, in order.

    Args:
        program: A valid program.
        kinds: Of the operations that have a kernel, beside layers with weights.
        without: Why the device runs no kernel; empty: it does.
    """
    made = {op.output.name: op.output for op in program.ops}
    found = []
    for op in program.ops:
        kernel, reason = _kernel(op, [made[name] for name in op.inputs], kinds, without)
        found.append(Plan(op.path, op.kind, "float" if reason else kernel, reason))
    return tuple(found)


def _kernel(op: p.Op, sources: list[p.Tensor], kinds: Collection[str], without: str) -> tuple[str, str]:
    if isinstance(op, p.Linear):
        return _layer_kernel(op, without)
    if isinstance(op, (*STAYS, p.Scale, p.Constant, p.Input)):
        return "int8", ""
    if op.kind not in kinds:
        return "float", f"there is no kernel for {op.kind!r}"
    if isinstance(op, p.Add) and len({source.shape for source in sources}) > 1:
        return "add", "the sum repeats one of its inputs"
    if isinstance(op, p.LayerNorm) and (op.dims != (len(op.output.shape) - 1,) or op.channel != op.dims[0]):
        return "layer_norm", "it normalises over more than the last dimension"
    if isinstance(op, (p.Softmax, p.LayerNorm)) and op.output.shape[-1] > 1 << 14:
        return op.kind, f"rows of {op.output.shape[-1]} numbers are too long"
    if isinstance(op, p.MatMul) and len(sources[0].shape) != len(sources[1].shape):
        return "matmul", "the matrices are batched differently"
    return op.kind, without


def _layer_kernel(op: p.Linear, without: str) -> tuple[str, str]:
    used = op.used
    if len(op.inputs) > 1:
        return "float", "a shortcut is added before rounding"
    if op.multipliers is not None:
        return "float", "groups of its inputs have scales of their own"
    if used.min(initial=0) < -128 or used.max(initial=0) > 127:
        return "float", "its weights minus their zero-points leave int8"
    sums = np.abs(used).reshape(len(used), -1).sum(1) * 256 + np.abs(op.bias.astype(np.int64))
    if int(sums.max(initial=0)) >= 1 << 31:
        return "float", "int32 does not hold its sums"
    if not isinstance(op, p.Conv):
        if without:
            return ("_int_mm", "") if _int_mm_takes(used.shape) else ("float", without)
        return ("linear w4" if op.weight_bits <= 4 and op.weight_zero is None else "linear"), ""
    depthwise = op.groups > 1 and op.weight.shape[1] == 1
    return ("depthwise" if depthwise else "conv"), without


def _int_mm_takes(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and all(size % 8 == 0 for size in shape)

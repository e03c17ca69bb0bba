"""Tables, products, softmax and normalisation, for :mod:`nasq.deploy.reference`; see :mod:`nasq.deploy.reference_ops`."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from nasq.deploy.reference_ops import Bytes, Entry, Ints, f32, place

__all__ = ["FUNCTIONS"]


def _centred(q: Bytes, source: Entry) -> Ints:
    return np.asarray(q.astype(np.int64) - source["zero_point"])


def _real(q: Bytes, source: Entry) -> Any:
    return _centred(q, source).astype(f32) * f32(source["scale"])


def _table(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    return np.asarray(op["values"][given[0]], np.uint8)


def _scale(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """The same integers; the entry of the tensor made says what they stand for."""
    return given[0]


def _mul(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """``clip(rne(fp32(fp32((q_a - z_a)(q_b - z_b)) * M) + z_y))``, as onnxruntime's QLinearMul: z_y inside the rounding."""
    made = op["output"]
    product = (_centred(given[0], sources[0]) * _centred(given[1], sources[1])).astype(f32)
    ratio = f32(sources[0]["scale"]) * f32(sources[1]["scale"]) / f32(made["scale"])
    steps = np.rint(product * ratio + f32(made["zero_point"]))
    return np.asarray(np.clip(steps, made["low"], made["high"]).astype(np.uint8))


def _sub(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """``clip(rne(fp32(fp32((q_a - z_a) s_a) - fp32((q_b - z_b) s_b)) / s_y) + z_y)``."""
    real = _real(given[0], sources[0]) - _real(given[1], sources[1])
    return place(np.rint(real / f32(op["output"]["scale"])), op["output"])


def _matmul(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """``clip(rne(fp32(acc) * M) + z_y)`` with ``M = fp32(fp32(s_a * s_b) / s_y)``."""
    acc = _centred(given[0], sources[0]) @ _centred(given[1], sources[1])
    ratio = f32(sources[0]["scale"]) * f32(sources[1]["scale"]) / f32(op["output"]["scale"])
    return place(np.rint(acc.astype(f32) * ratio), op["output"])


def _softmax(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """``e = table[max(q) - q]``, ``clip(rne(fp32(e / sum(e)) / s_y) + z_y)``; what is masked is nothing."""
    q = given[0].astype(np.int64)
    seen = np.ones(q.shape[-2:] if q.ndim > 2 else q.shape[-1:], np.int64)
    if op.get("causal"):
        seen = np.tril(seen)
    largest = (q * seen).max(axis=-1, keepdims=True)
    weights = op["table"].astype(np.int64)[largest - q * seen] * seen
    share = weights.astype(f32) / weights.sum(axis=-1, keepdims=True).astype(f32)
    return place(np.rint(share / f32(op["output"]["scale"])), op["output"])


def _layer_norm(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """In exact integers, then in float64 up to the normalised number, which is fp32 from there on.

    ``V = n sum(q^2) - sum(q)^2`` is ``n^2`` times the variance, in steps of the input; so is what eps becomes.
    """
    q, axes = given[0].astype(np.int64), tuple(dim + 1 for dim in op["dims"])
    count, step = prod(q.shape[axis] for axis in axes), float(sources[0]["scale"])
    total = q.sum(axis=axes, keepdims=True)
    spread = count * (q * q).sum(axis=axes, keepdims=True) - total * total
    root = np.sqrt(spread.astype(np.float64) + op["eps"] * (count * count) / (step * step))
    normal = ((count * q - total).astype(np.float64) / root).astype(f32)
    along = [1] * q.ndim
    along[op["channel"] + 1] = -1
    real = normal * op["gain"].reshape(along) + op["shift"].reshape(along)
    return place(np.rint(real / f32(op["output"]["scale"])), op["output"])


FUNCTIONS = {
    "table": _table,
    "scale": _scale,
    "mul": _mul,
    "sub": _sub,
    "matmul": _matmul,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
}

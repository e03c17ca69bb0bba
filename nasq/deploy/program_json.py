"""A program as ``subnet.json`` and arrays, and back; :mod:`nasq.deploy.schema` says what that looks like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy.checks import check_program
from nasq.deploy.schema import ARRAYS, FORMAT, SCHEMA, WEIGHTS, ArrayEntry, Document, LayerEntry, own_fields, parse
from nasq.errors import ArtifactError
from nasq.quant.operations import KINDS
from nasq.quant.packing import pack, packed_size, unpack
from nasq.quant.program import Linear, Op, Program, Tensor

__all__ = ["json_from_program", "program_from_json"]

Arrays = Mapping[str, NDArray[Any]]
Wanted = dict[str, tuple[type[np.generic], int]]


def json_from_program(program: Program) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The JSON form of a program and the arrays it refers to; nothing is shared with the program.

    Raises:
        ArtifactError: The program is not valid (:func:`nasq.deploy.checks.check_program`).
    """
    check_program(program)
    arrays: dict[str, NDArray[Any]] = {}
    ops, first = [], 0
    layers: list[Linear] = []
    for op in program.ops:
        entry = _entry(op, arrays)
        if isinstance(op, Linear):
            entry["weight"] = _weight_entry(op, len(layers), first, arrays)
            layers.append(op)
            first += len(op.bias)
        ops.append(entry)
    arrays["scales"] = np.concatenate([np.zeros(0, np.float32), *(layer.weight_scale for layer in layers)])
    arrays["biases"] = np.concatenate([np.zeros(0, np.int32), *(layer.bias for layer in layers)])
    shifts = np.concatenate([np.zeros(0, np.uint8), *(layer.shift for layer in layers)])
    if shifts.any():
        arrays["shifts"] = shifts
    places = {"file": WEIGHTS, "scales": "scales", "biases": "biases", "shifts": "shifts" if shifts.any() else None}
    head = {"format": FORMAT, "schema": SCHEMA, "target": program.target, "add": program.add}
    return {**head, "meta": _plain_meta(program.meta), "weights": places, "ops": ops}, arrays


def program_from_json(document: object, arrays: Arrays) -> Program:
    """Undoes :func:`json_from_program`; trusts nothing.

    Args:
        document: What a JSON reader made of ``subnet.json``.
        arrays: The arrays by name.

    Raises:
        ArtifactError: A newer schema, an unknown key or operation, an array of another name, type or size, or a
            program that is not valid.
    """
    parsed = parse(document)
    if parsed.weights.file != WEIGHTS:
        raise ArtifactError(f"subnet.json keeps its weights in {parsed.weights.file!r}. Allowed: {WEIGHTS!r}.")
    total = _check_arrays(parsed, arrays)
    shifts = arrays["shifts"] if parsed.weights.shifts else np.zeros(total, np.uint8)
    ops = [_op(entry, arrays, shifts) for entry in parsed.ops]
    program = Program(tuple(ops), parsed.target, parsed.add, _plain_meta(parsed.meta))
    check_program(program)
    return program


def _entry(op: Op, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Everything in plain Python numbers; the arrays go to ``arrays``, but for a layer's weights."""
    made = op.output
    entry: dict[str, Any] = {"op": op.kind, "path": op.path, "inputs": list(op.inputs)}
    integers = {name: int(getattr(made, name)) for name in ("zero_point", "low", "high", "bits")}
    entry["output"] = {"name": made.name, "shape": [int(size) for size in made.shape], "scale": float(made.scale)}
    entry["output"] |= integers
    if isinstance(op, Linear):
        entry["wide"] = bool(op.wide)
    for field, _ in own_fields(op.kind):
        value = getattr(op, field.name)
        if isinstance(value, np.ndarray):
            name = f"a{sum(name[0] == 'a' for name in arrays)}"
            arrays[name] = value.reshape(-1)
            value = {"tensor": name, "shape": list(value.shape)}
        entry[field.name] = [int(size) for size in value] if isinstance(value, tuple) else value
    return entry


def _weight_entry(op: Linear, number: int, first: int, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """A layer's weights, the ``number``-th, whose channels begin at ``first``; the arrays go to ``arrays``."""
    place = {"tensor": f"w{number}", "shape": list(op.weight.shape), "bits": int(op.weight_bits)}
    place |= {"signed": True, "axis": 0, "first": first}
    arrays[f"w{number}"] = pack(op.weight, op.weight_bits)
    if op.weight_zero is not None:
        place["zeros"] = f"z{number}"
        arrays[f"z{number}"] = (op.weight_zero + 2.0 ** (op.weight_bits - 1)).astype(np.uint8).reshape(-1)
    if op.multipliers is not None:
        place["groups"] = {"tensor": f"g{number}", "sizes": [int(size) for size in op.sizes]}
        arrays[f"g{number}"] = op.multipliers.reshape(-1)
    return place


def _plain_meta(meta: Mapping[str, object]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the program's meta cannot be written as JSON: {error}.") from error
    return plain


def _check_arrays(document: Document, arrays: Arrays) -> int:
    """Compares the arrays with what the document says; returns the number of output channels of all layers."""
    wanted, total = _wanted_arrays(document)
    if set(arrays) != set(wanted):
        odd = sorted(set(arrays) ^ set(wanted))[0]
        raise ArtifactError(f"the tensor {odd!r} is {'unknown' if odd in arrays else 'missing'} in {WEIGHTS}.")
    for name, (dtype, size) in wanted.items():
        if arrays[name].dtype != dtype or arrays[name].shape != (size,):
            raise ArtifactError(
                f"the tensor {name!r} is {arrays[name].dtype} of shape {arrays[name].shape}; "
                f"subnet.json needs {np.dtype(dtype)} of shape ({size},)."
            )
    return total


def _wanted_arrays(document: Document) -> tuple[Wanted, int]:
    """The arrays that the document refers to, and the number of output channels of all layers."""
    wanted: Wanted = {}
    layers = total = others = 0
    for entry in document.ops:
        if isinstance(entry, LayerEntry):
            wanted |= _weight_arrays(entry, layers, total)
            layers, total = layers + 1, total + entry.weight.shape[0]
        for place, dtype in _places(entry):
            if place.tensor != f"a{others}":
                raise ArtifactError(
                    f"{entry.output.name!r} has an array at {place.tensor!r}; in order it is at 'a{others}'."
                )
            wanted[place.tensor] = (dtype, prod(place.shape))
            others += 1
    wanted |= {"scales": (np.float32, total), "biases": (np.int32, total)}
    if document.weights.shifts:
        wanted["shifts"] = (np.uint8, total)
    return wanted, total


def _weight_arrays(entry: LayerEntry, number: int, first: int) -> Wanted:
    """The arrays of a layer's weights, which is the ``number``-th and whose channels begin at ``first``."""
    weight = entry.weight
    if weight.tensor != f"w{number}" or weight.first != first or weight.zeros not in (None, f"z{number}"):
        raise ArtifactError(
            f"{entry.output.name!r} has its weights at {weight.tensor!r} and channel {weight.first}; "
            f"in order they are at 'w{number}' and {first}"
            + ("." if weight.zeros is None else f", zero-points at 'z{number}', not {weight.zeros!r}.")
        )
    wanted: Wanted = {weight.tensor: (np.uint8, packed_size(weight.shape, weight.bits))}
    steps = weight.shape[0]
    if weight.groups is not None:
        steps *= len(weight.groups.sizes)
        if weight.groups.tensor != f"g{number}":
            raise ArtifactError(
                f"{entry.output.name!r} has its multipliers at {weight.groups.tensor!r}; in order they are at "
                f"'g{number}'."
            )
        wanted[weight.groups.tensor] = (np.int32, steps)
    if weight.zeros is not None:
        wanted[weight.zeros] = (np.uint8, steps)
    return wanted


def _places(entry: Any) -> list[tuple[ArrayEntry, type[np.generic]]]:
    """Where an entry's arrays are, but for a layer's weights, and what they hold."""
    own = ((getattr(entry, field.name), hint) for field, hint in own_fields(entry.op))
    return [(value, ARRAYS[hint]) for value, hint in own if isinstance(value, ArrayEntry)]


def _op(entry: Any, arrays: Arrays, shifts: NDArray[np.uint8]) -> Op:
    made = entry.output
    output = Tensor(made.name, tuple(made.shape), made.scale, made.zero_point, made.low, made.high, made.bits)
    own = {field.name: _value(getattr(entry, field.name), arrays) for field, _ in own_fields(entry.op)}
    if isinstance(entry, LayerEntry):
        own |= _layer_fields(entry, arrays, shifts)
    return KINDS[entry.op](tuple(entry.inputs), output, entry.path, **own)


def _value(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, ArrayEntry):
        return arrays[value.tensor].reshape(value.shape)
    return tuple(value) if isinstance(value, list) else value


def _layer_fields(entry: LayerEntry, arrays: Arrays, shifts: NDArray[np.uint8]) -> dict[str, Any]:
    weight = entry.weight
    part = slice(weight.first, weight.first + weight.shape[0])
    try:
        values = unpack(arrays[weight.tensor], weight.shape, weight.bits)
    except ArtifactError as error:
        raise ArtifactError(f"the weights of {entry.output.name!r} ({weight.tensor!r}): {error}") from error
    found: dict[str, Any] = {"weight": values, "weight_bits": weight.bits, "wide": entry.wide}
    if weight.zeros is not None:
        found["weight_zero"] = _zeros(entry, arrays[weight.zeros])
    if weight.groups is not None:
        found["multipliers"] = arrays[weight.groups.tensor].reshape(weight.shape[0], -1)
        found["sizes"] = tuple(weight.groups.sizes)
    return found | {
        "weight_scale": arrays["scales"][part], "bias": arrays["biases"][part], "shift": shifts[part],
    }  # fmt: skip


def _zeros(entry: LayerEntry, stored: NDArray[np.uint8]) -> NDArray[np.int8]:
    bits = entry.weight.bits
    if int(stored.max(initial=0)) >= 1 << bits:
        raise ArtifactError(
            f"the weight zero-points of {entry.output.name!r} reach {int(stored.max())}; {bits} bits hold 0 to "
            f"{(1 << bits) - 1}."
        )
    zeros = (stored.astype(np.int64) - (1 << (bits - 1))).astype(np.int8)
    return zeros if entry.weight.groups is None else zeros.reshape(entry.weight.shape[0], -1)

"""The JSON form of a program, version 1: every operation with its scalars; arrays stand beside it, by name.

``subnet.json`` holds ``format``, ``schema``, ``target``, ``add``, ``meta``, ``weights`` (where the arrays are) and
``ops``. Scales are the decimal form of the fp32 value as a double, so reading gives the same 32 bits. The arrays are

* ``w0, w1, ...``: uint8, the packed weights of the layers in order (:mod:`nasq.quant.packing`);
* ``z0, z1, ...``: uint8 ``[out]``, only of layers with asymmetric weights, whose ``weight`` then says ``zeros``: the
  zero-points, counted from the smallest integer ``-2^(bits - 1)``; the number is the layer's, as in ``w0``;
* ``scales`` (fp32), ``biases`` (int32) and, only where one is not zero, ``shifts`` (uint8): those of all layers one
  behind the other; a layer's part begins at its ``first`` and has one entry per output channel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nasq.deploy.checks import check_program
from nasq.errors import ArtifactError
from nasq.quant.packing import pack, packed_size, unpack
from nasq.quant.program import Add, AvgPool, Clip, Concat, Conv, Input, Linear, MaxPool, Op, Program, Reshape, Tensor

__all__ = ["SCHEMA", "json_from_program", "program_from_json"]

SCHEMA = 1
FORMAT = "nasq-subnet"
WEIGHTS = "model.safetensors"

Arrays = Mapping[str, NDArray[Any]]
Size = Annotated[int, Field(ge=0, le=1 << 31)]
Sizes = Annotated[list[Size], Field(max_length=8)]
Pair = Annotated[list[Size], Field(min_length=2, max_length=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Tensor(_Strict):
    name: str
    shape: Sizes
    scale: float
    zero_point: int
    low: int
    high: int
    bits: int


class _Weight(_Strict):
    tensor: str
    shape: Annotated[Sizes, Field(min_length=2)]
    bits: Annotated[int, Field(ge=1, le=8)]
    signed: Literal[True]
    axis: Literal[0]
    first: Size
    zeros: str | None = None


class _Op(_Strict):
    path: str
    inputs: list[str]
    output: _Tensor


class _Plain(_Op):
    op: Literal["input", "add", "reshape", "clip", "concat"]


class _Linear(_Op):
    op: Literal["linear"]
    weight: _Weight
    wide: bool


class _Conv(_Op):
    op: Literal["conv"]
    weight: _Weight
    wide: bool
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: Size


class _AvgPool(_Op):
    op: Literal["avg_pool"]
    kernel: Pair
    stride: Pair


class _MaxPool(_Op):
    op: Literal["max_pool"]
    kernel: Pair
    stride: Pair
    padding: Pair


class _Places(_Strict):
    file: str
    scales: Literal["scales"]
    biases: Literal["biases"]
    shifts: Literal["shifts"] | None


class _Document(_Strict):
    format: Literal["nasq-subnet"]
    schema_: Annotated[int, Field(alias="schema")]
    target: str
    add: Literal["both", "one"]
    meta: dict[str, Any]
    weights: _Places
    ops: list[Annotated[_Plain | _Linear | _Conv | _AvgPool | _MaxPool, Field(discriminator="op")]]


_KINDS: dict[str, type[Op]] = {
    "input": Input,
    "conv": Conv,
    "linear": Linear,
    "add": Add,
    "avg_pool": AvgPool,
    "max_pool": MaxPool,
    "reshape": Reshape,
    "clip": Clip,
    "concat": Concat,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_PAIRS = ("kernel", "stride", "padding", "dilation")


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
        entry = _entry(op)
        if isinstance(op, Linear):
            entry["weight"] = _weight_entry(op, f"w{len(layers)}", first)
            arrays[f"w{len(layers)}"] = pack(op.weight, op.weight_bits)
            if op.weight_zero is not None:
                entry["weight"]["zeros"] = f"z{len(layers)}"
                arrays[f"z{len(layers)}"] = (op.weight_zero + 2.0 ** (op.weight_bits - 1)).astype(np.uint8)
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
    parsed = _parse(document)
    if parsed.weights.file != WEIGHTS:
        raise ArtifactError(f"subnet.json keeps its weights in {parsed.weights.file!r}. Allowed: {WEIGHTS!r}.")
    total = _check_arrays(parsed, arrays)
    shifts = arrays["shifts"] if parsed.weights.shifts else np.zeros(total, np.uint8)
    ops = [_op(entry, arrays, shifts) for entry in parsed.ops]
    program = Program(tuple(ops), parsed.target, parsed.add, parsed.meta)
    check_program(program)
    return program


def _entry(op: Op) -> dict[str, Any]:
    """Everything but the arrays, in plain Python numbers."""
    made = op.output
    entry: dict[str, Any] = {"op": _NAMES[type(op)], "path": op.path, "inputs": list(op.inputs)}
    integers = {name: int(getattr(made, name)) for name in ("zero_point", "low", "high", "bits")}
    entry["output"] = {"name": made.name, "shape": [int(size) for size in made.shape], "scale": float(made.scale)}
    entry["output"] |= integers
    entry |= {name: [int(size) for size in getattr(op, name)] for name in _PAIRS if hasattr(op, name)}
    if isinstance(op, Linear):
        entry["wide"] = bool(op.wide)
    if isinstance(op, Conv):
        entry["groups"] = int(op.groups)
    return entry


def _weight_entry(op: Linear, name: str, first: int) -> dict[str, Any]:
    place = {"tensor": name, "shape": list(op.weight.shape), "bits": int(op.weight_bits)}
    return {**place, "signed": True, "axis": 0, "first": first}


def _plain_meta(meta: Mapping[str, object]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the program's meta cannot be written as JSON: {error}.") from error
    return plain


def _parse(document: object) -> _Document:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"subnet.json is not a subnet: its format is not {FORMAT!r}.")
    version = document.get("schema")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"subnet.json has the schema {version!r}. Allowed: {SCHEMA}.")
    if version > SCHEMA:
        raise ArtifactError(
            f"subnet.json has schema {version}; the installed nasq reads up to {SCHEMA}. "
            "Update nasq to read it: pip install -U nasq"
        )
    try:
        return _Document.model_validate(document)
    except ValidationError as error:
        raise ArtifactError(f"subnet.json: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    """The first of pydantic's complaints in one line."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        return f"unknown key {place!r}. It is corrupt, or of a version that this nasq does not know."
    if found["type"] == "union_tag_invalid":
        return f"{place}: unknown operation {found['ctx']['tag']!r}. Allowed: {', '.join(_KINDS)}."
    given = repr(found["input"])
    return (
        f"{place}: {found['msg'][0].lower()}{found['msg'][1:]}; given: {given[:60]}{'...' if len(given) > 60 else ''}"
    )


def _check_arrays(document: _Document, arrays: Arrays) -> int:
    """Compares the arrays with what the document says; returns the number of output channels of all layers."""
    wanted: dict[str, tuple[type[np.generic], int]] = {}
    layers = total = 0
    for entry in document.ops:
        if isinstance(entry, _Linear | _Conv):
            weight = entry.weight
            if weight.tensor != f"w{layers}" or weight.first != total or weight.zeros not in (None, f"z{layers}"):
                raise ArtifactError(
                    f"{entry.output.name!r} has its weights at {weight.tensor!r} and channel {weight.first}; "
                    f"in order they are at 'w{layers}' and {total}"
                    + ("." if weight.zeros is None else f", zero-points at 'z{layers}', not {weight.zeros!r}.")
                )
            wanted[weight.tensor] = (np.uint8, packed_size(weight.shape, weight.bits))
            if weight.zeros is not None:
                wanted[weight.zeros] = (np.uint8, weight.shape[0])
            layers, total = layers + 1, total + weight.shape[0]
    wanted |= {"scales": (np.float32, total), "biases": (np.int32, total)}
    if document.weights.shifts:
        wanted["shifts"] = (np.uint8, total)
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


def _op(entry: Any, arrays: Arrays, shifts: NDArray[np.uint8]) -> Op:
    made = entry.output
    output = Tensor(made.name, tuple(made.shape), made.scale, made.zero_point, made.low, made.high, made.bits)
    fields = {name: tuple(getattr(entry, name)) for name in _PAIRS if hasattr(entry, name)}
    if isinstance(entry, _Linear | _Conv):
        fields |= _layer_fields(entry, arrays, shifts)
    return _KINDS[entry.op](tuple(entry.inputs), output, entry.path, **fields)


def _layer_fields(entry: _Linear | _Conv, arrays: Arrays, shifts: NDArray[np.uint8]) -> dict[str, Any]:
    weight = entry.weight
    part = slice(weight.first, weight.first + weight.shape[0])
    try:
        values = unpack(arrays[weight.tensor], weight.shape, weight.bits)
    except ArtifactError as error:
        raise ArtifactError(f"the weights of {entry.output.name!r} ({weight.tensor!r}): {error}") from error
    fields = {"weight": values, "weight_bits": weight.bits, "wide": entry.wide}
    if weight.zeros is not None:
        fields["weight_zero"] = _zeros(entry, arrays[weight.zeros])
    fields |= {"weight_scale": arrays["scales"][part], "bias": arrays["biases"][part], "shift": shifts[part]}
    return fields | ({"groups": entry.groups} if isinstance(entry, _Conv) else {})


def _zeros(entry: _Linear | _Conv, stored: NDArray[np.uint8]) -> NDArray[np.int8]:
    bits = entry.weight.bits
    if int(stored.max(initial=0)) >= 1 << bits:
        raise ArtifactError(
            f"the weight zero-points of {entry.output.name!r} reach {int(stored.max())}; {bits} bits hold 0 to "
            f"{(1 << bits) - 1}."
        )
    return (stored.astype(np.int64) - (1 << (bits - 1))).astype(np.int8)

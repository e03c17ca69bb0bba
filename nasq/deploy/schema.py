"""The JSON form of a program, version 1: every operation with its scalars; arrays stand beside it, by name.

``subnet.json`` holds ``format``, ``schema``, ``target``, ``add``, ``meta``, ``weights`` (where the arrays are) and
``ops``. Scales are the decimal form of the fp32 value as a double, so reading gives the same 32 bits. The arrays are

* ``w0, w1, ...``: uint8, the packed weights of the layers in order (:mod:`nasq.quant.packing`);
* ``z0, z1, ...``: uint8 ``[out]``, only of layers with asymmetric weights, whose ``weight`` then says ``zeros``: the
  zero-points, counted from the smallest integer ``-2^(bits - 1)``; the number is the layer's, as in ``w0``;
* ``g0, g1, ...``: int32 ``[out * groups]``, only of linear layers whose groups of inputs have scales of their own, whose
  ``weight`` then says ``groups``: the multipliers, output by output; their ``zeros`` have one entry per output and group;
* ``scales`` (fp32), ``biases`` (int32) and, only where one is not zero, ``shifts`` (uint8): those of all layers one
  behind the other; a layer's part begins at its ``first`` and has one entry per output channel;
* ``a0, a1, ...``: the arrays of other operations (tables, constants, gains) in order, flat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_type_hints

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from nasq.deploy.checks import check_program
from nasq.errors import ArtifactError
from nasq.quant.operations import KINDS
from nasq.quant.packing import pack, packed_size, unpack
from nasq.quant.program import Linear, Op, Program, Tensor

__all__ = ["SCHEMA", "json_from_program", "program_from_json"]

SCHEMA = 1
FORMAT = "nasq-subnet"
WEIGHTS = "model.safetensors"

Arrays = Mapping[str, NDArray[Any]]
Size = Annotated[int, pydantic.Field(ge=0, le=1 << 31)]
Sizes = Annotated[list[Size], pydantic.Field(max_length=8)]
Pair = Annotated[list[Size], pydantic.Field(min_length=2, max_length=2)]


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


class _Groups(_Strict):
    tensor: str
    sizes: Annotated[list[Size], pydantic.Field(min_length=1, max_length=1 << 20)]


class _Weight(_Strict):
    tensor: str
    shape: Annotated[Sizes, pydantic.Field(min_length=2)]
    bits: Annotated[int, pydantic.Field(ge=1, le=8)]
    signed: Literal[True]
    axis: Literal[0]
    first: Size
    zeros: str | None = None
    groups: _Groups | None = None


class _Array(_Strict):
    tensor: str
    shape: Annotated[Sizes, pydantic.Field(min_length=1)]


class _Op(_Strict):
    path: str
    inputs: list[str]
    output: _Tensor


class _Layer(_Op):
    weight: _Weight
    wide: bool


_ARRAYS: dict[Any, type[np.generic]] = {
    NDArray[np.uint8]: np.uint8, NDArray[np.int32]: np.int32, NDArray[np.float32]: np.float32,
}  # fmt: skip
_TYPES: dict[Any, Any] = {int: Size, bool: bool, float: float, tuple[int, int]: Pair, tuple[int, ...]: Sizes}
_TYPES |= dict.fromkeys(_ARRAYS, _Array)


@cache
def _own(name: str) -> list[tuple[Field[Any], Any]]:
    """The fields of an operation that are its own, with their types; those of a layer's weights are stored apart."""
    kind = KINDS[name]
    hints = get_type_hints(kind)
    shared = {field.name for field in fields(Linear if issubclass(kind, Linear) else Op)}
    return [(field, hints[field.name]) for field in fields(kind) if field.name not in shared]


def _name(kind: type[Op]) -> Any:
    return Literal[kind.kind]


def _model(kind: type[Op]) -> type[BaseModel]:
    """What an operation's entry in ``subnet.json`` looks like: its own fields beside those of every operation."""
    own: dict[str, Any] = {
        field.name: (_TYPES[hint], ... if field.default is MISSING else field.default)
        for field, hint in _own(kind.kind)
    }
    # Defaults are tuples, as the program has them: they are not checked, which a strict list would refuse.
    base = _Layer if issubclass(kind, Linear) else _Op
    return pydantic.create_model(f"_{kind.__name__}", __base__=base, op=(_name(kind), ...), **own)


if TYPE_CHECKING:
    _AnyOp = Any
else:
    _AnyOp = Annotated[Union[tuple(map(_model, KINDS.values()))], pydantic.Field(discriminator="op")]  # noqa: UP007


class _Places(_Strict):
    file: str
    scales: Literal["scales"]
    biases: Literal["biases"]
    shifts: Literal["shifts"] | None


class _Document(_Strict):
    format: Literal["nasq-subnet"]
    schema_: Annotated[int, pydantic.Field(alias="schema")]
    target: str
    add: Literal["both", "one"]
    meta: dict[str, Any]
    weights: _Places
    ops: list[_AnyOp]


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
            entry["weight"] = _weight_entry(op, f"w{len(layers)}", first)
            arrays[f"w{len(layers)}"] = pack(op.weight, op.weight_bits)
            if op.weight_zero is not None:
                entry["weight"]["zeros"] = f"z{len(layers)}"
                zeros = (op.weight_zero + 2.0 ** (op.weight_bits - 1)).astype(np.uint8)
                arrays[f"z{len(layers)}"] = zeros.reshape(-1)
            if op.multipliers is not None:
                sizes = [int(size) for size in op.sizes]
                entry["weight"]["groups"] = {"tensor": f"g{len(layers)}", "sizes": sizes}
                arrays[f"g{len(layers)}"] = op.multipliers.reshape(-1)
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
    for field, _ in _own(op.kind):
        value = getattr(op, field.name)
        if isinstance(value, np.ndarray):
            name = f"a{sum(name[0] == 'a' for name in arrays)}"
            arrays[name] = value.reshape(-1)
            value = {"tensor": name, "shape": list(value.shape)}
        entry[field.name] = [int(size) for size in value] if isinstance(value, tuple) else value
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
        return f"{place}: unknown operation {found['ctx']['tag']!r}. Allowed: {', '.join(KINDS)}."
    given = repr(found["input"])
    return (
        f"{place}: {found['msg'][0].lower()}{found['msg'][1:]}; given: {given[:60]}{'...' if len(given) > 60 else ''}"
    )


def _check_arrays(document: _Document, arrays: Arrays) -> int:
    """Compares the arrays with what the document says; returns the number of output channels of all layers."""
    wanted: dict[str, tuple[type[np.generic], int]] = {}
    layers = total = others = 0
    for entry in document.ops:
        if isinstance(entry, _Layer):
            weight = entry.weight
            if weight.tensor != f"w{layers}" or weight.first != total or weight.zeros not in (None, f"z{layers}"):
                raise ArtifactError(
                    f"{entry.output.name!r} has its weights at {weight.tensor!r} and channel {weight.first}; "
                    f"in order they are at 'w{layers}' and {total}"
                    + ("." if weight.zeros is None else f", zero-points at 'z{layers}', not {weight.zeros!r}.")
                )
            wanted[weight.tensor] = (np.uint8, packed_size(weight.shape, weight.bits))
            steps = weight.shape[0]
            if weight.groups is not None:
                steps *= len(weight.groups.sizes)
                if weight.groups.tensor != f"g{layers}":
                    raise ArtifactError(
                        f"{entry.output.name!r} has its multipliers at {weight.groups.tensor!r}; in order they are at "
                        f"'g{layers}'."
                    )
                wanted[weight.groups.tensor] = (np.int32, steps)
            if weight.zeros is not None:
                wanted[weight.zeros] = (np.uint8, steps)
            layers, total = layers + 1, total + weight.shape[0]
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


def _places(entry: Any) -> list[tuple[_Array, type[np.generic]]]:
    """Where an entry's arrays are, but for a layer's weights, and what they hold."""
    own = ((getattr(entry, field.name), hint) for field, hint in _own(entry.op))
    return [(value, _ARRAYS[hint]) for value, hint in own if isinstance(value, _Array)]


def _op(entry: Any, arrays: Arrays, shifts: NDArray[np.uint8]) -> Op:
    made = entry.output
    output = Tensor(made.name, tuple(made.shape), made.scale, made.zero_point, made.low, made.high, made.bits)
    own = {field.name: _value(getattr(entry, field.name), arrays) for field, _ in _own(entry.op)}
    if isinstance(entry, _Layer):
        own |= _layer_fields(entry, arrays, shifts)
    return KINDS[entry.op](tuple(entry.inputs), output, entry.path, **own)


def _value(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, _Array):
        return arrays[value.tensor].reshape(value.shape)
    return tuple(value) if isinstance(value, list) else value


def _layer_fields(entry: _Layer, arrays: Arrays, shifts: NDArray[np.uint8]) -> dict[str, Any]:
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


def _zeros(entry: _Layer, stored: NDArray[np.uint8]) -> NDArray[np.int8]:
    bits = entry.weight.bits
    if int(stored.max(initial=0)) >= 1 << bits:
        raise ArtifactError(
            f"the weight zero-points of {entry.output.name!r} reach {int(stored.max())}; {bits} bits hold 0 to "
            f"{(1 << bits) - 1}."
        )
    zeros = (stored.astype(np.int64) - (1 << (bits - 1))).astype(np.int8)
    return zeros if entry.weight.groups is None else zeros.reshape(entry.weight.shape[0], -1)

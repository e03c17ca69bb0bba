"""What ``subnet.json`` looks like, version 1: every operation of a program with its scalars; arrays stand beside it.

``subnet.json`` holds ``format``, ``schema``, ``target``, ``add``, ``meta``, ``weights`` (where the arrays are) and
``ops``; :mod:`nasq.deploy.program_json` writes and reads it. Scales are the decimal form of the fp32 value as a double, so
reading gives the same 32 bits. The arrays are

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

from dataclasses import MISSING, Field, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_type_hints

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from nasq.errors import ArtifactError
from nasq.quant.operations import KINDS
from nasq.quant.program import Linear, Op

__all__ = ["ARRAYS", "FORMAT", "SCHEMA", "WEIGHTS", "ArrayEntry", "Document", "LayerEntry", "own_fields", "parse"]

SCHEMA = 1
"""The newest version that is read, and the one that is written."""

FORMAT = "nasq-subnet"
"""What ``format`` says."""

WEIGHTS = "model.safetensors"
"""The file of the arrays."""

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


class ArrayEntry(_Strict):
    """Where an array of an operation is."""

    tensor: str
    shape: Annotated[Sizes, pydantic.Field(min_length=1)]


class _Op(_Strict):
    path: str
    inputs: list[str]
    output: _Tensor


class LayerEntry(_Op):
    """What layers with weights have beside their own fields."""

    weight: _Weight
    wide: bool


ARRAYS: dict[Any, type[np.generic]] = {
    NDArray[np.uint8]: np.uint8, NDArray[np.int32]: np.int32, NDArray[np.float32]: np.float32,
}  # fmt: skip
"""The array types that fields of operations have, and what they hold."""

_TYPES: dict[Any, Any] = {int: Size, bool: bool, float: float, tuple[int, int]: Pair, tuple[int, ...]: Sizes}
_TYPES |= dict.fromkeys(ARRAYS, ArrayEntry)


@cache
def own_fields(name: str) -> list[tuple[Field[Any], Any]]:
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
        for field, hint in own_fields(kind.kind)
    }
    # Defaults are tuples, as the program has them: they are not checked, which a strict list would refuse.
    base = LayerEntry if issubclass(kind, Linear) else _Op
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


class Document(_Strict):
    """The whole of ``subnet.json``."""

    format: Literal["nasq-subnet"]
    schema_: Annotated[int, pydantic.Field(alias="schema")]
    target: str
    add: Literal["both", "one"]
    meta: dict[str, Any]
    weights: _Places
    ops: list[_AnyOp]


def parse(document: object) -> Document:
    """Checks the form of what a JSON reader made of ``subnet.json``.

    Raises:
        ArtifactError: Another format, a newer schema, an unknown key or operation, or a value of the wrong type.
    """
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
        return Document.model_validate(document)
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

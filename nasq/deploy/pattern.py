"""Compares a part of an ONNX graph with what it should be, node by node and bit by bit.

What a layer should be is a small tree: :class:`Made` by an operator of other parts, :class:`Fixed` numbers, or a tensor
:class:`Read` from another layer. :class:`Match` walks the tree and the file's nodes together; whatever is not the same is
a :class:`Finding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import require

__all__ = ["Finding", "Fixed", "Made", "Match", "Part", "Read"]


@dataclass(frozen=True)
class Finding:
    """One number or node in the file that is not what the bundle says: ``field`` of the layer at ``path``."""

    path: str
    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"layer {self.path!r}: {self.field} is {self.got}, the bundle says {self.expected}"


@dataclass(frozen=True)
class Read:
    """A quantized tensor that another layer makes, by the program's name."""

    name: str


@dataclass(frozen=True)
class Fixed:
    """Numbers in the file, stored or folded from what is stored: type, shape and every bit."""

    label: str
    value: NDArray[Any]


@dataclass(frozen=True)
class Made:
    """What an operator makes of other parts.

    Attributes:
        operator: Its type in ONNX.
        inputs: In order; ``None`` where an optional one is left out.
        attributes: Exactly these, but for those that have their default.
        label: What a finding calls it.
        otherwise: What a finding says instead, where there is another operator: ``(expected, got)``.
        skipped: Whether, where it is missing, its first input should stand in its place.
    """

    operator: str
    inputs: tuple[Part | None, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)
    label: str = "operator"
    otherwise: tuple[str, str] | None = None
    skipped: bool = False


Part = Made | Fixed | Read

_WINDOW = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "auto_pad": b"NOTSET"}
_DEFAULTS: dict[str, dict[str, object]] = {
    "Conv": {**_WINDOW, "group": 1},
    "MaxPool": {**_WINDOW, "ceil_mode": 0, "storage_order": 0},
    "AveragePool": {**_WINDOW, "ceil_mode": 0, "count_include_pad": 0},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    "QuantizeLinear": {"axis": 1},
    "DequantizeLinear": {"axis": 1},
    "Flatten": {"axis": 1},
    "Reshape": {"allowzero": 0},
    "Pad": {"mode": b"constant"},
    "Gather": {"axis": 0},
    "ReduceSum": {"keepdims": 1, "noop_with_empty_axes": 0},
    "ReduceMax": {"keepdims": 1},
    "Resize": {"cubic_coeff_a": -0.75, "exclude_outside": 0, "extrapolation_value": 0.0},
}


class Match:
    """Compares the parts of one layer.

    Args:
        path: The layer, for findings.
        makers: The node that makes each tensor of the file.
        constants: Every number that does not depend on the file's input.
        names: The name in the file of every tensor of the program so far.

    Attributes:
        found: What differs.
    """

    def __init__(
        self, path: str, makers: Mapping[str, Any], constants: Mapping[str, NDArray[Any]], names: Mapping[str, str]
    ) -> None:
        self.path, self.makers, self.constants, self.names = path, makers, constants, names
        self.found: list[Finding] = []

    def say(self, what: str, expected: object, got: object) -> None:
        """Adds a finding."""
        self.found.append(Finding(self.path, what, str(expected), str(got)))

    def part(self, name: str, wanted: Part | None) -> None:
        """Compares what makes the tensor ``name`` with what should."""
        if wanted is None:
            if name:
                self.say("an optional input", "left out", name)
        elif isinstance(wanted, Read):
            if self.names.get(wanted.name, "?") != name:
                self.say("inputs", self.names.get(wanted.name, "?"), name)
        elif isinstance(wanted, Fixed):
            self.array(wanted.label, name, wanted.value)
        else:
            self.made(name, wanted)

    def made(self, name: str, wanted: Made) -> None:
        """Compares a node, then what it reads."""
        node = self.makers.get(name)
        if node is None or node.op_type != wanted.operator:
            got = "a constant, or nothing" if node is None else node.op_type
            expected, got = wanted.otherwise or (wanted.operator, got)
            self.say(wanted.label, expected, got)
            if wanted.skipped:
                self.part(name, wanted.inputs[0])
            return
        self.attributes(node, wanted)
        given = list(node.input)
        while given and not given[-1]:
            given.pop()
        if len(given) != len(wanted.inputs):
            self.say(f"inputs of {wanted.operator}", len(wanted.inputs), len(given))
            return
        for source, part in zip(given, wanted.inputs, strict=True):
            self.part(source, part)

    def attributes(self, node: Any, wanted: Made) -> None:
        """The node's attributes are the wanted ones, where one that is absent counts as its default."""
        onnx = require("onnx")
        values = ((item.name, onnx.helper.get_attribute_value(item)) for item in node.attribute)
        got = {name: tuple(value) if isinstance(value, list) else value for name, value in values}
        defaults = _DEFAULTS.get(wanted.operator, {})
        if wanted.operator == "Conv" and "kernel_shape" in wanted.attributes:  # it follows from the weights
            defaults = {**defaults, "kernel_shape": wanted.attributes["kernel_shape"]}
        for name in sorted({*wanted.attributes, *got}):
            expected, found = (items.get(name, defaults.get(name)) for items in (wanted.attributes, got))
            if expected != found:
                self.say(name, expected, found)

    def array(self, what: str, name: str, expected: NDArray[Any]) -> None:
        """Type, shape and every bit equal; names the first element that differs."""
        got = self.constants.get(name)
        if got is None:
            self.say(what, "a constant", f"the tensor {name!r}")
        elif got.dtype != expected.dtype or got.shape != expected.shape:
            self.say(what, f"{expected.dtype} {expected.shape}", f"{got.dtype} {got.shape}")
        elif got.tobytes() != expected.tobytes():
            differs = np.argwhere(got.reshape(-1) != expected.reshape(-1)).reshape(-1)
            where = np.unravel_index(int(differs[0]) if len(differs) else 0, got.shape)
            place = f"[{', '.join(str(int(i)) for i in where)}]" if got.ndim else ""
            self.say(f"{what}{place}", repr(expected[where].item()), f"{got[where].item()!r} ({len(differs)} differ)")

"""The independent executor: what a bundle's integers have to be, by the book and in slow, plain NumPy.

It reads ``subnet.json`` and ``model.safetensors`` and nothing else, with its own parsing and unpacking, and imports
neither torch nor onnx nor any module of nasq but the errors and its own
operations (:mod:`nasq.deploy.reference_ops`): a mistake in the quantizers, the packing or the exporter
cannot hide in code that it shares. Integers are int64, everything else is fp32 with one rounding per operation, in the
order that ``docs/integer_arithmetic.md`` (and :mod:`nasq.quant.program`) writes down.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from nasq.deploy.reference_functions import FUNCTIONS
from nasq.deploy.reference_ops import EXECUTE, Bytes, Floats, Ints, f32, place, run_layer
from nasq.errors import ArtifactError, InputError

__all__ = ["Reference"]

SCHEMA = 1
BLOCK = 1 << 22  # int64 numbers that an operation may spread out at a time: 32 MB
_DTYPES = {"U8": "<u1", "I32": "<i4", "F32": "<f4"}

KINDS = {"input", "conv", "linear", "constant", *EXECUTE, *FUNCTIONS}


class Reference:
    """Executes a bundle. It checks what it needs itself; a received bundle goes through ``nasq.deploy.bundle`` first.

    Args:
        directory: The bundle; only ``subnet.json`` and ``model.safetensors`` are opened.

    Attributes:
        kinds: Of every operation in order: ``"input"``, ``"conv"``, ...
        names: Of the tensor that every operation makes.
        sources: The names of the tensors that every operation reads.

    Raises:
        ArtifactError: A file is missing, damaged, of another schema, or uses a rule that this executor does not know.
    """

    def __init__(self, directory: Path) -> None:
        document = _read_json(directory / "subnet.json")
        arrays = _read_safetensors(directory / "model.safetensors")
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ArtifactError(f"{directory}/subnet.json is not of schema {SCHEMA}, the only one the reference reads.")
        try:
            self._ops: list[dict[str, Any]] = document["ops"]
            self.kinds = tuple(str(op["op"]) for op in self._ops)
            self.names = tuple(str(op["output"]["name"]) for op in self._ops)
            self.sources = tuple(tuple(op["inputs"]) for op in self._ops)
            self._made = {name: op["output"] for name, op in zip(self.names, self._ops, strict=True)}
            self._layers = {i: _layer(op, arrays) for i, op in enumerate(self._ops) if "weight" in op}
            for op in self._ops:
                _own_arrays(op, arrays)
            rule = document["add"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(f"{directory} does not hold what its subnet.json needs: {error!r}.") from error
        unknown = sorted(set(self.kinds) - KINDS)
        if unknown or self.kinds[:1] != ("input",):
            raise ArtifactError(
                f"{directory} cannot be executed: {f'unknown operation {unknown[0]!r}' if unknown else 'no input'}. "
                f"Allowed: an input, then {', '.join(sorted(KINDS - {'input'}))}."
            )
        most = {"both": 1, "one": 2}.get(rule)
        if most is None or any(len(self.sources[index]) not in range(1, most + 1) for index in self._layers):
            raise ArtifactError(
                f"{directory} adds by the rule {rule!r}, and its layers do not. Allowed: 'both', 'one'."
            )

    @overload
    def run(self, x: Floats, every: Literal[False] = False) -> Bytes: ...
    @overload
    def run(self, x: Floats, every: Literal[True]) -> dict[str, Bytes]: ...
    def run(self, x: Floats, every: bool = False) -> Bytes | dict[str, Bytes]:
        """Executes the whole program.

        Args:
            x: fp32 ``[N, *input shape]``.
            every: Return every tensor by name instead of the output alone.

        Returns:
            uint8 container integers ``[N, *shape]``.

        Raises:
            InputError: ``x`` has another type or shape, or holds NaN or infinities.
        """
        self._check_input(x)
        wanted = self.names if every else self.names[-1:]
        found: dict[str, list[Bytes]] = {name: [] for name in wanted}
        spread = max(self._spread(index) for index in range(len(self._ops)))
        for part in _parts(len(x), spread):
            values = self._run_part(x[part], wanted)
            for name in wanted:
                found[name].append(values[name])
        results = {name: np.concatenate(parts) for name, parts in found.items()}
        return results if every else results[self.names[-1]]

    def step(self, op_index: int, inputs: Mapping[str, NDArray[np.integer]]) -> Bytes:
        """Executes one operation alone on given integers, such as those that a runtime made.

        Args:
            op_index: Place in :attr:`names`; not 0, which is the input.
            inputs: Container integers ``[N, *shape]`` (0..255) of the tensors the operation reads, by name.

        Returns:
            uint8 container integers ``[N, *shape]``.

        Raises:
            InputError: There is no such operation, or an input is missing or has another shape or type.
        """
        if not 0 < op_index < len(self._ops):
            raise InputError(f"there is no operation {op_index} to step. Allowed: 1 to {len(self._ops) - 1}.")
        given = [self._given(name, inputs) for name in self.sources[op_index]]
        if len({len(value) for value in given}) > 1:
            raise InputError(f"the inputs of {self.names[op_index]!r} are of different numbers of images.")
        count = len(given[0]) if given else 1
        parts = [np.arange(count)[part] for part in _parts(count, self._spread(op_index))]
        return np.concatenate([self._apply(op_index, [value[part] for value in given], len(part)) for part in parts])

    def predict(self, x: Floats) -> Ints:
        """The class of every image: the first index of the largest integer; int64 ``[N]`` (or ``[N, H, W]``)."""
        return np.asarray(self.run(x).argmax(axis=1), np.int64)

    def _run_part(self, x: Floats, wanted: tuple[str, ...]) -> dict[str, Bytes]:
        last_use = {name: index for index, names in enumerate(self.sources) for name in names}
        made = self._made[self.names[0]]
        values = {self.names[0]: place(np.rint(x / f32(made["scale"])), made)}
        for index in range(1, len(self._ops)):
            values[self.names[index]] = self._apply(index, [values[name] for name in self.sources[index]], len(x))
            for name in set(self.sources[index]) - set(wanted):
                if last_use[name] == index:
                    del values[name]
        return values

    def _apply(self, index: int, given: list[Bytes], count: int) -> Bytes:
        op, sources = self._ops[index], [self._made[name] for name in self.sources[index]]
        if index in self._layers:
            return run_layer(op, self._layers[index], given, sources)
        if self.kinds[index] == "constant":
            return np.broadcast_to(op["values"], (count, *op["values"].shape))
        return (EXECUTE.get(self.kinds[index]) or FUNCTIONS[self.kinds[index]])(op, given, sources)

    def _spread(self, index: int) -> int:
        """How many int64 numbers one image takes while the operation runs."""
        op = self._ops[index]
        taps = prod(op["weight"]["shape"][1:]) * op.get("groups", 1) if "weight" in op else 1
        shapes = [self._made[name]["shape"] for name in (*self.sources[index], self.names[index])]
        return int(taps * prod(shapes[-1][1:]) + sum(prod(shape) for shape in shapes))

    def _check_input(self, x: Floats) -> None:
        shape = tuple(self._made[self.names[0]]["shape"])
        if x.dtype != f32 or x.shape[1:] != shape or len(x) == 0:
            raise InputError(f"the input has to be float32 of shape (N, {', '.join(map(str, shape))}), N at least 1; "
                             f"given: {x.dtype} of shape {x.shape}.")  # fmt: skip
        if not np.isfinite(x).all():
            raise InputError("the input holds NaN or infinities; they have no integer.")

    def _given(self, name: str, inputs: Mapping[str, NDArray[np.integer]]) -> Bytes:
        shape = tuple(self._made[name]["shape"])
        if name not in inputs:
            raise InputError(f"the integers of {name!r} are needed. Given: {', '.join(inputs) or 'none'}.")
        value = inputs[name]
        if value.shape[1:] != shape or len(value) == 0 or not np.issubdtype(value.dtype, np.integer):
            raise InputError(f"{name!r} has to be integers of shape (N, {', '.join(map(str, shape))}); "
                             f"given: {value.dtype} of shape {value.shape}.")  # fmt: skip
        if value.min() < 0 or value.max() > 255:
            raise InputError(f"the integers of {name!r} reach from {value.min()} to {value.max()}. Allowed: 0 to 255.")
        return value.astype(np.uint8)


def _own_arrays(op: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Puts the arrays of an operation, but for a layer's weights, where its entry names them."""
    for key, value in op.items():
        if isinstance(value, dict) and "tensor" in value and key != "weight":
            op[key] = arrays[value["tensor"]].reshape(value["shape"])


def _parts(count: int, spread: int) -> list[slice]:
    step = max(1, BLOCK // spread)
    return [slice(start, start + step) for start in range(0, count, step)]


def _layer(op: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """A layer's integer weights (zero-points removed, shifted), fp32 scales and biases."""
    place = op["weight"]
    shape, first = place["shape"], place["first"]
    channels = slice(first, first + shape[0])
    column = (shape[0], *[1] * (len(shape) - 1))
    weight = _unpack(arrays[place["tensor"]], shape, place["bits"])
    groups = place.get("groups")
    if groups is not None and sum(groups["sizes"]) != shape[1]:
        raise ValueError(f"the groups of {op['output']['name']!r} do not hold its {shape[1]} inputs")
    if place.get("zeros") is not None:
        # Stored from 0 up, as the weights would be if they were not two's complements.
        zeros = arrays[place["zeros"]].astype(np.int64)
        if groups is not None:
            zeros = np.repeat(zeros.reshape(shape[0], -1), groups["sizes"], axis=1)
        weight = weight + 2 ** (place["bits"] - 1) - (zeros.reshape(column) if groups is None else zeros)
    if "shifts" in arrays:
        weight = weight * 2 ** arrays["shifts"][channels].astype(np.int64).reshape(column)
    layer = {"weight": weight, "scale": arrays["scales"][channels], "bias": arrays["biases"][channels].astype(np.int64)}
    if any(len(array) != shape[0] for array in layer.values()):
        raise ValueError(f"the layer {op['output']['name']!r} needs {shape[0]} scales and biases")
    if groups is not None:
        layer["multipliers"] = arrays[groups["tensor"]].astype(np.int64).reshape(shape[0], len(groups["sizes"]))
        layer["ends"] = np.cumsum(groups["sizes"])
    return layer


def _unpack(stream: Bytes, shape: list[int], bits: int) -> Ints:
    """Value i of a channel begins at bit ``i * bits`` of its bytes: two bytes from there hold it whole."""
    count = prod(shape[1:])
    rows = stream.astype(np.int64).reshape(shape[0], -(-bits * count // 8))
    rows = np.concatenate([rows, np.zeros((shape[0], 1), np.int64)], axis=1)
    byte, offset = np.divmod(np.arange(count) * bits, 8)
    raw = ((rows[:, byte] + 256 * rows[:, byte + 1]) >> offset) % 2**bits
    return np.asarray(raw - 2**bits * (raw >= 2 ** (bits - 1)), np.int64).reshape(shape)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Eight bytes of header size, a JSON header, then the arrays one behind the other."""
    try:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        arrays, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            values = np.frombuffer(data[8 + size + begin : 8 + size + stop], _DTYPES[entry["dtype"]])
            if begin != end or values.nbytes != stop - begin:
                raise ValueError(f"the tensor {name!r} is not where it should be")
            arrays[name], end = values.reshape(entry["shape"]), stop
        if end != len(data) - 8 - size:
            raise ValueError(f"{len(data) - 8 - size - end} bytes belong to no tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}.") from error
    return arrays

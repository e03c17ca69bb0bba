"""The independent executor: what a bundle's integers have to be, by the book and in slow, plain NumPy.

It reads ``subnet.json`` and ``model.safetensors`` and nothing else, with its own parsing and unpacking, and imports
neither torch nor onnx nor any module of nasq but the errors: a mistake in the quantizers, the packing or the exporter
cannot hide in code that it shares. Integers are int64, everything else is fp32 with one rounding per operation, in the
order that ``docs/integer_arithmetic.md`` (and :mod:`nasq.quant.program`) writes down.

Shapes: N images, C channels, H height, W width, K taps of a kernel, O output channels, G groups, P output positions.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from nasq.errors import ArtifactError, InputError

__all__ = ["Reference"]

SCHEMA = 1
BLOCK = 1 << 22  # int64 numbers that an operation may spread out at a time: 32 MB
_DTYPES = {"U8": "<u1", "I32": "<i4", "F32": "<f4"}

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
f32 = np.float32


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
            rule = document["add"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(f"{directory} does not hold what its subnet.json needs: {error!r}.") from error
        unknown = sorted(set(self.kinds) - _KINDS)
        if unknown or self.kinds[:1] != ("input",):
            raise ArtifactError(
                f"{directory} cannot be executed: {f'unknown operation {unknown[0]!r}' if unknown else 'no input'}. "
                f"Allowed: an input, then {', '.join(sorted(_KINDS - {'input'}))}."
            )
        if "add" in self.kinds and rule != "both":
            raise ArtifactError(f"{directory} adds by the rule {rule!r}; the reference computes sums by 'both' only.")

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
        parts = _parts(len(given[0]), self._spread(op_index))
        return np.concatenate([self._apply(op_index, [value[part] for value in given]) for part in parts])

    def predict(self, x: Floats) -> Ints:
        """The class of every image: the first index of the largest integer; int64 ``[N]`` (or ``[N, H, W]``)."""
        return np.asarray(self.run(x).argmax(axis=1), np.int64)

    def _run_part(self, x: Floats, wanted: tuple[str, ...]) -> dict[str, Bytes]:
        last_use = {name: index for index, names in enumerate(self.sources) for name in names}
        made = self._made[self.names[0]]
        values = {self.names[0]: _place(np.rint(x / f32(made["scale"])), made)}
        for index in range(1, len(self._ops)):
            values[self.names[index]] = self._apply(index, [values[name] for name in self.sources[index]])
            for name in set(self.sources[index]) - set(wanted):
                if last_use[name] == index:
                    del values[name]
        return values

    def _apply(self, index: int, given: list[Bytes]) -> Bytes:
        op, sources = self._ops[index], [self._made[name] for name in self.sources[index]]
        if index in self._layers:
            return _run_layer(op, self._layers[index], given[0], sources[0])
        return _EXECUTE[self.kinds[index]](op, given, sources)

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


def _run_layer(op: dict[str, Any], layer: dict[str, Any], q: Bytes, source: dict[str, Any]) -> Bytes:
    """``clip(rne(fp32(acc + bias) * M) + z_y)`` with ``M = fp32(fp32(s_x * weight_scale) / s_y)``."""
    x = q.astype(np.int64) - source["zero_point"]
    acc = _convolve(op, layer["weight"], x) if op["op"] == "conv" else x @ layer["weight"].T
    multiplier = f32(source["scale"]) * layer["scale"] / f32(op["output"]["scale"])
    channelwise = (-1, *[1] * (acc.ndim - 2))
    total = (acc + layer["bias"].reshape(channelwise)).astype(f32)
    return _place(np.rint(total * multiplier.reshape(channelwise)), op["output"])


def _convolve(op: dict[str, Any], weight: Ints, x: Ints) -> Ints:
    """``x [N, C, H, W]`` (zero-point removed, so that padding is 0) with ``weight [O, C/G, kh, kw]``: ``[N, O, H, W]``.

    Every window becomes a row of one matrix (im2col); the channels stand last, so that copying stays contiguous.
    """
    groups, (out, narrow, *kernel) = op["groups"], weight.shape
    pads = [(0, 0), *((p, p) for p in op["padding"]), (0, 0)]
    x_NHWC = np.pad(x.transpose(0, 2, 3, 1), pads)
    taps = list(_taps(x_NHWC, kernel, op["stride"], op["dilation"], op["output"]["shape"][1:]))
    columns = np.stack(taps, axis=3)  # [N, H, W, K, C]
    n, height, width, count, channels = columns.shape
    rows = columns.reshape(-1, count, groups, channels // groups).transpose(2, 0, 1, 3)
    rows_GPK = rows.reshape(groups, -1, count * narrow)
    weight_GKO = weight.reshape(groups, out // groups, narrow, count).transpose(0, 3, 2, 1)
    acc_GPO = rows_GPK @ np.ascontiguousarray(weight_GKO).reshape(groups, count * narrow, out // groups)
    return np.asarray(acc_GPO.transpose(1, 0, 2).reshape(n, height, width, out).transpose(0, 3, 1, 2), np.int64)


def _taps(x_NHWC: Ints, kernel: list[int], stride: list[int], dilation: list[int], size: list[int]) -> Iterator[Ints]:
    """For every place in the kernel, what lies there in every window: ``[N, *size, C]``."""
    reach = [(steps - 1) * s + 1 for steps, s in zip(size, stride, strict=True)]
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            yield x_NHWC[:, top : top + reach[0] : stride[0], left : left + reach[1] : stride[1]]


def _add(op: dict[str, Any], given: list[Bytes], sources: list[dict[str, Any]]) -> Bytes:
    """``clip(rne(fma(q_a, r_a, fma(q_b, r_b, f))))``, the kernel of onnxruntime's QLinearAdd; z_y is inside ``f``."""
    made = op["output"]
    (q_a, q_b), (a, b) = given, sources
    r_a, r_b = (f32(source["scale"]) / f32(made["scale"]) for source in sources)
    zeros = _fma(np.float64(a["zero_point"]), r_a, r_b * f32(b["zero_point"]))
    fixed = f32(made["zero_point"]) - zeros
    total = _fma(q_a.astype(np.float64), r_a, _fma(q_b.astype(np.float64), r_b, fixed))
    return np.asarray(np.clip(np.rint(total), made["low"], made["high"]).astype(np.uint8))


def _fma(q: Any, r: np.float32, c: Any) -> Any:
    """``q * r + c`` rounded once to fp32, where ``q`` is an integer of at most 8 bits (as float64), r and c are fp32.

    The product has at most 32 bits: exact in float64. Its sum with ``c`` may need more than float64's 53, so rounding
    it to float64 and then to fp32 would round twice. Knuth's TwoSum gives the exact error of the first rounding; where
    it is not zero, the sum is moved to the neighbour whose last bit is odd, between which and itself the exact value
    lies ("round to odd"). A value with an odd last bit is never a tie of a format that is at least two bits shorter,
    so the second rounding is the only one that counts (Boldo and Melquiond, Emulation of FMA, IEEE TC 2008, theorem 3).
    """
    product, c = np.asarray(q * np.float64(r)), np.asarray(c, np.float64)
    total = np.asarray(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    outwards = np.where(np.signbit(error) == np.signbit(total), 1, -1)  # +1 makes the magnitude one step larger
    odd = np.where((error != 0) & (bits & 1 == 0), bits + outwards, bits)
    return odd.view(np.float64).astype(f32)


def _avg_pool(op: dict[str, Any], given: list[Bytes], sources: list[dict[str, Any]]) -> Bytes:
    """``clip(rne(fp32(sum(q_x - z_x)) * M) + z_y)``.

    ``M`` is ``fp32(s_x / fp32(s_y * count))`` over the whole map, ``fp32(fp32(s_x * fp32(1 / count)) / s_y)`` in windows.
    """
    x = given[0].astype(np.int64) - sources[0]["zero_point"]
    total = np.zeros((len(x), *op["output"]["shape"]), np.int64)
    for tap in _taps(x.transpose(0, 2, 3, 1), op["kernel"], op["stride"], [1, 1], op["output"]["shape"][1:]):
        total += tap.transpose(0, 3, 1, 2)
    step, scale, count = f32(sources[0]["scale"]), f32(op["output"]["scale"]), f32(prod(op["kernel"]))
    whole = list(op["kernel"]) == list(x.shape[2:])
    ratio = step / (scale * count) if whole else (step * (f32(1) / count)) / scale
    return _place(np.rint(total.astype(f32) * ratio), op["output"])


def _max_pool(op: dict[str, Any], given: list[Bytes], sources: list[dict[str, Any]]) -> Bytes:
    pads = [(0, 0), *((p, p) for p in op["padding"]), (0, 0)]
    x_NHWC = np.pad(given[0].astype(np.int64).transpose(0, 2, 3, 1), pads, constant_values=-1)  # -1 never wins
    taps = _taps(x_NHWC, op["kernel"], op["stride"], [1, 1], op["output"]["shape"][1:])
    largest = next(taps)
    for tap in taps:
        largest = np.maximum(largest, tap)
    return largest.transpose(0, 3, 1, 2).astype(np.uint8)


def _reshape(op: dict[str, Any], given: list[Bytes], sources: list[dict[str, Any]]) -> Bytes:
    return given[0].reshape(len(given[0]), *op["output"]["shape"])


def _clip(op: dict[str, Any], given: list[Bytes], sources: list[dict[str, Any]]) -> Bytes:
    return np.clip(given[0], op["output"]["low"], op["output"]["high"]).astype(np.uint8)


def _concat(op: dict[str, Any], given: list[Bytes], sources: list[dict[str, Any]]) -> Bytes:
    """Joins channels; another grid is requantized: ``clip(rne(fp32(s_x * (q_x - z_x)) / s_y) + z_y)``."""
    made, parts = op["output"], []
    for q, source in zip(given, sources, strict=True):
        if (source["scale"], source["zero_point"]) == (made["scale"], made["zero_point"]):
            parts.append(np.clip(q, made["low"], made["high"]).astype(np.uint8))
        else:
            real = f32(source["scale"]) * (q.astype(np.int64) - source["zero_point"]).astype(f32)
            parts.append(_place(np.rint(real / f32(made["scale"])), made))
    return np.concatenate(parts, axis=1)


_EXECUTE: dict[str, Callable[[dict[str, Any], list[Bytes], list[dict[str, Any]]], Bytes]] = {
    "add": _add,
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "reshape": _reshape,
    "clip": _clip,
    "concat": _concat,
}
_KINDS = {"input", "conv", "linear", *_EXECUTE}


def _place(steps: Floats, made: dict[str, Any]) -> Bytes:
    """Rounded steps from the zero-point into the container; clipped first, so that nothing overflows on the way."""
    zero = made["zero_point"]
    within = np.clip(steps, f32(made["low"] - zero), f32(made["high"] - zero))
    return np.asarray(within.astype(np.int64) + zero, np.uint8)


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
    if place.get("zeros") is not None:
        # Stored from 0 up, as the weights would be if they were not two's complements.
        weight = weight + 2 ** (place["bits"] - 1) - arrays[place["zeros"]].astype(np.int64).reshape(column)
    if "shifts" in arrays:
        weight = weight * 2 ** arrays["shifts"][channels].astype(np.int64).reshape(column)
    layer = {"weight": weight, "scale": arrays["scales"][channels], "bias": arrays["biases"][channels].astype(np.int64)}
    if any(len(array) != shape[0] for array in layer.values()):
        raise ValueError(f"the layer {op['output']['name']!r} needs {shape[0]} scales and biases")
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

"""The official file of NAS-Bench-101: a TFRecord file of JSON lists, read without TensorFlow."""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nasq.errors import ArtifactError, InputError

__all__ = ["Record", "read_records"]

_DOUBLES = {1: "current_epoch", 2: "training_time", 3: "train_accuracy", 4: "validation_accuracy", 5: "test_accuracy"}


@dataclass(frozen=True)
class Record:
    """One training of one cell.

    Attributes:
        cell: The official adjacency bits and operators, as ``ADJACENCY:OPERATOR,OPERATOR,...``.
        epochs: How long it was trained.
        params: Trainable parameters.
        final: Metrics at the end of training, accuracies as fractions.
    """

    cell: str
    epochs: int
    params: int
    final: dict[str, float]


def read_records(path: Path) -> Iterator[Record]:
    """Every record of the file, in its order.

    Raises:
        InputError: The file is not there.
        ArtifactError: It is truncated, or a record is none of NAS-Bench-101 (its number is named).
    """
    try:
        with path.open("rb") as file:
            for number, data in enumerate(_frames(file.read(1 << 20), file, path), 1):
                try:
                    yield _record(data)
                except (ValueError, TypeError, KeyError, IndexError, struct.error, binascii.Error) as error:
                    raise ArtifactError(
                        f"{path}, record {number}, is none of NAS-Bench-101: {error}. Give nasbench_only108.tfrecord or "
                        "nasbench_full.tfrecord."
                    ) from error
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. Give the path of a TFRecord file of NAS-Bench-101.") from error


def _frames(buffer: bytes, file: object, path: Path) -> Iterator[bytes]:
    """The records: 8 bytes of length, 4 of its checksum, the data, 4 of the data's checksum (which are not checked)."""
    position = 0
    while True:
        buffer, position, header = _take(buffer, position, 12, file)
        if not header:
            return
        length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else -1
        if not 0 <= length < 1 << 24:
            raise ArtifactError(f"{path} is no TFRecord file, or it is truncated. Download it again.")
        buffer, position, data = _take(buffer, position, length + 4, file)
        if len(data) < length + 4:
            raise ArtifactError(f"{path} ends in the middle of a record: it is truncated. Download it again.")
        yield data[:-4]


def _take(buffer: bytes, position: int, count: int, file: object) -> tuple[bytes, int, bytes]:
    """``count`` bytes from ``position``, with more of the file where the buffer ends."""
    if position + count > len(buffer):
        more = file.read(1 << 20)  # type: ignore[attr-defined]
        while more and position + count > len(buffer) + len(more):
            more += file.read(1 << 20)  # type: ignore[attr-defined]
        buffer, position = buffer[position:] + more, 0
    return buffer, position + count, buffer[position : position + count]


def _record(data: bytes) -> Record:
    _, epochs, adjacency, operators, metrics = json.loads(data.decode())
    evaluations, params = [], 0
    for field, value in _fields(base64.b64decode(metrics, validate=True)):
        if field == 1 and isinstance(value, bytes):
            inner = dict(_fields(value))
            evaluations.append({name: float(inner[key]) for key, name in _DOUBLES.items() if key in inner})
        elif field == 2 and isinstance(value, int):
            params = value
    if len(evaluations) < 3:
        raise ValueError(f"it has {len(evaluations)} evaluations instead of 3")
    return Record(f"{adjacency}:{operators}", int(epochs), params, evaluations[-1])


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a protocol buffer: number and value (varint, double or bytes)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
        elif kind == 1:
            yield key >> 3, struct.unpack_from("<d", data, position)[0]
            position += 8
        elif kind == 2:
            length, position = _varint(data, position)
            yield key >> 3, data[position : position + length]
            position += length
        else:
            raise ValueError(f"a metric has the wire type {kind}")
    if position != len(data):
        raise ValueError("a metric is cut off")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position

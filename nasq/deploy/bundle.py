"""Writes and reads bundles: the directory in which a quantized subnet is handed over.

========================  ==========================================================================================
``subnet.json``           every operation and scalar, versioned (:mod:`nasq.deploy.schema`)
``model.safetensors``     packed integer weights, one array of all scales, one of all biases
``checksums.json``        SHA-256 of every other file; detects accidents, not tampering (:mod:`nasq.deploy.storage`)
``model.onnx``            the runtime's file
``parity.json``           what the runtime was found to compute
``README.md``             the model card
========================  ==========================================================================================

:func:`write` takes the last three as bytes, or :func:`add_file` adds them later. A bundle is replaced as a whole: after
a kill at any moment there is the old one or the new one. Reading trusts nothing: checksums, names, sizes, ranges and
shapes are compared before a program is made, and everything that does not hold is an ``ArtifactError``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from nasq import files
from nasq.deploy import storage
from nasq.deploy.program_json import json_from_program, program_from_json
from nasq.deploy.schema import SCHEMA, WEIGHTS
from nasq.errors import ArtifactError, InputError
from nasq.quant.program import Program

__all__ = [
    "SCHEMA",
    "SUBNET",
    "WEIGHTS",
    "add_file",
    "json_from_program",
    "program_from_json",
    "read",
    "verify_files",
    "write",
]

SUBNET = "subnet.json"
MAX_HEADER = 4 << 20  # bytes; the header of a network of 1,000 layers takes less than 100 kB
MAX_SUBNET = 64 << 20
_TYPES = {"F32", "I32", "U8"}


def write(directory: Path, program: Program, extra: Mapping[str, bytes] | None = None) -> None:
    """Writes a bundle, or replaces one, as a whole.

    Args:
        directory: The bundle; missing parents are made.
        program: The quantized subnet.
        extra: Further files by plain name, such as ``{"model.onnx": ...}``.

    Raises:
        ArtifactError: The program is not valid, or a name is not a plain file name.
        InputError: The directory exists and is no bundle, or ``extra`` names a file that this function writes itself.
        NasqError: The disk is full or read-only; what was there before is untouched.
    """
    _check_extra(extra or {})
    document, arrays = json_from_program(program)
    own = {SUBNET: _text(document).encode(), WEIGHTS: safetensors.save(arrays)}
    storage.publish(directory, own | dict(extra or {}), (SUBNET, WEIGHTS))


def add_file(directory: Path, name: str, data: bytes) -> None:
    """Adds a file to a bundle, or replaces it, together with its checksum, at once.

    Args:
        directory: An existing bundle; its other files are verified, so that damage is not sealed with new checksums.
        name: A plain file name.
        data: The file's content.

    Raises:
        ArtifactError: The bundle is damaged or incomplete, or the name is not a plain file name.
        InputError: The file is one that only :func:`write` may write.
    """
    _check_extra({name: data})
    storage.recover(directory)
    storage.publish(directory, _complete(directory, storage.contents(directory)) | {name: data}, (SUBNET, WEIGHTS))


def verify_files(directory: Path) -> dict[str, str]:
    """Compares every file of a bundle with its checksum, and nothing else; returns the SHA-256 by file name.

    Raises:
        ArtifactError: A file is missing, damaged, or not allowed in a bundle; the message names it.
    """
    return _complete(directory, storage.steady(directory, lambda: storage.verify(directory)))


def read(directory: Path) -> Program:
    """Reads a bundle's program; trusts nothing.

    Raises:
        ArtifactError: The bundle is damaged, incomplete, hostile, of a newer schema, or holds a program that is not
            valid; the message names the file and what is wrong with it.
    """
    return storage.steady(directory, lambda: _read(directory))


def _read(directory: Path) -> Program:
    path = directory / SUBNET
    with contextlib.suppress(OSError):  # which is told below, with what else is missing
        if (size := path.stat().st_size) > MAX_SUBNET:
            raise ArtifactError(f"{path} has {size} bytes; allowed: {MAX_SUBNET}.")
    own = {SUBNET: b"", WEIGHTS: b""}
    _complete(directory, storage.verify(directory, own))
    try:
        document = files.parse_json(own[SUBNET], path)
        _check_weights_name(directory, document)
        return program_from_json(document, _load_arrays(own[WEIGHTS]))
    except ArtifactError as error:
        raise ArtifactError(f"the bundle {directory} cannot be read: {error}") from error


def _check_extra(extra: Mapping[str, bytes]) -> None:
    for name in extra:
        if name in (SUBNET, WEIGHTS, storage.CHECKSUMS):
            raise InputError(f"{name} cannot be added to a bundle: nasq writes it. Write the whole bundle instead.")


def _text(document: dict[str, Any]) -> str:
    """JSON with one operation per line: short, and two bundles compare line by line."""
    head = json.dumps({**document, "ops": []}, indent=1, allow_nan=False)
    ops = ",\n".join("  " + json.dumps(op, allow_nan=False) for op in document["ops"])
    assert head.endswith("[]\n}")
    return f"{head[:-3]}\n{ops}\n ]\n}}\n"


def _complete(directory: Path, listed: dict[str, Any]) -> dict[str, Any]:
    for name in (SUBNET, WEIGHTS):
        if name not in listed:
            raise ArtifactError(f"{directory / storage.CHECKSUMS} does not list {name}; the bundle is incomplete.")
    return listed


def _check_weights_name(directory: Path, document: Any) -> None:
    """A path in the JSON is judged as a path first, so that the message says what is wrong with it."""
    places = document.get("weights") if isinstance(document, dict) else None
    name = places.get("file") if isinstance(places, dict) else None
    if isinstance(name, str):
        storage.path_of(directory, name)


def _load_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file; the library refuses gaps, overlaps and sizes that disagree."""
    _check_header(data)
    try:
        return dict(safetensors.load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{WEIGHTS} is not a valid safetensors file: {error}.") from error


def _check_header(data: bytes) -> None:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
        raise ArtifactError(
            f"{WEIGHTS} says that its header has {size} bytes, of {len(data)} in the file. "
            f"Allowed: up to {MAX_HEADER}; it is truncated or corrupt."
        )
    try:
        header = files.strict_json(data[8 : 8 + size].decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header of {WEIGHTS} is not JSON: {error}.") from error
    for name, entry in header.items() if isinstance(header, dict) else ():
        kind = entry.get("dtype") if isinstance(entry, dict) else entry
        if not isinstance(kind, str) or kind not in _TYPES:
            raise ArtifactError(f"the tensor {name!r} in {WEIGHTS} has the type {kind!r}. Allowed: F32, I32, U8.")

"""Checkpoints: tensors in safetensors, everything else in JSON, two slots, the pointer written last.

With the prefix ``DIR/checkpoint`` the files are::

    checkpoint.json             the manifest of the newest complete checkpoint: what load() reads
    checkpoint.0.json  .1.json  the manifests of the newest and of the one before it
    checkpoint.0.safetensors  .1.safetensors

A manifest holds the plain values, the name, size and SHA-256 of its tensors, and a checksum of itself. Saving writes
the slot that is not in use, then its manifest, then ``checkpoint.json``; killed at any moment, the former checkpoint
is whole. Copying a slot's manifest over ``checkpoint.json`` goes back to it. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from nasq.errors import ArtifactError, InputError
from nasq.files import read_json, write_bytes, write_json

__all__ = ["exists", "load", "pack", "save", "unpack"]

SCHEMA = 1
_TENSOR = "$tensor"


def exists(prefix: pathlib.Path) -> bool:
    """Whether a checkpoint with this prefix was ever completed; whether it can be read is for :func:`load` to say."""
    # Slot 0 alone is a first save that was killed before its end. Slot 1 is used only after a complete one.
    return _pointer(prefix).exists() or _manifest(prefix, 1).exists()


def save(prefix: pathlib.Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint; the former one stays until this one is complete.

    Args:
        prefix: Directory and first part of the file names.
        tensors: Flat; on any device, sharing memory or not.
        meta: Plain types that JSON knows.

    Raises:
        NasqError: The directory cannot be written.
        ArtifactError: The checkpoint that is there is corrupt.
    """
    former = _read_manifest(_pointer(prefix)) if _pointer(prefix).exists() else {"slot": 1, "serial": -1}
    slot = 1 - int(former["slot"])
    data = safetensors.torch.save({name: _own(tensor) for name, tensor in tensors.items()})
    write_bytes(_tensors(prefix, slot), data)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "slot": slot,
        "serial": former["serial"] + 1,
        "tensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "meta": dict(meta),
    }
    manifest["checksum"] = _checksum(manifest)
    write_json(_manifest(prefix, slot), manifest)
    write_json(_pointer(prefix), manifest)


def load(prefix: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the newest complete checkpoint: ``(tensors on the CPU, meta)``.

    Raises:
        ArtifactError: It is missing, truncated, changed, or of a newer schema; the message says what to do.
    """
    try:
        manifest = _read_manifest(_pointer(prefix))
        return _read_tensors(_tensors(prefix, int(manifest["slot"])), manifest["tensors"]), manifest["meta"]
    except _Newer:
        raise
    except ArtifactError as error:
        raise ArtifactError(f"{error} {_advice(prefix)}") from error


def pack(state: Any, name: str) -> tuple[dict[str, Tensor], Any]:
    """Splits a nested state into flat tensors and a plain rest that JSON can hold.

    Args:
        state: Dicts with text keys, lists, tuples (which come back as lists), numbers, texts, ``None``, tensors.
        name: What the tensors' names begin with.

    Returns:
        ``(tensors, rest)`` for :func:`unpack`.

    Raises:
        InputError: A part of the state is none of these, or a number is not finite; it is named.
    """
    if isinstance(state, Tensor):
        return {name: state}, {_TENSOR: name}
    if isinstance(state, Mapping):
        items, rest = _pack_items(state.items(), name)
        return items, dict(rest)
    if isinstance(state, list | tuple):
        items, rest = _pack_items(((str(i), value) for i, value in enumerate(state)), name)
        return items, [value for _, value in rest]
    if state is None or isinstance(state, bool | int | str) or (isinstance(state, float) and math.isfinite(state)):
        return {}, state
    raise InputError(
        f"the state {name!r} is {state!r} of type {type(state).__name__}; a checkpoint holds dicts with text keys, "
        "lists, finite numbers, texts, None and tensors"
    )


def _pack_items(items: Any, name: str) -> tuple[dict[str, Tensor], list[tuple[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    rest = []
    for key, value in items:
        if not isinstance(key, str) or key == _TENSOR:
            raise InputError(f"the state {name!r} has the key {key!r}; allowed: texts other than {_TENSOR!r}")
        inner, plain = pack(value, f"{name}/{key}")
        if clash := tensors.keys() & inner.keys():
            raise InputError(f"the state {name!r} has two tensors that would be called {min(clash)!r}; rename one key")
        tensors |= inner
        rest.append((key, plain))
    return tensors, rest


def unpack(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """Puts together what :func:`pack` split.

    Raises:
        ArtifactError: A tensor is missing.
    """
    if isinstance(rest, dict):
        if set(rest) == {_TENSOR}:
            if rest[_TENSOR] not in tensors:
                raise ArtifactError(f"the checkpoint has no tensor {rest[_TENSOR]!r}; it was not written by nasq")
            return tensors[rest[_TENSOR]]
        return {key: unpack(tensors, value) for key, value in rest.items()}
    return [unpack(tensors, value) for value in rest] if isinstance(rest, list) else rest


class _Newer(ArtifactError):
    """The schema is newer: going back to the former checkpoint would not help."""


def _pointer(prefix: pathlib.Path) -> pathlib.Path:
    return prefix.with_name(f"{prefix.name}.json")


def _manifest(prefix: pathlib.Path, slot: int) -> pathlib.Path:
    return prefix.with_name(f"{prefix.name}.{slot}.json")


def _tensors(prefix: pathlib.Path, slot: int) -> pathlib.Path:
    return prefix.with_name(f"{prefix.name}.{slot}.safetensors")


def _own(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory or are not contiguous.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _checksum(manifest: Mapping[str, Any]) -> str:
    covered = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise ArtifactError(f"{path} is not the manifest of a checkpoint.")
    if manifest["schema"] > SCHEMA:
        raise _Newer(
            f"{path} has schema {manifest['schema']}; this nasq reads {SCHEMA} and older. "
            "Go on with the nasq that wrote it, or upgrade: pip install --upgrade nasq"
        )
    if manifest.get("checksum") != _checksum(manifest):
        raise ArtifactError(f"{path} was changed or damaged: its checksum does not fit its content.")
    well_formed = (
        manifest.get("slot") in (0, 1)
        and isinstance(manifest.get("serial"), int)
        and isinstance(manifest.get("meta"), dict)
        and isinstance(manifest.get("tensors"), dict)
        and set(manifest["tensors"]) == {"bytes", "sha256"}
    )
    if not well_formed:
        raise ArtifactError(f"{path} is not the manifest of a checkpoint.")
    return manifest


def _read_tensors(path: pathlib.Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing.") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) != expected["bytes"]:
        raise ArtifactError(f"{path} is truncated: it has {len(data)} bytes, its manifest says {expected['bytes']}.")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise ArtifactError(f"{path} is corrupt: its SHA-256 is not the one in its manifest.")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}.") from error


def _advice(prefix: pathlib.Path) -> str:
    """What to do about a checkpoint that cannot be read: go back to a whole one, or start again."""
    whole = []
    for slot in (0, 1):
        with contextlib.suppress(ArtifactError):
            manifest = _read_manifest(_manifest(prefix, slot))
            _read_tensors(_tensors(prefix, slot), manifest["tensors"])
            whole.append((manifest["serial"], _manifest(prefix, slot)))
    if not whole:
        return f"No other checkpoint is whole: remove {prefix}.* and train again from the start."
    kept = max(whole)[1]
    return f"Another checkpoint is whole: go on from it with 'cp {kept} {_pointer(prefix)}' and resume again."

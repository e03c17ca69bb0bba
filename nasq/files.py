"""Atomic, durable writes: after a kill at any moment a reader finds the old file or the new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nasq.errors import ArtifactError, NasqError

__all__ = ["append_line", "parse_json", "read_json", "sha256", "strict_json", "write_bytes", "write_json", "write_text"]


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals (read-only, full disk, no permission) into one clear line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise NasqError(
            f"cannot write {path}: {reason}. What was there before is untouched; free space or choose a writable "
            "directory (--out) and run the same command again."
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data`` atomically and durably; makes missing parent directories.

    Raises:
        NasqError: The directory is read-only or the disk is full; the former file is untouched.
    """
    with _said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Replaces ``path`` by ``value`` as JSON. NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Appends one line in a single ``write``, so that lines of several processes never mix."""
    assert "\n" not in line
    with _said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            data = (line + "\n").encode()
            written = os.write(handle, data)
            if written < len(data):
                # A nearly full disk takes a part: take it back, or the next line would be glued to it.
                os.ftruncate(handle, os.fstat(handle).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = {key for key in keys if keys.count(key) > 1} if len(set(keys)) != len(keys) else set()
    if repeated:
        raise ValueError(f"duplicate key {sorted(repeated)[0]!r}")
    return dict(pairs)


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def strict_json(text: str) -> Any:
    """What a JSON text holds; duplicate keys, NaN and infinities are refused.

    Raises:
        ValueError: The text is no such JSON.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)


def read_json(path: Path) -> Any:
    """Reads a file as :func:`strict_json`.

    Raises:
        ArtifactError: The file is missing, not UTF-8, or not strict JSON.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing. Is this the right directory?") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}. It is corrupt or truncated.") from error
    return parse_json(data, path)


def parse_json(data: bytes, path: Path) -> Any:
    """The strict JSON that was read from ``path``; see :func:`read_json`."""
    try:
        return strict_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}. It is corrupt or truncated.") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""A directory of checksummed files that is replaced as a whole.

``checksums.json`` holds the SHA-256 of every other file. It detects accidents (a torn copy, a flipped bit, a file of
another bundle), not tampering: whoever can change a file can change its checksum.

Publishing builds the new directory beside the old one (``.NAME.nasq-new-*``), flushes it, moves the old one aside
(``.NAME.nasq-old``) and the new one into place. At any moment one of the two is complete; :func:`recover` puts the old
one back where a kill fell between the two moves. One writer at a time; any number of readers meanwhile
(:func:`steady`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from nasq import files
from nasq.errors import ArtifactError, InputError, NasqError

__all__ = ["CHECKSUMS", "contents", "digest", "path_of", "publish", "read", "recover", "steady", "verify"]

CHECKSUMS = "checksums.json"
MAX_LIST = 1 << 20  # bytes of checksums.json
MAX_FILE = 4 << 30  # bytes of any other file
ATTEMPTS = 100  # of readers and of the writer, who may cross each other's way
_DIGEST = re.compile(r"[0-9a-f]{64}")

_Found = TypeVar("_Found")


def path_of(directory: Path, name: str) -> Path:
    """The path of a bundle's file, whose name may come from an untrusted JSON.

    Raises:
        ArtifactError: The name is absolute, leaves the bundle or is no plain file name; or it is a link, a directory,
            a device or missing.
    """
    _check_name(name)
    return _regular(directory, name, MAX_FILE)


def read(directory: Path, name: str) -> bytes:
    """The bytes of a bundle's file; raises as :func:`path_of` does, and where the file cannot be read."""
    path = path_of(directory, name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error


def digest(data: bytes) -> str:
    """The SHA-256 of a file's content, in hex."""
    return hashlib.sha256(data).hexdigest()


def _regular(directory: Path, name: str, limit: int) -> Path:
    """The path of a plain file of at most ``limit`` bytes; opening a link or a pipe could lead elsewhere, or never end."""
    path = directory / name
    try:
        found = path.lstat()
    except OSError as error:
        raise ArtifactError(
            f"{name} is missing in {directory} ({error.strerror}). Is this a bundle, copied completely?"
        ) from error
    if stat.S_ISLNK(found.st_mode):
        raise ArtifactError(f"{path} is a symbolic link; links in a bundle are not followed. Replace it by the file.")
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path} is not a regular file.")
    if found.st_size > limit:
        raise ArtifactError(f"{path} has {found.st_size} bytes; allowed: {limit}.")
    return path


def verify(directory: Path, keep: dict[str, bytes] | None = None) -> dict[str, str]:
    """Compares every file with its checksum; returns the SHA-256 by file name.

    Args:
        directory: The bundle.
        keep: The files whose content is wanted, as keys; their values become the very bytes that were verified.

    Raises:
        ArtifactError: A file is missing, has another checksum, or may not be part of a bundle; the message names it.
    """
    digests = _listed(directory)
    for name, listed in digests.items():
        path = path_of(directory, name)
        try:
            if keep is not None and name in keep:
                keep[name] = path.read_bytes()
                found = digest(keep[name])
            else:
                found = files.sha256(path)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
        if found != listed:
            raise ArtifactError(
                f"{directory / name} does not match its checksum (listed {listed[:12]}..., found {found[:12]}...). "
                "It was changed, torn or mixed up; copy or export the bundle again."
            )
    return digests


def contents(directory: Path) -> dict[str, bytes]:
    """The verified bytes of every file by name, without the checksums.

    Raises:
        ArtifactError: As in :func:`verify`.
    """
    found = dict.fromkeys(_listed(directory), b"")
    verify(directory, found)
    return found


def publish(directory: Path, data: Mapping[str, bytes], required: tuple[str, ...]) -> None:
    """Makes ``directory`` hold exactly these files and their checksums, all at once.

    Files in the directory that are not part of the former bundle are kept.

    Args:
        directory: To be made or replaced; missing parents are made.
        data: The files by name.
        required: Files that tell an existing bundle from a directory that must not be replaced.

    Raises:
        InputError: ``directory`` exists and is no bundle, or a name is not a plain file name.
        NasqError: The disk is full or the parent is read-only; the old bundle is untouched.
    """
    for name in data:
        _check_name(name)
    directory = directory.resolve()
    with _said(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(directory, required)
        recover(directory)
        prefix = f".{directory.name}.nasq-new-"
        for stale in [entry for entry in directory.parent.iterdir() if entry.name.startswith(prefix)]:
            shutil.rmtree(stale, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
        try:
            _fill(fresh, data)
            _swap(fresh, directory)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        recover(directory)


def recover(directory: Path) -> None:
    """Finishes what a killed :func:`publish` left: puts the old bundle back, or clears it away behind the new one."""
    directory = directory.resolve()
    old = _aside(directory)
    with contextlib.suppress(OSError):
        if old.is_dir() and not directory.exists():
            os.rename(old, directory)
        elif old.is_dir():
            _discard(old, directory)


def steady(directory: Path, read: Callable[[], _Found]) -> _Found:
    """What ``read`` makes of a bundle; where a writer replaced the bundle meanwhile, it reads again.

    Without that, files of the former directory would be compared with checksums of the new one.

    Raises:
        ArtifactError: What ``read`` raised on a directory that stayed the same.
    """
    for _ in range(ATTEMPTS):
        recover(directory)
        before = _identity(directory)
        try:
            return read()
        except ArtifactError:
            if before == _identity(directory):
                raise
    return read()


def _identity(directory: Path) -> tuple[int, ...]:
    """What tells a directory from the one that takes its place; nothing where there is none."""
    try:
        found = directory.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _check_name(name: str) -> None:
    reason = ""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        reason = "is an absolute path"
    elif ".." in re.split(r"[/\\]", name):
        reason = "leads out of the bundle"
    elif not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
        reason = "is not a plain file name (letters, digits, '.', '_', '-')"
    elif name == CHECKSUMS:
        reason = "cannot hold its own checksum"
    if reason:
        raise ArtifactError(
            f"the bundle's file name {name[:80]!r} {reason}; it is refused. Allowed: files in the bundle."
        )


def _listed(directory: Path) -> dict[str, str]:
    path = _regular(directory, CHECKSUMS, MAX_LIST)
    document = files.read_json(path)
    listed = document.get("files") if isinstance(document, dict) and set(document) == {"algorithm", "files"} else None
    if not isinstance(listed, dict) or document["algorithm"] != "sha256":
        raise ArtifactError(f"{path} is not a list of checksums: it needs 'algorithm': 'sha256' and 'files'.")
    for name, digest in listed.items():
        _check_name(name)
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ArtifactError(f"{path} holds no SHA-256 for {name!r}: {str(digest)[:80]!r}.")
    return listed


def _check_replaceable(directory: Path, required: tuple[str, ...]) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; a bundle needs a directory. Choose another name.")
    held = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    if held and not held.issuperset({CHECKSUMS, *required}):
        raise InputError(f"{directory} exists and is not a bundle; it is left alone. Choose another directory.")


def _fill(fresh: Path, data: Mapping[str, bytes]) -> None:
    for name, content in data.items():
        files.write_bytes(fresh / name, content)
    digests = {name: digest(content) for name, content in sorted(data.items())}
    files.write_json(fresh / CHECKSUMS, {"algorithm": "sha256", "files": digests})
    os.chmod(fresh, 0o755)
    _flush(fresh)


def _swap(fresh: Path, directory: Path) -> None:
    old = _aside(directory)
    try:
        for attempt in range(ATTEMPTS):
            if directory.exists():
                os.rename(directory, old)
            try:
                os.rename(fresh, directory)
                break
            except OSError:  # a reader may have put the old one back just now
                if attempt == ATTEMPTS - 1 or not directory.exists():
                    raise
    finally:
        if old.exists() and not directory.exists():
            os.rename(old, directory)
    _flush(directory.parent)


def _discard(old: Path, directory: Path) -> None:
    """Removes the old bundle; what somebody else put there moves on to the new one."""
    if not old.is_dir():
        return
    try:
        known = {CHECKSUMS, *_listed(old)}
    except ArtifactError:
        known = {CHECKSUMS}
    for entry in old.iterdir():
        if entry.name not in known and not (directory / entry.name).exists():
            os.rename(entry, directory / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _aside(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.nasq-old"


def _flush(directory: Path) -> None:
    """Makes the directory's entries durable; not every system can open a directory."""
    with contextlib.suppress(PermissionError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _said(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NasqError(
            f"cannot write the bundle {directory}: {error.strerror or error}. What was there before is untouched; "
            "free space or choose a writable directory (--out) and run the same command again."
        ) from error

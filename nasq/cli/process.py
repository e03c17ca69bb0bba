"""The process around a command: its streams, Ctrl-C, and what the operating system refuses."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

__all__ = ["Interrupted", "interrupt", "open_closed_streams", "refused_by_system", "what_goes_on"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_WRONG_PATH = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}

_GO_ON = {"train", "split", "search", "worker", "score", "rank-supernet", "finetune", "table"}
"""Commands that take up their own work where it was left."""


class Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would end without a word."""


def interrupt(number: int, frame: object) -> None:
    """The handler of SIGINT."""
    raise Interrupted


def what_goes_on(words: Sequence[str]) -> str:
    """What an interrupted command line may count on; nothing is said of commands that leave nothing behind.

    Args:
        words: Behind the program's name.
    """
    command = next((word for word in words if not word.startswith("-")), "")
    if command == "run":
        return "; nothing is lost, 'nasq run' with --resume goes on"
    return "; nothing is lost, the same command goes on" if command in _GO_ON else ""


def refused_by_system(error: OSError) -> str:
    """The line for a file that could not be read or written; empty where the error is none of that kind, but a bug."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _NO_ROOM:
        return (
            f"the system refused to write or read: {error.strerror}{where}. What was written before is whole; free space "
            "or choose a writable directory, and run the same command again."
        )
    if error.errno in _WRONG_PATH and where:
        return f"a path cannot be used: {error.strerror}{where}. Give another one, and run the same command again."
    return ""


def open_closed_streams() -> None:
    """A program whose stdout or stderr was closed before it began (``>&-``) has ``None`` there; it writes to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open for as long as the process lives

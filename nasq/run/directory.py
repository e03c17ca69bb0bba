"""A run's directory: its files, its lock and its log of events."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nasq.errors import ArtifactError, InputError, NasqError
from nasq.files import append_line, write_text
from nasq.run.config import RunConfig, load_config

__all__ = ["RunDirectory"]

Listener = Callable[[Mapping[str, Any]], None]


class RunDirectory:
    """One run on disk. Use it in a ``with`` statement to hold its lock.

    Args:
        path: The directory.
        listener: Also told every event, for progress on a terminal.

    Attributes:
        supernet, search, exports, best: Sub-directories of the stages.
    """

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self.path = path
        self.listener = listener
        self.supernet, self.search = path / "supernet", path / "search"
        self.exports, self.best = path / "exports", path / "best"
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path, config: RunConfig, resume: bool, listener: Listener | None = None) -> RunDirectory:
        """Makes the directory of a new run, or opens that of an interrupted one.

        Raises:
            InputError: It exists and ``resume`` is off, or it belongs to another configuration.
        """
        run = cls(path, listener)
        if run.config_file.exists():
            if not resume:
                raise InputError(
                    f"{path} already holds a run. Go on with it: --resume. Or give another directory: --out."
                )
            before = run.config()
            if before != config:
                raise InputError(
                    f"{path} holds a run with another configuration ({_difference(before, config)}). Use its own, or "
                    "another --out."
                )
            return run
        if path.exists() and any(path.iterdir()):
            raise InputError(f"{path} is not empty and holds no run. Give another directory: --out.")
        write_text(run.config_file, config.to_yaml())
        return run

    @classmethod
    def open(cls, path: Path, listener: Listener | None = None) -> RunDirectory:
        """Opens a run that exists.

        Raises:
            InputError: There is none.
        """
        run = cls(path, listener)
        if not run.config_file.exists():
            raise InputError(f"{path} holds no run: config.yaml is missing. 'nasq run --out {path}' makes one.")
        return run

    @property
    def config_file(self) -> Path:
        """``config.yaml``."""
        return self.path / "config.yaml"

    def config(self) -> RunConfig:
        """The run's configuration, as it was given."""
        return load_config(self.config_file)

    def __enter__(self) -> RunDirectory:
        try:
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise NasqError(
                f"cannot write in {self.path}: {error.strerror}. Choose a writable directory: --out."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InputError(
                f"another process is working in {self.path}. Wait for it, or give another --out."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        os.close(self._lock)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Appends an event to ``events.jsonl`` with the time, and passes it on."""
        append_line(self.path / "events.jsonl", json.dumps({"time": round(time.time(), 3), **event}, default=str))
        if self.listener is not None:
            self.listener(event)

    def events(self) -> list[dict[str, Any]]:
        """Every event so far; a line that a kill cut short is left out.

        Raises:
            ArtifactError: Another line is damaged.
        """
        path = self.path / "events.jsonl"
        if not path.exists():
            return []
        found = []
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                if not line.endswith("}"):
                    continue
                raise ArtifactError(f"{path} is damaged in line {number}.") from error
        return found


def _difference(before: RunConfig, now: RunConfig) -> str:
    old, new = before.model_dump(), now.model_dump()
    key = next(key for key in old if old[key] != new[key])
    return f"{key}: {old[key]!r} there, {new[key]!r} here"[:300]

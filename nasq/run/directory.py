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
from nasq.files import append_line, write_bytes, write_text
from nasq.run.config import RunConfig, load_config

__all__ = ["RunDirectory"]

Listener = Callable[[Mapping[str, Any]], None]


class RunDirectory:
    """One run on disk. Use it in a ``with`` statement to hold its lock.

    Args:
        path: The directory.
        listener: Also told every event, for progress on a terminal.

    Attributes:
        supernet, forest, search, exports, best: Sub-directories of the stages.
    """

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self.path = path
        self.listener = listener
        self.supernet, self.forest, self.search = path / "supernet", path / "forest", path / "search"
        self.exports, self.best = path / "exports", path / "best"
        self._lock: int | None = None
        self._wanted: tuple[RunConfig, bool] | None = None

    @classmethod
    def create(cls, path: Path, config: RunConfig, resume: bool, listener: Listener | None = None) -> RunDirectory:
        """A new run, or an interrupted one that goes on. Nothing is written before its ``with`` statement begins.

        Raises:
            InputError: It exists and ``resume`` is off, or it belongs to another configuration.
        """
        run = cls(path, listener)
        run._wanted = (config, resume)
        run._admit(config, resume)
        return run

    def _admit(self, config: RunConfig, resume: bool) -> None:
        """Refuses a directory that holds something else."""
        if not self.config_file.exists():
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{self.path} is a file, and a run needs a directory. Give another one: --out.")
            if self.path.exists() and any(entry.name != _LOCK for entry in self.path.iterdir()):
                raise InputError(f"{self.path} is not empty and holds no run. Give another directory: --out.")
            return
        if not resume:
            raise InputError(
                f"{self.path} already holds a run. Go on with it: --resume. Or give another directory: --out."
            )
        before = self.config()
        other = config.model_copy(update={"processes": before.processes})  # how many train together may change
        if before != other:
            raise InputError(
                f"{self.path} holds a run with another configuration ({_difference(before, other)}). Use its own, or "
                "another --out."
            )

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
        lock = self._take_lock()
        try:
            self._begin()
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        return self

    def _take_lock(self) -> int:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise NasqError(
                f"cannot write in {self.path}: {error.strerror}. Choose a writable directory: --out."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise InputError(
                f"another process is working in {self.path}. Wait for it, or give another --out."
            ) from error
        return lock

    def _begin(self) -> None:
        """With the lock held: writes the configuration of a new run, drops an event that a kill cut short."""
        if self._wanted is not None:
            self._admit(*self._wanted)  # another process may have made a run here in the meantime
            if not self.config_file.exists() or self.config() != self._wanted[0]:
                write_text(self.config_file, self._wanted[0].to_yaml())
        whole = self._whole_events()
        if self._events_file.exists() and self._events_file.stat().st_size != len(whole):
            write_bytes(self._events_file, whole)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        os.close(self._lock)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Appends an event to ``events.jsonl`` with the time, and passes it on."""
        append_line(self._events_file, json.dumps({"time": round(time.time(), 3), **event}, default=str))
        if self.listener is not None:
            self.listener(event)

    def events(self) -> list[dict[str, Any]]:
        """Every event so far; a last line that is not complete is left out.

        Raises:
            ArtifactError: Another line is damaged.
        """
        found = []
        for number, line in enumerate(self._whole_events().splitlines(), 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ArtifactError(
                    f"{self._events_file} is damaged in line {number}. Remove that line; only the log of the run is lost."
                ) from error
        return found

    @property
    def _events_file(self) -> Path:
        return self.path / "events.jsonl"

    def _whole_events(self) -> bytes:
        """The complete lines of the log."""
        content = self._events_file.read_bytes() if self._events_file.exists() else b""
        return content[: content.rfind(b"\n") + 1]


_LOCK = ".lock"


def _difference(before: RunConfig, now: RunConfig) -> str:
    """The first key that differs, with both values."""
    old: Any = before.model_dump()
    new: Any = now.model_dump()
    names: list[str] = []
    while isinstance(old, dict) and isinstance(new, dict):
        name = next(key for key in {**old, **new} if old.get(key) != new.get(key) or (key in old) != (key in new))
        names.append(str(name))
        old, new = old.get(name), new.get(name)
    return f"{'.'.join(names)}: {old!r} there, {new!r} here"[:300]

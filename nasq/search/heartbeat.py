"""Signs of life in a storage: who lives counts up a number, who looks takes the time since it last changed.

So clocks of two machines are never compared.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nasq.errors import require

if TYPE_CHECKING:
    from nasq.search.shared import SharedStudy

__all__ = ["GRACE", "HEARTBEAT", "Heartbeat", "Watch"]

HEARTBEAT = 5.0
"""Seconds between two beats."""
GRACE = 6
"""Beats that may be missed."""


class Heartbeat:
    """Says from a thread of its own that a process lives. Use it in a ``with`` statement.

    Args:
        shared: Where to say it.
        key: Of the process, unique in the study.
        interval: Seconds between two beats.
    """

    def __init__(self, shared: SharedStudy, key: str, interval: float = HEARTBEAT) -> None:
        self._shared, self._key, self._interval = shared, key, interval
        self._facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "trial": None}
        self._count = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def at(self, trial: int | None) -> None:
        """Says at once which trial the process works on."""
        with self._lock:
            self._facts["trial"] = trial
            self._count += 1
            self._shared.write(self._key, {**self._facts, "beat": self._count})

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            with self._lock:
                self._count += 1
                value = {**self._facts, "beat": self._count}
                # A storage that is down is the main thread's business; the next beat tries again.
                try:
                    self._shared.write(self._key, value)
                except Exception as error:
                    if not isinstance(error, _storage_errors()):
                        raise


def _storage_errors() -> tuple[type[Exception], ...]:
    return (require("optuna").exceptions.StorageInternalError, require("sqlalchemy").exc.SQLAlchemyError)


class Watch:
    """How long ago each value last changed.

    Args:
        clock: Seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[object, float]] = {}

    def age(self, key: str, value: object) -> float:
        """Seconds since ``value`` was first seen under ``key`` without another one in between."""
        now = self._clock()
        if key not in self._seen or self._seen[key][0] != value:
            self._seen[key] = (value, now)
        return now - self._seen[key][1]

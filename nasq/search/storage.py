"""Where studies are kept: a journal file, or a database that SQLAlchemy knows; and waiting for one that restarts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nasq.errors import ArtifactError, InputError, MissingPackageError, NasqError, require

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = ["alone", "open_storage", "patiently", "quiet", "shown"]

T = TypeVar("T")

_DRIVERS = {"psycopg": "'nasq[postgres]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
_ALLOWED = "Allowed: postgresql://USER@HOST/NAME, mysql://..., sqlite:///FILE.db, or the path of a journal file."


class _FileLock:
    """Keeps writers of a journal apart. It dies with its process, and what a killed writer left half-written goes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = path.with_name(path.name + ".lock")
        self._handles: list[int] = []

    def acquire(self) -> bool:
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._handles.append(handle)
        self._repair()
        return True

    def _repair(self) -> None:
        """Cuts off a last line that has no end; everything after it could not be read otherwise."""
        with self._path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)

    def release(self) -> None:
        os.close(self._handles.pop())


def shown(where: str | Path) -> str:
    """A storage for people: a URL's password is hidden."""
    if "://" not in str(where):
        return str(where)
    url: str = require("sqlalchemy").engine.make_url(str(where)).render_as_string(hide_password=True)
    return url


def _url(where: str) -> str:
    """The URL with a driver that can be loaded.

    Raises:
        InputError: It is no URL, or of an unknown kind of database.
        MissingPackageError: The driver is not installed; names the command that installs it.
    """
    sqlalchemy = require("sqlalchemy")
    try:
        url = sqlalchemy.engine.make_url(where)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        dialect = url.get_dialect()
    except sqlalchemy.exc.NoSuchModuleError:
        raise InputError(f"the storage {shown(where)!r} is of an unknown kind of database. {_ALLOWED}") from None
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise InputError(f"the storage URL cannot be read. {_ALLOWED}") from None
    try:
        dialect.import_dbapi()
    except ImportError as error:
        wanted = _DRIVERS.get(error.name or "", error.name or dialect.driver)
        raise MissingPackageError(
            f"the storage {shown(where)!r} needs the driver {error.name or dialect.driver!r}, which is not installed. "
            f"Install it: pip install {wanted}"
        ) from error
    full: str = url.render_as_string(hide_password=False)
    return full


def open_storage(where: str | Path) -> BaseStorage:
    """Opens a journal file, made where it does not exist, or a database.

    Args:
        where: The path of a journal file, or a URL: ``postgresql://user@host/name``, ``sqlite:///file.db``.

    Raises:
        InputError: It is neither.
        MissingPackageError: The database's driver is not installed; names the command that installs it.
        NasqError: The database cannot be reached.
        ArtifactError: The journal is damaged.
    """
    return _journal(Path(where)) if "://" not in str(where) else _database(str(where))


def _require_last_line(path: Path) -> None:
    """Raises ValueError where the last line is no JSON: Optuna takes such a line for one that is being written."""
    with path.open("rb") as file:
        for line in deque(file, maxlen=1):
            json.loads(line)


def _journal(path: Path) -> BaseStorage:
    journal = require("optuna.storages.journal")
    if path.is_dir():
        raise InputError(f"the storage {path} is a directory. {_ALLOWED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lock = _FileLock(path)
        lock.acquire()  # cuts off what a kill left
        lock.release()
        _require_last_line(path)
        storage: BaseStorage = require("optuna").storages.JournalStorage(
            journal.JournalFileBackend(str(path), lock_obj=lock)
        )
    except OSError as error:
        raise NasqError(f"the journal {path} cannot be opened: {error.strerror}. Choose a writable path.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the journal {path} is damaged: {error}. Move it away, or name another one.") from error
    return storage


def _database(where: str) -> BaseStorage:
    url = _url(where)
    sqlalchemy = require("sqlalchemy")
    arguments: dict[str, Any] = {"pool_pre_ping": True}  # a restarted database costs no operation
    if url.startswith("sqlite"):
        arguments["connect_args"] = {"timeout": 60}
    try:
        with quiet():
            storage: BaseStorage = require("optuna").storages.get_storage(
                require("optuna").storages.RDBStorage(url, engine_kwargs=arguments)
            )
    except (sqlalchemy.exc.DBAPIError, require("optuna").exceptions.StorageInternalError) as error:
        raise NasqError(f"the storage {shown(where)!r} cannot be used: {_reason(error)} Is the server up?") from error
    except RuntimeError as error:  # tables of another version of optuna
        raise NasqError(f"the storage {shown(where)!r} cannot be used: {error}") from error
    return storage


def _reason(error: BaseException) -> str:
    """The first line of what the driver said."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".") + "."


@contextlib.contextmanager
def alone(storage: BaseStorage) -> Iterator[None]:
    """Where SQLite, which has no locks on rows, would give one subnet to two workers; nothing elsewhere."""
    engine = getattr(getattr(storage, "_backend", None), "engine", None)
    if engine is None or engine.dialect.name != "sqlite" or not engine.url.database:
        yield
        return
    handle = os.open(f"{engine.url.database}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Works without optuna's notes on stderr, which belongs to the command line."""
    logger = logging.getLogger("optuna")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def patiently(
    call: Callable[[], T],
    patience: float,
    on_wait: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Calls until the storage answers; a database that restarts is waited for.

    Args:
        call: What to do; it must not matter whether a call that failed did it.
        patience: Seconds after which its last error is raised.
        on_wait: Told the reason when waiting begins.
        clock: Seconds from any origin.
        sleep: What waits.

    Raises:
        NasqError: The storage did not answer in time.
    """
    errors = (require("optuna").exceptions.StorageInternalError, require("sqlalchemy").exc.SQLAlchemyError)
    began, pause = None, 0.1
    while True:
        try:
            return call()
        except errors as error:
            now = clock()
            if began is None:
                began = now
                if on_wait is not None:
                    on_wait(_reason(error))
            if now - began >= patience:
                raise NasqError(
                    f"the storage has not answered for {patience:.0f} s: {_reason(error)} Nothing is lost; start it and "
                    "run the same command again."
                ) from error
            sleep(pause)
            pause = min(2 * pause, 2.0)

"""What the processes of one search share: the study in its storage, and the workers on this machine."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from nasq.errors import ArtifactError, NasqError
from nasq.files import read_json, sha256, write_json
from nasq.run.assemble import Workshop
from nasq.run.directory import RunDirectory
from nasq.search import Goal
from nasq.search.shared import SharedStudy
from nasq.search.storage import open_storage

__all__ = ["RESTARTS", "STORAGE", "Crew", "SearchOptions", "facts_of", "journal", "shared_study"]

STORAGE = "NASQ_STORAGE"
"""Environment variable with the storage: a password in it is not seen in the list of processes."""

RESTARTS = 3
"""How often each worker of this machine that was killed is started again."""

# Settings that change nothing about a subnet's values.
_FREE = {
    "device",
    "threads",
    "bench",
    "export",
    "warmup",
    "train",
    "split",
    "train_inside_constraints",
    "check_target",
    "finetune",
}
_FREE_OF_DATA = {"root", "download"}


@dataclass(frozen=True)
class SearchOptions:
    """How a search runs; nothing here changes what it finds.

    Attributes:
        workers: Processes on this machine that evaluate; 0: this process itself, or with ``storage`` workers elsewhere.
        storage: A URL, or the path of a journal file; ``None``: ``RUN/search/journal.log``.
        study: Name of the study in the storage; ``None``: the run's directory's.
        remote: Whether workers that somebody else starts do the work.
        warm_start: A run from whose front a new search begins.
    """

    workers: int = 0
    storage: str | None = None
    study: str | None = None
    remote: bool = False
    warm_start: Path | None = None

    @property
    def shared_work(self) -> bool:
        """Whether other processes evaluate."""
        return self.workers > 0 or self.remote


def journal(run: RunDirectory) -> Path:
    """The journal file of a run whose study is in no other storage."""
    return run.search.resolve() / "journal.log"


def _identity(run: RunDirectory) -> str:
    """Says this search apart from every other one, also from one of the same settings."""
    path = run.search / "study.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex})
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise ArtifactError(
            f"{path} is damaged: it holds no 'id'. Move {run.search} away, and 'nasq search {run.path}' begins anew."
        )
    return str(found["id"])


def _weights(run: RunDirectory) -> str:
    """A digest of the trained weights: the forest's where there is one."""
    where = run.forest if (run.forest / "forest.json").exists() else run.supernet
    digest = hashlib.sha256()
    for path in sorted(where.rglob("weights.safetensors")):
        if "checkpoint" not in str(path.relative_to(where)):
            digest.update(f"{path.relative_to(where)} {sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def _settings(workshop: Workshop) -> str:
    """A digest of everything in the configuration that decides a subnet's values."""
    config = workshop.config.model_copy(
        update={"data": workshop.config.data.model_copy(update=dict.fromkeys(_FREE_OF_DATA))}
    )
    free: dict[str, Any] = {**dict.fromkeys(_FREE, True), "search": {"assist", "settings"}}
    return hashlib.sha256(config.model_dump_json(exclude=free).encode()).hexdigest()[:16]


def facts_of(run: RunDirectory, workshop: Workshop) -> dict[str, Any]:
    """What a worker must have in common with the search."""
    return {"weights": _weights(run), "settings": _settings(workshop)}


def shared_study(
    run: RunDirectory, workshop: Workshop, goals: Sequence[Goal], columns: Sequence[str], options: SearchOptions
) -> SharedStudy:
    """The run's study, made where it does not exist.

    Raises:
        InputError: The storage holds another study of this name; names both.
    """
    storage = open_storage(options.storage or journal(run))
    name = options.study or run.path.resolve().name
    facts = {"id": _identity(run), **facts_of(run, workshop)}
    study = SharedStudy.create(storage, name, workshop.supernet.space, goals, columns, facts)
    study.write("run", str(run.path.resolve()))
    return study


class Crew:
    """Workers on this machine; use it in a ``with`` statement, which ends them.

    A worker that was killed (out of memory, by hand) is started again, three times each. One that ended by itself has
    said why in its log; another try would say the same.

    Args:
        run: The run.
        study: Its study's name.
        options: Where it is, and how many workers.
        on_event: Told ``{"event": "search.worker", "pid": ..., "code": ..., "again": ...}`` when one ended early.
    """

    def __init__(
        self, run: RunDirectory, study: str, options: SearchOptions, on_event: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._run, self._on_event = run, on_event
        self._storage = options.storage or str(journal(run))
        self._command = [
            sys.executable, "-c", "from nasq.cli.main import main; main()", "worker", str(run.path), "--study", study,
        ]  # fmt: skip
        self._restarts = [0] * options.workers
        self._living: dict[int, subprocess.Popen[bytes]] = {}
        self._dead: set[tuple[str, int]] = set()

    def __enter__(self) -> Crew:
        for number in range(len(self._restarts)):
            self._start(number)
        return self

    def _start(self, number: int) -> None:
        with self._log(number).open("ab" if self._restarts[number] else "wb") as log:
            self._living[number] = subprocess.Popen(
                self._command,
                env={**os.environ, STORAGE: self._storage},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _log(self, number: int) -> Path:
        return self._run.search / f"worker-{number}.log"

    def dead(self) -> set[tuple[str, int]]:
        """Host and process number of the workers that ended; those that were killed are started again.

        Raises:
            NasqError: None is left; holds what the last one said.
        """
        for number, one in list(self._living.items()):
            if one.poll() is not None:
                del self._living[number]
                self._lost(number, one)
        return set(self._dead)

    def _lost(self, number: int, one: subprocess.Popen[bytes]) -> None:
        self._dead.add((socket.gethostname(), one.pid))
        again = one.returncode < 0 and self._restarts[number] < RESTARTS
        self._on_event({"event": "search.worker", "pid": one.pid, "code": one.returncode, "again": again})
        if again:
            self._restarts[number] += 1
            self._start(number)
        elif not self._living:
            raise self._all_ended(number, one.returncode)

    def _all_ended(self, number: int, code: int) -> NasqError:
        log = self._log(number)
        said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}, after {RESTARTS} new starts each"
        return NasqError(
            f"all {len(self._restarts)} workers have ended ({how}); the last one said: {said[0]} See {log}. Nothing is lost: "
            "run the same command again, with fewer workers where memory is short."
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._living.values():
            if kind is not None:
                one.terminate()
        for one in self._living.values():
            try:
                one.wait(15)  # the study says that it is finished, so they leave by themselves
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()

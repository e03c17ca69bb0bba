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

from nasq.errors import NasqError
from nasq.files import read_json, sha256, write_json
from nasq.run.assemble import Workshop
from nasq.run.directory import RunDirectory
from nasq.search import Goal
from nasq.search.shared import SharedStudy
from nasq.search.storage import open_storage

__all__ = ["STORAGE", "Crew", "SearchOptions", "facts_of", "journal", "shared_study"]

STORAGE = "NASQ_STORAGE"
"""Environment variable with the storage: a password in it is not seen in the list of processes."""

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
    return str(read_json(path)["id"])


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
    return hashlib.sha256(config.model_dump_json(exclude=_FREE).encode()).hexdigest()[:16]


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

    Args:
        run: The run.
        study: Its study's name.
        options: Where it is, and how many workers.
        on_event: Told ``{"event": "search.worker", "pid": ..., "code": ...}`` when one ended early.
    """

    def __init__(
        self, run: RunDirectory, study: str, options: SearchOptions, on_event: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._run, self._on_event = run, on_event
        self._storage = options.storage or str(journal(run))
        self._command = [
            sys.executable, "-c", "from nasq.cli.main import main; main()", "worker", str(run.path), "--study", study,
        ]  # fmt: skip
        self._count = options.workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._told: set[int] = set()

    def __enter__(self) -> Crew:
        environment = {**os.environ, STORAGE: self._storage}
        for number in range(self._count):
            with self._log(number).open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        self._command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        return self

    def _log(self, number: int) -> Path:
        return self._run.search / f"worker-{number}.log"

    def dead(self) -> set[tuple[str, int]]:
        """Host and process number of the workers that ended.

        Raises:
            NasqError: All of them did; holds what the last one said.
        """
        ended = [(number, one) for number, one in enumerate(self._processes) if one.poll() is not None]
        for _, one in ended:
            if one.pid not in self._told:
                self._told.add(one.pid)
                self._on_event({"event": "search.worker", "pid": one.pid, "code": one.returncode})
        if self._processes and len(ended) == len(self._processes):
            log = self._log(ended[-1][0])
            said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            raise NasqError(
                f"all {len(ended)} workers have ended (exit code {ended[-1][1].returncode}); the last one said: {said[0]} "
                f"See {log}. Nothing is lost: run the same command again."
            )
        return {(socket.gethostname(), one.pid) for _, one in ended}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._processes:
            if kind is not None:
                one.terminate()
        for one in self._processes:
            try:
                one.wait(15)  # the study says that it is finished, so they leave by themselves
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()

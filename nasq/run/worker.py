"""A worker: another process, here or on another machine, that evaluates subnets of a run's search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nasq.errors import ArtifactError, InputError
from nasq.run.directory import RunDirectory
from nasq.run.search import Evaluation, evaluator_of
from nasq.run.sharing import facts_of, journal
from nasq.run.train import load_trained
from nasq.search.shared import SharedStudy
from nasq.search.storage import open_storage
from nasq.search.workers import work

__all__ = ["join_study", "serve"]


def join_study(directory: Path | None, storage: str | None, name: str | None) -> tuple[SharedStudy, RunDirectory]:
    """The study that a worker is to work for, and the run that holds its weights.

    Args:
        directory: The run, or a copy of it on this machine; ``None``: where the study says that it is.
        storage: Where the study is; ``None``: the run's own journal.
        name: Of the study; ``None``: the only one there is.

    Raises:
        InputError: There is no such study, or the run is not on this machine.
    """
    if storage is None:
        if directory is None:
            raise InputError("a worker needs --storage URL, or the directory of a run on this machine.")
        file = journal(RunDirectory.open(directory))
        if not file.exists():
            raise InputError(f"{directory} is not being searched. Begin: nasq search {directory} --workers 1")
        storage = str(file)
    study = SharedStudy.join(open_storage(storage), name)
    where = directory or Path(study.read().get("run", ""))
    if directory is None and not (where / "config.yaml").exists():
        raise InputError(
            f"the run of the study {study.name!r} is in {where}, which is not on this machine. Copy it here, and give the "
            "directory: nasq worker DIR --storage URL"
        )
    return study, RunDirectory.open(where)


def serve(
    study: SharedStudy, run: RunDirectory, on_event: Callable[[Mapping[str, Any]], None] | None = None, **options: Any
) -> int:
    """Evaluates subnets until the search is finished; returns how many.

    Args:
        study: See :func:`join_study`.
        run: With the weights that the search has.
        on_event: Told every evaluated subnet.
        options: For :func:`nasq.search.workers.work`.

    Raises:
        ArtifactError: The run's space, weights or settings are not those of the search; names both.
    """
    from nasq.run.flow import prepare

    workshop = prepare(run.config())
    load_trained(run, workshop)
    evaluator = evaluator_of(workshop, Evaluation(workshop))[1]
    mine = {"space": workshop.supernet.space.fingerprint, "columns": list(evaluator.names), **facts_of(run, workshop)}
    for key, value in mine.items():
        if study.facts.get(key) != value:
            raise ArtifactError(
                f"{run.path} is not the run of the study {study.name!r}: its {key} is {value!s:.200}, that of the search is "
                f"{study.facts.get(key)!s:.200}. Copy the run here again."
            )
    return work(study, evaluator, on_event=on_event, **options)

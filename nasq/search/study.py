"""A study: one algorithm, one evaluator, one directory; killed at any moment, it goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasq.errors import ArtifactError, InputError, NasqError
from nasq.files import read_json, write_json
from nasq.search.algorithm import Algorithm
from nasq.search.evaluator import Evaluator, measured, prepare
from nasq.search.objectives import Goal
from nasq.search.results import Record, RecordFile, front

if TYPE_CHECKING:
    from nasq.search.shared import SharedStudy
    from nasq.search.workers import Dispatcher
    from nasq.space import Subnet

__all__ = ["Event", "Study", "StudyResult", "load_results"]

Event = Mapping[str, Any]

SCHEMA = 1
_PARTS = {"schema", "space", "objectives", "columns", "evaluated", "algorithm"}


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        records: Every evaluated subnet, in the order of evaluation.
        front: Those that no other one dominates, in the same order.
        exhausted: Whether the algorithm ended before the budget, because it found no unseen feasible subnet any more.
    """

    records: tuple[Record, ...]
    front: tuple[Record, ...]
    exhausted: bool


class Study:
    """Runs a search to a budget of evaluations, and keeps everything it learns on disk.

    The directory holds ``subnets.csv`` (a line for each evaluated subnet, current after each one) and ``state.json``
    (the algorithm at the start of its present generation, written atomically). After a kill at any moment the same
    study, made again, asks for the generation again, takes the values it finds in ``subnets.csv``, and ends with the
    result of an undisturbed run; only the seconds differ.

    Args:
        directory: Made where it does not exist; ``RUN/search`` of a run.
        algorithm: In its initial state, with the settings of the interrupted study if there was one.
        evaluator: A deterministic function of the subnet; its names include every objective's.
        on_event: Called with plain mappings whose ``"event"`` is ``search.started``, ``search.generation``,
            ``search.evaluated`` or ``search.finished``.
        clock: Seconds from any origin.
        shared: An Optuna study that gets a trial for every evaluated subnet, those of an interrupted run included.
        dispatcher: Has subnets evaluated by other processes; without one they are evaluated here. The algorithm is told
            values in the order of its asking either way, so workers change the order of ``subnets.csv`` and nothing else.

    Raises:
        InputError: The directory holds a study of another space or of other settings.
        ArtifactError: A file in the directory is damaged.
    """

    def __init__(
        self,
        directory: Path,
        algorithm: Algorithm,
        evaluator: Evaluator,
        on_event: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        shared: SharedStudy | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        missing = [objective.name for objective in algorithm.objectives if objective.name not in evaluator.names]
        if missing:
            raise InputError(
                f"the evaluator gives {', '.join(evaluator.names)}, but the search needs {', '.join(missing)} as well."
            )
        self.directory = directory
        self._algorithm = algorithm
        self._evaluator = evaluator
        self._on_event = on_event or (lambda event: None)
        self._clock = clock
        self._shared = shared
        self._dispatcher = dispatcher
        self._file = RecordFile(directory / "subnets.csv", evaluator.names)
        self._records: dict[str, Record] = {}
        self._queue: list[Subnet] = []
        self._restore()

    @property
    def records(self) -> tuple[Record, ...]:
        """Every evaluated subnet so far, those of an interrupted run included."""
        return tuple(self._records.values())

    @property
    def result(self) -> StudyResult:
        """What is known so far."""
        return StudyResult(self.records, tuple(front(self.records, self._algorithm.objectives)), self._algorithm.done)

    def run(self, budget: int) -> StudyResult:
        """Evaluates until ``budget`` subnets are known, those of an interrupted run included.

        Raises:
            InputError: The budget is not positive.
            InfeasibleError: The constraints leave nothing that could be found.
        """
        if budget < 1:
            raise InputError(f"the budget is {budget} evaluations; it must be at least 1.")
        with self._lock():
            self._emit("started", budget=budget, known=len(self._records))
            self._mirror()
            while len(self._records) < budget:
                self._tell_known()
                if not self._queue and not self._ask():
                    break
                self._work(budget)
            self._file.sync()
        result = self.result
        self._emit("finished", evaluated=len(result.records), front=len(result.front), exhausted=result.exhausted)
        return result

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Keeps a second study out of the directory while this one writes there."""
        handle = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"another search is writing in {self.directory}. Wait for it, or search in another directory."
                ) from error
            if len(self._file.read()) != len(self._records):
                raise InputError(
                    f"another search has written in {self.directory} since this one read it. Make the study again."
                )
            yield
        finally:
            os.close(handle)

    def _mirror(self) -> None:
        """Puts into the shared study what it does not have yet: a kill came between the file and it, or it is new."""
        if self._shared is None:
            return
        there = {record.subnet.id for record in self._shared.records()}
        for record in self.records:
            if record.subnet.id not in there:
                self._shared.add(self._algorithm.space, record, self._algorithm.constraints)

    def _ask(self) -> bool:
        """Takes the next generation from the algorithm; whether there is one."""
        self._queue = self._algorithm.ask()
        if not self._queue:
            if not self._algorithm.done:
                raise NasqError("the search algorithm waits for values, but every subnet it asked for was told.")
            return False
        self._file.sync()
        self._save()
        self._emit("generation", generation=self._algorithm.generation, subnets=len(self._queue))
        return True

    def _work(self, budget: int) -> None:
        """Has what is asked and not known evaluated, as far as the budget goes."""
        fresh = [subnet for subnet in self._queue if subnet.id not in self._records][: budget - len(self._records)]
        for record in self._evaluated(fresh):
            self._file.append(record)
            self._records[record.subnet.id] = record
            if self._shared is not None and self._dispatcher is None:
                # Behind the file: what a kill leaves out is put in by the next start, and nothing is there twice.
                self._shared.add(self._algorithm.space, record, self._algorithm.constraints)
            self._emit(
                "evaluated", subnet=record.subnet.id, values=dict(record.values), generation=record.generation,
                seconds=record.seconds, done=len(self._records), budget=budget,
            )  # fmt: skip
            self._tell_known()

    def _tell_known(self) -> None:
        """Tells the algorithm in the order of its asking, up to the first subnet that is not known."""
        while self._queue and self._queue[0].id in self._records:
            subnet = self._queue.pop(0)
            self._algorithm.tell(subnet, self._records[subnet.id].values)

    def _evaluated(self, fresh: Sequence[Subnet]) -> Iterator[Record]:
        generation = self._algorithm.generation
        if self._dispatcher is not None:
            yield from self._dispatcher.evaluate(fresh, generation)
            return
        before = [record for record in self.records if record.generation < generation]
        prepare(self._evaluator, sorted(before, key=lambda record: (record.generation, record.subnet.id)))
        for subnet in fresh:
            values, seconds = measured(self._evaluator, subnet, self._clock)
            yield Record(subnet, values, generation, seconds)

    def _emit(self, event: str, **facts: object) -> None:
        self._on_event({"event": f"search.{event}", **facts})

    def _save(self) -> None:
        algorithm = self._algorithm
        write_json(
            self.directory / "state.json",
            {
                "schema": SCHEMA,
                "space": algorithm.space.fingerprint,
                "objectives": [[o.name, o.unit, o.direction] for o in algorithm.objectives],
                "columns": list(self._evaluator.names),
                "evaluated": len(self._records),
                "algorithm": algorithm.state_dict(),
            },
        )

    def _restore(self) -> None:
        path = self.directory / "state.json"
        if not path.exists():
            if self._file.path.exists() and self._file.open():
                raise ArtifactError(f"{self._file.path} holds results, but {path} is missing. Use another directory.")
            self._file.open()
            return
        state = _read_state(path)
        self._check(path, state)
        self._algorithm.load_state_dict(state["algorithm"])
        self._records = {record.subnet.id: record for record in self._file.open()}
        if len(self._records) < state["evaluated"]:
            raise ArtifactError(
                f"{self._file.path} has {len(self._records)} subnets, but {path} knows {state['evaluated']}: lines "
                "were lost. Restore the file, or search in another directory."
            )

    def _check(self, path: Path, state: Any) -> None:
        if state["space"] != self._algorithm.space.fingerprint:
            raise InputError(
                f"{self.directory} holds a study of another search space: its fingerprint is {state['space']}, yours "
                f"is {self._algorithm.space.fingerprint}. Use the same space, or another directory."
            )
        if state["columns"] != list(self._evaluator.names):
            raise InputError(
                f"{self.directory} holds a study that records {', '.join(state['columns'])}; yours records "
                f"{', '.join(self._evaluator.names)}. Use the same objectives and costs, or another directory."
            )


def _read_state(path: Path) -> dict[str, Any]:
    state = read_json(path)
    if not isinstance(state, dict) or not state.keys() >= _PARTS:
        raise ArtifactError(f"{path} is not the state of a search. Use another directory.")
    if state["schema"] != SCHEMA:
        raise ArtifactError(
            f"{path} is of schema {state['schema']!r}; this version of nasq reads {SCHEMA}. Update nasq, or "
            "use another directory."
        )
    return state


def load_results(directory: Path) -> tuple[tuple[Goal, ...], tuple[Record, ...]]:
    """The goals and all records of a study's directory, finished or not; enough to pick and to report.

    Raises:
        ArtifactError: There is no study, or a file is damaged.
    """
    path = directory / "state.json"
    state = _read_state(path)
    try:
        goals = tuple(Goal(*map(str, goal)) for goal in state["objectives"])  # type: ignore[arg-type]
        columns = [str(name) for name in state["columns"]]
    except (TypeError, InputError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return goals, tuple(RecordFile(directory / "subnets.csv", columns).read())

"""Workers that take subnets from a shared study, and the dispatcher that gives them out and notices who died.

A subnet whose worker is silent (see :mod:`nasq.search.heartbeat`) is taken from it for good and put in again.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from nasq.errors import NasqError
from nasq.search.evaluator import Evaluator, measured, prepare
from nasq.search.heartbeat import GRACE, HEARTBEAT, Heartbeat, Watch
from nasq.search.objectives import Constraint
from nasq.search.results import Record
from nasq.search.shared import Job, SharedStudy, record_of
from nasq.search.storage import patiently

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from nasq.space import SearchSpace, Subnet

__all__ = ["Dispatcher", "Heartbeat", "work"]

T = TypeVar("T")

_WORKER, _COORDINATOR, _STATE = "worker:", "coordinator", "state"
_ATTEMPTS = 3
"""Workers that may be lost over one subnet."""


class Dispatcher:
    """Has subnets evaluated by the workers of a shared study; use it in a ``with`` statement.

    What it gives back is what one process would have found: each subnet once, whoever evaluated it.

    Args:
        shared: The study.
        space: Of its subnets.
        constraints: Shown beside each subnet.
        known: Values of a subnet that cost nothing; shown while it waits.
        interval: Seconds between two beats of the workers; after six without one a worker counts as dead.
        poll: Seconds between two looks into the storage.
        patience: Seconds to wait for a storage that does not answer.
        check: Called at every look; raises where waiting makes no sense any more. Gives the process numbers, with host,
            of workers that are known to be dead.
        on_event: Told what is worth a line, as mappings with ``"event"``.
        clock, sleep: Replaceable for tests.
    """

    def __init__(
        self,
        shared: SharedStudy,
        space: SearchSpace,
        constraints: Sequence[Constraint] = (),
        known: Callable[[Subnet], Mapping[str, float]] | None = None,
        *,
        interval: float = HEARTBEAT,
        poll: float = 0.05,
        patience: float = 300.0,
        check: Callable[[], set[tuple[str, int]]] | None = None,
        on_event: Callable[[Mapping[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.shared, self._space, self._constraints = shared, space, tuple(constraints)
        self._known = known or (lambda subnet: {})
        self._grace, self._poll, self._patience = GRACE * interval, poll, patience
        self._check = check or (lambda: set())
        self._on_event = on_event or (lambda event: None)
        self._sleep = sleep
        self._watch = Watch(clock)
        self._heart = Heartbeat(shared, _COORDINATOR, interval)
        self._old: set[int] = set()

    def __enter__(self) -> Dispatcher:
        self._old = {trial._trial_id for trial in self._patiently(self.shared.trials) if trial.state.name == "FAIL"}
        self._patiently(lambda: self.shared.write(_STATE, "searching"))
        self._heart.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heart.__exit__(kind, error, trace)
        if kind is None:
            self._patiently(lambda: self.shared.write(_STATE, "finished"))

    def _patiently(self, call: Callable[[], T]) -> T:
        return patiently(
            call, self._patience, lambda reason: self._on_event({"event": "search.waiting", "reason": reason})
        )

    def evaluate(self, subnets: Sequence[Subnet], generation: int) -> Iterator[Record]:
        """The records of ``subnets``, in the order in which they become known.

        Raises:
            NasqError: A worker says that a subnet cannot be evaluated, three workers were lost over one, or the storage
                does not answer any more.
        """
        left = {subnet.id: subnet for subnet in subnets}
        while left:
            found = self._patiently(lambda: self._look(left, generation))
            for record in found:
                del left[record.subnet.id]
                yield record
            if left and not found:
                self._sleep(self._poll)

    def _look(self, left: Mapping[str, Subnet], generation: int) -> list[Record]:
        """What is complete; afterwards everything else waits in the storage or is being worked on."""
        mine = [trial for trial in self.shared.trials() if trial.user_attrs.get("id") in left]
        complete = {trial.user_attrs["id"]: trial for trial in reversed(mine) if trial.state.name == "COMPLETE"}
        running = [trial for trial in mine if trial.state.name == "RUNNING" and trial.user_attrs["id"] not in complete]
        lost = self._lost(running)
        for trial in lost:
            if self.shared.give_up(trial, "its worker is silent"):
                self._on_event({"event": "search.lost", "subnet": trial.user_attrs["id"]})
        alive = {trial.user_attrs["id"] for trial in mine if trial.state.name == "WAITING"}
        alive |= {trial.user_attrs["id"] for trial in running if trial not in lost}
        self._refuse([trial for trial in mine if trial.state.name == "FAIL" and trial._trial_id not in self._old])
        for identity, subnet in left.items():
            # One that was just given up is put in by the next look: its worker may have been quicker after all.
            if (
                identity not in alive
                and identity not in complete
                and not any(t.user_attrs["id"] == identity for t in lost)
            ):
                self.shared.enqueue(self._space, subnet, generation, self._constraints, self._known(subnet))
        return [record_of(trial) for trial in complete.values()]

    def _lost(self, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Trials that nobody alive works on."""
        dead = self._check()
        values = self.shared.read()
        owners: dict[int, list[bool]] = {}
        for key, value in values.items():
            if key.startswith(_WORKER):
                alive = self._watch.age(key, value["beat"]) < self._grace
                owners.setdefault(value["trial"], []).append(alive and (value["host"], value["pid"]) not in dead)
        found = []
        for trial in running:
            states = owners.get(trial._trial_id)
            if states is None:  # just taken, or its worker died before it could say so
                orphaned = self._watch.age(f"trial:{trial._trial_id}", "orphan") >= self._grace
            else:
                orphaned = not any(states)
            if orphaned:
                found.append(trial)
        return found

    def _refuse(self, failed: Sequence[FrozenTrial]) -> None:
        """Raises what cannot be repaired by trying again."""
        counts: dict[str, int] = {}
        for trial in failed:
            identity = trial.user_attrs["id"]
            if "error" in trial.user_attrs:
                raise NasqError(f"a worker could not evaluate subnet {identity}: {trial.user_attrs['error']}")
            counts[identity] = counts.get(identity, 0) + 1
            if counts[identity] >= _ATTEMPTS:
                raise NasqError(
                    f"{_ATTEMPTS} workers were lost while they evaluated subnet {identity}. Is there enough memory? Try "
                    "fewer workers, or a smaller search.batch_size."
                )


def work(
    shared: SharedStudy,
    evaluator: Evaluator,
    *,
    interval: float = HEARTBEAT,
    poll: float = 0.05,
    patience: float = 300.0,
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Evaluates subnets of a shared study until its search is finished; returns how many.

    Args:
        shared: The study, see :meth:`SharedStudy.join`.
        evaluator: The one that the coordinator would have.
        interval: Seconds between two beats.
        poll: Seconds between two looks for work.
        patience: Seconds to wait for a storage that does not answer, or for a coordinator that is silent.
        on_event: Told ``{"event": "worker.evaluated", "subnet": ..., "values": ..., "seconds": ...}``.
        clock, sleep: Replaceable for tests.

    Raises:
        NasqError: The storage does not answer.
    """
    name = f"{_WORKER}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    with Heartbeat(shared, name, interval) as heart:
        worker = _Worker(shared, evaluator, name, heart, patience, on_event or (lambda event: None))
        worker.call(lambda: heart.at(None))
        watch = Watch(clock)
        while True:
            job = worker.call(shared.claim)
            if job is not None:
                worker.do(job)
                continue
            values = worker.call(shared.read)
            silent = watch.age(_COORDINATOR, values.get(_COORDINATOR, {}).get("beat")) >= patience
            if values.get(_STATE) == "finished" or silent:
                return worker.count
            sleep(poll)


class _Worker:
    """Does one job after the other."""

    def __init__(
        self,
        shared: SharedStudy,
        evaluator: Evaluator,
        name: str,
        heart: Heartbeat,
        patience: float,
        on_event: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._shared, self._evaluator, self._name, self._heart = shared, evaluator, name, heart
        self._patience, self._on_event = patience, on_event
        self._prepared = -1
        self.count = 0

    def call(self, action: Callable[[], T]) -> T:
        return patiently(action, self._patience)

    def do(self, job: Job) -> None:
        self.call(lambda: self._heart.at(job.trial))
        if job.generation != self._prepared:
            prepare(self._evaluator, self.call(lambda: self._shared.records(before=job.generation)))
            self._prepared = job.generation
        try:
            values, seconds = measured(self._evaluator, job.subnet)
        except NasqError as error:
            reason = str(error)
            self.call(lambda: self._shared.fail(job, reason))
            return
        except Exception:
            trace = traceback.format_exc()
            self.call(lambda: self._shared.fail(job, trace))
            raise
        if self.call(lambda: self._shared.finish(job, values, seconds, self._name)):
            self.count += 1
            self._on_event({"event": "worker.evaluated", "subnet": job.subnet.id, "values": values, "seconds": seconds})

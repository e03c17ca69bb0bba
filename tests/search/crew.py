"""Workers for tests: in threads, where only the order matters, and in processes that can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nasq.search import NSGA2, ObjectiveEvaluator, StudyResult
from nasq.search.shared import SharedStudy
from nasq.search.storage import open_storage
from nasq.search.workers import Dispatcher, work
from nasq.space import SearchSpace, Subnet

from .toy import ACCURACY, Costs, joint_space, limit, objective

Row = tuple[str, int, tuple[tuple[str, float], ...]]


class Counting:
    """The toy's evaluator; keeps the subnets that it was asked for, and takes its time."""

    def __init__(self, space: SearchSpace, pause: float = 0.0) -> None:
        costs = Costs(space)
        self.objectives = [ACCURACY, objective(costs)]
        self._inner = ObjectiveEvaluator(space, self.objectives, list(costs.measures().values()))
        self.names, self.known = self._inner.names, self._inner.known
        self.calls: list[str] = []
        self._pause = pause

    def __call__(self, subnet: Subnet) -> Mapping[str, float]:
        self.calls.append(subnet.id)
        time.sleep(self._pause)
        return self._inner(subnet)


class Toy:
    """A search of the toy space whose parts are made anew each time, as a new process would."""

    def __init__(self, name: str = "toy", blocks: int = 4) -> None:
        self.space = joint_space(blocks, name)
        self.evaluator = Counting(self.space)
        self.constraints = [limit(Costs(self.space), "bytes", upper=1500.0)]

    def algorithm(self, **settings: Any) -> NSGA2:
        wanted = {"population": 8, "seed": 1, **settings}
        return NSGA2(self.space, self.evaluator.objectives, self.constraints, **wanted)

    def shared(self, where: str | Path, name: str = "toy", **facts: Any) -> SharedStudy:
        goals, columns = self.evaluator.objectives, self.evaluator.names
        return SharedStudy.create(open_storage(where), name, self.space, goals, columns, facts)

    def dispatcher(self, shared: SharedStudy, **options: Any) -> Dispatcher:
        return Dispatcher(shared, self.space, self.constraints, self.evaluator.known, poll=0.01, **options)


def rows(result: StudyResult) -> list[Row]:
    """The multiset of results, without the seconds."""
    return sorted((one.subnet.id, one.generation, tuple(one.values.items())) for one in result.records)


@contextlib.contextmanager
def threads(where: str | Path, count: int, **options: Any) -> Iterator[list[Counting]]:
    """Workers that end when the study is finished."""
    evaluators = [Counting(joint_space()) for _ in range(count)]

    def serve(evaluator: Counting) -> None:
        work(SharedStudy.join(open_storage(where)), evaluator, poll=0.01, **options)

    running = [threading.Thread(target=serve, args=(evaluator,)) for evaluator in evaluators]
    for thread in running:
        thread.start()
    yield evaluators
    for thread in running:
        thread.join(120)
        assert not thread.is_alive()


def _serve(where: str, pause: float, interval: float) -> None:
    work(
        SharedStudy.join(open_storage(where)), Counting(joint_space(), pause), interval=interval, poll=0.02, patience=60
    )


@contextlib.contextmanager
def processes(where: str | Path, count: int, pause: float, interval: float) -> Iterator[list[BaseProcess]]:
    """Forked workers, so that nothing has to be imported again."""
    context = multiprocessing.get_context("fork")
    running: list[BaseProcess] = [
        context.Process(target=_serve, args=(str(where), pause, interval), daemon=True) for _ in range(count)
    ]
    for process in running:
        process.start()
    try:
        yield running
    finally:
        for process in running:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()

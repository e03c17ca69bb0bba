from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nasq.errors import InputError, NasqError
from nasq.search import NSGA2, RandomSearch, Study
from nasq.search.shared import SharedStudy
from nasq.search.storage import open_storage
from nasq.search.workers import Dispatcher, Heartbeat, work
from nasq.space import Subnet

from .crew import Counting, Row, Toy, processes, rows, threads

BUDGET = 20


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """What one process finds."""
    toy = Toy()
    return rows(Study(tmp_path_factory.mktemp("alone"), toy.algorithm(), toy.evaluator).run(BUDGET))


def searched(directory: Path, dispatcher: Dispatcher, toy: Toy, **options: Any) -> list[Row]:
    study = Study(directory, toy.algorithm(), toy.evaluator, dispatcher=dispatcher, **options)
    return rows(study.run(BUDGET))


def test_three_workers_find_what_one_process_finds(tmp_path: Path, wanted: list[Row]) -> None:
    where = tmp_path / "log"
    toy = Toy()
    shared = toy.shared(where)
    with threads(where, 3) as evaluators, toy.dispatcher(shared) as dispatcher:
        assert searched(tmp_path / "search", dispatcher, toy) == wanted
    calls = [identity for evaluator in evaluators for identity in evaluator.calls]
    assert sorted(calls) == sorted(row[0] for row in wanted)
    assert toy.evaluator.calls == []
    assert {trial.state.name for trial in shared.trials()} == {"COMPLETE"} and len(shared.trials()) == BUDGET


def test_a_new_coordinator_takes_what_was_brought_meanwhile(tmp_path: Path, wanted: list[Row]) -> None:
    where = tmp_path / "log"

    class Died(Exception):
        pass

    def die(event: Mapping[str, Any]) -> None:
        if event["event"] == "search.evaluated" and event["done"] == 3:
            raise Died

    toy = Toy()
    with threads(where, 0), pytest.raises(Died), toy.dispatcher(toy.shared(where)) as dispatcher:
        worker = threading.Thread(target=work, args=(SharedStudy.join(open_storage(where)), toy.evaluator), daemon=True)
        worker.start()
        searched(tmp_path / "search", dispatcher, Toy(), on_event=die)
    while any(trial.state.name != "COMPLETE" for trial in toy.shared(where).trials()):
        time.sleep(0.01)  # the worker finishes the generation without a coordinator
    again = Toy()
    with again.dispatcher(again.shared(where)) as dispatcher:
        assert searched(tmp_path / "search", dispatcher, again) == wanted
    worker.join(60)
    assert sorted(toy.evaluator.calls) == sorted(row[0] for row in wanted)


def test_a_search_without_workers_goes_on_with_them_and_back(tmp_path: Path, wanted: list[Row]) -> None:
    where = tmp_path / "log"
    first = Toy()
    Study(tmp_path / "search", first.algorithm(), first.evaluator, shared=first.shared(where)).run(5)
    second = Toy()
    with threads(where, 1) as evaluators, second.dispatcher(second.shared(where)) as dispatcher:
        shared = dispatcher.shared
        study = Study(tmp_path / "search", second.algorithm(), second.evaluator, shared=shared, dispatcher=dispatcher)
        study.run(11)
    third = Toy()
    result = Study(tmp_path / "search", third.algorithm(), third.evaluator, shared=third.shared(where)).run(BUDGET)
    assert rows(result) == wanted
    assert [len(toy.evaluator.calls) for toy in (first, second, third)] == [5, 0, BUDGET - 11]
    assert len(evaluators[0].calls) == 6
    assert len(third.shared(where).records()) == len(third.shared(where).trials()) == BUDGET


def test_what_a_kill_kept_from_the_study_is_put_in_by_the_next_start(tmp_path: Path) -> None:
    toy = Toy()
    Study(tmp_path, toy.algorithm(), toy.evaluator).run(7)
    shared = toy.shared(tmp_path / "log")
    again = Toy()
    Study(tmp_path, again.algorithm(), again.evaluator, shared=shared).run(9)
    Study(tmp_path, toy.algorithm(), toy.evaluator, shared=shared).run(9)
    assert len(shared.trials()) == len(shared.records()) == 9


class Steps:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 0.5
        time.sleep(0.001)


@pytest.mark.parametrize("beats", [True, False])
def test_a_subnet_whose_worker_is_silent_is_put_in_again(beats: bool, tmp_path: Path) -> None:
    toy = Toy()
    shared = toy.shared(tmp_path / "log")
    lost = SharedStudy.join(open_storage(tmp_path / "log"))
    (subnet,) = toy.algorithm(population=1).ask()
    events: list[Mapping[str, Any]] = []
    steps = Steps()
    dispatcher = toy.dispatcher(shared, interval=1.0, clock=steps, sleep=steps.sleep, on_event=events.append)
    shared.enqueue(toy.space, subnet, 0)
    job = lost.claim()
    assert job is not None
    if beats:  # else it died before it could say what it took
        Heartbeat(lost, "worker:lost").at(job.trial)
    with dispatcher:
        records = dispatcher.evaluate([subnet], 0)
        worker = threading.Thread(target=work, args=(SharedStudy.join(open_storage(tmp_path / "log")), toy.evaluator))
        worker.start()
        (found,) = list(records)
        assert steps.now >= 6.0
        assert not lost.finish(job, toy.evaluator(subnet), 1.0)
    worker.join(60)
    assert found.values == toy.evaluator(subnet)
    assert [event["event"] for event in events] == ["search.lost"]
    assert [trial.state.name for trial in shared.trials()] == ["FAIL", "COMPLETE"]


def test_a_worker_known_to_be_dead_is_not_waited_for(tmp_path: Path) -> None:
    toy = Toy()
    shared = toy.shared(tmp_path / "log")
    (subnet,) = toy.algorithm(population=1).ask()
    shared.enqueue(toy.space, subnet, 0)
    job = shared.claim()
    assert job is not None
    shared.write("worker:dead", {"host": "here", "pid": 1, "trial": job.trial, "beat": 1})
    dispatcher = toy.dispatcher(shared, interval=1e6, check=lambda: {("here", 1)})
    with threads(tmp_path / "log", 1), dispatcher:
        assert [one.subnet for one in dispatcher.evaluate([subnet], 0)] == [subnet]


class Broken(Counting):
    def __call__(self, subnet: Subnet) -> Mapping[str, float]:
        raise NasqError(f"the images of {subnet.id} are gone")


def test_what_a_worker_cannot_evaluate_ends_the_search_with_its_reason(tmp_path: Path) -> None:
    toy = Toy()
    shared = toy.shared(tmp_path / "log")
    joined = SharedStudy.join(open_storage(tmp_path / "log"))
    worker = threading.Thread(target=work, args=(joined, Broken(toy.space)), kwargs={"patience": 1.0})
    with pytest.raises(NasqError, match=r"could not evaluate subnet (\w+): the images of \1 are gone"), (
        toy.dispatcher(shared)
    ) as dispatcher:  # fmt: skip
        worker.start()
        searched(tmp_path / "search", dispatcher, toy)
    worker.join(60)  # nobody coordinates any more, so it leaves
    assert not worker.is_alive()
    # The next try is not refused for what failed before it.
    again = Toy()
    with threads(tmp_path / "log", 1), again.dispatcher(again.shared(tmp_path / "log")) as dispatcher:
        assert len(searched(tmp_path / "search", dispatcher, again)) == BUDGET


def test_a_subnet_that_costs_three_workers_is_not_tried_again(tmp_path: Path) -> None:
    toy = Toy()
    shared = toy.shared(tmp_path / "log")
    (subnet,) = toy.algorithm(population=1).ask()

    def take(seconds: float) -> None:
        if shared.claim() is not None:
            steps.now += 100

    steps = Steps()
    with pytest.raises(NasqError, match=f"3 workers were lost while they evaluated subnet {subnet.id}"), (
        toy.dispatcher(shared, clock=lambda: steps.now, sleep=lambda s: (take(s), steps.sleep(s))[0], interval=0.5)
    ) as dispatcher:  # fmt: skip
        list(dispatcher.evaluate([subnet], 0))
    assert [trial.state.name for trial in shared.trials()] == ["FAIL"] * 3


def test_two_searches_do_not_write_in_one_directory(tmp_path: Path) -> None:
    toy, other = Toy(), Toy()
    second = Study(tmp_path, other.algorithm(), other.evaluator)

    def intrude(event: Mapping[str, Any]) -> None:
        if event["event"] == "search.evaluated" and event["done"] == 2:
            with pytest.raises(InputError, match=f"another search is writing in {tmp_path}. Wait for it"):
                second.run(4)

    first = Study(tmp_path, toy.algorithm(), toy.evaluator, intrude)
    assert len(first.run(4).records) == 4
    with pytest.raises(InputError, match=r"another search has written in .* since this one read it"):
        second.run(4)
    assert other.evaluator.calls == []


@pytest.mark.parametrize("kind", [NSGA2, RandomSearch])
def test_killed_workers_change_nothing(kind: type[Any], tmp_path: Path) -> None:
    toy = Toy()
    alone = kind(toy.space, toy.evaluator.objectives, toy.constraints, population=8, seed=1)
    wanted = rows(Study(tmp_path / "alone", alone, toy.evaluator).run(BUDGET))
    where = tmp_path / "log"
    shared = toy.shared(where)
    events: list[str] = []
    with processes(where, 3, pause=0.05, interval=0.5) as workers:

        def kill(event: Mapping[str, Any]) -> None:
            events.append(event["event"])
            if events.count("search.evaluated") in (3, 9) and event["event"] == "search.evaluated":
                busy(shared, workers).kill()

        with toy.dispatcher(shared, interval=0.5, on_event=kill) as dispatcher:
            algorithm = kind(toy.space, toy.evaluator.objectives, toy.constraints, population=8, seed=1)
            study = Study(tmp_path / "search", algorithm, toy.evaluator, kill, dispatcher=dispatcher)
            assert rows(study.run(BUDGET)) == wanted
    assert sum(worker.exitcode == -9 for worker in workers) == 2


def busy(shared: SharedStudy, workers: list[Any]) -> Any:
    """A living worker that has a subnet in its hands; waits for one."""
    for _ in range(2000):
        running = {trial._trial_id for trial in shared.trials() if trial.state.name == "RUNNING"}
        values = [
            value for key, value in shared.read().items() if key.startswith("worker:") and value["trial"] in running
        ]
        found = [worker for worker in workers if worker.is_alive() and worker.pid in {value["pid"] for value in values}]
        if found:
            return found[0]
        time.sleep(0.005)
    raise AssertionError("no worker has a subnet")

"""Workers of one machine: those that are killed are started again, a bounded number of times."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nasq.errors import NasqError
from nasq.run.directory import RunDirectory
from nasq.run.sharing import RESTARTS, Crew, SearchOptions


def crew(tmp_path: Path, script: str, workers: int, events: list[Mapping[str, Any]]) -> Crew:
    (tmp_path / "search").mkdir()
    made = Crew(RunDirectory(tmp_path), "toy", SearchOptions(workers=workers), events.append)
    made._command = [sys.executable, "-S", "-c", script]
    return made


def looks(made: Crew, seconds: float = 30.0) -> set[tuple[str, int]]:
    """Looks until no worker is left."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        made.dead()
        time.sleep(0.01)
    raise AssertionError("the workers did not end")


def test_killed_workers_are_started_again_three_times(tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    with (
        pytest.raises(NasqError, match=r"all 1 workers have ended \(killed by signal 9, after 3 new starts each\)"),
        crew(tmp_path, "import os; print('begun', flush=True); os.kill(os.getpid(), 9)", 1, events) as made,
    ):
        looks(made)
    assert [event["again"] for event in events] == [True] * RESTARTS + [False]
    assert len({event["pid"] for event in events}) == len(made._dead) == RESTARTS + 1
    assert (tmp_path / "search/worker-0.log").read_text() == "begun\n" * (RESTARTS + 1)


def test_a_worker_that_said_why_it_ended_is_not_started_again(tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    with (
        pytest.raises(NasqError, match=r"exit code 2\); the last one said: no weights here See .*worker-\d.log"),
        crew(tmp_path, "print('no weights here'); raise SystemExit(2)", 2, events) as made,
    ):
        looks(made)
    assert [(event["code"], event["again"]) for event in events] == [(2, False)] * 2


def test_the_others_work_on_and_are_ended_with_the_search(tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    with crew(tmp_path, "import time; time.sleep(60)", 2, events) as made:
        lost, other = made._living.values()
        lost.kill()
        while not events:
            made.dead()
        assert {pid for _, pid in made.dead()} == {lost.pid}
        assert made._living[0].pid != lost.pid and made._living[1] is other
        for one in made._living.values():
            one.terminate()
    assert not any(one.poll() is None for one in made._living.values())

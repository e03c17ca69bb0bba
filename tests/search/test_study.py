from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nasq.errors import ArtifactError, InfeasibleError, InputError, NasqError
from nasq.search import (
    NSGA2,
    Bound,
    Goal,
    ObjectiveEvaluator,
    RandomSearch,
    Record,
    Study,
    StudyResult,
    front,
    load_results,
    pick,
)
from nasq.space import Choice, SearchSpace, Subnet

from . import killed
from .toy import ACCURACY, Costs, joint_space, limit, objective

BUDGET = 30


class Stopped(Exception):
    pass


class Fragile:
    """Evaluates like the others and dies on the ``last + 1``-th call."""

    def __init__(self, inner: ObjectiveEvaluator, last: int) -> None:
        self.names = inner.names
        self.calls: list[str] = []
        self._inner = inner
        self._last = last

    def __call__(self, subnet: Subnet) -> Mapping[str, float]:
        if len(self.calls) == self._last:
            raise Stopped
        self.calls.append(subnet.id)
        return self._inner(subnet)


def parts(
    kind: Any = NSGA2, name: str = "toy", upper: float = 1500.0, **settings: Any
) -> tuple[Any, ObjectiveEvaluator]:
    space = joint_space(name=name)
    costs = Costs(space)
    objectives = [ACCURACY, objective(costs)]
    algorithm = kind(
        space, objectives, [limit(costs, "bytes", upper=upper)], **{"population": 8, "seed": 1, **settings}
    )
    return algorithm, ObjectiveEvaluator(space, objectives, list(costs.measures().values()))


def comparable(result: StudyResult) -> list[tuple[Any, ...]]:
    """Everything but the seconds."""
    return [(record.subnet, dict(record.values), record.generation) for record in (*result.records, *result.front)]


@pytest.mark.parametrize("kind", [NSGA2, RandomSearch])
def test_a_study_keeps_its_budget_and_records_everything(tmp_path: Path, kind: Any) -> None:
    algorithm, evaluator = parts(kind)
    result = Study(tmp_path / "search", algorithm, evaluator).run(BUDGET)
    assert len(result.records) == BUDGET
    assert len({record.subnet for record in result.records}) == BUDGET
    assert [record.generation for record in result.records] == [number // 8 for number in range(BUDGET)]
    assert list(result.front) == front(result.records, algorithm.objectives)
    with (tmp_path / "search/subnets.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "subnet", "accuracy", "bitops", "bytes", "generation", "seconds"]
    for row, record in zip(rows, result.records, strict=True):
        assert row["id"] == record.subnet.id
        assert json.loads(row["subnet"]) == dict(record.subnet)
        assert {name: float(row[name]) for name in record.values} == record.values == evaluator(record.subnet)
        assert float(row["bytes"]) <= 1500


def test_the_file_is_current_after_each_evaluation(tmp_path: Path) -> None:
    algorithm, evaluator = parts()
    seen = []

    def look(event: Mapping[str, Any]) -> None:
        if event["event"] == "search.evaluated":
            last = (tmp_path / "subnets.csv").read_text().splitlines()[-1]
            assert last.startswith(event["subnet"])
            seen.append(event["done"])

    Study(tmp_path, algorithm, evaluator, look).run(10)
    assert seen == list(range(1, 11))


def test_events_tell_the_progress(tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    algorithm, evaluator = parts()
    ticks = iter(range(1000))
    Study(tmp_path, algorithm, evaluator, events.append, clock=lambda: next(ticks)).run(10)
    kinds = [event["event"] for event in events]
    first = ["search.started", "search.generation", *["search.evaluated"] * 8]
    assert kinds == [*first, "search.generation", "search.evaluated", "search.evaluated", "search.finished"]
    assert events[0]["budget"] == 10
    assert events[2]["seconds"] == 1
    assert events[-1]["evaluated"] == 10
    json.dumps(events, allow_nan=False)


@pytest.mark.parametrize("kind", [NSGA2, RandomSearch])
def test_stopped_anywhere_it_ends_as_if_undisturbed(tmp_path: Path, kind: Any) -> None:
    wanted = comparable(Study(tmp_path / "whole", *parts(kind)).run(BUDGET))
    for last in range(0, BUDGET, 4):
        directory = tmp_path / str(last)
        algorithm, inner = parts(kind)
        with pytest.raises(Stopped):
            Study(directory, algorithm, Fragile(inner, last)).run(BUDGET)
        # The process died while it wrote the next line.
        with (directory / "subnets.csv").open("ab") as file:
            file.write(b'0123456789ab,"{""b0.op"":""co')
        algorithm, inner = parts(kind)
        counting = Fragile(inner, BUDGET)
        study = Study(directory, algorithm, counting)
        assert len(study.records) == last
        assert comparable(study.run(BUDGET)) == wanted
        assert len(counting.calls) == BUDGET - last


def test_killed_for_real_at_three_moments(tmp_path: Path) -> None:
    wanted = comparable(killed.study(tmp_path / "whole").run(40))
    directory = tmp_path / "killed"
    command = [sys.executable, str(Path(killed.__file__)), str(directory), "40", "0.03"]
    root = str(Path(__file__).parents[2])
    done = 0
    for more in (3, 9, 6):
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
        try:
            done = wait_for_lines(directory / "subnets.csv", done + more, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    study = killed.study(directory)
    assert 18 <= len(study.records) < 40
    assert comparable(study.run(40)) == wanted


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> int:
    """Waits until the file has ``count`` records; gives how many it has."""
    for _ in range(3000):
        lines = path.read_bytes().count(b"\n") - 1 if path.exists() else 0
        if lines >= count:
            return lines
        assert process.poll() is None, "the process ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError(f"{path} did not reach {count} records")


def test_a_finished_study_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    wanted = comparable(Study(tmp_path / "whole", *parts()).run(BUDGET))
    study = Study(tmp_path / "two", *parts())
    study.run(13)
    assert comparable(study.run(BUDGET)) == wanted
    Study(tmp_path / "again", *parts()).run(13)
    assert comparable(Study(tmp_path / "again", *parts()).run(BUDGET)) == wanted


def test_a_smaller_budget_than_known_evaluates_nothing(tmp_path: Path) -> None:
    Study(tmp_path, *parts()).run(12)
    algorithm, inner = parts()
    result = Study(tmp_path, algorithm, Fragile(inner, 0)).run(5)
    assert len(result.records) == 12


def test_a_study_of_another_space_names_both_fingerprints(tmp_path: Path) -> None:
    first, evaluator = parts()
    Study(tmp_path, first, evaluator).run(4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = joint_space(5)
    costs = Costs(other)
    algorithm = NSGA2(other, [ACCURACY, objective(costs)], population=8, seed=1)
    with pytest.raises(InputError, match=f"fingerprint is {first.space.fingerprint}, yours is {other.fingerprint}"):
        Study(tmp_path, algorithm, ObjectiveEvaluator(other, algorithm.objectives, list(costs.measures().values())))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_study_of_other_settings_or_columns_is_refused(tmp_path: Path) -> None:
    Study(tmp_path, *parts()).run(4)
    with pytest.raises(InputError, match="begun with seed = 1 and is continued with 2"):
        Study(tmp_path, *parts(seed=2))
    algorithm, _ = parts()
    with pytest.raises(InputError, match="records accuracy, bitops, bytes; yours records accuracy, bitops"):
        Study(tmp_path, algorithm, ObjectiveEvaluator(algorithm.space, algorithm.objectives))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not the state of a search"),
        ('{"schema": 1}', "is not the state of a search"),
        (None, "holds results, but .*state.json is missing"),
    ],
)
def test_damaged_states_are_refused_and_left_alone(tmp_path: Path, content: str | None, message: str) -> None:
    Study(tmp_path, *parts()).run(4)
    state = tmp_path / "state.json"
    state.unlink() if content is None else state.write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ArtifactError, match=message):
        Study(tmp_path, *parts())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_newer_schema_and_lost_lines_are_refused(tmp_path: Path) -> None:
    Study(tmp_path, *parts()).run(20)
    records = tmp_path / "subnets.csv"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:10]))
    with pytest.raises(ArtifactError, match=r"has 9 subnets, but .* knows 16: lines were lost"):
        Study(tmp_path, *parts())
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "schema": 2}))
    with pytest.raises(ArtifactError, match="is of schema 2; this version of nasq reads 1"):
        Study(tmp_path, *parts())


def test_results_load_without_algorithm_or_evaluator(tmp_path: Path) -> None:
    result = Study(tmp_path, *parts()).run(20)
    goals, records = load_results(tmp_path)
    assert goals == (Goal("accuracy", "%", "maximize"), Goal("bitops", "", "minimize"))
    assert records == result.records
    median = sorted(record.values["bytes"] for record in records)[10]
    best = pick(records, goals, [Bound("bytes", upper=median)])
    assert best.values["accuracy"] == max(r.values["accuracy"] for r in records if r.values["bytes"] <= median)
    with pytest.raises(ArtifactError, match=r"state\.json is missing"):
        load_results(tmp_path / "nowhere")


def test_an_infeasible_study_explains_and_evaluates_nothing(tmp_path: Path) -> None:
    algorithm, inner = parts(upper=1.0)
    with pytest.raises(InfeasibleError, match="no feasible subnet was found"):
        Study(tmp_path, algorithm, Fragile(inner, 0)).run(4)


def test_a_small_space_ends_before_the_budget(tmp_path: Path) -> None:
    space = SearchSpace([Choice("a", (1, 2, 3)), Choice("b", (1, 2))])
    goal = objective(Costs(joint_space()))
    first = type(goal)("sum", "", "minimize", lambda rows: rows.sum(axis=1) * 1.0, on="rows")
    algorithm = NSGA2(space, [first], population=4)
    result = Study(tmp_path, algorithm, ObjectiveEvaluator(space, [first])).run(100)
    assert result.exhausted
    assert len(result.records) == 6
    assert [record.values["sum"] for record in result.front] == [0.0]


class Wrong:
    def __init__(self, names: list[str], values: dict[str, float]) -> None:
        self.names = names
        self._values = values

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        return self._values


@pytest.mark.parametrize(
    ("values", "message"),
    [({"accuracy": 1.0}, "evaluator gave accuracy for subnet .* it announced accuracy, bitops"),
     ({"accuracy": float("nan"), "bitops": 1.0}, "'accuracy' of subnet .* is nan"),
     ({"accuracy": 1.0, "bitops": float("inf")}, "'bitops' of subnet .* is inf")],
)  # fmt: skip
def test_wrong_evaluators_are_named_and_nothing_is_written(tmp_path: Path, values: Any, message: str) -> None:
    algorithm, _ = parts()
    with pytest.raises(NasqError, match=message):
        Study(tmp_path, algorithm, Wrong(["accuracy", "bitops"], values)).run(1)
    assert len((tmp_path / "subnets.csv").read_text().splitlines()) == 1


def test_inputs_are_checked(tmp_path: Path) -> None:
    algorithm, evaluator = parts()
    with pytest.raises(InputError, match="the evaluator gives accuracy, but the search needs bitops as well"):
        Study(tmp_path, algorithm, Wrong(["accuracy"], {}))
    with pytest.raises(InputError, match="the budget is 0"):
        Study(tmp_path, algorithm, evaluator).run(0)
    with pytest.raises(InputError, match="two different values have one name"):
        ObjectiveEvaluator(algorithm.space, [ACCURACY, ACCURACY])


def test_records_are_what_the_evaluator_gave(tmp_path: Path) -> None:
    algorithm, evaluator = parts()
    record = Study(tmp_path, algorithm, evaluator).run(1).records[0]
    assert record == Record(record.subnet, evaluator(record.subnet), 0, record.seconds)
    assert record.seconds >= 0

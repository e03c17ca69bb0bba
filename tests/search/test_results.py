from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nasq.errors import ArtifactError, InfeasibleError, InputError
from nasq.search import Bound, Goal, Record, RecordFile, front, hypervolumes, pick, pick_knee
from nasq.space import Subnet

GOALS = (Goal("accuracy", "%", "maximize"), Goal("bytes", "B", "minimize"))


def record(accuracy: float, size: float, name: str = "conv") -> Record:
    return Record(Subnet({"op": name, "bits": 4, "ratio": 0.5}), {"accuracy": accuracy, "bytes": size}, 0, 0.25)


RECORDS = [record(90.0, 100, "a"), record(95.0, 200, "b"), record(94.0, 300, "c"), record(95.0, 250, "d")]


def test_front_keeps_what_nothing_dominates() -> None:
    assert front(RECORDS, GOALS) == RECORDS[:2]
    assert front([], GOALS) == []


def test_pick_takes_the_best_within_limits() -> None:
    assert pick(RECORDS, GOALS) is RECORDS[1]
    assert pick(RECORDS, GOALS, [Bound("bytes", upper=150)]) is RECORDS[0]
    assert pick(RECORDS, GOALS, [Bound("bytes", lower=210)]) is RECORDS[3]
    assert pick(RECORDS, GOALS[1:], [Bound("accuracy", lower=94)]) is RECORDS[1]


def test_pick_breaks_ties_by_id_not_by_order() -> None:
    twins = [record(95.0, 200, "x"), record(95.0, 200, "y")]
    assert pick(twins, GOALS) == pick(twins[::-1], GOALS)


def test_pick_says_why_nothing_fits() -> None:
    with pytest.raises(
        InfeasibleError,
        match=r"none of the 4 .*bytes <= 50 holds for 0 \(seen 100 to 300\); accuracy >= 94 holds for 3",
    ):
        pick(RECORDS, GOALS, [Bound("bytes", upper=50), Bound("accuracy", lower=94)])
    with pytest.raises(InputError, match=r"'latency' was not recorded\. Recorded: accuracy, bytes"):
        pick(RECORDS, GOALS, [Bound("latency", upper=50)])
    with pytest.raises(InputError, match="nothing to pick from"):
        pick([], GOALS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
def test_records_read_back_exactly(tmp_path: Path, values: list[float], name: str) -> None:
    path = tmp_path / "subnets.csv"
    path.unlink(missing_ok=True)
    file = RecordFile(path, ["accuracy", "x,y"])
    assert file.open() == []
    written = [
        Record(Subnet({"op": name, "n": n}), {"accuracy": value, "x,y": -value}, n, 0.5)
        for n, value in enumerate(values)
    ]
    for entry in written:
        file.append(entry)
    assert RecordFile(path, ["accuracy", "x,y"]).open() == written
    assert RecordFile(path, ["accuracy", "x,y"]).read() == written


def test_a_line_torn_at_any_byte_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "subnets.csv"
    file = RecordFile(path, ["accuracy", "bytes"])
    file.open()
    for entry in RECORDS[:2]:
        file.append(entry)
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert RecordFile(path, ["accuracy", "bytes"]).read() == RECORDS[:1]
        assert path.read_bytes() == whole[:end]
        again = RecordFile(path, ["accuracy", "bytes"])
        assert again.open() == RECORDS[:1]
        again.append(RECORDS[1])
        assert path.read_bytes() == whole


def test_a_torn_header_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "subnets.csv"
    path.write_bytes(b"id,sub")
    assert RecordFile(path, ["accuracy"]).open() == []
    assert path.read_text() == "id,subnet,accuracy,generation,seconds\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], lines[1] + ",1", *lines[2:]], "line 2: 7 fields instead of 6"),
        (lambda lines: [lines[0], lines[1].replace(",90,", ",ninety,"), lines[2]], "line 2: could not convert"),
        (lambda lines: [lines[0], lines[1].replace(",90,", ",nan,"), lines[2]], "line 2: a value is not finite"),
        (lambda lines: [lines[0], lines[1], "0" + lines[2][1:]], "line 3: the id .* is not that of its subnet"),
        (lambda lines: [*lines, lines[1]], "line 4: subnet .* is there twice"),
        (lambda lines: [lines[0].replace("bytes", "bites"), *lines[1:]], "has the columns id, subnet, accuracy, bites"),
        (lambda lines: [lines[0], lines[1].replace('"{', '"['), lines[2]], "line 2: a subnet's JSON cannot be read"),
        (lambda lines: [lines[0], '"' + lines[1]], "is damaged"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "subnets.csv"
    file = RecordFile(path, ["accuracy", "bytes"])
    file.open()
    for entry in RECORDS[:2]:
        file.append(entry)
    lines = path.read_text().splitlines()
    if message.startswith("line 3: the id") and lines[2].startswith("0"):
        lines[2] = "1" + lines[2][1:]
    path.write_text("\n".join(change(lines)) + "\n")
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=message):
        RecordFile(path, ["accuracy", "bytes"]).open()
    assert path.read_bytes() == before


@pytest.mark.parametrize("names", [["id"], ["seconds"], ["a", "a"], ["a\nb"], [""]])
def test_columns_must_differ_from_each_other_and_from_ours(names: list[str]) -> None:
    with pytest.raises(InputError, match="must differ, and none may be id, subnet, generation, seconds"):
        RecordFile(Path("subnets.csv"), names)


def test_hypervolume_over_time_equals_that_of_each_prefix_and_pymoo() -> None:
    indicators = pytest.importorskip("pymoo.indicators.hv")
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.uniform(60, 95, 30), rng.uniform(100, 400, 30)])
    found = [record(a, b, str(i)) for i, (a, b) in enumerate(values.tolist())]
    reference = [60.0, 400.0]
    volumes = hypervolumes(found, GOALS, reference)
    exact = indicators.HV(ref_point=np.array([-60.0, 400.0]))
    assert volumes == pytest.approx([float(exact(values[: n + 1] * [-1, 1])) for n in range(30)])
    worst = [values[:, 0].min(), values[:, 1].max()]
    assert hypervolumes(found, GOALS) == pytest.approx(hypervolumes(found, GOALS, worst))
    assert hypervolumes([], GOALS) == []


def test_estimates_of_a_cascade_are_no_results() -> None:
    estimate = Record(Subnet({"op": "e"}), {"accuracy": 99.0, "bytes": 1.0, "level": 2.0}, 0, 0.1)
    final = Record(Subnet({"op": "f"}), {"accuracy": 90.0, "bytes": 9.0, "level": 4.0}, 0, 0.1)
    assert front([estimate, final], GOALS) == [final] and pick([estimate, final], GOALS) is final
    assert pick_knee([estimate, final], GOALS) is final
    assert hypervolumes([estimate, final], GOALS, [0.0, 10.0]) == [0.0, 90.0]
    with pytest.raises(InputError, match="nothing to pick from"):
        pick([estimate], GOALS)


def test_the_knee_within_limits() -> None:
    values = [(90.0, 100), (94.0, 120), (94.5, 200), (95.0, 400)]
    found = [record(a, b, str(i)) for i, (a, b) in enumerate(values)]
    assert pick_knee(found, GOALS) is found[1]
    assert pick_knee(found, GOALS, [Bound("accuracy", lower=94.4)]) in found[2:]

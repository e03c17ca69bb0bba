from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge as Reference

from nasq.errors import InputError
from nasq.search import NSGA2, Objective, Record, Study, front, load_results, pick
from nasq.search.cascade import LEVELS, Cascade, CascadeSettings, Ridge, spent
from nasq.space import Subnet

from .toy import Costs, accuracy, joint_space, limit, objective

SPACE = joint_space()
COSTS = Costs(SPACE)


def share(subnet: Subnet) -> float:
    return accuracy(subnet) / 100


def noisy(subnet: Subnet) -> float:
    """A proxy: the accuracy up to a made-up error."""
    return 7 * share(subnet) + 0.2 * math.sin(int(subnet.id[:6], 16))


def part(subnet: Subnet, steps: int = 6, size: int = 50) -> Iterator[tuple[int, int]]:
    rng = np.random.default_rng(int(subnet.id[:6], 16))
    right = 0
    for step in range(1, steps + 1):
        right += int(rng.binomial(size, share(subnet)))
        yield right, step * size


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def cascade(**changes: Any) -> Cascade:
    settings = CascadeSettings(**{"least": 16, "dominators": 2, **changes})
    objectives = [Objective("accuracy", "", "maximize", share), objective(COSTS)]
    return Cascade(
        SPACE, objectives, list(COSTS.measures().values()), settings, proxy=noisy, part=part, clock=Clock()
    )  # fmt: skip


def records(count: int, evaluator: Cascade, seed: int = 0) -> list[Record]:
    rows = np.unique(SPACE.sample_batch(4 * count, np.random.default_rng(seed)), axis=0)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [Record(subnet, evaluator(subnet), 0, 1.0) for subnet in SPACE.to_subnets(rows[chosen])]


@pytest.mark.parametrize(("n", "p"), [(30, 3), (12, 40)])
def test_the_regression_leaves_one_out_exactly(n: int, p: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, p)) * rng.uniform(0.1, 9, p) + 3
    x[:, 1] = 4.0  # a feature that says nothing
    y = x[:, 0] + 0.3 * rng.standard_normal(n)
    model = Ridge(x, y)
    spread = np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    z = (x - x.mean(axis=0)) / spread

    def left_out(penalty: float) -> float:
        """Brute force; the features stay scaled as they were with all rows, and the intercept is the mean of all."""
        errors = []
        for i in range(n):
            rest = np.arange(n) != i
            # An intercept without penalty, on features whose mean over all rows is 0.
            design = np.column_stack([np.ones(n), z])
            ridge = penalty * n * np.diag([0.0, *np.ones(p)])
            weights = np.linalg.solve(design[rest].T @ design[rest] + ridge, design[rest].T @ y[rest])
            errors.append(y[i] - design[i] @ weights)
        return float(np.sqrt(np.mean(np.square(errors))))

    assert model.error == pytest.approx(left_out(model.penalty), rel=1e-6)
    assert model.error <= min(left_out(10.0**power) for power in range(-3, 5)) * (1 + 1e-6)
    reference = Reference(alpha=model.penalty * n).fit(z, y)
    fresh = rng.standard_normal((5, p))
    assert model.predict(fresh) == pytest.approx(reference.predict((fresh - x.mean(axis=0)) / spread))


def test_nothing_is_given_up_before_enough_is_known() -> None:
    evaluator = cascade()
    first = records(15, evaluator)
    assert all(record.full and record.values["accuracy"] == share(record.subnet) for record in first)
    evaluator.learn(first)
    assert all(record.values["level"] >= 3 for record in records(20, evaluator, 1))  # no model yet, but a part


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_only_what_is_dominated_with_room_to_spare_is_given_up(level: str) -> None:
    evaluator = cascade(levels=(level,))
    first = records(60, evaluator)
    evaluator.learn(first)
    ended: set[int] = set()
    for record in records(150, evaluator, 1):
        if record.full:
            assert record.values["accuracy"] == share(record.subnet)
            continue
        ended.add(int(record.values["level"]))
        better = [
            one for one in first
            if share(one.subnet) >= record.values["accuracy"] and one.values["bitops"] <= record.values["bitops"]
        ]  # fmt: skip
        assert len(better) >= 2
        # What it was given up for is true: really dominated, not only by estimate.
        assert sum(
            share(o.subnet) > share(record.subnet) and o.values["bitops"] <= record.values["bitops"] for o in first
        )
    assert ended == {LEVELS.index(level) + 1}


def test_a_part_stops_where_hope_ends() -> None:
    evaluator = cascade(levels=("part",))
    evaluator.learn(records(60, evaluator))
    seen: list[int] = []

    def counting(subnet: Subnet) -> Iterator[tuple[int, int]]:
        for right, images in part(subnet, 20):
            seen.append(images)
            yield right, images

    evaluator._part = counting
    worst = min(records(60, cascade(), 2), key=lambda one: (share(one.subnet), -one.values["bitops"])).subnet
    row = evaluator(worst)
    if row["level"] == 3:
        assert seen[-1] < 1000 and row["accuracy"] == pytest.approx(share(worst), abs=0.3)
    better = SPACE.largest()
    seen.clear()
    assert evaluator(better)["level"] == 4 and seen[-1] == 1000


def test_the_same_records_in_a_new_process_give_the_same_decisions() -> None:
    one, two = cascade(), cascade()
    known = records(40, one)
    one.learn(known)
    two.learn(known)
    timed = {f"{level}_seconds" for level in LEVELS}
    for record in records(40, one, 3):
        again = two(record.subnet)
        assert {k: v for k, v in again.items() if k not in timed} == {
            k: v for k, v in record.values.items() if k not in timed
        }


def test_estimates_are_recorded_and_never_chosen(tmp_path: Path) -> None:
    evaluator = cascade(confidence=0.5)
    objectives = [Objective("accuracy", "", "maximize", share), objective(COSTS)]
    algorithm = NSGA2(SPACE, objectives, [limit(COSTS, "bytes", upper=1500.0)], population=20, seed=1)
    result = Study(tmp_path, algorithm, evaluator).run(100)
    _goals, found = load_results(tmp_path)
    estimates = [record for record in found if not record.full]
    assert estimates and tuple(found) == result.records
    assert all(record.full for record in result.front) and front(found, objectives) == list(result.front)
    assert all(record.values["accuracy"] == share(record.subnet) for record in result.front)
    assert pick(found, objectives).full
    table = {row.level: row for row in spent(found)}
    assert list(table) == list(LEVELS)
    assert table["proxy"].subnets == 100 and sum(row.ended for row in table.values()) == 100
    assert table["full"].subnets == table["full"].ended == 100 - len(estimates)
    assert table["proxy"].seconds == 100.0  # the clock ticks once in each level
    assert spent([Record(found[0].subnet, {"accuracy": 1.0}, 0, 0.0)]) == []


def test_a_proxy_that_is_not_finite_has_no_say_and_is_marked() -> None:
    evaluator = cascade(levels=("proxy",))
    evaluator._proxy = lambda subnet: float("nan") if int(subnet.id, 16) % 2 else noisy(subnet)
    first = records(60, evaluator)
    failed = [record for record in first if int(record.subnet.id, 16) % 2]
    assert failed and [one for one in first if one.values["proxy_failed"]] == failed
    evaluator.learn(first)
    kept = [record for record in first if record not in failed]
    alone = Ridge(np.array([[noisy(one.subnet)] for one in kept]), np.array([share(one.subnet) for one in kept]))
    assert evaluator._models["proxy"].error == pytest.approx(alone.error)
    assert all(record.full for record in records(60, evaluator, 1) if record.values["proxy_failed"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"levels": ("proxies",)},
            r"levels of a cascade are \['proxies'\]; allowed: each of proxy, predictor, part once",
        ),
        ({"levels": ("part", "part")}, "allowed: each of"),
        ({"confidence": 0.0}, "confidence 0.0"),
        ({"dominators": 0}, "dominators 0"),
        ({"least": 2}, "least 2"),
    ],
)
def test_settings_are_checked(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CascadeSettings(**changes)


def test_objectives_that_a_cascade_cannot_estimate_are_refused() -> None:
    latency = Objective("latency", "ms", "minimize", lambda subnet: 1.0)
    first = Objective("accuracy", "", "maximize", share)
    for objectives in ([first, latency], [objective(COSTS), first], [latency]):
        with pytest.raises(InputError, match=r"accuracy: it must be the first objective.*Change search\.objectives"):
            Cascade(SPACE, objectives, [], CascadeSettings(), proxy=noisy, part=part)
    with pytest.raises(InputError, match="level 'part' needs a function"):
        Cascade(SPACE, [first], [], CascadeSettings(), proxy=noisy)

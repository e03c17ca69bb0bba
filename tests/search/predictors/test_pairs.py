from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nasq import Choice
from nasq.errors import ArtifactError, InputError, NasqError
from nasq.search.predictors import Pairs, generate_pairs
from nasq.space import SearchSpace, Subnet

SPACE = SearchSpace([Choice("a", (2, 4)), Choice("b", (2, 4, 8))])
ROWS = np.array([[0, 0], [1, 2], [0, 1], [1, 2]], dtype=np.int16)


def score(subnet: Subnet) -> float:
    return float(10 * subnet["a"] + subnet["b"])


def test_each_is_measured_once_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    path, calls = tmp_path / "pairs.jsonl", list[Subnet]()

    def evaluate(subnet: Subnet) -> float:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(subnet)
        return score(subnet)

    with pytest.raises(KeyboardInterrupt):
        generate_pairs(SPACE, ROWS, evaluate, path)
    with path.open("a") as file:
        file.write('{"subnet": {"a": 2')  # the kill cut this line off
    assert len(Pairs.read(path, SPACE)) == 2
    done: list[tuple[int, int]] = []
    later: list[Subnet] = []

    def again(subnet: Subnet) -> float:
        later.append(subnet)
        return score(subnet)

    pairs = generate_pairs(SPACE, ROWS, again, path, lambda *at: done.append(at))
    assert len(later) == 1 and done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert np.array_equal(pairs.rows, ROWS) and pairs.values.tolist() == [22.0, 48.0, 24.0, 48.0]
    assert len(Pairs.read(path, SPACE)) == 3


def test_a_split_is_a_partition() -> None:
    rows = SPACE.sample_batch(20, np.random.default_rng(0))
    pairs = Pairs(rows, np.arange(20.0))
    one, other = pairs.split(0.8, np.random.default_rng(1))
    assert (len(one), len(other)) == (16, 4)
    assert sorted([*one.values, *other.values]) == list(range(20))
    with pytest.raises(InputError, match="leaves one part empty"):
        pairs.split(0.001, np.random.default_rng(0))


def test_damage_and_nan_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(NasqError, match="is nan; it must be finite"):
        generate_pairs(SPACE, ROWS, lambda subnet: float("nan"), path)
    assert not path.exists()
    path.write_text(json.dumps({"subnet": {"a": 3, "b": 2}, "value": 1}) + "\n")
    with pytest.raises(ArtifactError, match=r"line 1 of .*pairs\.jsonl is not a pair of this space"):
        Pairs.read(path, SPACE)

"""SIGKILL while a forest grows, in the middle of a split too; the script that measures it does it here once."""

from __future__ import annotations

import pytest

from scripts.benchmarks.kill_training import DELAYS, run


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_growth_ends_with_the_same_bytes() -> None:
    found = run(trials=1, seed=0)
    (trial,) = found["trials"]
    assert trial["different"] == [] and found["all_equal"]
    assert trial["compared"] > 10 and {kill["phase"] for kill in trial["kills"]} == set(DELAYS)
    assert found["kills_before_the_split_was_decided"] == 1  # one of them in the middle of the split

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from nasq.errors import InputError
from nasq.ranking.audit_seeds import compare_seeds, kendall_over_seeds, over_seeds
from nasq.ranking.audits import audit
from nasq.ranking.table import Table

NAMES = [f"n{index}" for index in range(40)]
TRUTH = np.random.default_rng(0).normal(90, 2, 40)
TABLE = Table({"acc": TRUTH}, NAMES)


def _noisy(noise: float, seeds: int, start: int = 1) -> np.ndarray:
    return np.stack([TRUTH + np.random.default_rng(start + k).normal(0, noise, 40) for k in range(seeds)])


def test_means_and_deviations_are_those_of_the_audits() -> None:
    columns = _noisy(1.0, 3)
    audits = [audit(Table({"mine": one}, NAMES), TABLE, resamples=5) for one in columns]
    found = over_seeds(audits)
    taus = [stats.kendalltau(one, TRUTH).statistic for one in columns]
    assert found.mean["mine"]["kendall"] == pytest.approx(np.mean(taus))
    assert found.deviation["mine"]["kendall"] == pytest.approx(np.std(taus, ddof=1))
    told = json.loads(json.dumps(found.to_json()))
    assert told["seeds"] == 3 and len(told["audits"]) == 3
    single = over_seeds(audits[:1]).to_json()
    assert single["deviation"]["mine"]["kendall"] is None and single["mean"]["mine"]["kendall"] == pytest.approx(
        taus[0]
    )


def test_only_the_same_scores_are_put_together() -> None:
    audits = [audit(Table({name: TRUTH}, NAMES), TABLE, resamples=2) for name in ("mine", "yours")]
    with pytest.raises(InputError, match=r"file 1 has mine, and file 2 has yours"):
        over_seeds(audits)
    with pytest.raises(InputError, match="no audit was given"):
        over_seeds([])


def test_a_better_way_is_told_apart_and_an_equal_one_is_not() -> None:
    good, bad = _noisy(0.5, 4), _noisy(4.0, 4, start=50)
    gain = compare_seeds(good, bad, TRUTH, 200)
    wanted = np.mean([stats.kendalltau(x, TRUTH).statistic for x in good]) - np.mean(
        [stats.kendalltau(x, TRUTH).statistic for x in bad]
    )
    assert gain.value == pytest.approx(wanted) and gain.separated and gain.low > 0
    back = compare_seeds(bad, good, TRUTH, 200)
    assert back.value == pytest.approx(-wanted) and back.high < 0
    same = compare_seeds(good, _noisy(0.5, 4, start=90), TRUTH, 200)
    assert not same.separated
    one = kendall_over_seeds(good, TRUTH, 200)
    assert one.low < one.value < one.high


def test_seeds_that_differ_widen_the_interval() -> None:
    even = np.repeat(_noisy(2.0, 1), 4, axis=0)
    uneven = np.stack([TRUTH, -TRUTH, TRUTH, -TRUTH])
    narrow, wide = kendall_over_seeds(even, TRUTH, 200), kendall_over_seeds(uneven, TRUTH, 200)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_shapes_and_numbers_are_checked() -> None:
    with pytest.raises(InputError, match=r"\[seeds, 40\], one per subnet; got \[40\]"):
        kendall_over_seeds(TRUTH, TRUTH)
    broken = _noisy(1.0, 2)
    broken[0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        compare_seeds(broken, _noisy(1.0, 2), TRUTH)

from __future__ import annotations

import re

import numpy as np
import pytest

from nasq.errors import InputError
from nasq.ranking.audit_seeds import over_seeds
from nasq.ranking.audits import audit
from nasq.ranking.table import Table
from nasq.report.audit import Scatter, _Axis, _ticks, audit_page, scatters

NAMES = [f"<b>{index}</b>" for index in range(30)]
RNG = np.random.default_rng(0)
TRUTH = RNG.normal(90, 2, 30)
TABLE = Table({"acc": TRUTH, "params": RNG.random(30)}, NAMES)


def _scores(seed: int) -> Table:
    rng = np.random.default_rng(seed)
    order = rng.permutation(30)
    values = TRUTH + rng.normal(size=30)
    values[0] = np.nan
    return Table({"<mine>": values[order]}, [NAMES[index] for index in order])


def test_pictures_show_the_mean_over_seeds_in_the_order_of_the_table() -> None:
    one, two = _scores(1), _scores(2)
    (picture,) = scatters([one, two], TABLE)
    by_name = [dict(zip(table.names, table.metrics["<mine>"], strict=True)) for table in (one, two)]
    np.testing.assert_allclose(picture.score, [(by_name[0][n] + by_name[1][n]) / 2 for n in NAMES[1:]])
    np.testing.assert_array_equal(picture.truth, TRUTH[1:])  # the first score is NaN


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_page_needs_nothing_else_and_escapes_names(seeds: int) -> None:
    files = [_scores(seed) for seed in range(seeds)]
    audits = [audit(one, TABLE, resamples=20) for one in files]
    found = over_seeds(audits)
    page = audit_page(found, scatters(files, TABLE), "scores & table")
    assert page.count("<circle") == 29
    assert "<mine>" not in page and "&lt;mine&gt;" in page and "scores &amp; table" in page
    assert not re.search(r"(src|href)=|<script", page)
    value = found.mean["<mine>"]["kendall"]
    assert f"{value:.3f}" in page
    spread = f"± {found.deviation['<mine>']['kendall']:.3f}"
    assert (spread in page) == (seeds == 2)
    assert ("2 seeds" in page) == (seeds == 2) and "params" in page


def test_points_are_placed_to_scale_and_many_are_thinned_out() -> None:
    axis = _Axis.of(np.array([0.0, 10.0]), 100, 200)
    assert axis.at(5.0) == 150 and 100 < axis.at(0.0) < 105 and 195 < axis.at(10.0) < 200
    assert _ticks(0.0, 10.0) == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert _ticks(88.3, 91.9) == [89.0, 90.0, 91.0]
    constant = _Axis.of(np.array([3.0, 3.0]), 0, 100)
    assert constant.at(3.0) == 50
    x = np.linspace(0, 1, 5000)
    audits = over_seeds([audit(Table({"x": TRUTH}, NAMES), TABLE, resamples=2)])
    page = audit_page(audits, [Scatter("x", x, x)], "many")
    assert page.count("<circle") == 2000 and "2000 of 5000 subnets" in page
    with pytest.raises(InputError, match="no subnet has both a score 'x'"):
        audit_page(audits, [Scatter("x", x[:0], x[:0])], "none")

from __future__ import annotations

import gzip
import json
import os
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nasq import Subnet, Supernet
from nasq.errors import InputError
from nasq.ranking.audits import audit, consistency, match
from nasq.ranking.statistics import top_k_regret
from nasq.ranking.table import Table
from nasq.ranking.table_import import import_table
from tests.ranking.test_table import Named

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=120)
NAMES = [f"net{number}" for number in range(120)]


def tables(**scores: np.ndarray) -> tuple[Table, Table]:
    """Scores in another order than the truth, and a table that knows more subnets."""
    order = np.random.default_rng(1).permutation(100)
    cost = TRUTH + RNG.normal(size=120)
    truth = Table({"acc": TRUTH, "params": cost, "loss": -TRUTH}, NAMES)
    return Table({name: values[order] for name, values in scores.items()}, [NAMES[row] for row in order]), truth


def test_coefficients_are_those_of_the_matched_subnets() -> None:
    noisy = TRUTH + np.random.default_rng(2).normal(size=120)
    scores, truth = tables(good=noisy, bad=-noisy)
    found = audit(scores, truth, resamples=200)
    assert (found.metric, found.subnets, found.unmatched) == ("acc", 100, 0)
    assert [score.name for score in found.scores] == ["good", "bad", "params"] and found.missing_baselines == ("flops",)
    good, bad, params = found.scores
    assert good.coefficients["kendall"].value == pytest.approx(stats.kendalltau(noisy[:100], TRUTH[:100]).statistic)
    assert good.coefficients["spearman"].value == pytest.approx(stats.spearmanr(noisy[:100], TRUTH[:100]).statistic)
    assert good.coefficients["pearson"].value == pytest.approx(np.corrcoef(noisy[:100], TRUTH[:100])[0, 1])
    for name, estimate in good.coefficients.items():
        assert estimate.low < estimate.value < estimate.high
        assert bad.coefficients[name].value == pytest.approx(-estimate.value)
    assert good.regret[10] == pytest.approx(top_k_regret(noisy[:100], TRUTH[:100], 10)) and set(good.regret) == {1, 10}
    gap = good.coefficients["kendall"].value - params.coefficients["kendall"].value
    assert good.beyond["params"].value == pytest.approx(gap) and not params.beyond
    assert bad.beyond["params"].separated and bad.beyond["params"].high < 0


def test_a_perfect_score_and_a_metric_to_minimise() -> None:
    scores, truth = tables(own=TRUTH)
    for metric, minimize in (("acc", False), ("loss", True)):
        own = audit(scores, truth, metric, minimize=minimize, resamples=20).scores[0]
        assert own.coefficients["kendall"].value == pytest.approx(1) and set(own.regret.values()) == {0}
        assert set(own.precision.values()) == {1}


def test_paired_intervals_are_narrower_than_the_scores_own() -> None:
    base = TRUTH + np.random.default_rng(3).normal(size=120)
    scores, truth = tables(score=base + 0.01 * np.random.default_rng(4).normal(size=120))
    truth = Table({"acc": TRUTH, "params": base}, NAMES)
    found = audit(scores, truth, resamples=100).scores[0]
    own, gap = found.coefficients["kendall"], found.beyond["params"]
    assert gap.high - gap.low < 0.2 * (own.high - own.low) and not gap.separated


def test_scores_that_are_nan_are_left_out_and_counted() -> None:
    holes = np.where(np.arange(120) % 4 == 0, nan, TRUTH)
    holes[int(TRUTH[:100].argmax())] = nan
    scores, truth = tables(holes=holes, flat=np.ones(120), none=np.full(120, nan))
    found = {score.name: score for score in audit(scores, truth, resamples=50).scores}
    there = ~np.isnan(holes[:100])
    assert found["holes"].missing == int((~there).sum()) and found["holes"].count == int(there.sum())
    assert found["holes"].coefficients["kendall"].value == pytest.approx(1)
    # The best subnet has no score, so it cannot be chosen: that is a regret.
    lost = TRUTH[:100].max() - TRUTH[:100][there].max()
    assert found["holes"].regret[1] == pytest.approx(lost) and lost > 0
    # The baseline is judged on the same subnets in the comparison.
    params = truth.metrics["params"][:100][there]
    gap = 1 - stats.kendalltau(params, TRUTH[:100][there]).statistic
    assert found["holes"].beyond["params"].value == pytest.approx(gap)
    assert isnan(found["flat"].coefficients["kendall"].value) and found["none"].count == 0
    text = json.dumps(audit(scores, truth, resamples=5).to_json(), allow_nan=False)
    assert json.loads(text)["scores"][1]["kendall"]["value"] is None


def test_subnets_whose_truth_is_unknown_do_not_count() -> None:
    scores, _ = tables(own=TRUTH)
    half = Table({"acc": np.where(np.arange(120) < 60, TRUTH, nan)}, NAMES)
    found = audit(scores, half, resamples=5)
    assert (found.subnets, found.unmatched) == (60, 40)
    assert found.missing_baselines == ("params", "flops")


def test_baselines_come_from_the_scores_or_are_given() -> None:
    scores, _ = tables(own=TRUTH, flops=-TRUTH)
    found = audit(scores, Table({"acc": TRUTH}, NAMES), costs={"params": TRUTH[: len(scores)]}, resamples=5)
    assert [score.name for score in found.scores] == ["own", "params", "flops"] and not found.missing_baselines
    assert found.scores[2].coefficients["kendall"].value == pytest.approx(-1)


def test_the_seed_decides_the_intervals() -> None:
    scores, truth = tables(noisy=TRUTH + np.random.default_rng(2).normal(size=120))
    results = [audit(scores, truth, resamples=30, seed=seed).to_json() for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


def test_subnets_are_matched_by_name_then_json_then_translation() -> None:
    network = Named()
    space = Supernet(network).space
    subnets = [Subnet({"a": a, "b": b}) for a in (1, 2) for b in (1, 2, 3)]
    named = Table({}, [f"{one['a']}x{one['b']}" for one in subnets])
    plain, both = Table({}, subnets=subnets[::-1]), Table({}, named.names, subnets)
    assert [rows.tolist() for rows in match(named, both)] == [[0, 1, 2, 3, 4, 5]] * 2
    assert [rows.tolist() for rows in match(plain, both)] == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    assert [rows.tolist() for rows in match(plain, named, network, space)] == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    with pytest.raises(InputError, match=r"no subnet in common.*\{\"a\":2,\"b\":3\} there and '1x1' here.*--space"):
        match(plain, named)


def test_refusals() -> None:
    scores, truth = tables(own=TRUTH)
    few = scores.rows([0, 1, 2, 3])
    with pytest.raises(InputError, match=r"share 4 subnets whose 'acc' is known\. At least 5 are needed"):
        audit(few, truth)
    with pytest.raises(InputError, match="unknown metric of the table 'ac'"):
        audit(scores, truth, "ac")
    with pytest.raises(InputError, match="0 resamples were asked for"):
        audit(scores, truth, resamples=0)
    with pytest.raises(InputError, match="the best 0 of 100 subnets"):
        audit(scores, truth, top=[0], resamples=1)
    with pytest.raises(InputError, match=r"best 101 scores was asked for \(top\), and 100 subnets are compared"):
        audit(scores, truth, top=[1, 101], resamples=1)
    assert list(audit(scores.rows(np.arange(9)), truth, resamples=1).scores[0].regret) == [1]
    assert list(audit(scores, truth, resamples=1).scores[0].regret) == [1, 10]


def test_consistency_of_two_measurements() -> None:
    noise = np.random.default_rng(5).normal(size=(2, 120))
    found = consistency(TRUTH + 0.1 * noise[0], TRUTH + 0.1 * noise[1], resamples=100)
    assert 0.85 < found.low < found.value < found.high < 1
    assert found.value == pytest.approx(stats.kendalltau(TRUTH + 0.1 * noise[0], TRUTH + 0.1 * noise[1]).statistic)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("NASQ_DATA"), reason="set NASQ_DATA to the directory of the public data sets")
def test_published_correlations_of_published_scores() -> None:
    """Spearman of the proxies that NASLib published, within 0.05 of the values that ZiCo (Table 3) gives for all cells."""
    folder = Path(os.environ["NASQ_DATA"]) / "tables"
    truth = import_table("nas-bench-201", folder / "nas_bench_201_cifar10.csv.gz")
    text = gzip.decompress((folder / "nas_bench_201_cifar10_published_proxies.csv.gz").read_bytes()).decode()
    raw = Table.parse(text, "proxies", names="nb201_index", skip=("naslib_ops",))
    scores = Table(raw.metrics, [truth.names[int(index)] for index in raw.names])
    found = {one.name: one for one in audit(scores, truth, "cifar10_test_200", resamples=20).scores}
    published = {"grad_norm": 0.63, "snip": 0.63, "fisher": 0.55, "synflow": 0.73, "nwot": 0.77, "params": 0.75}
    for name, value in published.items():
        assert found[name].coefficients["spearman"].value == pytest.approx(value, abs=0.05), name

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nasq.ranking.table import Table
from tests.run.tiny import Call, refused


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Scores and the truth of 13 networks of NAS-Bench-Macro, the latter as it was published."""
    rng = np.random.default_rng(0)
    names = ["".join(map(str, rng.integers(3, size=8))) for _ in range(12)] + ["22212220"]
    truth = rng.normal(85, 3, size=13)
    rows = {
        name: {"test_acc": [value] * 3, "mean_acc": value, "std": 0.0, "params": 1000 + index, "flops": 2000}
        for index, (name, value) in enumerate(zip(names, truth.tolist(), strict=True))
    }
    (tmp_path / "official.json").write_text(json.dumps(rows))
    Table({"good": truth, "noise": rng.normal(size=13)}, names).write(tmp_path / "scores.csv")
    return tmp_path / "official.json", tmp_path / "scores.csv"


def test_a_table_is_imported_and_scores_are_audited(files: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    official, scores = files
    table = tmp_path / "new" / "table.csv"
    done = call("table", "import", "nas-bench-macro", official, "--out", table)
    assert done.code == 0 and "subnets          13" in done.out and "mean_acc" in done.out
    assert len(Table.read(table)) == 13
    shown = call("audit", scores, "--table", table, "--metric", "mean_acc", "--resamples", 50)
    assert shown.code == 0 and "13 subnets against mean_acc" in shown.out
    assert "good: Kendall above params" in shown.err and "1.000 [1.00, 1.00]" in shown.out
    found = json.loads(call("audit", scores, "--table", table, "--top", 3, "--resamples", 20, "--json").out)
    assert [score["score"] for score in found["scores"]] == ["good", "noise", "params", "flops"]
    assert found["scores"][0]["kendall"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert found["scores"][0]["regret"] == {"3": 0.0} and found["scores"][3]["kendall"]["value"] is None
    assert found["metric"] == "mean_acc" and found["missing_baselines"] == []


def test_several_files_are_seeds_and_make_a_page(files: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    _, scores = files
    read = Table.read(scores)
    Table({"acc": read.metrics["good"]}, read.names).write(tmp_path / "table.csv")
    second = tmp_path / "second.csv"
    Table({"good": -read.metrics["good"], "noise": read.metrics["noise"]}, read.names).write(second)
    page = tmp_path / "page.html"
    common = ("--table", tmp_path / "table.csv", "--resamples", 5)
    done = call("audit", scores, second, *common, "--html", page)
    assert done.code == 0 and "over 2 seeds" in done.out and "0.000 ± 1.414" in done.out
    assert page.read_text().count("<figure>") == 2
    found = json.loads(call("audit", scores, second, *common, "--json").out)
    assert found["seeds"] == 2 and found["mean"]["good"]["kendall"] == 0
    Table({"better": read.metrics["good"]}, read.names).write(second)
    refused(call("audit", scores, second, *common), "file 1 has good, noise", "file 2 has better")


def test_the_space_counts_the_baselines(files: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    _, scores = files
    read = Table.read(scores)
    Table({"acc": read.metrics["good"]}, read.names).write(tmp_path / "table.csv")
    without = call("audit", scores, "--table", tmp_path / "table.csv", "--resamples", 5)
    assert "no params and no flops to compare with: name the search space, --space" in without.err
    done = call(
        "audit", scores, "--table", tmp_path / "table.csv", "--space", "nas_bench_macro", "--resamples", 5, "--json"
    )
    found = json.loads(done.out)
    assert [score["score"] for score in found["scores"]] == ["good", "noise", "params", "flops"]
    assert all(set(score["beyond"]) == {"params", "flops"} for score in found["scores"][:2])


def test_bad_input_is_one_line_and_exit_code_2(files: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    official, scores = files
    out = tmp_path / "out.csv"
    refused(
        call("table", "import", "nasbench", official, "--out", out), "unknown kind of table 'nasbench'", "nas-bench-101"
    )
    refused(call("table", "import", "nas-bench-201", scores, "--out", out), "has no column 'arch_str'")
    refused(call("table", "import", "csv", tmp_path / "no.csv", "--out", out), "no.csv is missing")
    assert not out.exists()
    refused(call("audit", scores, "--table", tmp_path / "no.csv"), "no.csv is missing")
    refused(call("audit", scores, "--table", scores, "--metric", "god"), "unknown metric", "Did you mean 'good'?")
    refused(call("audit", scores, "--table", scores, "--space", "nas_bench_micro"), "unknown search space")
    (tmp_path / "other.csv").write_text("name,acc\nx,1\n")
    refused(call("audit", scores, "--table", tmp_path / "other.csv"), "no subnet in common", "'x' here")
    refused(call("audit", tmp_path / "other.csv", "--table", scores, "--space", "nas_bench_macro"),
            "row 1 of", "is not in the space: 'x' is no NAS-Bench-Macro network")  # fmt: skip

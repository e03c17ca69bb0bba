"""``nasq score``: files that are valid at any moment, kills, shares, selections and refusals."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nasq.cli.main import main
from nasq.errors import ArtifactError, InputError
from nasq.ranking import Table
from nasq.run.score import ScoreJob, run_score
from nasq.run.score_file import ScoreFile, read_nodes, read_scores
from nasq.space import Subnet

NASQ = [sys.executable, "-c", "from nasq.cli.main import main; main()"]
BASE = ["score", "digits_mobile", "--proxy", "gradsign", "--proxy", "params", "--batch", "8", "--seed", "3"]


def job(out: Path, **changes: Any) -> ScoreJob:
    options = {"proxies": ("params", "grad_norm"), "count": 3, "batch": 8, **changes}
    return ScoreJob("digits_mobile", out=out, **options)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_file_of_scores(tmp_path: Path) -> None:
    told = []
    facts = run_score(job(tmp_path / "s.csv", nodes=True), lambda done, total: told.append((done, total)))
    assert facts["complete"] and facts["rows"] == 3 and facts["not_finite"] == {} and told == [(i, 3) for i in range(4)]
    found, columns = read_scores(tmp_path / "s.csv")
    assert columns == ["params", "grad_norm"]
    for row in found:
        assert Subnet.from_json(row["subnet"]).id == row["subnet_id"] and float(row["params"]) > 1000
    nodes = read_nodes(tmp_path / "s.csv")
    assert list(nodes) == [row["subnet_id"] for row in found]
    first = nodes[found[0]["subnet_id"]]
    assert sum(one[0] for one in first.values()) == pytest.approx(float(found[0]["grad_norm"]), rel=1e-3)
    assert Table.read(tmp_path / "s.csv").metrics["params"].tolist() == [float(row["params"]) for row in found]


def test_the_same_settings_go_on_and_others_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    run_score(job(out, count=2))
    few = rows(out)
    run_score(job(out, count=4))
    assert rows(out)[:2] == few and len({row["subnet_id"] for row in rows(out)}) == 4
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        run_score(job(out, seed=1))
    with pytest.raises(InputError, match="proxies is"):
        run_score(job(out, proxies=("params",)))
    (tmp_path / "s.csv.json").unlink()
    with pytest.raises(InputError, match=r"s.csv.json does not, so what its scores were made with is unknown"):
        run_score(job(out))


def test_a_line_cut_short_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    run_score(job(out))
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    run_score(job(out))
    assert out.read_bytes() == whole


def test_combined_columns_are_filled_in_at_the_end(tmp_path: Path) -> None:
    run_score(job(tmp_path / "s.csv", proxies=("vote",)))
    found = rows(tmp_path / "s.csv")
    assert list(found[0])[3:] == ["synflow", "jacov", "snip", "vote"]
    assert sum(float(row["vote"]) for row in found) == 3


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_subnets_from_a_file(tmp_path: Path, kind: str) -> None:
    run_score(job(tmp_path / "a.csv"))
    texts = [row["subnet"] for row in rows(tmp_path / "a.csv")][:2]
    listed = tmp_path / "subnets"
    if kind == "csv":
        with listed.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["subnet"], *([text] for text in texts)])
    else:
        listed.write_text("\n".join([*texts, texts[0]]))
    run_score(job(tmp_path / "b.csv", subnets=listed))
    assert rows(tmp_path / "b.csv") == rows(tmp_path / "a.csv")[:2]


def test_official_names(tmp_path: Path) -> None:
    cell = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|"
    (tmp_path / "names").write_text(cell)
    run_score(ScoreJob("nas_bench_201", ("params",), tmp_path / "s.csv", subnets=tmp_path / "names", batch=1))
    (row,) = rows(tmp_path / "s.csv")
    assert row["name"] == cell and float(row["params"]) == pytest.approx(73306 + 243040, abs=10)


def test_bits_change_the_scores(tmp_path: Path) -> None:
    """Every proxy that looks at gradients sees a quantized subnet through its quantizers."""
    names = ("gradsign", "grad_norm", "snip", "plain", "grasp", "fisher", "jacov", "epe_nas", "zico", "ntk", "synflow")
    bits = {"weight_bits": (2, 8), "activation_bits": (2, 8)}
    from nasq.run.score import _prepare

    space = _prepare(job(tmp_path / "x.csv", **bits)).supernet.space
    subnets = [space.smallest(), space.smallest().updated({name: 8 for name in space.names if name.endswith("_bits")})]
    (tmp_path / "subnets").write_text("\n".join(one.to_json() for one in subnets))
    facts = run_score(job(tmp_path / "s.csv", proxies=names, subnets=tmp_path / "subnets", batch=16, **bits))
    assert facts["not_finite"] == {}
    low, high = rows(tmp_path / "s.csv")
    for name in names:
        assert float(low[name]) != float(high[name]), name


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight.csv", tmp_path / "killed.csv"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*NASQ, *BASE, "--count", "12", "--quiet", "--out"]
    subprocess.run([*command, str(straight)], check=True, env=environment)
    process = subprocess.Popen([*command, str(killed)], env=environment)
    while not killed.exists() or killed.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = killed.read_bytes()
    assert before.count(b"\n") < 13, "it was over before it was killed"
    subprocess.run([*command, str(killed)], check=True, env=environment)
    assert killed.read_bytes() == straight.read_bytes() and killed.read_bytes().startswith(
        before[: before.rfind(b"\n")]
    )


@pytest.mark.slow
@pytest.mark.long
def test_several_processes_share_the_rows(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    subprocess.run([*NASQ, *BASE, "--count", "6", "--quiet", "--out", str(one)], check=True)
    subprocess.run([*NASQ, *BASE, "--count", "6", "--quiet", "--workers", "2", "--out", str(two)], check=True)
    assert two.read_bytes() == one.read_bytes()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s.csv"
    monkeypatch.setattr(sys, "argv", ["nasq", *BASE, "--count", "2", "--json", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"] == 2 and "2/2 subnets" in captured.err


def test_values_that_are_not_finite_are_kept_and_counted(tmp_path: Path) -> None:
    file = ScoreFile(tmp_path / "s.csv", ["a", "b"], {})
    file.open()
    file.add("id", "", "{}", {"a": math.nan, "b": -math.inf})
    assert rows(tmp_path / "s.csv") == [{"subnet_id": "id", "name": "", "subnet": "{}", "a": "nan", "b": "-inf"}]


def test_a_file_whose_first_score_failed_takes_other_settings(tmp_path: Path) -> None:
    """Whoever is told to add --output after the first subnet failed gives the same --out again."""
    path = tmp_path / "s.csv"
    ScoreFile(path, ["a"], {"output": None}).open()
    other = ScoreFile(path, ["a", "b"], {"output": 1})
    assert other.open() == {}
    other.add("id", "", "{}", {"a": 1.0, "b": 2.0})
    assert list(other.open()) == ["id"]
    with pytest.raises(InputError, match="other settings: output is 1 there and 0 here"):
        ScoreFile(path, ["a", "b"], {"output": 0}).open()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"count": None}, "holds 979,776 subnets; .* Give --count N"), ({"count": 0}, "--count is 0"),
     ({"batch": 9999}, "batch is 9999. Allowed: 1 to"), ({"proxies": ()}, "nothing to score with"),
     ({"proxies": ("synflo",)}, "Did you mean 'synflow'"), ({"weight_bits": (2,)}, "options for both"),
     ({"data": "cifar10", "data_root": Path("/nowhere")}, "cifar10"),
     ({"subnets": Path("/nowhere/x")}, "cannot be read")],
    ids=["whole", "count", "batch", "none", "unknown", "bits", "data", "subnets"],
)  # fmt: skip
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_score(job(tmp_path / "s.csv", **changes))


def test_files_that_are_no_scores(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArtifactError, match="is no file of scores"):
        read_scores(tmp_path / "s.csv")
    with pytest.raises(ArtifactError, match=r"no node-wise statistics beside it .*--nodes"):
        read_nodes(tmp_path / "s.csv")
    with pytest.raises(ArtifactError, match=r"no\.csv'\. 'nasq score' makes one"):
        read_scores(tmp_path / "no.csv")
    with pytest.raises(InputError, match=r"is a directory, and scores go to a file\. Give another: --out"):
        run_score(job(tmp_path))

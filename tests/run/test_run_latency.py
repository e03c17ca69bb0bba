"""`nasq bench --table`, `--end-to-end`, `--baseline`, and the objective that a table predicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nasq.deploy import latency_table
from nasq.deploy.latency_table import LatencyTable
from nasq.errors import ArtifactError, InputError
from nasq.run.assemble import assemble
from nasq.run.config import load_config
from nasq.run.directory import RunDirectory
from nasq.run.flow import open_workshop, prepare
from nasq.run.latency import TABLE, predicted_latency
from nasq.run.search import Evaluation, require_objectives
from tests.run.tiny import Call, Run, refused


def test_a_table_is_made_and_predicts_an_objective(copied: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_table, "MOST", 20)
    done = call("bench", copied, "--table", "--subnets", "8", "--json")
    assert done.code == 0, done.err
    told, table = json.loads(done.out), LatencyTable.load(copied / TABLE)
    assert set(told["rows"]) == set(table.rows) and table.fit is not None and table.fit.held_out == 2
    run = RunDirectory.open(copied)
    workshop = open_workshop(run)
    evaluation, space = Evaluation(workshop), workshop.supernet.space
    milliseconds = predicted_latency(workshop, evaluation, copied / TABLE)
    assert milliseconds(space.largest()) == pytest.approx(milliseconds(space.largest()))
    table.batch = 7
    table.save(copied / "other.json")
    with pytest.raises(InputError, match=r"other\.json was made for batch 7, this run has 1.*nasq bench RUN --table"):
        predicted_latency(workshop, evaluation, copied / "other.json")


def test_the_objective_needs_a_table(finished: Run) -> None:
    objectives = "search.objectives=[accuracy, predicted_latency]"
    with pytest.raises(InputError, match=r"unknown objective 'predicted_latency'"):
        prepare(load_config(finished.config, None, [objectives]))
    config = load_config(finished.config, None, [objectives, "search.latency_table=somewhere.json"])
    require_objectives(assemble(config))
    with pytest.raises(
        ArtifactError, match=r"somewhere\.json is missing.*nasq bench RUN --table"
    ):  # before the training, not after it
        prepare(config)


def test_image_files_and_baselines(copied: Path, call: Call) -> None:
    done = call("bench", copied, "--end-to-end", "--json")
    assert done.code == 0, done.err
    assert [row["stage"] for row in json.loads(done.out)] == ["decode", "resize", "normalise", "run", "total"]
    former = json.loads((copied / "bench.json").read_text())
    quick = {**former, "rows": [{**row, "high": 1e-9, "median": 1e-9} for row in former["rows"]]}
    (copied / "quick.json").write_text(json.dumps(quick))
    done = call("bench", copied, "--baseline", copied / "quick.json", "--json")
    assert done.code == 1 and {row["verdict"] for row in json.loads(done.out)} == {"slower"}
    assert "## Latency" in (copied / "best" / "README.md").read_text()
    assert (copied / "best" / "README.md").read_text().count("## Latency") == 1
    before = (copied / "bench.json").read_bytes()
    refused(call("bench", copied, "--baseline", copied / "missing.json"), "missing.json is missing")
    refused(call("bench", copied, "--baseline", copied / "summary.json"), "is not a benchmark: it has no 'rows'")
    refused(call("bench", copied, "--baseline", copied / "bench.json", "--tolerance", -1), "the tolerance is -1")
    assert (copied / "bench.json").read_bytes() == before  # refused before anything was timed

"""One whole run through the real command line, and what it leaves on disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.torch import load_file

from nasq.data import load as load_data
from nasq.deploy import bundle
from nasq.run.directory import RunDirectory
from tests.run.tiny import Call, Run, files, subnets

pytestmark = pytest.mark.timeout(300)


def test_json_is_all_there_is_on_stdout_and_quiet_means_quiet(finished: Run) -> None:
    facts = json.loads(finished.done.out)
    assert {"subnet", "test_accuracy", "validation_accuracy", "weights_bytes", "onnx_bytes", "latency_ms"} <= set(facts)
    assert facts["best"] == str(finished.directory / "best") and 0 <= facts["test_accuracy"] <= 1
    assert finished.done.err == ""
    assert json.loads((finished.directory / "summary.json").read_text()) == facts


def test_a_run_directory_holds_what_the_documentation_says(finished: Run) -> None:
    run = finished.directory
    for name in ("config.yaml", "events.jsonl", "supernet/supernet.json", "search/subnets.csv", "search/state.json",
                 "search/explanation.json", "search/front.json", "exports/index.json", "best/model.onnx",
                 "best/model.safetensors", "best/README.md", "bench.json", "summary.json", "report.html"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    assert not [name for name in files(run) if ".tmp" in name or "nasq-new" in name or "nasq-old" in name]
    assert json.loads(finished.done.out)["subnet"] in (run / "report.html").read_text()


def test_every_evaluated_subnet_has_a_row_and_keeps_the_constraint(finished: Run) -> None:
    rows = subnets(finished.directory)
    told = [event for event in RunDirectory.open(finished.directory).events() if event["event"] == "search.evaluated"]
    assert len(rows) == 8 == len({row["id"] for row in rows})
    assert [event["subnet"] for event in told] == [row["id"] for row in rows]
    assert all(12_000 <= float(row["bytes"]) <= 60_000 for row in rows)


def test_search_accuracy_is_that_of_the_exported_file_exactly(finished: Run) -> None:
    data = load_data("digits", validation=1100)
    images = data.normalise(data.validation.images).numpy()
    labels = data.validation.labels.numpy()
    searched = {row["id"]: float(row["accuracy"]) for row in subnets(finished.directory)}
    exported = [path for path in (finished.directory / "exports").iterdir() if path.is_dir()]
    assert len(exported) == len(json.loads((finished.directory / "exports" / "index.json").read_text())["subnets"])
    assert len(exported) > 1
    for directory in [*exported, finished.directory / "best"]:
        subnet = bundle.read(directory).meta["subnet"]
        found = next(row["id"] for row in subnets(finished.directory) if json.loads(row["subnet"]) == subnet)
        # The shipped file, alone: no nasq code between it and the figure.
        session = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
        (outputs,) = session.run(["output"], {session.get_inputs()[0].name: images})
        assert float((np.argmax(outputs, axis=1) == labels).mean()) == searched[found], directory


def test_the_best_bundle_is_whole_and_the_best(finished: Run, call: Call) -> None:
    best = finished.directory / "best"
    accuracies = [float(row["accuracy"]) for row in subnets(finished.directory)]
    facts = json.loads(finished.done.out)
    assert facts["validation_accuracy"] == max(accuracies)
    assert bundle.read(best).target == "onnxruntime-cpu"
    done = call("verify", best, "--json")
    assert done.code == 0 and json.loads(done.out)["differing"] == 0


def test_resume_shows_the_same_facts_without_working_again(finished: Run, copied: Path, call: Call) -> None:
    before = files(copied)
    done = call("run", finished.config, "--out", copied, "--resume", "--json")
    assert done.code == 0
    facts, now = json.loads(finished.done.out), json.loads(done.out)
    moved = {"best": str(copied / "best"), "report": str(copied / "report.html")}
    assert now == {**facts, **moved}
    new = RunDirectory.open(copied).events()[len(RunDirectory.open(finished.directory).events()) :]
    assert {event["stage"] for event in new} <= {"report"}
    changed = {name for name, content in files(copied).items() if before.get(name) != content}
    assert changed <= {"events.jsonl", "summary.json", "report.html"}


def test_resume_without_a_configuration_takes_the_one_of_the_run(finished: Run, copied: Path, call: Call) -> None:
    done = call("run", "--out", copied, "--resume", "--json", "--quiet")
    assert done.code == 0, done.err
    assert json.loads(done.out)["subnet"] == json.loads(finished.done.out)["subnet"]


def test_stages_on_their_own_give_what_the_flow_gave(finished: Run, copied: Path, call: Call) -> None:
    for path in [copied / "bench.json", copied / "exports" / "index.json", copied / "search" / "front.json"]:
        path.unlink()
    assert call("train", copied, "--quiet") == (0, "", "")
    assert call("search", copied, "--json").code == 0
    rows = json.loads(call("export", copied, "--json").out)
    assert [row["subnet"] for row in rows] == [
        one["id"] for one in json.loads((finished.directory / "exports" / "index.json").read_text())["subnets"]
    ]
    assert all(row["differing"] == 0 for row in rows)
    assert {row["candidate"] for row in json.loads(call("bench", copied, "--json").out)["rows"]} >= {"onnxruntime int8"}
    assert json.loads(call("report", copied, "--json").out) == {"report": str(copied / "report.html")}
    assert subnets(copied) == subnets(finished.directory)
    weights = [load_file(run / "best" / "model.safetensors") for run in (copied, finished.directory)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_the_ending_says_what_was_found_and_where(finished: Run, copied: Path, call: Call) -> None:
    done = call("run", finished.config, "--out", copied, "--resume")
    facts = json.loads(finished.done.out)
    assert facts["subnet"] in done.out and f"{100 * facts['test_accuracy']:.2f} %" in done.out
    assert f"{facts['weights_bytes'] / 1000:.1f} kB" in done.out and re.search(r"latency +\d+\.\d+ ms", done.out)
    assert str(copied / "best") in done.out and str(copied / "report.html") in done.out


def test_latency_can_be_an_objective(copied: Path, call: Call) -> None:
    shutil.rmtree(copied / "search")
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub("objectives:\n(  - .*\n)+", "objectives: [accuracy, latency]\n", config))
    rows = json.loads(call("search", copied, "--json", "--quiet").out)["front"]
    assert rows and all(set(row) == {"subnet", "accuracy", "latency"} for row in rows)
    assert all(float(row["latency"]) > 0 for row in subnets(copied)) and len(subnets(copied)) == 8

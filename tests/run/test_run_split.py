"""A run whose supernet is split: stages one by one, from training to bundles that pass the gate."""

from __future__ import annotations

from pathlib import Path

import pytest

from nasq.files import read_json
from nasq.run.directory import RunDirectory
from nasq.run.flow import open_workshop
from nasq.run.search import Evaluation, search_results
from nasq.training.splitting import Forest
from tests.run.tiny import CONFIG, Call, refused, subnets

SPLIT = """
split: {epochs: [1], repetitions: 2, batch_size: 16, choices: [stem.width, stage2.width]}
"""


def _config(path: Path, extra: str) -> Path:
    text = CONFIG.replace("train: {epochs: 2,", "train: {epochs: 2, sampler: importance, data_sampler: importance,")
    path.write_text(text.replace("evaluations: 8", "evaluations: 6").replace("export: 3", "export: 2") + extra)
    return path


def test_a_forest_is_searched_and_exported_as_one_space(tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    config = _config(tmp_path / "split.yaml", SPLIT)
    done = call("run", config, "--out", run, "--json")
    assert done.code == 0, done.err

    workshop = open_workshop(RunDirectory.open(run))
    forest = workshop.supernet
    assert isinstance(forest, Forest) and len(forest.supernets) == 2
    (split,) = read_json(run / "forest" / "growth" / "splits.json")["splits"].values()
    assert split["choice"] in ("stem.width", "stage2.width")
    assert len(subnets(run)) == 6
    # What the search wrote is what the leaf of each subnet gives, loaded afresh; the files passed the gate with it.
    evaluation = Evaluation(workshop)
    _, records = search_results(RunDirectory.open(run))
    for record in records[:3]:
        assert evaluation.accuracy(record.subnet) == record.values["accuracy"]
    assert all(read_json(path)["passed"] for path in (run / "exports").glob("*/parity.json"))
    assert len(list((run / "exports").glob("*/parity.json"))) == 2

    # Each leaf has a curve of its own, behind the one it grew from.
    page = (run / "report.html").read_text()
    assert "random, leaf 0" in page and "random, leaf 1" in page
    assert f"split at {split['choice']}: " in done.err

    # The finished run does nothing again.
    before = (run / "forest" / "forest.json").stat().st_mtime_ns
    assert call("run", config, "--out", run, "--resume", "--quiet", "--json").code == 0
    assert (run / "forest" / "forest.json").stat().st_mtime_ns == before


def test_a_run_without_a_split_says_how_to_plan_one(copied: Path, call: Call) -> None:
    refused(call("split", copied), "plans no split", "--set split.epochs=")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("split: {epochs: [1]}\ntrain_inside_constraints: true\n", ["train_inside_constraints", "split.epochs"]),
        ("split: {epochs: [2]}\n", ["last split is after epoch 2 of 2"]),
        ("split: {epochs: [1], choices: [stem.wide]}\n", ["'stem.wide'"]),
        ("split: {epochs: [1], groups: 1}\n", ["'split.groups' is 1"]),
        ("split: {epochs: [1], choices: [stem.width], groups: 3}\nSANDWICH", ["'sandwich'", "uniform"]),
    ],
)
def test_plans_that_cannot_work_are_refused_before_training(
    tmp_path: Path, call: Call, extra: str, words: list[str]
) -> None:
    config = _config(tmp_path / "bad.yaml", extra.replace("SANDWICH", ""))
    if "SANDWICH" in extra:
        config.write_text(config.read_text().replace("sampler: importance, data", "sampler: sandwich, data"))
    done = call("run", config, "--out", tmp_path / "run", "--quiet")
    refused(done, *words)
    assert not (tmp_path / "run" / "supernet" / "calibrated").exists()

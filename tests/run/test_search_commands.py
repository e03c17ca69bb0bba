"""``nasq search``, ``nasq worker`` and ``nasq pick`` on a run that is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import optuna
import pytest

from nasq.files import read_json, write_json
from nasq.run.assemble import assemble
from nasq.run.directory import RunDirectory
from nasq.run.search import Evaluation, evaluator_of
from nasq.search import hypervolumes, load_results, pick_knee
from nasq.search.storage import open_storage
from tests.run.tiny import Call, Run, refused, subnets


def begin_anew(run: Path) -> Path:
    """Takes the search of a copied run away."""
    shutil.rmtree(run / "search")
    return run


def test_the_journal_of_a_run_is_an_optuna_study(finished: Run) -> None:
    study = optuna.load_study(study_name="run", storage=open_storage(finished.directory / "search" / "journal.log"))
    rows = subnets(finished.directory)
    assert [trial.user_attrs["id"] for trial in study.trials] == [row["id"] for row in rows]
    for trial, row in zip(study.trials, rows, strict=True):
        assert trial.values == [float(row[name]) for name in ("accuracy", "bytes", "average_activation_bits")]
        assert trial.user_attrs["bytes <= 60 kB"] == float(row["bytes"]) and trial.user_attrs["bytes >= 12 kB"] >= 12000
        assert trial.user_attrs["bitops"] == float(row["bitops"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.long
def test_two_workers_find_what_one_process_found(finished: Run, copied: Path, tmp_path: Path, call: Call) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    done = call("search", begin_anew(copied), "--workers", 2, "--storage", url, "--study", "mine", "--json")
    assert done.code == 0, done.err

    def key(row: dict[str, str]) -> str:
        return row["id"]

    assert sorted(subnets(copied), key=key) == sorted(subnets(finished.directory), key=key)
    assert (copied / "search" / "front.json").exists() and (copied / "best" / "model.onnx").exists()
    trials = optuna.load_study(study_name="mine", storage=open_storage(url)).trials
    workers = [trial.user_attrs["result"]["worker"] for trial in trials]
    assert len(trials) == 8 and all(name.startswith("worker:") for name in workers)
    # Somebody who comes when everything is done has nothing to do; a worker with other weights is refused.
    late = call("worker", copied, "--storage", url, "--json")
    assert late.code == 0 and json.loads(late.out) == {"study": "mine", "evaluated": 0}
    other = Path(shutil.copytree(copied, tmp_path / "other"))
    (other / "supernet" / "weights.safetensors").write_bytes(b"x")
    refused(call("worker", other, "--storage", url), "weights.safetensors")


def test_workers_say_what_they_need(finished: Run, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NASQ_STORAGE", raising=False)
    refused(call("worker"), "--storage URL, or the directory")
    refused(call("worker", "--storage", tmp_path / "log"), "holds no study. Begin one", "nasq search RUN --storage URL")
    refused(call("worker", tmp_path), "holds no run")
    refused(
        call("worker", "--storage", "redis://me:secret@host/1"), "unknown kind of database", "redis://me:***@host/1"
    )
    refused(call("search", finished.directory, "--limit", "bytes<=1k"), "--explain")


def test_constraints_that_nothing_keeps_are_explained_with_code_2(finished: Run, call: Call) -> None:
    done = call("search", finished.directory, "--explain", "--limit", "bytes<=100")
    assert done.code == 2
    assert "bytes <= 100 B: 0 % survive" in done.out and "nearest found by descending" in done.out
    assert "the closest subnets:" in done.out
    found = json.loads(call("search", finished.directory, "--explain", "--limit", "bytes<=30k", "--json").out)
    assert [one["constraint"] for one in found["constraints"]] == ["bytes <= 30 kB"]
    refused(call("search", finished.directory, "--explain", "--limit", "byts<=30k"), "Did you mean 'bytes'?")


def test_pick_knows_the_knee_and_every_cost(finished: Run, call: Call) -> None:
    goals, records = load_results(finished.directory / "search")
    wanted = pick_knee(records, goals)
    assert json.loads(call("pick", finished.directory, "--knee", "--json").out)["id"] == wanted.subnet.id
    least = min(record.values["macs"] for record in records)
    found = json.loads(call("pick", finished.directory, "--max-macs", least, "--json").out)
    assert found["values"]["macs"] == least
    refused(call("pick", finished.directory, "--max-latency-ms", "5"), "did not measure latency", "search.objectives")
    volumes = hypervolumes(records, goals)
    assert volumes == sorted(volumes) and len(volumes) == len(records)


@pytest.mark.parametrize(("name", "direction"), [("bytes", "minimize"), ("compression", "maximize")])
def test_costs_are_minimized_and_compression_is_maximized(finished: Run, name: str, direction: str) -> None:
    config = RunDirectory.open(finished.directory).config()
    config = config.model_copy(update={"search": config.search.model_copy(update={"objectives": (name,)})})
    workshop = assemble(config)
    (goal,), _ = evaluator_of(workshop, Evaluation(workshop))
    assert (goal.name, goal.direction) == (name, direction)


def test_a_search_begins_with_the_front_of_another_run(finished: Run, copied: Path, call: Call) -> None:
    _, records = load_results(finished.directory / "search")
    begin_anew(copied)
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("evaluations: 8", "evaluations: 4"))
    done = call("search", copied, "--warm-start", finished.directory, "--json")
    assert done.code == 0, done.err
    kept = read_json(copied / "search" / "warm_start.json")
    first = [json.loads(row["subnet"]) for row in subnets(copied)]
    assert kept["run"] == str(finished.directory) and first == kept["subnets"][:4]
    assert {tuple(sorted(one.items())) for one in kept["subnets"]} <= {tuple(sorted(r.subnet.items())) for r in records}
    # It goes on as it began, with the option and without it; from another front it does not.
    assert call("search", copied, "--json").code == 0
    assert call("search", copied, "--warm-start", finished.directory, "--json").code == 0
    write_json(copied / "search" / "warm_start.json", {"run": "elsewhere", "subnets": kept["subnets"][:1]})
    refused(call("search", copied, "--warm-start", finished.directory), "began from 1 subnets of elsewhere")

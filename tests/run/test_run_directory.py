from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nasq.errors import ArtifactError, InputError, NasqError
from nasq.run.config import RunConfig, load_config
from nasq.run.directory import RunDirectory

CONFIG = load_config(preset="digits")


def other(**changes: object) -> RunConfig:
    return CONFIG.model_copy(update=changes)


def test_nothing_is_written_before_the_lock_is_held(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "run", CONFIG, resume=False)
    assert not (tmp_path / "a").exists()
    with run:
        assert run.config() == CONFIG and run.events() == []
    assert RunDirectory.open(tmp_path / "a" / "run").config() == CONFIG


def test_events_come_back_in_order_and_are_passed_on(tmp_path: Path) -> None:
    heard: list[object] = []
    with RunDirectory.create(tmp_path / "run", CONFIG, False, heard.append) as run:
        for number in range(3):
            run.tell({"event": "x", "number": number, "path": tmp_path})
        assert [event["number"] for event in run.events()] == [0, 1, 2]
        assert all(event["path"] == str(tmp_path) and event["time"] > 0 for event in run.events())
    assert len(heard) == 3


@pytest.mark.parametrize("torn", [b'{"event": "y", "val', b'{"event": {"a": 1}', b'{"', b"\xff\xfe}"])
def test_a_torn_last_line_is_dropped_and_never_glued_to_the_next(torn: bytes, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG, False) as run:
        run.tell({"event": "x"})
    log = tmp_path / "run" / "events.jsonl"
    log.write_bytes(log.read_bytes() + torn)
    assert [event["event"] for event in RunDirectory.open(tmp_path / "run").events()] == ["x"]
    with RunDirectory.open(tmp_path / "run") as run:
        run.tell({"event": "z"})
        assert [event["event"] for event in run.events()] == ["x", "z"]
    assert log.read_bytes().count(b"\n") == 2


def test_another_damaged_line_is_named(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG, False) as run:
        run.tell({"event": "x"})
    log = tmp_path / "run" / "events.jsonl"
    log.write_bytes(b"{broken\n" + log.read_bytes())
    with pytest.raises(ArtifactError, match=r"events.jsonl is damaged in line 1\. Remove that line"):
        RunDirectory.open(tmp_path / "run").events()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.create(path, CONFIG, False):
        with pytest.raises(InputError, match="another process is working in"), RunDirectory.open(path):
            pytest.fail("two processes had the lock")
        code = (
            "import sys; from pathlib import Path; from nasq.run.directory import RunDirectory\n"
            "with RunDirectory.open(Path(sys.argv[1])): pass"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
        assert done.returncode != 0 and "another process is working in" in done.stderr
    with RunDirectory.open(path):
        pass  # the lock is free again


def test_two_processes_that_begin_at_once_do_not_mix_their_configurations(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = RunDirectory.create(path, CONFIG, False)
    second = RunDirectory.create(path, other(seed=7), False)
    with first, pytest.raises(InputError, match="another process"):
        second.__enter__()
    with pytest.raises(InputError, match="already holds a run"):
        second.__enter__()
    assert RunDirectory.open(path).config() == CONFIG
    with RunDirectory.open(path):
        pass  # the refused one holds no lock


def test_a_lock_alone_does_not_make_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # a process was killed between its lock and its configuration
    with RunDirectory.create(tmp_path / "run", CONFIG, False) as run:
        assert run.config() == CONFIG


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (other(seed=5), r"seed: 0 there, 5 here"),
        (other(search=CONFIG.search.model_copy(update={"evaluations": 3})), r"search.evaluations: \d+ there, 3 here"),
        (other(train={**CONFIG.train, "lr": 9.0}), r"train.lr: 0\.\d+ there, 9.0 here"),
        (other(warmup=None), r"warmup: \{.*\} there, None here"),
    ],
)
def test_another_configuration_is_refused_with_its_difference(config: RunConfig, match: str, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG, False):
        pass
    with pytest.raises(InputError, match=match):
        RunDirectory.create(tmp_path / "run", config, resume=True)
    with RunDirectory.create(tmp_path / "run", CONFIG, resume=True) as run:
        assert run.config() == CONFIG


def test_directories_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not empty and holds no run"):
        RunDirectory.create(tmp_path, CONFIG, False)
    with pytest.raises(InputError, match="is a file"):
        RunDirectory.create(tmp_path / "file", CONFIG, False)
    with pytest.raises(InputError, match=r"holds no run: config.yaml is missing. 'nasq run --out"):
        RunDirectory.open(tmp_path)
    with (
        pytest.raises(NasqError, match="cannot write in"),
        RunDirectory.create(tmp_path / "file" / "run", CONFIG, False),
    ):
        pytest.fail("a directory below a file")


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", CONFIG, False):
        pass
    (tmp_path / "run" / "config.yaml").write_text("seed: [")
    with pytest.raises(InputError, match=r"config\.yaml is not YAML in line 1"):
        RunDirectory.create(tmp_path / "run", CONFIG, resume=True)

"""A run that trains in several processes."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nasq.errors import InputError, TrainingError
from nasq.run.config import load_config
from nasq.run.directory import RunDirectory
from nasq.run.flow import prepare, stage
from nasq.run.ranks import _failure
from nasq.training import checkpoint
from tests.run.tiny import ENVIRONMENT, NASQ, Call, files

SETTINGS = [
    "data.validation=1200", "check_target=false", "threads=1", "warmup.epochs=1", "warmup.warmup_epochs=0",
    "warmup.bf16=false", "warmup.channels_last=false", "train.epochs=3", "train.warmup_epochs=0", "train.bf16=false",
    "train.channels_last=false", "quantization.calibration_images=64", "train.sampler=importance",
    "train.data_sampler=importance", "train.distill=0",
]  # fmt: skip


def test_a_process_that_died_is_named_and_errors_keep_their_kind(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    died = _failure(run, None, 1, 2, -9)
    assert isinstance(died, TrainingError) and "process 2 of 2 ended with code -9" in str(died)
    told = _failure(run, {"kind": "InputError", "message": "no"}, 0, 2, 2)
    assert isinstance(told, InputError) and str(told) == "no"
    assert type(_failure(run, {"kind": "choose_from_", "message": "odd"}, 0, 2, 1)).__name__ == "NasqError"


def _trained(path: Path, processes: int, *more: str) -> list[dict[str, Any]]:
    config = load_config(None, None, [*SETTINGS, f"processes={processes}", *more])
    seen: list[dict[str, Any]] = []
    with RunDirectory.create(path, config, resume=False, listener=lambda event: seen.append(dict(event))) as run:
        workshop = prepare(config)
        stage(run, workshop, "train")
        if config.split.epochs:
            stage(run, workshop, "split")
    return seen


def _weights(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(path).items() if name.endswith("weights.safetensors")}


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_processes_train_a_run(tmp_path: Path) -> None:
    seen = _trained(tmp_path / "two", 2)
    told = [(event["event"], event.get("phase"), event.get("epoch")) for event in seen if "train" in event["event"]]
    assert told == [
        ("train.start", "warmup", 0), ("train.epoch", "warmup", 1), ("train.calibrated", None, None),
        ("train.start", "quantized", 0), *(("train.epoch", "quantized", epoch) for epoch in (1, 2, 3)),
    ]  # fmt: skip
    assert {event["processes"] for event in seen if event["event"] == "train.start"} == {2}
    logged = RunDirectory.open(tmp_path / "two").events()
    assert [event["event"] for event in logged] == [event["event"] for event in seen]
    _trained(tmp_path / "again", 2)
    assert _weights(tmp_path / "two") == _weights(tmp_path / "again")
    # One process draws the same subnets and images; BatchNorm sees whole batches there, so weights differ.
    _trained(tmp_path / "one", 1)
    two, one = (checkpoint.load(tmp_path / name / "supernet" / "warmup" / "checkpoint")[0] for name in ("two", "one"))
    for stream in ("paths/generator", "data/generator", "augmentation"):
        assert torch.equal(two[f"state/{stream}"], one[f"state/{stream}"])
    assert _weights(tmp_path / "two") != _weights(tmp_path / "one")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("more", [["split.epochs=[1]", "split.repetitions=2", "split.choices=[stem.width]"], []])
def test_killed_they_end_and_go_on_with_the_same_bits(tmp_path: Path, more: list[str], call: Call) -> None:
    _trained(tmp_path / "straight", 2, *more)
    run, config = tmp_path / "killed", tmp_path / "config.yaml"
    config.write_text(load_config(None, None, [*SETTINGS, "processes=2", *more]).to_yaml())
    command = [NASQ, "run", str(config), "--out", str(run), "--quiet"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        events = RunDirectory(run).events() if run.exists() else []
        if any(event.get("phase") == "quantized" and event.get("epoch") == 1 for event in events):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 30
    while _ranks(run) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _ranks(run)
    for name in ("train", "split") if more else ("train",):
        done = call(name, run, "--quiet")
        assert done.code == 0, done.err
    assert _weights(run) == _weights(tmp_path / "straight")


def _ranks(run: Path) -> list[str]:
    """Command lines of processes that train this run."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if "nasq.run.rank" in line and str(run) in line]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_an_error_in_a_process_is_that_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss of subnet \w+ .* is (nan|inf)|a gradient is not finite after"):
        _trained(tmp_path / "nan", 2, "train.lr=1e30", "train.clip_norm=null")

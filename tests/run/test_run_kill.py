"""SIGKILL while training and while searching; afterwards the run ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nasq.run.directory import RunDirectory
from tests.run.tiny import Call, Run, start, subnets


def _wait(process: subprocess.Popen[str], run: Path, wanted: Mapping[str, Any]) -> None:
    """Until the run's log holds an event with these values."""
    while process.poll() is None:
        if run.exists() and any(wanted.items() <= event.items() for event in RunDirectory(run).events()):
            return
        time.sleep(0.03)
    pytest.fail(f"the run ended before {wanted}: {process.communicate()[1]}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_while_training_and_while_searching(finished: Run, tmp_path: Path, call: Call) -> None:
    rng = random.Random(1)
    run = tmp_path / "run"
    moments: list[dict[str, Any]] = [
        {"event": "train.epoch", "phase": "quantized", "epoch": 1},
        {"event": "search.evaluated", "done": 2},
    ]
    for moment in moments:
        process = start("run", finished.config, "--out", run, "--resume", "--quiet")
        try:
            _wait(process, run, moment)
            time.sleep(rng.uniform(0, 0.3))
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    done = call("run", finished.config, "--out", run, "--resume", "--json", "--quiet")
    assert done.code == 0, done.err

    assert subnets(run) == subnets(finished.directory)
    straight, killed = json.loads(finished.done.out), json.loads(done.out)
    for key in ("subnet", "test_accuracy", "validation_accuracy", "weights_bytes", "onnx_bytes"):
        assert killed[key] == straight[key], key
    for name in ("supernet/weights.safetensors", "best/model.safetensors", "best/model.onnx"):
        assert (run / name).read_bytes() == (finished.directory / name).read_bytes(), name

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_supernet import FakeSupernet, tiny_data
from kill_worker import CONFIG

from nasq.training import Trainer, checkpoint

HERE = Path(__file__).parent


def _start(directory: Path, pause: float, seed: int) -> subprocess.Popen[bytes]:
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(HERE / "kill_worker.py"), str(directory), str(pause), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_processes_end_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    rng = random.Random(0)
    pointer = tmp_path / "checkpoint.json"
    for kill in range(3):
        worker = _start(tmp_path, 0.02, seed=kill)
        before = pointer.stat().st_mtime_ns if pointer.exists() else 0
        try:  # wait for a checkpoint of this process, then strike at some moment of an epoch or of a save
            while worker.poll() is None and not (pointer.exists() and pointer.stat().st_mtime_ns > before):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.communicate()
        assert worker.returncode == -signal.SIGKILL
    done = checkpoint.load(tmp_path / "checkpoint")[1]["epoch"]
    assert 3 <= done < CONFIG.epochs
    last = _start(tmp_path, 0, seed=9)
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()

    straight, killed = FakeSupernet(seed=0, dropout=0.2), FakeSupernet(seed=5)
    Trainer(straight, tiny_data(), CONFIG).run()
    tensors, meta = checkpoint.load(tmp_path / "checkpoint")
    assert meta["epoch"] == CONFIG.epochs
    killed.load_state_dict(checkpoint.unpack(tensors, meta["state"]["model"]))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, killed.state_dict()[name]), name

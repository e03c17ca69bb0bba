"""Several processes that train one run together: this one starts them, passes on what they tell, and waits for them.

Each gets the variables that ``torchrun`` sets, so :func:`nasq.training.distributed.process_group` joins them. They end
with this process, however it ends: each watches a pipe that only this process holds open.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from nasq import errors
from nasq.errors import NasqError, TrainingError
from nasq.run.config import RunConfig
from nasq.run.directory import RunDirectory

__all__ = ["train_in_ranks"]

OnStep = Callable[[str, int, int], None]
Lines = queue.Queue[tuple[int, str | None]]


def train_in_ranks(run: RunDirectory, config: RunConfig, name: str, on_step: OnStep | None = None) -> None:
    """Runs a training stage in ``config.processes`` processes.

    Args:
        run: Its lock is held by the caller; the first of the processes writes in it.
        config: Of the run.
        name: ``train`` or ``split``.
        on_step: Called with ``(phase, steps done, steps)``.

    Raises:
        NasqError: What one of them raised; the last checkpoint is kept.
    """
    variables = _variables(config)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "nasq.run.rank", str(run.path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(config.processes)
    ]
    try:
        _follow(run, children, on_step)
    finally:
        for child in children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()


def _variables(config: RunConfig) -> dict[str, str]:
    """The environment that all ranks share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {**os.environ, "WORLD_SIZE": str(config.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if torch.device(config.device).type != "cuda":
        found["CUDA_VISIBLE_DEVICES"] = ""
    if config.threads is None and "OMP_NUM_THREADS" not in found:
        found["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // config.processes))
    return found


def _follow(run: RunDirectory, children: list[subprocess.Popen[str]], on_step: OnStep | None) -> None:
    """Passes on what the processes tell until all have ended, or one has failed."""
    lines: Lines = queue.Queue()
    for rank, child in enumerate(children):
        threading.Thread(target=_read, args=(rank, child, lines), daemon=True).start()
    told: dict[int, dict[str, str]] = {}
    left = len(children)
    while left:
        rank, line = lines.get()
        if line is not None:
            message = json.loads(line)
            if "step" in message and on_step is not None:
                on_step(*message["step"])
            if "event" in message and run.listener is not None:
                run.listener(message["event"])
            if "error" in message:
                told[rank] = message["error"]
            continue
        left -= 1
        code = children[rank].wait()
        if code:
            raise _failure(run, told.get(rank), rank, len(children), code)


def _read(rank: int, child: subprocess.Popen[str], lines: Lines) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            lines.put((rank, line))
    lines.put((rank, None))


def _failure(run: RunDirectory, told: dict[str, str] | None, rank: int, size: int, code: int) -> NasqError:
    if told is not None:
        kind: Any = getattr(errors, told["kind"], NasqError)
        found: NasqError = kind(told["message"])
        return found
    return TrainingError(
        f"process {rank + 1} of {size} ended with code {code} while training. The checkpoint of the last epoch in {run.path} "
        "is kept: go on from it with --resume."
    )

"""Trains the fake supernet in a process of its own, slowly enough to be killed in between: kill_worker.py DIR PAUSE."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from fake_supernet import FakeSupernet, tiny_data

from nasq.training import TrainConfig, Trainer

CONFIG = TrainConfig(epochs=12, batch_size=32, bf16=False, optimizer="adam", lr=0.01)

if __name__ == "__main__":
    torch.set_num_threads(1)
    pause = float(sys.argv[2])
    net = FakeSupernet(seed=int(sys.argv[3]), dropout=0.2)
    Trainer(net, tiny_data(), CONFIG, Path(sys.argv[1]), on_step=lambda i, n: time.sleep(pause)).run()

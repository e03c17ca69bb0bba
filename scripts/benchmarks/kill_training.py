"""Kills a forest that grows with PA&DA with SIGKILL, while it trains and while it splits, and compares what it ends with.

The network is tiny, the images are scikit-learn's digits. The growth is made once undisturbed. Then, trial by trial, a new
one is killed once in each of these phases, at a random moment, and gone on with: training the root, comparing options for the
split, training a leaf, and writing (as soon as a new checkpoint or split appears on disk). Equal must be, byte for byte: the
tensors of every last checkpoint (weights, optimizer, gradient norms and distributions of paths, statistics and distribution
of images, and the states of all random streams), what they mean, the splits, and the weights and regions of the forest.

Usage: ``python -m scripts.benchmarks.kill_training [--trials 5] [--seed 0] [--out FILE]``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nasq.data
from nasq import Choice, Supernet, elastic
from nasq.data import DataSet, Split
from nasq.deploy.bench import environment
from nasq.files import append_line, read_json, sha256, write_json
from nasq.training import TrainConfig, checkpoint, stream
from nasq.training.splitting import ForestTrainer, SplitPlan

CONFIG = TrainConfig(
    epochs=7, batch_size=32, lr=0.05, warmup_epochs=0.0, sampler="importance", data_sampler="importance", distill=0.0,
    bf16=False, channels_last=False, threads=1,
)  # fmt: skip
PLAN = SplitPlan((4,), repetitions=40, batch_size=32)
DELAYS = {"training the root": 0.1, "splitting": 0.3, "training a leaf": 0.1, "writing": 0.001}
"""The phases, and by how many seconds at most a kill comes after the first sign of one."""


class Net(nn.Module):
    """An operator, a kernel inside one of its branches, and a width, with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        width = Choice("width", (4, 8))
        self.stem = elastic.Conv2d(1, width, 3, padding="same")
        self.norm = elastic.BatchNorm2d(width)
        branches = {
            "conv": elastic.Conv2d(width, width, Choice("kernel", (1, 3)), padding="same"),
            "pool": nn.AvgPool2d(3, 1, padding=1),
            "skip": nn.Identity(),
        }
        self.operator = elastic.OneOf(Choice("operator", tuple(branches), ordered=False), branches)
        self.dropout = nn.Dropout(0.2)
        self.head = elastic.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
        return self.head(self.dropout(self.operator(torch.relu(self.norm(self.stem(x)))).mean((2, 3))))


def build(name: str) -> Supernet:
    """The supernet with the initial weights of a stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(0, f"initialisation{name}").initial_seed() % 2**62)
        return Supernet(Net())


def images() -> DataSet:
    """320 of the digits to train on."""
    found = nasq.data.load("digits")
    train = Split(found.train.images[:320], found.train.labels[:320])
    return DataSet.from_splits(found.name, found.classes, train, found.validation, found.test)


def work(directory: Path, pause: float) -> None:
    """Grows the forest, or goes on; every step takes ``pause`` seconds more, so that there is something to kill."""

    def tell(event: dict[str, Any]) -> None:
        row = {key: event.get(key) for key in ("event", "leaf", "epoch")}
        append_line(directory / "events.jsonl", json.dumps(row))

    def wait(done: int, steps: int) -> None:
        time.sleep(pause)

    torch.set_num_threads(1)
    grower = ForestTrainer(build, images(), CONFIG, directory, PLAN, on_event=tell, on_step=wait)
    grower.run().save(directory / "forest")


def result(directory: Path) -> dict[str, Any]:
    """What has to be equal, by name."""
    found: dict[str, Any] = {"splits": read_json(directory / "splits.json")["splits"]}
    for folder in ("root", "leaf0", "leaf1"):
        prefix = directory / folder / "checkpoint"
        _, meta = checkpoint.load(prefix)
        tensors = prefix.with_name(f"checkpoint.{read_json(prefix.with_name('checkpoint.json'))['slot']}.safetensors")
        timeless = [
            {key: event[key] for key in ("epoch", "loss", "losses", "accuracy", "lr")} for event in meta["history"]
        ]
        found[f"{folder}: tensors"] = sha256(tensors)
        found[f"{folder}: the rest"] = {**meta, "history": timeless}
    for file in sorted((directory / "forest").rglob("*")):
        if file.is_file():
            found[f"forest: {file.relative_to(directory / 'forest')}"] = sha256(file)
    return found


# -- killing ---------------------------------------------------------------------------------------------------------


def command(directory: Path, pause: float) -> list[str]:
    return [sys.executable, "-m", "scripts.benchmarks.kill_training", "--work", str(directory), "--pause", str(pause)]


def events(directory: Path) -> list[dict[str, Any]]:
    """What was told so far; a last line that a kill cut short is left out."""
    path = directory / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def reached(directory: Path, phase: str) -> Callable[[], bool]:
    """Whether a process started from now on has come to a phase."""
    before = len(events(directory))
    written = {path: path.stat().st_mtime_ns for path in directory.rglob("*.json")}

    def told(kinds: tuple[str, ...], leaves: tuple[str, ...], epochs: range) -> bool:
        return any(
            event["event"] in kinds and event["leaf"] in leaves and event["epoch"] in epochs
            for event in events(directory)[before:]
        )

    def new_file() -> bool:
        return any(path.stat().st_mtime_ns != written.get(path) for path in directory.rglob("*.json"))

    at, last = PLAN.epochs[0], CONFIG.epochs
    return {
        "training the root": lambda: told(("epoch",), ("",), range(1, at)),
        "splitting": lambda: told(("start", "epoch"), ("",), range(at, at + 1)),
        "training a leaf": lambda: told(("epoch",), ("0", "1"), range(at, last)),
        "writing": new_file,
    }[phase]


def kill_in(directory: Path, phase: str, rng: random.Random) -> dict[str, Any]:
    """Starts the growth, or goes on with it, and kills it in a phase; what was on disk then."""
    there = reached(directory, phase)
    process = subprocess.Popen(command(directory, 0.01), stdout=subprocess.DEVNULL)
    while process.poll() is None and not there():
        time.sleep(0.001)
    time.sleep(rng.uniform(0, DELAYS[phase]))
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code != -signal.SIGKILL:
        raise SystemExit(f"the growth ended with code {code} before it could be killed while {phase}")
    last = events(directory)[-1:] or [{}]
    split = (directory / "splits.json").exists()
    return {"phase": phase, "last_event": last[0], "split_decided": split, "leaf_begun": (directory / "leaf0").exists()}


def trial(directory: Path, rng: random.Random, wanted: dict[str, Any]) -> dict[str, Any]:
    """One growth that is killed in every phase and goes on to the end."""
    phases = [phase for phase in DELAYS if phase != "writing"]
    phases.insert(rng.randrange(len(phases) + 1), "writing")
    kills = [kill_in(directory, phase, rng) for phase in phases]
    subprocess.run(command(directory, 0.0), check=True, stdout=subprocess.DEVNULL)
    found = result(directory)
    different = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    return {"kills": kills, "compared": len(wanted), "different": different}


def run(trials: int, seed: int) -> dict[str, Any]:
    """The undisturbed growth and all trials."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="nasq-kill-") as scratch:
        straight = Path(scratch) / "straight"
        subprocess.run(command(straight, 0.0), check=True, stdout=subprocess.DEVNULL)
        wanted = result(straight)
        done = []
        for number in range(trials):
            directory = Path(scratch) / f"killed{number}"
            done.append(trial(directory, rng, wanted))
            sys.stderr.write(json.dumps(done[-1]) + "\n")
            shutil.rmtree(directory)
    kills = [kill for one in done for kill in one["kills"]]
    inside = sum(kill["phase"] == "splitting" and not kill["split_decided"] for kill in kills)
    return {
        "trials": done, "kills": len(kills), "kills_before_the_split_was_decided": inside,
        "all_equal": not any(one["different"] for one in done), "seed": seed, "environment": environment(1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--work", type=Path, help="only grow in this directory, as the trials do")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds more per step")
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.pause)
        return 0
    report = run(options.trials, options.seed)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if options.out is not None:
        write_json(options.out, report)
    return 0 if report["all_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())

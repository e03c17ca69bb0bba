"""Kills ``nasq run`` with SIGKILL at random moments and compares what it ends with to an undisturbed run.

The run is made once undisturbed. Then, trial by trial, it is made anew, killed at a moment drawn from the trial's share
of the undisturbed run's time (so that all of it is covered), and continued with ``--resume``. Equal must be: every row of
``search/subnets.csv`` but the seconds, the trained supernet's weights, the exported subnets, the best bundle's integers
and the test accuracy. Usage: ``python -m scripts.benchmarks.kill_resume [--trials 5] [--seed 0] [--set KEY=VALUE ...]``.
"""

from __future__ import annotations

import argparse
import csv
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

from nasq.deploy.bench import environment
from nasq.files import sha256, write_json
from nasq.run.directory import RunDirectory
from nasq.run.export import exported

NASQ = Path(sys.executable).parent / "nasq"
ATTEMPTS = 3
"""A run that ended before its moment came is made again, with a moment that much earlier."""


def command(run: Path, options: argparse.Namespace, *more: str) -> list[str]:
    changes = [part for change in options.set for part in ("--set", change)]
    return [str(NASQ), "run", "--preset", options.preset, "--out", str(run), "--quiet", *changes, *more]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "search" / "subnets.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def result(run: Path) -> dict[str, Any]:
    """What has to be equal, by name."""
    index = exported(RunDirectory(run))
    return {
        "subnets.csv without seconds": rows(run),
        "supernet weights": sha256(run / "supernet" / "weights.safetensors"),
        "exported subnets": index["subnets"],
        "best subnet": index["best"],
        "best integers": sha256(run / "best" / "model.safetensors"),
        "best file": sha256(run / "best" / "model.onnx"),
        "test accuracy": index["test_accuracy"],
    }


def where(run: Path) -> str:
    """What the run was doing: its last event."""
    events = RunDirectory(run).events()
    if not events:
        return "starting"
    last = events[-1]
    detail = last.get("stage") or " ".join(str(last[key]) for key in ("phase", "epoch", "done") if key in last)
    return f"{last['event']} {detail}".strip()


def killed(run: Path, options: argparse.Namespace, moment: float) -> bool:
    """Starts the run and kills it after ``moment`` seconds; whether it was still working then."""
    process = subprocess.Popen(command(run, options), stdout=subprocess.DEVNULL)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    if process.returncode != 0:
        raise SystemExit(f"the run failed before it was killed: exit code {process.returncode}")
    return False


def trial(run: Path, options: argparse.Namespace, moment: float, wanted: dict[str, Any]) -> dict[str, Any]:
    for _ in range(ATTEMPTS):
        shutil.rmtree(run, ignore_errors=True)
        if killed(run, options, moment):
            break
        moment *= 0.8
    else:
        raise SystemExit(f"the run ended before it could be killed, {ATTEMPTS} times")
    doing = where(run)
    seconds = timed(lambda: subprocess.run(command(run, options, "--resume"), check=True, stdout=subprocess.DEVNULL))
    found = result(run)
    return {
        "killed_after_s": round(moment, 2),
        "while": doing,
        "resume_s": round(seconds, 2),
        "equal": {name: found[name] == wanted[name] for name in wanted},
    }


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    parser.add_argument("--out", type=Path, help="also write the result to this JSON file")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="nasq-kill-") as scratch:
        straight = Path(scratch) / "straight"
        whole = timed(lambda: subprocess.run(command(straight, options), check=True, stdout=subprocess.DEVNULL))
        wanted = result(straight)
        trials = []
        for number in range(options.trials):
            moment = whole * (number + rng.random()) / options.trials
            trials.append(trial(Path(scratch) / f"killed{number}", options, moment, wanted))
            print(json.dumps(trials[-1]), file=sys.stderr, flush=True)
    same = all(all(one["equal"].values()) for one in trials)
    report = {
        "preset": options.preset,
        "set": options.set,
        "seed": options.seed,
        "undisturbed_s": round(whole, 2),
        "subnets": len(wanted["subnets.csv without seconds"]),
        "test_accuracy": wanted["test accuracy"],
        "trials": trials,
        "all_equal": same,
        "environment": environment(1),
    }
    print(json.dumps(report, indent=1))
    if options.out is not None:
        write_json(options.out, report)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""How long ``import nasq`` and ``nasq --help`` take in a fresh process, beside Python itself doing nothing.

Usage: ``python -m scripts.benchmarks.startup [--repeats 15]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from nasq.deploy.bench import environment


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import nasq": [sys.executable, "-c", "import nasq"],
        "nasq --help": [
            sys.executable,
            "-c",
            "import sys; sys.argv = ['nasq', '--help']; from nasq.cli.main import main; main()",
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.repeats):
        for name, command in commands.items():
            times[name].append(seconds(command))
    loads = "import sys, nasq, nasq.cli.main; print('torch' in sys.modules)"
    torch = subprocess.run([sys.executable, "-c", loads], check=True, capture_output=True, text=True).stdout.strip()
    result = {
        "median_seconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "largest_seconds": {name: round(max(values), 3) for name, values in times.items()},
        "torch_loaded": torch == "True",
        "environment": environment(1),
    }
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

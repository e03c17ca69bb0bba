"""Parity of trained subnets at 8/8, 4/4, 2/2 and mixed bits: the shipped file against the independent reference.

Usage: ``python -m scripts.benchmarks.parity RUN [--mixed 12] [--out FILE.json]`` on a run whose supernet is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from nasq.deploy.bench import environment
from nasq.files import write_json
from nasq.run.directory import RunDirectory
from nasq.run.export import export_subnet
from nasq.run.flow import open_workshop
from nasq.run.search import Evaluation
from nasq.space import SearchSpace, Subnet


def uniform(space: SearchSpace, bits: int) -> Subnet:
    """The largest architecture with one bit-width everywhere (the nearest option where a choice lacks it)."""
    largest = {name: option for name, option in space.largest().items() if not name.endswith("_bits")}
    every = {
        choice.name: min(choice.options, key=lambda option: (abs(float(option) - bits), float(option)))
        for choice in space.choices
        if choice.name.endswith("_bits")
    }
    return space.to_subnet(space.to_rows([{**every, **largest}])[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--mixed", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    workshop = open_workshop(RunDirectory.open(options.run))
    evaluation = Evaluation(workshop)
    space = workshop.supernet.space
    rng = torch.Generator().manual_seed(0)
    tried = {f"{bits}/{bits}": uniform(space, bits) for bits in (8, 4, 2)}
    tried |= {f"mixed {index}": space.sample(rng) for index in range(options.mixed)}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, subnet in tried.items():
            report = export_subnet(workshop, evaluation, subnet, Path(scratch) / subnet.id, strict=False).report
            coverage = report.coverage
            rows.append(
                {
                    "bits": name,
                    "subnet": subnet.id,
                    "final integers": report.total,
                    "differ": report.differing,
                    "layers alone": len(report.layers),
                    "layers that differ": sum(not layer.passed for layer in report.layers),
                    "convolutions": coverage.total["convolutions"],
                    "integer convolutions": coverage.integer["convolutions"],
                    "sums": coverage.total["sums"],
                    "integer sums": coverage.integer["sums"],
                    "accuracy of the file": report.accuracy,
                    "accuracy of the search": evaluation.accuracy(subnet),
                    "passed": report.passed,
                }
            )
    result = {"rows": rows, "environment": environment(1)}
    if options.out:
        write_json(options.out, result)
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

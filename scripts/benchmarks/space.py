"""Subnets per second on one core: sampling and costs on arrays, for joint spaces and for those without bits.

Usage: ``python -m scripts.benchmarks.space [--spaces digits_mobile nas_bench_201 ...] [--float] [--rows 50000]``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

import nasq
from nasq import plugins
from nasq.deploy.bench import environment
from nasq.quant import quantize


def measure(name: str, bits: bool, rows: int, repeats: int) -> dict[str, Any]:
    """Processor time of sampling and of costing, the best of some runs."""
    factory = plugins.load("search_spaces", name)
    example = torch.zeros(1, *plugins.space_info(factory).input_shape)
    supernet = nasq.Supernet(quantize(factory(), example) if bits else factory(), name)
    model = nasq.cost.CostModel(supernet, None if bits else example)
    space, rng = supernet.space, torch.Generator().manual_seed(0)
    model.evaluate(space.sample_batch(1000, rng))
    sampling, costing = [], []
    for _ in range(repeats):
        began = time.process_time()
        drawn = space.sample_batch(rows, rng)
        sampled = time.process_time()
        costs = model.evaluate(drawn)
        sampling.append(sampled - began)
        costing.append(time.process_time() - sampled)
    return {
        "space": name,
        "bits": bits,
        "choices": len(space),
        "subnets": f"{float(space.size):.3e}",
        "sampled_per_second": round(rows / min(sampling)),
        "costs_per_second": round(rows / min(costing)),
        "costs": sorted(costs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spaces", nargs="+", default=["digits_mobile", "nas_bench_201", "mobilenet_v3"])
    parser.add_argument("--float", action="store_true", help="without bits")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(name, not options.float, options.rows, options.repeats) for name in options.spaces]
    json.dump({"results": found, "environment": environment(1)}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

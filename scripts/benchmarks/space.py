"""Subnets per second on one core: sampling and costs on arrays, for the demo's joint space.

Usage: ``python -m scripts.benchmarks.space [--rows 50000]``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

import nasq
from nasq import plugins
from nasq.deploy.bench import environment
from nasq.quant import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--space", default="digits_mobile")
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    factory = plugins.load("search_spaces", options.space)
    example = torch.zeros(1, *plugins.space_info(factory).input_shape)
    supernet = nasq.Supernet(quantize(factory(), example), options.space)
    model = nasq.cost.CostModel(supernet)
    space, rng = supernet.space, torch.Generator().manual_seed(0)
    model.evaluate(space.sample_batch(1000, rng))
    began = time.perf_counter()
    rows = space.sample_batch(options.rows, rng)
    sampled = time.perf_counter()
    costs = model.evaluate(rows)
    done = time.perf_counter()
    result = {
        "space": options.space,
        "choices": len(space),
        "subnets": f"{float(space.size):.3e}",
        "sampled_per_second": round(options.rows / (sampled - began)),
        "costs_per_second": round(options.rows / (done - sampled)),
        "costs": sorted(costs),
        "environment": environment(1),
    }
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

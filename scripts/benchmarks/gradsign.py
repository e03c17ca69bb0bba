"""GradSign on NAS-Bench-201 cells: the batched pass beside a loop over images, in one run.

Usage: ``python -m scripts.benchmarks.gradsign [--cells 5] [--images 128] [--threads 1] [--seed 0] [--exact]``.

The loop is the published way: one training-mode forward and backward pass per image, signs added up. Noise images; the time
does not depend on what they show. Reported are wall-clock and processor time (the latter counts on a busy machine), per cell.
``--exact`` also compares both in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from nasq.proxies.gradsign import GradSign
from nasq.search_spaces.nas_bench_201 import arch_str, nas_bench_201
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Supernet
from nasq.deploy.bench import environment
from nasq.ranking import score
from nasq.run.score import fresh


def loop(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """GradSign by one pass per image."""
    copied = copy.deepcopy(model).train()
    weights = [module.weight for module in copied.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    totals = [torch.zeros_like(weight) for weight in weights]
    for index in range(len(x)):
        copied.zero_grad()
        F.cross_entropy(copied(x[index : index + 1]), y[index : index + 1]).backward()
        for total, weight in zip(totals, weights, strict=True):
            if weight.grad is not None:
                total += weight.grad.sign()
    return float(sum(total.abs().double().sum() for total in totals))


def timed(call: Callable[[], float], repeats: int) -> tuple[float, float, float]:
    """The value, and the least wall-clock and processor seconds."""
    wall, busy, value = [], [], 0.0
    for _ in range(repeats):
        began, used = time.perf_counter(), time.process_time()
        value = call()
        wall.append(time.perf_counter() - began)
        busy.append(time.process_time() - used)
    return value, min(wall), min(busy)


def one_cell(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    proxy = GradSign()
    batched = lambda: score([proxy], model, (x, y), chunk=options.chunk)["gradsign"]  # noqa: E731
    value, wall, busy = timed(batched, options.repeats)
    wanted, slow_wall, slow_busy = timed(lambda: loop(model, x, y), options.repeats)
    found = {
        "batched_s": round(wall, 3), "loop_s": round(slow_wall, 3), "batched_cpu_s": round(busy, 3),
        "loop_cpu_s": round(slow_busy, 3), "ratio": round(slow_wall / wall, 2), "cpu_ratio": round(slow_busy / busy, 2),
        "relative_difference": abs(value - wanted) / wanted,
    }  # fmt: skip
    if options.exact:
        deep = copy.deepcopy(model).double()
        exact = score([proxy], deep, (x.double(), y))["gradsign"]
        found["equal_in_float64"] = exact == loop(deep, x.double(), y)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=5, help="how many random cells")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--chunk", type=int, help="images of one piece; default: as nasq chooses")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="the least time of so many runs counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="also compare in float64")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = torch.Generator().manual_seed(options.seed)
    x = torch.randn(options.images, 3, 32, 32, generator=rng)
    y = torch.randint(10, (options.images,), generator=rng)
    torch.manual_seed(options.seed)
    supernet = Supernet(nas_bench_201())
    rows = []
    for index in range(options.cells):
        subnet = supernet.space.sample(rng)
        row = {"cell": arch_str(subnet), **one_cell(fresh(supernet.extract(subnet), index), x, y, options)}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    sums = {key: sum(row[key] for row in rows) for key in ("batched_s", "loop_s", "batched_cpu_s", "loop_cpu_s")}
    result = {
        "images": options.images, "chunk": options.chunk, "threads": options.threads, "seed": options.seed,
        "cells": len(rows), "rows": rows, "ratio_of_sums": round(sums["loop_s"] / sums["batched_s"], 2),
        "cpu_ratio_of_sums": round(sums["loop_cpu_s"] / sums["batched_cpu_s"], 2),
        "environment": environment(options.threads),
    }  # fmt: skip
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

"""Forward time of an activated supernet over that of the extracted plain model, one subnet at a time.

Both compute the same numbers; the supernet also slices its shared weights. Processor time, not the clock: the ratio then
hardly depends on what else the machine does. Usage:
``python -m scripts.benchmarks.activated_forward [--spaces nas_bench_201 mobilenet_v3 autoformer] [--batch 64]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import nasq
from nasq import plugins
from nasq.deploy.bench import environment


def seconds(model: nn.Module, x: Tensor) -> float:
    began = time.process_time()
    model(x)
    return time.process_time() - began


def compare(supernet: nasq.Supernet, subnet: nasq.Subnet, x: Tensor, repeats: int) -> dict[str, Any]:
    """Median times of both, taken in turn so that neither has the quieter half of the run."""
    plain = supernet.extract(subnet).eval()
    times: dict[str, list[float]] = {"activated": [], "extracted": []}
    with supernet.activate(subnet):
        same = torch.equal(supernet(x), plain(x))  # warms both up
        for _ in range(repeats):
            times["activated"].append(seconds(supernet, x))
            times["extracted"].append(seconds(plain, x))
    activated, extracted = (statistics.median(times[key]) for key in ("activated", "extracted"))
    return {"equal": same, "activated_s": activated, "extracted_s": extracted, "ratio": activated / extracted}


def measure(name: str, batch: int, subnets: int, repeats: int) -> dict[str, Any]:
    factory = plugins.load("search_spaces", name)
    torch.manual_seed(0)
    supernet = nasq.Supernet(factory(), name).eval()
    x = torch.randn(batch, *plugins.space_info(factory).input_shape, generator=torch.Generator().manual_seed(0))
    space, rng = supernet.space, torch.Generator().manual_seed(0)
    chosen = [space.largest(), *space.to_subnets(space.sample_batch(subnets - 1, rng))]
    rows = [{"subnet": subnet.id, **compare(supernet, subnet, x, repeats)} for subnet in chosen]
    total = sum(row["activated_s"] for row in rows) / sum(row["extracted_s"] for row in rows)
    return {"space": name, "batch": batch, "input": list(x.shape[1:]), "ratio": round(total, 4), "subnets": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spaces", nargs="+", default=["nas_bench_201", "mobilenet_v3", "autoformer"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--subnets", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = [measure(name, options.batch, options.subnets, options.repeats) for name in options.spaces]
    json.dump({"results": found, "environment": environment(1)}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

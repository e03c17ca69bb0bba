"""Accuracy against latency on NAS-Bench-201 by table: how much of the true front's hypervolume a search finds.

Accuracy is the mean CIFAR-10 test accuracy and latency that of one device, both without noise: what is searched is what
is compared, and the true front is known. Reference point: 20 % error, the device's largest latency.

Usage: ``python -m scripts.benchmarks.search_nas_bench_201_front TABLES --out RUNS.jsonl [--devices 1080ti_1 ...]``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from nasq.search import Objective, hypervolume
from nasq.search.algorithms import ALGORITHMS
from scripts.benchmarks.nas_bench_201_table import Lines, Table201

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {"population": 50}),
    "nsga2, rate 0.5": ("nsga2", {"population": 50, "mutation_rate": 0.5}),
    "nsga2, population 50": ("nsga2", {"population": 50}),
    "nsga2": ("nsga2", {"population": 25, "crossover_rate": 0.5}),
    "nsga2, steady": ("nsga2", {"population": 25, "batch": 5, "crossover_rate": 0.5}),
    "nsga2, steady, front kept": ("nsga2", {"population": 25, "batch": 5, "crossover_rate": 0.5, "keep_front": True}),
    "nsga2, steady, single changes": (
        "nsga2",
        {"population": 25, "batch": 5, "crossover_rate": 0.0, "mutation_rate": 0.0},
    ),
    "nsga2, steady, front kept, single changes": (
        "nsga2",
        {"population": 25, "batch": 5, "crossover_rate": 0.0, "mutation_rate": 0.0, "keep_front": True},
    ),
    "nsga3": ("nsga3", {"population": 25, "crossover_rate": 0.5}),
    "local_search": ("local_search", {"population": 50, "batch": 10}),
    "bananas": ("bananas", {"population": 50, "batch": 50}),
}
"""What is compared: the name of the algorithm and its settings; the rest are defaults."""


def run(table: Table201, variant: str, device: str, seed: int, budget: int) -> dict[str, Any]:
    """One search."""
    name, settings = VARIANTS[variant]
    entry, latency = ALGORITHMS[name], table.latency[device]
    settings = {**entry.settings, **settings, "seed": seed}
    if "predictor" in settings:
        settings["features"] = table.features()
    objectives = [table.objective(), Objective("latency", "ms", "minimize", table.lookup(latency), on="rows")]
    algorithm = entry.kind(table.space, objectives, **settings)
    began = time.process_time()
    found: list[int] = []
    while len(found) < budget and (asked := algorithm.ask()):
        places = table.at(table.space.to_rows(asked)).tolist()
        for subnet, index in zip(asked, places, strict=True):
            algorithm.tell(subnet, {"accuracy": table.test[index], "latency": latency[index]})
        found += places
    whole = volume(table, device, range(len(latency)))
    share = volume(table, device, found[:budget]) / whole
    return {
        "variant": variant,
        "device": device,
        "seed": seed,
        "budget": budget,
        "share": share,
        "seconds": round(time.process_time() - began, 2),
    }


def volume(table: Table201, device: str, places: Any) -> float:
    """Hypervolume of some cells."""
    latency = table.latency[device]
    chosen = np.array(list(places))
    points = np.stack([table.test[chosen], latency[chosen]], axis=1)
    return hypervolume(points, [80.0, float(latency.max())], ["maximize", "minimize"])


def summary(lines: list[dict[str, Any]]) -> str:
    """A table: variants by devices."""
    devices = sorted({line["device"] for line in lines})
    text = [f"| algorithm | {' | '.join(devices)} |", "|---" * (len(devices) + 1) + "|"]
    for variant in VARIANTS:
        cells = []
        for device in devices:
            shares = [100 * one["share"] for one in lines if (one["variant"], one["device"]) == (variant, device)]
            several = f" ± {np.std(shares, ddof=1):.2f} ({len(shares)})" if len(shares) > 1 else ""
            cells.append(f"{np.mean(shares):.2f}{several}" if shares else "")
        text.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--devices", nargs="*", default=["1080ti_1"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=500)
    options = parser.parse_args()
    table, lines = Table201(options.tables), Lines(options.out, ("variant", "device", "seed"))
    for device in options.devices:
        for variant in options.variants:
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                if lines.missing(variant=variant, device=device, seed=seed):
                    lines.add(run(table, variant, device, seed, options.budget))
    print(summary(lines.all))


if __name__ == "__main__":
    main()

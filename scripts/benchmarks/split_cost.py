"""What scoring one split by gradient matching costs, in plain training steps: NAS-Bench-201 (C=16, N=5), batch 64.

One repetition compares all 5 operators of all 6 edges in one context on one batch: 25 passes instead of 30. A published
scoring has 100 repetitions; here a few of them are timed in turn with plain training steps of the same batch, and the ratio
of 100 repetitions to 2,500 steps is told. Times are the process's CPU seconds. ``--check`` also compares the distances in
float32 with a naive loop in float64 that knows nothing of shared passes.

Usage: ``python -m scripts.benchmarks.split_cost [--threads 2] [--cells 5] [--rounds 3] [--check]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from nasq.search_spaces.nas_bench_201 import OPERATORS
from torch import Tensor, nn

from nasq import Subnet, Supernet
from nasq.deploy.bench import environment
from nasq.training import TrainConfig, Trainer, stream
from nasq.training.splitting import gradient_distances
from scripts.benchmarks.supernet_throughput import noise, trainer

REPETITIONS, STEPS = 100, 2500


def naive(
    supernet: Supernet, batch: tuple[Tensor, Tensor], context: Subnet, name: str, kind: torch.dtype = torch.float64
) -> np.ndarray:
    """Distances of the operators of one edge in float64, one pass after the other; gradients in ``kind``."""
    own = copy.deepcopy(supernet).to(kind).train()
    index = own.space.names.index(name)
    left_out = {id(p) for cell in own.modules() if hasattr(cell, "edges") for p in cell.edges[index].parameters()}
    rows = []
    for operator in OPERATORS:
        own.zero_grad()
        with own.activate(Subnet({**context, name: operator})):
            nn.functional.cross_entropy(own(batch[0].to(kind)), batch[1]).backward()
        parts = [
            torch.zeros(p.numel(), dtype=torch.float64) if p.grad is None else p.grad.flatten().double()
            for p in own.parameters() if id(p) not in left_out
        ]  # fmt: skip
        rows.append(torch.cat(parts))
    norms = [float(row.norm()) for row in rows]
    found = np.ones((len(rows), len(rows)))
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if norms[i] > 0 and norms[j] > 0:
                found[i, j] = 1 - float(a @ b) / (norms[i] * norms[j] + 1e-6)
    np.fill_diagonal(found, 0)
    return found


def check(options: argparse.Namespace) -> dict[str, float]:
    """Largest difference of a distance from the naive loop's, over all edges, in one repetition of one cell per stage.

    Once beside gradients in float64, and once beside those in float32, of which the loop's arithmetic alone is in float64.
    """
    made = _trainer(replace(_config(), bf16=False), options, 1)
    batch = _batch(made)
    context = made.supernet.space.sample(stream(3, "context"))
    found = gradient_distances(made.supernet, lambda r: batch, lambda r: context, repetitions=1)
    kinds = {"float64": torch.float64, "float32 gradients": torch.float32}
    return {
        title: max(
            float(np.abs(found.distances[name] - naive(made.supernet, batch, context, name, kind)).max())
            for name in made.supernet.space.names
        )
        for title, kind in kinds.items()
    }


def _config() -> TrainConfig:
    return TrainConfig(epochs=1000, batch_size=64, sampler="uniform", distill=0.0, warmup_epochs=0.0)


def _trainer(config: TrainConfig, options: argparse.Namespace, cells: int) -> Trainer:
    return trainer(noise(64 * options.steps), config, options.device, cells)


def _batch(made: Trainer) -> tuple[Tensor, Tensor]:
    images = made.data.normalise(made.split.images[:64])
    return images.contiguous(memory_format=torch.channels_last), made.split.labels[:64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="plain steps per round, beside one repetition")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = _trainer(replace(_config(), bf16=False), options, options.cells)  # scoring is in fp32 as well
    batch, contexts = _batch(made), stream(0, "contexts")
    scoring, training, passes = 0.0, 0.0, []
    for index in range(options.rounds + 1):
        began = time.process_time()
        found = gradient_distances(
            made.supernet, lambda r: batch, lambda r: made.supernet.space.sample(contexts), repetitions=1
        )
        middle = time.process_time()
        made.run(until=index + 1)
        if index:
            scoring, training = scoring + middle - began, training + time.process_time() - middle
            passes.append(found.passes)
    result = {
        "cells": options.cells, "batch": 64, "rounds": options.rounds, "passes_per_repetition": passes,
        "cpu_seconds_per_repetition": round(scoring / options.rounds, 3),
        "cpu_seconds_per_plain_step": round(training / options.rounds / options.steps, 4),
        "scoring_over_2500_steps": round(
            (scoring / options.rounds * REPETITIONS) / (training / options.rounds / options.steps * STEPS), 3
        ),
        "largest_difference_from_a_naive_loop": check(options) if options.check else None,
        "environment": environment(options.threads),
    }  # fmt: skip
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

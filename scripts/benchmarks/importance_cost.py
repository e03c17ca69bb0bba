"""What importance of paths and data costs: a training step of uniform sampling against one with PA + DA, on the same paths.

Both train the same recorded paths on the same recorded batches of NAS-Bench-201 (C=16), one epoch each in turn; the second
reads gradient norms and predictions as PA&DA does and turns them into distributions at the end of each epoch. Times are the
process's CPU seconds, which others on the machine disturb less than the clock. The memory is that of the samplers' tensors
beside parameters, gradients and momentum (activations, which would make the share smaller, are left out).

Usage: ``python -m scripts.benchmarks.importance_cost [--threads 2] [--cells 5] [--rounds 4] [--steps 2]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nasq.data import DataSet
from nasq.data.importance import ImportanceSampler
from nasq.deploy.bench import environment
from nasq.training import Path, TrainConfig, Trainer, stream
from nasq.training.importance import ImportancePaths
from scripts.benchmarks.supernet_throughput import noise, trainer


class Recorded:
    """Gives recorded paths; passes on what it is told to a sampler, if there is one."""

    def __init__(self, paths: list[Path], inner: ImportancePaths | None) -> None:
        self.paths, self.inner, self.at = paths, inner, 0

    def step(self) -> list[Path]:
        self.at += 1
        return [self.paths[(self.at - 1) % len(self.paths)]]

    def observe(self, path: Path, loss: Tensor, supernet: nn.Module) -> None:
        if self.inner is not None:
            self.inner.observe(path, loss, supernet)

    def on_epoch(self, epoch: int) -> None:
        if self.inner is not None:
            self.inner.on_epoch(epoch)

    def on_phase(self, name: str) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class InOrder(ImportanceSampler):
    """Learns like an importance sampler, and gives all images in order."""

    def indices(self, epoch: int) -> Tensor:
        super().indices(epoch)
        return torch.arange(self.n)


class Plain(InOrder):
    """Gives all images in order and learns nothing."""

    def observe(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        pass


def _tensors(sampler: ImportancePaths, data: ImportanceSampler) -> int:
    held = [sampler.norms, sampler.seen, sampler.probabilities, data.running, data.seen, data.probabilities]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def _made(data: DataSet, config: TrainConfig, options: argparse.Namespace, learns: bool) -> tuple[Trainer, int]:
    """A trainer on recorded paths, and the bytes that its samplers hold."""
    made = trainer(data, config, options.device, options.cells)
    space = made.supernet.space
    generator = stream(1, "recorded paths")
    paths = [Path(space.sample(generator), "random") for _ in range(options.steps * (options.rounds + 1))]
    own = ImportancePaths(made.supernet, stream(0, "paths"), config.epochs, shared=True) if learns else None
    kind = InOrder if learns else Plain
    samples = kind(len(data.train), stream(0, "data"), config.epochs, device=options.device)
    made.path_sampler, made.data_sampler = Recorded(paths, own), samples
    return made, 0 if own is None else _tensors(own, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cells", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = noise(options.batch * options.steps)
    config = TrainConfig(
        epochs=options.rounds + 1, batch_size=options.batch, sampler="uniform", distill=0.0, warmup_epochs=0.0
    )
    plain, _ = _made(data, config, options, False)
    learning, held = _made(data, replace(config), options, True)
    times: dict[str, list[float]] = {"uniform": [], "pa-da": []}
    for index in range(options.rounds + 1):
        pairs = [("uniform", plain), ("pa-da", learning)]
        for name, one in pairs if index % 2 else reversed(pairs):
            began = time.process_time()
            one.run(until=index + 1)
            if index:
                times[name].append((time.process_time() - began) / options.steps)
    same = all(
        torch.equal(a, b) for a, b in zip(plain.supernet.parameters(), learning.supernet.parameters(), strict=True)
    )
    ratios = [b / a for a, b in zip(times["uniform"], times["pa-da"], strict=True)]
    weights = sum(p.numel() * p.element_size() for p in plain.supernet.parameters())
    result = {
        "batch": options.batch, "cells": options.cells, "rounds": options.rounds, "steps_per_round": options.steps,
        "same_weights_at_the_end": same,
        "cpu_seconds_per_step": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "ratio": round(sum(times["pa-da"]) / sum(times["uniform"]), 4), "ratio_of_each_round": [round(r, 4) for r in ratios],
        "bytes_of_the_samplers": held, "share_of_weights_gradients_momentum": round(held / (3 * weights), 6),
        "environment": environment(options.threads),
    }  # fmt: skip
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

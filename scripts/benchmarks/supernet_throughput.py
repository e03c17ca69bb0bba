"""Images per second of supernet training: NAS-Bench-201 (C=16, N=5), batch 256, uniform paths, augmentation included.

Variants of number format and memory order train the same paths, a few steps each in turn, so that the drift of the machine
meets all of them. ``seconds of CPU`` is the time that the process computed: on a machine that others use as well, the
throughput that it would have alone is at most images * threads / seconds of CPU.

Usage: ``python -m scripts.benchmarks.supernet_throughput [--threads 2] [--rounds 3] [--steps 2] [--device cuda]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from nasq.search_spaces.nas_bench_201 import nas_bench_201

from nasq import Supernet
from nasq.data import AugmentPolicy, DataSet, Split
from nasq.deploy.bench import environment
from nasq.training import TrainConfig, Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": False, "channels_last": False},
    "fp32 channels_last": {"bf16": False, "channels_last": True},
    "bf16": {"bf16": True, "channels_last": False},
    "bf16 channels_last": {"bf16": True, "channels_last": True},
    "automatic": {"bf16": "auto", "channels_last": "auto"},
}


def noise(count: int) -> DataSet:
    """Random images of CIFAR-10's shape: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)

    def part(size: int) -> Split:
        images = torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Split(images, torch.arange(size) % 10)

    return DataSet.from_splits("cifar10", [str(label) for label in range(10)], part(count), part(10), part(10))


def trainer(data: DataSet, config: TrainConfig, device: str, cells: int = 5) -> Trainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        supernet = Supernet(nas_bench_201(C=16, N=cells))
    return Trainer(supernet, data, config, device=device, augment=AugmentPolicy.for_data("cifar10"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = noise(options.batch * options.steps)
    config = TrainConfig(
        epochs=options.rounds + 1, batch_size=options.batch, sampler="uniform", distill=0.0, warmup_epochs=0.0
    )
    trainers = {name: trainer(data, replace(config, **VARIANTS[name]), options.device) for name in options.variants}
    wall: dict[str, list[float]] = {name: [] for name in trainers}
    cpu: dict[str, list[float]] = {name: [] for name in trainers}
    for index in range(options.rounds + 1):
        for name, one in trainers.items():
            began = time.process_time()
            event = one.run(until=index + 1)[-1]
            if index:  # the first round warms up
                wall[name].append(event["images_per_second"])
                cpu[name].append((time.process_time() - began) / (options.batch * options.steps))
    result = {
        "batch": options.batch, "steps": options.steps * options.rounds,
        "images_per_second": {name: statistics.median(values) for name, values in wall.items()},
        "best_images_per_second": {name: max(values) for name, values in wall.items()},
        "images_per_second_by_cpu_time": {
            name: round(options.threads / statistics.median(values), 1) for name, values in cpu.items()
        },
        "automatic": {"bf16": trainers["automatic"].bf16, "channels_last": trainers["automatic"].channels_last}
        if "automatic" in trainers else None,
        "environment": environment(options.threads),
    }  # fmt: skip
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

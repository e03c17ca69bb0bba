"""Time of a quantized training step and of calibration, as ratios to plain fp32 in one run.

ResNet-20 for CIFAR-10 (He et al. 2016, parameter-free shortcuts), batch 256, random inputs: speed does not depend on the
weights' values. As in training, quantized activations are made again in the backward pass. ``--sum-bits 8`` keeps the
residual stream at 8 bits and requantizes what convolutions read of it.
Usage: ``python -m scripts.benchmarks.quantized_step [--threads 2] [--sum-bits 8]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from nasq.search_spaces.resnet import resnet20
from torch import Tensor, nn
from torch.nn import functional as F

import nasq
from nasq.deploy.bench import environment
from nasq.quant import calibrate, quantize
from nasq.quant.recompute import recomputed


def step(model: nn.Module, x: Tensor, y: Tensor, bf16: bool, keep: bool = False) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), nullcontext() if keep else recomputed():
        loss = F.cross_entropy(model(x).float(), y)
    loss.backward()


def interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; they run in turn, so that drift of the machine cancels."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sum-bits", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain = resnet20(elastic=False).train()
    both = ("symmetric", "asymmetric")
    forms = {"weight_granularity": ("tensor", "channel"), "weight_symmetry": both, "activation_symmetry": both}
    network = quantize(plain, torch.zeros(1, 3, 32, 32), "generic", sum_bits=options.sum_bits, **forms)
    x, y = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
    began = time.perf_counter()
    calibrate(network, x)
    calibration = time.perf_counter() - began
    supernet = nasq.Supernet(network.train())
    supernet.activate(supernet.space.sample(torch.Generator().manual_seed(1)))
    last = x.contiguous(memory_format=torch.channels_last)
    times = interleaved(
        {
            "fp32": lambda: step(plain, x, y, False, keep=True),
            "quantized fp32": lambda: step(supernet, x, y, False),
            "quantized fp32, all kept": lambda: step(supernet, x, y, False, keep=True),
            "quantized fp32 channels_last": lambda: step(supernet, last, y, False),
            "quantized bf16 channels_last": lambda: step(supernet, last, y, True),
        },
        options.repeats,
    )
    result = {
        "sum_bits": options.sum_bits,
        "calibration_seconds": round(calibration, 3),
        "forms_per_weight": 7 * 4,
        "forms_per_signed_activation": 7 * 2,
        "step_seconds": {name: round(value, 4) for name, value in times.items()},
        "ratio_to_fp32": {name: round(value / times["fp32"], 3) for name, value in times.items()},
        "environment": environment(options.threads),
    }
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
